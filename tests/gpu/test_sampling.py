"""The device's choice of an id, against the sampler it stands in for."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from host_device import HostDevice, host_device
from numpy.typing import NDArray

from tcinfer.errors import TcinferError
from tcinfer.kernels.cuda.program import CHOICES, HOW, PASS, constants
from tcinfer.kernels.plan import LOGITS, OUT_ROWS
from tcinfer.sampling import SAMPLERS, Sampling, on_device
from tcinfer.sampling.choose import Draws, sample

KERNELS = Path(__file__).resolve().parents[2] / "kernels" / "cuda"
SHARED = 1024 + 24720  # the desk, and what lies behind it
MAIN = """
KERNEL(1024, 1) choose_all(Words a, Words p) { choose(a, p, {(int)blockIdx.x, (int)gridDim.x, false}); }
KERNEL(1024, 1) lead_all(Words a, Words p) { leaders(a, p, {(int)blockIdx.x, (int)gridDim.x, false}); }
"""
FULL = np.finfo(np.float32).max


class Given:
    """In place of a generator: one number, and how often it was asked for."""

    def __init__(self, number: float) -> None:
        self.number, self.asked = number, 0

    def random(self) -> float:
        self.asked += 1
        return self.number


@cache
def source() -> str:
    texts = [(KERNELS / name).read_text() for name in ("machine.h", "common.h", "sampling.cu")]
    return "\n".join([constants(), *texts, MAIN])


def chosen(
    device: HostDevice,
    logits: NDArray[np.float32],
    hows: list[Sampling],
    draws: list[float],
    blocks: int = 1,
    threads: int = 128,
    skew: int = 0,
    led: bool = False,
) -> NDArray[np.int64]:
    """What the device chooses of logits [rows, V], which begin `skew` floats behind an aligned address; led: each block
    has looked at a part of the one row."""
    rows, V = logits.shape
    settings = np.array([[h.temperature, h.top_k, h.top_p, h.min_p, d] for h, d in zip(hows, draws, strict=True)])
    at = device.zeros(logits.nbytes + 4 * skew)
    how, out, a, p = (device.zeros(n) for n in (settings.nbytes, 8 * rows, 16, 8 * PASS))
    device.put(at.address + 4 * skew, logits)
    device.put(how.address, settings)
    device.put(out.address, np.full(rows, -2, np.int64))
    keys = device.zeros(8 * blocks) if led else None
    device.put(a.address, np.array([V, keys.address if keys else 0]))
    words = np.zeros(PASS, np.int64)
    words[[OUT_ROWS, LOGITS, CHOICES, HOW]] = rows, at.address + 4 * skew, out.address, how.address
    device.put(p.address, words)
    for name in ("lead_all", "choose_all") if led else ("choose_all",):
        device.launch(device.program(source()).kernel(name), a.address, p.address, blocks, threads, SHARED)
    device.check()
    return device.get(out.address, np.zeros(rows, np.int64))


def expected(logits: NDArray[np.float32], how: Sampling, draw: float) -> int:
    if not np.isfinite(logits).all():
        return -1
    return sample(logits, how, Draws(Given(draw)))  # type: ignore[arg-type]


def some_logits(rng: np.random.Generator, V: int) -> NDArray[np.float32]:
    """A row of logits: of a model's kind, or of one that finds mistakes."""
    x = rng.standard_normal(V) * 10 ** rng.uniform(-1, 1.5)
    kind = rng.integers(9)
    if kind == 0:
        x = np.round(x)  # many ties, among them of -0 and 0
    elif kind == 1:
        x = np.sort(x)
    elif kind == 2:
        x = np.full(V, x[0])
    elif kind == 3:
        x = rng.choice([-0.0, 0.0, 1e-45, -1e-45], V)
    elif kind == 4:
        x = rng.choice([-FULL, FULL, 0.0], V)
    elif kind == 5:
        x = rng.permutation(V) % 700 / 7.0
    elif kind == 6:
        x[rng.integers(V)] = rng.choice([np.nan, np.inf, -np.inf])
    return x.astype(np.float32)


