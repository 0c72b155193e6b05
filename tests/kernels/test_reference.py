"""The plain equations against their identities: what the compiled operators are measured by."""

from __future__ import annotations

import math

import numpy as np
import pytest
from plans import random_matrix

from tcinfer.engine import backend as engine_backend
from tcinfer.errors import TcinferError
from tcinfer.kernels.reference import attention
from tcinfer.kernels.reference.matrix_memory import Writes, scan
from tcinfer.kernels.reference.pointwise import gelu, sigmoid
from tcinfer.kernels.reference.quants import KINDS, Kind, linear


def close(got: np.ndarray, want: np.ndarray, tolerance: float = 2e-6) -> None:
    """Within a tolerance of the largest number."""
    assert got.shape == want.shape
    assert np.abs(got - want).max(initial=0) <= tolerance * max(1.0, np.abs(want).max(initial=0))


def memory_arguments(
    seed: int, T: int, P: int = 1, G: int = 2, R: int = 2, D: int = 8, E: int = 8, steady: bool = True
) -> dict[str, np.ndarray]:
    """Random operands of the matrix memory, with unit keys as the mechanism writes them."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    k = normal(T, G, D)
    decay, rate = rng.uniform(0.5, 1, (P, 1, G)), rng.uniform(0, 0.9, (P, 1, G))
    if not steady:
        decay, rate = rng.uniform(0.05, 1, (P, T, G)), rng.uniform(0, 1, (P, T, G))
    return {
        "A": normal(P, G, D, E),
        "q": normal(T, G, R, D),
        "k": k / np.linalg.norm(k, axis=-1, keepdims=True),
        "v": normal(T, G, E),
        "decay": np.broadcast_to(decay, (P, T, G)).astype(np.float32),
        "rate": np.broadcast_to(rate, (P, T, G)).astype(np.float32),
    }


def run(scan, a: dict[str, np.ndarray], retrieve=None, wedge: bool = False, **options) -> np.ndarray:
    """A scan over such operands; a["A"] is changed in place."""
    return scan(a["A"], a["q"], Writes(a["k"], a["v"], a["decay"], a["rate"], retrieve, wedge), **options)


@pytest.mark.parametrize("decay", [0.01, 0.5, 0.995, 0.9999, 1.0])
@pytest.mark.parametrize("rate", [0.05, 1.0])
def test_the_delta_chunk_form_holds_in_float32_over_512_writes(decay: float, rate: float) -> None:
    a = memory_arguments(1, 512, D=64, E=64)
    a["decay"][:], a["rate"][:] = decay, rate
    exact = {name: x.astype(np.float64) for name, x in a.items()}
    ones = np.ones((512, 2), np.float32)
    k, v, A = exact["k"], exact["v"], exact["A"][0]
    decay, rate = float(np.float32(decay)), float(np.float32(rate))  # as the model has them
    for t in range(512):  # float64, the rule as it is written
        A = decay * A + rate * k[t][:, :, None] * (v[t] - np.einsum("gd,gde->ge", k[t], A))[:, None, :]
    run(scan, a, retrieve=ones)
    close(a["A"][0], A, 3e-6)


def test_reading_is_decayed_linear_attention_over_the_written_pairs() -> None:  # T2
    a = memory_arguments(2, 40, R=1)
    a["A"][:], a["decay"][:], a["rate"][:] = 0, 0.9, 0.3
    out = run(scan, a)
    for t in (1, 7, 39):
        scores = np.einsum("gd,igd->ig", a["q"][t, :, 0], a["k"][:t])
        weights = 0.3 * 0.9 ** (t - 1 - np.arange(t))
        close(out[t, :, 0], np.einsum("ig,i,ige->ge", scores, weights, a["v"][:t]).astype(np.float32))


def test_chunk_means_differ_from_the_scan_by_the_cross_terms_alone() -> None:  # T3
    C = 16
    a = memory_arguments(0, C, G=1, R=1, D=C, E=C)
    a["A"][:], a["decay"][:], a["rate"][:] = 0, 1, 1
    a["k"][:, 0] = a["v"][:, 0] = np.eye(C)  # one key, one value each
    run(scan, a)
    mean = C * C * np.outer(a["k"][:, 0].mean(0), a["v"][:, 0].mean(0))
    cross = mean - a["A"][0, 0]
    assert np.count_nonzero(np.abs(cross) > 1e-6) == C * C - C  # every cell off the diagonal
    close(cross, 1 - np.eye(C, dtype=np.float32))


def test_chunk_means_of_random_pairs_add_all_unequal_products() -> None:  # T3
    C = 16
    a = memory_arguments(3, C, G=1, R=1)
    a["A"][:], a["decay"][:], a["rate"][:] = 0, 1, 1
    k, v = a["k"][:, 0], a["v"][:, 0]
    run(scan, a)
    cross = sum(np.outer(k[i], v[j]) for i in range(C) for j in range(C) if i != j)
    close(C * C * np.outer(k.mean(0), v.mean(0)) - a["A"][0, 0], cross, 1e-5)


def test_pairs_written_with_a_decay_keep_their_own_age() -> None:  # T3
    C = 16
    a = memory_arguments(0, C, G=1, R=1, D=C, E=C)
    a["A"][:], a["decay"][:], a["rate"][:] = 0, 0.995, 0.05
    a["k"][:, 0] = a["v"][:, 0] = np.eye(C)
    run(scan, a)
    close(a["A"][0, 0], np.diag(0.05 * 0.995 ** (C - 1 - np.arange(C))).astype(np.float32))


def test_repeating_a_pair_converges_where_the_rule_says() -> None:  # T4
    key, value = np.eye(8, dtype=np.float32)[0], np.arange(8, dtype=np.float32)
    for rule, limit in (("delta", 0.05 / (1 - 0.995 + 0.05)), ("outer", 0.05 / (1 - 0.995))):
        a = memory_arguments(0, 4000, G=1, R=1)
        a["A"][:], a["decay"][:], a["rate"][:], a["k"][:], a["v"][:] = 0, 0.995, 0.05, key, value
        run(scan, a, retrieve=np.ones((4000, 1), np.float32) if rule == "delta" else None)
        close(key @ a["A"][0, 0], (limit * value).astype(np.float32), 1e-4)


def test_wedge_stays_antisymmetric() -> None:  # T5
    a = memory_arguments(4, 100)
    a["A"][:] = 0
    run(scan, a, wedge=True)
    close(a["A"], -a["A"].swapaxes(-1, -2))


def test_attention_in_blocks_is_attention_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(6)
    q = rng.normal(size=(40, 4, 8)).astype(np.float32)
    k, v = (rng.normal(size=(40, 2, 8)).astype(np.float32) for _ in range(2))
    causal = np.tri(40, dtype=bool)
    want = attention.attention(q, k, v, causal, 2, q + 1)
    monkeypatch.setattr(attention, "MOST_SCORES", 7 * 4 * 40)
    close(attention.attention(q, k, v, causal, 2, q + 1), want)


def test_gelu_is_the_exact_form() -> None:
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    want = np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x.tolist()])
    close(gelu(x.reshape(1, -1))[0], want.astype(np.float32))


def test_sigmoid_is_silent_and_right_at_the_ends() -> None:
    with np.errstate(all="raise"):
        close(sigmoid(np.array([-80, -1, 0, 1, 80], np.float32)), 1 / (1 + np.exp([80.0, 1, 0, -1, -80])))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("T", [1, 3])
def test_products_with_packed_weights(kind: Kind, T: int) -> None:
    w = random_matrix(kind, 70, 512)
    x, bias = np.random.default_rng(8).normal(size=(T, 512)).astype(np.float32), np.arange(70, dtype=np.float32)
    want = (x.astype(np.float64) @ w.values.T.astype(np.float64) + bias).astype(np.float32)
    close(linear(x, w, bias), want, 1e-6)
    np.testing.assert_array_equal(w.rows(np.array([4, 1])), w.values[[4, 1]])


def test_a_backend_that_cannot_run_says_so() -> None:
    with pytest.raises(TcinferError, match="cuda"):
        engine_backend("cuda")
    with pytest.raises(TcinferError, match="'fast' is not one of auto, numpy, numba, cuda"):
        engine_backend("fast")
