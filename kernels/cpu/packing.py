"""Packed weights as the CPU's products read them: unpacking, and repacking into rows interleaved by 16.

What the bytes of each kind stand for is in kernels/packing.py. For each run of 32 columns, one after the other:

    d     float16 [16]      scales of 16 rows; twice where 16 columns share one (Q6_K)
    m     float16 [16]      minima, where the kind has them
    high  int32 [1|2][16]   the fifth bits of 32 columns: bit j of byte k belongs to column 4j + k, bit 4 + j to column
                            16 + 4j + k; or the fifth and sixth: bits 2j, 2j + 1, the two halves in two words
    q     int32 [4|8][16]   byte k of word j: column 4j + k in the low four bits and column 16 + 4j + k in the high
                            ones; or, with 8 bits, column 4j + k alone

so that one vector holds four columns of 16 rows, which is what the byte product takes. Q4_K becomes Q4_1's layout and
Q5_K Q5_1's (scales rounded to float16: 11 and 9 % more bytes), Q6_K its own with float16 scales (7 % more). Floats are
interleaved column by column.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import GGMLQuantizationType as Kind
from llvmlite import ir
from numba.core import cgutils, types

from tcinfer.kernels.cpu.simd import F32, I8, I16, I32, I64, LANES, Lanes, constant, intrinsic, load, store
from tcinfer.kernels.packing import RUN, Packing


def to_float(stored: Lanes, kind: Kind) -> Lanes:
    """Elements of a float kind, as they lie in memory, in float32."""
    if kind == Kind.F32:
        return stored.bits(F32)
    return stored.half() if kind == Kind.F16 else (stored.wide() << 16).bits(F32)


def element(kind: Kind) -> Any:
    """The LLVM integer that holds an element of a float kind."""
    return I32 if kind == Kind.F32 else I16


def interleaved(p: Packing) -> np.dtype:
    """The layout of one run of 16 rows."""
    counts = {"d": p.scales, "m": int(p.minimum), "high": p.high, "q": 8 if p.bits == 8 else 4}
    return np.dtype([(name, "<u2" if name in "dm" else "<u4", (count, LANES)) for name, count in counts.items()])


def _places(p: Packing, field: str) -> tuple[Any, list[int]]:
    """The LLVM integer of a field's elements, and where each of its vectors lies in a run of 16 rows."""
    fields: Any = interleaved(p).fields
    kind, offset = fields[field]
    size = kind.base.itemsize
    return ir.IntType(8 * size), [offset + LANES * size * i for i in range(kind.shape[0])]


