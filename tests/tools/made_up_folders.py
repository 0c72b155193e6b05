"""The made-up models as Hugging Face folders: config.json and model.safetensors as transformers writes them.

    python tests/tools/made_up_folders.py OUTDIR

The same weights as made_up.py's files. Where transformers has no such option the folder has the nearest model that it
does have: FOLDERS names them. Their logits are the file's.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from made_up import MODELS, VOCABULARY, MadeUp, Weights, weights, write
from safetensors.numpy import save_file

CLASSES = {
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "phi3": ("phi3", "Phi3ForCausalLM"),
    "smollm3": ("smollm3", "SmolLM3ForCausalLM"),
}
GLOBAL, LOCAL = "full_attention", "sliding_attention"
GEMMAS_WINDOW = 512  # said in a folder without local layers, where it has no meaning


def _without(scaling: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in scaling.items() if name not in names}


FOLDERS: dict[str, MadeUp] = {
    "gemma3": MODELS["gemma3"],
    "gemma3-every": replace(
        MODELS["gemma3-every"], scaling=_without(MODELS["gemma3-every"].scaling, "attn_factor")
    ),  # beside linear scaling there is none
    "gemma3-list": replace(MODELS["gemma3-list"], rope_dim=None, scaling={"type": "linear", "factor": 4.0}),
    "gemma3-global": MODELS["gemma3-global"],
    "gemma3-local": MODELS["gemma3-local"],
    "gemma3-27b": MODELS["gemma3-27b"],
    "qwen3": MODELS["qwen3"],
    "qwen3-untied": MODELS["qwen3-untied"],
    "qwen3-yarn": MODELS["qwen3-yarn"],
    "phi3": replace(MODELS["phi3"], window=None),  # with one, transformers heeds it, llama.cpp does not
    "phi3-long": MODELS["phi3-long"],
    "smollm3": MODELS["smollm3"],
    "smollm3-every": replace(MODELS["smollm3-every"], biases=False, head_dim=16),  # no biases without o_proj's
}


def write_folder(model: MadeUp, folder: Path, version: int = 5, wrapped: bool = False) -> Path:
    """The model's folder, its config.json as transformers 4 or 5 writes it.

    wrapped: a gemma3 as the text half of a model that sees, whose other half is one tensor.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings, tensors = config(model, version), folder_tensors(model)
    if wrapped:
        tensors = {f"language_model.{name}": values for name, values in tensors.items()}
        tensors["vision_tower.vision_model.post_layernorm.weight"] = np.ones(8, np.float32)
        kept = {key: settings.pop(key) for key in ("dtype", "torch_dtype", "transformers_version") if key in settings}
        settings = {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "image_token_index": VOCABULARY - 1,
            "model_type": "gemma3",
            "text_config": _without(settings, "architectures"),
            "vision_config": {"hidden_size": 8, "model_type": "siglip_vision_model"},
        } | kept
    (folder / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def folder_tensors(model: MadeUp) -> Weights:
    """Every tensor by transformers' name: Gemma's norms less 1, heads in halves, the rest as in the file."""
    out = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    block = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_qkv": "self_attn.qkv_proj",
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.gate_up_proj" if model.arch == "phi3" else "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    if model.arch == "gemma3":
        block |= {
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        }
    tensors = {}
    for name, values in weights(model).items():
        if name.startswith("rope_factors"):
            continue  # in config.json
        stem = name.removesuffix(".weight")
        blk, _, part = stem.rpartition(".")
        if model.arch == "gemma3" and stem.endswith("norm"):
            values = values - np.float32(1)
        if model.arch == "smollm3" and part in ("attn_q", "attn_k"):
            values = _halves(values, model.head_dim)
        theirs = f"model.layers.{blk.removeprefix('blk.')}.{block[part]}" if blk else out[stem]
        tensors[f"{theirs}.weight"] = np.ascontiguousarray(values)
    return tensors


def _halves(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of each head from pairs of neighbours (0, D/2, 1, D/2 + 1, ..) to halves (0 .. D/2 - 1, D/2 ..)."""
    heads = rows.reshape(-1, head_dim, rows.shape[1])
    return np.concatenate([heads[:, 0::2], heads[:, 1::2]], axis=1).reshape(rows.shape)


def config(model: MadeUp, version: int = 5) -> dict[str, Any]:
    """What config.json holds."""
    if model.arch not in CLASSES or model.biases or (model.fused and model.arch != "phi3"):
        raise ValueError("transformers has no such model")
    kind, name = CLASSES[model.arch]
    bos, eos, pad = {"gemma3": (2, 1, 0), "phi3": (1, 2, 2)}.get(model.arch, (266, 268, 266))
    out = {
        "architectures": [name],
        "attention_dropout": 0.0,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "hidden_size": model.d_model,
        "initializer_range": 0.02,
        "intermediate_size": model.d_ff,
        "max_position_embeddings": model.context_length,
        "model_type": kind,
        "num_attention_heads": model.n_heads,
        "num_hidden_layers": model.n_layers,
        "num_key_value_heads": model.n_kv_heads,
        "pad_token_id": pad,
        "rms_norm_eps": model.eps,
        "tie_word_embeddings": model.tied,
        "transformers_version": {4: "4.57.3", 5: "5.24.0"}[version],
        "use_cache": True,
        "vocab_size": VOCABULARY,
        {4: "torch_dtype", 5: "dtype"}[version]: "float32",
    }
    own = {"gemma3": _gemma, "qwen3": _qwen, "phi3": _phi, "smollm3": _smollm}[model.arch]
    return out | own(model, version)


def _scaling(model: MadeUp) -> dict[str, Any] | None:
    """transformers' object of rope_scaling, from the file's keys."""
    kind = model.scaling.get("type", "linear" if "factor" in model.scaling else "none")
    if kind == "none":
        return None
    out = {"rope_type": kind} | {key: model.scaling[key] for key in ("factor",) if key in model.scaling}
    if kind == "yarn":
        out["original_max_position_embeddings"] = model.scaling["original_context_length"]
        if factor := model.scaling.get("attn_factor"):  # all of it there, beside YaRN's own in the file
            out["attention_factor"] = factor * (1 + 0.1 * math.log(model.scaling["factor"]))
    if kind == "longrope":
        w = weights(model)
        out |= {f"{which}_factor": w[f"rope_factors_{which}.weight"].tolist() for which in ("long", "short")}
    return out


def _rope(model: MadeUp, version: int) -> dict[str, Any]:
    base, scaling = model.rope_base, _scaling(model)
    if version == 4:
        return {"rope_scaling": scaling, "rope_theta": base}
    return {"rope_parameters": {"rope_theta": base} | (scaling or {"rope_type": "default"})}


def _gemma(model: MadeUp, version: int) -> dict[str, Any]:
    pattern = 6 if model.pattern is None else model.pattern
    pattern = pattern if model.window else 1
    if isinstance(pattern, list):
        local = pattern
    else:
        local = [pattern == 0 or (i + 1) % pattern != 0 for i in range(model.n_layers)]
    wide = model.n_layers == 62
    out = {
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": model.softcap,
        "head_dim": model.head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": model.d_model // model.n_heads if wide else model.head_dim,
        "sliding_window": model.window or GEMMAS_WINDOW,
    }
    base, local_base = model.rope_base or 10000.0, model.local_base or 10000.0
    if version == 4:
        out |= {"rope_local_base_freq": local_base, "rope_scaling": _scaling(model), "rope_theta": base}
    else:
        out["rope_parameters"] = {
            GLOBAL: {"rope_theta": base} | (_scaling(model) or {"rope_type": "default"}),
            LOCAL: {"rope_theta": local_base, "rope_type": "default"},
        }
        out["use_bidirectional_attention"] = False
    if version == 5 or isinstance(pattern, list) or pattern == 0:
        out["layer_types"] = [LOCAL if each else GLOBAL for each in local]
    else:
        out["sliding_window_pattern"] = pattern
    return out


def _qwen(model: MadeUp, version: int) -> dict[str, Any]:
    return {
        "attention_bias": False,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_window_layers": 28,
        "sliding_window": None,
        "use_sliding_window": False,
        **({"layer_types": [GLOBAL] * model.n_layers} if version == 5 else {}),
        **_rope(model, version),
    }


def _phi(model: MadeUp, version: int) -> dict[str, Any]:
    original = model.scaling.get("original_context_length", model.context_length)
    partial = (model.rope_dim or model.head_dim) / model.head_dim
    rope = _rope(model, version)
    if version == 5:
        more = {"original_max_position_embeddings": original} if model.scaling else {}
        rope["rope_parameters"] |= {"partial_rotary_factor": partial, **more}
    elif partial != 1:
        rope["partial_rotary_factor"] = partial
    return {
        "embd_pdrop": 0.0,
        "hidden_act": "silu",
        "original_max_position_embeddings": original,
        "resid_pdrop": 0.0,
        "sliding_window": model.window,
        **rope,
    }


def _smollm(model: MadeUp, version: int) -> dict[str, Any]:
    return {
        "attention_bias": False,
        "hidden_act": "silu",
        "layer_types": [GLOBAL] * model.n_layers,
        "mlp_bias": False,
        "no_rope_layer_interval": 4,
        "no_rope_layers": [int((i + 1) % 4 != 0) for i in range(model.n_layers)],  # 1: rotates
        "sliding_window": None,
        "use_sliding_window": False,
        **_rope(model, version),
    }


if __name__ == "__main__":
    for name, model in FOLDERS.items():
        print(write_folder(model, Path(sys.argv[1], name)))
        write(model, Path(sys.argv[1], f"{name}.gguf"))
