"""Tiny plans, so that tests can run one compiled operator over arrays and look at what it wrote."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import quantize

from tcinfer.kernels.cpu.plan import Rows
from tcinfer.kernels.cpu.recorder import Recorder
from tcinfer.kernels.cpu.threads import pool
from tcinfer.kernels.reference.quants import Kind, Matrix

UNTOUCHED = 12344.0  # what lies behind the rows of a pass, and must lie there afterwards


def at(address: int, *shape: int, dtype: Any = np.float32) -> np.ndarray:
    """The memory at an address as an array."""
    dtype = np.dtype(dtype)
    return np.frombuffer((ctypes.c_uint8 * (math.prod(shape) * dtype.itemsize)).from_address(address), dtype).reshape(
        shape
    )


class Pass(Recorder):
    """A plan for one pass of T rows: of one sequence that has taken `first` tokens, or of T sequences, a token each."""

    def __init__(self, T: int, first: int | Sequence[int] = 0, threads: int = 1) -> None:
        super().__init__(T + 1, pool(threads))  # one row more, which no operator may touch
        self.T, self.first = T, first

    def room(self, size: int) -> int:
        """As a plan's, but full of NaN: what is read before it is written shows."""
        address = super().room(size)
        at(address, size, dtype=np.uint8)[:] = 255
        return address

    def filled(self, values: np.ndarray) -> Rows:
        """Rows that hold these values [T, ..]."""
        rows = Rows(self, values[0].size, values.dtype == np.float16)
        self.array(rows)[:] = values.reshape(self.T, -1)
        return rows

    def array(self, rows: Rows) -> np.ndarray:
        """What is in some rows, [T, columns]."""
        return self._at(rows, 0, self.T)

    def _at(self, rows: Rows, first: int, count: int) -> np.ndarray:
        dtype = np.float16 if rows.half else np.float32
        return at(rows.address + first * rows.stride, count, rows.columns, dtype=dtype)

    def compute(self, *results: Rows, fields: Sequence[Sequence[np.ndarray]] = ((),), **words: int) -> list[np.ndarray]:
        """Run once, and give what is in these rows.  fields: of each sequence, the arrays of its state."""
        behind = [self._at(rows, self.T, 1) for rows in results]
        for row in behind:
            row[:] = UNTOUCHED
        firsts = [self.first] if isinstance(self.first, int) else list(self.first)
        count = self.T // len(firsts)
        addresses = [np.array([a.ctypes.data for a in arrays] or [0], np.int64) for arrays in fields]
        addresses *= len(firsts) // len(addresses)
        table = [[a.ctypes.data, f, count * i, count] for i, (a, f) in enumerate(zip(addresses, firsts, strict=True))]
        self.finish()
        self.run(
            rows=self.T,
            sequence_of=self.keep(np.repeat(np.arange(len(firsts)), count)),
            sequences=len(firsts),
            table=self.keep(np.array(table)),
            **words,
        )
        for row in behind:
            np.testing.assert_array_equal(row, UNTOUCHED, "written behind the last row")
        return [self.array(rows).copy() for rows in results]


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# The 16-bit floats of a packed block, by their first byte: scale and, in some kinds, minimum or its scale.
SCALES = {
    Kind.Q8_0: (0,), Kind.Q4_0: (0,), Kind.Q5_0: (0,), Kind.Q4_1: (0, 2), Kind.Q5_1: (0, 2),
    Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,),
}  # fmt: skip


def random_matrix(kind: Kind, rows: int, columns: int, seed: int = 7) -> Matrix:
    """Any bytes at all, with scales that are ordinary numbers."""
    rng = np.random.default_rng(seed)
    if kind not in SCALES:
        data = quantize(rng.normal(size=(rows, columns)).astype(np.float32), kind)
        return Matrix(data.view(np.uint8).reshape(rows, -1), kind, (rows, columns))
    values, size = GGML_QUANT_SIZES[kind]
    w = Matrix(rng.integers(0, 256, (rows, columns // values * size), dtype=np.uint8), kind, (rows, columns))
    for i in range(len(SCALES[kind])):
        field = scales(w, i)
        field[:] = rng.normal(size=field.shape)
    return w


def scales(w: Matrix, which: int) -> np.ndarray:
    """A view of one of SCALES of each block of a matrix, float16 [rows, blocks]."""
    blocks = w.data.reshape(len(w.data), -1, GGML_QUANT_SIZES[w.kind][1])
    first = SCALES[w.kind][which]
    return np.lib.stride_tricks.as_strided(
        w.data.reshape(-1)[first : first + 2].view(np.float16), blocks.shape[:2], blocks.strides[:2]
    )
