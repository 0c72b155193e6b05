"""What each sampler does to the candidates for the next token, as published; names and default order are llama.cpp's.

A filter is a function of candidates and plain numbers. It returns candidates, at least one of them, and writes into
nothing it was given. `CHAIN` says which options of `Sampling` each one takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tcinfer.config import LARGEST_FLOAT

if TYPE_CHECKING:
    from tcinfer.sampling import Sampling

Ids = NDArray[np.int64]
Logits = NDArray[np.float32] | NDArray[np.float64]

COLDEST = 1e-60  # a temperature at which float32 logits differ by nothing or by more than 10^14: as good as any lower


class Candidates(NamedTuple):
    """Ids that may come next. They rise, or else (`falling`) their logits fall, of equal ones the lower id first."""

    ids: Ids  # [n], n >= 1, each once
    logits: Logits  # [n], finite; float64 after a temperature
    falling: bool = False

    def take(self, at: Any) -> Candidates:
        """Those at positions that rise (int [k], a mask bool [n], or a slice)."""
        return Candidates(self.ids[at], self.logits[at], self.falling)

    def put(self, at: Any, logits: NDArray[np.float64]) -> Candidates:
        """With other logits [k] at positions int [k]. Only for candidates by id, an order that this does not change."""
        most = np.finfo(self.logits.dtype).max
        changed = self.logits.copy()
        changed[at] = np.clip(logits, -most, most)
        return self._replace(logits=changed)

    def by_id(self) -> Candidates:
        return self._ordered(np.argsort(self.ids), False) if self.falling else self

    def by_logit(self) -> Candidates:
        return self if self.falling else self._ordered(_falling(self.logits), True)

    def _ordered(self, order: NDArray[np.intp], falling: bool) -> Candidates:
        return Candidates(self.ids[order], self.logits[order], falling)


class Context(NamedTuple):
    """What samplers look at beside the candidates."""

    recent: Ids  # [n], the last tokens, oldest first
    breaks: NDArray[np.bool_] | None  # [V], DRY's sequence breakers
    rng: np.random.Generator

    def last(self, count: int) -> Ids:
        """The last `count` tokens; -1: all that are remembered."""
        return self.recent if count < 0 else self.recent[max(0, len(self.recent) - count) :]


def find(ids: Ids, tokens: Ids) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Where the tokens [m] stand that are among ids [n], which rise; and which of the tokens these are."""
    at = np.minimum(np.searchsorted(ids, tokens), len(ids) - 1)
    which = np.flatnonzero(ids[at] == tokens)
    return at[which], which


def log_probabilities(logits: Logits) -> NDArray[np.float64]:
    """log softmax(logits) in float64, [n]."""
    top, log_sum = _top_and_log_sum(logits)
    return logits - top - log_sum


def _top_and_log_sum(logits: Logits) -> tuple[np.float64, float]:
    """The largest logit, and log sum exp(logits - it), in float64."""
    z = logits.astype(np.float64)
    top = z.max()
    z -= top  # in place: large new arrays cost more than the arithmetic
    return top, math.log(np.exp(z, out=z).sum())


def probabilities(logits: Logits) -> NDArray[np.float64]:
    """softmax(logits) in float64, [n]."""
    p = log_probabilities(logits)
    return np.exp(p, out=p)


def penalties(c: Candidates, recent: Ids, repeat: float, presence: float, frequency: float) -> Candidates:
    """Ids among the recent: logit / repeat, or * repeat if it is not positive; - presence - frequency * occurrences.

    Keskar et al. 2019 (CTRL, arXiv:1909.05858) only divide, which makes a negative logit likelier: all runtimes
    multiply those. Presence and frequency are OpenAI's.
    """
    if not len(recent) or (repeat == 1 and presence == 0 and frequency == 0):
        return c
    tokens, counts = np.unique(recent, return_counts=True)
    c = c.by_id()
    at, which = find(c.ids, tokens)
    x = c.logits[at].astype(np.float64)
    return c.put(at, np.where(x > 0, x / repeat, x * repeat) - presence - frequency * counts[which])