def some_settings(rng: np.random.Generator, V: int) -> Sampling:
    """Settings of which the device knows all."""
    k = int(2 ** rng.uniform(0, 10.01))
    return Sampling(
        temperature=float(rng.choice([0, 1, 1e-3, 1e-300, 10 ** rng.uniform(-3, 0.7), rng.uniform(0.5, 1.5)])),
        top_k=int(rng.choice([k, 40, 1024, 0, 5000])) if V <= 1000 else min(k, 1024),
        top_p=float(rng.choice([1, 0, rng.random(), 0.95, 0.999])),
        min_p=float(rng.choice([0, 1, rng.random(), 0.05, 1e-6])),
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("V", [2, 50, 1000, 5000])
def test_the_device_chooses_as_the_sampler_does(V: int, seed: int) -> None:
    rng, device = np.random.default_rng([V, seed]), host_device(seed)
    for case in range(60):
        rows = int(rng.integers(1, 6))
        logits = np.stack([some_logits(rng, V) for _ in range(rows)])
        hows = [some_settings(rng, V) for _ in range(rows)]
        draws = [float(rng.choice([0, rng.random(), rng.random(), rng.random()])) for _ in range(rows)]
        got = chosen(device, logits, hows, draws, 1 + case % 3, (128, 256, 160)[case % 5 % 3], case % 4)
        assert got.tolist() == [expected(*row) for row in zip(logits, hows, draws, strict=True)]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_vocabulary_of_a_real_model(seed: int) -> None:
    V, rng = 50257, np.random.default_rng(seed)
    normal = rng.standard_normal(V) * 3
    few = np.where(np.arange(V) % 100, 1, 1.25)  # fewer than k above very many equal ones
    rows = [normal, normal, np.round(normal), np.zeros(V), -np.arange(V)[::-1] / 100, few, normal]
    logits = np.stack(rows).astype(np.float32)
    hows = [Sampling(top_k=k, top_p=1, min_p=0, temperature=2) for k in (40, 1024, 1024, 1000, 700, 1024)]
    hows.append(Sampling(temperature=0))
    draws = [*rng.random(5).tolist(), 0.999, 0.0]
    got = chosen(host_device(seed), logits, hows, draws, 2, 256)
    assert got.tolist() == [expected(*row) for row in zip(logits, hows, draws, strict=True)]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_blocks_that_look_at_parts_of_a_row(seed: int) -> None:
    rng, device = np.random.default_rng(seed), host_device(seed)
    for case in range(40):
        V = int(rng.choice([2, 60, 2100, 7000, 20011]))
        logits, how = some_logits(rng, V)[None], some_settings(rng, V)
        got = chosen(device, logits, [how], [0.4], (1, 3, 40, 100)[case % 4], 128, case % 3, led=True)
        assert got.tolist() == [expected(logits[0], how, 0.4)]


@pytest.mark.parametrize("number", [np.nan, -np.nan, np.inf, -np.inf])
def test_a_logit_that_is_not_finite(number: float) -> None:
    logits = np.zeros((7, 6), np.float32)
    for i in range(6):
        logits[i, i] = number
    hows = [Sampling(temperature=i % 2) for i in range(7)]
    assert chosen(host_device(), logits, hows, [0.0] * 7, skew=1).tolist() == [-1] * 6 + [0]


def test_every_candidate_is_drawn_as_often_as_it_is_likely() -> None:
    logits = np.log(np.array([1, 2, 3, 4], np.float32))
    draws = ((np.arange(100) + 0.5) / 100).tolist()
    how = Sampling(temperature=1, top_k=0, top_p=1, min_p=0)
    got = chosen(host_device(), np.tile(logits, (100, 1)), [how] * 100, draws, 3)
    assert np.bincount(got).tolist() == [10, 20, 30, 40]


def test_what_holds_exactly_the_mass_suffices_and_what_the_draw_reaches_exactly_is_passed() -> None:
    logits, draws = np.zeros((4, 4), np.float32), [0.75, 0.5, 0.25, 0.999]
    hows = [Sampling(top_k=0, top_p=1), Sampling(top_k=0, top_p=1), Sampling(top_k=0, top_p=1), Sampling(top_p=0.5)]
    got = chosen(host_device(), logits, hows, draws).tolist()
    assert got == [expected(*row) for row in zip(logits, hows, draws, strict=True)] == [3, 2, 1, 1]


def test_without_a_place_for_choices_nothing_happens() -> None:
    device = host_device()
    words, told = device.zeros(8 * PASS), np.zeros(PASS, np.int64)
    told[OUT_ROWS] = 3
    device.put(words.address, told)
    device.launch(device.program(source()).kernel("choose_all"), words.address, words.address, 1, 128, SHARED)


OFF = Sampling(temperature=1, top_k=0, top_p=1, min_p=0)
OTHERS: dict[str, Any] = {
    "repeat_penalty": 1.1,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "dry_multiplier": 0.8,
    "top_n_sigma": 1.0,
    "typical": 0.9,
    "xtc_probability": 0.5,
    "dynatemp_range": 0.1,
    "mirostat": 2,
    "logit_bias": ((0, 1.0),),
}


def test_what_the_device_is_asked_for() -> None:
    assert on_device(Sampling(), 50257)
    for name, value in OTHERS.items():
        assert not on_device(replace(Sampling(), **{name: value}), 50257), name
    assert on_device(Sampling(repeat_penalty=1.1, repeat_last_n=0), 50257)
    assert on_device(Sampling(dry_multiplier=1, dry_penalty_last_n=0), 50257)
    assert on_device(Sampling(xtc_probability=1, xtc_threshold=0.6), 50257)


@pytest.mark.parametrize(
    ("how", "vocab_size", "fits"),
    [
        (Sampling(top_k=1024), 50257, True),
        (Sampling(top_k=1025), 50257, False),
        (Sampling(top_k=0), 1024, True),
        (Sampling(top_k=5000), 1024, True),
        (Sampling(top_k=0), 1025, False),
        (Sampling(top_k=5000), 1025, False),
        (Sampling(temperature=0, top_k=0), 2**24, True),
        (Sampling(temperature=0, top_k=0), 2**24 + 1, False),
    ],
)
def test_the_device_has_room_for_1024_candidates(how: Sampling, vocab_size: int, fits: bool) -> None:
    assert on_device(how, vocab_size) == fits


def test_the_chain_must_come_to_the_same() -> None:
    assert on_device(Sampling(samplers="top_k;top_p;min_p;temperature"), 50257)
    assert on_device(Sampling(samplers="xtc;top_k;top_p;min_p;temperature;dry", dry_multiplier=0), 50257)
    assert on_device(Sampling(samplers="top_k;top_p;min_p", temperature=1), 50257)
    assert not on_device(Sampling(samplers="top_k;top_p;min_p"), 50257)
    assert not on_device(Sampling(samplers="top_p;top_k;min_p;temperature"), 50257)
    assert not on_device(Sampling(samplers="temperature;top_k;top_p;min_p"), 50257)
    assert not on_device(Sampling(samplers="top_p;min_p;temperature"), 50)
    assert on_device(Sampling(samplers="", temperature=1, top_k=0, top_p=1, min_p=0), 50)


def test_greedy_asks_for_nothing_but_penalties() -> None:
    cold = Sampling(temperature=0, samplers="top_p;dry;penalties", top_n_sigma=1, typical=0.5, dynatemp_range=1)
    assert on_device(cold, 50257)
    assert not on_device(replace(cold, repeat_penalty=1.1), 50257)
    assert not on_device(replace(cold, dry_multiplier=1), 50257)
    assert not on_device(replace(cold, logit_bias=((1, 1.0),)), 50257)
    assert on_device(replace(cold, repeat_penalty=1.1, mirostat=2), 50257)


def test_what_goes_to_the_device_needs_only_what_it_is_given() -> None:
    rng = np.random.default_rng(0)
    names = [f.name for f in fields(Sampling) if f.name in OTHERS]
    for _ in range(1500):
        chain = ";".join(SAMPLERS) if rng.random() < 0.5 else ";".join(rng.permutation(SAMPLERS)[: rng.integers(10)])
        V = int(rng.choice([3, 60]))
        others = {name: OTHERS[name] for name in names if rng.random() < 0.04}
        how = replace(some_settings(rng, V), samplers=chain, repeat_last_n=int(rng.choice([0, 8])), **others)
        if not on_device(how, V):
            continue
        bare = replace(OFF, **{name: getattr(how, name) for name in ("temperature", "top_k", "top_p", "min_p")})
        logits, recent, given = rng.standard_normal(V).astype(np.float32), rng.integers(V, size=9), Given(rng.random())
        got = sample(logits, how, Draws(given), recent)  # type: ignore[arg-type]
        assert given.asked == (how.temperature != 0)
        assert got == expected(logits, bare, given.number)


def test_bad_logits_cost_no_draw() -> None:
    given = Given(0.5)
    with pytest.raises(TcinferError):
        sample(np.array([0, np.nan], np.float32), Sampling(), Draws(given))  # type: ignore[arg-type]
    assert given.asked == 0
