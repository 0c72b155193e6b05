"""What is done to long rows of numbers, written in vectors: each an intrinsic over addresses and a count.

LLVM vectorises plain loops too, but not those with a maximum, and with short ones it spends more on checks than on
work.
"""

from __future__ import annotations

import math
from typing import Any

from numba.core import cgutils, types

from tcinfer.kernels.cpu.simd import (
    F32,
    I8,
    I32,
    I64,
    LANES,
    Held,
    Lanes,
    each,
    intrinsic,
    load,
    spread,
    store,
    whole_or_not,
)
from tcinfer.kernels.packing import RUN

NONE = -1e30  # less than any score


@intrinsic(types.float32, types.int64, types.int64)
def largest(builder: Any, x: Any, count: Any) -> Lanes:
    """The largest of `count` float32, or NONE. NaN is passed over: it shows in the sum of exponentials."""
    top = Held(builder, start=NONE)
    for offset, lanes in each(builder, count):
        v = load(builder, x, offset, lanes=lanes, rest=NONE)
        top[0] = top[0].call("llvm.maxnum", v.type, v.value)
    return top[0].reduce("fmax")


@intrinsic(types.float32, types.int64, types.int64, types.float32)
def exponentials(builder: Any, x: Any, count: Any, top: Any) -> Lanes:
    """x = e^(x - top), in place; returns the sum."""
    less, total = Lanes(builder, top).splat(), Held(builder)
    for offset, lanes in each(builder, count):
        e = (load(builder, x, offset, lanes=lanes, rest=NONE) - less).exp()
        store(e, x, offset, lanes)
        total[0] = total[0] + e.first(lanes)
    return total[0].reduce("fadd")


@intrinsic(types.void, *[types.int64] * 3, types.float32)
def scaled(builder: Any, x: Any, y: Any, count: Any, by: Any) -> None:
    """y = x · by."""
    factor = Lanes(builder, by).splat()
    for offset, lanes in each(builder, count):
        store(load(builder, x, offset, lanes=lanes) * factor, y, offset, lanes)


@intrinsic(types.void, *[types.int64] * 3, types.float32, types.float32)
def merged(builder: Any, x: Any, y: Any, count: Any, fade: Any, grow: Any) -> None:
    """x = x · fade + y · grow, in place."""
    old, new = Lanes(builder, fade).splat(), Lanes(builder, grow).splat()
    for offset, lanes in each(builder, count):
        part = load(builder, y, offset, lanes=lanes) * new
        store(load(builder, x, offset, lanes=lanes).fma(old, part), x, offset, lanes)


@intrinsic(types.float32, types.int64, types.int64, types.float32)
def squares(builder: Any, x: Any, count: Any, mean: Any) -> Lanes:
    """Σ (x - mean)²."""
    less, total = Lanes(builder, mean).splat(), Held(builder)
    for offset, lanes in each(builder, count):
        v = (load(builder, x, offset, lanes=lanes) - less).first(lanes)
        total[0] = v.fma(v, total[0])
    return total[0].reduce("fadd")


@intrinsic(types.void, *[types.int64] * 3, *[types.float32] * 2, *[types.int64] * 2)
def normed(builder: Any, x: Any, y: Any, count: Any, mean: Any, scale: Any, weight: Any, bias: Any) -> None:
    """y = (x - mean) · scale · weight + bias; bias may be 0, for none."""
    less, factor = Lanes(builder, mean).splat(), Lanes(builder, scale).splat()
    for offset, lanes in each(builder, count):
        v = (load(builder, x, offset, lanes=lanes) - less) * factor * load(builder, weight, offset, lanes=lanes)
        store(v, y, offset, lanes)
        with builder.if_then(builder.icmp_signed("!=", bias, I64(0))):
            store(v + load(builder, bias, offset, lanes=lanes), y, offset, lanes)


