"""The Numba engine: a model's plan, run by threads of this machine.

One plan serves a single token, a chunk of a prompt, and one token each of many sessions: only the rows differ.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib import import_module
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tcinfer.config import PASS_TOKENS, ModelConfig
from tcinfer.engine import base
from tcinfer.engine.base import F32, bytes_per_token
from tcinfer.engine.eager import HostEngine
from tcinfer.kernels.cpu import attention
from tcinfer.kernels.cpu.jit import OPERATORS, Operator, cache_folder, prune
from tcinfer.kernels.cpu.plan import module_of
from tcinfer.kernels.cpu.recorder import Recorder
from tcinfer.kernels.cpu.threads import Threads, pool, prepare
from tcinfer.kernels.plan import COUNT, FEW, FIELDS, FIRST, ONE, PROMPT, ROW, SEQUENCE, SESSIONS, Geometry
from tcinfer.memory import rooms
from tcinfer.memory.state import State
from tcinfer.transformer import transformer

KERNELS = tuple(
    f"tcinfer.kernels.cpu.{name}" for name in ("attention", "bandwidth", "linear", "matrix_memory", "ring", "rows")
)
WORTH_SHARING = 2**21  # multiplications of a pass below which one thread is done before two have met


class Engine(HostEngine):
    """A model's plan, and how a pass is described to it. One pass at a time; callers wait for each other."""

    pass_tokens = PASS_TOKENS  # rows of the longest pass

    def __init__(self, config: ModelConfig, weights: dict[str, Any], threads: Threads) -> None:
        """weights: as Backend.engine; the matrices are repacked here, which takes their size in memory again."""
        self.config, self._threads, self._lock, self._owner = config, threads, Lock(), os.getpid()
        self._plan = Recorder(PASS_TOKENS, threads)
        transformer(self._plan, config, lambda name, spec: weights.get(name))
        self._plan.finish()
        self._geometries = _geometries(config)
        self.bytes_per_token: int | None = bytes_per_token(weights)
        self._parts = np.empty(0, np.uint8)
        self._gathered = np.empty(0, np.uint8)

    def run(self, states: Sequence[Any], counts: Sequence[int], ids: NDArray[np.int64], out_rows: int) -> F32:
        total = len(ids)
        assert total == sum(counts) <= PASS_TOKENS
        logits = np.empty((out_rows, self.config.vocab_size), np.float32)
        ids = np.ascontiguousarray(ids, np.int64)
        of = np.repeat(np.arange(len(states)), counts)
        table = np.empty((len(states), SEQUENCE), np.int64)
        for entry, state, count, first in zip(table, states, counts, np.cumsum(counts) - counts, strict=True):
            entry[[FIELDS, FIRST, ROW, COUNT]] = state.addresses.ctypes.data, state.position, first, count
        kind = SESSIONS if len(states) > 1 else ONE if total == 1 else FEW if total <= attention.MOST_FEW else PROMPT
        if self._owner != os.getpid():  # forked, perhaps while another thread held the lock
            self._owner, self._lock = os.getpid(), Lock()
        with self._lock:
            if kind == PROMPT:
                words = self._room_for_keys(states[0].position, total)
            else:
                words = self._room_for_parts(states, counts)
            work = (self._plan.work + self._attention(words)) * total
            self._plan.run(
                threads=1 if work < WORTH_SHARING else None,
                kind=kind,
                rows=total,
                ids=ids.ctypes.data,
                sequence_of=of.ctypes.data,
                sequences=len(states),
                table=table.ctypes.data,
                out_first=total - out_rows,
                out_rows=out_rows,
                logits=logits.ctypes.data,
                **words,
            )
        for state, count in zip(states, counts, strict=True):
            state.position += count
        return logits

    def _attention(self, words: Mapping[str, int]) -> int:
        """Multiplications of a row's attention over all that there is room for, in all layers."""
        keys = words["keys"] if "keys" in words else words["splits"] * attention.BLOCK
        return sum(2 * g.heads * g.head_dim * keys * count for g, count in self._geometries.items())

    def _room_for_parts(self, states: Sequence[State], counts: Sequence[int]) -> dict[str, int]:
        last = max(state.position + count - 1 for state, count in zip(states, counts, strict=True))
        splits = max(attention.splits_of(g, last) for g in self._geometries)
        need = max(attention.parts_bytes(g, sum(counts), splits) for g in self._geometries)
        if need > len(self._parts):
            self._parts = np.empty(2 * need, np.uint8)
        return {"splits": splits, "parts": self._parts.ctypes.data}

    def _room_for_keys(self, position: int, count: int) -> dict[str, int]:
        keys = max(attention.places(g, position, count) for g in self._geometries)
        need = max(attention.gathered_bytes(g, keys) for g in self._geometries)
        if need > len(self._gathered):
            self._gathered = np.empty(2 * need, np.uint8)
        return {"keys": keys, "gathered": self._gathered.ctypes.data}


def _geometries(config: ModelConfig) -> dict[Geometry, int]:
    """The first levels that there are, as far as attention's room depends on them, and how many layers have each."""
    return Counter(
        Geometry(layer.n_heads, layer.n_kv_heads, layer.head_dim, layer.window, layer.sinks, True, True, 0)
        for layer in config.layers
    )


def operators() -> Collection[Operator]:
    """Every compiled operator that there is, those of the memories' rooms included."""
    own = {module_of(operator) for found in rooms() for operator in getattr(found, "OPERATORS", ())}
    for name in (*KERNELS, *sorted(own)):
        import_module(name)
    return OPERATORS.values()


def warm_up() -> Iterator[int]:
    """Compile every operator for this CPU into the cache folder: yields how many are left, at first all of them.

    Removes what earlier versions left there, if nobody has used it for a month.
    """
    found = operators()
    prune()
    prepare()
    for done, made in enumerate(found):
        yield len(found) - done
        _ = made.address
    yield 0


class Backend(base.Backend):
    """Plans of compiled operators, on threads of this machine."""

    name = "numba"

    def __init__(self, threads: int | None = None) -> None:
        """threads: that run a plan together; None is one for each CPU that this process may use."""
        self.cold = _cold()  # before the threads' own functions are compiled
        self.threads = pool(threads)

    def engine(self, config: ModelConfig, weights: dict[str, Any]) -> Engine:
        return Engine(config, weights, self.threads)


def _cold() -> str:
    folder = cache_folder()
    if folder is None:
        return "compiling for this CPU; there is no private cache folder to keep the result in"
    return "" if any(folder.rglob("*.nbi")) else "compiling for this CPU, once: some seconds"
