"""The matrix memory's recurrence, one pass over A a token. Equation: kernels/reference/matrix_memory.py.

Every column of A changes by itself, so that threads share heads and strips of 16 columns; a strip (4 KB for heads of
64) stays in the first cache while all tokens of a pass go through it.
"""

from __future__ import annotations

import numpy as np
from gguf.constants import GGMLQuantizationType as Kind

from tcinfer.kernels.cpu.jit import operator
from tcinfer.kernels.cpu.machine import floats, int64s
from tcinfer.kernels.cpu.rows import share
from tcinfer.kernels.cpu.simd import LANES
from tcinfer.kernels.cpu.tiles import MANY, float_tile, product
from tcinfer.kernels.cpu.vectors import merged
from tcinfer.kernels.plan import COUNT, EACH, FIELDS, ROW, SCRATCH, SEQUENCE, SEQUENCES, TABLE

F = np.float32
_one, _two, _many = (float_tile(Kind.F32, n) for n in (1, 2, MANY))


@operator
def _scan(a, p, thread, threads, taken):  # type: ignore[no-untyped-def]
    field, P, G, R, D, E = a[0], a[1], a[2], a[3], a[4], a[5]
    q, k, v, decay, rate, retrieve, mix, out = a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13]
    wedge, write_first = a[14], a[15]
    strips = (E + LANES - 1) // LANES
    work = p[SCRATCH] + thread * p[EACH]
    u, read = floats(work), floats(work + 4 * LANES)
    first, last = share(p[SEQUENCES] * G * strips, thread, threads)
    for item in range(first, last):
        g, e = item // strips % G, item % strips * LANES
        sequence = int64s(p[TABLE] + 8 * SEQUENCE * (item // (strips * G)))
        lanes = min(LANES, E - e)
        for row in range(sequence[ROW], sequence[ROW] + sequence[COUNT]):
            key, value = floats(k + 4 * D * (G * row + g)), floats(v + 4 * E * (G * row + g) + 4 * e)
            whole = floats(v + 4 * E * (G * row + g))
            target = out + 4 * (E * (G * row + g) * R + e)
            for r in range(R):
                for c in range(lanes):
                    floats(target + 4 * E * r)[c] = 0
            for plane in range(P):
                A = int64s(sequence[FIELDS])[field] + 4 * (D * E * (plane * G + g) + e)
                eta, lam = floats(rate)[(row * P + plane) * G + g], floats(decay)[(row * P + plane) * G + g]
                for moment in range(2):
                    if moment == write_first:  # read
                        queries = q + 4 * D * (G * row + g) * R
                        product(_many, _two, _one, A, 4 * E, queries, 4 * D, R, D, lanes, work + 4 * LANES, 4 * LANES)
                        for r in range(R):
                            share_ = floats(mix)[((row * P + plane) * G + g) * R + r] if mix else F(1)
                            if share_ != 0:
                                o = floats(target + 4 * E * r)
                                for c in range(lanes):
                                    o[c] += share_ * read[LANES * r + c]
                    elif eta != 0 or lam != 1:  # write
                        again = floats(retrieve)[G * row + g] if retrieve else F(0)
                        if again == 0:
                            for c in range(LANES):
                                u[c] = 0
                        else:
                            _one(A, 4 * E, k + 4 * D * (G * row + g), 4 * D, D, lanes, work, 4 * LANES)
                        for c in range(lanes):
                            u[c] = eta * (value[c] - again * u[c])
                        for d in range(D):
                            merged(A + 4 * E * d, work, lanes, lam, key[d])
                        if wedge:
                            for d in range(D):
                                merged(A + 4 * E * d, k + 4 * (D * (G * row + g) + e), lanes, F(1), -eta * whole[d])
