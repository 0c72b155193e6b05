"""The operators that a model's plan is made of, as steps for a GPU; the same names as in kernels/cpu/operators.py.

What a norm or an activation makes of a row is not computed by itself: it is told to the products that read it, which
compute it on the way in (staging.h): for a token as whole numbers of 24 bits, or as floats where weights are; those of
many rows read halves that `prepare` has written, each row divided by a power of two that keeps it in their range.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from gguf.constants import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from tcinfer.kernels.cpu import plan as cpu
from tcinfer.kernels.cpu.ring import Entering, Geometry
from tcinfer.kernels.cpu.rows import angles
from tcinfer.kernels.cuda.packing import BYTES, CHUNK_RUNS, RUN, TILE_ROWS, packed
from tcinfer.kernels.cuda.plan import ONE, PROMPT, SESSIONS, Plan
from tcinfer.kernels.cuda.program import (
    GELU,
    LAYER_NORM,
    MERGED_PARTS,
    PART_END,
    PLAIN,
    RMS_NORM,
    SWIGLU,
    Named,
)
from tcinfer.kernels.reference.quants import Matrix

__all__ = ["angles", "attention", "embed", "gelu", "linear", "norm", "small", "stored", "swiglu"]

SPLIT = 32  # keys of a head that a block takes at least, of a token's
MERGED = 4  # parts up to which a product puts them together as it reads them
LONG_SPLIT, MOST_SPLITS = 256, 64  # the same for a key head, where there are more keys
LARGEST_HEAD = 256  # that attend_many has room for


class Weights(NamedTuple):
    """A matrix on the device."""

    kind: Kind
    shape: tuple[int, int]
    words: tuple[int, ...]  # of kinds.h: address, runs of a row, bytes of a tile and of a chunk

    @property
    def tiles(self) -> int:
        return -(-self.shape[0] // TILE_ROWS[self.kind])


def stored(plan: Plan, w: Matrix) -> Weights:
    """`w` on the device, repacked."""
    p = packed(w)
    return Weights(w.kind, w.shape, (plan.upload(p.chunks), p.runs, p.chunks.shape[1], p.chunk))


def small(plan: Plan, values: NDArray[np.float32]) -> Weights:
    """A float32 matrix [rows, columns] as products read it."""
    data = np.ascontiguousarray(values).view(np.uint8).reshape(len(values), -1)
    return stored(plan, Matrix(data, Kind.F32, (values.shape[0], values.shape[1])))


class Made(cpu.Rows):
    """Rows that products compute from other rows as they read them; written out only if something else reads them."""

    def __init__(self, plan: Plan, columns: int, words: tuple[int | float, ...]) -> None:
        """words: what they are made of, as in staging.h up to FRESH."""
        self.plan, self.columns, self.stride, self.words = plan, columns, 4 * columns, words
        self._address = 0

    @property
    def address(self) -> int:  # type: ignore[override]
        if not self._address:
            assert isinstance(self.plan, Plan)
            self._address = self.plan.room(self.plan.capacity * self.stride)
            self.plan.step(Named("prepare"), *self.words, 1, self._address, self.stride, 0, False)
        return self._address


class Parts(cpu.Rows):
    """A row that several blocks have found parts of (attend_splits), of a token; in other passes plain rows.

    A product puts the parts together as it reads them; before any other step that reads the row, a step does.
    """

    def __init__(self, plain: cpu.Rows, parts: int, heads: int, D: int, splits: int) -> None:
        """parts: address of float32 [heads, splits, D + PART_END]."""
        self.plan, self.columns, self.stride, self.plain = plain.plan, plain.columns, plain.stride, plain
        self.words = MERGED_PARTS, parts, D, plain.columns, splits, 0, 0
        self._combine: tuple[int, ...] = (parts, plain.address, plain.stride, heads, D, splits)

    @property
    def address(self) -> int:  # type: ignore[override]
        if self._combine:
            self.plan.step(Named("combine"), *self._combine, when=ONE)
            self.words, self._combine = (PLAIN, self.plain.address, self.stride, self.columns, 0, 0, 0), ()
        return self.plain.address


def embed(plan: Plan, w: Weights, positions: NDArray | None) -> cpu.Rows:
    """The rows of the embedding that the pass's ids name, plus those of learned positions, if there are any."""
    x = cpu.Rows(plan, w.shape[1])
    plan.step(Named("embed", w.kind.name), *w.words, x.columns, x.address, x.stride, plan.keep(positions))
    return x


