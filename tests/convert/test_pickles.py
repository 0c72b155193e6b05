"""The restricted reader of checkpoints: it builds tensors and plain containers and runs nothing."""

from __future__ import annotations

import os
import pickle
import random
import time
import tracemalloc
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SHARED
from hostile_files import (
    ORDERED,
    calling_pickles,
    checkpoint,
    dict_of,
    hostile_checkpoints,
    hostile_pickles,
    ints,
    name,
    program,
    rebuilt,
    small_checkpoint,
    storage,
    tuple_of,
    zipped,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from tcinfer.converters.pickles import StoredTensor, load_plain, load_torch
from tcinfer.errors import FileError

LIMIT = 2.5  # seconds of CPU, half of what is promised; the longest takes 0.5 on a quiet machine
MARKER = Path("/tmp") / f"tcinfer-hostile-pickle-ran-{os.getpid()}"
CHECKPOINTS = dict(hostile_checkpoints(MARKER))
PICKLES = dict(hostile_pickles(MARKER))
CALLING = dict(calling_pickles(MARKER))


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def outcome(path: Path) -> str:
    """The message of the `FileError` that reading raises, or nothing if it reads; another error passes.

    What was read is converted too: no tensor may reach outside its storage.
    """
    try:
        values = [load_torch(path)]
        for value in values:
            if isinstance(value, StoredTensor):
                assert value.numpy().shape == value.shape
            elif isinstance(value, dict) and len(values) < 100:  # a dict may hold itself
                values += value.values()
    except FileError as error:
        return str(error)
    return ""


def refused(load: Any, path: Path) -> str:
    """The message of the `FileError` that loading raises, in bounded time; nothing has run."""
    start = time.process_time()
    with pytest.raises(FileError) as caught:
        load(path)
    assert time.process_time() - start < LIMIT
    assert not MARKER.exists()
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    assert len(message) < len(str(path)) + 400
    return message


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_hostile_checkpoint_is_one_clear_error(tmp_path: Path, case: str) -> None:
    refused(load_torch, written(tmp_path / "x.pt", CHECKPOINTS[case]))


@pytest.mark.parametrize("case", PICKLES)
def test_hostile_pickle_is_one_clear_error(tmp_path: Path, case: str) -> None:
    refused(load_plain, written(tmp_path / "x.pkl", PICKLES[case]))


@pytest.mark.parametrize("case", CALLING)
def test_the_calling_pickles_do_call(case: str) -> None:
    """Else the tests above would prove nothing."""
    try:
        try:  # noqa: SIM105
            pickle.loads(CALLING[case])
        except Exception:  # some leave nothing to return once they have run
            pass
        assert MARKER.exists()
    finally:
        MARKER.unlink(missing_ok=True)


def test_a_plain_pickle_names_nothing_at_all(tmp_path: Path) -> None:
    assert "collections.OrderedDict" in refused(load_plain, written(tmp_path / "x.pkl", program(ORDERED)))


@pytest.mark.parametrize("case", ["pickle: LONG_BINPUT 2^31", "zip bomb", "storage of 2^62", "an entry of 2^32-2"])
def test_hostile_checkpoint_takes_no_memory(tmp_path: Path, case: str) -> None:
    path = written(tmp_path / "x.pt", CHECKPOINTS[case])
    tracemalloc.start()
    try:
        refused(load_torch, path)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("pickle: GLOBAL os.system", "os.system"),
        ("legacy", "old format"),
        ("TorchScript", "TorchScript"),
        ("big-endian", "byte order"),
        ("compressed", "compressed"),
        ("no data.pkl", "0 data.pkl"),
        ("overlapping strides", "overlap"),
        ("missing storage", "'ckpt/data/1'"),
        ("an entry over the next", "overlaps"),
    ],
)
def test_message_names_what_is_wrong(tmp_path: Path, case: str, words: str) -> None:
    assert words in refused(load_torch, written(tmp_path / "x.pt", CHECKPOINTS[case]))


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "missing", Path("/dev/zero")):
        refused(load_torch, path)
        refused(load_plain, path)


