"""What blocks are made of, compiled: each operator in a plan of its own (tests/tools/plans.py) against its equation.

Those that the backends share are in test_operators.py.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import pytest
from conftest import FLOATS, as_bytes, as_bytes_twice
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import SCALES, Pass, at, normal, random_matrix, scales
from test_reference import close, memory_arguments, run

from tcinfer.kernels.cpu import machine, rows, tiles
from tcinfer.kernels.cpu.plan import Rows
from tcinfer.kernels.reference import pointwise
from tcinfer.kernels.reference.matrix_memory import Writes, scan_recurrent
from tcinfer.kernels.reference.matrix_memory import scan as chunked
from tcinfer.kernels.reference.quants import KINDS, Kind, Matrix
from tcinfer.kernels.reference.rotary import frequencies
from tcinfer.kernels.table import ANGLES, SCAN

F = np.float32
K_KINDS = (Kind.Q4_K, Kind.Q5_K, Kind.Q6_K)
ROWS_OF_PASSES = (1, 2, 3, 7, 8, 9, 20)


def each_kind(function):
    return pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)(function)


# Weights unpacked


def embedded(w: Matrix, ids: list[int], first: int = 0, positions: np.ndarray | None = None) -> np.ndarray:
    p = Pass(len(ids), first)
    (x,) = p.compute(p.embed(w, positions), ids=p.keep(np.array(ids)))
    return x


@each_kind
def test_embedding_is_the_rows_of_the_ids_plus_learned_positions(kind: Kind) -> None:
    w, ids, positions = random_matrix(kind, 9, 512), [3, 0, 8, 3], normal(1, 20, 512)
    exact = len(SCALES.get(kind, ())) < 2  # else the sum may be rounded once or twice
    close(embedded(w, ids), w.values[ids], 0 if exact else 1e-7)
    close(embedded(w, ids, 16, positions), w.values[ids] + positions[16:], 2e-7)


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16], ids=lambda kind: kind.name)
def test_every_number_of_16_bits_is_read_as_it_is(kind: Kind) -> None:
    stored = np.arange(2**16, dtype=np.uint16).reshape(-1, 256)
    w = Matrix(stored.view(np.uint8), kind, stored.shape)
    got = embedded(w, list(range(256)))
    want = stored.view(np.float16).astype(F) if kind == Kind.F16 else (stored.astype(np.uint32) << 16).view(F)
    np.testing.assert_array_equal(got, want)
    numbers = ~np.isnan(want)
    np.testing.assert_array_equal(got.view(np.uint32)[numbers], want.view(np.uint32)[numbers])  # -0 too


def test_numbers_are_rounded_to_16_bits_as_numpy_rounds_them() -> None:
    @numba.njit
    def run(x, address):
        for i in range(len(x)):
            machine.store_half(address + 2 * i, x[i])

    halves = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(F)
    halves = halves[np.isfinite(halves)]
    middles = (halves[1:] + halves[:-1]) / 2  # to even
    near = np.concatenate([np.nextafter(middles, F(math.inf)), np.nextafter(middles, F(-math.inf))])
    ends = np.array([65519.996, 65520, 1e38, math.inf, -math.inf, math.nan, 1e-8, 2.98e-8, 2.99e-8, 1e-45, -1e-40], F)
    x = np.concatenate([halves, middles, near, ends])
    y = np.empty(len(x), np.float16)
    run(x, y.ctypes.data)
    with np.errstate(over="ignore"):
        want = x.astype(np.float16)
    np.testing.assert_array_equal(y, want)
    np.testing.assert_array_equal(np.signbit(y[~np.isnan(y)]), np.signbit(want[~np.isnan(y)]))


# Products with weights


def product(x: np.ndarray, w: Matrix, bias: np.ndarray | None = None, gate=None, into=None, threads: int = 1):
    p = Pass(len(x), threads=threads)
    gate, into = (None if a is None else p.filled(a) for a in (gate, into))
    (y,) = p.compute(p.linear(p.filled(x), p.stored(w), bias, into, gate))
    return y


def steps(seed: int, *shape: int) -> np.ndarray:
    """Activations that lie safely between the middles of two steps of their 32's largest / 127."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-126, 127, (math.prod(shape) // 32, 32)) + rng.uniform(-0.4, 0.4, (math.prod(shape) // 32, 32))
    x[:, 5] = 127 * rng.choice([-1, 1], len(x))
    return (x * rng.lognormal(-5, 1, (len(x), 1))).astype(F).reshape(shape)


def exactly(x: np.ndarray, w: Matrix, seen=as_bytes) -> np.ndarray:
    """x Wᵀ in float64, of the activations as a product with packed weights takes them."""
    return (x if w.kind in FLOATS else seen(x)).astype(np.float64) @ w.values.T.astype(np.float64)


