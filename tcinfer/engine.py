"""The transformer as one plan: what Model.forward does in NumPy, step for step, in a backend's operators.

One plan serves a single token, a chunk of a prompt, and one token each of many sessions: only the rows differ. `Engine`
runs it on CPUs (numba backend); device_engine.py on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tcinfer import memory
from tcinfer.config import CHUNK, ModelConfig
from tcinfer.kernels.cpu import attention, linear, operators
from tcinfer.kernels.cpu.plan import COUNT, FIELDS, FIRST, LONG, ROW, SEQUENCE, SHORT, Plan, Rows
from tcinfer.kernels.cpu.threads import Threads
from tcinfer.kernels.reference.quants import Matrix
from tcinfer.memory.layer import Layer, Positions, geometry
from tcinfer.memory.state import State

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
WORTH_SHARING = 2**21  # multiplications of a pass below which one thread is done before two have met


class Engine:
    """A model's plan, and how a pass is described to it. One pass at a time; callers wait for each other."""

    chunk = CHUNK  # rows of the longest pass

    def __init__(
        self, config: ModelConfig, weights: Mapping[str, Any], freq: NDArray[np.float64] | None, threads: Threads
    ) -> None:
        """weights: as Model takes them; the matrices are repacked here, which takes their size in memory again."""
        self.config, self._threads, self._lock, self._owner = config, threads, Lock(), os.getpid()
        self._geometry = geometry(config)
        self._plan = Plan(CHUNK, threads)
        transformer(self._plan, operators, config, _repacked(weights, threads), weights[EMBEDDING], freq)
        self._plan.finish()
        self.bytes_per_token = bytes_per_token(weights)
        self._parts = np.empty(0, np.uint8)
        self._gathered = np.empty(0, np.uint8)

    def run(self, states: Sequence[Any], counts: Sequence[int], ids: NDArray[np.int64], out_rows: int) -> NDArray:
        """Take ids [sum of counts] into states, each its part, at most CHUNK in all, and move them on.

        Several states: a token each. Returns the logits of the last `out_rows` rows, float32 [out_rows, V].
        """
        assert len(states) == 1 or max(counts) == 1
        total = len(ids)
        assert total == sum(counts) <= CHUNK
        logits = np.empty((out_rows, self.config.vocab_size), np.float32)
        ids = np.ascontiguousarray(ids, np.int64)
        of = np.repeat(np.arange(len(states)), counts)
        table = np.empty((len(states), SEQUENCE), np.int64)
        for entry, state, count, first in zip(table, states, counts, np.cumsum(counts) - counts, strict=True):
            entry[[FIELDS, FIRST, ROW, COUNT]] = state.addresses.ctypes.data, state.position, first, count
        long = max(counts) > attention.FEW
        if self._owner != os.getpid():  # forked, perhaps while another thread held the lock
            self._owner, self._lock = os.getpid(), Lock()
        with self._lock:
            words = self._room_for_keys(states[0].position, counts[0]) if long else self._room_for_parts(states, counts)
            work = (self._plan.work + self._attention(words)) * total
            self._plan.run(
                threads=1 if work < WORTH_SHARING else None,
                kind=LONG if long else SHORT,
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
        return 2 * self.config.n_heads * self.config.head_dim * keys * self.config.n_layers

    def _room_for_parts(self, states: Sequence[State], counts: Sequence[int]) -> dict[str, int]:
        last = max(state.position + count - 1 for state, count in zip(states, counts, strict=True))
        splits = attention.splits_of(self._geometry, last)
        need = attention.parts_bytes(self._geometry, sum(counts), splits)
        if need > len(self._parts):
            self._parts = np.empty(2 * need, np.uint8)
        return {"splits": splits, "parts": self._parts.ctypes.data}

    def _room_for_keys(self, position: int, count: int) -> dict[str, int]:
        keys, need = attention.gathered(self._geometry, position, count)
        if need > len(self._gathered):
            self._gathered = np.empty(2 * need, np.uint8)
        return {"keys": keys, "gathered": self._gathered.ctypes.data}


def _repacked(weights: Mapping[str, Any], threads: Threads) -> dict[str, Any]:
    """The same weights with every matrix as products read it; the embedding only where it is also the head."""
    plan, out = Plan(1, threads), dict(weights)
    for name, value in weights.items():
        if isinstance(value, Matrix) and not (name == EMBEDDING and HEAD in weights):
            out[name] = linear.repacked(plan, value)
    plan.finish()
    plan.run()
    return out


def bytes_per_token(weights: Mapping[str, Any]) -> int:
    """Bytes of the matrices that each token is multiplied with, as the file holds them."""
    return sum(
        value.data.nbytes
        for name, value in weights.items()
        if isinstance(value, Matrix) and not (name == EMBEDDING and HEAD in weights)
    )


def transformer(
    plan: Plan,
    operators: Any,
    config: ModelConfig,
    weights: Mapping[str, Any],
    embedding: Any,
    freq: NDArray[np.float64] | None,
) -> None:
    """Put the whole model into a plan, logits last. operators: the backend's module of them; weights: its matrices,
    and float32 arrays for the rest; embedding: as its `embed` reads it."""
    layout, mechanism = memory.layout(config), memory.mechanism(config)
    x = operators.embed(plan, embedding, weights.get("position_embd.weight"))
    positions, first_field = Positions(plan, config, freq), 0
    plan.hold()
    for i, fields in enumerate(layout.layers):
        prefix = f"blk.{i}."
        own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        layer = Layer(plan, operators, config, own, positions, i, fields, first_field, x)
        first_field += len(fields)
        h = _norm(plan, operators, config, own, "attn_norm", x)
        q, k, v = (layer.linear(h, name, wait=name == "attn_v") for name in ("attn_q", "attn_k", "attn_v"))
        mechanism.plan(layer, q, k, v, h)
        h = _norm(plan, operators, config, own, "ffn_norm", x)
        if config.block.mlp == "gelu":
            h = operators.gelu(plan, layer.linear(h, "ffn_up"))
        else:
            gate = layer.linear(h, "ffn_gate", wait=False)
            h = operators.swiglu(plan, gate, layer.linear(h, "ffn_up"))
        layer.linear(h, "ffn_down", into=x)
        plan.reuse()
    h = _norm(plan, operators, config, weights, "output_norm", x)
    operators.linear(plan, h, weights.get(HEAD, weights[EMBEDDING]), head=True)


def _norm(plan: Plan, operators: Any, config: ModelConfig, w: Mapping[str, Any], name: str, x: Rows) -> Rows:
    layer = config.block.norm == "layer"
    return operators.norm(plan, x, w[name + ".weight"], w.get(name + ".bias"), config.norm_eps, layer)
