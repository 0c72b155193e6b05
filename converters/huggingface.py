"""A Hugging Face style folder: `config.json` and `*.safetensors`, a Tensor Cache beside if any.

What is special in an architecture stands in its file (tcinfer/architectures). A model of the Llama family with the full
cache becomes a plain `llama` or `qwen2` file, which other runtimes read too; one with a sliding window, or with
`tensor_cache` in config.json (the trainer's model_args by name), becomes `tcllama`.
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

from tcinfer.architectures import ARCHITECTURES, architecture
from tcinfer.config import ModelConfig, check_count, check_number
from tcinfer.converters import source, trainer_args
from tcinfer.converters.source import F32, Names, Source, Tensor, typed
from tcinfer.errors import FileError

CONFIG = "config.json"
LARGEST_CONFIG = 2**20  # bytes
LARGEST_HEAD = 2**16  # channels; far beyond any model, and it bounds the angles that are computed here
FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
ROPE_ARGS = {"rope_type", "type", "rope_theta", "factor", "partial_rotary_factor"}
YARN_ARGS = {"attention_factor": None, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}  # and what they must be
LLAMA3_ARGS = {"low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
REMEMBER = ("llama", "qwen2", "tcllama")  # what may have a Tensor Cache beside


def recognises(path: Path) -> bool:
    return path.is_dir()


def read(path: Path) -> Source:
    """Raises FileError for a folder that is no such model, or holds what this version does not know."""
    hf, have = _text_half(_read_json(path / CONFIG), _read_tensors(path))
    memory = hf.get("tensor_cache")
    if memory is not None and not isinstance(memory, dict):
        raise FileError("tensor_cache in config.json must be an object")
    config, arrays = _config(hf, memory, source.name_of(path.resolve()))
    names = Names(have)
    for name, values in arrays.items():
        names.out[name] = Tensor(name, values.shape, partial(np.asarray, values))
    kind = architecture(_architecture(hf))
    plain = config.arch == _architecture(hf)  # a file of ours has the rows of a folder
    names.move("model.embed_tokens", "token_embd")
    names.move("model.norm", "output_norm")
    if plain and hasattr(kind, "converted"):
        names.out["output_norm.weight"] = kind.converted(
            config, 0, "output_norm.weight", names.out["output_norm.weight"]
        )
    tied = hf.get("tie_word_embeddings", getattr(kind, "TIED", False))
    if not tied and "lm_head.weight" not in have:
        raise FileError("tensor 'lm_head.weight' is missing, and config.json does not tie it to the embedding")
    if names.head("lm_head.weight", names.out["token_embd.weight"]) and tied:
        raise FileError("config.json ties lm_head.weight to the embedding, but it holds other values")
    for i in range(config.n_layers):
        _layer(names, config, i, kind, plain, memory or {})
    names.drop(tuple(f"model.layers.{i}.self_attn.rotary_emb." for i in range(config.n_layers)))
    names.finish()
    notes = [f"tensors without a use at inference: {', '.join(names.idle)}"] if names.idle else []
    if memory and (ignored := sorted(set(memory) & trainer_args.TRAINING)):
        notes.append(f"arguments for training only: {', '.join(ignored)}")
    return Source(config, names.out, path, notes)


def _text_half(hf: dict[str, Any], have: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Of a model that also sees or hears, what it writes with; another model as it is."""
    text = hf.get("text_config")
    if not isinstance(text, dict):
        return hf, have
    found = {}
    for name, tensor in have.items():
        for prefix, plain in (("language_model.", ""), ("model.language_model.", "model.")):
            if name.startswith(prefix):
                found[plain + name.removeprefix(prefix)] = tensor
    return text, found


def _layer(names: Names, config: ModelConfig, i: int, kind: Any, plain: bool, memory: Mapping[str, Any]) -> None:
    """A layer's tensors by the names of the architecture; plain: made as its files have them."""
    h, blk = f"model.layers.{i}.", f"blk.{i}."
    before = set(names.out)
    for theirs, ours in kind.NAMES.items():
        names.move(h + theirs, blk + ours)
    if plain and hasattr(kind, "converted"):
        for name in names.out.keys() - before:
            names.out[name] = kind.converted(config, i, name.removeprefix(blk), names.out[name])
    trainer_args.take_memory(names, config, i, h + "self_attn.", memory)


def _architecture(hf: Mapping[str, Any]) -> str:
    """The architecture of a folder's model_type. Raises FileError for one that this version does not convert."""
    known = {name: arch for arch in ARCHITECTURES for name in getattr(architecture(arch), "HUGGING_FACE", ())}
    kind = hf.get("model_type")
    if not isinstance(kind, str) or kind not in known:
        raise FileError(f"model_type {kind!r} is not supported; this version converts {', '.join(known)}")
    return known[kind]


