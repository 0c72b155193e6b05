"""Rotary positions: angles in float64 from integer positions, so there is no table that ends."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]


def frequencies(
    head_dim: int,
    base: float,
    scaling: str = "none",
    factor: float = 1.0,
    divisors: F32 | None = None,
    original: int = 0,
) -> NDArray[np.float64]:
    """Angle per position of each channel pair, float64 [head_dim / 2]: base^(-2i / head_dim).

    scaling "linear" divides every angle by `factor`; "ntk" raises the base by factor^(D / (D - 2)) where the
    factor is above 1; "yarn" divides the angles that make less than one turn over the `original` tokens that a model
    was trained with, keeps those that make 32 and more, and mixes between. divisors [head_dim / 2] are a file's own
    (`rope_freqs.weight`, Llama 3).
    """
    if scaling == "ntk" and factor > 1:
        base = base * factor ** (head_dim / (head_dim - 2))
    angles = np.float64(base) ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling == "linear":
        angles /= factor
    if scaling == "yarn":
        angles *= _kept(head_dim, base, original) * (1 - 1 / factor) + 1 / factor
    return angles if divisors is None else angles / divisors.astype(np.float64)


def _kept(head_dim: int, base: float, original: int, many: float = 32, few: float = 1) -> NDArray[np.float64]:
    """How much of each angle YaRN keeps, 1 to 0: by the pair that makes so many turns over `original` tokens."""
    low, high = (head_dim * math.log(original / (2 * math.pi * turns)) / (2 * math.log(base)) for turns in (many, few))
    low, high = max(0, math.floor(low)), min(head_dim - 1, math.ceil(high))
    return 1 - np.clip((np.arange(head_dim // 2) - low) / max(0.001, high - low), 0, 1)


def angles(
    p: Any, freq: NDArray[np.float64], pairs: int, most: int = 2**62, offset: int = 0, factor: float = 1.0
) -> tuple[F32, F32]:
    """cos and sin of (position, at most `most`, + offset) · freq, times `factor`, computed in float64.

    freq [pairs]; both float32 [T, pairs].
    """
    a = (np.minimum(p.positions, most) + offset).astype(np.float64)[:, None] * freq
    return (factor * np.cos(a)).astype(np.float32), (factor * np.sin(a)).astype(np.float32)


def rotate(x: F32, cos: F32, sin: F32, pairs: str) -> F32:
    """Turn each channel pair (a, b) by its angle: (a cos - b sin, a sin + b cos).

    x [T, H, D]; cos, sin [T, 1, n / 2]: the first n channels rotate; pairs "interleaved" or "half" (which channels make
    a pair).
    """
    n = 2 * cos.shape[-1]
    half, y = n // 2, x.copy()
    a, b = (slice(0, n, 2), slice(1, n, 2)) if pairs == "interleaved" else (slice(half), slice(half, n))
    y[..., a] = x[..., a] * cos - x[..., b] * sin
    y[..., b] = x[..., a] * sin + x[..., b] * cos
    return y
