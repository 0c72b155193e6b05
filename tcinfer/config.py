"""What a model is: its shape, its layers, their memory. The only defaults and the only validation of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property
from numbers import Integral, Real
from typing import Any

from tcinfer.errors import TcinferError

DEFAULT_WINDOW = 512  # tokens, where neither the file nor the user names one
DEFAULT_SINKS = 4  # tokens, beside the window
PASS_TOKENS = 256  # tokens of a prompt, or sessions stepped together, that one pass through the model takes
LARGEST_COUNT = 2**31 - 1  # of anything a file or an option may count
LARGEST_FLOAT, SMALLEST_FLOAT = 3.4e38, 1.2e-38  # what a file's 32 bits hold


# Fields of ModelConfig that may differ from layer to layer: one value for all of them, or a tuple with one for each.
LAYERED = (
    *("n_heads", "n_kv_heads", "d_ff", "rope_dim", "rope_base", "rope_scaling", "rope_factor"),
    *("memory", "window", "sinks", "sink_positions", "key_conv", "options"),
)


@dataclass(frozen=True)
class LayerConfig:
    """Everything about one layer that is not a weight: its heads, its rotation, its memory."""

    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    norm_eps: float
    rope_dim: int  # channels of a head that rotate, the first ones; 0: none
    rope_base: float
    rope_scaling: str  # "none", "linear", "ntk" or "yarn" (kernels/reference/rotary.py)
    rope_factor: float
    memory: str  # a name of the registry in memory/
    window: int  # tokens in the ring; 0 is unbounded, the growing cache
    sinks: int  # first tokens that stay for ever, beside the window
    sink_positions: str  # "stored", or "in-cache": a sink's distance stops growing (StreamingLLM)
    key_conv: int  # taps of the causal convolution on the keys: 0 or 2
    cache_type: str  # elements of the ring: f16 or f32; keys and values are rounded to it as they arrive
    options: Any = None  # the mechanism's own frozen dataclass, or None

    def __post_init__(self) -> None:
        for name in ("n_heads", "n_kv_heads", "d_ff"):
            check_count(name, getattr(self, name), 1)
        for name in ("rope_dim", "window", "sinks"):
            check_count(name, getattr(self, name), 0)
        check_number("rope_base", self.rope_base, 0.0, above=True)
        check_number("rope_factor", self.rope_factor, 0.0, above=True)
        check_choice("rope_scaling", self.rope_scaling, ("none", "linear", "ntk", "yarn"))
        check_choice("sink_positions", self.sink_positions, ("stored", "in-cache"))
        check_choice("key_conv", self.key_conv, (0, 2))
        if self.sinks and not self.window:
            raise TcinferError("sinks stand beside a window, and this memory has none")
        if self.n_heads % self.n_kv_heads:
            raise TcinferError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.rope_dim > self.head_dim or self.rope_dim % 2:
            raise TcinferError(
                f"rope_dim {self.rope_dim} is not supported: an even number of channels rotates, at most the head's "
                f"{self.head_dim}"
            )
        if self.rope_scaling == "ntk" and self.rope_dim == 2:
            raise TcinferError("rope_scaling 'ntk' is not defined for heads of 2 channels")

    @property
    def cache_dtype(self) -> str:
        """NumPy's name of the ring's elements."""
        return {"f16": "float16", "f32": "float32"}[self.cache_type]


@dataclass(frozen=True)
class ModelConfig:
    """Everything about a model that is not a weight. Sizes are counts of elements or tokens.

    The fields in LAYERED have one value, or a tuple with one for each layer; `layers` has them layer by layer.
    """

    arch: str
    vocab_size: int
    n_layers: int
    d_model: int
    n_heads: int | tuple[int, ...]
    n_kv_heads: int | tuple[int, ...]
    head_dim: int
    d_ff: int | tuple[int, ...]
    context_length: int  # tokens of the training block; a hard limit only with learned positions
    norm_eps: float = 1e-5
    rope_dim: int | tuple[int, ...] = -1  # -1 means head_dim; 0 in all layers: see learned_positions
    rope_base: float | tuple[float, ...] = 10000.0
    rope_scaling: str | tuple[str, ...] = "none"
    rope_factor: float | tuple[float, ...] = 1.0
    rope_attention: float = 1.0  # by which cosines and sines are multiplied (YaRN, longrope)
    rope_original: int = 0  # tokens that a model was trained with before YaRN or longrope; 0: context_length
    memory: str | tuple[str, ...] = "full"
    window: int | tuple[int, ...] = 0
    sinks: int | tuple[int, ...] = 0
    sink_positions: str | tuple[str, ...] = "stored"
    key_conv: int | tuple[int, ...] = 0
    cache_type: str = "f16"
    attention_scale: float = 0.0  # of scores; 0: 1/√head_dim
    softcap: float = 0.0  # of the logits, cap · tanh(x / cap); 0: none
    options: Any = None
    name: str = ""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_layers", "d_model", "head_dim"):
            check_count(name, getattr(self, name), 1)
        check_count("context_length", self.context_length, 0)
        check_count("rope_original", self.rope_original, 0)
        check_number("norm_eps", self.norm_eps, 0.0)
        check_number("rope_attention", self.rope_attention, 0.0, above=True)
        check_number("attention_scale", self.attention_scale, 0.0)
        check_number("softcap", self.softcap, 0.0)
        check_choice("cache_type", self.cache_type, ("f16", "f32"))
        for name in LAYERED:
            value = getattr(self, name)
            if name == "rope_dim":  # -1 is the head
                value = tuple(self.head_dim if v == -1 else v for v in value) if type(value) is tuple else value
                value = self.head_dim if value == -1 else value
            if type(value) is tuple:
                if len(value) != self.n_layers:
                    raise TcinferError(f"{name} has {len(value)} values, and the model {self.n_layers} layers")
                value = value[0] if all(v == value[0] and type(v) is type(value[0]) for v in value) else value
            object.__setattr__(self, name, value)
        for i in range(self.n_layers if self._differ else 1):
            self.layer(i)

    @property
    def _differ(self) -> bool:
        return any(type(getattr(self, name)) is tuple for name in LAYERED)

    @cached_property
    def layers(self) -> tuple[LayerConfig, ...]:
        return tuple(map(self.layer, range(self.n_layers))) if self._differ else (self.layer(0),) * self.n_layers

    def layer(self, i: int) -> LayerConfig:
        """One of `layers`, without making them all: a file may claim to have billions."""
        values = {f.name: getattr(self, f.name) for f in fields(LayerConfig)}
        return LayerConfig(**{n: v[i] if n in LAYERED and type(v) is tuple else v for n, v in values.items()})

    @property
    def widest(self) -> LayerConfig:
        """The layer that sees farthest back exactly (the first of them); its window 0: unbounded."""
        if not self._differ:
            return self.layer(0)
        return max(self.layers, key=lambda layer: layer.window + layer.sinks if layer.window else math.inf)

    @property
    def far(self) -> tuple[int, ...]:
        """The layers whose window is the largest, or that have none: of those a user asks for another memory."""
        reach = [layer.window or math.inf for layer in self.layers]
        return tuple(i for i, window in enumerate(reach) if window == max(reach))

    @property
    def farthest(self) -> str | None:
        """The memory of the layers that see farthest back; None where they differ in it."""
        if not self._differ:
            return self.layer(0).memory
        found = {self.layers[i].memory for i in self.far}
        return found.pop() if len(found) == 1 else None

    @property
    def memories(self) -> str:
        """The memories of the layers, each once, as people read it; beside one that was trained, no plain ones."""
        layers = self.layers if self._differ else (self.layer(0),)
        trained = dict.fromkeys(layer.memory for layer in layers if layer.options is not None)
        return ", ".join(trained or dict.fromkeys(layer.memory for layer in layers))

    @property
    def learned_positions(self) -> bool:
        """No layer rotates: positions are a table that is added to the embedding."""
        return self.rope_dim == 0


def check_count(name: str, value: Any, least: int, most: int = LARGEST_COUNT) -> None:
    """Raise TcinferError unless `value` is an integer (no bool) with least <= value <= most."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) <= most:
        raise TcinferError(f"{name} must be a whole number from {least} to {most}, not {value!r}")


