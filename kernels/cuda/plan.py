"""A plan on a GPU: the same steps as on a CPU, their memory and arguments on the device, run in one launch or in many.

A single token is one cooperative launch: every multiprocessor holds one block, the blocks go through the steps side by
side, and meet where a step needs what another block has done; where it needs only what its own block has done, which is
so between the steps that treat each key head by themselves, the block's threads meet. Meanwhile a warp of each block
brings the weights of the steps to come (stream.h). A chunk of a prompt, and one token each of many sessions, are a
launch a step, all of them captured once as a graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from tcinfer.kernels import plan as neutral
from tcinfer.kernels.cuda.program import (
    ALONE_THREADS,
    CHOICES,
    DESK,
    HAND,
    HOW,
    HOW_MANY,
    KEY_HEADS,
    LOADER_THREADS,
    PASS,
    RECORD,
    TOGETHER_THREADS,
    WIDE_CAPABILITY,
    forms,
    source,
)
from tcinfer.kernels.errors import UnavailableError
from tcinfer.kernels.operators import Operator
from tcinfer.kernels.plan import ALWAYS, BLOCK, FEW, GRID, NONE, ONE, PROMPT, SESSIONS, WORDS, Step, barriers
from tcinfer.kernels.table import GPU_PUSH, INSERT, PUSH

BLOCKS = 4  # of a launch, for each multiprocessor
STREAM = 10  # words of a stream (stream.h)
MOST_SLOTS = 64


class Plan(neutral.Plan):
    """Steps in the making, and then in device memory."""

    def __init__(self, capacity: int, device: Any, rooms: Sequence[Operator] = ()) -> None:
        """capacity: rows of the longest pass; device: device.Device or what stands for it; rooms: the operators of the
        memories."""
        super().__init__(capacity)
        self.device, self.rooms = device, rooms
        self.streams: list[tuple[int, ...]] = []  # weights of a token's products, in order (stream.h)
        self.fields = 0  # of a session's state
        self.wide = device.capability == WIDE_CAPABILITY  # whether warpgroups multiply
        self.takers = 0  # warps that take chunks of weights (see `_ring`)
        self.before: dict[int, Step] = {}  # by a step's id, the one before it in a token's launch
        self._uploads: dict[int, int] = {}
        self._captured: dict[int, Callable[[], None]] = {}  # by kind of pass
        self._buffers: list[Any] = []

    def allocate(self, size: int) -> int:
        """Address of `size` bytes of device memory, zeros, the plan's for ever."""
        self._buffers.append(self.device.zeros(max(size, 16)))
        return self._buffers[-1].address

    def upload(self, array: NDArray | None) -> int:
        """Address of a copy of an array; 0 for None."""
        if array is None:
            return 0
        address = self.allocate(array.nbytes)
        self.device.put(address, np.ascontiguousarray(array))
        return address

    def keep(self, array: NDArray | None) -> int:
        """The same, with one copy of an array that is asked for again."""
        if array is None:
            return 0
        if id(array) not in self._uploads:
            self.kept.append(array)  # so that nothing else gets its id
            self._uploads[id(array)] = self.upload(array)
        return self._uploads[id(array)]

    def step(self, operator: Operator, kind: str = "", when: int = ALWAYS, **arguments: Any) -> Step:
        if operator is PUSH:
            operator, arguments = GPU_PUSH, arguments | {"k_field": -1, "v_field": -1, "window": 0, "sinks": 0}
        many = operator.many
        if many is not None:
            super().step(many, kind, when & (FEW | PROMPT), **arguments)
            when &= ~(FEW | PROMPT)
        return super().step(operator, kind, when, **arguments)

    def conflict(self, first: Step, second: Step) -> int:
        """As of any plan, but a token's row is alone (see `beside` in kernels/operators.py), and a block's own barrier
        is enough between steps that treat the same heads by themselves."""
        if first.operator.name in second.operator.beside or second.operator.name in first.operator.beside:
            return NONE
        most = BLOCK if first.operator.by_head and second.operator.by_head else GRID
        return min(super().conflict(first, second), most)

    def _push_into_rings(self) -> None:
        """In a token's pass `push` does what `insert` would do, where only attention needs the ring in between."""
        for push in [step for step in self.steps if step.operator is GPU_PUSH]:
            at = self.steps.index(push)
            inserts = self._inserts([step for step in self.steps[at + 1 :] if step.when & ONE], push)
            if len(inserts) < 2:
                continue
            alone = Step(GPU_PUSH, "", dict(push.arguments), ONE)
            for name, insert in inserts.items():
                insert.when &= ~ONE
                alone.change(name, insert.arguments["field"])
                for same in ("window", "sinks"):
                    alone.change(same, insert.arguments[same])
            push.when &= ~ONE
            self.steps.insert(at, alone)

    def _inserts(self, after: Sequence[Step], push: Step) -> dict[str, Step]:
        """Which of the steps put into the ring what `push` has made, before anything else needs it as it was."""
        made = {push.arguments["k_new"]: "k_field", push.arguments["v_new"]: "v_field"}
        found: dict[str, Step] = {}
        for step in after:
            if step.operator is INSERT:
                found |= {made[rows]: step for rows in {step.arguments["rows"]} & made.keys()}
            elif INSERT.name not in step.operator.beside and any(
                isinstance(x, tuple) for of in step.touched() for x in of
            ):
                break
            if len(found) == len(made):
                break
        return found

    def finish(self) -> None:
        """Compile the operators that the steps use, and put the steps on the device."""
        self._push_into_rings()
        one = [step for step in self.steps if step.when & ONE]
        self.before = {id(step): before for before, step in pairwise(one)}
        waits, ring = barriers(self, one), self._ring(one)
        self.share(one, waits)
        arguments = [np.array(step.words() or [0], np.int64) for step in self.steps]
        starts = np.cumsum([0, *map(len, arguments)])
        base = self.allocate(8 * int(starts[-1]))
        self.device.put(base, np.concatenate(arguments))
        at = {id(step): base + 8 * int(start) for step, start in zip(self.steps, starts[:-1], strict=True)}
        others = [step for step in self.steps if step.when & (PROMPT | SESSIONS)]
        kinds = {step.kind for step in self.steps if step.kind}
        numbers = {form.full: i for i, form in enumerate(forms(True, kinds, self.rooms))}
        records = np.zeros((len(one), RECORD), np.int64)
        for record, step, wait in zip(records, one, waits, strict=True):
            record[:2] = numbers[step.name], wait
            record[2 : 2 + len(step.arguments)] = step.words()
        streams = np.array([(*s, *[0] * (STREAM - len(s))) for s in self.streams], np.int64).reshape(-1, STREAM)
        words = np.array([len(one), self.keep(records), len(streams), self.keep(streams), *ring, self.fields], np.int64)
        self._steps = self.keep(words)
        self._together = self.device.program(source(True, kinds, self.rooms), together=True).kernel("together")
        self._shared_together = self.device.shared_bytes
        alone = self.device.program(source(False, kinds, self.rooms, self.wide))
        kernels = {step.name: alone.kernel(f"step_{step.name}") for step in others}
        self._launches = []
        for step in others:
            blocks = self.device.multiprocessors * (1 if step.operator.large else BLOCKS)
            shared = self._shared([step], ALONE_THREADS)
            self._launches.append((kernels[step.name], at[id(step)], shared, blocks, step.when))

    def share(self, steps: Sequence[Step], waits: Sequence[int]) -> None:
        """Divide the weights of a token's products among blocks, now that it is known where these meet."""

    def _ring(self, steps: Sequence[Step]) -> tuple[int, int, int, int, int]:
        """Of a token's launch: where in shared memory chunks of weights go; for how many there is room (log2), of which
        size; how many warps take them, and how many may be on their way, as many or more (stream.h)."""
        start = -(-(self._shared(steps, TOGETHER_THREADS) + HAND) // 16) * 16
        products = [step.arguments for step in steps if step.operator.name == "linear_one"]
        size = max((min(a["chunk_bytes"], a["tile_bytes"]) for a in products), default=16)
        slots = min((self.device.shared_bytes - start) // (size + 16), MOST_SLOTS)
        if slots < 2:
            self._refuse(start + 2 * (size + 16))
        turns = slots.bit_length() - 1
        self.takers = min(TOGETHER_THREADS // 32, 1 << (turns - 1))
        return start, turns, size, self.takers, (1 << turns) - self.takers

    def _shared(self, steps: Sequence[Step], threads: int) -> int:
        """Bytes of shared memory that any of some steps needs. Raises UnavailableError where a block has less."""
        needs = [
            s.operator.shared({**s.arguments, "wide": self.wide}, threads // 32) for s in steps if s.operator.shared
        ]
        need = DESK + max(needs, default=0)
        if need > self.device.shared_bytes:
            self._refuse(need)
        return need

    def _refuse(self, need: int) -> NoReturn:
        raise UnavailableError(
            f"{self.device.name} has {self.device.shared_bytes:,} bytes of shared memory for a block, and this "
            f"model needs {need:,}: use --backend numba"
        )

    def run_pass(self, kind: int, address: int) -> None:
        """Launch the steps of a kind of pass, whose words are at an address on the device, always the same."""
        if kind == ONE:
            blocks, threads = self.device.multiprocessors, TOGETHER_THREADS + LOADER_THREADS
            self.device.launch(
                self._together, self._steps, address, blocks, threads, self._shared_together, together=True
            )
            return
        if kind not in self._captured:
            self._captured[kind] = self.device.captured(self.launches(kind, address))
        self._captured[kind]()

    def launches(self, kind: int, address: int) -> Callable[[], None]:
        """Launches the steps of a pass of many rows, one after the other. Holds no reference to the plan."""
        device, those = self.device, [launch for *launch, when in self._launches if when & kind]

        def each() -> None:
            for kernel, arguments, shared, blocks in those:
                device.launch(kernel, arguments, address, blocks, ALONE_THREADS, shared)

        return each


class Pass:
    """All that a pass of so many rows and sequences is told: one array, to be put at an address as it is.

    Parts that are filled before that: how float64 [rows, HOW_MANY] (sampling.cu), table int64 [sequences, SEQUENCE],
    ids and sequence_of int64 [rows].
    """

    def __init__(self, rows: int, sequences: int, key_heads: int, address: int = 0) -> None:
        one, table = (rows,), (sequences, neutral.SEQUENCE)
        shapes = {"how": (rows, HOW_MANY), "table": table, "ids": one, "sequence_of": one}
        ends = np.cumsum([PASS, *(math.prod(shape) for shape in shapes.values())])
        self.data: NDArray[np.int64] = np.zeros(int(ends[-1]), np.int64)
        parts = [
            self.data[start:end].reshape(shape)
            for shape, start, end in zip(shapes.values(), ends[:-1], ends[1:], strict=True)
        ]
        self.how, self.table, self.ids, self.sequence_of = parts[0].view(np.float64), *parts[1:]
        places = [HOW, *(WORDS[name] for name in shapes if name != "how")]
        self.data[places] = address + 8 * ends[:-1]
        self.data[KEY_HEADS] = key_heads
        self.tell(rows=rows, sequences=sequences)

    def tell(self, choices: int = 0, **words: int) -> None:
        """choices: address for the ids chosen, int64 [out_rows]; 0: none is; other words by their names in small."""
        self.data[CHOICES] = choices
        for name, value in words.items():
            self.data[WORDS[name]] = value
