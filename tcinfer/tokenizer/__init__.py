"""Text to ids and back, with a GGUF file's `tokenizer.*` metadata: the keys, the checks, the interface.

The kinds are in kinds.py and huggingface.py; they and their libraries are imported only when a
file needs one. A Tokenizer is immutable: any number of threads may use one at once.

A text's lone surrogates (bytes of a pipe that were no UTF-8) count as U+FFFD. SentencePiece writes a space as
U+2581, so a U+2581 in a text comes back as a space.
"""

import codecs
import operator
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import groupby
from typing import Any, TypeVar

import numpy as np

from tcinfer.errors import FileError, TokenizerError

MODEL = "tokenizer.ggml.model"
PRE = "tokenizer.ggml.pre"
TOKENS = "tokenizer.ggml.tokens"
SCORES = "tokenizer.ggml.scores"
TYPES = "tokenizer.ggml.token_type"
MERGES = "tokenizer.ggml.merges"
BOS = "tokenizer.ggml.bos_token_id"
EOS = "tokenizer.ggml.eos_token_id"
EOT = "tokenizer.ggml.eot_token_id"
EOM = "tokenizer.ggml.eom_token_id"
UNKNOWN_ID = "tokenizer.ggml.unknown_token_id"
PADDING_ID = "tokenizer.ggml.padding_token_id"
ADD_BOS = "tokenizer.ggml.add_bos_token"
ADD_SPACE_PREFIX = "tokenizer.ggml.add_space_prefix"
REMOVE_EXTRA_WHITESPACES = "tokenizer.ggml.remove_extra_whitespaces"
CHARSMAP = "tokenizer.ggml.precompiled_charsmap"
HUGGINGFACE_JSON = "tokenizer.huggingface.json"
CHAT_TEMPLATE = "tokenizer.chat_template"

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_SURROGATES = re.compile("[\ud800-\udfff]")
_T = TypeVar("_T")


class Tokenizer:
    """What every kind has in common; by itself the tokenizer of a file that holds none: ids only.

    `vocab_size` counts the tokenizer's tokens. A model may have more rows (a padded embedding): their ids are
    valid and decode to nothing.
    """

    def __init__(self, metadata: Mapping[str, Any], tokens: int, rows: int | None, add_bos: bool = False) -> None:
        """Raises FileError for more tokens than rows, an id out of range, or a BOS to add but none there."""
        if rows is not None and tokens > rows:
            raise FileError(f"the tokenizer has {tokens} tokens, but the model's vocabulary is {rows}")
        self.vocab_size = tokens
        self._limit = tokens if rows is None else rows
        self.bos_id = token_id(metadata, BOS, self._limit)
        self.eos_id, *others = (token_id(metadata, key, self._limit) for key in (EOS, EOT, EOM))
        self.eos_ids = frozenset(end for end in (self.eos_id, *others) if end is not None)
        self.add_bos = value(metadata, ADD_BOS, bool, add_bos and self.bos_id is not None)
        if self.add_bos and self.bos_id is None:
            raise FileError(f"{ADD_BOS} is true, but there is no {BOS}")
        self._controls: dict[str, int] = {}  # text to id; a kind puts its own here
        self._prefix_once = False  # whether the prefix space is for a text's beginning only, not after control tokens

    def encode(self, text: str, bos: bool = False, special: bool = False, continues: bool = False) -> list[int]:
        """The ids of a text, after `bos_id` where `bos`; control tokens are seen in it only where `special`.

        continues: it goes on from an earlier text, so no prefix space is put before it. Raises TokenizerError
        where the text cannot be written in the vocabulary or there is no BOS token.
        """
        return self.encode_parts([(text, special)], bos, continues)

    def encode_parts(self, parts: Iterable[tuple[str, bool]], bos: bool = False, continues: bool = False) -> list[int]:
        """The ids of one text that comes in parts, each with its `special`; bos, continues, errors as in `encode`.

        Tokens reach across parts as in the whole text, but control tokens are found only in parts with `special`:
        the text of other parts never becomes one, not even together with its neighbours. Where the parts
        themselves begin with the BOS token, `bos` adds no second one.
        """
        if bos and self.bos_id is None:
            raise TokenizerError("this file's tokenizer has no BOS token")
        ids: list[int] = []
        for stretch in self._stretches(parts):
            if isinstance(stretch, int):
                ids.append(stretch)
            elif stretch:
                ids += self._encode_plain(stretch, prefix=not (self._prefix_once if ids else continues))
        return [self.bos_id, *ids] if bos and self.bos_id is not None and ids[:1] != [self.bos_id] else ids

    def control_text(self, token: int | None) -> str:
        """How a text writes a control token where it is seen; "" for None and for any other token."""
        return next((text for text, control in self._controls.items() if control == token), "")

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids from its beginning. Raises TokenizerError for an id out of range."""
        return b"".join(map(self.token_bytes, iterable(ids))).decode("utf-8", "replace")

    def stream(self) -> "StreamDecoder":
        """A decoder for ids that come one at a time and continue a text."""
        return StreamDecoder(self)

    def token_bytes(self, token: int) -> bytes:
        """The bytes one id adds to a text, none for a control token.

        Raises TokenizerError for an id out of range, or where the bytes depend on the ids around it.
        """
        return self._bytes(self.checked(token))

    def _stretches(self, parts: Iterable[tuple[str, bool]]) -> Iterator[str | int]:
        """Control tokens as ids and, joined across parts, the plain text around them."""
        plain = ""
        for special, run in groupby(parts, key=lambda part: bool(part[1])):
            text = "".join(_checked_text(text) for text, _ in run)
            for i, piece in enumerate(self._cut(text) if special else [text]):
                if i % 2:
                    yield plain
                    yield self._controls[piece]
                    plain = ""
                else:
                    plain += piece
        yield plain

    def _cut(self, text: str) -> list[str]:
        """Plain text and control tokens in turn."""
        return self._control.split(text) if self._control else [text]

    @cached_property
    def _control(self) -> "re.Pattern[str] | None":
        return any_of(self._controls)

    def _encode_plain(self, text: str, prefix: bool) -> list[int]:
        """The ids of a stretch without control tokens; prefix: with the space that the kind puts first, if any."""
        raise TokenizerError(
            "this file holds no tokenizer: give ids (in Python), or convert again with --tokenizer FILE"
        )

    def _bytes(self, token: int) -> bytes:
        raise TokenizerError("this file holds no tokenizer: ids cannot be turned into text")

    def checked(self, token: int) -> int:
        try:
            token = operator.index(token)
        except TypeError:
            raise TokenizerError(f"an id is a whole number, not {short(repr(token))}") from None
        if not 0 <= token < self._limit:
            raise TokenizerError(f"id {token} is outside the vocabulary of {self._limit}")
        return token


class StreamDecoder:
    """Ids to text as they come; held back are at most the three bytes of an unfinished character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The characters that this id completes. Raises TokenizerError for an id out of range."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def peek(self, token: int) -> str:
        """What `push` would give, without pushing."""
        state = self._decoder.getstate()
        try:
            return self.push(token)
        finally:
            self._decoder.setstate(state)

    def flush(self) -> str:
        """What was held back, as replacement characters."""
        return self._decoder.decode(b"", final=True)


