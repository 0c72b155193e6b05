"""A plan: the steps of a whole pass through a model, and the rows they work on, laid out once. Backends run it.

A step is an operator (operators.py) with its arguments by name. Steps run side by side until one needs what another has
written: where that is so a barrier stands, computed here from what operators read and write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from tcinfer.kernels.operators import Argument, Operator

# Words of a pass, int64. Addresses where nothing else is said. Backends add words of their own behind PASS.
(
    KIND_OF_PASS,  # which steps run: a bit of their `when`
    ROWS,  # tokens in this pass
    IDS,  # int64 [ROWS]
    SEQUENCE_OF,  # int64 [ROWS]: which sequence a row belongs to
    SEQUENCES,  # how many
    TABLE,  # int64 [SEQUENCES, SEQUENCE]
    OUT_FIRST,  # the first row whose logits are wanted
    OUT_ROWS,  # how many
    LOGITS,  # float32 [OUT_ROWS, vocabulary]
    SPLITS,  # parts into which a short sequence's attention is divided
    PARTS,  # float32: what they found
    GATHERED,  # float32: keys and values of a long sequence side by side
    KEYS,  # how many there are room for
    SCRATCH,  # of each thread
    EACH,  # bytes from one thread's to the next
    PASS,
) = range(16)
NAMES = "kind rows ids sequence_of sequences table out_first out_rows logits splits parts gathered keys"  # as above
WORDS = {name: number for number, name in enumerate(NAMES.split())}
SEQUENCE = 4
FIELDS, FIRST, ROW, COUNT = range(SEQUENCE)  # of a sequence: its state's addresses, position, first row, rows
ONE, FEW, PROMPT, SESSIONS = 1, 2, 4, 8  # kinds of pass: one token; a few of a sequence; more; one each of many
ALWAYS = ONE | FEW | PROMPT | SESSIONS
ALIGNMENT = 64  # bytes: a cache line, and the widest vector
Made = TypeVar("Made")
NONE, BLOCK, GRID = range(3)  # what stands between two steps: nothing, a barrier of each GPU block for itself, of all


class Geometry(NamedTuple):
    """What the first level's operators need to know of a layer."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int  # 0: unbounded
    sinks: int
    half: bool  # the ring's elements are float16, and else float32
    interleaved: bool  # which channels make a rotated pair: neighbours, or the two halves
    turned: int  # channels of a head that rotate, the first ones


class Step:
    """One call of an operator, while the plan is being made: arguments can still change."""

    def __init__(self, operator: Operator, kind: str, arguments: dict[str, int], when: int) -> None:
        """kind: of the weights or of the ring, where the operator has a form for each; wait: kinds of pass in which
        the next step needs a barrier first."""
        self.operator, self.kind, self.arguments, self.when, self.wait = operator, kind, arguments, when, 0
        self._touched: tuple[set[Any], set[Any]] | None = None

    def change(self, name: str, value: int) -> None:
        """Change an argument."""
        assert name in self.arguments
        self.arguments[name], self._touched = value, None

    @property
    def name(self) -> str:
        return f"{self.operator.name}_{self.kind}" if self.kind else self.operator.name

    def words(self) -> list[int]:
        """The arguments in the operator's order."""
        return [self.arguments[name] for name in self.operator.names]

    def touched(self) -> tuple[set[Any], set[Any]]:
        """What the step reads, and what it writes: addresses of rows, fields of the state, buffers of the pass."""
        if self._touched is not None:
            return self._touched
        reads: set[Any] = set()
        writes: set[Any] = set()
        for a in self.operator.every:
            if not (a.reads or a.writes):
                continue
            at: Any = a.name if a.word else self.arguments[a.name]
            if not a.word and (at < 0 if a.field else not at):  # not asked for
                continue
            place = ("field", at) if a.field else at
            if a.reads:
                reads.add(place)
            if a.writes:
                writes.add(place)
        self._touched = reads, writes
        return self._touched


class Rows:
    """A matrix of the pass, one row a token; float32 unless it is told to hold halves."""

    def __init__(self, plan: Plan, columns: int, half: bool = False, address: int | None = None) -> None:
        """address: where they lie already; None: in memory that the plan gives them."""
        self.plan, self.columns, self.half = plan, columns, half
        self.stride = (2 if half else 4) * columns  # bytes
        self.address = plan.room(plan.capacity * self.stride) if address is None else address


