"""The published trainer's arguments and tensors of a memory; those of a mechanism stand in its room (checkpoint.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from typing import Any

from tcinfer.config import ModelConfig
from tcinfer.converters.source import Names, typed
from tcinfer.errors import FileError
from tcinfer.gguf.schema import top_layers
from tcinfer.memory import MODES, room

# Arguments of the first level, with the trainer's defaults.
FIRST_LEVEL = {"use_kv_cache": True, "kv_window": 512, "kv_num_sinks": 0, "key_conv": 0}
# By mode: how checkpoints name it. The first that is enabled counts: infini before tensor, as in the trainer.
CHECKPOINTS: dict[str, Any] = {
    mode: import_module(f"{room(mode).__name__}.checkpoint") for mode, row in MODES.items() if row.needs_weights
}
TRAINING = {"dropout", *(arg for checkpoint in CHECKPOINTS.values() for arg in checkpoint.TRAINING)}


def defaults() -> dict[str, Any]:
    """Every argument that bears on inference, with the trainer's default."""
    found = dict(FIRST_LEVEL)
    for mode, checkpoint in CHECKPOINTS.items():
        own = {f.name: f.default for f in fields(room(mode).Options)}
        found |= {checkpoint.ENABLED: False} | {arg: own[name] for arg, name in checkpoint.ARGS.items()}
        found |= {checkpoint.TOP: -1} if checkpoint.TOP else {}
    return found


def memory_fields(args: Mapping[str, Any], n_layers: int) -> dict[str, Any]:
    """The memory of a model by the trainer's model_args, as arguments of ModelConfig. Raises FileError."""
    a = {name: typed(args, name, default) for name, default in defaults().items()}
    window = a["kv_window"] if a["use_kv_cache"] else 0
    sinks = a["kv_num_sinks"] if window else 0
    if window and not 0 <= sinks < window:
        raise FileError(f"kv_num_sinks {sinks} leaves no room in kv_window {window}")
    shared = {"window": window - sinks, "sinks": sinks, "key_conv": a["key_conv"]}
    for mode, checkpoint in CHECKPOINTS.items():
        if a[checkpoint.ENABLED]:
            options = room(mode).Options(**{name: a[arg] for arg, name in checkpoint.ARGS.items()})
            top = a[checkpoint.TOP] if checkpoint.TOP else -1
            modes = top_layers(mode, top, n_layers, shared["window"], sinks)
            own = tuple(options if one == mode else None for one in modes) if type(modes) is tuple else options
            return {"memory": modes, "options": own, **shared}
    return {"memory": "sinks" if sinks else "window" if window else "full", **shared}


def take_memory(names: Names, config: ModelConfig, layer: int, prefix: str, args: Mapping[str, Any]) -> None:
    """The memory's tensors of one layer, from the trainer's names below `prefix`; args: its model_args.

    Those of layers that have no part of an enabled mechanism are left out.
    """
    blk, own = f"blk.{layer}.", config.layer(layer)
    if own.key_conv:
        names.out[blk + "attn_key_conv"] = names.take(prefix + "key_conv.weight")
    for mode, checkpoint in CHECKPOINTS.items():
        if own.memory == mode:
            checkpoint.take(names, own, blk, prefix)
        elif args.get(checkpoint.ENABLED):
            names.drop(tuple(prefix + end for end in checkpoint.PREFIXES))