@intrinsic(types.void, *[types.int64] * 3)
def silu_product(builder: Any, gate: Any, up: Any, count: Any) -> None:
    """up = silu(gate) · up, in place; silu(g) = g / (1 + e^-g)."""
    for offset, lanes in each(builder, count):
        g = load(builder, gate, offset, lanes=lanes)
        store(g / ((g * -1.0).exp() + 1.0) * load(builder, up, offset, lanes=lanes), up, offset, lanes)


@intrinsic(types.void, *[types.int64] * 3)
def gelu_product(builder: Any, gate: Any, up: Any, count: Any) -> None:
    """up = gelu(gate) · up, in place, by the approximation g / (1 + e^(-2 √(2/π) (g + 0.044715 g³)))."""
    for offset, lanes in each(builder, count):
        g = load(builder, gate, offset, lanes=lanes)
        by = (g * g * 0.044715 + 1.0) * g * (-2 * math.sqrt(2 / math.pi))
        store(g / (by.exp() + 1.0) * load(builder, up, offset, lanes=lanes), up, offset, lanes)


@intrinsic(types.void, types.int64, types.int64)
def gelu_of(builder: Any, x: Any, count: Any) -> None:
    """x = x/2 · (1 + erf(x/√2)), in place."""
    for offset, lanes in each(builder, count):
        v = load(builder, x, offset, lanes=lanes)
        store(v * 0.5 * ((v * math.sqrt(0.5)).erf() + 1.0), x, offset, lanes)


@intrinsic(types.void, *[types.int64] * 3)
def quantise_run(builder: Any, x: Any, q: Any, head: Any) -> None:
    """32 float32 -> int8 q = round(x / d), d = max|x| / 127; and at head d, d Σq, d Σ(first 16), d Σ(last 16).

    The largest magnitude is found among bit patterns, where NaN is above all; it makes d NaN.
    """
    values = [load(builder, x, 4 * LANES * i) for i in range(RUN // LANES)]
    magnitudes = [v.bits(I32) & 0x7FFFFFFF for v in values]
    top = magnitudes[0].call("llvm.umax", magnitudes[0].type, magnitudes[1].value).reduce("umax").bits(F32)
    inverse = (Lanes(builder, F32(127.0)) / top).limited(">", 3e38)  # of nothing but zeros: any number does
    sums = []
    for i, v in enumerate(values):
        whole = (v * inverse).nearest().whole()
        store(whole.narrow(I8), q, LANES * i)
        sums.append(whole.reduce("add"))
    d = top * (1 / 127)
    for i, value in enumerate((d, d * (sums[0] + sums[1]).float(), d * sums[0].float(), d * sums[1].float())):
        store(value, head, 4 * i)


@intrinsic(types.void, *[types.int64] * 4)
def left_over(builder: Any, x: Any, q: Any, head: Any, out: Any) -> None:
    """out = x - d q, 32 float32: what `quantise_run` could not say."""
    d = spread(builder, head) * -1.0
    for i in range(RUN // LANES):
        n = load(builder, q, LANES * i, I8).wide(signed=True).float()
        store(n.fma(d, load(builder, x, 4 * LANES * i)), out, 4 * LANES * i)


@intrinsic(types.void, *[types.int64] * 8)
def delivered(
    builder: Any, sums: Any, n: Any, out: Any, stride: Any, lanes: Any, bias: Any, gate: Any, add: Any
) -> None:
    """out [n, lanes] = or += (sums [n, 16] + bias [lanes]) · gate [n]; bias and gate may be 0, for none."""

    def given(x: Any) -> Any:
        return builder.if_then(builder.icmp_signed("!=", x, I64(0)))

    for some in whole_or_not(builder, lanes):
        with cgutils.for_range(builder, n) as loop:
            v = Held(builder)
            v[0] = load(builder, sums, builder.mul(loop.index, I64(4 * LANES)))
            to = builder.add(out, builder.mul(loop.index, stride))
            with given(bias):
                v[0] = v[0] + load(builder, bias, lanes=some)
            with given(gate):
                v[0] = v[0] * spread(builder, gate, builder.mul(loop.index, I64(4)))
            with given(add):
                v[0] = v[0] + load(builder, to, lanes=some)
            store(v[0], to, 0, some)
