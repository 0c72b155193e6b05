"""What a model file holds, for people."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields
from os import PathLike

import numpy as np

from tcinfer import memory, reader, tokenizer
from tcinfer.config import ModelConfig
from tcinfer.errors import FileError, TcinferError
from tcinfer.kernels.reference.pointwise import sigmoid
from tcinfer.loader import bind, bundled, read_config

SHOWN = (
    "arch",
    "name",
    "vocab_size",
    "n_layers",
    "d_model",
    "n_heads",
    "n_kv_heads",
    "head_dim",
    "d_ff",
    "context_length",
    "norm_eps",
    "rope_dim",
    "rope_base",
    "rope_scaling",
    "rope_factor",
    "memory",
    "window",
    "sinks",
    "sink_positions",
    "key_conv",
)


def report(path: str | PathLike[str] | None = None) -> str:
    """The configuration, the memory with its learned gates, decays and rates, the state's bytes, the tensors.

    Raises TcinferError for a file that this version cannot run.
    """
    file = reader.read(bundled() if path is None else path)
    try:
        config = read_config(file)
        weights = bind(config, file.tensors)
        words = tokenizer.from_metadata(file.metadata, config.vocab_size)
    except TcinferError as e:
        raise FileError(f"{file.path}: {e}") from e
    lines = [f"{_shown(file.path)}: GGUF version {file.version}, {file.path.stat().st_size:,} bytes"]
    lines += [f"{name:<22}{_shown(getattr(config, name))}" for name in SHOWN]
    if config.options is not None:
        lines += [f"  {f.name:<20}{_shown(getattr(config.options, f.name))}" for f in fields(config.options)]
    kind = file.metadata.get(tokenizer.MODEL, "tokenizer.json" if words.vocab_size else "none")
    lines.append(f"{'tokenizer':<22}{kind}, {words.vocab_size:,} tokens")
    size = memory.layout(config).nbytes
    lines.append(
        f"{'state':<22}{size:,} bytes a session, whatever its length"
        if memory.bounded(config)
        else f"{'state':<22}grows by {_bytes_per_token(config):,} bytes a token"
    )
    for i in range(config.n_layers):
        lines += _learned(i, {k.split(".", 2)[2]: v for k, v in weights.items() if k.startswith(f"blk.{i}.")})
    kinds = Counter(tensor.kind.name for tensor in file.tensors.values())
    count = sum(int(np.prod(tensor.shape, dtype=np.int64)) for tensor in file.tensors.values())
    lines.append(f"{'parameters':<22}{count:,} in {len(file.tensors)} tensors")
    lines.append(f"{'tensor types':<22}{', '.join(f'{n} {kind}' for kind, n in kinds.most_common())}")
    return "\n".join(lines)


def _bytes_per_token(config: ModelConfig) -> int:
    return memory.layout(config, 2).nbytes - memory.layout(config, 1).nbytes


def _learned(layer: int, w: dict[str, np.ndarray]) -> list[str]:
    """A line on what the memory of a layer has learned, or none."""
    parts = []
    for name, label in (
        ("tc_gate.bias", "gate"),
        ("tc_decay", "decay"),
        ("tc_rate", "write rate"),
        ("tc_alpha", "alpha"),
    ):
        if name in w:
            parts.append(f"{label} {_span(sigmoid(w[name]))}")
    if "infini_beta" in w:
        parts.append(f"memory's share {_span(sigmoid(w['infini_beta']))}")
    return [f"  layer {layer:<14}{', '.join(parts)}"] if parts else []


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"  # a float32 of a file has no more digits than that
    return "".join(c if c.isprintable() else "?" for c in str(value))


def _span(x: np.ndarray) -> str:
    low, high = float(x.min()), float(x.max())
    return f"{low:.5g}" if low == high else f"{low:.5g} to {high:.5g}"