def tolerance(kind: Kind) -> float:
    """Products of two scales are kept in float16; else it is the sum alone that is rounded."""
    return 1e-3 if kind in K_KINDS else 2e-6


@each_kind
@pytest.mark.parametrize("T", ROWS_OF_PASSES)
def test_products_with_weights(kind: Kind, T: int) -> None:
    w, x = random_matrix(kind, 70, 512), steps(T, T, 512)
    bias, gate, into = normal(2, 70), normal(3, T, 1), normal(4, T, 70)
    want = exactly(x, w)
    scale = np.abs(want).max()
    close(product(x, w) / scale, want / scale, tolerance(kind))
    close(product(x, w, bias) / scale, (want + bias) / scale, tolerance(kind))
    got = product(x, w, bias, gate, into)
    close(got / scale, (into + gate * (want + bias)) / scale, 3 * tolerance(kind))


@each_kind
def test_products_of_any_shape(kind: Kind) -> None:
    for outputs, columns in ((1, 256), (16, 256), (17, 768), (33, 1024), (5, 40), (3, 1), (50, 96)):
        if columns % GGML_QUANT_SIZES[kind][0]:
            continue
        w, x = random_matrix(kind, outputs, columns), normal(5, 3, columns)
        x = x if kind in FLOATS else steps(5, 3, columns)
        want = exactly(x, w)
        close(product(x, w) / np.abs(want).max(), want / np.abs(want).max(), tolerance(kind))


@pytest.mark.parametrize("kind", SCALES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("byte", [0, 0x7F, 0x80, 0xFF])
def test_products_of_the_largest_integers(kind: Kind, byte: int) -> None:
    """All bytes of weights and of activations at an end of their range, where sums of 16 bits would overflow."""
    w = random_matrix(kind, 20, 256)
    w.data[:] = byte
    for i in range(len(SCALES[kind])):
        scales(w, i)[:] = 1
    x = np.stack([np.ones(256), -np.ones(256), np.resize([1, -1], 256), np.repeat([1, -1], 128)]).astype(F)
    want = exactly(x, w)
    close(product(x, w), want, 1e-6)
    close(product(x[:1], w), want[:1], 1e-6)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q6_K], ids=lambda kind: kind.name)
def test_the_head_gives_the_last_rows_to_the_pass(kind: Kind) -> None:
    w, x = random_matrix(kind, 70, 256), steps(6, 9, 256)
    for wanted in (1, 4, 9, 0):
        p = Pass(9)
        logits = np.full((wanted + 1, 70), 7, F)
        p.linear(p.filled(x), p.stored(w), head=True)
        p.compute(out_first=9 - wanted, out_rows=wanted, logits=logits.ctypes.data)
        want = exactly(x, w, as_bytes_twice)[9 - wanted :]
        close(logits[:wanted], want, tolerance(kind))
        assert (logits[wanted] == 7).all()


def test_small_matrices_of_a_mechanism() -> None:
    for shape in ((1, 32), (2, 24), (16, 8), (19, 7)):
        matrix, x = normal(7, *shape), normal(8, 5, shape[1])
        p = Pass(5)
        (y,) = p.compute(p.linear(p.filled(x), p.small(matrix)))
        close(y, x @ matrix.T)


