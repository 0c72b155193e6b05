"""Products with packed weights, which stay packed: one token row by row, a prompt panel by panel."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tcinfer.kernels.cpu.blocks import PACKINGS, row_dot, row_unpack
from tcinfer.kernels.cpu.jit import compiled
from tcinfer.kernels.cpu.threads import Threads
from tcinfer.kernels.reference import quants
from tcinfer.kernels.reference.quants import Matrix

F32 = NDArray[np.float32]

FEW = 3  # tokens up to which each row is multiplied as it is unpacked; more are worth a matrix product
PANEL = 2**20  # values unpacked at once for a matrix product
SHARED = 2**19  # values of a matrix from which on its rows are shared among threads


def linear(x: F32, w: Matrix, bias: F32 | None, threads: Threads) -> F32:
    """y = x Wᵀ + b, as kernels.reference.quants.linear; each row is summed by one thread in one order, so the result
    does not depend on how many there are."""
    blocks = packed(w)
    if blocks is None:
        return quants.linear(x, w, bias)
    y = np.empty((len(x), len(blocks)), np.float32)
    if len(x) <= FEW:
        x = np.ascontiguousarray(x)
        if blocks.shape[0] * w.shape[1] < SHARED:
            _rows(blocks, x, y, 0, len(blocks))
        else:
            threads.share(len(blocks), lambda first, last: _rows(blocks, x, y, first, last))
    else:
        step = max(1, PANEL // w.shape[1])
        panel = np.empty((min(step, len(blocks)), w.shape[1]), np.float32)
        for a in range(0, len(blocks), step):
            part = panel[: len(blocks) - a]
            _unpack(blocks, a, part)
            y[:, a : a + step] = x @ part.T
    return y if bias is None else y + bias


def packed(w: Matrix) -> NDArray | None:
    """The matrix as records [rows, blocks] of its packing; None where it has none here (float32, odd widths)."""
    packing = PACKINGS.get(w.kind)
    if packing is None or w.shape[1] % packing.values:
        return None
    return w.data.view(packing.dtype)


@compiled
def _rows(blocks: NDArray, x: F32, y: F32, first: int, last: int) -> None:
    for row in range(first, last):
        for t in range(x.shape[0]):
            y[t, row] = row_dot(blocks, row, x[t])  # type: ignore[call-arg]  # Numba gives the first argument


@compiled
def _unpack(blocks: NDArray, first: int, panel: F32) -> None:
    for row in range(panel.shape[0]):
        row_unpack(blocks, first + row, panel[row])  # type: ignore[call-arg]
