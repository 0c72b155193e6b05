"""The state of one sequence: one buffer, laid out by the configuration alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tcinfer.errors import TcinferError

ALIGNMENT = 64  # bytes: a cache line, and the widest vector


class Field(NamedTuple):
    """One array of a layer's state."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    by_token: bool = False  # an entry for each token, filled in order and then again from somewhere: the ring's


@dataclass(frozen=True)
class Layout:
    """The arrays of every layer, in order; the buffer holds the position (int64), then each array, 64-byte aligned."""

    layers: tuple[tuple[Field, ...], ...]
    capacity: int = 0  # tokens that fit, where the state grows with them

    @property
    def nbytes(self) -> int:
        return ALIGNMENT + sum(_padded(f) for fields in self.layers for f in fields)

    def places(self) -> Iterator[tuple[int, Field, int]]:
        """Every array: its layer, itself, and where in the buffer it begins."""
        at = ALIGNMENT
        for layer, fields in enumerate(self.layers):
            for f in fields:
                yield layer, f, at
                at += _padded(f)


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
        self.layers: list[dict[str, NDArray]] = [{} for _ in layout.layers]
        for layer, f, at in layout.places():
            self.layers[layer][f.name] = self.buffer[at : at + _bytes(f)].view(f.dtype).reshape(f.shape)
        addresses = [array.ctypes.data for views in self.layers for array in views.values()]
        self.addresses = np.array(addresses, np.int64)  # of every array, layer by layer

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
        return self.resized(self.layout)

    def resized(self, layout: Layout) -> State:
        """The same contents in a layout with room for another number of tokens (unbounded caches alone need this).

        What no token has filled yet stays untouched, and takes no memory.
        """
        other = State(layout)
        other.position = self.position
        for fields, old, new in zip(layout.layers, self.layers, other.layers, strict=True):
            for f in fields:
                count = min(len(old[f.name]), f.shape[0], self.position if f.by_token else f.shape[0])
                new[f.name][:count] = old[f.name][:count]
        return other

    def on_host(self) -> State:
        """Itself."""
        return self


class DeviceState:
    """The same in a GPU's memory: passes run on it there, and whoever wants to look at it gets a copy."""

    def __init__(self, layout: Layout, device: Any) -> None:
        """All zeros, position 0. Raises TcinferError if the device has not so much memory."""
        places = [at for _, _, at in layout.places()]
        self.layout, self.position, self._device = layout, 0, device
        self._room = device.zeros(layout.nbytes + 8 * len(places))
        self.fields = self._room.address + layout.nbytes  # address of the arrays' addresses, int64
        device.put(self.fields, np.array(places, np.int64) + self._room.address)

    @classmethod
    def placed(cls, state: State, device: Any) -> DeviceState:
        """A copy of a state of this machine's memory."""
        other = cls(state.layout, device)
        device.put(other._room.address, state.buffer)
        other.position = state.position
        return other

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes

    def on_host(self) -> State:
        """A copy in this machine's memory."""
        other = State(self.layout)
        self._device.get(self._room.address, other.buffer)
        other.position = self.position
        return other

    def copy(self) -> DeviceState:
        """Another state with the same contents and nothing shared."""
        other = DeviceState(self.layout, self._device)
        other.position = self.position
        self._device.copy(other._room.address, self._room.address, self.nbytes)
        return other

    def resized(self, layout: Layout) -> DeviceState:
        """The same contents in a layout with room for another number of tokens."""
        other = DeviceState(layout, self._device)
        other.position = self.position
        for (_, old, at), (_, new, to) in zip(self.layout.places(), layout.places(), strict=True):
            count = min(_bytes(old), _bytes(new))  # a field grows, if at all, along its first axis
            self._device.copy(other._room.address + to, self._room.address + at, count)
        return other


AnyState = State | DeviceState
