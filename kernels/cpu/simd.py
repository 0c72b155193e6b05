"""Vectors for Numba: what its own types and loops do not reach.

`Lanes` is a vector (or a scalar) while LLVM code is being written: Python's operators emit instructions, so that an
intrinsic reads like arithmetic. Everything is LLVM's generic code, which becomes AVX-512, AVX2 or Arm
instructions by itself, but for one product (`dot4`) and the conversion of halves, which look at TIER.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partialmethod, reduce, wraps
from operator import add
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
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


def intrinsic(returns: Any, *takes: Any) -> Callable[[Callable], Any]:
    """Of a function(builder, *arguments) that writes LLVM code: what compiled functions call, with these types."""

    def made(write: Callable) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            found = write(builder, *arguments)
            if returns == types.void:
                return context.get_dummy_value()
            return found.value if isinstance(found, Lanes) else found

        # Numba takes the names of the arguments from here, and leaves the first one out: `builder`, as wraps has it.
        return numba_intrinsic(wraps(write)(lambda typingctx, *given, **named: (returns(*takes), codegen)))

    return made


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

    @property
    def count(self) -> int:
        return getattr(self.type, "count", 1)

    def _shaped(self, element: Any) -> Any:
        return _vector(element, self.count)

    def _with(self, other: Lanes | float) -> Any:
        """Another operand's value, in as many lanes as this one has."""
        if not isinstance(other, Lanes):
            return ir.Constant(self.type, [other] * self.count if self.count > 1 else other)
        return other.splat(self.count).value if self.count > other.count else other.value

    def _emit(self, name: str, other: Lanes | float) -> Lanes:
        return Lanes(self.builder, getattr(self.builder, name)(self.value, self._with(other)))

    def _arithmetic(self, name: str, other: Lanes | float) -> Lanes:
        return self._emit("f" + name if self.element == F32 else name, other)

    __add__ = partialmethod(_arithmetic, "add")
    __sub__ = partialmethod(_arithmetic, "sub")
    __mul__ = partialmethod(_arithmetic, "mul")
    __truediv__ = partialmethod(_arithmetic, "div")  # of floats
    __and__ = partialmethod(_emit, "and_")
    __or__ = partialmethod(_emit, "or_")
    __xor__ = partialmethod(_emit, "xor")
    __lshift__ = partialmethod(_emit, "shl")
    __rshift__ = partialmethod(_emit, "lshr")  # of unsigned values

    def fma(self, other: Lanes | float, plus: Lanes | float) -> Lanes:
        """self · other + plus, rounded once."""
        return self.call("llvm.fma", self.type, self._with(other), self._with(plus))

    def exp(self) -> Lanes:
        """e^x within 1e-7 of its value; x is taken within -87 .. 88, and NaN stays.

        x = n ln 2 + r, |r| <= ln 2 / 2; e^r by a polynomial (Cephes' coefficients), 2^n by its bits.
        """
        x = self.limited("<", -87.0).limited(">", 88.0)
        n = (x * 1.4426950408889634).nearest()
        r = n.fma(2.12194440e-4, n.fma(-0.693359375, x))
        p = r * 0.0 + 1.9875691500e-4
        for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
            p = p.fma(r, c)
        y = p.fma(r * r, r) + 1.0
        return y * ((n.whole() + 127) << 23).bits(F32)

    def erf(self) -> Lanes:
        """The error function within 3e-7; x is taken within -4 .. 4, and NaN stays.  A rational function (Eigen's)."""
        x = self.limited("<", -4.0).limited(">", 4.0)
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
        return x * above / below

    def limited(self, than: str, limit: float) -> Lanes:
        """`limit` where self is < or > it; the comparison is false for NaN."""
        beyond = self.builder.fcmp_ordered(than, self.value, self._with(limit))
        return Lanes(self.builder, self.builder.select(beyond, self._with(limit), self.value))

    def nearest(self) -> Lanes:
        """The nearest whole numbers, ties to even, still float32."""
        return self.call("llvm.rint", self.type)

    def whole(self) -> Lanes:
        """float32 within the range of int32, as int32."""
        return Lanes(self.builder, self.builder.fptosi(self.value, self._shaped(I32)))

    def reduce(self, name: str) -> Lanes:
        """All lanes in one: "add", "umax", "fmax" or "fadd", always in the same order."""
        if name != "fadd":
            return self.call(f"llvm.vector.reduce.{name}", self.element)
        name = f"llvm.vector.reduce.fadd.{_suffix(self.type)}"
        return Lanes(self.builder, call_function(self.builder, name, F32, F32(0.0), self.value, fastmath=FAST))

    def call(self, name: str, returns: Any, *others: Any) -> Lanes:
        """An LLVM intrinsic, this value being its first argument; "llvm.name" gets the type's suffix."""
        name = name if name.startswith("llvm.x86") else f"{name}.{_suffix(self.type)}"
        return Lanes(self.builder, call_function(self.builder, name, returns, self.value, *others))

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
        count = self.count * _width(self.element) // _width(element)
        return Lanes(self.builder, self.builder.bitcast(self.value, _vector(element, count)))

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
        one = Lanes(self.builder, self.builder.insert_element(undefined, self.value, I32(0)))
        return one.shuffle(one, [0] * count)

    def shuffle(self, other: Lanes, order: list[int]) -> Lanes:
        """Lanes of self and other (numbered on) in the order given."""
        places = constant(self.builder, I32, order).value
        return Lanes(self.builder, self.builder.shuffle_vector(self.value, other.value, places))

    def part(self, first: int, count: int) -> Lanes:
        return self.shuffle(self, list(range(first, first + count)))

    def first(self, lanes: Any) -> Lanes:
        """The first `lanes` (int64; None: all), and 0 in the others."""
        if lanes is None:
            return self
        inside = Lanes(self.builder, _inside(self.builder, lanes))
        return inside.select(self, constant(self.builder, self.element, self.count))

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
            s = (signed << (24 - shift))._emit("ashr", 24)
            total = total + ((bytes_ >> shift) & 255) * s
        return total


