"""Packed weights in vector registers: each kind described once, as the values that its bytes stand for.

A description takes a Block (the fields of one packed block) and gives its values in order, as vectors of LANES float32.
From that one description come the product of a packed row with a float32 vector (`row_dot`) and the unpacking of a
row (`row_unpack`), as intrinsics of Numba. They are written in LLVM's generic vectors: the compiler makes AVX-512,
AVX2 or Arm instructions of them. (Plain Numba loops over a block are not vectorised at all: their trip counts are so
short that they are unrolled into scalars first.) Formats: the GGUF specification; reference: gguf-py's dequantize.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numba
import numpy as np
from gguf.constants import GGMLQuantizationType as Kind
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba.core import cgutils, types
from numba.extending import intrinsic

LANES = 16  # float32 in a vector: one AVX-512 register, two of AVX2, four of Arm
ACCUMULATORS = 4  # independent sums, so that one does not wait for the other

I8, I16, I32, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()
HAS_HALF = bool(get_host_cpu_features().get("f16c")) or platform.machine() in ("aarch64", "arm64")
FAST = ("reassoc", "contract", "nsz", "arcp")  # as kernels.cpu.jit.FASTMATH


class Lanes:
    """A vector (or scalar) under construction: operators emit instructions; a plain number stands for every lane."""

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder, self.value = builder, value

    def _with(self, other: Lanes | float) -> Any:
        want = self.value.type
        if not isinstance(other, Lanes):
            element = want.element if isinstance(want, ir.VectorType) else want
            constant = ir.Constant(element, other)
            return ir.Constant(want, [constant] * want.count) if isinstance(want, ir.VectorType) else constant
        if isinstance(want, ir.VectorType) and not isinstance(other.value.type, ir.VectorType):
            return other.splat(want.count).value
        return other.value

    def _emit(self, name: str, other: Lanes | float) -> Lanes:
        flags = {"flags": FAST} if name.startswith("f") else {}
        return Lanes(self.builder, getattr(self.builder, name)(self.value, self._with(other), **flags))

    @property
    def is_float(self) -> bool:
        return getattr(self.value.type, "element", self.value.type) == F32

    def __add__(self, other: Lanes | float) -> Lanes:
        return self._emit("fadd" if self.is_float else "add", other)

    def __sub__(self, other: Lanes | float) -> Lanes:
        return self._emit("fsub" if self.is_float else "sub", other)

    def __mul__(self, other: Lanes | float) -> Lanes:
        return self._emit("fmul" if self.is_float else "mul", other)

    def __and__(self, other: int) -> Lanes:
        return self._emit("and_", other)

    def __or__(self, other: Lanes | int) -> Lanes:
        return self._emit("or_", other)

    def __lshift__(self, other: Lanes | int) -> Lanes:
        return self._emit("shl", other)

    def __rshift__(self, other: Lanes | int) -> Lanes:  # of unsigned values
        return self._emit("lshr", other)

    def _shaped(self, element: Any) -> Any:
        t = self.value.type
        return ir.VectorType(element, t.count) if isinstance(t, ir.VectorType) else element

    def wide(self, signed: bool = False) -> Lanes:
        """Bytes or halves as 32-bit integers."""
        extend = self.builder.sext if signed else self.builder.zext
        return Lanes(self.builder, extend(self.value, self._shaped(I32)))

    def float(self) -> Lanes:
        """32-bit integers as the numbers they are."""
        return Lanes(self.builder, self.builder.sitofp(self.value, self._shaped(F32)))

    def bits(self, element: Any) -> Lanes:
        """The same bits as another type of the same width."""
        return Lanes(self.builder, self.builder.bitcast(self.value, self._shaped(element)))

    def half(self) -> Lanes:
        """16-bit floats (as integers) in float32; by integer arithmetic where the CPU has no instruction for it."""
        if HAS_HALF:
            return Lanes(self.builder, self.builder.fpext(self.bits(ir.HalfType()).value, self._shaped(F32)))
        h = self.wide()
        magnitude = (h & 0x7FFF) << 13
        finite = (magnitude.bits(F32) * 2.0**112).bits(I32)
        special = self.builder.icmp_unsigned(">=", magnitude.value, magnitude._with(0x7C00 << 13))
        chosen = Lanes(self.builder, self.builder.select(special, (magnitude | 0x7F800000).value, finite.value))
        return (chosen | ((h & 0x8000) << 16)).bits(F32)

    def splat(self, count: int) -> Lanes:
        """A scalar in every lane."""
        one = self.builder.insert_element(
            ir.Constant(ir.VectorType(self.value.type, count), ir.Undefined), self.value, I32(0)
        )
        mask = ir.Constant(ir.VectorType(I32, count), [I32(0)] * count)
        return Lanes(self.builder, self.builder.shuffle_vector(one, one, mask))


class Block:
    """One packed block: a pointer, and the NumPy dtype that says where its fields lie."""

    def __init__(self, builder: Any, pointer: Any, dtype: np.dtype) -> None:
        self.builder, self.pointer, self.dtype = builder, pointer, dtype

    def _load(self, at: Any, element: Any, count: int) -> Lanes:
        want = ir.VectorType(element, count) if count > 1 else element
        typed = self.builder.bitcast(self.builder.gep(self.pointer, [at]), want.as_pointer())
        return Lanes(self.builder, self.builder.load(typed, align=1))

    def vector(self, field: str, at: int = 0, count: int = LANES) -> Lanes:
        """`count` elements of a field from element `at` on, as stored."""
        assert self.dtype.fields is not None
        base, offset = self.dtype.fields[field][:2]
        size = base.base.itemsize
        return self._load(I32(offset + at * size), ir.IntType(8 * size), count)

    def scalar(self, field: str, at: int = 0) -> Lanes:
        return self.vector(field, at, 1)

    def half(self, field: str) -> Lanes:
        return self.scalar(field).half()

    def lanes(self, values: range) -> Lanes:
        """A constant vector."""
        return Lanes(self.builder, ir.Constant(ir.VectorType(I32, len(values)), [I32(v) for v in values]))


def f16(b: Block) -> list[Lanes]:
    return [b.vector("x", i).half() for i in (0, 16)]


def bf16(b: Block) -> list[Lanes]:
    return [(b.vector("upper", i).wide() << 16).bits(F32) for i in (0, 16)]


def q8_0(b: Block) -> list[Lanes]:
    d = b.half("d")
    return [b.vector("q", i).wide(signed=True).float() * d for i in (0, 16)]


def _nibbles(b: Block, at: int = 0) -> list[Lanes]:
    """16 bytes as 32 values of 4 bits: low nibbles, then high ones."""
    q = b.vector("q", at).wide()
    return [q & 15, q >> 4]


def _fifth(b: Block) -> list[Lanes]:
    """The fifth bits of 32 values, already in place."""
    bits = b.scalar("high").splat(LANES)
    return [((bits >> b.lanes(range(i, i + 16))) & 1) << 4 for i in (0, 16)]


def q4_0(b: Block) -> list[Lanes]:
    d = b.half("d")
    return [(q - 8).float() * d for q in _nibbles(b)]


def q4_1(b: Block) -> list[Lanes]:
    d, m = b.half("d"), b.half("m")
    return [q.float() * d + m for q in _nibbles(b)]


def q5_0(b: Block) -> list[Lanes]:
    d = b.half("d")
    return [((q | h) - 16).float() * d for q, h in zip(_nibbles(b), _fifth(b), strict=True)]


def q5_1(b: Block) -> list[Lanes]:
    d, m = b.half("d"), b.half("m")
    return [(q | h).float() * d + m for q, h in zip(_nibbles(b), _fifth(b), strict=True)]


def _k_scales(b: Block) -> list[tuple[Lanes, Lanes]]:
    """Scale and minimum of the 8 sub-blocks of a K block: 6 bits each, packed into 12 bytes."""
    s = [b.scalar("scales", i).wide() for i in range(12)]
    d, low = b.half("d"), b.half("dmin")
    first = [(s[j] & 63, s[j + 4] & 63) for j in range(4)]
    rest = [((s[j + 8] & 15) | ((s[j] >> 6) << 4), (s[j + 8] >> 4) | ((s[j + 4] >> 6) << 4)) for j in range(4)]
    return [(scale.float() * d, minimum.float() * low) for scale, minimum in first + rest]


def q4_k(b: Block) -> list[Lanes]:
    out = []
    for j, (d, m) in enumerate(_k_scales(b)):
        for i in (0, 16):
            out.append(_nibbles(b, 32 * (j // 2) + i)[j % 2].float() * d - m)
    return out


def q5_k(b: Block) -> list[Lanes]:
    out = []
    for j, (d, m) in enumerate(_k_scales(b)):
        for i in (0, 16):
            fifth = ((b.vector("high", i).wide() >> j) & 1) << 4
            out.append((_nibbles(b, 32 * (j // 2) + i)[j % 2] | fifth).float() * d - m)
    return out


def q6_k(b: Block) -> list[Lanes]:
    d = b.half("d")
    out = []
    for i in range(0, 256, 16):  # halves of 128 values, each of 4 runs of 32, each of 2 vectors
        half, run, within = i // 128, i % 128 // 32, i % 32
        low = _nibbles(b, 64 * half + 32 * (run % 2) + within)[run // 2]
        high = ((b.vector("high", 32 * half + within).wide() >> (2 * run)) & 3) << 4
        scale = b.scalar("scales", i // 16).wide(signed=True).float() * d
        out.append(((low | high) - 32).float() * scale)
    return out


class Packing(NamedTuple):
    """A kind of packing: its block's fields, how many values a block holds, and what they are."""

    dtype: np.dtype
    values: int
    describe: Callable[[Block], list[Lanes]]


