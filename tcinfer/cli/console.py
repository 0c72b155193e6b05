"""What the commands share: streams, lines of error, Ctrl-C, figures for people."""

from __future__ import annotations

import os
import signal
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from tcinfer.errors import TcinferError

if TYPE_CHECKING:
    from tcinfer.progress import Bar, Progress

INTERRUPTED = 130  # exit status after Ctrl-C
TERMINATED = 143  # after SIGTERM
T = TypeVar("T")
DIRECTIONS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # they reorder what stands around them
LONGEST_LINE = 5000  # characters of an error; the longest path has 4096


def use_utf8() -> None:
    """Text is UTF-8 whatever the locale says."""
    if sys.stdout is None:  # the shell's >&-
        raise TcinferError("standard output is closed")
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="replace", newline="")


def complain(text: str) -> None:
    """An error on one line of stderr, whatever a name from a file holds."""
    say(f"{styled('tcinfer:', fg='red')} {one_line(text)}")


def say(text: str) -> None:
    """A line on stderr."""
    click.echo(text, err=True)


def note(text: str) -> None:
    """A line on stderr about what goes on, quieter than what is asked for."""
    say(styled(text, dim=True))


def styled(text: str, **style: Any) -> str:
    """Text for stderr with click's styles, where its terminal has them and nobody said NO_COLOR."""
    plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb" or not sys.stderr.isatty()
    return text if plain else click.style(text, **style)


def one_line(text: str) -> str:
    """`text` of a bearable length, without line ends and what else could move a terminal's cursor."""
    text = text if len(text) <= LONGEST_LINE else text[:LONGEST_LINE] + "..."
    return "".join(c if c.isprintable() else "?" for c in text)


def printable(text: str) -> str:
    """Text of a model as a terminal may show it: every script, but nothing that drives the terminal."""
    return "".join("\ufffd" if _drives(c) else c for c in text if c != "\r")


def _drives(c: str) -> bool:
    return c not in "\n\t" and (unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c in DIRECTIONS)


def close_stdout() -> None:
    """Leave nothing for the interpreter to complain of when stdout cannot take what is left."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Interrupts:
    """Called between tokens: if a signal has come since the start, raises KeyboardInterrupt, or what ends a program."""

    def __init__(self) -> None:
        self.hits: list[int] = []
        self.waiting = False  # for input: then a signal takes effect at once

    def __call__(self) -> None:
        if self.hits:
            raise KeyboardInterrupt if self.hits[-1] == signal.SIGINT else SystemExit(TERMINATED)

    def waits(self, parts: Iterator[T]) -> Iterator[T]:
        """The same, each part waited for."""
        while True:
            self.waiting = True
            self()
            part = next(parts, None)
            self.waiting = False
            if part is None:
                return
            yield part


@contextmanager
def interruptible(*also: int, patient: bool = False) -> Iterator[Interrupts]:
    """Ctrl-C (and the signals in `also`) takes effect at the next call of what this yields; a second one at once, but
    for the patient, whose session must stay whole.

    Between tokens, because a KeyboardInterrupt in the middle of one may land where it is swallowed: Numba compiles
    through callbacks that print exceptions and go on.
    """
    check = Interrupts()

    def handler(signum: int, _: object) -> None:
        check.hits.append(signum)
        if check.waiting or (len(check.hits) > 1 and not patient):
            check()

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, *also)}
    try:
        yield check
        check()
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def both(advance: Bar, check: Callable[[], None]) -> Progress:
    """Progress that Ctrl-C can end."""

    def progress(n: int, total: int | None = None) -> None:
        advance(n, total)
        check()

    return progress


def terminated(*_: Any) -> NoReturn:
    """A handler of SIGTERM: leave by an exception, so that what is half-written is removed."""
    sys.exit(TERMINATED)


def stdin_waits() -> bool:
    """Whether something is there to be read from standard input, of a pipe or a file."""
    with suppress(ImportError, OSError, AttributeError, ValueError):  # no such call, no standard input
        import fcntl
        import termios

        if not sys.stdin.isatty():
            return any(fcntl.ioctl(sys.stdin.fileno(), termios.FIONREAD, bytes(4)))
    return False


def decoded(data: bytes) -> str:
    """Bytes are UTF-8 whatever the locale says."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        invalid()
        return data.decode(errors="replace")


def invalid() -> None:
    """Say so."""
    say("tcinfer: the text given is not valid UTF-8; what is not was replaced")


def argument(text: str) -> str:
    """A text from the command line, likewise."""
    return decoded(os.fsencode(text))


def rate(tokens: int, seconds: float) -> str:
    """Tokens per second, for people."""
    return f"{tokens / seconds:,.1f} tokens/s" if seconds > 0 and tokens else "no time"
