"""Every option of every command: two runs, without it and with it, and what must then differ or hold."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shlex
import string
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest
from conftest import tcinfer
from flag_rows import BASES, HELP, MODEL, STDIN, TABLES, TEMPLATE, TEXT
from test_cli import COMMAND, Outcome, command, refused, write_model

from tcinfer.api import Session
from tcinfer.chat import launch
from tcinfer.cli import cli


def commands(group: click.Command = cli, *names: str) -> Iterator[tuple[str, click.Command]]:
    yield " ".join(names), group
    for name, below in getattr(group, "commands", {}).items():
        yield from commands(below, *names, name)


OPTIONS = {
    (name, flag): option
    for name, command in commands()
    for option in command.get_params(click.Context(command, help_option_names=["-h", "--help"]))
    if isinstance(option, click.Option)
    for flag in (option.opts[-1], *option.secondary_opts)
}
ROWS = {(name, flag): row for name, _ in commands() for flag, row in ({"--help": HELP} | TABLES.get(name, {})).items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the rows name."""
    folder = tmp_path_factory.mktemp("flags")
    letters = string.ascii_letters + string.digits + string.punctuation + " \n"
    write_model(folder / "m.gguf", letters, vocab_size=len(letters))
    command("generate", "-m", MODEL, "-p", "JULIET:\n", "-n", 4, "-s", folder / "s.tcs", "--save")
    texts = {"text.txt": TEXT, "prompt.txt": "JULIET:", "t.jinja": TEMPLATE}
    for name, text in (texts | {"schema.json": '{"const": 3}', "grammar.lark": 'start: "yea" | "nay"'}).items():
        (folder / name).write_text(text)
    ids = {c: i for i, c in enumerate(letters)}
    (folder / "meta.pkl").write_bytes(pickle.dumps({"stoi": ids, "itos": {i: c for c, i in ids.items()}}))
    return folder


TEMPLATES = cache(launch.ChatTemplate)


@pytest.fixture
def folder(files: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """To be there. Each chat template is rendered once: it takes a process of its own."""
    monkeypatch.chdir(files)
    monkeypatch.setenv("XDG_STATE_HOME", str(files / "state"))
    monkeypatch.setattr(launch, "ChatTemplate", TEMPLATES)
    return files


def run(name: str, arguments: str, *more: str, stdin: str = "") -> Outcome:
    for new in Path().glob("new.*"):
        new.unlink()
    before, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO((stdin or STDIN.get(name, "")).encode()))
    try:
        return command(*shlex.split(f"{name} {BASES.get(name, '')} {arguments}"), *more)
    finally:
        sys.stdin = before


once = cache(run)


def test_every_option_has_a_row() -> None:
    assert ROWS.keys() == OPTIONS.keys()


@pytest.mark.parametrize(("name", "flag"), ROWS, ids=map(" ".join, ROWS))
def test_an_option_does_what_its_row_says(folder: Path, name: str, flag: str) -> None:
    row = ROWS[name, flag]
    pytest.importorskip(row.needs)
    if row is HELP:
        assert row.holds(Outcome(0, "", ""), run(name, "", flag))
        return
    without = once(name, row.base if row.without is None else row.without)
    try:
        idle = row.holds(without, once(name, row.base))
    except (AssertionError, ValueError, OSError, IndexError, TypeError):
        idle = False
    assert not idle, "this row could not fail"
    given = run(name, row.base, flag, *([] if row.value is None else [row.value]))
    assert row.holds(without, given), (without, given)


# Forms, values that are refused

FORMS = [key for key, option in OPTIONS.items() if len(option.opts) > 1 and key[1] != "--help"]


@pytest.mark.parametrize(("name", "flag"), FORMS, ids=map(" ".join, FORMS))
def test_every_form_of_an_option_is_the_same(name: str, flag: str) -> None:
    option, value = OPTIONS[name, flag], ROWS[name, flag].value
    forms = [[form] if value is None else [form, value] for form in option.opts]
    if value is not None:
        forms += [[f"{form}={value}"] for form in option.opts if form.startswith("--")]
        forms += [[f"{form}{value}"] for form in option.opts if len(form) == 2]
    below = dict(commands())[name]
    contexts = [below.make_context(name, form, resilient_parsing=True) for form in forms]
    assert len({str(context.params[option.name]) for context in contexts}) == 1
    assert all(context.get_parameter_source(option.name).name == "COMMANDLINE" for context in contexts)


NUMBERS = [key for key, option in OPTIONS.items() if option.type in (click.INT, click.FLOAT)]
BELOW_ZERO = ("--presence-penalty", "--frequency-penalty", "--top-n-sigma")  # any number is one
FROM_MINUS_ONE = ("--max-tokens", "--seed", "--dry-penalty-last-n", "--repeat-last-n")
WORDS = ("nan", "true", "yes", "one", "", " ", "1,5", "0x10", "1 2")
WHOLE = ("inf", "1.0", "1e3", str(2**64), str(-(2**63)), str(10**400))
REAL = ("inf", "-inf", "1e39", "1e999")


