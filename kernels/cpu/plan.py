"""A plan: the steps of a whole pass through a model, and the memory they work on, laid out once.

A step is an operator with its arguments. All threads go through the steps side by side, each doing its share, and wait
for each other where a step says so: one region of compiled code a pass, whether that is one token, a chunk of a
prompt, or one token each of many sessions. Nothing is allocated while it runs.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tcinfer.kernels.cpu.packing import RUN
from tcinfer.kernels.cpu.threads import ARGUMENTS, KIND_OF_PASS, OPERATOR, STEP, WAIT, WHEN
from tcinfer.kernels.cpu.tiles import HEAD

# Words of a pass, int64. Addresses where nothing else is said.
(
    _,  # KIND_OF_PASS: SHORT or LONG
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
SEQUENCE = 4
FIELDS, FIRST, ROW, COUNT = range(SEQUENCE)  # of a sequence: its state's addresses, position, first row, rows
SHORT, LONG = 1, 2  # kinds of pass, by its longest sequence: bits of a step's `when`
ALWAYS = SHORT | LONG
ALIGNMENT = 64


class Step:
    """One call of an operator, while the plan is being made: arguments can still change."""

    def __init__(self, operator: Any, arguments: list[int], wait: bool, when: int) -> None:
        self.operator, self.arguments, self.wait, self.when = operator, arguments, wait, when


class Rows:
    """A float32 matrix of the pass, one row a token.  `bytes`: the same quantised for packed weights, if asked for."""

    def __init__(self, plan: Plan, columns: int) -> None:
        self.plan, self.columns = plan, columns
        self.stride = 4 * columns
        self.address = plan.room(plan.capacity * self.stride)
        self.maker: tuple[Step, int] | None = None  # a step that can quantise, and the argument that asks it to
        self._bytes = 0

    @property
    def bytes(self) -> int:
        """Address of int8 [columns], then 4 float32 for each 32 of them; `bytes_stride` apart. 0: not made yet."""
        return self._bytes

    @property
    def bytes_stride(self) -> int:
        return -(-(self.columns + self.columns // RUN * HEAD) // ALIGNMENT) * ALIGNMENT

    def want_bytes(self) -> bool:
        """Make room for the quantised rows; whether a step of its own has to fill it."""
        if self._bytes:
            return False
        self._bytes = self.plan.room(self.plan.capacity * self.bytes_stride)
        if self.maker is None:
            return True
        step, argument = self.maker
        step.arguments[argument] = self._bytes
        return False


class Plan:
    """Steps, and the memory that they share. Made by the functions of the operator modules, closed by `finish`."""

    def __init__(self, capacity: int, threads: Any) -> None:
        """capacity: rows of the longest pass."""
        self.capacity, self.threads = capacity, threads
        self.steps: list[Step] = []
        self.kept: list[Any] = []  # arrays that the steps point into
        self.work = 0  # multiplications a row, about
        self._scratch = ALIGNMENT
        self._rooms: list[tuple[int, int]] = []  # (address, size) of those since the last `reuse`
        self._free: dict[int, list[int]] = {}  # by size: those that nothing uses any more
        self._finished: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None

    def room(self, size: int) -> int:
        """Address of `size` bytes, until the next `reuse`. Pages that no pass touches cost nothing."""
        if self._free.get(size):
            address = self._free[size].pop()
            self._rooms.append((address, size))
            return address
        address = self.allocate(size)
        self._rooms.append((address, size))
        return address

    def allocate(self, size: int) -> int:
        """Address of `size` bytes, the plan's for ever."""
        block = np.empty(size + 2 * ALIGNMENT, np.uint8)  # vectors may be read whole at the end
        self.kept.append(block)
        return int(block.ctypes.data + -block.ctypes.data % ALIGNMENT)

    def keep(self, array: NDArray | None) -> int:
        """Address of an array's first element; 0 for None."""
        if array is None:
            return 0
        assert array.flags.c_contiguous
        self.kept.append(array)
        return int(array.ctypes.data)

    def step(self, operator: Any, *arguments: int | float, wait: bool = True, when: int = ALWAYS) -> Step:
        """Append a step of an Operator.

        wait: the next one needs what this one does; when: in which kinds of pass it runs.
        """
        self.steps.append(Step(operator, as_words(arguments), wait, when))
        return self.steps[-1]

    def hold(self) -> None:
        """What has been given out so far is needed to the end."""
        self._rooms.clear()

    def reuse(self) -> None:
        """What has been given out since `hold` or `reuse` is needed no more: later steps may have the same room."""
        assert self.steps[-1].wait
        for address, size in self._rooms:
            self._free.setdefault(size, []).append(address)
        self._rooms.clear()

    def scratch(self, size: int) -> None:
        """See to it that each thread has so many bytes to work in, for as long as one operator runs."""
        self._scratch = max(self._scratch, -(-size // ALIGNMENT) * ALIGNMENT)

    def wait(self) -> None:
        """What comes now needs everything before it."""
        self.steps[-1].wait = True

    def finish(self) -> None:
        """Compile what is not compiled yet, and fix the steps."""
        arguments = [np.array(step.arguments or [0], np.int64) for step in self.steps]
        self.kept += arguments
        steps = np.zeros((len(self.steps), STEP), np.int64)
        for row, step, a in zip(steps, self.steps, arguments, strict=True):
            row[[OPERATOR, ARGUMENTS, WAIT, WHEN]] = step.operator.address, a.ctypes.data, step.wait, step.when
        pass_ = np.zeros(PASS, np.int64)
        pass_[SCRATCH], pass_[EACH] = self.room(self.threads.count * self._scratch), self._scratch
        pass_[KIND_OF_PASS] = ALWAYS
        self._finished = steps, pass_

    def run(self, threads: int | None = None, **words: int) -> None:
        """One pass. words: of a pass, by the names above in small letters; the others stay as they were."""
        assert self._finished is not None
        steps, pass_ = self._finished
        for name, value in words.items():
            pass_[WORDS[name]] = value
        self.threads.run(steps, pass_, self.threads.count if threads is None else threads)


WORDS = {
    "kind": KIND_OF_PASS,
    "rows": ROWS,
    "ids": IDS,
    "sequence_of": SEQUENCE_OF,
    "sequences": SEQUENCES,
    "table": TABLE,
    "out_first": OUT_FIRST,
    "out_rows": OUT_ROWS,
    "logits": LOGITS,
    "splits": SPLITS,
    "parts": PARTS,
    "gathered": GATHERED,
    "keys": KEYS,
}


def as_words(arguments: Iterable[int | float]) -> list[int]:
    """Arguments as int64: of a float64 its bits (`machine.number` takes them back)."""
    return [struct.unpack("<q", struct.pack("<d", x))[0] if isinstance(x, float) else int(x) for x in arguments]
