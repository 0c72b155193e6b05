"""The CUDA engine: a model's plan on a GPU, passes described to it, logits and chosen ids fetched from it."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from functools import lru_cache
from threading import RLock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tcinfer import memory
from tcinfer.config import ModelConfig
from tcinfer.engine import base
from tcinfer.engine.base import F32, Here, How, Logits, bytes_per_token
from tcinfer.errors import TcinferError
from tcinfer.kernels.cuda.plan import Pass
from tcinfer.kernels.cuda.recorder import Recorder
from tcinfer.kernels.errors import UnavailableError
from tcinfer.kernels.plan import FEW, ONE, PROMPT, SESSIONS
from tcinfer.kernels.table import CHOOSE, LEADERS
from tcinfer.memory import rooms
from tcinfer.memory.state import AnyState, DeviceState, Layout, State
from tcinfer.sampling import Sampling, on_device
from tcinfer.transformer import transformer

PASS_TOKENS = 2048  # rows of a pass with which a GPU is busy


class Later:
    """A row of logits that still lies on the GPU. Fetched when asked for, at the latest before a pass overwrites it."""

    def __init__(self, engine: Engine, row: int) -> None:
        self._engine, self.row = engine, row
        self._logits: F32 | None = None

    def fetch(self) -> F32:
        """float32 [V], read only."""
        with self._engine.lock:  # a pass of another thread may be fetching it just now
            if self._logits is None:
                self._logits = self._engine.logits(self.row, 1)[0]
                self._logits.flags.writeable = False
            return self._logits


class Engine:
    """A model's plan, weights and buffers on a GPU. One pass at a time; callers wait for each other."""

    def __init__(self, config: ModelConfig, weights: dict[str, Any], device: Any) -> None:
        """weights: as Backend.engine; the matrices are repacked and sent to the device.

        Raises UnavailableError where it lacks what the model needs.
        """
        self.config, self.device, self.lock, self._owner = config, device, RLock(), os.getpid()
        self.pass_tokens: int = PASS_TOKENS  # rows of the longest pass
        self.ragged = False
        self.bytes_per_token: int | None = bytes_per_token(weights)
        heads = {layer.n_kv_heads for layer in config.layers}
        if len(heads) > 1:
            raise UnavailableError("on a GPU all layers must have as many key heads: use --backend numba")
        self._heads = heads.pop()
        self._plan = plan = Recorder(
            self.pass_tokens, device, [o for found in rooms() for o in getattr(found, "OPERATORS", ())]
        )
        transformer(plan, config, lambda name, spec: weights.get(name))
        leaders = plan.allocate(8 * device.multiprocessors)
        plan.step(LEADERS, when=ONE, vocabulary=config.vocab_size, leaders=leaders)
        plan.step(CHOOSE, when=ONE, vocabulary=config.vocab_size, leaders=leaders)
        plan.step(CHOOSE, when=FEW | PROMPT | SESSIONS, vocabulary=config.vocab_size, leaders=None)
        plan.fields = sum(len(fields) for fields in memory.layout(config).layers)
        plan.finish()
        self._choices = plan.allocate(8 * self.pass_tokens)
        self._pass = device.zeros(Pass(self.pass_tokens, self.pass_tokens, self._heads).data.nbytes)
        address, key_heads = self._pass.address, self._heads
        # of a shape, made once: most passes are of one or two shapes
        self._passes = lru_cache(8)(lambda rows, sequences: Pass(rows, sequences, key_heads, address))
        self._logits, self._rows = device.zeros(4 * config.vocab_size), 1  # room for so many rows
        self._later: dict[int, weakref.ref[Later]] = {}  # by row

    def new_state(self, layout: Layout) -> AnyState:
        return DeviceState(layout, self.device)

    def placed(self, state: AnyState) -> AnyState:
        return DeviceState.placed(state, self.device) if isinstance(state, State) else state.copy()

    def chooses(self, sampling: Sampling) -> bool:
        return on_device(sampling, self.config.vocab_size)

    def run(self, states: Sequence[Any], counts: Sequence[int], ids: NDArray[np.int64], out_rows: int) -> F32:
        with self.lock:
            self._launch(states, counts, ids, out_rows)
            return self.logits(0, out_rows)

    def step(
        self, states: Sequence[Any], ids: NDArray[np.int64], hows: Sequence[How] | None = None, first: int = 0
    ) -> tuple[Sequence[Logits], NDArray[np.int64] | None]:
        count, V = len(states), self.config.vocab_size
        with self.lock:
            if hows is None:
                return [Here(row.copy()) for row in self.run(states, [1] * count, ids, count)], None
            rows = [
                (s.temperature, s.top_k or V, s.top_p, s.min_p, draw)
                for s, draw in ((h.sampling, h.draw) for h in hows)
            ]
            self._launch(states, [1] * count, ids, count, np.array(rows), first)
            chosen = self.device.get(self._choices, np.empty(count, np.int64))
            laters = [Later(self, first + row) for row in range(count)]
            self._later.update((later.row, weakref.ref(later)) for later in laters)
            return laters, chosen

    def logits(self, first: int, count: int) -> F32:
        """Rows of the last pass's logits, float32 [count, V]."""
        V = self.config.vocab_size
        with self.lock:
            return self.device.get(self._logits.address + 4 * V * first, np.empty((count, V), np.float32))

    def room(self, rows: int) -> None:
        with self.lock:
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
        """As `run`; the logits of the last `out_rows` rows become rows `first` and following."""
        total = len(ids)
        assert total == sum(counts) <= self.pass_tokens
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


class Backend(base.Backend):
    """Plans of operators in CUDA C++, on one NVIDIA GPU."""

    name = "cuda"

    def __init__(self, threads: int | None = None, device: Any = None) -> None:
        """device: in place of the GPU that CuPy uses (tests). Raises UnavailableError where there is none to use."""
        if device is None:
            from tcinfer.kernels.cuda.device import Device

            device = Device()
        self.device = device

    @property
    def cold(self) -> str:  # type: ignore[override]
        return "" if self.device.warm else "compiling for this GPU, once: up to a minute"

    def engine(self, config: ModelConfig, weights: dict[str, Any]) -> Engine:
        return Engine(config, weights, self.device)
