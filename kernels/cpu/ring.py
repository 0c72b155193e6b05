"""The first level's operators: what enters the ring, what leaves it, what stays (tcinfer/memory/local.py).

A pass rotates and rounds its keys and values first, into rows of the ring's type beside the ring; attention reads ring
and rows; what leaves is copied out for a second level; last, the rows that stay are written into their slots.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from gguf.constants import GGMLQuantizationType as Kind
from numba.extending import register_jitable
from numpy.typing import NDArray

from tcinfer.kernels.cpu.jit import operator
from tcinfer.kernels.cpu.machine import floats, int8s, int64s, load_half, store_half
from tcinfer.kernels.cpu.packing import FLOATS
from tcinfer.kernels.cpu.plan import (
    COUNT,
    FIELDS,
    FIRST,
    ROW,
    ROWS,
    SEQUENCE,
    SEQUENCE_OF,
    SEQUENCES,
    TABLE,
    Plan,
    Rows,
)
from tcinfer.kernels.cpu.rows import position, share

F = np.float32


class Geometry(NamedTuple):
    """What the first level's operators need to know of a model."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int  # 0: unbounded
    sinks: int
    kind: Kind  # of the ring's elements: F16 or F32
    interleaved: bool  # which channels make a rotated pair: neighbours, or the two halves

    @property
    def size(self) -> int:
        """Bytes of an element of the ring."""
        return FLOATS[self.kind]


class Entering(NamedTuple):
    """What `push` makes of a pass's queries, keys and values; None where not asked for."""

    q: Rows  # rotated
    q_far: Rows | None  # rotated for the sinks
    k_new: int  # [rows, G, D] of the ring's type, k rotated; k_stride apart
    v_new: int
    stride: int
    k: Rows | None  # float32 of the same, rounded
    v: Rows | None
    k_plain: Rows | None  # float32, convolved, not rotated, not rounded


@register_jitable
def turn(x, y, cos, sin, width, interleaved, back):  # type: ignore[no-untyped-def]
    """y = one head x turned by the angles of its position (or back): (a cos - b sin, a sin + b cos)."""
    half = width // 2
    sign = F(-1) if back else F(1)
    if interleaved:
        for i in range(half):
            a, b, c, s = x[2 * i], x[2 * i + 1], cos[i], sign * sin[i]
            y[2 * i] = a * c - b * s
            y[2 * i + 1] = a * s + b * c
    else:
        for i in range(half):
            a, b, c, s = x[i], x[half + i], cos[i], sign * sin[i]
            y[i] = a * c - b * s
            y[half + i] = a * s + b * c


@register_jitable
def slot_of(at, window, sinks):  # type: ignore[no-untyped-def]
    """Where a position is kept: sinks in front, then the ring."""
    return at if window == 0 or at < sinks else sinks + (at - sinks) % window


@operator
def _push(a, p, thread, threads, taken):  # type: ignore[no-untyped-def]
    q, q_stride, k, v, kv_stride = a[0], a[1], a[2], a[3], a[4]
    H, G, D, half, interleaved = a[5], a[6], a[7], a[8], a[9]
    cos, sin, cos_far, sin_far = a[10], a[11], a[12], a[13]
    q_out, q_far, k_new, v_new, new_stride = a[14], a[15], a[16], a[17], a[18]
    k_out, v_out, k_plain, taps, last_field, scratch = a[19], a[20], a[21], a[22], a[23], a[24]
    turns = cos != 0
    first, last = share(p[ROWS] * (H + G), thread, threads)
    for item in range(first, last):
        row, h = item // (H + G), item % (H + G)
        c, s = floats(cos + 2 * D * row), floats(sin + 2 * D * row)
        if h < H:
            x, y = floats(q + row * q_stride + 4 * D * h), floats(q_out + row * q_stride + 4 * D * h)
            if turns:
                turn(x, y, c, s, D, interleaved, False)
            else:
                for i in range(D):
                    y[i] = x[i]
            if q_far:
                c, s = floats(cos_far + 2 * D * row), floats(sin_far + 2 * D * row)
                turn(x, floats(q_far + row * q_stride + 4 * D * h), c, s, D, interleaved, False)
            continue
        g = h - H
        x = floats(k + row * kv_stride + 4 * D * g)
        turned = floats(scratch + row * kv_stride + 4 * D * g)
        if taps:  # k'_t = w_0 k_t + w_1 k_{t-1}
            sequence = int64s(p[TABLE] + 8 * SEQUENCE * int64s(p[SEQUENCE_OF])[row])
            before = floats(int64s(sequence[FIELDS])[last_field] + 4 * D * g)
            if row > sequence[ROW]:
                before = floats(k + (row - 1) * kv_stride + 4 * D * g)
            now, then = floats(taps + 4 * D * g), floats(taps + 4 * D * (G + g))
            mixed = floats(k_plain + row * kv_stride + 4 * D * g)
            for i in range(D):
                mixed[i] = now[i] * x[i] + then[i] * before[i]
            x = mixed
        elif k_plain:
            plain = floats(k_plain + row * kv_stride + 4 * D * g)
            for i in range(D):
                plain[i] = x[i]
        if turns:
            turn(x, turned, c, s, D, interleaved, False)
        else:
            for i in range(D):
                turned[i] = x[i]
        value = floats(v + row * kv_stride + 4 * D * g)
        to_k, to_v = k_new + row * new_stride, v_new + row * new_stride
        if half:
            for i in range(D):
                store_half(to_k + 2 * (D * g + i), turned[i])
                store_half(to_v + 2 * (D * g + i), value[i])
        else:
            for i in range(D):
                floats(to_k)[D * g + i] = turned[i]
                floats(to_v)[D * g + i] = value[i]
        if k_out:
            rounded, rounded_v = (
                floats(k_out + row * kv_stride + 4 * D * g),
                floats(v_out + row * kv_stride + 4 * D * g),
            )
            for i in range(D):
                rounded[i] = load_half(to_k + 2 * (D * g + i)) if half else turned[i]
                rounded_v[i] = load_half(to_v + 2 * (D * g + i)) if half else value[i]


