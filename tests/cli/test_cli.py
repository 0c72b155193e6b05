"""The command line: real processes, pipes and terminals; what is refused is refused on one line."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import SHAKESPEARE, SMALL, random_weights, shared, tcinfer

import tcinfer as package
from tcinfer import cli
from tcinfer.converters.source import Source, Tensor
from tcinfer.converters.write import OUTTYPES, write
from tcinfer.engine import BACKENDS
from tcinfer.memory import MODES
from tcinfer.tokenizer import MODEL, TOKENS

COMMAND = str(Path(sys.executable).parent / "tcinfer")
FAST = ("--backend", "numpy")  # starts in a quarter of a second
PLAY = (*FAST, "-m", SHAKESPEARE)
ROMEO = ("generate", *PLAY, "-p", "ROMEO:")
HUGE = str(2**63)


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


def command(*arguments: object) -> Outcome:
    """The command within this process: what it printed and its exit status. An error that escapes it, escapes."""
    out, err = io.TextIOWrapper(io.BytesIO()), io.StringIO()
    argv, handler = sys.argv, signal.getsignal(signal.SIGTERM)
    sys.argv = ["tcinfer", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
            cli.main()
    finally:
        sys.argv = argv
        signal.signal(signal.SIGTERM, handler)
    out.flush()
    return Outcome(end.value.code, out.buffer.getvalue().decode(), err.getvalue())


def refused(outcome: Any) -> str:
    """The one line on stderr of a command that was refused with status 1 and printed nothing."""
    status, out, err = (
        outcome
        if isinstance(outcome, Outcome)
        else (
            outcome.returncode,
            outcome.stdout,
            outcome.stderr,
        )
    )
    assert (status, out) == (1, ""), err
    assert err.startswith("tcinfer: ")
    assert err.endswith("\n")
    assert err[:-1].isprintable()
    assert len(err) < 6000
    return err


def write_model(path: Path, characters: str = "", **changes: Any) -> Path:
    """A GGUF file of conftest's SMALL model, random weights, its ids being `characters` where there are any."""
    config = replace(SMALL, **changes)
    vocabulary = {MODEL: "char", TOKENS: list(characters)} if characters else {}
    tensors = {name: Tensor(name, x.shape, partial(np.copy, x)) for name, x in random_weights(config).items()}
    write(Source(config, tensors, path.parent), path, "f32", vocabulary)
    return path


# Text, figures, seeds


def test_stdout_has_the_text_alone_and_stderr_the_figures() -> None:
    done = tcinfer(*ROMEO, "-n", "150", "--seed", "5")
    again = tcinfer(*ROMEO, "-n", "150", "--seed", "5")
    model = package.load(SHAKESPEARE, backend="numpy")
    pieces = model.session().generate("ROMEO:", max_tokens=150, seed=5)
    assert done.returncode == 0
    assert done.stdout == again.stdout == "".join(piece.text for piece in pieces)
    (figures,) = done.stderr.splitlines()
    assert figures.startswith("prompt 6 tokens, ")
    for part in ("new 150 tokens, ", " tokens/s", f"state {model.session().nbytes:,} bytes", "28 tokens outside the"):
        assert part in figures


def test_another_seed_is_another_text() -> None:
    one, two = (command(*ROMEO, "-n", 60, "--seed", seed).out for seed in (1, 2))
    assert one != two


def test_default_backend_generates() -> None:
    done = tcinfer("generate", "-m", SHAKESPEARE, "-p", "ROMEO:", "-n", "3", "--temp", "0", "--threads", "1")
    assert (done.returncode, done.stdout) == (0, command(*ROMEO, "-n", 3, "--temp", 0).out)


# Where the prompt comes from


