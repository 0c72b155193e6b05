"""The pages in docs/ and what links to them say what is so: commands, options, examples, links, numbers, picture."""

from __future__ import annotations

import fnmatch
import importlib.util
import os
import re
import shlex
import shutil
import string
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import click
import pytest
from conftest import ROOT, SHAKESPEARE, smollm2, tcinfer
from test_cli import write_model

from tcinfer import memory, sequence
from tcinfer.chat import launch, snapshots
from tcinfer.cli import cli
from tcinfer.cli.repl import COMMANDS
from tcinfer.loader import Opened
from tcinfer.memory_options import with_memory
from tcinfer.sampling import SAMPLERS, Sampling

DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *DOCS.glob("*.md"),
    *ROOT.glob("models/*.md"),
]
CHAT, EVERY = (DOCS / "chat.md").read_text(), (DOCS / "commands.md").read_text()
WIDE = os.environ | {"COLUMNS": "100"}
TRAINER = "".join(path.read_text() for path in ROOT.glob("models/trainer/*.py"))
FOREIGN = set(re.findall(r"--[a-z0-9-]+", TRAINER))  # options of its scripts, in the models' cards


def commands(group: click.Command = cli, *names: str) -> Iterator[tuple[str, click.Command]]:
    yield " ".join(("tcinfer", *names)), group
    for name, below in getattr(group, "commands", {}).items():
        yield from commands(below, *names, name)


BY_NAME = dict(commands())
SECTIONS = dict(re.findall(r"^## ([^\n]*)\n\n```text\n(.*?)```$", EVERY, re.M | re.S))


def options(command: click.Command) -> list[click.Option]:
    context = click.Context(command, help_option_names=["-h", "--help"])
    return [param for param in command.get_params(context) if isinstance(param, click.Option)]


def flags(command: click.Command) -> list[str]:
    return [flag for option in options(command) for flag in (*option.opts, *option.secondary_opts)]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# docs/commands.md


def test_the_page_of_commands_is_what_its_script_writes() -> None:
    assert script("commands").page() == EVERY


def test_the_page_has_every_command_that_a_process_names() -> None:
    def named(*names: str) -> Iterator[str]:
        yield " ".join(("tcinfer", *names))
        shown = tcinfer(*names, "--help", env=WIDE).stdout
        for name in re.findall(r"^  ([a-z]+)  ", shown.partition("\nCommands:\n")[2], re.M):
            yield from named(*names, name) if name == "session" else [" ".join(("tcinfer", *names, name))]

    assert sorted(named()) == sorted(SECTIONS) == sorted(BY_NAME)


@pytest.mark.parametrize("name", ["", "generate", "perplexity", "completion", "session", "session verify"])
def test_a_section_is_the_help_of_a_real_process(name: str) -> None:
    assert SECTIONS[f"tcinfer {name}".strip()] == tcinfer(*name.split(), "--help", env=WIDE).stdout


@pytest.mark.parametrize("name", BY_NAME)
def test_every_option_is_in_its_section_once_and_helped(name: str) -> None:
    found = flags(BY_NAME[name])
    assert len(set(found)) == len(found)
    assert BY_NAME[name].help
    for option in options(BY_NAME[name]):
        assert option.help, option.name
        assert option.help.endswith("."), option.name
        head = ", ".join(option.opts) + "".join(f" / {flag}" for flag in option.secondary_opts)
        assert len(re.findall(rf"^  {head}(?: |$)", SECTIONS[name], re.M)) == 1, head


def test_no_page_names_an_option_that_is_not() -> None:
    known = {flag for command in BY_NAME.values() for flag in flags(command)} | {"--no-deps"}  # pip's
    for page in PAGES:
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*\b", page.read_text())) <= known | FOREIGN, page


# Examples


def examples() -> Iterator[str]:
    """Every `tcinfer ...` of the pages' shell blocks (behind a pipe, too), of the helps, and of the running text."""
    for page in PAGES:
        text = page.read_text()
        for block in re.findall(r"^```(?:console|text)\n(.*?)^```", text, re.M | re.S):
            yield from re.findall(r"^ *(?:[^|\n]*\| )?(tcinfer [a-z].*)$", block, re.M)
        if page.parent == DOCS or page.stem == "README":
            yield from re.findall(r"`(tcinfer [a-z][^`]*)`", text)


@pytest.mark.parametrize("line", sorted({re.sub(r" +#.*", "", line) for line in examples()}))
def test_an_example_can_be_parsed(line: str) -> None:
    words = shlex.split(re.split(" [<>|] ", line)[0])
    name = words.pop(0)
    while words and f"{name} {words[0]}" in BY_NAME:
        name = f"{name} {words.pop(0)}"
    assert name != "tcinfer"
    if words or name not in SECTIONS:  # not just the command's name, as a text says it
        BY_NAME[name].make_context(name, words)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", CHAT, re.M | re.S)


def test_the_python_of_chat_md_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks("python"):
        exec(block, {})  # the page's own text
    assert len(capsys.readouterr().out) > 20
    assert f"{(tmp_path / 'tale.tcs').stat().st_size:,} for the\nbundled model" in CHAT


