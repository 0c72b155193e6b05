"""`tcinfer chat` in a real terminal, and in pipes: what a person types, and what the screen then shows."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import termios
import time
import unicodedata
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from terminal import ALT_ENTER, COMMAND, CTRL_D, TEMPLATE, UP, Terminal, chats, environment, piped, shakespeare
from test_cli import FAST, PLAY, command, refused, write_model

from tcinfer.chat.conversation import Conversation
from tcinfer.cli.repl import COMMANDS, Repl, printable
from tcinfer.errors import TcinferError
from tcinfer.generation import Piece

CHAT = ("chat", *PLAY)
ROMEO = (*CHAT, "-n", "8", "--seed", "1")
PLAIN = ("--chat-template", "plain.jinja")  # what any vocabulary with a bar can write


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where all files of a chat are: its working folder and its state."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (tmp_path / "plain.jinja").write_text("{% for m in messages %}{{ m.content }}|{% endfor %}")
    return tmp_path


@pytest.fixture
def romeo(home: Path) -> Iterator[Terminal]:
    """A chat with shakespeare.gguf, its prompt waiting."""
    with Terminal(home, *ROMEO, "--name", "play", HOME=str(home)) as terminal:
        terminal.until(terminal.ready)
        yield terminal


def log(home: Path, name: str = "play") -> list[dict]:
    return [json.loads(line) for line in (home / "tcinfer" / "chats" / f"{name}.jsonl").read_bytes().splitlines()]


def turns(home: Path, name: str = "play") -> int:
    return sum("end" in record for record in log(home, name))


def said(home: Path, name: str = "play") -> list[str]:
    """The messages of a conversation."""
    return [record["user"] for record in log(home, name) if "user" in record]


def last_answer(home: Path, name: str = "play") -> str:
    records = log(home, name)
    last = max(i for i, record in enumerate(records) if "turn" in record)
    return shakespeare("numpy").tokenizer.decode([i for record in records[last:] for i in record.get("out", [])])


# Commands


def test_an_answer_that_was_cut_off_says_so(romeo: Terminal) -> None:
    assert romeo.says("Speak")[-1] == "(cut off after 8 tokens; /set max-tokens N allows more)"


def test_help_says_every_command_once(romeo: Terminal) -> None:
    shown = [line.split()[0] for line in romeo.says("/help") if line.startswith("  /")]
    assert set(shown) >= {name for name in COMMANDS if name not in ("/bye", "/quit")}
    assert len(shown) == len(set(shown))
    (line,) = romeo.says("/nonsense")
    assert line == "tcinfer: /nonsense is no command; /help lists them (// begins a message with a slash)"


def test_an_answer_and_the_status_line(romeo: Terminal, home: Path) -> None:
    assert romeo.status == "play | 0 tokens | 0 outside the exact window | state 0.3 MB"
    answer, _ = romeo.says("Speak")  # and that it was cut off
    assert len(answer) > 3
    for _ in range(4):
        romeo.says("Speak")
    position = log(home)[-1]["position"]
    assert position > 150
    start = f"play | {position:,} tokens | {position - 128:,} outside the exact window | state 0.3 MB | "
    assert romeo.status.startswith(start)
    assert re.fullmatch(r"[\d,]+ tokens/s", romeo.status.removeprefix(start))


def test_undo_regen_fork_switch_sessions(romeo: Terminal, home: Path) -> None:
    assert romeo.says("/undo") == ["tcinfer: there is no turn to take back"]
    assert romeo.says("/regen") == ["tcinfer: there is no answer to try again yet"]
    romeo.says("One")
    romeo.says("Two")
    third, _ = romeo.says("Three")
    other, _ = romeo.says("/regen")
    assert other != third
    assert said(home) == ["One", "Two", "Three"]
    assert romeo.says("/undo") == ["took back 1 turn; 2 left"]
    assert romeo.says("/fork fall") == ["fall is as this conversation is now; /switch fall goes there"]
    assert romeo.says("/fork fall") == ["tcinfer: there is a conversation 'fall' already: choose another name"]
    assert romeo.says("/undo 5") == ["took back 2 turns; 0 left"]
    for bad in ("0", "-1", "x", "1.5"):
        assert romeo.says(f"/undo {bad}") == [f"tcinfer: /undo takes a whole number from 1, not '{bad}'"]
    romeo.says("Four")
    assert romeo.says("/switch play") == ["tcinfer: this is 'play' already"]
    (where, last) = romeo.says("/switch fall")
    assert where.startswith("fall | ")
    assert last.startswith("the last answer was: ")
    assert said(home, "fall") == ["One", "Two"]
    assert said(home) == ["Four"]
    facts = r"[\d,]+ tokens, 20\d\d-\d\d-\d\d \d\d:\d\d"
    for line, name in zip(sorted(romeo.says("/sessions")), (r"  play +1 turns?", r"\* fall +2 turns"), strict=True):
        assert re.fullmatch(f"{name}, {facts}", line)
    assert romeo.says("/switch nowhere") == ["tcinfer: there is no conversation 'nowhere'; known: fall, play"]
    assert romeo.says("/switch") == ["tcinfer: /switch NAME: what is missing is the name"]


def test_save_load_read_memory(romeo: Terminal, home: Path) -> None:
    romeo.says("/set temp 0")
    romeo.says("Speak")
    folder = home / "tcinfer" / "chats"
    assert "".join(romeo.says("/save")).replace(" ", "").endswith(f"{folder}/play.tcs".replace(" ", ""))
    assert romeo.says("/save mine.tcs") == [f"mine.tcs: {(home / 'mine.tcs').stat().st_size:,} bytes"]
    assert romeo.says("/save ~/other.tcs") == [f"{home}/other.tcs: {(home / 'mine.tcs').stat().st_size:,} bytes"]
    assert (home / "mine.tcs").read_bytes() == (folder / "play.tcs").read_bytes()
    (home / "long").write_text("And so it goes on, my lord.\n" * 10)
    assert romeo.says("/read nowhere") == ["tcinfer: nowhere: no such file"]
    assert romeo.says("/read long") == ["long (280 bytes) goes before your next message"]
    here = romeo.says("What is it?")
    position = log(home)[-1]["position"]
    assert position > 280
    (held, *layers) = romeo.says("/memory")
    assert held == f"window: 128 tokens held exactly, {position - 128:,} outside; 0.3 MB"
    shares = [re.search(r"window (\d+)%, memory (\d+)%", line) for line in layers]
    assert [sum(map(int, share.groups())) for share in shares if share] == [100] * 4
    assert romeo.says("/load nowhere.tcs")[0].startswith("tcinfer: nowhere.tcs: cannot be read")
    assert " tokens | " in romeo.says("/load mine.tcs")[0]
    romeo.says("/read long")
    assert romeo.says("What is it?") == here
    assert f" | {position:,} tokens | " in romeo.status


def test_set_system_clear_exit(romeo: Terminal, home: Path) -> None:
    assert romeo.says("/set temp 0") == []
    assert romeo.says("/set max-tokens 3") == []
    shown = {line.split()[0]: line.split(maxsplit=1)[1] for line in romeo.says("/set")}
    assert (shown["temp"], shown["max-tokens"], shown["seed"]) == ("0.0", "3", "1")
    assert romeo.says("/set temp") == [f"  {'temp':<24}0.0"]
    assert romeo.says("/set max-tokens") == [f"  {'max-tokens':<24}3"]
    for bad in ("temp hot", "temp -1", "nonsense 1", "max-tokens -2", "top-p 7"):
        (line,) = romeo.says(f"/set {bad}")
        assert line.startswith("tcinfer: "), bad
    assert shown == {line.split()[0]: line.split(maxsplit=1)[1] for line in romeo.says("/set")}
    assert len(romeo.says("Speak")[0]) <= 3
    assert romeo.says("/system") == ["no system prompt"]
    (line,) = romeo.says("/clear")
    assert re.fullmatch(r"a new conversation, [\d-]+; /switch play goes back", line)
    (line,) = romeo.says("/clear")  # of one in which nothing was said, which is gone
    assert re.fullmatch(r"a new conversation, [\d-]+", line)
    assert " | 0 tokens | " in romeo.status
    (line,) = romeo.says("/system Be kind.")
    assert line.endswith(", with this system prompt")
    assert romeo.says("/system") == ["Be kind."]
    romeo.enter("/exit")
    assert romeo.status_code() == 0
    assert [path.name for path in (home / "tcinfer" / "chats").glob("*.jsonl")] == ["play.jsonl"]


# Keys


def test_messages_of_several_lines_and_the_history(romeo: Terminal, home: Path) -> None:
    for line in ('"""First', "second", 'third"""'):
        romeo.until(lambda: romeo.screen.cursor.x == 2)
        romeo.enter(line)
    romeo.until(romeo.ready)
    romeo.typed(f"Up{ALT_ENTER}down")
    assert romeo.text().count("Up") == 1
    romeo.child.send("\r")
    romeo.until(romeo.ready)
    romeo.says("Last")
    assert said(home) == ["First\nsecond\nthird", "Up\ndown", "Last"]
    romeo.child.send(UP)
    romeo.until(lambda: romeo.lines()[romeo.screen.cursor.y] == "> Last")
    romeo.child.send(CTRL_D + "\x15" + CTRL_D)  # Ctrl-D leaves at an empty prompt alone
    assert romeo.status_code() == 0
    with Terminal(home, *ROMEO, "--continue") as again:
        again.until(again.ready)
        again.child.send(UP)
        again.until(lambda: again.lines()[again.screen.cursor.y] == "> Last")
        again.child.send(UP)
        again.until(lambda: again.lines()[again.screen.cursor.y] == "down")
    assert (home / "tcinfer" / "chats" / "history").stat().st_mode & 0o777 == 0o600


def test_ctrl_c_at_the_prompt_stays_and_in_an_answer_stops_it(romeo: Terminal, home: Path) -> None:
    romeo.typed("half a line")
    romeo.stop()
    romeo.until(romeo.ready)
    assert "/exit or Ctrl-D leaves" in romeo.lines()
    romeo.says("/set max-tokens -1")
    romeo.says("/set logit-bias 0-inf")  # no line ends, so no end
    for n in (1, 2):
        romeo.enter(f"Speak {'again ' * n}")
        romeo.until(romeo.streaming)
        romeo.stop()
        romeo.until(romeo.ready)
        assert "(stopped)" in romeo.text()
        assert turns(home) == n
    assert "^C" not in romeo.text()
    shown = "".join("".join(romeo.below(f"Speak {'again ' * 2}")).removesuffix("(stopped)").split())
    told = "".join(last_answer(home).split())
    assert len(shown) > 10
    assert shown == told
    romeo.says("/set max-tokens 8")
    romeo.says("On")
    assert turns(home) == 3


def test_ctrl_c_twice_does_not_cost_the_conversation(romeo: Terminal, home: Path) -> None:
    romeo.says("/set max-tokens -1")
    romeo.says("/set logit-bias 0-inf")
    for n in range(1, 6):
        romeo.enter("Speak")
        romeo.until(romeo.streaming)
        for _ in range(3):
            romeo.process.send_signal(signal.SIGINT)
            time.sleep(0.0007 * n)
        romeo.until(romeo.ready)
    romeo.says("/set max-tokens 8")
    romeo.says("Once more")
    assert said(home)[-1] == "Once more"
    assert log(home)[-1]["position"] == sum(len(r.get("in", r.get("out", []))) for r in log(home))


def test_ctrl_c_at_the_first_word_says_what_is_so(home: Path, monkeypatch: Any, capsys: Any) -> None:
    class Slow(Conversation):
        def ask(self, *arguments: Any) -> Iterator[Piece]:
            with closing(super().ask(*arguments)) as pieces:  # type: ignore[type-var]
                first = next(pieces)
                signal.raise_signal(signal.SIGINT)  # while the first token is chosen
                yield first
                yield from pieces

    made = chats(backend="numpy")
    talk = made.begin(None)
    talk.max_tokens, talk.__class__ = 5, Slow
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Speak\n")))
    Repl(made, talk).run()
    heard = capsys.readouterr().err
    assert ("(stopped)" in heard) != ("as it was" in heard)
    assert talk.turns == ("(stopped)" in heard)
    talk.close()


def test_reading_a_large_file_shows_a_bar_and_can_be_stopped(romeo: Terminal, home: Path) -> None:
    romeo.says("Speak")
    before, status = (home / "tcinfer" / "chats" / "play.jsonl").read_bytes(), romeo.status
    (home / "long").write_text("And so it goes on, my lord.\n" * 4000)
    romeo.says("/read long")
    romeo.enter("What is it?")
    romeo.until(lambda: re.search(r"reading .*━.* [\d,]{4,}", romeo.text()))
    romeo.stop()
    romeo.until(romeo.ready)
    (bar,) = (line for line in romeo.lines() if "━" in line)
    fed, total = (int(n.replace(",", "")) for n in re.search(r" ([\d,]+)/([\d,]+) ", bar + " ").groups())
    assert 1000 < fed < total - 1000
    assert 0.99 < total / (4000 * 28) < 1.01
    assert "interrupted; the conversation is as it was" in romeo.lines()
    assert romeo.status == status
    assert (home / "tcinfer" / "chats" / "play.jsonl").read_bytes() == before
    romeo.says("Never mind", 15)  # without that file
    assert len([i for r in log(home) for i in r.get("in", [])]) < 200


def test_a_file_that_is_no_text_is_refused_when_it_is_named(romeo: Terminal, home: Path) -> None:
    (home / "binary").write_bytes(b"GGUF\0\1\2")
    (home / "french").write_text("na\u00efve")
    assert romeo.says("/read binary") == ["tcinfer: binary: is no text"]
    assert romeo.says("/read french")[0].startswith("tcinfer: french: the character '\u00ef' (U+00EF)")
    romeo.says("Speak")
    assert said(home) == ["Speak"]


def test_ctrl_c_ends_a_chat_through_a_pipe(home: Path) -> None:
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    restored = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen([COMMAND, *ROMEO], env=environment(home), preexec_fn=restored, **pipes) as run:
        run.stdin.write(b"Speak\n")
        run.stdin.flush()
        run.stdout.readline()
        time.sleep(0.2)  # it waits for the next line
        run.send_signal(signal.SIGINT)
        assert run.wait(20) == 130
        assert b"Traceback" not in run.stderr.read()


def test_a_terminal_is_as_it_was_when_a_signal_ends_an_answer(romeo: Terminal) -> None:
    romeo.says("/set max-tokens -1")
    romeo.says("/set logit-bias 0-inf")
    romeo.enter("Speak")
    romeo.until(romeo.streaming)
    assert not termios.tcgetattr(romeo.child.child_fd)[3] & termios.ECHO
    romeo.process.send_signal(signal.SIGTERM)
    romeo.until(lambda: termios.tcgetattr(romeo.child.child_fd)[3] & termios.ECHO)
    romeo.until(lambda: romeo.ended)


def test_a_file_that_cannot_be_read_stands_in_nobodys_way(romeo: Terminal, home: Path) -> None:
    (home / "brief").write_text("Be brief.")
    romeo.says("/read brief")
    (home / "brief").unlink()
    line = "".join(romeo.says("What is it?"))
    assert "tcinfer: brief: cannot be read: No such file or directory" in line
    assert "not read: brief" in line
    romeo.says("Speak")
    assert said(home) == ["Speak"]


def test_a_character_outside_the_vocabulary(romeo: Terminal, home: Path) -> None:
    (line,) = romeo.says("na\u00efve")
    assert line.startswith("tcinfer: ")
    assert "'\u00ef' (U+00EF) is not in the vocabulary" in line
    romeo.says("Naive")
    assert said(home) == ["Naive"]


def test_what_is_typed_during_an_answer_waits_for_the_prompt(romeo: Terminal, home: Path) -> None:
    romeo.says("/set max-tokens -1")
    romeo.says("/set logit-bias 0-inf")
    romeo.enter("Speak")
    romeo.until(romeo.streaming)
    for key in "zqx":  # which Romeo does not say
        romeo.child.send(f"{key}3 ")
        time.sleep(0.02)
    romeo.settle_for(0.2)
    assert "z3" not in romeo.text()
    romeo.stop()
    romeo.until(lambda: "> z3 q3 x3" in romeo.lines())
    romeo.child.send("\x15")  # the line away
    romeo.until(romeo.ready)
    romeo.says("/set max-tokens 8")
    romeo.enter("Once more")
    romeo.child.send("/undo\r")  # a whole line is taken as one
    romeo.until(lambda: "took back 1 turn; 1 left" in romeo.lines())


def test_words_wrap_at_the_edge(home: Path) -> None:
    def words(lines: list[str]) -> list[str]:
        return " ".join(lines).split()

    with Terminal(home, *CHAT, "--name", "play", "-n", "300", "--temp", "0", "-l", "0-inf", columns=64) as narrow:
        narrow.until(narrow.ready)
        lines = narrow.says("Speak")[:-1]
        assert len(lines) > 3
        assert words(lines) == last_answer(home).split()  # none is torn


def test_an_error_has_a_line_of_its_own(romeo: Terminal, home: Path, monkeypatch: Any, capsys: Any) -> None:
    class Broken(Conversation):
        def ask(self, *arguments: Any) -> Iterator[Piece]:
            yield from list(super().ask(*arguments))[:3]
            raise TcinferError("out of order")

    made = chats(backend="numpy")
    talk = made.begin(None)
    talk.max_tokens, talk.__class__ = 5, Broken
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Speak\n")))
    with pytest.raises(TcinferError, match="out of order"):
        Repl(made, talk).run()
    assert capsys.readouterr().out.endswith("\n")
    talk.close()


def test_delete(romeo: Terminal, home: Path) -> None:
    romeo.says("Speak")
    romeo.says("/fork copy")
    assert romeo.says("/delete play") == ["tcinfer: this is 'play': /clear or /switch first"]
    assert romeo.says("/delete nobody") == ["tcinfer: there is no conversation 'nobody'; known: play, copy"]
    assert romeo.says("/delete ../x")[0].endswith("at most 64")
    with Terminal(home, *CHAT, "--continue", "--name", "copy") as other:
        other.until(other.ready)
        assert romeo.says("/delete copy") == ["tcinfer: conversation 'copy' is open in another terminal"]
        other.child.send(CTRL_D)
        other.status_code()
    assert romeo.says("/delete copy") == ["copy is gone"]
    assert sorted(path.name for path in (home / "tcinfer" / "chats").iterdir()) == ["history", "play.jsonl", "play.tcs"]


@pytest.mark.parametrize("end", ["Ctrl-D", "SIGTERM", "SIGHUP"])
def test_a_chat_that_is_not_saved_leaves_nothing(home: Path, end: str) -> None:
    (home / "tmp").mkdir()
    with Terminal(home, *ROMEO, "--no-save", TMPDIR=str(home / "tmp")) as secret:
        secret.until(secret.ready)
        assert "nothing of this chat is kept" in secret.lines()
        secret.says("Speak")
        assert secret.says("/undo") == ["took back 1 turn; 0 left"]
        secret.says("Speak")
        assert "--no-save" in secret.says("/save")[0]
        secret.says("/fork other")
        secret.says("/save mine.tcs")
        assert len(list((home / "tmp").iterdir())) == 1
        if end == "Ctrl-D":
            secret.child.send(CTRL_D)
        else:
            secret.process.send_signal(getattr(signal, end))
        assert secret.status_code() == (0 if end == "Ctrl-D" else 143)
    assert sorted(path.name for path in home.iterdir()) == ["mine.tcs", "plain.jinja", "tmp"]
    assert not list((home / "tmp").iterdir())


def test_another_models_session_says_whose_it_is(romeo: Terminal, home: Path) -> None:
    model = write_model(home / "wide.gguf", "abcdefgh|", vocab_size=9, name="Letters")
    command("generate", "-m", model, "-p", "ab", "-n", 1, "-s", home / "l.tcs", "--save")
    told = re.compile(r"l\.tcs: is of another model \(tc\w+, 'Letters'\): its \w+ is .*; name its own with -m")
    assert told.search(" ".join(romeo.says("/load l.tcs")))
    for others in (("generate", "-p", "a"), ("absorb", "-f", home / "plain.jinja"), ("generate", "-p", "a", "--save")):
        assert told.search(refused(command(*others, *PLAY, "-s", home / "l.tcs")))


# Characters and escape sequences


def test_wide_and_combining_characters_come_through(home: Path) -> None:
    model = write_model(home / "wide.gguf", "漢字é🙂e\u0301 ab|👩\u200d🚀", vocab_size=15)
    with Terminal(home, *CHAT, "-m", model, *PLAIN, "-n", "30", "--name", "wide", "--seed", "1") as wide:
        wide.until(wide.ready)
        wide.child.send("漢字 🙂 e\u0301 é ab")
        wide.until(lambda: "ab" in wide.lines()[wide.screen.cursor.y])
        wide.child.send("\x7f\x7f\x1b[D\x1b[D\x1b[Dab\r")  # two back, three to the left
        wide.until(wide.ready)
        assert said(home, "wide") == ["漢字 🙂 e\u0301ab é "]
        assert "> 漢字 🙂 éab é" in unicodedata.normalize("NFC", wide.text())


HOSTILE = "\x1b[2JH]0;x\x07\x08\r\x9b\x85\u202e\u2028ab|"


def test_a_models_text_does_not_drive_the_terminal(home: Path) -> None:
    model = write_model(home / "evil.gguf", "".join(dict.fromkeys(HOSTILE)), vocab_size=len(set(HOSTILE)))
    bar = "".join(dict.fromkeys(HOSTILE)).index("|")
    options = ("-m", model, *PLAIN, "-n", "400", "--temp", "9", "-l", f"{bar}-inf", "--seed", "1")
    with Terminal(home, *CHAT, *options, "--top-k", "0", "--top-p", "1", "--min-p", "0") as evil:
        evil.until(evil.ready)
        greeting = evil.lines()[:2]
        answer = "".join(evil.says("ab"))
        assert evil.lines()[:2] == greeting
        assert answer.count("\ufffd") > 100
        assert evil.screen.title == ""
        assert not re.search(rb"\x07|\xc2[\x80-\x9f]|\x1b\[2J|\x1b\]", evil.raw)
    done = piped(home, *CHAT, *options, lines="ab\n")
    assert "\ufffd" in done.stdout
    assert done.stdout[:-1].isprintable()


def test_a_models_name_does_not_drive_the_terminal(home: Path) -> None:
    model = write_model(home / "evil.gguf", "ab|", vocab_size=3, name="nice\x1b[2J\x1b]0;x\x07\nname")
    done = piped(home, *CHAT, "-m", model, *PLAIN)
    assert done.returncode == 0
    assert "nice" in done.stderr
    assert all(line.isprintable() for line in done.stderr.splitlines())
    assert len(done.stderr.splitlines()) == len(piped(home, *CHAT).stderr.splitlines())


def test_what_languages_need_is_printed_as_it_is() -> None:
    for text in ("می\u200cخواهم", "👩\u200d🚀", "❤\ufe0f", "e\u0301", "क\u094dष", "a\tb\n", "漢字"):
        assert printable(text) == text
    assert printable("a\x1b[2J\x07\x9b\r\u202e\u2028b") == "a\ufffd[2J\ufffd\ufffd\ufffd\ufffdb"


def test_colour_is_for_errors_and_the_rest_is_dim(romeo: Terminal) -> None:
    romeo.says("/nonsense")
    romeo.says("Speak")
    assert b"\x1b[31mtcinfer:\x1b[0m /nonsense" in romeo.raw
    assert b"\x1b[2m(cut off after 8 tokens" in romeo.raw


def test_no_color_means_no_color(home: Path) -> None:
    with Terminal(home, *ROMEO, NO_COLOR="1") as plain:
        plain.until(plain.ready)
        plain.says("Speak")
        plain.says("/help")
        plain.says("/nonsense")
        plain.child.send(CTRL_D)
        assert plain.status_code() == 0
        codes = {code for found in re.findall(rb"\x1b\[([\d;]*)m", plain.raw) for code in found.split(b";") if code}
    assert codes <= {b"0", b"1", b"4", b"7"}  # reverse for the status line, but no colours


# Pipes


def test_a_pipe_is_answered_line_by_line(home: Path) -> None:
    done = piped(home, *ROMEO, "--name", "play", lines="Speak\n\nOn\r\n/undo\nAnd?")
    assert done.returncode == 0
    assert said(home) == ["Speak", "And?"]
    greeting, _, undone = done.stderr.splitlines()
    assert "tensor memory" in greeting
    assert undone == "took back 1 turn; 1 left"
    assert done.stdout.count("\n") >= 3
    assert "\x1b" not in done.stdout + done.stderr
    quiet = piped(home, *ROMEO, "-q", lines="Speak\nOn\n")
    assert quiet.stderr == ""
    assert done.stdout.startswith(quiet.stdout)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("/nonsense", "is no command"),
        ("na\u00efve", "not in the vocabulary"),
        ("/switch ../x", "is no name"),
        ("/load /", "is a folder"),
    ],
)
def test_a_bad_line_ends_a_pipe_with_one_line(home: Path, bad: str, says: str) -> None:
    done = piped(home, *ROMEO, "-q", "--name", "play", lines=f"Speak\n{bad}\nOn\n")
    assert done.returncode == 1
    assert done.stdout.count("\n") >= 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("tcinfer: ")
    assert says in line
    assert said(home) == ["Speak"]


def test_a_block_in_a_pipe_is_one_message(home: Path) -> None:
    done = piped(home, *ROMEO, "-q", "--name", "play", lines='"""First\nsecond"""\n')
    assert (done.returncode, said(home)) == (0, ["First\nsecond"])
    done = piped(home, *ROMEO, "-q", "--name", "open", lines='"""First\nsecond\n')
    if done.returncode == 0:  # an error would do as well; silence would not
        assert said(home, "open") == ["First\nsecond"]


