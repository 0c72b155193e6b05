"""A Hugging Face style folder of the Llama family: `config.json` and `*.safetensors`, a Tensor Cache beside if any.

A model with the full cache becomes a plain `llama` or `qwen2` file, which other runtimes read too; one with a sliding
window, or with `tensor_cache` in config.json (the trainer's model_args by name), becomes `tcllama`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tcinfer.config import ModelConfig, check_count, check_number
from tcinfer.converters import source
from tcinfer.converters.source import F32, Names, Source, Tensor, typed
from tcinfer.errors import FileError

CONFIG = "config.json"
LARGEST_CONFIG = 2**20  # bytes
LARGEST_HEAD = 2**16  # channels; far beyond any model, and it bounds the angles that are computed here
MODEL_TYPES = ("llama", "mistral", "qwen2")  # config.json's model_type
FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
ROPE_ARGS = {"rope_type", "type", "rope_theta", "factor"}
LLAMA3_ARGS = {"low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}


def recognises(path: Path) -> bool:
    return path.is_dir()


def read(path: Path) -> Source:
    """Raises FileError for a folder that is no such model, or holds what this version does not know."""
    hf = _read_json(path / CONFIG)
    have = _read_tensors(path)
    memory = hf.get("tensor_cache")
    if memory is not None and not isinstance(memory, dict):
        raise FileError("tensor_cache in config.json must be an object")
    config, divisors = _config(hf, memory, source.name_of(path.resolve()))
    names = Names(have)
    if divisors is not None:
        names.out["rope_freqs.weight"] = Tensor("rope_freqs.weight", divisors.shape, lambda: divisors)
    names.move("model.embed_tokens", "token_embd")
    names.move("model.norm", "output_norm")
    tied = hf.get("tie_word_embeddings", False)
    if not tied and "lm_head.weight" not in have:
        raise FileError("tensor 'lm_head.weight' is missing, and config.json does not tie it to the embedding")
    if names.head("lm_head.weight", names.out["token_embd.weight"]) and tied:
        raise FileError("config.json ties lm_head.weight to the embedding, but it holds other values")
    for i in range(config.n_layers):
        _layer(names, config, i)
    names.drop(tuple(f"model.layers.{i}.self_attn.rotary_emb." for i in range(config.n_layers)))
    names.finish()
    notes = [f"tensors without a use at inference: {', '.join(names.idle)}"] if names.idle else []
    if memory and (ignored := sorted(set(memory) & source.TRAINING_ARGS)):
        notes.append(f"arguments for training only: {', '.join(ignored)}")
    return Source(config, names.out, path, notes)


def _layer(names: Names, config: ModelConfig, i: int) -> None:
    h, blk = f"model.layers.{i}.", f"blk.{i}."
    for theirs, ours in (
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.down_proj", "ffn_down"),
    ):
        names.move(h + theirs, blk + ours)
    if config.arch == "llama":  # its GGUF form rotates neighbouring channels, the folder's halves
        for name, heads in (("attn_q", config.layers[i].n_heads), ("attn_k", config.layers[i].n_kv_heads)):
            for end in (".weight", ".bias"):
                if tensor := names.out.get(blk + name + end):
                    rows = heads * config.head_dim
                    tensor.check((rows, config.d_model) if end == ".weight" else (rows,))
                    names.out[blk + name + end] = tensor.changed(tensor.shape, partial(_interleave, heads))
    source.take_memory(names, config, i, h + "self_attn.")


def _interleave(heads: int, x: F32) -> F32:
    """Rows of each head from (0 .. D/2-1, D/2 .. D-1) to (0, D/2, 1, D/2+1, ..).  [heads · D, ...]."""
    return x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def _config(hf: dict[str, Any], memory: Mapping[str, Any] | None, name: str) -> tuple[ModelConfig, F32 | None]:
    """The configuration, and the angles' divisors of a Llama 3 model."""

    def count(name: str, default: int | None = None) -> int:
        value = hf.get(name)
        value = default if value is None else value
        if value is None:
            raise FileError(f"{name} is missing from config.json")
        check_count(name, value, 1)
        return value

    kind = hf.get("model_type")
    if kind not in MODEL_TYPES:
        raise FileError(f"model_type {kind!r} is not supported; this version converts {', '.join(MODEL_TYPES)}")
    for key, harmless in (("hidden_act", "silu"), ("pretraining_tp", 1), ("partial_rotary_factor", 1.0)):
        if hf.get(key, harmless) != harmless:
            raise FileError(f"{key} {hf[key]!r} in config.json is not supported, only {harmless!r}")
    n_heads, d_model = count("num_attention_heads"), count("hidden_size")
    head_dim = count("head_dim", d_model // n_heads)
    if head_dim > LARGEST_HEAD:
        raise FileError(f"head_dim {head_dim} in config.json is more than this version's {LARGEST_HEAD}")
    rope, divisors = _rope(hf, head_dim, count("max_position_embeddings", 2048))
    window = hf.get("sliding_window") if hf.get("use_sliding_window", kind == "mistral") else None
    _check_layers(hf, kind, bool(window))
    own: dict[str, Any] = {"memory": "window" if window else "full", "window": window or 0}
    # llama.cpp runs a plain file with the full cache, whatever its window says: such a model is ours
    arch = "tcllama" if window else "qwen2" if kind == "qwen2" else "llama"
    if memory is not None:
        known = {*source.MEMORY_ARGS, *source.TENSOR_ARGS, *source.TRAINING_ARGS}
        source.refuse_unknown(memory, known, "tensor_cache")
        arch, own = "tcllama", source.memory_fields(memory, count("num_hidden_layers"))
    config = ModelConfig(
        arch=arch,
        name=name,
        vocab_size=count("vocab_size"),
        n_layers=count("num_hidden_layers"),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=count("num_key_value_heads", n_heads),
        head_dim=head_dim,
        d_ff=count("intermediate_size"),
        context_length=count("max_position_embeddings", 2048),
        norm_eps=typed(hf, "rms_norm_eps", 1e-6),
        **rope,
        **own,
    )
    return config, divisors


def _check_layers(hf: Mapping[str, Any], kind: str, window: bool) -> None:
    """Raises FileError where some layers have a window and others have none."""
    alike = ["sliding_attention" if window else "full_attention"]
    kinds = hf.get("layer_types") or alike
    if not isinstance(kinds, list) or any(one not in alike for one in kinds):
        raise FileError(f"layer_types in config.json: this version runs models whose layers are all {alike[0]} here")
    if kind == "qwen2" and window and hf.get("max_window_layers", 28) != 0 and "layer_types" not in hf:
        raise FileError("max_window_layers in config.json leaves the window to some layers, which is not supported")


def _rope(hf: dict[str, Any], head_dim: int, context: int) -> tuple[dict[str, Any], F32 | None]:
    """rope_base, rope_scaling, rope_factor; and for Llama 3 the divisor of each angle, float32 [head_dim / 2]."""
    told = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(told, dict):
        raise FileError("rope_scaling in config.json must be an object")
    base = typed(told, "rope_theta", typed(hf, "rope_theta", 10000.0))
    kind = told.get("rope_type", told.get("type", "default"))
    source.refuse_unknown(told, ROPE_ARGS | LLAMA3_ARGS, "rope_scaling")
    if kind == "default":
        return {"rope_base": base}, None
    if kind in ("linear", "llama3") and "factor" not in told:
        raise FileError("rope_scaling in config.json has no factor")
    factor = typed(told, "factor", 1.0)
    if kind == "linear":
        return {"rope_base": base, "rope_scaling": "linear", "rope_factor": factor}, None
    if kind != "llama3":
        raise FileError(f"rope_scaling {kind!r} is not supported; this version has linear and llama3")
    low, high = typed(told, "low_freq_factor", 1.0), typed(told, "high_freq_factor", 4.0)
    trained = typed(told, "original_max_position_embeddings", context)
    check_number("rope_theta", base, 0.0, above=True)
    check_number("factor", factor, 0.0, above=True)
    check_number("high_freq_factor", high, low, above=True)
    check_number("low_freq_factor", low, 0.0, above=True)
    check_count("original_max_position_embeddings", trained, 1)
    wavelength = 2 * math.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
    # 1 keeps an angle, `factor` slows it; between the two wavelengths the angle itself is interpolated
    keep = np.clip((trained / wavelength - low) / (high - low), 0, 1)
    return {"rope_base": base}, (1 / (keep + (1 - keep) / factor)).astype(np.float32)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileError(f"no {path.name} in this folder")
    if path.stat().st_size > LARGEST_CONFIG:
        raise FileError(f"{path.name} is too large to be a model's configuration")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as e:
        raise FileError(f"{path.name} is not valid JSON: {e}") from None
    if not isinstance(value, dict):
        raise FileError(f"{path.name} must hold an object")
    return value


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of every *.safetensors file by name, read when called; float32."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileError("no *.safetensors in this folder")
    have: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in _open(file).items():
            if name in have:
                raise FileError(f"tensor {name!r} is in two files")
            have[name] = tensor
    return have


def _open(file: Path) -> dict[str, Tensor]:
    """The tensors of one file. The library checks the whole header (lengths, overlaps, trailing bytes); NumPy has no
    bfloat16, so the bytes are viewed here."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):
            data = np.memmap(file, np.uint8, "r")
    except (SafetensorError, OSError, ValueError) as e:
        raise FileError(f"{file.name}: {e}") from None
    start = 8 + int(data[:8].view("<u8")[0])
    header = json.loads(data[8:start].tobytes())
    have: dict[str, Tensor] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in FLOATS:
            raise FileError(f"tensor {name!r} is {entry['dtype']}, not one of {', '.join(FLOATS)}")
        begin, end = entry["data_offsets"]
        load = partial(_load, data[start + begin : start + end], entry["dtype"], entry["shape"])
        have[name] = Tensor(name, tuple(entry["shape"]), load)
    return have


def _load(data: NDArray[np.uint8], dtype: str, shape: list[int]) -> F32:
    values = np.frombuffer(data.tobytes(), FLOATS[dtype])
    if dtype == "BF16":  # the upper half of a float32
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False).reshape(shape)
