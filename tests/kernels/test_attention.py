"""Compiled attention against the reference over exactly the keys that each query sees, and what it is made of."""

from __future__ import annotations

import math

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import Pass, normal
from test_reference import close

from tcinfer.kernels.cpu import attention, machine, tiles, vectors
from tcinfer.kernels.plan import FEW, ONE, PROMPT, SESSIONS, Geometry
from tcinfer.kernels.reference.attention import attention as exactly
from tcinfer.kernels.reference.quants import Kind
from tcinfer.memory.ring import Entering

F = np.float32


@st.composite
def sights(draw: st.DrawFn) -> dict:
    """What attention may be asked: shapes, window, position, and the rows of a short or a long pass."""
    window = draw(st.sampled_from([0, 1, 2, 7, 16, 40, 130, 300]))
    return {
        "D": draw(st.sampled_from([2, 8, 24, 64, 80, 128])),
        "G": draw(st.integers(1, 3)),
        "R": draw(st.sampled_from([1, 2, 3, 5, 9, 33])),
        "window": window,
        "sinks": draw(st.sampled_from([0, 1, 4, 17])) if window else 0,
        "far": bool(window) and draw(st.booleans()),
        "kind": draw(st.sampled_from([Kind.F16, Kind.F32])),
        "first": draw(st.sampled_from([0, 1, 3, 17, 130, 400]) | st.integers(0, 700)),
        "T": draw(st.integers(1, 4) | st.integers(5, 40) | st.sampled_from([64, 256])),
        "seed": draw(st.integers(0, 99)),
    }


def slot(position: int, window: int, sinks: int) -> int:
    return position if not window or position < sinks else sinks + (position - sinks) % window


def attended(D, G, R, window, sinks, far, kind, first, T, seed, spoil=None) -> tuple[np.ndarray, np.ndarray]:
    """Compiled attention over a ring and the pass's own rows, and the reference's over what each query sees."""
    stored = np.float16 if kind == Kind.F16 else F
    k, v = (normal(seed + i, first + T, G, D).astype(stored) for i in (0, 1))
    q, q_far = (3 * normal(seed + i, T, G * R, D) for i in (2, 3))
    if spoil:
        (k, v)[spoil[0]][spoil[1], -1, -1] = math.nan
    geometry, p = Geometry(G * R, G, D, window, sinks, kind == Kind.F16, False, D), Pass(T, first)
    ring = [np.full((sinks + (window or first + T), G, D), math.nan, stored) for _ in (k, v)]
    for i in range(first):
        for cache, values in zip(ring, (k, v), strict=True):
            cache[slot(i, window, sinks)] = values[i]
    new = [p.keep(values[first:].copy()) for values in (k, v)]
    rows_far = p.filled(q_far) if far else None
    entering = Entering(p.filled(q), rows_far, *new, None, None, None)
    out = p.attention(geometry, entering, 0, 1)
    if T <= attention.MOST_FEW:
        splits = attention.splits_of(geometry, first + T - 1)
        parts = p.room(attention.parts_bytes(geometry, T, splits))
        words = {"kind": ONE if T == 1 else FEW, "splits": splits, "parts": parts}
    else:
        places = attention.places(geometry, first, T)
        words = {"kind": PROMPT, "keys": places, "gathered": p.room(attention.gathered_bytes(geometry, places))}
    (got,) = p.compute(out, fields=[ring], **words)
    want = []
    for t, now in enumerate(range(first, first + T)):
        seen = [i for i in range(now + 1) if not window or i < sinks or i > now - window]
        keys_seen, values_seen = (a[seen].astype(F) for a in (k, v))
        near_sinks = sum(i < sinks for i in seen) if far else 0
        want.append(exactly(q[t : t + 1], keys_seen, values_seen, None, near_sinks, q_far[t : t + 1])[0])
    return got.reshape(T, G * R, D), np.array(want)


@settings(max_examples=150, deadline=None)
@given(sights())
def test_attention(sight: dict) -> None:
    close(*attended(**sight), 5e-6)


SIGHT = {"D": 24, "G": 2, "R": 3, "window": 40, "sinks": 4, "far": False, "kind": Kind.F16, "first": 100, "seed": 0}


