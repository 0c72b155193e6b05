"""Decoding speed beside llama.cpp on the same file, interleaved in one process: medians and their ratio.

    python tests/measure_peer.py [MODEL.gguf]        (SmolLM2 where it is installed)

Both with 2 threads; llama.cpp with and without flash attention, the better of the two counts. Needs the extra `peer`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np

ROUNDS, TOKENS, THREADS, DEPTH = 5, 20, 2, 100


def main() -> None:
    import llama_cpp
    from conftest import smollm2

    import tcinfer

    path = sys.argv[1] if len(sys.argv) > 1 else str(smollm2())
    session = tcinfer.load(path, memory="full", threads=THREADS).session()
    start = np.arange(100, 100 + DEPTH).tolist()
    session.feed(start)
    runs: dict[str, Callable[[], object]] = {"tcinfer": lambda: session.feed(100)}
    for flash in (False, True):
        peer = llama_cpp.Llama(path, n_ctx=2048, n_threads=THREADS, verbose=False, flash_attn=flash)
        peer.eval(start)
        runs[f"llama.cpp, flash_attn={flash}"] = lambda peer=peer: peer.eval([100])
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, step in runs.items():
            for _ in range(TOKENS):
                started = time.perf_counter()
                step()
                times[name].append(time.perf_counter() - started)
    speed = {name: 1 / float(np.median(t)) for name, t in times.items()}
    for name, tokens in speed.items():
        print(f"{name}: {tokens:.1f} tokens/s")
    best = max(tokens for name, tokens in speed.items() if name != "tcinfer")
    print(f"ratio to the better: {speed['tcinfer'] / best:.2f}")


if __name__ == "__main__":
    main()