def dry(
    c: Candidates,
    recent: Ids,
    multiplier: float,
    base: float,
    allowed_length: int,
    breaks: NDArray[np.bool_] | None = None,
) -> Candidates:
    """Do not repeat yourself: logit - multiplier * base^(length - allowed_length) for what would go on a repetition.

    `length` is how many of the last tokens have stood before that token already; shorter ones than `allowed_length`
    cost nothing. p-e-w 2024 (github.com/oobabooga/text-generation-webui/pull/5677).
    """
    if multiplier == 0:
        return c
    tokens, lengths = repetitions(recent, breaks)
    tokens, lengths = tokens[lengths >= allowed_length], lengths[lengths >= allowed_length]
    if not len(tokens):
        return c
    c = c.by_id()
    at, which = find(c.ids, tokens)
    with np.errstate(over="ignore"):
        penalty = multiplier * np.power(float(base), lengths[which] - allowed_length)
    return c.put(at, c.logits[at].astype(np.float64) - np.minimum(penalty, LARGEST_FLOAT))


def repetitions(recent: Ids, breaks: NDArray[np.bool_] | None = None) -> tuple[Ids, Ids]:
    """Tokens [m], each once, that have stood after the last one; after how many of the last ones at most, int [m].

    breaks: bool [V], tokens that go on nothing and before which no repetition begins. The Z-algorithm (Gusfield 1997)
    over the tokens, the last first, at the places where the last one stands again: linear time.
    """
    back = recent[::-1]
    n = limit = len(back)
    if breaks is not None and (broken := breaks[back]).any():
        limit = int(broken.argmax())
    places = np.flatnonzero(back[1:] == back[0]) + 1 if limit else np.empty(0, np.intp)
    s: list[int] = back.tolist()  # lists: their single elements are read faster
    z = [0] * n  # z[k]: how many tokens from s[k] on are those from s[0] on, up to the limit
    left = right = 0  # s[left:right] == s[:right-left] is what reaches furthest
    for k in (ks := places.tolist()):
        if k < right and z[k - left] < right - k:
            z[k] = z[k - left]
            continue
        length = max(right - k, 0)
        while length < limit and k + length < n and s[length] == s[k + length]:
            length += 1
        left, right, z[k] = k, k + length, length
    tokens, group = np.unique(back[places - 1], return_inverse=True)
    longest = np.zeros(len(tokens), np.int64)
    np.maximum.at(longest, group, np.array([z[k] for k in ks], np.int64))
    goes_on = np.full(len(tokens), True) if breaks is None else ~breaks[tokens]
    return tokens[goes_on], longest[goes_on]


def top_n_sigma(c: Candidates, n: float) -> Candidates:
    """Logits within n standard deviations of the largest. Tang et al. 2024 (arXiv:2411.07641)."""
    if n <= 0:
        return c
    return c.take(np.flatnonzero(c.logits >= c.logits.max() - n * c.logits.std(dtype=np.float64)))


def top_k(c: Candidates, k: int) -> Candidates:
    """The k likeliest. Fan et al. 2018 (arXiv:1805.04833)."""
    if not 0 < k < len(c.ids):
        return c
    if not c.falling:  # sorting all would cost more than the rest of the chain
        c = c.take(np.flatnonzero(c.logits >= _reached(c.logits, k))).by_logit()
    return c.take(slice(k))


def typical(c: Candidates, mass: float) -> Candidates:
    """The fewest that hold `mass`, those first whose surprise is nearest to the entropy. Meister et al. 2022
    (arXiv:2202.00666)."""
    if mass >= 1:
        return c
    c = c.by_logit()
    log_p = log_probabilities(c.logits)
    p = np.exp(log_p)
    entropy = -(p * log_p).sum()
    order = np.argsort(np.abs(-log_p - entropy), kind="stable")
    return c.take(np.sort(order[: _fewest(p[order], mass)]))


def top_p(c: Candidates, mass: float) -> Candidates:
    """The fewest that hold `mass`, the likeliest first. Holtzman et al. 2019 (arXiv:1904.09751)."""
    if mass >= 1:
        return c
    top, log_sum = _top_and_log_sum(c.logits)
    least = float(top + log_sum + math.log((1 - mass) / len(c.ids)))  # all below hold less than 1 - mass together
    some = c if c.falling else c.take(np.flatnonzero(c.logits >= least)).by_logit()
    count = _fewest(np.exp(some.logits - top - log_sum), mass)
    if count > len(some.ids) and not c.falling:  # rounding left out what is needed
        return top_p(c.by_logit(), mass)
    return some.take(slice(count))


def min_p(c: Candidates, share: float) -> Candidates:
    """Those with at least this share of the likeliest's probability. Nguyen et al. 2024 (arXiv:2407.01082)."""
    if share <= 0:
        return c
    z = c.logits.astype(np.float64)
    z -= z.max()
    return c.take(np.flatnonzero(z >= math.log(share)))