def _packing(values: int, describe: Callable[[Block], list[Lanes]], **fields: Any) -> Packing:
    return Packing(np.dtype([(name, *kind) for name, kind in fields.items()]), values, describe)


def _bytes(count: int, kind: str = "u1") -> tuple[str, tuple[int]]:
    return (kind, (count,))


_HALF = ("<u2",)
PACKINGS = {
    Kind.F16: _packing(32, f16, x=_bytes(32, "<u2")),  # no blocks of its own: rows in runs of 32
    Kind.BF16: _packing(32, bf16, upper=_bytes(32, "<u2")),  # the upper half of a float32
    Kind.Q8_0: _packing(32, q8_0, d=_HALF, q=_bytes(32, "i1")),
    Kind.Q4_0: _packing(32, q4_0, d=_HALF, q=_bytes(16)),
    Kind.Q4_1: _packing(32, q4_1, d=_HALF, m=_HALF, q=_bytes(16)),
    Kind.Q5_0: _packing(32, q5_0, d=_HALF, high=("<u4",), q=_bytes(16)),
    Kind.Q5_1: _packing(32, q5_1, d=_HALF, m=_HALF, high=("<u4",), q=_bytes(16)),
    Kind.Q4_K: _packing(256, q4_k, d=_HALF, dmin=_HALF, scales=_bytes(12), q=_bytes(128)),
    Kind.Q5_K: _packing(256, q5_k, d=_HALF, dmin=_HALF, scales=_bytes(12), high=_bytes(32), q=_bytes(128)),
    Kind.Q6_K: _packing(256, q6_k, q=_bytes(128), high=_bytes(64), scales=_bytes(16, "i1"), d=_HALF),
}
_BY_TYPE = {numba.from_dtype(packing.dtype): packing for packing in PACKINGS.values()}


