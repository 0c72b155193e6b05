"""Read GGUF files: memory-mapped, every number checked against the file before it is believed.

A GGUF file is a header (magic, version, two counts), metadata pairs, tensor descriptions, padding and the
tensors' bytes. Nothing here allocates or loops by a number of the file before the bytes left are seen to hold
that much, so a hostile file costs no more than its own length. Whatever is wrong raises `FileError`.
"""

from __future__ import annotations

import mmap
import os
import stat
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from tcinfer.errors import FileError
from tcinfer.tokenizer import short

Value = bool | int | float | str | list[str] | np.ndarray

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_KEY = 65535  # bytes, by the format
MAX_NAME = 127  # bytes; ggml itself keeps 63
MAX_DIMS = 4

U32 = struct.Struct("<I")
U64 = struct.Struct("<Q")
# The struct code of each number; NumPy's codes are the same letters. Booleans are read as bytes and checked.
NUMBERS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.FLOAT64: "d",
    GGUFValueType.BOOL: "B",
}
SMALLEST_PAIR = 8 + 1 + 4 + 1  # key length, key, type, a one-byte value
SMALLEST_TENSOR = 8 + 1 + 4 + 8 + 4 + 8  # name length, name, n_dims, one dim, kind, offset
MOST_ENTRIES = 2**16  # tensors, and pairs; the largest models have a few thousand of each


@dataclass(frozen=True, eq=False)
class TensorInfo:
    """One tensor of the file.

    `shape` is in NumPy order (GGUF's reversed): a matrix is (rows, columns). `data` is a read-only uint8 view
    of the map, [rows, bytes per row], rows being the product of all dims but the innermost; a vector has one.
    """

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    data: np.ndarray


@dataclass(frozen=True, eq=False)
class GGUFFile:
    """A GGUF file that was read; its numeric and bool arrays are read-only NumPy arrays, none of them of the map.

    `types` has the type of every metadata value, an array's being followed by that of its elements.
    """

    path: Path
    version: int
    metadata: dict[str, Value]
    types: dict[str, tuple[GGUFValueType, ...]]
    tensors: dict[str, TensorInfo]


def file_error(path: Path, text: str) -> FileError:
    """The error "PATH: text", on one line whatever characters the path or a name inside the file holds."""
    return FileError("".join(c if c.isprintable() else "?" for c in f"{path}: {text}"))


