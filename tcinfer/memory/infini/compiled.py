"""What Infini-attention adds to ring and matrix: its feature map, its normaliser, its gate.

Equations: equations.py, whose compiled forms these operators are.
"""

from __future__ import annotations

import math

import numpy as np
from numba.extending import register_jitable

from tcinfer.kernels.cpu.jit import operator
from tcinfer.kernels.cpu.machine import floats, int64s, number
from tcinfer.kernels.cpu.rows import share, sigmoid
from tcinfer.kernels.plan import COUNT, FIELDS, ROW, ROWS, SEQUENCE, SEQUENCES, TABLE

F = np.float32


@register_jitable
def _feature(x):  # type: ignore[no-untyped-def]
    """φ(x) = ELU(x) + 1."""
    return x + F(1) if x > 0 else F(math.exp(x))


@operator
def _features(a, p, thread, threads, taken):  # type: ignore[no-untyped-def]
    q, k, z, G, R, D, eps, delta = a[0], a[1], a[2], a[3], a[4], a[5], F(number(a[6])), a[7]
    fq, fk, retrieve, norm = a[8], a[9], floats(a[10]), floats(a[11])
    first, last = share(p[SEQUENCES] * G, thread, threads)
    for item in range(first, last):
        sequence, g = int64s(p[TABLE] + 8 * SEQUENCE * (item // G)), item % G
        sums = floats(int64s(sequence[FIELDS])[z] + 4 * D * g)
        for row in range(sequence[ROW], sequence[ROW] + sequence[COUNT]):
            x, y = floats(k + 4 * D * (G * row + g)), floats(fk + 4 * D * (G * row + g))
            for r in range(R):
                at = 4 * D * ((G * row + g) * R + r)
                query, feature, dot = floats(q + at), floats(fq + at), F(0)
                for i in range(D):
                    feature[i] = _feature(query[i])
                    dot += feature[i] * sums[i]
                norm[(G * row + g) * R + r] = dot + eps
            dot = F(0)
            for i in range(D):
                y[i] = _feature(x[i])
                dot += y[i] * sums[i]
            retrieve[G * row + g] = F(1) / (dot + eps) if delta else F(0)
            for i in range(D):
                sums[i] += y[i]


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
