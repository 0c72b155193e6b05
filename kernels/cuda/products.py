"""Products with weights, as they are recorded: neighbours that read the same row become one, their matrices one piece.

So do the two of a gated activation, whose outputs then become one on the way out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from tcinfer.kernels.cuda.made import MADE, Made, Parts, made_of
from tcinfer.kernels.cuda.packing import CHUNK_RUNS, TILE_ROWS, packed
from tcinfer.kernels.cuda.plan import Plan
from tcinfer.kernels.packing import FLOATS
from tcinfer.kernels.plan import FEW, GRID, NONE, ONE, PROMPT, SESSIONS, Rows, Step
from tcinfer.kernels.reference.quants import Matrix, small
from tcinfer.kernels.table import HEAD_MANY, HEAD_ONE, LINEAR_MANY, LINEAR_ONE, PREPARE

MANY = FEW | PROMPT | SESSIONS
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


class Products(Plan):
    """A plan, and the weights that its products read."""

    def __init__(self, capacity: int, device: Any, rooms: Sequence[Any] = ()) -> None:
        super().__init__(capacity, device, rooms)
        self._awaited: dict[tuple[bool, tuple[int, ...]], tuple[tuple[Matrix, ...], list[Step]]] = {}  # see `await_`
        self._last: Product | None = None
        self._prepared: dict[tuple[int, bool, bool], tuple[Any, ...]] = {}  # halves of rows, while these are there

    def stored(self, matrix: Matrix) -> Matrix:
        """The matrix: it is repacked and sent when the plan is closed, perhaps with others that x is multiplied by."""
        return matrix

    def await_(self, matrices: tuple[Matrix, ...], steps: Sequence[Step], by_turns: bool = False) -> None:
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

    small = staticmethod(small)

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
        made: dict[str, Any] = dict(zip(MADE, made_of(x), strict=True))
        product = (*made_of(x), w.kind)
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
        many |= {"y_stride": stride, "y_2_stride": 0, "y_3_stride": 0, "head": head, "columns": columns}
        of_many = self.step(HEAD_MANY if head else LINEAR_MANY, w.kind.name, MANY, **matrix, **many, **after)
        self.await_((w,), (one, of_many))
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
            change = {where: first, f"y{part}": y.address, f"bias{part}": self.keep(bias)}
            change |= {"outputs": first + w.shape[0]}
            change |= {} if stride is None else {f"y{part}_stride": stride}
            for name, value in change.items():
                step.change(name, value)
        self._last = last._replace(
            matrices=(*last.matrices, w), outputs=(*last.outputs, y), plain=last.plain and bias is None
        )
        self.await_(self._last.matrices, last.steps)
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
            made: dict[str, Any] = dict(zip(MADE, made_of(x), strict=True))
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

    def pair(self, gate: Rows, up: Rows, activation: int) -> bool:
        """Whether the last product, which has made gate and up, now makes act(gate) · up, in the place of gate."""
        last = self._last
        if last is None or last.end != len(self.steps) or not _are_pairs(last, gate, up):
            return False
        self._take_back(last)
        for step in last.steps:
            step.change("pair", activation)
            step.change("second", 0)
            step.change("y_2", 0)
        self.await_(last.matrices, last.steps, by_turns=True)
        self._last = None  # nothing joins it any more
        return True

    def conflict(self, first: Step, second: Step) -> int:
        """As of any plan, but two products side by side that add to the same numbers give each to the same block:
        blocks need not meet between them."""
        if self.before.get(id(second)) is first and _in_turn(first, second):
            return GRID if first.touched()[1] & (second.touched()[0] - {second.arguments["y"]}) else NONE
        return super().conflict(first, second)

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
            matrix = (step.arguments[name] for name in PLACE)
            self.streams.append((*matrix, step.operator is HEAD_ONE, *words.values()))
            before = step


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
