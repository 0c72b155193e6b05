"""Against llama.cpp on the same files, and against plain arithmetic on the same weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import shared, smollm2

import tcinfer
from tcinfer import converters

pytestmark = pytest.mark.peer
STORY = "Once upon a time"


def llama(path: Path, **options):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra `peer`)")
    return llama_cpp.Llama(str(path), verbose=False, n_threads=2, **options)


def greedy(peer, ids: list[int], count: int) -> list[int]:
    out = []
    for token in peer.generate(ids, temp=0, top_k=1, repeat_penalty=1.0):
        if token == peer.token_eos() or len(out) == count:
            break
        out.append(token)
    return out


def test_stories260k_from_safetensors_from_gguf_and_by_llama_cpp(tmp_path: Path, backend: str) -> None:
    folder, gguf = shared("models", "stories260K"), shared("models", "stories260K", "stories260K-f32.gguf")
    ours = tmp_path / "stories.gguf"
    converters.convert(folder, ours, "f32", folder / "tok512.bin")
    texts = [
        "Hello, World! 12345 67",
        "  two  spaces\n\n\ttabs",
        "naïve café 🦙 日本語",
        "don't <|im_start|> I'LL we're",
        "<|im_start|>user\nhi<|im_end|>\n",
    ]
    for text in texts:
        for special in (False, True):
            want = peer.tokenize(text.encode(), add_bos=False, special=special)
            assert tokenizer.encode(text, special=special) == want
