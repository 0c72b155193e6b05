"""Text from files and pipes: the same pieces however the bytes come, and the ids of the whole text."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterable, Iterator
from itertools import pairwise
from threading import Thread

import pytest
from conftest import SHAKESPEARE, shared, smollm2
from hypothesis import example, given
from hypothesis import strategies as st

from tcinfer import progress, tokenizer
from tcinfer.gguf import reader
from tcinfer.tokenizer import stream as text

# what cuts are about: words, punctuation, white space of every kind, characters of one to four bytes
TEXTS = st.text(st.sampled_from("ab.,  \n\r\t\u00a0\u3000é中😀\x1c\u0301"), max_size=100)


class Drops(io.RawIOBase):
    """A stream that gives its bytes in these parts, and long ones in several reads."""

    def __init__(self, parts: Iterable[bytes]) -> None:
        self._parts, self._part = filter(None, parts), b""

    def read(self, size: int = -1) -> bytes:
        part = self._part or next(self._parts, b"")
        part, self._part = part[:size], part[size:]
        return part


def cut(data: bytes) -> list[str]:
    return list(text.pieces(io.BytesIO(data)))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 16 characters, so that a short text has many."""
    monkeypatch.setattr(text, "SIZE", 16)


def tokenizer_of(path: object) -> tokenizer.Tokenizer:
    return tokenizer.from_metadata(reader.read(path).metadata, None)


# Pieces


@pytest.mark.usefixtures("small")
def test_pieces_are_the_text_and_no_word_is_torn() -> None:
    @given(TEXTS)
    @example("  x" * 20)
    @example("x\n" * 20)
    @example("." * 16 + "\n" * 16)
    def check(whole: str) -> None:
        found = cut(whole.encode())
        assert "".join(found) == whole
        assert all(1 <= len(piece) <= 16 for piece in found)
        for before, after in pairwise(found):
            at_word = after[0] == " " and not before[-1].isspace()
            at_line = before.endswith("\n") and not any(map(str.isspace, before[-2:-1] + after[0]))
            assert at_word or at_line or len(before) == 16

    check()


@pytest.mark.usefixtures("small")
def test_pieces_do_not_depend_on_how_bytes_arrive() -> None:
    @given(TEXTS.map(str.encode) | st.binary(max_size=100), st.data())
    def check(data: bytes, draw: st.DataObject) -> None:
        at = sorted(draw.draw(st.lists(st.integers(0, len(data)))))
        parts = [data[a:b] for a, b in zip([0, *at], [*at, len(data)], strict=True)]
        assert list(text.pieces(Drops(parts))) == cut(data)
        assert "".join(cut(data)) == data.decode(errors="replace")

    check()


def test_a_piece_ends_before_the_last_space_that_fits() -> None:
    words = b"word " * 40_000
    first, *_ = found = cut(words)
    assert text.SIZE - 5 < len(first) <= text.SIZE
    assert {piece[0] for piece in found[1:]} == {" "}


