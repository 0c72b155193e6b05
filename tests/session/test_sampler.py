"""Options, draws and the choice of a token; the filters themselves are in test_filters.py."""

from __future__ import annotations

import math
import time
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from conftest import SHAKESPEARE, smollm2
from hypothesis import given, settings
from hypothesis import strategies as st

import tcinfer
from tcinfer.errors import TcinferError
from tcinfer.sampling import filters
from tcinfer.sampling.choose import Draws, Sampling, breaker_ids, sample
from tcinfer.tokenizer import Tokenizer, from_metadata

FLAT = Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=1)  # the softmax itself


def picks(logits: np.ndarray, how: Sampling, n: int = 2000, **more: Any) -> np.ndarray:
    draws = Draws.of(how)
    return np.array([sample(logits, how, draws, **more) for _ in range(n)])


def shares(logits: np.ndarray, how: Sampling, n: int = 20_000) -> np.ndarray:
    return np.bincount(picks(logits, how, n), minlength=len(logits)) / n


def log(*p: float) -> np.ndarray:
    return np.log(np.array(p)).astype(np.float32)


def test_defaults_are_the_known_ones() -> None:
    assert Sampling() == Sampling(
        temperature=0.8,
        dynatemp_range=0.0,
        dynatemp_exponent=1.0,
        top_k=40,
        top_p=0.95,
        min_p=0.05,
        typical=1.0,
        top_n_sigma=-1.0,
        xtc_probability=0.0,
        xtc_threshold=0.1,
        dry_multiplier=0.0,
        dry_base=1.75,
        dry_allowed_length=2,
        dry_penalty_last_n=-1,
        dry_sequence_breakers=("\n", ":", '"', "*"),
        mirostat=0,
        mirostat_tau=5.0,
        mirostat_eta=0.1,
        repeat_last_n=64,
        repeat_penalty=1.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        logit_bias=(),
        samplers="penalties;dry;top_n_sigma;top_k;typ_p;top_p;min_p;xtc;temperature",
        seed=-1,
    )


def test_every_option_says_what_a_command_line_needs() -> None:
    told = [f.metadata for f in fields(Sampling)]
    flags = [flag for metadata in told for flag in metadata["flags"]]
    assert len(set(flags)) == len(flags)
    assert all(flag.startswith("-") for flag in flags)
    assert all(metadata["metavar"] and metadata["help"].endswith(".") for metadata in told)


WRONG: dict[str, list[Any]] = {
    "temperature": [-0.1],
    "dynatemp_range": [-1],
    "dynatemp_exponent": [-1],
    "top_k": [-1, 1.5, 2**63],
    "top_p": [-0.1, 1.1],
    "min_p": [-0.1, 1.1],
    "typical": [-0.1, 1.1],
    "xtc_probability": [-0.1, 1.1],
    "xtc_threshold": [-0.1, 1.1],
    "dry_multiplier": [-1],
    "dry_base": [0.9],
    "dry_allowed_length": [0, 1.5, 2**63],
    "dry_penalty_last_n": [-2, 1.5, 2**63],
    "dry_sequence_breakers": [("",), (1,), 5, ("a", None)],
    "mirostat": [1, 3, 2.5, 2**63],
    "mirostat_tau": [-1],
    "mirostat_eta": [-1],
    "repeat_last_n": [-2, 1.5, 2**63],
    "repeat_penalty": [0, -1, 1e-310],
    "logit_bias": [5, [1, 2], [(1,)], "1+2", {"1": 2}, {-1: 2}, {True: 1}, {1: "x"}, {1: math.inf}, {2**63: 1}],
    "samplers": ["top_q", "top_k;", "top_k,top_p", "top_k;top_k", 5, ["top_k"]],
    "seed": [-2, 2**64, 1.5],
}


@pytest.mark.parametrize("name", [f.name for f in fields(Sampling)])
def test_options_that_cannot_be_are_refused(name: str) -> None:
    numbers = not isinstance(getattr(Sampling, name), str | tuple)
    for value in [*WRONG.get(name, []), *([math.nan, math.inf, -math.inf, True, "1", None] if numbers else [None])]:
        with pytest.raises(TcinferError) as e:
            Sampling(**{name: value})
        assert "\n" not in str(e.value)
        assert name in str(e.value)