def norm(plan: Plan, x: cpu.Rows, weight: NDArray, bias: NDArray | None, eps: float, layer: bool) -> Made:
    """RMS norm, or layer norm with its mean and its bias."""
    parameters = plan.keep(weight), plan.keep(bias), float(eps)
    return Made(plan, x.columns, (LAYER_NORM if layer else RMS_NORM, x.address, x.stride, x.columns, *parameters))


def swiglu(plan: Plan, gate: cpu.Rows, up: cpu.Rows) -> Made:
    """silu(gate) · up."""
    return Made(plan, up.columns, (SWIGLU, up.address, up.stride, up.columns, gate.address, 0, 0))


def gelu(plan: Plan, x: cpu.Rows) -> Made:
    """The exact form."""
    return Made(plan, x.columns, (GELU, x.address, x.stride, x.columns, 0, 0, 0))


def linear(
    plan: Plan,
    x: cpu.Rows,
    w: Weights,
    bias: NDArray | None = None,
    into: cpu.Rows | None = None,
    gate: cpu.Rows | None = None,
    head: bool = False,
    wait: bool = True,
) -> cpu.Rows:
    """x Wᵀ + b. into: rows that it is added to; gate: a factor for each row; head: the pass's logits."""
    outputs, columns = w.shape
    assert columns == x.columns
    y = into or cpu.Rows(plan, 0 if head else outputs)
    address, stride = (0, 4 * outputs) if head else (y.address, y.stride)
    after = (plan.keep(bias), gate.address if gate else 0, into is not None)
    shift, fresh = _since(plan, x, w, address)
    number = len(plan.streams)
    share = _share(w, shift, plan.takers, plan.device.multiprocessors)
    plan.streams.append((*w.words, head, *share))
    one = (*w.words, outputs, address, *after, *share, number, *_made(x), fresh)
    plan.step(Named("linear_one", w.kind.name), *one, wait=wait, when=ONE)
    many = (*w.words, outputs, *_prepared(plan, x, w.kind, head), address, stride, *after, head, columns)
    plan.step(Named("linear_many", w.kind.name), *many, when=PROMPT | SESSIONS)
    return y


OUTPUTS, Y, ADD, SHIFT, FIRST_MADE = 4, 5, 8, 9, 15  # arguments of linear_one