def test_the_shell_of_sessions_runs(tmp_path: Path) -> None:
    (block,) = [block for block in blocks("text") if "absorb" in block]
    (tmp_path / "server.log").write_text("An error: the rose is gone.\n" * 9)
    shutil.copy(SHAKESPEARE, tmp_path / "model.gguf")
    script = f"set -eo pipefail; PATH={Path(sys.executable).parent}:$PATH; {block.replace('tail -f', 'cat')}"
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "the same state\n" in done.stdout
    assert "log.tcs: whole, 27" in done.stdout


def test_the_schema_of_chat_md_is_followed(tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    letters = string.printable[:95]
    write_model(tmp_path / "model.gguf", letters, vocab_size=95)
    (line,) = [line for line in examples() if "--json-schema " in line]
    words = shlex.split(line)[1:]
    done = tcinfer(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.match(r'\{ ?("name" ?: ?"|\}|"|$)', done.stdout)


# What the pages name


def links() -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        yield from ((page, target) for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()))


@pytest.mark.parametrize(("page", "target"), sorted(set(links())), ids=lambda value: getattr(value, "name", value))
def test_a_link_leads_somewhere(page: Path, target: str) -> None:
    file, _, heading = target.partition("#")
    if file.startswith(("http:", "https:")):
        return
    to = (page.parent / file).resolve() if file else page
    assert to.is_relative_to(ROOT)
    assert to.exists()
    headings = re.findall(r"^#+ (.*)$", to.read_text(), re.M) if heading else []
    assert not heading or heading in {re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings}


def test_readme_leads_to_every_page() -> None:
    assert {(page.parent / target).resolve() for page, target in links() if page.stem == "README"} >= set(
        DOCS.glob("*.md")
    )


CODE = {
    path.name for folder in ("tcinfer", "kernels", "converters", "tests", "docs") for path in (ROOT / folder).rglob("*")
}


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", DOCS / "chat.md", DOCS / "mechanisms.md"],
    ids=lambda page: page.name,
)
def test_every_file_of_ours_that_a_page_names_is_there(page: Path) -> None:
    spans = [word for span in re.findall(r"`([^`\n]+)`", page.read_text()) for word in span.split()]
    for path in spans:
        if path.startswith(("tcinfer/", "kernels/", "converters/", "models/", "tests/", "docs/", ".ci/")):
            assert list(ROOT.glob(path)), path
        elif path.endswith(".py"):
            assert fnmatch.filter(CODE, path), path


# docs/chat.md


def test_the_table_has_every_command_of_a_chat() -> None:
    rows = re.findall(r"^\| `(/[^`]+)` \| (.*) \|$", CHAT, re.M)
    assert [usage for usage, _ in rows] == list(dict.fromkeys(command.usage for command in COMMANDS.values()))
    others = [name for _, text in rows for name in re.findall(r"`(/[a-z]+)`", text)]
    assert sorted([usage.split()[0] for usage, _ in rows] + others) == sorted(COMMANDS)


@pytest.mark.parametrize(
    "fact",
    [
        f"the last {launch.LARGEST_WINDOW:,} tokens exactly",
        f"up to {launch.PINNED >> 20} MiB of keys and values",
        f"({snapshots.BUDGET >> 20} MiB of them)",
        f"at most {sequence.RECENT:,} tokens",
    ],
)
def test_a_number_of_chat_md_is_the_one_that_holds(fact: str) -> None:
    assert fact in " ".join(CHAT.split())


def test_a_session_of_smollm2_is_as_large_as_chat_md_says() -> None:
    config = with_memory(Opened(smollm2()).config, "sinks", 512)
    assert f"{memory.layout(config).nbytes / 1e6:.0f} MB for SmolLM2 with a window of 512" in " ".join(CHAT.split())


def test_the_order_of_samplers_can_be_given_as_it_is_written() -> None:
    written = re.search(r"`(penalties;[^`]*)`", CHAT)
    assert written is not None
    assert Sampling(samplers=written[1]).chain() == list(SAMPLERS)


def test_the_picture_is_of_a_run_that_shows_what_it_says() -> None:
    lines = [text.replace("\xa0", " ") for text in ET.parse(DOCS / "chat.svg").getroot().itertext()]
    assert any(
        re.search(r"[\d,]+ tokens \| [\d,]+ outside the exact window \| state [\d.]+ MB", line) for line in lines
    )
    for said, _ in script("record").SAID:
        assert any(line.startswith(f"> {said}") for line in lines), said
    assert any(line.startswith("took back 1 turn") for line in lines)
    assert any("(stopped)" in line for line in lines)  # by Ctrl-C, which the picture's description promises


def test_the_examples_of_the_python_page_run_in_order(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "python.md").read_text(), re.S)
    assert len(blocks) >= 8
    (tmp_path / "page.py").write_text("\n".join(blocks))
    done = subprocess.run([sys.executable, "page.py"], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "temperature" in done.stdout.splitlines()[-1]
