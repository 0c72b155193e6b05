"""The plan of a model on a GPU while it is recorded: what tcinfer/net.py asks of a backend.

What a norm or an activation makes of a row is not computed by itself: it is told to the products that read it, which
compute it on the way in (staging.h): for a token as whole numbers of 24 bits, or as floats where weights are; those of
many rows read halves that `prepare` has written, each row divided by a power of two that keeps it in their range.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from tcinfer.kernels.cuda.packing import CHUNK_RUNS, TILE_ROWS, packed
from tcinfer.kernels.cuda.plan import Plan
from tcinfer.kernels.cuda.program import GEGLU, GELU, LAYER_NORM, MERGED_PARTS, PART_END, PLAIN, RMS_NORM, SWIGLU
from tcinfer.kernels.packing import FLOATS
from tcinfer.kernels.plan import FEW, NONE, ONE, PROMPT, SESSIONS, Conflict, Geometry, Rows, Step
from tcinfer.kernels.reference.quants import Matrix
from tcinfer.kernels.table import (
    ATTEND_MANY,
    ATTEND_ROWS,
    ATTEND_SPLITS,
    COMBINE_SPLITS,
    GPU_EMBED,
    HEAD_MANY,
    HEAD_ONE,
    LINEAR_MANY,
    LINEAR_ONE,
    PREPARE,
)

MANY = FEW | PROMPT | SESSIONS
SPLIT = 32  # keys of a head that a block takes at least, of a token's
MERGED = 4  # parts up to which a product puts them together as it reads them
LONG_SPLIT, MOST_SPLITS = 256, 64  # the same for a key head, where there are more keys
LARGEST_HEAD = 256  # that attend_many has room for
PANEL = 128  # columns of which prepared rows have a whole number (panels.h)


class Weights(NamedTuple):
    """A matrix on the device."""

    kind: Kind
    shape: tuple[int, int]
    words: tuple[int, ...]  # of kinds.h: address, runs of a row, bytes of a tile and of a chunk

    @property
    def named(self) -> dict[str, int]:
        return dict(zip(("at", "runs", "tile_bytes", "chunk_bytes"), self.words, strict=True))


Words = tuple[int | float, ...]  # what a row is made of, of staging.h: as many as STAGED, but for `fresh`
MADE = ("make", "x", "x_stride", "columns", "weight", "offset", "eps")


class Made(Rows):
    """Rows that products compute from other rows as they read them; written out only if something else reads them."""

    def __init__(self, plan: Plan, columns: int, words: Words) -> None:
        self.plan, self.columns, self.half, self.stride, self.words = plan, columns, False, 4 * columns, words
        self._address = 0

    @property
    def address(self) -> int:  # type: ignore[override]
        if not self._address:
            self._address = self.plan.room(self.plan.capacity * self.stride)
            made: dict[str, Any] = dict(zip(MADE, self.words, strict=True))
            to: dict[str, Any] = {"rows": self._address, "rows_stride": self.stride, "factors": None, "head": False}
            self.plan.step(PREPARE, **made, fresh=True, **to)
        return self._address


class Parts(Rows):
    """A row that several blocks have found parts of (attend_splits), of a token; in other passes plain rows.

    A product puts the parts together as it reads them; before any other step that reads the row, a step does.
    """

    def __init__(self, plain: Rows, parts: int, heads: int, D: int, splits: int) -> None:
        """parts: address of float32 [heads, splits, D + PART_END]."""
        self.plan, self.columns, self.half, self.stride = plain.plan, plain.columns, False, plain.stride
        self.plain = plain
        self.words: Words = MERGED_PARTS, parts, D, plain.columns, splits, 0, 0
        self._combine: dict[str, Any] = {
            "parts": parts,
            "out": plain,
            "stride": plain.stride,
            "H": heads,
            "D": D,
            "splits": splits,
        }

    @property
    def address(self) -> int:  # type: ignore[override]
        if self._combine:
            self.plan.step(COMBINE_SPLITS, when=ONE, **self._combine)
            self.words, self._combine = (PLAIN, self.plain.address, self.stride, self.columns, 0, 0, 0), {}
        return self.plain.address


class Recorder(Plan):
    """A plan, and the weights that its products read."""

    def __init__(self, capacity: int, device: Any, rooms: Sequence[Any] = ()) -> None:
        super().__init__(capacity, device, rooms)
        self._stored: dict[int, Weights] = {}  # by the matrix's id
        self._prepared: dict[tuple[int, bool, bool], tuple[Any, ...]] = {}  # halves of rows, while these are there

    def stored(self, matrix: Matrix) -> Weights:
        """The matrix on the device, repacked."""
        if id(matrix) not in self._stored:
            self.kept.append(matrix)  # so that nothing else gets its id
            p = packed(matrix)
            words = (self.upload(p.chunks), p.runs, p.chunks.shape[1], p.chunk)
            self._stored[id(matrix)] = Weights(matrix.kind, matrix.shape, words)
        return self._stored[id(matrix)]

    def small(self, values: NDArray[np.float32]) -> Weights:
        """A float32 matrix [rows, columns] as products read it."""
        data = np.ascontiguousarray(values).view(np.uint8).reshape(len(values), -1)
        return self.stored(Matrix(data, Kind.F32, (values.shape[0], values.shape[1])))

    def ones(self, columns: int) -> Rows:
        return Ones(self, columns)

    def embed(self, table: Matrix, positions: NDArray | None) -> Rows:
        """The rows of the embedding that the pass's ids name, plus those of learned positions, if there are any."""
        w = self.stored(table)
        x = self.rows(w.shape[1])
        self.step(GPU_EMBED, w.kind.name, **w.named, columns=x.columns, x=x, stride=x.stride, positions=positions)
        return x

    def norm(self, x: Rows, weight: NDArray, bias: NDArray | None, eps: float, layer: bool) -> Rows:
        """RMS norm, or layer norm with its mean and its bias."""
        parameters = self.keep(weight), self.keep(bias), float(eps)
        return Made(self, x.columns, (LAYER_NORM if layer else RMS_NORM, x.address, x.stride, x.columns, *parameters))

    def gated(self, gate: Rows, up: Rows, activation: str) -> Rows:
        """act(gate) · up; activation: "silu" or "gelu_tanh"."""
        make = GEGLU if activation == "gelu_tanh" else SWIGLU
        return Made(self, up.columns, (make, up.address, up.stride, up.columns, gate.address, 0, 0))

    def gelu(self, x: Rows) -> Rows:
        """The exact form."""
        return Made(self, x.columns, (GELU, x.address, x.stride, x.columns, 0, 0, 0))

    def linear(
        self,
        x: Rows,
        w: Weights,
        bias: NDArray | None = None,
        into: Rows | None = None,
        gate: Rows | None = None,
        head: bool = False,
    ) -> Rows:
        """x Wᵀ + b. into: rows that it is added to; gate: a factor for each row; head: the pass's logits."""
        outputs, columns = w.shape
        assert columns == x.columns
        y = into or self.rows(0 if head else outputs)
        address, stride = (0, 4 * outputs) if head else (y.address, y.stride)
        after = {"bias": bias, "gate": gate, "add": into is not None}
        share = dict.fromkeys(("shift", "each", "more", "how", "how_more", "number", "fresh"), 0)  # see `share`
        made: dict[str, Any] = dict(zip(MADE, _made(x), strict=True))
        one: dict[str, Any] = {**w.named, "outputs": outputs, "y": address, **after, **share, **made}
        self.step(HEAD_ONE if head else LINEAR_ONE, w.kind.name, ONE, **one)
        rows, rows_stride, factors = self._halves(x, w.kind, head)
        many: dict[str, Any] = {
            "rows": rows,
            "rows_stride": rows_stride,
            "factors": factors,
            "y": address,
            "y_stride": stride,
        }
        many |= {**w.named, "outputs": outputs, **after, "head": head, "columns": columns}
        self.step(HEAD_MANY if head else LINEAR_MANY, w.kind.name, MANY, **many)
        return y

    def _halves(self, x: Rows, kind: Kind, head: bool) -> tuple[int, int, int]:
        """Address, stride and factors of rows as products of many read them: of the head only those that are wanted."""
        floats = kind == Kind.F32
        x = x.plain if isinstance(x, Parts) else x
        if floats and not isinstance(x, Made) and not head:
            return x.address, x.stride, 0
        key = id(x), floats, head
        if key not in self._prepared:
            stride = x.stride if floats else 2 * PANEL * -(-x.columns // PANEL)
            capacity = -(-self.capacity // 8) * 8  # rows of a panel come in eights (panels.h)
            rows, factors = self.room(capacity * stride), 0 if floats else self.room(4 * self.capacity)
            made: dict[str, Any] = dict(zip(MADE, _made(x), strict=True))
            to: dict[str, Any] = {"rows": rows, "rows_stride": stride, "factors": factors, "head": head}
            self.step(PREPARE, when=MANY, **made, fresh=True, **to)
            self._prepared[key] = x, (rows, stride, factors)
        return self._prepared[key][1]

    def reuse(self) -> None:
        super().reuse()
        self._prepared.clear()

    def finish(self) -> None:
        self._prepared.clear()  # rows know their plan: without a circle it goes as soon as nobody needs it
        super().finish()

    def attention(self, geometry: Geometry, new: Any, k_field: int, v_field: int) -> Rows:
        """Each row's query over what it sees of its sequence's ring and of the pass's own rows. Rows [H * D].

        A token's keys are divided among several blocks.
        """
        H, G, D, window, sinks = geometry.heads, geometry.kv_heads, geometry.head_dim, geometry.window, geometry.sinks
        out, half = self.rows(H * D), geometry.half
        common = {"q": new.q, "q_far": new.q_far, "q_stride": new.q.stride, "k_field": k_field, "v_field": v_field}
        common |= {"k_new": new.k_new, "v_new": new.v_new, "H": H, "G": G, "D": D, "window": window, "sinks": sinks}
        whole = common | {"out": out, "splits": 1, "parts": None}
        form = form_of(half, H // G, D)
        keys = window + sinks if window else LONG_SPLIT * MOST_SPLITS
        tensor_cores = half and D % 2 == 0 and D <= LARGEST_HEAD
        by_itself = SESSIONS if tensor_cores else MANY
        splits, split_form = max(1, min(MERGED, keys // SPLIT, self.device.multiprocessors // H)), form_of(half, 1, D)
        if keys > 2 * LONG_SPLIT * MERGED:
            splits, split_form = min(MOST_SPLITS, keys // LONG_SPLIT), form
        parts = self.room(4 * H * splits * (D + PART_END))
        if splits > 1:
            divided = common | {"out": None, "splits": splits, "parts": parts}
            self.step(ATTEND_SPLITS, split_form, ONE, **divided)
        self.step(ATTEND_ROWS, form, by_itself if splits > 1 else by_itself | ONE, **whole)
        if tensor_cores:
            self.step(ATTEND_MANY, "", FEW | PROMPT, **whole)
        if splits == 1:
            return out
        found = Parts(out, parts, H, D, splits)
        if splits > MERGED or D % 4:
            found.address  # noqa: B018  the step that puts them together
        return found

    def conflict(self, first: Step, second: Step) -> Conflict:
        """As of any plan, but two products in a row that add to the same numbers give each of them to the same block,
        one after the other: blocks need not meet between them."""
        clash, local = super().conflict(first, second)
        if clash and _in_turn(first, second):
            clash = bool(first.touched()[1] & (second.touched()[0] - {second.arguments["y"]}))
        return clash, local

    def share(self, steps: Sequence[Step], waits: Sequence[int]) -> None:
        """Which tiles of weights each block has in a token's products, and whether x has been staged before."""
        before: Step | None = None
        for i, step in enumerate(steps):
            if step.operator.name != "linear_one":
                before = None
                continue
            shift, fresh = 0, True
            if before is not None and _in_turn(before, step):
                shift = before.arguments["shift"]
            elif before is not None and waits[i - 1] == NONE:
                # tiles go on with the blocks that the step before has left without
                shift = before.arguments["shift"] + -(-before.arguments["outputs"] // TILE_ROWS[Kind[before.kind]])
                alike = (Kind[before.kind] in FLOATS) == (Kind[step.kind] in FLOATS)  # how x is staged
                fresh = not alike or any(before.arguments[name] != step.arguments[name] for name in MADE)
            words = _share(step, shift, self.takers, self.device.multiprocessors)
            for name, value in words.items():
                step.change(name, value)
            step.change("number", len(self.streams))
            step.change("fresh", fresh)
            matrix = (step.arguments[name] for name in ("at", "runs", "tile_bytes", "chunk_bytes"))
            self.streams.append((*matrix, step.operator is HEAD_ONE, *words.values()))
            before = step


class Ones(Rows):
    """Rows of ones, which nobody writes."""

    def __init__(self, plan: Plan, columns: int) -> None:
        self.plan, self.columns, self.half, self.stride = plan, columns, False, 4 * columns
        self.address = plan.keep(np.ones((plan.capacity, columns), np.float32))


def _in_turn(first: Step, second: Step) -> bool:
    """Whether two products add to the same rows, divided among blocks alike."""
    if {first.operator.name, second.operator.name} != {"linear_one"} or not first.arguments["add"]:
        return False
    a, b = ((s.arguments["y"], s.arguments["outputs"], TILE_ROWS[Kind[s.kind]]) for s in (first, second))
    return a == b


def _share(step: Step, shift: int, warps: int, blocks: int) -> dict[str, int]:
    """Which tiles each block has, and how its warps share them: the words of a share in stream.h."""
    chunks = -(-step.arguments["runs"] // CHUNK_RUNS)

    def how(tiles: int) -> int:
        sharers = min(chunks, warps // tiles) if 0 < tiles < warps else 1
        return sharers | warps // sharers << 8 | -(-4096 // sharers) << 16

    each, more = divmod(-(-step.arguments["outputs"] // TILE_ROWS[Kind[step.kind]]), blocks)
    return {"shift": shift % blocks, "each": each, "more": more, "how": how(each), "how_more": how(each + 1)}


def _made(x: Rows) -> Words:
    """What rows are made of, in the words of staging.h."""
    return x.words if isinstance(x, Made | Parts) else (PLAIN, x.address, x.stride, x.columns, 0, 0, 0)


def form_of(half: bool, heads: int, D: int) -> str:
    """The form of attend_rows (attention.cu) for so many query heads of a key head, with D channels."""
    plain = D % 8 == 0 and D <= 256 if half else D % 4 == 0 and D <= 128
    return ("Half" if half else "Float") + (str(min(heads, 4)) if plain else "Any")
