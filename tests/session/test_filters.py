"""Every filter against its published definition, written out slowly; and against llama.cpp's."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from conftest import smollm2
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import tcinfer
from tcinfer.sampling import filters
from tcinfer.sampling.choose import Sampling, breaker_ids
from tcinfer.sampling.filters import CHAIN, Candidates, Context

unhurried = settings(deadline=None)
NEAR = 1e-9  # what rounding may decide either way
floats = st.floats(-20, 20, width=32) | st.sampled_from([0.0, -0.0, 1.0, -1.0])  # ties are frequent
logits_of = st.lists(floats, min_size=1, max_size=30).map(lambda x: np.array(x, np.float32))
any_logits = st.lists(
    st.floats(width=32, allow_nan=False, allow_infinity=False) | st.sampled_from([0.0, -0.0, 1e30, -1e30]),
    min_size=1,
    max_size=30,
).map(lambda x: np.array(x, np.float32))
tokens_of = st.lists(st.integers(0, 4), max_size=40)


def candidates(logits: np.ndarray, falling: bool = False) -> Candidates:
    c = Candidates(np.arange(len(logits)), logits)
    return c.by_logit() if falling else c


def ranked(logits: np.ndarray) -> list[int]:
    """Positions from the likeliest on, of equal ones the lowest first."""
    return sorted(range(len(logits)), key=lambda i: (-logits[i], i))


def softmax(logits: np.ndarray) -> list[float]:
    most = max(map(float, logits))
    e = [math.exp(float(x) - most) for x in logits]
    return [x / math.fsum(e) for x in e]


def entropy(p: list[float]) -> float:
    return -math.fsum(x * math.log(x) for x in p if x)


def fewest(order: list[int], p: list[float], mass: float) -> list[int]:
    """The first of `order` that hold `mass`; not decided where rounding would decide it."""
    total = 0.0
    for n, i in enumerate(order):
        total += p[i]
        assume(abs(total - mass) > NEAR)
        if total > mass:
            return order[: n + 1]
    return order


@unhurried
@given(any_logits)
def test_falling_logits_of_equal_ones_the_lower_id_first(logits: np.ndarray) -> None:
    c = candidates(logits, falling=True)
    assert c.ids.tolist() == ranked(logits)
    assert (c.logits == logits[c.ids]).all()
    back = c.by_id()
    assert back.ids.tolist() == list(range(len(logits)))
    assert (back.logits == logits).all()
    twice = c.by_id()._replace(logits=logits.astype(np.float64)).by_logit()
    assert twice.ids.tolist() == c.ids.tolist()


@unhurried
@given(any_logits, st.integers(0, 31), st.booleans())
def test_top_k_keeps_the_k_likeliest(logits: np.ndarray, k: int, falling: bool) -> None:
    kept = filters.top_k(candidates(logits, falling), k)
    assert kept.by_logit().ids.tolist() == ranked(logits)[: k or None]


def test_top_k_of_many_with_ties() -> None:
    logits = np.random.default_rng(0).integers(0, 2000, 49152).astype(np.float32)
    for k in (1, 40, 1000, 49151):
        assert filters.top_k(candidates(logits), k).ids.tolist() == ranked(logits)[:k]


@st.composite
def many_logits(draw: st.DrawFn) -> np.ndarray:
    """Enough of them that the largest are looked for in groups, in several orders, with few or many ties."""
    n, spread = draw(st.integers(8000, 30_000)), draw(st.sampled_from([0.0, 0.5, 3.0, 1e37]))
    logits = np.random.default_rng(draw(st.integers(0, 99))).normal(0, spread, n).clip(-3e38, 3e38)
    if draw(st.booleans()):
        logits = np.round(logits)
    if draw(st.booleans()):
        logits = np.sort(logits)[:: draw(st.sampled_from([1, -1]))]
    return logits.astype(np.float32)


def ranked_many(logits: np.ndarray) -> np.ndarray:
    return np.lexsort((np.arange(len(logits)), -logits))


@settings(unhurried, max_examples=60)
@given(many_logits(), st.sampled_from([1, 2, 40, 128, 129, 400, 1000, 7999]))
def test_top_k_of_many_is_the_head_of_a_full_sort(logits: np.ndarray, k: int) -> None:
    kept = filters.top_k(candidates(logits), k)
    assert (kept.ids == ranked_many(logits)[:k]).all()
    assert (kept.logits == logits[kept.ids]).all()


@settings(unhurried, max_examples=60)
@given(many_logits(), st.sampled_from([0.0, 0.3, 0.95, 1 - 1e-9, 1 - 2**-53]), st.booleans())
def test_top_p_of_many_is_the_head_of_a_full_sort(logits: np.ndarray, mass: float, falling: bool) -> None:
    order = ranked_many(logits)
    e = np.exp(logits[order].astype(np.float64) - logits.max())
    reached = np.cumsum(e) / math.fsum(e)
    kept = filters.top_p(candidates(logits, falling), mass)
    n = len(kept.ids)
    assert (kept.ids == order[:n]).all()
    assert reached[n - 1] >= mass - NEAR
    assert n == 1 or reached[n - 2] < mass + NEAR


@pytest.mark.parametrize("falling", [False, True])
def test_top_p_where_by_rounding_even_all_hold_less(falling: bool) -> None:
    logits = np.repeat(np.float32([0, -1e30]), [9, 9])
    assert len(filters.top_p(candidates(logits, falling), 1 - 2**-53).ids) == 18  # nine ninths are 1 - 3e-16


@unhurried
@given(logits_of, st.floats(0, 1), st.booleans())
def test_top_p_keeps_the_fewest_likeliest_that_hold_p(logits: np.ndarray, mass: float, falling: bool) -> None:
    want = fewest(ranked(logits), softmax(logits), mass) if mass < 1 else ranked(logits)
    assert filters.top_p(candidates(logits, falling), mass).by_logit().ids.tolist() == want


@unhurried
@given(logits_of, st.floats(0, 1), st.booleans())
def test_typical_keeps_those_of_ordinary_surprise(logits: np.ndarray, mass: float, falling: bool) -> None:
    p = softmax(logits)
    strange = {i: abs(-math.log(p[i]) - entropy(p)) for i in ranked(logits)}
    order = sorted(strange, key=lambda i: strange[i])
    for a, b in pairwise(order):  # equal logits keep their order, others must not be equally near
        assume(logits[a] == logits[b] or strange[b] - strange[a] > NEAR)
    want = fewest(order, p, mass) if mass < 1 else order
    kept = filters.typical(candidates(logits, falling), mass)
    assert sorted(kept.ids.tolist()) == sorted(want)
    assert kept.by_logit().ids.tolist() == [i for i in ranked(logits) if i in want]


@unhurried
@given(logits_of, st.floats(0, 1), st.booleans())
def test_min_p_keeps_a_share_of_the_likeliest(logits: np.ndarray, share: float, falling: bool) -> None:
    p = softmax(logits)
    assume(all(abs(x / max(p) - share) > NEAR or x == max(p) for x in p))
    want = {i for i, x in enumerate(p) if x >= share * max(p)}
    assert set(filters.min_p(candidates(logits, falling), share).ids.tolist()) == want


@unhurried
@given(logits_of, st.floats(-1, 4), st.booleans())
def test_top_n_sigma_keeps_what_is_near_the_largest(logits: np.ndarray, n: float, falling: bool) -> None:
    x = list(map(float, logits))
    mean = math.fsum(x) / len(x)
    sigma = math.sqrt(math.fsum((a - mean) ** 2 for a in x) / len(x))
    assume(all(a == max(x) or abs(a - (max(x) - n * sigma)) > NEAR for a in x))
    want = {i for i, a in enumerate(x) if n <= 0 or a >= max(x) - n * sigma}
    assert set(filters.top_n_sigma(candidates(logits, falling), n).ids.tolist()) == want


@unhurried
@given(logits_of, st.floats(0, 1), st.booleans())
@example(np.zeros(3, np.float32), 0.0, False)
def test_xtc_leaves_the_least_likely_top_choice(logits: np.ndarray, threshold: float, falling: bool) -> None:
    p = softmax(logits)
    assume(all(abs(x - threshold) > NEAR for x in p))
    top = [i for i in ranked(logits) if p[i] >= threshold]
    gone = set(top[:-1]) if threshold <= 0.5 else set()
    kept = filters.xtc(candidates(logits, falling), 1.0, threshold, np.random.default_rng(0))
    assert set(kept.ids.tolist()) == set(range(len(p))) - gone
    assert len(kept.ids)


def test_xtc_acts_as_often_as_it_should() -> None:
    rng, c = np.random.default_rng(1), candidates(np.zeros(4, np.float32))
    assert sum(len(filters.xtc(c, 0.3, 0.1, rng).ids) == 1 for _ in range(10_000)) == pytest.approx(3000, abs=150)
    state = rng.bit_generator.state
    assert filters.xtc(c, 0.0, 0.1, rng) is c
    assert rng.bit_generator.state == state  # off: it draws nothing


@unhurried
@given(
    logits_of,
    st.lists(st.integers(0, 29), max_size=50),
    st.floats(0.1, 3),
    st.floats(-2, 2),
    st.floats(-2, 2),
    st.booleans(),
)
def test_penalties_are_those_of_ctrl_and_openai(
    logits: np.ndarray, recent: list[int], repeat: float, presence: float, frequency: float, falling: bool
) -> None:
    want = logits.astype(np.float64)
    for i in range(len(want)):
        if times := recent.count(i):
            want[i] = want[i] / repeat if want[i] > 0 else want[i] * repeat
            want[i] -= presence + frequency * times
    c = filters.penalties(candidates(logits, falling), np.array(recent, np.int64), repeat, presence, frequency)
    np.testing.assert_allclose(c.by_id().logits, want, rtol=1e-6, atol=1e-6)


def repetitions(recent: list[int], breakers: set[int]) -> dict[int, int]:
    """DRY's definition, after the text of text-generation-webui's PR 5677: token -> longest match before it."""
    found: dict[int, int] = {}
    for i in range(len(recent) - 1):  # recent[i + 1] is what the match would go on with
        length = 0
        while length <= i and recent[i - length] == recent[-1 - length] and recent[-1 - length] not in breakers:
            length += 1
        if length and recent[i + 1] not in breakers:
            found[recent[i + 1]] = max(found.get(recent[i + 1], 0), length)
    return found


@unhurried
@given(tokens_of | st.lists(st.just(1), max_size=60), st.sets(st.integers(0, 4), max_size=2), st.integers(1, 4))
@example([1, 2, 3, 1, 2, 3, 1, 2], set(), 2)
@example([1, 2, 3, 1, 2], {2}, 1)
@example([1, 2, 3, 1], {2}, 1)
def test_dry_against_its_definition(recent: list[int], breakers: set[int], allowed_length: int) -> None:
    breaks = np.isin(np.arange(5), list(breakers)) if breakers else None
    tokens, lengths = filters.repetitions(np.array(recent, np.int64), breaks)
    assert dict(zip(tokens.tolist(), lengths.tolist(), strict=True)) == repetitions(recent, breakers)
    want = np.zeros(5)
    for token, length in repetitions(recent, breakers).items():
        if length >= allowed_length:
            want[token] = -0.5 * 1.75 ** (length - allowed_length)
    for falling in (False, True):
        c = candidates(np.zeros(5, np.float32), falling)
        c = filters.dry(c, np.array(recent, np.int64), 0.5, 1.75, allowed_length, breaks)
        np.testing.assert_allclose(c.by_id().logits, want, rtol=1e-6)


def test_dry_over_long_memories() -> None:
    rng = np.random.default_rng(0)
    for recent in (np.full(1000, 3), np.resize([1, 2, 1, 1, 2, 1, 3], 1000), rng.integers(0, 3, 1000)):
        tokens, lengths = filters.repetitions(recent)
        assert dict(zip(tokens.tolist(), lengths.tolist(), strict=True)) == repetitions(recent.tolist(), set())
    c = filters.dry(candidates(np.ones(5, np.float32)), np.full(4096, 3), 0.8, 1.75, 2)
    assert np.isfinite(c.logits).all()
    assert c.logits[3] < -1e38  # 1.75^4093 is beyond all floats


@unhurried
@given(logits_of, st.floats(0.01, 5), st.floats(0, 5), st.floats(0, 4), st.booleans())
def test_temperature_follows_the_entropy(
    logits: np.ndarray, t: float, spread: float, exponent: float, falling: bool
) -> None:
    c = filters.temperature(candidates(logits, falling), t, spread, exponent)
    if spread and len(logits) > 1:
        low = max(0.0, t - spread)
        t = low + (t + spread - low) * (entropy(softmax(logits)) / math.log(len(logits))) ** exponent
    assume(t > 1e-6)
    np.testing.assert_allclose(c.by_id().logits, logits.astype(np.float64) / t, rtol=1e-6, atol=1e-6)


def test_cold_temperatures_leave_the_likeliest() -> None:
    for logits in ([0.0, 1e-38], [-3e38, 3e38], [1.0, 1.0000001]):
        c = filters.temperature(candidates(np.array(logits, np.float32)), 1e-310)
        assert filters.probabilities(c.logits).tolist() == [1, 0]
        assert c.ids[0] == 1


@unhurried
@given(logits_of, st.floats(-1, 12), st.booleans())
def test_mirostat_cuts_off_what_surprises_more_than_mu(logits: np.ndarray, mu: float, falling: bool) -> None:
    p = softmax(logits)
    assume(all(abs(-math.log2(x) - mu) > NEAR for x in p))
    want = [i for i in ranked(logits) if -math.log2(p[i]) <= mu] or ranked(logits)[:1]
    assert filters.mirostat(candidates(logits, falling), mu).ids.tolist() == want


STRONG = Sampling(
    temperature=1e-310,
    dynatemp_range=1e-311,
    top_k=2,
    top_p=0.0,
    min_p=1.0,
    typical=0.0,
    top_n_sigma=1e-30,
    xtc_probability=1.0,
    xtc_threshold=0.0,
    dry_multiplier=3e38,
    dry_allowed_length=1,
    repeat_penalty=1e30,
    presence_penalty=3e38,
    frequency_penalty=-3e38,
)
MILD = Sampling(xtc_probability=0.5, dry_multiplier=0.8, typical=0.9, top_n_sigma=1.0, repeat_penalty=1.1)
EDGES = ([0.5], [1, 1, 1], [0, -0.0, 0, -0.0], [1e30, -1e30, 1e30, 0], [3.4e38, -3.4e38], [1e-45, 0, -1e-45])


@pytest.mark.parametrize("name", CHAIN)
@pytest.mark.parametrize("how", [STRONG, MILD, Sampling()], ids=["strong", "mild", "default"])
def test_some_candidates_always_stay_and_nothing_given_is_written_to(name: str, how: Sampling) -> None:
    for edge in EDGES:
        for falling in (False, True):
            c = candidates(np.array(edge, np.float32), falling)
            recent = np.array([0, 1, 0, 1, 0, 0])
            breaks = np.zeros(len(edge) + 2, bool)
            for array in (c.ids, c.logits, recent, breaks):
                array.flags.writeable = False
            kept = CHAIN[name](c, how, Context(recent, breaks, np.random.default_rng(0)))
            assert set(kept.ids) <= set(c.ids)
            assert len(set(kept.ids)) == len(kept.ids) == len(kept.logits) > 0
            assert np.isfinite(kept.logits).all()
            assert kept.falling or (np.diff(kept.ids) > 0).all()
            assert not kept.falling or (kept.logits[1:] <= kept.logits[:-1]).all()


def test_defaults_that_are_off_cost_nothing() -> None:
    c, context = candidates(np.arange(9, dtype=np.float32)), Context(np.arange(5), None, np.random.default_rng(0))
    on = {"top_k", "top_p", "min_p", "temperature"}
    off = Sampling(top_k=0, top_p=1.0, min_p=0.0)
    assert all(
        CHAIN[name](c, off if name in on else Sampling(), context) is c for name in CHAIN if name != "temperature"
    )


def test_the_last_tokens() -> None:
    context = Context(np.arange(5), None, np.random.default_rng(0))
    lasts = {count: context.last(count).tolist() for count in (-1, 0, 2, 9)}
    assert lasts == {-1: [0, 1, 2, 3, 4], 0: [], 2: [3, 4], 9: [0, 1, 2, 3, 4]}


# llama.cpp's own


@pytest.fixture(scope="module")
def llama_cpp() -> Any:
    return pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra `peer`)")


def theirs(llama_cpp: Any, sampler: Any, logits: np.ndarray, recent: Any = ()) -> dict[int, float]:
    """What llama.cpp's sampler leaves: id -> logit."""
    data = (llama_cpp.llama_token_data * len(logits))(*((i, float(x), 0.0) for i, x in enumerate(logits)))
    array = llama_cpp.llama_token_data_array(ctypes.cast(data, llama_cpp.llama_token_data_p), len(logits), -1, False)
    for token in recent:
        llama_cpp.llama_sampler_accept(sampler, int(token))
    llama_cpp.llama_sampler_apply(sampler, ctypes.byref(array))
    left = {array.data[i].id: array.data[i].logit for i in range(array.size)}
    llama_cpp.llama_sampler_free(sampler)
    return {token: logit for token, logit in left.items() if logit > -math.inf}  # top_n_sigma leaves such


