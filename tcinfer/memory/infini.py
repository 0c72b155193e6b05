"""Infini-attention (mechanisms.md 2.1): every token is written to a normalised matrix, mixed inside the heads.

read   m_t = φ(q_t) M / (φ(q_t)·z + 1e-5)                           φ(x) = ELU(x) + 1, before this token's write
write  M += φ(k_t) ⊗ v_t                                            "linear"
       M += φ(k_t) ⊗ (v_t - φ(k_t) M / (φ(k_t)·z + 1e-5))           "delta"
       z += φ(k_t)
out    σ(β_h) m + (1 - σ(β_h)) local, per head, before the output projection
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tcinfer.config import ModelConfig, check_choice, check_types
from tcinfer.kernels.reference.matrix_memory import Writes
from tcinfer.memory import local
from tcinfer.memory.chunk import Chunk
from tcinfer.memory.state import Field, Spec

if TYPE_CHECKING:
    from tcinfer.kernels.cpu.plan import Rows
    from tcinfer.memory.layer import Layer

F32 = NDArray[np.float32]
EPS = np.float32(1e-5)
MATRICES = ("M",)


@dataclass(frozen=True)
class Options:
    rule: str = "delta"  # or "linear"

    def __post_init__(self) -> None:
        check_types(self)
        check_choice("rule", self.rule, ("linear", "delta"))


def tensors(config: ModelConfig, layer: int) -> dict[str, Spec]:
    return {"infini_beta": Spec((config.n_heads,))}


def state(config: ModelConfig, layer: int, capacity: int) -> tuple[Field, ...]:
    G, D = config.n_kv_heads, config.head_dim
    return (*local.state(config, layer, capacity), Field("M", (G, D, D)), Field("z", (G, D)))


def attend(chunk: Chunk, w: dict[str, Any], state: dict[str, NDArray], q: F32, k: F32, v: F32, x: F32) -> F32:
    ops, T, G = chunk.ops, chunk.count, k.shape[1]
    near = local.push(chunk, w, state, q, k, v)
    fq = ops.elu_plus_one(near.q).reshape(T, G, -1, q.shape[-1])  # [T, G, R, D]
    fk = ops.elu_plus_one(near.k)  # [T, G, D]
    after = state["z"] + np.cumsum(fk, axis=0)  # [T, G, D] z after each write
    before = np.concatenate([state["z"][None], after[:-1]])
    state["z"][:] = after[-1]
    retrieve = None
    if chunk.config.options.rule == "delta":
        retrieve = 1 / ((fk * before).sum(-1) + EPS)  # [T, G]
    ones = np.ones((1, T, G), np.float32)
    read = ops.scan(state["M"][None], fq, Writes(fk, near.v, ones, ones, retrieve))  # [T, G, R, D]
    far = (read / ((fq * before[:, :, None]).sum(-1, keepdims=True) + EPS)).reshape(q.shape)
    share = ops.sigmoid(w["infini_beta"])[:, None]  # [H, 1]
    near_part, far_part = (1 - share) * near.out, share * far
    chunk.contributed(near_part, far_part)
    return chunk.linear(local.merge(near_part + far_part), w, "attn_output")


def plan(layer: Layer, q: Rows, k: Rows, v: Rows, h: Rows) -> None:
    from tcinfer.kernels.cpu import infini, matrix_memory

    config = layer.config
    G, D = config.n_kv_heads, config.head_dim
    shape = (G, config.n_heads // G, D)
    new = layer.push(q, k, v, rounded=True)
    near = layer.attend(new)
    layer.settle(new, k)
    fq, norm, writes = infini.features(
        layer.plan, new, layer.field("z"), shape, float(EPS), config.options.rule == "delta"
    )
    far = matrix_memory.scan(layer.plan, layer.field("M"), 1, (*shape, D), fq, writes)
    infini.blend(layer.plan, near, far, norm, layer.weights["infini_beta"], D)
    layer.linear(near, "attn_output", into=layer.x)
