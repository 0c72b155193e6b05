"""The converter: every published form becomes a file that runs; what cannot be exact is refused, nothing half-done."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FLOATS, SHAKESPEARE, SHARED, ByBytes, shared
from hostile_files import checkpoint, integer, ints, name, program, rebuilt, storage, string
from test_cli import FAST, command, refused

import tcinfer
from tcinfer.converters import read as read_checkpoint
from tcinfer.converters import write
from tcinfer.converters.pickles import load_torch
from tcinfer.gguf import reader
from tcinfer.kernels.reference.quants import unpack
from tcinfer.transformer import tensors as specs_of

GOLDEN = sorted(path.parent.name for path in SHARED.glob("golden/*/ckpt.pt"))
NAN, INF = float("nan"), float("inf")
NUMBERS = np.random.default_rng(7)
IDS = NUMBERS.integers(0, 64, 60)


def values(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a GGUF file, unpacked."""
    return {n: unpack(t.data, t.kind).reshape(t.shape) for n, t in reader.read(path).tensors.items()}


def logits(path: Path, backend: str = "numpy") -> np.ndarray:
    return tcinfer.load(path, backend=backend, cache_type="f32").session().feed(IDS, all_logits=True)


def converted(source: Path, out: Path, *options: str) -> Path:
    done = command("convert", source, "-o", out, "--outtype", "F32", "--no-verify", *options)
    assert done.status == 0, done.err
    return out


