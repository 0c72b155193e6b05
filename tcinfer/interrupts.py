"""Ctrl-C between passes, never within one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

HEEDED = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextmanager
def uninterrupted() -> Iterator[None]:
    """A block that is short, and is finished before a signal (of HEEDED) is heeded: KeyboardInterrupt, or what
    another handler in Python does, comes at its end. Python runs handlers in the main thread alone, so elsewhere this
    is nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers: dict[int, Callable[..., Any]] = {}
    came: list[tuple[int, Any]] = []
    with ExitStack() as last:  # whatever one of them raises, the others are done
        for number in HEEDED:
            if callable(handler := signal.getsignal(number)):
                handlers[number] = handler
        last.callback(_replayed, handlers, came)
        for number, handler in handlers.items():
            last.callback(signal.signal, number, handler)
        for number in handlers:
            signal.signal(number, lambda number, frame: came.append((number, frame)))
        yield


def _replayed(handlers: dict[int, Callable[..., Any]], came: list[tuple[int, Any]]) -> None:
    """Give each signal that came to its handler."""
    with ExitStack() as last:
        for number, frame in reversed(came):
            last.callback(handlers[number], number, frame)