def test_unknown_samplers_are_told_the_known_ones() -> None:
    with pytest.raises(TcinferError, match=r"no 'top_a'; there are penalties, dry, .*temperature"):
        Sampling(samplers="top_k;top_a")


def test_biases_and_breakers_come_in_several_forms() -> None:
    want = ((1, 0.5), (3, -math.inf))
    assert Sampling(logit_bias={3: -math.inf, 1: 0.5}).logit_bias == want
    assert Sampling(logit_bias=[(1, 1), (3, -math.inf), (1, -0.5)]).logit_bias == want
    assert Sampling(dry_sequence_breakers=["a", "b"]).dry_sequence_breakers == ("a", "b")
    assert hash(Sampling(logit_bias={1: 1.0})) == hash(Sampling(logit_bias=((1, 1.0),)))


# The choice


def test_zero_temperature_takes_the_likeliest_and_the_first_of_equals() -> None:
    logits = np.array([0, 3, 3, 1], np.float32)
    greedy = Sampling(temperature=0, seed=0)
    assert sample(logits, greedy, Draws.of(greedy)) == 1
    assert sample(logits, replace(greedy, logit_bias={2: 0.1}), Draws.of(greedy)) == 2
    assert sample(logits, greedy, Draws.of(greedy), allowed=np.array([True, False, False, True])) == 3
    penalised = replace(greedy, presence_penalty=1.0)
    assert sample(logits, penalised, Draws.of(greedy), [1, 2]) == 1
    assert sample(logits, replace(penalised, presence_penalty=5.0), Draws.of(greedy), [1, 2]) == 3
    dry = replace(greedy, dry_multiplier=9.0, dry_allowed_length=1)
    assert sample(logits, dry, Draws.of(greedy), [0, 1, 0]) == 2
    others = replace(greedy, xtc_probability=1.0, typical=0.1, mirostat=2, samplers="xtc;typ_p")
    assert sample(logits, others, Draws.of(greedy)) == 1


def test_zero_temperature_draws_nothing() -> None:
    draws = Draws.of(Sampling(seed=1))
    before = draws.words()
    sample(np.zeros(5, np.float32), Sampling(temperature=0), draws)
    assert draws.words() == before


def test_frequencies_are_the_softmax_at_the_temperature() -> None:
    want = np.sqrt([0.5, 0.3, 0.2]) / np.sqrt([0.5, 0.3, 0.2]).sum()
    np.testing.assert_allclose(shares(log(0.5, 0.3, 0.2), replace(FLAT, temperature=2.0)), want, atol=0.015)


def test_frequencies_after_other_options() -> None:
    logits = log(0.4, 0.3, 0.2, 0.1)
    for how, want in (
        (replace(FLAT, top_k=2), [4 / 7, 3 / 7, 0, 0]),
        (replace(FLAT, logit_bias=((0, -math.inf), (3, math.log(2)))), [0, 3 / 7, 2 / 7, 2 / 7]),
        (replace(FLAT, xtc_probability=0.5, xtc_threshold=0.25), [0.2, 0.15 + 0.25, 0.1 + 1 / 6, 0.05 + 1 / 12]),
        (replace(FLAT, samplers="", temperature=0.1), [0.4, 0.3, 0.2, 0.1]),
    ):
        np.testing.assert_allclose(shares(logits, how), want, atol=0.015)


def test_top_k_leaves_k() -> None:
    logits = np.arange(10, dtype=np.float32) / 10
    how = Sampling(temperature=5, top_k=3, top_p=1, min_p=0, seed=1)
    assert set(picks(logits, how).tolist()) == {7, 8, 9}


def test_samplers_run_in_their_order() -> None:
    """0.35 of the two likeliest is one of them; of the four it would be two."""
    logits = log(0.3, 0.27, 0.23, 0.2)
    how = replace(FLAT, top_k=2, top_p=0.35)
    assert set(picks(logits, replace(how, samplers="top_k;top_p"), 100)) == {0}
    assert set(picks(logits, replace(how, samplers="top_p;top_k"), 100)) == {0, 1}
    assert set(picks(logits, replace(how, samplers="top_p"), 100)) == {0, 1}
    assert set(picks(logits, replace(how, samplers="temperature"), 100)) == {0, 1, 2, 3}
    penalised = replace(how, presence_penalty=9.0, samplers="top_k;penalties")
    assert set(picks(logits, penalised, 100, recent=[0])) == {1}
    assert set(picks(logits, replace(penalised, samplers="penalties;top_k"), 100, recent=[0])) == {1, 2}