def _vectors(context: Any, builder: Any, signature: Any, arguments: Any) -> Iterator[tuple[int, Lanes, Any]]:
    """The loop over a row's blocks, open while this generator runs: for each vector of a block its number, its values,
    and a pointer to the same place in the float32 array.  arguments: records [rows, blocks], row, floats [columns]."""
    blocks_type, _, floats_type = signature.args
    packing = _BY_TYPE[blocks_type.dtype]
    blocks = context.make_array(blocks_type)(context, builder, arguments[0])
    floats = context.make_array(floats_type)(context, builder, arguments[2]).data
    _, count = cgutils.unpack_tuple(builder, blocks.shape)
    size, values = (ir.Constant(count.type, n) for n in (packing.dtype.itemsize, packing.values))
    start = builder.bitcast(blocks.data, I8.as_pointer())
    pointer = builder.gep(start, [builder.mul(arguments[1], builder.mul(count, size))])
    with cgutils.for_range(builder, count) as loop:
        block = Block(builder, builder.gep(pointer, [builder.mul(loop.index, size)]), packing.dtype)
        first = builder.mul(loop.index, values)
        for i, w in enumerate(packing.describe(block)):
            at = builder.gep(floats, [builder.add(first, ir.Constant(first.type, i * LANES))])
            yield i, w, builder.bitcast(at, ir.VectorType(F32, LANES).as_pointer())


@intrinsic
def row_dot(typingctx: Any, blocks: Any, row: Any, x: Any) -> Any:
    """Σ_i w_i x_i of one packed row.  blocks: records [rows, blocks], row: int64, x: float32 [columns]."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        zero = ir.Constant(ir.VectorType(F32, LANES), [0.0] * LANES)
        sums = [cgutils.alloca_once_value(builder, zero) for _ in range(ACCUMULATORS)]
        for i, w, at in _vectors(context, builder, signature, arguments):
            total = sums[i % ACCUMULATORS]
            product = w * Lanes(builder, builder.load(at, align=4))
            builder.store((product + Lanes(builder, builder.load(total))).value, total)
        whole = Lanes(builder, builder.load(sums[0]))
        for total in sums[1:]:
            whole = whole + Lanes(builder, builder.load(total))
        reduce = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(F32, [F32, zero.type]), f"llvm.vector.reduce.fadd.v{LANES}f32"
        )
        return builder.call(reduce, [F32(0.0), whole.value], fastmath=FAST)

    return types.float32(blocks, row, x), codegen


@intrinsic
def row_unpack(typingctx: Any, blocks: Any, row: Any, out: Any) -> Any:
    """Write the values of one packed row.  blocks: records [rows, blocks], row: int64, out: float32 [columns]."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        for _, w, at in _vectors(context, builder, signature, arguments):
            builder.store(w.value, at, align=4)
        return context.get_dummy_value()

    return types.void(blocks, row, out), codegen