def push(
    plan: Plan,
    geometry: Geometry,
    q: Rows,
    k: Rows,
    v: Rows,
    near: tuple[int, int],
    far: tuple[int, int],
    taps: NDArray | None,
    last_field: int,
    rounded: bool,
    plain: bool,
) -> Entering:
    """Convolve, rotate, round.  near, far: angles (rows.angles), or (0, 0); rounded, plain: make k, v and k_plain."""
    H, G, D, size = geometry.heads, geometry.kv_heads, geometry.head_dim, geometry.size
    stride = size * G * D
    q_out, q_far = Rows(plan, H * D), Rows(plan, H * D) if far[0] else None
    k_new, v_new = (plan.room(plan.capacity * stride) for _ in range(2))
    k_out, v_out = (Rows(plan, G * D) for _ in range(2)) if rounded else (None, None)
    k_plain = Rows(plan, G * D) if plain or taps is not None else None
    plan.step(
        _push,
        *(q.address, q.stride, k.address, v.address, k.stride),
        *(H, G, D, size == 2, geometry.interleaved),
        *(*near, *far),
        *(q_out.address, _at(q_far), k_new, v_new, stride),
        *(_at(k_out), _at(v_out), _at(k_plain), plan.keep(taps), last_field, Rows(plan, G * D).address),
    )
    return Entering(q_out, q_far, k_new, v_new, stride, k_out, v_out, k_plain)


def _at(rows: Rows | None) -> int:
    return rows.address if rows else 0


@operator
def _take(a, p, thread, threads, taken):  # type: ignore[no-untyped-def]
    field, new, stride, width, half, window, sinks, out = a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]
    size = 2 if half else 4
    first, last = share(p[ROWS], thread, threads)
    for row in range(first, last):
        sequence = int64s(p[TABLE] + 8 * SEQUENCE * int64s(p[SEQUENCE_OF])[row])
        leaving = position(p, row) - window
        if leaving < sinks:
            continue
        at = new + (leaving - sequence[FIRST] + sequence[ROW]) * stride
        if leaving < sequence[FIRST]:
            at = int64s(sequence[FIELDS])[field] + slot_of(leaving, window, sinks) * width * size
        y = floats(out + 4 * width * row)
        for i in range(width):
            y[i] = load_half(at + 2 * i) if half else floats(at)[i]


def take(plan: Plan, geometry: Geometry, field: int, new: int, stride: int, width: int, half: bool) -> Rows:
    """float32 rows of the tokens that leave the window while each row enters it; rows with none keep what they hold.

    field: of the cache; new: the pass's own rows, [rows, width] `stride` apart; half: both of float16.
    """
    out = Rows(plan, width)
    arguments = (field, new, stride, width, half, geometry.window, geometry.sinks, out.address)
    plan.step(_take, *arguments, wait=False)
    return out


@operator
def _insert(a, p, thread, threads, taken):  # type: ignore[no-untyped-def]
    field, new, stride, size, window, sinks = a[0], a[1], a[2], a[3], a[4], a[5]
    first, last = share(p[ROWS], thread, threads)
    for row in range(first, last):
        sequence = int64s(p[TABLE] + 8 * SEQUENCE * int64s(p[SEQUENCE_OF])[row])
        at = position(p, row)
        if window == 0 or at < sinks or at >= sequence[FIRST] + sequence[COUNT] - window:
            slot = int64s(sequence[FIELDS])[field] + slot_of(at, window, sinks) * size
            source, target = int8s(new + row * stride), int8s(slot)
            for i in range(size):
                target[i] = source[i]


def insert(plan: Plan, geometry: Geometry, field: int, new: int, stride: int, size: int) -> None:
    """Write the rows that stay into their slots of a per-token field: `size` bytes each, `stride` apart."""
    plan.step(_insert, field, new, stride, size, geometry.window, geometry.sinks, wait=False)


@operator
def _keep_last(a, p, thread, threads, taken):  # type: ignore[no-untyped-def]
    field, x, stride, width = a[0], a[1], a[2], a[3]
    first, last = share(p[SEQUENCES], thread, threads)
    for i in range(first, last):
        sequence = int64s(p[TABLE] + 8 * SEQUENCE * i)
        source = floats(x + (sequence[ROW] + sequence[COUNT] - 1) * stride)
        target = floats(int64s(sequence[FIELDS])[field])
        for c in range(width):
            target[c] = source[c]


def keep_last(plan: Plan, field: int, x: Rows) -> None:
    """The last row of each sequence into a field of its state."""
    plan.step(_keep_last, field, x.address, x.stride, x.columns, wait=False)