def read(p: Packing, builder: Any, address: Any) -> tuple[list[Lanes], list[Lanes], list[Lanes]]:
    """A run of 16 rows: its integers as 8 vectors of 4 bytes a lane (columns 0-3, 4-7, .., 28-31), d, and m or none."""

    def vectors(field: str) -> list[Lanes]:
        element, places = _places(p, field)
        return [load(builder, address, place, element) for place in places]

    high, q = vectors("high"), vectors("q")
    if p.bits < 8:
        q = [(word >> up) & 0x0F0F0F0F for up in (0, 4) for word in q]
    for i in range(8 if high else 0):
        word, place = divmod(i, 8 // p.high)
        up = 4 - p.high * place
        above = high[word] << up if up >= 0 else high[word] >> -up
        q[i] = q[i] | (above & (0x10101010 * ((1 << p.high) - 1)))
    return q, [d.half() for d in vectors("d")], [m.half() for m in vectors("m")]


class _Block:
    """A block of a row at an address, for kernels/packing.py to read."""

    def __init__(self, builder: Any, address: Any, dtype: Any) -> None:
        self.builder, self.address, self.fields = builder, address, dtype.fields

    def _load(self, field: str, at: int, element: Any, count: int = 1) -> Lanes:
        return load(self.builder, self.address, self.fields[field][1] + at, element, count)

    def bytes(self, field: str, at: int) -> Lanes:
        return self._load(field, at, I8, RUN).wide()

    def byte(self, field: str, at: int) -> Lanes:
        return self._load(field, at, I8).wide()

    def nibbles(self, field: str) -> Lanes:
        q = self._load(field, 0, I8, 16).wide()
        return (q & 15).shuffle(q >> 4, list(range(RUN)))

    def bits(self, field: str) -> Lanes:
        word = self._load(field, 0, I32).splat(RUN)
        return (word >> constant(self.builder, I32, list(range(RUN)))) & 1

    def half(self, field: str) -> Lanes:
        return self._load(field, 0, I16).half()


class Values(NamedTuple):
    """A run of one row: its integers, their scale (or one for each half), and the minimum, if there is one."""

    q: list[Lanes]
    d: list[Lanes]
    m: Lanes | None


def _runs(builder: Any, p: Packing, row: Any, blocks: Any) -> Iterator[tuple[Any, list[Values]]]:
    """The loop over a row's blocks: yields (number of the first run, the block's runs) once, the loop being open."""
    with cgutils.for_range(builder, blocks) as loop:
        b = _Block(builder, builder.add(row, builder.mul(loop.index, I64(p.block.itemsize))), p.block)
        d, m = b.half("d"), b.half("m") if p.minimum else None
        runs = []
        for q, by in p.read(b, p.bits):
            scales = [s.float() * d for s in by[: p.scales]] or [d]
            minimum = by[-1].float() * m * -1.0 if by and m else m
            runs.append(Values([q.part(0, LANES), q.part(LANES, LANES)], scales, minimum))
        yield builder.mul(loop.index, I64(p.runs)), runs


def unpacker(p: Packing) -> Any:
    """The intrinsic unpack(row, blocks, out): float32 values of a packed row.  Addresses, and a count of blocks."""

    @intrinsic(types.void, *[types.int64] * 3)
    def unpack(builder: Any, row: Any, blocks: Any, out: Any) -> None:
        for first, runs in _runs(builder, p, row, blocks):
            at = builder.add(out, builder.mul(first, I64(4 * RUN)))
            for i, run in enumerate(runs):
                for half, d in enumerate(run.d * (2 // len(run.d))):
                    q = run.q[half]
                    value = q.float() * d + run.m if run.m else (q - p.offset).float() * d
                    store(value, at, 128 * i + 64 * half)

    return unpack


def interleaver(p: Packing) -> Any:
    """The intrinsic interleave(row, blocks, out, lane): a packed row becomes row `lane` of the 16 at `out`."""
    size = interleaved(p).itemsize

    @intrinsic(types.void, *[types.int64] * 4)
    def interleave(builder: Any, row: Any, blocks: Any, out: Any, lane: Any) -> None:
        for first, runs in _runs(builder, p, row, blocks):
            at = builder.add(out, builder.mul(first, I64(size)))
            for i, run in enumerate(runs):
                _write(p, run, builder.add(at, I64(i * size)), lane)

    return interleave


def _write(p: Packing, run: Values, address: Any, lane: Any) -> None:
    """A run of one row, which is row `lane` (int64) of the 16 at an address: what `read` reads."""
    builder = run.q[0].builder

    def put(field: str, values: list[Lanes]) -> None:
        element, places = _places(p, field)
        at = builder.add(address, builder.mul(lane, I64(element.width // 8)))
        for place, value in zip(places, values, strict=True):
            store(value, at, place)

    def words(q: list[Lanes]) -> list[Lanes]:
        """Integers of 8 bits, four a word."""
        return [part.lane(j) for part in (half.narrow(I8).bits(I32) for half in q) for j in range(4)]

    put("d", [d.to_half() for d in run.d])
    put("m", [run.m.to_half()] if run.m else [])
    if p.high:
        above, count = words([q >> 4 for q in run.q]), 8 // p.high
        shifted = [word << p.high * (i % count) for i, word in enumerate(above)]
        put("high", [reduce(or_, shifted[i : i + count]) for i in range(0, 8, count)])
    put("q", words(run.q if p.bits == 8 else [(run.q[0] & 15) | ((run.q[1] & 15) << 4)]))
