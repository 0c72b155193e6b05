"""Architectures: what one transformer block is, one file each, and a row in ARCHITECTURES.

An architecture is a module with

    NORM           "rms" or "layer": the norm in front of the head, and which key holds its eps
    ROTARY         which channels make a rotated pair: "interleaved" (0,1)(2,3).. or "half" (0,D/2)(1,D/2+1)..
    OURS           written by this project's schema; others are plain GGUF models
    block(net, x)  the wiring of a layer: rows x [C] in, the rows after it out (net.py)

and where it differs from a Llama

    embed(net)              the wiring in front of the first layer
    divisors(net)           of a layer's angles; without it they are the tensor rope_freqs.weight, if it is there
    read(values, get)       what its own keys change in `values`, the fields of ModelConfig; get(key, default) reads one
    write(config)           its own keys
    KEYS                    those of them that other plain files may not have (gguf/schema.py)
    FUSED                   name in a file -> the names of `block` whose rows lie there one after another

and where folders of Hugging Face hold such models

    HUGGING_FACE            its names there (model_type)
    NAMES                   name in a layer there -> in a file
    TIED                                   whether the head is the embedding where config.json does not say
    ACTIVATION                             what config.json must call the feed-forward's activation, if not "silu"
    from_hugging_face(hf, values)          as `read`, of config.json; tensors that it holds, by name
    converted(config, layer, name, tensor) a folder's tensor as a file has it

To add one: write the file, name it in ARCHITECTURES.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from tcinfer.errors import TcinferError

# `general.architecture`, and the name of the module
ARCHITECTURES = ("tcgpt", "tcllama", "llama", "qwen2", "qwen3", "gemma3", "phi3", "smollm3")


def architecture(name: str) -> Any:
    """The module of an architecture. Raises TcinferError for a name that is none."""
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise TcinferError(f"architecture {name!r} is not supported; this version runs {known}")
    return import_module(f"{__name__}.{name}")
