"""From logits to an id: pure functions and an explicit random generator."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tcinfer.config import check_count, check_number
from tcinfer.errors import TcinferError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; names, order and defaults are llama.cpp's."""

    temperature: float = 0.8  # 0: always the likeliest
    top_k: int = 40  # the K likeliest; 0: all
    top_p: float = 0.95  # the fewest that hold this much probability; 1: all
    min_p: float = 0.05  # those with at least this share of the likeliest's probability; 0: all
    seed: int = -1  # -1: a different text each time

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, 0)
        check_count("top_k", self.top_k, 0)
        check_number("top_p", self.top_p, 0, 1)
        check_number("min_p", self.min_p, 0, 1)
        check_count("seed", self.seed, -1, 2**64 - 1)

    def rng(self) -> np.random.Generator:
        """The generator that `seed` stands for: the same seed, the same draws, on every machine."""
        return np.random.Generator(np.random.PCG64(None if self.seed < 0 else self.seed))


def sample(logits: NDArray[np.float32], how: Sampling, rng: np.random.Generator) -> int:
    """The next id.  logits [V].  Raises TcinferError if they are not numbers."""
    if not np.isfinite(logits).all():
        raise TcinferError("the model computed logits that are not finite: its weights are damaged or overflow")
    if how.temperature == 0:
        return int(np.argmax(logits))
    ids: NDArray[np.intp] = np.argsort(-logits, kind="stable")  # ties: the lower id first
    if how.top_k:
        ids = ids[: how.top_k]
    ids = ids[: top_p(logits[ids], how.top_p)]
    ids = ids[: min_p(logits[ids], how.min_p)]
    p = probabilities(logits[ids], how.temperature)
    at = int(np.searchsorted(np.cumsum(p), rng.random(), side="right"))
    return int(ids[min(at, len(ids) - 1)])


def probabilities(logits: NDArray[np.float32], temperature: float = 1.0) -> NDArray[np.float64]:
    """softmax(logits / temperature) in float64, [n]."""
    z = logits.astype(np.float64)
    with np.errstate(over="ignore"):  # a temperature near 0 sends all but the likeliest to -inf, as it should
        e = np.exp((z - z.max()) / temperature)
    return e / e.sum()


def top_p(logits: NDArray[np.float32], p: float) -> int:
    """How many of the likeliest (logits [n], falling) hold probability p together; at least 1."""
    if p >= 1:
        return len(logits)
    return int(np.searchsorted(np.cumsum(probabilities(logits)), p)) + 1


def min_p(logits: NDArray[np.float32], p: float) -> int:
    """How many (logits [n], falling) have at least p times the first one's probability; at least 1."""
    if p <= 0:
        return len(logits)
    return max(1, int(np.sum(logits - logits[0] >= np.log(p))))
