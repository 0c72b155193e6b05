"""What every checkpoint family turns into before it is written: a configuration and named tensors."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tcinfer.config import ModelConfig
from tcinfer.errors import FileError
from tcinfer.format import top_layers
from tcinfer.memory import infini, tensor_cache

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint, its values still in the file."""

    name: str  # as the checkpoint has it
    shape: tuple[int, ...]
    load: Callable[[], F32]

    def check(self, *shapes: tuple[int, ...]) -> Tensor:
        """Itself, if it has one of these shapes; else FileError."""
        if self.shape not in shapes:
            raise FileError(f"tensor {self.name!r} has shape {list(self.shape)}, the model needs {list(shapes[0])}")
        return self

    def changed(self, shape: tuple[int, ...], change: Callable[[F32], F32]) -> Tensor:
        """What `change` makes of it, of shape `shape`."""
        return Tensor(self.name, shape, lambda: change(self.load()))


@dataclass
class Source:
    """A checkpoint, read far enough to be written."""

    config: ModelConfig
    tensors: dict[str, Tensor]  # by GGUF name, NumPy order
    folder: Path | None  # where a tokenizer may lie
    notes: list[str] = field(default_factory=list)  # what the file holds that inference does not use
    keys: dict[str, Any] = field(default_factory=dict)  # metadata to keep beside what the configuration says
    packed: tuple[str, ...] = ()  # quantised kinds among the tensors