def xtc(c: Candidates, probability: float, threshold: float, rng: np.random.Generator) -> Candidates:
    """Exclude top choices: now and then, of those with p >= threshold, all but the least likely go.

    p-e-w 2024 (github.com/oobabooga/text-generation-webui/pull/6335). Nothing goes unless two reach the threshold, so
    above 0.5 it is off.
    """
    if probability <= 0 or threshold > 0.5 or len(c.ids) < 2 or rng.random() >= probability:
        return c
    c = c.by_logit()
    reach = int((probabilities(c.logits) >= threshold).sum())
    return c.take(slice(max(reach - 1, 0), None))


def temperature(c: Candidates, t: float, spread: float = 0.0, exponent: float = 1.0) -> Candidates:
    """logits / t, float64. With a spread, t lies between t - spread and t + spread: the surer, the lower.

    Its place is (entropy / largest possible entropy)^exponent, as in llama.cpp's --dynatemp-range; after Zhu et al.
    2023 (arXiv:2309.02772).
    """
    c = c.by_logit()  # while they are float32, which sort faster
    if spread > 0 and len(c.ids) > 1:
        log_p = log_probabilities(c.logits)
        disorder = -(np.exp(log_p) * log_p).sum() / math.log(len(log_p))
        low, high = max(0.0, t - spread), t + spread
        t = low + (high - low) * min(max(float(disorder), 0.0), 1.0) ** exponent
    return c._replace(logits=c.logits.astype(np.float64) / max(t, COLDEST))


def mirostat(c: Candidates, mu: float) -> Candidates:
    """Those whose surprise, -log2 p, is at most mu; at least the likeliest. Basu et al. 2020 (arXiv:2007.14966, v2)."""
    c = c.by_logit()
    surprise = log_probabilities(c.logits) / -math.log(2)
    return c.take(slice(max(1, int((surprise <= mu).sum()))))


def _fewest(p: NDArray[np.float64], mass: float) -> int:
    """How many of the first probabilities [n] it takes to hold `mass`; at least 1."""
    return int(np.searchsorted(np.cumsum(p), mass)) + 1


def _reached(logits: Logits, k: int) -> np.floating:
    """A number that the k largest of logits [n] reach, and that few others reach.

    Of the largest ones of any groups, the k-th is reached by k logits at least: one in each of k groups.
    """
    groups = 8 * max(k, 128)
    rows = len(logits) // groups
    if rows >= 8:
        logits = logits[: rows * groups].reshape(rows, groups).max(axis=0)
    return np.partition(logits, len(logits) - k)[len(logits) - k]


def _falling(logits: Logits) -> NDArray[np.intp]:
    """Positions [n] from the largest logit to the smallest, of equal ones the first first."""
    if logits.dtype != np.float32:
        return np.argsort(-logits, kind="stable")
    # A stable sort of floats is slow. Instead, integers that rise as the float falls, sorted by their lower and then
    # by their upper half: a radix sort.
    bits = (logits + np.float32(0)).view(np.uint32)  # -0 is 0
    keys = np.where(logits < 0, bits, bits ^ 0x7FFFFFFF)
    order = np.argsort(keys.astype(np.uint16), kind="stable")
    return order[np.argsort((keys >> 16).astype(np.uint16)[order], kind="stable")]


# Name -> the filter with the options it takes. The order is that of the default chain.
CHAIN: dict[str, Callable[[Candidates, Sampling, Context], Candidates]] = {
    "penalties": lambda c, how, at: penalties(
        c, at.last(how.repeat_last_n), how.repeat_penalty, how.presence_penalty, how.frequency_penalty
    ),
    "dry": lambda c, how, at: dry(
        c, at.last(how.dry_penalty_last_n), how.dry_multiplier, how.dry_base, how.dry_allowed_length, at.breaks
    ),
    "top_n_sigma": lambda c, how, at: top_n_sigma(c, how.top_n_sigma),
    "top_k": lambda c, how, at: top_k(c, how.top_k),
    "typ_p": lambda c, how, at: typical(c, how.typical),
    "top_p": lambda c, how, at: top_p(c, how.top_p),
    "min_p": lambda c, how, at: min_p(c, how.min_p),
    "xtc": lambda c, how, at: xtc(c, how.xtc_probability, how.xtc_threshold, at.rng),
    "temperature": lambda c, how, at: temperature(c, how.temperature, how.dynatemp_range, how.dynatemp_exponent),
}
GREEDY = ("penalties", "dry")  # of these, what bears on which one is the likeliest
