"""Many requests at once: one thread runs the passes, and each request is written as if it were alone.

Each turn of the thread is a pass, or a few: one token for every sequence that is written to, and as much of the prompts
that wait to be read as fits the time that nobody should have to wait. A prompt is read up to its last token, which
then goes with the tokens that are written. What an answer is does not depend on what else runs: a row of a pass has the
same bits whatever rows are beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from tcinfer import memory
from tcinfer.config import check_count, check_number
from tcinfer.errors import TcinferError
from tcinfer.generation import Generation, Piece, Request
from tcinfer.sequence import RECENT, Sequence, Snapshot, advance, rounded_up, run

if TYPE_CHECKING:
    from tcinfer.loaded import Loaded

UNREAD = 256  # pieces that nobody has taken yet, at most: then a request waits
SHORT = 64  # tokens of a prompt that go with others' in one pass, where the engine can; longer parts go alone
AGEING = 2.0  # seconds in which waiting halves what a prompt counts as
CANCELLED, DEADLINE, ERROR = "cancelled", "deadline", "error"  # why a text is over, beside "stop" and "length"
FASTEST = 1e5  # tokens a second that prompts are taken to be read with before it has been measured


class BusyError(TcinferError):
    """There is no room for one more request now; later there may be."""


@dataclass(frozen=True)
class Answer:
    """A whole text."""

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
        self, scheduler: Scheduler, request: Request, past: Sequence | Snapshot | None, deadline: float | None
    ) -> None:
        """Made by `Scheduler.submit`."""
        self.request, self.past, self._scheduler = request, past, scheduler
        self.session: Any = past if isinstance(past, Sequence) else None
        self._changed = threading.Condition()
        self._unread: deque[Piece] = deque()
        self._texts: list[str] = []
        self._ids: list[int] = []
        self._whole = False  # somebody waits for the whole text: nobody has to take pieces
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self._error: BaseException | None = None
        self._reason: str | None = None
        self.prompt_tokens = 0
        self._submitted = time.monotonic()
        self._begun = self._first = self._ended = math.nan
        self.deadline = math.inf if deadline is None else self._submitted + deadline
        self.cancelled, self.keep = False, True

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
        self._scheduler.wake()

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
            self._scheduler.wake()
        return self._unread.popleft()

    def _let_run(self) -> None:
        self._whole = True
        self._scheduler.wake()

    def _answer(self) -> Answer:
        if self._error is not None:
            raise self._error
        assert self._reason is not None
        waited, first, end = (t - self._submitted for t in (self._begun, self._first, self._ended))
        return Answer("".join(self._texts), self._ids, self._reason, self.prompt_tokens, waited, first, end)

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
            self._texts.append(piece.text)
            if piece.id >= 0:
                self._ids.append(piece.id)
            self._unread.append(piece)
            self._notify()

    def end(self, reason: str, error: BaseException | None = None) -> None:
        """Nothing more comes."""
        with self._changed:
            self._reason, self._error, self._ended = reason, error, time.monotonic()
            if not self.keep:
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


class _Job:
    """A request that is being worked on, or waits to be."""

    sequence: Sequence
    generation: Generation
    lent = False  # whether the sequence is the scheduler's alone just now

    def __init__(self, handle: Handle) -> None:
        self.handle, self.queued = handle, time.monotonic()
        prompt = handle.request.prompt
        known: Any = prompt
        self._length = len(prompt) / 4 if isinstance(prompt, str) else len(known) if hasattr(prompt, "__len__") else 1
        self.pending = np.empty(0, np.int64)  # ids to feed; the last one's logits are looked at
        self.writing = False  # whether the pending id is one that was chosen

    def begin(self, new: Callable[[Snapshot | None], Sequence]) -> None:
        """Make its session, if it has none. Raises TcinferError for a request that does not fit it."""
        handle, past = self.handle, self.handle.past
        self.sequence = past if isinstance(past, Sequence) else new(past)
        self.sequence.lend()  # until it is dropped
        self.lent, handle.session = True, self.sequence
        self.generation = Generation(handle.request, self.sequence)
        self.pending = self.generation.prompt
        self._length = len(self.pending)
        handle.begun(len(self.pending))

    def rank(self, now: float) -> float:
        """Order of prompts: the shortest first, and who has waited."""
        return (len(self.pending) or self._length) * 2.0 ** ((self.queued - now) / AGEING)  # at last 0


class Scheduler:
    """A thread that works on requests, many at once. A context manager: at its end it is closed."""

    def __init__(
        self,
        model: Loaded,
        session: Callable[[Snapshot | None], Sequence] | None = None,
        max_active: int = 64,
        max_queue: int = 1024,
        budget: int | None = None,
        context: int | None = None,
        stall: float = 0.05,
    ) -> None:
        """session: makes a new one, with a past if there is one; max_active: requests that are worked on at once;
        max_queue: that wait, beyond which `submit` raises BusyError; budget: bytes of all states together; context:
        tokens that a session may reach where its cache grows (`full` memory), which must be said; stall: seconds that
        prompts may keep writers waiting.
        """
        check_count("max_active", max_active, 1)
        check_count("max_queue", max_queue, 0)
        check_number("stall", stall, 0.0)
        if budget is not None:
            check_count("budget", budget, 1)
        if context is None and not model.bounded:
            raise TcinferError(
                "this model's cache grows with every token: say `context`, the tokens that fit, or choose "
                "another memory"
            )
        if context is not None:
            check_count("context", context, 1)
        self._model, self._new, self._context = model, session or (lambda past: Sequence(model, past)), context
        self.max_active, self.max_queue, self.budget, self.stall = max_active, max_queue, budget, stall
        capacity = 0 if model.bounded or context is None else rounded_up(context)
        V = model.config.vocab_size
        self.bytes_each = memory.layout(model.config, capacity).nbytes + 4 * RECENT + 4 * V
        self._awake = threading.Condition()
        self._inbox: deque[Handle] = deque()
        self._closing = False
        self._queue: list[_Job] = []
        self._active: list[_Job] = []
        self._rate = FASTEST  # tokens of prompts a second
        self._thread: threading.Thread | None = None

    def submit(
        self,
        request: Request,
        session: Sequence | Snapshot | None = None,
        deadline: float | None = None,
        keep: bool = True,
    ) -> Handle:
        """Ask for a text; session: goes on from there (nobody else may use it until the handle is done), or from a
        snapshot; a new one by default; deadline: seconds after which it ends as it is then; keep: whether
        the handle has the session when it is done, or its memory is given back.

        Raises BusyError where too many wait, and TcinferError once closed.
        """
        with self._awake:
            if self._closing:
                raise TcinferError("this scheduler is closed")
            if len(self._inbox) + len(self._queue) >= self.max_queue:
                raise BusyError(f"{self.max_queue} requests wait already: try again later")
            handle = Handle(self, request, session, deadline)
            handle.keep = keep
            self._inbox.append(handle)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="tcinfer scheduler", daemon=True)
                self._thread.start()
            self._awake.notify()
        return handle

    def wake(self) -> None:
        """There may be something to do."""
        with self._awake:
            self._awake.notify()

    def close(self) -> None:
        """Cancel what is not done, and end the thread."""
        with self._awake:
            self._closing = True
            self._awake.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def active(self) -> int:
        """Requests that are being worked on."""
        return len(self._active)

    @property
    def nbytes(self) -> int:
        """Bytes of their states, and of what is kept beside them."""
        return self.bytes_each * len(self._active)

    # the thread

    def _run(self) -> None:
        """What ends the thread, if anything does, ends what is being worked on: nobody waits for ever."""
        try:
            self._work()
        except BaseException as e:
            with self._awake:
                self._closing = True
                handles = [*self._inbox, *(job.handle for job in [*self._active, *self._queue])]
            for handle in handles:
                handle.end(ERROR, e)

    def _work(self) -> None:
        while True:
            with self._awake:
                while not (self._inbox or self._closing or self._has_work()):
                    self._awake.wait(self._until_deadline())
                handles, self._inbox = list(self._inbox), deque()
                closing = self._closing
            self._queue += map(_Job, handles)
            for job in [*self._active, *self._queue]:
                if closing or job.handle.cancelled or job.handle.deadline <= time.monotonic():
                    self._stop(job, CANCELLED if closing or job.handle.cancelled else DEADLINE)
            if closing:
                return
            self._admit()
            self._turn()

    @staticmethod
    def _ready(job: _Job) -> bool:
        return not job.handle.stalled

    def _has_work(self) -> bool:
        """Whether there is something to do that nobody has to say first."""
        jobs = [*self._active, *self._queue]
        over = any(job.handle.cancelled or job.handle.deadline <= time.monotonic() for job in jobs)
        return over or any(map(self._ready, self._active)) or (bool(self._queue) and self._has_room())

    def _until_deadline(self) -> float | None:
        first = min((job.handle.deadline for job in [*self._active, *self._queue]), default=math.inf)
        return None if first == math.inf else max(0.0, first - time.monotonic())

    def _has_room(self) -> bool:
        """For one more to be worked on."""
        if not self._active:
            return True
        fits = self.budget is None or self.nbytes + self.bytes_each <= self.budget
        return len(self._active) < self.max_active and fits

    def _admit(self) -> None:
        """Work on more of those that wait, the shortest prompts first, as far as there is room."""
        if not self._queue or not self._has_room():
            return
        now = time.monotonic()
        self._queue.sort(key=lambda job: job.rank(now))
        while self._queue and self._has_room():
            job = self._queue.pop(0)
            self._active.append(job)
            with self._alone(job):
                if self.budget is not None and self.bytes_each > self.budget:
                    raise TcinferError(
                        f"a session takes {self.bytes_each:,} bytes, more than the budget {self.budget:,}"
                    )
                job.begin(self._new)
                most = job.sequence.position + len(job.pending) + max(0, job.handle.request.max_tokens)
                endless = job.handle.request.max_tokens < 0
                if self._context is not None and not self._model.bounded and (endless or most > self._context):
                    raise TcinferError(f"prompt and answer take more than the {self._context:,} tokens of `context`")
                if not len(job.pending):
                    job.generation.begin(job.sequence)
                    self._choose(job)

    @contextlib.contextmanager
    def _alone(self, job: _Job) -> Iterator[None]:
        """What goes wrong within ends this job, and no other."""
        try:
            yield
        except Exception as e:
            self._drop(job)
            job.handle.end(ERROR, e)

    def _drop(self, job: _Job) -> None:
        for jobs in (self._active, self._queue):
            if job in jobs:
                jobs.remove(job)
        if job.lent:
            job.sequence.take_back()
            job.lent = False

    def _stop(self, job: _Job, reason: str) -> None:
        """End a job before its time. One whose prompt was read in part takes one token more, to stand somewhere."""
        with self._alone(job):
            if job in self._active and job.sequence.position and not job.sequence.stands:
                self._step([job], [job.pending[:1]])
            self._drop(job)
            job.handle.end(reason)

    def _choose(self, job: _Job) -> None:
        """After a pass: the id to be fed next, or the end."""
        token = None if job.generation.finish_reason else job.generation.choose(job.sequence)
        if token is not None:
            job.pending, job.writing = np.array([token], np.int64), True
            return
        if job.generation.rest:
            job.handle.put(Piece(job.generation.rest, -1))
        self._drop(job)
        job.handle.end(str(job.generation.finish_reason))

    def _turn(self) -> None:
        """A token for each that writes, and parts of prompts."""
        now = time.monotonic()
        ready = [job for job in self._active if self._ready(job)]
        writers = [job for job in ready if len(job.pending) == 1]
        readers = sorted((job for job in ready if len(job.pending) > 1), key=lambda job: job.rank(now))
        chunk = self._model.chunk
        room = chunk if not writers else int(min(chunk, max(1, self.stall * self._rate)))
        together: list[tuple[_Job, int]] = []  # short parts of prompts, which share a pass
        for job in readers:
            count = min(room, len(job.pending) - 1)
            if count <= 0:
                break
            room -= count
            if count > SHORT or not self._model.engine.ragged:
                self._read([(job, count)])
            else:
                together.append((job, count))
        if together:
            self._read(together)
        for a in range(0, len(writers), chunk):
            self._write(writers[a : a + chunk])

    def _read(self, parts: list[tuple[_Job, int]]) -> None:
        """Parts of prompts in one pass, none of them to its end."""
        parts = [(job, count) for job, count in parts if self._room(job, count)]
        if not parts:
            return
        start, total = time.monotonic(), sum(count for _, count in parts)
        try:
            run([job.sequence for job, _ in parts], [job.pending[:count] for job, count in parts], 0)
        except Exception as e:
            for job, _ in parts:
                self._drop(job)
                job.handle.end(ERROR, e)
            return
        for job, count in parts:
            job.pending = job.pending[count:]
        measured = total / max(1e-6, time.monotonic() - start)
        if total >= 8:
            self._rate = measured if self._rate == FASTEST else self._rate + 0.3 * (measured - self._rate)

    def _room(self, job: _Job, count: int) -> bool:
        """Make room for so many tokens more; False where that has ended the job."""
        with self._alone(job):
            job.sequence.check_fits(count)
            job.sequence.make_room(count)
            return True
        return False

    def _step(self, jobs: list[_Job], ids: list[NDArray[np.int64]]) -> None:
        """A pass with a token for each."""
        self._model.engine.room(len(jobs))
        advance([job.sequence for job in jobs], np.concatenate(ids), [job.generation.ahead for job in jobs])

    def _write(self, jobs: list[_Job]) -> None:
        """A pass with the one pending token of each, and what follows from it."""
        jobs = [job for job in jobs if self._room(job, 1)]
        if not jobs:
            return
        try:
            self._step(jobs, [job.pending for job in jobs])
        except Exception as e:
            for job in jobs:
                self._drop(job)
                job.handle.end(ERROR, e)
            return
        for job in jobs:
            with self._alone(job):
                if job.writing:
                    job.handle.put(job.generation.fed(int(job.pending[0])))
                else:
                    job.generation.begin(job.sequence)
                self._choose(job)
