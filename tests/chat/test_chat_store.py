"""Conversations on disk: every crash, every hostile log, names, permissions, locks; and the budget of snapshots."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from terminal import answer, chats, conversation, shakespeare
from test_cli import write_model

from tcinfer.chat import store
from tcinfer.chat.conversation import Conversation
from tcinfer.chat.launch import Chats
from tcinfer.chat.snapshots import Snapshots
from tcinfer.chat.store import LONGEST_LINE, Log
from tcinfer.errors import TcinferError

WORDS = ("What is it?", "Speak on", "And then?")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def shared() -> Chats:
    return chats()


@pytest.fixture(scope="module")
def start() -> dict[str, Any]:
    """What a real conversation begins with."""
    with tempfile.TemporaryDirectory() as folder:
        made = chats()
        made.folder = Path(folder)
        talk = made.begin(None, "talk")
        talk.close()
    return talk.log.start


@pytest.fixture
def made(home: Path, shared: Chats) -> Chats:
    """Chats with shakespeare.gguf, in a folder of their own."""
    shared.folder = home / "chats"
    shared.folder.mkdir()
    return shared


def test_a_models_path_may_be_no_utf8(home: Path) -> None:
    path = os.fsdecode(b"/models/m\xff.gguf")
    store.Log(home, "odd", {"model": path}).close()
    log = store.Log(home, "odd", {"model": path})
    assert store.start_of(home, "odd")["model"] == log.start["model"] == path
    log.close()


def ids(line: bytes) -> list[int]:
    record = json.loads(line)
    return record.get("in", record.get("out", []))


def replayed(log: bytes, base: Path | None = None) -> tuple[int, int, NDArray | None]:
    """Turns, position and logits of a log's whole turns, fed to a fresh session line by line."""
    session = shakespeare().load_session(base) if base is not None else shakespeare().session()
    lines = [line for line in log.splitlines(keepends=True) if line.endswith(b"\n")]
    last = max((i for i, line in enumerate(lines) if line.startswith(b'{"end"')), default=0)
    for line in lines[: last + 1]:
        if found := ids(line):
            session.feed(found)
    return sum(line.startswith(b'{"end"') for line in lines), session.position, session.logits


def agrees(talk: Conversation, turns: int, position: int, logits: NDArray | None) -> None:
    assert (talk.turns, talk.session.position) == (turns, position)
    assert np.array_equal(talk.session.logits, logits) if logits is not None else talk.session.logits is None


def spoken(folder: Path, begin: Callable[[], Conversation] | None = None) -> tuple[bytes, list[bytes | None]]:
    """A log of a few turns in the folder, and the session file as after each of them, the beginning first."""
    talk = conversation(folder) if begin is None else begin()
    talk.max_tokens = 3
    sessions: list[bytes | None] = [None]
    for word in WORDS:
        answer(talk, word)
        sessions.append(talk.log.session_path.read_bytes())
    talk.close()
    return talk.log.path.read_bytes(), sessions


# Crashes


@pytest.mark.parametrize("session", [None, 1, 2, 3])
def test_a_log_cut_anywhere_comes_back_with_whole_turns(tmp_path: Path, session: int | None) -> None:
    """Beside a session file that is gone, old, or newer than the log."""
    log, sessions = spoken(tmp_path)
    ends = list(itertools.accumulate(len(line) for line in log.splitlines(keepends=True)))
    cuts = {*range(ends[-3], len(log) + 1), *ends}  # every byte of the last two lines, the end of every other
    wanted: dict[int, Any] = {}
    for cut in sorted(cuts):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / "talk.jsonl").write_bytes(log[:cut])
        if session is not None:
            (folder / "talk.tcs").write_bytes(sessions[session] or b"")
        turns = log[:cut].count(b'{"end"') - (log[:cut].rpartition(b"\n")[2].startswith(b'{"end"'))
        wanted[turns] = found = wanted.get(turns) or replayed(log[:cut])
        talk = conversation(folder, new=False, tokens=3)
        agrees(talk, *found)
        if cut in (ends[-3] + 1, ends[-2], len(log) - 1, len(log)):
            answer(talk, "Go on")
            talk.close()
            talk = conversation(folder, new=False)
            agrees(talk, *replayed((folder / "talk.jsonl").read_bytes()))
            assert talk.turns == turns + 1
        talk.close()
        shutil.rmtree(folder)
    assert set(wanted) == {0, 1, 2, 3}


