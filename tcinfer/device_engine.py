"""The transformer's plan on a GPU: passes described to it, logits and chosen ids fetched from it."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping, Sequence
from functools import lru_cache
from threading import RLock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tcinfer import memory
from tcinfer.config import ModelConfig
from tcinfer.engine import EMBEDDING, bytes_per_token, transformer
from tcinfer.errors import TcinferError
from tcinfer.kernels.cuda import operators
from tcinfer.kernels.cuda.plan import ONE, PROMPT, SESSIONS, Pass, Plan
from tcinfer.kernels.cuda.program import Named
from tcinfer.kernels.reference.quants import Matrix
from tcinfer.memory.state import DeviceState

F32 = NDArray[np.float32]
CHUNK = 2048  # rows of a pass with which a GPU is busy


class Later:
    """A row of logits that still lies on the GPU. Fetched when asked for, at the latest before a pass overwrites it."""

    def __init__(self, engine: DeviceEngine, row: int) -> None:
        self._engine, self.row = engine, row
        self._logits: F32 | None = None

    def fetch(self) -> F32:
        """float32 [V], read only."""
        if self._logits is None:
            self._logits = self._engine.logits(self.row, 1)[0]
            self._logits.flags.writeable = False
        return self._logits


class DeviceEngine:
    """A model's plan, weights and buffers on a GPU. One pass at a time; callers wait for each other."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Any],
        freq: NDArray[np.float64] | None,
        device: Any,
    ) -> None:
        """weights: as Model takes them; the matrices are repacked and sent to the device."""
        self.config, self.device, self._lock, self._owner = config, device, RLock(), os.getpid()
        self.chunk = chunk = CHUNK  # rows of the longest pass
        self.bytes_per_token = bytes_per_token(weights)
        self._plan = plan = Plan(chunk, device)
        there = {name: operators.stored(plan, w) if isinstance(w, Matrix) else w for name, w in weights.items()}
        transformer(plan, operators, config, there, there[EMBEDDING], freq)
        plan.step(Named("choose"), config.vocab_size)
        plan.fields = sum(len(fields) for fields in memory.layout(config).layers)
        plan.finish()
        self._choices = plan.allocate(8 * chunk)
        self._pass = device.zeros(Pass(chunk, chunk, config.n_kv_heads).data.nbytes)
        address, heads = self._pass.address, config.n_kv_heads
        # of a shape, made once: most passes are of one or two shapes
        self._passes = lru_cache(8)(lambda rows, sequences: Pass(rows, sequences, heads, address))
        self._logits, self._rows = device.zeros(4 * config.vocab_size), 1  # room for so many rows
        self._later: dict[int, weakref.ref[Later]] = {}  # by row

    def run(self, states: Sequence[Any], counts: Sequence[int], ids: NDArray[np.int64], out_rows: int) -> F32:
        """As engine.Engine.run, on states of this device."""
        with self._lock:
            self._launch(states, counts, ids, out_rows)
            return self.logits(0, out_rows)

    def choose(
        self, states: Sequence[Any], ids: NDArray[np.int64], how: NDArray[np.float64], first: int = 0
    ) -> tuple[list[Later], NDArray[np.int64]]:
        """Take a token into each of at most `chunk` states, and choose what comes next.

        how: float64 [len(states), HOW_MANY]. Returns the logits, which stay on the device as rows `first` and
        following, and the ids, int64 [len(states)]; -1 where the logits are not finite.
        """
        with self._lock:
            self._launch(states, [1] * len(states), ids, len(states), how, first)
            chosen = self.device.get(self._choices, np.empty(len(states), np.int64))
            laters = [Later(self, first + row) for row in range(len(states))]
            self._later.update((later.row, weakref.ref(later)) for later in laters)
            return laters, chosen

    def logits(self, first: int, count: int) -> F32:
        """Rows of the last pass's logits, float32 [count, V]."""
        V = self.config.vocab_size
        with self._lock:
            return self.device.get(self._logits.address + 4 * V * first, np.empty((count, V), np.float32))

    def make_room(self, rows: int) -> None:
        """For the logits of so many rows. Raises UnavailableError where there is not so much memory."""
        with self._lock:
            if rows > self._rows:
                self._rescue(0, self._rows)
                self._logits, self._rows = self.device.zeros(4 * self.config.vocab_size * rows), rows

    def _launch(
        self,
        states: Sequence[DeviceState],
        counts: Sequence[int],
        ids: NDArray[np.int64],
        out_rows: int,
        how: NDArray[np.float64] | None = None,
        first: int = 0,
    ) -> None:
        """Take ids [sum of counts] into states, each its part, at most `chunk` in all, and move them on.

        Several states: a token each. The logits of the last `out_rows` rows become rows `first` and following.
        """
        total = len(ids)
        assert total == sum(counts) <= self.chunk
        assert len(states) == 1 or max(counts) == 1
        assert first + out_rows <= self._rows
        if self._owner != os.getpid():
            raise TcinferError("a model on a GPU does not outlive a fork: load it in the new process")
        self._rescue(first, first + out_rows)
        one = self._passes(total, len(states))
        logits = self._logits.address + 4 * self.config.vocab_size * first
        choices = 0 if how is None else self._choices
        one.tell(choices=choices, out_first=total - out_rows, out_rows=out_rows, logits=logits)
        row = 0
        for i, (state, count) in enumerate(zip(states, counts, strict=True)):
            one.table[i] = state.fields, state.position, row, count
            one.sequence_of[row : row + count] = i
            row += count
        one.ids[:] = ids
        if how is not None:
            one.how[:] = how
        self.device.put(self._pass.address, one.data)
        self._plan.run_pass(ONE if total == 1 else SESSIONS if len(states) > 1 else PROMPT, self._pass.address)
        for state, count in zip(states, counts, strict=True):
            state.position += count

    def _rescue(self, first: int, stop: int) -> None:
        """Fetch the rows that somebody still waits for, before they are overwritten."""
        for row in range(first, stop):
            reference = self._later.get(row)
            if reference is not None and (later := reference()) is not None:
                later.fetch()
            self._later.pop(row, None)
