"""Books as token streams, with exercises for the memory among the pages.

Every book is cut into documents of one length. A document starts from an empty memory with the beginning-of-text piece,
and passes through the model segment by segment with its state. A share of the documents is spliced with exercises
(exercises.py) at the ends of paragraphs. Everything is drawn from (seed, round, document) alone, so that a run that was
cut off goes on with the same text.
"""

import random
import re
from dataclasses import dataclass, fields
from pathlib import Path

import click
import exercises
import numpy as np
import torch
import vocabulary
from exercises import Question
from numpy.typing import NDArray
from sentencepiece import SentencePieceProcessor
from torch import Tensor

Ids = NDArray[np.int32]

NEAREST, FARTHEST = 2, 16  # gaps between telling and asking, in windows
FACTS_AT_ONCE, THINGS_AT_ONCE = 5, 6  # at most
FACTS_DUE = 5  # no more is told while so many questions are still to be asked
PASSAGE, CUE = (12, 40), 3  # tokens of a repeated passage, and how many of them only start it
WORD = re.compile("▁[a-z]{3,}")
DRILLS = 0.1  # of the run
DRILL = 16  # words of a line
PROMPT = 0.0  # weight of what a reader says: a story that goes on by itself is not to ask itself questions
EVERY = 256  # tokens of a book, about, for each passage that is repeated


@dataclass(frozen=True)
class Recipe:
    """How documents are made of books."""

    length: int  # tokens of a document, the beginning-of-text piece not counted
    window: int  # tokens: the unit of the gaps
    share: float  # of the documents have exercises
    emphasis: float  # weight of what only the memory can know, in the loss; the reader's have PROMPT, others 1


def read(folder: Path) -> list[str]:
    """The text of a file, or of every *.txt of a folder in order of name.

    Raises click.ClickException where there is none, or it is not UTF-8.
    """
    files = sorted(folder.glob("*.txt")) if folder.is_dir() else [folder]
    if not files:
        raise click.ClickException(f"{folder}: no *.txt in this folder")
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as e:
            raise click.ClickException(f"{file}: not UTF-8 at byte {e.start}") from None
    return texts


class Writer:
    """Puts one document together: tokens, and the weight of each as a target."""

    def __init__(self, pieces: SentencePieceProcessor, words: list[int], recipe: Recipe, rng: random.Random) -> None:
        """words: ids of whole words."""
        self.pieces, self.words, self.recipe, self.rng = pieces, words, recipe, rng
        self.paragraph = pieces.piece_to_id(vocabulary.PARAGRAPH)
        self.ids: list[int] = [pieces.bos_id()]
        self.weights: list[float] = [1.0]
        self.due: list[tuple[int, Question | list[int], bool]] = []  # from which token on; what; whether once more

    def put(self, ids: list[int], weight: float = 1.0) -> None:
        self.ids += ids
        self.weights += [weight] * len(ids)

    def text(self, text: str, weight: float = 1.0) -> None:
        self.put(self.pieces.encode(text), weight)

    def gap(self) -> int:
        """Tokens between telling and asking: all distances from 2 to 16 windows, the near ones more often."""
        low, high = self.recipe.window * NEAREST, self.recipe.window * FARTHEST
        return round(low * (high / low) ** self.rng.random())

    def tell(self) -> None:
        """Facts or a list, with their questions put off."""
        if self.rng.random() < 0.8:
            told, asked = exercises.facts(self.rng, self.rng.randint(1, FACTS_AT_ONCE))
        else:
            told, asked = exercises.shopping(self.rng, self.rng.randint(3, THINGS_AT_ONCE))
        self.text(f"{told}{vocabulary.PARAGRAPH}", PROMPT)
        self.reply(exercises.KEPT)
        self.put_off(asked)

    def put_off(self, asked: list[Question]) -> None:
        when = len(self.ids) + self.gap()
        self.rng.shuffle(asked)
        again = self.rng.random() < 0.5
        self.due += [(when, question, again) for question in asked]

    def ask(self) -> None:
        """Everything that is due by now."""
        now, self.due = (
            [one for one in self.due if one[0] <= len(self.ids)],
            [one for one in self.due if one[0] > len(self.ids)],
        )
        for _, what, again in now:
            if isinstance(what, Question):
                self.question(what)
                if again:  # once more, as far from this answer
                    self.due.append((len(self.ids) + self.gap(), what, False))
            else:
                self.text(exercises.AGAIN, PROMPT)
                self.put(what[:CUE], PROMPT)
                self.put(what[CUE:], self.recipe.emphasis)
                self.put([self.paragraph])

    def question(self, question: Question) -> None:
        self.text(f"{question.ask}{vocabulary.PARAGRAPH}", PROMPT)
        self.text(question.lead)
        self.reply(question.answer, 2 * self.recipe.emphasis)  # few tokens, and the hardest

    def reply(self, text: str, weight: float = 1.0) -> None:
        """The end of an answer; the book goes on after it."""
        self.text(text, weight)
        self.put([self.pieces.eos_id()])
        self.put([self.paragraph], PROMPT)

    def passage(self, paragraph: list[int]) -> None:
        """Have a part of a paragraph repeated later; or words in no order, which nothing but the memory can know."""
        size = self.rng.randint(*PASSAGE)
        if self.rng.random() < 0.5:
            words = self.rng.choices(self.words, k=size)
            self.text(exercises.WORDS, PROMPT)
            self.put([*words, self.paragraph], PROMPT)
            self.due.append((len(self.ids) + self.gap(), words, False))
        elif len(paragraph) > size:
            start = self.rng.randrange(len(paragraph) - size)
            self.due.append((len(self.ids) + self.gap(), paragraph[start : start + size], False))

    def page(self, book: Ids, at: int) -> None:
        """Text of the book from there on, with exercises between its paragraphs."""
        ends = np.flatnonzero(book[at:] == self.paragraph) + at + 1
        while len(self.ids) <= self.recipe.length and len(ends):
            paragraph, at, ends = book[at : ends[0]].tolist(), int(ends[0]), ends[1:]
            self.put(paragraph)
            self.ask()
            if sum(isinstance(what, Question) for _, what, _ in self.due) < FACTS_DUE:
                self.tell()
            if self.rng.random() < len(paragraph) / EVERY:
                self.passage(paragraph)
        self.put(book[at : at + self.recipe.length].tolist())

    def drill(self) -> None:
        """Lines of words in no order, most of them said before, some windows ago: nothing else to learn, so that the
        memory is found before the language is."""
        lines: list[list[int]] = []
        while len(self.ids) <= self.recipe.length:
            near, far = (round(n * self.recipe.window / DRILL) for n in (1.5, 8))
            back = round(near * (far / near) ** self.rng.random())  # lines
            if len(lines) > back and self.rng.random() < 0.6:
                line = lines[-back]
                self.put(line[:1])
                self.put(line[1:], self.recipe.emphasis)
            else:
                line = self.rng.choices(self.words, k=DRILL)
                self.put(line)
            lines.append(line)

    def document(self) -> tuple[Ids, NDArray[np.float32]]:
        end = self.recipe.length + 1
        return np.array(self.ids[:end], np.int32), np.array(self.weights[:end], np.float32)


