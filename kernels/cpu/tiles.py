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
    I32,
    I64,
    LANES,
    TIER,
    Held,
    constant,
    each,
    fetch_ahead,
    intrinsic,
    load,
    spread,
    store,
    whole_or_not,
)
from tcinfer.kernels.packing import FLOATS, PACKINGS, RUN

MANY = 8 if TIER == "avx512vnni" else 4  # rows of activations whose sums fit the registers at once
AHEAD = 4096  # bytes by which weights are fetched before they are needed, where each is used once
RUN_SUMS = 16  # bytes of scale and sums that follow the bytes of each run of activations (see vectors.quantise_run)


@cache
def byte_tile(kind: Kind, n: int) -> Any:
    """tile(w, x, x_stride, runs, out): out float32 [n, 16] = n rows of quantised activations · 16 interleaved rows.

    Σ over runs of d_w d_x Σ q_w q_x + m_w (d_x Σ q_x), with m_w = -offset · d_w where the kind has no minimum.
    """
    packing = PACKINGS[kind]
    size = interleaved(packing).itemsize

    @intrinsic(types.void, *[types.int64] * 5)
    def tile(builder: Any, w: Any, x: Any, x_stride: Any, runs: Any, out: Any) -> None:
        rows = [builder.add(x, builder.mul(x_stride, I64(t))) for t in range(n)]
        heads = builder.mul(runs, I64(RUN))
        sums = Held(builder, n)
        with cgutils.for_range(builder, runs) as loop:
            at = builder.add(w, builder.mul(loop.index, I64(size)))
            if n <= 2:
                for line in range(0, size, 64):
                    fetch_ahead(builder, at, AHEAD + line)
            q, d, m = read(packing, builder, at)
            m = m or [scale * float(-packing.offset) for scale in d]
            for t in range(n):
                byte = builder.add(rows[t], builder.mul(loop.index, I64(RUN)))
                head = builder.add(builder.add(rows[t], heads), builder.mul(loop.index, I64(RUN_SUMS)))
                chains = [constant(builder, I32, LANES)] * (2 if n <= 2 or packing.scales == 2 else 1)
                for j in range(8):
                    c = j // 4 if len(chains) == 2 else 0
                    chains[c] = chains[c].dot4(q[j], spread(builder, byte, 4 * j, I32), packing.bits == 8)
                d_x, total = spread(builder, head), sums[t]
                if packing.scales == 1:
                    chains = [sum(chains[1:], chains[0])]
                for i, chain in enumerate(chains):
                    total = chain.float().fma(d[i] * d_x, total)
                    total = m[i].fma(spread(builder, head, 4 * (packing.scales + i)), total)
                sums[t] = total
        for t in range(n):
            store(sums[t], out, 64 * t)

    return tile


@cache
def float_tile(kind: Kind, n: int, add: bool = False) -> Any:
    """tile(w, w_stride, x, x_stride, count, lanes, out, out_stride): out float32 [n, 16] = Σ_c x[t, c] · w[c, 0..15].

    w: `count` rows of `lanes` (at most 16) elements of a float kind, w_stride bytes apart; x float32 [n, count];
    add: on top of what is in `out`. Summed column by column, and `out` is always written in whole vectors.
    """

    @intrinsic(types.void, *[types.int64] * 8)
    def tile(
        builder: Any, w: Any, w_stride: Any, x: Any, x_stride: Any, count: Any, lanes: Any, out: Any, out_stride: Any
    ) -> None:
        rows = [builder.add(x, builder.mul(x_stride, I64(t))) for t in range(n)]
        outs = [builder.add(out, builder.mul(out_stride, I64(t))) for t in range(n)]
        sums = Held(builder, n)
        for t in range(n if add else 0):
            sums[t] = load(builder, outs[t])
        for some in whole_or_not(builder, lanes):
            with cgutils.for_range(builder, count) as loop:
                at = builder.add(w, builder.mul(loop.index, w_stride))
                if n == 1:
                    fetch_ahead(builder, at, AHEAD)
                values = to_float(load(builder, at, 0, element(kind), lanes=some), kind)
                for t in range(n):
                    x_c = spread(builder, rows[t], builder.mul(loop.index, I64(4)))
                    sums[t] = values.fma(x_c, sums[t])
        for t in range(n):
            store(sums[t], outs[t])

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

    @intrinsic(types.void, *[types.int64] * 3)
    def turn(builder: Any, table: Any, width: Any, out: Any) -> None:
        rows = [load(builder, table, 8 * i, I64, 1).value for i in range(LANES)]
        for at, lanes in each(builder, width, FLOATS[kind]):
            vectors = [to_float(load(builder, row, at, element(kind), lanes=lanes), kind) for row in rows]
            for distance in (8, 4, 2, 1):
                low = [i if not i & distance else i - distance + LANES for i in range(LANES)]
                high = [i + distance if not i & distance else i + LANES for i in range(LANES)]
                for i in range(LANES):
                    if not i & distance:
                        a, b = vectors[i], vectors[i + distance]
                        vectors[i], vectors[i + distance] = a.shuffle(b, low), a.shuffle(b, high)
            to = builder.add(out, builder.mul(at, I64(4 * LANES // FLOATS[kind])))
            for i, v in enumerate(vectors):
                store(v, to, 4 * LANES * i)

    return turn
