"""Infini-attention: every token is written to a normalised matrix, mixed inside the heads.

read   m_t = φ(q_t) M / (φ(q_t)·z + 1e-5)                           φ(x) = ELU(x) + 1, before this token's write
write  M += φ(k_t) ⊗ v_t                                            "linear"
       M += φ(k_t) ⊗ (v_t - φ(k_t) M / (φ(k_t)·z + 1e-5))           "delta"
       z += φ(k_t)
out    σ(β_h) m + (1 - σ(β_h)) local, per head, before the output projection

Of a layer: the tensor `infini_beta` [H], logits of the memory's share. Source: docs/mechanisms.md, "Infini-attention".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tcinfer.config import LayerConfig, check_choice, check_types
from tcinfer.kernels.reference.pointwise import sigmoid
from tcinfer.kernels.table import SCAN
from tcinfer.memory import ring
from tcinfer.memory.infini.equations import BLEND, EPS, FEATURES, blended
from tcinfer.memory.state import Field

if TYPE_CHECKING:
    from tcinfer.net import Net, Rows

MATRICES = ("M",)
PREFIX = "infini_"
LEARNED = {"memory_share": "memory's share"}
OPERATORS = (FEATURES, BLEND)


@dataclass(frozen=True)
class Options:
    rule: str = "delta"  # or "linear"

    def __post_init__(self) -> None:
        check_types(self)
        check_choice("rule", self.rule, ("linear", "delta"))


def check(layer: LayerConfig) -> None:
    """Any window and sinks will do."""


def state(layer: LayerConfig, capacity: int) -> tuple[Field, ...]:
    """The ring's, M [G, D, D] and z [G, D]."""
    G, D = layer.n_kv_heads, layer.head_dim
    return (*ring.state(layer, capacity), Field("M", (G, D, D)), Field("z", (G, D)))


def wire(net: Net, q: Rows, k: Rows, v: Rows, h: Rows, into: Rows | None) -> Rows:
    """As ring.wire, the memory's read blended in."""
    H, G, D = net.layer.n_heads, net.layer.n_kv_heads, net.layer.head_dim
    shape = {"G": G, "R": H // G, "D": D}
    new = ring.push(net, q, k, v, rounded=True)
    near = ring.attend(net, new)
    ring.settle(net, new, k)
    delta = net.layer.options.rule == "delta"
    fq, fk, retrieve, norm = net.call(FEATURES, q=new.q, k=new.k, z=net.field("z"), **shape, eps=EPS, delta=delta)
    one = net.ones(G)
    pairs = {"q": fq, "k": fk, "v": new.v, "decay": one, "rate": one, "retrieve": retrieve if delta else None}
    plain = {"mix": None, "wedge": False, "write_first": False}
    far = net.call(SCAN, field=net.field("M"), P=1, **shape, E=D, **pairs, **plain)
    betas = net.weight("infini_beta", (H,))
    net.contributed(lambda: blended(near, far, norm, betas, H, D))
    net.call(BLEND, near=near, far=far, norm=norm, betas=betas, H=H, D=D)
    return net.linear(near, "attn_output", net.config.d_model, into)


def learned(weights: dict) -> dict[str, object]:
    """What a layer's weights say of its memory, for `inspect`."""
    return {"memory_share": sigmoid(weights["infini_beta"]).tolist()}