def from_metadata(metadata: Mapping[str, Any], vocab_size: int | None) -> Tokenizer:
    """The tokenizer that a file's metadata describes; `vocab_size` is the model's number of rows, if known.

    Raises FileError for broken metadata and TokenizerError, by name, for a kind that is not supported.
    """
    kind = value(metadata, MODEL, str, "none")
    if HUGGINGFACE_JSON not in metadata and kind in ("none", "no_vocab"):
        if TOKENS in metadata:
            raise FileError(f"the file has {TOKENS}, but no {MODEL}")
        return Tokenizer(metadata, 0, vocab_size)
    from tcinfer.tokenizer.huggingface import HuggingFace
    from tcinfer.tokenizer.kinds import kinds

    if HUGGINGFACE_JSON in metadata:
        return HuggingFace(metadata, vocab_size)
    if kind not in kinds:
        known = ", ".join(kinds)
        raise TokenizerError(f"tokenizer model {short(kind)} is not supported; the known ones are {known}")
    return kinds[kind](metadata, vocab_size)


def iterable(ids: Iterable[int]) -> Iterable[int]:
    """Itself. Raises TokenizerError if there is nothing to go through."""
    if not isinstance(ids, Iterable):
        raise TokenizerError(f"ids are a list of whole numbers, not {short(repr(ids))}")
    return ids


def any_of(texts: Iterable[str]) -> "re.Pattern[str] | None":
    """One group that matches any of the texts, the longest first; None where there are none."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None


def short(text: str) -> str:
    """A text from a file as an error message shows it: quoted, on one line, not long."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _checked_text(text: str) -> str:
    if not isinstance(text, str):
        raise TokenizerError(f"a text is needed, not {short(repr(text))}")
    return _SURROGATES.sub("\ufffd", text)


def value(metadata: Mapping[str, Any], key: str, kind: type[_T], default: _T) -> _T:
    """A key's value, or the default where it is absent. Raises FileError where it is of another type."""
    found = metadata.get(key, default)
    if not isinstance(found, kind):
        raise FileError(f"{key} should be {kind.__name__}, not {type(found).__name__}")
    return found


def token_id(metadata: Mapping[str, Any], key: str, count: int) -> int | None:
    """The id under a key, None where it is absent. Raises FileError where it is no id of `count` tokens."""
    found = metadata.get(key)
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, int | np.integer) or not 0 <= found < count:
        raise FileError(f"{key} is {short(str(found))}, which is not one of {count} ids")
    return int(found)


def strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    """A list of non-empty strings. Raises FileError where the key holds anything else."""
    found = metadata.get(key)
    if not isinstance(found, list | tuple) or not all(isinstance(item, str) for item in found):
        raise FileError(f"{key} should be a list of strings")
    if "" in found:
        raise FileError(f"{key}: entry {found.index('')} is empty")
    if _SURROGATES.search("".join(found)):  # JSON can hold half a character, UTF-8 cannot
        raise FileError(f"{key} holds a lone surrogate")
    return list(found)


def numbers(metadata: Mapping[str, Any], key: str, kinds: str, count: int) -> list[Any]:
    """`count` finite numbers of NumPy's kinds ("iu" or "f"). Raises FileError for anything else."""
    try:
        found = np.asarray(metadata.get(key))
    except (ValueError, OverflowError):  # ragged, or integers beyond 64 bits
        found = np.empty(())
    if found.ndim != 1 or len(found) != count or (count and found.dtype.kind not in kinds):
        what = "floats" if kinds == "f" else "integers"
        raise FileError(f"{key} should be {count} {what}, one for each token")
    if kinds == "f" and not np.isfinite(found).all():
        raise FileError(f"{key} holds a number that is not finite")
    return found.tolist()
