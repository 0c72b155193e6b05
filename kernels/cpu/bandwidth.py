"""How fast this machine reads memory: the ceiling for decoding, which reads every weight once a token."""

from __future__ import annotations

import time
from functools import reduce
from operator import xor
from typing import Any

import numpy as np
from numba.core import cgutils, types

from tcinfer.kernels.cpu.jit import operator
from tcinfer.kernels.cpu.machine import int64s
from tcinfer.kernels.cpu.plan import Plan
from tcinfer.kernels.cpu.rows import share
from tcinfer.kernels.cpu.simd import I32, I64, Held, Lanes, fetch_ahead, intrinsic, load
from tcinfer.kernels.cpu.threads import Threads
from tcinfer.kernels.cpu.tiles import AHEAD
from tcinfer.kernels.table import LOOK

LEAST = 2**26  # bytes, below which one reading is too short to be measured
READINGS = 9
LINES = 4  # cache lines looked at together


@intrinsic(types.int32, types.int64, types.int64)
def _read(builder: Any, at: Any, size: Any) -> Lanes:
    """Read `size` bytes (a multiple of 256); returns a number that depends on all of them."""
    seen = Held(builder, LINES, element=I32)
    with cgutils.for_range_slice(builder, I64(0), size, I64(64 * LINES)) as (i, _):
        here = builder.add(at, i)
        for line in range(LINES):
            fetch_ahead(builder, here, AHEAD + 64 * line)
            seen[line] = load(builder, here, 64 * line, I32) ^ seen[line]
    return reduce(xor, [seen[line] for line in range(LINES)]).reduce("add")


@operator
def _look(a, p, thread, threads, taken):  # type: ignore[no-untyped-def]
    data, size, sums = a[0], a[1], int64s(a[2])
    first, last = share(size // 256, thread, threads)
    sums[8 * thread] = _read(data + 256 * first, 256 * (last - first))


class Bandwidth:
    """Measures it, with the same threads and the same kind of loop as the products."""

    def __init__(self, threads: Threads, size: int) -> None:
        """size: bytes to read, at least: those of the weights, so that caches help both or neither."""
        size = max(LEAST, -(-size // 2**20) * 2**20)
        self._plan, self._size = Plan(1, threads), size
        data = np.ones(size, np.uint8)  # written, so that every page is there
        self._plan.step(LOOK, data=data, size=size, sums=np.zeros(8 * threads.count, np.int64))
        self._plan.finish()
        self._plan.run()

    def measure(self) -> float:
        """Bytes per second, the median of READINGS in a row: the first finds clocks low and threads asleep."""
        taken = []
        for _ in range(READINGS):
            started = time.perf_counter()
            self._plan.run()
            taken.append(time.perf_counter() - started)
        return self._size / sorted(taken)[READINGS // 2]
