"""A progress bar on stderr for what takes longer than a second; silence where stderr is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

PATIENCE = 1.0  # seconds


@contextmanager
def bar(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Yields advance(n). The bar appears after a second and goes away at the end.

    total: None where it is not known, as of a pipe; then there is a count, and no time that remains.
    """
    shown: list[tuple[Any, Any]] = []  # the bar and its task, once it is there
    started, done = time.monotonic(), 0

    def advance(n: int) -> None:
        nonlocal done
        done += n
        if not shown and time.monotonic() - started > PATIENCE and sys.stderr.isatty():
            shown.append(_started(what, total))
        for progress, task in shown:
            progress.update(task, completed=done)

    try:
        yield advance
    finally:
        for progress, _ in shown:
            progress.stop()


def _started(what: str, total: int | None) -> tuple[Any, Any]:
    from rich.console import Console  # only now: its import takes longer than most of what a bar is for
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

    counts: tuple[ProgressColumn, ...] = (MofNCompleteColumn(), TimeRemainingColumn())
    if total is None:
        counts = (TextColumn("{task.completed:,}"),)
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), *counts, console=Console(stderr=True), transient=True
    )
    task = progress.add_task(what, total=total)
    progress.start()
    return progress, task
