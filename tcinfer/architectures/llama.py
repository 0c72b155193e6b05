"""Llama: RMS norms, a gated MLP, neighbouring channels rotated. Mistral and SmolLM2 are files of this kind."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tcinfer.memory import remember

if TYPE_CHECKING:
    from tcinfer.net import Net, Rows

NORM, ROTARY, OURS = "rms", "interleaved", False


def attend(net: Net, x: Rows) -> Rows:
    """x + attention of the normed x, [C]."""
    h = net.norm(x, "attn_norm")
    return remember(net, *projections(net, h), h, into=x)


def projections(net: Net, h: Rows) -> tuple[Rows, Rows, Rows]:
    """Queries [H · D], keys and values [G · D]."""
    layer = net.layer
    heads = (layer.n_heads, layer.n_kv_heads, layer.n_kv_heads)
    q, k, v = (
        net.linear(h, name, count * layer.head_dim)
        for name, count in zip(("attn_q", "attn_k", "attn_v"), heads, strict=True)
    )
    return q, k, v


def feed_forward(net: Net, h: Rows, activation: str = "silu", into: Rows | None = None) -> Rows:
    """down(act(gate h) · up h), [C], added to `into` if there is one."""
    F = net.layer.d_ff
    gate = net.linear(h, "ffn_gate", F)
    return net.linear(net.gated(gate, net.linear(h, "ffn_up", F), activation), "ffn_down", net.config.d_model, into)


def block(net: Net, x: Rows) -> Rows:
    x = attend(net, x)
    return feed_forward(net, net.norm(x, "ffn_norm"), into=x)
