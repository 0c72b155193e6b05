"""Activations whose function NumPy does not have."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from tcinfer.kernels.cpu.jit import compiled

F32 = NDArray[np.float32]


def gelu(x: F32) -> F32:
    """x/2 · (1 + erf(x/√2)), as kernels.reference.pointwise.gelu."""
    return _gelu(np.ascontiguousarray(x).reshape(-1)).reshape(x.shape)


@compiled
def _gelu(x: F32) -> F32:
    y = np.empty_like(x)
    for i in range(x.size):
        y[i] = 0.5 * x[i] * (1 + math.erf(x[i] * math.sqrt(0.5)))
    return y