def test_how_many_tokens_are_looked_back() -> None:
    logits, recent = np.zeros(4, np.float32), [0, 1, 2]
    how = replace(FLAT, presence_penalty=99.0)
    for last, want in ((64, {3}), (2, {0, 3}), (1, {0, 1, 3}), (0, {0, 1, 2, 3}), (-1, {3})):
        assert set(picks(logits, replace(how, repeat_last_n=last), 100, recent=recent)) == want
    dry = replace(FLAT, dry_multiplier=99.0, dry_allowed_length=1)
    for last, want in ((-1, {0, 2, 3}), (2, {0, 1, 2, 3}), (0, {0, 1, 2, 3})):
        assert set(picks(logits, replace(dry, dry_penalty_last_n=last), 100, recent=[0, 1, 0])) == want
    breaks = np.array([True, False, False, False])
    assert set(picks(logits, dry, 100, recent=[0, 1, 0], breaks=breaks)) == {0, 1, 2, 3}


def test_the_seed_decides_and_minus_one_does_not() -> None:
    logits = np.zeros(1000, np.float32)
    assert (picks(logits, replace(FLAT, seed=5), 50) == picks(logits, replace(FLAT, seed=5), 50)).all()
    assert (picks(logits, replace(FLAT, seed=-1), 50) != picks(logits, replace(FLAT, seed=-1), 50)).any()
    largest = replace(FLAT, seed=2**64 - 1)
    assert (picks(logits, largest, 50) == picks(logits, largest, 50)).all()


def test_the_same_ids_on_every_machine() -> None:
    logits = (np.arange(49152) * 7919 % 10007 / 1000).astype(np.float32)  # each value several times
    assert picks(logits, Sampling(seed=1), 8).tolist() == [44188, 18327, 2080, 18327, 13127, 14167, 17287, 4160]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_numbers_are_refused(bad: float) -> None:
    with pytest.raises(TcinferError, match="not finite"):
        sample(np.array([0, bad], np.float32), Sampling(), Draws.of(Sampling(seed=0)))


def test_only_what_is_allowed_comes_up() -> None:
    logits = np.array([9, 1, 8, 1], np.float32)
    allowed = np.array([False, True, False, True])
    for how in (FLAT, Sampling(seed=1), replace(FLAT, mirostat=2), Sampling(repeat_penalty=1.1, dry_multiplier=1.0)):
        assert set(picks(logits, how, 100, allowed=allowed, recent=[0, 1, 0])) == {1, 3}
    never = replace(FLAT, logit_bias=((1, -math.inf),))
    assert set(picks(logits, never, 100, allowed=allowed)) == {3}
    assert allowed.tolist() == [False, True, False, True]


def test_nothing_allowed_and_ids_that_are_none() -> None:
    draws, logits = Draws.of(FLAT), np.zeros(2, np.float32)
    with pytest.raises(TcinferError, match="no token may come next"):
        sample(logits, FLAT, draws, allowed=np.zeros(2, bool))
    with pytest.raises(TcinferError, match="no token may come next"):
        sample(logits, replace(FLAT, logit_bias=((0, -math.inf), (1, -math.inf))), draws)
    with pytest.raises(TcinferError, match="logit_bias: id 2 is outside the vocabulary of 2"):
        sample(logits, replace(FLAT, logit_bias=((2, 1.0),)), draws)


@settings(deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=12),
    st.sampled_from([0.0, 1e-310, 0.8, 3e38]),
    st.permutations(list(filters.CHAIN)),
    st.sampled_from([0, 2]),
)
def test_any_logits_in_any_order(logits: list[float], temperature: float, order: list[str], mirostat: int) -> None:
    how = Sampling(
        temperature=temperature,
        dynatemp_range=0.5,
        typical=0.9,
        top_n_sigma=2.0,
        xtc_probability=0.5,
        dry_multiplier=1e38,
        dry_allowed_length=1,
        repeat_penalty=1e38,
        frequency_penalty=-3e38,
        samplers=";".join(order),
        mirostat=mirostat,
        seed=1,
    )
    draws = Draws.of(how)
    for _ in range(3):
        assert 0 <= sample(np.array(logits, np.float32), how, draws, [0, 0, 0]) < len(logits)


