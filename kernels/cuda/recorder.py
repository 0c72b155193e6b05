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
ENDS = ("", "_2", "_3")  # of the arguments y and bias of a product's parts
PLACE = ("at", "runs", "tile_bytes", "chunk_bytes")  # of a matrix (kinds.h)
PANEL = 128  # columns of which prepared rows have a whole number (panels.h)


class Product(NamedTuple):
    """A product that has been recorded, of which more may be made: matrices one below the other with the same x."""

    x: tuple[Any, ...]  # what it is made of
    matrices: tuple[Matrix, ...]
    outputs: tuple[Rows, ...]
    steps: tuple[Step, Step]  # a token's, and that of many rows
    plain: bool  # without bias
    end: int  # steps recorded when it was


def joined(matrices: Sequence[Matrix], by_turns: bool = False) -> Matrix:
    """Matrices one below the other, or, of two, their rows by turns."""
    if len(matrices) == 1:
        return matrices[0]
    rows = [m.data for m in matrices]
    data = np.stack(rows, 1).reshape(-1, rows[0].shape[1]) if by_turns else np.concatenate(rows)
    return Matrix(data, matrices[0].kind, (len(data), matrices[0].shape[1]))


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
        self._awaited: dict[tuple[bool, tuple[int, ...]], tuple[tuple[Matrix, ...], list[Step]]] = {}  # see `_await`
        self._last: Product | None = None
        self._prepared: dict[tuple[int, bool, bool], tuple[Any, ...]] = {}  # halves of rows, while these are there

    def stored(self, matrix: Matrix) -> Matrix:
        """The matrix: it is repacked and sent when the plan is closed, perhaps with others that x is multiplied by."""
        return matrix

    def _await(self, matrices: tuple[Matrix, ...], steps: Sequence[Step], by_turns: bool = False) -> None:
        """Steps read these matrices, in one piece, once the plan is closed."""
        key = by_turns, tuple(map(id, matrices))
        self._awaited.setdefault(key, (matrices, []))[1].extend(steps)

    def _place(self) -> None:
        """Send what steps await, and tell them where it is."""
        for (by_turns, _), (matrices, steps) in self._awaited.items():
            p = packed(joined(matrices, by_turns))
            words = dict(zip(PLACE, (self.upload(p.chunks), p.runs, p.chunks.shape[1], p.chunk), strict=True))
            for step in steps:
                for name, value in words.items():
                    step.change(name, value)
        self._awaited.clear()

    def small(self, values: NDArray[np.float32]) -> Matrix:
        """A float32 matrix [rows, columns] as products read it."""
        data = np.ascontiguousarray(values).view(np.uint8).reshape(len(values), -1)
        return Matrix(data, Kind.F32, (values.shape[0], values.shape[1]))

    def ones(self, columns: int) -> Rows:
        return Ones(self, columns)

    def embed(self, table: Matrix, positions: NDArray | None) -> Rows:
        """The rows of the embedding that the pass's ids name, plus those of learned positions, if there are any."""
        x = self.rows(table.shape[1])
        rows: dict[str, Any] = {"columns": x.columns, "x": x, "stride": x.stride, "positions": positions}
        self._await((table,), [self.step(GPU_EMBED, table.kind.name, **dict.fromkeys(PLACE, 0), **rows)])
        return x

    def norm(self, x: Rows, weight: NDArray, bias: NDArray | None, eps: float, layer: bool) -> Rows:
        """RMS norm, or layer norm with its mean and its bias."""
        parameters = self.keep(weight), self.keep(bias), float(eps)
        return Made(self, x.columns, (LAYER_NORM if layer else RMS_NORM, x.address, x.stride, x.columns, *parameters))

    def gated(self, gate: Rows, up: Rows, activation: str) -> Rows:
        """act(gate) · up; activation: "silu" or "gelu_tanh". The product that has just made both makes this instead."""
        make = GEGLU if activation == "gelu_tanh" else SWIGLU
        last = self._last
        if last is None or last.end != len(self.steps) or not _are_pairs(last, gate, up):
            return Made(self, up.columns, (make, up.address, up.stride, up.columns, gate.address, 0, 0))
        self._take_back(last)
        for step in last.steps:
            step.change("pair", make)
            step.change("second", 0)
            step.change("y_2", 0)
        self._await(last.matrices, last.steps, by_turns=True)
        return gate

    def gelu(self, x: Rows) -> Rows:
        """The exact form."""
        return Made(self, x.columns, (GELU, x.address, x.stride, x.columns, 0, 0, 0))

    def linear(
        self,
        x: Rows,
        w: Matrix,
        bias: NDArray | None = None,
        into: Rows | None = None,
        gate: Rows | None = None,
        head: bool = False,
    ) -> Rows:
        """x Wᵀ + b. into: rows that it is added to; gate: a factor for each row; head: the pass's logits.

        Products of the same x that come one after the other become one.
        """
        outputs, columns = w.shape
        assert columns == x.columns
        y = into or self.rows(0 if head else outputs)
        address, stride = (0, 4 * outputs) if head else (y.address, y.stride)
        made: dict[str, Any] = dict(zip(MADE, _made(x), strict=True))
        product = (*_made(x), w.kind)
        if into is None and gate is None and not head and self._joins(product, w, y, bias):
            return y
        later = {f"{name}{part}": 0 for part in ENDS[1:] for name in ("y", "bias")}
        after = {"bias": bias, "gate": gate, "add": into is not None, "pair": 0, "second": 0, "third": 0, **later}
        share = dict.fromkeys(("shift", "each", "more", "how", "how_more", "number", "fresh"), 0)  # see `share`
        matrix: dict[str, Any] = {**dict.fromkeys(PLACE, 0), "outputs": outputs}
        one = self.step(
            HEAD_ONE if head else LINEAR_ONE, w.kind.name, ONE, **matrix, y=address, **after, **share, **made
        )
        rows, rows_stride, factors = self._halves(x, w.kind, head)
        many: dict[str, Any] = {"rows": rows, "rows_stride": rows_stride, "factors": factors, "y": address}
        strides = {"y_stride": stride, "y_2_stride": 0, "y_3_stride": 0}
        of_many = self.step(
            HEAD_MANY if head else LINEAR_MANY,
            w.kind.name,
            MANY,
            **matrix,
            **many,
            **strides,
            **after,
            head=head,
            columns=columns,
        )
        self._await((w,), (one, of_many))
        alone = into is not None or gate is not None or head
        self._last = None if alone else Product(product, (w,), (y,), (one, of_many), bias is None, len(self.steps))
        return y

    def _joins(self, x: tuple[Any, ...], w: Matrix, y: Rows, bias: NDArray | None) -> bool:
        """Make a product a part of the one that was recorded just before, if it is of the same x and there is room."""
        last = self._last
        if last is None or last.end != len(self.steps) or last.x != x or len(last.outputs) == len(ENDS):
            return False
        first = sum(m.shape[0] for m in last.matrices)  # output
        if first % max(8, TILE_ROWS[w.kind]):
            return False
        self._take_back(last)
        part, where = ENDS[len(last.outputs)], ("second", "third")[len(last.outputs) - 1]
        for step, stride in zip(last.steps, (None, y.stride), strict=True):
            change = {
                where: first,
                f"y{part}": y.address,
                f"bias{part}": self.keep(bias),
                "outputs": first + w.shape[0],
            }
            change |= {} if stride is None else {f"y{part}_stride": stride}
            for name, value in change.items():
                step.change(name, value)
        self._last = last._replace(
            matrices=(*last.matrices, w), outputs=(*last.outputs, y), plain=last.plain and bias is None
        )
        self._await(self._last.matrices, last.steps)
        return True

    def _take_back(self, last: Product) -> None:
        """Its steps do not await what they did."""
        key = False, tuple(map(id, last.matrices))
        steps = self._awaited[key][1]
        for step in last.steps:
            steps.remove(step)
        if not steps:
            del self._awaited[key]

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
        self._last = None
        self._place()
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
            splits, split_form = (
                min(MOST_SPLITS, keys // LONG_SPLIT),
                form_of(half, min(H // G, 2), D),
            )  # more would not fit registers
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


def _are_pairs(last: Product, gate: Rows, up: Rows) -> bool:
    """Whether a product has made just these two, and a block has both of a pair."""
    alike = last.plain and len({m.shape for m in last.matrices}) == 1 and TILE_ROWS[last.matrices[0].kind] % 2 == 0
    return alike and len(last.outputs) == 2 and last.outputs[0] is gate and last.outputs[1] is up


def _share(step: Step, shift: int, warps: int, blocks: int) -> dict[str, int]:
    """Which tiles each block has, and how its warps share them: the words of a share in stream.h."""
    chunks = -(-step.arguments["runs"] // CHUNK_RUNS)

    def how(tiles: int) -> int:
        left = tiles % warps
        sharers = min(chunks, warps // left) if left else 1
        return sharers | left << 8 | (-(-4096 // left) if left else 0) << 16

    each, more = divmod(-(-step.arguments["outputs"] // TILE_ROWS[Kind[step.kind]]), blocks)
    return {"shift": shift % blocks, "each": each, "more": more, "how": how(each), "how_more": how(each + 1)}


def _made(x: Rows) -> Words:
    """What rows are made of, in the words of staging.h."""
    return x.words if isinstance(x, Made | Parts) else (PLAIN, x.address, x.stride, x.columns, 0, 0, 0)


def form_of(half: bool, heads: int, D: int) -> str:
    """The form of attend_rows (attention.cu) for so many query heads of a key head, with D channels."""
    plain = D % 8 == 0 and D <= 256 if half else D % 4 == 0 and D <= 128
    return ("Half" if half else "Float") + (str(min(heads, 4)) if plain else "Any")