class Library:
    """Tokenised books, as documents in an order drawn anew each round."""

    def __init__(self, books: list[Ids], pieces: SentencePieceProcessor, recipe: Recipe, seed: int) -> None:
        self.books, self.pieces, self.recipe, self.seed = books, pieces, recipe, seed
        known = [i for i in range(pieces.get_piece_size()) if not (pieces.is_control(i) or pieces.is_unknown(i))]
        words = [i for i in known if WORD.fullmatch(pieces.id_to_piece(i))]
        self.words = [i for i in words if pieces.id_to_piece(i)[1:] not in exercises.HELD] or known
        self.places = [
            (i, at) for i, book in enumerate(books) for at in range(0, len(book) - recipe.length, recipe.length)
        ]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.books))

    def document(self, number: int, drill: float = 0.0) -> tuple[Ids, NDArray[np.float32]]:
        """The number-th of an endless row: ids [length + 1], and the weight of each as a target.

        drill: the chance that it is a drill instead of a book.
        """
        turn, index = divmod(number, len(self.places))
        order = random.Random(f"{self.seed} {turn}").sample(range(len(self.places)), len(self.places))
        book, at = self.places[order[index]]
        rng = random.Random(f"{self.seed} {turn} {index}")
        writer = Writer(self.pieces, self.words, self.recipe, rng)
        if rng.random() < drill:
            writer.drill()
        elif rng.random() < self.recipe.share:
            writer.page(self.books[book], at)
        else:
            writer.put(self.books[book][at : at + self.recipe.length].tolist())
        return writer.document()


def tokenize(texts: list[str], pieces: SentencePieceProcessor) -> list[Ids]:
    return [np.array(ids, np.int32) for ids in pieces.encode(texts, num_threads=2)]


@dataclass(frozen=True)
class Batch:
    inputs: Tensor  # [B, T]
    targets: Tensor  # [B, T]
    weights: Tensor  # [B, T] of the targets
    fresh: Tensor  # [B] whether a stream starts a new document here

    def to(self, device: str) -> "Batch":
        return Batch(*(getattr(self, field.name).to(device) for field in fields(self)))


class Streams:
    """B streams of documents, T tokens a step. The first documents of the streams are entered at different places, so
    that not all streams start anew together."""

    def __init__(self, libraries: list[Library], batch: int, block: int, seed: int) -> None:
        self.libraries, self.batch, self.block, self.seed = libraries, batch, block, seed
        self.parts = libraries[0].recipe.length // block  # segments of a document
        self.open: dict[int, tuple[int, tuple[Ids, NDArray[np.float32]]]] = {}

    def later(self, number: int, documents: int) -> bool:
        """Whether a document comes from the second library: more and more of them do."""
        progress = min(1.0, number / max(1, documents))
        return len(self.libraries) > 1 and random.Random(f"{self.seed} {number}").random() < 0.75 * progress

    def drills(self, number: int, documents: int) -> float:
        """The chance of a drill: certain at first, less and less over the first part of the run."""
        return max(0.0, 1 - number / max(1, DRILLS * documents))

    def step(self, number: int, steps: int) -> Batch:
        """The batch of a step, the same whenever it is asked for; `steps` is the length of the whole run."""
        rows = []
        documents = steps * self.batch // self.parts
        for stream in range(self.batch):
            turn, part = divmod(number + stream % self.parts, self.parts)
            which = turn * self.batch + stream
            if self.open.get(stream, (-1,))[0] != which:
                library = self.libraries[self.later(which, documents)]
                self.open[stream] = (which, library.document(which, self.drills(which, documents)))
            ids, weights = self.open[stream][1]
            cut = slice(part * self.block, (part + 1) * self.block)
            after = slice(cut.start + 1, cut.stop + 1)
            rows.append((ids[cut], ids[after], weights[after], part == 0 or number == 0))
        inputs, targets, weights, fresh = (np.stack(column) for column in zip(*rows, strict=True))
        long, real = torch.from_numpy(inputs).long(), torch.from_numpy(weights)
        return Batch(long, torch.from_numpy(targets).long(), real, torch.from_numpy(fresh))
