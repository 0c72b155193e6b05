"""`quantize`, and GGUF files as a family of checkpoints: values, metadata with its types, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from conftest import SMALL, random_weights, shared, smollm2
from gguf.constants import GGUFValueType as Type
from hostile_files import small_gguf
from plans import random_matrix
from test_cli import command, refused, write_model
from test_hostile_cli import model_file

import tcinfer
from tcinfer.converters.write import OUTTYPES
from tcinfer.gguf import reader, schema
from tcinfer.kernels.reference.quants import Kind, unpack
from tcinfer.loader import bundled
from tcinfer.memory.tensor_cache import Options
from tcinfer.transformer import tensors as specs_of

PACKING = ("general.file_type", "general.quantization_version")
TENSOR = {"memory": "tensor", "window": 16, "options": Options(two_timescales=True, token_gate=True, token_rate=True)}
MATRIX = "blk.1.ffn_up.weight"
IDS = np.random.default_rng(3).integers(0, SMALL.vocab_size, 60)


def quantized(source: Path, out: Path, kind: str, *options: str) -> Path:
    done = command("quantize", source, out, kind, *options)
    assert done.status == 0, done.err
    return out


def values(path: Path) -> dict[str, np.ndarray]:
    return {n: unpack(t.data, t.kind).reshape(t.shape) for n, t in reader.read(path).tensors.items()}


def described(path: Path) -> dict[str, tuple[Any, ...]]:
    """Every metadata value with its types, by gguf-py, but for what tells the packing and the file itself."""
    found = gguf.GGUFReader(path).fields.items()
    return {
        key: (tuple(field.types), field.contents())
        for key, field in found
        if key not in PACKING and not key.startswith("GGUF.")
    }


def llama_file(path: Path, *more: tuple[Any, ...], matrices: Kind = Kind.F32) -> Path:
    """A plain Llama of SMALL's size, 256 wide, with `more` metadata (key, value, type and an array's own type)."""
    rng = np.random.default_rng(5)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value, *types in more:
        writer.add_key_value(key, value, *types)
    names = [
        f"blk.0.{name}" for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down", "ffn_gate")
    ]
    for name in ("token_embd", *names):
        if matrices == Kind.F32:
            writer.add_tensor(f"{name}.weight", (rng.normal(size=(256, 256)) / 16).astype(np.float32))
        else:
            writer.add_tensor(f"{name}.weight", random_matrix(matrices, 256, 256).data, raw_dtype=matrices)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(256, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# Values


def test_logits_stay_close_and_the_file_gets_smaller(tmp_path: Path) -> None:
    source = write_model(tmp_path / "in.gguf", **TENSOR)
    out = quantized(source, tmp_path / "out.gguf", "q8_0", "--verify")
    assert out.stat().st_size < source.stat().st_size / 2
    want, got = (tcinfer.load(p, backend="numpy").session().feed(IDS, all_logits=True) for p in (source, out))
    difference = np.abs(got - want).max() / np.abs(want).max()
    assert 1e-5 < difference < 0.1  # it costs something, and not much


def test_what_is_no_matrix_stays_as_it_is_bit_for_bit(tmp_path: Path) -> None:
    source = write_model(tmp_path / "in.gguf", **TENSOR)
    out = quantized(source, tmp_path / "out.gguf", "q4_0", "--no-verify")
    before, after = reader.read(source).tensors, reader.read(out).tensors
    specs = specs_of(tcinfer.load(out, backend="numpy").config)
    assert before.keys() == after.keys()
    kept = [name for name in after if not specs[name].matrix]
    for part in (
        "tc_decay",
        "tc_rate",
        "tc_gate.bias",
        "tc_gate.weight",
        "tc_alpha",
        "tc_rate_proj",
        "attn_norm.weight",
    ):
        assert f"blk.0.{part}" in kept
    for name, tensor in after.items():
        assert tensor.kind == (Kind.F32 if name in kept else Kind.Q4_0)
        if name in kept:
            assert tensor.data.tobytes() == before[name].data.tobytes()


def test_f16_and_f32_there_and_back(tmp_path: Path) -> None:
    source = write_model(tmp_path / "in.gguf", **TENSOR)
    half = quantized(source, tmp_path / "half.gguf", "f16")
    single = quantized(half, tmp_path / "single.gguf", "F32")
    again = quantized(single, tmp_path / "again.gguf", "f16")
    assert half.read_bytes() == again.read_bytes()
    for name, x in values(half).items():
        np.testing.assert_array_equal(x, values(single)[name])
    assert {t.kind for t in reader.read(single).tensors.values()} == {Kind.F32}


@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.Q8_0], ids=lambda kind: kind.name)
def test_every_packed_kind_is_unpacked_as_gguf_py_does_it(kind: Kind, tmp_path: Path) -> None:
    source = llama_file(tmp_path / "in.gguf", matrices=kind)
    out = quantized(source, tmp_path / "out.gguf", "f32", "--no-verify")
    want = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(source).tensors}
    for name, x in values(out).items():
        np.testing.assert_array_equal(x, want[name])


# Metadata

MORE = [
    ("general.name", "naïve", Type.STRING),
    ("general.tags", ["a", "", "é"], Type.ARRAY, Type.STRING),
    ("general.file_type", 0, Type.UINT32),
    ("general.alignment", 32, Type.UINT32),
    ("tokenizer.chat_template", "{{ messages }}", Type.STRING),
    ("llama.rope.scale", 2.5, Type.FLOAT32),
    ("x.u8", 255, Type.UINT8),
    ("x.i8", -128, Type.INT8),
    ("x.u16", 65535, Type.UINT16),
    ("x.i16", -32768, Type.INT16),
    ("x.u32", 2**32 - 1, Type.UINT32),
    ("x.i32", 7, Type.INT32),
    ("x.f32", 0.1, Type.FLOAT32),
    ("x.bool", True, Type.BOOL),
    ("x.string", "line\nline", Type.STRING),
    ("x.u64", 2**64 - 1, Type.UINT64),
    ("x.i64", -(2**63), Type.INT64),
    ("x.f64", 0.1, Type.FLOAT64),
    ("x.nan", float("inf"), Type.FLOAT64),
    ("x.bools", [True, False], Type.ARRAY, Type.BOOL),
    ("x.bytes", [0, 255], Type.ARRAY, Type.UINT8),
    ("x.longs", [2**64 - 1, 0], Type.ARRAY, Type.UINT64),
    ("x.halves", [0.1, 0.2], Type.ARRAY, Type.FLOAT64),
]


def test_every_key_and_type_is_kept(tmp_path: Path) -> None:
    source = llama_file(tmp_path / "in.gguf", *MORE)
    out = quantized(source, tmp_path / "out.gguf", "q8_0")
    before, after = described(source), described(out)
    del before["general.alignment"]  # of the other file's bytes
    assert before == {key: value for key, value in after.items() if key in before}
    for key, _, *types in MORE:
        assert key in (*PACKING, "general.alignment") or after[key][0] == tuple(types)
    config = tcinfer.load(out, backend="numpy").config
    assert after.keys() - before.keys() <= schema.to_metadata(config).keys()
    assert config == tcinfer.load(source, backend="numpy").config
    assert reader.read(out).metadata["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0


@pytest.mark.parametrize("which", ["bundled", "smollm2"])
def test_metadata_of_real_files_is_the_same_before_and_after(which: str, tmp_path: Path) -> None:
    source = bundled() if which == "bundled" else smollm2()
    out = quantized(source, tmp_path / "out.gguf", "q4_0", "--no-verify")
    before, after = (reader.read(path).metadata for path in (source, out))
    if which == "bundled":
        assert before.keys() == after.keys()
        assert described(source) == described(out)
    for key, value in before.items():
        if key not in PACKING:
            np.testing.assert_array_equal(after[key], value)
            assert type(after[key]) is type(value)


def test_an_empty_array_is_told(tmp_path: Path) -> None:
    """gguf-py writes none: this one is made by hand, where a string of the same bytes was."""
    blank = bytes([0, 0, 0, 0]) + bytes(8)  # an array of no u8
    source = llama_file(tmp_path / "in.gguf", ("x.none", "1234", Type.STRING))
    old = np.uint32(Type.STRING).tobytes() + (4).to_bytes(8, "little") + b"1234"
    data = source.read_bytes()
    assert data.count(old) == 1
    source.write_bytes(data.replace(old, np.uint32(Type.ARRAY).tobytes() + blank))
    done = command("quantize", source, tmp_path / "out.gguf", "f16")
    assert (done.status, done.err) == (0, "not used: empty arrays: x.none\n")


# What is said


def test_losses_that_add_up_are_told_on_one_line(tmp_path: Path) -> None:
    source = write_model(tmp_path / "in.gguf")
    assert command("quantize", source, tmp_path / "q4_1.gguf", "q4_1").err == ""
    again = command("quantize", tmp_path / "q4_1.gguf", tmp_path / "q8_0.gguf", "q8_0")
    assert again.err == "from Q4_1 to q8_0: what each loses adds up; start from f16 or f32 if you can\n"
    assert "verified on 64 tokens: logits differ from the original's by at most" in again.out
    assert command("quantize", tmp_path / "q4_1.gguf", tmp_path / "f16.gguf", "f16").err == ""


def test_convert_takes_a_gguf_file_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_model(tmp_path / "in.gguf", "abc", vocab_size=3)
    (tmp_path / "meta.pkl").write_bytes(b"lies beside it, and is not its tokenizer")
    monkeypatch.chdir(tmp_path)
    done = command("convert", source, "--outtype", "q8_0")
    assert (done.status, done.err) == (0, "tokenizer: the file's own\n")
    assert (tmp_path / "in-q8_0.gguf").read_bytes() == quantized(source, tmp_path / "out.gguf", "q8_0").read_bytes()
    tokens = shared("models", "stories260K", "tok512.bin")
    bare = write_model(tmp_path / "bare.gguf", vocab_size=512)
    done = command("convert", bare, "-o", "with.gguf", "--tokenizer", tokens)
    assert (done.status, done.err) == (0, f"tokenizer: {tokens}\n")
    assert tcinfer.load("with.gguf", backend="numpy").tokenizer.encode("Once upon a time")


# What is refused


@pytest.mark.parametrize("how", ["itself", "symlink", "hardlink", "another way there"])
def test_a_file_is_never_its_own_output(how: str, tmp_path: Path) -> None:
    source, out = write_model(tmp_path / "in.gguf"), tmp_path / "out.gguf"
    before = source.read_bytes()
    if how == "symlink":
        out.symlink_to(source)
    elif how == "hardlink":
        os.link(source, out)
    else:
        out = source if how == "itself" else tmp_path / ".." / tmp_path.name / "in.gguf"
    assert "is the checkpoint itself" in refused(command("quantize", source, out, "q8_0"))
    assert source.read_bytes() == before


@pytest.mark.parametrize("kind", ["q9_0", "q4_k", "", "f8", "q8_0 "])
def test_unknown_types(kind: str, tmp_path: Path) -> None:
    line = refused(command("quantize", bundled(), tmp_path / "out.gguf", kind))
    assert "must be one of f32, f16, bf16, q8_0" in line
    assert not list(tmp_path.iterdir())


def test_help_names_every_type() -> None:
    words = set(command("quantize", "--help").out.replace(",", " ").replace(":", " ").replace(".", " ").split())
    assert words >= {*OUTTYPES, "q4_k", "q5_k", "q6_k"}


def test_inputs_that_are_no_model(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    good = write_model(tmp_path / "good.gguf")
    cut, plain, text = tmp_path / "cut.gguf", tmp_path / "plain.gguf", tmp_path / "x.pt"
    cut.write_bytes(good.read_bytes()[:-64])  # the last tensor ends beyond the file
    plain.write_bytes(small_gguf())
    text.write_text("no model")
    for path, says in (
        (cut, "it is cut short or damaged"),
        (plain, "no matrix 'token_embd.weight'"),
        (text, "not a GGUF file"),
        (tmp_path, "is a folder; name a file"),
        (tmp_path / "nowhere.gguf", "no such file"),
        (Path("/dev/zero"), "is a pipe or a device"),
    ):
        line = refused(command("quantize", path, out, "q8_0"))
        assert line.startswith(f"tcinfer: {path}: ")
        assert says in line
    assert not out.exists()


def test_tensors_that_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"precious")
    broken, large = random_weights(SMALL)[MATRIX], random_weights(SMALL)[MATRIX]
    broken[3, 4], large[3, 4] = np.nan, 1e6
    for values, kind, says in (
        (broken, "f32", f"tensor '{MATRIX}' holds NaN or Inf"),
        (large, "f16", f"tensor '{MATRIX}' has values beyond the range of F16: use the type bf16 or f32"),
        (np.ones((64, 32), np.int32), "f16", f"tensor '{MATRIX}' is I32; this version unpacks F32"),
        (np.ones((64, 31), np.float32), "f16", f"tensor '{MATRIX}' has shape [64, 31], the model needs [64, 32]"),
    ):
        source = model_file(tmp_path / "in.gguf", {}, {MATRIX: values})
        line = refused(command("quantize", source, out, kind))
        assert line.startswith(f"tcinfer: {source}: {says}")
    assert out.read_bytes() == b"precious"
    assert {path.name for path in tmp_path.iterdir()} == {"in.gguf", "out.gguf"}


@pytest.mark.parametrize("out", ["/nowhere/out.gguf", "/proc/out.gguf"])
def test_output_that_cannot_be_written(out: str) -> None:
    assert f"{out}: cannot be written" in refused(command("quantize", bundled(), out, "q8_0"))


# Others' readers, and a model of some size


@pytest.mark.slow
def test_smollm2_to_q8_0_goes_on_as_before(tmp_path: Path) -> None:
    out = quantized(smollm2(), tmp_path / "out.gguf", "q8_0", "--verify")
    ids = tcinfer.load(out, backend="numpy").tokenizer.encode("The capital of France is")
    want, got = (tcinfer.load(path, backend="numpy").session().feed(ids) for path in (smollm2(), out))
    assert got.argmax() == want.argmax()
    assert got @ want / np.linalg.norm(got) / np.linalg.norm(want) > 0.998


@pytest.mark.peer
def test_llama_cpp_reads_what_is_written(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra `peer`)")
    source = shared("models", "stories260K", "stories260K-f32.gguf")
    out = quantized(source, tmp_path / "out.gguf", "f16")
    texts = []
    for path in (source, out):
        peer = llama_cpp.Llama(str(path), verbose=False, n_threads=2, n_ctx=64)
        texts.append(peer("Once upon a time", max_tokens=20, temperature=0)["choices"][0]["text"])
    assert len(texts[0]) > 20
    assert texts[0] == texts[1]