def map_file(path: Path) -> mmap.mmap:
    """Map a regular file that holds something, read-only; a pipe or device is refused before it is opened."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise file_error(path, "is a folder; name a file")
        if not stat.S_ISREG(mode):
            raise file_error(path, "is a pipe or a device; name a regular file")
        with open(path, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise file_error(path, "is empty; download or write it again")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise file_error(path, f"cannot be read: {getattr(error, 'strerror', None) or error}") from None


def read(path: str | os.PathLike[str]) -> GGUFFile:
    """Read a GGUF file of version 2 or 3, little-endian. Raises `FileError` if anything in it is bad."""
    cursor = _Cursor(Path(path), map_file(Path(path)))
    version = _version(cursor)
    tensor_count = cursor.number(U64, "the tensor count")
    pair_count = cursor.number(U64, "the metadata count")
    for count, what in ((tensor_count, "tensors"), (pair_count, "metadata pairs")):
        if count > MOST_ENTRIES:
            raise cursor.fail(f"the header counts {count} {what}; no model has more than {MOST_ENTRIES}")
    cursor.need(pair_count * SMALLEST_PAIR + tensor_count * SMALLEST_TENSOR, "what the header counts")
    metadata: dict[str, Value] = {}
    types: dict[str, tuple[GGUFValueType, ...]] = {}
    for _ in range(pair_count):
        key = cursor.string("a metadata key", 1, MAX_KEY)
        if key in metadata:
            raise cursor.fail(f"metadata key {short(key)} is there twice")
        metadata[key], types[key] = _value(cursor, key)
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    assert isinstance(alignment, int)
    if not 8 <= alignment <= 65536 or alignment & (alignment - 1):
        raise cursor.fail(f"alignment {alignment} is not a power of two between 8 and 65536")
    return GGUFFile(cursor.path, version, metadata, types, _tensors(cursor, tensor_count, alignment))


class _Cursor:
    """A position in the mapped file; every step forward is checked against the bytes left."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.view = np.frombuffer(data, np.uint8)
        self.size = len(data)
        self.position = 0

    def fail(self, text: str) -> FileError:
        return file_error(self.path, text)

    def need(self, count: int, what: str) -> None:
        left = self.size - self.position
        if count > left:
            text = f"{what} needs {count} bytes but {left} are left: the file is cut short or damaged"
            raise self.fail(f"{text}; download or convert it again")

    def number(self, code: struct.Struct, what: str) -> int:
        self.need(code.size, what)
        (value,) = code.unpack_from(self.data, self.position)
        self.position += code.size
        return value

    def string(self, what: str, least: int = 0, most: int | None = None) -> str:
        length = self.number(U64, what)
        if length < least or (most is not None and length > most):
            raise self.fail(f"{what} is {length} bytes long, not {least} to {most}")
        self.need(length, what)
        start = self.position
        self.position += length
        try:
            return str(self.data[start : self.position], "utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"{what} at byte {start} is not valid UTF-8") from None

    def strings(self, count: int, what: str) -> list[str]:
        """`count` strings. A vocabulary has 10^5 of them, so the loop makes no calls it can do without."""
        self.need(count * U64.size, what)
        data, size, position, length_at = self.data, self.size, self.position, U64.unpack_from
        strings = []
        try:
            for _ in range(count):
                start = position + 8
                position = start + length_at(data, position)[0]
                if position > size:
                    raise self.fail(f"a string of {what} runs past the end of the file")
                strings.append(str(data[start:position], "utf-8"))
        except struct.error:
            raise self.fail(f"{what} runs past the end of the file") from None
        except UnicodeDecodeError:
            raise self.fail(f"{what} holds a string that is not valid UTF-8, at byte {start}") from None
        self.position = position
        return strings

    def numbers(self, count: int, code: str, what: str) -> np.ndarray:
        """`count` numbers as a read-only array."""
        dtype = np.dtype("<" + code)
        self.need(count * dtype.itemsize, what)
        start = self.position
        self.position += count * dtype.itemsize
        array = np.frombuffer(self.view[start : self.position].tobytes(), dtype).copy()
        array.flags.writeable = False
        return array


def _version(cursor: _Cursor) -> int:
    """The version, after the magic; what is not version 2 or 3 in little-endian order is refused by name."""
    magic = cursor.data[:4]
    if magic != MAGIC:
        endian = " little-endian" if magic == MAGIC[::-1] else ""
        raise cursor.fail(f"not a{endian} GGUF file: it starts with {magic!r}, not {MAGIC!r}")
    cursor.position = len(MAGIC)
    version = cursor.number(U32, "the version")
    if int.from_bytes(version.to_bytes(4, "little"), "big") in (1, *VERSIONS):
        raise cursor.fail("a big-endian GGUF file; convert it to little-endian")
    if version not in VERSIONS:
        raise cursor.fail(f"GGUF version {version}; versions 2 and 3 are read, so convert it again")
    return version


def _value_type(cursor: _Cursor, what: str) -> GGUFValueType:
    number = cursor.number(U32, f"the type of {what}")
    try:
        return GGUFValueType(number)
    except ValueError:
        raise cursor.fail(f"{what} has the unknown type {number}") from None


def _value(cursor: _Cursor, key: str) -> tuple[Value, tuple[GGUFValueType, ...]]:
    """The metadata value of `key` and its type, the cursor standing at the type."""
    what = f"metadata {short(key)}"
    kind = _value_type(cursor, what)
    if key == "general.alignment" and kind != GGUFValueType.UINT32:
        raise cursor.fail(f"{what} is {kind.name}, not UINT32")
    if key == "general.architecture" and kind != GGUFValueType.STRING:
        raise cursor.fail(f"{what} is {kind.name}, not STRING")
    if kind == GGUFValueType.STRING:
        return cursor.string(what), (kind,)
    if kind != GGUFValueType.ARRAY:
        array = _numbers(cursor, 1, kind, what)
        return array[0].item(), (kind,)
    types = kind, _value_type(cursor, what)
    kind = types[1]
    count = cursor.number(U64, f"the length of {what}")
    if kind == GGUFValueType.ARRAY:
        raise cursor.fail(f"{what} is an array of arrays, which no model needs")
    if kind == GGUFValueType.STRING:
        return cursor.strings(count, what), types
    return _numbers(cursor, count, kind, what), types


def _numbers(cursor: _Cursor, count: int, kind: GGUFValueType, what: str) -> np.ndarray:
    array = cursor.numbers(count, NUMBERS[kind], what)
    if kind != GGUFValueType.BOOL:
        return array
    if (array > 1).any():
        raise cursor.fail(f"{what} is a BOOL that is neither 0 nor 1")
    return array.view(np.bool_)


def _tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, TensorInfo]:
    """The tensors whose descriptions start at the cursor; their data follows, no two of them overlapping."""
    described = {}
    for _ in range(count):
        name = cursor.string("a tensor name", 1, MAX_NAME)
        if name in described:
            raise cursor.fail(f"tensor {short(name)} is there twice")
        described[name] = _describe(cursor, f"tensor {short(name)}", alignment)
    start = -(-cursor.position // alignment) * alignment
    tensors, end, before = {}, start, ""
    for name, (offset, kind, dims, row) in sorted(described.items(), key=lambda item: item[1][0]):
        begin, rows = start + offset, prod(dims[1:])
        if begin < end:
            raise cursor.fail(f"tensors {short(before)} and {short(name)} overlap")
        end, before = begin + rows * row, name
        if end > cursor.size:
            text = f"tensor {short(name)} ends at byte {end} but the file has {cursor.size}"
            raise cursor.fail(f"{text}: it is cut short or damaged; download or convert it again")
        tensors[name] = TensorInfo(name, kind, dims[::-1], cursor.view[begin:end].reshape(rows, row))
    return {name: tensors[name] for name in described}


def _describe(cursor: _Cursor, what: str, alignment: int) -> tuple[int, GGMLQuantizationType, tuple[int, ...], int]:
    """A tensor's offset in bytes, kind, dims in GGUF's order (innermost first), and bytes per row."""
    n_dims = cursor.number(U32, f"{what}: its dimensions")
    if not 1 <= n_dims <= MAX_DIMS:
        raise cursor.fail(f"{what} has {n_dims} dimensions, not 1 to {MAX_DIMS}")
    dims = tuple(cursor.number(U64, f"{what}: its dimensions") for _ in range(n_dims))
    if 0 in dims:
        raise cursor.fail(f"{what} has a dimension of 0")
    number = cursor.number(U32, f"{what}: its kind")
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise cursor.fail(f"{what} is of the unknown kind {number}; convert it to a known one") from None
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if dims[0] % block:
        raise cursor.fail(f"{what} has rows of {dims[0]}, not a multiple of {block} as {kind.name} needs")
    offset = cursor.number(U64, f"{what}: its offset")
    if offset % alignment:
        raise cursor.fail(f"{what} starts at offset {offset}, not a multiple of the alignment {alignment}")
    return offset, kind, dims, dims[0] // block * block_bytes
