"""The first level: exact keys and values of the last `window` tokens in a ring, sinks beside it.

The token at position t sees the sinks (positions 0 .. n-1) and positions t - window + 1 .. t, itself included; window 0
is unbounded. Keys (rotated) and values are rounded to the ring's type as they arrive, before any use, so that it makes
no difference which of a stream's tokens are still in the chunk and which are in the ring already.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tcinfer.kernels.plan import Geometry
from tcinfer.kernels.reference import attention
from tcinfer.kernels.reference.rotary import rotate

F32 = NDArray[np.float32]
Ints = NDArray[np.int64]


def push(
    p: Any,
    q: F32,
    k: F32,
    v: F32,
    H: int,
    G: int,
    D: int,
    half: bool,
    interleaved: bool,
    turned: int,
    cos: F32 | None,
    sin: F32 | None,
    cos_far: F32 | None,
    sin_far: F32 | None,
    taps: F32 | None,
    last: NDArray | None,
) -> tuple[Any, ...]:
    """Convolve keys, rotate queries and keys, round keys and values.

    q [T, H, D], k and v [T, G, D]; cos and sin [T, turned / 2] of each row's position, or None where nothing rotates;
    _far: of the position from which a query meets the sinks, where it is another; taps [2, G, D] of the convolution
    k'_t = w_0 k_t + w_1 k_{t-1}, last [G, D] the key before the chunk. Returns q and q for the sinks, rotated; k and v
    of the ring's type; the same as float32; k convolved, not rotated, not rounded.
    """
    pairs = "interleaved" if interleaved else "half"
    if taps is not None:
        assert last is not None
        k = taps[0] * k + taps[1] * np.concatenate([last.reshape(1, G, D), k[:-1]])
    plain, far = k, None
    if cos is not None and sin is not None:
        if cos_far is not None and sin_far is not None:
            far = rotate(q, cos_far[:, None], sin_far[:, None], pairs)
        q, k = (rotate(x, cos[:, None], sin[:, None], pairs) for x in (q, k))
    kind = np.float16 if half else np.float32
    k, v = k.astype(kind), v.astype(kind)
    return q, far, k, v, k.astype(np.float32), v.astype(np.float32), plain


def slots(positions: Ints, window: int, sinks: int) -> Ints:
    """Where in the cache each position is kept: sinks in front, then the ring."""
    return np.where(positions < sinks, positions, sinks + (positions - sinks) % window) if window else positions


def take(p: Any, field: NDArray, rows: NDArray, width: int, half: bool, window: int, sinks: int) -> NDArray[np.float32]:
    """The rows of the tokens that leave the window while each of the chunk enters it; zeros where none does.

    field [slots, ..]: of the cache before the chunk; rows [T, width]: the chunk's own.
    """
    out = np.zeros((p.count, width), np.float32)
    leaving = p.positions - window
    cached, own = (leaving >= sinks) & (leaving < p.first), leaving >= max(sinks, p.first)
    out[cached] = field.reshape(len(field), width)[slots(leaving[cached], window, sinks)]
    out[own] = rows[leaving[own] - p.first]
    return out


def insert(p: Any, field: NDArray, rows: NDArray, width: int, half: bool, window: int, sinks: int) -> None:
    """Write the rows [T, width] that stay into their slots of a per-token field [slots, ..]."""
    at = p.positions
    stay = (at < sinks) | (at >= p.first + p.count - window) if window else np.ones(p.count, bool)
    field.reshape(len(field), width)[slots(at[stay], window, sinks)] = rows[stay]


def keep_last(p: Any, field: NDArray, x: F32, width: int) -> None:
    """The chunk's last row into a field."""
    field.reshape(width)[:] = x[-1]


def attend(p: Any, g: Geometry, q: F32, q_far: F32 | None, keys: NDArray, values: NDArray, k: Any, v: Any) -> F32:
    """Each row's query over what it sees of the ring and of the chunk itself.

    q, q_far [T, H, D]; keys, values [slots, G, D]: the ring before the chunk; k, v [T, G, D] as `push` gives them.
    Returns [T, H, D].
    """
    cached = min(p.first, g.sinks + g.window) if g.window else p.first
    seen = p.once(("visible", g.window, g.sinks), lambda: visible(p.first, p.count, g.window, g.sinks, cached))
    k, v = (
        np.concatenate([old[:cached], new.reshape(-1, g.kv_heads, g.head_dim)]).astype(np.float32, copy=False)
        for old, new in ((keys, k), (values, v))
    )
    return attention.attention(q, k, v, seen, g.sinks, q_far)


def visible(first: int, count: int, window: int, sinks: int, cached: int) -> NDArray[np.bool_]:
    """Which keys each query of a chunk sees, [count, cached + count]: the cache's slots in order, then the chunk."""
    slot = np.arange(cached)
    at = slot  # the position that each slot holds
    if window:
        at = np.where(slot < sinks, slot, slot + window * ((first - 1 - slot) // window))
    keys = np.concatenate([at, np.arange(first, first + count)])
    queries = np.arange(first, first + count)[:, None]
    causal = keys <= queries
    return causal & ((keys > queries - window) | (keys < sinks)) if window else causal