def _halves(u: Lanes, s: Lanes, full: bool) -> Lanes:
    """The byte product in AVX2: sums of two as int16 (which hold them if one of two is 0, or the bytes are small)."""
    masks = (0x00FF00FF, 0xFF00FF00 - 2**32) if full else (-1,)
    ones = constant(u.builder, I16, [1] * 16).value
    sums = []
    for first in (0, 8):
        x, part = s.part(first, 8).bits(I8).value, u.part(first, 8)
        pairs = ((part & mask).bits(I8).call("llvm.x86.avx2.pmadd.ub.sw", ones.type, x) for mask in masks)
        sums.append(reduce(add, (two.call("llvm.x86.avx2.pmadd.wd", ir.VectorType(I32, 8), ones) for two in pairs)))
    return sums[0].shuffle(sums[1], list(range(16)))


def _vector(element: Any, count: int) -> Any:
    return ir.VectorType(element, count) if count > 1 else element


def _suffix(kind: Any) -> str:
    return f"v{kind.count}{kind.element.intrinsic_name}" if isinstance(kind, ir.VectorType) else kind.intrinsic_name


def _width(element: Any) -> int:
    return {F32: 32, F16: 16}.get(element) or element.width


def constant(builder: Any, element: Any, values: Any) -> Lanes:
    """A constant vector, or zeros: values a list, or their number."""
    values = [0] * values if isinstance(values, int) else values
    return Lanes(builder, ir.Constant(ir.VectorType(element, len(values)), values))


class Held:
    """Vectors that live in registers across loops and branches: held[i] reads one, held[i] = v replaces it."""

    def __init__(self, builder: Any, count: int = 1, start: float = 0, element: Any = F32) -> None:
        self.builder, first = builder, constant(builder, element, [start] * LANES).value
        self._at = [cgutils.alloca_once_value(builder, first) for _ in range(count)]

    def __getitem__(self, i: int) -> Lanes:
        return Lanes(self.builder, self.builder.load(self._at[i]))

    def __setitem__(self, i: int, value: Lanes) -> None:
        self.builder.store(value.value, self._at[i])