def test_small_checkpoint(tmp_path: Path) -> None:
    loaded = load_torch(written(tmp_path / "x.pt", small_checkpoint()))
    assert list(loaded) == ["model", "n"]
    assert loaded["n"] == 7
    w = loaded["model"]["w"]
    assert loaded["model"]["tied"] is w
    assert (w.shape, w.dtype, w.storage) == ((2, 3), "float32", "0")
    np.testing.assert_array_equal(w.numpy(), np.arange(6, dtype=np.float32).reshape(2, 3))
    assert not w.numpy().flags.writeable
    assert w.numpy().base is not None


@pytest.mark.parametrize(
    ("kind", "raw", "expected"),
    [
        ("Half", np.array([1.5, np.nan], np.float16), np.array([1.5, np.nan], np.float32)),
        ("BFloat16", np.array([0x3FC0, 0x7FC0], np.uint16), np.array([1.5, np.nan], np.float32)),
        ("Double", np.array([0.1, 1e300, np.nan]), np.array([0.1, np.inf, np.nan], np.float32)),
        ("Float", np.array([0.1, -np.inf], np.float32), np.array([0.1, -np.inf], np.float32)),
        ("Long", np.array([-1, 1 << 62]), np.array([-1, 1 << 62])),
        ("Byte", np.array([0, 255], np.uint8), np.array([0, 255], np.uint8)),
        ("Bool", np.array([0, 1, 2], np.uint8), np.array([False, True, True])),
    ],
)
def test_kinds(tmp_path: Path, kind: str, raw: np.ndarray, expected: np.ndarray) -> None:
    of = storage("0", len(raw), name("torch", f"{kind}Storage"))
    content = checkpoint(program(rebuilt(ints(len(raw)), ints(1), of=of)), {"0": raw.tobytes()})
    array = load_torch(written(tmp_path / "x.pt", content)).numpy()
    assert array.dtype == expected.dtype
    np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize(
    ("shape", "strides", "offset", "expected"),
    [
        ((), (), 5, 5.0),
        ((3, 2), (1, 3), 0, [[0, 3], [1, 4], [2, 5]]),
        ((2,), (3,), 1, [1, 4]),
        ((1, 2), (10**15, 1), 4, [[4, 5]]),
        ((0, 7), (1, 1), 0, np.zeros((0, 7))),
    ],
)
def test_views(tmp_path: Path, shape: tuple, strides: tuple, offset: int, expected: Any) -> None:
    value = rebuilt(ints(*shape), ints(*strides), offset=b"K" + bytes([offset]))
    tensor = load_torch(written(tmp_path / "x.pt", checkpoint(program(value))))
    assert isinstance(tensor.numpy(), np.ndarray)
    np.testing.assert_array_equal(tensor.numpy(), np.array(expected, np.float32), strict=True)


def test_folders_parameters_and_sizes(tmp_path: Path) -> None:
    parameter = (
        name("torch._utils", "_rebuild_parameter") + tuple_of(rebuilt(ints(6), ints(1)), b"\x88", ORDERED) + b"R"
    )
    size = name("torch", "Size") + tuple_of(ints(2, 3)) + b"R"
    entries = {"data.pkl": program(dict_of(p=parameter, s=size)), "data/0": bytes(24)}
    for folder in ("", "archive/", "a/b c/", "ünï/"):
        content = zipped({folder + key: raw for key, raw in entries.items()})
        loaded = load_torch(written(tmp_path / "x.pt", content))
        assert isinstance(loaded["p"], StoredTensor)
        assert loaded["s"] == (2, 3)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_pickle(tmp_path: Path, protocol: int) -> None:
    meta = {
        "vocab_size": 3,
        "itos": {0: "a", 1: "b"},
        "stoi": {"a": 0},
        "x": [1.5, None, True, -(1 << 40), (1, (2, 3, 4, 5))],
    }
    meta |= {"long": "é" * 1000, "empty": [(), [], {}, ""], "bytes": b"ab" * 300 if protocol > 2 else None}
    path = written(tmp_path / "meta.pkl", pickle.dumps(meta, protocol=protocol))
    assert load_plain(path) == meta


