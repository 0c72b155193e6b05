"""The contract of every memory mechanism: the answers of the definitions, in chunks of any size, in constant bytes.

Each case is compared with `oracle.py`, a float64 model that takes one token at a time and forgets nothing.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from decimal import Decimal, localcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
from conftest import SHARED, SMALL, build, random_weights
from oracle import Weights

from tcinfer import memory
from tcinfer.api import Model, Session
from tcinfer.architectures import architecture
from tcinfer.config import DEFAULT_WINDOW, ModelConfig
from tcinfer.errors import FileError, TcinferError
from tcinfer.gguf.reader import read
from tcinfer.kernels.reference.quants import unpack
from tcinfer.kernels.reference.rotary import angles, frequencies
from tcinfer.loader import bind, dropped, load, read_config
from tcinfer.memory import infini, tensor_cache
from tcinfer.memory_options import with_memory

T, W = 48, 7
IDS = np.random.default_rng(1).integers(0, SMALL.vocab_size, T)
TOLERANCE = {"numpy": 2e-5, "numba": 1e-4, "cuda": 1e-4}  # of the largest logit
GOLDEN = sorted(p.parent.name for p in (SHARED / "golden").glob("*/golden.npz"))


def tc(base: dict | None = None, top: int = -1, **options) -> dict:
    """Tensor Cache; top: in so many of the last layers alone (of as many as `base` says, or SMALL has)."""
    changes = {"memory": "tensor", "window": W, **(base or {}), "options": tensor_cache.Options(**options)}
    if top < 0:
        return changes
    there = [i >= changes.get("n_layers", SMALL.n_layers) - top for i in range(changes.get("n_layers", SMALL.n_layers))]
    plain = "sinks" if changes.get("sinks") else "window"
    memories = tuple("tensor" if t else plain for t in there)
    return changes | {"memory": memories, "options": tuple(changes["options"] if t else None for t in there)}


def inf(rule: str, **changes) -> dict:
    return {"memory": "infini", "window": W, **changes, "options": infini.Options(rule)}


GQA = {"n_kv_heads": 2}
WINDOW = {"memory": "window", "window": W}
SINKS = {"memory": "sinks", "window": W, "sinks": 3}
IN_CACHE = {**SINKS, "sink_positions": "in-cache"}
LEARNED, CONV = {"rope_dim": 0, "context_length": 500}, {"key_conv": 2}
LINEAR, NTK = ({"rope_scaling": scaling, "rope_factor": 4.0} for scaling in ("linear", "ntk"))

CASES = {
    "full": {},
    "full-learned": LEARNED,
    "full-llama-gqa": {"arch": "llama", **GQA},
    "full-tcllama-ntk": {"arch": "tcllama", **NTK},
    "full-qwen2-one-kv-head": {"arch": "qwen2", "n_kv_heads": 1},
    "full-ntk-below-1": {"rope_scaling": "ntk", "rope_factor": 0.5},
    "window": WINDOW,
    "window-learned-key-conv": WINDOW | LEARNED | CONV,
    "window-llama-gqa-linear": {**WINDOW, "arch": "llama", **GQA, **LINEAR},
    "sinks": SINKS,
    "sinks-more-than-window": {**SINKS, "window": 2, "sinks": 9},
    "sinks-in-cache": IN_CACHE,
    "sinks-in-cache-llama-gqa-linear": {**IN_CACHE, "arch": "llama", **GQA, **LINEAR},
    "sinks-in-cache-qwen2-key-conv": {**IN_CACHE, "arch": "qwen2", **CONV},
    "sinks-in-cache-llama-half-rotation": {**IN_CACHE, "arch": "llama", **GQA, "rope_dim": 4},
    "infini-linear": inf("linear"),
    "infini-delta": inf("delta"),
    "infini-delta-gqa-key-conv": inf("delta", arch="tcllama", **GQA, **CONV),
    "infini-linear-gqa-sinks": inf("linear", **GQA, sinks=2),
    "infini-delta-unbounded": inf("delta", window=0),
    "tensor-outer": tc(rule="outer"),
    "tensor-delta": tc(),
    "tensor-wedge": tc(rule="wedge", value_scale=-0.5),
    "tensor-window-1": tc({"window": 1}),
    "tensor-learned": tc(LEARNED),
    "tensor-sinks": tc({"sinks": 2, **GQA}, write_on_insert=True),
    "tensor-sinks-in-cache": tc({"sinks": 2, "sink_positions": "in-cache"}, rope=False),
    "tensor-insert": tc(write_on_evict=False, write_on_insert=True),
    "tensor-evict-and-insert": tc(write_on_insert=True, rule="outer"),
    "tensor-top-layer": tc(top=1),
    "tensor-no-layer": tc(top=0),
    "tensor-raw-keys": tc(normalize_k=False),
    "tensor-normalised": tc(rule="outer", normalize_q=True, normalize_read=True, normalize_read_eps=0.05),
    "tensor-normalised-read-gqa": tc(GQA, normalize_read=True, write_then_read=True),
    "tensor-token-gate": tc(token_gate=True),
    "tensor-two-timescales": tc(two_timescales=True),
    "tensor-slots-k": tc(slots=4),
    "tensor-slots-q": tc(slots=3, write_route="q", read_topk=2, router_temperature=0.1),
    "tensor-slots-gqa-two-timescales": tc(GQA, slots=3, read_topk=3, router_temperature=0.2, two_timescales=True),
    "tensor-slots-wedge-plain-insert": tc(slots=2, rule="wedge", rope=False, write_on_insert=True),
    "tensor-write-then-read-insert": tc(write_then_read=True, write_on_insert=True),
    "tensor-plain-keys": tc({"arch": "tcllama"}, rope=False),
    "tensor-plain-keys-half-rotation": tc({"arch": "tcllama", "rope_dim": 4}, rope=False),
    "tensor-token-decay": tc(CONV, token_decay=True, rule="outer"),
    "tensor-token-rates-two-timescales": tc(GQA, token_rate=True, token_decay=True, two_timescales=True),
    "tensor-unbounded-insert": tc({"window": 0, **CONV}, write_on_insert=True, token_rate=True),
    "tensor-everything": tc(
        {"arch": "tcllama", "n_layers": 3, **GQA, **CONV, **NTK, "sinks": 2},
        top=2, write_on_insert=True, write_then_read=True, slots=3, read_topk=2, router_temperature=0.1,
        two_timescales=True, token_gate=True, normalize_q=True, value_scale=1.5, rope=False, token_rate=True,
        token_decay=True,
    ),
}  # fmt: skip
BOUNDED = [name for name, changes in CASES.items() if changes.get("window")]


def config_of(name: str) -> ModelConfig:
    return replace(SMALL, **CASES[name])


def weights_of(config: ModelConfig) -> Weights:
    """Random weights; llama without biases, with divisors of its angles; qwen2 with a head of its own."""
    weights = random_weights(config)
    if config.arch == "llama":
        weights = without(weights, "bias")
        weights["rope_freqs.weight"] = np.linspace(1, 3, config.rope_dim // 2, dtype=np.float32)
    if config.arch == "qwen2":
        weights["output.weight"] = weights["token_embd.weight"][::-1].copy()
    if config.memory == "tensor" and not config.options.normalize_k:  # diverges where rate · |k|² > 1 + decay
        weights |= {name: w - 6 for name, w in weights.items() if name.endswith("tc_rate")}
    return weights


def model_of(name: str, backend: str) -> Model:
    return build(config_of(name), backend, weights_of(config_of(name)))


@functools.cache
def expected(name: str, count: int = T) -> tuple[np.ndarray, list[Weights]]:
    """The oracle's logits and matrices of a case, after `count` tokens."""
    return oracle.run(config_of(name), weights_of(config_of(name)), np.resize(IDS, count))


