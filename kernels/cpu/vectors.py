"""What is done to long rows of numbers, written in vectors: each an intrinsic over addresses and a count.

LLVM vectorises plain loops too, but not those with a maximum, and with short ones it spends more on checks than on
work.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from numba.core import cgutils, types

from tcinfer.kernels.cpu.simd import (
    F32,
    I8,
    I32,
    I64,
    LANES,
    Lanes,
    constant,
    intrinsic,
    load,
    load_some,
    store,
    store_some,
)
from tcinfer.kernels.packing import RUN

NONE = -1e30  # less than any score


def _each(builder: Any, count: Any, body: Callable[[Any, Any], None]) -> None:
    """body(offset in bytes, lanes) for each vector of `count` float32: lanes None if whole, else how many (int64)."""
    whole = builder.and_(count, I64(-LANES))
    with cgutils.for_range_slice(builder, I64(0), whole, I64(LANES)) as (c, _):
        body(builder.mul(c, I64(4)), None)
    rest = builder.sub(count, whole)
    with builder.if_then(builder.icmp_signed(">", rest, I64(0))):
        body(builder.mul(whole, I64(4)), rest)


def _get(builder: Any, address: Any, offset: Any, lanes: Any, rest: float = 0) -> Lanes:
    if lanes is None:
        return load(builder, address, offset, F32)
    return load_some(builder, address, offset, F32, lanes, rest)


def _put(value: Lanes, address: Any, offset: Any, lanes: Any) -> None:
    if lanes is None:
        store(value, address, offset)
    else:
        store_some(value, address, offset, lanes)


def _collected(builder: Any, count: Any, start: float, step: Callable[[Lanes, Any, Any], Lanes]) -> Lanes:
    """A vector carried through all vectors: step(vector, offset, lanes) -> vector."""
    first = constant(builder, F32, [start] * LANES)
    at = cgutils.alloca_once(builder, first.type)
    builder.store(first.value, at)
    _each(
        builder,
        count,
        lambda offset, lanes: builder.store(step(Lanes(builder, builder.load(at)), offset, lanes).value, at),
    )
    return Lanes(builder, builder.load(at))


@intrinsic
def largest(typingctx: Any, x: Any, count: Any) -> Any:
    """The largest of `count` float32, or NONE. NaN is passed over: it shows in the sum of exponentials."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, count = arguments

        def step(top: Lanes, offset: Any, lanes: Any) -> Lanes:
            return top.call("llvm.maxnum", top.type, _get(builder, x, offset, lanes, NONE).value)

        return _collected(builder, count, NONE, step).reduce("fmax").value

    return types.float32(types.int64, types.int64), codegen


@intrinsic
def exponentials(typingctx: Any, x: Any, count: Any, top: Any) -> Any:
    """x = e^(x - top), in place; returns the sum."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, count, top = arguments
        less = Lanes(builder, top).splat()

        def step(total: Lanes, offset: Any, lanes: Any) -> Lanes:
            e = (_get(builder, x, offset, lanes, NONE) - less).exp()
            _put(e, x, offset, lanes)
            return total + (e if lanes is None else _masked(e, lanes))

        return _collected(builder, count, 0.0, step).reduce("fadd").value

    return types.float32(types.int64, types.int64, types.float32), codegen


def _masked(v: Lanes, lanes: Any) -> Lanes:
    """0 in all lanes but the first ones."""
    builder = v.builder
    count = Lanes(builder, builder.trunc(lanes, I32)).splat()
    inside = builder.icmp_signed("<", constant(builder, I32, list(range(LANES))).value, count.value)
    return Lanes(builder, builder.select(inside, v.value, constant(builder, F32, LANES).value))


@intrinsic
def scaled(typingctx: Any, x: Any, y: Any, count: Any, by: Any) -> Any:
    """y = x · by."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, y, count, by = arguments
        factor = Lanes(builder, by).splat()

        def body(offset: Any, lanes: Any) -> None:
            _put(_get(builder, x, offset, lanes) * factor, y, offset, lanes)

        _each(builder, count, body)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3, types.float32), codegen


@intrinsic
def merged(typingctx: Any, x: Any, y: Any, count: Any, fade: Any, grow: Any) -> Any:
    """x = x · fade + y · grow, in place."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, y, count, fade, grow = arguments
        old, new = Lanes(builder, fade).splat(), Lanes(builder, grow).splat()

        def body(offset: Any, lanes: Any) -> None:
            part = _get(builder, y, offset, lanes) * new
            _put(_get(builder, x, offset, lanes).fma(old, part), x, offset, lanes)

        _each(builder, count, body)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3, types.float32, types.float32), codegen


@intrinsic
def squares(typingctx: Any, x: Any, count: Any, mean: Any) -> Any:
    """Σ (x - mean)²."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, count, mean = arguments
        less = Lanes(builder, mean).splat()

        def step(total: Lanes, offset: Any, lanes: Any) -> Lanes:
            v = _get(builder, x, offset, lanes) - less
            v = v if lanes is None else _masked(v, lanes)
            return v.fma(v, total)

        return _collected(builder, count, 0.0, step).reduce("fadd").value

    return types.float32(types.int64, types.int64, types.float32), codegen


