"""The state of one sequence: one buffer, laid out by the configuration alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tcinfer.errors import TcinferError

ALIGNMENT = 64  # bytes: a cache line, and the widest vector


class Spec(NamedTuple):
    """What a weight must look like, in NumPy order."""

    shape: tuple[int, ...]
    required: bool = True
    matrix: bool = False  # a projection: may be quantised; everything else is kept in float32


class Field(NamedTuple):
    """One array of a layer's state."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"


@dataclass(frozen=True)
class Layout:
    """The arrays of every layer, in order; the buffer holds the position (int64), then each array, 64-byte aligned."""

    layers: tuple[tuple[Field, ...], ...]
    capacity: int = 0  # tokens that fit, where the state grows with them

    @property
    def nbytes(self) -> int:
        return ALIGNMENT + sum(_padded(f) for fields in self.layers for f in fields)


def _bytes(f: Field) -> int:
    return math.prod(f.shape) * np.dtype(f.dtype).itemsize


def _padded(f: Field) -> int:
    return -(-_bytes(f) // ALIGNMENT) * ALIGNMENT


class State:
    """One preallocated buffer and the views into it: `layers[i][name]` is an array, `position` a count of tokens."""

    def __init__(self, layout: Layout) -> None:
        """All zeros, position 0. Raises TcinferError if the machine cannot give the bytes."""
        try:
            room = np.zeros(layout.nbytes + ALIGNMENT, np.uint8)
        except (MemoryError, ValueError) as e:
            raise TcinferError(
                f"a session of this model needs {layout.nbytes:,} bytes, which this machine does not give; "
                "choose a smaller window"
            ) from e
        start = -room.ctypes.data % ALIGNMENT
        self.layout = layout
        self.buffer: NDArray[np.uint8] = room[start : start + layout.nbytes]
        self._position: NDArray[np.int64] = self.buffer[:8].view(np.int64)
        self.layers: list[dict[str, NDArray]] = []
        addresses = []  # of every array, layer by layer
        at = ALIGNMENT
        for fields in layout.layers:
            views = {}
            for f in fields:
                views[f.name] = self.buffer[at : at + _bytes(f)].view(f.dtype).reshape(f.shape)
                addresses.append(views[f.name].ctypes.data)
                at += _padded(f)
            self.layers.append(views)
        self.addresses = np.array(addresses, np.int64)

    @property
    def position(self) -> int:
        """Tokens taken in so far."""
        return int(self._position[0])

    @position.setter
    def position(self, value: int) -> None:
        self._position[0] = value

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes

    def copy(self) -> State:
        """Another state with the same contents and nothing shared."""
        other = State(self.layout)
        other.buffer[:] = self.buffer
        return other

    def resized(self, layout: Layout) -> State:
        """The same contents in a layout with room for another number of tokens (unbounded caches alone need this)."""
        other = State(layout)
        other.position = self.position
        for old, new in zip(self.layers, other.layers, strict=True):
            for name, array in old.items():
                count = min(len(array), len(new[name]))
                new[name][:count] = array[:count]
        return other
