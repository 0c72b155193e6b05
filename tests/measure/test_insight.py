"""What the second level holds, and its share in an answer: against NumPy, and in models where both are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import BACKENDS, SMALL, build, random_weights
from test_memory import CASES, IDS, changed, config_of, inf, model_of, tc, weights_of

from tcinfer import memory
from tcinfer.api import Model, Session
from tcinfer.config import PASS_TOKENS, ModelConfig
from tcinfer.errors import TcinferError
from tcinfer.measure import memory as insight
from tcinfer.memory.state import State

D, RNG = SMALL.head_dim, np.random.default_rng(0)
FAR = [name for name, changes in CASES.items() if changes.get("memory") in ("tensor", "infini")]
SHUT = -1e9
BETA = {"infini": "infini_beta", "tensor": "tc_gate.bias"}


def orthogonal() -> np.ndarray:
    return np.linalg.qr(RNG.normal(size=(D, D)))[0]


def rank(n: int) -> np.ndarray:
    """n orthogonal directions of equal length."""
    return orthogonal()[:, :n] @ orthogonal()[:n]


# Norm and saturation


@pytest.mark.parametrize(
    ("make", "want"),
    [
        (lambda: np.outer(RNG.normal(size=D), RNG.normal(size=D)), 1 / D),
        (lambda: 1e-12 * np.outer(RNG.normal(size=D), RNG.normal(size=D)), 1 / D),
        (orthogonal, 1),
        (lambda: 1e15 * orthogonal(), 1),
        (lambda: rank(2), 2 / D),
        (lambda: rank(5), 5 / D),
        (lambda: np.zeros((D, D)), 0),
        (lambda: np.diag([3.0, 1, *[0] * (D - 2)]), 100 / 82 / D),
    ],
    ids=["one pair", "a tiny pair", "orthogonal", "large", "two directions", "five", "nothing", "unequal"],
)
@pytest.mark.parametrize("changes", [tc(), tc(slots=3, two_timescales=True), tc({"n_kv_heads": 2}), inf("delta")])
def test_saturation_of_known_matrices(make, want: float, changes: dict) -> None:
    """Every head and plane another matrix of the same kind, the last layer's alone."""
    config = replace(SMALL, **changes)
    state = State(memory.layout(config))
    name = memory.mechanism(config).MATRICES[0]
    matrices = state.layers[-1][name]
    for index in np.ndindex(matrices.shape[:-2]):
        matrices[index] = make()
    first, last = insight.layers(config, state)
    assert (first.layer, first.norm, first.saturation) == (0, 0, 0)
    assert last.saturation == pytest.approx(want, rel=1e-5)
    lengths = [np.linalg.norm(matrix) for matrix in matrices.reshape(-1, D, D).astype(np.float64)]
    assert last.norm == pytest.approx(np.sqrt(np.mean(np.square(lengths))), rel=1e-6)


def test_saturation_is_the_mean_over_heads_and_planes() -> None:
    config = replace(SMALL, **tc(slots=2))
    state = State(memory.layout(config))
    planes = state.layers[0]["A"]
    planes[:] = 0
    planes[0, 0], planes[1, 3] = orthogonal(), 2 * rank(1)
    (first, _) = insight.layers(config, state)
    assert first.saturation == pytest.approx((1 + 1 / D) / planes[:, :, 0, 0].size, rel=1e-5)
    assert first.norm == pytest.approx(np.sqrt((D + 4) / planes[:, :, 0, 0].size), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("full", []),
        ("sinks-in-cache", []),
        ("tensor-no-layer", []),
        ("tensor-top-layer", [1]),
        ("infini-linear", [0, 1]),
    ],
)
def test_layers_that_have_a_second_level(name: str, layers: list[int], backend: str) -> None:
    session = model_of(name, backend).session()
    session.feed(IDS)
    before = session.state.buffer.copy()
    found = insight.layers(session.model.config, session.state)
    assert [layer.layer for layer in found] == layers
    assert all(layer.norm > 0 and 1 / D <= layer.saturation <= 1 for layer in found)
    np.testing.assert_array_equal(session.state.buffer, before)
    shares = insight.shares(session.model, session.snapshot(), IDS.tolist())
    assert sorted(shares) == layers


# Shares


def shares_of(config: ModelConfig, weights: dict[str, np.ndarray], backend: str, ids: np.ndarray = IDS) -> list[float]:
    """Of a session that has read IDS, while it reads `ids`, layer by layer."""
    session = build(config, backend, weights).session()
    session.feed(IDS)
    found = insight.shares(session.model, session.snapshot(), ids.tolist())
    return [found[layer] for layer in sorted(found)]


