"""A process of one tree for compare_commits.py: repeats what it is asked for, line by line, and prints its speed.

PYTHON benchmarks/speed_worker.py MODEL.gguf       (the first line lists what can be asked for, tabs between)
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np

import tcinfer

PROMPT, DECODED, CONTEXT, SESSIONS, STEPS, WARMING = 512, 32, 64, 16, 8, 16  # tokens, but for sessions and their steps


def works(path: str) -> dict[str, Callable[[], float]]:
    """What is measured of a model: each gives tokens per second of one repetition."""
    model = tcinfer.load(path, backend="numba", memory="full")
    session = model.session()
    ids = np.random.default_rng(0).integers(0, len(session.feed(0)), PROMPT)
    session.reset()
    session.feed(ids[:CONTEXT])
    begun = session.snapshot()
    sessions = [session.fork() for _ in range(SESSIONS)]

    def seconds(work: Callable[..., object], *arguments: object) -> float:
        started = time.perf_counter()
        work(*arguments)
        return time.perf_counter() - started

    def warm() -> None:
        """What is not timed: clocks rise, caches fill."""
        session.restore(begun)
        for token in ids[:WARMING]:
            session.feed(token)

    def prompt() -> float:
        warm()
        session.reset()
        return PROMPT / seconds(session.feed, ids)

    def decode() -> float:
        warm()
        session.restore(begun)
        return 1 / float(np.median([seconds(session.feed, token) for token in ids[:DECODED]]))

    def together() -> float:
        warm()
        for one in sessions:
            one.restore(begun)
        taken = [seconds(model.step_many, sessions, [token] * SESSIONS) for token in ids[:STEPS]]
        return SESSIONS / float(np.median(taken))

    return {"decode": decode, f"prompt of {PROMPT}": prompt, f"{SESSIONS} sessions together": together}


def serve(path: str) -> None:
    """Measure what is asked for, line by line, until there are no more."""
    known = works(path)
    print("\t".join(known), flush=True)
    for line in sys.stdin:
        print(known[line.strip()](), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
