"""The GGUF schema: which key and which tensor holds what. Shared by the converters and the loader.

Schema version 1. A file is an ordinary GGUF (version 3) with the standard key for everything that has one, below
`<arch>` = `general.architecture`, one of ours (`tcgpt`, the published GPT block; `tcllama`, the Llama block), so that
other runtimes refuse it; plain `llama` and `qwen2` files are read too, and then have no `tcinfer.` keys.

| key | holds |
|---|---|
| `tcinfer.schema_version` (u32) | 1; a newer one is refused |
| `<arch>.vocab_size`, `.context_length`, `.embedding_length`, `.block_count`, `.feed_forward_length` | sizes |
| `<arch>.attention.head_count`, `.head_count_kv`, `.key_length`, `.value_length` | heads |
| `<arch>.attention.layer_norm_epsilon` or `.layer_norm_rms_epsilon` | eps of the block's norm |
| `<arch>.attention.sliding_window` (u32) | tokens in the ring, sinks not counted; 0 is unbounded |
| `<arch>.rope.dimension_count`, `.freq_base`, `.scaling.type`, `.scaling.factor` | rotation; 0: learned positions |
| `tcinfer.memory.mechanism` (string) | a name of the registry in `memory/__init__.py` |
| `tcinfer.memory.sinks` (u32), `.sink_positions` (string), `.key_conv` (u32) | first level |
| `tcinfer.memory.<option>` | each option of the mechanism: the fields of `Options` in its room in `memory/` |

Heads, `feed_forward_length`, `sliding_window`, rotation and everything below `tcinfer.memory.` are one value for all
layers, or an array with one for each (an option that a layer's mechanism does not have is then ignored there).

A `tcinfer.` key that this version does not know, or that the file's mechanism does not have, is refused by name.
Tensors (NumPy order, [out, in]; matrices may be quantised, all else is float32 exactly as trained):

| tensor | shape | what |
|---|---|---|
| `token_embd.weight`, `output.weight` | [V, C] | embedding; head, absent where tied |
| `position_embd.weight`, `rope_freqs.weight` | [context, C], [D/2] | learned positions; divisors of the angles |
| `output_norm.*`, `blk.i.attn_norm.*`, `blk.i.ffn_norm.*` | [C] | weight, and bias where there is one |
| `blk.i.attn_{q,k,v,output}.*`, `blk.i.ffn_{up,gate,down}.*` | | projections: weight, and bias where there is one |
| `blk.i.attn_key_conv` | [2, G, D] | taps of the key convolution |

Those of a memory mechanism stand in its room (`memory/`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from tcinfer import architectures
from tcinfer.config import LAYERED, ModelConfig, check_count
from tcinfer.errors import FileError, TcinferError
from tcinfer.memory import MODES, room

SCHEMA_VERSION = 1
MOST_LAYERS = 2**16  # that an array may have values for
SCHEMA_KEY = "tcinfer.schema_version"
MEMORY = "tcinfer.memory."

# Field of ModelConfig -> key below `<arch>.`
STANDARD = {
    "vocab_size": "vocab_size",
    "context_length": "context_length",
    "d_model": "embedding_length",
    "n_layers": "block_count",
    "d_ff": "feed_forward_length",
    "n_heads": "attention.head_count",
    "n_kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "window": "attention.sliding_window",
    "rope_dim": "rope.dimension_count",
    "rope_base": "rope.freq_base",
    "rope_scaling": "rope.scaling.type",
    "rope_factor": "rope.scaling.factor",
}
SIZES = ("n_heads", "n_kv_heads", "d_ff")  # of these, plain files may hold a value for each layer
NORM_EPS = {"layer": "attention.layer_norm_epsilon", "rms": "attention.layer_norm_rms_epsilon"}
VALUE_LENGTH = "attention.value_length"
OLD_FACTOR = "rope.scale_linear"  # of plain files, before rope.scaling.*
# The same of plain files, with what they mean where they are absent
ORIGINAL = (
    ("rope_attention", "rope.scaling.attn_factor", 1.0),
    ("rope_original", "rope.scaling.original_context_length", 0),
)
# Field of ModelConfig -> key below `tcinfer.memory.`
FIRST_LEVEL = {"memory": "mechanism", "sinks": "sinks", "sink_positions": "sink_positions", "key_conv": "key_conv"}

# Keys of plain files that change the computation in ways this version does not have: (key below <arch>, harmless value)
UNSUPPORTED = {
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.scale": 0.0,
    "attention.kv_lora_rank": 0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "logit_scale": 1.0,
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
    "use_parallel_residual": False,
}


def to_metadata(config: ModelConfig) -> dict[str, Any]:
    """The keys that describe `config`, in order: key -> bool, int, float or str (32-bit in the file), or a list."""
    arch, kind = config.arch, architectures.architecture(config.arch)
    out: dict[str, Any] = {"general.architecture": arch}
    if config.name:
        out["general.name"] = config.name
    for name, key in STANDARD.items():
        if name in ("rope_scaling", "rope_factor") and config.rope_scaling == "none":
            continue
        if name == "window" and not (kind.OURS or config.window):  # a plain file says nothing where there is none
            continue
        out[f"{arch}.{key}"] = getattr(config, name)
    out[f"{arch}.{VALUE_LENGTH}"] = config.head_dim
    out[f"{arch}.{NORM_EPS[kind.NORM]}"] = config.norm_eps
    if not kind.OURS:
        for name, key, harmless in ORIGINAL:
            if getattr(config, name) != harmless:
                out[f"{arch}.{key}"] = getattr(config, name)
    if kind.OURS:
        out[SCHEMA_KEY] = SCHEMA_VERSION
        for name, key in FIRST_LEVEL.items():
            out[MEMORY + key] = getattr(config, name)
        out |= _options(config)
    if hasattr(kind, "write"):
        out |= kind.write(config)
    return {key: list(value) if type(value) is tuple else value for key, value in out.items()}


def _options(config: ModelConfig) -> dict[str, Any]:
    """The keys of the mechanisms' options: a layer that has no such option gets some other layer's."""
    out: dict[str, Any] = {}
    given = [layer.options for layer in config.layers]
    names = {f.name: None for options in given if options is not None for f in fields(options)}
    for name in names:
        there = [getattr(options, name, None) for options in given]
        first = next(value for value in there if value is not None)
        values = tuple(first if value is None else value for value in there)
        out[MEMORY + name] = first if len(set(values)) == 1 else values
    return out


def from_metadata(metadata: Mapping[str, Any], vocab_size: int, n_tensors: int) -> ModelConfig:
    """The configuration that a file's keys describe; `vocab_size` is the embedding's rows.

    Raises FileError (no path in it) for keys that are missing, of the wrong type, unknown or of a newer version, and
    TcinferError for values that no model can have.
    """
    arch = architecture(metadata)
    kind = architectures.architecture(arch)
    if kind.OURS:
        _check_schema(metadata)
    if _get(metadata, "split.count", int, 1) > 1:
        raise FileError("this is one part of a split model; join the parts first (llama-gguf-split --merge)")
    values: dict[str, Any] = {"arch": arch, "name": _get(metadata, "general.name", str, "")}
    for name, key in STANDARD.items():
        default = _default(metadata, arch, name, vocab_size, kind.OURS)
        type_ = str if name == "rope_scaling" else float if name in ("rope_base", "rope_factor") else int
        layered = name in (LAYERED if kind.OURS else SIZES)
        values[name] = _get(metadata, f"{arch}.{key}", type_, default, layered)
    if not kind.OURS:
        for name, key, harmless in ORIGINAL:
            values[name] = _get(metadata, f"{arch}.{key}", type(harmless), harmless)
    values["norm_eps"] = _get(metadata, f"{arch}.{NORM_EPS[kind.NORM]}", float)
    if values["vocab_size"] != vocab_size:
        raise FileError(f"{arch}.vocab_size is {values['vocab_size']}, but the embedding has {vocab_size} rows")
    if values["n_layers"] > n_tensors:
        raise FileError(f"{arch}.block_count is {values['n_layers']}, but the file has {n_tensors} tensors")
    if _get(metadata, f"{arch}.{VALUE_LENGTH}", int, values["head_dim"]) != values["head_dim"]:
        raise FileError(f"{arch}.{VALUE_LENGTH} differs from the key length, which this version does not run")
    if kind.OURS:
        values |= _read_memory(metadata, arch, values)
    else:
        values["memory"] = "window" if values["window"] else "full"
        handled = getattr(kind, "KEYS", ())
        for key, harmless in UNSUPPORTED.items():
            found = _get(metadata, f"{arch}.{key}", type(harmless), harmless)
            if found != harmless and key not in handled:
                raise FileError(f"{arch}.{key} = {found:g} is not supported by this version")
    if hasattr(kind, "read"):
        kind.read(values, lambda key, default: _get(metadata, f"{arch}.{key}", type(default), default, layered=True))
    return ModelConfig(**values)


def architecture(metadata: Mapping[str, Any]) -> str:
    """The file's architecture. Raises FileError if it has none, or one that this version does not run."""
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str):
        raise FileError("key 'general.architecture' is missing: this file is no model")
    try:
        architectures.architecture(arch)
    except TcinferError as e:
        raise FileError(str(e)) from None
    return arch


