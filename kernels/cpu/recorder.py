"""The plan of a model on CPUs while it is recorded: what tcinfer/net.py asks of a backend."""

from __future__ import annotations

from typing import Any

from tcinfer.kernels.cpu.attention import attention
from tcinfer.kernels.cpu.linear import Weights, linear, repacked, small
from tcinfer.kernels.cpu.plan import Plan
from tcinfer.kernels.cpu.rows import embed, gated, gelu, norm
from tcinfer.kernels.reference.quants import Matrix


class Recorder(Plan):
    """A plan, and the weights that its products read, repacked when the plan is closed."""

    attention, linear, embed, gated, gelu, norm = attention, linear, embed, gated, gelu, norm

    def __init__(self, capacity: int, threads: Any) -> None:
        super().__init__(capacity, threads)
        self._loading = Plan(1, threads)
        self._stored: dict[int, tuple[Matrix, Weights]] = {}  # by the matrix's id, which is its own until `finish`

    def stored(self, matrix: Matrix) -> Weights:
        """The matrix as products read it: a copy, once the plan is closed."""
        if id(matrix) not in self._stored:
            self._stored[id(matrix)] = matrix, repacked(self._loading, matrix)
        return self._stored[id(matrix)][1]

    def small(self, values: Any) -> Weights:
        return small(self, values)

    def finish(self) -> None:
        """Repack the weights, then as Plan's."""
        self._loading.finish()
        self._loading.run()
        self._stored.clear()
        del self._loading
        super().finish()