# model_args of the memory (mechanisms.md 1.2, memory-that-works.md 4) -> field of tensor_cache.Options
TENSOR_ARGS = {
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
# The rest of the memory's model_args, with the trainer's defaults.
MEMORY_ARGS = {
    "use_kv_cache": True,
    "kv_window": 512,
    "kv_num_sinks": 0,
    "tc_enabled": False,
    "infini_enabled": False,
    "tc_layers": -1,
    "infini_update_rule": infini.Options.rule,
    "key_conv": 0,
}
TRAINING_ARGS = {
    "dropout",
    "tc_chunk_size",
    "tc_decay_init",
    "tc_lr_init",
    "tc_gate_init",
    "tc_decay_slow_init",
    "tc_lr_slow_init",
    "tc_alpha_init",
    "tc_use_in_full_forward",
    "tc_freeze_decay_lr",
    "infini_segment_size",
}


def memory_fields(args: Mapping[str, Any], n_layers: int) -> dict[str, Any]:
    """The memory of a model by the trainer's model_args, as arguments of ModelConfig. Raises FileError."""
    defaults = {f.name: f.default for f in fields(tensor_cache.Options)}
    wanted = MEMORY_ARGS | {arg: defaults[name] for arg, name in TENSOR_ARGS.items()}
    a = {name: typed(args, name, default) for name, default in wanted.items()}
    window = a["kv_window"] if a["use_kv_cache"] else 0
    sinks = a["kv_num_sinks"] if window else 0
    if window and not 0 <= sinks < window:
        raise FileError(f"kv_num_sinks {sinks} leaves no room in kv_window {window}")
    shared = {"window": window - sinks, "sinks": sinks, "key_conv": a["key_conv"]}
    if a["infini_enabled"]:  # wins over tc_enabled
        return {"memory": "infini", "options": infini.Options(rule=a["infini_update_rule"]), **shared}
    if a["tc_enabled"]:
        options = tensor_cache.Options(**{name: a[arg] for arg, name in TENSOR_ARGS.items()})
        modes = top_layers(a["tc_layers"], n_layers, shared["window"], shared["sinks"])
        if type(modes) is tuple:
            return {"memory": modes, "options": tuple(options if m == "tensor" else None for m in modes), **shared}
        return {"memory": modes, "options": options, **shared}
    return {"memory": "sinks" if sinks else "window" if window else "full", **shared}


class Names:
    """The tensors of a checkpoint, each taken once: what is left at the end had no use."""

    def __init__(self, have: Mapping[str, Tensor], biases: bool | None = None) -> None:
        """biases: whether every projection and norm that is moved has one (None: each as it is)."""
        self._left = dict(have)
        self.biases = biases
        self.out: dict[str, Tensor] = {}  # by GGUF name
        self.idle: list[str] = []  # known, but switched off by an option

    def maybe(self, name: str) -> Tensor | None:
        return self._left.pop(name, None)

    def take(self, name: str) -> Tensor:
        """Raises FileError if it is not there."""
        tensor = self.maybe(name)
        if tensor is None:
            raise FileError(f"tensor {name!r} is missing")
        return tensor

    def move(self, theirs: str, ours: str) -> None:
        """A weight, and its bias: one that `biases` asks for, or any that is there."""
        self.out[ours + ".weight"] = self.take(theirs + ".weight")
        bias = self.take(theirs + ".bias") if self.biases else self.maybe(theirs + ".bias")
        if bias is not None and self.biases is False:
            raise FileError(f"tensor {bias.name!r} is there, but the model has no biases")
        if bias is not None:
            self.out[ours + ".bias"] = bias

    def head(self, name: str, embedding: Tensor) -> bool:
        """The head, unless it is the embedding itself; whether it is one of its own."""
        head = self.maybe(name)
        own = head is not None and not np.array_equal(head.load(), embedding.load())
        if head is not None and own:
            self.out["output.weight"] = head
        return own

    def drop(self, prefixes: tuple[str, ...]) -> None:
        """Leave out what begins so, and remember it."""
        for name in [n for n in self._left if n.startswith(prefixes)]:
            del self._left[name]
            self.idle.append(name)

    def finish(self) -> None:
        """Raises FileError for a tensor that nothing took."""
        for name in self._left:
            raise FileError(f"tensor {name!r} is not used by a model with these options")


def take_memory(names: Names, config: ModelConfig, layer: int, prefix: str) -> None:
    """The memory's tensors of one layer, from the trainer's names below `prefix` (mechanisms.md 1.1)."""
    out, blk, own = names.out, f"blk.{layer}.", config.layers[layer]
    if own.key_conv:
        out[blk + "attn_key_conv"] = names.take(prefix + "key_conv.weight")
    if own.memory == "infini":
        out[blk + "infini_beta"] = names.take(prefix + "infini.beta")
    if own.memory != "tensor":
        if any(other.memory == "tensor" for other in config.layers):
            names.drop((prefix + "tc.", prefix + "tc_"))
        return
    o: tensor_cache.Options = own.options
    heads, width = (own.n_kv_heads,), config.d_model
    for ours, theirs in (("tc_decay", "tc.logit_decay_"), ("tc_rate", "tc.logit_lr_")):
        speeds = [names.take(prefix + theirs + s).check(heads) for s in ("fast", "slow")[: o.timescales]]
        out[blk + ours] = Tensor(speeds[0].name, (len(speeds), *heads), partial(_stack, speeds))
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


def _stack(parts: list[Tensor]) -> F32:
    return np.stack([part.load() for part in parts])


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 200


def shown(value: Any) -> str:
    """A value as an error shows it. Of a hostile file's nested lists `repr` might never come to an end."""
    return _repr.repr(value)


def name_of(folder: Path) -> str:
    """A model's name from its folder's; what is no UTF-8 in it is replaced."""
    return folder.name.encode("utf-8", "replace").decode()


def typed(args: Mapping[str, Any], name: str, default: Any) -> Any:
    """args[name], or the default; FileError if it is not of the default's type (whole numbers serve for floats)."""
    value = args.get(name, default)
    if type(default) is float and type(value) is int and abs(value) < 2**63:
        return float(value)
    if type(value) is not type(default):
        raise FileError(f"argument {name} must be of type {type(default).__name__}, not {shown(value)}")
    return value


def refuse_unknown(args: Iterable[str], known: Iterable[str], where: str) -> None:
    """FileError for an argument that this version does not know: it might change what the model computes."""
    for name in args:
        if name not in known:
            raise FileError(f"argument {shown(name)} in {where} is not known to this version of tcinfer")
