"""From logits to an id: the options and their bounds, what changes while sampling, and the choice itself."""

from __future__ import annotations

import math
import operator
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tcinfer import filters
from tcinfer.config import LARGEST_COUNT, LARGEST_FLOAT, check_choice, check_count, check_number
from tcinfer.errors import TcinferError, TokenizerError
from tcinfer.filters import Candidates

if TYPE_CHECKING:
    from tcinfer.tokenizer import Tokenizer

LARGEST_WORD = 2**64 - 1


def _option(default: Any, usage: str, text: str, check: Any = None) -> Any:
    """A field that also says how the command line shows it; usage: its flags, then what stands for the value."""
    *flags, metavar = usage.split()
    return field(default=default, metadata={"flags": flags, "metavar": metavar, "help": text, "check": check})


def _number(
    default: float, usage: str, text: str, least: float = -LARGEST_FLOAT, most: float = math.inf, above: bool = False
) -> Any:
    return _option(default, usage, text, lambda name, value: check_number(name, value, least, most, above))


def _count(default: int, usage: str, text: str, least: int, most: int = LARGEST_COUNT) -> Any:
    return _option(default, usage, text, lambda name, value: check_count(name, value, least, most))


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; names, order and defaults are llama.cpp's. Raises TcinferError for what cannot be.

    The metadata of a field has `flags`, `metavar` and `help` for a command line.
    """

    temperature: float = _number(0.8, "--temp T", "0: always the likeliest.", 0)
    dynatemp_range: float = _number(0.0, "--dynatemp-range R", "T moves by up to R with the entropy; 0: off.", 0)
    dynatemp_exponent: float = _number(1.0, "--dynatemp-exp E", "How T follows the entropy.", 0)
    top_k: int = _count(40, "--top-k K", "The K likeliest; 0: off.", 0)
    top_p: float = _number(0.95, "--top-p P", "The fewest that hold P together; 1: off.", 0, 1)
    min_p: float = _number(0.05, "--min-p P", "At least P times the likeliest; 0: off.", 0, 1)
    typical: float = _number(1.0, "--typical P", "The most typical that hold P together; 1: off.", 0, 1)
    top_n_sigma: float = _number(-1.0, "--top-n-sigma N", "Logits within N deviations of the largest; 0: off.")
    xtc_probability: float = _number(0.0, "--xtc-probability P", "How often top choices go; 0: off.", 0, 1)
    xtc_threshold: float = _number(0.1, "--xtc-threshold P", "From where it is a top choice; above 0.5: off.", 0, 1)
    dry_multiplier: float = _number(0.0, "--dry-multiplier M", "Penalty for going on a repetition; 0: off.", 0)
    dry_base: float = _number(1.75, "--dry-base B", "Times B for each token more.", 1)
    dry_allowed_length: int = _count(2, "--dry-allowed-length N", "From N tokens on it is a repetition.", 1)
    dry_penalty_last_n: int = _count(-1, "--dry-penalty-last-n N", "Tokens looked back; 0: off, -1: all.", -1)
    dry_sequence_breakers: tuple[str, ...] = _option(
        ("\n", ":", '"', "*"), "--dry-sequence-breaker TEXT", "Where a repetition ends; may be repeated."
    )
    mirostat: int = _option(
        0,
        "--mirostat N",
        "2: Mirostat 2 in place of all samplers but the temperature; 0: off.",
        lambda name, value: check_choice(name, value, (0, 2)),
    )
    mirostat_tau: float = _number(5.0, "--mirostat-ent TAU", "The surprise wanted, in bits.", 0)
    mirostat_eta: float = _number(0.1, "--mirostat-lr ETA", "How fast it gets there.", 0)
    repeat_last_n: int = _count(64, "--repeat-last-n N", "Tokens penalised; 0: off, -1: all.", -1)
    repeat_penalty: float = _number(1.0, "--repeat-penalty X", "Divides their logits; 1: off.", 0, above=True)
    presence_penalty: float = _number(0.0, "--presence-penalty X", "Taken from their logits; 0: off.")
    frequency_penalty: float = _number(0.0, "--frequency-penalty X", "For each time they occur; 0: off.")
    logit_bias: tuple[tuple[int, float], ...] = _option(
        (), "-l --logit-bias ID(+/-)BIAS", "Added to a logit; -inf: never. May be repeated."
    )
    samplers: str = _option(";".join(filters.CHAIN), "--samplers NAMES", "What runs, in this order.")
    seed: int = _count(-1, "--seed S", "-1: another text each time.", -1, LARGEST_WORD)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dry_sequence_breakers", _texts(self.dry_sequence_breakers))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        for f in fields(self):
            if check := f.metadata["check"]:
                check(f.name, getattr(self, f.name))
        if not isinstance(self.samplers, str):
            raise TcinferError(f"samplers must be names with ';' between, not {type(self.samplers).__name__}")
        names = self.chain()
        if unknown := [name for name in names if name not in filters.CHAIN]:
            known = ", ".join(filters.CHAIN)
            raise TcinferError(f"samplers has no {unknown[0]!r}; there are {known}, with ';' between")
        if len(set(names)) < len(names):
            raise TcinferError(f"samplers must name each once, not {self.samplers!r}")

    def chain(self) -> list[str]:
        """The names in `samplers`."""
        return self.samplers.split(";") if self.samplers else []

    def draws(self) -> Draws:
        """What changes while sampling, at its start: the same seed, the same draws, on every machine."""
        return Draws(np.random.Generator(np.random.PCG64(None if self.seed < 0 else self.seed)))


def _texts(given: Any) -> tuple[str, ...]:
    texts = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Iterable) else (given,)
    if not all(isinstance(text, str) and text for text in texts):
        raise TcinferError("dry_sequence_breakers must be texts of at least one character")
    return texts


def _biases(given: Any) -> tuple[tuple[int, float], ...]:
    """Pairs or a mapping as pairs by id, each id once with the sum of its biases."""
    total: dict[int, float] = {}
    try:
        pairs = [(token, bias) for token, bias in (given.items() if isinstance(given, Mapping) else given)]
    except (TypeError, ValueError):
        raise TcinferError("logit_bias must be pairs of an id and a number, or a mapping") from None
    for token, bias in pairs:
        check_count("an id in logit_bias", token, 0)
        if not isinstance(bias, float) or bias != -math.inf:
            check_number(f"the logit_bias of {token}", bias, -LARGEST_FLOAT)
        total[int(token)] = total.get(int(token), 0.0) + float(bias)
    return tuple(sorted(total.items()))


@dataclass
class Draws:
    """What changes while sampling. A session keeps it, a fork copies it."""

    rng: np.random.Generator  # PCG64
    mu: float | None = None  # Mirostat's largest surprise, in bits; None before its first token

    def copy(self) -> Draws:
        """The same draws from here on, independent of these."""
        return Draws.from_words(self.words())

    def words(self) -> tuple[int, ...]:
        """All of it in 7 unsigned 64-bit integers, to be kept in a file."""
        state: Any = self.rng.bit_generator.state
        numbers = (state["state"]["state"], state["state"]["inc"])
        halves = (half for number in numbers for half in (number >> 64, number & LARGEST_WORD))
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
        raise TcinferError("the model computed logits that are not finite: its weights are damaged or overflow")
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
    c = Candidates(ids, logits if allowed is None else logits[ids])
    if not len(tokens):
        return c
    at, which = filters.find(ids, tokens)
    return c.put(at, c.logits[at] + biases[which])


@lru_cache(maxsize=1)
def _all_ids(V: int) -> NDArray[np.int64]:
    ids = np.arange(V)
    ids.flags.writeable = False
    return ids


def breaker_ids(tokenizer: Tokenizer, texts: Sequence[str], rows: int) -> NDArray[np.bool_]:
    """DRY's sequence breakers: which of the model's ids hold one of the texts; bool [rows]."""
    breaks = np.zeros(rows, bool)
    if texts:
        holds = re.compile(b"|".join(re.escape(text.encode("utf-8", "replace")) for text in texts)).search
        for token in range(min(rows, tokenizer.vocab_size)):
            breaks[token] = holds(_bytes(tokenizer, token)) is not None
    return breaks


def _bytes(tokenizer: Tokenizer, token: int) -> bytes:
    try:
        return tokenizer.token_bytes(token)
    except TokenizerError:  # its tokens have no bytes of their own: then what it is alone
        return tokenizer.decode([token]).encode()
