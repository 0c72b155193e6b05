"""From logits to an id: what changes while sampling, and the choice itself."""

from __future__ import annotations

import math
import operator
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tcinfer.errors import TcinferError, TokenizerError
from tcinfer.sampling import LARGEST_SEED, Sampling, filters
from tcinfer.sampling.filters import Candidates

if TYPE_CHECKING:
    from tcinfer.tokenizer import Tokenizer

NOT_FINITE = "the model computed logits that are not finite: its weights are damaged or overflow"


@dataclass
class Draws:
    """What changes while sampling. A session keeps it, a fork copies it."""

    rng: np.random.Generator  # PCG64
    mu: float | None = None  # Mirostat's largest surprise, in bits; None before its first token

    @classmethod
    def seeded(cls, seed: int | None) -> Draws:
        """At the start; None: from the system's entropy."""
        return cls(np.random.Generator(np.random.PCG64(seed)))

    @classmethod
    def of(cls, how: Sampling) -> Draws:
        """At the start of a text: the same seed, the same draws, on every machine."""
        return cls.seeded(None if how.seed < 0 else how.seed)

    def peek(self) -> float:
        """The number that `rng.random()` gives next."""
        bits = self.rng.bit_generator
        before = bits.state
        number = self.rng.random()
        bits.state = before
        return number

    def take(self, number: float) -> bool:
        """Go past a number that was seen; False, and nothing done, if it is not the next one any more."""
        bits = self.rng.bit_generator
        before = bits.state
        if self.rng.random() == number:
            return True
        bits.state = before
        return False

    def copy(self) -> Draws:
        """The same draws from here on, independent of these."""
        return Draws.from_words(self.words())

    def words(self) -> tuple[int, ...]:
        """All of it in 7 unsigned 64-bit integers, to be kept in a file."""
        state: Any = self.rng.bit_generator.state
        numbers = (state["state"]["state"], state["state"]["inc"])
        halves = (half for number in numbers for half in (number >> 64, number & LARGEST_SEED))
        mu = math.nan if self.mu is None else self.mu
        return (*halves, state["has_uint32"], state["uinteger"], *struct.unpack("<Q", struct.pack("<d", mu)))

    @classmethod
    def from_words(cls, words: Iterable[int]) -> Draws:
        """The opposite of `words`. Raises TcinferError for what that cannot have written."""
        try:
            a, b, c, d, half, rest, bits = (operator.index(word) for word in words)
            packed = struct.pack("<7Q", a, b, c, d, half, rest, bits)
        except (TypeError, ValueError, struct.error):
            raise TcinferError("the state of a random generator is 7 unsigned 64-bit integers") from None
        mu = struct.unpack("<d", packed[-8:])[0]
        if not d % 2 or half > 1 or rest >= 2**32 or math.isinf(mu):
            raise TcinferError("these 7 integers are no state of a random generator: they were damaged")
        bit_generator = np.random.PCG64(0)
        state: Any = {"state": a << 64 | b, "inc": c << 64 | d}
        bit_generator.state = {"bit_generator": "PCG64", "state": state, "has_uint32": half, "uinteger": rest}
        return cls(np.random.Generator(bit_generator), None if math.isnan(mu) else mu)


def sample(
    logits: NDArray[np.float32],
    how: Sampling,
    draws: Draws,
    recent: ArrayLike = (),
    allowed: NDArray[np.bool_] | None = None,
    breaks: NDArray[np.bool_] | None = None,
) -> int:
    """The next id.  logits float32 [V]; recent int [n], the last tokens, oldest first.

    allowed: bool [V], the only ids there are; breaks: bool [V], DRY's sequence breakers (`breaker_ids`). Raises
    TcinferError for logits that are not finite, and where no id is left.
    """
    if not np.isfinite(logits).all():
        raise TcinferError(NOT_FINITE)
    c = _candidates(logits, how, allowed)
    # llama.cpp runs no other sampler beside Mirostat, penalties included: bias, temperature, Mirostat.
    chain = [] if how.mirostat else how.chain()
    if how.temperature == 0:
        chain = [name for name in chain if name in filters.GREEDY]
    context = filters.Context(np.asarray(recent, np.int64), breaks, draws.rng)
    for name in chain:
        c = filters.CHAIN[name](c, how, context)
    if how.temperature == 0:
        return int(c.ids[np.argmax(c.logits)])  # by id still: the lowest of equals
    mu = 2 * how.mirostat_tau if draws.mu is None else draws.mu
    if how.mirostat:
        c = filters.mirostat(filters.temperature(c, how.temperature), mu)
    c = c.by_logit()
    p = filters.probabilities(c.logits)
    reached = np.cumsum(p)
    at = int(np.searchsorted(reached, draws.rng.random() * reached[-1], side="right"))  # the sum is only nearly 1
    if how.mirostat:
        draws.mu = float(mu - how.mirostat_eta * (-np.log2(p[at]) - how.mirostat_tau))
    return int(c.ids[at])


def log_probabilities(logits: NDArray[np.float32], count: int, chosen: int) -> dict[int, float]:
    """The model's own log probabilities, natural logarithms, of the `count` likeliest ids, and of the one chosen.

    logits float32 [V], before any sampler.
    """
    count, x = min(count, len(logits)), logits.astype(np.float64)
    x -= x.max()
    x -= math.log(np.exp(x).sum())
    top = np.argpartition(-x, count - 1)[:count] if count else np.empty(0, np.int64)
    top = top[np.lexsort((top, -x[top]))]
    return {int(token): float(x[token]) for token in (*top, chosen)}


def _candidates(logits: NDArray[np.float32], how: Sampling, allowed: NDArray[np.bool_] | None) -> Candidates:
    """What may be chosen at all, biases added."""
    V = len(logits)
    tokens = np.array([token for token, _ in how.logit_bias], np.int64)
    biases = np.array([bias for _, bias in how.logit_bias])
    if len(tokens) and tokens[-1] >= V:
        raise TcinferError(f"logit_bias: id {tokens[-1]} is outside the vocabulary of {V}")
    never = tokens[biases == -math.inf]
    if len(never):
        allowed = np.ones(V, bool) if allowed is None else allowed.copy()
        allowed[never] = False
    ids = _all_ids(V) if allowed is None else np.flatnonzero(allowed)
    if not len(ids):
        raise TcinferError("no token may come next: grammar, banned texts and logit_bias leave none")
    c = Candidates(ids, logits if allowed is None else logits.take(ids))
    if not len(tokens):
        return c
    at, which = filters.find(ids, tokens)
    return c.put(at, c.logits[at] + biases[which])


@lru_cache(maxsize=1)
def _all_ids(V: int) -> NDArray[np.int64]:
    ids = np.arange(V)
    ids.flags.writeable = False
    return ids


@lru_cache(8)
def breaker_ids(tokenizer: Tokenizer, texts: tuple[str, ...], rows: int) -> NDArray[np.bool_]:
    """DRY's sequence breakers: which of the model's ids hold one of the texts; bool [rows]."""
    breaks = np.zeros(rows, bool)
    if texts:
        holds = re.compile(b"|".join(re.escape(text.encode("utf-8", "replace")) for text in texts)).search
        for token in range(min(rows, tokenizer.vocab_size)):
            breaks[token] = holds(_bytes(tokenizer, token)) is not None
    breaks.flags.writeable = False
    return breaks


def _bytes(tokenizer: Tokenizer, token: int) -> bytes:
    try:
        return tokenizer.token_bytes(token)
    except TokenizerError:  # its tokens have no bytes of their own: then what it is alone
        return tokenizer.decode([token]).encode()
