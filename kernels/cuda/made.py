"""Rows that are not written: a product that reads them is told what they are made of, and makes them on the way in."""

from __future__ import annotations

from typing import Any

from tcinfer.kernels.cuda.program import MERGED_PARTS, PLAIN
from tcinfer.kernels.plan import ONE, Plan, Rows
from tcinfer.kernels.table import COMBINE_SPLITS, PREPARE

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
        to = {"out": plain, "stride": plain.stride}
        self._combine: dict[str, Any] = {"parts": parts, **to, "H": heads, "D": D, "splits": splits}

    @property
    def address(self) -> int:  # type: ignore[override]
        if self._combine:
            self.plan.step(COMBINE_SPLITS, when=ONE, **self._combine)
            self.words, self._combine = (PLAIN, self.plain.address, self.stride, self.columns, 0, 0, 0), {}
        return self.plain.address


def made_of(x: Rows) -> Words:
    """What rows are made of, in the words of staging.h."""
    return x.words if isinstance(x, Made | Parts) else (PLAIN, x.address, x.stride, x.columns, 0, 0, 0)
