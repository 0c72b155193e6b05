"""The scripts of the proof run on real files, and their figures are what the runtime's own commands say."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from conftest import SHAKESPEARE, shared
from test_cli import command
from trainer_modules import trainer_modules

import tcinfer
from tcinfer import converters

pytestmark = pytest.mark.peer
torch = pytest.importorskip("torch")

trainer = pytest.fixture(scope="module")(trainer_modules)
TINY = (
    "--layers=2 --remember=1 --width=32 --heads=2 --window=8 --segment=16 --document=64 --batch=4 --steps=2 --float32"
)


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("books"), random.Random(1)
    sentence = "the old miller went to the river and saw a swan who said good morning to him there"
    for name in ("one", "two"):
        lines = (" ".join(rng.choices(sentence.split(), k=30)).capitalize() + "." for _ in range(60))
        (folder / f"{name}.txt").write_text("\n\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def model(trainer: SimpleNamespace, books: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model")
    done = CliRunner().invoke(trainer.train.main, [f"--data={books}", f"--out={out}", "--vocab=340", *TINY.split()])
    assert done.exit_code == 0, done.output
    converters.convert(out / "ckpt.pt", out / "model.gguf", "f32", verify=False)
    return out / "model.gguf"


def test_ask(trainer: SimpleNamespace, model: Path, books: Path, tmp_path: Path) -> None:
    arguments = [str(model), f"--book={books / 'one.txt'}", "--trials=2", "--facts=2", f"--json={tmp_path / 'a.json'}"]
    done = CliRunner().invoke(trainer.ask.main, arguments)
    assert done.exit_code == 0, done.output
    scores = json.loads((tmp_path / "a.json").read_text())
    assert {(s["memory"], s["gap"], s["words"]) for s in scores} == {
        (memory, gap, words)
        for memory in ("tensor", "window")
        for gap in (2, 4, 8, 16)
        for words in ("trained", "held out")
    }
    assert all(s["asked"] == 4 and 0 <= s["right"] <= 4 for s in scores)
    assert "| gap | words | model | memory off |" in done.output
    assert done.output.count("| 16 W |") == 2


def test_answers_are_paired_with_the_baselines(trainer: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: in each of four trials `good` is right where `base` is wrong, and both are right about the rest."""
    widest = SimpleNamespace(window=2)
    models = {n: SimpleNamespace(config=SimpleNamespace(widest=widest, memories=n)) for n in ("good", "base", "a")}
    answers = {"good": [True, True], "base": [False, True], "a": [False, False]}
    monkeypatch.setattr(trainer.ask, "trial", lambda *_: answers)
    scores = trainer.ask.measure(models, list(range(99)), 4, 2, 1, "base")
    assert [(s.right, s.asked, s.error, s.p) for s in scores[:3]] == [(8, 8, 0, 2**-4), (4, 8, 0, 1), (0, 8, 0, 1)]
    head, _, row, *_ = trainer.ask.table(scores, "base").splitlines()
    assert head == "| gap | words | good | base | a |"
    assert row == "| 2 W | trained | 1.000 ± 0.000 (p = 0.06) | 0.500 ± 0.000 | 0.000 ± 0.000 (p = 1) |"


