"""The published GPT block: layer norms, exact GELU, neighbouring channels rotated or learned positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tcinfer.architectures.llama import projections
from tcinfer.memory import remember

if TYPE_CHECKING:
    from tcinfer.net import Net, Rows

NORM, ROTARY, OURS = "layer", "interleaved", True


def block(net: Net, x: Rows) -> Rows:
    h = net.norm(x, "attn_norm", NORM)
    x = remember(net, *projections(net, h), h, into=x)
    h = net.gelu(net.linear(net.norm(x, "ffn_norm", NORM), "ffn_up", net.layer.d_ff))
    return net.linear(h, "ffn_down", net.config.d_model, into=x)