def call_function(builder: Any, name: str, returns: Any, *arguments: Any, fastmath: tuple[str, ...] = ()) -> Any:
    """Call a function of LLVM or of the system by its name, with LLVM values."""
    kind = ir.FunctionType(returns, [a.type for a in arguments])
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, arguments, fastmath=fastmath)


def pointer(builder: Any, address: Any, offset: Any = 0, kind: Any = I8) -> Any:
    """An LLVM pointer from an address (int64) and an offset in bytes."""
    if offset != 0:
        address = builder.add(address, I64(offset) if isinstance(offset, int) else offset)
    return builder.inttoptr(address, kind.as_pointer())


def load(
    builder: Any, address: Any, offset: Any = 0, kind: Any = F32, count: int = LANES, lanes: Any = None, rest: float = 0
) -> Lanes:
    """`count` elements (1: a scalar) from an address, of any alignment.

    lanes (int64): only the first of LANES elements; the others are `rest` and their memory is not touched.
    """
    want = _vector(kind, count)
    at = pointer(builder, address, offset, want)
    if lanes is None:
        return Lanes(builder, builder.load(at, align=1))
    others = constant(builder, kind, [rest] * LANES).value
    name = f"llvm.masked.load.{_suffix(want)}.p0"
    return Lanes(builder, call_function(builder, name, want, at, I32(1), _inside(builder, lanes), others))


def store(value: Lanes, address: Any, offset: Any = 0, lanes: Any = None) -> None:
    """All elements to an address, of any alignment; or only the first `lanes` (int64) of LANES."""
    builder = value.builder
    at = pointer(builder, address, offset, value.type)
    if lanes is None:
        builder.store(value.value, at, align=1)
    else:
        name = f"llvm.masked.store.{_suffix(value.type)}.p0"
        call_function(builder, name, ir.VoidType(), value.value, at, I32(1), _inside(builder, lanes))


def spread(builder: Any, address: Any, offset: Any = 0, kind: Any = F32) -> Lanes:
    """The element at an address, in every lane."""
    return load(builder, address, offset, kind, 1).splat()


def _inside(builder: Any, lanes: Any) -> Any:
    """Which of LANES are the first `lanes`."""
    count = Lanes(builder, builder.trunc(lanes, I32)).splat()
    return builder.icmp_signed("<", constant(builder, I32, list(range(LANES))).value, count.value)


def each(builder: Any, count: Any, size: int = 4) -> Iterator[tuple[Any, Any]]:
    """The loop over the vectors of `count` elements of `size` bytes: yields (offset in bytes, lanes), twice.

    Once with the code open for whole vectors, lanes being None, and once for the rest, which is `lanes` (int64) long.
    """
    whole = builder.and_(count, I64(-LANES))
    with cgutils.for_range_slice(builder, I64(0), whole, I64(LANES)) as (c, _):
        yield builder.mul(c, I64(size)), None
    rest = builder.sub(count, whole)
    with builder.if_then(builder.icmp_signed(">", rest, I64(0))):
        yield builder.mul(whole, I64(size)), rest


def whole_or_not(builder: Any, lanes: Any) -> Iterator[Any]:
    """Yields None with the code open for lanes = LANES, and then `lanes` (int64) with it open for fewer."""
    with builder.if_else(builder.icmp_signed("==", lanes, I64(LANES))) as branches:
        for branch, count in zip(branches, (None, lanes), strict=True):
            with branch:
                yield count


def fetch_ahead(builder: Any, address: Any, offset: int) -> None:
    """Ask for a cache line that will be read soon; any address does."""
    call_function(builder, "llvm.prefetch.p0", ir.VoidType(), pointer(builder, address, offset), I32(0), I32(3), I32(1))
