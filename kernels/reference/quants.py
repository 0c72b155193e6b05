"""Weights as stored: packed bytes, their kind, and the values they stand for."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from gguf.constants import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from numpy.typing import NDArray

from tcinfer.kernels.packing import FLOATS, PACKINGS

KINDS = (*FLOATS, *PACKINGS)


class Matrix:
    """A weight matrix [rows, columns], row by row in the packing of its kind.

    data: uint8 [rows, bytes per row], usually a view of the mapped file; never changed.
    """

    def __init__(self, data: NDArray[np.uint8], kind: Kind, shape: tuple[int, int]) -> None:
        assert data.dtype == np.uint8
        assert len(data) == shape[0]
        self.data, self.kind, self.shape = data, kind, shape

    @cached_property
    def values(self) -> NDArray[np.float32]:
        """float32 [rows, columns]: the whole matrix, unpacked once and kept."""
        return unpack(self.data, self.kind)

    def rows(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """float32 [len(ids), columns]: the rows named, unpacked."""
        return unpack(self.data[ids], self.kind)


def small(values: NDArray[np.float32]) -> Matrix:
    """A float32 matrix [rows, columns] as one."""
    data = np.ascontiguousarray(values).view(np.uint8).reshape(len(values), -1)
    return Matrix(data, Kind.F32, (values.shape[0], values.shape[1]))


def unpack(data: NDArray[np.uint8], kind: Kind) -> NDArray[np.float32]:
    """float32 [rows, columns] of packed rows uint8 [rows, bytes per row] (formats: the GGUF specification)."""
    if kind == Kind.F32:
        return np.ascontiguousarray(data).view(np.float32)
    return dequantize(np.ascontiguousarray(data), kind).astype(np.float32, copy=False)


def linear(x: NDArray[np.float32], w: Matrix, bias: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """y = x Wᵀ + b.  x float32 [T, columns]; w [rows, columns]; bias [rows] or None; returns [T, rows]."""
    # One row as a matrix-vector product: the library's matrix product would copy all of W first.
    y = (w.values @ x[0])[None] if len(x) == 1 else x @ w.values.T
    return y if bias is None else y + bias
