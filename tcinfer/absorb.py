"""Feeding a stream of any length into a session, saving it as it goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, BinaryIO

from tcinfer.tokenizer.stream import ids_and_total

if TYPE_CHECKING:
    from tcinfer.api import Session
    from tcinfer.progress import Progress


def absorb(
    session: Session,
    stream: BinaryIO,
    save: Callable[[], object],
    every: float,
    live: float | None = None,
    progress: Progress | None = None,
    invalid: Callable[[], None] | None = None,
) -> int:
    """The tokens fed; save: called every so many seconds, where a live stream rests, and at the end, also one that an
    interruption or an error brings, if the session is whole then. live, invalid: as `tokenizer.stream.pieces` takes."""
    start, saved = session.position, time.monotonic()

    def save_after(seconds: float) -> None:
        nonlocal saved
        if time.monotonic() - saved > seconds:
            save()
            saved = time.monotonic()

    def fed(n: int, total: int | None) -> None:
        if progress is not None:
            progress(n, total)
        save_after(every)

    tokenizer, bos = session.model.tokenizer, not start and session.model.tokenizer.add_bos
    try:
        for part, total in ids_and_total(tokenizer, stream, bos, live, continues=start > 0, invalid=invalid):
            if part:
                session.feed(part, progress=partial(fed, total=total))
            else:  # the stream rests: there is time to save
                save_after(0)
    finally:
        if session.whole:
            save()
    return session.position - start
