"""Vectors for Numba: what its own types and loops do not reach.

`Lanes` is a vector (or a scalar) while LLVM code is being written: Python's operators emit instructions, so that an
intrinsic reads like arithmetic. Everything is LLVM's generic code, which becomes AVX-512, AVX2 or Arm
instructions by itself, but for one product (`dot4`) and the conversion of halves, which look at TIER.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic as numba_intrinsic

from tcinfer.kernels.table import LANES

I8, I16, I32, I64, F16, F32 = *(ir.IntType(n) for n in (8, 16, 32, 64)), ir.HalfType(), ir.FloatType()
# Plain loops and sums over lanes may be reordered (that is what makes vectors of them); NaN and Inf stay what they are.
FAST = ("reassoc", "contract", "nsz", "arcp")

_FEATURES = set(cpu_target.target_context.codegen().magic_tuple()[2].split(","))  # of the CPU that Numba compiles for


def _tier() -> str:
    """The instructions that the byte products use: never tried out, because a missing one ends the process."""
    if {"+avx512f", "+avx512bw", "+avx512vnni"} <= _FEATURES:
        return "avx512vnni"
    return "avx2" if {"+avx2", "+fma", "+f16c"} <= _FEATURES else "generic"


TIER = _tier()
HAS_HALF = TIER != "generic" or "+fullfp16" in _FEATURES  # whether `half` in LLVM code is safe here


def intrinsic(function: Any) -> Any:
    """Numba's own, untyped: compiled functions call it without its first argument."""
    return numba_intrinsic(function)