def test_streams_that_are_closed(home: Path) -> None:
    def run(script: str) -> subprocess.CompletedProcess:
        line = ["bash", "-c", script, COMMAND, *ROMEO, "-q"]
        return subprocess.run(line, capture_output=True, text=True, env=environment(home), timeout=60)

    done = run('printf "Speak\\nOn\\n%.0s" {1..50} | "$0" "$@" | head -c 9; exit ${PIPESTATUS[1]}')
    assert (done.returncode, len(done.stdout), done.stderr) == (0, 9, "")
    assert refused(run('"$0" "$@" <&-'))


# From one process to the next


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("-m", "nowhere.gguf"), "nowhere.gguf: cannot be read"),
        (("--chat-template", "nowhere.jinja"), "nowhere.jinja: No such file"),
        (("--chat-template", "broken.jinja"), "the chat template"),
        (("--name", "../x"), "is no name"),
        (("--name", "taken"), "there is a conversation 'taken' already"),
        (("-c", "--name", "nobody"), "there is no conversation 'nobody'; known: taken, gone"),
        (("-c", "-sys", "Hi"), "--continue goes on with the memory and system prompt"),
        (("-c", "--window", "9"), "--continue goes on with the memory and system prompt"),
        (("-c", "--name", "gone"), "gone.gguf: cannot be read: No such file"),
        (("-n", "-2"), "max_tokens"),
        (("--temp", "nan"), "temperature"),
        (("--memory", "infini"), "no weights for infini"),
        (("--stop", ""), "stop strings"),
    ],
)
def test_what_is_refused_is_refused_in_one_line(
    home: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], says: str
) -> None:
    folder = home / "tcinfer" / "chats"
    folder.mkdir(parents=True)
    start = {"model": str(home / "gone.gguf"), "system": None, "memory": {}}
    for name in ("gone", "taken"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"start": start}) + "\n")
        time.sleep(0.01)
    (home / "broken.jinja").write_text("{% for %}")
    before = sorted(folder.iterdir())
    monkeypatch.chdir(home)
    assert says in refused(command("chat", *FAST, *arguments))
    assert sorted(folder.iterdir()) == before


