"""Sampling against the definitions of its parts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcinfer.errors import TcinferError
from tcinfer.sampler import Sampling, min_p, sample, top_p

logits_of = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=30).map(lambda x: np.array(x, np.float32))


def draws(logits: np.ndarray, how: Sampling, n: int = 2000) -> np.ndarray:
    rng = how.rng()
    return np.array([sample(logits, how, rng) for _ in range(n)])


def test_defaults_are_the_known_ones() -> None:
    assert Sampling() == Sampling(temperature=0.8, top_k=40, top_p=0.95, min_p=0.05, seed=-1)


def test_zero_temperature_takes_the_likeliest_and_the_first_of_equals() -> None:
    assert sample(np.array([0, 3, 3, 1], np.float32), Sampling(temperature=0), Sampling(seed=0).rng()) == 1


@settings(deadline=None)
@given(logits_of, st.floats(0.01, 0.999))
def test_top_p_keeps_the_fewest_that_hold_p(logits: np.ndarray, p: float) -> None:
    falling = np.sort(logits)[::-1]
    q = np.exp(falling.astype(np.float64) - falling.max())
    q /= q.sum()
    n = top_p(falling, p)
    assert q[: n - 1].sum() < p + 1e-12
    assert q[:n].sum() >= p - 1e-12


@settings(deadline=None)
@given(logits_of, st.floats(0.01, 1))
def test_min_p_keeps_what_has_a_share_of_the_likeliest(logits: np.ndarray, p: float) -> None:
    falling = np.sort(logits)[::-1]
    ratio = np.exp(falling.astype(np.float64) - falling[0])
    n = min_p(falling, p)
    assert n >= 1
    assert (ratio[:n] >= p * (1 - 1e-5)).all()
    assert (ratio[n:] <= p * (1 + 1e-5)).all()


def test_frequencies_are_the_softmax_at_the_temperature() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    how = Sampling(temperature=2.0, top_k=0, top_p=1, min_p=0, seed=1)
    want = np.sqrt([0.5, 0.3, 0.2]) / np.sqrt([0.5, 0.3, 0.2]).sum()
    got = np.bincount(draws(logits, how, 20000), minlength=3) / 20000
    np.testing.assert_allclose(got, want, atol=0.015)


def test_top_k_leaves_k() -> None:
    logits = np.arange(10, dtype=np.float32) / 10
    how = Sampling(temperature=5, top_k=3, top_p=1, min_p=0, seed=1)
    assert set(draws(logits, how).tolist()) == {7, 8, 9}


def test_the_seed_decides_and_minus_one_does_not() -> None:
    logits = np.zeros(1000, np.float32)
    flat = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    assert (draws(logits, Sampling(**flat, seed=5), 50) == draws(logits, Sampling(**flat, seed=5), 50)).all()
    assert (draws(logits, Sampling(**flat), 50) != draws(logits, Sampling(**flat), 50)).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_numbers_are_refused(bad: float) -> None:
    with pytest.raises(TcinferError, match="not finite"):
        sample(np.array([0, bad], np.float32), Sampling(), Sampling(seed=0).rng())
