"""Products with packed weights, which stay packed: one token row by row, a prompt panel by panel."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tcinfer.kernels.cpu.blocks import PACKINGS, row_dot, row_unpack
from tcinfer.kernels.cpu.jit import compiled
from tcinfer.kernels.cpu.threads import Threads
from tcinfer.kernels.reference.quants import Matrix

F32 = NDArray[np.float32]

FEW = 3  # tokens up to which each row is multiplied as it is unpacked; more are worth a matrix product
PANEL = 2**18  # values unpacked at once for a matrix product: they stay in the cache
SHARED = 2**19  # values up to which one thread unpacks a matrix sooner than two are woken


def linear(x: F32, w: Matrix, bias: F32 | None, threads: Threads) -> F32:
    """y = x Wᵀ + b, as kernels.reference.quants.linear. A packed row that meets one token is summed by one thread in
    one order, so the bits do not depend on how many threads there are."""
    blocks = packed(w)
    x = np.ascontiguousarray(x)
    y = np.empty((len(x), w.shape[0]), np.float32)
    if blocks is None:
        values = w.values

        def work(first: int, last: int) -> None:
            y[:, first:last] = x @ values[first:last].T if len(x) > 1 else values[first:last] @ x[0]

    elif len(x) <= FEW:

        def work(first: int, last: int) -> None:
            _rows(blocks, x, y, first, last)

    else:

        def work(first: int, last: int) -> None:
            step = max(1, PANEL // w.shape[1])
            panel = np.empty((min(step, last - first), w.shape[1]), np.float32)
            for a in range(first, last, step):
                part = panel[: last - a]
                _unpack(blocks, a, part)
                y[:, a : a + len(part)] = x @ part.T

    # A matrix product does some 32 multiplications in the time that unpacking takes for one value.
    if w.shape[0] * w.shape[1] * max(1, len(x) // 32) <= SHARED:
        work(0, w.shape[0])
    else:
        threads.share(w.shape[0], work)
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
