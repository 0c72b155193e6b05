"""Session files: going on from one is never having stopped; nothing hostile gets in; on disk they are whole, or not.

Offsets are those of the table at the top of `session_file.py`, written down a second time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import re
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import BACKENDS, SMALL, build, random_weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cli import FAST, command, refused
from test_memory import IDS, SINKS, config_of, difference, weights_of
from test_processes import process

from tcinfer import loader, session_file
from tcinfer.api import Model, Session
from tcinfer.errors import FileError, TcinferError
from tcinfer.kernels.reference.quants import Kind
from tcinfer.memory import tensor_cache
from tcinfer.sequence import RECENT

BOUNDED = [
    "window", "window-learned-key-conv", "sinks", "sinks-in-cache", "sinks-in-cache-qwen2-key-conv", "infini-linear",
    "infini-delta-gqa-key-conv", "tensor-outer", "tensor-delta", "tensor-wedge", "tensor-normalised",
    "tensor-sinks-in-cache", "tensor-two-timescales", "tensor-slots-gqa-two-timescales",
    "tensor-token-rates-two-timescales", "tensor-everything",
]  # fmt: skip
GROWING = ["full", "full-learned", "infini-delta-unbounded", "tensor-unbounded-insert"]
LONG = ["window", "sinks-in-cache", "infini-delta", "tensor-everything"]


@functools.cache
def model(name: str, backend: str, cache_type: str = "f16") -> Model:
    """A case of test_memory, with the ring that files have by default."""
    config = replace(config_of(name), cache_type=cache_type)
    return build(config, backend, weights_of(config))


def same(one: Session, two: Session) -> None:
    """Both stand at the same place, with the same past and the same logits before them."""
    assert one.position == two.position
    np.testing.assert_array_equal(one.recent, two.recent)
    if one.position:
        np.testing.assert_array_equal(one.logits, two.logits)
    else:
        assert one.logits is two.logits is None


# Going on


@pytest.mark.parametrize("name", BOUNDED + GROWING)
def test_going_on_from_a_file_is_never_having_stopped(name: str, backend: str, tmp_path: Path) -> None:
    """Saved at the start, in the window, when it is just full, one past it, and far past it."""
    session, others, path = model(name, backend).session(), list[Session](), tmp_path / "s.tcs"
    full = session.model.config.window + session.model.config.sinks or 12
    for stop in (0, 1, 3, full, full + 1, 40, 48):
        part = IDS[session.position : stop]
        want = session.feed(part, all_logits=True) if len(part) else None
        for other in others:
            np.testing.assert_array_equal(other.feed(part, all_logits=True), want)
            same(other, session)
        assert session.save(path) == path.stat().st_size
        others.append(session.model.load_session(path))
        same(others[-1], session)


@pytest.mark.parametrize("name", BOUNDED + GROWING)
@pytest.mark.parametrize(("one", "two"), [BACKENDS, BACKENDS[::-1]], ids="-".join)
def test_the_other_backend_goes_on_from_it(name: str, one: str, two: str, tmp_path: Path) -> None:
    session = model(name, one, "f32").session()
    session.feed(IDS[:20])
    session.save(tmp_path / "s.tcs")
    other = model(name, two, "f32").load_session(tmp_path / "s.tcs")
    same(other, session)
    for a, b in zip(session_file.arrays(other.state), session_file.arrays(session.state), strict=True):
        np.testing.assert_array_equal(a[2][:20], b[2][:20])
    assert difference(other.feed(IDS[20:], all_logits=True), session.feed(IDS[20:], all_logits=True)) < 1e-4


@pytest.mark.parametrize("name", LONG)
def test_bytes_are_the_same_after_any_number_of_tokens(name: str, tmp_path: Path) -> None:
    session, path = model(name, "numba").session(), tmp_path / "s.tcs"
    size = session.save(path)
    for count in (1000, 20_000):
        session.feed(np.resize(IDS, count - session.position))
        assert session.save(path) == path.stat().st_size == size


@pytest.mark.parametrize("position", [10_000_000, 2**31 - 2, 2**32 + 5])
@pytest.mark.parametrize("name", LONG)
def test_a_position_of_any_size_is_kept(name: str, position: int, backend: str, tmp_path: Path) -> None:
    session, path = model(name, backend).session(), tmp_path / "s.tcs"
    session.feed(IDS)
    size = session.save(path)
    session.state.position = position
    assert session.save(path) == size
    other = session.model.load_session(path)
    same(other, session)
    want = session.feed(IDS[:9], all_logits=True)
    np.testing.assert_array_equal(other.feed(IDS[:9], all_logits=True), want)
    assert np.isfinite(want).all()
    assert other.position == position + 9


@pytest.mark.parametrize("name", ["full", "infini-delta-unbounded", "tensor-unbounded-insert"])
def test_a_growing_cache_is_saved_as_long_as_it_is(name: str, tmp_path: Path) -> None:
    session, path, sizes = model(name, "numba").session(), tmp_path / "s.tcs", []
    for count in (255, 256, 257, 513):  # of 513 tokens the cache has room for 1,024, the file for 768
        session.feed(np.resize(IDS, count - session.position))
        sizes.append(session.save(path))
        other, stays = session.model.load_session(path), session.fork()
        same(other, session)
        for part in (IDS[:1], np.resize(IDS, 300)):
            np.testing.assert_array_equal(other.feed(part, all_logits=True), stays.feed(part, all_logits=True))
    assert other.nbytes < session.nbytes + stays.nbytes
    assert sizes[0] == sizes[1] < sizes[2] < sizes[3]


def test_an_interrupted_prompt_is_saved_and_gone_on_from(backend: str, tmp_path: Path) -> None:
    """Between two chunks of it, where no logits were computed."""

    def stop(n: int) -> None:
        raise KeyboardInterrupt

    session, path = model("tensor-everything", backend).session(), tmp_path / "s.tcs"
    with pytest.raises(KeyboardInterrupt):
        session.feed(np.resize(IDS, 600), progress=stop)
    session.save(path)
    other = session.model.load_session(path)
    assert other.position == session.position == 256
    np.testing.assert_array_equal(other.feed(IDS), session.feed(IDS))


OPERATIONS = ("feed", "generate", "snapshot", "restore", "file", "fork", "reset")


@pytest.mark.parametrize("name", ["full", "sinks-in-cache", "infini-delta-unbounded", "tensor-everything"])
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.tuples(st.integers(0, 1), st.sampled_from(OPERATIONS), st.integers(0, 99)), max_size=14))
def test_forks_never_influence_each_other(name: str, backend: str, tmp_path: Path, steps: list) -> None:
    """Both of two forks, whatever is done to either, stand where an independent session with its history stands."""
    m = model(name, backend)

    def apply(session: Session, what: str, number: int) -> None:
        if what == "feed":
            session.feed(np.resize(IDS, number % 11 + 1) + number % 2)
        else:
            list(session.generate(max_tokens=number % 4, seed=number % 3 - 1, repeat_penalty=1.2))

    begin = [("feed", 20), ("generate", 5)]
    first = m.session()
    for step in begin:
        apply(first, *step)
    sessions, pasts = [first, first.fork()], [list(begin), list(begin)]
    snapshots = [(first.snapshot(), list(begin))]
    for who, what, number in steps:
        if what in ("feed", "generate") and (what == "feed" or sessions[who].position):
            apply(sessions[who], what, number)
            pasts[who].append((what, number))
        elif what == "snapshot":
            snapshots.append((sessions[who].snapshot(), list(pasts[who])))
        elif what == "restore":
            snapshot, past = snapshots[number % len(snapshots)]
            sessions[who].restore(snapshot)
            pasts[who] = list(past)
        elif what == "file":
            sessions[who].save(tmp_path / f"{who}.tcs")
            sessions[who] = m.load_session(tmp_path / f"{who}.tcs")
        elif what == "fork":
            sessions[who], pasts[who] = sessions[1 - who].fork(), list(pasts[1 - who])
        elif what == "reset":
            sessions[who].reset()
            pasts[who] = [*begin]
            for step in begin:
                apply(sessions[who], *step)
    for session, past in zip(sessions, pasts, strict=True):
        alone = m.session()
        for step in past:
            apply(alone, *step)
        same(session, alone)
        np.testing.assert_array_equal(session.feed(7), alone.feed(7))
        assert [p.id for p in session.generate(max_tokens=3)] == [p.id for p in alone.generate(max_tokens=3)]


# Hostile files


TENSOR = replace(config_of("tensor-delta"), n_layers=1, window=2, name="tiny")
DESCRIPTION, DIGEST, LAST = 128, 32, 4 * RECENT
POSITION, CAPACITY, FLAGS, WORDS = 48, 56, 64, 72


def refusal(path: Path | str, into: Model | None = None) -> str:
    """The one line with which a file is refused, its name taken off; within a second."""
    start = time.monotonic()
    with pytest.raises(FileError) as caught:
        into.load_session(path) if into is not None else session_file.read(path)
    text = str(caught.value)
    assert time.monotonic() - start < 1
    assert text.startswith(f"{path}: ")
    assert text.isprintable()
    assert len(text) < 1000
    return text.removeprefix(f"{path}: ")


def sealed(data: bytes | bytearray) -> bytes:
    """The file with the checksum that belongs to it."""
    return bytes(data[:-DIGEST]) + hashlib.blake2b(data[:-DIGEST], digest_size=DIGEST).digest()


class Tiny:
    """A small valid file and its parts."""

    def __init__(self, path: Path, backend: str = "numpy") -> None:
        self.path, self.model = path, build(TENSOR, backend)
        self.session = self.model.session()
        list(self.session.generate(IDS[:5], max_tokens=3, seed=1))
        self.session.save(path)
        self.good = path.read_bytes()
        self.state = DESCRIPTION + struct.unpack_from("<I", self.good, 12)[0]
        self.ring = self.state + self.session.nbytes
        self.logits = self.ring + LAST
        assert len(self.good) == self.logits + 4 * TENSOR.vocab_size + DIGEST

    def with_at(self, *changes: tuple[int, bytes]) -> bytes:
        """The file with some bytes overwritten, and its checksum."""
        data = bytearray(self.good)
        for at, value in changes:
            data[at : at + len(value)] = value
        return sealed(data)

    def described(self, description: bytes | dict[str, Any]) -> bytes:
        """The file with another description, or with some of its values changed (... is left out)."""
        if isinstance(description, dict):
            values = json.loads(self.good[DESCRIPTION : self.state]) | description
            description = json.dumps({k: v for k, v in values.items() if v is not ...}).encode()
        head = self.good[:12] + struct.pack("<I", len(description)) + self.good[16:DESCRIPTION]
        return sealed(head + description + self.good[self.state :])

    def at_position(self, position: int) -> bytes:
        return self.with_at(*((at, struct.pack("<q", position)) for at in (POSITION, self.state)))

    def refused(self, data: bytes) -> str:
        self.path.write_bytes(data)
        return refusal(self.path)


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Tiny]:
    """At the end the session whose file it was is what it had been."""
    t = Tiny(tmp_path / "s.tcs")
    want = t.session.fork().feed(IDS, all_logits=True)
    yield t
    np.testing.assert_array_equal(t.session.feed(IDS, all_logits=True), want)


KINDS = {
    "empty": (lambda t: b"", "is empty"),
    "another magic": (lambda t: b"GGUF" + t.good[4:], "no session file"),
    "zeros": (lambda t: bytes(5000), "no session file"),
    "a byte too many": (lambda t: t.good + b"\0", "damaged or cut off"),
    "a byte too many, sealed": (lambda t: sealed(t.good + b"\0"), "bytes where its description makes"),
    "twice": (lambda t: sealed(t.good + t.good), "bytes where its description makes"),
    "a newer version": (lambda t: t.with_at((8, struct.pack("<I", 2))), "version 2 .* reads 1: update"),
    "version 0": (lambda t: t.with_at((8, struct.pack("<I", 0))), "version 0"),
    "a flag that is none": (lambda t: t.with_at((FLAGS, b"\7")), "flags"),
    "flags of 2^63": (lambda t: t.with_at((FLAGS + 7, b"\x80")), "flags"),
    "logits without a token": (lambda t: t.at_position(0), "logits without a token"),
    "an even increment": (lambda t: t.with_at((WORDS + 24, b"\0")), "random"),
    "a negative position": (lambda t: t.at_position(-1), "position"),
    "a position of -2^63": (lambda t: t.at_position(-(2**63)), "position"),
    "a position in its header": (lambda t: t.with_at((POSITION, b"\7")), "position 7 in its header, but at 8"),
    "a position in its state": (lambda t: t.with_at((t.state, b"\7")), "position 8 in its header, but at 7"),
    "room in bounded memory": (lambda t: t.with_at((CAPACITY, b"\1")), "room for 1 tokens"),
    "a longer description": (lambda t: t.with_at((12, b"\xff\xff\xff\xff")), "description"),
    "no description": (lambda t: t.with_at((12, b"\0\0\0\0")), "description"),
    "id -1": (lambda t: t.with_at((t.ring + 8, b"\xff" * 4)), "outside the vocabulary of 50"),
    "id 50": (lambda t: t.with_at((t.logits - 4, struct.pack("<i", 50))), "outside the vocabulary of 50"),
    "NaN in logits": (lambda t: t.with_at((t.logits, struct.pack("<f", math.nan))), "NaN or Inf in its logits"),
    "Inf in logits": (lambda t: t.with_at((t.logits + 196, struct.pack("<f", -math.inf))), "NaN or Inf in its logits"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_made_wrong(kind: str, tiny: Tiny) -> None:
    make, says = KINDS[kind]
    assert re.search(says, tiny.refused(make(tiny)))
    assert re.search(says, refused(command("session", "verify", tiny.path)))


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, says in (
        (loader.bundled(), "no session file"),
        (tmp_path, "folder"),
        (tmp_path / "fifo", "pipe or a device"),
        ("/dev/zero", "pipe or a device"),
        (tmp_path / "nowhere" / "s.tcs", "No such file"),
    ):
        assert says in refusal(path)
        assert says in refused(command("generate", *FAST, "-s", path, "-p", "a"))


def test_cut_at_any_byte(tiny: Tiny) -> None:
    for length in range(len(tiny.good) - 1, -1, -1):
        os.truncate(tiny.path, length)
        with pytest.raises(FileError):
            session_file.read(tiny.path)
    for length in (0, 7, 8, 50, 159, 160, 161, tiny.state, tiny.ring, tiny.logits, len(tiny.good) - 1):
        tiny.refused(tiny.good[:length])
        if length > DIGEST:
            tiny.refused(sealed(tiny.good[:length]))


NAN, DEEP = math.nan, 10_000
DESCRIPTIONS: dict[str, Any] = {
    "no JSON": b"\xff\0hello\n",
    "a list": b"[1]",
    "lists in lists": b"[" * DEEP + b"]" * DEEP,
    "objects in objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "a key missing": {"window": ...},
    "a key too many": {"x\ny": 1},
    "an option too many": {"options": {"x\ny": 1}},
    "options of no kind": {"options": [1]},
    "no options": {"options": None},
    "options of the wrong type": {"options": {"slots": True}},
    "NaN": {"norm_eps": NAN},
    "NaN in an option": {"options": {"value_scale": NAN}},
    "infinite": {"rope_base": math.inf},
    "a number of 401 digits": {"norm_eps": 10**400},
    "a name that is a number": {"name": 5},
    "an unknown architecture": {"arch": "gpt\n2"},
    "an unknown memory": {"memory": "quantum\x1b[2J"},
    "half a window": {"window": 1.5},
    "true layers": {"n_layers": True},
    "a negative window": {"window": -1},
    "another memory": {"memory": "full"},
    "a million layers": {"n_layers": 10**6},
    **{f"2^31 - 1 {name}": {name: 2**31 - 1} for name in ("n_layers", "window", "sinks", "vocab_size", "head_dim")},
    "heads of 2^60 bytes": {"n_heads": 2**31 - 1, "n_kv_heads": 2**31 - 1, "head_dim": 2**30, "rope_dim": 0},
}


@pytest.mark.parametrize("kind", DESCRIPTIONS)
def test_a_description_that_cannot_be(kind: str, tiny: Tiny) -> None:
    data = tiny.described(DESCRIPTIONS[kind])
    tracemalloc.start()
    tiny.refused(data)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 4 * len(data) + 2**20


def test_many_layers_cost_no_more_than_their_file(tiny: Tiny) -> None:
    """Each of two arrays of 64 bytes at least; what they are must be clear before they are counted one by one."""
    size = 8 * 2**20
    data = tiny.described({"n_layers": size // 64 - 1000})
    tiny.refused(sealed(data[: -4 * TENSOR.vocab_size] + bytes(size - len(data)) + data[-4 * TENSOR.vocab_size :]))


@pytest.mark.parametrize(("cache_type", "bad"), [("f32", math.nan), ("f32", math.inf), ("f16", -math.inf)])
def test_not_a_number_in_any_array(cache_type: str, bad: float, tmp_path: Path) -> None:
    """The last one of each array of each layer."""
    session, path = model("tensor-everything", "numpy", cache_type).session(), tmp_path / "s.tcs"
    session.feed(IDS)
    session.save(path)
    good, buffer = path.read_bytes(), session.state.buffer
    start = good.index(buffer.tobytes())
    for layer, name, array in session_file.arrays(session.state):
        at = array.ctypes.data + array.nbytes - array.itemsize - buffer.ctypes.data
        value = np.array(bad, array.dtype).tobytes()
        path.write_bytes(sealed(good[: start + at] + value + good[start + at + len(value) :]))
        assert f"NaN or Inf in {name} of layer {layer}" in refusal(path)


def test_a_growing_cache_with_other_room_than_its_position_needs(tmp_path: Path) -> None:
    session, path = model("full", "numpy").session(), tmp_path / "s.tcs"
    session.feed(np.resize(IDS, 200))
    session.save(path)
    good, at = path.read_bytes(), DESCRIPTION + struct.unpack_from("<I", path.read_bytes(), 12)[0]
    for room, position, says in (
        (0, 200, "room for 0 tokens at position 200"),
        (512, 200, "room for 512 tokens"),
        (256, 257, "room for 256 tokens at position 257"),
        (512, 300, "bytes where its description makes"),
        (2**62, 2**62, "room for|position"),
        (-256, 200, "cannot be"),
    ):
        data = bytearray(good)
        struct.pack_into("<qq", data, POSITION, position, room)
        struct.pack_into("<q", data, at, position)
        path.write_bytes(sealed(data))
        assert re.search(says, refusal(path))


def go_on_from(folder: str) -> None:
    """From positions that no stream reaches: refused, or gone on from. In a process: an address may be made of one."""
    for backend in BACKENDS:
        t = Tiny(Path(folder, "s.tcs"), backend)
        for position in (2**31, 2**32 + 5, 2**53, 2**62, 2**63 - 40, 2**63 - 2, 2**63 - 1):
            t.path.write_bytes(t.at_position(position))
            with contextlib.suppress(FileError):
                session = t.model.load_session(t.path)
                assert np.isfinite(session.feed(IDS)).all()
                assert session.position == position + len(IDS)


def test_a_huge_position_is_refused_or_gone_on_from(tmp_path: Path) -> None:
    process(f"import test_session_file as t; t.go_on_from({str(tmp_path)!r})")


def test_thousands_of_damaged_bytes(tiny: Tiny) -> None:
    rng = np.random.default_rng(0)
    with open(tiny.path, "r+b", buffering=0) as file:
        for at in rng.integers(0, len(tiny.good), 5000).tolist():
            os.pwrite(file.fileno(), bytes([tiny.good[at] ^ int(rng.integers(1, 256))]), at)
            with pytest.raises(FileError):
                session_file.read(tiny.path)
            os.pwrite(file.fileno(), tiny.good[at : at + 1], at)
    assert tiny.path.read_bytes() == tiny.good


def test_thousands_of_forged_bytes(tmp_path: Path, backend: str) -> None:
    """Sealed again: refused, or a session of finite numbers that takes ids."""
    t, rng, loaded = Tiny(tmp_path / "s.tcs", backend), np.random.default_rng(1), 0
    places = np.concatenate([np.arange(t.ring), rng.integers(t.ring, len(t.good) - DIGEST, 300)])
    for at in rng.choice(places, 400).tolist():
        t.path.write_bytes(t.with_at((at, bytes([t.good[at] ^ 1 << int(rng.integers(8))]))))
        try:
            session = t.model.load_session(t.path)
        except FileError:
            refusal(t.path, t.model)
            continue
        loaded += 1
        assert all(np.isfinite(array).all() for _, _, array in session_file.arrays(session.state))
        assert np.isfinite(session.logits).all()
        with contextlib.suppress(TcinferError):
            session.feed(IDS[:2])
    assert 30 < loaded < 370


# Other models


OTHERS: dict[str, tuple[Callable[[], Model], str]] = {
    "arch": (lambda: build(replace(TENSOR, arch="tcllama")), "another model .*'tiny'.* arch is 'tcgpt'"),
    "shape": (lambda: build(replace(TENSOR, d_ff=96)), "d_ff is 64, this model's 96"),
    "layers": (lambda: build(replace(TENSOR, n_layers=2)), "n_layers is 1, this model's 2"),
    "weights": (lambda: build(TENSOR, weights=random_weights(TENSOR, seed=1)), "weights differ"),
    "one weight": (lambda: build(TENSOR, weights=touched()), "weights differ"),
    "quantisation": (lambda: build(TENSOR, kind=Kind.Q8_0), "weights differ"),
    "window": (lambda: build(replace(TENSOR, window=3)), "window 2, and this model runs with 3"),
    "sinks": (lambda: build(replace(TENSOR, sinks=1)), "sinks 0, and this model runs with 1"),
    "cache type": (
        lambda: build(replace(TENSOR, cache_type="f16")),
        "cache_type 'f32', and this model runs with 'f16'",
    ),
    "memory": (lambda: build(replace(SMALL, n_layers=1, **SINKS)), "memory 'tensor', and this model runs with 'sinks'"),
    "rule": (
        lambda: build(replace(TENSOR, options=tensor_cache.Options("outer"))),
        "options .*rule=.delta.*rule=.outer",
    ),
}


def touched() -> dict[str, np.ndarray]:
    """The weights with the last one of a bias changed."""
    weights = random_weights(TENSOR)
    weights["output_norm.bias"][-1] += 1
    return weights


@pytest.mark.parametrize("what", OTHERS)
def test_a_file_of_another_model(what: str, tiny: Tiny) -> None:
    make, says = OTHERS[what]
    assert re.search(says, refusal(tiny.path, make()))