PEERS: dict[str, tuple[Callable[[Any, float], Any], Callable[[Candidates, float], Candidates], list[float]]] = {
    "top_k": (
        lambda peer, k: peer.llama_sampler_init_top_k(int(k)),
        lambda c, k: filters.top_k(c, int(k)),
        [0, 1, 40, 1000],
    ),
    "top_p": (lambda peer, p: peer.llama_sampler_init_top_p(p, 1), filters.top_p, [0, 0.1, 0.5, 0.95, 1]),
    "min_p": (lambda peer, p: peer.llama_sampler_init_min_p(p, 1), filters.min_p, [0, 0.01, 0.05, 0.5]),
    "typical": (lambda peer, p: peer.llama_sampler_init_typical(p, 1), filters.typical, [0.1, 0.5, 0.95, 1]),
    "top_n_sigma": (lambda peer, n: peer.llama_sampler_init_top_n_sigma(n), filters.top_n_sigma, [-1, 0, 0.5, 1, 3]),
    "xtc": (
        lambda peer, t: peer.llama_sampler_init_xtc(1.0, t, 1, 7),
        lambda c, t: filters.xtc(c, 1.0, t, np.random.default_rng(0)),
        [0.01, 0.1, 0.3, 0.6],
    ),
    "dynatemp": (
        lambda peer, t: peer.llama_sampler_init_temp_ext(t, 0.5, 1.5),
        lambda c, t: filters.temperature(c, t, 0.5, 1.5),
        [0.1, 0.5, 0.8, 2],
    ),
    "temperature": (lambda peer, t: peer.llama_sampler_init_temp(t), filters.temperature, [0.1, 0.8, 2]),
}


