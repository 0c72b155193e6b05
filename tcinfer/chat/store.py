"""Where conversations are kept: for each a session file, and a log of what was fed, from which turns can be replayed.

    <the user's state folder>/tcinfer/chats/NAME.tcs      the session, as after the last turn (session_file.py)
                                            NAME.jsonl    the log, one JSON object a line
                                            NAME.base.tcs the session that it began with, if it did not begin empty

    {"start": {...}}                  first: the model's path, the options it ran with, the system prompt
    {"turn": n, "user": text}         a turn begins; text is shortened, and for people alone
    {"in": [ids]}, {"out": [ids]}     what was fed: the person's message in its template, then the answer; in parts
    {"end": n, "position": p}         the turn is over, p tokens were taken in so far

A turn without its end is one that was cut off, and is dropped. Everything is private to the user.
"""

from __future__ import annotations

import errno
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

from tcinfer.atomic import copy, lock
from tcinfer.errors import FileError, TcinferError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
SHOWN = 200  # characters of a message that the log keeps for people
LONGEST_LINE = 2**20  # bytes; a part of ids has a few thousand


def state_folder() -> Path:
    """Where the user's conversations are kept; it need not be there. Raises TcinferError where there is no home."""
    from platformdirs import user_state_path

    with suppress(RuntimeError, KeyError):
        path = user_state_path("tcinfer", appauthor=False)
        if path.is_absolute():
            return path
    raise TcinferError("there is no home folder to keep conversations in: set HOME or XDG_STATE_HOME, or use --no-save")


def chats() -> Path:
    """The folder of all conversations, made if it is not there. Raises TcinferError."""
    folder = state_folder() / "chats"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for ours in (folder.parent, folder):
            with suppress(PermissionError):  # some file systems have no modes
                os.chmod(ours, 0o700)
    except OSError as e:
        raise TcinferError(f"{folder}: conversations cannot be kept there: {e.strerror}") from None
    return folder


@contextmanager
def temporary() -> Iterator[Path]:
    """A folder for conversations that nobody keeps: private, and gone at the end. Raises TcinferError."""
    try:
        folder = TemporaryDirectory(prefix="tcinfer-chat-")
    except OSError as e:
        raise TcinferError(f"there is no room for temporary files: {e.strerror}") from None
    with folder as name:
        yield Path(name)


def names(folder: Path) -> list[str]:
    """Every conversation there, the latest first."""

    def used(path: Path) -> float:
        with suppress(OSError):
            return path.stat().st_mtime
        return 0.0

    logs = sorted(folder.glob("*.jsonl"), key=used, reverse=True)
    return [path.stem for path in logs if NAME.fullmatch(path.stem)]


