"""Hugging Face's `tokenizers`: whole tokenizer.json files, and what byte-level BPE is in one."""

import json
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any, TypeVar

from tcinfer.errors import FileError, TcinferError, TokenizerError
from tcinfer.tokenizer import HUGGINGFACE_JSON, StreamDecoder, Tokenizer, iterable, short, value

_T = TypeVar("_T")


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def _words(number: str) -> dict[str, Any]:
    pattern = (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{number}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


# tokenizer.ggml.pre: how a text is cut before byte-level BPE, as a tokenizer.json writes it.
PRE_TOKENIZERS = {
    "gpt-2": _byte_level(True),
    "smollm": _sequence({"type": "Digits", "individual_digits": True}, _byte_level(True)),
    "qwen2": _sequence(_words(r"\p{N}"), _byte_level(False)),
    **dict.fromkeys(("llama-bpe", "smaug-bpe", "dbrx"), _sequence(_words(r"\p{N}{1,3}"), _byte_level(False))),
}
IGNORES_MERGES = "llama-bpe"  # a word that is a token is that token, whatever the merges make of it


def _byte_alphabet() -> dict[str, int]:
    """How byte-level BPE writes bytes: printable Latin-1 as itself, the rest in characters from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(rest)}


ALPHABET = _byte_alphabet()


def alphabet_bytes(piece: str) -> bytes:
    """The bytes of a byte-level piece; a piece that is not written in the alphabet stands for itself."""
    try:
        return bytes([ALPHABET[character] for character in piece])
    except KeyError:
        return piece.encode()


def load(text: str) -> Any:
    """A tokenizer.json as the library has it, without truncation and padding. Raises FileError."""
    import tokenizers

    library = run(lambda: tokenizers.Tokenizer.from_str(text), FileError, "the file's tokenizer is broken")
    library.no_truncation()
    library.no_padding()
    return library


def run(call: Callable[[], _T], kind: type[TcinferError], what: str) -> _T:
    """A library's answer, its own errors as ours."""
    try:
        return call()
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":  # Rust's: no Exception
            raise kind(f"{what}: {' '.join(str(error).split())[:200]}") from None
        raise


class HuggingFace(Tokenizer):
    """`tokenizer.huggingface.json`: a whole tokenizer.json, run as it is, except for truncation and padding.

    Ids beyond plain text (a template's [CLS] and the like) are not added: `bos` and the conversation do that.
    """

    def __init__(self, metadata: Mapping[str, Any], rows: int | None) -> None:
        self._library = load(value(metadata, HUGGINGFACE_JSON, str, ""))
        self._library.encode_special_tokens = True  # as plain text: they are cut out before the library sees it
        self._names = {token: name for name, token in self._library.get_vocab().items()}
        super().__init__(metadata, max(self._names, default=-1) + 1, rows)
        added = {token: facts for token, facts in self._library.get_added_tokens_decoder().items() if facts.special}
        self._control_ids = set(added)
        self._controls = {facts.content: token for token, facts in added.items() if facts.content}
        self._added = {facts.content: facts for facts in added.values()}
        self._prefix_once = '"prepend_scheme": "first"' in json.dumps(_steps(self._library))
        self._unknown = self._library.token_to_id(getattr(self._library.model, "unk_token", None) or "")
        from tokenizers.decoders import ByteLevel

        self._own_bytes = isinstance(self._library.decoder, ByteLevel)

    def _cut(self, text: str) -> list[str]:
        pieces = super()._cut(text)
        for i in range(1, len(pieces), 2):  # a token may take the white space around it
            if self._added[pieces[i]].lstrip:
                pieces[i - 1] = pieces[i - 1].rstrip()
            if self._added[pieces[i]].rstrip:
                pieces[i + 1] = pieces[i + 1].lstrip()
        return pieces

    @cached_property
    def _without_prefix(self) -> Any:
        """The library as it puts no space first."""
        steps = _steps(self._library)
        if (changed := _no_prefix(steps)) == steps:
            return self._library
        library = load(json.dumps(json.loads(self._library.to_str()) | changed))
        library.encode_special_tokens = True
        return library

    def _encode_plain(self, text: str, prefix: bool) -> list[int]:
        library = self._library if prefix else self._without_prefix
        what = "the text cannot be encoded"
        ids = run(lambda: library.encode(text, add_special_tokens=False).ids, TokenizerError, what)
        if found := self._control_ids.intersection(ids) - {self._unknown}:
            raise TokenizerError(f"the text holds the control token {short(self._names[min(found)])}")
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return super().decode(ids) if self._own_bytes else self._text([self.checked(token) for token in iterable(ids)])

    def stream(self) -> StreamDecoder:
        return super().stream() if self._own_bytes else _WindowDecoder(self, self._text, self._anchor)

    def _bytes(self, token: int) -> bytes:
        if not self._own_bytes:
            raise TokenizerError("the bytes of this tokenizer's tokens depend on the tokens around them")
        return b"" if token in self._control_ids else alphabet_bytes(self._names.get(token, ""))

    def _text(self, ids: list[int]) -> str:
        return run(lambda: self._library.decode(ids), TokenizerError, "the ids cannot be decoded")

    @cached_property
    def _anchor(self) -> list[int]:
        """A token that is a word: after it, a decoder keeps the space it drops where a text begins."""
        return next(([token] for token in sorted(self._names) if self._text([token]).isalpha()), [])


def _steps(library: Any) -> dict[str, Any]:
    """What a tokenizer.json says of the steps that may put a space before a text."""
    steps = {"normalizer": library.normalizer, "pre_tokenizer": library.pre_tokenizer}
    return {name: None if step is None else json.loads(step.__getstate__()) for name, step in steps.items()}


def _no_prefix(step: Any) -> Any:
    """Steps of a tokenizer.json, changed so that they put nothing before a text."""
    if isinstance(step, list):
        return [_no_prefix(part) for part in step]
    if not isinstance(step, dict):
        return step
    off = {"prepend_scheme": "never", "add_prefix_space": False, "prepend": ""}
    return {name: off[name] if name in off else _no_prefix(part) for name, part in step.items()}


class _WindowDecoder(StreamDecoder):
    """For decoders that look at neighbours: what a short window of ids gains in text with each new id."""

    _MOST = 16  # ids without a complete character: more than any character has bytes

    def __init__(self, tokenizer: HuggingFace, text: Callable[[list[int]], str], anchor: list[int]) -> None:
        self._tokenizer, self._text = tokenizer, text
        self._context, self._pending = anchor, list[int]()

    def push(self, token: int) -> str:
        self._pending = [*self._pending, self._tokenizer.checked(token)]
        gained = self._gained()
        if gained.endswith("\ufffd") and len(self._pending) < self._MOST:
            return ""
        if gained:
            self._context, self._pending = self._pending, []
        elif len(self._pending) >= self._MOST:  # nothing but tokens without text
            self._pending = []
        return gained

    def peek(self, token: int) -> str:
        state = self._context, self._pending
        try:
            return self.push(token)
        finally:
            self._context, self._pending = state

    def flush(self) -> str:
        gained, self._pending = self._gained(), []
        return gained

    def _gained(self) -> str:
        return self._text(self._context + self._pending)[len(self._text(self._context)) :]
