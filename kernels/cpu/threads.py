"""Threads that run one plan together: spin barriers inside, sleep outside.

A worker is a Python thread that sleeps until there is work, runs its share of a plan without the GIL, and then waits a
moment for the next one in compiled code, because the next token usually comes at once. Waiting gives way to other
threads before long, so that more threads than CPUs are slow and not stuck.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress

import numpy as np
from numba import types

from tcinfer.kernels.cpu.jit import compiled
from tcinfer.kernels.cpu.machine import (
    atomic_add,
    atomic_load,
    atomic_replace,
    atomic_swap,
    call,
    give_way,
    int64s,
    pause,
)
from tcinfer.kernels.plan import KIND_OF_PASS

PATIENCE = 200  # pauses (some 10 us) after which a waiting thread gives way
WAKING = 1000  # looks at a worker that was woken, giving way in between, before it is woken again
LINGER = 4000  # pauses after which a worker without work goes to sleep

# Words of the shared block, each on a cache line of its own: the job, the count of arrivals at barriers, the workers.
LINE = 8
JOB, ARRIVALS, WORKERS = 0, LINE, 2 * LINE
STEPS, COUNT, PASS, THREADS, BASE = range(5)  # of the job
ASLEEP, AWAKE, HELD, GO = range(4)  # of a worker

# Words of a step of a plan
STEP = 8  # a cache line
# WHEN, WAIT: kinds of pass in which it runs, and in which all wait for each other behind it; TAKEN: how much of its
# work threads have claimed
OPERATOR, ARGUMENTS, WAIT, WHEN, TAKEN = range(5)


@compiled
def _barrier(shared: int, goal: int) -> None:
    arrivals = shared + 8 * ARRIVALS
    if atomic_add(arrivals, 1) + 1 >= goal:
        return
    spins = 0
    while atomic_load(arrivals) < goal:
        spins += 1
        if spins < PATIENCE:
            pause()
        else:
            give_way()


@compiled
def run_steps(steps: int, count: int, pass_: int, thread: int, threads: int, shared: int, base: int) -> None:
    """This thread's share of every step; ends when all threads have done theirs."""
    p, goal = int64s(pass_), base
    kind = p[KIND_OF_PASS]
    for i in range(count):
        step = int64s(steps + 8 * STEP * i)
        if step[WHEN] & kind:
            call(step[OPERATOR], int64s(step[ARGUMENTS]), p, thread, threads, steps + 8 * (STEP * i + TAKEN))
            if threads > 1 and step[WAIT] & kind:
                goal += threads
                _barrier(shared, goal)
    if threads > 1:
        _barrier(shared, goal + threads)


@compiled
def _clear(steps: int, count: int) -> None:
    """Nothing of the steps' work is claimed yet."""
    for i in range(count):
        int64s(steps + 8 * STEP * i)[TAKEN] = 0


@compiled
def _run_alone(steps: int, count: int, pass_: int) -> None:
    _clear(steps, count)
    run_steps(steps, count, pass_, 0, 1, 0, 0)


@compiled
def _run_together(shared: int, steps: int, count: int, pass_: int, threads: int, asleep: int, patience: int) -> int:
    """A whole pass on workers 1 .. threads - 1 and this thread, if none of the workers sleeps.

    Workers are held first, so that none goes to sleep while the others are looked at; then they are given the job. All
    in one call, because an interruption between two would leave a job half handed out. A worker that sleeps is looked
    at `patience` times; if it still does, its number is written to `asleep`, and how many do is returned.
    """
    out, n = int64s(asleep), 0
    for worker in range(1, threads):
        state, spins = shared + 8 * (WORKERS + LINE * worker), 0
        while atomic_load(state) != HELD and not atomic_replace(state, AWAKE, HELD):
            spins += 1
            if spins > patience:
                out[n] = worker
                n += 1
                break
            give_way()
    if n:
        return n
    job, base = int64s(shared + 8 * JOB), atomic_load(shared + 8 * ARRIVALS)
    job[STEPS], job[COUNT], job[PASS], job[THREADS], job[BASE] = steps, count, pass_, threads, base
    _clear(steps, count)
    for worker in range(1, threads):
        atomic_swap(shared + 8 * (WORKERS + LINE * worker), GO)
    run_steps(steps, count, pass_, 0, threads, shared, base)
    return 0


