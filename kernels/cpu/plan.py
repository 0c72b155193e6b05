"""A plan on CPUs: all threads go through the steps side by side, each doing its share, and wait for each other where a
barrier stands: one region of compiled code a pass, whether that is one token, a chunk of a prompt, or one token each of
many sessions. Nothing is allocated while it runs.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tcinfer.kernels import plan as neutral
from tcinfer.kernels.cpu.jit import OPERATORS
from tcinfer.kernels.cpu.threads import ARGUMENTS, OPERATOR, STEP, WAIT, WHEN
from tcinfer.kernels.cpu.tiles import RUN_SUMS
from tcinfer.kernels.operators import Operator
from tcinfer.kernels.packing import RUN
from tcinfer.kernels.plan import ALIGNMENT, ALWAYS, EACH, KIND_OF_PASS, PASS, SCRATCH, WORDS, Step, barriers

KINDS = tuple(1 << i for i in range(ALWAYS.bit_length()))


class Rows(neutral.Rows):
    """Rows that packed weights can be multiplied with.  `bytes`: the same quantised, if asked for."""

    def __init__(self, plan: Plan, columns: int, half: bool = False, address: int | None = None) -> None:
        super().__init__(plan, columns, half, address)
        self.maker: Step | None = None  # that can quantise, where its argument `out` asks it to
        # address of int8 [columns], then 4 float32 for each 32 of them; `bytes_stride` apart; 0: not made yet
        self.bytes = 0

    @property
    def bytes_stride(self) -> int:
        return -(-(self.columns + self.columns // RUN * RUN_SUMS) // ALIGNMENT) * ALIGNMENT

    def want_bytes(self) -> bool:
        """Make room for the quantised rows; whether a step of its own has to fill it."""
        if self.bytes:
            return False
        self.bytes = self.plan.room(self.plan.capacity * self.bytes_stride)
        if self.maker is None:
            return True
        self.maker.change("out", self.bytes)
        return False


class Plan(neutral.Plan):
    """Steps, and the memory that they share. Made by the functions of the operator modules, closed by `finish`."""

    def __init__(self, capacity: int, threads: Any) -> None:
        """capacity: rows of the longest pass."""
        super().__init__(capacity)
        self.threads = threads
        self.work = 0  # multiplications a row, about; known when the plan is closed
        self._finished: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None

    def allocate(self, size: int) -> int:
        block = np.empty(size + 2 * ALIGNMENT, np.uint8)  # vectors may be read whole at the end
        self.kept.append(block)
        return int(block.ctypes.data + -block.ctypes.data % ALIGNMENT)

    def keep(self, array: NDArray | None) -> int:
        if array is None:
            return 0
        assert array.flags.c_contiguous
        self.kept.append(array)
        return int(array.ctypes.data)

    def rows(self, columns: int, half: bool = False, address: int | None = None) -> Rows:
        return Rows(self, columns, half, address)

    def finish(self) -> None:
        """Compile what is not compiled yet, put the barriers, and fix the steps."""
        self._wait()
        arguments = [np.array(step.words() or [0], np.int64) for step in self.steps]
        self.kept += arguments
        steps = np.zeros((len(self.steps), STEP), np.int64)
        for row, step, a in zip(steps, self.steps, arguments, strict=True):
            address = compiled(step.operator, step.name).address
            row[[OPERATOR, ARGUMENTS, WAIT, WHEN]] = address, a.ctypes.data, step.wait, step.when
        self.work = sum(step.operator.work(step.arguments) for step in self.steps if step.operator.work)
        needs = [step.operator.scratch(step.arguments) for step in self.steps if step.operator.scratch]
        scratch = -(-max(needs, default=1) // ALIGNMENT) * ALIGNMENT
        pass_ = np.zeros(PASS, np.int64)
        pass_[SCRATCH], pass_[EACH] = self.room(self.threads.count * scratch), scratch
        pass_[KIND_OF_PASS] = ALWAYS
        self._finished = steps, pass_

    def _wait(self) -> None:
        """Say behind which steps threads wait for each other, in each kind of pass."""
        done: dict[tuple[int, ...], list[int]] = {}
        for kind in KINDS:
            those = tuple(i for i, step in enumerate(self.steps) if step.when & kind)
            if those not in done:
                done[those] = barriers(self, [self.steps[i] for i in those])
            for i, barrier in zip(those, done[those], strict=True):
                self.steps[i].wait |= kind if barrier else 0

    def run(self, threads: int | None = None, **words: int) -> None:
        """One pass. words: of a pass, by the names of kernels.plan.WORDS; the others stay as they were."""
        assert self._finished is not None
        steps, pass_ = self._finished
        for name, value in words.items():
            pass_[WORDS[name]] = value
        self.threads.run(steps, pass_, self.threads.count if threads is None else threads)


def compiled(operator: Operator, name: str) -> Any:
    """The compiled form of an operator, by its whole name; its module is imported where it has not been."""
    if name not in OPERATORS:
        importlib.import_module(module_of(operator))
    return OPERATORS[name]


def module_of(operator: Operator) -> str:
    """Where the compiled forms of an operator stand."""
    return f"{operator.home}.compiled" if "." in operator.home else f"tcinfer.kernels.cpu.{operator.home}"
