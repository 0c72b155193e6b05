"""A GGUF file itself, to be packed in another way: its tensors unpacked, its metadata kept with every value's type.

What describes the model is written anew from its configuration (format.py); what describes how the file was packed is
not kept.
"""

from __future__ import annotations

import struct
from functools import partial
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGUFValueType as Type
from gguf.gguf_writer import GGUFValue

from tcinfer import format as schema
from tcinfer import reader
from tcinfer.converters.source import F32, Source, Tensor
from tcinfer.kernels.reference.quants import unpack
from tcinfer.loader import bind, read_config

PACKING = {"general.file_type", "general.quantization_version", "general.alignment"}
PAIR = struct.Struct("<II")


def recognises(path: Path) -> bool:
    return path.is_file() and path.suffix == ".gguf"


def read(path: Path) -> Source:
    """Raises FileError for a file that this version cannot run."""
    file = reader.read(path)
    config = read_config(file)
    bind(config, file.tensors)  # finds what is wrong with a tensor, all but NaN in a matrix
    types, written = _types(file), schema.to_metadata(config).keys() | PACKING
    keys, empty = {}, []
    for key, value in file.metadata.items():
        if key in written:
            continue
        if types[key][0] == Type.ARRAY and not len(value):  # type: ignore[arg-type]
            empty.append(key)  # gguf-py writes none
        else:
            keys[key] = GGUFValue(value.tolist() if isinstance(value, np.ndarray) else value, *types[key])
    tensors = {name: Tensor(name, tensor.shape, partial(_values, tensor)) for name, tensor in file.tensors.items()}
    kinds = {tensor.kind for tensor in file.tensors.values()}
    packed = sorted(kind.name for kind in kinds if GGML_QUANT_SIZES[kind][0] > 1)
    notes = [f"empty arrays: {', '.join(empty)}"] if empty else []
    return Source(config, tensors, None, notes, keys, tuple(packed))


def _values(tensor: reader.TensorInfo) -> F32:
    return unpack(tensor.data, tensor.kind).reshape(tensor.shape)


def _types(file: reader.GGUFFile) -> dict[str, tuple[Type, ...]]:
    """The type of every metadata value, an array's being followed by that of its elements.

    A second walk by the reader's own steps: what it hands out are Python's numbers, which are all of one width.
    """
    cursor = reader._Cursor(file.path, reader.map_file(file.path))
    reader._version(cursor)
    _, count = (cursor.number(reader.U64, "a count") for _ in range(2))
    types: dict[str, tuple[Type, ...]] = {}
    for _ in range(count):
        key = cursor.string("a metadata key")
        kind, item = PAIR.unpack_from(cursor.data, cursor.position)
        types[key] = (Type(kind), Type(item)) if kind == Type.ARRAY else (Type(kind),)
        reader._value(cursor, key)
    return types
