"""What Tensor Cache memory adds to ring and matrix: which pair a row writes and how, and how queries read.

Equations: equations.py, whose compiled forms these operators are.
"""

from __future__ import annotations

import math

import numpy as np
from numba.extending import register_jitable

from tcinfer.kernels.cpu.jit import operator
from tcinfer.kernels.cpu.machine import floats, number
from tcinfer.kernels.cpu.ring import turn
from tcinfer.kernels.cpu.rows import position, share, sigmoid
from tcinfer.kernels.plan import ROWS

F = np.float32
UNIT_EPS = F(1e-5)  # added to a norm, as kernels.reference.pointwise.unit


@register_jitable
def unit_scale(x, width):  # type: ignore[no-untyped-def]
    """1 / (‖x‖ + eps)."""
    total = F(0)
    for i in range(width):
        total += x[i] * x[i]
    return F(1) / (F(math.sqrt(total)) + UNIT_EPS)


@register_jitable
def _cosines(x, width, keys, slots, temperature, out):  # type: ignore[no-untyped-def]
    """Router logits cos(x, slot key) / (√D τ)."""
    scale = unit_scale(x, width) / F(math.sqrt(F(width)) * temperature)
    for s in range(slots):
        key = floats(keys + 4 * width * s)
        dot = F(0)
        for i in range(width):
            dot += x[i] * key[i]
        out[s] = dot * scale * unit_scale(key, width)


@operator
def _writes(a, p, thread, threads, taken):  # type: ignore[no-untyped-def]
    entering_k, entering_v, entering_decay, entering_rate = a[0], a[1], a[2], a[3]
    leaving_k, leaving_v, leaving_decay, leaving_rate = a[4], a[5], a[6], a[7]
    G, D, window, sinks, timescales, slots, normalize = a[8], a[9], a[10], a[11], a[12], a[13], a[14]
    value_scale, temperature = F(number(a[15])), number(a[16])
    cos, sin, turned, interleaved = a[17], a[18], a[19], a[20]
    decays, rates, slot_keys, route = floats(a[21]), floats(a[22]), a[23], a[24]
    k, v, decay, rate, work = a[25], a[26], floats(a[27]), floats(a[28]), a[29]
    first, last = share(p[ROWS] * G, thread, threads)
    for item in range(first, last):
        row, g = item // G, item % G
        left = leaving_k != 0 and position(p, row) - window >= sinks
        at = 4 * D * (G * row + g)
        key, value = floats(k + at), floats(v + at)
        lam_term, eta_term, best, written = F(0), F(0), np.int64(0), left or entering_k != 0
        if written:
            x = floats((leaving_k if left else entering_k) + at)
            y = floats((leaving_v if left else entering_v) + at)
            decay_term = leaving_decay if left else entering_decay
            rate_term = leaving_rate if left else entering_rate
            if decay_term:
                lam_term = floats(decay_term)[G * row + g]
            if rate_term:
                eta_term = floats(rate_term)[G * row + g]
            first_plain = np.int64(0)
            if left and cos:  # the memory sees keys before rotation
                angles = 2 * turned * row
                turn(x, key, floats(cos + angles), floats(sin + angles), turned, interleaved, True)
                first_plain = turned
            for i in range(first_plain, D):
                key[i] = x[i]
            by = unit_scale(key, D) if normalize else F(1)
            for i in range(D):
                key[i] *= by
                value[i] = y[i] * value_scale
        else:
            for i in range(D):
                key[i], value[i] = F(0), F(0)
        if slots > 1 and written:
            logits = floats(work + 4 * slots * item)
            chooser = floats(route + at) if route else key
            _cosines(chooser, D, slot_keys + 4 * slots * D * g, slots, temperature, logits)
            for s in range(1, slots):
                if logits[s] > logits[best]:
                    best = np.int64(s)
        for t in range(timescales):
            lam, eta = sigmoid(decays[G * t + g] + lam_term), sigmoid(rates[G * t + g] + eta_term)
            for s in range(slots):
                plane = (row * timescales * slots + t * slots + s) * G + g
                decay[plane], rate[plane] = (lam, eta) if written and s == best else (F(1), F(0))


@operator
def _unit(a, p, thread, threads, taken):  # type: ignore[no-untyped-def]
    x, heads, width, y = a[0], a[1], a[2], a[3]
    first, last = share(p[ROWS] * heads, thread, threads)
    for i in range(first, last):
        source, target = floats(x + 4 * width * i), floats(y + 4 * width * i)
        by = unit_scale(source, width)
        for c in range(width):
            target[c] = source[c] * by


@operator
def _mix(a, p, thread, threads, taken):  # type: ignore[no-untyped-def]
    q, G, R, D, timescales, slots, topk, temperature = a[0], a[1], a[2], a[3], a[4], a[5], a[6], number(a[7])
    slot_keys, alpha, mix, work = a[8], a[9], floats(a[10]), a[11]
    first, last = share(p[ROWS] * G * R, thread, threads)
    for item in range(first, last):
        row, g, r = item // (G * R), item // R % G, item % R
        logits, weights = floats(work + 8 * slots * item), floats(work + 8 * slots * item + 4 * slots)
        for s in range(slots):
            logits[s], weights[s] = F(0), F(0)
        if slots > 1:
            _cosines(floats(q + 4 * D * item), D, slot_keys + 4 * slots * D * g, slots, temperature, logits)
        total, top = F(0), F(0)
        for n in range(min(topk, slots)):  # the best ones, the first of equals before the others
            best = np.int64(-1)
            for s in range(slots):
                if weights[s] == 0 and (best < 0 or logits[s] > logits[best]):
                    best = np.int64(s)
            if n == 0:
                top = logits[best]
            weights[best] = F(math.exp(logits[best] - top))
            total += weights[best]
        slow = sigmoid(floats(alpha)[g]) if timescales == 2 else F(1)
        for t in range(timescales):
            for s in range(slots):
                by = slow if t == 1 else F(1)
                mix[((row * timescales * slots + t * slots + s) * G + g) * R + r] = by * weights[s] / total


@operator
def _divide(a, p, thread, threads, taken):  # type: ignore[no-untyped-def]
    x, by, heads, width, eps = a[0], floats(a[1]), a[2], a[3], F(number(a[4]))
    first, last = share(p[ROWS] * heads, thread, threads)
    for i in range(first, last):
        target, d = floats(x + 4 * width * i), max(abs(by[i]), eps)
        for c in range(width):
            target[c] /= d


@operator
def _gate(a, p, thread, threads, taken):  # type: ignore[no-untyped-def]
    logit, bias, gate = a[0], floats(a[1])[0], floats(a[2])
    first, last = share(p[ROWS], thread, threads)
    for row in range(first, last):
        gate[row] = sigmoid(floats(logit)[row] + bias if logit else bias)
