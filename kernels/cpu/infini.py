"""What Infini-attention adds to ring and matrix: its feature map, its normaliser, its gate.

Equations: tcinfer/memory/infini.py, whose compiled form these operators are.
"""

from __future__ import annotations

import math

import numpy as np
from numba.extending import register_jitable
from numpy.typing import NDArray

from tcinfer.kernels.cpu.jit import operator
from tcinfer.kernels.cpu.machine import floats, int64s, number
from tcinfer.kernels.cpu.matrix_memory import Writes
from tcinfer.kernels.cpu.plan import COUNT, FIELDS, ROW, ROWS, SEQUENCE, SEQUENCES, TABLE, Plan, Rows
from tcinfer.kernels.cpu.ring import Entering
from tcinfer.kernels.cpu.rows import share
from tcinfer.kernels.cpu.tensor_cache import ones, sigmoid

F = np.float32


@register_jitable
def _feature(x):  # type: ignore[no-untyped-def]
    """φ(x) = ELU(x) + 1."""
    return x + F(1) if x > 0 else F(math.exp(x))


@operator
def _features(a, p, thread, threads, taken):  # type: ignore[no-untyped-def]
    q, k, field, G, R, D, eps, delta = a[0], a[1], a[2], a[3], a[4], a[5], F(number(a[6])), a[7]
    fq, fk, retrieve, norm = a[8], a[9], floats(a[10]), floats(a[11])
    first, last = share(p[SEQUENCES] * G, thread, threads)
    for item in range(first, last):
        sequence, g = int64s(p[TABLE] + 8 * SEQUENCE * (item // G)), item % G
        z = floats(int64s(sequence[FIELDS])[field] + 4 * D * g)
        for row in range(sequence[ROW], sequence[ROW] + sequence[COUNT]):
            x, y = floats(k + 4 * D * (G * row + g)), floats(fk + 4 * D * (G * row + g))
            for r in range(R):
                at = 4 * D * ((G * row + g) * R + r)
                query, feature, dot = floats(q + at), floats(fq + at), F(0)
                for i in range(D):
                    feature[i] = _feature(query[i])
                    dot += feature[i] * z[i]
                norm[(G * row + g) * R + r] = dot + eps
            dot = F(0)
            for i in range(D):
                y[i] = _feature(x[i])
                dot += y[i] * z[i]
            retrieve[G * row + g] = F(1) / (dot + eps) if delta else F(0)
            for i in range(D):
                z[i] += y[i]


def features(
    plan: Plan, new: Entering, z_field: int, shape: tuple[int, int, int], eps: float, delta: bool
) -> tuple[Rows, Rows, Writes]:
    """φ(q) [G, R, D], φ(q)·z + eps [G, R] before each write, and what each row writes; moves z on.  shape: G, R, D."""
    G, R, D = shape
    assert new.k is not None
    assert new.v is not None
    fq, fk = Rows(plan, G * R * D), Rows(plan, G * D)
    retrieve, norm = Rows(plan, G), Rows(plan, G * R)
    arguments = (new.q.address, new.k.address, z_field, *shape, float(eps), delta)
    plan.step(_features, *arguments, fq.address, fk.address, retrieve.address, norm.address, wait=False)
    one = ones(plan, G)
    return fq, norm, Writes(fk, new.v, one, one, retrieve)


@operator
def _blend(a, p, thread, threads, taken):  # type: ignore[no-untyped-def]
    near, far, norm, betas, H, D = a[0], a[1], floats(a[2]), floats(a[3]), a[4], a[5]
    first, last = share(p[ROWS] * H, thread, threads)
    for i in range(first, last):
        x, y = floats(near + 4 * D * i), floats(far + 4 * D * i)
        part = sigmoid(betas[i % H])
        by = part / norm[i]
        for c in range(D):
            x[c] = by * y[c] + (F(1) - part) * x[c]


def blend(plan: Plan, near: Rows, far: Rows, norm: Rows, betas: NDArray, width: int) -> None:
    """σ(β) far / norm + (1 - σ(β)) near for each head, in place of near.  Rows [H, width], norm and betas [H]."""
    plan.step(_blend, near.address, far.address, norm.address, plan.keep(betas), len(betas), width)
