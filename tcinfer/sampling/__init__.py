"""How tokens are chosen, as options: names, bounds, help. Imports nothing heavy: command-line help is made of it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from numbers import Real
from typing import Any

from tcinfer.config import LARGEST_COUNT, LARGEST_FLOAT, check_choice, check_count, check_number
from tcinfer.errors import TcinferError

LARGEST_SEED = 2**64 - 1
# llama.cpp's samplers in its order; filters.py has the functions
SAMPLERS = ("penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature")
BIAS = re.compile(r"(\d+)([+-](?:inf|[\d.]+(?:e[+-]?\d+)?))")


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
    dry_penalty_last_n: int = _count(-1, "--dry-penalty-last-n N", "Tokens looked back; 0: off, -1: 4,096.", -1)
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
    repeat_last_n: int = _count(64, "--repeat-last-n N", "Tokens penalised; 0: off, -1: 4,096.", -1)
    repeat_penalty: float = _number(1.0, "--repeat-penalty X", "Divides their logits; 1: off.", 0, above=True)
    presence_penalty: float = _number(0.0, "--presence-penalty X", "Taken from their logits; 0: off.")
    frequency_penalty: float = _number(0.0, "--frequency-penalty X", "For each time they occur; 0: off.")
    logit_bias: tuple[tuple[int, float], ...] = _option(
        (), "-l --logit-bias ID(+/-)BIAS", "Added to a logit; -inf: never. May be repeated."
    )
    samplers: str = _option(";".join(SAMPLERS), "--samplers NAMES", "What runs, in this order.")
    seed: int = _count(-1, "--seed S", "-1: another text each time.", -1, LARGEST_SEED)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dry_sequence_breakers", strings("dry_sequence_breakers", self.dry_sequence_breakers))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        for f in fields(self):
            if check := f.metadata["check"]:
                check(f.name, getattr(self, f.name))
        if not isinstance(self.samplers, str):
            raise TcinferError(f"samplers must be names with ';' between, not {type(self.samplers).__name__}")
        names = self.chain()
        if unknown := [name for name in names if name not in SAMPLERS]:
            known = ", ".join(SAMPLERS)
            raise TcinferError(f"samplers has no {unknown[0]!r}; there are {known}, with ';' between")
        if len(set(names)) < len(names):
            raise TcinferError(f"samplers must name each once, not {self.samplers!r}")

    def chain(self) -> list[str]:
        """The names in `samplers`."""
        return [name.strip() for name in self.samplers.split(";")] if self.samplers else []


def strings(name: str, given: str | Iterable[str]) -> tuple[str, ...]:
    """One or several texts as a tuple. Raises TcinferError for what are none."""
    texts = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Iterable) else (given,)
    if not all(isinstance(text, str) and text for text in texts):
        raise TcinferError(f"{name} must be texts of at least one character")
    return texts


def _biases(given: Any) -> tuple[tuple[int, float], ...]:
    """Pairs or a mapping as pairs by id, each id once with the sum of its biases."""
    total: dict[int, float] = {}
    try:
        pairs = [(token, amount) for token, amount in (given.items() if isinstance(given, Mapping) else given)]
    except (TypeError, ValueError):
        raise TcinferError("logit_bias must be pairs of an id and a number, or a mapping") from None
    for token, amount in pairs:
        check_count("an id in logit_bias", token, 0)
        if not isinstance(amount, Real) or amount != -math.inf:
            check_number(f"the logit_bias of {token}", amount, -LARGEST_FLOAT)
        total[int(token)] = total.get(int(token), 0.0) + float(amount)
    return tuple(sorted(total.items()))


def parsed(name: str, text: str) -> Any:
    """A field's value as people write it: lists with ',' between. Raises TcinferError."""
    default = getattr(Sampling, name)
    if name == "logit_bias":
        return [bias(one) for one in text.split(",") if one]
    if name == "dry_sequence_breakers":
        return tuple(one for one in text.split(",") if one)
    try:
        return type(default)(text)
    except ValueError:
        kind = "a whole number" if isinstance(default, int) else "a number"
        raise TcinferError(f"{name} must be {kind}, not {text[:40]!r}") from None


def bias(text: str) -> tuple[int, float]:
    """The id and number of `ID(+/-)BIAS`. Raises TcinferError."""
    found = BIAS.fullmatch(text)
    try:
        return int(found[1]), float(found[2])  # type: ignore[index]
    except (TypeError, ValueError):
        raise TcinferError(f"logit_bias {text[:40]!r}: an id, a sign, a number, such as 42+1.5 or 42-inf") from None


@lru_cache(64)
def on_device(how: Sampling, vocab_size: int) -> bool:
    """Whether kernels/cuda/sampling.cu chooses as `sampler.sample` does, if that is given no `allowed` ids.

    It has top-k, top-p, min-p and a temperature, in this order, and room for 1,024 candidates and ids below 2^24.
    """
    plain = how.repeat_penalty == 1 and how.presence_penalty == 0 and how.frequency_penalty == 0
    off = {
        "penalties": plain or how.repeat_last_n == 0,
        "dry": how.dry_multiplier == 0 or how.dry_penalty_last_n == 0,
        "top_n_sigma": how.top_n_sigma <= 0,
        "top_k": not 0 < how.top_k < vocab_size,
        "typ_p": how.typical >= 1,
        "top_p": how.top_p >= 1,
        "min_p": how.min_p <= 0,
        "xtc": how.xtc_probability <= 0 or how.xtc_threshold > 0.5,
        "temperature": how.temperature == 1 and how.dynatemp_range == 0,
    }
    runs = [name for name in how.chain() if not off[name]]
    if how.logit_bias or vocab_size > 2**24:
        return False
    if how.temperature == 0:  # then nothing else bears on which is the likeliest; beside Mirostat not even these
        return how.mirostat != 0 or not {"penalties", "dry"} & set(runs)
    served = [name for name in ("top_k", "top_p", "min_p", "temperature") if not off[name]]
    candidates = vocab_size if off["top_k"] else how.top_k
    return runs == served and candidates <= 1024 and how.mirostat == 0 and how.dynatemp_range == 0