@pytest.mark.parametrize("unit", ["A", " ", "\n", "a ", "é\n", ". \n"])
def test_time_is_linear_whatever_the_text(unit: str) -> None:
    started = time.monotonic()
    pieces = cut((unit * (10**7 // len(unit))).encode())
    assert time.monotonic() - started < 5
    assert {len(piece) for piece in pieces[:-1]} <= set(range(text.SIZE - len(unit), text.SIZE + 1))


def test_a_byte_at_a_time_takes_no_quadratic_time() -> None:
    started = time.monotonic()
    data = b"A" * 200_000
    assert list(text.pieces(Drops(data[i : i + 1] for i in range(len(data))))) == cut(data)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("data", [b"a\xff b\xfe\xc3", b"\xc3", b"ok " * 30_000 + b"\xe4\xb8"])
def test_bytes_that_are_no_utf8_are_said_once(data: bytes) -> None:
    said: list[int] = []
    found = "".join(text.pieces(io.BytesIO(data), invalid=lambda: said.append(1)))
    assert (found, said) == (data.decode(errors="replace"), [1])


def test_a_replacement_character_of_the_text_itself_is_valid() -> None:
    assert list(text.pieces(io.BytesIO("\ufffd".encode()), invalid=lambda: pytest.fail("it is"))) == ["\ufffd"]


# Live


def slowly(*parts: bytes, pause: float = 0.3) -> Iterator[tuple[float, str]]:
    """Seconds and text of each piece that comes of parts written into a pipe with a pause between."""
    ours, theirs = os.pipe()

    def write() -> None:
        for part in parts:
            os.write(theirs, part)
            time.sleep(pause)
        os.close(theirs)

    started, writer = time.monotonic(), Thread(target=write)
    writer.start()
    with os.fdopen(ours, "rb") as stream:
        for piece in filter(None, text.pieces(stream, live=0.1)):
            yield time.monotonic() - started, piece
    writer.join()


def test_live_lines_come_at_once_and_the_rest_at_the_end() -> None:
    (one, first), (two, second), (three, third) = slowly("one\ntw\u00e9".encode()[:-1], b"\xa9o\nthr", b"ee")
    assert (first, second, third) == ("one\n", "twéo\n", "three")
    assert 0.1 <= one < 0.3 <= two < 0.6 < 0.9 <= three


def test_live_does_not_wait_for_a_pause_that_never_comes() -> None:
    pieces = list(slowly(*[b"a line\n"] * 40, pause=0.02))
    assert "".join(piece for _, piece in pieces) == "a line\n" * 40
    assert 2 <= len(pieces) <= 10
    assert pieces[0][0] < 0.4


def test_live_without_a_descriptor_is_as_without() -> None:
    assert list(text.pieces(io.BytesIO(b"a\nb"), live=0.1)) == ["a\nb"]


def test_live_pieces_of_a_long_text_are_bounded() -> None:
    data = b"word " * 60_000
    found = [piece for _, piece in slowly(data[:50_000], data[50_000:100_000], data[100_000:150_000], pause=0)]
    assert "".join(found).encode() == data[:150_000]
    assert all(len(piece) <= text.SIZE for piece in found)


# Ids


def check_ids(words: tokenizer.Tokenizer, whole: str) -> None:
    """In pieces of SIZE and of a few words, from a beginning and as a continuation."""
    for continues in (False, True):
        want = words.encode(whole, continues=continues)
        parts = list(text.ids(words, io.BytesIO(whole.encode()), continues=continues))
        assert [token for part in parts for token in part] == want
        assert all(parts)


@pytest.mark.parametrize("size", [2**6, 2**10, 2**16])
def test_ids_are_those_of_the_whole_text(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "SIZE", size)
    characters = tokenizer_of(SHAKESPEARE)
    shakespeare = shared("data", "shakespeare", "tinyshakespeare.txt").read_text()[:200_000]
    check_ids(characters, shakespeare)
    check_ids(tokenizer_of(shared("models", "stories260K", "stories260K-f32.gguf")), shakespeare)


@pytest.mark.parametrize("size", [2**6, 2**10, 2**16])
def test_ids_of_byte_level_bpe(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "SIZE", size)
    words = tokenizer_of(smollm2())
    for book in sorted(shared("data", "books", "valid").iterdir())[:3]:
        check_ids(words, book.read_text()[:100_000])
    check_ids(words, "one\n\n\n  two  \n three.\r\n\r\n\tfour   five...\n\n" * 500)


VOCABULARIES = ("ggml-vocab-gpt-2.gguf", "ggml-vocab-phi-3.gguf")


@pytest.mark.parametrize("name", VOCABULARIES)
def test_ids_of_other_vocabularies(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = tokenizer_of(shared("data", "tokenizers", "gguf_vocab", name))
    book = shared("data", "books", "valid", "Jack_London__White_Fang.txt").read_text()[:100_000]
    for size in (2**6, 2**16):
        monkeypatch.setattr(text, "SIZE", size)
        check_ids(words, book)


def test_bos_comes_once_and_before_nothing_too() -> None:
    words = tokenizer_of(shared("models", "stories260K", "stories260K-f32.gguf"))
    whole = "Once upon a time. " * 10_000
    first, *rest = text.ids(words, io.BytesIO(whole.encode()), bos=True)
    assert len(rest) == 2
    assert first + [token for part in rest for token in part] == words.encode(whole, bos=True)
    assert list(text.ids(words, io.BytesIO(b""), bos=True)) == [[words.bos_id]]
    assert list(text.ids(words, io.BytesIO(b""))) == []


# The bar of a text whose length nobody knows


def test_bar_without_a_total_shows_the_count(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress.bar("reading", None) as advance:
        advance(1000)
        advance(234)
    assert "reading" in terminal.getvalue()
    assert "1,234" in terminal.getvalue()
