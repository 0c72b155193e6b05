"""The README says what is so: its commands run, its help texts are the commands' own, its Python works."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, shared, tcinfer

README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```console\n(.*?)```", README, re.S) for line in block.splitlines()]


@pytest.mark.parametrize("line", [c for c in COMMANDS if c.startswith("tcinfer ")])
def test_commands_run(line: str, tmp_path: Path) -> None:
    words = shlex.split(line, comments=True)[1:]
    if words[0] == "convert" and "--help" not in words:
        shutil.copy(shared("golden", "tc-delta", "ckpt.pt"), tmp_path)
        (tmp_path / "meta.pkl").write_bytes(_character_table())
        shutil.copytree(shared("models", "stories260K"), tmp_path / "my-llama-folder")
    if "model.gguf" in words and words[0] != "convert":
        shutil.copy(ROOT / "models" / "shakespeare.gguf", tmp_path / "model.gguf")
    (tmp_path / "play.txt").write_text("First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 20)
    env = os.environ | {"XDG_STATE_HOME": str(tmp_path)}
    if "play.tcs" in words and words[0] != "absorb":
        assert tcinfer("absorb", "-s", "play.tcs", "-f", "play.txt", cwd=tmp_path, env=env).returncode == 0
    done = tcinfer(*words, cwd=tmp_path, env=env, input="ROMEO\n" if words[0] == "chat" else "")
    assert done.returncode == 0, done.stderr
    assert done.stdout or words[0] == "absorb"


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
    assert out.getvalue().endswith(" 327744\n")


def test_the_table_of_memory_against_context_is_there() -> None:
    rows = re.findall(r"^\| ([\d,]+) \| (.*) \|$", README.split("<!-- context table -->")[1], re.M)
    assert len(rows) >= 3
    assert len({cells.split(" | ")[3] for _, cells in rows}) == 1  # the Tensor Cache's state


def test_every_file_that_is_linked_is_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
