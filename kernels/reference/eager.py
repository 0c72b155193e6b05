"""The NumPy backend: operators that are executed at once, each by its plain equation.

It has the methods of the plans that the other backends record (kernels/cpu/recorder.py, kernels/cuda/recorder.py), so
that one wiring of a model serves all of them. Rows are float32 arrays [T, columns], fields the arrays of the state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tcinfer.kernels.operators import Operator
from tcinfer.kernels.plan import Geometry
from tcinfer.kernels.reference import pointwise, quants, ring

F32 = NDArray[np.float32]
Made = TypeVar("Made")
Product = Callable[[F32, quants.Matrix, F32 | None], F32]


class Eager:
    """One chunk of one sequence on its way through a model."""

    gelu, gated, small = staticmethod(pointwise.gelu), staticmethod(pointwise.gated), staticmethod(quants.small)

    def __init__(
        self,
        ids: NDArray[np.int64],
        first: int,
        fields: Sequence[NDArray],
        wanted: slice,
        product: Product = quants.linear,
    ) -> None:
        """ids [T] at positions first, first + 1, ..; fields: of the state, of all layers; wanted: the rows whose logits
        are asked for; product: x Wᵀ + b."""
        self.ids, self.first, self.count, self._fields = ids, first, len(ids), fields
        self.positions = np.arange(first, first + len(ids), dtype=np.int64)
        self._wanted, self._product, self._made = wanted, product, dict[Any, Any]()
        self.logits: F32 = np.empty((0, 0), np.float32)

    def once(self, key: Any, make: Callable[[], Made]) -> Made:
        """make(), once for all layers."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def lasting(self, make: Callable[[], Made]) -> Made:
        return make()

    def hold(self) -> None:
        """Nothing: arrays live as long as they are used."""

    reuse = hold

    def call(self, operator: Operator, **given: Any) -> Any:
        """Execute an operator: what it writes, in order, as rows; None is not asked for and not given."""
        arguments = {}
        for a in operator.arguments:
            value = given.get(a.name)
            if a.output or a.private:
                continue
            if a.field:
                value = self._fields[int(value)]  # type: ignore[arg-type]
            elif a.shape and value is not None:
                value = value.reshape(self.count, *(int(n) if n.isdigit() else int(given[n]) for n in a.shape))
            arguments[a.name] = value
        operator.check(given | {a.name: None for a in operator.arguments if a.output or a.private})
        assert operator.equation is not None, operator
        found = operator.equation(self, **arguments)
        outputs = [a for a in operator.arguments if a.output]
        results = found if isinstance(found, tuple) else (found,)
        made = [
            None if result is None else np.ascontiguousarray(result).reshape(self.count, a.columns(given))
            for a, result in zip(outputs, results if outputs else (), strict=True)
            if a.name not in given
        ]
        return made[0] if len(made) == 1 else tuple(made)

    def ones(self, columns: int) -> F32:
        return np.ones((self.count, columns), np.float32)

    def embed(self, table: quants.Matrix, positions: F32 | None) -> F32:
        """The rows that the ids name, plus those of learned positions.  [T, C]."""
        x = table.rows(self.ids)
        return x if positions is None else x + positions[self.first : self.first + self.count]

    def norm(self, x: F32, weight: F32, bias: F32 | None, eps: float, layer: bool) -> F32:
        return pointwise.layer_norm(x, weight, bias, eps) if layer else pointwise.rms_norm(x, weight, eps)

    def stored(self, matrix: quants.Matrix) -> quants.Matrix:
        return matrix

    def linear(
        self,
        x: F32,
        w: quants.Matrix,
        bias: F32 | None = None,
        into: F32 | None = None,
        gate: F32 | None = None,
        head: bool = False,
    ) -> F32:
        """x Wᵀ + b, times the gate [T, 1] of each row; added to `into`; of the head the wanted rows' logits."""
        y = self._product(x[self._wanted] if head else x, w, bias)
        if gate is not None:
            y = gate * y
        if head:
            self.logits = y
        if into is None:
            return y
        into += y
        return into

    def attention(self, geometry: Geometry, new: Any, k_field: int, v_field: int) -> F32:
        """Each row's query over what it sees of the ring and of the chunk. Rows [H * D]."""
        g, T = geometry, self.count
        q, far = (None if x is None else x.reshape(T, g.heads, g.head_dim) for x in (new.q, new.q_far))
        if far is not None and self.first + T <= g.sinks + g.window:
            far = None  # nobody has left the window yet: the same rotation
        assert q is not None
        keys, values = self._fields[k_field], self._fields[v_field]
        return ring.attend(self, g, q, far, keys, values, new.k_new, new.v_new).reshape(T, -1)
