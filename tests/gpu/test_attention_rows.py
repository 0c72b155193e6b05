"""Attention of rows by themselves (attend_rows, attend_splits, combine) on the stand-in, against float64."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from host_device import HostDevice, host_device
from numpy.typing import NDArray

from tcinfer.kernels import plan as words
from tcinfer.kernels.cuda import packing
from tcinfer.kernels.cuda.program import DESK, PART_END, constants
from tcinfer.kernels.cuda.recorder import form_of
from tcinfer.kernels.table import GPU

F = np.float32
CUDA = Path(packing.__file__).parent
TEXTS = ("machine.h", "common.h", "kinds.h", "attention.cu")
K_FIELD, V_FIELD = 4, 2
HEADS = [1, 5, 8, 24, 64, 80, 128, 320]  # channels of them
pytestmark = pytest.mark.slow
TYPES = [np.float16, np.float32]
Streams = tuple[tuple[int, int], ...]  # of each sequence: tokens before the pass, tokens of the pass


@cache
def source(operator: str, threads: int) -> str:
    """The operators, and a kernel `test` that runs one of them."""
    machine, *texts = ((CUDA / name).read_text() for name in TEXTS)
    work = "Work{(int)blockIdx.x, (int)gridDim.x, false}"
    kernel = f"KERNEL({threads}, 1) test(const int64 *a, const int64 *p) {{ {operator}(a, p, {work}); }}"
    return "\n".join([machine, constants(), *texts, kernel])


def slot_of(at: int, window: int, sinks: int) -> int:
    return at if not window or at < sinks else sinks + (at - sinks) % window


class Case:
    """A pass over random streams: its memory on the device, and what it should give."""

    def __init__(
        self,
        streams: Streams,
        D: int,
        kind: Any,
        *,
        window: int = 0,
        sinks: int = 0,
        H: int = 2,
        G: int = 1,
        far: bool = False,
        scale: float = 1,
    ) -> None:
        rng = np.random.default_rng(7)
        rows = sum(count for _, count in streams)
        self.shape, self.rows = (H, G, D, window, sinks), rows
        self.half, self.far = kind == np.float16, far
        self.q, self.q_far = (F(scale) * rng.standard_normal((rows, H, D), F) for _ in range(2))
        self.fresh = [np.zeros((rows, G, D), kind) for _ in range(2)]
        self.table, self.rings = np.zeros((len(streams), words.SEQUENCE), np.int64), []
        self.sequence_of = np.repeat(np.arange(len(streams)), [count for _, count in streams])
        self.want = np.empty((rows, H, D))
        row = 0
        for i, (first, count) in enumerate(streams):
            stream = [rng.standard_normal((first + count, G, D), F).astype(kind) for _ in range(2)]
            rings = [np.full((sinks + (window or first + 7), G, D), np.nan, kind) for _ in range(2)]
            for ring, fresh, all_ in zip(rings, self.fresh, stream, strict=True):
                for t in range(first):
                    ring[slot_of(t, window, sinks)] = all_[t]
                fresh[row : row + count] = all_[first:]
            self.rings.append(rings)
            self.table[i, [words.FIRST, words.ROW, words.COUNT]] = first, row, count
            for t in range(first, first + count):
                self.want[row] = self.row(row, t, *stream)
                row += 1

    def row(self, row: int, t: int, keys: NDArray, values: NDArray) -> NDArray:
        """One row of what should be."""
        H, G, D, window, sinks = self.shape
        seen = np.array([s for s in range(t + 1) if not window or s < sinks or s > t - window])
        of = np.arange(H) // (H // G)
        k, v = keys[seen][:, of].astype(float), values[seen][:, of].astype(float)
        scores = np.einsum("shd,hd->hs", k, self.q[row].astype(float))
        if self.far:
            scores = np.where(seen < sinks, np.einsum("shd,hd->hs", k, self.q_far[row].astype(float)), scores)
        weights = np.exp((scores - scores.max(1, keepdims=True)) / math.sqrt(D))
        return np.einsum("hs,shd->hd", weights / weights.sum(1, keepdims=True), v)

    def got(self, splits: int = 1, blocks: int = 2, threads: int = 256, seed: int = 0) -> NDArray:
        """What the operators give."""
        H, G, D, window, sinks = self.shape
        device: HostDevice = host_device(seed)
        buffers = []

        def put(array: NDArray) -> int:
            buffers.append(device.zeros(array.nbytes))
            device.put(buffers[-1].address, array)
            return buffers[-1].address

        def launch(operator: str, a: list[int], shared: int) -> None:
            kernel = device.program(source(operator, threads)).kernel("test")
            device.launch(kernel, put(np.array(a, np.int64)), address, blocks, threads, shared)
            device.check()

        for i, (k, v) in enumerate(self.rings):
            fields = np.zeros(5, np.int64)
            fields[[K_FIELD, V_FIELD]] = put(k), put(v)
            self.table[i, words.FIELDS] = put(fields)
        p = np.zeros(words.PASS, np.int64)
        p[[words.ROWS, words.SEQUENCES]] = self.rows, len(self.table)
        p[[words.TABLE, words.SEQUENCE_OF]] = put(self.table), put(self.sequence_of.astype(np.int64))
        address, out = put(p), np.full((self.rows, H, D), np.nan, F)
        to, parts = put(out), put(np.full((self.rows, H, splits, D + PART_END), np.nan, F))
        a = [put(self.q), put(self.q_far) if self.far else 0, 4 * H * D, K_FIELD, V_FIELD, *map(put, self.fresh)]
        a += [H, G, D, window, sinks, to, splits, parts if splits > 1 else 0]
        name = "attend_splits" if splits > 1 else "attend_rows"
        launch(f"{name}<{form_of(self.half, H // G, D)}>", a, DESK + GPU[name].shared({"D": D}, threads // 32))
        if splits > 1:
            launch("combine", [parts, to, 4 * H * D, H, D, splits], DESK)
        return device.get(to, out)

    def holds(self, **how: int) -> None:
        """Asserts that it gives what it should."""
        got = self.got(**how)
        assert np.linalg.norm(got - self.want) < 1e-6 * np.linalg.norm(self.want)
        assert np.abs(got - self.want).max() < 4e-6 * np.abs(self.want).max()


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("D", HEADS)
def test_any_size_of_heads(D: int, kind: Any) -> None:
    Case(((90, 2),), D, kind).holds()
    Case(((90, 2),), D, kind, window=60, sinks=5, far=True, H=3).holds()


@pytest.mark.parametrize("D", [1023, 1024])
def test_the_largest_heads(D: int) -> None:
    for kind in TYPES:
        Case(((20, 1),), D, kind, window=16, sinks=2, far=True).holds()


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("R", [1, 2, 3, 4, 7, 9])
def test_any_number_of_heads_of_a_key_head(R: int, kind: Any) -> None:
    for D in (64, 12):
        Case(((130, 1),), D, kind, H=2 * R, G=2, window=100, sinks=4, far=True).holds()


@pytest.mark.parametrize("first", [0, 1, 3, 30, 37, 38, 41, 42, 43, 200])
@pytest.mark.parametrize(
    ("window", "sinks", "far"), [(38, 4, True), (38, 4, False), (38, 0, False), (3, 70, True), (0, 0, False)]
)
def test_before_and_after_the_ring_is_full(first: int, window: int, sinks: int, far: bool) -> None:
    for kind in TYPES:
        Case(((first, 1),), 16, kind, window=window, sinks=sinks, far=far).holds()
    Case(((first, 45),), 8, np.float16, window=window, sinks=sinks, far=far).holds(blocks=3)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("far", [False, True])
def test_rows_of_several_sequences(kind: Any, far: bool) -> None:
    streams = ((0, 1), (70, 1), (12, 3), (500, 1), (3, 2))
    Case(streams, 24, kind, window=33, sinks=3, far=far, H=6, G=2).holds(blocks=3)
    Case(streams, 64, kind, H=3, G=3).holds(threads=384)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("splits", [1, 4, 64])
@pytest.mark.parametrize("D", [5, 64, 320])
def test_splits_and_their_combination(D: int, splits: int, kind: Any) -> None:
    Case(((700, 1),), D, kind, H=3).holds(splits=splits)
    Case(((9, 1),), D, kind, H=4, G=2).holds(splits=splits, threads=384)  # fewer keys than splits
    Case(((300, 1),), D, kind, window=150, sinks=40, far=True).holds(splits=splits)


def test_sharp_scores() -> None:
    for kind in TYPES:
        Case(((400, 1),), 64, kind, window=300, sinks=4, far=True, H=3, scale=6).holds()


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("D", [5, 64, 320])
@pytest.mark.parametrize("splits", [1, 4])
def test_the_same_in_any_order_and_number_of_blocks(D: int, kind: Any, splits: int) -> None:
    case = Case(((100, 1), (20, 2)), D, kind, window=70, sinks=4, far=True, H=10, G=2)
    for threads in (256, 384):
        first = case.got(splits, blocks=1, threads=threads)
        for seed in (0, 1, 2):
            np.testing.assert_array_equal(case.got(splits, blocks=3 - seed, threads=threads, seed=seed), first)
    for threads in (288, 512):  # other numbers of warps
        case.holds(splits=splits, threads=threads)