def test_a_conversation_from_a_session_file_survives_the_same(tmp_path: Path) -> None:
    first = shakespeare().session()
    first.feed(shakespeare().tokenizer.encode("GLOUCESTER:\nNow is the winter of our"))
    first.save(tmp_path / "first.tcs")
    made = chats()
    log, _ = spoken(made.folder, lambda: made.begin(None, "talk", tmp_path / "first.tcs"))
    base = made.folder / "talk.base.tcs"
    assert base.read_bytes() == (tmp_path / "first.tcs").read_bytes()
    ends = list(itertools.accumulate(len(line) for line in log.splitlines(keepends=True)))
    for cut in (len(log), ends[-2], ends[3], ends[0]):
        (made.folder / "talk.jsonl").write_bytes(log[:cut])
        (made.folder / "talk.tcs").unlink(missing_ok=True)
        talk = made.resume("talk")
        agrees(talk, *replayed(log[:cut], base))
        if talk.turns:
            talk.undo(99)
            agrees(talk, 0, first.position, first.logits)
        talk.close()


def test_what_lies_there_of_an_old_conversation_is_not_in_a_new_one(tmp_path: Path) -> None:
    """Someone removed the log alone, or a crash came between the files of a fork."""
    spoken(tmp_path)
    (tmp_path / "talk.jsonl").unlink()
    talk = conversation(tmp_path)
    agrees(talk, 0, 0, None)
    talk.close()