def feed(session: Session, ids: np.ndarray, lengths: list[int]) -> np.ndarray:
    """Logits of every token, fed in chunks of these lengths (the rest at once)."""
    parts = np.split(ids, np.cumsum(lengths, dtype=int))
    return np.concatenate([session.feed(part, all_logits=True) for part in parts if len(part)])


def run(config: ModelConfig, weights: Weights, backend: str, ids: np.ndarray = IDS) -> np.ndarray:
    return build(config, backend, weights).session().feed(ids, all_logits=True)


def agrees(config: ModelConfig, weights: Weights, backend: str) -> bool:
    """Whether the model gives the oracle's logits."""
    return difference(run(config, weights, backend), oracle.logits(config, weights, IDS)) < TOLERANCE[backend]


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """max |a - b| / max |b|; 0 where both are empty or zero."""
    assert np.shape(a) == np.shape(b)
    return float(np.max(np.abs(a - b), initial=0) / max(np.max(np.abs(b), initial=0), 1e-30))


def arrays(session: Session) -> Weights:
    return {f"{i}.{name}": a for i, layer in enumerate(session.state.on_host().layers) for name, a in layer.items()}


def without(weights: Weights, *parts: str) -> Weights:
    return {name: w for name, w in weights.items() if not any(part in name for part in parts)}


