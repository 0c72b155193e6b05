"""The matrix memory over many rows of a sequence, by chunks, against its recurrence in float64."""

from __future__ import annotations

from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from host_device import host_device
from numpy.typing import NDArray

from tcinfer.kernels import plan as words
from tcinfer.kernels.cuda import plan
from tcinfer.kernels.cuda.program import ALONE_THREADS, DESK, constants
from tcinfer.kernels.table import GPU

pytestmark = pytest.mark.slow

F = np.float32
FIELD = 1
NOTHING = F(7)  # in what nobody may write
RULES = ("outer", "delta", "wedge", "infini")


class Case(NamedTuple):
    """Random writes and reads of some sequences, one after the other in a pass whose first row is none of theirs."""

    rule: str = "delta"
    P: int = 2
    G: int = 2
    R: int = 1
    D: int = 24
    E: int = 0  # 0: D
    rows: tuple[int, ...] = (70,)
    decay: float = 0.9  # of the tokens that write, from here to 1
    writes: float = 1.0  # how many tokens write to a plane
    write_first: bool = False
    mixed: bool = False


class Given(NamedTuple):
    q: NDArray  # [T, G, R, D]
    k: NDArray  # [T, G, D]
    v: NDArray  # [T, G, E]
    decay: NDArray  # [T, P, G]
    rate: NDArray
    retrieve: NDArray | None  # [T, G]
    mix: NDArray | None  # [T, P, G, R]
    states: NDArray  # [sequences, P, G, D, E]


def given(case: Case) -> Given:
    """The numbers of a case, as float32."""
    rng, T, (rule, P, G, R, D, E, *_) = np.random.default_rng(1), 1 + sum(case.rows), case
    k, q = rng.standard_normal((T, G, D)), rng.standard_normal((T, G, R, D))
    v, states = rng.standard_normal((T, G, E or D)), rng.standard_normal((len(case.rows), P, G, D, E or D))
    on = rng.random((T, P, G)) < case.writes
    decay, rate = np.where(on, rng.uniform(case.decay, 1, on.shape), 1), np.where(on, rng.uniform(0.1, 1, on.shape), 0)
    retrieve = np.ones((T, G)) if rule == "delta" else None
    if rule == "infini":
        k, q = (np.where(x > 0, x + 1, np.exp(x)) for x in (k, q))
        retrieve = 1 / ((k * (np.cumsum(k, 0) - k)).sum(-1) + 1e-6)
        decay, rate, states = np.ones_like(decay), np.ones_like(rate), np.zeros_like(states)
        retrieve[[1 + sum(case.rows[:i]) for i in range(len(case.rows))]] = 1e6  # as long as nothing was written
    else:
        k /= np.linalg.norm(k, axis=-1, keepdims=True)
    mix = rng.random((T, P, G, R)) if case.mixed else None
    return Given._make(x if x is None else x.astype(F) for x in (q, k, v, decay, rate, retrieve, mix, states))


def recurrence(case: Case, numbers: Given) -> tuple[NDArray, NDArray]:
    """kernels.reference.matrix_memory.scan_recurrent in float64: what is read, and the states afterwards."""
    q, k, v, decay, rate, retrieve, mix, states = (x if x is None else x.astype(float) for x in numbers)
    out = np.full((*q.shape[:3], v.shape[-1]), NOTHING, float)
    row = 1
    for A, count in zip(states, case.rows, strict=True):
        for t in range(row, row + count):
            u = v[t][None]
            if retrieve is not None:
                u = u - retrieve[t][:, None] * np.einsum("gd,pgde->pge", k[t], A)
            new = k[t][:, :, None] * u[..., None, :]
            if case.rule == "wedge":
                new = new - v[t][:, :, None] * k[t][:, None, :]
            after = decay[t][..., None, None] * A + rate[t][..., None, None] * new
            read = np.einsum("grd,pgde->pgre", q[t], after if case.write_first else A)
            out[t] = (read if mix is None else mix[t][..., None] * read).sum(0)
            A[:] = after
        row += count
    return out, states


@cache
def source() -> str:
    machine, *texts = (
        (Path(plan.__file__).parent / name).read_text() for name in ("machine.h", "common.h", "matrix_memory_many.cu")
    )
    work = "Work{(int)blockIdx.x, (int)gridDim.x, false}"
    kernel = f"KERNEL({ALONE_THREADS}, 1) test(const int64 *a, const int64 *p) {{ scan_many(a, p, {work}); }}"
    return "\n".join([machine, constants(), *texts, kernel])


