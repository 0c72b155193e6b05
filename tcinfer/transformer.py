"""The whole model as one wiring: embedding, the blocks of its architecture, norm and head."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tcinfer.architectures import architecture
from tcinfer.config import ModelConfig
from tcinfer.memory import layout
from tcinfer.net import Dry, Net, Recorder, Spec


def transformer(
    recorder: Recorder,
    config: ModelConfig,
    weights: Callable[[str, Spec], Any],
    shares: dict[int, NDArray[np.float32]] | None = None,
) -> None:
    """Wire the model, its logits last; weights and shares as Net takes them."""
    kind = architecture(config.arch)
    net = Net(recorder, config, weights, layout(config).layers, kind, shares)
    x = kind.embed(net) if hasattr(kind, "embed") else net.embed()
    recorder.hold()
    for i in range(config.n_layers):
        net.enter(i)
        x = kind.block(net, x)
        recorder.reuse()
    net.logits(net.norm(x, "output_norm", kind.NORM, whole=True))


QKV = {"attn_qkv": ("attn_q", "attn_k", "attn_v")}  # any file may have them fused


def fused(
    config: ModelConfig, specs: Mapping[str, Spec], more: Mapping[str, tuple[str, ...]] | None = None
) -> dict[str, tuple[str, ...]]:
    """Names of tensors in which files of an architecture hold several of `specs`, rows one after another: -> those.

    more: what others may hold beside what its FUSED says.
    """
    found = {}
    for whole, parts in {**(more or {}), **getattr(architecture(config.arch), "FUSED", {})}.items():
        for i in range(config.n_layers):
            for end in ("weight", "bias"):
                names = tuple(f"blk.{i}.{part}.{end}" for part in parts)
                if all(name in specs for name in names):
                    found[f"blk.{i}.{whole}.{end}"] = names
    return found


def file_tensors(config: ModelConfig, names: Collection[str] = ()) -> dict[str, Spec]:
    """Every tensor of a file, by its name there; those that `names` has apart are not fused."""
    specs = tensors(config)
    for whole, parts in fused(config, specs, QKV if any("attn_qkv" in name for name in names) else None).items():
        if all(part in names for part in parts):
            continue
        those = [specs.pop(part) for part in parts]
        rows = sum(spec.shape[0] for spec in those)
        specs[whole] = those[0]._replace(shape=(rows, *those[0].shape[1:]))
    return specs


def tensors(config: ModelConfig) -> dict[str, Spec]:
    """Every weight that a model of this configuration has, by its GGUF name."""
    dry = Dry()
    transformer(dry, config, dry.weights)
    return dry.specs
