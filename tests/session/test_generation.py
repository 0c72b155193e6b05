"""Text from sessions: going on from a file, what never comes up in a text, what ends it, what makes it come again."""

from __future__ import annotations

import json
import math
import re
import signal
import string
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SHAKESPEARE, smollm2, tcinfer
from test_absorb import byte_level
from test_cli import FAST, PLAY, ROMEO, command, refused, start
from test_memory import IDS
from test_session_file import BOUNDED, GROWING, model

import tcinfer as package
from tcinfer import session_file
from tcinfer.api import Model, Session
from tcinfer.constraint import Constraint
from tcinfer.engine import compiled
from tcinfer.errors import TcinferError
from tcinfer.sampling import Sampling
from tcinfer.sequence import RECENT

PROMPT = "ROMEO:\n"
ON = ("-p", "")  # nothing beside the session; without it, standard input is the prompt
PARROT = "\N{PARROT}"


@pytest.fixture(scope="module")
def shakespeare() -> Model:
    return package.load(SHAKESPEARE, threads=1)


@pytest.fixture(scope="module")
def smol() -> Model:
    return package.load(smollm2(), memory="sinks", window=128)


@pytest.fixture(scope="module")
def upon(smol: Model) -> list[str]:
    """What it writes when left alone, token by token."""
    return [piece.text for piece in smol.session().generate("Once upon a time", 60, temperature=0)]


@pytest.fixture(scope="module")
def byte_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level(tmp_path_factory.mktemp("bytes") / "m.gguf")


@pytest.fixture(scope="module")
def bytewise(byte_file: Path) -> Model:
    """A small model of random weights with GPT-2's byte-level tokens: a parrot takes three."""
    return package.load(byte_file, backend="numpy")


def ids(session: Session, max_tokens: int, **options: Any) -> list[int]:
    return [piece.id for piece in session.generate(max_tokens=max_tokens, **options)]


def text(session: Session, prompt: Any = None, **options: Any) -> str:
    return "".join(piece.text for piece in session.generate(prompt, **{"max_tokens": 200, "seed": 3} | options))


def again(session: Session, path: Path) -> Session:
    """The session after a stay in a file."""
    session.save(path)
    return session.model.load_session(path)


# Going on from a file

WAYS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 1.5},
    "penalties": {"repeat_penalty": 1.5, "repeat_last_n": -1, "presence_penalty": 0.3, "frequency_penalty": 0.2},
    "DRY": {"dry_multiplier": 2.0, "dry_allowed_length": 1, "temperature": 0.3},
    "Mirostat": {"mirostat": 2, "mirostat_tau": 2.0, "mirostat_eta": 0.5},
    "XTC": {"xtc_probability": 0.5, "xtc_threshold": 0.05},
    "all": {"repeat_penalty": 1.2, "dry_multiplier": 0.5, "dynatemp_range": 0.3, "typical": 0.9, "top_n_sigma": 2.0},
}


@pytest.mark.parametrize("way", WAYS)
def test_sampling_goes_on_from_a_file(way: str, backend: str, tmp_path: Path) -> None:
    def begun() -> Session:
        session = model("tensor-everything", backend).session()
        session.feed(IDS[:10])
        return session

    want = ids(begun(), 30, seed=5, **WAYS[way])
    assert want != ids(begun(), 30, seed=5)
    assert want != ids(begun(), 30, seed=6, **WAYS[way])
    for cut in (1, 17):
        session = begun()
        got = ids(session, cut, seed=5, **WAYS[way])
        got += ids(again(session, tmp_path / "s.tcs"), 30 - cut, **WAYS[way])
        assert got == want


@pytest.mark.parametrize("name", BOUNDED + GROWING)
def test_every_memory_writes_on_from_a_file(name: str, tmp_path: Path) -> None:
    one, how = model(name, "numba").session(), WAYS["all"]
    one.feed(IDS[:3])
    two = one.fork()
    want = ids(one, 30, seed=1, **how)
    got = ids(two, 1, seed=1, **how)
    for _ in range(29):
        two = again(two, tmp_path / "s.tcs") if two.position in (5, 20) else two
        got += ids(two, 1, **how)
    assert got == want


def test_penalties_remember_all_that_a_file_holds(tmp_path: Path) -> None:
    """More tokens than are kept, the oldest of them the only ones of their kind."""
    session = model("window", "numba").session()
    session.feed(np.concatenate([[49] * 5, [1] * 100, [7] * (RECENT - 1)]))
    other, how = again(session, tmp_path / "s.tcs"), {"repeat_penalty": 1e4, "repeat_last_n": -1, "temperature": 1}
    assert other.recent.tolist() == session.recent.tolist() == [1] + [7] * (RECENT - 1)
    assert ids(other, 40, seed=1, **how) == ids(session, 40, seed=1, **how)


