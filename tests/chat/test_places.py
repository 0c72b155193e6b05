"""Where conversations and sessions are kept: many begun at once, file systems that lack something, no home at all."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
from terminal import COMMAND, answer, conversation, environment, shakespeare
from test_cli import PLAY, command

from tcinfer.chat import store

CHAT = ("chat", *PLAY, "-q", "-n", "4", "--temp", "0")
NOBODY = "import pwd\n\n\ndef unknown(uid):\n    raise KeyError(uid)\n\n\npwd.getpwuid = unknown\n"  # docker run --user


def test_chats_that_begin_at_once_are_conversations_of_their_own(tmp_path: Path) -> None:
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    runs = [subprocess.Popen([COMMAND, *CHAT], env=environment(tmp_path), **pipes) for _ in range(4)]
    for run in runs:
        out, err = run.communicate(b"Speak\n", timeout=60)
        assert (run.returncode, err) == (0, b"")
        assert out
    names = store.names(tmp_path / "tcinfer" / "chats")
    assert len(names) == 4


def test_a_name_that_is_taken_is_counted_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store.time, "strftime", lambda form: "now")
    logs = [store.begin(tmp_path, {"model": "m"}) for _ in range(3)]
    assert [log.name for log in logs] == ["now", "now-2", "now-3"]
    for log in logs:
        log.close()


def refusing(number: int) -> Any:
    def call(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("lacks", ["locks", "locks at all", "modes", "folders to sync"])
def test_file_systems_that_lack_something_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacks: str) -> None:
    whole = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        whole(handle)

    module, name, call = {
        "locks": (fcntl, "flock", refusing(errno.ENOLCK)),
        "locks at all": (fcntl, "flock", refusing(errno.ENOSYS)),
        "modes": (os, "chmod", refusing(errno.EPERM)),
        "folders to sync": (os, "fsync", fsync),
    }[lacks]
    monkeypatch.setattr(module, name, call)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    talk = conversation(store.chats())
    first = answer(talk, "Speak")
    assert first
    talk.close()
    again = conversation(store.chats(), new=False)
    assert again.last_text() == first
    for _ in range(2):  # a new file, and one that is there
        again.session.save(tmp_path / "s.tcs")
    assert shakespeare().load_session(tmp_path / "s.tcs").position == again.session.position
    again.close()


def test_without_a_home_a_line_says_so(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(NOBODY)
    env = {k: v for k, v in environment(tmp_path).items() if k not in ("HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME")}
    env["PYTHONPATH"] = str(tmp_path)

    def run(*arguments: str) -> subprocess.CompletedProcess:
        given = {"input": "Speak\n", "capture_output": True, "text": True, "timeout": 60}
        return subprocess.run([COMMAND, *arguments], cwd=tmp_path, env=env, **given)

    for more in ((), ("--continue",)):
        done = run(*CHAT, *more)
        assert done.returncode == 1
        assert done.stderr == (
            "tcinfer: there is no home folder to keep conversations in: set HOME or XDG_STATE_HOME, or use --no-save\n"
        )
    done = run(*CHAT, "--no-save")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout
    done = run("doctor")
    assert (done.returncode, done.stderr) == (0, "")
    assert "there is no home folder" in done.stdout
    assert not (tmp_path / "~").exists()


def test_doctor_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert str(tmp_path / "tcinfer") in command("doctor").out
