"""The first level: exact keys and values of the last `window` tokens in a ring, sinks beside it.

Full, window and sinks memory are this alone; Infini and Tensor Cache put a matrix behind it. Keys are stored as
rotated at their own position. The token at position t sees the sinks (positions 0 .. n-1) and positions
t - window + 1 .. t, itself included; window 0 is unbounded. With sink_positions "in-cache" (StreamingLLM) the query
meets the sinks as if it stood at min(t, n + window - 1): the same scores as keys rotated by their index in the cache,
because only the difference of two rotations counts.

Keys (rotated) and values are rounded to the ring's type as they arrive, before any use, so that it makes no difference
which of a stream's tokens are still in the chunk and which are in the ring already.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tcinfer.config import ModelConfig
from tcinfer.memory.chunk import Chunk
from tcinfer.memory.state import Field, Spec

if TYPE_CHECKING:
    from tcinfer.kernels.cpu.plan import Rows
    from tcinfer.memory.layer import Layer

F32 = NDArray[np.float32]
Options = None
MATRICES = ()


def tensors(config: ModelConfig, layer: int) -> dict[str, Spec]:
    if not config.key_conv:
        return {}
    return {"attn_key_conv": Spec((config.key_conv, config.n_kv_heads, config.head_dim))}


def state(config: ModelConfig, layer: int, capacity: int) -> tuple[Field, ...]:
    slots = config.sinks + (config.window or capacity)
    kv = (slots, config.n_kv_heads, config.head_dim)
    fields = (Field("k", kv, config.cache_dtype), Field("v", kv, config.cache_dtype))
    return (*fields, Field("k_last", kv[1:])) if config.key_conv else fields


def attend(chunk: Chunk, w: dict[str, Any], state: dict[str, NDArray], q: F32, k: F32, v: F32, x: F32) -> F32:
    return chunk.linear(merge(push(chunk, w, state, q, k, v).out), w, "attn_output")


def plan(layer: Layer, q: Rows, k: Rows, v: Rows, h: Rows) -> None:
    new = layer.push(q, k, v)
    out = layer.attend(new)
    layer.settle(new, k)
    layer.linear(out, "attn_output", into=layer.x)


def merge(heads: F32) -> F32:
    """[T, .., D] -> [T, all heads side by side]."""
    return heads.reshape(len(heads), -1)


class Evicted(NamedTuple):
    """The tokens that left the window, oldest first: one for each of the last `total` tokens of the chunk."""

    first: int  # position of the oldest
    total: int
    cached: NDArray[np.int64]  # slots of those that stood in the cache before the chunk
    chunk: slice  # those that entered and left within the chunk

    def take(self, cache: NDArray, new: NDArray) -> NDArray:
        """Their rows, [total, ...], of any per-token array: its ring before the chunk, and the chunk's own rows."""
        return np.concatenate([cache[self.cached], new[self.chunk]])


class Pushed(NamedTuple):
    """What a second level needs to know of T tokens that passed through the first."""

    out: F32  # [T, H, D] local attention
    q: F32  # [T, H, D] rotated
    k: F32  # [T, G, D] convolved where the model does, rotated, rounded
    v: F32  # [T, G, D] rounded
    k_plain: F32  # [T, G, D] the same before rotation
    evicted: Evicted
    k_out: F32  # [evicted.total, G, D] what left: keys as stored, rotated at their own positions
    v_out: F32  # [evicted.total, G, D]


def evicted(config: ModelConfig, first: int, count: int) -> Evicted:
    """Which tokens leave while positions first .. first + count - 1 enter."""
    n, W = config.sinks, config.window
    if not W:
        return Evicted(0, 0, np.empty(0, np.int64), slice(0, 0))
    start, stop = n + max(0, first - n - W), n + max(0, first + count - n - W)  # positions
    inside = min(max(start, first), stop)  # from here on they are the chunk's own
    return Evicted(start, stop - start, slots(config, np.arange(start, inside)), slice(inside - first, stop - first))


def slots(config: ModelConfig, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where in the cache each position is kept: sinks in front, then the ring."""
    n, W = config.sinks, config.window
    return np.where(positions < n, positions, n + (positions - n) % W) if W else positions


def insert(chunk: Chunk, cache: NDArray, new: NDArray) -> None:
    """Write a chunk's rows new [T, ...] into a per-token array."""
    rows, at = chunk.memo("staying", lambda: staying(chunk.config, chunk.first, chunk.count))
    cache[at] = new[rows]


def staying(config: ModelConfig, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which rows of a chunk are still cached after it, and in which slots."""
    n, W = config.sinks, config.window
    positions = np.arange(first, first + count)
    if W:
        positions = positions[(positions < n) | (positions >= first + count - W)]
    return positions - first, slots(config, positions)


def push(chunk: Chunk, w: dict[str, Any], state: dict[str, NDArray], q: F32, k: F32, v: F32) -> Pushed:
    """Take T tokens into the ring and attend over it.  q [T, H, D]; k, v [T, G, D], none of them rotated."""
    config, first, T = chunk.config, chunk.first, chunk.count
    n, W = config.sinks, config.window
    if config.key_conv:  # k'_t = w_0 k_t + w_1 k_{t-1}
        taps = w["attn_key_conv"]
        before = np.concatenate([state["k_last"][None], k[:-1]])
        state["k_last"][:] = k[-1]
        k = taps[0] * k + taps[1] * before
    k_plain, k = k, chunk.rounded(chunk.rotate(k, first))
    v = chunk.rounded(v)
    q_plain, q = q, chunk.rotate(q, first)
    q_sinks = None
    if n and config.sink_positions == "in-cache" and first + T > n + W:
        q_sinks = chunk.rotate(q_plain, first, most=n + W - 1)
    leaving = chunk.memo("evicted", lambda: evicted(config, first, T))
    k_out, v_out = leaving.take(state["k"], k), leaving.take(state["v"], v)
    if T == 1:  # the slot that is overwritten is the one that left: nothing needs to be masked or copied
        insert(chunk, state["k"], k)
        insert(chunk, state["v"], v)
        filled = min(first + 1, n + W) if W else first + 1
        keys, values = (state[name][:filled].astype(np.float32, copy=False) for name in ("k", "v"))
        out = chunk.ops.attention(q, keys, values, None, n, q_sinks)
    else:
        cached = min(first, n + W) if W else first
        keys = np.concatenate([state["k"][:cached], k])
        values = np.concatenate([state["v"][:cached], v])
        seen = chunk.memo("visible", lambda: visible(config, first, T, cached))
        out = chunk.ops.attention(q, keys, values, seen, n, q_sinks)
        insert(chunk, state["k"], k)
        insert(chunk, state["v"], v)
    return Pushed(out, q, k, v, k_plain, leaving, k_out, v_out)


def visible(config: ModelConfig, first: int, count: int, cached: int) -> NDArray[np.bool_]:
    """Which keys each query of a chunk sees, [count, cached + count]: the cache's slots in order, then the chunk."""
    n, W = config.sinks, config.window
    slot = np.arange(cached)
    at = np.where(slot < n, slot, slot + W * ((first - 1 - slot) // W)) if W else slot  # position held by each slot
    keys = np.concatenate([at, np.arange(first, first + count)])
    queries = np.arange(first, first + count)[:, None]
    causal = keys <= queries
    return causal & ((keys > queries - W) | (keys < n)) if W else causal
