"""Many requests at once: one thread runs the passes, and each request is written as if it were alone.

Each turn of the thread is a pass, or a few: one token for every sequence that is written to, and as much of the prompts
that wait to be read as fits the time that nobody should have to wait. A prompt is read up to its last token, which
then goes with the tokens that are written. What an answer is does not depend on what else runs: a row of a pass has the
same bits whatever rows are beside it.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from tcinfer import memory
from tcinfer.config import check_count, check_number
from tcinfer.errors import TcinferError
from tcinfer.generation import Generation, Piece, Request
from tcinfer.handle import Handle, Work
from tcinfer.sequence import RECENT, Sequence, Snapshot, advance, rounded_up, run

if TYPE_CHECKING:
    from tcinfer.loaded import Loaded

SHORT = 64  # tokens of a prompt that go with others' in one pass, where the engine can; longer parts go alone
AGEING = 2.0  # seconds in which waiting halves what a prompt counts as
CANCELLED, DEADLINE, ERROR = "cancelled", "deadline", "error"  # why a text is over, beside "stop" and "length"
MEASURED = 8  # tokens of a pass from which speed can be told
FASTEST = 1e5  # tokens a second that prompts are taken to be read with before it has been measured


class BusyError(TcinferError):
    """There is no room for one more request now; later there may be."""


class _Job:
    """A request that is being worked on, or waits to be."""

    sequence: Sequence
    generation: Generation
    lent = False  # whether the sequence is the scheduler's alone just now

    def __init__(self, work: Work) -> None:
        self.work, self.queued = work, time.monotonic()
        self._length = _about(work.request.prompt)
        self.pending = np.empty(0, np.int64)  # ids to feed; the last one's logits are looked at
        self.writing = False  # whether the pending id is one that was chosen

    def begin(self, new: Callable[[Snapshot | None], Sequence]) -> None:
        """Make its session, if it has none. Raises TcinferError for a request that does not fit it."""
        work, past = self.work, self.work.past
        self.sequence = past if isinstance(past, Sequence) else new(past)
        self.sequence.lend()  # until it is dropped
        self.lent, work.session = True, self.sequence
        self.generation = Generation(work.request, self.sequence)
        self.pending = self.generation.prompt
        self._length = len(self.pending)
        work.begun(len(self.pending))

    def rank(self, now: float) -> float:
        """Order of prompts: the shortest first, and who has waited."""
        return (len(self.pending) or self._length) * 2.0 ** ((self.queued - now) / AGEING)  # at last 0


def _about(prompt: Any) -> float:
    """How many tokens a prompt has, before it is looked at closely."""
    try:
        return len(prompt) / 4 if isinstance(prompt, str) else len(prompt)
    except TypeError:  # none, or one id
        return 1


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
        self._inbox: deque[_Job] = deque()
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
        whole: bool = False,
    ) -> Handle:
        """Ask for a text; session: goes on from there (nobody else may use it until the handle is done), or from a
        snapshot; a new one by default; deadline: seconds after which it ends as it is then; keep: whether
        the handle has the session when it is done, or its memory is given back; whole: nobody takes pieces as they
        come, so that it is written to its end though nobody does.

        A handle that nobody holds any more is cancelled. Raises BusyError where too many wait, and TcinferError for
        what is no request, for a session of another model, and once closed.
        """
        if not isinstance(request, Request):
            raise TcinferError(f"a scheduler takes a tcinfer.Request, not {type(request).__name__}: Request.of(prompt)")
        ours = isinstance(session, (Sequence, Snapshot)) and session.model is self._model
        if session is not None and not ours:
            raise TcinferError("a request goes on from a session or a snapshot of the scheduler's own model")
        if deadline is not None:
            check_number("deadline", deadline, 0.0)
        with self._awake:
            if self._closing:
                raise TcinferError("this scheduler is closed")
            if len(self._inbox) + len(self._queue) >= self.max_queue + self._free():
                raise BusyError(f"{self.max_queue} requests wait already: try again later")
            work = Work(request, session, deadline, keep, whole, self.wake)
            self._inbox.append(_Job(work))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="tcinfer scheduler", daemon=True)
                self._thread.start()
            self._awake.notify()
        return Handle(work)

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
                jobs = [*self._inbox, *self._active, *self._queue]
            for job in jobs:
                self._drop(job)
                job.work.end(ERROR, e)

    def _work(self) -> None:
        while True:
            with self._awake:
                while not (self._inbox or self._closing or self._has_work()):
                    self._awake.wait(self._until_deadline())
                self._queue += self._inbox
                self._inbox.clear()
                closing = self._closing
            for job in [*self._active, *self._queue]:
                if closing or job.work.cancelled or job.work.deadline <= time.monotonic():
                    self._stop(job, CANCELLED if closing or job.work.cancelled else DEADLINE)
            if closing:
                return
            self._admit()
            self._turn()

    @staticmethod
    def _ready(job: _Job) -> bool:
        return not job.work.stalled

    def _has_work(self) -> bool:
        """Whether there is something to do that nobody has to say first."""
        jobs = [*self._active, *self._queue]
        over = any(job.work.cancelled or job.work.deadline <= time.monotonic() for job in jobs)
        return over or any(map(self._ready, self._active)) or (bool(self._queue) and self._has_room())

    def _until_deadline(self) -> float | None:
        first = min((job.work.deadline for job in [*self._active, *self._queue]), default=math.inf)
        return None if first == math.inf else min(max(0.0, first - time.monotonic()), threading.TIMEOUT_MAX)

    def _free(self) -> int:
        """How many more may be worked on. One at least where none is: it is told by itself that it does not fit."""
        most = self.max_active
        if self.budget is not None:
            most = max(1, min(most, self.budget // self.bytes_each))
        return max(0, most - len(self._active))

    def _has_room(self) -> bool:
        """For one more to be worked on."""
        return self._free() > 0

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
                most = job.sequence.position + len(job.pending) + max(0, job.work.request.max_tokens)
                endless = job.work.request.max_tokens < 0
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
            job.work.end(ERROR, e)

    @contextlib.contextmanager
    def _together(self, jobs: list[_Job]) -> Iterator[None]:
        """A pass of some jobs: what goes wrong with it as a whole ends them all."""
        try:
            yield
        except Exception as e:
            for job in jobs:
                self._drop(job)
                job.work.end(ERROR, e)

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
                job.sequence.make_room(1)
                self._step([job], [job.pending[:1]])
            self._drop(job)
            job.work.end(reason)

    def _choose(self, job: _Job) -> None:
        """After a pass: the id to be fed next, or the end."""
        token = None if job.generation.finish_reason else job.generation.choose(job.sequence)
        if token is not None:
            job.pending, job.writing = np.array([token], np.int64), True
            return
        if job.generation.rest:
            job.work.put(Piece(job.generation.rest, -1))
        self._drop(job)
        job.work.end(str(job.generation.finish_reason))

    def _turn(self) -> None:
        """A token for each that writes, and parts of prompts."""
        now = time.monotonic()
        ready = [job for job in self._active if self._ready(job)]
        writers = [job for job in ready if len(job.pending) == 1]
        readers = sorted((job for job in ready if len(job.pending) > 1), key=lambda job: job.rank(now))
        chunk = self._model.pass_tokens
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
        jobs, start, total = [job for job, _ in parts], time.monotonic(), sum(count for _, count in parts)
        if not jobs:
            return
        with self._together(jobs):
            run([job.sequence for job in jobs], [job.pending[:count] for job, count in parts], 0)
            for job, count in parts:
                job.pending = job.pending[count:]
            if total >= MEASURED:
                measured = total / max(1e-6, time.monotonic() - start)
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
        with self._together(jobs):
            self._step(jobs, [job.pending for job in jobs])
            for job in jobs:
                with self._alone(job):
                    if job.writing:
                        job.work.put(job.generation.fed(int(job.pending[0])))
                    else:
                        job.generation.begin(job.sequence)
                    self._choose(job)
