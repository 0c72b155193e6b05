"""Ctrl-C between passes, never within one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

HEEDED = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """A block that is short, and is finished before a signal (SIGINT, SIGTERM) is heeded: KeyboardInterrupt, or what
    another handler in Python does, comes at its end. Python runs handlers in the main thread alone, so elsewhere this
    is nothing.
    """
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: handler for number in HEEDED if callable(handler := signal.getsignal(number))}
    came: list[tuple[int, Any]] = []
    for number in handlers:
        signal.signal(number, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if came:
            handlers[came[0][0]](*came[0])  # type: ignore[index]
