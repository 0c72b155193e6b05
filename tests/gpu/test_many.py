"""Products and attention of many rows on tensor cores, against float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Kind
from host_device import HostDevice, host_device
from numpy.typing import NDArray
from plans import random_matrix

from tcinfer.kernels import plan as words
from tcinfer.kernels.cuda import packing
from tcinfer.kernels.cuda.packing import packed
from tcinfer.kernels.cuda.plan import Pass
from tcinfer.kernels.cuda.program import ALONE_THREADS as THREADS
from tcinfer.kernels.cuda.program import GEGLU, SWIGLU, constants
from tcinfer.kernels.cuda.recorder import Recorder
from tcinfer.kernels.reference.pointwise import gelu_tanh
from tcinfer.kernels.reference.quants import KINDS
from tcinfer.kernels.table import LINEAR_MANY

pytestmark = pytest.mark.slow
F = np.float32
WIDE = pytest.mark.parametrize("wide", [False, True], ids=["warps", "warpgroups"])  # that multiply
SHARED = {False: 1024 + 98304, True: 1024 + 196608}  # by `wide`
SEEDS = (0, 1, 2)


CUDA = Path(packing.__file__).parent
TEXTS = (
    *("machine.h", "common.h", "panels.h", "kinds.h", "staging.h", "outputs.h"),
    *("linear_few.cu", "linear_tiles.cu", "linear_exact.cu", "linear_wide.cu", "linear_many.cu", "attention_many.cu"),
)


@cache
def source(operator: str, wide: bool) -> str:
    """The operators, and a kernel `test` that runs one of them."""
    machine, *texts = ((CUDA / name).read_text() for name in TEXTS)
    work = "Work{(int)blockIdx.x, (int)gridDim.x, false}"
    kernel = f"KERNEL({THREADS}, 1) test(const int64 *a, const int64 *p) {{ {operator}(a, p, {work}); }}"
    return "\n".join([machine, constants(wide=wide), *texts, kernel])


class Memory:
    """Arrays on a device, and one launch over them."""

    def __init__(self, seed: int = 0) -> None:
        self.device: HostDevice = host_device(seed)
        self.buffers: list[Any] = []

    def put(self, array: NDArray | None) -> int:
        if array is None:
            return 0
        self.buffers.append(self.device.zeros(array.nbytes))
        self.device.put(self.buffers[-1].address, array)
        return self.buffers[-1].address

    def run(self, operator: str, a: list[int], p: dict[int, int], blocks: int, wide: bool = False) -> None:
        of_pass = np.zeros(words.PASS, np.int64)
        for word, value in p.items():
            of_pass[word] = value
        kernel = self.device.program(source(operator, wide)).kernel("test")
        self.device.launch(kernel, self.put(np.array(a, np.int64)), self.put(of_pass), blocks, THREADS, SHARED[wide])
        self.device.check()


def normal(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, F)


# Products


def in_panels(x: NDArray[np.float16]) -> NDArray[np.float16]:
    """Rows as panels.h has them: [panel, row, piece, value], rows in eights, zeros in columns beyond the last."""
    rows, columns = x.shape
    whole = np.zeros((-(-rows // 8) * 8, -(-columns // 128) * 128), np.float16)
    whole[rows:] = np.nan
    whole[:rows, :columns] = x
    # [row, block, run, product, half of a product, pair] to [block, half a block, row, piece, run, pair]
    parts = whole.reshape(len(whole), -1, 4, 2, 4, 2, 2).transpose(1, 3, 0, 4, 5, 2, 6)
    panels = parts.reshape(-1, len(whole), 8, 8)
    swizzled = np.empty_like(panels)
    for row in range(8):
        swizzled[:, row::8, np.arange(8) ^ row] = panels[:, row::8]
    return swizzled


def product(
    kind: Kind,
    rows: int,
    outputs: int,
    columns: int,
    *,
    bias: bool = False,
    gate: bool = False,
    add: bool = False,
    head: bool = False,
    pair: int = 0,
    ends: Sequence[int] = (),
    blocks: int = 3,
    seed: int = 0,
    wide: bool = False,
) -> tuple[NDArray, NDArray]:
    """What the operator makes of random rows, and what it should. pair: the activation; ends: outputs with which other
    parts begin."""
    w, m = random_matrix(kind, outputs, columns), Memory(seed)
    floats = kind == Kind.F32
    width = columns if floats else -(-columns // 32) * 32
    x = np.zeros((rows, width), F if floats else np.float16)
    x[:, :columns] = normal(1, rows, columns)
    factors = None if floats else np.abs(normal(2, rows)) + F(0.5)
    b = normal(3, outputs) if bias else None
    g = normal(4, rows) if gate else None
    y = normal(5, rows, outputs)
    to = m.put(y)
    on = packed(w)
    rows_at = m.put(in_panels(x) if wide and not floats and rows > 16 else x)
    a: dict[str, Any] = dict.fromkeys(LINEAR_MANY.names, 0)
    a |= {"at": m.put(on.chunks), "runs": on.runs, "tile_bytes": on.chunks.shape[1], "chunk_bytes": on.chunk}
    a |= {"outputs": outputs, "rows": rows_at, "rows_stride": width * x.itemsize, "factors": m.put(factors)}
    a |= {"y": 0 if head else to, "y_stride": 4 * outputs, "gate": m.put(g), "add": add, "head": head}
    a |= {"columns": columns, "pair": pair, "bias": m.put(b)}
    for first, name, part in zip(ends, ("second", "third"), ("_2", "_3"), strict=False):  # side by side after all
        a |= {name: first, f"y{part}": to + 4 * first, f"y{part}_stride": 4 * outputs}
        a |= {f"bias{part}": 0 if b is None else m.put(b[first:])}
    p = {words.ROWS: 999, words.OUT_ROWS: rows, words.LOGITS: to} if head else {words.ROWS: rows}
    m.run(f"linear_many<{kind.name}>", [a[name] for name in LINEAR_MANY.names], p, blocks, wide)
    want = x[:, :columns].astype(float) @ w.values.astype(float).T
    want = want if factors is None else factors[:, None] * want
    if pair:
        g, u = want[:, ::2], want[:, 1::2]
        want = (g / (1 + np.exp(-np.clip(g, -700, None))) if pair == SWIGLU else gelu_tanh(g)) * u
        return m.device.get(to, np.empty_like(y))[:, : outputs // 2], want
    want = want if b is None else want + b
    want = want if g is None else g[:, None] * want
    return m.device.get(to, np.empty_like(y)), want + y if add else want


def error(got: NDArray, want: NDArray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize(
    ("rows", "outputs", "columns", "blocks"), [(3, 41, 512, 3), (13, 37, 768, 1), (33, 70, 256, 3), (65, 129, 512, 1)]
)
@WIDE
def test_products_with_every_kind(kind: Kind, rows: int, outputs: int, columns: int, blocks: int, wide: bool) -> None:
    bound = 1e-6 if kind == Kind.F32 else 1e-3
    assert error(*product(kind, rows, outputs, columns, blocks=blocks, wide=wide)) < bound


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.F32], ids=lambda kind: kind.name)
@pytest.mark.parametrize("columns", [1, 31, 72, 1100])
@pytest.mark.parametrize("rows", [2, 9, 17])
@WIDE
def test_products_with_any_number_of_columns(kind: Kind, rows: int, columns: int, wide: bool) -> None:
    assert error(*product(kind, rows, 19, columns, wide=wide)) < (1e-6 if kind == Kind.F32 else 1e-3)


@pytest.mark.parametrize("rows", [2, 8, 16, 17, 32, 64, 129, 300])
@pytest.mark.parametrize(("outputs", "columns"), [(130, 96), (5, 160)])
@WIDE
def test_products_of_any_number_of_rows(rows: int, outputs: int, columns: int, wide: bool) -> None:
    assert error(*product(Kind.Q8_0, rows, outputs, columns, blocks=2, wide=wide)) < 1e-3


@pytest.mark.parametrize(("rows", "blocks"), [(64, 1), (260, 1), (260, 100)])
@WIDE
def test_products_in_every_size_of_tiles(rows: int, blocks: int, wide: bool) -> None:
    assert error(*product(Kind.Q5_1, rows, 300, 128, blocks=blocks, wide=wide)) < 1e-3


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.F32], ids=lambda kind: kind.name)
@pytest.mark.parametrize("rows", [1, 5, 40])
@WIDE
def test_what_is_done_with_products(kind: Kind, rows: int, wide: bool) -> None:
    bound = 1e-6 if kind == Kind.F32 else 1e-3
    for options in ({"bias": True}, {"gate": True}, {"add": True}, {"head": True}):
        assert error(*product(kind, rows, 33, 64, **options, wide=wide)) < bound
    assert error(*product(kind, rows, 33, 64, bias=True, gate=True, add=True, wide=wide)) < bound


@pytest.mark.parametrize("rows", [1, 12, 40, 300])
def test_parts_of_a_product_and_pairs(rows: int) -> None:
    for kind in (Kind.Q4_0, Kind.F32):
        bound = 1e-6 if kind == Kind.F32 else 1e-3
        assert error(*product(kind, rows, 200, 64, ends=(96, 160), bias=True)) < bound
        assert error(*product(kind, rows, 77, 64, ends=(8,))) < bound
    for activation in (SWIGLU, GEGLU):
        assert error(*product(Kind.Q8_0, rows, 150, 64, pair=activation)) < 1e-3


@pytest.mark.parametrize("kind", [Kind.Q6_K, Kind.F16, Kind.F32], ids=lambda kind: kind.name)
@pytest.mark.parametrize("rows", [2, 12, 70])
@WIDE
def test_products_are_the_same_in_any_order_and_number_of_blocks(kind: Kind, rows: int, wide: bool) -> None:
    first, _ = product(kind, rows, 90, 512, blocks=1, wide=wide)
    for seed in SEEDS:
        again, _ = product(kind, rows, 90, 512, blocks=1 + seed, seed=seed, wide=wide)
        np.testing.assert_array_equal(again, first)


@WIDE
def test_a_row_is_the_same_beside_any_others_in_the_same_form(wide: bool) -> None:
    for some, more in ((3, 15), (18, 150)):
        few, many = (product(Kind.Q4_K, rows, 140, 256, wide=wide)[0] for rows in (some, more))
        np.testing.assert_array_equal(few, many[:some])


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q6_K, Kind.F16], ids=lambda kind: kind.name)
@pytest.mark.parametrize(
    ("rows", "outputs", "columns"), [(512, 128, 256), (250, 128, 96), (256, 127, 160), (700, 256, 64)]
)
@WIDE
def test_products_in_the_largest_tiles(kind: Kind, rows: int, outputs: int, columns: int, wide: bool) -> None:
    columns = 256 if kind == Kind.Q6_K else columns
    after = {"bias": True, "gate": True, "add": True}
    large, want = product(kind, rows, outputs, columns, blocks=1, wide=wide, **after)
    assert error(large, want) < 1e-3
    for blocks, seed in ((1, 1), (100, 2)):
        again, _ = product(kind, rows, outputs, columns, blocks=blocks, seed=seed, wide=wide, **after)
        np.testing.assert_array_equal(again, large)


@WIDE
@pytest.mark.parametrize("columns", [72, 131, 2100])  # rows that a block's registers hold, and others
def test_rows_are_prepared_as_products_read_them(columns: int, wide: bool) -> None:
    device, most = host_device(), 45
    device.capability = (9, 0) if wide else (8, 0)
    w, plan = random_matrix(Kind.F16, 21, columns), Recorder(most, device)
    x = plan.rows(columns)
    y = plan.linear(x, plan.stored(w))
    plan.finish()
    values = normal(1, most, columns)
    device.put(x.address, values)
    told = device.zeros(Pass(most, 1, 1).data.nbytes)
    for rows in (3, 17, most):
        device.put(told.address, Pass(rows, 1, 1, told.address).data)
        plan.run_pass(words.PROMPT, told.address)
        got = device.get(y.address, np.empty((most, 21), F))[:rows]
        assert error(got, values[:rows].astype(float) @ w.values.astype(float).T) < 1e-3
    device.check()


# Attention


def attended(
    first: int,
    rows: int,
    H: int,
    G: int,
    D: int,
    window: int,
    sinks: int,
    *,
    far: bool = False,
    blocks: int = 2,
    seed: int = 0,
    scale: float = 1,
) -> tuple[NDArray, NDArray]:
    """What the operator makes of the last `rows` of a random stream, and what it should."""
    m, all_ = Memory(seed), first + rows
    k, v = (normal(i, all_, G, D).astype(np.float16) for i in (1, 2))
    q, q_far = (F(scale) * normal(i, all_, H, D) for i in (3, 4))
    rings = [np.full((sinks + (window or all_), G, D), np.nan, np.float16) for _ in range(2)]
    for t in range(first):
        slot = t if not window or t < sinks else sinks + (t - sinks) % window
        rings[0][slot], rings[1][slot] = k[t], v[t]
    fields = m.put(np.array([0, 0, m.put(rings[1]), 0, m.put(rings[0])], np.int64))
    sequence = np.zeros(words.SEQUENCE, np.int64)
    sequence[[words.FIELDS, words.FIRST, words.ROW, words.COUNT]] = fields, first, 0, rows
    out = np.zeros((rows, H, D), F)
    to = m.put(out)
    a = [m.put(q[first:]), m.put(q_far[first:]) if far else 0, 4 * H * D, 4, 2, m.put(k[first:]), m.put(v[first:])]
    a += [H, G, D, window, sinks, to]
    m.run("attend_many", a, {words.ROWS: rows, words.TABLE: m.put(sequence)}, blocks)

    want = np.empty((rows, H, D))
    at, s = np.arange(first, all_)[:, None], np.arange(all_)[None]
    seen = (s <= at) & ((s < sinks) | (s > at - window)) if window else s <= at
    for h in range(H):
        keys, values = k[:, h * G // H].astype(float), v[:, h * G // H].astype(float)
        scores = q[first:, h].astype(float) @ keys.T
        if far and window:
            scores[:, :sinks] = q_far[first:, h].astype(float) @ keys[:sinks].T
        scores = np.where(seen, scores / math.sqrt(D), -np.inf)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        want[:, h] = weights / weights.sum(1, keepdims=True) @ values
    return m.device.get(to, out), want


def close(got: NDArray, want: NDArray) -> None:
    assert np.abs(got - want).max() < 2e-3 * np.abs(want).max()


@pytest.mark.parametrize("D", [2, 8, 20, 24, 64, 80, 96, 128, 256])
@pytest.mark.parametrize(("window", "sinks"), [(0, 0), (37, 5)])
def test_attention_with_any_size_of_heads(D: int, window: int, sinks: int) -> None:
    close(*attended(45, 21, 2, 1, D, window, sinks))


@pytest.mark.parametrize(("H", "G"), [(1, 1), (4, 4), (6, 2), (5, 1), (9, 3)])
def test_attention_with_grouped_heads(H: int, G: int) -> None:
    close(*attended(30, 50, H, G, 8, 0, 0))
    close(*attended(30, 50, H, G, 8, 40, 3, far=True))


@pytest.mark.parametrize("first", [0, 3, 70, 200])
@pytest.mark.parametrize("rows", [2, 65, 300])
@pytest.mark.parametrize(("window", "sinks", "far"), [(0, 0, False), (16, 0, False), (66, 70, True), (130, 4, True)])
def test_attention_over_ring_and_chunk(first: int, rows: int, window: int, sinks: int, far: bool) -> None:
    close(*attended(first, rows, 2, 1, 8, window, sinks, far=far))


def test_attention_with_sharp_scores() -> None:
    close(*attended(100, 40, 2, 1, 64, 64, 4, far=True, scale=8))


@pytest.mark.parametrize("D", [24, 256])
def test_attention_is_the_same_in_any_order_and_number_of_blocks(D: int) -> None:
    first, _ = attended(50, 70, 4, 2, D, 33, 2, far=True, blocks=1)
    for seed in SEEDS:
        again, _ = attended(50, 70, 4, 2, D, 33, 2, far=True, blocks=1 + seed, seed=seed)
        np.testing.assert_array_equal(again, first)


def test_attention_of_a_token_is_the_same_in_any_chunk() -> None:
    whole, _ = attended(0, 150, 2, 1, 8, 40, 3)
    last, _ = attended(131, 19, 2, 1, 8, 40, 3)
    np.testing.assert_array_equal(last, whole[131:])