def plain(weights: Weights) -> Weights:
    return without(weights, ".tc_", "infini")


def changed(weights: Weights, end: str, value: float) -> Weights:
    return {name: np.full_like(w, value) if name.endswith(end) else w for name, w in weights.items()}


def opened(path: Path) -> tuple[ModelConfig, Weights]:
    file = read(path)
    return read_config(file), {name: unpack(t.data, t.kind).reshape(t.shape) for name, t in file.tensors.items()}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_oracle_itself(name, convert_golden):
    with np.load(SHARED / "golden" / name / "golden.npz") as golden:
        got = oracle.logits(*opened(convert_golden(name)), golden["tokens"])
        assert difference(got, golden["logits"]) < 1e-6


@pytest.mark.parametrize("name", CASES)
def test_parity(name, backend):
    """The definition's logits, and its matrices after the last token."""
    want, memories = expected(name)
    session = model_of(name, backend).session()
    assert difference(session.feed(IDS, all_logits=True), want) < TOLERANCE[backend]
    for state, matrices in zip(session.state.on_host().layers, memories, strict=True):
        for key in matrices.keys() & state.keys():
            assert difference(state[key], matrices[key].reshape(state[key].shape)) < TOLERANCE[backend], key


@pytest.mark.parametrize("name", CASES)
def test_any_chunks_give_the_same_answers(name, backend):
    model, rng = model_of(name, backend), np.random.default_rng(2)
    ragged = [rng.integers(1, most, T) for most in (4, 2 * W, T)]
    first = model.session()
    want = feed(first, IDS, [])
    for lengths in ([1] * T, [W, 1, W + 1, 3 * W], *ragged):
        session = model.session()
        assert difference(feed(session, IDS, lengths), want) < TOLERANCE[backend], lengths
        for key, array in arrays(session).items():
            assert difference(array, arrays(first)[key]) < TOLERANCE[backend], (lengths, key)


@pytest.mark.parametrize("name", BOUNDED)
def test_bytes_never_change(name, backend):
    session = model_of(name, backend).session()
    buffer = session.state.on_host().buffer
    for count in (1, 499):
        assert session.nbytes == buffer.nbytes == memory.layout(session.model.config).nbytes
        session.feed(np.resize(IDS, count))
    assert session.nbytes == buffer.nbytes
    assert all(np.shares_memory(array, buffer) for array in arrays(session).values())


@pytest.mark.parametrize("name", CASES)
def test_snapshot_restore_fork(name, backend):
    """Going on from a copy is, bit for bit, going on; and no copy hears of another."""
    session = model_of(name, backend).session()
    other = session.model.session()
    session.feed(IDS[:20])
    snapshot, fork = session.snapshot(), session.fork()
    want = feed(session, IDS[20:], [1, 1, 12])
    elsewhere = fork.feed(IDS[:15], all_logits=True)
    other.restore(snapshot)
    assert np.array_equal(other.feed(IDS[:15], all_logits=True), elsewhere)
    other.restore(snapshot)
    assert np.array_equal(feed(other, IDS[20:], [1, 1, 12]), want)
    for key, array in arrays(other).items():
        assert np.array_equal(array, arrays(session)[key]), key
        assert not np.shares_memory(array, arrays(session)[key]), key


@pytest.mark.parametrize("name", CASES)
def test_causality(name, backend):
    """Another token at t changes the logits from t on, and none before."""
    model = model_of(name, backend)
    want = model.session().feed(IDS, all_logits=True)
    for t in (1, W, 30, T - 1):
        ids = IDS.copy()
        ids[t] = (ids[t] + 1) % SMALL.vocab_size
        got = model.session().feed(ids, all_logits=True)
        assert difference(got[:t], want[:t]) < TOLERANCE[backend]
        assert difference(got[t], want[t]) > 1e-2


LONG = ["sinks-in-cache", "infini-delta", "tensor-delta", "tensor-unbounded-insert", "tensor-everything"]