@pytest.mark.parametrize(("first", "T"), [(100, 30), (125, 4)])  # long and short, both into the next block of 128
@pytest.mark.parametrize("where", [2, 90, 127, 128])
@pytest.mark.parametrize("which", [0, 1])
def test_what_is_no_number_shows_in_attention(first: int, T: int, where: int, which: int) -> None:
    """A NaN in a key or a value, for the rows that see it; the other key head's queries do not hear of it."""
    with np.errstate(invalid="ignore"):
        got, want = attended(**SIGHT | {"first": first, "T": T}, spoil=(which, where))
    seen = np.array([where < SIGHT["sinks"] or at - SIGHT["window"] < where <= at for at in range(first, first + T)])
    assert seen.any()
    assert np.isnan(want[seen, 3:, -1]).all()
    assert np.isnan(got[seen, 3:, -1]).all()
    assert np.isfinite(got[:, :3]).all()


@pytest.mark.parametrize("kind", [Kind.F16, Kind.F32], ids=lambda kind: kind.name)
def test_attention_of_many_sequences_is_that_of_each(kind: Kind) -> None:
    """One token each, at positions of their own, bit for bit."""
    G, R, D, window, sinks, firsts = 2, 3, 24, 200, 3, [0, 5, 130, 203, 1000]
    geometry = Geometry(G * R, G, D, window, sinks, kind == Kind.F16, False, D)
    stored = np.float16 if kind == Kind.F16 else F
    rings = [[normal(s + i, window + sinks, G, D).astype(stored) for i in (0, 50)] for s in range(5)]
    new = [normal(i, 5, G, D).astype(stored) for i in (7, 8)]
    q = normal(9, 5, G * R * D)

    def run(which: list[int]) -> np.ndarray:
        p = Pass(len(which), [firsts[s] for s in which])
        k, v = (p.keep(a[which]) for a in new)
        out = p.attention(geometry, Entering(p.filled(q[which]), None, k, v, None, None, None), 0, 1)
        splits = attention.splits_of(geometry, max(firsts[s] for s in which))
        parts = p.room(attention.parts_bytes(geometry, len(which), splits))
        return p.compute(out, fields=[rings[s] for s in which], kind=SESSIONS, splits=splits, parts=parts)[0]

    np.testing.assert_array_equal(run([0, 1, 2, 3, 4]), np.concatenate([run([s]) for s in range(5)]))


# What it is made of


@pytest.mark.parametrize("kind", [Kind.F16, Kind.F32], ids=lambda kind: kind.name)
def test_sixteen_keys_side_by_side(kind: Kind) -> None:
    turn = tiles.side_by_side(kind)

    @numba.njit
    def run(table, D, out):
        turn(table, D, out)

    for D in (1, 2, 8, 15, 16, 17, 24, 64, 80, 129):
        rows, out = normal(D, 16, D + 3).astype(np.float16 if kind == Kind.F16 else F), np.full((D + 31, 16), 7, F)
        table = np.array([row.ctypes.data for row in rows[::-1]])
        run(table.ctypes.data, D, out.ctypes.data)
        np.testing.assert_array_equal(out[:D], rows[::-1, :D].T.astype(F))
        assert (out[-(-D // 16) * 16 :] == 7).all()


def test_the_largest_and_the_sum_of_exponentials() -> None:
    @numba.njit
    def run(x, count, top):
        return vectors.largest(x, count), vectors.exponentials(x, count, top)

    for count in (1, 2, 15, 16, 17, 31, 100):
        x = normal(count, count + 1) - 5
        x[count] = 99  # not looked at
        largest, want = x[:count].max(), np.exp(x[:count].astype(np.float64) + 4)
        got = run(x.ctypes.data, count, F(-4))
        assert (got[0], x[count]) == (largest, 99)
        close(x[:count], want.astype(F))
        assert got[1] == pytest.approx(want.sum(), rel=1e-6)
        x[count // 2] = math.nan
        largest, total = run(x.ctypes.data, count, F(-4))
        assert not math.isnan(largest)
        assert math.isnan(total)


def test_exp_over_its_whole_range() -> None:
    @numba.njit
    def run(x, y):
        for i in range(len(x)):
            y[i] = machine.exp(x[i])

    x = np.concatenate([np.linspace(-87, 88, 100_001), normal(0, 100_000) / 10]).astype(F)
    y = np.empty_like(x)
    run(x, y)
    assert np.abs(y / np.exp(x.astype(np.float64)) - 1).max() < 2e-7
    x = np.array([0, -0.0, -88, -1e30, -math.inf, 200, math.inf, math.nan], F)
    y = np.empty_like(x)
    run(x, y)
    low, high = np.exp(-87.0), np.exp(88.0)
    np.testing.assert_allclose(y, [1, 1, low, low, low, high, high, math.nan], rtol=2e-7)
