"""A text of any length, from a file or a pipe, to ids: piece by piece, in bounded memory.

Pieces are cut where no tokenizer's word is torn, so that their ids are those of the whole text. Before byte-level BPE
a text is cut into words, a word having the space before it and punctuation the line ends after it; SentencePiece
begins its words with the space. So a cut is right before the first space after something else or, in text without
spaces, after a single line end between two other characters.
"""

from __future__ import annotations

import codecs
import os
import re
import select
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from tcinfer.tokenizer import Tokenizer

SIZE = 2**16  # characters of a piece, at most; bytes of one read

_CUT = re.compile(r".*(?:\S(?= )|\S\n(?=\S))", re.DOTALL)  # up to the last place for a cut


def pieces(stream: BinaryIO, live: float | None = None, invalid: Callable[[], None] | None = None) -> Iterator[str]:
    """The UTF-8 text of a stream in pieces of at most SIZE characters.

    Where the cuts are depends on the text alone, not on how its bytes arrive; SIZE characters without a place for one
    are cut hard. With `live` (seconds; for streams with a file descriptor, from which nothing was read yet) that is
    given up for speed: once it has waited so long for more, all up to the last line end is a piece at once,
    and an empty one follows: the stream rests.
    invalid: called once if there are bytes that are no UTF-8; each becomes U+FFFD as in `bytes.decode`.
    """
    held, length = list[str](), 0  # what was read and not yielded, and its characters
    for new in _decoded(_reads(stream, live), invalid):
        held.append(new)
        length += len(new)
        if new and length <= SIZE:  # join only what makes a piece: reads may be of a byte each
            continue
        text, at = "".join(held), 0
        while len(text) - at > SIZE:
            found = _CUT.match(text, at, at + SIZE + 1)
            end = found.end() if found else at + SIZE
            yield text[at:end]
            at = end
        if not new:
            if end := text.rfind("\n", at) + 1:
                yield text[at:end]
                at = end
            yield ""
        held, length = [text[at:]], len(text) - at
    if length:
        yield "".join(held)


def ids(
    tokenizer: Tokenizer,
    stream: BinaryIO,
    bos: bool = False,
    live: float | None = None,
    continues: bool = False,
    invalid: Callable[[], None] | None = None,
) -> Iterator[list[int]]:
    """The ids of a stream's text, piece by piece; together those of `tokenizer.encode` of the whole.

    But for words and user-defined tokens that a hard cut tears, and line ends where `live` cuts after one of several.
    live, invalid: as for `pieces`. Raises TokenizerError where the text cannot be written in the vocabulary.
    """
    for found, _ in ids_and_total(tokenizer, stream, bos, live, continues, invalid):
        yield found


def ids_and_total(
    tokenizer: Tokenizer,
    stream: BinaryIO,
    bos: bool = False,
    live: float | None = None,
    continues: bool = False,
    invalid: Callable[[], None] | None = None,
) -> Iterator[tuple[list[int], int | None]]:
    """The same, each piece with about how many ids the whole will have: None of a stream without a known end."""
    size, count, taken = _size(stream), 0, 0
    for text in pieces(stream, live, invalid):
        if not text:  # the stream rests
            yield [], None
            continue
        if found := tokenizer.encode(text, bos=bos, continues=continues):
            count, taken = count + len(found), taken + len(text.encode())
            yield found, round(count * max(1.0, size / taken)) if size else None
        bos, continues = False, True
    if bos:  # there was no text
        yield tokenizer.encode("", bos=True), None


def _size(stream: BinaryIO) -> int:
    """Bytes of a file from where it stands; 0 where that is not known."""
    try:
        start = stream.tell()
        end = stream.seek(0, os.SEEK_END)
        stream.seek(start)
        return end - start
    except (OSError, ValueError):
        return 0


def _reads(stream: BinaryIO, live: float | None) -> Iterator[bytes]:
    """What each read gives; with `live`, an empty one after so many seconds spent on waiting."""
    try:
        descriptor = stream.fileno() if live is not None else None
    except (AttributeError, OSError):
        descriptor = None
    if descriptor is None or live is None:
        while data := stream.read(SIZE):
            yield data
        return
    waited, pending = 0.0, False  # seconds spent on waiting since something was read that may be handed out
    while True:
        start = time.monotonic()
        ready, _, _ = select.select([descriptor], [], [], max(0.0, live - waited) if pending else None)
        waited += time.monotonic() - start
        if pending and (not ready or waited >= live):
            waited, pending = 0.0, False
            yield b""
        if ready:
            data = os.read(descriptor, SIZE)
            if not data:
                return
            waited, pending = waited if pending else 0.0, True
            yield data


def _decoded(reads: Iterator[bytes], invalid: Callable[[], None] | None) -> Iterator[str]:
    """The text of some bytes, each part of whole characters; an empty read is an empty part, and no other is."""
    decoder = codecs.getincrementaldecoder("utf-8")()

    def decode(data: bytes, final: bool = False) -> str:
        try:
            return decoder.decode(data, final)
        except UnicodeDecodeError:
            decoder.errors = "replace"  # what it held back, it still has
            if invalid is not None:
                invalid()
            return decoder.decode(data, final)

    for data in reads:
        if (text := decode(data)) or not data:
            yield text
    if rest := decode(b"", final=True):
        yield rest
