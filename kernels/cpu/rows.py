"""Operators that treat each row by itself: embedding, norms, activations, quantisation, angles of rotation.

Each is a compiled function and, below it, the function that puts it into a plan. Equations: pointwise.py and
rotary.py in kernels/reference/.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType as Kind
from numba.extending import register_jitable
from numpy.typing import NDArray

from tcinfer.kernels.cpu.jit import Operator, operator
from tcinfer.kernels.cpu.machine import atomic_add, doubles, floats, int64s, load_brain, load_half, number
from tcinfer.kernels.cpu.packing import unpacker
from tcinfer.kernels.cpu.plan import Plan, Rows
from tcinfer.kernels.cpu.tiles import RUN_SUMS
from tcinfer.kernels.cpu.vectors import gelu_of, gelu_product, left_over, normed, quantise_run, silu_product, squares
from tcinfer.kernels.packing import FLOATS, PACKINGS, RUN
from tcinfer.kernels.plan import (
    EACH,
    FIRST,
    IDS,
    LOGITS,
    OUT_FIRST,
    OUT_ROWS,
    ROW,
    ROWS,
    SCRATCH,
    SEQUENCE,
    SEQUENCE_OF,
    TABLE,
)
from tcinfer.kernels.reference.quants import Matrix
from tcinfer.kernels.table import CPU_EMBED, CPU_GATED, CPU_GELU, CPU_NORM, QUANTISE, QUANTISE_TWICE

F = np.float32
CLAIMS = 4  # parts of a step's work for each thread


@register_jitable
def share(count, thread, threads):  # type: ignore[no-untyped-def]
    """The part first .. last - 1 of `count` things that falls to one thread."""
    return count * thread // threads, count * (thread + 1) // threads


@register_jitable
def claim(taken, count, least, threads):  # type: ignore[no-untyped-def]
    """The next part first .. last - 1 of `count` things that no thread has taken; empty when there is none.

    Threads are not equally fast (another process, another kind of core), so each takes several parts, `least` things or
    more at a time. Who does what makes no difference to the result.
    """
    size = count if threads == 1 else max(least, count // (CLAIMS * threads))
    first = atomic_add(taken, size)
    return min(first, count), min(first + size, count)


@register_jitable
def position(p, row):  # type: ignore[no-untyped-def]
    """Where in its stream a row of the pass stands."""
    s = int64s(p[TABLE] + 8 * SEQUENCE * int64s(p[SEQUENCE_OF])[row])
    return s[FIRST] + row - s[ROW]


@register_jitable
def sigmoid(x):  # type: ignore[no-untyped-def]
    e = F(math.exp(-abs(x)))
    return (F(1) if x >= 0 else e) / (F(1) + e)


@register_jitable
def bytes_at(base, stride, columns, row, run):  # type: ignore[no-untyped-def]
    """Addresses of the integers of one run of a quantised row, and of its scale and sums."""
    at = base + row * stride
    return at + RUN * run, at + columns + RUN_SUMS * run


@register_jitable
def quantise_runs(x, out, stride, columns, row, first, last):  # type: ignore[no-untyped-def]
    """Runs first .. last - 1 of the float32 row at x, into that row of the quantised ones."""
    for run in range(first, last):
        q, head = bytes_at(out, stride, columns, row, run)
        quantise_run(x + 4 * RUN * run, q, head)


@operator
def _quantise(a, p, thread, threads, taken):  # type: ignore[no-untyped-def]
    x, stride, columns, out, out_stride = a[0], a[1], a[2], a[3], a[4]
    runs = columns // RUN
    first, last = claim(taken, p[ROWS] * runs, 32, threads)
    while first < last:
        for i in range(first, last):
            row, run = i // runs, i % runs
            quantise_runs(x + row * stride, out, out_stride, columns, row, run, run + 1)
        first, last = claim(taken, p[ROWS] * runs, 32, threads)


@operator
def _quantise_twice(a, p, thread, threads, taken):  # type: ignore[no-untyped-def]
    x, stride, columns, out, out_stride = a[0], a[1], a[2], a[3], a[4]
    runs, rest = columns // RUN, p[SCRATCH] + thread * p[EACH]
    first, last = share(p[OUT_ROWS] * runs, thread, threads)
    for i in range(first, last):
        row, run = i // runs, i % runs
        values = x + (p[OUT_FIRST] + row) * stride + 4 * RUN * run
        q, head = bytes_at(out, out_stride, columns, 2 * row, run)
        quantise_run(values, q, head)
        left_over(values, q, head, rest)
        q, head = bytes_at(out, out_stride, columns, 2 * row + 1, run)
        quantise_run(rest, q, head)


def quantised_twice(plan: Plan, x: Rows) -> int:
    """Address of the rows whose logits are wanted, each as two rows of x.bytes_stride: it quantised, and what that left
    over quantised again."""
    out = plan.room(2 * plan.capacity * x.bytes_stride)
    plan.step(QUANTISE_TWICE, x=x, stride=x.stride, columns=x.columns, out=out, out_stride=x.bytes_stride)
    return out


def quantised(plan: Plan, x: Rows) -> int:
    """Address of x quantised to bytes, x.bytes, made if it is not there."""
    if x.want_bytes():
        plan.step(QUANTISE, x=x, stride=x.stride, columns=x.columns, out=x.bytes, out_stride=x.bytes_stride)
    return x.bytes


@operator
def _norm(a, p, thread, threads, taken):  # type: ignore[no-untyped-def]
    x, columns, y, stride, weight, bias = a[0], a[1], a[2], a[3], a[4], a[5]
    eps, layer, out, out_stride = F(number(a[6])), a[7], a[8], a[9]
    runs = (columns + RUN - 1) // RUN
    i, last = claim(taken, p[ROWS] * runs, 32, threads)
    while i < last:
        row, run = i // runs, i % runs
        stop = min(runs, run + last - i)
        mean = F(0)
        if layer:  # each thread sums up the whole row: sooner done than waited for
            v = floats(x + row * stride)
            for c in range(columns):
                mean += v[c]
            mean /= F(columns)
        scale = F(1) / F(math.sqrt(squares(x + row * stride, columns, mean) / F(columns) + eps))
        at, count = 4 * RUN * run, min(columns, RUN * stop) - RUN * run
        shift = bias + at if bias else bias
        normed(x + row * stride + at, y + row * stride + at, count, mean, scale, weight + at, shift)
        if out:
            quantise_runs(y + row * stride, out, out_stride, columns, row, run, stop)
        i += stop - run
        if i == last:
            i, last = claim(taken, p[ROWS] * runs, 32, threads)


def norm(plan: Plan, x: Rows, weight: NDArray, bias: NDArray | None, eps: float, layer: bool) -> Rows:
    """RMS norm, or layer norm with its mean and its bias."""
    y = Rows(plan, x.columns)
    rows: dict[str, Any] = {"x": x, "columns": x.columns, "y": y, "stride": y.stride}
    to: dict[str, Any] = {"out": None, "out_stride": y.bytes_stride}
    y.maker = plan.step(CPU_NORM, **rows, **to, weight=weight, bias=bias, eps=eps, layer=layer)
    return y


@operator
def _gated(a, p, thread, threads, taken):  # type: ignore[no-untyped-def]
    gate, up, columns, stride, out, out_stride, tanh = a[0], a[1], a[2], a[3], a[4], a[5], a[6]
    # columns are shared, not rows, as in the products before: what a thread has just written is in its cache
    first, last = claim(taken, (columns + RUN - 1) // RUN, 8, threads)
    while first < last:
        at, count = 4 * RUN * first, min(columns, RUN * last) - RUN * first
        for row in range(p[ROWS]):
            if tanh:
                gelu_product(gate + row * stride + at, up + row * stride + at, count)
            else:
                silu_product(gate + row * stride + at, up + row * stride + at, count)
            if out:
                quantise_runs(up + row * stride, out, out_stride, columns, row, first, last)
        first, last = claim(taken, (columns + RUN - 1) // RUN, 8, threads)


def gated(plan: Plan, gate: Rows, up: Rows, activation: str) -> Rows:
    """act(gate) · up, in place of up; activation: "silu" or "gelu_tanh"."""
    rows: dict[str, Any] = {"gate": gate, "up": up, "columns": up.columns, "stride": up.stride}
    to: dict[str, Any] = {"out": None, "out_stride": up.bytes_stride}
    up.maker = plan.step(CPU_GATED, **rows, **to, tanh=activation == "gelu_tanh")
    return up


@operator
def _gelu(a, p, thread, threads, taken):  # type: ignore[no-untyped-def]
    x, columns, stride, out, out_stride = a[0], a[1], a[2], a[3], a[4]
    first, last = claim(taken, (columns + RUN - 1) // RUN, 8, threads)
    while first < last:
        for row in range(p[ROWS]):
            gelu_of(x + row * stride + 4 * RUN * first, min(columns, RUN * last) - RUN * first)
            if out:
                quantise_runs(x + row * stride, out, out_stride, columns, row, first, last)
        first, last = claim(taken, (columns + RUN - 1) // RUN, 8, threads)


def gelu(plan: Plan, x: Rows) -> Rows:
    """The exact form, in place."""
    x.maker = plan.step(CPU_GELU, x=x, columns=x.columns, stride=x.stride, out=None, out_stride=x.bytes_stride)
    return x


def _embed(kind: Kind) -> Operator:
    packing = PACKINGS.get(kind)
    unpack: Any = unpacker(packing) if packing else None
    size, count = (packing.block.itemsize, packing.runs * RUN) if packing else (FLOATS[kind], 1)
    packed, half, brain = packing is not None, kind == Kind.F16, kind == Kind.BF16

    @operator(name=f"embed_{kind.name}")
    def embed(a, p, thread, threads, taken):  # type: ignore[no-untyped-def]
        table, columns, x, stride, positions = a[0], a[1], a[2], a[3], a[4]
        ids = int64s(p[IDS])
        first, last = share(p[ROWS], thread, threads)
        for row in range(first, last):
            at, y = table + ids[row] * (columns // count * size), floats(x + row * stride)
            if packed:
                unpack(at, columns // count, x + row * stride)
            elif half:
                for c in range(columns):
                    y[c] = load_half(at + 2 * c)
            elif brain:
                for c in range(columns):
                    y[c] = load_brain(at + 2 * c)
            else:
                for c in range(columns):
                    y[c] = floats(at)[c]
            if positions:
                learned = floats(positions + 4 * columns * position(p, row))
                for c in range(columns):
                    y[c] += learned[c]

    return embed


for _kind in (*PACKINGS, *FLOATS):
    _embed(_kind)


def embed(plan: Plan, table: Matrix, positions: NDArray | None) -> Rows:
    """The rows of the embedding that the pass's ids name, plus those of learned positions, if there are any."""
    x = Rows(plan, table.shape[1])
    data = np.array(table.data)  # a copy: nothing stays mapped
    plan.step(CPU_EMBED, table.kind.name, table=data, columns=x.columns, x=x, stride=x.stride, positions=positions)
    return x