def scanned(case: Case, numbers: Given, blocks: int = 2, seed: int = 0, skew: int = 0) -> tuple[NDArray, NDArray]:
    """What the operator reads, and the states afterwards. skew: floats by which no array is aligned."""
    device, buffers = host_device(seed), []

    def put(array: NDArray | None, by: int = 0) -> int:
        if array is None:
            return 0
        buffers.append(device.zeros(array.nbytes + 4 * by))
        device.put(buffers[-1].address + 4 * by, array)
        return buffers[-1].address + 4 * by

    q, k, v, decay, rate, retrieve, mix, states = numbers
    out, sequences = np.full((*q.shape[:3], v.shape[-1]), NOTHING), np.zeros((len(states), words.SEQUENCE), np.int64)
    at = [put(A, skew) for A in states]
    starts = np.cumsum([1, *case.rows])
    for of, address, row, count in zip(sequences, at, starts, case.rows, strict=False):
        of[[words.FIELDS, words.ROW, words.COUNT]] = put(np.array([0, address])), row, count
    a: list[Any] = [FIELD, case.P, case.G, case.R, case.D, v.shape[-1]]
    a += [put(x, skew) for x in (q, k, v, decay, rate, retrieve, mix, out)]
    to, a = a[-1], [*a, case.rule == "wedge", case.write_first]
    of_pass = np.zeros(words.PASS, np.int64)
    of_pass[[words.ROWS, words.SEQUENCES, words.TABLE]] = len(q), len(states), put(sequences)
    shared = DESK + GPU["scan_many"].shared({"D": a[4]}, ALONE_THREADS // 32)
    assert shared <= DESK + 98304
    kernel = device.program(source()).kernel("test")
    device.launch(kernel, put(np.array(a, np.int64)), put(of_pass), blocks, ALONE_THREADS, shared)
    device.check()
    return device.get(to, out), np.stack([device.get(x, np.empty_like(A)) for x, A in zip(at, states, strict=True)])


def error(got: NDArray, want: NDArray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def check(case: Case, **how: int) -> None:
    numbers = given(case)
    compare(scanned(case, numbers, **how), recurrence(case, numbers))


def compare(got: tuple[NDArray, NDArray], want: tuple[NDArray, NDArray]) -> None:
    assert (got[0][0] == NOTHING).all()
    assert error(got[0][1:], want[0][1:]) < 2e-6
    assert error(got[1], want[1]) < 2e-6


@pytest.mark.parametrize("D", [2, 8, 24, 64, 128])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_with_every_size_of_head(rule: str, D: int) -> None:
    check(Case(rule, D=D, write_first=D == 24))
    check(Case(rule, D=D, G=1, P=1, rows=(33,)), blocks=64)
    if rule != "wedge":
        check(Case(rule, D=D, E=1, R=3))


@pytest.mark.parametrize("D", [1, 7, 65, 130, 256])
@pytest.mark.parametrize("E", [5, 16, 17, 40])
def test_sizes_that_fit_nothing(D: int, E: int) -> None:
    check(Case("delta", D=D, E=E, R=2, P=1, rows=(40,)))


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 100, 300])
@pytest.mark.parametrize("R", [1, 3, 9])
def test_every_number_of_rows_and_queries(rows: int, R: int) -> None:
    for write_first in (False, True):
        check(Case("delta", R=R, P=1, D=8, rows=(rows,), write_first=write_first, mixed=write_first))


@pytest.mark.parametrize("decay", [1.0, 0.5, 1e-3, 0.0])
@pytest.mark.parametrize("P", range(1, 7))
def test_planes(P: int, decay: float) -> None:
    """Each with its decay and rate; of some tokens each writes to few planes, or to none."""
    for rule, mixed in product(RULES[:3], (False, True)):
        check(Case(rule, P=P, G=1 + P % 3, D=8, decay=decay, writes=1 if P == 1 else 1 / P, mixed=mixed))


def test_decays_that_are_strong_and_weak_in_turn() -> None:
    """Their logarithms in float32 would lose what is weak behind what is strong."""
    case = Case("delta", P=3, rows=(64,), write_first=True)
    numbers = given(case)
    numbers.decay[::5] = 1e-30
    numbers.decay[3::7] = 0
    compare(scanned(case, numbers), recurrence(case, numbers))


@pytest.mark.parametrize("rule", RULES)
def test_sequences_beside_each_other(rule: str) -> None:
    check(Case(rule, rows=(33, 1, 64), R=3, mixed=True))


@pytest.mark.parametrize("skew", [1, 2, 3])
def test_rows_that_are_not_aligned(skew: int) -> None:
    check(Case("delta", rows=(40, 5)), skew=skew)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("D", [24, 72, 132])
def test_neither_order_nor_number_of_blocks_shows_in_the_bits(rule: str, D: int) -> None:
    """With many blocks strips are narrow, with few they are wide."""
    case = Case(rule, R=2, D=D, rows=(50, 33), mixed=True)
    numbers = given(case)
    first = scanned(case, numbers, blocks=1)
    for seed, blocks in ((1, 2), (2, 3), (0, 100), (1, 100), (2, 100)):
        for got, want in zip(scanned(case, numbers, blocks, seed), first, strict=True):
            np.testing.assert_array_equal(got, want)


def test_a_prompt_in_two_passes_is_that_in_one() -> None:
    """Where the first ends with a chunk, to the bit."""
    case = Case("delta", R=2, rows=(96,))
    numbers = given(case)
    whole, state = scanned(case, numbers)
    first = scanned(case._replace(rows=(64,)), numbers)
    rest = Given._make([*(x if x is None else x[64:] for x in numbers[:-1]), first[1]])
    second = scanned(case._replace(rows=(32,)), rest)
    np.testing.assert_array_equal(second[0][1:], whole[65:])
    np.testing.assert_array_equal(second[1], state)
