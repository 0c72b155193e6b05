"""Every hostile file through the command line: one line, status 1, within seconds, in little memory."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from conftest import BACKENDS, SMALL, random_weights
from hostile_files import hostile_checkpoints, hostile_ggufs
from test_cli import COMMAND, FAST, command, refused, write_model

from tcinfer.gguf import schema
from tcinfer.memory.tensor_cache import Options
from tcinfer.tokenizer import MODEL, SCORES, TOKENS, TYPES

MARKER = Path("/tmp") / f"tcinfer-hostile-file-ran-{os.getpid()}"
GGUFS = dict(hostile_ggufs())
CHECKPOINTS = dict(hostile_checkpoints(MARKER))
SECONDS = 5
BYTES = 500 * 10**6
MISSING = object()
TENSOR_CACHE = {"memory": "tensor", "window": 16, "options": Options()}
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder; at the end it holds no more than the case's own file, and nothing has run."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert {path.name for path in tmp_path.iterdir()} <= {"case.gguf", "case.pt", "before.gguf"}
    assert not MARKER.exists()


# Linux counts what the parent holds while a child starts as the child's own: between pytest, which may hold more than
# the limit, and the command stands a small process that starts it and adds a line about it.
LAUNCHER = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdin=subprocess.DEVNULL, timeout=60)
print(done.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def measured(*arguments: str) -> tuple[str, float, int]:
    """The line with which a process of its own refuses, its seconds, and the bytes it had at most."""
    start = time.monotonic()
    command = [sys.executable, "-SEc", LAUNCHER, COMMAND, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    *out, last = done.stdout.splitlines()
    status, most = map(int, last.split())
    line = refused(subprocess.CompletedProcess(arguments, status, "\n".join(out), done.stderr))
    return line, time.monotonic() - start, most * 1024


@pytest.mark.parametrize("arguments", [("inspect", "case.gguf"), ("generate", *FAST, "-p", "x", "-m", "case.gguf")])
def test_every_hostile_gguf(folder: Path, arguments: tuple[str, ...]) -> None:
    for case, content in GGUFS.items():
        (folder / "case.gguf").write_bytes(content)
        start = time.monotonic()
        assert "case.gguf: " in refused(command(*arguments)), case
        assert time.monotonic() - start < SECONDS, case


def test_every_hostile_checkpoint(folder: Path) -> None:
    for case, content in CHECKPOINTS.items():
        (folder / "case.pt").write_bytes(content)
        start = time.monotonic()
        line = refused(command("convert", "case.pt"))
        assert "case.pt: " in line, case
        assert len(line) < 1000, case
        assert time.monotonic() - start < SECONDS, case


@pytest.mark.parametrize(
    "case",
    [
        "49 bytes",
        "cut by one byte",
        "2147483648 strings",
        "18446744073709551615 bytes of token",
        "9223372036854775808 tensors",
        "a dimension of 9223372036854775808",
        "4 dimensions of 65536",
        "alignment 2147483648",
    ],
)
def test_hostile_gguf_in_a_process(folder: Path, case: str) -> None:
    (folder / "case.gguf").write_bytes(GGUFS[case])
    _, seconds, most = measured("generate", "-m", "case.gguf", "-p", "x")
    assert seconds < SECONDS
    assert most < BYTES


@pytest.mark.parametrize(
    "case",
    [
        "pickle: GLOBAL os.system",
        "pickle: a billion laughs for a name",
        "pickle: a million steps",
        "expanded, stride 0",
        "storage of 2^62",
        "zip bomb",
        "a huge pickle",
        "an entry of 2^32-2",
    ],
)
def test_hostile_checkpoint_in_a_process(folder: Path, case: str) -> None:
    (folder / "case.pt").write_bytes(CHECKPOINTS[case])
    _, seconds, most = measured("convert", "case.pt")
    assert seconds < SECONDS
    assert most < BYTES


# Files that are well formed and make no model


def model_file(path: Path, keys: dict[str, Any], weights: dict[str, Any], **changes: Any) -> Path:
    """SMALL's file with some keys and tensors replaced, added, or left out (MISSING). A pair as a value is
    (value, GGUF type)."""
    config = replace(SMALL, **changes)
    tokens = {MODEL: "char", TOKENS: [chr(0x61 + i) for i in range(config.vocab_size)]}
    metadata = schema.to_metadata(config) | tokens | keys
    writer = gguf.GGUFWriter(path, metadata.pop("general.architecture"))
    for key, value in metadata.items():
        if isinstance(value, tuple):
            writer.add_key_value(key, *value)
        elif value is not MISSING:
            kind = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}[type(value)]
            kind = "INT32" if kind == "UINT32" and value < 0 else kind
            writer.add_key_value(key, value, gguf.GGUFValueType[kind])
    for name, values in (random_weights(config) | weights).items():
        if values is not MISSING:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


LARGE = 2**31 - 1
U64, F64 = gguf.GGUFValueType.UINT64, gguf.GGUFValueType.FLOAT64
KEYS = [
    ("general.architecture", "gpt2", "architecture 'gpt2' is not supported"),
    ("tcgpt.attention.head_count", 0, "n_heads must be"),
    ("tcgpt.attention.head_count", 3, "is not a multiple|has shape"),
    ("tcgpt.attention.head_count", LARGE, "is not a multiple|has shape"),
    ("tcgpt.attention.head_count", [4, 4, 4], "n_heads has 3 values, and the model 2 layers"),
    ("tcgpt.attention.head_count", [4, 2], "has shape|is not a multiple"),
    ("tcgpt.embedding_length", [32, 32], "must be of type int, not an array of 2"),
    ("tcgpt.attention.head_count", "4", "must be of type int"),
    ("tcgpt.attention.head_count", 4.0, "must be of type int"),
    ("tcgpt.attention.head_count", True, "must be of type int"),
    ("tcgpt.attention.head_count", MISSING, "'tcgpt.attention.head_count' is missing"),
    ("tcgpt.attention.head_count_kv", 0, "n_kv_heads must be"),
    ("tcgpt.attention.head_count_kv", 3, "is not a multiple"),
    ("tcgpt.attention.key_length", 7, "differs from the key length"),
    ("tcgpt.attention.value_length", 16, "differs from the key length"),
    ("tcgpt.block_count", 0, "n_layers must be"),
    ("tcgpt.block_count", 2**31, "but the file has"),
    ("tcgpt.block_count", (2**63, U64), "but the file has"),
    ("tcgpt.block_count", 3, "'blk.2.attn_norm.weight' is missing"),
    ("tcgpt.block_count", 1, "'blk.1.attn_norm.weight' has no place"),
    ("tcgpt.embedding_length", LARGE, "has shape"),
    ("tcgpt.feed_forward_length", LARGE, "has shape"),
    ("tcgpt.vocab_size", LARGE, "the embedding has 50 rows"),
    ("tcgpt.context_length", -1, "context_length must be"),
    ("tcgpt.attention.sliding_window", LARGE, "smaller window"),
    ("tcgpt.attention.sliding_window", (2**63, U64), "window must be"),
    ("tcgpt.attention.layer_norm_epsilon", NAN, "norm_eps must be"),
    ("tcgpt.attention.layer_norm_epsilon", -1.0, "norm_eps must be"),
    ("tcgpt.rope.freq_base", NAN, "rope_base must be"),
    ("tcgpt.rope.freq_base", 0.0, "rope_base must be"),
    ("tcgpt.rope.freq_base", INF, "rope_base must be"),
    ("tcgpt.rope.dimension_count", 10, "rope_dim 10 is not supported"),
    ("tcgpt.rope.scaling.type", "longrope", "rope_scaling must be one of"),
    ("tcgpt.rope.scaling.factor", 0.0, "rope_factor must be"),
    ("tcgpt.foo", 1, "key 'tcgpt.foo' is not known"),
    ("tcinfer.schema_version", 2, "is 2, this version of tcinfer reads 1: update"),
    ("tcinfer.schema_version", 0, "is 0, .*convert the checkpoint again"),
    ("tcinfer.schema_version", MISSING, "'tcinfer.schema_version' is missing"),
    ("tcinfer.memory.foo", 1, "key 'tcinfer.memory.foo' is not known"),
    ("tcinfer.memory.mechanism", "quantum", "mechanism 'quantum' is not known"),
    ("tcinfer.memory.mechanism", "infini", "key 'tcinfer.memory.write_on_evict' is not known"),
    ("tcinfer.memory.sinks", LARGE, "smaller window"),
    ("tcinfer.memory.sink_positions", "elsewhere", "sink_positions must be one of"),
    ("tcinfer.memory.key_conv", 2, "'blk.0.attn_key_conv' is missing"),
    ("tcinfer.memory.key_conv", 3, "key_conv must be one of"),
    ("tcinfer.memory.rule", "hebb", "rule must be one of outer, delta, wedge"),
    ("tcinfer.memory.slots", 0, "slots must be"),
    ("tcinfer.memory.slots", LARGE, "has shape|is missing"),
    ("tcinfer.memory.normalize_k", 1, "must be of type bool"),
    ("tcinfer.memory.value_scale", NAN, "value_scale must be"),
    ("tcinfer.memory.router_temperature", 0.0, "router_temperature must be"),
    ("tcinfer.memory.two_timescales", True, "has shape|is missing"),
    (MODEL, "wordpiece", "tokenizer model 'wordpiece' is not supported"),
    (TOKENS, [1, 2, 3], "should be a list of strings"),
    (TOKENS, ["a", ""], "entry 1 is empty"),
    (TOKENS, ["a"] * 51, "the model's vocabulary is 50|twice"),
    (TOKENS, MISSING, "should be a list of strings"),
    ("tokenizer.ggml.bos_token_id", 50, "is not one of 50 ids"),
    ("tokenizer.ggml.add_bos_token", 1, "should be bool"),
]


@pytest.mark.parametrize(("key", "value", "says"), KEYS, ids=[f"{key}={str(value)[:20]}" for key, value, _ in KEYS])
def test_a_key_that_makes_no_model(folder: Path, key: str, value: Any, says: str) -> None:
    path = model_file(folder / "case.gguf", {key: value}, {}, **TENSOR_CACHE)
    line = refused(command("generate", *FAST, "-m", path, "-p", "abc", "-n", 2))
    assert re.search(says, line)
    assert command("inspect", path).status == ("smaller window" not in says)  # inspect needs no session


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({SCORES: ["a"] * 50, TYPES: [1] * 50}, "50 floats"),
        ({SCORES: [0.5] * 50, TYPES: [1.5] * 50}, "50 integers"),
        ({SCORES: [0.5] * 49, TYPES: [1] * 50}, "50 floats"),
        ({SCORES: [NAN] * 50, TYPES: [1] * 50}, "not finite"),
        ({SCORES: 1.0, TYPES: 1}, "50 floats|50 integers"),
    ],
)
def test_tokenizer_arrays_of_the_wrong_type(folder: Path, keys: dict[str, Any], says: str) -> None:
    path = model_file(folder / "case.gguf", {MODEL: "llama"} | keys, {})
    assert re.search(says, refused(command("inspect", path)))


NORM, MATRIX = "blk.1.ffn_norm.weight", "blk.1.ffn_up.weight"


def holed(name: str, value: float = NAN) -> np.ndarray:
    """A tensor of SMALL with one bad value."""
    values = random_weights(SMALL)[name]
    values.flat[-1] = value
    return values


TENSORS = [
    (NORM, MISSING, f"'{NORM}' is missing"),
    (MATRIX, MISSING, f"'{MATRIX}' is missing"),
    ("token_embd.weight", MISSING, "no matrix 'token_embd.weight'"),
    ("token_embd.weight", np.ones(50, np.float32), "no matrix 'token_embd.weight'"),
    ("blk.0.extra", np.ones(4, np.float32), "'blk.0.extra' has no place"),
    ("blk.7.attn_norm.weight", np.ones(32, np.float32), "has no place"),
    (NORM, np.ones(31, np.float32), "has shape [31], the model needs [32]"),
    (NORM, np.ones((32, 32), np.float32), "has shape"),
    (MATRIX, np.ones((32, 64), np.float32), "has shape [32, 64], the model needs [64, 32]"),
    (MATRIX, np.ones((64, 32), np.int32), "is I32; this version unpacks F32"),
    (NORM, holed(NORM), f"'{NORM}' holds NaN or Inf"),
    (NORM, holed(NORM, -INF), f"'{NORM}' holds NaN or Inf"),
]


@pytest.mark.parametrize(("name", "values", "says"), TENSORS)
def test_a_tensor_that_makes_no_model(folder: Path, name: str, values: Any, says: str) -> None:
    path = model_file(folder / "case.gguf", {}, {name: values})
    for arguments in (("inspect", path), ("generate", *FAST, "-m", path, "-p", "abc")):
        assert says in refused(command(*arguments))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["NaN in F32", "NaN in Q8_0", "Inf in Q4_1", "overflow"])
def test_broken_matrices_end_at_the_first_token(folder: Path, backend: str, kind: str) -> None:
    weights: dict[str, Any] = {MATRIX: holed(MATRIX)}
    if kind == "overflow":
        weights = {MATRIX: np.full((64, 32), 3e38, np.float32), NORM: np.full(32, 3e38, np.float32)}
    path = folder / "case.gguf"
    if "Q" in kind:
        write_model(folder / "before.gguf", "abc", vocab_size=3)
        quantised = gguf.GGMLQuantizationType[kind.split()[-1]]
        packed = gguf.quantize(random_weights(SMALL)[MATRIX], quantised)
        packed[-1, :2] = list(struct.pack("<e", NAN if "NaN" in kind else INF))  # the scale of a row's only block
        writer = gguf.GGUFWriter(path, "tcgpt")
        before = gguf.GGUFReader(folder / "before.gguf")
        for name, field in before.fields.items():
            if not name.startswith("GGUF.") and name != "general.architecture":
                writer.add_key_value(name, field.contents(), field.types[0])
        for tensor in before.tensors:
            same = tensor.name != MATRIX
            writer.add_tensor(tensor.name, tensor.data if same else packed, raw_dtype=None if same else quantised)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    else:
        model_file(path, {}, weights)
    line, *_ = measured("generate", "--backend", backend, "-m", str(path), "-p", "abcabc")  # no warnings beside it
    assert "not finite" in line


def test_a_window_of_gigabytes_costs_nothing(folder: Path) -> None:
    """The memory of a window is touched token by token: a large one works, an absurd one is refused."""
    model = write_model(folder / "case.gguf", "abc", vocab_size=3)
    window = ("--memory", "window", "--window")
    line, seconds, most = measured("generate", *FAST, "-m", str(model), "-p", "ab", *window, str(2**31 - 1))
    assert "smaller window" in line
    assert seconds < SECONDS
    assert most < BYTES


@pytest.mark.parametrize("kilobytes", [200_000, 300_000])
def test_a_limit_on_memory_is_named(kilobytes: int) -> None:
    """Where not even the libraries can be loaded."""
    line = f"ulimit -v {kilobytes}; {COMMAND} generate -p hi -n 3"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "output" not in done.stderr
    assert "memory" in done.stderr.splitlines()[-1]
