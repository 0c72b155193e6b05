"""Attention of one token over the cache, compiled; several tokens are the reference's matrix products."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from tcinfer.kernels.cpu.jit import compiled
from tcinfer.kernels.reference import attention as reference

F32 = NDArray[np.float32]


def attention(
    q: F32,
    k: F32,
    v: F32,
    visible: NDArray[np.bool_] | None = None,
    sinks: int = 0,
    q_sinks: F32 | None = None,
) -> F32:
    """As kernels.reference.attention.attention."""
    if len(q) > 1 or visible is not None:
        return reference.attention(q, k, v, visible, sinks, q_sinks)
    near = np.ascontiguousarray(q[0])
    far = near if q_sinks is None else np.ascontiguousarray(q_sinks[0])
    return _one(near, far, min(sinks, len(k)), np.ascontiguousarray(k), np.ascontiguousarray(v))[None]


@compiled
def _one(q: F32, q_sinks: F32, sinks: int, k: F32, v: F32) -> F32:
    """q, q_sinks [H, D]; k, v [S, G, D]; the first `sinks` keys are met by q_sinks. Returns [H, D]."""
    H, D = q.shape
    S, G, _ = k.shape
    scale = np.float32(1 / math.sqrt(D))
    scores = np.empty((H, S), np.float32)
    out = np.zeros((H, D), np.float32)
    group = H // G
    for s in range(S):
        queries = q_sinks if s < sinks else q
        for h in range(H):
            key, query = k[s, h // group], queries[h]
            dot = np.float32(0)
            for d in range(D):
                dot += query[d] * key[d]
            scores[h, s] = dot * scale
    for h in range(H):
        top = scores[h].max()
        total = np.float32(0)
        for s in range(S):
            scores[h, s] = math.exp(scores[h, s] - top)
            total += scores[h, s]
        scores[h] /= total
    for s in range(S):
        for h in range(H):
            value, weight, row = v[s, h // group], scores[h, s], out[h]
            for d in range(D):
                row[d] += weight * value[d]
    return out