# The choice among many


def plain(logits: np.ndarray, how: Sampling, draws: Draws, allowed: np.ndarray) -> int:
    """Top-k, top-p, min-p and the temperature by their definition: everything sorted first."""
    ids = np.flatnonzero(allowed)
    ids = ids[np.lexsort((ids, -logits[ids]))][: how.top_k or None]
    z = logits[ids].astype(np.float64)
    if how.top_p < 1:
        held = np.cumsum(filters.probabilities(z))
        z = z[: np.searchsorted(held, how.top_p) + 1]
    if how.min_p > 0:
        z = z[z - z[0] >= math.log(how.min_p)]
    reached = np.cumsum(filters.probabilities(z / how.temperature))
    return int(ids[np.searchsorted(reached, draws.rng.random() * reached[-1], side="right")])


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([2, 100, 8192, 10_000, 30_000]),
    st.integers(0, 99),
    st.sampled_from([0.5, 3.0, 20.0]),
    st.booleans(),
    st.sampled_from([0.0, 0.01, 0.9]),
    st.sampled_from([0, 1, 40, 1000]),
    st.sampled_from([0.5, 0.95, 1.0]),
    st.sampled_from([0.0, 0.05]),
)
def test_the_choice_is_that_of_a_full_sort(
    V: int, seed: int, spread: float, ties: bool, banned: float, k: int, p: float, min_p: float
) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, spread, V).astype(np.float32)
    logits = np.round(logits) if ties else logits
    allowed = rng.random(V) >= banned
    allowed[0], never = True, V - 1
    how = Sampling(top_k=k, top_p=p, min_p=min_p, seed=seed)
    draws, same = Draws.of(how), Draws.of(how)
    for _ in range(3):
        assert sample(logits, how, draws, allowed=allowed if banned else None) == plain(logits, how, same, allowed)
    left = allowed & (np.arange(V) != never)
    how = replace(how, logit_bias={never: -math.inf})
    assert sample(logits, how, draws, allowed=allowed if banned else None) == plain(logits, how, same, left)


