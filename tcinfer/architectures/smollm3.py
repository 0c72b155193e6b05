"""SmolLM 3: a Llama block, every fourth layer without rotation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tcinfer.architectures import llama
from tcinfer.config import ModelConfig
from tcinfer.errors import FileError

NORM, ROTARY, OURS = "rms", "interleaved", False
HUGGING_FACE = ("smollm3",)
NAMES, block, converted = llama.NAMES, llama.block, llama.converted
TIED = True  # where config.json does not say
PLAIN_EVERY = 4  # layers, the last of which does not rotate


def read(values: dict[str, Any], get: Callable[[str, Any], Any]) -> None:
    """Which layers rotate, which no key says."""
    count, D = values["n_layers"], values["head_dim"]
    if get("rope.dimension_count", D) != D:
        raise FileError("rope.dimension_count: the whole head must rotate")
    values["rope_dim"] = tuple(0 if i % PLAIN_EVERY == PLAIN_EVERY - 1 else D for i in range(count))


def write(config: ModelConfig) -> dict[str, Any]:
    """Of the layers that rotate; a list would be read by nobody else."""
    return {f"{config.arch}.rope.dimension_count": config.head_dim}


def from_hugging_face(hf: dict[str, Any], values: dict[str, Any]) -> None:
    """The same from a folder, whose config.json lists the layers: GGUF files have no key for others."""
    llama.without_window(hf, values)
    if (hf.get("rope_parameters") or hf).get("partial_rotary_factor", 1.0) != 1.0:
        raise FileError("partial_rotary_factor in config.json: the whole head must rotate")
    read(values, lambda key, default: default)
    rotates = [int(dim > 0) for dim in values["rope_dim"]]
    if hf.get("no_rope_layers", rotates) != rotates:  # 1 where a layer rotates
        raise FileError(f"no_rope_layers in config.json: only every {PLAIN_EVERY}th layer may be without rotation")
