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
from typing import Any, Self

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


class Work:
    """A request on its way, as the scheduler and its handle share it: what was written, and who waits for it."""

    def __init__(
        self,
        request: Request,
        past: Sequence | Snapshot | None,
        deadline: float | None,
        keep: bool,
        whole: bool,
        wake: Callable[[], None],
    ) -> None:
        """wake: tells the scheduler that there may be something to do; the rest as `Scheduler.submit` takes it."""
        self.request, self.past, self.wake = request, past, wake
        self.session: Any = past if isinstance(past, Sequence) else None
        self.changed = threading.Condition()
        self.unread: deque[Piece] = deque()
        self.pieces: list[Piece] = []  # all of them
        self.whole = whole  # the whole text is waited for: nobody has to take pieces
        self.waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self.error: BaseException | None = None
        self.reason: str | None = None  # why it is over
        self.cancelled, self._keep = False, keep
        self.prompt_tokens = 0
        self.submitted = time.monotonic()
        self.started = self.first = self.ended = math.nan
        self.deadline = math.inf if deadline is None else self.submitted + deadline

    def cancel(self) -> None:
        self.cancelled = True
        self.wake()

    # of the scheduler's thread

    @property
    def stalled(self) -> bool:
        """Whether there is too much that nobody has taken."""
        return len(self.unread) >= UNREAD and not self.whole

    def begun(self, tokens: int) -> None:
        self.started, self.prompt_tokens = time.monotonic(), tokens

    def put(self, piece: Piece) -> None:
        """One more piece."""
        with self.changed:
            if math.isnan(self.first):
                self.first = time.monotonic()
            self.unread.append(piece)
            if self.request.max_tokens >= 0:  # without an end, only what nobody has taken is kept
                self.pieces.append(piece)
            self._notify()

    def end(self, reason: str, error: BaseException | None = None) -> None:
        """Nothing more comes."""
        with self.changed:
            self.reason, self.error, self.ended = reason, error, time.monotonic()
            if not self._keep:
                self.session = self.past = None
            self._notify()

    def _notify(self) -> None:
        self.changed.notify_all()
        waiters, self.waiters = self.waiters, []
        for loop, waiter in waiters:
            with contextlib.suppress(RuntimeError):  # a loop that is closed
                loop.call_soon_threadsafe(_wake, waiter)


class Handle(Iterator[Piece]):
    """A request on its way: an iterator and an async iterator of its pieces, and what the whole text can be waited for
    with (`result`, or await). Closed, at the end of a `with` block, or once nobody holds it, it is cancelled."""

    def __init__(self, work: Work) -> None:
        """Made by `Scheduler.submit`."""
        self._work = work

    def __del__(self) -> None:
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def request(self) -> Request:
        return self._work.request

    @property
    def session(self) -> Any:
        """None until there was room for it; may be used once all is done."""
        return self._work.session

    @property
    def prompt_tokens(self) -> int:
        return self._work.prompt_tokens

    @property
    def finish_reason(self) -> str | None:
        """None until it is over."""
        return self._work.reason

    def done(self) -> bool:
        """Whether it is over: nothing more will be written."""
        return self._work.reason is not None

    def cancel(self) -> None:
        """Write no more, from the next pass on; what was written stays, and the session has taken it in."""
        self._work.cancel()

    def close(self) -> None:
        """Cancel it, unless it is over."""
        if not self.done():
            self.cancel()

    async def aclose(self) -> None:
        """The same, for asyncio."""
        self.close()

    def result(self, timeout: float | None = None) -> Answer:
        """Wait for the whole text. Raises what went wrong with it, and TimeoutError after `timeout` seconds."""
        self._let_run()
        with self._work.changed:
            if not self._work.changed.wait_for(self.done, timeout):
                raise TimeoutError(f"no whole text within {timeout} s")
        return self._answer()

    def __next__(self) -> Piece:
        work = self._work
        with work.changed:
            work.changed.wait_for(lambda: work.unread or self.done())
            piece = self._taken()
        if piece is None:
            raise StopIteration
        return piece

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self

    async def __anext__(self) -> Piece:
        while True:
            with self._work.changed:
                if self._work.unread or self.done():
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
            with self._work.changed:
                if self.done():
                    break
                waiter = self._waiter()
            yield from waiter
        return self._answer()

    def _waiter(self) -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        self._work.waiters.append((loop, waiter))
        return waiter

    def _taken(self) -> Piece | None:
        """The next piece, or None at the end; under the lock."""
        work = self._work
        if not work.unread:
            if work.error is not None:
                raise work.error
            return None
        if len(work.unread) == UNREAD:
            work.wake()
        return work.unread.popleft()

    def _let_run(self) -> None:
        self._work.whole = True
        self._work.wake()

    def _answer(self) -> Answer:
        work = self._work
        if work.error is not None:
            raise work.error
        assert work.reason is not None
        waited, first, end = (t - work.submitted for t in (work.started, work.first, work.ended))
        pieces = work.pieces or work.unread
        ids = [piece.id for piece in pieces if piece.id >= 0]
        return Answer("".join(piece.text for piece in pieces), ids, work.reason, work.prompt_tokens, waited, first, end)


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
