"""The kinds of tokenizer a GGUF file may hold. The libraries do the tokenizing.

`sentencepiece` runs `llama` and `t5`, its model rebuilt from the file's pieces, scores and types;
`tokenizers` runs `gpt2`. What is done here is what they leave open: checking what the file says, keeping
control tokens out of plain text, and turning ids back into bytes.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, partial
from typing import Any

import numpy as np

from tcinfer.errors import FileError, TokenizerError
from tcinfer.tokenizer import (
    ADD_SPACE_PREFIX,
    BYTE,
    CHARSMAP,
    CONTROL,
    MERGES,
    NORMAL,
    PRE,
    REMOVE_EXTRA_WHITESPACES,
    SCORES,
    TOKENS,
    TYPES,
    UNKNOWN,
    UNKNOWN_ID,
    UNUSED,
    USER_DEFINED,
    Tokenizer,
    any_of,
    numbers,
    short,
    strings,
    token_id,
    value,
)
from tcinfer.tokenizer.huggingface import ALPHABET, IGNORES_MERGES, PRE_TOKENIZERS, alphabet_bytes, load, run

SPACE = "\u2581"  # how SentencePiece writes a space
_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")


class _Pieces(Tokenizer):
    """A kind whose every token has bytes of its own; user-defined tokens are cut out of the text here."""

    def __init__(self, metadata: Mapping[str, Any], rows: int | None, add_bos: bool = False) -> None:
        self._tokens = strings(metadata, TOKENS)
        count = len(self._tokens)
        if not count:
            raise FileError(f"{TOKENS} is empty")
        super().__init__(metadata, count, rows, add_bos)
        self._types = numbers(metadata, TYPES, "iu", count) if TYPES in metadata else [NORMAL] * count
        if not set(self._types) <= set(range(NORMAL, BYTE + 1)):
            raise FileError(f"{TYPES}: a token type is {NORMAL} to {BYTE}")
        for token, kind in enumerate(self._types):  # plain text must not end a turn
            if kind == USER_DEFINED and (token == self.bos_id or token in self.eos_ids):
                self._types[token] = CONTROL
        self._table = list(map(self._piece_bytes, range(count)))
        self._controls = self._of_type(CONTROL)
        self._users = self._of_type(USER_DEFINED)
        self._user = any_of(self._users)

    def _of_type(self, *types: int) -> dict[str, int]:
        """Text to id for the tokens of these types; of tokens with the same text the first one counts."""
        found: dict[str, int] = {}
        for token, kind in enumerate(self._types):
            if kind in types:
                found.setdefault(self._tokens[token], token)
        return found

    def _encode_plain(self, text: str, prefix: bool) -> list[int]:
        ids: list[int] = []
        for i, part in enumerate(self._user.split(text) if self._user else [text]):
            if i % 2:  # split() puts what the pattern's one group matched between the rest
                ids.append(self._users[part])
            elif part:
                ids += self._encode_rest(part)
        return ids

    def _encode_rest(self, text: str) -> list[int]:
        raise NotImplementedError

    def _piece_bytes(self, token: int) -> bytes:
        return b"" if self._types[token] in (CONTROL, UNKNOWN) else self._tokens[token].encode()

    def _bytes(self, token: int) -> bytes:
        return self._table[token] if token < len(self._table) else b""


class _SentencePiece(_Pieces):
    """`llama` (BPE) and `t5` (unigram)."""

    def __init__(self, metadata: Mapping[str, Any], rows: int | None, unigram: bool) -> None:
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2

        schema: Any = sentencepiece_model_pb2  # generated code: mypy sees no names in it
        if TYPES not in metadata:
            raise FileError(f"{TYPES} is missing")
        super().__init__(metadata, rows, add_bos=not unigram)
        count = len(self._tokens)
        self._space_prefix = value(metadata, ADD_SPACE_PREFIX, bool, True)
        self._unknown = self._unknown_id(token_id(metadata, UNKNOWN_ID, count))
        proto = schema.ModelProto()
        proto.trainer_spec.model_type = schema.TrainerSpec.UNIGRAM if unigram else schema.TrainerSpec.BPE
        proto.trainer_spec.byte_fallback = BYTE in self._types
        normalizer = proto.normalizer_spec
        normalizer.add_dummy_prefix = self._space_prefix
        self._trims = value(metadata, REMOVE_EXTRA_WHITESPACES, bool, False)
        normalizer.remove_extra_whitespaces = self._trims
        if CHARSMAP in metadata:
            normalizer.precompiled_charsmap = _charsmap(metadata[CHARSMAP])
        seen: set[str] = set()
        for token, score in enumerate(numbers(metadata, SCORES, "f", count)):
            piece, kind = self._tokens[token], self._types[token]
            if kind == USER_DEFINED:  # the library looks for these after it has changed the text's spaces
                piece = piece.replace(" ", SPACE)
            if token == self._unknown:
                kind = UNKNOWN  # the library takes exactly one
            elif kind == UNKNOWN or (piece in seen and kind in (NORMAL, USER_DEFINED)):
                kind = UNUSED
            if kind in (UNKNOWN, CONTROL) or piece in seen or self._types[token] == UNKNOWN:
                piece = _unreachable(token)
            elif "\0" in piece:
                raise FileError(f"{TOKENS}: token {token} holds a NUL character")
            seen.add(piece)
            proto.pieces.add(piece=piece, score=score, type=kind)
        if self._unknown == count:
            proto.pieces.add(piece=_unreachable(count), score=0.0, type=UNKNOWN)
        self._library = run(
            lambda: sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString()),
            FileError,
            "the file's SentencePiece vocabulary is broken",
        )

    @cached_property
    def _without_prefix(self) -> Any:
        """The library as it puts no space first: a setting of its model, hence a second one."""
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2

        schema: Any = sentencepiece_model_pb2
        proto = schema.ModelProto.FromString(self._library.serialized_model_proto())
        proto.normalizer_spec.add_dummy_prefix = False
        return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())

    def _unknown_id(self, named: int | None) -> int:
        """The library's one unknown piece: the named one, the first of the type, or one past the end."""
        if named is not None and self._types[named] in (UNKNOWN, CONTROL):
            return named
        return self._types.index(UNKNOWN) if UNKNOWN in self._types else len(self._tokens)

    def _encode_plain(self, text: str, prefix: bool) -> list[int]:
        # The library itself matches user-defined pieces, and puts no space before what follows one.
        if self._trims and text.startswith(" "):  # it drops the space, and the prefix is one
            prefix = True
        library = self._library if prefix or not self._space_prefix else self._without_prefix
        ids: list[int] = library.encode(text)
        if len(self._tokens) in ids:
            raise TokenizerError("the text holds a character that is not in the vocabulary")
        return ids

    def _piece_bytes(self, token: int) -> bytes:
        if self._types[token] != BYTE:
            return super()._piece_bytes(token).replace(SPACE.encode(), b" ")
        if (match := _BYTE_PIECE.fullmatch(self._tokens[token])) is None:
            raise FileError(f"{TOKENS}: byte token {token} is {short(self._tokens[token])}, not '<0x0A>'")
        return bytes([int(match[1], 16)])

    def _bytes(self, token: int) -> bytes:
        if token == self._unknown < len(self._table):
            return " \u2047 ".encode()  # as the library shows it
        return super()._bytes(token)

    def decode(self, ids: Iterable[int]) -> str:
        text = super().decode(ids)
        return text.removeprefix(" ") if self._space_prefix else text


