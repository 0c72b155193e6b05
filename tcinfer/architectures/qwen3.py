"""Qwen 3: a Llama block whose queries and keys are normed head by head; halves of a head rotated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tcinfer.architectures import llama
from tcinfer.memory import remember

if TYPE_CHECKING:
    from tcinfer.net import Net, Rows

NORM, ROTARY, OURS = "rms", "half", False
HUGGING_FACE = ("qwen3",)
NAMES = llama.NAMES | {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
from_hugging_face = llama.without_window


def block(net: Net, x: Rows) -> Rows:
    h = net.norm(x, "attn_norm")
    q, k, v = llama.projections(net, h)
    x = remember(net, net.head_norm(q, "attn_q_norm"), net.head_norm(k, "attn_k_norm"), v, h, into=x)
    return llama.feed_forward(net, net.norm(x, "ffn_norm"), into=x)