def test_prompt_from_option_file_and_pipe(tmp_path: Path) -> None:
    (tmp_path / "prompt").write_text("ROMEO:\n")
    rest = ("generate", *PLAY, "-n", "20", "--seed", "1")
    texts = {
        tcinfer(*rest, "-p", "ROMEO:\n").stdout,
        tcinfer(*rest, "-f", str(tmp_path / "prompt")).stdout,
        tcinfer(*rest, input="ROMEO:\n").stdout,
    }
    assert len(texts) == 1
    assert len(texts.pop()) == 20


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("-p", "a", "-f", "b"), "exclude each other"),
        (("-f", "nowhere.txt"), "nowhere.txt: No such file"),
        (("-f", "/"), "Is a directory"),
        (("-p", ""), "nothing to go on from"),
        (("-p", "naïve"), "'ï' (U+00EF) is not in the vocabulary"),
        (("-p", "a", "--stop", ""), "stop strings"),
    ],
)
def test_bad_prompts(arguments: tuple[str, ...], says: str) -> None:
    assert says in refused(command("generate", *PLAY, *arguments))


@pytest.mark.slow
def test_two_megabytes_through_a_pipe(tmp_path: Path) -> None:
    tiny = {"n_layers": 1, "d_model": 4, "d_ff": 4, "n_heads": 1, "n_kv_heads": 1, "head_dim": 4, "rope_dim": 4}
    tiny |= {"memory": "window", "window": 1}
    model = write_model(tmp_path / "m.gguf", "ab ", vocab_size=3, **tiny)
    text = "abba ab " * 250_000
    done = tcinfer("generate", *FAST, "-m", str(model), "-n", "4", input=text)
    assert (done.returncode, len(done.stdout)) == (0, 4)
    assert "prompt 2,000,000 tokens" in done.stderr