class Plan:
    """Steps, and the memory that they share. What a backend adds: memory, the operators of a block, and running."""

    def __init__(self, capacity: int) -> None:
        """capacity: rows of the longest pass."""
        self.capacity = capacity
        self.steps: list[Step] = []
        self.kept: list[Any] = []  # arrays that the steps point into
        self._rooms: list[tuple[int, int]] = []  # (address, size) of those since the last `reuse`
        self._free: dict[int, list[int]] = {}  # by size: those that nothing uses any more

    def allocate(self, size: int) -> int:
        """Address of `size` bytes, the plan's for ever."""
        raise NotImplementedError

    def keep(self, array: NDArray | None) -> int:
        """Address of an array's first element where the backend reads it; 0 for None."""
        raise NotImplementedError

    def room(self, size: int) -> int:
        """Address of `size` bytes, until the next `reuse`. Pages that no pass touches cost nothing."""
        free = self._free.get(size)
        address = free.pop() if free else self.allocate(size)
        self._rooms.append((address, size))
        return address

    def hold(self) -> None:
        """What has been given out so far is needed to the end."""
        self._rooms.clear()

    def reuse(self) -> None:
        """What has been given out since `hold` or `reuse` is needed no more: later steps may have the same room."""
        for address, size in self._rooms:
            self._free.setdefault(size, []).append(address)
        self._rooms.clear()

    def lasting(self, make: Callable[[], Made]) -> Made:
        """make(), its rooms held to the end."""
        rooms, self._rooms = self._rooms, []
        try:
            return make()
        finally:
            self._rooms = rooms

    def rows(self, columns: int, half: bool = False, address: int | None = None) -> Rows:
        return Rows(self, columns, half, address)

    def ones(self, columns: int) -> Rows:
        """Rows of ones, which nobody writes."""
        return self.rows(columns, address=self.keep(np.ones((self.capacity, columns), np.float32)))

    def step(self, operator: Operator, kind: str = "", when: int = ALWAYS, **arguments: Any) -> Step:
        """Append a step. Arguments are numbers, addresses, Rows, arrays to keep, or None for what is not asked for.

        Raises TypeError unless they are those of the operator.
        """
        operator.check(arguments)
        numbers = {a.name for a in operator.arguments if a.number}
        words = {
            name: as_word(float(value or 0)) if name in numbers else self._word(value)
            for name, value in arguments.items()
        }
        self.steps.append(Step(operator, kind, words, when))
        return self.steps[-1]

    def call(self, operator: Operator, **given: Any) -> Any:
        """Append a step, with room for the rows that it writes and that are not given: those, in order.

        Rows that are given must have the operator's shape; an output given as None is not made.
        """
        made = []
        for a in operator.arguments:
            if a.shape and a.name in given and given[a.name] is not None:
                self._check(operator, a, given)
            elif a.name not in given and (a.output or a.private):
                given[a.name] = self.rows(a.columns(given), bool(a.half and given[a.half]))
                if not a.private:
                    made.append(given[a.name])
        self.step(operator, **given)
        return made[0] if len(made) == 1 else tuple(made)

    def _check(self, operator: Operator, a: Argument, given: dict[str, Any]) -> None:
        columns = getattr(given[a.name], "columns", None)
        if columns is not None and columns != a.columns(given):
            raise TypeError(f"operator {operator.name}: {a.name} has {columns} columns, not {a.columns(given)}")

    def _word(self, value: Any) -> int:
        if value is None:
            return 0
        if isinstance(value, np.ndarray):
            return self.keep(value)
        assert not isinstance(value, float), "mark it as a number in the table"
        return int(getattr(value, "address", value))

    def conflict(self, first: Step, second: Step) -> int:
        """What must stand between two steps: NONE, BLOCK or GRID."""
        (reads, writes), (reads_too, writes_too) = first.touched(), second.touched()
        return GRID if writes & (reads_too | writes_too) or reads & writes_too else NONE


def barriers(plan: Plan, steps: Sequence[Step]) -> list[int]:
    """For each step, what must stand behind it before the next may begin: NONE, BLOCK or GRID.

    BLOCK: a barrier of each GPU block for itself, enough between steps that treat the same heads by themselves. GRID:
    one of all blocks or threads. A barrier is put as late as it can be, right before the step that needs it.
    """
    out = [NONE] * len(steps)
    since_grid = since_block = 0  # steps that no such barrier has been put behind
    for j, step in enumerate(steps):
        found = ((i, plan.conflict(steps[i], step)) for i in range(since_grid, j))
        need = max((what for i, what in found if what == GRID or i >= since_block), default=NONE)
        if need:
            out[j - 1], since_block = need, j
        if need == GRID:
            since_grid = j
    return out


def as_word(number: float) -> int:
    """The bits of a float64 as an int64 (kernels take them back by `number`)."""
    return int(np.float64(number).view(np.int64))
