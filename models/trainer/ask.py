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
from itertools import chain, product
from pathlib import Path
from statistics import stdev

import click
import exercises
import vocabulary
from runtime import OFF, open_models

from tcinfer.api import Model
from tcinfer.progress import bar

GAPS = (2, 4, 8, 16)  # windows


@dataclass(frozen=True)
class Score:
    """How many questions were answered, of those put."""

    model: str
    memory: str
    gap: int  # windows
    words: str  # "trained": of the training exercises; "held out": never the answer of a question there
    right: int
    asked: int
    error: float  # standard error of right / asked, over trials
    p: float  # of the sign test against the baseline


def sign_test(better: int, worse: int) -> float:
    """One-sided binomial test of the pairs that differ: P(at least `better` heads of better + worse tosses)."""
    n = better + worse
    return sum(math.comb(n, k) for k in range(better, n + 1)) / 2**n


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


def measure(models: dict[str, Model], book: list[int], trials: int, count: int, seed: int, base: str) -> list[Score]:
    """Every model on the same facts and pages, for each gap and both kinds of words; base: the name of the baseline."""
    window = max(model.config.widest.window for model in models.values())
    if len(book) <= GAPS[-1] * window:
        raise click.ClickException(f"the book is too short: {len(book):,} tokens, of {GAPS[-1] * window:,} and more")
    scores = []
    with bar("asking", trials * len(GAPS) * 2) as advance:
        for gap, held_out in product(GAPS, (False, True)):
            answered: dict[str, list[list[bool]]] = {name: [] for name in models}  # of each trial
            for number in range(trials):
                rng = random.Random(f"{seed} {gap} {held_out} {number}")
                start = rng.randrange(len(book) - gap * window)
                pages = book[start : start + gap * window]
                for name, right in trial(models, pages, gap * window, count, rng, held_out).items():
                    answered[name].append(right)
                advance(1)
            words = "held out" if held_out else "trained"
            for name, found in answered.items():
                shares = [sum(right) / count for right in found]
                pairs = Counter(zip(chain(*found), chain(*answered[base]), strict=True))
                error = stdev(shares) / math.sqrt(trials) if trials > 1 else math.nan
                p = sign_test(pairs[True, False], pairs[False, True])
                right = round(sum(shares) * count)
                scores.append(Score(name, models[name].config.memories, gap, words, right, trials * count, error, p))
    return scores


def table(scores: list[Score], base: str) -> str:
    """Rows of gaps, a column for each model."""
    names = list(dict.fromkeys(score.model for score in scores))
    by = {(s.model, s.gap, s.words): s for s in scores}
    lines = ["| gap | words | " + " | ".join(names) + " |", "|---|---|" + "---:|" * len(names)]
    for gap, words in dict.fromkeys((s.gap, s.words) for s in scores):
        cells = []
        for name in names:
            score = by[name, gap, words]
            p = "" if name == base else f" (p = {score.p:.1g})"
            cells.append(f"{score.right / score.asked:.3f} ± {score.error:.3f}{p}")
        lines.append(f"| {gap} W | {words} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@click.command(context_settings={"show_default": True})
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--book", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True, help="The pages.")
@click.option("--trials", default=40, type=click.IntRange(1), help="For each gap and kind of words.")
@click.option("--facts", default=3, type=click.IntRange(1, 9), help="Told and asked in each trial.")
@click.option("--seed", default=1)
@click.option("--against", metavar="NAME", help="The baseline; without it, the first model's window alone.")
@click.option("--json", "results", type=click.Path(path_type=Path), help="Where to write the figures.")
def main(
    files: tuple[Path, ...], book: Path, trials: int, facts: int, seed: int, against: str | None, results: Path | None
) -> None:
    """Ask models for facts that they read pages ago; the first also with its memory off, as the one to beat."""
    models = open_models(files, off=against is None)
    base = against or OFF
    if base not in models:
        raise click.ClickException(f"--against {base}: no such model among {', '.join(models)}")
    pieces = next(iter(models.values())).tokenizer
    scores = measure(models, pieces.encode(book.read_text(encoding="utf-8")), trials, facts, seed, base)
    if results:
        results.write_text(json.dumps([asdict(score) for score in scores], indent=1))
    click.echo(table(scores, base))


if __name__ == "__main__":
    main()
