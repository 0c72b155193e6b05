"""Read `torch.save` files and plain pickles without torch and without running anything they name.

It can only build tensors and plain containers; a pickle that names anything else is refused and nothing of
it runs. A pickle is a program for a small stack machine. Python's own unpickler runs all of that machine, and
has been talked into more than it should do; here is a machine with fewer instructions: no imports, no calls
but the rebuilding of tensors, no attributes, and every other instruction refused by its name. What a pickle
names is only ever a name (`_Name`), looked up in our own tables. Inside, whatever is wrong with the file is a
ValueError; `load_torch` and `load_plain` raise `FileError`.
"""

from __future__ import annotations

import mmap
import os
import pickletools
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from tcinfer.gguf.reader import file_error, map_file, short

MAX_STEPS = 400_000  # half a second; a 124 M parameter checkpoint with its optimizer takes about 10^4
MAX_PICKLE, MAX_DIMS, MAX_ARGUMENTS = 1 << 24, 32, 7  # bytes; of a tensor; of a call
ZIP_START, LEGACY_START = b"PK\x03\x04", b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
RESAVE = "save it again with torch.save of a recent PyTorch"

# What NumPy reads each dtype as (a bfloat16 is the upper half of a float32), and torch's storages of them.
CODES = {"float64": "<f8", "float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "bool": "|u1"}
CODES |= {"int64": "<i8", "int32": "<i4", "int16": "<i2", "int8": "|i1", "uint8": "|u1"}
DTYPES = {"Float": "float32", "Double": "float64", "Half": "float16", "BFloat16": "bfloat16", "Bool": "bool"}
DTYPES |= {"Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8"}
DTYPES = {f"torch.{kind}Storage": dtype for kind, dtype in DTYPES.items()}


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor that still lies in its file: nothing is read or converted before `numpy()`.

    `storage` is the key of the storage it views (tied weights share one), `dtype` its name in torch,
    `offset` and `strides` count elements. `data` is all of the storage, uint8 `[bytes]`.
    """

    shape: tuple[int, ...]
    dtype: str
    storage: str
    offset: int
    strides: tuple[int, ...]
    data: np.ndarray = field(repr=False)

    def numpy(self) -> np.ndarray:
        """The values `[*shape]`: float32 for every floating kind, integers and bool as stored.

        A read-only view of the map where the file holds them so, else a copy. NaN and Inf pass through, and a
        float64 beyond float32's range becomes Inf.
        """
        code = np.dtype(CODES[self.dtype])
        flat = np.require(self.data.view(code), requirements="A")[self.offset :]
        steps = [stride * code.itemsize for stride in self.strides]
        array = np.lib.stride_tricks.as_strided(flat, self.shape, steps, writeable=False)
        if self.dtype == "bfloat16":
            return np.asarray(array.astype(np.uint32) << 16).view(np.float32)
        if self.dtype == "bool":
            return np.asarray(array != 0)
        if code.kind == "f":
            with np.errstate(over="ignore"):
                return array.astype(np.float32, copy=False)
        return array


def load_torch(path: str | os.PathLike[str]) -> Any:
    """What `torch.save` wrote to `path`: each tensor as a `StoredTensor`, each OrderedDict as a dict."""
    path = Path(path)
    data = map_file(path)
    if data[: len(LEGACY_START)] == LEGACY_START or data[257:262] == b"ustar":
        raise file_error(path, f"a checkpoint in torch's old format, before version 1.6; {RESAVE}")
    if data[:4] != ZIP_START:
        raise file_error(path, "not a checkpoint: torch.save writes a zip archive and this is none")
    return _refusing(path, lambda: _load_archive(_Archive(data)))


def load_plain(path: str | os.PathLike[str]) -> Any:
    """A bare pickle of dict, list, tuple, str, bytes, int, float, bool and None: nanoGPT's meta.pkl."""
    data = map_file(Path(path))
    return _refusing(Path(path), lambda: _run(data, None))


def _refusing(path: Path, load: Callable[[], Any]) -> Any:
    """What `load` returns. Whatever it raises becomes a `FileError`: a damaged file can raise anything."""
    try:
        return load()
    except Exception as error:
        text = str(error) if isinstance(error, ValueError) else f"damaged ({type(error).__name__}: {error})"
        raise file_error(path, " ".join(text.split())[:300]) from None


class _Archive:
    """The entries of a zip file, none compressed and no two overlapping, as views of its map."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = np.frombuffer(data, np.uint8)
        archive = zipfile.ZipFile(data)  # type: ignore[call-overload]  # typeshed wants a file; a map will do
        self.entries: dict[str, tuple[int, int]] = {}
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise ValueError("a TorchScript archive, which holds code: torch.save the model's state_dict")
        before = 0
        for entry in sorted(archive.infolist(), key=lambda entry: entry.header_offset):
            name = short(entry.filename)
            if entry.compress_type or entry.file_size != entry.compress_size or entry.flag_bits & 1:
                raise ValueError(f"entry {name} is compressed or encrypted, not as torch.save does; {RESAVE}")
            if entry.header_offset < before:
                raise ValueError(f"entry {name} overlaps the one before it")
            head = data[entry.header_offset : entry.header_offset + 30]
            if head[:4] != ZIP_START or entry.filename in self.entries:
                raise ValueError(f"entry {name} is damaged or there twice")
            begin = entry.header_offset + 30 + sum(head[26:30:2]) + 256 * sum(head[27:30:2])
            before = begin + entry.file_size
            if before > archive.start_dir:
                raise ValueError(f"entry {name} runs past the end of the entries")
            self.entries[entry.filename] = begin, before

    def view(self, name: str) -> np.ndarray:
        """The bytes of an entry, uint8 `[bytes]`, read-only."""
        if name not in self.entries:
            raise ValueError(f"has no entry {short(name)}: not a whole checkpoint of torch.save")
        begin, end = self.entries[name]
        return self.data[begin:end]


def _load_archive(archive: _Archive) -> Any:
    """The contents of a `torch.save` archive, whose entries all lie in one folder of any name."""
    programs = [name for name in archive.entries if name.rpartition("/")[2] == "data.pkl"]
    if len(programs) != 1:
        raise ValueError(f"not a checkpoint of torch.save: a zip archive with {len(programs)} data.pkl")
    folder = programs[0].removesuffix("data.pkl")
    if folder + "byteorder" in archive.entries:
        order = archive.view(folder + "byteorder").tobytes()
        if order != b"little":
            raise ValueError(f"its byte order is {order[:20]!r}; {RESAVE} on a little-endian machine")
    return _run(archive.view(programs[0]), lambda key: archive.view(f"{folder}data/{key}"))


@dataclass(frozen=True)
class _Name:
    """Something the pickle names. It stands for itself alone and can do nothing."""

    name: str


def _storage(identity: Any, archive: Callable[[str], np.ndarray]) -> StoredTensor:
    """The flat tensor of a storage, from its persistent id; any location will do, a GPU too."""
    match identity:
        case ("storage", _Name(kind), str(key), str(), int(count)) if kind in DTYPES and type(count) is int:
            data, size = archive(key), np.dtype(CODES[DTYPES[kind]]).itemsize
            if len(data) != count * size:
                raise ValueError(f"storage {short(key)} is {len(data)} bytes long, not {count} x {size}")
            return StoredTensor((count,), DTYPES[kind], key, 0, (1,), data)
    raise ValueError("describes a storage in a way that torch.save does not")


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *others: Any) -> StoredTensor:
    """torch._utils._rebuild_tensor_v2: a view of a storage, inside it, no two elements in the same place.

    The others are: whether it wants a gradient, hooks, and a dict of lazy operations where there are any.
    """
    if (type(storage), type(shape), type(strides)) != (StoredTensor, tuple, tuple) or others[2:]:
        raise ValueError("has a tensor that is no plain view of a storage; store its clone()")
    if len(shape) != len(strides) or len(shape) > MAX_DIMS:
        raise ValueError(f"has a tensor of {len(shape)} dimensions and {len(strides)} strides")
    if any(type(n) is not int or n < 0 for n in (offset, *shape, *strides)):
        raise ValueError("has a tensor whose offset, shape or strides are no counts")
    count = len(storage.data) // np.dtype(CODES[storage.dtype]).itemsize
    if prod(size for size in shape if size) > max(count, 1 << 40):  # beside a 0, sizes could be any
        raise ValueError(f"has a tensor of shape {shape} that does not fit its storage")
    if 0 in shape:
        return replace(storage, shape=shape, strides=(0,) * len(shape))
    strides = tuple(stride if size > 1 else 0 for size, stride in zip(shape, strides, strict=True))
    last = 0  # the furthest element over the dimensions of smaller stride
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1 and stride <= last:
            raise ValueError(f"has a tensor of shape {shape} whose elements overlap; store its clone()")
        last += stride * (size - 1)
    if offset + last >= count:
        raise ValueError(f"has a tensor of shape {shape} that runs past the end of its storage")
    return replace(storage, shape=shape, offset=offset, strides=strides)


def _itself(value: Any, *_: Any) -> Any:
    """torch.Size of a tuple, torch._utils._rebuild_parameter of a tensor: what they wrap is built already."""
    return value


BUILDERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": {}.copy,  # a new dict each time; no arguments, for pickles fill it later
    "torch.Size": _itself,
    "torch._utils._rebuild_parameter": _itself,
    "torch._utils._rebuild_tensor_v2": _tensor,
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
SCALARS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
SCALARS |= {"BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
TAKES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2}  # those that need no mark


def _run(program: Any, archive: Callable[[str], np.ndarray] | None) -> Any:
    """Run the machine on a pickle. `archive` gives a storage's bytes; without it nothing at all can be named.

    Its steps are bounded in number, and each makes one value or moves some; none takes a size from the file.
    """
    if len(program) > MAX_PICKLE:
        raise ValueError(f"its pickle is {len(program)} bytes long; at most {MAX_PICKLE} are read")
    stack: list[Any] = []
    marked: list[list[Any]] = []  # the stacks below each mark
    memo: dict[int, Any] = {}
    value: Any
    for step, (opcode, value, _) in enumerate(pickletools.genops(bytes(program))):
        name = opcode.name
        if step > MAX_STEPS:
            raise ValueError(f"its pickle takes more than {MAX_STEPS} steps")
        if name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            index = len(memo) if value is None else value
            if index > MAX_STEPS:
                raise ValueError(f"its pickle remembers a value number {index}, more than it has steps")
            memo[index] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[value])
        elif name in SCALARS:
            if type(value) is int and not -(1 << 63) <= value < 1 << 64:
                raise ValueError("its pickle holds an integer of more than 64 bits")
            stack.append(value)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in EMPTY:
            stack.append(EMPTY[name]())
        elif name == "MARK":
            marked.append(stack)
            stack = []
        elif name in ("TUPLE", "APPENDS", "SETITEMS"):
            items, stack = stack, marked.pop()
            _put(stack, items, name)
        elif name in TAKES:
            _put(stack, _take(stack, TAKES[name]), name)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            named = value.replace(" ", ".", 1) if value else ".".join(_take(stack, 2))
            if archive is None or (named not in BUILDERS and named not in DTYPES):
                raise ValueError(f"names {short(named)}, which was not run; save tensors and plain values only")
            stack.append(_Name(named))
        elif name == "REDUCE":
            builder, values = _take(stack, 2)
            known = type(builder) is _Name and builder.name in BUILDERS
            if not known or type(values) is not tuple or len(values) > MAX_ARGUMENTS:
                raise ValueError("calls something, which was not run; save tensors and plain values only")
            stack.append(BUILDERS[builder.name](*values))
        elif name == "BINPERSID" and archive is not None:
            stack.append(_storage(stack.pop(), archive))
        elif name == "BUILD" and type(stack[-2]) is dict:
            stack.pop()  # an OrderedDict's attributes, such as a state_dict's _metadata
        elif name == "STOP":
            if marked or len(stack) != 1:
                raise ValueError("its pickle does not end in one value")
            return stack[0]
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"its pickle has the instruction {name}, which plain values do not need")
    raise AssertionError("genops ends with STOP or raises")


def _take(stack: list[Any], count: int) -> list[Any]:
    """The top `count` values, off the stack."""
    if len(stack) < count:
        raise ValueError("its pickle takes more values than it has")
    items = stack[-count:]
    del stack[-count:]
    return items


def _put(stack: list[Any], items: list[Any], name: str) -> None:
    """Put the items on the stack as a tuple, or into the list or dict on top (its keys and values in turn).

    A dict's keys are strings, bytes and small integers: the hash of a deep tuple can exhaust the C stack, and
    integers chosen to share one hash make a dict take quadratic time.
    """
    if name.startswith("TUPLE"):
        stack.append(tuple(items))
    elif name.startswith("APPEND") and type(stack[-1]) is list:
        stack[-1].extend(items)
    elif name.startswith("SETITEM") and type(stack[-1]) is dict:
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, bytes) and not (type(key) is int and abs(key) < 1 << 32):
                raise ValueError(f"its pickle has a {type(key).__name__}, or a huge number, as a dict's key")
            stack[-1][key] = value
    else:
        raise ValueError(f"its pickle has the instruction {name} for a {type(stack[-1]).__name__}")
