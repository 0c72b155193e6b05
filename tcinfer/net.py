"""What blocks and memories are wired against: one description of a model, for every backend.

A wiring calls methods of `Net` with rows and gets rows. The NumPy backend executes each at once, Numba and CUDA record
it as steps of a plan, and a dry run (`Dry`) collects the weights that the wiring asks for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from tcinfer.config import LayerConfig, ModelConfig
from tcinfer.kernels.operators import Operator
from tcinfer.kernels.plan import Geometry
from tcinfer.kernels.reference.rotary import frequencies
from tcinfer.kernels.table import ADD, ANGLES, HEAD_NORM, SCALE, SOFTCAP

Rows = Any  # a float32 matrix of the pass, one row a token: an array, or a place in a plan (kernels/plan.py)
F32 = NDArray[np.float32]
Made = TypeVar("Made")


class Spec(NamedTuple):
    """What a weight must look like, in NumPy order."""

    shape: tuple[int, ...]
    required: bool = True
    matrix: bool = False  # a projection: may be quantised; everything else is kept in float32


class Recorder(Protocol):
    """What a backend does for a wiring: kernels/reference/eager.py, kernels/cpu/recorder.py, kernels/cuda/recorder.py.

    Weights are float32 arrays, but for matrices, which are what `stored` makes of them.
    """

    def stored(self, matrix: Any) -> Any: ...
    def small(self, values: F32) -> Any: ...
    def embed(self, table: Any, positions: F32 | None) -> Rows: ...
    def norm(self, x: Rows, weight: F32, bias: F32 | None, eps: float, layer: bool) -> Rows: ...
    def linear(self, x: Rows, w: Any, bias: Any, into: Rows | None, gate: Rows | None, head: bool = False) -> Rows: ...
    def gelu(self, x: Rows) -> Rows: ...
    def gated(self, gate: Rows, up: Rows, activation: str) -> Rows: ...
    def attention(self, geometry: Geometry, new: Any, k_field: int, v_field: int) -> Rows: ...
    def ones(self, columns: int) -> Rows: ...
    def call(self, operator: Operator, **given: Any) -> Any: ...
    def lasting(self, make: Callable[[], Made]) -> Made: ...
    def hold(self) -> None: ...
    def reuse(self) -> None: ...


class Net:
    """A model while it is wired. `layer`, `number`: the layer that is being wired."""

    def __init__(
        self,
        recorder: Recorder,
        config: ModelConfig,
        weights: Callable[[str, Spec], Any],
        fields: tuple[tuple[Any, ...], ...],
        architecture: Any,
        shares: dict[int, F32] | None = None,
    ) -> None:
        """weights: gives one by its name, or None for one that is optional and absent; fields: of each layer's state
        (memory.layout); architecture: its module; shares: if given, is told for each layer with a memory its share [T]
        in what the layer adds (NumPy alone)."""
        self.recorder, self.config, self._weights, self._kind = recorder, config, weights, architecture
        self._fields, self._first_field, self.number, self._shares = fields, 0, 0, shares
        self.layer: LayerConfig = config.layers[0]
        self._made: dict[Any, Any] = {}

    def enter(self, number: int) -> None:
        """What follows is the wiring of this layer."""
        if number:
            self._first_field += len(self._fields[number - 1])
        self.number, self.layer = number, self.config.layers[number]

    def once(self, key: Any, make: Callable[[], Made]) -> Made:
        """make(), once for all layers that ask with the same key: for what depends on nothing else."""
        if key not in self._made:
            self._made[key] = self.recorder.lasting(make)
        return self._made[key]

    # weights

    def tensor(self, name: str, shape: tuple[int, ...], required: bool = True, matrix: bool = False) -> Any:
        """A weight by its whole name."""
        return self._weights(name, Spec(shape, required, matrix))

    def weight(self, name: str, shape: tuple[int, ...], required: bool = True) -> Any:
        """A weight of the layer that is no matrix, float32; None where it is optional and absent."""
        return self.tensor(f"blk.{self.number}.{name}", shape, required)

    # rows

    def embed(self) -> Rows:
        """The embedding of the pass's ids, and learned positions where no layer rotates.  [C]."""
        c = self.config
        table = self.tensor("token_embd.weight", (c.vocab_size, c.d_model), matrix=True)
        learned = self.tensor("position_embd.weight", (c.context_length, c.d_model)) if c.learned_positions else None
        return self.recorder.embed(table, learned)

    def linear(self, x: Rows, name: str, out: int, into: Rows | None = None, gate: Rows | None = None) -> Rows:
        """x Wᵀ + b with the layer's `name`.weight [out, in] and, where there is one, `name`.bias; times the gate [1] of
        each row; added to `into`, if it is given."""
        name = f"blk.{self.number}.{name}"
        w = self.tensor(f"{name}.weight", (out, columns(x)), matrix=True)
        bias = self.tensor(f"{name}.bias", (out,), required=False)
        return self.recorder.linear(x, self.recorder.stored(w), bias, into, gate)

    def project(self, x: Rows, matrix: F32) -> Rows:
        """x Wᵀ with a small float32 matrix [out, in]."""
        return self.recorder.linear(x, self.recorder.small(matrix), None, None, None)

    def norm(self, x: Rows, name: str, kind: str = "rms", whole: bool = False) -> Rows:
        """The norm of each row; kind "rms", or "layer" with mean and bias; whole: not of the layer's weights."""
        prefix, width = ("" if whole else f"blk.{self.number}."), (columns(x),)
        weight = self.tensor(f"{prefix}{name}.weight", width)
        bias = self.tensor(f"{prefix}{name}.bias", width, required=False) if kind == "layer" else None
        return self.recorder.norm(x, weight, bias, self.config.norm_eps, kind == "layer")

    def head_norm(self, x: Rows, name: str) -> Rows:
        """RMS norm of each head by itself, in place.  [heads · D]."""
        D = self.config.head_dim
        weight, heads = self.weight(f"{name}.weight", (D,)), columns(x) // D
        self.recorder.call(HEAD_NORM, x=x, heads=heads, width=D, weight=weight, eps=self.config.norm_eps)
        return x

    def scale(self, x: Rows, factor: float) -> Rows:
        """x · factor, in place."""
        if factor != 1:
            self.recorder.call(SCALE, x=x, columns=columns(x), factor=factor)
        return x

    def add(self, x: Rows, y: Rows) -> Rows:
        """x + y, in place of x."""
        self.recorder.call(ADD, x=x, y=y, columns=columns(x))
        return x

    def gelu(self, x: Rows) -> Rows:
        """The exact form."""
        return self.recorder.gelu(x)

    def gated(self, gate: Rows, up: Rows, activation: str = "silu") -> Rows:
        """act(gate) · up; activation: "silu" or "gelu_tanh"."""
        return self.recorder.gated(gate, up, activation)

    def logits(self, x: Rows) -> None:
        """The head: a matrix of its own, or without one the embedding."""
        c, shape = self.config, (self.config.vocab_size, self.config.d_model)
        head = self.tensor("output.weight", shape, required=False, matrix=True)
        if head is None:
            head = self.tensor("token_embd.weight", shape, matrix=True)
        self.recorder.linear(x, self.recorder.stored(head), None, None, None, head=True)
        if c.softcap:
            self.recorder.call(SOFTCAP, columns=c.vocab_size, cap=c.softcap)

    def call(self, operator: Operator, **given: Any) -> Any:
        """An operator of a room of its own: rows that it writes, in order (kernels/operators.py)."""
        return self.recorder.call(operator, **given)

    def ones(self, count: int) -> Rows:
        """Rows of ones, [count]."""
        return self.once(("ones", count), lambda: self.recorder.ones(count))

    # state and positions

    def field(self, name: str) -> int:
        """The number of an array of the layer's state, as operators know it."""
        return self._first_field + [f.name for f in self._fields[self.number]].index(name)

    def is_half(self, name: str) -> bool:
        """Whether an array of the layer's state has float16 elements."""
        return {f.name: f.dtype for f in self._fields[self.number]}[name] == "float16"

    @property
    def geometry(self) -> Geometry:
        """The layer's first level, as operators know it."""
        c = self.layer
        half, pairs = c.cache_type == "f16", self._kind.ROTARY == "interleaved"
        return Geometry(c.n_heads, c.n_kv_heads, c.head_dim, c.window, c.sinks, half, pairs, c.rope_dim)

    def angles(
        self, most: int = 2**62, offset: int = 0, inverse: bool = False
    ) -> tuple[Rows, Rows] | tuple[None, None]:
        """cos and sin [rope_dim / 2] of (position, at most `most`) + offset in the layer's rotation; (None, None) where
        it has none.  inverse: of what turns back, if it is applied with the sine's sign changed."""
        c, original = self.layer, self.config.rope_original or self.config.context_length
        by = self.config.rope_attention
        if not c.rope_dim:
            return None, None
        if c.rope_scaling == "yarn":
            by *= 1 + 0.1 * math.log(c.rope_factor)
        key = c.rope_dim, c.rope_base, c.rope_scaling, c.rope_factor
        given = {"most": most, "offset": offset, "factor": float(1 / by if inverse else by)}

        def make() -> tuple[Rows, Rows]:
            own = getattr(self._kind, "divisors", None)
            divisors = own(self) if own else self.tensor("rope_freqs.weight", (c.rope_dim // 2,), required=False)
            freq = frequencies(*key, divisors, original)
            return self.recorder.call(ANGLES, freq=freq, pairs=len(freq), **given)

        return self.once(("angles", key, *given.values()), make)

    def contributed(self, parts: Callable[[], tuple[F32, F32]]) -> None:
        """A mechanism tells what window and memory each add to its output, [T, ..]; looked at only where somebody asks:
        kept is the memory's share, [T], of the sum of both lengths."""
        if self._shares is not None:
            a, b = (np.linalg.norm(x, axis=-1) for x in parts())
            self._shares[self.number] = b / np.maximum(a + b, np.float32(1e-30))


def columns(x: Rows) -> int:
    """Columns of some rows."""
    return x.shape[1] if isinstance(x, np.ndarray) else x.columns


class _Absent(NamedTuple):
    """Rows, or a matrix, of which nothing is there but the shape."""

    shape: tuple[int, ...]

    @property
    def columns(self) -> int:
        return self.shape[-1]


class Dry:
    """A recorder that computes nothing: what is left of a wiring are the weights that it asks for, in `specs`."""

    def __init__(self) -> None:
        self.specs: dict[str, Spec] = {}

    def weights(self, name: str, spec: Spec) -> Any:
        """Every weight is said to be there; arrays are of ones, which take no memory."""
        self.specs.setdefault(name, spec)
        return _Absent(spec.shape) if spec.matrix else np.broadcast_to(np.float32(1), spec.shape)

    def stored(self, matrix: Any) -> Any:
        return matrix

    def small(self, values: F32) -> Any:
        return _Absent(values.shape)

    def embed(self, table: Any, positions: F32 | None) -> Rows:
        return _Absent((table.shape[1],))

    def norm(self, x: Rows, weight: F32, bias: F32 | None, eps: float, layer: bool) -> Rows:
        return x

    def linear(self, x: Rows, w: Any, bias: Any, into: Rows | None, gate: Rows | None, head: bool = False) -> Rows:
        assert w.shape[1] == x.columns
        return into or _Absent((w.shape[0],))

    def gelu(self, x: Rows) -> Rows:
        return x

    def gated(self, gate: Rows, up: Rows, activation: str) -> Rows:
        return up

    def attention(self, geometry: Geometry, new: Any, k_field: int, v_field: int) -> Rows:
        return _Absent((geometry.heads * geometry.head_dim,))

    def ones(self, columns: int) -> Rows:
        return _Absent((columns,))

    def call(self, operator: Operator, **given: Any) -> Any:
        outputs = [a for a in operator.arguments if a.output and a.name not in given]
        operator.check(dict.fromkeys((*given, *(a.name for a in (*outputs, *operator.private)))))
        made = [_Absent((a.columns(given),)) for a in outputs]
        return made[0] if len(made) == 1 else tuple(made)

    def lasting(self, make: Callable[[], Made]) -> Made:
        return make()

    def hold(self) -> None:
        """Nothing is kept."""

    reuse = hold
