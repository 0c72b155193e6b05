"""The CUDA backend as a whole, on the stand-in: the same answers, and what is asked of a device for them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import SHAKESPEARE, SMALL, build, but_slow
from host_device import HostDevice, backend, device, host_device, use  # noqa: F401
from plans import normal, random_matrix
from programs import OnRecord
from test_engine import at_many_positions, other_shape
from test_memory import config_of, difference, feed, weights_of

import tcinfer
from tcinfer.api import Session
from tcinfer.engine import cuda
from tcinfer.errors import TcinferError
from tcinfer.generation import Request
from tcinfer.kernels.cuda.plan import Pass
from tcinfer.kernels.cuda.program import SWIGLU
from tcinfer.kernels.cuda.recorder import Recorder
from tcinfer.kernels.plan import GRID, NONE, ONE, PROMPT, barriers
from tcinfer.kernels.reference import pointwise
from tcinfer.kernels.reference.quants import KINDS, Kind
from tcinfer.measure import speed as bench
from tcinfer.sampling import Sampling
from tcinfer.sampling.choose import Draws
from tcinfer.sequence import advance

IDS = np.random.default_rng(1).integers(0, SMALL.vocab_size, 60)
EVERYTHING = "tensor-everything"
GREEDY, WARM = Sampling(temperature=0), Sampling(temperature=0.9, top_k=12, top_p=0.9, min_p=0.02, seed=4)


class Counted(HostDevice):
    """Counts what is asked of the device."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated = self.launched = self.fetched = 0

    def zeros(self, nbytes: int) -> Any:
        self.allocated += 1
        return super().zeros(nbytes)

    def launch(self, *arguments: Any, **options: Any) -> None:
        self.launched += 1
        super().launch(*arguments, **options)

    def get(self, address: int, array: np.ndarray) -> np.ndarray:
        self.fetched += array.nbytes
        return super().get(address, array)


