"""Memory and speed against context, full cache beside Tensor Cache: prints the table that docs/speed.md shows.

    python benchmarks/measure_context.py [CONTEXT ...]

Each figure is of a process of its own: bytes of state, resident memory beyond what the loaded model takes, and
the median time of one more token.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

CONTEXTS = (1_000, 4_000, 16_000, 32_000)
MODES = ("full", "tensor")


def measure(memory: str, context: int) -> dict[str, float]:
    import numpy as np
    import psutil

    import tcinfer

    session = tcinfer.load(memory=memory).session()
    ids = np.random.default_rng(0).integers(0, session.model.config.vocab_size, context)
    for i in ids[:4]:
        session.feed(i)
    before = psutil.Process().memory_info().rss
    session.feed(ids[4:])
    times = []
    for i in ids[:100]:
        started = time.perf_counter()
        session.feed(i)
        times.append(time.perf_counter() - started)
    grown = psutil.Process().memory_info().rss - before
    return {"state": session.nbytes, "resident": grown, "token": float(np.median(times))}


def main() -> None:
    contexts = [int(a) for a in sys.argv[1:]] or CONTEXTS
    print("| context | " + " | ".join(f"{m}: state | resident | ms/token" for m in MODES) + " |")
    print("|---:|" + "---:|---:|---:|" * len(MODES))
    for context in contexts:
        cells = []
        for memory in MODES:
            command = [sys.executable, __file__, "--one", memory, str(context)]
            m = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
            cells += [f"{m['state'] / 1e6:,.1f} MB", f"{m['resident'] / 1e6:,.1f} MB", f"{m['token'] * 1e3:.2f}"]
        print(f"| {context:,} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(sys.argv[2], int(sys.argv[3]))))
    else:
        main()
