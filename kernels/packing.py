"""Kinds of weights: what the bytes of each GGUF kind stand for, written once for CPUs and GPUs.

A quantised row consists of blocks, a block of runs of 32 columns. Column c of a run stands for

    blocks of one run     (q[c] - offset) d       or, where there are minima, q[c] d + m
    blocks of 8 runs      (q[c] - offset) s d     or                          q[c] s d - t m

where q are integers of 4 to 8 bits, d and m float16 of the block, s and t small integers of the run. A kind is one row
of PACKINGS: its bits, the fields of its block, and how runs are read from them. Reading is arithmetic on integers
alone, so that the same text makes machine code (kernels/cpu/packing.py) and works on arrays (kernels/cuda/packing.py).
Formats: the GGUF specification; reference: gguf-py's dequantize.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
from gguf.constants import GGMLQuantizationType as Kind

RUN = 32  # columns that share scales, and whose activations are quantised, together


class Block(Protocol):
    """What reading needs of a block, or of many blocks at once. Integers may be bytes: none gets larger on the way."""

    def bytes(self, field: str, at: int) -> Any:
        """32 bytes of a field from byte `at` on, as integers [.., 32]."""

    def byte(self, field: str, at: int) -> Any:
        """One byte, as an integer [..]."""

    def nibbles(self, field: str) -> Any:
        """A field of 16 bytes as integers [.., 32]: the low four bits of each, then the high ones."""

    def bits(self, field: str) -> Any:
        """A field of 4 bytes as integers [.., 32]: its bits, the lowest first."""


class Run(NamedTuple):
    """32 columns of a block."""

    q: Any  # integers [.., 32], none below 0
    by: tuple[Any, ...] = ()  # s (one, or one for each half), then t, where the kind has them


def _single(b: Block, bits: int) -> list[Run]:
    """A block of one run."""
    q = b.bytes("q", 0) ^ 128 if bits == 8 else b.nibbles("q")  # signed bytes: 128 more
    return [Run(q | b.bits("high") << 4 if bits == 5 else q)]


def _k_blocks(b: Block, bits: int) -> list[Run]:
    """Q4_K and Q5_K: runs two by two in the nibbles of 32 bytes, fifth bits run by run, s and t of 6 bits."""
    x = [b.byte("scales", i) for i in range(12)]
    by = [(x[j] & 63, x[j + 4] & 63) for j in range(4)]
    by += [((x[j + 8] & 15) | (x[j] >> 6) << 4, (x[j + 8] >> 4) | (x[j + 4] >> 6) << 4) for j in range(4)]
    runs = []
    for j in range(8):
        q = b.bytes("q", 32 * (j // 2)) >> 4 * (j % 2) & 15
        runs.append(Run(q | (b.bytes("high", 0) >> j & 1) << 4 if bits == 5 else q, by[j]))
    return runs


def _q6_k(b: Block, bits: int) -> list[Run]:
    """Two times four runs: first the nibbles of 64 bytes, and two bits each of 32 more; s are signed bytes."""
    runs = []
    for j in range(8):
        half, quarter = divmod(j, 4)
        low = b.bytes("q", 64 * half + 32 * (quarter % 2)) >> 4 * (quarter // 2) & 15
        high = b.bytes("high", 32 * half) >> 2 * quarter & 3
        runs.append(Run(low | high << 4, tuple((b.byte("scales", 2 * j + i) ^ 128) - 128 for i in (0, 1))))
    return runs


class Packing(NamedTuple):
    """A quantised kind."""

    bits: int  # of an integer: 4, 5, 6 or 8
    block: np.dtype  # its bytes by field: q (the lowest four bits, or all 8), high (those above), d, m, scales
    read: Callable[[Any, int], list[Run]]  # of (block, bits)
    scales: int = 1  # of a run

    @property
    def runs(self) -> int:
        """Of a block."""
        return self.block["q"].itemsize // (32 if self.bits == 8 else 16)

    @property
    def high(self) -> int:
        """Bits of an integer that lie apart from the lowest four."""
        return self.bits - 4 if self.bits < 8 else 0

    @property
    def minimum(self) -> bool:
        return "m" in (self.block.names or ())

    @property
    def offset(self) -> int:
        """What is subtracted from the integers: half their range, where there is no minimum."""
        return 0 if self.minimum else 1 << (self.bits - 1)


def _block(**fields: int) -> np.dtype:
    """Fields of so many bytes, one after the other."""
    return np.dtype([(name, np.uint8, count) for name, count in fields.items()])


FLOATS = {Kind.F32: 4, Kind.F16: 2, Kind.BF16: 2}  # bytes of an element
PACKINGS = {
    Kind.Q8_0: Packing(8, _block(d=2, q=32), _single),
    Kind.Q4_0: Packing(4, _block(d=2, q=16), _single),
    Kind.Q4_1: Packing(4, _block(d=2, m=2, q=16), _single),
    Kind.Q5_0: Packing(5, _block(d=2, high=4, q=16), _single),
    Kind.Q5_1: Packing(5, _block(d=2, m=2, high=4, q=16), _single),
    Kind.Q4_K: Packing(4, _block(d=2, m=2, scales=12, q=128), _k_blocks),
    Kind.Q5_K: Packing(5, _block(d=2, m=2, scales=12, high=32, q=128), _k_blocks),
    Kind.Q6_K: Packing(6, _block(q=128, high=64, scales=16, d=2), _q6_k, scales=2),
}
