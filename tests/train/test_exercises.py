"""The trainer's text: exercises told once and asked back from beyond the window, documents read segment by segment."""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
from test_trainer import torch
from test_trainer_command import prose
from trainer_modules import trainer_modules

pytestmark = pytest.mark.peer
trainer = pytest.fixture(scope="module")(trainer_modules)

WINDOW = 8
DOCUMENTS = range(12)


@pytest.fixture(scope="module")
def pieces(trainer, tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / trainer.vocabulary.NAME
    trainer.vocabulary.train([prose(0), prose(1)], 400, path)
    return trainer.vocabulary.load(path)


@pytest.fixture(scope="module")
def recipe(trainer):
    return trainer.data.Recipe(length=1024, window=WINDOW, share=1.0, emphasis=3.0)


@pytest.fixture(scope="module")
def library(trainer, pieces, recipe):
    books = trainer.data.tokenize([prose(seed, 400) for seed in range(3)], pieces)
    return trainer.data.Library(books, pieces, recipe, seed=5)


@dataclass
class Page:
    """A document as text, with the token that each character belongs to."""

    ids: np.ndarray
    weights: np.ndarray
    text: str
    ends: list[int]  # of the tokens, in characters

    def token(self, character: int) -> int:
        """The token that a character is in."""
        return bisect_right(self.ends, character)


@pytest.fixture(scope="module")
def pages(library, pieces):
    def text_of(i: int) -> str:
        piece = pieces.id_to_piece(i)
        if pieces.is_byte(i):
            return chr(int(piece[1:-1], 16))
        return "" if pieces.is_control(i) else piece.replace("▁", " ")

    pages = []
    for number in DOCUMENTS:
        ids, weights = library.document(number)
        texts = [text_of(i) for i in ids.tolist()]
        pages.append(Page(ids, weights, "".join(texts), np.cumsum([len(text) for text in texts]).tolist()))
    return pages


@dataclass
class Asked:
    """A question in a page, and its answer: a sentence that was told."""

    sentence: str
    answer: str
    choices: list[str]  # that the answer is of
    start: int  # tokens: the question
    lead: int  # the sentence
    known: int  # what only the memory can know
    stop: int


def asked(trainer, page: Page) -> list[Asked]:
    """Every question whose answer is not cut off."""
    exercises, found = trainer.exercises, []
    for sentence, ask, choices in [*exercises.FACTS, (exercises.LIST, exercises.ASK_LIST, exercises.THINGS)]:
        pattern = re.escape(f"{ask}\n\n{sentence}").replace(r"\{what\}", r"(?P<what>[\w ,]+)")
        pattern = pattern.replace(r"\{who\}", r"(?P<who>\w+ \w+)", 1).replace(r"\{who\}", "(?P=who)")
        for match in re.finditer(pattern, page.text):
            lead = page.text.index("\n\n", match.start()) + 2
            start, known, last = match.start(), match.start("what") - 1, match.end() - 1
            places = (page.token(start), page.token(lead), page.token(known), page.token(last) + 1)
            found.append(Asked(page.text[lead : match.end()], match["what"], choices, *places))
    return found


def test_a_document_is_the_same_whenever_it_is_asked_for(trainer, library, pieces, recipe):
    again = trainer.data.Library(library.books, pieces, recipe, seed=5)
    other = trainer.data.Library(library.books, pieces, recipe, seed=6)
    numbers = [0, 3, len(library.places), 1000]
    for number in reversed(numbers):
        for one, two in zip(library.document(number), again.document(number), strict=True):
            assert np.array_equal(one, two)
        assert not np.array_equal(library.document(number)[0], other.document(number)[0])
    firsts = {library.document(number)[0].tobytes() for number in numbers}
    assert len(firsts) == len(numbers)


def test_documents_have_one_length_and_one_beginning(library, pieces):
    for number in range(30):
        ids, weights = library.document(number)
        assert len(ids) == len(weights) == 1025
        assert np.flatnonzero(ids == pieces.bos_id()).tolist() == [0]


def test_without_exercises_a_round_is_the_books(trainer, library, pieces, recipe):
    plain = trainer.data.Library(library.books, pieces, replace(recipe, share=0.0), seed=5)
    documents = [plain.document(number) for number in range(len(plain.places))]
    want = {plain.books[i][at : at + 1024].tobytes() for i, at in plain.places}
    assert {ids[1:].tobytes() for ids, _ in documents} == want
    assert all((weights == 1).all() for _, weights in documents)


def test_what_is_asked_was_told_beyond_the_window_and_not_since(trainer, pages):
    """Neither told nor answered: a question that is asked twice is as far from its first answer."""
    total = 0
    for page in pages:
        for question in asked(trainer, page):
            places = [match.start() for match in re.finditer(re.escape(question.sentence), page.text)]
            first = page.text.rfind("\n\n", 0, places[0]) + 2
            assert page.text.startswith(trainer.exercises.TELL, first)
            before = max(at for at in places if page.token(at) < question.lead)
            assert question.start - page.token(before + len(question.sentence)) >= 2 * WINDOW
            total += 1
    assert total > 50


def test_what_only_the_memory_can_know_weighs_more_and_what_a_reader_says_nothing(trainer, pages, pieces):
    """A story that goes on by itself would otherwise tell itself to remember things."""
    exercises, passages = trainer.exercises, 0
    again = pieces.encode(exercises.AGAIN)
    asks = [re.escape(ask).replace(r"\{who\}", r"\w+ \w+") for _, ask, _ in exercises.FACTS]
    said = re.compile(f"{exercises.TELL} .*|{exercises.WORDS} .*|{'|'.join(asks)}|{re.escape(exercises.ASK_LIST)}")
    for page in pages:
        expected = np.ones(len(page.ids))
        for question in asked(trainer, page):
            expected[question.known : question.stop] = 6  # twice what a passage's weigh
        ids = page.ids.tolist()
        ends = [i + 1 for i, piece in enumerate(ids) if pieces.id_to_piece(piece) == "\n\n"]  # the last may be cut off
        for start, end in pairwise([0, *ends]):
            if said.fullmatch(page.text[page.ends[start - 1] if start else 0 : page.ends[end - 2]]):
                expected[start:end] = 0
            if ids[end - 2] == pieces.eos_id():  # the book goes on
                expected[end - 1] = 0
            if ids[start : start + len(again)] == again:
                known = start + len(again) + trainer.data.CUE
                expected[start:known] = 0
                expected[known : end - 1] = 3
                passage, passages = ids[start + len(again) : end - 1], passages + 1
                first = next(i for i in range(start) if ids[i : i + len(passage)] == passage)
                assert start + len(again) - (first + len(passage)) >= 2 * WINDOW
        assert np.array_equal(page.weights[: ends[-1]], expected[: ends[-1]])
    assert passages > 5


def test_held_out_words_are_never_drilled(trainer, tmp_path):
    trainer.vocabulary.train([prose(0) + "a golden key and an apple\n\n" * 99], 420, tmp_path / "t")
    pieces = trainer.vocabulary.load(tmp_path / "t")
    recipe = trainer.data.Recipe(length=64, window=WINDOW, share=1.0, emphasis=3.0)
    words = trainer.data.Library(trainer.data.tokenize([prose(0)], pieces), pieces, recipe, seed=1).words
    assert {"key", "apple", "Tobias"} < trainer.exercises.HELD
    assert pieces.piece_to_id("▁golden") in words
    assert not {pieces.piece_to_id("▁key"), pieces.piece_to_id("▁apple")} & {*words, pieces.unk_id()}


def test_held_out_words_are_never_answers(trainer, pages):
    exercises = trainer.exercises
    for choices in (exercises.NAMES, exercises.PLACES, exercises.THINGS, exercises.COLOURS):
        trained, kept = (exercises.words(choices, held_out) for held_out in (False, True))
        assert len(kept) >= len(choices) // exercises.HELD_OUT
        assert len({*trained, *kept}) == len(trained) + len(kept) == len(choices)
    for page in pages:
        for question in asked(trainer, page):
            parts = [part.removeprefix("a ") for part in question.answer.split(", ")]
            assert set(parts) <= set(exercises.words(question.choices, False))


@pytest.mark.parametrize("held_out", [False, True])
def test_facts_and_lists(held_out, trainer):
    exercises = trainer.exercises
    for make in (exercises.facts, exercises.shopping):
        told, questions = make(random.Random(1), 5, held_out)
        assert told.startswith(exercises.TELL)
        assert len(questions) == (5 if make is exercises.facts else 1)
        assert all(question.lead + question.answer in told for question in questions)
        assert len({question.ask for question in questions}) == len(questions)


# Streams


def test_streams_read_documents_in_segments(trainer, library, pieces):
    B, block, parts = 3, 256, 4
    streams = trainer.data.Streams([library], B, block, seed=5)
    batches = [streams.step(number, 12) for number in range(12)]
    for stream in range(B):
        inputs, targets, weights = (
            np.concatenate([getattr(batch, name)[stream].numpy() for batch in batches])
            for name in ("inputs", "targets", "weights")
        )
        starts = [at // block for at in np.flatnonzero(inputs == pieces.bos_id())]
        assert [i for i, batch in enumerate(batches) if batch.fresh[stream]] == sorted({0, *starts})
        skipped = stream % parts * block  # streams are entered at different places
        numbers = [turn * B + stream for turn in range(4)]
        documents = [library.document(n, streams.drills(n, 12 * B // parts)) for n in numbers]
        for got, column, shift in ((inputs, 0, 0), (targets, 0, 1), (weights, 1, 1)):
            want = np.concatenate([document[column][shift : shift + 1024] for document in documents])
            assert np.array_equal(got, want[skipped : skipped + len(got)])
    assert batches[0].fresh.all()
    assert [batch.fresh.sum().item() for batch in batches[1:5]] == [0, 1, 1, 1]


def test_a_step_is_the_same_whenever_it_is_asked_for(trainer, library):
    read = trainer.data.Streams([library, library], 3, 256, seed=5)
    for number in range(6):
        batch = read.step(number, 12)
    alone = trainer.data.Streams([library, library], 3, 256, seed=5).step(5, 12)
    assert all(torch.equal(x, getattr(alone, name)) for name, x in vars(batch).items())


def test_drills_repeat_lines_from_beyond_the_window(trainer, library):
    size, repeated = trainer.data.DRILL, 0
    for number in range(4):
        ids, weights = library.document(number, drill=1.0)
        lines = ids[1:].reshape(-1, size).tolist()
        for at, (line, heavy) in enumerate(zip(lines, weights[1:].reshape(-1, size) > 1, strict=True)):
            assert heavy.tolist() == ([False] + [line in lines[:at]] * (size - 1))
            if line in lines[:at]:
                repeated += 1
                gap = (at - max(i for i in range(at) if lines[i] == line)) * size
                assert WINDOW < gap <= 8 * WINDOW
    assert repeated > 20


def test_drills_are_for_the_first_tenth(trainer, library):
    streams = trainer.data.Streams([library], 3, 256, seed=5)
    assert [streams.drills(number, 100) for number in (0, 5, 10, 99)] == [1.0, 0.5, 0.0, 0.0]


def test_more_and_more_documents_come_from_the_second_library(trainer, library):
    streams = trainer.data.Streams([library, library], 3, 256, seed=5)
    later = [streams.later(number, 9000) for number in range(12000)]
    shares = [sum(later[at : at + 3000]) / 3000 for at in range(0, 12000, 3000)]
    assert shares == pytest.approx([0.125, 0.375, 0.625, 0.75], abs=0.04)
    assert not any(trainer.data.Streams([library], 3, 256, seed=5).later(number, 1000) for number in range(1000))