@pytest.mark.parametrize("options", ["", "--mirostat 2 --temp 1.2", "--repeat-penalty 1.3 --dry-multiplier 1"])
def test_200_tokens_are_twice_100(options: str, tmp_path: Path) -> None:
    path, how = tmp_path / "s.tcs", ("generate", "-m", SHAKESPEARE, "--threads", 1, *options.split())
    whole = command(*how, "-p", PROMPT, "-n", 200, "--seed", 8).out
    first = command(*how, "-p", PROMPT, "-n", 100, "--seed", 8, "-s", path, "--save")
    middle = path.read_bytes()
    second = command(*how, *ON, "-n", 100, "-s", path)
    assert (first.out + second.out, len(first.out)) == (whole, 100)
    assert path.read_bytes() == middle  # it was no --save
    third = command(*how, *ON, "-n", 100, "-s", path, "--save")
    assert (third.out, session_file.read(path).position) == (second.out, len(PROMPT) + 200)
    assert path.stat().st_size == len(middle)


@pytest.mark.parametrize("word", [PARROT, "a\N{GRINNING FACE}\u4e2d\N{SNOWMAN}b", "na\u00efve \N{PARROT}\N{PARROT}"])
def test_characters_are_whole_wherever_a_text_is_cut(word: str, bytewise: Model, tmp_path: Path) -> None:
    """Each token in a run of its own, with a file between; what a run shows is whole characters."""
    wanted, shown = bytewise.tokenizer.encode(word), []
    session = bytewise.session()
    session.feed(1)
    for token in wanted:
        (piece,) = session.generate(max_tokens=1, temperature=0, logit_bias={token: 1e6})
        assert piece.id == token
        shown.append(piece.text)
        session = again(session, tmp_path / "s.tcs")
    assert "".join(shown) == word
    assert "" in shown


def test_characters_are_whole_across_commands(byte_file: Path, bytewise: Model, tmp_path: Path) -> None:
    outs, path = [], tmp_path / "s.tcs"
    for i, token in enumerate(bytewise.tokenizer.encode(PARROT)):
        how = ("-m", byte_file, "-n", 1, "--temp", 0, "-l", f"{token}+1e6", "-s", path, "--save")
        outs.append(command("generate", *FAST, *how, *(ON if i else ("-p", "A"))).out)
    assert outs == ["", "", PARROT]


def test_no_character_is_ever_torn(bytewise: Model) -> None:
    """Random tokens of any bytes: together the pieces are what a decoder makes of all of them."""
    session = bytewise.session()
    starts = {i: 20.0 for i in range(50257) if bytewise.tokenizer.token_bytes(i)[:1] > b"\x7f"}
    pieces = list(session.generate([1], 120, seed=1, temperature=2, logit_bias=starts, top_k=0))
    every = b"".join(bytewise.tokenizer.token_bytes(piece.id) for piece in pieces)
    shown = "".join(piece.text for piece in pieces)
    assert every.decode(errors="replace").startswith(shown)
    assert len(every.decode(errors="replace")) - len(shown) <= 1
    assert shown.count("\ufffd") > 10


# Session files of `generate`


MADE = (
    "--memory sinks --window 20",
    "--memory full",
    "--window 20 --cache-type f32",
    "--window 9 --sinks 3",
    "--threads 1",
)


@pytest.mark.parametrize("options", MADE)
def test_memory_options_are_the_files(options: str, tmp_path: Path) -> None:
    """The same text without them as with all of them or with one; other ones are refused."""
    path, made = tmp_path / "s.tcs", options.split()
    assert command(*ROMEO, *made, "-n", 30, "-s", path, "--save", "--seed", 1).status == 0
    goes_on = ("generate", *PLAY, *ON, "-n", 30, "-s", path)
    plain, *others = (command(*goes_on, *given) for given in ([], made, made[-2:]))
    assert (plain.status, len(plain.out)) == (0, 30), plain.err
    assert [other.out for other in others] == [plain.out] * 2, others[-1].err
    wrong = "f16" if "f32" in options else "f32"
    assert "s.tcs: was made with " in refused(command(*goes_on, "--cache-type", wrong))


