"""Whole passes of the numba backend: other shapes than test_memory's, many sessions at once, any number of threads."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import SMALL, ByBytes, build, small
from test_memory import CASES, config_of, difference, feed, weights_of

from tcinfer.api import Model, Session
from tcinfer.config import PASS_TOKENS, ModelConfig
from tcinfer.engine import compiled
from tcinfer.errors import TcinferError
from tcinfer.kernels.reference.quants import Kind

IDS = np.random.default_rng(1).integers(0, SMALL.vocab_size, 60)
LENGTHS = [1, 2, 3, 5, 1, 20, 4, 1, 1]


def other_shape(name: str, **changes) -> ModelConfig:
    """A case of test_memory with heads that are no multiple of a vector, and another number of them."""
    config, head_dim = config_of(name), changes.pop("head_dim", 24)
    rope_dim = config.rope_dim and max(2, head_dim * config.rope_dim // config.head_dim // 2 * 2)
    return replace(config, **{"head_dim": head_dim, "rope_dim": rope_dim, "d_ff": 96, **changes})


@pytest.mark.parametrize("name", CASES)
def test_a_ring_of_16_bits_is_the_references(name: str) -> None:
    """The two round the same numbers, but for those in the middle where float32's last bit decides."""
    config = other_shape(name, cache_type="f16")
    want, got = (feed(build(config, b, weights_of(config)).session(), IDS, LENGTHS) for b in ("numpy", "numba"))
    assert difference(got, want) < 2e-3
    exact = feed(build(replace(config, cache_type="f32"), "numba", weights_of(config)).session(), IDS, LENGTHS)
    assert difference(got, exact) > 1e-6  # or nothing was rounded


@pytest.mark.parametrize("head_dim", [2, 8, 24, 64, 80])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (9, 1)], ids=str)
@pytest.mark.parametrize("name", ["full", "sinks-in-cache", "tensor-everything"])
def test_heads_of_any_size(name: str, heads: tuple[int, int], head_dim: int) -> None:
    n_heads, n_kv_heads = heads
    config = other_shape(name, head_dim=head_dim, n_heads=n_heads, n_kv_heads=n_kv_heads, rope_scaling="none")
    want, got = (feed(build(config, b, weights_of(config)).session(), IDS, LENGTHS) for b in ("numpy", "numba"))
    assert difference(got, want) < 1e-4


