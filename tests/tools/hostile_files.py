"""Builders of small valid files and of every hostile file we know of, as (name, bytes) pairs.

The hostile pickles that call something would, if they ever ran, create the marker file they are given.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

HUGE = (1 << 31, 1 << 63, (1 << 64) - 1)
UINT8, UINT32, BOOL, STRING, ARRAY = 0, 4, 7, 8, 9
F32, Q8_0 = 0, 8


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: str | bytes, length: int | None = None) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return u64(len(raw) if length is None else length) + raw


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + u32(kind) + value


def array(kind: int, count: int, values: bytes) -> bytes:
    return u32(kind) + u64(count) + values


def tensor(name: str | bytes, dims: tuple[int, ...], kind: int = F32, offset: int = 0, n_dims: int = -1) -> bytes:
    n_dims = len(dims) if n_dims < 0 else n_dims
    return text(name) + u32(n_dims) + b"".join(map(u64, dims)) + u32(kind) + u64(offset)


def gguf(
    pairs: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    data: bytes = b"",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    """A GGUF file. `counts` are the tensor and metadata counts to claim instead of the true ones."""
    n_tensors, n_pairs = counts or (len(tensors), len(pairs))
    head = b"GGUF" + u32(version) + u64(n_tensors) + u64(n_pairs) + b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


ARCHITECTURE = pair("general.architecture", STRING, text("llama"))


def small_gguf() -> bytes:
    """A valid file: six pairs and two tensors, [2, 8] F32 and [32] Q8_0."""
    pairs = (
        ARCHITECTURE,
        pair("general.alignment", UINT32, u32(32)),
        pair("a.flag", BOOL, b"\1"),
        pair("a.tokens", ARRAY, array(STRING, 3, text("<s>") + text("é") + text(""))),
        pair("a.scores", ARRAY, array(6, 2, struct.pack("<2f", 0.5, -1))),
        pair("a.flags", ARRAY, array(BOOL, 2, b"\0\1")),
    )
    tensors = (tensor("w", (8, 2)), tensor("q", (32,), Q8_0, 64))
    return gguf(pairs, tensors, struct.pack("<16f", *range(16)) + bytes(34))


def hostile_ggufs() -> Iterator[tuple[str, bytes]]:
    good = small_gguf()
    for length in range(1, len(good), 5):
        yield f"cut to {length} bytes", good[:length]
    yield "cut by one byte", good[:-1]
    yield "empty", b""
    for magic in (b"ggml", b"GGUE", b"FUGG", b"PK\3\4", b"\0\0\0\0"):
        yield f"magic {magic!r}", magic + good[4:]
    for version in (0, 1, 4, 1 << 31, 1 << 24, 2 << 24, 3 << 24, (1 << 32) - 1):
        yield f"version {version}", gguf((ARCHITECTURE,), version=version)
    for n in (5, 10**6, *HUGE):
        yield f"{n} tensors", gguf((ARCHITECTURE,), counts=(n, 1))
        yield f"{n} pairs", gguf((ARCHITECTURE,), counts=(0, n))
        yield f"{n} bytes of key", gguf((text("k", n) + u32(UINT8) + b"\1",), alignment=1)
        yield f"{n} bytes of string", gguf((pair("k", STRING, text("v", n)),), alignment=1)
        yield f"{n} bytes of token", gguf((pair("k", ARRAY, array(STRING, 1, text("v", n))),), alignment=1)
        yield f"{n} strings", gguf((pair("k", ARRAY, array(STRING, n, text("v"))),), alignment=1)
        yield f"{n} numbers", gguf((pair("k", ARRAY, array(12, n, b"")),), alignment=1)
        yield f"{n} nested arrays", gguf((pair("k", ARRAY, array(ARRAY, n, b"")),))
        yield f"{n} bytes of tensor name", gguf((), (text("t", n) + u32(1) + u64(1) + u32(F32) + u64(0),))
        yield f"a dimension of {n}", gguf((), (tensor("t", (n,)),))
        yield f"dimensions of {n}", gguf((), (tensor("t", (n,) * 4),), bytes(64))
        yield f"an offset of {n}", gguf((), (tensor("t", (1,), offset=n),), bytes(64))
    # 49 bytes on which gguf-py's reader hangs
    yield "49 bytes", gguf((pair("k", ARRAY, array(UINT8, 1 << 63, b"")),), alignment=1)
    for n_dims in (0, 5, 10**6, (1 << 32) - 1):
        yield f"n_dims {n_dims}", gguf((), (tensor("t", (1,) * 5, n_dims=n_dims),), bytes(64))
    for n, size in ((1, 1 << 62), (2, 1 << 32), (4, 1 << 16), (3, 3 << 30)):  # 4 * product wraps in 64 bits
        yield f"{n} dimensions of {size}", gguf((), (tensor("t", (size,) * n),), bytes(64))
    for alignment in (0, 1, 4, 13, 48, 1 << 17, 1 << 31):
        yield f"alignment {alignment}", gguf((pair("general.alignment", UINT32, u32(alignment)),))
    yield "alignment of a bad type", gguf((pair("general.alignment", 10, u64(32)),))
    yield "alignment a string", gguf((pair("general.alignment", STRING, text("32")),))
    yield "architecture a number", gguf((pair("general.architecture", UINT32, u32(1)),))
    yield "architecture an array", gguf((pair("general.architecture", ARRAY, array(STRING, 1, text("a"))),))
    yield "overlap", gguf((), (tensor("a", (16,)), tensor("b", (16,), offset=32)), bytes(128))
    yield "same place", gguf((), (tensor("a", (16,)), tensor("b", (16,))), bytes(128))
    yield "misaligned", gguf((), (tensor("a", (4,), offset=4),), bytes(64))
    yield "out of the file", gguf((), (tensor("a", (16,), offset=64),), bytes(127))
    yield "zero dimension", gguf((), (tensor("a", (4, 0)),), bytes(64))
    yield "half a block", gguf((), (tensor("a", (31,), Q8_0),), bytes(64))
    for kind in (4, 5, 31, 255, 1 << 31):
        yield f"tensor kind {kind}", gguf((), (tensor("a", (4,), kind),), bytes(64))
    for kind in (13, 255, 1 << 31):
        yield f"value type {kind}", gguf((pair("k", kind, bytes(8)),))
        yield f"element type {kind}", gguf((pair("k", ARRAY, array(kind, 1, bytes(8))),))
    yield "duplicate key", gguf((ARCHITECTURE, ARCHITECTURE))
    yield "duplicate tensor", gguf((), (tensor("a", (8,)), tensor("a", (8,), offset=32)), bytes(64))
    yield "empty key", gguf((pair("", UINT8, b"\1"),))
    yield "long key", gguf((pair("k" * 65536, UINT8, b"\1"),))
    yield "long tensor name", gguf((), (tensor("t" * 128, (8,)),), bytes(64))
    yield "control characters", gguf((pair("\n\r\x1b\u2028", 99, b""),))
    for raw in (b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"a\xe9"):
        yield f"key {raw!r}", gguf((pair(raw, UINT8, b"\1"),))
        yield f"string {raw!r}", gguf((pair("k", STRING, text(raw)),))
        yield f"token {raw!r}", gguf((pair("k", ARRAY, array(STRING, 2, text("a") + text(raw))),))
        yield f"tensor name {raw!r}", gguf((), (tensor(raw, (8,)),), bytes(64))
    yield "bool 2", gguf((pair("k", BOOL, b"\2"),))
    yield "bools 0 255", gguf((pair("k", ARRAY, array(BOOL, 2, b"\0\xff")),))


# Pickles, by hand: each helper gives the instructions that leave one value on the stack.


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def string(value: str) -> bytes:
    return b"X" + u32(len(value.encode())) + value.encode()


def integer(value: int) -> bytes:
    raw = value.to_bytes(10, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def tuple_of(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def ints(*values: int) -> bytes:
    return tuple_of(*map(integer, values))


def dict_of(**items: bytes) -> bytes:
    return b"}(" + b"".join(string(key) + value for key, value in items.items()) + b"u"


def program(value: bytes, protocol: int = 2) -> bytes:
    return b"\x80" + bytes([protocol]) + value + b"."


ORDERED = name("collections", "OrderedDict") + b")R"
REBUILD = name("torch._utils", "_rebuild_tensor_v2")
FLOAT = name("torch", "FloatStorage")


def storage(key: str, count: int, kind: bytes = FLOAT) -> bytes:
    return tuple_of(string("storage"), kind, string(key), string("cpu"), integer(count)) + b"Q"


def rebuilt(shape: bytes, strides: bytes, of: bytes = storage("0", 6), offset: bytes = b"K\0") -> bytes:
    return REBUILD + tuple_of(of, offset, shape, strides, b"\x89", ORDERED) + b"R"


def checkpoint(
    pickle: bytes | None, storages: dict[str, bytes] | None = None, order: bytes = b"little", extra: str = ""
) -> bytes:
    """A torch.save archive around a pickle; storage 0 is six floats unless `storages` says otherwise."""
    entries = {} if pickle is None else {"data.pkl": pickle}
    entries |= {"byteorder": order} | ({extra: program(b"}")} if extra else {})
    stored = {"0": struct.pack("<6f", *range(6))} if storages is None else storages
    return zipped(
        {f"ckpt/{key}": raw for key, raw in entries.items()} | {f"ckpt/data/{k}": v for k, v in stored.items()}
    )


def zipped(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for key, raw in entries.items():
            archive.writestr(zipfile.ZipInfo(key), raw, compression)
    return file.getvalue()


def small_checkpoint() -> bytes:
    """A valid one: {"model": {"w": [2, 3] floats 0..5, "tied": the same}, "n": 7}, with _metadata."""
    w = rebuilt(ints(2, 3), ints(3, 1))
    model = ORDERED + b"(" + string("w") + w + b"q\1" + string("tied") + b"h\1u" + dict_of(_metadata=ORDERED) + b"b"
    return checkpoint(program(dict_of(model=model, n=integer(7))))


def calling_pickles(marker: Path) -> Iterator[tuple[str, bytes]]:
    """Pickles that create the marker under the standard library's unpickler."""
    command, python = string(f"touch '{marker}'"), string(f"open({str(marker)!r}, 'w')")
    system = name("os", "system")
    yield "GLOBAL os.system", program(system + tuple_of(command) + b"R")
    yield "GLOBAL posix.system", program(name("posix", "system") + tuple_of(command) + b"R")
    yield "GLOBAL builtins.eval", program(name("builtins", "eval") + tuple_of(python) + b"R")
    yield "GLOBAL builtins.exec", program(name("builtins", "exec") + tuple_of(python) + b"R")
    yield "STACK_GLOBAL", program(string("os") + string("system") + b"\x93" + tuple_of(command) + b"R", 4)
    yield (
        "STACK_GLOBAL dotted",
        program(string("zipfile") + string("os.system") + b"\x93" + tuple_of(command) + b"R", 4),
    )
    yield "INST", program(b"(" + command + b"ios\nsystem\n")
    yield "OBJ", program(b"(" + system + command + b"o")
    shell = name("subprocess", "getoutput")
    yield "memo", program(shell + b"q\0" + b"0" + b"h\0" + tuple_of(command) + b"R")
    getattr_ = name("builtins", "getattr")
    found = getattr_ + tuple_of(name("os", "path") + b"q\0" + b"0h\0", string("os")) + b"R"
    yield "getattr", program(getattr_ + tuple_of(found, string("system")) + b"R" + tuple_of(command) + b"R")
    # the state of a foreign object: its __setstate__ is os.system
    foreign = name("types", "SimpleNamespace") + b")R" + dict_of(__setstate__=system) + b"b"
    yield "BUILD", program(foreign + command + b"b")


