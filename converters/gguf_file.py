"""A GGUF file itself, to be packed in another way: its tensors unpacked, its metadata kept with every value's type.

What describes the model is written anew from its configuration (gguf/schema.py); what describes how the file was packed
is not kept.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGUFValueType as Type
from gguf.gguf_writer import GGUFValue

from tcinfer.converters.source import F32, Source, Tensor
from tcinfer.gguf import reader, schema
from tcinfer.kernels.reference.quants import unpack
from tcinfer.loader import bind, read_config

PACKING = {"general.file_type", "general.quantization_version", "general.alignment"}


def recognises(path: Path) -> bool:
    """By what it begins with, for others' stores name files by their digests; a broken one by its name."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(reader.MAGIC)) == reader.MAGIC or path.suffix.lower() == ".gguf"


def read(path: Path) -> Source:
    """Raises FileError for a file that this version cannot run."""
    file = reader.read(path)
    config = read_config(file)
    bind(config, file.tensors)  # finds what is wrong with a tensor, all but NaN in a matrix
    written = schema.to_metadata(config).keys() | PACKING
    keys, empty = {}, []
    for key, value in file.metadata.items():
        if key in written:
            continue
        if file.types[key][0] == Type.ARRAY and not len(value):  # type: ignore[arg-type]
            empty.append(key)  # gguf-py writes none
        else:
            keys[key] = GGUFValue(value.tolist() if isinstance(value, np.ndarray) else value, *file.types[key])
    tensors = {name: Tensor(name, tensor.shape, partial(_values, tensor)) for name, tensor in file.tensors.items()}
    kinds = {tensor.kind for tensor in file.tensors.values()}
    packed = sorted(kind.name for kind in kinds if GGML_QUANT_SIZES[kind][0] > 1)
    notes = [f"empty arrays: {', '.join(empty)}"] if empty else []
    return Source(config, tensors, None, notes, keys, tuple(packed))


def _values(tensor: reader.TensorInfo) -> F32:
    return unpack(tensor.data, tensor.kind).reshape(tensor.shape)
