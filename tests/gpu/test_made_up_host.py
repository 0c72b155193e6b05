"""The architectures on the stand-in: what they have beside a Llama's operators, in a token's launch and in others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import but_slow
from host_device import backend, device  # noqa: F401
from made_up import MODELS, write

import tcinfer

IDS = np.random.default_rng(1).integers(0, 280, 26)  # three windows of 8
SLOW = ("gemma3-every", "gemma3-list", "qwen3", "smollm3")


@pytest.mark.parametrize("name", but_slow(("gemma3", "phi3-long", *SLOW), *SLOW))
def test_logits_are_the_references(name: str, backend: str, tmp_path: Path) -> None:  # noqa: F811
    path = write(MODELS[name], tmp_path / "model.gguf")
    want, at_once, singly = (tcinfer.load(path, b, cache_type="f32").session() for b in ("numpy", backend, backend))
    logits = want.feed(IDS, all_logits=True)
    for got in (at_once.feed(IDS, all_logits=True), np.stack([singly.feed(int(i)) for i in IDS])):
        assert np.abs(got - logits).max() < 1e-5 * np.abs(logits).max()
