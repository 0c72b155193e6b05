"""Threads that share the rows of one operator: compiled code runs without the GIL."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

from threadpoolctl import ThreadpoolController


class Threads:
    """A pool made when it is first needed, and made again in a process that was forked from one that had it."""

    def __init__(self, count: int | None) -> None:
        """count: threads that work at once, the caller's own included; None: one for each CPU at hand."""
        self.count = count or _cpus()
        self._owner: int | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._blas: ThreadpoolController | None = None

    def share(self, rows: int, work: Callable[[int, int], None]) -> None:
        """work(first, last) over ranges that cover 0 .. rows, side by side; returns when all are done."""
        step = -(-rows // self.count)
        parts = [(a, min(rows, a + step)) for a in range(0, rows, step)]
        waiting = [self._workers().submit(work, *part) for part in parts[1:]]
        work(*parts[0])
        for done in waiting:
            done.result()

    def alone(self) -> AbstractContextManager[Any]:
        """Around code whose BLAS calls should stay in their own thread. The setting is the process's, and put back."""
        if self._blas is None:
            self._blas = ThreadpoolController().select(user_api="blas")
        return self._blas.limit(limits=1)

    def _workers(self) -> ThreadPoolExecutor:
        if self._pool is None or self._owner != os.getpid():
            self._owner = os.getpid()
            self._pool = ThreadPoolExecutor(max(1, self.count - 1), thread_name_prefix="tcinfer")
        return self._pool


def _cpus() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1