@operator
def _angles(a, p, thread, threads, taken):  # type: ignore[no-untyped-def]
    freq, pairs, most, offset, factor, cos, sin = doubles(a[0]), a[1], a[2], a[3], number(a[4]), a[5], a[6]
    first, last = share(p[ROWS], thread, threads)
    for row in range(first, last):
        at = float(min(position(p, row), most) + offset)
        c, s = floats(cos + 4 * pairs * row), floats(sin + 4 * pairs * row)
        for i in range(pairs):
            c[i], s[i] = F(factor * math.cos(at * freq[i])), F(factor * math.sin(at * freq[i]))


@operator
def _add(a, p, thread, threads, taken):  # type: ignore[no-untyped-def]
    x, y, columns = floats(a[0]), floats(a[1]), a[2]
    first, last = share(p[ROWS] * columns, thread, threads)
    for i in range(first, last):
        x[i] += y[i]


@operator
def _scale(a, p, thread, threads, taken):  # type: ignore[no-untyped-def]
    x, columns, factor = floats(a[0]), a[1], F(number(a[2]))
    first, last = share(p[ROWS] * columns, thread, threads)
    for i in range(first, last):
        x[i] *= factor


@operator
def _softcap(a, p, thread, threads, taken):  # type: ignore[no-untyped-def]
    columns, cap, logits = a[0], number(a[1]), floats(p[LOGITS])
    first, last = share(p[OUT_ROWS] * columns, thread, threads)
    for i in range(first, last):
        logits[i] = F(cap * math.tanh(logits[i] / cap))


@operator
def _head_norm(a, p, thread, threads, taken):  # type: ignore[no-untyped-def]
    x, heads, width, weight, eps = a[0], a[1], a[2], a[3], F(number(a[4]))
    first, last = share(p[ROWS] * heads, thread, threads)
    for i in range(first, last):
        at = x + 4 * width * i
        scale = F(1) / F(math.sqrt(squares(at, width, F(0)) / F(width) + eps))
        normed(at, at, width, F(0), scale, weight, np.int64(0))
