"""What a model is: its shape, its block, its memory. The only defaults and the only validation of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any, NamedTuple

from tcinfer.errors import TcinferError

DEFAULT_WINDOW = 512  # tokens, where neither the file nor the user names one
DEFAULT_SINKS = 4  # tokens, beside the window
CHUNK = 256  # tokens of a prompt, or sessions stepped together, that one pass through the model takes
LARGEST_COUNT = 2**31 - 1  # of anything a file or an option may count
LARGEST_FLOAT, SMALLEST_FLOAT = 3.4e38, 1.2e-38  # what a file's 32 bits hold


class Architecture(NamedTuple):
    """The parts in which one transformer block differs from another."""

    norm: str  # "layer" (mean and variance) or "rms"
    mlp: str  # "gelu" (up, exact-erf GELU, down) or "swiglu" (silu(gate) * up, down)
    rotary: str  # which channels make a pair: "interleaved" (0,1)(2,3).. or "half" (0,D/2)(1,D/2+1)..
    ours: bool  # written by this project's schema; others are plain GGUF models


ARCHITECTURES = {
    "tcgpt": Architecture(norm="layer", mlp="gelu", rotary="interleaved", ours=True),
    "tcllama": Architecture(norm="rms", mlp="swiglu", rotary="half", ours=True),
    "llama": Architecture(norm="rms", mlp="swiglu", rotary="interleaved", ours=False),
    "qwen2": Architecture(norm="rms", mlp="swiglu", rotary="half", ours=False),
}


@dataclass(frozen=True)
class ModelConfig:
    """Everything about a model that is not a weight. Sizes are counts of elements or tokens."""

    arch: str
    vocab_size: int
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    context_length: int  # tokens of the training block; a hard limit only with learned positions
    norm_eps: float = 1e-5
    rope_dim: int = -1  # channels that rotate: head_dim, or 0 for learned positions; -1 means head_dim
    rope_base: float = 10000.0
    rope_scaling: str = "none"  # "linear": angles / factor; "ntk": base * factor^(D/(D-2)), D = head_dim
    rope_factor: float = 1.0
    memory: str = "full"  # MODE: full, window, sinks, infini, tensor
    window: int = 0  # tokens in the ring; 0 is unbounded, the growing cache
    sinks: int = 0  # first tokens that stay for ever, beside the window
    sink_positions: str = "stored"  # or "in-cache": a sink's distance stops growing (StreamingLLM)
    key_conv: int = 0  # taps of the causal convolution on the keys: 0 or 2
    cache_type: str = "f16"  # elements of the ring: f16 or f32; keys and values are rounded to it as they arrive
    options: Any = field(default=None)  # the mechanism's own frozen dataclass, or None
    name: str = ""

    def __post_init__(self) -> None:
        if self.arch not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise TcinferError(f"architecture {self.arch!r} is not supported; this version runs {known}")
        if self.rope_dim == -1:
            object.__setattr__(self, "rope_dim", self.head_dim)
        for name in ("vocab_size", "n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff"):
            check_count(name, getattr(self, name), 1)
        for name in ("context_length", "rope_dim", "window", "sinks"):
            check_count(name, getattr(self, name), 0)
        check_number("norm_eps", self.norm_eps, 0.0)
        check_number("rope_base", self.rope_base, 0.0, above=True)
        check_number("rope_factor", self.rope_factor, 0.0, above=True)
        check_choice("rope_scaling", self.rope_scaling, ("none", "linear", "ntk"))
        check_choice("sink_positions", self.sink_positions, ("stored", "in-cache"))
        check_choice("key_conv", self.key_conv, (0, 2))
        check_choice("cache_type", self.cache_type, ("f16", "f32"))
        if self.sinks and not self.window:
            raise TcinferError("sinks stand beside a window, and this memory has none")
        if self.memory == "full" and self.window:
            raise TcinferError("full memory has no window")
        if self.memory == "window" and self.sinks:
            raise TcinferError("window memory has no sinks")
        if self.memory in ("window", "sinks") and not self.window:
            raise TcinferError(f"{self.memory} memory needs a window of at least 1 token")
        if self.n_heads % self.n_kv_heads:
            raise TcinferError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.rope_dim not in (0, self.head_dim) or self.rope_dim % 2:
            raise TcinferError(
                f"rope_dim {self.rope_dim} is not supported: the whole head of {self.head_dim} channels (an even "
                "number) rotates, or none of it"
            )
        if self.rope_scaling == "ntk" and self.rope_dim == 2:
            raise TcinferError("rope_scaling 'ntk' is not defined for heads of 2 channels")

    @property
    def block(self) -> Architecture:
        return ARCHITECTURES[self.arch]

    @property
    def cache_dtype(self) -> str:
        """NumPy's name of the ring's elements."""
        return {"f16": "float16", "f32": "float32"}[self.cache_type]

    @property
    def learned_positions(self) -> bool:
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