@pytest.mark.parametrize("damage", ["cut", "a bit", "empty", "another model"])
def test_a_damaged_session_file_is_refused_with_the_way_out(tmp_path: Path, damage: str) -> None:
    log, sessions = spoken(tmp_path)
    data = bytearray(sessions[3] or b"")
    if damage == "a bit":
        data[len(data) // 2] ^= 1
    elif damage == "another model":  # as this one, but with other memory
        other = chats(memory="window").begin(None, "other")
        other.max_tokens = 3
        answer(other, "Hi")
        other.close()
        data = bytearray(other.log.session_path.read_bytes())
    else:
        data = data[: 1000 if damage == "cut" else 0]
    (tmp_path / "talk.tcs").write_bytes(data)
    with pytest.raises(TcinferError, match=r"talk\.tcs: .*remove that file") as error:
        conversation(tmp_path, new=False)
    assert str(error.value).isprintable()
    assert (tmp_path / "talk.jsonl").read_bytes() == log
    (tmp_path / "talk.tcs").unlink()
    talk = conversation(tmp_path, new=False)
    agrees(talk, *replayed(log))
    talk.close()


def test_a_conversation_of_another_model_is_refused(tmp_path: Path) -> None:
    """Also where its session file is gone: ids mean other things there."""
    tokenizer = shakespeare().tokenizer
    other = write_model(tmp_path / "other.gguf", "".join(tokenizer.decode([i]) for i in range(65)), vocab_size=65)
    talk = chats(other).begin(None, "talk")
    talk.max_tokens = 3
    answer(talk, "Hi")
    talk.close()
    for _ in range(2):
        with pytest.raises(TcinferError, match="another model") as error:
            chats().resume("talk")
        assert "remove that file" not in str(error.value)  # that would feed it to the wrong model
        talk.log.session_path.unlink(missing_ok=True)


# Hostile logs

IDS = '{"turn":2,"user":""}\n{"in":[1]}\n{"out":[2]}\n{"end":2,"position":9}\n'


@pytest.mark.parametrize(
    "lines",
    {
        "not JSON": "what is this\n" + IDS,
        "deep nesting": '{"in":' + "[" * 100_000 + "]" * 100_000 + "}\n" + IDS,
        "a number": "5\n" + IDS,
        "a list": "[]\n" + IDS,
        "NaN": '{"turn":NaN}\n' + IDS,
        "ids that are words": '{"turn":1,"user":""}\n{"in":["a"]}\n{"end":1,"position":1}\n',
        "ids that are fractions": '{"turn":1,"user":""}\n{"in":[1.5]}\n{"end":1,"position":1}\n',
        "ids that are true": '{"turn":1,"user":""}\n{"in":[true]}\n{"end":1,"position":1}\n',
        "no list of ids": '{"turn":1,"user":""}\n{"in":7}\n{"end":1,"position":1}\n',
        "negative ids": '{"turn":1,"user":""}\n{"in":[-1]}\n{"end":1,"position":1}\n',
        "ids beyond the vocabulary": '{"turn":1,"user":""}\n{"in":[65]}\n{"end":1,"position":1}\n',
        "ids beyond int64": f'{{"turn":1,"user":""}}\n{{"in":[{2**70}]}}\n{{"end":1,"position":1}}\n',
        "thousands of digits": '{"turn":1,"user":""}\n{"in":[1%s]}\n{"end":1,"position":1}\n' % ("0" * 9999),
        "a turn that is a word": '{"turn":"a"}\n' + IDS,
        "an end without a place": '{"end":1}\n' + IDS,
        "a huge end": f'{{"turn":1,"user":""}}\n{{"in":[1]}}\n{{"end":{2**70},"position":1}}\n',
        "a negative end": '{"turn":1,"user":""}\n{"in":[1]}\n{"end":-5,"position":1}\n',
        "turns out of order": IDS + '{"turn":1,"user":""}\n{"in":[1]}\n{"end":1,"position":10}\n',
        "2 MiB in a line": IDS.replace("2", "1") + '{"turn":2,"user":"%s"}\n' % ("a" * 2**21) + IDS,
        "invalid UTF-8": b'{"turn":1,"user":"\xff\xfe"}\n' + IDS.encode(),
        "no start": "",
    }.items(),
    ids=lambda case: case[0],
)
def test_hostile_logs_are_one_line_of_error(made: Chats, start: dict[str, Any], lines: tuple[str, str | bytes]) -> None:
    case, text = lines
    data = b"" if case == "no start" else json.dumps({"start": start}).encode() + b"\n"
    data += text if isinstance(text, bytes) else text.encode()
    (made.folder / "talk.jsonl").write_bytes(data)
    with pytest.raises(TcinferError) as error:
        made.resume("talk")
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 500
    assert "another model" not in str(error.value)
    assert (made.folder / "talk.jsonl").read_bytes() == data


@pytest.mark.parametrize("value", [None, [], {"memory": "tensor"}, 5.5, "x", {}, True, -1, 2**70], ids=str)
@pytest.mark.parametrize("key", ["", "memory", "window", "sinks", "cache_type"])
def test_hostile_starts_are_one_line_of_error(made: Chats, start: dict[str, Any], key: str, value: Any) -> None:
    if key and value is None:
        return  # which is what a conversation says that leaves it to the model
    memory = start["memory"] | {key: value} if key else value
    (made.folder / "talk.jsonl").write_text(json.dumps({"start": start | {"memory": memory}}) + "\n")
    with pytest.raises(TcinferError) as error:
        made.resume("talk")
    assert str(error.value).isprintable()
    assert "another model" not in str(error.value)


@pytest.mark.parametrize("model", [None, 5, [], "a" * LONGEST_LINE], ids=lambda model: str(model)[:9])
def test_a_start_that_names_no_model(home: Path, model: Any) -> None:
    (home / "talk.jsonl").write_text(json.dumps({"start": {"model": model}}) + "\n")
    with pytest.raises(TcinferError, match="does not begin as a conversation does"):
        store.start_of(home, "talk")


def test_a_link_in_place_of_a_log_is_not_followed(home: Path) -> None:
    (home / "elsewhere").write_text('{"start":{}}\n')
    (home / "talk.jsonl").symlink_to(home / "elsewhere")
    with pytest.raises(TcinferError, match="cannot be opened"):
        Log(home, "talk")


# Names, permissions, locks


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "/etc/passwd",
        "a\0b",
        ".hidden",
        "-n",
        "a b",
        "a\n",
        "ä",
        "a" * 65,
        "x.tcs",
        "x.jsonl",
    ],
)
def test_names_that_are_none(home: Path, name: str) -> None:
    talk = conversation(home, "good")
    for attempt in (lambda: Log(home, name, {}), lambda: Log(home, name), lambda: talk.fork(name)):
        with pytest.raises(TcinferError, match="is no name") as error:
            attempt()
        assert str(error.value).isprintable()
    talk.close()
    assert not list(home.iterdir())