def _check_schema(metadata: Mapping[str, Any]) -> None:
    version = _get(metadata, SCHEMA_KEY, int)
    if version != SCHEMA_VERSION:
        raise FileError(
            f"{SCHEMA_KEY} is {version}, this version of tcinfer reads {SCHEMA_VERSION}: "
            + ("update tcinfer" if version > SCHEMA_VERSION else "convert the checkpoint again")
        )


def _default(metadata: Mapping[str, Any], arch: str, name: str, vocab_size: int, ours: bool) -> Any:
    """What a standard key means where it is absent; None where it must be there."""

    def number(field: str) -> Any:
        return _get(metadata, f"{arch}.{STANDARD[field]}", int, layered=field in LAYERED)

    if name == "vocab_size":
        return vocab_size
    if name == "n_kv_heads":
        return number("n_heads")
    if name == "head_dim":
        heads = number("n_heads")
        return number("d_model") // max(1, heads if type(heads) is int else max(heads, default=1))
    if name == "rope_factor":
        return 1.0 if ours else _get(metadata, f"{arch}.{OLD_FACTOR}", float, 1.0)
    if name == "rope_scaling":  # of a plain file that gives a factor alone, linear is meant
        scaled = not ours and {f"{arch}.{STANDARD['rope_factor']}", f"{arch}.{OLD_FACTOR}"} & set(metadata)
        return "linear" if scaled else "none"
    if not ours:
        plain = {"rope_dim": -1, "window": 0, "rope_base": 10000.0, "context_length": 0}
        return plain.get(name)
    return None