def test_invalid_utf8_is_replaced_and_said(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m.gguf", "ab\ufffd", vocab_size=3)
    for arguments, given in ((("-p", b"a\xffb"), b""), ((), b"a\xffb")):
        done = tcinfer("generate", *FAST, "-m", str(model), "-n", "1", *arguments, input=given, text=False)
        assert done.returncode == 0
        assert b"not valid UTF-8" in done.stderr
        assert b"prompt 3 tokens" in done.stderr


def test_a_pipe_beside_p_is_not_passed_over_in_silence() -> None:
    said = "standard input is not read, for -p gives the prompt"
    assert said in tcinfer("generate", *PLAY, "-p", "A", "-n", "1", input="some notes").stderr
    assert said not in tcinfer("generate", *PLAY, "-p", "A", "-n", "1").stderr
    assert tcinfer("generate", *PLAY, "-p", "A", "-n", "1", "-q", input="some notes").stderr == ""


def test_help_is_there_without_docstrings() -> None:
    for arguments in ([], ["generate"], ["session"], ["session", "fork"]):
        found = [
            subprocess.run([sys.executable, *flags, "-m", "tcinfer", *arguments, "--help"], capture_output=True).stdout
            for flags in ([], ["-OO"])
        ]
        assert found[0] == found[1] != b""


def test_terminal_without_a_prompt_is_refused() -> None:
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run([COMMAND, "generate", *FAST], stdin=theirs, capture_output=True, text=True, timeout=60)
    finally:
        os.close(ours)
        os.close(theirs)
    assert "no prompt" in refused(done)


def test_text_on_a_terminal_ends_with_a_line_end() -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen([COMMAND, *ROMEO, "-n", "5", "--seed", "1"], stdin=theirs, stdout=theirs, stderr=theirs) as p:
        os.close(theirs)
        seen = b""
        with contextlib.suppress(OSError):  # EIO: the other side is closed
            while part := os.read(ours, 1000):
                seen += part
    os.close(ours)
    assert p.returncode == 0
    text, _, figures = seen.decode().replace("\r\n", "\n").partition("\nprompt 6")
    assert text == command(*ROMEO, "-n", 5, "--seed", 1).out
    assert "new 5 tokens" in figures


# Pipes that close, disks that are full, interrupts


def test_head_ends_it_quietly() -> None:
    script = f"{COMMAND} {' '.join(ROMEO)} -n -1 | head -c 200; echo ${{PIPESTATUS[0]}} >&2"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert len(done.stdout) == 200
    *figures, status = done.stderr.splitlines()
    assert status == "0"
    assert len(figures) == 1
    assert figures[0].startswith("prompt 6 tokens")


def test_inspect_into_a_closed_pipe() -> None:
    script = f"{COMMAND} inspect | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("0\n", "")


@pytest.mark.parametrize(
    "tail", [("generate", *FAST, "-p", "a", "-n", "3"), ("inspect",), ("--version",)], ids=lambda tail: tail[0]
)
@pytest.mark.parametrize(("redirection", "says"), [(">/dev/full", "No space left"), (">&-", "closed")])
def test_stdout_that_takes_nothing(tail: tuple[str, ...], redirection: str, says: str) -> None:
    script = f'"$0" "$@" {redirection}'
    done = subprocess.run(["bash", "-c", script, COMMAND, *tail], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("tcinfer: ")
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full"])
def test_stderr_that_takes_nothing_does_not_cost_the_text(redirection: str) -> None:
    script = f'"$0" "$@" {redirection}'
    done = subprocess.run(["bash", "-c", script, COMMAND, *ROMEO, "-n", "9"], capture_output=True, text=True)
    assert len(done.stdout) == 9


def test_closed_stdin_is_no_prompt() -> None:
    script = f"{COMMAND} generate --backend numpy <&-"
    assert "no prompt" in refused(subprocess.run(["bash", "-c", script], capture_output=True, text=True))


def start(*arguments: str) -> subprocess.Popen:
    """The command in the background, as a terminal starts it: a test run in the background ignores SIGINT."""
    restored: Callable[[], Any] = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen([COMMAND, *arguments], stdout=-1, stderr=-1, text=True, preexec_fn=restored)


def test_interrupt_ends_with_130() -> None:
    with start(*ROMEO, "-n", "-1") as process:
        assert process.stdout is not None
        assert process.stdout.read(50)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert len(err.splitlines()) == 1  # the figures


# Options


@pytest.mark.parametrize(
    ("option", "values"),
    {
        "--temp": ("nan", "inf", "-inf", "-0.1"),
        "--top-k": ("-1", HUGE, "-" + HUGE),
        "--top-p": ("nan", "inf", "-0.1", "1.01"),
        "--min-p": ("nan", "-inf", "-0.1", "1.01"),
        "--seed": ("-2", str(2**64)),
        "--max-tokens": ("-2", HUGE),
        "--window": ("0", "-1", HUGE),
        "--sinks": ("-1", HUGE),
        "--threads": ("0", "-1", "4097", HUGE),
    }.items(),
)
def test_numbers_out_of_range(option: str, values: tuple[str, ...]) -> None:
    for value in values:
        line = refused(command(*ROMEO, "-n", 1, option, value))
        assert option.lstrip("-").replace("-", "_").replace("temp", "temperature") in line
    usage = command(*ROMEO, option, "many")
    assert "is not a valid" in refused(usage)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--memory full --window 9", "full memory has no window"),
        ("--memory full --sinks 9", "full memory has no window"),
        ("--memory window --sinks 2", "has no sinks"),
        ("--memory infini", "no weights for infini"),
        ("--memory nonsense", "not one of full, window, sinks, infini, tensor"),
        ("--backend nonsense", "not one of auto, numpy, numba, cuda"),
        ("--window 2147483647", "choose a smaller window"),
        ("--sinks 2147483647", "choose a smaller window"),
        ("-m nowhere.gguf", "nowhere.gguf: cannot be read: No such file"),
        ("-m /", "is a folder"),
        ("-m /dev/zero", "is a pipe or a device"),
    ],
)
def test_choices_that_are_refused(arguments: str, says: str) -> None:
    assert says in refused(command(*ROMEO, *arguments.split()))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--memory window --window 20", "exact window of 20"),
        ("--memory sinks --window 20 --sinks 3", "13 tokens outside the exact window of 20"),
        ("--memory sinks", "exact window of 128"),
        ("--memory full", "the cache grows"),
        ("--window 30", "6 tokens outside the exact window of 30"),
        ("--threads 1", "exact window of 128"),
        ("--seed 18446744073709551615", "new 30 tokens"),
        ("--temp 0 --top-k 0 --top-p 1 --min-p 0", "new 30 tokens"),
        ("--temp 1e-310", "new 30 tokens"),
        ("--temp 1e30 --top-p 0 --min-p 1", "new 30 tokens"),
    ],
)
def test_choices_that_are_taken(arguments: str, says: str) -> None:
    done = command(*ROMEO, "-n", 30, *arguments.split())
    assert (done.status, len(done.out), done.err.count("\n")) == (0, 30, 1), done.err
    assert says in done.err


