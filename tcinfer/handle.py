"""A request on its way, as who asked for it sees it: pieces as they come, or the whole text once it is there."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

from tcinfer.generation import Piece, Request
from tcinfer.sequence import Sequence, Snapshot

UNREAD = 256  # pieces that nobody has taken yet, at most: then a request waits


@dataclass(frozen=True)
class Answer:
    """A whole text; of one without an end (max_tokens -1) what nobody has taken yet."""

    text: str
    ids: list[int]  # all fed
    finish_reason: str  # "stop", "length", "cancelled" or "deadline"
    prompt_tokens: int
    waited_seconds: float  # until its prompt was begun
    first_seconds: float  # until its first piece, from when it was submitted
    seconds: float  # until its end


class Handle(Iterator[Piece]):
    """A request on its way: an iterator and an async iterator of its pieces, and what the whole text can be waited for
    with (`result`, or await). `session` is None until there was room for it, and may be used once all is done."""

    def __init__(
        self,
        request: Request,
        past: Sequence | Snapshot | None,
        deadline: float | None,
        keep: bool,
        wake: Callable[[], None],
    ) -> None:
        """Made by `Scheduler.submit`; wake: tells it that there may be something to do."""
        self.request, self.past, self._wake_scheduler = request, past, wake
        self.session: Any = past if isinstance(past, Sequence) else None
        self._changed = threading.Condition()
        self._unread: deque[Piece] = deque()
        self._pieces: list[Piece] = []  # all of them
        self._whole = False  # somebody waits for the whole text: nobody has to take pieces
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self._error: BaseException | None = None
        self._reason: str | None = None
        self.prompt_tokens = 0
        self._submitted = time.monotonic()
        self._begun = self._first = self._ended = math.nan
        self.deadline = math.inf if deadline is None else self._submitted + deadline
        self.cancelled, self._keep = False, keep

    @property
    def finish_reason(self) -> str | None:
        """None until it is over."""
        return self._reason

    def done(self) -> bool:
        """Whether it is over: nothing more will be written."""
        return self._reason is not None

    def cancel(self) -> None:
        """Write no more, from the next pass on; what was written stays, and the session has taken it in."""
        self.cancelled = True
        self._wake_scheduler()

    def result(self, timeout: float | None = None) -> Answer:
        """Wait for the whole text. Raises what went wrong with it, and TimeoutError after `timeout` seconds."""
        self._let_run()
        with self._changed:
            if not self._changed.wait_for(self.done, timeout):
                raise TimeoutError(f"no whole text within {timeout} s")
        return self._answer()

    def __next__(self) -> Piece:
        with self._changed:
            self._changed.wait_for(lambda: self._unread or self.done())
            piece = self._taken()
        if piece is None:
            raise StopIteration
        return piece

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self

    async def __anext__(self) -> Piece:
        while True:
            with self._changed:
                if self._unread or self.done():
                    piece = self._taken()
                    break
                waiter = self._waiter()
            await waiter
        if piece is None:
            raise StopAsyncIteration
        return piece

    def __await__(self) -> Generator[Any, None, Answer]:
        self._let_run()
        while True:
            with self._changed:
                if self.done():
                    break
                waiter = self._waiter()
            yield from waiter
        return self._answer()

    def _waiter(self) -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        self._waiters.append((loop, waiter))
        return waiter

    def _taken(self) -> Piece | None:
        """The next piece, or None at the end; under the lock."""
        if not self._unread:
            if self._error is not None:
                raise self._error
            return None
        if len(self._unread) == UNREAD:
            self._wake_scheduler()
        return self._unread.popleft()

    def _let_run(self) -> None:
        self._whole = True
        self._wake_scheduler()

    def _answer(self) -> Answer:
        if self._error is not None:
            raise self._error
        assert self._reason is not None
        waited, first, end = (t - self._submitted for t in (self._begun, self._first, self._ended))
        pieces = self._pieces or self._unread
        ids = [piece.id for piece in pieces if piece.id >= 0]
        return Answer(
            "".join(piece.text for piece in pieces), ids, self._reason, self.prompt_tokens, waited, first, end
        )

    # of the scheduler's thread

    @property
    def stalled(self) -> bool:
        """Whether there is too much that nobody has taken."""
        return len(self._unread) >= UNREAD and not self._whole

    def begun(self, tokens: int) -> None:
        self._begun, self.prompt_tokens = time.monotonic(), tokens

    def put(self, piece: Piece) -> None:
        """One more piece."""
        with self._changed:
            if math.isnan(self._first):
                self._first = time.monotonic()
            self._unread.append(piece)
            if self.request.max_tokens >= 0:  # without an end, only what nobody has taken is kept
                self._pieces.append(piece)
            self._notify()

    def end(self, reason: str, error: BaseException | None = None) -> None:
        """Nothing more comes."""
        with self._changed:
            self._reason, self._error, self._ended = reason, error, time.monotonic()
            if not self._keep:
                self.session = self.past = None
            self._notify()

    def _notify(self) -> None:
        self._changed.notify_all()
        waiters, self._waiters = self._waiters, []
        for loop, waiter in waiters:
            with contextlib.suppress(RuntimeError):  # a loop that is closed
                loop.call_soon_threadsafe(_wake, waiter)


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
