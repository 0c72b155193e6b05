"""Phi 3 and 4 mini: a Llama block, projections fused in files, halves of a head (or of a part of it) rotated.

Long contexts are rotated by divisors of the angles, one for each pair of channels (longrope): a set for distances up to
those it was trained with first, and one for longer ones, which also multiplies cosines and sines by a factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tcinfer.architectures import llama
from tcinfer.config import check_count, check_number
from tcinfer.errors import FileError

if TYPE_CHECKING:
    from tcinfer.net import Net

NORM, ROTARY, OURS = "rms", "half", False
HUGGING_FACE = ("phi3",)
block = llama.block
FUSED = {"attn_qkv": ("attn_q", "attn_k", "attn_v"), "ffn_up": ("ffn_gate", "ffn_up")}
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ROPE_ARGS = {
    *("type", "rope_type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"),
    *("long_factor", "short_factor", "attention_factor", "factor"),
}
ROPE_TYPES = ("longrope", "su")  # names of it in config.json
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"


def read(values: dict[str, Any], get: Callable[[str, Any], Any]) -> None:
    """Longrope, whose divisors are tensors; and the window, as the model was trained (llama.cpp ignores it)."""
    if values.get("rope_scaling") == "longrope":
        values["rope_scaling"], values["rope_factor"] = "none", 1.0
    if values["window"] >= values["context_length"]:  # no token is ever so far away
        values["window"] = 0
    values["memory"] = "window" if values["window"] else "full"


def divisors(net: Net) -> Any:
    """Of the angles: for the distances that a layer may see exactly, however long the stream is."""
    shape, layer = (net.layer.rope_dim // 2,), net.config.widest
    long, short = (net.tensor(name, shape, required=False) for name in (LONG, SHORT))
    near = layer.window and layer.window + layer.sinks <= net.config.rope_original
    return short if near else long


def from_hugging_face(hf: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Window, part of the head that rotates, and longrope of a folder's config.json; the sets of divisors."""
    scaling = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if unknown := set(scaling) - ROPE_ARGS:
        raise FileError(f"argument {min(unknown)!r} in rope_scaling is not known to this version of tcinfer")
    values["window"] = hf.get("sliding_window") or 0
    check_count("sliding_window", values["window"], 0)
    part = hf.get("partial_rotary_factor", scaling.get("partial_rotary_factor", 1.0))
    check_number("partial_rotary_factor", part, 0.0, above=True)
    values["rope_dim"] = int(values["head_dim"] * part)
    arrays = {}
    if scaling.get("type", scaling.get("rope_type")) in ROPE_TYPES:
        arrays = {LONG: scaling.get("long_factor"), SHORT: scaling.get("short_factor")}
        for name, factors in arrays.items():
            if not isinstance(factors, list) or len(factors) != values["rope_dim"] // 2:
                raise FileError(f"rope_scaling in config.json needs {values['rope_dim'] // 2} numbers for {name}")
            for factor in factors:
                check_number(name, factor, 0.0, above=True)
        context = values["context_length"]
        original = hf.get("original_max_position_embeddings", scaling.get("original_max_position_embeddings", context))
        check_count("original_max_position_embeddings", original, 2)
        values["rope_original"] = original
        farther = scaling.get("factor")
        farther = context / original if farther is None else farther
        check_number("factor of rope_scaling", farther, 0.0, above=True)
        if scaling.get("attention_factor") is not None:
            values["rope_attention"] = scaling["attention_factor"]
        elif farther > 1:
            values["rope_attention"] = math.sqrt(1 + math.log(farther) / math.log(original))
    read(values, lambda key, default: default)
    return {name: np.asarray(factors, np.float32) for name, factors in arrays.items()}