class Lanes:
    """A vector or scalar under construction; a plain number stands for itself in every lane.

    Every operation is done exactly as it is written, so that two operators that write the same get the same bits.
    """

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder, self.value = builder, value

    @property
    def type(self) -> Any:
        return self.value.type

    @property
    def element(self) -> Any:
        return getattr(self.type, "element", self.type)

    def _shaped(self, element: Any) -> Any:
        return ir.VectorType(element, self.type.count) if isinstance(self.type, ir.VectorType) else element

    def _with(self, other: Lanes | float) -> Any:
        if not isinstance(other, Lanes):
            constant = ir.Constant(self.element, other)
            vector = isinstance(self.type, ir.VectorType)
            return ir.Constant(self.type, [constant] * self.type.count) if vector else constant
        if isinstance(self.type, ir.VectorType) and not isinstance(other.type, ir.VectorType):
            return other.splat(self.type.count).value
        return other.value

    def _emit(self, name: str, other: Lanes | float) -> Lanes:
        return Lanes(self.builder, getattr(self.builder, name)(self.value, self._with(other)))

    def _arithmetic(self, name: str, other: Lanes | float) -> Lanes:
        return self._emit("f" + name if self.element == F32 else name, other)

    def __add__(self, other: Lanes | float) -> Lanes:
        return self._arithmetic("add", other)

    def __sub__(self, other: Lanes | float) -> Lanes:
        return self._arithmetic("sub", other)

    def __mul__(self, other: Lanes | float) -> Lanes:
        return self._arithmetic("mul", other)

    def __and__(self, other: Lanes | int) -> Lanes:
        return self._emit("and_", other)

    def __or__(self, other: Lanes | int) -> Lanes:
        return self._emit("or_", other)

    def __xor__(self, other: Lanes | int) -> Lanes:
        return self._emit("xor", other)

    def __lshift__(self, other: Lanes | int) -> Lanes:
        return self if isinstance(other, int) and other == 0 else self._emit("shl", other)

    def __rshift__(self, other: Lanes | int) -> Lanes:  # of unsigned values
        return self if isinstance(other, int) and other == 0 else self._emit("lshr", other)

    def fma(self, other: Lanes | float, plus: Lanes | float) -> Lanes:
        """self · other + plus, rounded once."""
        return self.call("llvm.fma", self.type, self._with(other), self._with(plus))

    def exp(self) -> Lanes:
        """e^x within 1e-7 of its value; x is taken within -87 .. 88, and NaN stays.

        x = n ln 2 + r, |r| <= ln 2 / 2; e^r by a polynomial (Cephes' coefficients), 2^n by its bits.
        """
        x = self._held("<", -87.0)._held(">", 88.0)
        n = (x * 1.4426950408889634).nearest()
        r = n.fma(2.12194440e-4, n.fma(-0.693359375, x))
        p = r * 0.0 + 1.9875691500e-4
        for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
            p = p.fma(r, c)
        y = p.fma(r * r, r) + 1.0
        return y * ((n.whole() + 127) << 23).bits(F32)

    def erf(self) -> Lanes:
        """The error function within 3e-7; x is taken within -4 .. 4, and NaN stays.  A rational function (Eigen's)."""
        x = self._held("<", -4.0)._held(">", 4.0)
        square = x * x
        above, below = square * 0.0 + -2.72614225801306e-10, square * 0.0 + -1.45660718464996e-05
        for c in (
            2.77068142495902e-08,
            -2.10102402082508e-06,
            -5.69250639462346e-05,
            -7.34990630326855e-04,
            -2.95459980854025e-03,
            -1.60960333262415e-02,
        ):
            above = above.fma(square, c)
        for c in (-2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03, -1.42647390514189e-02):
            below = below.fma(square, c)
        return (x * above).over(below)

    def _held(self, than: str, limit: float) -> Lanes:
        """`limit` where self is < or > it; the comparison is false for NaN."""
        beyond = self.builder.fcmp_ordered(than, self.value, self._with(limit))
        return Lanes(self.builder, self.builder.select(beyond, self._with(limit), self.value))

    def over(self, other: Lanes) -> Lanes:
        """self / other."""
        return Lanes(self.builder, self.builder.fdiv(self.value, self._with(other)))

    def nearest(self) -> Lanes:
        """The nearest whole numbers, ties to even, still float32."""
        return self.call("llvm.rint", self.type)

    def whole(self) -> Lanes:
        """float32 within the range of int32, as int32."""
        return Lanes(self.builder, self.builder.fptosi(self.value, self._shaped(I32)))

    def reduce(self, name: str) -> Lanes:
        """All lanes in one: "add", "umax", "fmax" or "fadd", always in the same order."""
        if name == "fadd":
            start = ir.Constant(F32, 0.0)
            kind = ir.FunctionType(F32, [F32, self.type])
            called = f"llvm.vector.reduce.fadd.{_suffix(self.type)}"
            function = cgutils.get_or_insert_function(self.builder.module, kind, called)
            return Lanes(self.builder, self.builder.call(function, [start, self.value], fastmath=FAST))
        return self.call(f"llvm.vector.reduce.{name}", self.element)

    def call(self, name: str, returns: Any, *others: Any) -> Lanes:
        """An LLVM intrinsic, this value being its first argument; "llvm.name" gets the type's suffix."""
        name = name if name.startswith("llvm.x86") else f"{name}.{_suffix(self.type)}"
        arguments = [self.value, *others]
        kind = ir.FunctionType(returns, [a.type for a in arguments])
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return Lanes(self.builder, self.builder.call(function, arguments))

    def wide(self, signed: bool = False) -> Lanes:
        """Bytes or halves as 32-bit integers."""
        extend = self.builder.sext if signed else self.builder.zext
        return Lanes(self.builder, extend(self.value, self._shaped(I32)))

    def narrow(self, element: Any) -> Lanes:
        """The low bits of integers."""
        return Lanes(self.builder, self.builder.trunc(self.value, self._shaped(element)))

    def float(self) -> Lanes:
        """32-bit integers as the numbers they are."""
        return Lanes(self.builder, self.builder.sitofp(self.value, self._shaped(F32)))

    def bits(self, element: Any) -> Lanes:
        """The same bits as elements of another type; their number follows from its width."""
        count = getattr(self.type, "count", 1) * _width(self.element) // _width(element)
        return Lanes(
            self.builder, self.builder.bitcast(self.value, ir.VectorType(element, count) if count > 1 else element)
        )

    def half(self) -> Lanes:
        """16-bit floats (as integers) in float32; by integer arithmetic where the CPU has no instruction for it."""
        if HAS_HALF:
            return Lanes(self.builder, self.builder.fpext(self.bits(F16).value, self._shaped(F32)))
        h = self.wide()
        magnitude = (h & 0x7FFF) << 13
        finite = (magnitude.bits(F32) * 2.0**112).bits(I32)
        chosen = magnitude.below(0x7C00 << 13).select(finite, magnitude | 0x7F800000)
        return (chosen | ((h & 0x8000) << 16)).bits(F32)

    def to_half(self) -> Lanes:
        """float32 as 16-bit floats (as integers), rounded to nearest, ties to even."""
        if HAS_HALF:
            return Lanes(self.builder, self.builder.fptrunc(self.value, self._shaped(F16))).bits(I16)
        b = self.bits(I32)
        magnitude = b & 0x7FFFFFFF
        small = (magnitude.bits(F32) + 0.5).bits(I32) - 0x3F000000  # subnormal halves: the adder rounds
        normal = (magnitude + ((magnitude >> 13) & 1) - ((112 << 23) - 0xFFF)) >> 13
        finite = magnitude.below(113 << 23).select(small, normal)
        special = magnitude.below(0x7F800001).select(magnitude * 0 + 0x7C00, magnitude * 0 + 0x7E00)
        chosen = magnitude.below(143 << 23).select(finite, special)
        return (chosen | ((b >> 16) & 0x8000)).narrow(I16)

    def below(self, limit: int) -> Lanes:
        """Which unsigned integers are less than `limit`."""
        return Lanes(self.builder, self.builder.icmp_unsigned("<", self.value, self._with(limit)))

    def select(self, yes: Lanes, no: Lanes) -> Lanes:
        return Lanes(self.builder, self.builder.select(self.value, yes.value, no.value))

    def splat(self, count: int = LANES) -> Lanes:
        """A scalar in every lane."""
        undefined = ir.Constant(ir.VectorType(self.type, count), ir.Undefined)
        one = self.builder.insert_element(undefined, self.value, I32(0))
        return Lanes(
            self.builder, self.builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(I32, count), [0] * count))
        )

    def shuffle(self, other: Lanes, order: list[int]) -> Lanes:
        """Lanes of self and other (numbered on) in the order given."""
        mask = ir.Constant(ir.VectorType(I32, len(order)), order)
        return Lanes(self.builder, self.builder.shuffle_vector(self.value, other.value, mask))

    def part(self, first: int, count: int) -> Lanes:
        return self.shuffle(self, list(range(first, first + count)))

    def lane(self, i: int) -> Lanes:
        return Lanes(self.builder, self.builder.extract_element(self.value, I32(i)))

    def dot4(self, bytes_: Lanes, signed: Lanes, full: bool) -> Lanes:
        """self + Σ of 4 neighbours of bytes_ · signed.  self int32 [16]; both others int32 [16], seen as 4 bytes each.

        bytes_ are unsigned; `full`: some may be 128 or more.
        """
        if TIER == "avx512vnni":
            return self.call("llvm.x86.avx512.vpdpbusd.512", self.type, bytes_.value, signed.value)
        if TIER == "avx2":
            return self + _halves(bytes_, signed, full)
        total = self
        for shift in (0, 8, 16, 24):
            s = signed << (24 - shift)
            s = Lanes(self.builder, self.builder.ashr(s.value, s._with(24)))
            total = total + ((bytes_ >> shift) & 255) * s
        return total


