"""Softmax attention over ring and chunk. Equation: kernels/reference/attention.py.

A query's keys are its sinks and the positions of its window. They are taken in blocks whose borders are multiples of
BLOCK in the stream, however the stream was fed; each block gives a maximum, a sum of exponentials and weighted values,
and blocks are merged oldest first. So a token's attention has the same bits in any chunk and for any number of threads.

Passes of few tokens a sequence share blocks among the threads and merge in a second step. Long ones gather keys (16
side by side) and values once in float32, and take blocks of queries through them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType as Kind
from numba.extending import register_jitable

from tcinfer.kernels.cpu.jit import Operator, operator
from tcinfer.kernels.cpu.machine import exp, floats, int64s, load_half
from tcinfer.kernels.cpu.plan import Plan, Rows
from tcinfer.kernels.cpu.ring import slot_of
from tcinfer.kernels.cpu.rows import claim, share
from tcinfer.kernels.cpu.simd import LANES
from tcinfer.kernels.cpu.tiles import MANY, float_tile, padded, product, side_by_side
from tcinfer.kernels.cpu.vectors import NONE, exponentials, largest, merged, scaled
from tcinfer.kernels.packing import FLOATS
from tcinfer.kernels.plan import (
    ALWAYS,
    COUNT,
    EACH,
    FIELDS,
    FIRST,
    GATHERED,
    KEYS,
    PARTS,
    PROMPT,
    ROW,
    ROWS,
    SCRATCH,
    SEQUENCE,
    SEQUENCE_OF,
    SPLITS,
    TABLE,
    Geometry,
)
from tcinfer.kernels.table import ATTEND_FEW, ATTEND_GATHERED, BLOCK, COMBINE_FEW, GATHER, QUERIES

F = np.float32
MOST_FEW = 4  # rows of a sequence up to which a pass is short
SHORT = ALWAYS & ~PROMPT


@register_jitable
def window_start(at, window, sinks):  # type: ignore[no-untyped-def]
    """The first position that the window of the token at a position holds."""
    return max(sinks, at - window + 1) if window else np.int64(0)


@register_jitable
def visible(at, window, sinks):  # type: ignore[no-untyped-def]
    """What the token at a position sees: how many sinks, and the first position of its window."""
    return min(sinks, at + 1) if window else np.int64(0), window_start(at, window, sinks)


@register_jitable
def blocks_of(at, window, sinks):  # type: ignore[no-untyped-def]
    """In how many blocks the token at a position finds its keys: of sinks, and of its window."""
    ns, low = visible(at, window, sinks)
    return (ns + BLOCK - 1) // BLOCK, at // BLOCK - low // BLOCK + 1 if low <= at else np.int64(0)


@register_jitable
def merge(whole, top, part, part_top, width):  # type: ignore[no-untyped-def]
    """Put a block's weighted values and sum (a row [padded(width) + 1]) on top of those before it; the new maximum."""
    new = max(top, part_top)
    merged(whole, part, padded(width) + 1, exp(top - new), exp(part_top - new))
    return new


