"""How the published trainer's checkpoints name Tensor Cache: arguments and tensors."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tcinfer.config import LayerConfig

ENABLED, TOP = "tc_enabled", "tc_layers"  # the second: how many of the top layers have it, -1 for all
ARGS = {  # model_args -> field of Options
    "tc_update_rule": "rule",
    "tc_write_on_evict": "write_on_evict",
    "tc_write_on_insert": "write_on_insert",
    "tc_write_then_read": "write_then_read",
    "tc_num_slots": "slots",
    "tc_read_topk": "read_topk",
    "tc_router_temp": "router_temperature",
    "tc_write_route": "write_route",
    "tc_two_timescales": "two_timescales",
    "tc_per_token_gate": "token_gate",
    "tc_normalize_k": "normalize_k",
    "tc_normalize_q": "normalize_q",
    "tc_normalize_read": "normalize_read",
    "tc_normalize_read_eps": "normalize_read_eps",
    "tc_value_scale": "value_scale",
    "tc_rope": "rope",
    "tc_token_rate": "token_rate",
    "tc_token_decay": "token_decay",
}
TRAINING = {
    *("tc_chunk_size", "tc_decay_init", "tc_lr_init", "tc_gate_init", "tc_decay_slow_init", "tc_lr_slow_init"),
    *("tc_alpha_init", "tc_use_in_full_forward", "tc_freeze_decay_lr"),
}
PREFIXES = ("tc.", "tc_")  # of its tensors


def take(names: Any, layer: LayerConfig, blk: str, prefix: str) -> None:
    """Move a layer's tensors from below `prefix` to below `blk` (names: converters.source.Names)."""
    out, o, heads, width = names.out, layer.options, (layer.n_kv_heads,), layer.d_model
    for ours, theirs in (("tc_decay", "tc.logit_decay_"), ("tc_rate", "tc.logit_lr_")):
        speeds = [names.take(prefix + theirs + s).check(heads) for s in ("fast", "slow")[: o.timescales]]
        out[blk + ours] = speeds[0].changed((len(speeds), *heads), partial(_stacked, speeds[1:]))
    names.move(prefix + "tc_proj", blk + "tc_output")
    if o.token_gate:
        weight = names.take(prefix + "tc_gate_proj.weight").check((1, width))
        out[blk + "tc_gate.weight"] = weight.changed((width,), np.ravel)
        out[blk + "tc_gate.bias"] = names.take(prefix + "tc_gate_proj.bias")
    else:
        out[blk + "tc_gate.bias"] = names.take(prefix + "tc_gate").check((1,), ()).changed((1,), np.ravel)
    for wanted, ours, theirs in (
        (o.two_timescales, "tc_alpha", "tc.logit_alpha"),
        (o.slots > 1, "tc_slot_keys", "tc.slot_keys"),
        (o.token_rate, "tc_rate_proj", "tc.rate_proj.weight"),
        (o.token_decay, "tc_decay_proj", "tc.decay_proj.weight"),
    ):
        if wanted:
            out[blk + ours] = names.take(prefix + theirs)


def _stacked(rest: list[Any], first: Any) -> Any:
    return np.stack([first, *(part.load() for part in rest)])
