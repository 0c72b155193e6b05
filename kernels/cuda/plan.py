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
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from tcinfer.kernels.cpu import plan as cpu
from tcinfer.kernels.cuda.program import (
    ALONE_THREADS,
    CHOICES,
    DESK,
    HAND,
    HOW,
    HOW_MANY,
    KEY_HEADS,
    LOADER_THREADS,
    NO_WAIT,
    PASS,
    RECORD,
    TOGETHER_THREADS,
    WAIT_FOR_BLOCK,
    WAIT_FOR_GRID,
    Named,
    operators,
    source,
)
from tcinfer.kernels.errors import UnavailableError

ONE, PROMPT, SESSIONS = 1, 2, 4  # kinds of pass: a token, many rows of a sequence, a row each of many
ALWAYS = ONE | PROMPT | SESSIONS
BLOCKS = 4  # of a launch, for each multiprocessor
STREAM = 10  # words of a stream (stream.h), of which:
_, _, TILE, CHUNK = range(4)
MOST_SLOTS = 64
ROOMY = 2**17  # bytes of a block's shared memory from which there is room for a chunk of each warp
LARGE = ("linear_many", "attend_many", "scan_many")  # have one, which fills it

# Operators that do in one block what belongs to a row and a key head.
BY_HEAD = {
    *("push", "take", "insert", "keep_last", "writes", "ones", "unit", "mix", "divide", "gate", "scan", "features"),
    *("blend", "attend_rows"),
}
LATER = {"attend_splits"}  # what they find no such operator reads, and they read nothing that one of these writes
MANY = {"scan": "scan_many"}  # operators that have another form, with the same arguments, for many rows of a sequence
Room = Callable[[Sequence[int], int], int]


def _attention_room(a: Sequence[int], warps: int) -> int:
    return warps * (128 + 16 * (min(256, max(32, 1 << (a[9] - 1).bit_length())) + 2))