@intrinsic
def normed(typingctx: Any, x: Any, y: Any, count: Any, mean: Any, scale: Any, weight: Any, bias: Any) -> Any:
    """y = (x - mean) · scale · weight + bias; bias may be 0, for none."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, y, count, mean, scale, weight, bias = arguments
        less, factor = Lanes(builder, mean).splat(), Lanes(builder, scale).splat()

        def body(offset: Any, lanes: Any) -> None:
            v = (_get(builder, x, offset, lanes) - less) * factor * _get(builder, weight, offset, lanes)
            _put(v, y, offset, lanes)
            with builder.if_then(builder.icmp_signed("!=", bias, I64(0))):
                _put(v + _get(builder, bias, offset, lanes), y, offset, lanes)

        _each(builder, count, body)
        return context.get_dummy_value()

    numbers = [types.float32] * 2
    return types.void(*[types.int64] * 3, *numbers, *[types.int64] * 2), codegen


@intrinsic
def silu_product(typingctx: Any, gate: Any, up: Any, count: Any) -> Any:
    """up = silu(gate) · up, in place; silu(g) = g / (1 + e^-g)."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        gate, up, count = arguments

        def body(offset: Any, lanes: Any) -> None:
            g = _get(builder, gate, offset, lanes)
            _put(g.over((g * -1.0).exp() + 1.0) * _get(builder, up, offset, lanes), up, offset, lanes)

        _each(builder, count, body)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def gelu_product(typingctx: Any, gate: Any, up: Any, count: Any) -> Any:
    """up = gelu(gate) · up, in place, by the approximation g / (1 + e^(-2 √(2/π) (g + 0.044715 g³)))."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        gate, up, count = arguments

        def body(offset: Any, lanes: Any) -> None:
            g = _get(builder, gate, offset, lanes)
            by = (g * g * 0.044715 + 1.0) * g * (-2 * math.sqrt(2 / math.pi))
            _put(g.over(by.exp() + 1.0) * _get(builder, up, offset, lanes), up, offset, lanes)

        _each(builder, count, body)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def gelu_of(typingctx: Any, x: Any, count: Any) -> Any:
    """x = x/2 · (1 + erf(x/√2)), in place."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, count = arguments

        def body(offset: Any, lanes: Any) -> None:
            v = _get(builder, x, offset, lanes)
            _put(v * 0.5 * ((v * math.sqrt(0.5)).erf() + 1.0), x, offset, lanes)

        _each(builder, count, body)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def quantise_run(typingctx: Any, x: Any, q: Any, head: Any) -> Any:
    """32 float32 -> int8 q = round(x / d), d = max|x| / 127; and at head d, d Σq, d Σ(first 16), d Σ(last 16).

    The largest magnitude is found among bit patterns, where NaN is above all; it makes d NaN.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, q, head = arguments
        values = [load(builder, x, 4 * LANES * i, F32) for i in range(RUN // LANES)]
        magnitudes = [v.bits(I32) & 0x7FFFFFFF for v in values]
        top = magnitudes[0].call("llvm.umax", magnitudes[0].type, magnitudes[1].value).reduce("umax").bits(F32)
        one = Lanes(builder, F32(127.0))
        inverse = one.over(top)._held(">", 3e38)  # of nothing but zeros: any number does
        sums = []
        for i, v in enumerate(values):
            whole = (v * inverse).nearest().whole()
            store(whole.narrow(I8), q, LANES * i)
            sums.append(whole.reduce("add"))
        d = top * (1 / 127)
        for i, value in enumerate((d, d * (sums[0] + sums[1]).float(), d * sums[0].float(), d * sums[1].float())):
            store(value, head, 4 * i)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def left_over(typingctx: Any, x: Any, q: Any, head: Any, out: Any) -> Any:
    """out = x - d q, 32 float32: what `quantise_run` could not say."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, q, head, out = arguments
        d = load(builder, head, 0, F32, 1).splat() * -1.0
        for i in range(RUN // LANES):
            n = load(builder, q, LANES * i, I8).wide(signed=True).float()
            store(n.fma(d, load(builder, x, 4 * LANES * i, F32)), out, 4 * LANES * i)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@intrinsic
def delivered(
    typingctx: Any, sums: Any, n: Any, out: Any, stride: Any, lanes: Any, bias: Any, gate: Any, add: Any
) -> Any:
    """out [n, lanes] = or += (sums [n, 16] + bias [lanes]) · gate [n]; bias and gate may be 0, for none."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, n, out, stride, lanes, bias, gate, add = arguments

        def given(x: Any) -> Any:
            return builder.icmp_signed("!=", x, I64(0))

        def rows(count: Any) -> None:
            at = cgutils.alloca_once(builder, constant(builder, F32, LANES).type)
            with cgutils.for_range(builder, n) as loop:
                builder.store(load(builder, sums, builder.mul(loop.index, I64(4 * LANES)), F32).value, at)
                to = builder.add(out, builder.mul(loop.index, stride))

                def change(by: Callable[[Lanes], Lanes]) -> None:
                    builder.store(by(Lanes(builder, builder.load(at))).value, at)

                with builder.if_then(given(bias)):
                    change(lambda v: v + _get(builder, bias, 0, count))
                with builder.if_then(given(gate)):
                    change(lambda v: v * load(builder, gate, builder.mul(loop.index, I64(4)), F32, 1).splat())
                with builder.if_then(given(add)):
                    change(lambda v: v + _get(builder, to, 0, count))
                _put(Lanes(builder, builder.load(at)), to, 0, count)

        with builder.if_else(builder.icmp_signed("==", lanes, I64(LANES))) as (full, tail):
            with full:
                rows(None)
            with tail:
                rows(lanes)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), codegen
