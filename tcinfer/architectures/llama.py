"""Llama: RMS norms, a gated MLP, neighbouring channels rotated. Mistral and SmolLM2 are files of this kind."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tcinfer.config import check_count
from tcinfer.errors import FileError
from tcinfer.memory import remember

if TYPE_CHECKING:
    from tcinfer.config import ModelConfig
    from tcinfer.net import Net, Rows

F32 = NDArray[np.float32]

NORM, ROTARY, OURS = "rms", "interleaved", False
HUGGING_FACE = ("llama", "mistral")
ATTENTIONS = ("sliding_attention", "full_attention")  # of config.json's layer_types
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_proj": "ffn_gate",
    "mlp.down_proj": "ffn_down",
}


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


def from_hugging_face(hf: dict[str, Any], values: dict[str, Any]) -> None:
    """Windows of a folder's config.json. llama.cpp runs a plain file with the full cache, whatever its window says: a
    model with windows becomes one of ours."""
    count, kind = values["n_layers"], hf.get("model_type")
    window = hf.get("sliding_window") if hf.get("use_sliding_window", kind == "mistral") else None
    first = hf.get("max_window_layers", 28) if kind == "qwen2" else 0  # the layers below have none
    check_count("max_window_layers", first, 0)
    kinds = hf.get("layer_types")
    if kinds is None:
        local = [bool(window) and i >= first for i in range(count if window and first else 1)]
    elif not isinstance(kinds, list) or len(kinds) != count or not set(map(str, kinds)) <= set(ATTENTIONS):
        raise FileError(f"layer_types in config.json must name {' or '.join(ATTENTIONS)} for each of {count} layers")
    else:
        local = [one == ATTENTIONS[0] for one in kinds]
    if not any(local):
        return
    if not window:
        raise FileError("layer_types in config.json names layers with a window, and sliding_window says none")
    values["arch"] = "tcllama"
    values["memory"] = "window" if all(local) else tuple("window" if here else "full" for here in local)
    values["window"] = window if all(local) else tuple(window if here else 0 for here in local)


def without_window(hf: dict[str, Any], values: dict[str, Any]) -> None:
    """Raise FileError for windows in config.json: files of the architecture have no key for them."""
    from_hugging_face(hf, found := dict(values))
    if found["arch"] != values["arch"]:
        raise FileError(f"use_sliding_window in config.json is not supported for {values['arch']}")


def converted(config: ModelConfig, layer: int, name: str, tensor: Any) -> Any:
    """A folder's tensor as a file has it: folders rotate the halves of a head, files neighbouring channels."""
    own = config.layer(layer)
    heads = {"attn_q": own.n_heads, "attn_k": own.n_kv_heads}.get(name.split(".")[0])
    if heads is None:
        return tensor
    tensor.check((heads * own.head_dim, config.d_model)[: 1 + name.endswith(".weight")])
    return tensor.changed(tensor.shape, partial(_interleaved, heads))


def _interleaved(heads: int, x: F32) -> F32:
    """Rows of each head from (0 .. D/2-1, D/2 .. D-1) to (0, D/2, 1, D/2+1, ..).  [heads · D, ...]."""
    return x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def block(net: Net, x: Rows) -> Rows:
    h = net.norm(x, "attn_norm")
    x = remember(net, *projections(net, h), h, into=x)
    return feed_forward(net, net.norm(x, "ffn_norm"), into=x)