def _config(
    hf: dict[str, Any], memory: Mapping[str, Any] | None, name: str
) -> tuple[ModelConfig, Mapping[str, NDArray[np.float32]]]:
    """The configuration, and tensors that config.json holds: divisors of the angles."""

    def count(name: str, default: int | None = None) -> int:
        value = hf.get(name)
        value = default if value is None else value
        if value is None:
            raise FileError(f"{name} is missing from config.json")
        check_count(name, value, 1)
        return value

    arch = _architecture(hf)
    kind = architecture(arch)
    activation = getattr(kind, "ACTIVATION", "silu")
    for key, harmless in (("hidden_act", activation), ("hidden_activation", activation), ("pretraining_tp", 1)):
        if (hf.get(key) or harmless) != harmless:
            raise FileError(f"{key} {hf[key]!r} in config.json is not supported, only {harmless!r}")
    n_heads, d_model = count("num_attention_heads"), count("hidden_size")
    head_dim = count("head_dim", d_model // n_heads)
    if head_dim > LARGEST_HEAD:
        raise FileError(f"head_dim {head_dim} in config.json is more than this version's {LARGEST_HEAD}")
    values: dict[str, Any] = {
        "arch": arch,
        "name": name,
        "vocab_size": count("vocab_size"),
        "n_layers": count("num_hidden_layers"),
        "d_model": d_model,
        "n_heads": n_heads,
        "n_kv_heads": count("num_key_value_heads", n_heads),
        "head_dim": head_dim,
        "d_ff": count("intermediate_size"),
        "context_length": count("max_position_embeddings", 2048),
        "norm_eps": typed(hf, "rms_norm_eps", 1e-6),
    }
    rope, divisors = _rope(hf, head_dim, values["context_length"], getattr(kind, "ROPE_TYPES", ()))
    values |= rope
    arrays = {} if divisors is None else {"rope_freqs.weight": divisors}
    arrays |= kind.from_hugging_face(hf, values) or {}
    if hf.get("partial_rotary_factor", 1.0) != 1.0 and "rope_dim" not in values:
        raise FileError(
            f"partial_rotary_factor {hf['partial_rotary_factor']!r} in config.json is not supported, only 1.0"
        )
    if memory is not None:
        if values["arch"] not in REMEMBER:
            raise FileError(f"tensor_cache in config.json does not go with model_type {hf['model_type']!r}")
        known = {*trainer_args.defaults(), *trainer_args.TRAINING}
        source.refuse_unknown(memory, known, "tensor_cache")
        values |= {"arch": "tcllama"} | trainer_args.memory_fields(memory, values["n_layers"])
    return ModelConfig(**values), arrays


def original(told: Mapping[str, Any], hf: Mapping[str, Any], context: int) -> int:
    """Tokens that a model was trained with before its context was made longer. Raises FileError, TcinferError."""
    name = "original_max_position_embeddings"
    found = told.get(name, hf.get(name, context))
    check_count(name, found, 1)
    return found


def _rope(hf: dict[str, Any], head_dim: int, context: int, own: tuple[str, ...]) -> tuple[dict[str, Any], F32 | None]:
    """rope_base, rope_scaling, rope_factor; and for Llama 3 the divisor of each angle, float32 [head_dim / 2].

    own: scalings that the architecture reads itself.
    """
    told = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if isinstance(told, dict) and "full_attention" in told:  # by kind of layer
        told = told["full_attention"]
    if not isinstance(told, dict):
        raise FileError("rope_scaling in config.json must be an object")
    base = typed(told, "rope_theta", typed(hf, "rope_theta", 10000.0))
    kind = told.get("rope_type", told.get("type", "default"))
    if kind in own:
        return {"rope_base": base}, None
    source.refuse_unknown(told, {*ROPE_ARGS, *LLAMA3_ARGS, *YARN_ARGS}, "rope_scaling")
    for name, must in YARN_ARGS.items():
        if must is not None and told.get(name, must) != must:
            raise FileError(f"{name} {told[name]!r} in config.json is not supported, only {must!r}")
    if kind == "default":
        return {"rope_base": base}, None
    if kind in ("linear", "yarn", "llama3") and "factor" not in told:
        raise FileError("rope_scaling in config.json has no factor")
    factor = typed(told, "factor", 1.0)
    if kind in ("linear", "yarn"):
        scaled: dict[str, Any] = {"rope_base": base, "rope_scaling": kind, "rope_factor": factor}
        if kind == "yarn":
            own_factor = 1 + 0.1 * math.log(max(1.0, factor))  # that YaRN itself makes of it
            attention = typed(told, "attention_factor", own_factor)
            scaled |= {"rope_original": original(told, hf, context), "rope_attention": attention / own_factor}
        return scaled, None
    if kind != "llama3":
        raise FileError(f"rope_scaling {kind!r} is not supported; this version has linear, yarn and llama3")
    low, high = typed(told, "low_freq_factor", 1.0), typed(told, "high_freq_factor", 4.0)
    trained = original(told, hf, context)
    check_number("rope_theta", base, 0.0, above=True)
    check_number("factor", factor, 0.0, above=True)
    check_number("high_freq_factor", high, low, above=True)
    check_number("low_freq_factor", low, 0.0, above=True)
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
