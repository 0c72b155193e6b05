"""Softmax attention over ring and chunk. Equation: kernels/reference/attention.py.

Keys are numbered as a query sees them: the sinks, then the window, oldest first. Passes of few tokens a sequence go
through them where they lie, divided into parts of SPLIT keys whatever the number of threads, and put the parts
together. Long ones first gather keys (transposed, 16 side by side) and values in float32, and then take blocks of
queries through blocks of keys with a running maximum.
"""

from __future__ import annotations

import math

import numpy as np
from gguf.constants import GGMLQuantizationType as Kind
from numba.extending import register_jitable

from tcinfer.kernels.cpu.jit import Operator, operator
from tcinfer.kernels.cpu.plan import (
    COUNT,
    EACH,
    FIELDS,
    FIRST,
    GATHERED,
    KEYS,
    LONG,
    PARTS,
    ROW,
    ROWS,
    SCRATCH,
    SEQUENCE,
    SEQUENCE_OF,
    SHORT,
    SPLITS,
    TABLE,
    Plan,
    Rows,
)
from tcinfer.kernels.cpu.ring import Entering, Geometry, slot_of
from tcinfer.kernels.cpu.rows import share
from tcinfer.kernels.cpu.simd import LANES, exp, floats, int64s, load_half
from tcinfer.kernels.cpu.tiles import MANY, float_tile, scores
from tcinfer.kernels.cpu.vectors import NONE, exponentials, largest, scaled

F = np.float32
FEW = 4  # rows of a sequence up to which a pass is short
SPLIT = 128  # keys in a part
BLOCK = 128  # keys in a block
ROWS_OF_BLOCK = 32  # query rows (tokens times heads of a group) taken together, about


@register_jitable
def visible(at, window, sinks):  # type: ignore[no-untyped-def]
    """What the token at a position sees: how many sinks, and the first position of its window."""
    if window == 0:
        return np.int64(0), np.int64(0)
    return min(sinks, at + 1), max(sinks, at - window + 1)


@register_jitable
def stretch(i, stop, ns, low, first, window, sinks):  # type: ignore[no-untyped-def]
    """Keys i .. stop - 1 of a query, or the first of them that lie side by side: (their number, from the pass's own rows?,
    slot or row).  ns, low: as `visible` gives them; first: the position of the sequence's first row."""
    at = i if i < ns else low + i - ns
    n = (min(ns, stop) if i < ns else stop) - i
    if at >= first:
        return n, True, at - first
    n = min(n, first - at)
    if window and at >= sinks:
        n = min(n, window - (at - sinks) % window)
    return n, False, slot_of(at, window, sinks)


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