def test_what_is_refused_leaves_the_file(tmp_path: Path) -> None:
    good, new = tmp_path / "good.tcs", tmp_path / "new.tcs"
    assert command("generate", *PLAY, "-s", good, "--save", "-p", PROMPT, "-n", 3).status == 0
    before = good.read_bytes()
    for arguments in (
        ("-p", "na\u00efve"),
        ("-p", "a", "-l", "999+1"),
        ("-p", "a", "--temp", "nan"),
        ("-p", "a", "--grammar", "start: ("),
        ("-p", "a", "--stop", ""),
        ("-p", "a", "-n", "-2"),
        ("-f", "nowhere"),
        ("-p", "a", "--window", "0"),
        ("-p", "a", "--grammar", "start: /[4-9]/"),  # the vocabulary has no such digit
    ):
        for path in (good, new):
            refused(command("generate", *PLAY, "-s", path, "--save", *arguments))
        assert good.read_bytes() == before, arguments
        assert not new.exists(), arguments
    assert "needs the session's file" in refused(command("generate", *PLAY, "--save", "-p", "a"))
    assert "No such file" in refused(command("generate", *PLAY, "-s", new, "-p", "a"))


def test_an_interrupt_saves_what_was_shown(tmp_path: Path) -> None:
    path = tmp_path / "s.tcs"
    with start("generate", *PLAY, "-p", PROMPT, "-n", "-1", "-s", str(path), "--save") as process:
        assert process.stdout is not None
        shown = process.stdout.read(50)
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=30)
    assert (process.returncode, err.count("\n")) == (130, 1)
    assert session_file.read(path).position in (len(PROMPT + shown + rest), len(PROMPT + shown + rest) + 1)


def test_stats_are_a_line_of_json_and_quiet_is_quiet(tmp_path: Path) -> None:
    path = tmp_path / "s.tcs"
    done = tcinfer("generate", *PLAY, "-p", PROMPT, "-n", "150", "-s", str(path), "--save", "--stats", "json")
    figures = json.loads(done.stderr)
    assert done.stderr.count("\n") == 1
    assert figures.items() >= {"prompt_tokens": 7, "new_tokens": 150, "position": 157, "outside_window": 29}.items()
    assert 0 < figures["prompt_seconds"] < 60
    assert 0 < figures["new_seconds"] < 60
    assert figures["state_bytes"] == session_file.read(path).state.nbytes
    figures = json.loads(command("generate", *PLAY, *ON, "-n", 5, "-s", path, "--stats", "json").err)
    assert (figures["prompt_tokens"], figures["prompt_seconds"], figures["position"]) == (0, 0, 162)
    done = tcinfer("generate", *PLAY, "-n", "5", "-s", str(path), "--quiet")
    assert (done.returncode, len(done.stdout), done.stderr) == (0, 5, "")
    assert "must be one of text, json" in refused(command("generate", *PLAY, "-p", "a", "--stats", "xml"))


# Banned texts

BANS = (
    ["the"],
    ["th", "he", "e "],
    ["e"],
    ["\n"],
    [" ", "e"],
    ["an", "nd", "and", "a"],
    [*"aeiou"],
    [":", "\n\n", "s,"],
)


@pytest.mark.parametrize("bans", BANS, ids=ascii)
def test_banned_texts_never_come_up(bans: list[str], shakespeare: Model) -> None:
    free = text(shakespeare.session(), PROMPT)
    assert any(ban in free for ban in bans)
    for how in ({"temperature": 0}, {"temperature": 2.0, "top_k": 0}, {"mirostat": 2}):
        got = text(shakespeare.session(), PROMPT, banned=bans, max_tokens=120, **how)
        assert len(got) == 120
        assert not any(ban in got for ban in bans)


WORDS = [[" the", " a"], ["the", "he", "th"]]
MORE = [[" I", ". ", "ed "], ["in", "ing", "n ", ","], ["e"], [" "], [*"etaoin"]]
MORE = [pytest.param(bans, marks=pytest.mark.slow) for bans in MORE]


@pytest.mark.parametrize("bans", WORDS + MORE, ids=ascii)
def test_banned_texts_never_come_up_across_tokens(bans: list[str], smol: Model, upon: list[str]) -> None:
    assert any(ban in "".join(upon) for ban in bans)
    for temperature in (0, 1):
        got = text(smol.session(), "Once upon a time", banned=bans, temperature=temperature, max_tokens=20)
        assert got
        assert not any(ban in got for ban in bans)


