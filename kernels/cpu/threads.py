"""Threads that run one plan together: spin barriers inside, sleep outside.

A worker is a Python thread that sleeps until there is work, runs its share of a plan without the GIL, and then waits a
moment for the next one in compiled code, because the next token usually comes at once. Waiting gives way to other
threads before long, so that more threads than CPUs are slow and not stuck.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import numpy as np

from tcinfer.kernels.cpu.jit import compiled
from tcinfer.kernels.cpu.simd import (
    atomic_add,
    atomic_load,
    atomic_replace,
    atomic_swap,
    call,
    give_way,
    int64s,
    pause,
)

PATIENCE = 200  # pauses (some 10 us) after which a waiting thread gives way
LINGER = 4000  # pauses after which a worker without work goes to sleep

# Words of the shared block, each on a cache line of its own: the job, the count of arrivals at barriers, the workers.
LINE = 8
JOB, ARRIVALS, WORKERS = 0, LINE, 2 * LINE
STEPS, COUNT, PASS, THREADS, BASE = range(5)  # of the job
ASLEEP, AWAKE, GO = range(3)  # of a worker

# Words of a step of a plan
STEP = 4
OPERATOR, ARGUMENTS, WAIT, WHEN = range(STEP)
KIND_OF_PASS = 0  # word of a pass: a step runs if its WHEN has this bit


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
def _run(steps: int, count: int, pass_: int, thread: int, threads: int, shared: int, base: int) -> int:
    """This thread's share of every step; ends when all threads have done theirs. Returns the number of arrivals."""
    p, goal = int64s(pass_), base
    kind = p[KIND_OF_PASS]
    for i in range(count):
        step = int64s(steps + 8 * STEP * i)
        if step[WHEN] & kind:
            call(step[OPERATOR], int64s(step[ARGUMENTS]), p, thread, threads)
            if threads > 1 and (step[WAIT] or i == count - 1):
                goal += threads
                _barrier(shared, goal)
    return goal


@compiled
def _start(shared: int, steps: int, count: int, pass_: int, threads: int, base: int, asleep: int) -> int:
    """Hand a job to workers 1 .. threads - 1; writes which of them sleep to `asleep` and returns how many."""
    job, out, n = int64s(shared + 8 * JOB), int64s(asleep), 0
    job[STEPS], job[COUNT], job[PASS], job[THREADS], job[BASE] = steps, count, pass_, threads, base
    for worker in range(1, threads):
        if atomic_swap(shared + 8 * (WORKERS + LINE * worker), GO) == ASLEEP:
            out[n] = worker
            n += 1
    return n


@compiled
def _work(shared: int, worker: int) -> None:
    """Do jobs until there has been none for a while."""
    state, job = shared + 8 * (WORKERS + LINE * worker), int64s(shared + 8 * JOB)
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
        _run(job[STEPS], job[COUNT], job[PASS], worker, job[THREADS], shared, job[BASE])


def prepare() -> None:
    """Compile what runs plans, for the thread that asks: compiling is not for several at once."""
    _run.compile(f"int64({', '.join(['int64'] * 7)})")
    _start.compile(f"int64({', '.join(['int64'] * 7)})")
    _work.compile("void(int64, int64)")


class Threads:
    """`count` threads, the caller's own included; started when first needed, and anew in a forked process."""

    def __init__(self, count: int | None) -> None:
        """count: None is one for each CPU that this process may use."""
        prepare()
        self.count = count or _cpus()
        self._owner: int | None = None

    def run(self, steps: np.ndarray, pass_: np.ndarray, threads: int) -> None:
        """Run a plan's steps (int64 [n, STEP]) over a pass, on `threads` of the threads. One caller at a time."""
        if threads <= 1:
            _run(steps.ctypes.data, len(steps), pass_.ctypes.data, 0, 1, 0, 0)
            return
        if self._owner != os.getpid():
            self._open()
        with self._lock:
            asleep = np.empty(threads, np.int64)
            shared, base = self._shared.ctypes.data, int(self._shared[ARRIVALS])
            job = (steps.ctypes.data, len(steps), pass_.ctypes.data)
            n = _start(shared, *job, threads, base, asleep.ctypes.data)
            for worker in asleep[:n]:
                self._wake[worker].release()
            _run(*job, 0, threads, shared, base)

    def _open(self) -> None:
        block = np.zeros(WORKERS + LINE * (self.count + 1), np.int64)
        skip = -block.ctypes.data % 64 // 8
        self._shared = block[skip:]
        self._lock = threading.Lock()
        self._wake = [threading.Semaphore(0) for _ in range(self.count)]
        for worker in range(1, self.count):
            threading.Thread(
                target=_live, args=(self._wake[worker], self._shared, worker), name=f"tcinfer-{worker}", daemon=True
            ).start()
        self._owner = os.getpid()


def _live(wake: threading.Semaphore, shared: np.ndarray, worker: int) -> None:
    while True:
        wake.acquire()
        _work(shared.ctypes.data, worker)


_pools: dict[int, Threads] = {}


def pool(count: int | None) -> Threads:
    """The threads of this process that work `count` at a time: all models share them, so that no two pools spin."""
    return _pools.setdefault(count or _cpus(), Threads(count))


def _cpus() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


__all__: list[Any] = ["Threads", "pool"]