def test_what_the_scripts_refuse(trainer: SimpleNamespace, model: Path, books: Path, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(model.read_bytes())
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    (tmp_path / "short.txt").write_text("Too short.")
    for script, arguments, says in (
        ("ask", [str(model), str(tmp_path / "model.gguf"), f"--book={books / 'one.txt'}"], "two files have one name"),
        ("ask", [str(tmp_path / "broken.gguf"), f"--book={books / 'one.txt'}"], "broken.gguf"),
        ("ask", [str(model), SHAKESPEARE, f"--book={books / 'one.txt'}"], "another vocabulary"),
        ("ask", [str(model), f"--book={tmp_path / 'short.txt'}"], "too short"),
        ("ask", [str(model), f"--book={books / 'one.txt'}", "--against=it"], "no such model among model"),
        ("distance", [str(model), f"--books={tmp_path / 'none'}"], "does not exist"),
        ("distance", [str(model), f"--books={model.parent}"], "no *.txt"),
        ("distance", [str(model), f"--books={books}", f"--plot={tmp_path}/x.pdf"], "ends in .svg"),
        ("compare", [f"--books={books}", f"--vocabulary={books}", f"--out={tmp_path / 'out'}"], "no tokenizer.model"),
    ):
        done = CliRunner().invoke(getattr(trainer, script).main, arguments)
        assert done.exit_code in (1, 2), done.output
        assert isinstance(done.exception, SystemExit), done.exception
        assert says in " ".join(done.output.split())


def test_the_gap_is_what_it_says(
    trainer: SimpleNamespace, model: Path, books: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the last fact's answer and its question's stand `gap` tokens, give or take how long questions are."""
    runtime = tcinfer.load(model)
    pieces, fed = runtime.tokenizer, []
    monkeypatch.setattr(type(runtime.session()), "feed", spy(type(runtime.session()).feed, fed))
    trainer.ask.trial({"it": runtime}, pieces.encode((books / "one.txt").read_text()), 1600, 1, random.Random(3), False)
    head, question = fed
    told = pieces.decode(head).index("I will remember")
    answer_told = len(pieces.encode(pieces.decode(head)[:told]))
    assert 1600 <= len(head) + len(question) - answer_told <= 1640


def spy(feed, fed):
    def seen(self, ids, *rest, **more):
        fed.append(list(ids))
        return feed(self, ids, *rest, **more)

    return seen


@pytest.mark.parametrize(
    ("better", "worse", "p"), [(0, 0, 1), (0, 9, 1), (9, 0, 2**-9), (2, 1, 0.5), (999, 999, 0.509)]
)
def test_the_sign_test(trainer: SimpleNamespace, better: int, worse: int, p: float) -> None:
    assert trainer.ask.sign_test(better, worse) == pytest.approx(p, rel=1e-3)


def test_distance_agrees_with_the_command(trainer: SimpleNamespace, model: Path, books: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        trainer.distance.main,
        [
            str(model),
            "--off",
            f"--books={books}",
            "--limit=600",
            f"--json={tmp_path / 'd.json'}",
            f"--plot={tmp_path / 'd.svg'}",
        ],
    )
    assert done.exit_code == 0, done.output
    assert (tmp_path / "d.svg").read_text().count("</svg>") == 1
    bins = json.loads((tmp_path / "d.json").read_text())["bins"]
    for number, book in enumerate(("one", "two")):
        memories = ("--memory", "tensor", "--memory", "window", "--by-position", "--output", "json")
        told = command("perplexity", "-m", model, "-f", books / f"{book}.txt", "--limit", 600, *memories)
        names = {"tensor:8": "model", "window:8": "memory off"}
        for row in json.loads(told.out)["rows"]:
            tokens, nll = bins[row["windows"]][names[row["memory"]]][number]
            assert tokens == row["tokens"]
            assert nll == pytest.approx(row["nll"], abs=1e-6)


def test_parts_of_books(trainer: SimpleNamespace, model: Path, books: Path) -> None:
    """Each from an empty state: no bin is farther than a part is long, and every part counts."""
    done = CliRunner().invoke(trainer.distance.main, [str(model), f"--books={books}", "--cut=40"])
    assert done.exit_code == 0, done.output
    runtime = tcinfer.load(model)
    parts = sum(len(runtime.tokenizer.encode((books / f"{name}.txt").read_text())) // 40 for name in ("one", "two"))
    labels = [line.split(" | ")[:2] for line in done.output.splitlines()[2:] if line.startswith("|")]
    assert labels == [[f"| {label}", str(parts)] for label in ("0-1", "1-2", "2-4", "4-8", "all")]


def test_means_over_books(trainer: SimpleNamespace) -> None:
    mean, error = trainer.distance.mean([(10, 1.0), (30, 2.0)])
    assert mean == 1.75
    assert error == pytest.approx(math.sqrt(2 * (7.5**2 + 7.5**2)) / 40)


def test_footprint(trainer: SimpleNamespace, model: Path) -> None:
    done = CliRunner().invoke(trainer.footprint.main, [str(model), "--measured=256"])
    assert done.exit_code == 0, done.output
    state = tcinfer.load(model).session().nbytes
    per_token = 2 * 2 * 32 * 2  # keys and values, layers, channels, bytes
    assert f"| 256 | {state:,} | {256 * per_token:,} |" in done.output
    assert f"| 10,485,760 | {state:,} | {10_485_760 * per_token:,} |" in done.output


@pytest.mark.slow
def test_compare(trainer: SimpleNamespace, books: Path, model: Path, tmp_path: Path, monkeypatch) -> None:
    """Five models, trained and converted; a second call has nothing left to do."""
    folder = tmp_path / "books"
    for part in ("tales", "novels", "valid"):
        (folder / part).mkdir(parents=True)
        (folder / part / "a.txt").write_text((books / "one.txt").read_text())
    small = {
        "layers": 2,
        "remember": 2,
        "heads": 2,
        "width": 32,
        "window": 8,
        "segment": 16,
        "document": 64,
        "batch": 2,
    }
    monkeypatch.setattr(trainer.compare, "SIZE", small)
    line = [
        f"--books={folder}",
        f"--vocabulary={model.parent}",
        f"--out={tmp_path / 'out'}",
        "--steps=2",
        "--threads=1",
    ]
    for _ in range(2):
        done = CliRunner().invoke(trainer.compare.main, line)
        assert done.exit_code == 0, done.output
    for memory in ("full", "window", "sinks", "infini", "tensor"):
        loaded = tcinfer.load(tmp_path / "out" / f"{memory}.gguf")
        assert loaded.config.memory == memory
        assert loaded.config.key_conv == 2


@pytest.mark.slow
def test_the_storyteller_remembers(trainer: SimpleNamespace) -> None:
    """The bundled weights: told, read pages, asked; with its memory clearly more than with the window alone."""
    book = shared("data", "books", "valid", "Edith_Nesbit__The_Book_of_Dragons.txt")
    models = {"on": tcinfer.load(), "off": tcinfer.load(memory="window")}
    ids = models["on"].tokenizer.encode(book.read_text())
    for score in trainer.ask.measure(models, ids, 10, 3, seed=2, base="off"):
        if score.words == "trained":
            assert score.right >= 24 if score.model == "on" else score.right <= 6
        elif score.model == "on":
            assert score.p < 0.05
