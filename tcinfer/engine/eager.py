"""The NumPy engine: the wiring executed operator by operator, one sequence after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tcinfer.config import PASS_TOKENS, ModelConfig
from tcinfer.engine import base
from tcinfer.engine.base import F32, Here, How
from tcinfer.kernels.reference import quants
from tcinfer.kernels.reference.eager import Eager, Product
from tcinfer.memory.state import AnyState, Layout, State
from tcinfer.sampling import Sampling
from tcinfer.transformer import transformer


class HostEngine:
    """What engines share whose states lie in this machine's memory."""

    ragged = True

    def new_state(self, layout: Layout) -> AnyState:
        return State(layout)

    def placed(self, state: AnyState) -> AnyState:
        return state.copy()

    def room(self, rows: int) -> None:
        """Nothing to see to: logits are given as they are."""

    def chooses(self, sampling: Sampling) -> bool:
        return False

    def run(self, states: Sequence[Any], counts: Sequence[int], ids: NDArray[np.int64], out_rows: int) -> F32:
        raise NotImplementedError

    def step(
        self, states: Sequence[Any], ids: NDArray[np.int64], hows: Sequence[How] | None = None, first: int = 0
    ) -> tuple[Sequence[Here], None]:
        logits = self.run(states, [1] * len(states), ids, len(states))
        return [Here(row.copy()) for row in logits], None  # no views: one would keep all


class Engine(HostEngine):
    """A model's weights as they lie in its file, unpacked when they are first used."""

    pass_tokens = PASS_TOKENS
    bytes_per_token: int | None = None
    product: Product = staticmethod(quants.linear)  # x Wᵀ + b

    def __init__(self, config: ModelConfig, weights: dict[str, Any]) -> None:
        self.config, self._weights = config, weights

    def run(self, states: Sequence[Any], counts: Sequence[int], ids: NDArray[np.int64], out_rows: int) -> F32:
        logits, last = [], np.cumsum(counts)
        for state, count, stop in zip(states, counts, last, strict=True):
            wanted = min(count, max(0, out_rows - int(last[-1] - stop)))
            logits.append(self.forward(state, ids[stop - count : stop], wanted))
        return np.concatenate(logits)

    def forward(self, state: State, ids: NDArray[np.int64], out_rows: int, shares: dict[int, F32] | None = None) -> F32:
        """ids [T] into a state; the logits of the last rows.  shares: as Net takes them."""
        fields = [array for layer in state.layers for array in layer.values()]
        wanted = slice(len(ids) - out_rows, len(ids))
        chunk = Eager(ids, state.position, fields, wanted, self.product)
        transformer(chunk, self.config, lambda name, spec: self._weights.get(name), shares)
        state.position += len(ids)
        return chunk.logits


class Backend(base.Backend):
    """The reference: every operator by its plain equation."""

    name, copies = "numpy", False

    def __init__(self, threads: int | None = None) -> None:
        """threads: of the matrix products, which are NumPy's own (process-wide); None leaves them as they are."""
        if threads is not None:
            from threadpoolctl import threadpool_limits

            threadpool_limits(threads, user_api="blas")

    def engine(self, config: ModelConfig, weights: dict[str, Any]) -> Engine:
        return Engine(config, weights)
