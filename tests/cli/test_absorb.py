"""Session files on the command line and on the disk: streams into them, what is said of them, how they are written."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import re
import resource
import signal
import stat
import string
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from conftest import SHAKESPEARE, SMALL, random_weights, shared, small, tcinfer
from test_cli import COMMAND, FAST, PLAY, command, refused, write_model
from test_memory import IDS

import tcinfer as package
from tcinfer import session_file
from tcinfer.api import Session
from tcinfer.atomic import replacing
from tcinfer.converters.source import Source, Tensor
from tcinfer.converters.write import write
from tcinfer.engine.base import Here
from tcinfer.errors import FileError, TcinferError
from tcinfer.gguf.reader import read
from tcinfer.measure import memory as insight

CHARACTERS = string.printable[:95] + "\n\ufffd"
WINDOW = {"vocab_size": len(CHARACTERS), "memory": "window", "window": 8}
SIZES = {"n_layers": 1, "d_model": 4, "d_ff": 4, "n_heads": 1, "n_kv_heads": 1, "head_dim": 4, "rope_dim": 4}
MINUTE = {**SIZES, "cache_type": "f16"}  # or of so few channels the rounding would be too much
TEXT = "Line after line, and\n  some of them indented.\nROMEO:\nWhat, again?\n" * 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "m.gguf", CHARACTERS, **WINDOW)


@pytest.fixture(scope="module")
def minute(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes some ten thousand characters a second."""
    return write_model(tmp_path_factory.mktemp("model") / "m.gguf", CHARACTERS, **WINDOW | MINUTE)


def byte_level(path: Path) -> Path:
    """A small model with GPT-2's vocabulary."""
    found = read(shared("data", "tokenizers", "gguf_vocab", "ggml-vocab-gpt-2.gguf")).metadata
    names = ("ggml.model", "ggml.pre", "ggml.tokens", "ggml.merges")
    keys = {key: list(v) if not isinstance(v := found[key], str) else v for key in map("tokenizer.{}".format, names)}
    config = replace(SMALL, vocab_size=len(found["tokenizer.ggml.tokens"]), memory="window", window=8)
    tensors = {name: Tensor(name, x.shape, partial(np.copy, x)) for name, x in random_weights(config).items()}
    write(Source(config, tensors, path.parent), path, "f32", keys)
    return path


