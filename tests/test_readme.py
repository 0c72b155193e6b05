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
COMMANDS = [line for block in re.findall(r"```console\n(.*?)```", README, re.S) for line in block.splitlines()]


PAGE = "In the morning the rain was over, and they went down to the river.\n\n"


@pytest.mark.parametrize("line", [c for c in COMMANDS if c.startswith("tcinfer ")])
def test_commands_run(line: str, tmp_path: Path) -> None:
    words = shlex.split(line, comments=True)[1:]
    if words[0] == "convert" and "--help" not in words:
        shutil.copy(shared("golden", "tc-delta", "ckpt.pt"), tmp_path)
        (tmp_path / "meta.pkl").write_bytes(_character_table())
        shutil.copytree(shared("models", "stories260K"), tmp_path / "my-llama-folder")
    if "model.gguf" in words and words[0] != "convert":
        shutil.copy(SHAKESPEARE, tmp_path / "model.gguf")
    (tmp_path / "tale.txt").write_text(PAGE * 20)
    env = os.environ | {"XDG_STATE_HOME": str(tmp_path)}
    if "tale.tcs" in words and words[0] != "absorb":
        assert tcinfer("absorb", "-s", "tale.tcs", "-f", "tale.txt", cwd=tmp_path, env=env).returncode == 0
    done = tcinfer(*words, cwd=tmp_path, env=env, input="Who are you?\n" if words[0] == "chat" else "")
    assert done.returncode == 0, done.stderr
    assert done.stdout or words[0] == "absorb"


def test_what_the_bundled_model_remembers(tmp_path: Path) -> None:
    (block,) = re.findall(r"```text\n(printf .*?chat -q --temp 0\n)(.*?)```", README, re.S)
    (tmp_path / "tale.txt").write_text(PAGE * 30)
    env = os.environ | {"XDG_STATE_HOME": str(tmp_path), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
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
    rows = re.findall(r"^\| ([\d,]+) \| (.*) \|$", README.split("<!-- context table -->")[1], re.M)
    assert len(rows) >= 3
    states = {cells.split(" | ")[3] for _, cells in rows}  # the Tensor Cache's
    assert states == {f"{tcinfer_package.load(backend='numpy').session().nbytes / 1e6:,.1f} MB"}


def test_every_file_that_is_linked_is_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