@each_kind
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_what_is_no_number_shows_in_products(kind: Kind, value: float) -> None:
    """In the outputs that depend on it, and in no others."""
    w = random_matrix(kind, 70, 512)
    if kind in FLOATS:
        bad = w.values.copy()
        bad[33, 100] = value
        w = Matrix(quantize(bad, kind).view(np.uint8).reshape(70, -1), kind, w.shape)
    else:
        scales(w, -1 if math.isnan(value) else 0)[33, -1] = value
    for T in (1, 2, 9):
        finite = np.isfinite(product(steps(T, T, 512), w))
        assert not finite[:, 33].any()
        assert finite[:, np.arange(70) != 33].all()
        x = steps(T, T, 512)
        x[T // 2, 77] = value
        finite = np.isfinite(product(x, random_matrix(kind, 70, 512)))
        assert not finite[T // 2].any()
        assert finite[np.arange(T) != T // 2].all()


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("n", [1, 2, tiles.MANY])
def test_products_of_sixteen_columns(n: int, add: bool) -> None:
    tile = tiles.float_tile(Kind.F32, n, add)

    @numba.njit
    def run(w, w_stride, x, x_stride, count, lanes, out, out_stride):
        tile(w, w_stride, x, x_stride, count, lanes, out, out_stride)

    for count in (0, 1, 2, 3, 5, 64):
        for lanes in (1, 7, 16):
            w, x, out = normal(count, count + 1, 19), normal(1, n, count + 3), normal(2, n, 20)
            before = out.copy()
            w[:, lanes:], w[count], x[:, count:] = math.nan, math.nan, math.nan
            addresses = [(a.ctypes.data, a.strides[0]) for a in (w, x, out)]
            run(*addresses[0], *addresses[1], count, lanes, *addresses[2])
            close(out[:, :lanes], x[:, :count] @ w[:count, :lanes] + add * before[:, :lanes])
            np.testing.assert_array_equal(out[:, 16:], before[:, 16:])


# Activations as bytes


def in_bytes(x: Rows, T: int) -> tuple[np.ndarray, np.ndarray]:
    """Integers [T, runs, 32] and heads [T, runs, 4] of quantised rows."""
    raw = at(x.bytes, T, x.bytes_stride, dtype=np.int8)
    heads = raw[:, x.columns : x.columns + x.columns // 32 * 16].copy().view(F)
    return raw[:, : x.columns].reshape(T, -1, 32), heads.reshape(T, -1, 4)


def check_bytes(x: Rows, values: np.ndarray) -> None:
    T, runs = len(values), values.reshape(len(values), -1, 32)
    q, heads = in_bytes(x, T)
    largest = np.abs(runs).max(-1)
    d = largest * F(1 / 127)
    with np.errstate(invalid="ignore"):
        middle = runs.astype(np.float64) * 127 / largest[..., None]
    middle[largest == 0] = 0
    assert np.abs(q - middle).max() < 0.50002
    sums = [q.sum(-1), q[..., :16].sum(-1), q[..., 16:].sum(-1)]
    np.testing.assert_allclose(heads, np.stack([d, *(d * n for n in sums)], -1), rtol=2e-7)


def test_activations_as_bytes() -> None:
    x = normal(9, 6, 576) * np.logspace(-30, 30, 6, dtype=F)[:, None]
    x[1, 32:64], x[2, 64:128], x[3, 7] = 0, 1, -1e25
    x[4, :32] = np.linspace(-127, 127, 32)
    x[5, :32] = np.where(np.arange(32) < 9, 127, 2.5)  # in the middle: to the even number
    p = Pass(6)
    filled = p.filled(x)
    rows.quantised(p, filled)
    rows.quantised(p, filled)  # once is enough
    assert len(p.steps) == 1
    p.compute()
    check_bytes(filled, x)
    assert (in_bytes(filled, 6)[0][5, 0, 9:] == 2).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_the_scale_of_bytes_shows_what_is_no_number(value: float) -> None:
    x = normal(10, 1, 96)
    x[0, 40] = value
    p = Pass(1)
    filled = p.filled(x)
    rows.quantised(p, filled)
    p.compute()
    assert np.isfinite(in_bytes(filled, 1)[1][0, :, 0]).tolist() == [True, False, True]


@pytest.mark.parametrize("maker", ["norm", "silu", "gelu_tanh", "gelu"])
def test_what_makes_rows_makes_their_bytes_when_asked(maker: str) -> None:
    x, up = normal(11, 5, 96), normal(12, 5, 96)
    p = Pass(5)
    y = {
        "norm": lambda: p.norm(p.filled(x), np.ones(96, F), None, 1e-5, False),
        "silu": lambda: p.gated(p.filled(x), p.filled(up), maker),
        "gelu_tanh": lambda: p.gated(p.filled(x), p.filled(up), maker),
        "gelu": lambda: p.gelu(p.filled(x)),
    }[maker]()
    rows.quantised(p, y)
    assert len(p.steps) == 1
    (values,) = p.compute(y)
    check_bytes(y, values)


# Row by row


@pytest.mark.parametrize("columns", [1, 31, 32, 100, 576])
@pytest.mark.parametrize("T", [1, 5])
def test_norms(columns: int, T: int) -> None:
    x, w, b = normal(13, T, columns) * 3 + 1, normal(14, columns), normal(15, columns)
    x[0] *= 1e-3  # where eps counts
    for layer, bias, want in (
        (False, None, pointwise.rms_norm(x, w, 1e-5)),
        (True, None, pointwise.layer_norm(x, w, None, 1e-5)),
        (True, b, pointwise.layer_norm(x, w, b, 1e-5)),
    ):
        p = Pass(T)
        (y,) = p.compute(p.norm(p.filled(x), w, bias, 1e-5, layer))
        close(y, want)


EXTREMES = [0, -0.0, 1e-30, -1e-30, 20, -20, 88, -88, 1e4, -1e4, 1e30, -1e30, math.inf, math.nan]


@pytest.mark.parametrize("columns", [1, 32, 70])
def test_activations(columns: int) -> None:
    x, up = 3 * normal(16, 4, columns), normal(17, 4, columns)
    x[3] = np.resize(EXTREMES, columns)
    up[3] = 1
    p, q = Pass(4), Pass(4)
    products = {name: p.gated(p.filled(x), p.filled(up), name) for name in ("silu", "gelu_tanh")}
    found = dict(zip(products, p.compute(*products.values()), strict=True))
    (gelu,) = q.compute(q.gelu(q.filled(x)))
    with np.errstate(all="ignore"):
        for name, got in found.items():
            np.testing.assert_allclose(got, pointwise.gated(x, up, name), rtol=2e-6, atol=1e-6, err_msg=name)
        exact = [[0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in row] for row in x.astype(float).tolist()]
        np.testing.assert_allclose(gelu, exact, rtol=2e-6, atol=1e-6)


def test_angles_far_out() -> None:
    freq = frequencies(64, 10000.0)
    ever = 2**62
    for first, most, offset in ((0, ever, 0), (10_000_000, ever, 0), (10**8 + 1, 10**8 + 3, 0), (900, 902, -128)):
        p = Pass(5, first)
        made = p.call(ANGLES, freq=freq, pairs=32, most=most, offset=offset, factor=1.0)
        cos, sin = p.compute(*made)
        a = (np.minimum(first + np.arange(5), most) + offset)[:, None] * freq  # float64
        assert np.abs(cos - np.cos(a)).max() < 6e-8
        assert np.abs(sin - np.sin(a)).max() < 6e-8


# The matrix memory


def compiled_scan(A, q, writes: Writes, mix=None, write_first: bool = False, threads: int = 1) -> np.ndarray:
    """The compiled scan with the reference's arguments."""
    (T, G, R, D), (P, _, _, E) = q.shape, A.shape
    p = Pass(T, threads=threads)

    def by_row(a: np.ndarray | None) -> Rows | None:  # [P, T, ..] as rows [P, ..]
        return None if a is None else p.filled(np.ascontiguousarray(np.moveaxis(a, 1, 0)))

    k, v, decay, rate, retrieve, wedge = writes
    retrieve = None if retrieve is None else p.filled(retrieve)
    held = np.full(A.size + 32, 7, F)
    held[: A.size] = A.ravel()
    pairs = {"k": p.filled(k), "v": p.filled(v), "decay": by_row(decay), "rate": by_row(rate)}
    how = {"retrieve": retrieve, "mix": by_row(mix), "wedge": wedge, "write_first": write_first}
    out = p.call(SCAN, field=0, P=P, G=G, R=R, D=D, E=E, q=p.filled(q), **pairs, **how)
    (got,) = p.compute(out, fields=[[held]])
    assert (held[A.size :] == 7).all()
    A[:] = held[: A.size].reshape(A.shape)
    return got.reshape(T, G, R, E)


@pytest.mark.parametrize("scan", [chunked, compiled_scan], ids=["numpy", "numba"])
@pytest.mark.parametrize("rule", ["outer", "delta", "wedge"])
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    T=st.integers(1, 70),
    P=st.integers(1, 3),
    G=st.integers(1, 2),
    R=st.sampled_from([1, 2, 3, 9]),
    D=st.sampled_from([2, 8, 24, 64]),
    E=st.sampled_from([1, 8, 24, 64]),
    steady=st.booleans(),
    mixed=st.booleans(),
    write_first=st.booleans(),
)
def test_scans_are_the_recurrence(scan, rule, seed, T, P, G, R, D, E, steady, mixed, write_first) -> None:
    a = memory_arguments(seed, T, P, G, R, D, D if rule == "wedge" else E, steady)
    rng = np.random.default_rng(seed)
    idle = rng.uniform(size=(P, T, G)) < 0.2  # these write nothing
    a["decay"][idle], a["rate"][idle] = 1, 0
    options = {
        "retrieve": rng.uniform(0, 1, (T, G)).astype(F) * (rng.uniform(size=(T, G)) < 0.8) if rule == "delta" else None,
        "wedge": rule == "wedge",
        "mix": (rng.uniform(0, 1, (P, T, G, R)) * rng.integers(0, 2, (P, T, G, R))).astype(F) if mixed else None,
        "write_first": write_first,
    }
    b = {name: x.copy() for name, x in a.items()}
    want = run(scan_recurrent, a, **options)
    got = run(scan, b, **options)
    close(got, want, 1e-5)
    close(b["A"], a["A"], 1e-5)