@pytest.mark.peer
@pytest.mark.parametrize("name", PEERS)
def test_the_same_is_left_as_by_llama_cpp(llama_cpp: Any, name: str) -> None:
    make, ours, values = PEERS[name]
    rng = np.random.default_rng(0)
    for spread in (0.3, 2.0, 5.0):
        for value in values:
            logits = rng.normal(0, spread, 300).astype(np.float32)
            want = theirs(llama_cpp, make(llama_cpp, value), logits)
            c = ours(candidates(logits), value)
            assert set(c.ids.tolist()) == set(want), (spread, value)
            np.testing.assert_allclose(c.logits, [want[token] for token in c.ids.tolist()], rtol=1e-5)


@pytest.mark.peer
def test_penalties_are_llama_cpps(llama_cpp: Any) -> None:
    rng = np.random.default_rng(0)
    for repeat, frequency, presence in ((1.0, 0.0, 0.0), (1.3, 0.0, 0.0), (0.8, 0.4, -0.2), (1.0, 0.1, 0.5)):
        logits, recent = rng.normal(0, 3, 50).astype(np.float32), rng.integers(0, 50, 90)
        sampler = llama_cpp.llama_sampler_init_penalties(50, 64, repeat, frequency, presence)
        want = theirs(llama_cpp, sampler, logits, recent)
        c = filters.penalties(candidates(logits), recent[-64:], repeat, presence, frequency)
        np.testing.assert_allclose(c.logits, [want[token] for token in range(50)], rtol=1e-5, atol=1e-6)


@pytest.mark.peer
def test_dry_is_llama_cpps(llama_cpp: Any) -> None:
    path = smollm2()
    tokenizer = tcinfer.load(path).tokenizer
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    vocab = llama_cpp.llama_model_get_vocab(model.model)
    logits, texts = np.zeros(tokenizer.vocab_size, np.float32), Sampling.dry_sequence_breakers
    breaks = breaker_ids(tokenizer, texts, len(logits))
    ids = tokenizer.encode('He said: "to be or not to be, to be or not to be.\n" And to be or not to')
    for end in range(len(ids)):
        breakers = (ctypes.c_char_p * len(texts))(*(text.encode() for text in texts))
        sampler = llama_cpp.llama_sampler_init_dry(vocab, 0.8, 1.75, 2, 30, breakers, len(texts))
        left = theirs(llama_cpp, sampler, logits, ids[:end])
        want = {token: logit for token, logit in left.items() if logit}
        c = filters.dry(candidates(logits), np.array(ids[:end][-30:], np.int64), 0.8, 1.75, 2, breaks)
        got = np.flatnonzero(c.logits)
        assert got.tolist() == sorted(want)
        np.testing.assert_allclose(c.logits[got], [want[token] for token in got], rtol=1e-6)
    assert want
