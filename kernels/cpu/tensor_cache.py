"""What Tensor Cache memory adds to ring and matrix: which pair a row writes and how, and how queries read.

Equations: tcinfer/memory/tensor.py, whose compiled form these operators are.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba.extending import register_jitable
from numpy.typing import NDArray

from tcinfer.kernels.cpu.jit import operator
from tcinfer.kernels.cpu.machine import floats, int64s, number
from tcinfer.kernels.cpu.matrix_memory import Writes
from tcinfer.kernels.cpu.plan import ROWS, Plan, Rows
from tcinfer.kernels.cpu.ring import turn
from tcinfer.kernels.cpu.rows import position, share

F = np.float32
UNIT_EPS = F(1e-5)  # added to a norm, as kernels.reference.pointwise.unit


@register_jitable
def sigmoid(x):  # type: ignore[no-untyped-def]
    e = F(math.exp(-abs(x)))
    return (F(1) if x >= 0 else e) / (F(1) + e)


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


class Source(NamedTuple):
    """Where written pairs come from, float32 rows; None where the mechanism does not write such pairs."""

    k: Rows  # [G, D]
    v: Rows  # [G, D]
    decay_term: Rows | None = None  # [G], added to the decay's logit
    rate_term: Rows | None = None


@operator
def _writes(a, p, thread, threads, taken):  # type: ignore[no-untyped-def]
    entering, leaving, G, D, window, sinks = a[0], a[1], a[2], a[3], a[4], a[5]
    timescales, slots, normalize, scale, temperature = a[6], a[7], a[8], F(number(a[9])), number(a[10])
    cos, sin, interleaved, decays, rates, slot_keys = a[11], a[12], a[13], floats(a[14]), floats(a[15]), a[16]
    route, route_stride, keys, values, decay, rate, work = (
        a[17],
        a[18],
        a[19],
        a[20],
        floats(a[21]),
        floats(a[22]),
        a[23],
    )
    first, last = share(p[ROWS] * G, thread, threads)
    for item in range(first, last):
        row, g = item // G, item % G
        left = leaving != 0 and position(p, row) - window >= sinks
        source = int64s(leaving if left else entering)
        at = 4 * D * (G * row + g)
        k, v = floats(keys + at), floats(values + at)
        lam_term, eta_term, best, written = F(0), F(0), np.int64(0), left or entering != 0
        if written:
            x, y = floats(source[0] + at), floats(source[1] + at)
            if source[2]:
                lam_term = floats(source[2])[G * row + g]
            if source[3]:
                eta_term = floats(source[3])[G * row + g]
            if left and cos:  # the memory sees keys before rotation
                turn(x, k, floats(cos + 2 * D * row), floats(sin + 2 * D * row), D, interleaved, True)
            else:
                for i in range(D):
                    k[i] = x[i]
            by = unit_scale(k, D) if normalize else F(1)
            for i in range(D):
                k[i] *= by
                v[i] = y[i] * scale
        else:
            for i in range(D):
                k[i], v[i] = F(0), F(0)
        if slots > 1 and written:
            logits = floats(work + 4 * slots * item)
            chooser = floats(route + row * route_stride + 4 * D * g) if route else k
            _cosines(chooser, D, slot_keys + 4 * slots * D * g, slots, temperature, logits)
            for s in range(1, slots):
                if logits[s] > logits[best]:
                    best = np.int64(s)
        for t in range(timescales):
            lam, eta = sigmoid(decays[G * t + g] + lam_term), sigmoid(rates[G * t + g] + eta_term)
            for s in range(slots):
                plane = (row * timescales * slots + t * slots + s) * G + g
                decay[plane], rate[plane] = (lam, eta) if written and s == best else (F(1), F(0))


def writes(
    plan: Plan,
    shape: tuple[int, int, int, int],
    entering: Source | None,
    leaving: Source | None,
    window: tuple[int, int],
    back: tuple[int, int],
    interleaved: bool,
    decays: NDArray,
    rates: NDArray,
    normalize: bool = True,
    value_scale: float = 1.0,
    rule: str = "delta",
    slot_keys: NDArray | None = None,
    temperature: float = 1.0,
    route: Rows | None = None,
) -> Writes:
    """The pair of each row: what leaves the window, else what enters; where neither is given, none.

    shape: G, D, timescales, slots; window: tokens, sinks; back: angles by which leaving keys are turned back, or
    (0, 0); decays, rates: logits [timescales, G]; slot_keys [G, slots, D]; route: rows [G, D] that choose the slot, or
    the keys.
    """
    G, D, timescales, slots = shape
    planes = timescales * slots
    k, v = Rows(plan, G * D), Rows(plan, G * D)
    decay, rate = Rows(plan, planes * G), Rows(plan, planes * G)

    def table(source: Source | None) -> int:
        if source is None:
            return 0
        return plan.keep(np.array([rows.address if rows else 0 for rows in source], np.int64))

    plan.step(
        _writes,
        *(table(entering), table(leaving), G, D, *window),
        *(timescales, slots, normalize, float(value_scale), float(temperature)),
        *(*back, interleaved, plan.keep(decays), plan.keep(rates), plan.keep(slot_keys)),
        *(route.address if route else 0, route.stride if route else 0),
        *(k.address, v.address, decay.address, rate.address, Rows(plan, slots * G).address),
    )
    retrieve = ones(plan, G) if rule == "delta" else None
    return Writes(k, v, decay, rate, retrieve, rule == "wedge")


@operator
def _ones(a, p, thread, threads, taken):  # type: ignore[no-untyped-def]
    x, columns = floats(a[0]), a[1]
    first, last = share(p[ROWS] * columns, thread, threads)
    for i in range(first, last):
        x[i] = F(1)


def ones(plan: Plan, columns: int) -> Rows:
    x = Rows(plan, columns)
    plan.step(_ones, x.address, columns)
    return x


@operator
def _unit(a, p, thread, threads, taken):  # type: ignore[no-untyped-def]
    x, y, width, per_row = a[0], a[1], a[2], a[3]
    first, last = share(p[ROWS] * per_row, thread, threads)
    for i in range(first, last):
        source, target = floats(x + 4 * width * i), floats(y + 4 * width * i)
        by = unit_scale(source, width)
        for c in range(width):
            target[c] = source[c] * by


def unit(plan: Plan, x: Rows, width: int) -> Rows:
    """Each head (of `width`) divided by its norm."""
    y = Rows(plan, x.columns)
    plan.step(_unit, x.address, y.address, width, x.columns // width)
    return y


@operator
def _mix(a, p, thread, threads, taken):  # type: ignore[no-untyped-def]
    q, G, R, D, timescales, slots, topk, temperature = a[0], a[1], a[2], a[3], a[4], a[5], a[6], number(a[7])
    slot_keys, alpha, mix = a[8], a[9], floats(a[10])
    work = a[11]
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


def mix(
    plan: Plan,
    q: Rows,
    shape: tuple[int, int, int],
    timescales: int,
    slots: int,
    topk: int,
    temperature: float,
    slot_keys: NDArray | None,
    alpha: NDArray | None,
) -> Rows:
    """How much of each plane a query reads, [planes, G, R]: softmax over its best slots, σ(alpha) of the slow ones.

    shape: G, R, D; slot_keys [G, slots, D]; alpha [G].
    """
    G, R, D = shape
    out = Rows(plan, timescales * slots * G * R)
    arguments = (timescales, slots, topk, float(temperature), plan.keep(slot_keys), plan.keep(alpha), out.address)
    plan.step(_mix, q.address, G, R, D, *arguments, Rows(plan, 2 * slots * G * R).address)
    return out


@operator
def _divide(a, p, thread, threads, taken):  # type: ignore[no-untyped-def]
    x, by, width, per_row, eps = a[0], floats(a[1]), a[2], a[3], F(number(a[4]))
    first, last = share(p[ROWS] * per_row, thread, threads)
    for i in range(first, last):
        target, d = floats(x + 4 * width * i), max(abs(by[i]), eps)
        for c in range(width):
            target[c] /= d


def divide(plan: Plan, x: Rows, by: Rows, width: int, eps: float) -> None:
    """x [heads, width] /= max(|by [heads]|, eps), in place."""
    plan.step(_divide, x.address, by.address, width, x.columns // width, float(eps))


@operator
def _gate(a, p, thread, threads, taken):  # type: ignore[no-untyped-def]
    x, bias, fixed = floats(a[0]), floats(a[1])[0], a[2]
    first, last = share(p[ROWS], thread, threads)
    for row in range(first, last):
        x[row] = sigmoid(bias if fixed else x[row] + bias)


def gate(plan: Plan, bias: NDArray, logit: Rows | None = None) -> Rows:
    """σ(logit + bias) of each row, in place of the logit.  bias [1]; logit [1], or None for 0."""
    out = logit or Rows(plan, 1)
    plan.step(_gate, out.address, plan.keep(bias), logit is None)
    return out