def test_learned_positions_stop_with_an_error(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m.gguf", "abc", vocab_size=3, rope_dim=0, context_length=16)
    done = command("generate", *FAST, "-m", model, "-p", "ab", "-n", -1)
    assert done.status == 1
    assert len(done.out) == 14
    assert "ends at token 16" in done.err.splitlines()[-1]


# Help, version, imports, locale, inspect


def test_help_names_every_choice() -> None:
    def words(*arguments: str) -> set[str]:
        done = command(*arguments, "--help")
        assert (done.status, done.err) == (0, "")
        return set(done.out.replace(",", " ").replace(".", " ").split())

    assert words() >= {"convert", "generate", "inspect"}
    assert words("generate") >= {*BACKENDS, *(name for name, mode in MODES.items() if not mode.needs_weights)}
    assert words("convert") >= set(OUTTYPES)
    assert words("inspect") >= {"shape", "memory"}


def test_version() -> None:
    assert tcinfer("--version").stdout == f"tcinfer {package.__version__}\n"


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import tcinfer", {"numpy", "gguf", "numba", "torch", "click"}),
        ("sys.argv[1:] = ['--help']; main()", {"numpy", "gguf", "numba", "torch", "rich"}),
        ("sys.argv[1:] = ['convert', '--help']; main()", {"numpy", "gguf", "numba", "torch", "rich"}),
        (
            "sys.argv[1:] = ['generate', '-p', 'A', '-n', '2']; main()",
            {"torch", "safetensors", "tokenizers", "asyncio", "jinja2", "subprocess"},
        ),
        (
            "import tcinfer; list(tcinfer.load().session().generate('A', max_tokens=2))",
            {"torch", "click", "rich", "asyncio"},
        ),
    ],
)
def test_nothing_is_imported_without_need(code: str, absent: set[str]) -> None:
    main = "from tcinfer.cli import main; " if "main()" in code else ""
    lines = ("import sys", "try:", f"    {main}{code}", "except SystemExit: pass", "print('\\n', *sys.modules)")
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    imported = set(done.stdout.splitlines()[-1].split())
    assert not absent & imported


def test_text_is_utf8_in_a_plain_locale(tmp_path: Path) -> None:
    model = write_model(tmp_path / "modèle.gguf", "é", vocab_size=1, name="modèle")
    plain = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    options = ("-m", str(model), "-p", "é", "-n", "3", "--stop", "é")
    assert tcinfer("generate", *FAST, *options[:-2], env=plain, text=False).stdout.decode() == "ééé"
    assert tcinfer("generate", *FAST, *options, env=plain, text=False).stdout == b""
    assert "modèle\n" in tcinfer("inspect", str(model), env=plain, text=False).stdout.decode()


@pytest.mark.parametrize(
    ("path", "lines"),
    {
        "": (
            "tcllama",
            "memory                window in layers 0-2; tensor in layers 3-5",
            "window                64",
            "  layer 3",
            "llama, 4,096 tokens",
        ),
        "stories260K-f32.gguf": ("llama", "llama, 512 tokens", "grows by 640 bytes a token", "292,800 in 48 tensors"),
    }.items(),
)
def test_inspect(path: str, lines: tuple[str, ...]) -> None:
    done = command("inspect", *([shared("models", "stories260K", path)] if path else []))
    assert (done.status, done.err) == (0, "")
    for line in lines:
        assert line in done.out


def test_inspect_shows_no_control_characters(tmp_path: Path) -> None:
    done = command("inspect", write_model(tmp_path / "m.gguf", name="a\x1b[2J\r\nstate 0 bytes"))
    assert all(line.isprintable() for line in done.out.splitlines())
    assert "\nstate 0 bytes" not in done.out