def _share(w: Weights, shift: int, warps: int, blocks: int) -> tuple[int, ...]:
    """Which tiles each block has, and how its warps share them: the words of a share in stream.h."""
    chunks = -(-w.words[1] // CHUNK_RUNS)

    def how(tiles: int) -> int:
        sharers = min(chunks, warps // tiles) if 0 < tiles < warps else 1
        return sharers | warps // sharers << 8 | -(-4096 // sharers) << 16

    each, more = divmod(w.tiles, blocks)
    return shift % blocks, each, more, how(each), how(each + 1)


def _since(plan: Plan, x: cpu.Rows, w: Weights, y: int) -> tuple[int, bool]:
    """What a token's product finds before it: tiles of weights that have their blocks already, and whether x is not
    staged yet.

    Two that add to the same numbers give each of them to the same block, one after the other: blocks need not meet.
    """
    last = next((step for step in reversed(plan.steps) if step.when & ONE), None)
    if last is None or last.operator.name != "linear_one":
        return 0, True
    rows, outputs = TILE_ROWS[Kind[last.operator.kind]], last.arguments[OUTPUTS]
    same = last.arguments[Y] == y and outputs == w.shape[0] and rows == TILE_ROWS[w.kind]
    if last.arguments[ADD] and same:
        last.wait = False
        return last.arguments[SHIFT], True
    if last.wait:
        return 0, True
    floats = [Kind[last.operator.kind] in BYTES, w.kind in BYTES]  # how x is staged
    again = last.arguments[FIRST_MADE:-1] != cpu.as_words(_made(x)) or floats[0] != floats[1]
    return last.arguments[SHIFT] + -(-outputs // rows), again


def _made(x: cpu.Rows) -> tuple[int | float, ...]:
    """What rows are made of, in the words of staging.h up to FRESH."""
    return x.words if isinstance(x, Made | Parts) else (PLAIN, x.address, x.stride, x.columns, 0, 0, 0)


def _prepared(plan: Plan, x: cpu.Rows, kind: Kind, head: bool) -> tuple[int, int, int]:
    """Address, stride and factors of rows as products of many read them: of the head only those that are wanted."""
    floats = kind == Kind.F32
    x = x.plain if isinstance(x, Parts) else x
    if floats and not isinstance(x, Made) and not head:
        return x.address, x.stride, 0
    key = id(x), floats, head
    if key not in plan.prepared:
        stride = x.stride if floats else 2 * RUN * -(-x.columns // RUN)
        rows, factors = plan.room(plan.capacity * stride), 0 if floats else plan.room(4 * plan.capacity)
        plan.step(Named("prepare"), *_made(x), True, rows, stride, factors, head, when=PROMPT | SESSIONS)
        plan.prepared[key] = x, (rows, stride, factors)
    return plan.prepared[key][1]


def attention(plan: Plan, geometry: Geometry, new: Entering, k_field: int, v_field: int) -> cpu.Rows:
    """Each row's query over what it sees of its sequence's ring and of the pass's own rows. Rows [H * D].

    A token's keys are divided among several blocks.
    """
    H, G, D, window, sinks = geometry.heads, geometry.kv_heads, geometry.head_dim, geometry.window, geometry.sinks
    out, half = cpu.Rows(plan, H * D), geometry.kind == Kind.F16
    query = (new.q.address, new.q_far.address if new.q_far else 0, new.q.stride)
    common = (*query, k_field, v_field, new.k_new, new.v_new, H, G, D, window, sinks, out.address)
    form = form_of(half, H // G, D)
    keys = window + sinks if window else LONG_SPLIT * MOST_SPLITS
    tensor_cores = half and D % 2 == 0 and D <= LARGEST_HEAD
    by_itself = SESSIONS if tensor_cores else SESSIONS | PROMPT
    splits, split_form = max(1, min(MERGED, keys // SPLIT, plan.device.multiprocessors // H)), form_of(half, 1, D)
    if keys > 2 * LONG_SPLIT * MERGED:
        splits, split_form = min(MOST_SPLITS, keys // LONG_SPLIT), form
    parts = plan.room(4 * H * splits * (D + PART_END))
    if splits > 1:
        plan.step(Named("attend_splits", split_form), *common, splits, parts, when=ONE)
    plan.step(Named("attend_rows", form), *common, 1, 0, when=by_itself if splits > 1 else by_itself | ONE)
    if tensor_cores:
        plan.step(Named("attend_many"), *common, when=PROMPT)
    if splits == 1:
        return out
    found = Parts(out, parts, H, D, splits)
    if splits > MERGED or D % 4:
        found.address  # noqa: B018  the step that puts them together
    return found


def form_of(half: bool, heads: int, D: int) -> str:
    """The form of attend_rows (attention.cu) for so many query heads of a key head, with D channels."""
    plain = D % 8 == 0 and D <= 256 if half else D % 4 == 0 and D <= 128
    return ("Half" if half else "Float") + (str(min(heads, 4)) if plain else "Any")
