"""The scripts of the proof run on real files, and their figures are what the runtime's own commands say."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from conftest import shared
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
    assert done.output.count("| 16 W |") == 2


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


@pytest.mark.parametrize(("right", "asked", "rate", "p"), [(0, 9, 0.3, 1), (9, 9, 0.5, 2**-9), (10, 10, 0, 1e-10)])
def test_binomial_tail(trainer: SimpleNamespace, right: int, asked: int, rate: float, p: float) -> None:
    assert trainer.ask.chance_of(right, asked, rate) == pytest.approx(p)


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
    line = [f"--books={folder}", f"--vocabulary={model.parent}", f"--out={tmp_path / 'out'}", "--steps=2"]
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
    file = Path(tcinfer.loader.bundled()).with_name("storyteller.gguf")
    if not file.exists():
        pytest.skip("no storyteller yet")
    book = shared("data", "books", "valid") / "Beatrix_Potter__The_Tale_of_Peter_Rabbit.txt"
    book = book if book.exists() else next(iter(sorted(shared("data", "books", "valid").glob("*.txt"))))
    models = {"on": tcinfer.load(file), "off": tcinfer.load(file, memory="window")}
    ids = models["on"].tokenizer.encode(book.read_text())
    scores = trainer.ask.measure(models, ids, 10, 3, seed=2)
    for gap in (2, 4):
        on, off = (
            sum(s.right for s in scores if s.model == name and s.gap == gap and s.words == "trained") for name in models
        )
        assert trainer.ask.chance_of(on, 30, off / 30) < 1e-3