def _halves(u: Lanes, s: Lanes, full: bool) -> Lanes:
    """The byte product in AVX2: sums of two as int16 (which hold them if one of two is 0, or the bytes are small)."""
    sums = []
    for first in (0, 8):
        x, part = s.part(first, 8).bits(I8), u.part(first, 8)
        total = None
        for mask in (0x00FF00FF, 0xFF00FF00 - 2**32) if full else (-1,):
            pairs = (part & mask).bits(I8).call("llvm.x86.avx2.pmadd.ub.sw", ir.VectorType(I16, 16), x.value)
            ones = ir.Constant(ir.VectorType(I16, 16), [1] * 16)
            four = pairs.call("llvm.x86.avx2.pmadd.wd", ir.VectorType(I32, 8), ones)
            total = four if total is None else total + four
        sums.append(total)
    low, high = sums
    assert low is not None
    assert high is not None
    return low.shuffle(high, list(range(16)))


def _suffix(kind: Any) -> str:
    return f"v{kind.count}{_name(kind.element)}" if isinstance(kind, ir.VectorType) else _name(kind)


def _width(element: Any) -> int:
    return {F32: 32, F16: 16}.get(element) or element.width


def constant(builder: Any, element: Any, values: Any) -> Lanes:
    """A constant vector, or zeros: values a list, or their number."""
    values = [0] * values if isinstance(values, int) else values
    return Lanes(builder, ir.Constant(ir.VectorType(element, len(values)), values))