@pytest.mark.parametrize("how", [Sampling(), Sampling(repeat_penalty=1.1), Sampling(top_k=0)], ids=str)
def test_few_of_many_are_sorted(how: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    V = 262_144
    logits = np.random.default_rng(0).normal(0, 3, V).astype(np.float32)
    logits[7] = 24  # as in a text: the likeliest holds much
    handled = []
    for name in ("sort", "argsort", "partition", "lexsort", "cumsum", "unique"):
        monkeypatch.setattr(np, name, counting(getattr(np, name), handled))
    sample(logits, how, Draws.of(how), np.arange(64))
    assert 0 < sum(handled) < V / 100


def counting(function: Any, handled: list[int]) -> Any:
    """A function of an array that also notes its size."""

    def counted(array: Any, *arguments: Any, **options: Any) -> Any:
        handled.append(np.size(array))
        return function(array, *arguments, **options)

    return counted


# Mirostat


def test_mirostat_learns_from_each_surprise() -> None:
    p, how = (0.5, 0.25, 0.125, 0.125), replace(FLAT, mirostat=2, mirostat_tau=1.25, mirostat_eta=0.5)
    draws, mu = Draws.of(how), 2.5  # 2 tau
    for _ in range(50):
        kept = [x for x in p if -math.log2(x) <= mu] or [p[0]]
        chosen = sample(log(*p), how, draws)
        surprise = -math.log2(p[chosen] / sum(kept))
        mu -= 0.5 * (surprise - 1.25)
        assert draws.mu == pytest.approx(mu, abs=1e-5)


def test_mirostat_finds_the_surprise_it_aims_at() -> None:
    logits = np.random.default_rng(0).normal(0, 3, 500).astype(np.float32)
    how = Sampling(mirostat=2, mirostat_tau=2.0, temperature=1.0, seed=1)
    draws = Draws.of(how)
    for _ in range(200):
        sample(logits, how, draws)
    assert draws.mu is not None
    kept = filters.mirostat(filters.Candidates(np.arange(500), logits), draws.mu)
    p = filters.probabilities(kept.logits)
    assert -(p * np.log2(p)).sum() == pytest.approx(2.0, abs=0.3)


def test_mirostat_runs_without_the_chain_but_with_bias_and_temperature() -> None:
    logits = log(0.4, 0.3, 0.2, 0.1)
    how = replace(FLAT, mirostat=2, mirostat_eta=0.0, mirostat_tau=50.0, top_k=1, presence_penalty=99.0)
    assert set(picks(logits, how, 300, recent=[0, 1, 2, 3])) == {0, 1, 2, 3}
    assert set(picks(logits, replace(how, temperature=0.01), 300)) == {0}
    assert set(picks(logits, replace(how, logit_bias=((0, -math.inf),)), 300)) == {1, 2, 3}


# Draws


def test_draws_go_on_from_their_words() -> None:
    logits = np.random.default_rng(0).normal(0, 3, 100).astype(np.float32)
    for how in (FLAT, replace(FLAT, mirostat=2)):
        draws = Draws.of(how)
        for steps in range(3):
            words = draws.words()
            assert len(words) == 7
            assert all(0 <= word < 2**64 for word in words)
            again = [Draws.from_words(words), Draws.from_words(np.array(words, np.uint64)), draws.copy(), draws]
            assert len({tuple(sample(logits, how, each) for _ in range(20)) for each in again}) == 1, steps
            assert len({each.words() for each in again}) == 1
            assert again[0].mu == draws.mu
    draws.rng.integers(0, 2**31, dtype=np.uint32)  # leaves half a word behind
    assert Draws.from_words(draws.words()).words() == draws.words()


def test_words_that_are_no_draws_are_refused() -> None:
    words = Draws.of(FLAT).words()
    for at, value in (
        (3, words[3] - 1),
        (4, 2),
        (5, 2**32),
        (6, 0x7FF0 << 48),
        (0, -1),
        (1, 2**64),
        (2, 0.5),
        (3, "x"),
    ):
        with pytest.raises(TcinferError, match="random generator"):
            Draws.from_words([*words[:at], value, *words[at + 1 :]])
    for wrong in (words[:6], (*words, 0), (), None, 5, "abcdefg"):
        with pytest.raises(TcinferError, match="random generator"):
            Draws.from_words(wrong)


# Sequence breakers


def test_breakers_are_tokens_that_hold_one_of_the_texts() -> None:
    model = tcinfer.load(SHAKESPEARE)
    tokenizer, rows = model.tokenizer, model.config.vocab_size
    breaks = breaker_ids(
        tokenizer,
        (
            "\n",
            ":",
            "xyz",
        ),
        rows + 5,
    )
    assert breaks.tolist() == [i < rows and tokenizer.decode([i]) in ("\n", ":") for i in range(rows + 5)]
    assert not breaker_ids(tokenizer, (), rows).any()
    assert breaker_ids(tokenizer, ("\n",), 1).tolist() == [True]
    assert not breaker_ids(from_metadata({}, 9), ("\n",), 9).any()  # a file without a tokenizer


def test_breakers_where_tokens_have_no_bytes_of_their_own() -> None:
    class Words(Tokenizer):
        def _bytes(self, token: int) -> bytes:
            return Tokenizer._bytes(self, token)  # raises

        def decode(self, ids: Any) -> str:
            return ["a", "b:", "c"][next(iter(ids))]

    assert breaker_ids(
        Words({}, 3, 4),
        (
            ":",
            "\n",
        ),
        4,
    ).tolist() == [False, True, False, False]


def test_breakers_of_a_large_vocabulary() -> None:
    tokenizer = tcinfer.load(smollm2()).tokenizer
    start = time.perf_counter()
    breaks = breaker_ids(tokenizer, Sampling.dry_sequence_breakers, tokenizer.vocab_size)
    assert time.perf_counter() - start < 1  # 0.02 s
    found = {tokenizer.token_bytes(int(i)) for i in np.flatnonzero(breaks)}
    assert {b"\n", b"\n\n", b":", b'."'} <= found
    assert all(any(c in piece for c in b'\n:"*') for piece in found)
