"""What the tests of chats share: conversations in this process, pipes, and a real terminal around `tcinfer chat`.

Keys go into the terminal, and assertions are about the screen that a person would see.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pexpect
import psutil
import pyte
from conftest import SHAKESPEARE

from tcinfer.api import Model
from tcinfer.chat import store
from tcinfer.chat.conversation import Conversation
from tcinfer.chat.launch import Chats
from tcinfer.chat.store import Log
from tcinfer.chat.template import ChatTemplate
from tcinfer.engine import backend as engine_backend
from tcinfer.loader import load
from tcinfer.sampling.choose import Sampling

COMMAND = str(Path(sys.executable).parent / "tcinfer")
# What the 65 characters of shakespeare.gguf can write.
TEMPLATE = (
    "{% for m in messages %}{{ 'CITIZEN' if m.role == 'user' else 'ROMEO' }}:\n{{ m.content }}\n\n"
    "{% endfor %}{% if add_generation_prompt %}ROMEO:\n{% endif %}"
)
ENTER, ALT_ENTER, UP, CTRL_C, CTRL_D = "\r", "\x1b\r", "\x1b[A", "\x03", "\x04"
SECONDS = 60.0  # for anything to happen, on a busy machine
QUIET = 0.3  # seconds without output


@lru_cache
def shakespeare(backend: str = "numba") -> Model:
    return load(SHAKESPEARE, backend=backend)


@lru_cache
def template(source: str | None = TEMPLATE) -> ChatTemplate:
    return ChatTemplate(source, "", "")


def conversation(
    folder: Path,
    name: str = "talk",
    new: bool = True,
    model: Model | None = None,
    source: str | None = TEMPLATE,
    system: str | None = None,
    tokens: int = 6,
    **sampling: Any,
) -> Conversation:
    """A conversation in this process: a new one, or one to go on with. Greedy unless `sampling` says otherwise."""
    log = Log(folder, name, {"system": system} if new else None)
    try:
        how = Sampling(**{"temperature": 0} | sampling)
        talk = Conversation(model or shakespeare(), template(source), log, how)
    except BaseException:
        log.close()
        raise
    talk.max_tokens = tokens
    return talk


def chats(path: Path | None = None, source: str | None = TEMPLATE, backend: str = "numba", **asked: Any) -> Chats:
    """As `tcinfer chat` makes it; what it says goes into its list `said`."""
    said: list[str] = []
    options = dict.fromkeys(("memory", "window", "sinks", "cache_type")) | asked
    how, engine = Sampling(temperature=0), engine_backend(backend)
    made = Chats(str(path or SHAKESPEARE), store.chats(), engine, options, source, how, said.append)
    made.said = said  # type: ignore[attr-defined]
    return made


def answer(talk: Conversation, message: str, *files: Path) -> str:
    """Ask, and wait for the whole answer."""
    return "".join(piece.text for piece in talk.ask(message, files))


def piped(home: Path, *arguments: object, lines: str | bytes = "", **more: str) -> subprocess.CompletedProcess:
    """`tcinfer ARGUMENTS` with text on its standard input, in a folder whose state files lie in it too."""
    data = lines.encode() if isinstance(lines, str) else lines
    command = [COMMAND, *map(str, arguments)]
    done = subprocess.run(command, input=data, capture_output=True, cwd=home, env=environment(home, **more), timeout=60)
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())


def environment(home: Path, **more: str) -> dict[str, str]:
    """The environment of a chat whose files all lie under `home`."""
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES")}
    return kept | {"XDG_STATE_HOME": str(home), "TERM": "xterm-256color"} | more


class _Screen(pyte.Screen):
    """A screen whose answers (where is the cursor?) go back to the program."""

    answer: Callable[[str], Any]

    def write_process_input(self, data: str) -> None:
        self.answer(data)


class Terminal:
    """`tcinfer ARGUMENTS` as a person runs it. A context manager: nothing is left running."""

    def __init__(self, home: Path, *arguments: object, rows: int = 60, columns: int = 120, **more: str) -> None:
        """home: of its state files; more: of its environment."""
        self.screen = _Screen(columns, rows)
        self._stream = pyte.ByteStream(self.screen)
        self.raw = bytearray()  # the last of what the program wrote
        self.ended = False
        self._entered = ""
        restored: Callable[[], Any] = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        self.child = pexpect.spawn(
            COMMAND,
            list(map(str, arguments)),
            env=environment(home, **more),
            cwd=str(home),
            dimensions=(rows, columns),
            preexec_fn=restored,
        )
        self.child.delaybeforesend = None
        self.screen.answer = self.child.send
        self.process = psutil.Process(self.child.pid)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.child.close(force=True)

    def read(self, seconds: float = 0.05) -> bool:
        """Take in what the program writes next; whether there was anything."""
        try:
            data = self.child.read_nonblocking(2**16, timeout=seconds)
        except pexpect.TIMEOUT:
            return False
        except pexpect.EOF:
            self.ended = True
            return False
        self.raw = (self.raw + data)[-(2**20) :]
        self._stream.feed(data)
        return True

    def until(self, true: Callable[[], Any], seconds: float = SECONDS) -> None:
        """Read until something is so; fails with the screen as it is then."""
        end = time.monotonic() + seconds
        while not true():
            self.read()
            if time.monotonic() > end or (self.ended and not true()):
                raise AssertionError("it did not come; the screen:\n" + "\n".join(self.lines()))

    def settle(self) -> None:
        """Read until the program has been quiet for a moment."""
        while self.read(QUIET):
            pass

    def settle_for(self, seconds: float) -> None:
        """Read for so long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.read()

    def lines(self) -> list[str]:
        """The screen from the top to its last line with text."""
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip().split("\n")

    def text(self) -> str:
        return "\n".join(self.lines())

    @property
    def status(self) -> str:
        """The line at the bottom while there is a prompt."""
        last = self.lines()[-1]
        return last.strip() if " | state " in last else ""

    def ready(self) -> bool:
        """Whether an empty prompt waits."""
        cursor = self.screen.cursor
        return cursor.x == 2 and self.screen.display[cursor.y].rstrip() == ">" and bool(self.status)

    def streaming(self) -> bool:
        """Whether an answer to the last line can be seen to come, and no prompt waits."""
        return not self.status and len("".join(self._after(self._entered))) > 20

    def typed(self, text: str) -> None:
        """Keys, and no Enter; returns once they can be seen."""
        self.child.send(text)
        self.until(lambda: not self.ready())
        self.until(lambda: text.splitlines()[-1][-30:].strip() in self.text())

    def enter(self, text: str) -> None:
        """A line; returns at once."""
        self.typed(text)
        self._entered = text
        self.child.send(ENTER)

    def says(self, text: str, seconds: float = SECONDS) -> list[str]:
        """A line; returns what came below it, once the next prompt waits."""
        self.enter(text)
        self.until(self.ready, seconds)
        return self.below(text)

    def below(self, text: str) -> list[str]:
        """The lines between this line, as it was typed last, and the prompt."""
        return self._after(text, self.screen.cursor.y)

    def _after(self, text: str, end: int | None = None) -> list[str]:
        lines = self.lines()
        places = [i for i, line in enumerate(lines) if line == f"> {text}".rstrip()]
        return lines[places[-1] + 1 : end] if places else []

    def stop(self) -> None:
        """Ctrl-C."""
        self.child.send(CTRL_C)

    def kill(self) -> None:
        """kill -9."""
        self.child.kill(signal.SIGKILL)
        self.child.wait()

    def status_code(self) -> int:
        """Its exit status, once it has ended."""
        self.until(lambda: self.ended)
        return self.child.wait()

    def rss(self) -> int:
        """Resident bytes of the process alone."""
        return self.process.memory_info().rss
