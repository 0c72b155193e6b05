"""The matrix memory's recurrence in one pass over A per token, compiled; long chunks are the exact chunk form."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tcinfer.kernels.cpu.jit import compiled
from tcinfer.kernels.reference import matrix_memory as reference
from tcinfer.kernels.reference.matrix_memory import Writes

F32 = NDArray[np.float32]

STEPS = 8  # tokens up to which the recurrence is faster than the chunk form's many small products


def scan(A: F32, q: F32, writes: Writes, mix: F32 | None = None, write_first: bool = False) -> F32:
    """As kernels.reference.matrix_memory.scan_recurrent; A is changed in place."""
    if len(q) > STEPS:
        return reference.scan(A, q, writes, mix, write_first)
    k, v, decay, rate, retrieve, wedge = writes
    retrieve = np.zeros(k.shape[:2], np.float32) if retrieve is None else retrieve
    mix = np.ones((len(A), *q.shape[:3]), np.float32) if mix is None else mix
    arrays = [np.ascontiguousarray(x, np.float32) for x in (q, k, v, decay, rate, retrieve, mix)]
    out = np.zeros((*q.shape[:3], v.shape[-1]), np.float32)
    assert A.flags.c_contiguous
    _steps(A, *arrays, wedge, write_first, out)
    return out


@compiled
def _steps(
    A: F32,
    q: F32,
    k: F32,
    v: F32,
    decay: F32,
    rate: F32,
    retrieve: F32,
    mix: F32,
    wedge: bool,
    write_first: bool,
    out: F32,
) -> None:
    P, G, D, E = A.shape
    T = len(q)
    u = np.empty(E, np.float32)
    for t in range(T):
        for p in range(P):
            for g in range(G):
                plane, key, value = A[p, g], k[t, g], v[t, g]
                eta, lam, c = rate[p, t, g], decay[p, t, g], retrieve[t, g]
                if not write_first:
                    _read(plane, q[t, g], mix[p, t, g], out[t, g])
                if eta != 0 or lam != 1:
                    for e in range(E):
                        u[e] = 0
                    if c != 0:
                        for d in range(D):
                            row, kd = plane[d], key[d]
                            for e in range(E):
                                u[e] += kd * row[e]
                    for e in range(E):
                        u[e] = eta * (value[e] - c * u[e])
                    for d in range(D):
                        row, kd = plane[d], key[d]
                        for e in range(E):
                            row[e] = lam * row[e] + kd * u[e]
                    if wedge:
                        for d in range(D):
                            row, vd = plane[d], eta * value[d]
                            for e in range(E):
                                row[e] -= vd * key[e]
                if write_first:
                    _read(plane, q[t, g], mix[p, t, g], out[t, g])


@compiled
def _read(plane: F32, q: F32, mix: F32, out: F32) -> None:
    """out [R, E] += mix [R] · q [R, D] A [D, E]."""
    for r in range(q.shape[0]):
        if mix[r] != 0:
            row_out = out[r]
            for d in range(plane.shape[0]):
                row, weight = plane[d], mix[r] * q[r, d]
                for e in range(plane.shape[1]):
                    row_out[e] += weight * row[e]