def start_of(folder: Path, name: str) -> dict[str, Any]:
    """What a conversation began with, without opening it. Raises TcinferError."""
    path = folder / f"{checked(name)}.jsonl"
    try:
        with open(path, "rb") as file:
            start = json.loads(file.readline(LONGEST_LINE))["start"]
            if not isinstance(start["model"], str):
                raise ValueError
            return start
    except FileNotFoundError:
        raise _unknown(folder, name) from None
    except OSError as e:
        raise FileError(f"{path}: cannot be read: {e.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise FileError(f"{path}: does not begin as a conversation does") from None


def summary(folder: Path, name: str) -> str:
    """Turns, tokens and the day of the last one, from the end of a conversation's log."""
    path = folder / f"{name}.jsonl"
    try:
        with open(path, "rb") as file:
            used = os.fstat(file.fileno())
            file.seek(max(0, used.st_size - LONGEST_LINE))
            tail = file.read()
    except OSError:  # gone meanwhile
        return "cannot be read"
    ends = re.findall(rb'^\{"end":(\d+),"position":(\d+)\}$', tail, re.MULTILINE)
    turns, position = (int(n) for n in ends[-1]) if ends else (0, 0)
    day = time.strftime("%Y-%m-%d %H:%M", time.localtime(used.st_mtime))
    return f"{turns:,} turns, {position:,} tokens, {day}"


def delete(folder: Path, name: str) -> None:
    """Remove a conversation and all its files. Raises TcinferError where it is not there, or is open."""
    path = folder / f"{checked(name)}.jsonl"
    try:
        with open(path, "rb") as file:
            _lock(file, name)
            for left in (folder / f"{name}.tcs", folder / f"{name}.base.tcs", path):  # the log last: it is the name
                left.unlink(missing_ok=True)
    except FileNotFoundError:
        raise _unknown(folder, name) from None
    except OSError as e:
        raise FileError(f"{path}: cannot be removed: {e.strerror}") from None


def begin(folder: Path, start: dict[str, Any]) -> Log:
    """The log of a conversation that begins now, named after the time; others may begin at the same moment."""
    name = time.strftime("%Y-%m-%d-%H%M%S")
    for i in range(1, 10**6):
        with suppress(_TakenError):
            return Log(folder, name if i == 1 else f"{name}-{i}", start)
    raise TcinferError(f"{folder}: too many conversations began at once")


class _TakenError(TcinferError):
    """There is a conversation of that name."""


class Log:
    """One conversation's files. Its log stays open, and locked, as long as this does."""

    def __init__(self, folder: Path, name: str, start: dict[str, Any] | None = None) -> None:
        """start: what a new conversation begins with; without it, the one of this name is gone on with.

        Raises TcinferError for a name that is none, is taken, is not there, or is open elsewhere.
        """
        self.name = checked(name)
        self.session_path = folder / f"{name}.tcs"
        self.base_path = folder / f"{name}.base.tcs"
        self.path = folder / f"{name}.jsonl"
        self._folder = folder
        self.turns = 0  # complete ones
        try:
            flags = os.O_RDWR | (os.O_CREAT | os.O_EXCL if start is not None else 0) | getattr(os, "O_NOFOLLOW", 0)
            self._file: IO[bytes] = os.fdopen(os.open(self.path, flags, 0o600), "r+b", buffering=0)
        except FileExistsError:
            raise _TakenError(f"there is a conversation {name!r} already: go on with it, or choose another") from None
        except FileNotFoundError:
            raise _unknown(folder, name) from None
        except OSError as e:
            raise FileError(f"{self.path}: cannot be opened: {e.strerror}") from None
        try:
            _lock(self._file, name)
            if start is not None:
                for left in (self.session_path, self.base_path):  # of a conversation whose log is gone
                    left.unlink(missing_ok=True)
                self._append({"start": start}, sync=True)
            self.start = self._recover()
            os.utime(self.path)  # who is used last is gone on with
        except BaseException:
            self._file.close()
            if start is not None:
                self.path.unlink(missing_ok=True)
            raise

    @property
    def kept(self) -> bool:
        """Whether it outlasts `close`: something was said, or it goes on from a session."""
        return self.turns > 0 or self.base_path.exists()

    def close(self) -> None:
        """Nobody else may go on before this; a conversation in which nothing was said leaves no trace."""
        if not self.kept and not self._file.closed:
            self.path.unlink(missing_ok=True)
            self.session_path.unlink(missing_ok=True)
        self._file.close()

    def begin(self, user: str) -> None:
        """A turn begins."""
        self._append({"turn": self.turns + 1, "user": user[:SHOWN]})

    def fed(self, kind: str, ids: Sequence[int]) -> None:
        """Ids that the session has taken in: "in" or "out"."""
        for a in range(0, len(ids), 4096):
            self._append({kind: [int(i) for i in ids[a : a + 4096]]})

    def end(self, position: int) -> None:
        """The turn is over, and from here on it survives whatever happens."""
        self._append({"end": self.turns + 1, "position": position}, sync=True)
        self.turns += 1

    def back_to(self, turn: int, keep_question: bool = False) -> None:
        """Drop all that came after so many turns; with keep_question, but for what the next turn fed "in"."""
        where = None
        current = 0
        for at, record in self._records():
            current = record.get("turn", current)
            if current > turn and (not keep_question or "out" in record or "end" in record):
                where = at
                break
        if where is not None:
            try:
                self._file.truncate(where)
            except OSError as e:
                raise FileError(f"{self.path}: cannot be written: {e.strerror}") from None
        self.turns = turn

    def replay(self, after: int, until: int) -> Iterator[list[int]]:
        """All ids that were fed in the turns after + 1 .. until, in order."""
        for record in self._turns(after, until):
            if ids := record.get("in", record.get("out")):
                yield ids

    def part(self, turn: int, kind: str) -> Iterator[list[int]]:
        """What a turn fed before the answer ("in"), or what the model answered ("out")."""
        return (record[kind] for record in self._turns(turn - 1, turn) if kind in record)

    def positions(self) -> Iterator[tuple[int, int]]:
        """(turn, tokens taken in at its end) of every complete turn."""
        for _, record in self._records():
            if "end" in record:
                yield record["end"], record["position"]

    def copy_to(self, name: str) -> None:
        """All files under another name."""
        if (self._folder / f"{checked(name)}.jsonl").exists():
            raise TcinferError(f"there is a conversation {name!r} already: choose another name")
        log = self._folder / f"{name}.jsonl"
        targets = {self.session_path: f"{name}.tcs", self.base_path: f"{name}.base.tcs"}
        for path, target in targets.items():
            if path.exists():
                copy(path, self._folder / target, private=True)
        copy(self.path, log, private=True)  # last: with it, the conversation is there
        used = self.path.stat()
        os.utime(log, ns=(used.st_atime_ns, used.st_mtime_ns - 1))  # this one is still the last used

    def _turns(self, after: int, until: int) -> Iterator[dict[str, Any]]:
        current = 0
        for _, record in self._records():
            current = record.get("turn", current)
            if current > until:
                return
            if current > after:
                yield record

    def _records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(where it begins, record) of every whole line. Raises FileError for one that is no record."""
        with open(self.path, "rb") as file:
            at = 0
            while line := file.readline(LONGEST_LINE):
                if not line.endswith(b"\n") and len(line) < LONGEST_LINE:
                    return  # cut off while it was written
                try:
                    record = json.loads(line)
                    if not _is_record(record):
                        raise ValueError
                except (ValueError, RecursionError):
                    raise self._broken(at) from None
                yield at, record
                at += len(line)

    def _recover(self) -> dict[str, Any]:
        """Drop what was cut off, count the turns, give what the conversation began with."""
        start, whole, current = None, 0, 0
        for at, record in self._records():
            if "start" in record and not at:
                start = record["start"]
            elif "turn" in record and record["turn"] == self.turns + 1 == current + 1:
                current = record["turn"]
            elif "end" in record and record["end"] == current == self.turns + 1:
                self.turns = current
            elif not current > self.turns or not ("in" in record or "out" in record):
                raise self._broken(at)
            if current == self.turns:
                whole = at
        if start is None:
            raise FileError(f"{self.path}: does not begin as a conversation does")
        with open(self.path, "rb") as file:
            file.seek(whole)
            whole += len(file.readline())
        self._file.truncate(whole)
        return start

    def _broken(self, at: int) -> FileError:
        return FileError(f"{self.path}: the line at byte {at} is no record of a conversation, or in the wrong place")

    def _append(self, record: dict[str, Any], sync: bool = False) -> None:
        line = json.dumps(record, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
        if len(line) > LONGEST_LINE:
            raise TcinferError(f"a system prompt and a template of {len(line):,} bytes are too long for a conversation")
        at = self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if sync:
                os.fsync(self._file.fileno())
        except OSError as e:
            with suppress(OSError):  # half a line would spoil those after it
                self._file.truncate(at)
            raise FileError(f"{self.path}: cannot be written: {e.strerror}") from None


def checked(name: str) -> str:
    """The name of a conversation: never a path. Raises TcinferError."""
    if not NAME.fullmatch(name) or name.endswith((".tcs", ".jsonl", ".base")):
        raise TcinferError(f"{name!r} is no name: letters, digits, dots, dashes and underscores, at most 64")
    return name


def _unknown(folder: Path, name: str) -> TcinferError:
    return TcinferError(f"there is no conversation {name!r}; known: {', '.join(names(folder)[:20]) or 'none'}")


def _is_record(record: Any) -> bool:
    """Whether a line is one of the five, of the right types."""
    if not isinstance(record, dict):
        return False
    counts = all(isinstance(record[k], int) for k in ("turn", "end", "position") if k in record)
    ids = all(
        isinstance(record[k], list) and all(type(i) is int for i in record[k]) for k in ("in", "out") if k in record
    )
    return counts and ids and isinstance(record.get("start", {}), dict) and ("end" in record) == ("position" in record)


def _lock(file: IO[bytes], name: str) -> None:
    """Two processes that go on with one conversation would tear it."""
    try:
        lock(file.fileno())
    except BlockingIOError:
        raise TcinferError(f"conversation {name!r} is open in another terminal") from None
