"""The inner products that everything rests on, written in vectors: 16 rows of weights by a few rows of activations.

`byte_tile(kind, n)`     packed weights by activations quantised to bytes
`float_tile(kind, n)`     anything in float: F32, F16 and BF16 weights, keys, values, the matrix memory
`scores(kind)`            a query by 16 keys as they lie in the cache

Each makes an intrinsic for compiled functions; all arguments are addresses, strides in bytes, and counts.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from gguf.constants import GGMLQuantizationType as Kind
from numba.core import cgutils, types
from numba.extending import intrinsic

from tcinfer.kernels.cpu.packing import FLOATS, PACKINGS, RUN, element, to_float
from tcinfer.kernels.cpu.simd import (
    F32,
    I16,
    I32,
    I64,
    LANES,
    TIER,
    Lanes,
    constant,
    fetch_ahead,
    load,
    load_some,
    store,
)

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

    @intrinsic
    def tile(typingctx: Any, w: Any, x: Any, x_stride: Any, runs: Any, out: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            w, x, x_stride, runs, out = arguments
            rows = [builder.add(x, builder.mul(x_stride, I64(t))) for t in range(n)]
            heads = builder.mul(runs, I64(RUN))
            sums = _Sums(builder, n)
            with cgutils.for_range(builder, runs) as loop:
                at = builder.add(w, builder.mul(loop.index, I64(packing.bytes)))
                if n <= 2:
                    for line in range(0, packing.bytes, 64):
                        fetch_ahead(builder, at, AHEAD + line)
                q = packing.read(builder, at)
                d = [load(builder, at, 32 * i, I16).half() for i in range(packing.scales)]
                if packing.minimum:
                    m = [load(builder, at, 32 * packing.scales, I16).half()]
                else:
                    m = [scale * float(-packing.offset) for scale in d]
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
    add: to what is in `out`, which is always written in whole vectors.
    """
    unroll = {1: 4, 2: 2}.get(n, 1)  # independent sums, so that one addition does not wait for the other

    @intrinsic
    def tile(
        typingctx: Any, w: Any, w_stride: Any, x: Any, x_stride: Any, count: Any, lanes: Any, out: Any, out_stride: Any
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            w, w_stride, x, x_stride, count, lanes, out, out_stride = arguments
            rows = [builder.add(x, builder.mul(x_stride, I64(t))) for t in range(n)]
            sums = _Sums(builder, n * unroll)

            def column(c: Any, which: int, whole: bool) -> None:
                at = builder.add(w, builder.mul(c, w_stride))
                kind_ = element(kind)
                stored = load(builder, at, 0, kind_) if whole else load_some(builder, at, 0, kind_, lanes)
                if n == 1 and which == 0:
                    fetch_ahead(builder, at, AHEAD)
                values = to_float(stored, kind)
                for t in range(n):
                    x_c = load(builder, builder.add(rows[t], builder.mul(c, I64(4))), 0, F32, 1).splat()
                    sums[t * unroll + which] = values.fma(x_c, sums[t * unroll + which])

            def columns(whole: bool) -> None:
                together = builder.sdiv(count, I64(unroll))
                with cgutils.for_range(builder, together) as loop:
                    first = builder.mul(loop.index, I64(unroll))
                    for u in range(unroll):
                        column(builder.add(first, I64(u)), u, whole)
                if unroll > 1:
                    with cgutils.for_range_slice(builder, builder.mul(together, I64(unroll)), count, I64(1)) as (c, _):
                        column(c, 0, whole)

            with builder.if_else(builder.icmp_signed("==", lanes, I64(LANES))) as (full, tail):
                with full:
                    columns(True)
                with tail:
                    columns(False)
            for t in range(n):
                to = builder.add(out, builder.mul(out_stride, I64(t)))
                total = sums[t * unroll]
                for u in range(1, unroll):
                    total = total + sums[t * unroll + u]
                store(load(builder, to, 0, F32) + total if add else total, to)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), codegen

    return tile


@cache
def scores(kind: Kind) -> Any:
    """score(q, k, k_stride, width, rows, out): out float32 [16] = q · k_i for keys i = 0 .. rows - 1 (the rest: any).

    q float32 [width]; keys of a float kind, k_stride bytes apart. Sixteen sums side by side, added up across lanes by
    a tree of shuffles.
    """
    size = FLOATS[kind]

    @intrinsic
    def score(typingctx: Any, q: Any, k: Any, k_stride: Any, width: Any, rows: Any, out: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            q, k, k_stride, width, rows, out = arguments
            last = builder.sub(rows, I64(1))
            keys = []
            for i in range(LANES):
                inside = builder.icmp_signed("<", I64(i), last)
                keys.append(builder.add(k, builder.mul(k_stride, builder.select(inside, I64(i), last))))
            sums = _Sums(builder, LANES)

            def part(c: Any, lanes: Any) -> None:
                def get(address: Any, bytes_: int, kind_: Any) -> Lanes:
                    at = builder.add(address, builder.mul(c, I64(bytes_)))
                    return load(builder, at, 0, kind_) if lanes is None else load_some(builder, at, 0, kind_, lanes)

                x = get(q, 4, F32)
                for i in range(LANES):
                    sums[i] = to_float(get(keys[i], size, element(kind)), kind).fma(x, sums[i])

            whole = builder.and_(width, I64(-LANES))
            with cgutils.for_range_slice(builder, I64(0), whole, I64(LANES)) as (c, _):
                part(c, None)
            rest = builder.sub(width, whole)
            with builder.if_then(builder.icmp_signed(">", rest, I64(0))):
                part(whole, rest)
            level = [sums[i] for i in range(LANES)]
            half = LANES // 2
            while len(level) > 1:
                low = [i for i in range(2 * LANES) if i % (2 * half) < half]
                high = [i for i in range(2 * LANES) if i % (2 * half) >= half]
                level = [a.shuffle(b, low) + a.shuffle(b, high) for a, b in zip(level[::2], level[1::2], strict=True)]
                half //= 2
            store(level[0], out)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), codegen

    return score
