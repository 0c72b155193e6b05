"""Architectures: what one transformer block is, one file each, and a row in ARCHITECTURES.

An architecture is a module with

    NORM           "rms" or "layer": the norm in front of the head, and which key holds its eps
    ROTARY         which channels make a rotated pair: "interleaved" (0,1)(2,3).. or "half" (0,D/2)(1,D/2+1)..
    OURS           written by this project's schema; others are plain GGUF models
    block(net, x)  the wiring of a layer: rows x [C] in, the rows after it out (net.py)

and where it differs from a Llama

    embed(net)                    the wiring in front of the first layer
    read(metadata, get, values)   what its own keys change in the configuration's fields (format.py)
    adapt(name, tensor)           tensors under the names of `block`, made of the file's where it fuses them (loader.py)
    HUGGING_FACE                  how folders name it, and what is different there (converters/huggingface.py)

To add one: write the file, name it in ARCHITECTURES.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from tcinfer.errors import TcinferError

ARCHITECTURES = ("tcgpt", "tcllama", "llama", "qwen2")  # `general.architecture`, and the name of the module


def architecture(name: str) -> Any:
    """The module of an architecture. Raises TcinferError for a name that is none."""
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise TcinferError(f"architecture {name!r} is not supported; this version runs {known}")
    return import_module(f"{__name__}.{name}")