def check_number(name: str, value: Any, least: float, most: float = math.inf, above: bool = False) -> None:
    """Raise TcinferError unless `value` is a number (no bool) in [least, most], or (least, most], that float32 has."""
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # a whole number of hundreds of digits
        number = math.nan
    low = number < least or (above and (number == least or abs(number) < SMALLEST_FLOAT))
    if low or number > most or not abs(number) <= LARGEST_FLOAT:
        bounds = f"{'above' if above else 'at least'} {least:g}" + (f" and at most {most:g}" if most < math.inf else "")
        raise TcinferError(f"{name} must be a number {bounds}, not {value!r}")


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise TcinferError unless `value` is one of `choices`."""
    if isinstance(value, bool) != isinstance(choices[0], bool) or value not in choices:
        raise TcinferError(f"{name} must be one of {', '.join(map(str, choices))}, not {value!r}")


def check_types(options: Any) -> None:
    """Raise TcinferError unless every field of a dataclass has the type of its default (int serves for float)."""
    for f in fields(options):
        value, want = getattr(options, f.name), type(f.default)
        if want is float and type(value) is int:
            object.__setattr__(options, f.name, float(value))
        elif type(value) is not want:
            raise TcinferError(f"{f.name} must be of type {want.__name__}, not {value!r}")