# The published checkpoints


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_checkpoints_convert_and_verify(case: str, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    done = command("convert", shared("golden", case, "ckpt.pt"), "-o", out, "--outtype", "f32", "--verify")
    assert done.status == 0, done.err
    assert "not used: arguments for training only: dropout, " in done.err
    assert "no tokenizer found" in done.err
    found = re.search(
        r"verified on \d+ tokens: logits differ from the checkpoint's by at most (\S+) \(the largest is (\S+)\)",
        done.out,
    )
    assert found is not None
    assert float(found[1]) < 1e-5 * float(found[2])
    assert command("inspect", out).status == 0


@pytest.mark.parametrize("outtype", write.OUTTYPES)
def test_outtypes(outtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices as asked for, everything else bit for bit; the file runs on both backends."""
    source = shared("golden", "tc-two-timescales", "ckpt.pt")
    monkeypatch.chdir(tmp_path)
    done = command("convert", source, "--outtype", outtype)
    assert done.status == 0, done.err
    assert [path.name for path in tmp_path.iterdir()] == [f"ckpt-{outtype}.gguf"]  # the default name
    file = reader.read(tmp_path / f"ckpt-{outtype}.gguf")
    checkpoint_read = read_checkpoint(source)
    specs = specs_of(checkpoint_read.config)
    exact = [n for n in file.tensors if not specs[n].matrix]
    assert {"blk.0.tc_gate.bias", "blk.1.tc_decay", "blk.1.tc_rate", "blk.1.tc_alpha"} <= set(exact)
    for n, tensor in file.tensors.items():
        assert tensor.kind.name == ("F32" if n in exact else outtype.upper())
        if n in exact:
            assert tensor.data.tobytes() == checkpoint_read.tensors[n].load().tobytes()
    reference, compiled = (tcinfer.load(file.path, backend=name, cache_type="f32") for name in ("numpy", "numba"))
    ByBytes(reference)
    differences = []
    for ids in IDS.reshape(-1, 5):
        want, got = (model.session().feed(ids, all_logits=True) for model in (reference, compiled))
        differences.append(np.abs(got - want).max() / np.abs(want).max())
    assert np.median(differences) < 1e-4
    assert max(differences) < (1e-4 if outtype.upper() in [kind.name for kind in FLOATS] else 5e-2)


def test_gguf_dump_reads_the_files(tmp_path: Path) -> None:
    out = converted(shared("golden", "tc-slots-q", "ckpt.pt"), tmp_path / "out.gguf")
    tool = Path(sys.executable).parent / "gguf-dump"
    done = subprocess.run([tool, "--json", out], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    dump = json.loads(done.stdout)
    assert dump["metadata"]["tcinfer.memory.mechanism"]["value"] == "tensor"
    assert dump["tensors"]["blk.0.tc_decay"]["type"] == "F32"


# Checkpoints of our own making


def pickled(value: Any, storages: dict[str, bytes], kind: str) -> bytes:
    """The pickle of plain values and of arrays, whose bytes go into `storages` as tensors of `kind`."""
    if isinstance(value, np.ndarray):
        key = str(len(storages))
        half = kind == "BFloat16"
        stored = (value.view(np.uint32) >> 16).astype("<u2") if half else value.astype(DTYPES[kind])
        storages[key] = stored.tobytes()
        strides = [s // value.itemsize for s in np.ascontiguousarray(value).strides]
        of = storage(key, value.size, name("torch", f"{kind}Storage"))
        return rebuilt(ints(*value.shape), ints(*strides), of)
    if isinstance(value, dict):
        inner = b"".join(pickled(k, storages, kind) + pickled(v, storages, kind) for k, v in value.items())
        return b"}(" + inner + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(pickled(item, storages, kind) for item in value) + b"e"
    simple: dict[type, Callable[[Any], bytes]] = {
        type(None): lambda _: b"N",
        bool: lambda x: b"\x88" if x else b"\x89",
        int: integer,
        float: lambda x: b"G" + struct.pack(">d", x),
        str: string,
    }
    return simple[type(value)](value)


DTYPES = {"Float": "<f4", "Half": "<f2", "Double": "<f8", "BFloat16": "<u2"}


def contents(case: str = "tc-delta") -> dict[str, Any]:
    """A golden checkpoint as plain values and arrays."""
    found = load_torch(shared("golden", case, "ckpt.pt"))
    weights = {n: stored.numpy() for n, stored in found["model"].items()}
    return {"model": weights, "model_args": dict(found["model_args"]), "iter_num": 3}


def saved(path: Path, value: Any, kind: str = "Float") -> Path:
    storages: dict[str, bytes] = {}
    path.write_bytes(checkpoint(program(pickled(value, storages, kind)), storages))
    return path


@pytest.mark.parametrize("kind", DTYPES)
def test_checkpoint_dtypes_and_compiled_names(kind: str, tmp_path: Path) -> None:
    """Every float type gives its own values; torch.compile's prefix and the optimizer's state change nothing."""
    value = contents()
    keep = {"Half": lambda x: x.astype("<f2").astype("<f4"), "BFloat16": bf16}.get(kind, lambda x: x)
    value["model"] = {f"_orig_mod.{n}": keep(x) for n, x in value["model"].items()}
    value["optimizer"] = {"state": [np.zeros(3, np.float32)], "lr": 0.1, "unknown": None}
    got = values(converted(saved(tmp_path / "c.pt", value, kind), tmp_path / "out.gguf"))
    want = read_checkpoint(shared("golden", "tc-delta", "ckpt.pt")).tensors
    assert got.keys() == want.keys()
    for n, x in got.items():
        np.testing.assert_array_equal(x, keep(want[n].load()))


def bf16(x: np.ndarray) -> np.ndarray:
    """What is left of float32 when its lower half is cut off."""
    return (np.ascontiguousarray(x).view(np.uint32) & 0xFFFF0000).view(np.float32)


WQ, DECAY = "transformer.h.0.attn.c_attn.weight", "transformer.h.1.attn.tc.logit_decay_fast"
ARGS: list[tuple[dict[str, Any], str]] = [
    ({"tc_quantum": True}, "argument 'tc_quantum' in model_args is not known"),
    ({"tc_update_rule": "hebb"}, "rule must be one of outer, delta, wedge"),
    ({"tc_update_rule": 3}, "argument tc_update_rule must be of type str, not 3"),
    ({"tc_enabled": 1}, "argument tc_enabled must be of type bool, not 1"),
    ({"n_layer": True}, "argument n_layer must be of type int, not True"),
    ({"n_layer": 2.0}, "argument n_layer must be of type int"),
    ({"n_layer": [[[[[[[["a"] * 99]]]]]]]}, "argument n_layer must be of type int"),
    ({"n_layer": 3}, "tensor 'transformer.h.2.ln1.weight' is missing"),
    ({"n_layer": 1}, "'transformer.h.1.ln1.weight' is not used"),
    ({"n_layer": 2**31 - 1}, "tensor 'transformer.h.2.ln1.weight' is missing"),
    ({"n_layer": 2**62}, "n_layers must be"),
    ({"n_layer": 0}, "is not used|n_layers must be"),
    ({"n_head": 0}, "n_head must be"),
    ({"n_head": 3}, "n_embd 64 is not a multiple of n_head 3"),
    ({"n_embd": 2**62}, "must be a whole number"),
    ({"n_head": 8}, "logit_decay_fast' has shape [4], the model needs [8]"),
    ({"vocab_size": 97}, "'transformer.wte.weight' has shape [96, 64], the model needs [97, 64]"),
    ({"rope_base": NAN}, "rope_base must be"),
    ({"rope_base": 2**70}, "rope_base must be|integer"),
    ({"kv_window": -1}, "kv_window"),
    ({"kv_window": 2**40}, "window must be"),
    ({"kv_num_sinks": 16}, "kv_num_sinks 16 leaves no room in kv_window 16"),
    ({"tc_value_scale": INF}, "value_scale must be"),
    ({"tc_num_slots": 2}, "tc.slot_keys' is missing"),
    ({"tc_two_timescales": True}, "logit_decay_slow' is missing"),
    ({"tc_enabled": False}, "is not used by a model with these options"),
    ({"infini_enabled": True}, "infini.beta' is missing"),
    ({"key_conv": 2}, "key_conv.weight' is missing"),
    ({"key_conv": 3}, "key_conv must be one of"),
    ({"use_rope": False}, "transformer.wpe.weight' is missing"),
    ({"bias": True}, ".bias' is missing"),
    ({"rope_scaling_factor": NAN}, "rope_scaling_factor must be"),
    ({"rope_base": 1e300}, "rope_base must be"),
    ({"tc_num_slots": 2, "tc_router_temp": 1e-300}, "router_temperature must be"),
]
WEIGHTS: list[tuple[dict[str, Any], str]] = [
    ({"transformer.h.0.extra": np.ones(2, np.float32)}, "'transformer.h.0.extra' is not used"),
    ({WQ: None}, f"entry '{WQ}' of 'model' is not a tensor"),
    ({WQ: np.ones((64, 192), np.float32)}, "c_attn.weight' has shape [64, 192], the model needs [192, 64]"),
    ({DECAY: np.ones(5, np.float32)}, "logit_decay_fast' has shape [5], the model needs [4]"),
    ({DECAY: np.full(4, NAN, np.float32)}, "'blk.1.tc_decay' holds NaN or Inf"),
    ({WQ: np.full((192, 64), -INF, np.float32)}, "'blk.0.attn_q.weight' holds NaN or Inf"),
    ({WQ: np.ones((384, 64), np.float32)}, "has shape [384, 64], the model needs [192, 64]"),
    ({"_orig_mod." + WQ: np.ones((192, 64), np.float32)}, "is there twice"),
    ({WQ.replace("weight", "bias"): np.ones(192, np.float32)}, "but the model has no biases"),
    ({WQ: np.full((192, 64), 1e6, np.float32)}, "'blk.0.attn_q.weight' has values beyond the range of Q8_0"),
]


@pytest.mark.parametrize(
    ("part", "changes", "says"), [("model_args", *row) for row in ARGS] + [("model", *row) for row in WEIGHTS]
)
def test_checkpoints_that_are_refused(part: str, changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    value = contents()
    value[part] |= changes
    source = saved(tmp_path / "c.pt", value)
    line = refused(command("convert", source, "-o", tmp_path / "out.gguf", "--outtype", "q8_0"))
    assert any(one in line for one in says.split("|"))
    assert line.startswith(f"tcinfer: {source}: ")
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]


@pytest.mark.parametrize(
    "value", [{}, [], {"model": {}}, {"model": [], "model_args": {}}, {"model": {}, "model_args": 3}]
)
def test_pickles_that_are_no_checkpoint(value: Any, tmp_path: Path) -> None:
    refused(command("convert", saved(tmp_path / "c.pt", value)))


@pytest.mark.parametrize("tensor", [WQ, DECAY, "transformer.wte.weight", "transformer.ln_f.weight"])
def test_missing_tensor(tensor: str, tmp_path: Path) -> None:
    value = contents()
    del value["model"][tensor]
    assert f"tensor '{tensor}' is missing" in refused(command("convert", saved(tmp_path / "c.pt", value)))


def test_an_argument_whose_repr_would_never_end(tmp_path: Path) -> None:
    """Lists that hold the list before them twice, ninety deep."""
    got = [b"h" + bytes([i]) for i in range(91)]
    laughs = b"](]q\0" + b"".join(b"](" + 2 * got[i] + b"eq" + bytes([i + 1]) for i in range(90)) + b"e"
    value = b"}(" + string("model") + b"}" + string("model_args") + b"}(" + string("n_layer") + laughs + b"uu"
    (tmp_path / "c.pt").write_bytes(checkpoint(program(value)))
    line = refused(command("convert", tmp_path / "c.pt"))
    assert "argument n_layer must be of type int" in line
    assert len(line) < 1000


# Tokenizers beside a checkpoint


def test_character_table_beside_the_checkpoint(tmp_path: Path) -> None:
    source = shutil.copy(shared("golden", "tc-delta", "ckpt.pt"), tmp_path)
    bare = converted(source, tmp_path / "bare.gguf")
    assert "holds no tokenizer" in refused(command("generate", *FAST, "-m", bare, "-p", "a"))
    ids = [piece.id for piece in tcinfer.load(bare).session().generate([1, 2], max_tokens=5, seed=1)]
    characters = [chr(0x20 + i) for i in range(96)]
    table = {"vocab_size": 96, "itos": dict(enumerate(characters)), "stoi": {c: i for i, c in enumerate(characters)}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(table))
    done = command("convert", source, "-o", tmp_path / "out.gguf", "--outtype", "f32")
    assert f"tokenizer: {tmp_path / 'meta.pkl'}" in done.err
    done = command("generate", *FAST, "-m", tmp_path / "out.gguf", "-p", '!"', "-n", 5, "--seed", 1)
    assert done.out == "".join(characters[i] for i in ids)
    (tmp_path / "meta.pkl").write_bytes(b"cos\nsystem\n.")
    assert "meta.pkl" in refused(command("convert", source, "-o", tmp_path / "out.gguf"))
    assert "nowhere" in refused(command("convert", source, "--tokenizer", tmp_path / "nowhere"))


# Output


def test_weights_that_overflow_do_not_verify(tmp_path: Path) -> None:
    value = contents()
    value["model"] |= {n: np.full(64, 3e38, np.float32) for n in value["model"] if n.endswith("ln2.weight")}
    outcome = command("convert", saved(tmp_path / "c.pt", value), "-o", tmp_path / "out.gguf", "--outtype", "f32")
    assert outcome.status == 1
    assert "not finite" in outcome.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("/nowhere/x.gguf", "No such file"),
        ("/proc/x.gguf", "cannot be written"),
        ("/dev/null/x.gguf", "ot a directory"),
    ],
)
def test_output_that_cannot_be_written(out: str, says: str) -> None:
    line = refused(command("convert", shared("golden", "window", "ckpt.pt"), "-o", out))
    assert out in line
    assert says in line


def test_checkpoint_is_never_its_own_output(tmp_path: Path) -> None:
    source = tmp_path / "c.pt"
    before = saved(source, contents()).read_bytes()
    assert "is the checkpoint itself" in refused(command("convert", source, "-o", source))
    assert source.read_bytes() == before


@pytest.mark.parametrize("path", ["nowhere.pt", "x" * 5000, "/", "/dev/zero", "/etc/passwd"])
def test_checkpoint_that_is_none(path: str, tmp_path: Path) -> None:
    refused(command("convert", path, "-o", tmp_path / "out.gguf"))


def test_unknown_outtype() -> None:
    assert "must be one of f32, f16" in refused(command("convert", "c.pt", "--outtype", "q2_k"))


def full_disk() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("what", "status"),
    [
        (lambda: signal.raise_signal(signal.SIGINT), 130),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), 143),
        (full_disk, 1),
    ],
    ids=["SIGINT", "SIGTERM", "a full disk"],
)
@pytest.mark.parametrize("existing", [None, b"precious"])
def test_interrupted_conversion(
    what: Callable[[], Any], status: int, existing: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever ends it half way, nothing is left of it, and a file that was there stays as it was."""
    out, done, pack = tmp_path / "out.gguf", [], write.pack

    def slow(*arguments: Any) -> Any:
        done.append(arguments[0])
        if len(done) == 5:
            assert list(tmp_path.glob(".tcinfer-*.part"))
            what()
        return pack(*arguments)

    monkeypatch.setattr(write, "pack", slow)
    if existing is not None:
        out.write_bytes(existing)
    assert command("convert", shared("golden", "tc-delta", "ckpt.pt"), "-o", out).status == status
    assert len(done) == 5
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == ({out.name: existing} if existing else {})


@pytest.mark.parametrize("name", ["sha256-0123456789abcdef", "MODEL.GGUF"])  # an ollama blob; what Windows writes
def test_a_gguf_file_is_known_by_what_it_begins_with(name: str, tmp_path: Path) -> None:
    shutil.copy(SHAKESPEARE, tmp_path / name)
    assert inspected(converted(tmp_path / name, tmp_path / "out.gguf", "--no-verify")) == inspected(Path(SHAKESPEARE))


def inspected(path: Path) -> Any:
    return json.loads(command("inspect", "--json", path).out)["tokenizer"]
