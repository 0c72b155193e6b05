"""The script that checks and measures a GPU, run once with the stand-in in its place: each section does its work."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from host_device import host_device
from measure_gpu import ended

SCRIPT = Path(__file__).with_name("measure_gpu.py")
SECTIONS = ("golden", "decode", "steps", "sessions", "prompt", "torch", "long", "sanitize", "profile")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_every_section_on_the_stand_in(tmp_path: Path) -> None:
    host_device()  # or skip
    done = run("--stand-in", "--json", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout
    _, table = done.stdout.split("| | what | figure | wanted |")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert all(len(row) == 4 and row[2] for row in cells)
    assert list(dict.fromkeys(row[0] for row in cells)) == list(SECTIONS)
    facts = json.loads((tmp_path / "out.json").read_text())["facts"]
    rows = [[fact[name] for name in ("section", "what", "figure", "wanted")] for fact in facts if "section" in fact]
    assert rows == cells


def test_where_there_is_no_gpu_every_section_says_so() -> None:
    done = run("decode", "long")
    if "ModuleNotFoundError: No module named 'cupy'" not in done.stdout and "Unavailable" not in done.stdout:
        pytest.skip("there is a GPU")
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    rows = done.stdout.splitlines()[-2:]
    assert [row.split("|")[1].strip() for row in rows] == ["decode", "long"]
    assert all("FAILED: " in row for row in rows)


def test_what_hangs_is_ended_with_all_that_it_started() -> None:
    inner = "import time; print(1, flush=True); time.sleep(60)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    started = time.monotonic()
    assert ended([sys.executable, "-c", outer], 2, keep=True) == ("1\n", "ended after 2 s")
    assert time.monotonic() - started < 20


def test_a_section_that_is_not_there() -> None:
    done = run("nothing")
    assert done.returncode == 2
    assert "no section nothing" in done.stderr


def test_what_a_section_compiles_is_known_without_a_gpu(tmp_path: Path) -> None:
    told = (
        "import sys, json; sys.path.insert(0, sys.argv[1]); import importable; from pathlib import Path\n"
        "from programs import cubin_of, recorded\n"
        "texts = [recorded(names, Path(sys.argv[2])) for names in (['long'], ['sessions', 'long'])]\n"
        "print(json.dumps([[[cubin_of(Path(), text).name, together] for text, together in some] for some in texts]))"
    )  # in a process of its own: every model in it is of the device that records
    command = [sys.executable, "-c", told, str(SCRIPT.parent), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    long, both = json.loads(done.stdout)
    assert [together for _, together in long] == [True, False]  # the bundled model's
    assert len({name for name, _ in long}) == 2
    assert len(both) > 2
    assert all(text in both for text in long)
