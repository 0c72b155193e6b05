"""Normalisation and activations: the equations, one row or one element at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]


def rms_norm(x: F32, weight: F32, eps: float) -> F32:
    """y = x / sqrt(mean(x²) + eps) · w.  x [T, C], weight [C]."""
    return x * (1.0 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps))) * weight


def layer_norm(x: F32, weight: F32, bias: F32 | None, eps: float) -> F32:
    """y = (x - mean(x)) / sqrt(var(x) + eps) · w + b.  x [T, C], weight and bias [C]."""
    centred = x - np.mean(x, axis=-1, keepdims=True)
    y = centred * (1.0 / np.sqrt(np.mean(centred * centred, axis=-1, keepdims=True) + np.float32(eps))) * weight
    return y if bias is None else y + bias


def sigmoid(x: F32) -> F32:
    """1 / (1 + e^-x), without overflow: e^-|x| is never above 1.  Any shape."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


_erf = np.frompyfunc(math.erf, 1, 1)  # NumPy has no erf of its own


def gelu(x: F32) -> F32:
    """x/2 · (1 + erf(x/√2)), the exact form.  Any shape."""
    return 0.5 * x * (1 + _erf(x * np.float32(math.sqrt(0.5))).astype(np.float32))


def gelu_tanh(x: F32) -> F32:
    """x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³))), the approximation that Gemma was trained with.  Any shape."""
    return x * sigmoid(2 * np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x))


def gated(gate: F32, up: F32, activation: str) -> F32:
    """act(gate) · up; activation: "silu", g sigmoid(g), or "gelu_tanh".  Both [T, F]."""
    return (gate * sigmoid(gate) if activation == "silu" else gelu_tanh(gate)) * up


def softcap(p: Any, columns: int, cap: float) -> None:
    """cap · tanh(x / cap) of the logits [.., columns], in place: none beyond the cap."""
    p.logits[:] = np.float32(cap) * np.tanh(p.logits / np.float32(cap))


def add(p: Any, x: F32, y: F32, columns: int) -> None:
    """x += y.  Both [T, columns]."""
    x += y


def scale(p: Any, x: F32, columns: int, factor: float) -> None:
    """x *= factor.  [T, columns]."""
    x *= np.float32(factor)


def head_norm(p: Any, x: F32, heads: int, width: int, weight: F32, eps: float) -> None:
    """RMS norm of each head by itself, in place.  x [T, heads, width], weight [width]."""
    x[:] = rms_norm(x, weight, eps)


def elu_plus_one(x: F32) -> F32:
    """φ(x) = ELU(x) + 1: x + 1 above 0, e^x below.  Any shape."""
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def unit(x: F32) -> F32:
    """x / (‖x‖ + 1e-5) over the last axis: the eps is added, not a floor (docs/mechanisms.md, "Norms")."""
    return x / (np.sqrt(np.sum(x * x, axis=-1, keepdims=True)) + np.float32(1e-5))
