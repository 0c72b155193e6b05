"""The inner products that everything rests on, written in vectors: 16 rows of weights by a few rows of activations.

`byte_tile(kind, n)`     packed weights by activations quantised to bytes
`float_tile(kind, n)`     anything in float: F32, F16 and BF16 weights, keys, values, the matrix memory
`side_by_side(kind)`      16 keys as they lie in the cache, turned so that they can be such weights

Each makes an intrinsic for compiled functions; all arguments are addresses, strides in bytes, and counts. A sum is
added up in the same order whatever n is: a token gets the same bits alone, in a prompt, and beside other sessions.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from gguf.constants import GGMLQuantizationType as Kind
from numba.core import cgutils, types
from numba.extending import register_jitable

from tcinfer.kernels.cpu.packing import element, interleaved, read, to_float
from tcinfer.kernels.cpu.simd import (
    F32,
    I32,
    I64,
    LANES,
    TIER,
    Lanes,
    constant,
    fetch_ahead,
    intrinsic,
    load,
    load_some,
    store,
)
from tcinfer.kernels.packing import FLOATS, PACKINGS, RUN

MANY = 8 if TIER == "avx512vnni" else 4  # rows of activations whose sums fit the registers at once
AHEAD = 4096  # bytes by which weights are fetched before they are needed, where each is used once
HEAD = 16  # bytes of scale and sums that follow the bytes of each run of activations (see vectors.quantise_run)


class _Sums:
    """Accumulators that live in registers across a loop."""

    def __init__(self, builder: Any, count: int) -> None:
        self.builder = builder
        zero = constant(builder, F32, LANES).value
        self._at = [cgutils.alloca_once(builder, zero.type) for _ in range(count)]
        for at in self._at:
            builder.store(zero, at)

    def __getitem__(self, i: int) -> Lanes:
        return Lanes(self.builder, self.builder.load(self._at[i]))

    def __setitem__(self, i: int, value: Lanes) -> None:
        self.builder.store(value.value, self._at[i])


@cache
def byte_tile(kind: Kind, n: int) -> Any:
    """tile(w, x, x_stride, runs, out): out float32 [n, 16] = n rows of quantised activations · 16 interleaved rows.

    Σ over runs of d_w d_x Σ q_w q_x + m_w (d_x Σ q_x), with m_w = -offset · d_w where the kind has no minimum.
    """
    packing = PACKINGS[kind]
    size = interleaved(packing).itemsize

    @intrinsic
    def tile(typingctx: Any, w: Any, x: Any, x_stride: Any, runs: Any, out: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            w, x, x_stride, runs, out = arguments
            rows = [builder.add(x, builder.mul(x_stride, I64(t))) for t in range(n)]
            heads = builder.mul(runs, I64(RUN))
            sums = _Sums(builder, n)
            with cgutils.for_range(builder, runs) as loop:
                at = builder.add(w, builder.mul(loop.index, I64(size)))
                if n <= 2:
                    for line in range(0, size, 64):
                        fetch_ahead(builder, at, AHEAD + line)
                q, d, m = read(packing, builder, at)
                m = m or [scale * float(-packing.offset) for scale in d]
                for t in range(n):
                    byte = builder.add(rows[t], builder.mul(loop.index, I64(RUN)))
                    head = builder.add(builder.add(rows[t], heads), builder.mul(loop.index, I64(HEAD)))

                    def spread(address: Any, offset: int, kind: Any) -> Lanes:
                        return load(builder, address, offset, kind, 1).splat()

                    chains = [constant(builder, I32, LANES)] * (2 if n <= 2 or packing.scales == 2 else 1)
                    for j in range(8):
                        c = j // 4 if len(chains) == 2 else 0
                        chains[c] = chains[c].dot4(q[j], spread(byte, 4 * j, I32), packing.bits == 8)
                    d_x, total = spread(head, 0, F32), sums[t]
                    if packing.scales == 1:
                        whole = chains[0] if len(chains) == 1 else chains[0] + chains[1]
                        total = whole.float().fma(d[0] * d_x, total)
                        total = m[0].fma(spread(head, 4, F32), total)
                    else:
                        for i in (0, 1):
                            total = chains[i].float().fma(d[i] * d_x, total)
                            total = m[i].fma(spread(head, 8 + 4 * i, F32), total)
                    sums[t] = total
            for t in range(n):
                store(sums[t], out, 64 * t)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    return tile


@cache
def float_tile(kind: Kind, n: int, add: bool = False) -> Any:
    """tile(w, w_stride, x, x_stride, count, lanes, out, out_stride): out float32 [n, 16] = Σ_c x[t, c] · w[c, 0..15].

    w: `count` rows of `lanes` (at most 16) elements of a float kind, w_stride bytes apart; x float32 [n, count];
    add: on top of what is in `out`. Summed column by column, and `out` is always written in whole vectors.
    """

    @intrinsic
    def tile(
        typingctx: Any, w: Any, w_stride: Any, x: Any, x_stride: Any, count: Any, lanes: Any, out: Any, out_stride: Any
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            w, w_stride, x, x_stride, count, lanes, out, out_stride = arguments
            rows = [builder.add(x, builder.mul(x_stride, I64(t))) for t in range(n)]
            outs = [builder.add(out, builder.mul(out_stride, I64(t))) for t in range(n)]
            sums = _Sums(builder, n)
            for t in range(n if add else 0):
                sums[t] = load(builder, outs[t], 0, F32)

            def columns(whole: bool) -> None:
                with cgutils.for_range(builder, count) as loop:
                    at = builder.add(w, builder.mul(loop.index, w_stride))
                    if n == 1:
                        fetch_ahead(builder, at, AHEAD)
                    what = element(kind)
                    stored = load(builder, at, 0, what) if whole else load_some(builder, at, 0, what, lanes)
                    values = to_float(stored, kind)
                    for t in range(n):
                        x_c = load(builder, rows[t], builder.mul(loop.index, I64(4)), F32, 1).splat()
                        sums[t] = values.fma(x_c, sums[t])

            with builder.if_else(builder.icmp_signed("==", lanes, I64(LANES))) as (full, tail):
                with full:
                    columns(True)
                with tail:
                    columns(False)
            for t in range(n):
                store(sums[t], outs[t])
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), codegen

    return tile


@register_jitable
def padded(width):  # type: ignore[no-untyped-def]
    """Floats of a row of `width` in whole vectors."""
    return (width + LANES - 1) // LANES * LANES


@register_jitable
def product(many, two, one, w, w_stride, x, x_stride, n, count, lanes, out, out_stride):  # type: ignore[no-untyped-def]
    """out [n, 16] = x [n, count] · w [count, lanes], n rows in tiles (three of float_tile's)."""
    t = 0
    while t < n:
        left = n - t
        if left >= MANY:
            many(w, w_stride, x + t * x_stride, x_stride, count, lanes, out + t * out_stride, out_stride)
            t += MANY
        elif left >= 2:
            two(w, w_stride, x + t * x_stride, x_stride, count, lanes, out + t * out_stride, out_stride)
            t += 2
        else:
            one(w, w_stride, x + t * x_stride, x_stride, count, lanes, out + t * out_stride, out_stride)
            t += 1


@cache
def side_by_side(kind: Kind) -> Any:
    """turn(table, width, out): out float32 [width, 16] from 16 rows [width] of a float kind.

    table: the addresses of the rows. Written in whole groups of 16 columns. Each such square is turned in four rounds,
    in which vectors at a distance of 8, 4, 2 and 1 exchange halves, quarters, and so on.
    """

    @intrinsic
    def turn(typingctx: Any, table: Any, width: Any, out: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            table, width, out = arguments
            rows = [load(builder, table, 8 * i, I64, 1).value for i in range(LANES)]

            def square(c: Any, lanes: Any) -> None:
                vectors = []
                for row in rows:
                    at, what = builder.mul(c, I64(FLOATS[kind])), element(kind)
                    whole = lanes is None
                    stored = load(builder, row, at, what) if whole else load_some(builder, row, at, what, lanes)
                    vectors.append(to_float(stored, kind))
                for distance in (8, 4, 2, 1):
                    low = [i if not i & distance else i - distance + LANES for i in range(LANES)]
                    high = [i + distance if not i & distance else i + LANES for i in range(LANES)]
                    for i in range(LANES):
                        if not i & distance:
                            a, b = vectors[i], vectors[i + distance]
                            vectors[i], vectors[i + distance] = a.shuffle(b, low), a.shuffle(b, high)
                for i, v in enumerate(vectors):
                    store(v, builder.add(out, builder.mul(c, I64(4 * LANES))), 4 * LANES * i)

            whole = builder.and_(width, I64(-LANES))
            with cgutils.for_range_slice(builder, I64(0), whole, I64(LANES)) as (c, _):
                square(c, None)
            rest = builder.sub(width, whole)
            with builder.if_then(builder.icmp_signed(">", rest, I64(0))):
                square(whole, rest)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 3), codegen

    return turn