def _scan_many_room(a: Sequence[int], warps: int) -> int:
    D = a[4]
    columns, stages, pitch = 32 if D <= 64 else 16, 2 if D <= 128 else 1, -(-D // 4) * 4 | 4
    return 4 * (columns * pitch + stages * (32 * (pitch + max(pitch, 36)) + 36 * columns) + 36 * columns + 2568)


# Bytes of shared memory beside the desk, by a step's arguments and the warps of a block.
ROOM: dict[str, Room] = {
    "linear_one": lambda a, warps: 16 * 8 * 33 * -(-a[1] // 32),  # of floats; as bytes less
    "attend_rows": _attention_room,
    "attend_splits": _attention_room,
    "scan": lambda a, warps: 4 * 32 * (a[4] + 1 + 8 * warps),
    "scan_many": _scan_many_room,
    "writes": lambda a, warps: 4 * a[7],
    "mix": lambda a, warps: 8 * a[5],
    "choose": lambda a, warps: 24720,
    "linear_many": lambda a, warps: 98304,
    "attend_many": lambda a, warps: 512 * max(32, 1 << (a[9] - 1).bit_length()) if a[9] <= 128 else 98304,
}


class Plan(cpu.Plan):
    """Steps in the making, and then in device memory; made by operators.py here and by the modules of kernels.cpu."""

    def __init__(self, capacity: int, device: Any) -> None:
        """capacity: rows of the longest pass; device: device.Device or what stands for it."""
        super().__init__(capacity, threads=None)
        self.device = device
        self.prepared: dict[tuple[int, bool, bool], tuple[Any, ...]] = {}  # what operators.py keeps of rows
        self.streams: list[tuple[int, ...]] = []  # weights of a token's products, in order (stream.h)
        self.fields = 0  # of a session's state
        self.takers = TOGETHER_THREADS // 32 if device.shared_bytes >= ROOMY else 8  # warps that take chunks of weights
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

    def step(self, operator: Any, *arguments: int | float, wait: bool = True, when: int = ALWAYS) -> cpu.Step:
        """Append a step of an Operator of kernels.cpu, whose name the CUDA form has too, or of a Named one."""
        named = operator if isinstance(operator, Named) else Named(operator.name.removeprefix("_"))
        when = ALWAYS if when == cpu.ALWAYS else when
        if named.name in MANY:  # first: what is changed of the last step afterwards concerns a token's launch
            super().step(Named(MANY[named.name]), *arguments, when=when & PROMPT)
            when &= ~PROMPT
        return super().step(named, *arguments, wait=wait, when=when)

    def reuse(self) -> None:
        super().reuse()
        self.prepared.clear()

    def finish(self) -> None:
        """Compile the operators that the steps use, and put the steps on the device."""
        self.prepared.clear()
        arguments = [np.array(step.arguments or [0], np.int64) for step in self.steps]
        starts = np.cumsum([0, *map(len, arguments)])
        base = self.allocate(8 * int(starts[-1]))
        self.device.put(base, np.concatenate(arguments))
        at = {id(step): base + 8 * int(start) for step, start in zip(self.steps, starts[:-1], strict=True)}
        one = [step for step in self.steps if step.when & ONE]
        others = [step for step in self.steps if step.when & (PROMPT | SESSIONS)]
        kinds = {step.operator.kind for step in self.steps if step.operator.kind}
        numbers = {operator: i for i, operator in enumerate(operators(True, kinds))}
        records = np.zeros((len(one), RECORD), np.int64)
        for record, step, wait in zip(records, one, _waits(one), strict=True):
            record[:2] = numbers[step.operator], wait
            record[2 : 2 + len(step.arguments)] = step.arguments
        streams = np.array([(*s, *[0] * (STREAM - len(s))) for s in self.streams], np.int64).reshape(-1, STREAM)
        hand, turns, size = self._ring(one)
        words = np.array(
            [len(one), self.keep(records), len(streams), self.keep(streams), hand, turns, size, self.fields], np.int64
        )
        self._steps = self.keep(words)
        self._together = self.device.program(source(True, kinds), together=True).kernel("together")
        self._shared_together = self.device.shared_bytes
        alone = self.device.program(source(False, kinds))
        kernels = {s.operator: alone.kernel(f"step_{s.operator.full}") for s in others}
        self._launches = []
        for step in others:
            blocks = self.device.multiprocessors * (1 if step.operator.name in LARGE else BLOCKS)
            shared = self._shared([step], ALONE_THREADS)
            self._launches.append((kernels[step.operator], at[id(step)], shared, blocks, step.when))

    def _ring(self, steps: Sequence[cpu.Step]) -> tuple[int, int, int]:
        """Of a token's launch: where in shared memory what it is told goes, and then chunks of weights; for how many
        of them (log2), of which size."""
        hand = -(-self._shared(steps, TOGETHER_THREADS) // 16) * 16
        start = hand + HAND
        size = max((min(stream[CHUNK], stream[TILE]) for stream in self.streams), default=16)
        slots = min((self.device.shared_bytes - start) // (size + 16), MOST_SLOTS)
        least = 1 << (self.takers - 1).bit_length()  # a power of two, and one for each taker
        if slots < least:
            self._refuse(start + least * (size + 16))
        return hand, slots.bit_length() - 1, size

    def _shared(self, steps: Sequence[cpu.Step], threads: int) -> int:
        """Bytes of shared memory that any of some steps needs. Raises UnavailableError where a block has less."""
        needs = [ROOM[s.operator.name](s.arguments, threads // 32) for s in steps if s.operator.name in ROOM]
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


def _waits(steps: Sequence[cpu.Step]) -> list[int]:
    """What each step of a single launch ends with.

    A step that the next one needs is waited for by its block alone while both treat key heads by themselves; whatever
    was waited for in that way must be waited for by all once another kind of step follows. What a LATER one finds, too.
    """
    out, pending = [], False  # pending: a block alone has been waited for
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        local = step.operator.name in BY_HEAD and following is not None and following.operator.name in BY_HEAD
        if following is None:
            out.append(NO_WAIT)
        elif local:
            out.append(WAIT_FOR_BLOCK if step.wait else NO_WAIT)
            pending |= step.wait
        elif step.operator.name in LATER and following.operator.name in BY_HEAD:
            out.append(NO_WAIT)
            pending = True
        else:
            out.append(WAIT_FOR_GRID if step.wait or pending else NO_WAIT)
            pending &= not out[-1]
    return out


class Pass:
    """All that a pass of so many rows and sequences is told: one array, to be put at an address as it is.

    Parts that are filled before that: how float64 [rows, HOW_MANY] (sampling.cu), table int64 [sequences, SEQUENCE],
    ids and sequence_of int64 [rows].
    """

    def __init__(self, rows: int, sequences: int, key_heads: int, address: int = 0) -> None:
        shapes = {"how": (rows, HOW_MANY), "table": (sequences, cpu.SEQUENCE), "ids": (rows,), "sequence_of": (rows,)}
        ends = np.cumsum([PASS, *(math.prod(shape) for shape in shapes.values())])
        self.data: NDArray[np.int64] = np.zeros(int(ends[-1]), np.int64)
        parts = [
            self.data[start:end].reshape(shape)
            for shape, start, end in zip(shapes.values(), ends[:-1], ends[1:], strict=True)
        ]
        self.how, self.table, self.ids, self.sequence_of = parts[0].view(np.float64), *parts[1:]
        places = [HOW, *(cpu.WORDS[name] for name in shapes if name != "how")]
        self.data[places] = address + 8 * ends[:-1]
        self.data[KEY_HEADS] = key_heads
        self.tell(rows=rows, sequences=sequences)

    def tell(self, choices: int = 0, **words: int) -> None:
        """choices: address for the ids chosen, int64 [out_rows]; 0: none is; other words by their names in small."""
        self.data[CHOICES] = choices
        for name, value in words.items():
            self.data[cpu.WORDS[name]] = value