@compiled
def _let_go(shared: int, threads: int) -> None:
    """Workers that were held for a job that did not come may sleep."""
    for worker in range(1, threads):
        atomic_replace(shared + 8 * (WORKERS + LINE * worker), HELD, AWAKE)


@compiled
def _work(shared: int, worker: int) -> None:
    """Do jobs until there has been none for a while."""
    state, job = shared + 8 * (WORKERS + LINE * worker), int64s(shared + 8 * JOB)
    atomic_replace(state, ASLEEP, AWAKE)
    while True:
        spins = 0
        while atomic_load(state) != GO:
            spins += 1
            pause()
            if spins % PATIENCE == 0:
                give_way()
            if spins > LINGER and atomic_replace(state, AWAKE, ASLEEP):
                return
        atomic_swap(state, AWAKE)  # before the work: the next job may be handed over as soon as this one is done
        run_steps(job[STEPS], job[COUNT], job[PASS], worker, job[THREADS], shared, job[BASE])


def prepare() -> None:
    """Compile what runs plans, for the thread that asks: compiling is not for several at once."""
    for function, arguments in ((_run_alone, 3), (_run_together, 7), (_let_go, 2), (_work, 2)):
        function.compile(tuple([types.int64] * arguments))


class Threads:
    """`count` threads, the caller's own included; started when first needed, and anew in a forked process."""

    def __init__(self, count: int) -> None:
        prepare()
        self.count = count
        self._owner: int | None = None

    def run(self, steps: np.ndarray, pass_: np.ndarray, threads: int) -> None:
        """Run a plan's steps (int64 [n, STEP]) over a pass on `threads` threads; callers wait for each other."""
        job = (steps.ctypes.data, len(steps), pass_.ctypes.data)
        if threads <= 1:
            _run_alone(*job)
            return
        if self._owner != os.getpid():
            self._open()
        with self._lock:
            shared, asleep = self._shared.ctypes.data, np.empty(threads, np.int64)
            try:
                patience = 0
                while n := _run_together(shared, *job, threads, asleep.ctypes.data, patience):
                    for worker in asleep[:n]:
                        with suppress(RuntimeError):  # it is open already
                            self._wake[worker].release()
                    patience = WAKING
            except BaseException:  # Ctrl-C, before the job was handed out or after it was done
                _let_go(shared, threads)
                raise

    def _open(self) -> None:
        with _opening:
            if self._owner == os.getpid():
                return
            block = np.zeros(WORKERS + LINE * (self.count + 1), np.int64)
            self._shared = block[-block.ctypes.data % 64 // 8 :]
            self._lock = threading.Lock()
            self._wake = [threading.Lock() for _ in range(self.count)]  # open: the worker is to wake up
            for worker in range(1, self.count):
                self._wake[worker].acquire()
                threading.Thread(
                    target=_live, args=(self._wake[worker], self._shared, worker), name=f"tcinfer-{worker}", daemon=True
                ).start()
            self._owner = os.getpid()


def _live(wake: threading.Lock, shared: np.ndarray, worker: int) -> None:
    """A worker's life. Ctrl-C within the Python code of a threading.Event could leave its lock held; this one is C."""
    while True:
        wake.acquire()
        _work(shared.ctypes.data, worker)


_opening = threading.Lock()


def _forked() -> None:
    """In a child process, whose parent may have held the lock in a thread that is not here."""
    global _opening
    _opening = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)

_pools: dict[int, Threads] = {}


def pool(count: int | None) -> Threads:
    """The threads of this process that work `count` at a time (None: one for each CPU that it may use).

    All models share them, so that few threads spin.
    """
    count = count or _cpus()
    return _pools.get(count) or _pools.setdefault(count, Threads(count))


def _cpus() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1
