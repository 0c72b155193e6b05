"""The transformer's plan on a GPU: passes described to it, logits and chosen ids fetched from it."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from functools import lru_cache
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tcinfer.config import ModelConfig
from tcinfer.engine import EMBEDDING, bytes_per_token, transformer
from tcinfer.kernels.cuda import operators
from tcinfer.kernels.cuda.plan import ONE, PROMPT, SESSIONS, Pass, Plan
from tcinfer.kernels.cuda.program import Named
from tcinfer.kernels.reference.quants import Matrix
from tcinfer.memory.state import DeviceState

F32 = NDArray[np.float32]
CHUNK = 1024  # rows of a pass with which a GPU is busy
HOW = 5  # numbers that say how a row's next id is chosen: temperature, top_k, top_p, min_p, a draw from [0, 1)


class Later:
    """A row of logits that still lies on the GPU. Fetched when asked for, at the latest before a pass overwrites it."""

    def __init__(self, engine: DeviceEngine, row: int) -> None:
        self._engine, self._row = engine, row
        self._logits: F32 | None = None

    def fetch(self) -> F32:
        """float32 [V], read only."""
        if self._logits is None:
            self._logits = self._engine.logits(self._row, 1)[0]
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
        self.config, self.device, self._lock = config, device, Lock()
        self.chunk = chunk = CHUNK  # rows of the longest pass
        self.bytes_per_token = bytes_per_token(weights)
        self._plan = plan = Plan(chunk, device, config.n_kv_heads)
        there = {name: operators.stored(plan, w) if isinstance(w, Matrix) else w for name, w in weights.items()}
        transformer(plan, operators, config, there, there[EMBEDDING], freq)
        plan.step(Named("choose"), config.vocab_size)
        plan.finish()
        self._choices = plan.allocate(8 * chunk)
        self._pass = device.zeros(Pass(chunk, chunk, config.n_kv_heads).data.nbytes)
        address, heads = self._pass.address, config.n_kv_heads
        # of a shape, made once: most passes are of one or two shapes
        self._passes = lru_cache(8)(lambda rows, sequences: Pass(rows, sequences, heads, address))
        self._logits, self._rows = device.zeros(4 * config.vocab_size), 1  # room for so many rows
        self._later: list[weakref.ref[Later]] = []

    def run(self, states: Sequence[Any], counts: Sequence[int], ids: NDArray[np.int64], out_rows: int) -> F32:
        """As engine.Engine.run, on states of this device."""
        self.launch(states, counts, ids, out_rows)
        return self.logits(0, out_rows)

    def launch(
        self,
        states: Sequence[DeviceState],
        counts: Sequence[int],
        ids: NDArray[np.int64],
        out_rows: int,
        how: NDArray[np.float64] | None = None,
    ) -> NDArray[np.int64] | None:
        """Take ids [sum of counts] into states, each its part, at most `chunk` in all, and move them on.

        Several states: a token each. The logits of the last `out_rows` rows stay on the device (`logits`, `later`).
        how: float64 [out_rows, HOW]; if given, the ids that come next are chosen there and returned, int64 [out_rows].
        """
        total = len(ids)
        assert total == sum(counts) <= self.chunk
        assert len(states) == 1 or max(counts) == 1
        with self._lock:
            assert out_rows <= self._rows
            self._rescue()
            one = self._passes(total, len(states))
            one.tell(
                choices=0 if how is None else self._choices,
                out_first=total - out_rows,
                out_rows=out_rows,
                logits=self._logits.address,
            )
            row = 0
            for i, (state, count) in enumerate(zip(states, counts, strict=True)):
                one.table[i] = state.fields, state.position, row, count
                one.sequence_of[row : row + count] = i
                row += count
            one.ids[:] = ids
            if how is not None:
                one.how[:out_rows] = how
            self.device.put(self._pass.address, one.data)
            kind = ONE if total == 1 else SESSIONS if len(states) > 1 else PROMPT
            self._plan.run_pass(kind, self._pass.address)
            chosen = None if how is None else self.device.get(self._choices, np.empty(out_rows, np.int64))
        for state, count in zip(states, counts, strict=True):
            state.position += count
        return chosen

    def logits(self, first: int, count: int) -> F32:
        """Rows of the last pass's logits, float32 [count, V]."""
        V = self.config.vocab_size
        return self.device.get(self._logits.address + 4 * V * first, np.empty((count, V), np.float32))

    def later(self, row: int) -> Later:
        """A row of the last pass's logits, to be fetched if it is wanted."""
        later = Later(self, row)
        self._later.append(weakref.ref(later))
        return later

    def _rescue(self) -> None:
        """Fetch what others still hold of the last pass, before it is overwritten."""
        for reference in self._later:
            if (later := reference()) is not None:
                later.fetch()
        self._later.clear()

    def make_room(self, rows: int) -> None:
        """For the logits of so many rows. Raises UnavailableError where there is not so much memory."""
        if rows > self._rows:
            with self._lock:
                self._rescue()
                self._logits, self._rows = self.device.zeros(4 * self.config.vocab_size * rows), rows
