"""Recall in text: tell a model facts, let it read pages of a book, ask. With its memory, and with the window alone.

    python models/trainer/ask.py storyteller.gguf window.gguf --book books/valid/A_Book.txt

Runs in tcinfer, token by token, without PyTorch. A question counts as answered if every token of the answer is the most
likely one. The gap is the number of tokens between the fact's answer and the question's, in windows.
"""

import json
import math
import random
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import exercises
import vocabulary

from tcinfer.loader import load
from tcinfer.model import Model
from tcinfer.progress import bar

GAPS = (2, 4, 8, 16)  # windows


@dataclass(frozen=True)
class Score:
    """How many questions were answered, of those put."""

    model: str
    memory: str
    gap: int  # windows
    words: str  # "trained": of the training exercises; "held out": never an answer there
    right: int
    asked: int

    @property
    def share(self) -> float:
        return self.right / self.asked

    @property
    def error(self) -> float:
        return math.sqrt(self.share * (1 - self.share) / self.asked)


def chance_of(right: int, asked: int, rate: float) -> float:
    """One-sided binomial test: the probability of at least `right` of `asked` where each has probability `rate`."""
    rate = max(rate, 1 / asked)  # what was never seen may still happen
    return min(1.0, sum(math.comb(asked, k) * rate**k * (1 - rate) ** (asked - k) for k in range(right, asked + 1)))


def trial(models: dict[str, Model], pages: list[int], gap: int, count: int, rng: random.Random, held_out: bool):
    """Which of `count` questions each model answers, {name: [bool]}: all facts told at once, then pages, then each
    question put to a fork of the session."""
    pieces = next(iter(models.values())).tokenizer
    told, questions = exercises.facts(rng, count, held_out)
    head = [pieces.bos_id, *pieces.encode(f"{told}{vocabulary.PARAGRAPH}{exercises.KEPT}"), pieces.eos_id]
    pages = [*pieces.encode(vocabulary.PARAGRAPH), *pages]
    prompts = [pieces.encode(f"{vocabulary.PARAGRAPH}{q.ask}{vocabulary.PARAGRAPH}{q.lead}") for q in questions]
    answers = [pieces.encode(q.answer.removesuffix(".")) for q in questions]
    filler = pages[: gap - len(pieces.encode(exercises.KEPT)) - max(map(len, prompts))]
    found = {}
    for name, model in models.items():
        session = model.session()
        session.feed([*head, *filler])
        found[name] = []
        for prompt, answer in zip(prompts, answers, strict=True):
            fork = session.fork()
            logits = fork.feed([*prompt, *answer[:-1]], all_logits=True)[len(prompt) - 1 :]
            found[name].append(logits.argmax(-1).tolist() == answer)
    return found


def measure(models: dict[str, Model], book: list[int], trials: int, count: int, seed: int) -> list[Score]:
    """Every model on the same facts and pages, for each gap and both kinds of words."""
    window = next(model.config.window for model in models.values() if model.config.window)
    right: Counter = Counter()
    with bar("asking", trials * len(GAPS) * 2) as advance:
        for gap in GAPS:
            for held_out in (False, True):
                for number in range(trials):
                    rng = random.Random(f"{seed} {gap} {held_out} {number}")
                    start = rng.randrange(len(book) - gap * window)
                    pages = book[start : start + gap * window]
                    for name, answered in trial(models, pages, gap * window, count, rng, held_out).items():
                        right[name, gap, held_out] += sum(answered)
                    advance(1)
    words = {False: "trained", True: "held out"}
    return [
        Score(name, models[name].config.memory, gap, words[held_out], hits, trials * count)
        for (name, gap, held_out), hits in sorted(right.items())
    ]


def table(scores: list[Score]) -> str:
    """Rows of gaps, a column for each model; the last model is the one the others are tested against."""
    names = list(dict.fromkeys(score.model for score in scores))
    by = {(s.model, s.gap, s.words): s for s in scores}
    lines = ["| gap | words | " + " | ".join(names) + " |", "|---|---|" + "---:|" * len(names)]
    for gap, words in sorted({(s.gap, s.words) for s in scores}):
        cells = []
        for name in names:
            score, base = by[name, gap, words], by[names[-1], gap, words]
            p = "" if score is base else f" (p = {chance_of(score.right, score.asked, base.share):.1g})"
            cells.append(f"{score.share:.3f} ± {score.error:.3f}{p}")
        lines.append(f"| {gap} W | {words} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@click.command(context_settings={"show_default": True})
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--book", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True, help="The pages.")
@click.option("--trials", default=40, help="For each gap and kind of words.")
@click.option("--facts", default=3, help="Told and asked in each trial.")
@click.option("--seed", default=1)
@click.option("--json", "results", type=click.Path(path_type=Path), help="Where to write the figures.")
def main(files: tuple[Path, ...], book: Path, trials: int, facts: int, seed: int, results: Path | None) -> None:
    """Ask models for facts that they read pages ago; the first also with its memory off, as the column to beat."""
    models = {file.stem: load(file) for file in files}
    models[f"{files[0].stem}, memory off"] = load(files[0], memory="window")
    pieces = next(iter(models.values())).tokenizer
    scores = measure(models, pieces.encode(book.read_text(encoding="utf-8")), trials, facts, seed)
    click.echo(table(scores))
    if results:
        results.write_text(json.dumps([asdict(score) for score in scores], indent=1))


if __name__ == "__main__":
    main()