def _few(kind: Kind) -> Operator:
    """One block's part for one (row, key head): for each query head of the group values, sum and maximum."""
    turn, size = side_by_side(kind), FLOATS[kind]
    one, two, many = (float_tile(Kind.F32, n) for n in (1, 2, MANY))
    one_more, two_more, many_more = (float_tile(kind, n, add=True) for n in (1, 2, MANY))

    @operator(name=f"attend_few_{kind.name}")
    def attend(a, p, thread, threads, taken):  # type: ignore[no-untyped-def]
        q, q_far, q_stride, k_field, v_field, k_new, v_new = a[0], a[1], a[2], a[3], a[4], a[5], a[6]
        H, G, D, window, sinks = a[7], a[8], a[9], a[10], a[11]
        R, splits, stride, wide = H // G, p[SPLITS], size * G * D, padded(D)
        S = p[SCRATCH] + thread * p[EACH]
        S_stride = 4 * BLOCK
        Q = S + R * S_stride
        turned = Q + 4 * R * D
        addresses = turned + 4 * LANES * wide
        table = int64s(addresses)
        first, last = share(p[ROWS] * G * splits, thread, threads)
        for item in range(first, last):
            row, g, split = item // (G * splits), item // splits % G, item % splits
            sequence = int64s(p[TABLE] + 8 * SEQUENCE * int64s(p[SEQUENCE_OF])[row])
            fields, start, base = int64s(sequence[FIELDS]), sequence[FIRST], sequence[ROW]
            at = start + row - base
            ns, low = visible(at, window, sinks)
            far, near = blocks_of(at, window, sinks)
            if split >= far + near:
                continue
            if split < far:
                begin, stop = BLOCK * split, min(BLOCK * split + BLOCK, ns)
            else:
                block = low // BLOCK + split - far
                begin, stop = max(low, BLOCK * block), min(at + 1, BLOCK * block + BLOCK)
            source = q_far if q_far and split < far else q
            scaled(source + row * q_stride + 4 * D * g * R, Q, R * D, F(1 / math.sqrt(D)))
            for j in range(begin, stop, LANES):
                for i in range(LANES):
                    key = min(j + i, stop - 1)
                    if key >= start:
                        table[i] = k_new + (base + key - start) * stride + size * D * g
                    else:
                        table[i] = fields[k_field] + slot_of(key, window, sinks) * stride + size * D * g
                turn(addresses, D, turned)
                product(many, two, one, turned, 4 * LANES, Q, 4 * D, R, D, LANES, S + 4 * (j - begin), S_stride)
            parts = p[PARTS] + 4 * (wide + LANES) * R * item
            o = floats(parts)
            for i in range((wide + LANES) * R):
                o[i] = 0
            for r in range(R):
                top = largest(S + r * S_stride, stop - begin)
                total = exponentials(S + r * S_stride, stop - begin, top)
                o[(wide + LANES) * r + wide], o[(wide + LANES) * r + wide + 1] = total, top
            j = begin
            while j < stop:  # values that lie side by side
                n = stop - j
                v = v_new + (base + j - start) * stride
                if j < start:
                    n = min(n, start - j)
                    if window and j >= sinks:
                        n = min(n, window - (j - sinks) % window)
                    elif window:
                        n = min(n, sinks - j)
                    v = fields[v_field] + slot_of(j, window, sinks) * stride
                for c in range(0, D, LANES):
                    from_, weights, lanes = v + size * (D * g + c), S + 4 * (j - begin), min(LANES, D - c)
                    to, step = parts + 4 * c, 4 * (wide + LANES)
                    product(many_more, two_more, one_more, from_, stride, weights, S_stride, R, n, lanes, to, step)
                j += n

    return attend


