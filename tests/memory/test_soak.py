"""A long stream: the state's bytes and the process's memory stay what they are."""

from __future__ import annotations

import time

import numpy as np
import psutil
import pytest
from conftest import small

import tcinfer
from tcinfer.memory import infini, tensor_cache

TOKENS, SETTLED, LIMIT = 100_000, 5_000, 4 * 2**20  # tokens, tokens, bytes


def stream(model: tcinfer.Model, step: int) -> tuple[int, list[float]]:
    """Feed TOKENS random ids, `step` at a time; growth of resident memory after SETTLED, and seconds by tenth."""
    session, process = model.session(), psutil.Process()
    rng = np.random.default_rng(0)
    size, settled, marks = session.nbytes, 0, [time.monotonic()]
    while session.position < TOKENS:
        session.feed(rng.integers(0, model.config.vocab_size, step))
        assert session.nbytes == size
        if not settled and session.position >= SETTLED:
            settled = process.memory_info().rss
        if session.position % (TOKENS // 10) == 0:
            marks.append(time.monotonic())
    assert np.isfinite(session.feed(1)).all()
    return process.memory_info().rss - settled, np.diff(marks).tolist()


@pytest.mark.slow
def test_100_000_tokens_one_by_one_through_the_bundled_model() -> None:
    growth, tenths = stream(tcinfer.load(), 1)
    print(f"resident memory +{growth:,} bytes; seconds for each 10,000 tokens: {[round(t, 1) for t in tenths]}")
    assert growth < LIMIT
    assert np.median(tenths[-3:]) < 1.5 * np.median(tenths[1:4])


@pytest.mark.slow
@pytest.mark.parametrize(
    "memory",
    [
        {"memory": "window", "window": 64},
        {"memory": "sinks", "window": 64, "sinks": 4, "sink_positions": "in-cache"},
        {"memory": "infini", "window": 64, "options": infini.Options()},
        {"memory": "tensor", "window": 64, "options": tensor_cache.Options(slots=2, token_rate=True), "key_conv": 2},
    ],
    ids=lambda m: m["memory"],
)
def test_100_000_tokens_in_a_prompt(memory: dict, backend: str) -> None:
    growth, _ = stream(small(backend, **memory), 250)
    assert growth < LIMIT
