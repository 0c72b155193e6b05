"""How the published trainer's checkpoints name Infini-attention: arguments and tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tcinfer.config import LayerConfig

ENABLED, TOP = "infini_enabled", ""
ARGS = {"infini_update_rule": "rule"}  # model_args -> field of Options
TRAINING = {"infini_segment_size"}
PREFIXES = ("infini.",)  # of its tensors


def take(names: Any, layer: LayerConfig, blk: str, prefix: str) -> None:
    """Move a layer's tensors from below `prefix` to below `blk` (names: converters.source.Names)."""
    names.out[blk + "infini_beta"] = names.take(prefix + "infini.beta")
