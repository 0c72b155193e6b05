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
    texts = []
    for path in (ours, gguf):
        session = tcinfer.load(path, backend=backend).session()
        texts.append([p.id for p in session.generate(STORY, max_tokens=200, temperature=0)])
        peer = llama(path, n_ctx=512)
        ids = peer.tokenize(STORY.encode())
        assert ids == session.model.tokenizer.encode(STORY, bos=True)
        texts.append(greedy(peer, ids, 200))
    assert len(texts[0]) == 200
    assert all(text == texts[0] for text in texts)


@pytest.fixture(scope="module")
def passage() -> str:
    return shared("data", "books", "valid", "Jane_Austen__Persuasion.txt").read_text()[5000:8000]


@pytest.fixture(scope="module")
def reference(passage: str) -> tuple[list[int], np.ndarray]:
    """400 ids of text and their float32 logits from NumPy."""
    model = tcinfer.load(smollm2(), backend="numpy")
    ids = model.tokenizer.encode(passage)[:400]
    return ids, model.session().feed(ids, all_logits=True)


def test_smollm2_logits_against_llama_cpp(reference, passage: str) -> None:
    ids, ours = reference
    peer = llama(smollm2(), n_ctx=512, n_batch=512, logits_all=True)
    assert peer.tokenize(passage.encode(), add_bos=False, special=False)[:400] == ids
    peer.eval(ids)
    theirs = np.array(peer.scores[:400])
    cosine = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    top1 = (ours.argmax(1) == theirs.argmax(1)).mean()
    print(f"top-1 agreement {top1:.4f}, median cosine {np.median(cosine):.6f}")
    assert top1 >= 0.94
    assert np.median(cosine) >= 0.999


def test_smollm2_numba_against_the_reference_at_once_and_one_by_one(reference) -> None:
    """Activations in bytes cost a little, which 30 layers show as such cosines; how tokens are fed costs nothing."""
    ids, want = reference
    model = tcinfer.load(smollm2(), backend="numba")
    got = model.session().feed(ids[:128], all_logits=True)
    cosine = (got * want[:128]).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(want[:128], axis=1)
    top1 = (got.argmax(1) == want[:128].argmax(1)).mean()
    print(f"top-1 agreement {top1:.4f}, median cosine {np.median(cosine):.6f}, least {cosine.min():.6f}")
    assert top1 >= 0.93
    assert np.median(cosine) >= 0.9997
    session = model.session()
    np.testing.assert_array_equal(np.stack([session.feed(i) for i in ids[:64]]), got[:64])


def test_smollm2_sinks_hold_far_beyond_the_window(reference) -> None:
    """StreamingLLM's promise: with sinks, a plain model goes on sensibly past its window; without, it does not."""
    ids, _ = reference

    def nll(memory: str) -> float:
        logits = tcinfer.load(smollm2(), memory=memory, window=64).session().feed(ids, all_logits=True)
        rows = logits[100:-1].astype(np.float64)
        log_sum = np.log(np.exp(rows - rows.max(1, keepdims=True)).sum(1)) + rows.max(1)
        return float((log_sum - rows[np.arange(len(rows)), ids[101:]]).mean())

    assert nll("sinks") < nll("window") - 1


def test_tokenizer_of_smollm2_against_llama_cpp() -> None:
    peer = llama(smollm2(), vocab_only=True)
    tokenizer = tcinfer.load(smollm2()).tokenizer
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