def test_only_what_would_complete_it_is_another_token(shakespeare: Model) -> None:
    free = text(shakespeare.session(), PROMPT)
    for a, b in ((0, 1), (20, 30), (57, 59), (100, 190)):
        got = text(shakespeare.session(), PROMPT, banned=free[a:b])
        at = free.index(free[a:b]) + b - a - 1
        assert got[:at] == free[:at]
        assert free[a:b] not in got


def test_of_greedy_choices_the_next_likeliest_follows(shakespeare: Model) -> None:
    session = shakespeare.session()
    order = np.argsort(-session.feed(shakespeare.tokenizer.encode(PROMPT)), kind="stable").tolist()
    for n in (0, 1, 5):
        bans = [shakespeare.tokenizer.decode([i]) for i in order[:n]]
        assert ids(session.fork(), 1, temperature=0, banned=bans) == [order[n]]


def test_a_ban_reaches_across_two_calls(shakespeare: Model, tmp_path: Path) -> None:
    """What one run has begun, the next one does not complete: two of 10 tokens are one of 20."""
    free = text(shakespeare.session(), PROMPT, max_tokens=20)
    ban = free[6:14]
    want, session = text(shakespeare.session(), PROMPT, max_tokens=20, banned=ban), shakespeare.session()
    got = text(session, PROMPT, max_tokens=10, banned=ban)
    got += text(again(session, tmp_path / "s.tcs"), max_tokens=10, seed=-1, banned=ban)
    assert ban not in got
    assert got == want


def test_a_ban_of_everything_is_said(shakespeare: Model) -> None:
    session, every = shakespeare.session(), [shakespeare.tokenizer.decode([i]) for i in range(65)]
    with pytest.raises(TcinferError, match="no token may come next"):
        text(session, PROMPT, banned=every)
    assert session.position == len(PROMPT)
    assert len(text(session, max_tokens=9, banned=every[:-1])) == 9


@pytest.mark.parametrize(
    ("grammar", "bans"), [("start: /[a-z ]{60}/", ["e", "th", " "]), ('start: ("ab" | "c"){30}', ["bc"])]
)
def test_a_grammar_and_bans_hold_together(grammar: str, bans: list[str], shakespeare: Model) -> None:
    pytest.importorskip("llguidance")
    follow = Constraint(shakespeare.tokenizer, shakespeare.config.vocab_size, grammar=grammar)
    got = text(shakespeare.session(), PROMPT, constraint=follow, banned=bans)
    assert not any(ban in got for ban in bans)
    assert re.fullmatch(r"[a-z]{60}|c*(ab)+", got)


# What ends it


@pytest.mark.parametrize(("a", "b"), [(3, 5), (10, 24), (31, 32), (40, 60)])
def test_stop_texts_end_it_across_tokens(a: int, b: int, smol: Model, upon: list[str]) -> None:
    free = "".join(upon)
    stop, session = free[a:b], smol.session()
    pieces = list(session.generate("Once upon a time", 30, temperature=0, stop=["never comes", stop]))
    assert "".join(piece.text for piece in pieces) == free[: free.index(stop)]
    assert session.position == 4 + len(pieces)
    assert [piece.id for piece in pieces] == session.recent[4:].tolist()


def test_stop_ids_end_it_and_are_not_fed(shakespeare: Model) -> None:
    free = ids(shakespeare.session(), 60, prompt=PROMPT, seed=3)
    for stop in ({free[0]}, {free[17]}, {free[30], free[44]}):
        session, at = shakespeare.session(), min(free.index(token) for token in stop)
        assert ids(session, 60, prompt=PROMPT, seed=3, stop_ids=np.array(sorted(stop))) == free[:at]
        assert session.position == len(PROMPT) + at


# What makes it come again