def test_a_nest_of_100_000_lists(tmp_path: Path) -> None:
    nest = program(b"]" * 100_000 + b"a" * 99_999)
    for load, content in ((load_plain, nest), (load_torch, checkpoint(nest))):
        value = load(written(tmp_path / "x", content))
        depth = 0
        while value:
            (value,) = value
            depth += 1
        assert depth == 99_999


@settings(max_examples=500, deadline=1000)
@given(st.lists(st.tuples(st.integers(0, len(small_checkpoint()) - 1), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bytes_load_or_fail_clearly(tmp_path_factory: pytest.TempPathFactory, flips: list) -> None:
    content = bytearray(small_checkpoint())
    for at, mask in flips:
        content[at] ^= mask
    path = written(tmp_path_factory.getbasetemp() / "flipped.pt", bytes(content))
    assert outcome(path).isprintable()


def same(mine: Any, theirs: Any, torch: Any) -> None:
    """What we load is what torch loads, tensors by value."""
    if isinstance(theirs, torch.Tensor):
        array = theirs.detach()
        array = array.float().numpy() if array.is_floating_point() else array.numpy()
        np.testing.assert_array_equal(mine.numpy(), array, strict=True)
    elif isinstance(theirs, dict):
        assert list(mine) == list(theirs)
        for key in theirs:
            same(mine[key], theirs[key], torch)
    elif isinstance(theirs, list | tuple):
        assert len(mine) == len(theirs)
        for ours, other in zip(mine, theirs, strict=True):
            same(ours, other, torch)
    else:
        assert mine == theirs
        assert type(mine) is type(theirs)


@pytest.mark.peer
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_torch_saves(tmp_path: Path, protocol: int) -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 3))
    model[1].weight = torch.nn.Parameter(model[0].weight.T.contiguous())
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    kinds = [
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.bool,
    ]
    content = {
        "model": model.state_dict(),
        "parameter": model[0].weight,
        "optimizer": optimizer.state_dict(),
        "kinds": [torch.arange(5).to(kind) for kind in kinds],
        "views": [
            torch.arange(12).reshape(3, 4).T,
            torch.arange(9)[1::2],
            torch.zeros(0, 3),
            torch.tensor(2.5),
        ],
        "ordered": OrderedDict(a=1, b=(None, 1e-5)),
        "config": {"n_layer": 2, "bias": False, "seed": 1 << 40, "name": "x"},
    }
    torch.save(content, tmp_path / "x.pt", pickle_protocol=protocol)
    same(load_torch(tmp_path / "x.pt"), content, torch)


@pytest.mark.peer
def test_what_torch_saves_and_we_refuse(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "x.pt"
    module = torch.nn.Linear(2, 2)
    for value in (torch.zeros(1).expand(5), torch.zeros(2, dtype=torch.complex64), np.float64(1), module):
        torch.save(value, path)
        refused(load_torch, path)
    torch.save(module.state_dict(), path, _use_new_zipfile_serialization=False)
    assert "old format" in refused(load_torch, path)


@pytest.mark.peer
def test_golden_checkpoints_as_torch_loads_them() -> None:
    torch = pytest.importorskip("torch")
    paths = sorted((SHARED / "golden").glob("*/ckpt.pt"))
    if not paths:
        pytest.skip(f"{SHARED / 'golden'} is not here")
    for path in paths:
        same(load_torch(path), torch.load(path, weights_only=True), torch)


def test_random_programs_end_in_a_value_or_a_clear_error(tmp_path: Path) -> None:
    rng = random.Random(0)
    known = b"(]})}tuase0123NKX\x85\x86\x87\x88\x89\x8cq\x94hRbQ.c\x93\x81o"
    for _ in range(1000):
        content = checkpoint(program(bytes(rng.choices(known, k=rng.randrange(1, 30)))))
        assert outcome(written(tmp_path / "x.pt", content)).isprintable()
