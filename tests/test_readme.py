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


@pytest.mark.parametrize("command", ["generate", "convert", "bench"])
def test_help_texts_are_the_commands_own(command: str) -> None:
    shown = re.search(rf"<!-- help: {command} -->\n```text\n(.*?)```", README, re.S)
    assert shown is not None
    env = os.environ | {"COLUMNS": "100"}
    assert shown[1] == tcinfer(command, "--help", env=env).stdout


@pytest.mark.parametrize("line", [c for c in COMMANDS if c.startswith("tcinfer ")])
def test_commands_run(line: str, tmp_path: Path) -> None:
    words = shlex.split(line, comments=True)[1:]
    if words[0] == "convert" and "--help" not in words:
        shutil.copy(shared("golden", "tc-delta", "ckpt.pt"), tmp_path)
        (tmp_path / "meta.pkl").write_bytes(_character_table())
        shutil.copytree(shared("models", "stories260K"), tmp_path / "my-llama-folder")
    if words[:2] == ["inspect", "model.gguf"]:
        shutil.copy(ROOT / "models" / "shakespeare.gguf", tmp_path / "model.gguf")
    done = tcinfer(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def _character_table() -> bytes:
    import pickle

    chars = [chr(32 + i) for i in range(96)]
    return pickle.dumps({"vocab_size": 96, "itos": dict(enumerate(chars)), "stoi": {c: i for i, c in enumerate(chars)}})


def test_the_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for line in COMMANDS:
        if line.startswith("make "):
            assert re.search(rf"^{line.split()[1]}:", makefile, re.M)


def test_the_python_example_runs() -> None:
    code = re.search(r"```python\n(.*?)```", README, re.S)
    assert code is not None
    out = io.StringIO()
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