@operator
def _combine(a, p, thread, threads, taken):  # type: ignore[no-untyped-def]
    out, stride, H, G, D, window, sinks = a[0], a[1], a[2], a[3], a[4], a[5], a[6]
    R, splits, wide = H // G, p[SPLITS], padded(D)
    whole = p[SCRATCH] + thread * p[EACH]
    o = floats(whole)
    first, last = share(p[ROWS] * H, thread, threads)
    for item in range(first, last):
        row, h = item // H, item % H
        sequence = int64s(p[TABLE] + 8 * SEQUENCE * int64s(p[SEQUENCE_OF])[row])
        far, near = blocks_of(sequence[FIRST] + row - sequence[ROW], window, sinks)
        for i in range(wide + 1):
            o[i] = 0
        top = F(NONE)
        for split in range(far + near):
            part = p[PARTS] + 4 * (wide + LANES) * (((row * G + h // R) * splits + split) * R + h % R)
            top = merge(whole, top, part, floats(part)[wide + 1], D)
        scaled(whole, out + row * stride + 4 * D * h, D, F(1) / o[wide])


@register_jitable
def _gathered(first, count, window, sinks):  # type: ignore[no-untyped-def]
    """How the keys of a long pass lie side by side: sinks, the place where the window begins, its first position there
    (a multiple of 16), and how many places there are."""
    ns = min(sinks, first + count) if window else np.int64(0)
    begin = padded(ns)
    low = window_start(first, window, sinks)
    base = low - low % LANES
    return ns, begin, base, begin + padded(max(0, first + count - base))


def _gather(kind: Kind) -> Operator:
    turn, half, size = side_by_side(kind), kind == Kind.F16, FLOATS[kind]

    @operator(name=f"gather_{kind.name}")
    def gather(a, p, thread, threads, taken):  # type: ignore[no-untyped-def]
        k_field, v_field, k_new, v_new, G, D, window, sinks = a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]
        stride = size * G * D
        sequence = int64s(p[TABLE])  # a long pass has one sequence
        fields, start, count = int64s(sequence[FIELDS]), sequence[FIRST], sequence[COUNT]
        ns, begin, base, places = _gathered(start, count, window, sinks)
        low = window_start(start, window, sinks)
        addresses = p[SCRATCH] + thread * p[EACH]
        table = int64s(addresses)
        first, last = share(places // LANES * G, thread, threads)
        for item in range(first, last):
            tile, g = item // G, item % G
            values = floats(p[GATHERED] + 4 * padded(D) * G * p[KEYS] + 4 * D * (g * p[KEYS] + LANES * tile))
            for lane in range(LANES):
                place = LANES * tile + lane
                at = place if place < begin else base + place - begin
                there = at < ns if place < begin else low <= at < start + count
                k, v = k_new + size * D * g, v_new + size * D * g  # any memory will do where no key is
                if there and at >= start:
                    k, v = k + (at - start) * stride, v + (at - start) * stride
                elif there:
                    slot = slot_of(at, window, sinks) * stride + size * D * g
                    k, v = fields[k_field] + slot, fields[v_field] + slot
                table[lane] = k
                for c in range(D):
                    value = load_half(v + 2 * c) if half else floats(v)[c]
                    values[D * lane + c] = value if there else F(0)
            turn(addresses, D, p[GATHERED] + 4 * padded(D) * (g * p[KEYS] + LANES * tile))

    return gather


_one, _two, _many = (float_tile(Kind.F32, n) for n in (1, 2, MANY))


@operator
def _attend_many(a, p, thread, threads, taken):  # type: ignore[no-untyped-def]
    q, q_far, q_stride, out, H, G, D, window, sinks = a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8]
    R, wide = H // G, padded(D)
    tokens = max(1, QUERIES // R)
    sequence = int64s(p[TABLE])
    start, count = sequence[FIRST], sequence[COUNT]
    ns, place, base, _ = _gathered(start, count, window, sinks)
    most, step = padded(tokens * R), 4 * (wide + LANES)
    Q = p[SCRATCH] + thread * p[EACH]
    S, S_stride = Q + 4 * D * most, 4 * BLOCK
    whole = S + S_stride * most
    part = whole + step * most
    o, tops = floats(whole), floats(part + step * most)
    key_heads, value_heads = p[GATHERED], p[GATHERED] + 4 * wide * G * p[KEYS]
    far_blocks = (ns + BLOCK - 1) // BLOCK
    blocks = (count + tokens - 1) // tokens
    item, until = claim(taken, blocks * G, 1, threads)
    while item < until:
        begin, g = item // G * tokens, item % G
        stop = min(count, begin + tokens)
        rows = (stop - begin) * R
        full = (rows + MANY - 1) // MANY * MANY  # with rows of zeros, so that the widest tile serves all
        for i in range(rows):
            tops[i] = F(NONE)
        for i in range(rows * (wide + LANES)):
            o[i] = 0
        earliest = window_start(start + begin, window, sinks)
        near = earliest // BLOCK
        for block in range(near - far_blocks, max(near, (start + stop - 1) // BLOCK + 1)):
            far = block < near
            if far:
                begins = (block - near + far_blocks) * BLOCK
                ends, at_place = min(begins + BLOCK, ns), begins
            else:
                begins = max(block * BLOCK, max(base, earliest - earliest % LANES))
                ends, at_place = min(block * BLOCK + BLOCK, start + stop), place + begins - base
            if block == near - far_blocks or block == near:
                source = q_far if far and q_far else q
                for i in range(stop - begin):
                    x = source + (begin + i) * q_stride + 4 * D * g * R
                    scaled(x, Q + 4 * D * R * i, R * D, F(1 / math.sqrt(D)))
                for c in range(rows * D, full * D):
                    floats(Q)[c] = 0
            for j in range(0, ends - begins, LANES):
                keys = key_heads + 4 * wide * (g * p[KEYS] + at_place + j)
                product(_many, _two, _one, keys, 4 * LANES, Q, 4 * D, full, D, LANES, S + 4 * j, S_stride)
            for i in range(rows):
                at = start + begin + i // R
                lower = 0 if far else max(window_start(at, window, sinks) - begins, 0)
                upper = min(ends, at + 1) - begins
                s = floats(S + i * S_stride)
                for c in range(min(lower, ends - begins)):
                    s[c] = 0
                for c in range(max(upper, 0), ends - begins):
                    s[c] = 0
                last = floats(part + i * step)
                last[wide + 1], last[wide + 2] = F(NONE), F(lower < upper)
                if lower < upper:
                    top = largest(S + i * S_stride + 4 * lower, upper - lower)
                    last[wide] = exponentials(S + i * S_stride + 4 * lower, upper - lower, top)
                    last[wide + 1] = top
            for c in range(0, D, LANES):
                values = value_heads + 4 * (D * (g * p[KEYS] + at_place) + c)
                lanes, n = min(LANES, D - c), ends - begins
                # one vector of a row after the other: sums and maxima stand behind them
                product(_many, _two, _one, values, 4 * D, S, S_stride, full, n, lanes, part + 4 * c, step)
            for i in range(rows):
                last = floats(part + i * step)
                if last[wide + 2] != 0:  # the row sees something of this block
                    tops[i] = merge(whole + i * step, tops[i], part + i * step, last[wide + 1], D)
        for i in range(rows):
            y = out + (begin + i // R) * q_stride + 4 * D * (g * R + i % R)
            scaled(whole + i * step, y, D, F(1) / o[(wide + LANES) * i + wide])
        item += 1
        if item == until:
            item, until = claim(taken, blocks * G, 1, threads)


for _kind in (Kind.F16, Kind.F32):
    _few(_kind)
    _gather(_kind)


def attention(plan: Plan, geometry: Geometry, new: Any, k_field: int, v_field: int) -> Rows:
    """Each row's query over what it sees of its sequence's ring and of the pass's own rows. Rows [H * D]."""
    H, D = geometry.heads, geometry.head_dim
    out, kind = Rows(plan, H * D), "F16" if geometry.half else "F32"
    window = {"window": geometry.window, "sinks": geometry.sinks}
    shape = {"H": H, "G": geometry.kv_heads, "D": D, **window}
    query = {"q": new.q, "q_far": new.q_far, "q_stride": new.q.stride}
    cache = {"k_field": k_field, "v_field": v_field, "k_new": new.k_new, "v_new": new.v_new}
    plan.step(ATTEND_FEW, kind, SHORT, **query, **cache, **shape)
    plan.step(COMBINE_FEW, "", SHORT, out=out, stride=out.stride, **shape)
    plan.step(GATHER, kind, PROMPT, **cache, G=geometry.kv_heads, D=D, **window)
    plan.step(ATTEND_GATHERED, "", PROMPT, **query, out=out, **shape)
    return out


def splits_of(geometry: Geometry, position: int) -> int:
    """Blocks in which the token at a position, or any before it, finds its keys, at most."""
    window, sinks = geometry.window, geometry.sinks
    # one more than whole blocks: a window may begin and end within one
    last = position if not window else min(position, window + BLOCK - 1)
    return -(-sinks // BLOCK) + last // BLOCK + 1


def parts_bytes(geometry: Geometry, rows: int, splits: int) -> int:
    """Of what the blocks of a short pass give."""
    return 4 * (padded(geometry.head_dim) + LANES) * geometry.heads * rows * splits


def places(geometry: Geometry, first: int, count: int) -> int:
    """Places for keys in a long pass."""
    return int(_gathered(first, count, geometry.window, geometry.sinks)[3])


def gathered_bytes(geometry: Geometry, places: int) -> int:
    """Of keys and values in so many places."""
    return 4 * geometry.kv_heads * places * (padded(geometry.head_dim) + geometry.head_dim)