class Live:
    """`absorb` of a pipe in the background; a first line end went through it, so that it has started."""

    def __init__(self, path: Path, model: Path, *options: object) -> None:
        self.path = path
        arguments = ("absorb", "-s", path, "-m", model, *FAST, *options)
        restored = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [COMMAND, *map(str, arguments)], stdin=pipe, stdout=pipe, stderr=pipe, preexec_fn=restored
        )
        self.write("\n")
        assert self.reaches(1, 30)

    @property
    def position(self) -> int:
        """Tokens in the file, which is checked whole."""
        return session_file.read(self.path).position if self.path.exists() else -1

    def write(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def reaches(self, position: int, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while self.position != position and time.monotonic() < end:
            time.sleep(0.01)
        return self.position == position

    def ends(self) -> tuple[int, str]:
        """Its exit status and what it said."""
        with contextlib.suppress(BrokenPipeError):
            out, err = self.process.communicate(timeout=30)
        assert out == b""
        return self.process.returncode, err.decode()


@pytest.fixture
def live(tmp_path: Path, model: Path) -> Iterator[Callable[..., Live]]:
    started: list[Live] = []

    def start(*options: object, model: Path = model) -> Live:
        started.append(Live(tmp_path / "s.tcs", model, *options))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.communicate()


# Streams


@pytest.mark.slow
def test_a_stream_is_the_text_fed_at_once(tmp_path: Path) -> None:
    """From a file and from a pipe; the files are the same to the byte, and so is what Python saves."""
    (tmp_path / "text").write_text(TEXT)
    assert command("absorb", "-m", SHAKESPEARE, "-s", tmp_path / "file.tcs", "-f", tmp_path / "text").status == 0
    done = tcinfer("absorb", "-m", SHAKESPEARE, "-s", str(tmp_path / "pipe.tcs"), input=TEXT)
    session = package.load(SHAKESPEARE).session()
    session.feed(session.model.tokenizer.encode(TEXT))
    size = session.save(tmp_path / "python.tcs")
    assert len({(tmp_path / f"{name}.tcs").read_bytes() for name in ("file", "pipe", "python")}) == 1
    count, far = f"{len(TEXT):,} tokens", f"{len(TEXT) - 128:,} of them outside the exact window"
    assert re.fullmatch(
        rf"absorbed {count}, [\d,.]+ tokens/s; .*pipe.tcs: {count} in {size:,} bytes, {far}\n", done.stderr
    )


@pytest.mark.parametrize("kind", ["characters", "byte-level", "SentencePiece with BOS"])
def test_texts_cut_at_line_ends_are_one_stream(kind: str, tmp_path: Path) -> None:
    options: tuple[object, ...] = ("-m", SHAKESPEARE)
    if kind != "characters":
        gguf = ("models", "stories260K", "stories260K-f32.gguf")
        path = byte_level(tmp_path / "m.gguf") if kind == "byte-level" else shared(*gguf)
        options = ("-m", path, *("--memory", "sinks", "--window", "20"))
    lines = TEXT.splitlines(keepends=True)
    for name, parts in (("whole", [TEXT]), ("parts", ["".join(lines[:37]), "".join(lines[37:])])):
        for part in parts:
            (tmp_path / "text").write_text(part)
            done = command("absorb", "-s", tmp_path / f"{name}.tcs", "-f", tmp_path / "text", *options)
            assert done.status == 0, done.err
    assert (tmp_path / "parts.tcs").read_bytes() == (tmp_path / "whole.tcs").read_bytes()


def test_the_file_follows_a_live_pipe(live: Callable[..., Live]) -> None:
    process = live("--every", 60)
    process.write("hello world\n")
    assert process.reaches(13, 2)
    time.sleep(0.5)
    process.write("more\nand no line end")
    assert process.reaches(18, 2)
    process.write(" yet\n")
    assert process.reaches(38, 2)
    process.write("the end")
    status, err = process.ends()
    assert (status, process.position) == (0, 45)
    assert err.startswith("absorbed 45 tokens, ")


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_end(number: int, busy: bool, model: Path, live: Callable[..., Live]) -> None:
    process = live("--every", 60)
    process.write("some text\n" * (6000 if busy else 1))
    if busy:
        time.sleep(0.7)
        assert process.position == 1
    else:
        assert process.reaches(11, 2)
    process.process.send_signal(number)
    assert process.process.wait(3) == (130 if number == signal.SIGINT else 143)
    _, err = process.ends()
    assert (process.position == 11) is not busy
    assert 1 < process.position < 60_000
    done = command("generate", *FAST, "-m", model, "-s", process.path, "-p", "and", "-n", 3)
    assert (done.status, len(done.out)) == (0, 3)
    assert err.startswith(f"absorbed {process.position:,} tokens, ")
    assert f"{process.position:,} tokens in {process.path.stat().st_size:,} bytes" in err
    assert err.count("\n") == 1


def test_lines_that_never_pause_are_in_the_file_after_every_seconds(live: Callable[..., Live]) -> None:
    """A log of ten lines a second, and kill -9."""
    process, start = live("--every", 0.5), time.monotonic()
    while time.monotonic() < start + 3:
        process.write("a line\n")
        time.sleep(0.1)
    process.process.kill()
    process.process.wait()
    assert process.position > 49  # the first second's lines of three


def test_a_long_text_is_saved_every_seconds(live: Callable[..., Live], tmp_path: Path) -> None:
    """Of a piece of 65,536 characters, which takes this model much longer than that; then kill -9."""
    deep = write_model(tmp_path / "deep.gguf", CHARACTERS, **WINDOW, n_layers=24)
    process = live("--every", 0.5, model=deep)
    process.write("word " * 14_000)
    end = time.monotonic() + 10
    while process.position == 1 and time.monotonic() < end:
        time.sleep(0.1)
    process.process.kill()
    process.process.wait()
    assert 1 < process.position < 60_000


@pytest.mark.slow
def test_a_stream_that_rests_is_in_the_file_to_the_last_token(live: Callable[..., Live], minute: Path) -> None:
    """After a long piece follows the beginning of a line, and then nothing."""
    process = live("--every", 1, model=minute)
    process.write("word " * 14_000)
    assert process.reaches(65_535, 20)


@pytest.mark.slow
def test_two_megabytes_take_no_memory(live: Callable[..., Live], minute: Path) -> None:
    def most() -> int:
        status = Path(f"/proc/{process.process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024

    process = live("--every", 0.1, model=minute)
    process.write("abba ab\n" * 50_000)
    assert process.reaches(400_001, 60)
    before = most()
    for _ in range(4):
        process.write("abba ab\n" * 50_000)
    assert process.reaches(2_000_001, 60)
    assert most() - before < 2 * 2**20


@pytest.mark.parametrize("text", ["", "\n"])
def test_nothing_is_a_stream_too(text: str, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "s.tcs"
    done = tcinfer("absorb", "-s", str(path), "-m", str(model), *FAST, input=text)
    assert (done.returncode, session_file.read(path).position) == (0, len(text))
    done = command("generate", *FAST, "-m", model, "-s", path, "-p", "a", "-n", 3)
    assert (done.status, len(done.out)) == (0, 3)


def test_invalid_utf8_is_replaced_and_said(model: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "s.tcs")
    done = tcinfer("absorb", "-s", path, "-m", str(model), *FAST, "-q", input=b"a\xff\xfeb", text=False)
    assert (done.returncode, session_file.read(path).position) == (0, 4)
    assert done.stderr.splitlines() == [b"tcinfer: the text given is not valid UTF-8; what is not was replaced"]


def test_quiet_says_nothing(model: Path, tmp_path: Path) -> None:
    done = tcinfer("absorb", "-s", str(tmp_path / "s.tcs"), "-m", str(model), *FAST, "-q", input=TEXT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_cannot_be_absorbed_is_refused_before_it_is_read(model: Path, tmp_path: Path) -> None:
    """No file is made or changed, and the pipe still holds its text."""
    other = write_model(tmp_path / "other.gguf", CHARACTERS, **WINDOW | {"d_ff": 32})
    good, broken, text = tmp_path / "good.tcs", tmp_path / "broken.tcs", tmp_path / "text"
    text.write_text("text")
    assert command("absorb", "-s", good, "-m", model, *FAST, "-f", text).status == 0
    broken.write_bytes(good.read_bytes()[:-1])
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "s.tcs")
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    ours, theirs = os.pipe()
    os.write(theirs, b"some text\n")
    os.close(theirs)
    new = ("-s", tmp_path / "new.tcs", "-m", model)
    for arguments, says in (
        (("-s", broken, "-m", model), "damaged"),
        (("-s", tmp_path / "nowhere" / "s.tcs", "-m", model), "cannot be written: No such file"),
        (("-s", good, "-m", other), "d_ff is 64, this model's 32"),
        (("-s", good, "-m", model, "--window", "9"), "window 8, and this model runs with 9"),
    ):
        line = [COMMAND, "absorb", *FAST, *map(str, arguments)]
        assert says in refused(subprocess.run(line, stdin=ours, capture_output=True, text=True))
    assert os.read(ours, 100) == b"some text\n"
    os.close(ours)
    for arguments, says in (
        (("-s", model, "-m", model), "no session file"),
        (("-s", tmp_path, "-m", model), "is a folder"),
        (("-s", "/dev/null", "-m", model), "pipe or a device"),
        (("-s", good), "another model"),
        (("-s", tmp_path / "new.tcs", "-m", tmp_path / "nowhere.gguf"), "No such file"),
        ((*new, "-f", tmp_path / "nowhere.txt"), "No such file"),
        ((*new, "-f", tmp_path), "Is a directory"),
        ((*new, "--every", "nan"), "--every must be"),
        ((*new, "--every", "-1"), "--every must be"),
    ):
        assert says in refused(command("absorb", *FAST, "-f", text, *arguments))
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_what_came_before_a_text_that_cannot_be_written_is_kept(minute: Path, tmp_path: Path) -> None:
    path, text = tmp_path / "s.tcs", tmp_path / "text"
    text.write_text("word " * 14_000 + "na\u00efve")
    done = command("absorb", "-s", path, "-m", minute, *FAST, "-f", text)
    assert done.status == 1
    assert done.err.splitlines()[-1] == "tcinfer: the character '\u00ef' (U+00EF) is not in the vocabulary"
    assert session_file.read(path).position == 65_534


# session show, diff, fork, verify


class Saved(NamedTuple):
    """A file of shakespeare.gguf, what is in it, and the session that it was."""

    path: Path
    good: bytes
    session: Session


@pytest.fixture(scope="module")
def session() -> Session:
    session = package.load(SHAKESPEARE, backend="numpy").session()
    list(session.generate(TEXT[:300], max_tokens=2, seed=1))
    return session


@pytest.fixture
def saved(session: Session, tmp_path: Path) -> Saved:
    path = tmp_path / "s.tcs"
    session.save(path)
    return Saved(path, path.read_bytes(), session.fork())


def test_show_tells_all(saved: Saved) -> None:
    path, _, session = saved
    done, parsed = command("session", "show", path), command("session", "show", path, "--json")
    config, layers = session.model.config, insight.layers(session.model.config, session.state)
    facts = {
        "file": str(path),
        "bytes": path.stat().st_size,
        "model": f"{config.name or 'without a name'} (tcgpt, 4 layers of 128)",
        "fingerprint": session.model.fingerprint.hex()[:16],
        "memory": "tensor",
        "window": 128,
        "sinks": 0,
        "cache_type": "f16",
        "tokens": 302,
        "outside_window": 174,
        "state_bytes": session.nbytes,
        "random_numbers": True,
    }
    assert json.loads(parsed.out) == facts | {"layers": [layer._asdict() for layer in layers]}
    lines = [f"{k.replace('_', ' '):<22}{f'{v:,}' if type(v) is int else v}" for k, v in facts.items()]
    lines += [f"  layer {x.layer:<14}norm {x.norm:.4g}, {x.saturation:.0%} saturated" for x in layers]
    assert done.out.splitlines() == lines
    assert (done.status, done.err, len(layers)) == (0, "", 4)


def test_show_of_any_name_is_lines_for_a_terminal(model: Path, tmp_path: Path) -> None:
    named = write_model(tmp_path / "m.gguf", CHARACTERS, **WINDOW, name="a\x1b[2J\nstate bytes 0")
    path = tmp_path / "a\x1b[1m\n.tcs"
    session = package.load(named, backend="numpy").session()
    session.save(path)
    done = command("session", "show", path)
    assert done.status == 0
    assert all(line.isprintable() for line in done.out.splitlines())
    assert len(done.out.splitlines()) == 12
    for other in ("fork", "diff"):
        done = command("session", other, path, *([tmp_path / "b.tcs"] if other == "fork" else [path]))
        assert all(line.isprintable() for line in done.out.splitlines())


def test_diff_tells_how_far_apart(saved: Saved, model: Path, tmp_path: Path) -> None:
    path, _, session = saved
    assert command("session", "diff", path, path).out == "tokens                302 and 302\nthe same state\n"
    other = session.fork()
    other.state.layers[2]["A"][0, 1] *= 1.5
    other.save(tmp_path / "b.tcs")
    one, two = session.state.layers[2]["A"], other.state.layers[2]["A"]
    apart = np.linalg.norm((one - two).astype(np.float64)) / np.linalg.norm(two.astype(np.float64))
    want = (
        f"tokens                302 and 302\n  layer 2   A          {apart:.3g} of its length apart\ndifferent states\n"
    )
    assert command("session", "diff", path, tmp_path / "b.tcs").out == want
    other = session.fork()
    other.feed([1])
    other.save(tmp_path / "c.tcs")
    lines = command("session", "diff", path, tmp_path / "c.tcs").out.splitlines()
    assert (lines[0], lines[-1]) == ("tokens                302 and 303", "different states")
    assert {line[2:9] for line in lines[1:-1]} == {f"layer {i}" for i in range(4)}
    package.load(model, backend="numpy").session().save(tmp_path / "d.tcs")
    assert "of different models or memory options" in refused(command("session", "diff", path, tmp_path / "d.tcs"))
    assert "No such file" in refused(command("session", "diff", path, tmp_path / "nowhere"))


def test_fork_copies_what_is_whole_to_where_nothing_is(saved: Saved, tmp_path: Path) -> None:
    path = saved.path
    copy = tmp_path / "copy.tcs"
    done = command("session", "fork", path, copy)
    assert (done.status, done.out) == (0, f"{copy}: 302 tokens in {path.stat().st_size:,} bytes\n")
    assert copy.read_bytes() == path.read_bytes()
    assert "is there already" in refused(command("session", "fork", path, copy))
    assert "No such file" in refused(command("session", "fork", path, tmp_path / "nowhere" / "copy.tcs"))
    path.write_bytes(path.read_bytes()[:-1])
    assert "damaged" in refused(command("session", "fork", path, tmp_path / "broken.tcs"))
    assert {path.name for path in tmp_path.iterdir()} == {"s.tcs", "copy.tcs"}


def test_verify_tells_whether_it_goes_on(saved: Saved, model: Path) -> None:
    path = saved.path
    whole = f"{path}: whole, 302 tokens in {path.stat().st_size:,} bytes"
    assert command("session", "verify", path).out == f"{whole}\n"
    done = command("session", "verify", path, "-m", SHAKESPEARE)
    assert done.out == f"{whole}; it goes on in {SHAKESPEARE}\n"
    assert re.search("another model|no weights for", refused(command("session", "verify", path, "-m", model)))
    path.write_bytes(path.read_bytes()[:1000] + b"x" + path.read_bytes()[1001:])
    assert "checksum" in refused(command("session", "verify", path))


# Writing


def test_what_cannot_be_written(saved: Saved, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("nowhere/s.tcs", "folder", "s.tcs/s.tcs", "a\0b", "x" * 256):
        with pytest.raises(FileError, match="cannot be written"):
            saved.session.save(tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"s.tcs", "folder"}


@pytest.mark.parametrize("name", ["x" * 255, "\N{PARROT}" * 63, " ", ".hidden", "a\nb"], ids=len)
def test_any_name_that_the_system_takes(name: str, saved: Saved, tmp_path: Path) -> None:
    saved.session.save(tmp_path / name)
    assert (tmp_path / name).read_bytes() == saved.good


def test_a_disk_that_fills_up_leaves_the_old_file(saved: Saved, tmp_path: Path) -> None:
    """A limit on the size of files stands for it: a write in the middle fails."""
    session = saved.session.fork()
    session.feed(1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for most in (0, 100, 200_000, len(saved.good) - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
        try:
            with pytest.raises(FileError, match="cannot be written: File too large"):
                session.save(saved.path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved.path.read_bytes() == saved.good
    assert list(tmp_path.iterdir()) == [saved.path]


def test_a_link_is_followed(saved: Saved, tmp_path: Path) -> None:
    (tmp_path / "target").write_text("mine")
    (tmp_path / "target").chmod(0o600)
    for target in ("target", "nowhere"):
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(target)
        saved.session.save(tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / target).read_bytes() == saved.good
    assert stat.S_IMODE((tmp_path / "target").stat().st_mode) == 0o600


def test_two_writers_of_one_file(tmp_path: Path) -> None:
    """The second is refused while the first runs, whether the file was there before or not."""
    path, text = tmp_path / "two.tcs", tmp_path / "text.txt"
    text.write_text("a line of a log\n" * 20)
    for _ in range(2):
        arguments = [COMMAND, "absorb", *FAST, "-s", str(path)]
        first = subprocess.Popen(arguments, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while not path.exists() or not is_held(path):
            time.sleep(0.01)
        assert "is being written by another process" in refused(command("absorb", *FAST, "-s", path, "-f", text))
        with pytest.raises(FileError, match="another process"):
            package.load(backend="numpy").session().save(path)
        first.communicate(text.read_text(), timeout=100)
        assert first.returncode == 0
    assert command("session", "verify", path).status == 0


def is_held(path: Path) -> bool:
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def test_a_file_that_changed_meanwhile_is_not_replaced(saved: Saved, tmp_path: Path) -> None:
    path = tmp_path / "s.tcs"
    saved.session.save(path)
    one, two = (saved.session.model.load_session(path) for _ in range(2))
    one.feed([1])
    one.save(path)
    kept = path.read_bytes()
    two.feed([2])
    with pytest.raises(TcinferError, match="has changed since this session read"):
        two.save(path)
    assert path.read_bytes() == kept
    one.save(path)
    two.save(tmp_path / "other.tcs")
    path.unlink()
    two.save(path)


def test_what_a_killed_writer_left_is_cleared_by_the_next(saved: Saved, tmp_path: Path) -> None:
    path = tmp_path / "new" / "s.tcs"
    path.parent.mkdir()
    with replacing(path) as temporary:
        temporary.write_text("half")
    temporary.write_text("half")  # as kill -9 leaves it
    saved.session.fork().save(path)
    assert list(path.parent.iterdir()) == [path]
    assert path.read_bytes() == saved.good


def test_who_writes_at_the_same_time_waits(saved: Saved, tmp_path: Path) -> None:
    path = tmp_path / "new" / "s.tcs"
    path.parent.mkdir()
    write = partial(session_file.write, saved.session.snapshot(), path)
    threads = [threading.Thread(target=write) for _ in range(3)]
    with replacing(path) as temporary:
        for thread in threads:
            thread.start()
        time.sleep(0.05)
        temporary.write_text("mine")
    for thread in threads:
        thread.join(20)
    assert path.read_bytes() == saved.good
    assert list(path.parent.iterdir()) == [path]


def test_a_pipe_or_a_device_is_not_replaced(saved: Saved, tmp_path: Path) -> None:
    """As root, /dev/null would become a file."""
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(FileError):
        saved.session.save(tmp_path / "fifo")
    assert stat.S_ISFIFO(os.stat(tmp_path / "fifo").st_mode)


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_permissions_are_the_umasks_or_those_that_the_file_has(umask: int, saved: Saved, tmp_path: Path) -> None:
    def mode(name: str) -> int:
        saved.session.save(tmp_path / name)
        return stat.S_IMODE((tmp_path / name).stat().st_mode)

    before = os.umask(umask)
    try:
        assert mode("new.tcs") == 0o666 & ~umask
        assert os.umask(umask) == umask
        saved.path.chmod(0o600)
        assert mode("s.tcs") == 0o600
    finally:
        os.umask(before)


def test_a_session_that_overflowed_does_not_replace_a_good_file(saved: Saved) -> None:
    for spoil in ("state", "logits"):
        session = saved.session.fork()
        logits = session.logits.copy()
        (logits if spoil == "logits" else session.state.layers[0]["A"]).flat[0] = math.inf
        session._logits = Here(logits)
        with pytest.raises(TcinferError):
            session.save(saved.path)
        assert saved.path.read_bytes() == saved.good


def test_killed_while_it_saves_the_file_is_always_whole(tmp_path: Path) -> None:
    one, path, seen = small("numpy", memory="window", window=2000).session(), tmp_path / "s.tcs", set[bytes]()
    one.feed(IDS)
    two = one.fork()
    two.feed(IDS)
    two.save(path)
    contents = {path.read_bytes()}
    session_file.write(one.snapshot(), path)
    contents.add(path.read_bytes())
    for delay in np.random.default_rng(0).uniform(0, 0.06, 40):
        child = os.fork()
        if child == 0:
            with contextlib.suppress(Exception):
                while True:
                    session_file.write(two.snapshot(), path)
                    session_file.write(one.snapshot(), path)
            os._exit(1)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        seen.add(path.read_bytes())
    assert seen == contents


def test_a_home_in_a_path_is_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bash leaves the ~ of --session=~/x.tcs as it is; a session that is there is gone on with, not replaced."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "text").write_text("a line\n" * 10)
    for times in (1, 2):
        assert command("absorb", *PLAY, "--session=~/x.tcs", "-f", tmp_path / "text").status == 0
        assert json.loads(command("session", "show", "--json", "~/x.tcs").out)["tokens"] == 70 * times
    assert command("session", "fork", "~/x.tcs", "~/y.tcs").status == 0
    assert command("generate", *PLAY, "-p", "A", "-n", 2, "-s", "~/z.tcs", "--save").status == 0
    assert command("session", "diff", "~/x.tcs", "~/y.tcs").out.endswith("the same state\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text", "x.tcs", "y.tcs", "z.tcs"]