class _ByteLevel(_Pieces):
    """`gpt2`: byte-level BPE, cut as `tokenizer.ggml.pre` says.

    A file without `pre`, or with "default", is cut as GPT-2 does it: that is what its model name says.
    """

    def __init__(self, metadata: Mapping[str, Any], rows: int | None) -> None:
        pre = value(metadata, PRE, str, "default")
        pre = "gpt-2" if pre == "default" else pre
        if pre not in PRE_TOKENIZERS:
            known = ", ".join(PRE_TOKENIZERS)
            raise TokenizerError(f"pre-tokenizer {short(pre)} is not supported; the known ones are {known}")
        super().__init__(metadata, rows, add_bos=pre == "llama-bpe")  # as in llama.cpp
        merges = [tuple(merge.split(" ")) for merge in strings(metadata, MERGES)]
        if bad := [pair for pair in merges if len(pair) != 2 or not all(pair)]:
            raise FileError(f"{MERGES}: {short(' '.join(bad[0]))} is not two tokens and a space between")
        vocabulary = self._of_type(NORMAL, USER_DEFINED, UNUSED, BYTE)
        self._missing = frozenset(ALPHABET[character] for character in ALPHABET.keys() - vocabulary.keys())
        model = {"type": "BPE", "vocab": vocabulary, "merges": merges, "ignore_merges": pre == IGNORES_MERGES}
        self._library = load(json.dumps({"pre_tokenizer": PRE_TOKENIZERS[pre], "model": model}))

    def _encode_rest(self, text: str) -> list[int]:
        lost = self._missing.intersection(text.encode()) if self._missing else None
        if lost:  # the library would drop them silently
            raise TokenizerError(f"the text holds the byte 0x{min(lost):02X}, which the vocabulary lacks")
        return self._library.encode(text, add_special_tokens=False).ids

    def _piece_bytes(self, token: int) -> bytes:
        if self._types[token] in (CONTROL, UNKNOWN, USER_DEFINED):
            return super()._piece_bytes(token)
        return alphabet_bytes(self._tokens[token])


class _Characters(_Pieces):
    """`char`: every token but a control token is one character."""

    def __init__(self, metadata: Mapping[str, Any], rows: int | None) -> None:
        super().__init__(metadata, rows)
        self._characters = self._of_type(NORMAL)
        for token, (piece, kind) in enumerate(zip(self._tokens, self._types, strict=True)):
            if kind == NORMAL and len(piece) != 1:
                raise FileError(f"{TOKENS}: token {token} is {short(piece)}, not one character")

    def _encode_rest(self, text: str) -> list[int]:
        try:
            return [self._characters[character] for character in text]
        except KeyError as error:
            character = error.args[0]
            name = f"{short(character)} (U+{ord(character):04X})"
            raise TokenizerError(f"the character {name} is not in the vocabulary") from None


kinds: dict[str, Callable[[Mapping[str, Any], int | None], Tokenizer]] = {
    "llama": partial(_SentencePiece, unigram=False),
    "t5": partial(_SentencePiece, unigram=True),
    "gpt2": _ByteLevel,
    "char": _Characters,
}


def _unreachable(token: int) -> str:
    """The name of a piece that no text gives: not even a control token of one letter is found in a text."""
    return f"<{token}\U0010fffd>"


def _charsmap(found: Any) -> bytes:
    """SentencePiece's normalization table, which a file holds as an array of bytes."""
    if isinstance(found, bytes) or (isinstance(found, np.ndarray) and found.dtype.itemsize == 1):
        return bytes(found)
    raise FileError(f"{CHARSMAP} should be an array of bytes")