def _few(kind: Kind) -> Operator:
    """Scores, maximum, sum and weighted values of one (row, key head, part), for each query head of the group."""
    score, size = scores(kind), 2 if kind == Kind.F16 else 4
    one, two, many = (float_tile(kind, n, add=True) for n in (1, 2, MANY))

    @operator(name=f"attend_few_{kind.name}")
    def attend(a, p, thread, threads):  # type: ignore[no-untyped-def]
        q, q_far, q_stride, k_field, v_field, k_new, v_new = a[0], a[1], a[2], a[3], a[4], a[5], a[6]
        H, G, D, window, sinks = a[7], a[8], a[9], a[10], a[11]
        R, splits, stride = H // G, p[SPLITS], size * G * D
        strips = (D + LANES - 1) // LANES
        scale = F(1 / math.sqrt(D))
        S = p[SCRATCH] + thread * p[EACH]
        S_stride = 4 * (SPLIT + LANES)
        O = S + R * S_stride
        first, last = share(p[ROWS] * G * splits, thread, threads)
        for item in range(first, last):
            row, g, split = item // (G * splits), item // splits % G, item % splits
            sequence = int64s(p[TABLE] + 8 * SEQUENCE * int64s(p[SEQUENCE_OF])[row])
            fields, start, base = int64s(sequence[FIELDS]), sequence[FIRST], sequence[ROW]
            at = start + row - base
            ns, low = visible(at, window, sinks)
            begin, stop = SPLIT * split, min(SPLIT * split + SPLIT, ns + max(0, at - low + 1))
            if begin >= stop:
                continue
            i = begin
            while i < stop:
                n, own, where = stretch(i, stop, ns, low, start, window, sinks)
                k = k_new + (base + where) * stride if own else fields[k_field] + where * stride
                source = q_far if q_far and i < ns else q
                for r in range(R):
                    query = source + row * q_stride + 4 * D * (g * R + r)
                    for j in range(0, n, LANES):
                        from_ = k + j * stride + size * D * g
                        score(query, from_, stride, D, min(LANES, n - j), S + r * S_stride + 4 * (i - begin + j))
                i += n
            parts = p[PARTS] + 4 * (D + 2) * R * item
            for r in range(R):
                scaled(S + r * S_stride, stop - begin, scale)
                top = largest(S + r * S_stride, stop - begin)
                total = exponentials(S + r * S_stride, stop - begin, top)
                out = floats(parts + 4 * (D + 2) * r)
                out[D], out[D + 1] = top, total
            o = floats(O)
            for j in range(strips * R * LANES):
                o[j] = 0
            i = begin
            while i < stop:
                n, own, where = stretch(i, stop, ns, low, start, window, sinks)
                v = v_new + (base + where) * stride if own else fields[v_field] + where * stride
                for strip in range(strips):
                    c = LANES * strip
                    from_, to = v + size * (D * g + c), O + 4 * LANES * R * strip
                    weights = S + 4 * (i - begin)
                    product(many, two, one, from_, stride, weights, S_stride, R, n, min(LANES, D - c), to, 4 * LANES)
                i += n
            for r in range(R):
                out = floats(parts + 4 * (D + 2) * r)
                for c in range(D):
                    out[c] = o[(c // LANES * R + r) * LANES + c % LANES]

    return attend


@operator
def _combine(a, p, thread, threads):  # type: ignore[no-untyped-def]
    out, stride, H, G, D, window, sinks = a[0], a[1], a[2], a[3], a[4], a[5], a[6]
    R, splits = H // G, p[SPLITS]
    first, last = share(p[ROWS] * H, thread, threads)
    for item in range(first, last):
        row, h = item // H, item % H
        sequence = int64s(p[TABLE] + 8 * SEQUENCE * int64s(p[SEQUENCE_OF])[row])
        at = sequence[FIRST] + row - sequence[ROW]
        ns, low = visible(at, window, sinks)
        used = (ns + max(0, at - low + 1) + SPLIT - 1) // SPLIT
        base = p[PARTS] + 4 * (D + 2) * (((row * G + h // R) * splits) * R + h % R)
        step = 4 * (D + 2) * R
        top, total = F(NONE), F(0)
        for i in range(used):
            x = floats(base + i * step)[D]
            top = x if not x <= top else top
        y = floats(out + row * stride + 4 * D * h)
        for c in range(D):
            y[c] = 0
        for i in range(used):
            part = floats(base + i * step)
            e = exp(part[D] - top)
            total += e * part[D + 1]
            for c in range(D):
                y[c] += e * part[c]
        for c in range(D):
            y[c] /= total


@register_jitable
def _gathered(first, count, window, sinks):  # type: ignore[no-untyped-def]
    """What the rows of a long sequence see together: sinks, room for them, first position of the window, all numbers."""
    ns, low = visible(first, window, sinks)
    ns = min(sinks, first + count) if window else 0
    room = (ns + LANES - 1) // LANES * LANES
    return ns, room, low, room + max(0, first + count - low)


@operator
def _gather(a, p, thread, threads):  # type: ignore[no-untyped-def]
    k_field, v_field, k_new, v_new, G, D, window, sinks, half = a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8]
    size = 2 if half else 4
    stride = size * G * D
    sequence = int64s(p[TABLE])  # a long pass has one sequence
    fields, start, count = int64s(sequence[FIELDS]), sequence[FIRST], sequence[COUNT]
    ns, room, low, n = _gathered(start, count, window, sinks)
    blocks = (n + LANES - 1) // LANES
    first, last = share(blocks * G, thread, threads)
    for item in range(first, last):
        block, g = item // G, item % G
        keys = floats(p[GATHERED] + 4 * D * (g * p[KEYS] + LANES * block))
        values = floats(p[GATHERED] + 4 * D * ((G + g) * p[KEYS] + LANES * block))
        for lane in range(LANES):
            j = LANES * block + lane
            if j >= n or ns <= j < room:  # no key: nothing may be NaN there
                for c in range(D):
                    keys[LANES * c + lane] = 0
                    values[D * lane + c] = 0
                continue
            at = j if j < ns else low + j - room
            k, v = k_new + (at - start) * stride, v_new + (at - start) * stride
            if at < start:
                slot = slot_of(at, window, sinks) * stride
                k, v = fields[k_field] + slot, fields[v_field] + slot
            k, v = k + size * D * g, v + size * D * g
            for c in range(D):
                keys[LANES * c + lane] = load_half(k + 2 * c) if half else floats(k)[c]
            for c in range(D):
                values[D * lane + c] = load_half(v + 2 * c) if half else floats(v)[c]


_one, _two, _many = (float_tile(Kind.F32, n) for n in (1, 2, MANY))
_one_more, _two_more, _many_more = (float_tile(Kind.F32, n, add=True) for n in (1, 2, MANY))


@operator
def _attend_many(a, p, thread, threads):  # type: ignore[no-untyped-def]
    q, q_far, q_stride, out, H, G, D, window, sinks = a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8]
    R = H // G
    tokens = max(1, ROWS_OF_BLOCK // R)
    strips = (D + LANES - 1) // LANES
    scale = F(1 / math.sqrt(D))
    sequence = int64s(p[TABLE])
    start, count = sequence[FIRST], sequence[COUNT]
    ns, room, low, n = _gathered(start, count, window, sinks)
    most = (tokens * R + MANY - 1) // MANY * MANY
    Q = p[SCRATCH] + thread * p[EACH]
    S, S_stride = Q + 4 * D * most, 4 * BLOCK
    O = S + S_stride * most
    tops, totals = floats(O + 4 * LANES * strips * most), floats(O + 4 * LANES * strips * most + 4 * most)
    o = floats(O)
    blocks = (count + tokens - 1) // tokens
    first, last = share(blocks * G, thread, threads)
    for item in range(first, last):
        block, g = item // G, item % G
        begin, stop = block * tokens, min(count, block * tokens + tokens)
        rows = (stop - begin) * R
        full = (rows + MANY - 1) // MANY * MANY  # with rows of zeros, so that the widest tile serves all
        for i in range(rows):
            tops[i], totals[i] = F(NONE), F(0)
        for i in range(strips * most * LANES):
            o[i] = 0
        near = (
            room + max(low, start + begin - window + 1 if window else 0) - low
        )  # of the window, the first key they see
        near -= near % LANES
        j = np.int64(0) if ns else near
        while True:
            far = j < room and ns > 0
            if far:
                until = min(j + BLOCK, room)
            else:
                j = max(j, near)
                if j >= room + start + stop - low:
                    break
                until = min(j + BLOCK, room + start + stop - low)
            source = q_far if far and q_far else q
            for i in range(rows):
                x = floats(source + (begin + i // R) * q_stride + 4 * D * (g * R + i % R))
                y = floats(Q + 4 * D * i)
                for c in range(D):
                    y[c] = x[c] * scale
            for c in range(rows * D, full * D):
                floats(Q)[c] = 0
            for b in range(0, until - j, LANES):
                keys = p[GATHERED] + 4 * D * (g * p[KEYS] + j + b)
                product(_many, _two, _one, keys, 4 * LANES, Q, 4 * D, full, D, LANES, S + 4 * b, S_stride)
            wide = until - j
            for i in range(rows):
                at = start + begin + i // R
                if far:
                    lower, upper = np.int64(0), min(ns, at + 1) - j
                else:
                    lower = max(0, at - window + 1 - low + room - j) if window else np.int64(0)
                    upper = at + 1 - low + room - j
                upper = min(upper, wide)
                s = floats(S + i * S_stride)
                for c in range(min(lower, wide)):
                    s[c] = 0
                for c in range(max(upper, 0), wide):
                    s[c] = 0
                if lower >= upper:
                    continue
                top = max(tops[i], largest(S + i * S_stride + 4 * lower, upper - lower))
                total = exponentials(S + i * S_stride + 4 * lower, upper - lower, top)
                fade = exp(tops[i] - top)
                tops[i], totals[i] = top, totals[i] * fade + total
                for strip in range(strips):
                    for c in range(LANES):
                        o[(strip * most + i) * LANES + c] *= fade
            for strip in range(strips):
                c = LANES * strip
                values = p[GATHERED] + 4 * (D * ((G + g) * p[KEYS] + j) + c)
                to = O + 4 * LANES * most * strip
                product(
                    _many_more,
                    _two_more,
                    _one_more,
                    values,
                    4 * D,
                    S,
                    S_stride,
                    full,
                    wide,
                    min(LANES, D - c),
                    to,
                    4 * LANES,
                )
            j = until
        for i in range(rows):
            y = floats(out + (begin + i // R) * q_stride + 4 * D * (g * R + i % R))
            for c in range(D):
                y[c] = o[(c // LANES * most + i) * LANES + c % LANES] / totals[i]


FEW_OF = {kind: _few(kind) for kind in (Kind.F16, Kind.F32)}


def attention(plan: Plan, geometry: Geometry, new: Entering, k_field: int, v_field: int) -> Rows:
    """Each row's query over what it sees of its sequence's ring and of the pass's own rows. Rows [H * D]."""
    H, G, D, window, sinks = geometry.heads, geometry.kv_heads, geometry.head_dim, geometry.window, geometry.sinks
    out = Rows(plan, H * D)
    far = new.q_far.address if new.q_far else 0
    shape = (H, G, D, window, sinks)
    query = (new.q.address, far, new.q.stride)
    strips = -(-D // LANES) * LANES
    plan.scratch(4 * (H // G) * (SPLIT + LANES + strips))
    plan.scratch(4 * (max(ROWS_OF_BLOCK, H // G) + MANY) * (D + BLOCK + strips + 2))
    plan.step(FEW_OF[geometry.kind], *query, k_field, v_field, new.k_new, new.v_new, *shape, when=SHORT)
    plan.step(_combine, out.address, out.stride, *shape, when=SHORT)
    half = geometry.size == 2
    plan.step(_gather, k_field, v_field, new.k_new, new.v_new, G, D, window, sinks, half, when=LONG)
    plan.step(_attend_many, *query, out.address, *shape, when=LONG)
    return out


def parts_bytes(geometry: Geometry, rows: int, splits: int) -> int:
    """Of the parts of a short pass."""
    return 4 * (geometry.head_dim + 2) * geometry.heads * rows * splits


def gathered_keys(geometry: Geometry, first: int, count: int) -> int:
    """Keys that a long pass gathers, and room for a vector at the end."""
    window, sinks = geometry.window, geometry.sinks
    low = max(sinks, first - window + 1) if window else 0
    return sinks + 2 * LANES + first + count - low + LANES


def splits_of(geometry: Geometry, position: int) -> int:
    """Parts of the attention of the token at a position."""
    keys = position + 1 if not geometry.window else min(position + 1, geometry.window + geometry.sinks)
    return -(-keys // SPLIT)