def test_a_seed_is_a_text_on_any_threads_however_the_prompt_was_fed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "WORTH_SHARING", 0)
    found, prompt = set(), PROMPT * 40
    for threads in (1, 3):
        m = package.load(threads=threads)
        tokens = m.tokenizer.encode(prompt)
        for cuts in ([], [1, 2, 3], [100, 101, 257], range(0, len(tokens), 7)):
            session = m.session()
            for a, b in pairwise([0, *cuts]):
                if a < b:
                    session.feed(tokens[a:b])
            found.add(text(session, tokens[session.position :] or None, max_tokens=60, temperature=1.2))
    assert len(found) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"nonsense": 1}, "no option 'nonsense'; sampling has temperature, "),
        ({"temp": 1}, "no option 'temp'"),
        ({"temperature": 1, "Top_K": 1}, "no option 'Top_K'"),
        ({"samplers": ["top_k"]}, "samplers"),
        ({"sampling": {"seed": 1}}, "is a tcinfer.Sampling, not dict"),
        ({"stop_ids": "abc"}, "stop_ids"),
        ({"stop_ids": 5}, "stop_ids"),
        ({"stop_ids": [1.5]}, "stop_ids"),
        ({"stop_ids": [65]}, "outside the vocabulary of 65"),
        ({"stop_ids": [-1]}, "outside the vocabulary of 65"),
        ({"logit_bias": {65: 1.0}}, "outside the vocabulary of 65"),
        ({"banned": [""]}, "banned"),
        ({"banned": 5}, "banned"),
        ({"constraint": "start: /a/"}, "constraint"),
        ({"max_tokens": True}, "max_tokens"),
        ({"prompt": b"abc"}, "whole numbers"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_at_once(options: dict[str, Any], says: str, shakespeare: Model) -> None:
    """When it is called, not when the first piece is asked for."""
    session = shakespeare.session()
    with pytest.raises(TcinferError, match=re.escape(says)):
        session.generate(**{"prompt": "a"} | options)
    assert session.position == 0


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("taken", [0, 1, 25])
def test_what_is_left_half_way_is_a_session_to_use(taken: int, closed: bool, shakespeare: Model) -> None:
    want, session = text(shakespeare.session(), PROMPT, max_tokens=60), shakespeare.session()
    pieces = session.generate(PROMPT, -1, seed=3, stop="\x00")
    got = "".join(next(pieces).text for _ in range(taken))
    if closed:
        pieces.close()
    del pieces
    assert session.position == (len(PROMPT) + taken if taken else 0)
    assert session.whole
    if taken:
        assert got + text(session, seed=-1, max_tokens=60 - taken) == want
    else:
        assert text(session, PROMPT, max_tokens=60) == want


def test_logits_of_a_session_are_its_own(shakespeare: Model) -> None:
    """They are shared with its snapshots and forks, and so nobody may write to them."""
    session = shakespeare.session()
    session.feed(shakespeare.tokenizer.encode(PROMPT))
    fork = session.fork()
    before = fork.logits.copy()
    with pytest.raises(ValueError, match="read-only"):
        session.logits[:] = -math.inf
    np.testing.assert_array_equal(fork.logits, before)


@pytest.mark.slow
def test_a_ban_of_nearly_everything_takes_no_minutes(smol: Model) -> None:
    """All that is left of 49,152 tokens are those without ASCII."""
    got = text(smol.session(), "Once upon", max_tokens=3, banned=[*string.printable])
    assert not set(got) & set(string.printable)


# Many at once


@pytest.mark.parametrize("way", WAYS)
def test_many_are_stepped_as_each_would_write(way: str, shakespeare: Model) -> None:
    """With breakers of DRY that the text is full of: without them it would be another one."""
    how = Sampling(**{"seed": 5} | WAYS[way], dry_sequence_breakers=(" ", "e"))
    prompts = [shakespeare.tokenizer.encode(text) for text in (PROMPT, "the king and the queen and the k")]
    want = [ids(shakespeare.session(), 20, prompt=prompt, sampling=how) for prompt in prompts]
    if way == "DRY":
        other = replace(how, dry_sequence_breakers=())
        assert want != [ids(shakespeare.session(), 20, prompt=prompt, sampling=other) for prompt in prompts]
    sessions = [shakespeare.session() for _ in prompts]
    for session, prompt in zip(sessions, prompts, strict=True):
        session.feed(prompt[:-1])
    tokens, got = [prompt[-1] for prompt in prompts], []
    for _ in range(20):
        tokens = shakespeare.step_many(sessions, tokens, how).tolist()
        got.append(tokens)
    assert np.array(got).T.tolist() == want


def test_a_bias_of_no_id_is_refused_before_any_session_moves_on(shakespeare: Model) -> None:
    sessions = [shakespeare.session() for _ in range(2)]
    with pytest.raises(TcinferError, match="outside the vocabulary"):
        shakespeare.step_many(sessions, [1, 2], Sampling(logit_bias={10**6: 1.0}))
    assert [session.position for session in sessions] == [0, 0]


@pytest.mark.parametrize("prompt", [[[1], [2, 3]], [[1, 2]], [None], {}, object()])
def test_a_prompt_that_is_no_list_of_ids_is_refused(prompt: Any, shakespeare: Model) -> None:
    session = shakespeare.session()
    with pytest.raises(TcinferError, match="ids must be"):
        session.generate(prompt)
    with pytest.raises(TcinferError, match="ids must be"):
        shakespeare.step_many([session], prompt)