@pytest.mark.parametrize("name", FAR)
def test_shares_are_shares_and_leave_the_session_alone(name: str, backend: str) -> None:
    session = model_of(name, backend).session()
    session.feed(IDS)
    snapshot, twin = session.snapshot(), session.fork()
    shares = insight.shares(session.model, snapshot, IDS[:12].tolist())
    assert all(0 < share < 1 for share in shares.values())
    np.testing.assert_array_equal(session.feed(IDS[:12]), twin.feed(IDS[:12]))
    session.restore(snapshot)
    assert insight.shares(session.model, session.snapshot(), IDS[:12].tolist()) == shares


@pytest.mark.parametrize("name", ["tensor-everything", "tensor-token-gate", "tensor-delta", "infini-delta"])
def test_a_shut_gate_leaves_no_share(name: str, backend: str) -> None:
    config = config_of(name)
    shut = changed(weights_of(config), BETA[config.layers[-1].memory], SHUT)
    assert shares_of(config, changed(shut, "tc_gate.weight", 0), backend) == [0] * len(shares_of(config, shut, backend))


@pytest.mark.parametrize("name", ["tensor-everything", "tensor-delta", "tensor-sinks"])
def test_without_what_the_window_adds_all_is_the_memorys(name: str, backend: str) -> None:
    config = config_of(name)
    weights = changed(changed(weights_of(config), "attn_output.weight", 0), "attn_output.bias", 0)
    assert min(shares_of(config, weights, backend)) > 0.999


def test_an_open_infini_gate_gives_all_to_the_memory(backend: str) -> None:
    config = config_of("infini-delta")
    assert min(shares_of(config, changed(weights_of(config), "infini_beta", 40.0), backend)) > 0.999


@pytest.mark.parametrize("times", [0.01, 0.5, 3, 100])
def test_a_share_follows_what_the_memory_adds(times: float, backend: str) -> None:
    """The first layer's: of lengths a and b it is b / (a + b), so c times the memory makes it c b / (a + c b)."""
    config, one = replace(SMALL, **tc()), IDS[:1]
    weights = random_weights(config)
    share = shares_of(config, weights, backend, one)[0]
    scaled = {name: w * np.float32(times) if "tc_output" in name else w for name, w in weights.items()}
    want = times * share / (1 - share + times * share)
    assert shares_of(config, scaled, backend, one)[0] == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("name", ["tensor-everything", "infini-linear"])
def test_both_backends_find_the_same_shares(name: str) -> None:
    config = config_of(name)
    one, two = (shares_of(config, weights_of(config), backend) for backend in BACKENDS)
    np.testing.assert_allclose(one, two, rtol=1e-3)


def test_of_many_ids_the_last_are_looked_at(backend: str) -> None:
    model = model_of("tensor-delta", backend)
    ids, session = np.resize(IDS, 2 * PASS_TOKENS + 30), model.session()
    want = insight.shares(model, session.snapshot(), ids.tolist())
    session.feed(ids[:-PASS_TOKENS])
    assert insight.shares(model, session.snapshot(), ids[-PASS_TOKENS:].tolist()) == want


@pytest.mark.parametrize("name", ["full", "infini-delta-unbounded", "tensor-unbounded-insert"])
def test_a_cache_that_is_full_grows_for_them(name: str, backend: str) -> None:
    """A block of an unbounded cache is 256 tokens: the ids do not fit beside what was read before."""
    session = model_of(name, backend).session()
    session.feed(np.resize(IDS, 250))
    shares = insight.shares(session.model, session.snapshot(), IDS[:20].tolist())
    assert len(shares) == (0 if name == "full" else 2)


def test_no_ids_have_no_shares(backend: str) -> None:
    """As after an answer that ended at once."""
    session = model_of("tensor-delta", backend).session()
    session.feed(IDS)
    assert insight.shares(session.model, session.snapshot(), []) == {}


@pytest.mark.parametrize("ids", [[50], [-1], [1, 2, 2**40]], ids=str)
def test_ids_that_are_none_are_refused(ids: list[int]) -> None:
    model: Model = model_of("tensor-delta", "numpy")
    session: Session = model.session()
    with pytest.raises(TcinferError, match="outside the vocabulary"):
        insight.shares(model, session.snapshot(), ids)
