"""The GGUF reader: right on valid files, one clear error on hostile ones, cheap on both."""

from __future__ import annotations

import os
import time
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from conftest import SHARED
from hostile_files import gguf as build
from hostile_files import hostile_ggufs, pair, small_gguf, tensor, text
from hypothesis import given, settings
from hypothesis import strategies as st

from tcinfer.errors import FileError
from tcinfer.gguf.reader import read

HOSTILE = dict(hostile_ggufs())


def refused(path: Path) -> str:
    """The message of the `FileError` that reading raises, which is one line and names the file."""
    with pytest.raises(FileError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    assert len(message) < len(str(path)) + 400
    return message


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def outcome(path: Path) -> str:
    """The message of the `FileError` that reading raises, or nothing if it reads; another error passes."""
    try:
        read(path)
    except FileError as error:
        return str(error)
    return ""


def same_as_gguf_py(path: Path) -> None:
    """`read` and gguf-py's own reader agree on every value and every tensor."""
    mine, theirs = read(path), gguf.GGUFReader(path)
    fields = {key: field for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert list(mine.metadata) == list(fields)
    for key, field in fields.items():
        value = mine.metadata[key]
        if isinstance(value, np.ndarray):
            assert not value.flags.writeable
            assert value.flags.aligned
            value = value.tolist()
        assert value == field.contents()
        assert type(value) is type(field.contents())
    assert list(mine.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor_ in theirs.tensors:
        info = mine.tensors[tensor_.name]
        assert info.kind == tensor_.tensor_type
        assert info.shape == tuple(tensor_.shape.tolist()[::-1])
        assert info.data.tobytes() == tensor_.data.tobytes()
        assert info.data.shape[0] == int(np.prod(info.shape[:-1]))
        assert not info.data.flags.writeable


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_is_one_clear_error(tmp_path: Path, case: str) -> None:
    path = written(tmp_path / "x.gguf", HOSTILE[case])
    start = time.process_time()
    refused(path)
    assert time.process_time() - start < 1


def test_hostile_files_take_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    tracemalloc.start()
    try:
        for content in HOSTILE.values():
            refused(written(path, content))
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("version 1", "version 1"),
        (f"version {3 << 24}", "big-endian"),
        ("alignment 13", "13"),
        ("tensor kind 31", "kind 31"),
        ("overlap", "'a' and 'b' overlap"),
        ("duplicate key", "'general.architecture' is there twice"),
        ("n_dims 1000000", "1000000 dimensions"),
    ],
)
def test_message_names_what_is_wrong(tmp_path: Path, case: str, words: str) -> None:
    assert words in refused(written(tmp_path / "x.gguf", HOSTILE[case]))


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "pipe" in refused(tmp_path / "pipe")
    assert "folder" in refused(tmp_path)
    assert "device" in refused(Path("/dev/zero"))
    assert "No such file" in refused(tmp_path / "missing")
    assert "empty" in refused(written(tmp_path / "empty", b""))
    for odd in ("a\nb", "a\0b", "a\udce9"):
        with pytest.raises(FileError) as caught:
            read(tmp_path / odd)
        assert str(caught.value).isprintable()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(tmp_path: Path) -> None:
    path = written(tmp_path / "x.gguf", small_gguf())
    path.chmod(0)
    assert "Permission" in refused(path)


def test_every_value_type_as_gguf_py_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    limits = {"uint8": 255, "int8": -128, "uint16": 65535, "int16": -32768, "uint32": (1 << 32) - 1}
    limits |= {"int32": -(1 << 31), "uint64": (1 << 64) - 1, "int64": -(1 << 63)}
    for kind, value in limits.items():
        getattr(writer, f"add_{kind}")(f"a.{kind}", value)
        types = gguf.GGUFValueType
        writer.add_key_value(f"b.{kind}", [value, 0, 1], types.ARRAY, types[kind.upper()])
    writer.add_float32("a.float32", 0.1)
    writer.add_float64("a.float64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "é\n\0")
    writer.add_array("b.float", [0.5, -1.5])
    writer.add_array("b.bool", [True, False, True])
    writer.add_array("b.string", ["", "a", "日本"])
    rng = np.random.default_rng(0)
    writer.add_tensor("vector", rng.normal(size=5).astype(np.float32))
    writer.add_tensor("cube", rng.normal(size=(2, 3, 4)).astype(np.float16))
    quantised = gguf.quants.quantize(rng.normal(size=(3, 64)).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("quantised", quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    same_as_gguf_py(path)
    assert read(path).tensors["quantised"].data.shape == (3, 68)
    assert read(path).metadata["b.bool"].dtype == np.bool_  # type: ignore[union-attr]


def test_small_file_and_version_2(tmp_path: Path) -> None:
    path = written(tmp_path / "x.gguf", small_gguf())
    file = read(path)
    assert (file.path, file.version) == (path, 3)
    assert file.metadata["a.tokens"] == ["<s>", "é", ""]
    w = file.tensors["w"]
    assert w.shape == (2, 8)
    np.testing.assert_array_equal(w.data.view(np.float32), np.arange(16).reshape(2, 8))
    assert file.tensors["q"].data.shape == (1, 34)
    same_as_gguf_py(path)
    assert read(written(path, build((pair("k", 7, b"\1"),), version=2))).version == 2


def test_empty_arrays_and_large_alignment(tmp_path: Path) -> None:
    pairs = (
        pair("general.alignment", 4, (65536).to_bytes(4, "little")),
        pair("none", 9, (8).to_bytes(4, "little") + bytes(8)),
        pair("nothing", 9, (6).to_bytes(4, "little") + bytes(8)),
    )
    file = read(written(tmp_path / "x.gguf", build(pairs, (tensor("t", (2,)),), b"\0\0\x80?" * 2, alignment=65536)))
    assert file.metadata["none"] == []
    assert np.asarray(file.metadata["nothing"]).shape == (0,)
    np.testing.assert_array_equal(file.tensors["t"].data.view(np.float32), [[1, 1]])


def test_a_file_of_a_hundred_thousand_strings_is_quick(tmp_path: Path) -> None:
    count = 100_000
    strings = b"".join(text(f"token {i}") for i in range(count))
    path = written(tmp_path / "x.gguf", build((pair("k", 9, b"\x08\0\0\0" + count.to_bytes(8, "little") + strings),)))
    start = time.process_time()
    assert len(read(path).metadata["k"]) == count  # type: ignore[arg-type]
    assert time.process_time() - start < 0.5


@settings(max_examples=500, deadline=1000)
@given(st.lists(st.tuples(st.integers(0, len(small_gguf()) - 1), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bytes_read_or_fail_clearly(tmp_path_factory: pytest.TempPathFactory, flips: list) -> None:
    content = bytearray(small_gguf())
    for at, mask in flips:
        content[at] ^= mask
    path = written(tmp_path_factory.getbasetemp() / "flipped.gguf", bytes(content))
    assert outcome(path).isprintable()


FILES = ["models/stories260K/stories260K-f32.gguf", "data/tokenizers/gguf_vocab/ggml-vocab-phi-3.gguf"]


@pytest.mark.parametrize("file", FILES)
def test_real_files_as_gguf_py_reads_them(file: str) -> None:
    if not (SHARED / file).exists():
        pytest.skip(f"{SHARED / file} is not here")
    same_as_gguf_py(SHARED / file)