def test_nothing_to_go_on_with(home: Path) -> None:
    assert "there is no conversation in" in refused(command(*CHAT, "--continue"))


def test_a_conversation_is_open_in_one_terminal_alone(romeo: Terminal, home: Path) -> None:
    romeo.says("Speak")
    assert "'play' is open in another terminal" in refused(piped(home, *CHAT, "-q", "--continue", lines="On\n"))
    romeo.says("And?")
    assert said(home) == ["Speak", "And?"]
    romeo.child.send(CTRL_D)
    assert romeo.status_code() == 0
    assert piped(home, *ROMEO, "-q", "--continue", lines="On\n").returncode == 0
    assert said(home) == ["Speak", "And?", "On"]


def test_kill_9_costs_the_unfinished_turn_alone(romeo: Terminal, home: Path) -> None:
    answer, _ = romeo.says("Speak")  # and that it was cut off
    romeo.says("/set max-tokens -1")
    romeo.says("/set logit-bias 0-inf")
    romeo.enter("And?")
    romeo.until(romeo.streaming)
    romeo.kill()
    with Terminal(home, *ROMEO, "--continue") as again:
        again.until(again.ready)
        assert f"the last answer was: {answer}" in again.lines()
        again.says("On")
    assert said(home) == ["Speak", "On"]


def test_a_conversation_keeps_its_template(home: Path) -> None:
    (home / "hamlet.jinja").write_text(TEMPLATE.replace("ROMEO", "HAMLET"))
    piped(home, *ROMEO, "--chat-template", "hamlet.jinja", "--name", "play", lines="Speak\n")
    assert piped(home, *ROMEO, "--continue", lines="On\n").returncode == 0
    fed = [i for record in log(home) for i in record.get("in", [])]
    assert shakespeare("numpy").tokenizer.decode(fed).count("HAMLET") == 2
