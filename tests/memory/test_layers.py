"""Layers that differ: memories, windows, rotations and heads of their own, beside the float64 oracle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import oracle
import pytest
from conftest import SMALL, build, random_weights
from test_cli import write_model
from test_memory import IDS, TOLERANCE, difference

import tcinfer
from tcinfer.config import ModelConfig
from tcinfer.gguf import schema
from tcinfer.measure.file import facts, report
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


SHOWN = {
    "heads": ("2 of 8 channels, 2 of keys and values in layer 1", "32 in the feed-forward in layer 1"),
    "memory in the middle": ("tensor in layer 1", "7 tokens in layer 1", "2, positions stored in layer 0"),
    "every memory": ("infini in layer 1", "none in layer 2", "2 taps in layer 0"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_file_of_such_layers(name: str, backend: str, tmp_path: Path) -> None:
    """Written, opened, run, and its session kept and gone on with."""
    config = config_of(name)
    path = write_model(tmp_path / "m.gguf", arch="tcllama", n_layers=3, **CASES[name])
    model = tcinfer.load(path, backend=backend, cache_type="f32")
    assert replace(model.config, norm_eps=config.norm_eps) == config  # a file has 32 bits of it
    session = model.session()
    got = session.feed(IDS, all_logits=True)
    assert difference(got, oracle.logits(config, random_weights(config), IDS)) < TOLERANCE[backend]
    session.save(tmp_path / "s.tcs")
    np.testing.assert_array_equal(model.load_session(tmp_path / "s.tcs").feed(3), session.feed(3))


@pytest.mark.parametrize("name", SHOWN)
def test_inspect_shows_such_layers(name: str, tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", arch="tcllama", n_layers=3, **CASES[name])
    found, config = facts(path), config_of(name)
    told = [(layer["memory"], layer["window"], layer["n_kv_heads"]) for layer in found["layers"]]
    assert told == [(layer.memory, layer.window, layer.n_kv_heads) for layer in config.layers]
    text = " ".join(report(found).split())
    for part in SHOWN[name]:
        assert part in text


@pytest.mark.parametrize("heads", [(4, 2, 1), (1, 1, 2)])
def test_a_plain_file_whose_heads_differ(heads: tuple[int, ...], backend: str, tmp_path: Path) -> None:
    changes = {"arch": "llama", "n_layers": 3, "n_kv_heads": heads, "d_ff": (64, 32, 96)}
    path = write_model(tmp_path / "m.gguf", **changes)
    config = replace(SMALL, **changes)
    got = tcinfer.load(path, backend=backend, cache_type="f32").session().feed(IDS, all_logits=True)
    assert difference(got, oracle.logits(config, random_weights(config), IDS)) < TOLERANCE[backend]