def hostile_pickles(marker: Path) -> Iterator[tuple[str, bytes]]:
    """Pickles to refuse, bare and in an archive."""
    yield from calling_pickles(marker)
    for module, attribute in (
        ("numpy", "load"),
        ("torch", "load"),
        ("torch.storage", "_load_from_bytes"),
        ("os", "x y"),
    ):
        yield f"names {module}.{attribute}", program(name(module, attribute))
    yield "control characters in a name", program(string("a\x1b\u2028") + string("b\r\n") + b"\x93", 4)
    yield "NEWOBJ", program(name("subprocess", "Popen") + tuple_of(string("true")) + b"\x81")
    yield "NEWOBJ_EX", program(name("subprocess", "Popen") + b")}\x92", 4)
    yield "EXT1", program(b"\x82\1)R")
    yield "EXT4", program(b"\x84" + u32(1 << 30) + b")R")
    yield "PERSID", program(b"Pstorage\n")
    yield "REDUCE of a string", program(string("os.system") + b")R")
    yield "BUILD of a list", program(b"]}b")
    yield "BUILD of nothing", program(b"}b")
    yield "LONG_BINPUT 2^31", program(b"Nr" + u32(1 << 31))
    yield "LONG_BINPUT 2^32-1", program(b"Nr" + u32((1 << 32) - 1))
    yield "BINGET of nothing", program(b"h\5")
    for opcode in (b"X", b"B"):
        yield f"length 2^31 for {opcode!r}", program(opcode + u32(1 << 31) + b"x")
    for opcode in (b"\x8d", b"\x8e", b"\x96", b"\x95"):
        yield f"length 2^63 for {opcode!r}", program(opcode + u64((1 << 63) - 1) + b"x")
    yield "LONG4 2^31-1", program(b"\x8b" + u32((1 << 31) - 1) + b"\1")
    yield "a long integer", program(b"\x8a\xff" + b"\x7f" * 255)
    yield "a longer integer", program(b"L" + b"9" * 100_000 + b"L\n")
    yield "a million steps", program(b"]" * 1_000_000)
    yield "a tuple of depth 500,000 for a key", program(b"})" + b"\x85" * 500_000 + b"Ns")
    yield "an unhashable key", program(b"}]Ns")
    yield "half a pair", program(b"}(K\1u")
    yield "no values", program(b"")
    yield "two values", program(b"NN")
    yield "an open mark", program(b"(N")
    yield "no mark", program(b"Nt")
    yield "no stop", b"\x80\2N"
    yield "a set", program(b"\x8f", 4)
    # repr of this list of lists of lists ... would never end
    laughs = b"]" + b"".join(
        b"q" + bytes([i]) + b"0](" + b"h" + bytes([i]) + b"h" + bytes([i]) + b"e" for i in range(90)
    )
    yield "a billion laughs for a name", program(laughs + string("x") + b"\x93", 4)
    yield "binary noise", bytes(range(256)) * 4
    yield "cut", program(string("abcdef"))[:9]