@pytest.mark.parametrize("name", LONG)
def test_prompts_longer_than_one_pass(name, backend):
    """300 tokens: past the session's own chunks of 256, and an unbounded cache's first block; 40 times round a ring."""
    for lengths in ([], [1] * 50):
        got = feed(model_of(name, backend).session(), np.resize(IDS, 300), lengths)
        assert difference(got, expected(name, 300)[0]) < TOLERANCE[backend]


# identities: what mechanisms become where a part of them is closed


def tensor_model(**options) -> tuple[ModelConfig, Weights]:
    """A Tensor Cache whose empty memory adds nothing: its output has no bias."""
    config = replace(SMALL, **tc(**options))
    return config, without(random_weights(config), "tc_output.bias")


def test_without_gate_or_write_rate_or_eviction_the_first_level_is_left(backend):
    config, weights = tensor_model()
    want = run(replace(SMALL, **WINDOW), plain(weights), backend)
    for closed in ("tc_gate.bias", "tc_rate"):
        assert difference(run(config, changed(weights, closed, -1e4), backend), want) < 1e-6
    wide = run(replace(config, window=T), weights, backend)
    assert difference(wide, run(SMALL, plain(weights), backend)) < 1e-6


@pytest.mark.parametrize(("write_then_read", "first"), [(False, W + 1), (True, W)])
def test_memory_is_silent_until_something_was_read_that_left(write_then_read, first, backend):
    config, weights = tensor_model(write_then_read=write_then_read)
    got = run(config, weights, backend)
    want = run(replace(SMALL, **WINDOW), plain(weights), backend)
    assert difference(got[:first], want[:first]) < 1e-6
    assert difference(got[first], want[first]) > 1e-3


SHARES = {"slots": 4, "read_topk": 4, "router_temperature": 1e6}
LIMITS = {  # options, changed weights, the options that they come to
    "no slow share": ({"two_timescales": True}, {"tc_alpha": -1e4}, {}),
    "normaliser never reached": ({"normalize_read": True, "normalize_read_eps": 1e3, "value_scale": 1e3}, {}, {}),
    "equal shares of slots": ({**SHARES, "rule": "outer"}, {"tc_decay": 40}, {"rule": "outer", "value_scale": 0.25}),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits_that_are_a_plainer_memory(name, backend):
    options, values, plainer = LIMITS[name]
    config, weights = tensor_model(**options)
    for end, value in values.items():
        weights = changed(weights, end, value)
    single, needed = tensor_model(**plainer)
    kept = {name: weights[name][: len(w)] for name, w in needed.items()}  # of two timescales, the fast
    assert difference(run(config, weights, backend), run(single, kept, backend)) < 2e-5


def test_a_wedge_matrix_is_antisymmetric(backend):
    session = model_of("tensor-wedge", backend).session()
    session.feed(IDS)
    A = session.state.on_host().layers[0]["A"]
    assert difference(A, -A.swapaxes(-1, -2)) < 1e-6


def test_a_cache_that_is_not_full_is_full_attention(backend):
    for changes in (SINKS, IN_CACHE, WINDOW):
        config = replace(SMALL, **changes)
        ids, weights = IDS[: config.window + config.sinks], random_weights(config)
        want = run(SMALL, weights, backend, ids)
        assert difference(run(config, weights, backend, ids), want) < 1e-6


def test_in_cache_positions_depend_on_the_cache_alone(backend):
    """One layer: equal sinks and equal last W tokens, equal answer, whatever t is; not so with stored positions."""
    sinks, window = IDS[:3], IDS[-W:]
    short, long = (np.concatenate([sinks, np.resize(IDS[5:], n), window]) for n in (4, 401))
    for changes, same in ((IN_CACHE, True), (SINKS, False)):
        config = replace(SMALL, **changes, n_layers=1)
        a, b = (run(config, random_weights(config), backend, ids)[-1] for ids in (short, long))
        assert (difference(a, b) < 2e-5) == same


def test_angles_stay_exact_at_a_hundred_million():
    """Against 2π-reduced angles in 50 digits: float32 rounding is all that is lost."""
    positions, pi = [1, 10_000_000, 100_000_001], Decimal("3.141592653589793238462643383279502884197169399375105821")
    for base, scaling, factor in ((10_000, "none", 1), (500_000, "linear", 4)):
        cos, sin = angles(SimpleNamespace(positions=np.array(positions)), frequencies(64, base, scaling, factor), 32)
        with localcontext(prec=50):
            freq = [Decimal(base) ** (Decimal(-i) / 32) / factor for i in range(32)]
            exact = [[float(p * f % (2 * pi)) for f in freq] for p in positions]
        assert np.abs(cos - np.cos(exact)).max() < 1e-7
        assert np.abs(sin - np.sin(exact)).max() < 1e-7


SOURCES = ["full", "full-llama-gqa", "sinks", "infini-delta-gqa-key-conv", "tensor-everything"]
SIZES = [("full", {}), ("window", {"window": 5}), ("sinks", {"window": 5, "sinks": 2}), ("sinks", {})]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("mode", "sizes"), SIZES)
def test_any_model_runs_full_window_and_sinks(source, mode, sizes, backend):
    """The file's own memory is left out, weights, gate and β with it; plain Llama gets StreamingLLM's positions."""
    file = config_of(source)
    asked = with_memory(file, mode, **sizes)
    assert (asked.memory, asked.options, asked.key_conv) == (mode, None, file.key_conv)
    if mode not in ("full", file.memory):
        sinks, positions = 4 * (mode == "sinks"), "stored" if architecture(file.arch).OURS else "in-cache"
        window = sizes.get("window", file.window or DEFAULT_WINDOW)
        assert (asked.window, asked.sinks, asked.sink_positions) == (window, sizes.get("sinks", sinks), positions)
    weights = weights_of(file)
    kept = {name: w for name, w in weights.items() if name not in dropped(file, asked)}
    assert kept.keys() == plain(weights).keys()
    assert agrees(asked, kept, backend)