def _read_memory(metadata: Mapping[str, Any], arch: str, standard: Mapping[str, Any]) -> dict[str, Any]:
    """The `tcinfer.memory.` keys as arguments of ModelConfig; standard: those of the standard keys."""
    n_layers = standard["n_layers"]
    values = {
        name: _get(metadata, MEMORY + key, int if name in ("sinks", "key_conv") else str, layered=True)
        for name, key in FIRST_LEVEL.items()
    }
    named = values["memory"] if type(values["memory"]) is tuple else (values["memory"],)
    known = {SCHEMA_KEY, *(MEMORY + key for key in FIRST_LEVEL.values())}
    chosen: dict[str, dict[str, Any]] = {}  # by mode: its options, one value or one for each layer
    for mode in dict.fromkeys(named):
        if mode not in MODES:
            raise FileError(f"{MEMORY}mechanism {mode!r} is not known to this version, which has {', '.join(MODES)}")
        made = room(mode).Options
        if made is not None:
            chosen[mode] = {
                f.name: _get(metadata, MEMORY + f.name, type(f.default), layered=True) for f in fields(made)
            }
            known |= {MEMORY + name for name in chosen[mode]}
    for mode in chosen:  # of files from before layers could differ
        top = MEMORY + getattr(room(mode), "TOP_KEY", "")
        if top in metadata:
            known.add(top)
            values["memory"] = top_layers(mode, _get(metadata, top, int), n_layers, standard["window"], values["sinks"])
    modes = values["memory"] if type(values["memory"]) is tuple else (values["memory"],) * n_layers
    if any(type(value) is tuple and len(value) != n_layers for value in (modes, *values.values())):
        raise FileError(f"an array below {MEMORY} has not one value for each of {n_layers} layers")
    values["options"] = tuple(_chosen(mode, chosen.get(mode), i, n_layers) for i, mode in enumerate(modes))
    known |= {f"{arch}.{key}" for key in (*STANDARD.values(), *NORM_EPS.values(), VALUE_LENGTH)}
    for key in metadata:
        if key.startswith(("tcinfer.", f"{arch}.")) and key not in known:
            modes_read = ", ".join(dict.fromkeys(modes))
            raise FileError(
                f"key {key!r} is not known to this version of tcinfer (memory {modes_read}): update tcinfer"
            )
    return values


def top_layers(mode: str, top: int, n_layers: int, window: int, sinks: int) -> str | tuple[str, ...]:
    """The memories of a model whose `top` last layers alone have `mode`; below 0: all of them have."""
    plain = "sinks" if sinks else "window" if window else "full"
    if not 0 <= top < n_layers:
        return mode
    check_count("the number of layers", n_layers, 1, MOST_LAYERS)
    return tuple(mode if i >= n_layers - top else plain for i in range(n_layers))


def _chosen(mode: str, chosen: dict[str, Any] | None, layer: int, n_layers: int) -> Any:
    """The options of a layer, or None where its mechanism has none."""
    if chosen is None:
        return None
    for name, value in chosen.items():
        if type(value) is tuple and len(value) != n_layers:
            raise FileError(f"key {MEMORY + name!r} has {len(value)} values, and the model {n_layers} layers")
    return room(mode).Options(**{n: v[layer] if type(v) is tuple else v for n, v in chosen.items()})


def _get(metadata: Mapping[str, Any], key: str, kind: type, default: Any = None, layered: bool = False) -> Any:
    """metadata[key] as `kind` (whole numbers serve for floats); layered: or an array of them, as a tuple.

    FileError if it is missing or of another kind.
    """
    value = metadata.get(key, default)
    if value is None:
        raise FileError(f"key {key!r} is missing")
    if layered and isinstance(value, list | np.ndarray | tuple):
        listed = value.tolist() if isinstance(value, np.ndarray) else list(value)
        if len(listed) <= MOST_LAYERS:
            flags = kind is int and all(type(one) is bool for one in listed)  # a list of yes and no
            return tuple(_get({key: one}, key, bool if flags else kind) for one in listed)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        shown = f"an array of {len(value)}" if isinstance(value, list | np.ndarray) else repr(value)
        raise FileError(f"key {key!r} must be of type {kind.__name__}, not {shown}")
    return value
