"""Layers that differ: memories, windows, rotations and heads of their own, beside the float64 oracle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import oracle
import pytest
from conftest import SMALL, build, random_weights
from test_memory import IDS, TOLERANCE, difference

from tcinfer import format as schema
from tcinfer.config import ModelConfig
from tcinfer.memory import infini, layout, tensor_cache

CACHE, INFINI = tensor_cache.Options(write_on_insert=True), infini.Options("linear")
CASES = {
    "windows": {"memory": ("window", "full", "window"), "window": (3, 0, 9)},
    "bases": {"rope_base": (10000.0, 500.0, 10000.0), "memory": "window", "window": (7, 7, 4)},
    "a layer without rotation": {"rope_dim": (8, 0, 8)},
    "scaled in one": {"rope_scaling": ("none", "linear", "none"), "rope_factor": (1.0, 4.0, 1.0)},
    "heads": {"n_heads": (4, 2, 4), "n_kv_heads": (4, 2, 1), "d_ff": (64, 32, 96)},
    "memory in the middle": {
        "memory": ("sinks", "tensor", "window"),
        "window": (5, 7, 3),
        "sinks": (2, 3, 0),
        "options": (None, CACHE, None),
    },
    "every memory": {
        "memory": ("tensor", "infini", "full"),
        "window": (7, 4, 0),
        "options": (replace(CACHE, rope=False), INFINI, None),
        "key_conv": (2, 0, 0),
        "rope_base": (10000.0, 1000.0, 100.0),
    },
}


def config_of(name: str) -> ModelConfig:
    return replace(SMALL, arch="tcllama", n_layers=3, **CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_logits_are_the_oracles_in_any_chunks(name: str, backend: str) -> None:
    config = config_of(name)
    weights = random_weights(config)
    want = oracle.logits(config, weights, IDS)
    model = build(config, backend, weights)
    for lengths in ([len(IDS)], [1] * len(IDS), [5, 1, 20, 2, 20]):
        session = model.session()
        got = [session.feed(part, all_logits=True) for part in np.split(IDS, np.cumsum(lengths)[:-1])]
        assert difference(np.concatenate(got), want) < TOLERANCE[backend], lengths


@pytest.mark.parametrize("name", CASES)
def test_a_session_goes_on_from_its_file(name: str, tmp_path: Path) -> None:
    model = build(config_of(name), "numba")
    session = model.session()
    session.feed(IDS[:30])
    session.save(tmp_path / "s.tcs")
    again = model.load_session(tmp_path / "s.tcs")
    np.testing.assert_array_equal(again.feed(IDS[30:]), session.feed(IDS[30:]))
    assert session.nbytes == layout(model.config, 256).nbytes


@pytest.mark.parametrize("name", CASES)
def test_a_file_says_what_each_layer_is(name: str) -> None:
    """As arrays, one value a layer, and no array where layers are alike."""
    config = replace(config_of(name), cache_type="f16", name="made up")
    keys = schema.to_metadata(config)
    assert schema.from_metadata(keys, config.vocab_size, 99) == config
    lists = {key.rsplit(".", 1)[1] for key, value in keys.items() if type(value) is list}
    assert ("sliding_window" in lists) == (type(config.window) is tuple)