def hostile_checkpoints(marker: Path) -> Iterator[tuple[str, bytes]]:
    for case, pickle in hostile_pickles(marker):
        yield f"pickle: {case}", checkpoint(pickle)
    good = small_checkpoint()
    for length in range(1, len(good), 29):
        yield f"cut to {length} bytes", good[:length]
    yield "empty", b""
    one = (ints(6), ints(1))
    tensors = {
        "past the end": rebuilt(ints(7), ints(1)),
        "offset past the end": rebuilt(*one, offset=b"K\1"),
        "negative offset": rebuilt(ints(5), ints(1), offset=integer(-1)),
        "bool offset": rebuilt(ints(5), ints(1), offset=b"\x88"),
        "float offset": rebuilt(ints(5), ints(1), offset=b"G" + bytes(8)),
        "negative size": rebuilt(ints(-1), ints(1)),
        "negative stride": rebuilt(ints(6), ints(-1)),
        "bool size": rebuilt(tuple_of(b"\x88"), ints(1)),
        "expanded, stride 0": rebuilt(ints(10**6), ints(0)),
        "overlapping strides": rebuilt(ints(3, 2), ints(1, 1)),
        "overlapping as_strided": rebuilt(ints(2, 3), ints(2, 1)),
        "more sizes than strides": rebuilt(ints(2, 3), ints(1)),
        "sizes 2^63": rebuilt(ints(1 << 63, 1 << 63), ints(1, 1)),
        "an empty tensor of absurd sizes": rebuilt(ints(0, 1 << 62, 1 << 62), ints(1, 1, 1)),
        "40 dimensions": rebuilt(ints(*[1] * 40), ints(*[1] * 40)),
        "a list for a shape": rebuilt(b"]K\6a", ints(1)),
        "no storage": rebuilt(*one, of=b"N"),
        "a string for a storage": rebuilt(*one, of=string("0")),
        "too few arguments": REBUILD + tuple_of(storage("0", 6)) + b"R",
        "lazy negation": REBUILD
        + tuple_of(storage("0", 6), b"K\0", *one, b"\x89", ORDERED, dict_of(neg=b"\x88"))
        + b"R",
        "storage too small": rebuilt(*one, of=storage("0", 1000)),
        "storage too large": rebuilt(ints(1), ints(1), of=storage("0", 1)),
        "storage of 2^62": rebuilt(ints(1), ints(1), of=storage("0", 1 << 62)),
        "storage of -1": rebuilt(ints(1), ints(1), of=storage("0", -1)),
        "missing storage": rebuilt(*one, of=storage("1", 6)),
        "escaping storage": rebuilt(*one, of=storage("../../../etc/passwd", 6)),
        "an unknown kind": rebuilt(*one, of=storage("0", 6, name("torch", "QInt8Storage"))),
        "a kind that is no storage": rebuilt(*one, of=storage("0", 6, REBUILD)),
        "a string for a kind": rebuilt(*one, of=storage("0", 6, string("torch.FloatStorage"))),
        "a short persistent id": tuple_of(string("storage"), FLOAT) + b"Q",
        "a persistent id of a module": tuple_of(string("module"), FLOAT, string("0"), string("cpu"), b"K\6") + b"Q",
        "BUILD of a tensor": rebuilt(*one) + dict_of(shape=ints(1000)) + b"b",
        "BUILD of a name": REBUILD + tuple_of(b"N", dict_of(__defaults__=b")")) + b"b",
        "BUILD of a class": name("collections", "OrderedDict") + dict_of(x=b"N") + b"b",
        "NEWOBJ of a class": name("collections", "OrderedDict") + b")\x81",
        "OrderedDict of pairs": name("collections", "OrderedDict") + tuple_of(b"]") + b"R",
        "REDUCE of a storage": FLOAT + tuple_of(b"K\6") + b"R",
        "REDUCE of a tensor": rebuilt(*one) + b")R",
        "a million arguments": name("torch", "Size") + b"(" + b"N" * 500_000 + b"tR",
        "a tensor for a key": b"}" + rebuilt(*one) + b"Ns",
    }
    for case, value in tensors.items():
        yield case, checkpoint(program(value))
    plain = program(b"}")
    yield "no data.pkl", checkpoint(None)
    yield "two data.pkl", zipped({"a/data.pkl": plain, "b/data.pkl": plain})
    yield "big-endian", checkpoint(plain, order=b"big")
    yield "unknown byte order", checkpoint(plain, order=b"middle" * 1000)
    yield "TorchScript", checkpoint(plain, extra="constants.pkl")
    yield "legacy", b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
    yield "legacy tar", bytes(257) + b"ustar" + bytes(250)
    yield "a bare pickle", plain
    yield "compressed", zipped({"ckpt/data.pkl": plain}, zipfile.ZIP_DEFLATED)
    yield "zip bomb", zipped({"ckpt/data.pkl": plain, "ckpt/data/0": bytes(1 << 25)}, zipfile.ZIP_DEFLATED)
    yield "not a zip inside", b"PK\3\4" + bytes(1000)
    yield "a huge pickle", checkpoint(bytes((1 << 24) + 1))
    yield "a directory of 2^31 bytes", good[:-10] + u32(1 << 31) + good[-6:]
    # Central directory records: +10 the method, +8 flags, +20 compressed and +24 true size, +42 the offset.
    first = good.index(b"PK\1\2")
    last = good.rindex(b"PK\1\2")
    patches = {
        "an entry over the next": (first + 20, u32(good.index(b"PK\3\4", 4) - 36) * 2),
        "an entry over the directory": (last + 20, u32(25) * 2),
        "an entry of 2^32-2": (last + 20, u32((1 << 32) - 2) * 2),
        "an entry of two sizes": (last + 24, u32(1 << 30)),
        "two entries in one place": (last + 42, u32(0)),
        "an entry inside another": (last + 42, u32(40)),
        "an offset of 2^31": (last + 42, u32(1 << 31)),
        "an encrypted entry": (last + 8, b"\1\0"),
        "an unknown method": (last + 10, b"\x63\0"),
    }
    for case, (at, raw) in patches.items():
        yield case, good[:at] + raw + good[at + len(raw) :]