@pytest.mark.parametrize("name", ["infini-delta", "tc-per-token-gate"])
def test_a_file_of_another_memory_is_its_window(name, convert_golden, backend):
    config, weights = opened(convert_golden(name))
    model = load(convert_golden(name), backend, memory="window", window=9, cache_type="f32")
    got = model.session().feed(IDS, all_logits=True)
    want = oracle.logits(replace(config, memory="window", window=9, options=None), plain(weights), IDS)
    assert difference(got, want) < TOLERANCE[backend]


@pytest.mark.parametrize("name", ["tensor-delta", "infini-delta"])
def test_another_window_or_sinks_keep_the_mechanism(name, backend):
    asked = with_memory(config_of(name), window=11, sinks=2)
    assert asked == replace(config_of(name), window=11, sinks=2)
    assert agrees(asked, weights_of(asked), backend)


REFUSED = [
    ("full", {"memory": "tensor"}, "no weights for tensor"),
    ("tensor-delta", {"memory": "infini"}, "no weights for infini"),
    ("window", {"memory": "ring"}, "not one of full, window"),
    ("full", {"window": 4}, "full memory has no window"),
    ("sinks", {"memory": "window", "sinks": 2}, "has no sinks"),
    ("window", {"window": 0}, "window must be"),
]


@pytest.mark.parametrize(("source", "asked", "says"), REFUSED)
def test_what_the_weights_do_not_allow_is_refused(source, asked, says):
    with pytest.raises(TcinferError, match=says):
        with_memory(config_of(source), **asked)


@pytest.mark.parametrize("name", ["tensor-delta", "infini-delta"])
def test_missing_weights_are_refused_by_name(name, convert_golden):
    """A window model's file read as if it had a memory."""
    file = read(convert_golden("window"))
    config = replace(read_config(file), memory=config_of(name).memory, options=config_of(name).options)
    with pytest.raises(FileError, match=r"tensor 'blk\.0\.(tc|infini)_\w+(\.\w+)?' is missing"):
        bind(config, file.tensors)


def test_of_slots_that_are_equal_the_first_is_written_and_read(backend: str) -> None:
    """Ties must not depend on rounding, or the answer would depend on the chunking."""
    config = replace(SMALL, **tc(slots=3))
    model = build(config, backend, changed(weights_of(config), "tc_slot_keys", 1.0))
    at_once, singly = model.session(), model.session()
    want = at_once.feed(IDS, all_logits=True)
    np.testing.assert_allclose(np.stack([singly.feed(i) for i in IDS]), want, atol=1e-4)
    assert not at_once.state.on_host().layers[0]["A"][1:].any()
