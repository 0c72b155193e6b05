"""Gemma 3 (text): a scaled embedding, norms around attention and feed-forward, queries and keys normed head by head.

Five local layers, with a window and a rotation of their own, to each global one. Norm weights in files are 1 + w of the
published ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tcinfer.architectures import llama
from tcinfer.config import check_count, check_number
from tcinfer.errors import FileError
from tcinfer.memory import remember

if TYPE_CHECKING:
    from tcinfer.config import ModelConfig
    from tcinfer.net import Net, Rows

NORM, ROTARY, OURS = "rms", "half", False
HUGGING_FACE = ("gemma3_text",)
ACTIVATION = "gelu_pytorch_tanh"
NAMES = llama.NAMES | {
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
KEYS = ("final_logit_softcapping",)  # that other plain files may not have
TIED = True  # where config.json does not say
PATTERN_KEY = "attention.sliding_window_pattern"
PATTERN = 6  # layers, the last of which is global, where a file does not say
LOCAL_BASE = 10000.0
LAYERS_OF_27B = 62  # its scores are scaled by the width of a head that it has not


def embed(net: Net) -> Rows:
    return net.scale(net.embed(), math.sqrt(net.config.d_model))


def block(net: Net, x: Rows) -> Rows:
    c = net.config
    h = net.norm(x, "attn_norm")
    q, k, v = llama.projections(net, h)
    q, k = net.head_norm(q, "attn_q_norm"), net.head_norm(k, "attn_k_norm")
    if c.attention_scale:
        q = net.scale(q, c.attention_scale * math.sqrt(c.head_dim))
    x = net.add(x, net.norm(remember(net, q, k, v, h), "post_attention_norm"))
    y = llama.feed_forward(net, net.norm(x, "ffn_norm"), "gelu_tanh")
    return net.add(x, net.norm(y, "post_ffw_norm"))


def read(values: dict[str, Any], get: Callable[[str, Any], Any]) -> None:
    """Local and global layers, and the scale of scores, of a file."""
    pattern, count = get(PATTERN_KEY, PATTERN), values["n_layers"]
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        if get(f"{key}_swa", values["head_dim"]) != values["head_dim"]:
            raise FileError(f"local layers with {key} of their own are not supported")
    local = (
        pattern if type(pattern) is tuple else tuple(pattern == 0 or i % pattern < pattern - 1 for i in range(count))
    )
    _layers(values, local if values["window"] else (False,) * count, get("rope.freq_base_swa", LOCAL_BASE))
    values["softcap"] = get("final_logit_softcapping", 0.0)
    if count == LAYERS_OF_27B:
        values["attention_scale"] = 1 / math.sqrt(_width(values))


def _width(values: dict[str, Any]) -> int:
    """Of a head, if heads divided the model's width among them."""
    check_count("n_heads", values["n_heads"], 1, values["d_model"])
    return values["d_model"] // values["n_heads"]


def _layers(values: dict[str, Any], local: tuple[bool, ...], base: float) -> None:
    """Give each layer its window, its base and its scaling: those of global layers are in `values`."""

    def spread(own: Any, other: Any) -> tuple[Any, ...]:
        return tuple(own if here else other for here in local)

    values["memory"], values["window"] = spread("window", "full"), spread(values["window"], 0)
    values["rope_base"] = spread(base, values["rope_base"])
    values["rope_scaling"] = spread("none", values.get("rope_scaling", "none"))
    values["rope_factor"] = spread(1.0, values.get("rope_factor", 1.0))


def write(config: ModelConfig) -> dict[str, Any]:
    """The keys of a file for what its layers differ in."""
    local = [layer for layer in config.layers if layer.window]
    whole = next((layer for layer in config.layers if not layer.window), None)
    keys: dict[str, Any] = {}
    if whole is not None:
        keys = {"rope.freq_base": whole.rope_base, "rope.scaling.type": whole.rope_scaling}
        keys["rope.scaling.factor"] = whole.rope_factor
    if local:
        keys |= {"attention.sliding_window": local[0].window, "rope.freq_base_swa": local[0].rope_base}
        pattern = tuple(bool(layer.window) for layer in config.layers)
        if pattern != tuple(i % PATTERN < PATTERN - 1 for i in range(config.n_layers)):
            keys[PATTERN_KEY] = pattern
    if config.softcap:
        keys["final_logit_softcapping"] = config.softcap
    return {f"{config.arch}.{key}": value for key, value in keys.items()}


def from_hugging_face(hf: dict[str, Any], values: dict[str, Any]) -> None:
    """Local and global layers, and the scale of scores, of a folder's config.json."""
    count, told = values["n_layers"], hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if told.get("full_attention", told).get("rope_type") == "llama3":  # its divisors would reach local layers too
        raise FileError("rope_type 'llama3' in config.json is not supported for this architecture")
    pattern = hf.get("sliding_window_pattern", hf.get("_sliding_window_pattern", PATTERN))
    kinds = hf.get("layer_types")
    if kinds is None:
        check_count("sliding_window_pattern", pattern, 1)
        kinds = [llama.ATTENTIONS[i % pattern == pattern - 1] for i in range(count)]
    if not isinstance(kinds, list) or len(kinds) != count or not set(map(str, kinds)) <= set(llama.ATTENTIONS):
        raise FileError(
            f"layer_types in config.json must name {' or '.join(llama.ATTENTIONS)} for each of {count} layers"
        )
    values["window"] = hf.get("sliding_window", 4096) or 0
    _layers(values, tuple(kind == llama.ATTENTIONS[0] for kind in kinds), _local_base(hf))
    cap = hf.get("final_logit_softcapping") or 0.0
    check_number("final_logit_softcapping", cap, 0.0)
    values["softcap"] = float(cap)
    for key in ("attn_logit_softcapping", "use_bidirectional_attention", "attention_bias"):
        if hf.get(key):
            raise FileError(f"{key} in config.json is not supported")
    # a file has no key for it: what it is follows from the model's size
    width = _width(values) if count == LAYERS_OF_27B else values["head_dim"]
    if hf.get("query_pre_attn_scalar", 256) != width:
        raise FileError(f"query_pre_attn_scalar in config.json must be {width} in a model of this shape")
    if count == LAYERS_OF_27B:
        values["attention_scale"] = 1 / math.sqrt(width)


def _local_base(hf: dict[str, Any]) -> float:
    """The base of local layers, where folders of different ages have it."""
    told: Any = (hf.get("rope_parameters") or {}).get("sliding_attention") or {}
    if not isinstance(told, dict):
        raise FileError("sliding_attention of rope_parameters in config.json must be an object")
    if told.get("rope_type", "default") != "default":
        raise FileError(f"rope_type {told['rope_type']!r} of sliding_attention in config.json is not supported")
    base: Any = hf.get("rope_local_base_freq", told.get("rope_theta", LOCAL_BASE))
    check_number("rope_local_base_freq", base, 0.0, above=True)
    return float(base)


def converted(config: ModelConfig, layer: int, name: str, tensor: Any) -> Any:
    """A folder's tensor as a file has it: norms are told as what they multiply by."""
    return tensor.changed(tensor.shape, lambda x: x + 1) if name.endswith("norm.weight") else tensor
