"""One layer of a model while its plan is made: what a mechanism's `plan` is given (numba and cuda backends)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from tcinfer.config import ModelConfig
from tcinfer.kernels.cpu import ring, rows
from tcinfer.kernels.cpu.plan import Plan, Rows
from tcinfer.kernels.cpu.ring import Entering, Geometry
from tcinfer.memory.state import Field

NOWHERE = (0, 0)  # angles where nothing rotates


class Positions:
    """Angles of rotation, the same for every layer: computed at the start of a pass."""

    def __init__(self, plan: Plan, config: ModelConfig, freq: NDArray[np.float64] | None) -> None:
        """near: of each row's own position; far: of that from which a query meets the sinks, where it is another;
        leaving: of the token that leaves the window while a row enters it, where the memory sees keys unrotated."""
        n, W = config.sinks, config.window
        self.near = self.far = self.leaving = NOWHERE
        if freq is None:
            return
        self.near = rows.angles(plan, freq)
        if n and config.sink_positions == "in-cache":
            self.far = rows.angles(plan, freq, most=n + W - 1)
        if not getattr(config.options, "rope", True):
            self.leaving = rows.angles(plan, freq, offset=-W)


@dataclass
class Layer:
    """A layer's plan in the making.  x: the residual rows that its output is added to."""

    plan: Plan
    operators: Any  # the backend's module of them
    config: ModelConfig
    weights: Mapping[str, Any]  # by their names within the layer: linear.Weights for matrices, float32 for the rest
    positions: Positions
    number: int
    fields: tuple[Field, ...]  # of its state
    first_field: int  # the number of the first of them among all layers'
    x: Rows

    @cached_property
    def geometry(self) -> Geometry:
        return geometry(self.config)

    def field(self, name: str) -> int:
        """The number of a field of the state, as operators know it."""
        return self.first_field + [f.name for f in self.fields].index(name)

    def linear(self, x: Rows, name: str, into: Rows | None = None, gate: Rows | None = None, wait: bool = True) -> Rows:
        """x Wᵀ + b with the layer's `name`.weight and, where there is one, `name`.bias; see kernels.cpu.linear."""
        w, bias = self.weights[name + ".weight"], self.weights.get(name + ".bias")
        return self.operators.linear(self.plan, x, w, bias, into, gate, wait=wait)

    def project(self, x: Rows, matrix: NDArray[np.float32], wait: bool = True) -> Rows:
        """x Wᵀ with a small float32 matrix [out, in] of the mechanism's."""
        return self.operators.linear(self.plan, x, self.operators.small(self.plan, matrix), wait=wait)

    def push(self, q: Rows, k: Rows, v: Rows, rounded: bool = False, plain: bool = False) -> Entering:
        """Queries, keys and values as they enter the first level; see kernels.cpu.ring.push."""
        taps = self.weights.get("attn_key_conv")
        last = self.field("k_last") if taps is not None else 0
        angles = self.positions.near, self.positions.far
        return ring.push(self.plan, self.geometry, q, k, v, *angles, taps, last, rounded, plain)

    def attend(self, new: Entering) -> Rows:
        """Local attention, rows [H * D]."""
        return self.operators.attention(self.plan, self.geometry, new, self.field("k"), self.field("v"))

    def take(self, name: str, new: int, stride: int, width: int) -> Rows:
        """What leaves a per-token field of the state; see kernels.cpu.ring.take."""
        half = self.fields[self.field(name) - self.first_field].dtype == "float16"
        return ring.take(self.plan, self.geometry, self.field(name), new, stride, width, half)

    def settle(self, new: Entering, k: Rows, terms: Mapping[str, Rows] | None = None) -> None:
        """Last: what stays is written into the ring.  k: as it was pushed; terms: by the names of their fields."""
        for name, at in (("k", new.k_new), ("v", new.v_new)):
            ring.insert(self.plan, self.geometry, self.field(name), at, new.stride, new.stride)
        for name, values in (terms or {}).items():
            ring.insert(self.plan, self.geometry, self.field(name), values.address, values.stride, values.stride)
        if "attn_key_conv" in self.weights:
            ring.keep_last(self.plan, self.field("k_last"), k)


@cache
def geometry(config: ModelConfig) -> Geometry:
    """A model's first level, as the operators know it."""
    return Geometry(
        config.n_heads,
        config.n_kv_heads,
        config.head_dim,
        config.window,
        config.sinks,
        Kind.F16 if config.cache_type == "f16" else Kind.F32,
        config.block.rotary == "interleaved",
    )
