"""A progress bar on stderr for what takes longer than a second; silence where stderr is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

PATIENCE = 1.0  # seconds


class Progress(Protocol):
    """What is told how much was done since the last time, and of how much, where that is known."""

    def __call__(self, n: int, total: int | None = None) -> None: ...


class Bar:
    """What `bar` yields: called with how much was done since the last call."""

    def __init__(self, what: str, total: int | None) -> None:
        self.what, self.total = what, total
        self.done = 0
        self._started = time.monotonic()
        self._progress: Any = None  # the library's, once there is something to show

    def __call__(self, n: int, total: int | None = None) -> None:
        """total: where it was not known before, or is known better now."""
        self.done += n
        self.total = self.total if total is None else max(total, self.done)
        if self._progress is None and time.monotonic() - self._started > PATIENCE and sys.stderr.isatty():
            self._progress = _library()
            self._task = self._progress.add_task(self.what, total=None, count="")
            self._progress.start()
        if self._progress is not None:
            count = f"{self.done:,}" + ("" if self.total is None else f"/{self.total:,}")
            self._progress.update(self._task, completed=self.done, total=self.total, count=count)

    def stop(self, stays: bool) -> None:
        """stays: on the screen, as it is now; otherwise nothing is left of it."""
        if self._progress is not None:
            self._progress.live.transient = not stays
            self._progress.stop()


@contextmanager
def bar(what: str, total: int | None) -> Iterator[Bar]:
    """The bar appears after a second and goes away at the end; after Ctrl-C it stays, and says how far it came.

    total: None where it is not known, as of a pipe; then there is a count, and no time that remains.
    """
    shown, stays = Bar(what, total), False
    try:
        yield shown
    except KeyboardInterrupt:
        stays = True
        raise
    finally:
        shown.stop(stays)


def _library() -> Any:
    from rich.console import Console  # only now: its import takes longer than most of what a bar is for
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))