def pointer(builder: Any, address: Any, offset: Any = 0) -> Any:
    """An LLVM pointer from an address (int64) and an offset in bytes."""
    if offset != 0:
        address = builder.add(address, I64(offset) if isinstance(offset, int) else offset)
    return builder.inttoptr(address, I8.as_pointer())


def load(builder: Any, address: Any, offset: Any, element: Any, count: int = LANES) -> Lanes:
    """`count` elements (1: a scalar) from an address, of any alignment."""
    want = ir.VectorType(element, count) if count > 1 else element
    at = builder.bitcast(pointer(builder, address, offset), want.as_pointer())
    return Lanes(builder, builder.load(at, align=1))


def store(value: Lanes, address: Any, offset: Any = 0) -> None:
    builder = value.builder
    at = builder.bitcast(pointer(builder, address, offset), value.type.as_pointer())
    builder.store(value.value, at, align=1)


def load_some(builder: Any, address: Any, offset: Any, element: Any, lanes: Any, rest: float = 0) -> Lanes:
    """The first `lanes` (int64) of LANES elements; the others are `rest` and their memory is not touched."""
    vector = ir.VectorType(element, LANES)
    at = builder.bitcast(pointer(builder, address, offset), vector.as_pointer())
    mask, others = _mask(builder, lanes), ir.Constant(vector, [rest] * LANES)
    kind = ir.FunctionType(vector, [at.type, I32, mask.type, vector])
    name = f"llvm.masked.load.v{LANES}{_name(element)}.p0"
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return Lanes(builder, builder.call(function, [at, I32(1), mask, others]))


def store_some(value: Lanes, address: Any, offset: Any, lanes: Any) -> None:
    """The first `lanes` (int64) elements to an address."""
    builder = value.builder
    at = builder.bitcast(pointer(builder, address, offset), value.type.as_pointer())
    mask = _mask(builder, lanes)
    kind = ir.FunctionType(ir.VoidType(), [value.type, at.type, I32, mask.type])
    name = f"llvm.masked.store.v{LANES}{_name(value.element)}.p0"
    builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [value.value, at, I32(1), mask])


def _name(element: Any) -> str:
    return {F32: "f32", F16: "f16"}.get(element) or f"i{element.width}"


def _mask(builder: Any, lanes: Any) -> Any:
    count = Lanes(builder, builder.trunc(lanes, I32)).splat()
    return builder.icmp_signed("<", ir.Constant(ir.VectorType(I32, LANES), list(range(LANES))), count.value)


def fetch_ahead(builder: Any, address: Any, offset: int) -> None:
    """Ask for a cache line that will be read soon; any address does."""
    at = pointer(builder, address, offset)
    kind = ir.FunctionType(ir.VoidType(), [at.type, I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [at, I32(0), I32(3), I32(1)])
