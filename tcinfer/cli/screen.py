"""An answer on a person's terminal: words wrap, and keys pressed meanwhile wait for the next prompt."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

TAB = 8  # columns


def _columns() -> int:
    return shutil.get_terminal_size().columns


class Wrapped:
    """Text as it comes, with a line end before each word that would cross the edge.

    A word is written once it is whole: once a space, a line end or a character two columns wide follows; before and
    after such a character a line may end. A word longer than a line is left to the terminal.
    """

    def __init__(self, out: TextIO, columns: Callable[[], int] = _columns) -> None:
        self._out, self._columns = out, columns
        self._at = 0  # the column where the next character goes
        self._spaces, self._word = "", ""  # not written yet

    def write(self, text: str) -> None:
        for c in text:
            if c == "\n":
                self._end_word()
                self._end_line()
            elif c in " \t":
                self._end_word()
                self._spaces += c
            elif _cells(c) > 1:
                self._end_word()
                self._word = c
                self._end_word()
            else:
                self._word += c

    def flush(self) -> None:
        """Show what was written, but for a word that may go on."""
        self._out.flush()

    def _end_word(self) -> None:
        if not self._word:
            return
        columns, width, start = self._columns(), _cells(self._word), self._at
        for c in self._spaces:
            start += TAB - start % TAB if c == "\t" else 1
        if self._at and start + width > columns:
            self._end_line()
            start = 0
        self._out.write(self._spaces + self._word)
        self._at = start + width if start + width <= columns else (start + width - 1) % columns + 1
        self._spaces = self._word = ""

    def _end_line(self) -> None:
        self._out.write("\n")
        self._at, self._spaces = 0, ""


def _cells(text: str) -> int:
    from prompt_toolkit.utils import get_cwidth

    return get_cwidth(text)


@contextmanager
def unechoed() -> Iterator[None]:
    """Keys pressed within are not shown; whoever reads next gets them, also after a Ctrl-C."""
    try:
        import termios
    except ImportError:  # Windows
        yield
        return
    inputs, local = 0, 3  # places in what tcgetattr gives
    before, quiet = termios.tcgetattr(sys.stdin), termios.tcgetattr(sys.stdin)
    quiet[inputs] &= ~termios.ICRNL
    quiet[local] = quiet[local] & ~(termios.ECHO | termios.ICANON) | termios.NOFLSH
    try:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
        yield
    finally:
        with suppress(termios.error):  # the terminal may be gone
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