@pytest.mark.parametrize("kind", [Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q5_1], ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", ["full-qwen2-one-kv-head", "infini-delta", "tensor-everything"])
def test_models_of_packed_weights(name: str, kind: Kind) -> None:
    """Short sequences: in most no activation lies in the middle of two steps, and the answers are the same."""
    config = other_shape(name, head_dim=16, n_heads=6, n_kv_heads=2 - (name[:4] == "full"), rope_scaling="none")
    reference, compiled = (build(config, b, weights_of(config), kind) for b in ("numpy", "numba"))
    ByBytes(reference)
    differences = []
    for ids in np.resize(IDS, (12, 5)):
        want = reference.session().feed(ids, all_logits=True)
        differences += [difference(feed(compiled.session(), ids, parts), want) for parts in ([], [1, 2, 1])]
    assert np.median(differences) < 1e-4
    assert max(differences) < 5e-2


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", CASES)
def test_any_chunks_give_the_same_bits(name: str, kind: Kind) -> None:
    """Past the ends of two blocks of attention; another last bit could become a whole step of an activation."""
    config = other_shape(name, cache_type="f16")
    model, ids = build(config, "numba", weights_of(config), kind), np.resize(IDS, 290)
    wanted: list[np.ndarray] = []
    for lengths in ([256], [1] * 290, [100, 1, 1, 30, 4, 3, 1], [5, 123, 2, 1, 1, 1, 4]):
        session = model.session()
        got = [feed(session, ids, lengths), session.state.buffer]
        wanted = wanted or got
        for a, b in zip(got, wanted, strict=True):
            np.testing.assert_array_equal(a, b, str(lengths[:5]))


# Many sessions at once


def at_many_positions(model: Model, counts: list[int]) -> list[Session]:
    """Sessions that have taken so many tokens of streams of their own."""
    sessions = [model.session() for _ in counts]
    for i, (session, count) in enumerate(zip(sessions, counts, strict=True)):
        if count:
            session.feed(np.resize(IDS[i:], count))
    return sessions


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", CASES)
def test_many_sessions_at_once_are_each_alone(name: str, kind: Kind) -> None:
    """Bit for bit, wherever in its stream each of them stands."""
    config = other_shape(name)
    model = build(config, "numba", weights_of(config), kind)
    counts = [0, 1, 6, 7, 9, 30, 141, 3, 2, 11]
    together, alone = (at_many_positions(model, counts) for _ in range(2))
    for step in range(3):
        tokens = IDS[10 * step : 10 * step + 10]
        got = model.step_many(together, tokens)
        want = np.stack([session.feed(token) for session, token in zip(alone, tokens, strict=True)])
        np.testing.assert_array_equal(got, want)
    assert [s.position for s in together] == [count + 3 for count in counts]


def test_more_sessions_than_one_pass_takes(backend: str) -> None:
    model = build(replace(SMALL, memory="window", window=7), backend)
    sessions, tokens = [model.session() for _ in range(PASS_TOKENS + 20)], np.resize(IDS, PASS_TOKENS + 20)
    first, second = (model.step_many(sessions, t) for t in (tokens, tokens[::-1]))
    one = model.session()
    assert difference(first[PASS_TOKENS + 5], one.feed(tokens[PASS_TOKENS + 5])) < 1e-5
    assert difference(second[PASS_TOKENS + 5], one.feed(tokens[14])) < 1e-5
    assert np.array_equal(sessions[PASS_TOKENS + 5].logits, second[PASS_TOKENS + 5])


def test_a_token_that_one_session_cannot_take_changes_none(backend: str) -> None:
    model, other = (build(replace(SMALL, rope_dim=0), backend) for _ in range(2))
    a, b, full = (model.session() for _ in range(3))
    full.feed(np.zeros(64, int))
    for sessions, tokens, says in (
        ([a, b], [1, 50], "id 50"),
        ([a, b], [1], "one token for each"),
        ([a, b], [[1], [2]], "flat list"),
        ([a, b], [1.0, 2.0], "whole numbers"),
        ([], [], "at least one session"),
        ([a, a], [1, 2], "each session once"),
        ([a, other.session()], [1, 2], "sessions of this model"),
        ([a, full], [1, 2], "ends at token 64"),
    ):
        with pytest.raises(TcinferError, match=says):
            model.step_many(sessions, tokens)
        assert (a.position, b.position) == (0, 0)
    model.step_many([a, b], [1, 2])
    assert (a.position, b.position) == (1, 1)


# Threads


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", ["sinks-in-cache-qwen2-key-conv", "infini-delta-gqa-key-conv", "tensor-everything"])
def test_any_number_of_threads_gives_the_same_bits(name: str, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts, single tokens and many sessions; logits and states."""
    monkeypatch.setattr(compiled, "WORTH_SHARING", 0)
    config = other_shape(name, cache_type="f16", vocab_size=90)
    wanted: list[np.ndarray] = []
    for threads in (1, 2, 3, 8):
        model = build(config, "numba", weights_of(config), kind, threads)
        sessions = at_many_positions(model, [30, 1, 9])
        got = [feed(sessions[0], IDS, LENGTHS), *(model.step_many(sessions, [i, i + 1, i + 2]) for i in range(9))]
        got += [session.state.buffer for session in sessions]
        wanted = wanted or got
        for a, b in zip(got, wanted, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("sinks", [600, 1000])
def test_many_sinks_while_the_stream_is_still_among_them(sinks: int) -> None:
    """More sinks than two blocks of attention hold, a window beside them, and chunks that end before it begins."""
    changes = {"memory": "sinks", "window": 40, "sinks": sinks}
    ids = np.random.default_rng(0).integers(0, 50, sinks + 60)
    want = small("numpy", **changes).session().feed(ids, all_logits=True)
    session = small("numba", **changes).session()
    parts = np.split(ids, [5, 300, 310, 590])
    got = np.concatenate([session.feed(part, all_logits=True) for part in parts])
    assert np.abs(got - want).max() < 2e-5 * np.abs(want).max()
