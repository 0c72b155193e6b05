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
from tcinfer.kernels.cpu.packing import FLOATS, PACKINGS, RUN, unpacker
from tcinfer.kernels.cpu.plan import (
    EACH,
    FIRST,
    IDS,
    OUT_FIRST,
    OUT_ROWS,
    ROW,
    ROWS,
    SCRATCH,
    SEQUENCE,
    SEQUENCE_OF,
    TABLE,
    Plan,
    Rows,
)
from tcinfer.kernels.cpu.tiles import HEAD
from tcinfer.kernels.cpu.vectors import gelu_of, left_over, normed, quantise_run, silu_product, squares
from tcinfer.kernels.reference.quants import Matrix

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
def bytes_at(base, stride, columns, row, run):  # type: ignore[no-untyped-def]
    """Addresses of the integers of one run of a quantised row, and of its scale and sums."""
    at = base + row * stride
    return at + RUN * run, at + columns + HEAD * run


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
    plan.scratch(4 * RUN)
    plan.step(_quantise_twice, x.address, x.stride, x.columns, out, x.bytes_stride)
    return out


def quantised(plan: Plan, x: Rows) -> None:
    """See to it that x.bytes is there."""
    if x.want_bytes():
        plan.step(_quantise, x.address, x.stride, x.columns, x.bytes, x.bytes_stride)


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
    parameters = plan.keep(weight), plan.keep(bias), float(eps), layer
    step = plan.step(_norm, x.address, x.columns, y.address, y.stride, *parameters, 0, y.bytes_stride)
    y.maker = step, 8
    return y


@operator
def _swiglu(a, p, thread, threads, taken):  # type: ignore[no-untyped-def]
    gate, up, columns, stride, out, out_stride = a[0], a[1], a[2], a[3], a[4], a[5]
    # columns are shared, not rows, as in the products before: what a thread has just written is in its cache
    first, last = claim(taken, (columns + RUN - 1) // RUN, 8, threads)
    while first < last:
        at, count = 4 * RUN * first, min(columns, RUN * last) - RUN * first
        for row in range(p[ROWS]):
            silu_product(gate + row * stride + at, up + row * stride + at, count)
            if out:
                quantise_runs(up + row * stride, out, out_stride, columns, row, first, last)
        first, last = claim(taken, (columns + RUN - 1) // RUN, 8, threads)


def swiglu(plan: Plan, gate: Rows, up: Rows) -> Rows:
    """silu(gate) · up, in place of up."""
    step = plan.step(_swiglu, gate.address, up.address, up.columns, up.stride, 0, up.bytes_stride)
    up.maker = step, 4
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
    step = plan.step(_gelu, x.address, x.columns, x.stride, 0, x.bytes_stride)
    x.maker = step, 3
    return x


def _embed(kind: Kind) -> Operator:
    packing = PACKINGS.get(kind)
    unpack: Any = unpacker(packing) if packing else None
    size, count = (packing.dtype.itemsize, packing.per_block * RUN) if packing else (FLOATS[kind], 1)
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


EMBED = {kind: _embed(kind) for kind in (*PACKINGS, *FLOATS)}


def embed(plan: Plan, table: Matrix, positions: NDArray | None) -> Rows:
    """The rows of the embedding that the pass's ids name, plus those of learned positions, if there are any."""
    x = Rows(plan, table.shape[1])
    data = np.ascontiguousarray(table.data)
    plan.step(EMBED[table.kind], plan.keep(data), x.columns, x.address, x.stride, plan.keep(positions))
    return x


@operator
def _angles(a, p, thread, threads, taken):  # type: ignore[no-untyped-def]
    freq, half, most, offset, cos, sin = doubles(a[0]), a[1], a[2], a[3], a[4], a[5]
    first, last = share(p[ROWS], thread, threads)
    for row in range(first, last):
        at = float(min(position(p, row), most) + offset)
        c, s = floats(cos + 4 * half * row), floats(sin + 4 * half * row)
        for i in range(half):
            c[i], s[i] = F(math.cos(at * freq[i])), F(math.sin(at * freq[i]))


def angles(plan: Plan, freq: NDArray[np.float64], most: int = 2**62, offset: int = 0) -> tuple[int, int]:
    """Addresses of cos and sin, float32 [rows, D / 2], of (position, at most `most`) + offset; computed in float64."""
    cos, sin = (plan.room(4 * plan.capacity * len(freq)) for _ in range(2))
    plan.step(_angles, plan.keep(freq), len(freq), most, offset, cos, sin)
    return cos, sin
