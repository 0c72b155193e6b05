"""Packed weights: what the bytes of each GGUF kind stand for, and the layout in which products read them.

Each kind is described once (`KINDS`), as runs of 32 values q·d + m or (q - offset)·d. From that come unpacking, and
repacking into rows interleaved by 16: for each run of 32 columns, one after the other,

    d     float16 [16]      scales of 16 rows; twice where 16 columns share one (Q6_K)
    m     float16 [16]      minima, where the kind has them
    high  int32 [1|2][16]   the fifth bits of 32 columns: bit j of byte k belongs to column 4j + k, bit 4 + j to column
                            16 + 4j + k; or the fifth and sixth: bits 2j, 2j + 1, the two halves in two words
    q     int32 [4|8][16]   byte k of word j: column 4j + k in the low four bits and column 16 + 4j + k in the high
                            ones; or, with 8 bits, column 4j + k alone

so that one vector holds four columns of 16 rows, which is what the byte product takes. Q4_K becomes Q4_1's layout and
Q5_K Q5_1's (scales rounded to float16: 11 and 9 % more bytes), Q6_K its own with float16 scales (7 % more). Floats are
interleaved column by column. Formats: the GGUF specification; reference: gguf-py's dequantize.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import GGMLQuantizationType as Kind
from llvmlite import ir
from numba.core import cgutils, types

from tcinfer.kernels.cpu.simd import F32, I8, I16, I32, I64, LANES, Lanes, constant, intrinsic, load, store

RUN = 32  # columns that are packed, and whose activations are quantised, together


class Block:
    """One packed block of a row: its address, and the NumPy dtype that says where its fields lie."""

    def __init__(self, builder: Any, address: Any, dtype: np.dtype) -> None:
        self.builder, self.address, self.dtype = builder, address, dtype

    def vector(self, field: str, at: int = 0, count: int = LANES) -> Lanes:
        """`count` elements of a field from element `at` on, as stored."""
        assert self.dtype.fields is not None
        base, offset = self.dtype.fields[field][:2]
        size = base.base.itemsize
        return load(self.builder, self.address, offset + at * size, ir.IntType(8 * size), count)

    def scalar(self, field: str, at: int = 0) -> Lanes:
        return self.vector(field, at, 1)

    def half(self, field: str) -> Lanes:
        return self.scalar(field).half()


class Run(NamedTuple):
    """32 values of a block: two vectors of unsigned integers, the scale of each, and the minimum, if there is one."""

    q: tuple[Lanes, Lanes]
    d: tuple[Lanes, Lanes]
    m: Lanes | None = None


def _nibbles(b: Block, at: int = 0) -> tuple[Lanes, Lanes]:
    """16 bytes as 32 values of 4 bits: low nibbles, then high ones."""
    q = b.vector("q", at).wide()
    return q & 15, q >> 4


def _fifth(b: Block) -> tuple[Lanes, Lanes]:
    """The fifth bits of 32 values, in place."""
    word = b.scalar("high").splat()
    first, second = (word >> constant(b.builder, I32, list(range(i, i + 16))) for i in (0, 16))
    return (first & 1) << 4, (second & 1) << 4


def _run(b: Block, q: tuple[Lanes, Lanes]) -> list[Run]:
    """A block of one run, with the fields d and, in some kinds, m."""
    d = b.half("d")
    return [Run(q, (d, d), b.half("m") if "m" in (b.dtype.names or ()) else None)]


def _q8(b: Block) -> list[Run]:
    first, second = (b.vector("q", i).wide(signed=True) + 128 for i in (0, 16))
    return _run(b, (first, second))


def _q4(b: Block) -> list[Run]:
    return _run(b, _nibbles(b))


def _q5(b: Block) -> list[Run]:
    (first, second), (above, above_second) = _nibbles(b), _fifth(b)
    return _run(b, (first | above, second | above_second))


def _k_scales(b: Block) -> list[tuple[Lanes, Lanes]]:
    """Scale and minimum of the 8 runs of a K block: 6 bits each, packed into 12 bytes."""
    s = [b.scalar("scales", i).wide() for i in range(12)]
    d, low = b.half("d"), b.half("dmin")
    first = [(s[j] & 63, s[j + 4] & 63) for j in range(4)]
    rest = [((s[j + 8] & 15) | ((s[j] >> 6) << 4), (s[j + 8] >> 4) | ((s[j + 4] >> 6) << 4)) for j in range(4)]
    return [(scale.float() * d, minimum.float() * low * -1.0) for scale, minimum in first + rest]


def _q4_k(b: Block) -> list[Run]:
    runs = []
    for j, (d, m) in enumerate(_k_scales(b)):
        first, second = (_nibbles(b, 32 * (j // 2) + i)[j % 2] for i in (0, 16))
        runs.append(Run((first, second), (d, d), m))
    return runs


def _q5_k(b: Block) -> list[Run]:
    runs = []
    for j, run in enumerate(_q4_k(b)):
        above, above_second = (((b.vector("high", i).wide() >> j) & 1) << 4 for i in (0, 16))
        runs.append(run._replace(q=(run.q[0] | above, run.q[1] | above_second)))
    return runs


def _q6_k(b: Block) -> list[Run]:
    runs = []
    for j in range(8):  # two halves of 128 values, each of 4 runs
        half, quarter = divmod(j, 4)
        scales = [b.scalar("scales", 2 * j + i).wide(signed=True).float() * b.half("d") for i in (0, 1)]
        parts = []
        for within in (0, 16):
            low = _nibbles(b, 64 * half + 32 * (quarter % 2) + within)[quarter // 2]
            parts.append(low | (((b.vector("high", 32 * half + within).wide() >> (2 * quarter)) & 3) << 4))
        runs.append(Run((parts[0], parts[1]), (scales[0], scales[1])))
    return runs


class Packing(NamedTuple):
    """A quantised kind: its block's fields, how to read its runs, and the shape of its interleaved layout."""

    dtype: np.dtype
    runs: Callable[[Block], list[Run]]
    per_block: int  # runs
    bits: int  # of an integer: 4, 5, 6 or 8
    offset: int  # subtracted from the integers, where there is no minimum
    minimum: bool = False
    scales: int = 1  # of a run

    @property
    def highs(self) -> int:
        """Vectors that hold the bits above the fourth."""
        return {5: 1, 6: 2}.get(self.bits, 0)

    @property
    def words(self) -> int:
        """Vectors that hold the rest."""
        return 8 if self.bits == 8 else 4

    @property
    def bytes(self) -> int:
        """Of one run of 16 rows."""
        return 32 * (self.scales + self.minimum) + 64 * (self.highs + self.words)

    def read(self, builder: Any, address: Any) -> list[Lanes]:
        """The integers of one run of 16 rows as 8 vectors of 4 bytes a lane: columns 0-3, 4-7, .., 28-31."""
        at = 32 * (self.scales + self.minimum)
        high = [load(builder, address, at + 64 * i, I32) for i in range(self.highs)]
        at += 64 * self.highs
        words = [load(builder, address, at + 64 * i, I32) for i in range(self.words)]
        if self.bits == 8:
            return words
        out = []
        for half in (0, 1):
            for j, word in enumerate(words):
                q = ((word >> 4) if half else word) & 0x0F0F0F0F
                if self.bits == 5:
                    bit = j + 4 * half
                    q = q | ((high[0] << (4 - bit) if bit < 4 else high[0] >> (bit - 4)) & 0x10101010)
                elif self.bits == 6:
                    shift = 4 - 2 * j
                    q = q | ((high[half] << shift if shift >= 0 else high[half] >> -shift) & 0x30303030)
                out.append(q)
        return out

    def write(self, run: Run, address: Any, lane: Any) -> None:
        """The same run of one row, which is row `lane` (int64) of its 16."""
        builder = run.q[0].builder
        narrow, wide = builder.mul(lane, I64(2)), builder.mul(lane, I64(4))

        def put(value: Lanes, offset: int, by: Any) -> None:
            store(value, builder.add(address, by), offset)

        for i in range(self.scales):
            put(run.d[i].to_half(), 32 * i, narrow)
        at = 32 * self.scales
        if run.m is not None:
            put(run.m.to_half(), at, narrow)
            at += 32
        above = [(q >> 4).narrow(I8).bits(I32) for q in run.q] if self.highs else []  # int32 [4], values in 4 bytes
        if self.bits == 5:
            word = constant(builder, I32, 4)
            word = Lanes(builder, builder.extract_element(word.value, I32(0)))
            for half, part in enumerate(above):
                for j in range(4):
                    word = word | (part.lane(j) << (j + 4 * half))
            put(word, at, wide)
        elif self.bits == 6:
            for half, part in enumerate(above):
                word = part.lane(0) | (part.lane(1) << 2) | (part.lane(2) << 4) | (part.lane(3) << 6)
                put(word, at + 64 * half, wide)
        at += 64 * self.highs
        if self.bits == 8:
            words = [q.narrow(I8).bits(I32) for q in run.q]
        else:
            words = [((run.q[0] & 15) | ((run.q[1] & 15) << 4)).narrow(I8).bits(I32)]
        for i in range(self.words):
            put(words[i // 4].lane(i % 4), at + 64 * i, wide)


def _fields(**fields: Any) -> np.dtype:
    return np.dtype([(name, *((kind,) if isinstance(kind, str) else kind)) for name, kind in fields.items()])


def _bytes(count: int, kind: str = "u1") -> tuple[str, tuple[int]]:
    return kind, (count,)


H = "<u2"
PACKINGS = {
    Kind.Q8_0: Packing(_fields(d=H, q=_bytes(32, "i1")), _q8, 1, bits=8, offset=128),
    Kind.Q4_0: Packing(_fields(d=H, q=_bytes(16)), _q4, 1, bits=4, offset=8),
    Kind.Q4_1: Packing(_fields(d=H, m=H, q=_bytes(16)), _q4, 1, bits=4, offset=0, minimum=True),
    Kind.Q5_0: Packing(_fields(d=H, high="<u4", q=_bytes(16)), _q5, 1, bits=5, offset=16),
    Kind.Q5_1: Packing(_fields(d=H, m=H, high="<u4", q=_bytes(16)), _q5, 1, bits=5, offset=0, minimum=True),
    Kind.Q4_K: Packing(
        _fields(d=H, dmin=H, scales=_bytes(12), q=_bytes(128)), _q4_k, 8, bits=4, offset=0, minimum=True
    ),
    Kind.Q5_K: Packing(
        _fields(d=H, dmin=H, scales=_bytes(12), high=_bytes(32), q=_bytes(128)),
        _q5_k,
        8,
        bits=5,
        offset=0,
        minimum=True,
    ),
    Kind.Q6_K: Packing(
        _fields(q=_bytes(128), high=_bytes(64), scales=_bytes(16, "i1"), d=H), _q6_k, 8, bits=6, offset=32, scales=2
    ),
}
FLOATS = {Kind.F32: 4, Kind.F16: 2, Kind.BF16: 2}  # bytes of an element


def to_float(stored: Lanes, kind: Kind) -> Lanes:
    """Elements of a float kind, as they lie in memory, in float32."""
    if kind == Kind.F32:
        return stored.bits(F32)
    return stored.half() if kind == Kind.F16 else (stored.wide() << 16).bits(F32)


def element(kind: Kind) -> Any:
    """The LLVM integer that holds an element of a float kind."""
    return I32 if kind == Kind.F32 else I16


def _each_block(builder: Any, packing: Packing, row: Any, blocks: Any) -> Any:
    """The loop over a row's blocks: yields (number of the first run, the block's runs) once, the loop being open."""
    with cgutils.for_range(builder, blocks) as loop:
        address = builder.add(row, builder.mul(loop.index, I64(packing.dtype.itemsize)))
        yield builder.mul(loop.index, I64(packing.per_block)), packing.runs(Block(builder, address, packing.dtype))


def unpacker(packing: Packing) -> Any:
    """The intrinsic unpack(row, blocks, out): float32 values of a packed row.  Addresses, and a count of blocks."""

    @intrinsic
    def unpack(typingctx: Any, row: Any, blocks: Any, out: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            row, blocks, out = arguments
            for first, runs in _each_block(builder, packing, row, blocks):
                at = builder.add(out, builder.mul(first, I64(4 * RUN)))
                for i, run in enumerate(runs):
                    for half in (0, 1):
                        q = run.q[half] if run.m is not None else run.q[half] - packing.offset
                        value = q.float() * run.d[half]
                        store(value if run.m is None else value + run.m, at, 128 * i + 64 * half)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), codegen

    return unpack


def interleaver(packing: Packing) -> Any:
    """The intrinsic interleave(row, blocks, out, lane): a packed row becomes row `lane` of the 16 at `out`."""

    @intrinsic
    def interleave(typingctx: Any, row: Any, blocks: Any, out: Any, lane: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            row, blocks, out, lane = arguments
            for first, runs in _each_block(builder, packing, row, blocks):
                at = builder.add(out, builder.mul(first, I64(packing.bytes)))
                for i, run in enumerate(runs):
                    packing.write(run, builder.add(at, I64(i * packing.bytes)), lane)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64, types.int64), codegen

    return interleave