@pytest.fixture
def counted(device: HostDevice, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:  # noqa: F811
    """Backend "cuda" on a device that counts."""
    made = Counted()
    made.programs = device.programs
    use(made, monkeypatch)
    yield made
    made.check()


def ids_of(session: Session, count: int, sampling: Sampling) -> list[int]:
    return [piece.id for piece in session.generate(IDS[:20], count, sampling)]


@pytest.mark.parametrize("how", [GREEDY, WARM], ids=["greedy", "warm"])
@pytest.mark.parametrize("name", ["sinks-in-cache", "infini-delta", EVERYTHING])
def test_a_token_is_one_launch_nothing_is_allocated_and_only_its_id_comes_back(
    name: str, how: Sampling, counted: Counted
) -> None:
    config = config_of(name)
    session = build(config, "cuda", weights_of(config)).session()
    pieces = session.generate(IDS[:20], 20, how)
    next(pieces)
    before = counted.launched, counted.allocated, counted.fetched
    got = [next(pieces).id for _ in range(10)]
    assert (counted.launched - before[0], counted.allocated, counted.fetched - before[2]) == (10, before[1], 80)
    assert got == ids_of(build(config, "numpy", weights_of(config)).session(), 11, how)[1:]


SAMPLINGS = [
    replace(GREEDY, seed=1),
    WARM,
    replace(WARM, top_k=0, samplers="top_p;temperature", min_p=0.0),
    replace(WARM, repeat_penalty=1.3),  # not on the device: logits are fetched
    replace(WARM, mirostat=2),
    replace(GREEDY, presence_penalty=0.5, seed=1),
]


@pytest.mark.parametrize("how", SAMPLINGS, ids=range(len(SAMPLINGS)))
def test_the_same_seed_gives_the_same_ids_and_leaves_the_same_draws(how: Sampling, backend: str) -> None:  # noqa: F811
    config = config_of("tensor-delta")
    sessions = [build(config, b, weights_of(config)).session() for b in ("numpy", backend)]
    want, got = (ids_of(session, 30, how) for session in sessions)
    assert got == want
    a, b = (session.draws for session in sessions)
    assert isinstance(a, Draws)
    assert isinstance(b, Draws)
    assert a.words()[:6] == b.words()[:6]
    more = replace(how, seed=-1)
    a, b = ([piece.id for piece in session.generate(None, 5, more)] for session in sessions)
    assert a == b


def test_a_banned_text_is_avoided_with_the_ids_of_the_device(backend: str) -> None:  # noqa: F811
    texts = []
    for b in ("numpy", backend):
        pieces = tcinfer.load(SHAKESPEARE, backend=b).session().generate("ROMEO:", 40, seed=3, banned=["e"])
        texts.append("".join(piece.text for piece in pieces))
    want, got = texts
    assert "e" not in got
    assert got == want


def test_logits_wait_on_the_device_and_are_rescued_before_they_are_overwritten(counted: Counted) -> None:
    model = build(replace(SMALL, memory="window", window=7), "cuda")
    one, other = model.session(), model.session()
    ids_of(one, 3, GREEDY)
    advance([one], np.array([5]), [GREEDY])
    assert isinstance(one._logits, cuda.Later)
    fetched = counted.fetched
    other.feed(IDS[:3])
    assert counted.fetched - fetched == 2 * 4 * SMALL.vocab_size  # its own, and those of the first
    reference = build(replace(SMALL, memory="window", window=7), "numpy").session()
    ids = ids_of(reference, 3, GREEDY)
    assert difference(np.asarray(one.logits), reference.feed(5)) < 1e-5
    assert ids


def test_fork_save_and_load(tmp_path: Any, backend: str) -> None:  # noqa: F811
    """From a device to a file, to another backend, and back: a copy goes on to the bit on the device."""
    config = config_of(EVERYTHING)
    model, other = (build(config, b, weights_of(config)) for b in (backend, "numpy"))
    session = model.session()
    session.feed(IDS[:30])
    fork = session.fork()
    session.save(tmp_path / "s.tcs")
    want = feed(session, IDS[30:50], [1, 1, 10])
    for copy in (fork, model.load_session(tmp_path / "s.tcs")):
        np.testing.assert_array_equal(feed(copy, IDS[30:50], [1, 1, 10]), want)
    elsewhere = other.load_session(tmp_path / "s.tcs")
    assert difference(feed(elsewhere, IDS[30:50], []), want) < 1e-4
    elsewhere.save(tmp_path / "t.tcs")
    back = model.load_session(tmp_path / "t.tcs")
    assert difference(back.feed(IDS[50:52]), elsewhere.feed(IDS[50:52])) < 1e-4
    assert back.nbytes == elsewhere.nbytes


@pytest.mark.parametrize("name", ["full-llama-gqa", "sinks-in-cache", "infini-delta", EVERYTHING])
def test_many_sessions_at_once(name: str, backend: str) -> None:  # noqa: F811
    config = config_of(name)
    reference, model = (build(config, b, weights_of(config)) for b in ("numpy", backend))
    counts = [0, 1, 6, 7, 9, 30, 141, 3, 2, 11]
    want, got = (at_many_positions(m, counts) for m in (reference, model))
    for step in range(2):
        tokens = IDS[10 * step : 10 * step + 10]
        assert difference(model.step_many(got, tokens), reference.step_many(want, tokens)) < 1e-4
    for how in (WARM, GREEDY):  # the first seeds the draws
        ids = [m.step_many(s, tokens, sampling=how).tolist() for m, s in ((reference, want), (model, got))]
        assert ids[0] == ids[1]
    assert difference(np.stack([s.logits for s in got]), np.stack([s.logits for s in want])) < 1e-4


def test_more_sessions_and_longer_prompts_than_a_pass_takes(
    backend: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda, "PASS_TOKENS", 32)
    config = config_of("tensor-delta")
    reference, model = (build(config, b, weights_of(config)) for b in ("numpy", backend))
    ids = np.resize(IDS, 75)
    want, got = (m.session().feed(ids, all_logits=True) for m in (reference, model))
    assert difference(got, want) < 1e-4
    tokens = np.resize(IDS, 40)
    want, got = (m.step_many([m.session() for _ in tokens], tokens) for m in (reference, model))
    assert difference(got, want) < 1e-4


def test_weights_that_overflow_are_told(backend: str) -> None:  # noqa: F811
    config = config_of("window")
    weights = {name: w * np.float32(1e30) if "ffn" in name else w for name, w in weights_of(config).items()}
    model = build(config, backend, weights)
    session = model.session()
    with pytest.raises(TcinferError, match="not finite"):
        ids_of(session, 5, GREEDY)
    with pytest.raises(TcinferError, match="not finite"):
        model.step_many([model.session()], [1], sampling=GREEDY)


QUICK = (Kind.Q8_0,)  # of the others each has its own program to compile


@pytest.mark.parametrize(
    "kind",
    [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS],
    ids=[kind.name for kind in KINDS],
)
@pytest.mark.parametrize("layer", [False, True], ids=["rms", "layer"])
def test_weights_of_every_kind(kind: Kind, layer: bool, device: HostDevice) -> None:  # noqa: F811
    """Embedding, norm and head: a token's product keeps float32, those of many rows round both sides to halves."""
    columns, V, eps = (512, 70, 1e-5) if kind.name.endswith("_K") else (416, 70, 1e-5)
    w, (weight, bias) = random_matrix(kind, V, columns), normal(3, 2, columns)
    plan = Recorder(8, device)
    plan.linear(plan.norm(plan.embed(w, None), weight, bias, eps, layer), plan.stored(w), head=True)
    plan.finish()
    room, ids = device.zeros(10_000), np.array([3, 69, 0, 3, 41])
    rows = w.rows(ids)
    normed = pointwise.layer_norm(rows, weight, bias, eps) if layer else pointwise.rms_norm(rows, weight, eps)
    want = normed.astype(np.float64) @ w.values.T.astype(np.float64)
    for count, pass_kind in ((1, ONE), (5, PROMPT)):
        logits = device.zeros(4 * V * count)
        told = Pass(count, 1, 1, room.address)
        told.tell(out_rows=count, logits=logits.address)
        told.ids[:] = ids[:count]
        device.put(room.address, told.data)
        plan.run_pass(pass_kind, room.address)
        got = device.get(logits.address, np.empty((count, V), np.float32))
        exact = count == 1 or kind == Kind.F32
        assert np.linalg.norm(got - want[:count]) < (2e-6 if exact else 1e-3) * np.linalg.norm(want[:count])


def test_rows_that_products_compute_are_there_for_others_too(device: HostDevice) -> None:  # noqa: F811
    """A mechanism may want the normed rows themselves: asking for their address writes them out."""
    w, weight = random_matrix(Kind.Q8_0, 40, 64), normal(3, 64)
    plan = Recorder(8, device)
    h = plan.norm(plan.embed(w, None), weight, None, 1e-5, False)
    address = h.address
    plan.finish()
    room, ids = device.zeros(10_000), np.array([3, 39, 0])
    for count, pass_kind in ((1, ONE), (3, PROMPT)):
        told = Pass(count, 1, 1, room.address)
        told.ids[:] = ids[:count]
        device.put(room.address, told.data)
        plan.run_pass(pass_kind, room.address)
        got = device.get(address, np.empty((count, 64), np.float32))
        assert difference(got, pointwise.rms_norm(w.rows(ids[:count]), weight, 1e-5)) < 1e-6


@pytest.mark.parametrize("name", ["full-llama-gqa", "sinks-in-cache-llama-gqa-linear", "infini-delta", EVERYTHING])
def test_a_ring_of_16_bits_is_the_references(name: str, backend: str) -> None:  # noqa: F811
    """Prompts then go through tensor cores, which round queries and weights of keys to halves."""
    config = other_shape(name, cache_type="f16")
    want, got = (build(config, b, weights_of(config)).session() for b in ("numpy", backend))
    assert difference(feed(got, IDS, [1, 2, 20]), feed(want, IDS, [1, 2, 20])) < 5e-3


@pytest.mark.parametrize("head_dim", [5, 320])
def test_heads_that_tensor_cores_do_not_take(head_dim: int, backend: str) -> None:  # noqa: F811
    """An odd number of channels, or more than there is room for, goes through float32."""
    config = other_shape("full-learned", head_dim=head_dim, cache_type="f16")
    want, got = (build(config, b, weights_of(config)).session() for b in ("numpy", backend))
    assert difference(feed(got, IDS[:40], [9, 1, 1]), feed(want, IDS[:40], [9, 1, 1])) < 5e-3


def test_sessions_of_several_passes_leave_their_logits_on_the_device(
    counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "PASS_TOKENS", 8)
    model = build(SMALL, "cuda")
    sessions, tokens = [model.session() for _ in range(20)], IDS[:20]
    for _ in range(2):
        fetched = counted.fetched
        tokens = model.step_many(sessions, tokens, sampling=GREEDY)
        assert counted.fetched - fetched == 8 * 20  # the ids
    reference = build(SMALL, "numpy").session()
    reference.feed(IDS[17])
    assert difference(sessions[17].logits, reference.feed(int(np.argmax(reference.logits)))) < 1e-5


OTHERS = ("sinks-in-cache-qwen2-key-conv", "infini-delta-gqa-key-conv")


@pytest.mark.parametrize("name", but_slow((EVERYTHING, *OTHERS), *OTHERS))
def test_neither_order_nor_number_of_blocks_shows_in_the_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in runs threads in another order for each seed: a missing barrier would show."""
    config = other_shape(name, cache_type="f16")
    wanted: list[np.ndarray] = []
    for seed, multiprocessors in ((0, 3), (1, 3), (2, 3), (3, 1), (4, 5)):
        other = HostDevice(seed)
        other.multiprocessors = multiprocessors
        use(other, monkeypatch)
        model = build(config, "cuda", weights_of(config))
        session = model.session()
        got = [feed(session, IDS, [1, 1, 30, 1, 9])]
        together = at_many_positions(model, [3, 9, 30])
        got += [model.step_many(together, IDS[:3]), session.state.on_host().buffer]
        wanted = wanted or got
        for a, b in zip(got, wanted, strict=True):
            np.testing.assert_array_equal(a, b, f"seed {seed}, {multiprocessors} blocks")


def test_a_model_that_is_dropped_gives_its_memory_back_at_once(device: HostDevice, backend: str) -> None:  # noqa: F811
    """Not when Python next looks for cycles: it does not know how much of a GPU hangs on one."""
    gc.collect()
    before = len(device.buffers)
    gc.disable()
    try:
        model = build(SMALL, backend)
        session = model.session()
        ids_of(session, 5, GREEDY)
        assert len(device.buffers) > before
        del model, session
        assert len(device.buffers) == before
    finally:
        gc.enable()


@pytest.mark.parametrize("window", [200, 2600], ids=["put together by the product", "by a step"])
@pytest.mark.parametrize("memory", ["sinks", "infini-delta"])
@pytest.mark.parametrize("cache_type", ["f16", "f32"])
def test_keys_of_a_token_are_divided_among_blocks(
    memory: str, window: int, cache_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = host_device()
    other.multiprocessors = 13
    use(other, monkeypatch)
    config = replace(config_of(memory), window=window, cache_type=cache_type)
    want, got = (build(config, b, weights_of(config)).session() for b in ("numpy", "cuda"))
    want.feed(np.resize(np.arange(50), window + 31))
    got = Session.from_bytes(got.model, want.to_bytes())  # feeding so much takes the stand-in long
    for token in range(5):
        a, b = (session.feed([token]) for session in (want, got))
        assert np.abs(a - b).max() < (1e-4 if cache_type == "f32" else 2e-3) * np.abs(a).max()


def test_more_weights_for_a_block_than_its_shared_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """On its way every chunk comes when its warp asks for it, none in the place of another that nobody has read."""
    other = host_device(seed=3)
    other.multiprocessors, other.shared_bytes, other.capability = 1, 100_000, (8, 9)
    use(other, monkeypatch)
    config = replace(SMALL, d_model=64, head_dim=16, rope_dim=16, d_ff=4096, vocab_size=301)
    want, got = (build(config, b, kind=Kind.Q8_0).session() for b in ("numpy", "cuda"))
    for token in range(4):
        a, b = (session.feed([token]) for session in (want, got))
        assert np.abs(a - b).max() < 1e-5 * np.abs(a).max()


@pytest.mark.parametrize(
    ("kind", "value", "products"), [(Kind.Q8_0, Kind.Q8_0, 4), (Kind.Q8_0, Kind.Q4_0, 5), (Kind.F32, Kind.F32, 4)]
)
def test_neighbours_are_one_step(kind: Kind, value: Kind, products: int, backend: str) -> None:  # noqa: F811
    """Of a token's layer: queries, keys and values of one kind; gate and up, whose activation costs no step; push puts
    key and value into the ring. The logits are what they were."""
    config = replace(config_of("window-llama-gqa-linear"), d_ff=96)
    kinds = {"attn_v.weight": value}
    of_kind = lambda name: kinds.get(name.split(".", 2)[-1], kind)  # noqa: E731
    models = [build(config, b, weights_of(config), kind=of_kind) for b in ("numpy", backend)]
    steps = [step.operator.name for step in models[1].engine._plan.steps if step.when & ONE]
    assert steps.count("linear_one") == products * config.n_layers + 1
    assert steps.count("push") == config.n_layers
    assert "insert" not in steps
    want, got = (feed(model.session(), IDS, [1] * 20) for model in models)
    off = np.abs(want - got).max(1) / np.abs(want).max()
    assert off[:20].max() < 1e-5
    assert off.max() < 1e-2  # halves


def test_bench_measures_a_gpu_by_the_same_table(backend: str) -> None:  # noqa: F811
    model = tcinfer.load(SHAKESPEARE, backend=backend)
    report = bench.run("shakespeare", model, prompt=8, tokens=3, rounds=1)
    assert report.threads == 0
    assert report.tier == HostDevice.name
    assert report.bandwidth > 0
    assert report.rows[0].median("decode") > 0
    head, *table = report.markdown().splitlines()
    assert f"{HostDevice.name}; copies " in head
    assert "threads," not in head
    assert len(table) == 4
    with pytest.raises(TcinferError, match="runs llama"):
        bench.run("shakespeare", model, peer=True)


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind not in (Kind.F16, Kind.BF16)], ids=lambda kind: kind.name
)
def test_a_wide_model_has_room_on_a_small_card(kind: Kind) -> None:
    """99 KB of shared memory for a block, as GPUs of 8.6 and 8.9 have, and rows of 14,336 columns."""
    other = OnRecord()
    other.shared_bytes, other.capability = 101_376, (8, 9)
    plan = Recorder(1, other)
    weights = random_matrix(kind, 16, 14336)
    plan.linear(plan.rows(14336), plan.stored(weights))
    plan.finish()
    assert plan.takers >= 4


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_few_slots_and_tiles_that_are_left_over(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks may come in any order, and still none is taken for the one that has its slot two turns later."""
    other = host_device(seed)
    other.multiprocessors, other.shared_bytes, other.capability = 3, 101_376, (8, 9)
    use(other, monkeypatch)
    config = replace(SMALL, n_layers=1, d_model=64, head_dim=16, rope_dim=16, d_ff=8192, vocab_size=301)
    want, got = (build(config, b, kind=Kind.Q8_0).session() for b in ("numpy", "cuda"))
    for token in range(2):
        a, b = (session.feed([token]) for session in (want, got))
        assert np.abs(a - b).max() < 1e-5 * np.abs(a).max()


def test_products_that_add_in_turn_share_blocks_only_side_by_side() -> None:
    plan = Recorder(1, OnRecord())
    x, z, y = plan.rows(64), plan.rows(64), plan.rows(64)
    w = [random_matrix(Kind.Q8_0, 64, 64, seed=i) for i in range(4)]
    plan.linear(x, w[0], into=y), plan.linear(x, w[1], into=y), plan.linear(z, w[2]), plan.linear(x, w[3], into=y)
    plan.finish()
    assert barriers(plan, [step for step in plan.steps if step.when & ONE]) == [NONE, NONE, GRID, NONE]


def test_nothing_joins_a_pair() -> None:
    plan = Recorder(1, OnRecord())
    x, w = plan.rows(64), [random_matrix(Kind.Q8_0, 64, 64, seed=i) for i in range(3)]
    gate, up = plan.linear(x, w[0]), plan.linear(x, w[1])
    assert plan.gated(gate, up, "silu") is gate
    plan.linear(x, w[2])
    plan.finish()
    assert [step.arguments["pair"] for step in plan.steps if step.operator.name == "linear_one"] == [SWIGLU, 0]


@pytest.mark.parametrize("mixed", [False, True], ids=["chosen there", "some fetched"])
def test_many_requests_are_what_each_is_alone(mixed: bool, backend: str) -> None:  # noqa: F811
    config = config_of("tensor-delta")
    hows = [
        GREEDY,
        WARM,
        replace(WARM, repeat_penalty=1.3) if mixed else replace(WARM, seed=9),
        replace(GREEDY, seed=1),
    ]
    requests = [Request(IDS[i : i + 5 + 9 * i], 12, how) for i, how in enumerate(hows)]
    want = [
        [piece.id for piece in build(config, "numpy", weights_of(config)).session().generate(r.prompt, 12, r.sampling)]
        for r in requests
    ]
    with build(config, backend, weights_of(config)).scheduler() as scheduler:
        handles = [scheduler.submit(request) for request in requests]
        assert [handle.result(120).ids for handle in handles] == want