def test_names_that_are_some(home: Path) -> None:
    for name in ("a", "a" * 64, "2026-11-22-101500", "v1.2_b", "a..b"):
        conversation(home, name).close()


def test_a_second_one_is_refused_while_the_first_is_open(home: Path) -> None:
    talk = conversation(home)
    answer(talk, "Hi")
    with pytest.raises(TcinferError, match="'talk' is open in another terminal"):
        conversation(home, new=False)
    with pytest.raises(TcinferError, match="there is a conversation 'talk' already"):
        conversation(home)
    answer(talk, "Hi")
    talk.close()
    again = conversation(home, new=False)
    assert again.turns == 2
    again.close()


def test_everything_is_private_whatever_the_umask(home: Path, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        made = chats()
        (tmp_path / "open.tcs").write_bytes(spoken(made.folder, lambda: made.begin(None, "talk"))[1][1] or b"")
        made.begin(None, "other", tmp_path / "open.tcs").close()
        talk = made.resume("talk")
        talk.fork("third")
        talk.close()
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in made.folder.iterdir()}
    assert set(modes) == {"talk.jsonl", "talk.tcs", "third.jsonl", "third.tcs", "other.jsonl", "other.base.tcs"}
    assert set(modes.values()) == {0o600}
    assert [stat.S_IMODE(p.stat().st_mode) for p in (made.folder, made.folder.parent)] == [0o700, 0o700]


@pytest.mark.parametrize("how", ["nothing said", "an error", "all taken back"])
def test_an_empty_conversation_leaves_nothing_behind(home: Path, how: str) -> None:
    talk = conversation(home)
    if how == "an error":
        with pytest.raises(TcinferError):
            answer(talk, "\u00ef")
    elif how == "all taken back":
        answer(talk, "Hi")
        talk.undo()
    talk.close()
    assert not list(home.iterdir())


def test_the_last_conversation_is_the_one_that_was_used_last(home: Path) -> None:
    for name in ("one", "two"):
        talk = conversation(home, name)
        answer(talk, "Hi")
        talk.fork(f"fork-of-{name}")
        talk.close()
    assert store.names(home)[0] == "two"
    talk = conversation(home, "one", new=False)
    answer(talk, "Hi")
    talk.close()
    assert store.names(home)[0] == "one"


# Snapshots


def snapshot(nbytes: int) -> Any:
    return SimpleNamespace(nbytes=nbytes)


@given(
    st.integers(0, 100),
    st.lists(st.one_of(st.tuples(st.just("add"), st.integers(1, 40)), st.tuples(st.just("back"), st.integers(0, 9)))),
)
@settings(deadline=None)
def test_snapshots_stay_below_their_budget(budget: int, steps: list[tuple[str, int]]) -> None:
    kept, turn, last = Snapshots(budget), 0, 0
    for step, n in steps:
        if step == "add":
            kept.add(turn, snapshot(n))
            turn, last = turn + 1, n
        else:
            turn = max(0, turn - n)
            kept.back_to(turn)
        turns = [at for at, _ in kept._kept]
        assert turns == sorted(set(turns))
        assert all(0 <= at <= turn for at in turns)
        assert kept.nbytes == sum(one.nbytes for _, one in kept._kept) <= max(budget, last)
        if step == "add":
            assert kept._kept[-1][0] == turn - 1
        for asked in range(turn + 1):
            found = kept.nearest(asked)
            assert found == max((k for k in kept._kept if k[0] <= asked), key=lambda k: k[0], default=None)


def test_near_snapshots_are_dense_and_far_ones_sparse() -> None:
    kept = Snapshots(16)
    for turn in range(1000):
        kept.add(turn, snapshot(1))
    turns = [turn for turn, _ in kept._kept]
    assert 8 <= len(turns) <= 16
    assert turns[-3:] == [997, 998, 999]
    far, near = np.array_split(np.diff(turns), 2)
    assert far.mean() > 5 * near.mean()
    for back in range(1, 600):  # what is replayed for an undo is in proportion to what is taken back
        start = kept.nearest(1000 - back)
        assert start is not None
        assert 1000 - back - start[0] <= 2 * back
