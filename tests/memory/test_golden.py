"""The published trainer's checkpoints: converted, they give the authors' logits and memory states."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import SHARED, shared

from tcinfer.loader import load

NAMES = sorted(path.parent.name for path in SHARED.glob("golden/*/golden.npz"))
LIMIT = {"numpy": 2e-5, "numba": 1e-4, "cuda": 1e-4}  # of max |difference| / max |logit|
FEEDS = {"at once": [96], "ragged": [1, 3, 17, 2, 30, 5, 16, 22], "one by one": [1] * 96}


@pytest.mark.skipif(not NAMES, reason="../shared/golden is not here")
@pytest.mark.parametrize("feed", FEEDS)
@pytest.mark.parametrize("name", NAMES)
def test_golden(name: str, feed: str, backend: str, convert_golden) -> None:
    golden = np.load(shared("golden", name, "golden.npz"))
    model = load(convert_golden(name), backend=backend, cache_type="f32")
    session = model.session()
    parts = np.split(golden["tokens"], np.cumsum(FEEDS[feed])[:-1])
    logits = np.concatenate([session.feed(part, all_logits=True) for part in parts])
    assert relative(logits, golden["logits"]) < LIMIT[backend]
    for key in golden.files:
        if "." in key:
            memory, layer = key.split(".")
            state = session.state.on_host().layers[int(layer)]
            assert relative(memory_of(state, memory, golden[key].shape), golden[key]) < LIMIT[backend]


@pytest.mark.skipif(not NAMES, reason="../shared/golden is not here")
@pytest.mark.parametrize("name", NAMES)
def test_golden_with_keys_and_values_in_half(name: str, backend: str, convert_golden) -> None:
    golden = np.load(shared("golden", name, "golden.npz"))
    logits = load(convert_golden(name), backend=backend).session().feed(golden["tokens"], all_logits=True)
    error = relative(logits, golden["logits"])
    assert 0 < error < 5e-3


def memory_of(state: dict[str, np.ndarray], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A layer's memory in the golden files' shape: A0 is the fast one, A1 the slow; [H, D, D] or [H, S, D, D]."""
    if not name.startswith("A"):
        return state[name].reshape(shape)
    planes = state["A"].reshape(-1, shape[1] if len(shape) == 4 else 1, *state["A"].shape[1:])
    return planes[int(name[1:])].swapaxes(0, 1).reshape(shape)


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())
