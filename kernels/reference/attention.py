"""Softmax attention over keys that are all at hand, with grouped queries and sinks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]

MOST_SCORES = 2**23  # scores held at once; more queries than that are taken in blocks


def softmax(x: F32) -> F32:
    """e^(x - max) / Σ e^(x - max) over the last axis; -inf counts as absent."""
    e = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return e / np.sum(e, axis=-1, keepdims=True)


def attention(
    q: F32, k: F32, v: F32, visible: NDArray[np.bool_] | None = None, sinks: int = 0, q_sinks: F32 | None = None
) -> F32:
    """softmax(q kᵀ / √D) v, head by head.

    q [T, H, D]; k, v [S, G, D], H a multiple of G: G key heads, each read by H / G query heads;
    visible [T, S]: which keys a query sees (None: all); q_sinks [T, H, D]: the queries as they are turned for the
    first `sinks` keys, whose positions are counted differently (None: the same). Returns [T, H, D].
    """
    T, H, D = q.shape
    S, G, _ = k.shape
    step = max(1, MOST_SCORES // (H * S))
    if step < T:
        of_queries = q, visible, q_sinks
        parts: list[Any] = [[None if x is None else x[i : i + step] for x in of_queries] for i in range(0, T, step)]
        return np.concatenate([attention(mine, k, v, seen, sinks, far) for mine, seen, far in parts])

    def grouped(queries: F32) -> F32:  # [T, H, D] -> [G, H/G · T, D]
        return queries.reshape(T, G, H // G, D).transpose(1, 2, 0, 3).reshape(G, -1, D)

    scores = grouped(q) @ k.transpose(1, 2, 0)  # [G, H/G · T, S]
    if q_sinks is not None and sinks:
        scores[:, :, :sinks] = grouped(q_sinks) @ k[:sinks].transpose(1, 2, 0)
    scores = scores.reshape(G, H // G, T, S) * np.float32(1 / math.sqrt(D))
    if visible is not None:
        scores = np.where(visible, scores, np.float32(-np.inf))
    out = softmax(scores).reshape(G, -1, S) @ v.transpose(1, 0, 2)  # [G, H/G · T, D]
    return np.ascontiguousarray(out.reshape(G, H // G, T, D).transpose(2, 0, 1, 3)).reshape(T, H, D)
