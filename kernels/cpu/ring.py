"""The first level's operators: what enters the ring, what leaves it, what stays (kernels/reference/ring.py).

A pass rotates and rounds its keys and values first, into rows of the ring's type beside the ring; attention reads ring
and rows; what leaves is copied out for a second level; last, the rows that stay are written into their slots.
"""

from __future__ import annotations

import numpy as np
from numba.extending import register_jitable

from tcinfer.kernels.cpu.jit import operator
from tcinfer.kernels.cpu.machine import floats, int8s, int64s, load_half, store_half
from tcinfer.kernels.cpu.rows import position, share
from tcinfer.kernels.plan import COUNT, FIELDS, FIRST, ROW, ROWS, SEQUENCE, SEQUENCE_OF, SEQUENCES, TABLE

F = np.float32


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


@register_jitable
def turned_to(x, y, cos, sin, row, turned, width, interleaved, turns):  # type: ignore[no-untyped-def]
    """y = one head x whose first `turned` channels are turned by the row's angles, if it turns at all."""
    if turns:
        turn(x, y, floats(cos + 2 * turned * row), floats(sin + 2 * turned * row), turned, interleaved, False)
        for i in range(turned, width):
            y[i] = x[i]
    else:
        for i in range(width):
            y[i] = x[i]


@operator
def _push(a, p, thread, threads, taken):  # type: ignore[no-untyped-def]
    q, k, v, H, G, D, half, interleaved, turned = a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8]
    cos, sin, cos_far, sin_far, q_out, q_far = a[9], a[10], a[11], a[12], a[13], a[14]
    k_new, v_new, k_out, v_out, k_plain = a[15], a[16], a[17], a[18], a[19]
    taps, last, scratch = a[20], a[21], a[22]
    turns = cos != 0
    q_stride, kv_stride, new_stride = 4 * D * H, 4 * D * G, (2 if half else 4) * D * G
    first, end = share(p[ROWS] * (H + G), thread, threads)
    for item in range(first, end):
        row, h = item // (H + G), item % (H + G)
        if h < H:
            x, at = floats(q + row * q_stride + 4 * D * h), row * q_stride + 4 * D * h
            turned_to(x, floats(q_out + at), cos, sin, row, turned, D, interleaved, turns)
            if q_far:
                turned_to(x, floats(q_far + at), cos_far, sin_far, row, turned, D, interleaved, turns)
            continue
        g = h - H
        x = floats(k + row * kv_stride + 4 * D * g)
        key = floats(scratch + row * kv_stride + 4 * D * g)
        if taps:  # k'_t = w_0 k_t + w_1 k_{t-1}
            sequence = int64s(p[TABLE] + 8 * SEQUENCE * int64s(p[SEQUENCE_OF])[row])
            before = floats(int64s(sequence[FIELDS])[last] + 4 * D * g)
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
        turned_to(x, key, cos, sin, row, turned, D, interleaved, turns)
        value = floats(v + row * kv_stride + 4 * D * g)
        to_k, to_v = k_new + row * new_stride, v_new + row * new_stride
        if half:
            for i in range(D):
                store_half(to_k + 2 * (D * g + i), key[i])
                store_half(to_v + 2 * (D * g + i), value[i])
        else:
            for i in range(D):
                floats(to_k)[D * g + i] = key[i]
                floats(to_v)[D * g + i] = value[i]
        if k_out:
            rounded, rounded_v = (
                floats(k_out + row * kv_stride + 4 * D * g),
                floats(v_out + row * kv_stride + 4 * D * g),
            )
            for i in range(D):
                rounded[i] = load_half(to_k + 2 * (D * g + i)) if half else key[i]
                rounded_v[i] = load_half(to_v + 2 * (D * g + i)) if half else value[i]


@operator
def _take(a, p, thread, threads, taken):  # type: ignore[no-untyped-def]
    field, rows, width, half, window, sinks, out = a[0], a[1], a[2], a[3], a[4], a[5], a[6]
    size = 2 if half else 4
    first, last = share(p[ROWS], thread, threads)
    for row in range(first, last):
        sequence = int64s(p[TABLE] + 8 * SEQUENCE * int64s(p[SEQUENCE_OF])[row])
        leaving = position(p, row) - window
        if leaving < sinks:
            continue
        at = rows + (leaving - sequence[FIRST] + sequence[ROW]) * width * size
        if leaving < sequence[FIRST]:
            at = int64s(sequence[FIELDS])[field] + slot_of(leaving, window, sinks) * width * size
        y = floats(out + 4 * width * row)
        for i in range(width):
            y[i] = load_half(at + 2 * i) if half else floats(at)[i]


@operator
def _insert(a, p, thread, threads, taken):  # type: ignore[no-untyped-def]
    field, rows, width, half, window, sinks = a[0], a[1], a[2], a[3], a[4], a[5]
    size = width * (2 if half else 4)
    first, last = share(p[ROWS], thread, threads)
    for row in range(first, last):
        sequence = int64s(p[TABLE] + 8 * SEQUENCE * int64s(p[SEQUENCE_OF])[row])
        at = position(p, row)
        if window == 0 or at < sinks or at >= sequence[FIRST] + sequence[COUNT] - window:
            slot = int64s(sequence[FIELDS])[field] + slot_of(at, window, sinks) * size
            source, target = int8s(rows + row * size), int8s(slot)
            for i in range(size):
                target[i] = source[i]


@operator
def _keep_last(a, p, thread, threads, taken):  # type: ignore[no-untyped-def]
    field, x, width = a[0], a[1], a[2]
    first, last = share(p[SEQUENCES], thread, threads)
    for i in range(first, last):
        sequence = int64s(p[TABLE] + 8 * SEQUENCE * i)
        source = floats(x + 4 * (sequence[ROW] + sequence[COUNT] - 1) * width)
        target = floats(int64s(sequence[FIELDS])[field])
        for c in range(width):
            target[c] = source[c]