@pytest.mark.parametrize(("name", "flag"), NUMBERS, ids=map(" ".join, NUMBERS))
def test_numbers_that_cannot_be_are_refused_by_name(folder: Path, name: str, flag: str) -> None:
    option = OPTIONS[name, flag]
    wrong = WORDS + (WHOLE if option.type == click.INT else REAL)
    wrong += () if flag in BELOW_ZERO else ("-2",) if flag in FROM_MINUS_ONE else ("-1",)
    wrong += (str(2**63),) if option.type == click.INT and flag != "--seed" else ()
    model = f"-m {MODEL}" if (name, "--model") in OPTIONS else ""
    for value in wrong:
        line = refused(run(name, model, f"{flag}={value}"))
        assert flag in line or flag[2:].replace("-", "_") in line or option.name in line, value


FLAGS = [key for key, option in OPTIONS.items() if option.is_flag]


@pytest.mark.parametrize(("name", "flag"), FLAGS, ids=map(" ".join, FLAGS))
def test_flags_take_no_value(name: str, flag: str) -> None:
    for value in ("true", "no", "1", ""):
        assert flag in refused(command(*name.split(), f"{flag}={value}"))


FILES = [key for key, row in ROWS.items() if re.search(r"\.[a-z]+$", row.value or "")]


@pytest.mark.parametrize(("name", "flag"), FILES, ids=map(" ".join, FILES))
def test_a_file_is_completed_by_the_shell(name: str, flag: str) -> None:
    words = f"tcinfer {name} {flag} x"
    asked = {"_TCINFER_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    assert tcinfer(env=os.environ | asked).stdout == "file,x\n"


@pytest.mark.parametrize(("name", "flag"), FILES, ids=map(" ".join, FILES))
@pytest.mark.parametrize("value", ["nowhere/x.svg", ""])
def test_a_file_that_cannot_be_is_refused(folder: Path, name: str, flag: str, value: str) -> None:
    assert value in refused(run(name, "", f"{flag}={value}"))


NEEDY = {name: [param for param in below.params if param.required] for name, below in commands()}


@pytest.mark.parametrize("name", [name for name, required in NEEDY.items() if required])
def test_what_is_missing_is_named(name: str) -> None:
    line, first = refused(command(*name.split())), NEEDY[name][0]
    assert (first.opts[-1] if isinstance(first, click.Option) else first.metavar) in line
    assert "?" not in line  # what a line end becomes


@pytest.mark.parametrize("name", ["", "session"])
def test_a_group_alone_shows_its_help(name: str) -> None:
    done = command(*name.split())
    assert done.out + done.err == command(*name.split(), "--help").out


# Options together, and through real pipes


def test_absorb_saves_as_often_as_every_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    save = Session.save
    monkeypatch.setattr(Session, "save", lambda self, *to: saved.append(self.position) or save(self, *to))
    for every, more in (("1000", False), ("0", True)):  # than before the first token and after the last one
        saved.clear()
        run("absorb", "-m m.gguf --memory window --window 1", "--every", every, stdin="be " * 30_000)
        assert (saved[0], saved[-1], len(saved) > 2) == (0, 90_000, more)


@pytest.mark.parametrize("backend", ["numba", "numpy"])
def test_threads_change_no_bit(folder: Path, backend: str) -> None:
    one, *more = (json.loads(run("perplexity", f"--backend {backend} --threads {n}").out) for n in (1, 2, 3))
    assert all(other == one for other in more)


def test_a_chat_through_a_pipe_goes_on(tmp_path: Path) -> None:
    def piped(arguments: str) -> subprocess.CompletedProcess:
        script = f"printf 'ROMEO\\n' | {COMMAND} chat -m {MODEL} {arguments}"
        env = os.environ | {"XDG_STATE_HOME": str(tmp_path)}
        return subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, timeout=60)

    first, again = piped("-n 8 --temp 0 -q --name x"), piped("-c -n 9 --top-k 1")
    assert (first.returncode, first.stderr, len(first.stdout)) == (0, "", 9)
    assert "the last answer was: " + " ".join(first.stdout.split()) in again.stderr
    assert again.returncode == 0 < len(again.stdout)


def test_a_conversation_goes_on_with_another_seed(folder: Path) -> None:
    run("chat", "--name one", stdin="ROMEO\n/fork two\n/fork three\n")
    kept, same, another = (run("chat", f"-c --name {name}").out for name in ("one --seed 5", "two --seed 5", "three"))
    assert kept == same != another


def test_a_session_takes_options_that_it_has(folder: Path) -> None:
    run("absorb", "-s kept.tcs --memory sinks --window 20 --sinks 3")
    for option in ("--memory sinks", "--window 20", "--sinks 3", "--cache-type f16"):
        done = run("generate", f"-s kept.tcs {option}")
        assert (done.status, len(done.out)) == (0, 24), done.err


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("generate", "-s nowhere/x.tcs --save", "nowhere/x.tcs: cannot be written"),
        ("absorb", "-f schema.json", "is not in the vocabulary"),
        ("bench", "--soak 20 --compare llama.cpp", "--soak"),
        ("bench", "--compare llama.cpp", "llama.cpp"),
    ],
)
def test_what_cannot_be_is_refused_before_all_else(folder: Path, name: str, arguments: str, says: str) -> None:
    if arguments == "--compare llama.cpp":
        pytest.importorskip("llama_cpp")
    assert says in refused(run(name, arguments))


def test_soak_is_json_where_asked(folder: Path) -> None:
    assert json.loads(run("bench", "--soak 20").out)  # beside -o json
