"""Text that follows a grammar: which ids may come next. The library `llguidance` parses; here are its edges."""

from __future__ import annotations

import json
import re
from copy import copy
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tcinfer.errors import TcinferError, TokenizerError
from tcinfer.tokenizer.huggingface import run

if TYPE_CHECKING:
    from tcinfer.tokenizer import Tokenizer

# Every id that fits is allowed. Else the library cuts text that is the only way on into tokens itself, which goes wrong
# where the vocabulary lacks a character. It stands behind the grammar, where it moves no line numbers.
NO_FORCING = '\n%llguidance {"no_forcing": true}\n'
UNKNOWN_FORMAT = re.compile(r"Unknown format: (\S+)")  # what the library says of one
VALUES = ("const", "enum", "default", "examples")  # keys of a schema below which is no schema
# JSON allows white space without end, which small models love. This is room for indented lines.
WHITE_SPACE = {"whitespace_pattern": r" |\n{1,2}[ \t]{0,20}"}


class Constraint:
    """A grammar, and the place in it to which the accepted ids have led."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        V: int,
        json_schema: str | dict[str, Any] | None = None,
        grammar: str | None = None,
    ) -> None:
        """V: the model's ids; json_schema: as text or parsed; grammar: llguidance's Lark dialect, or GBNF.

        Raises TcinferError unless exactly one of the two is given, for a broken one, for a tokenizer whose tokens have
        no bytes of their own, and where llguidance is not installed.
        """
        library = _library()
        if (json_schema is None) == (grammar is None):
            raise TcinferError("a constraint is a json_schema or a grammar, one of them")
        name = "grammar" if json_schema is None else "json_schema"
        schema = None if json_schema is None else _schema(json_schema)
        vocabulary = _vocabulary(tokenizer, V)

        def compiled() -> Any:
            lark = _lark(grammar) if schema is None else f"start: %json {json.dumps(schema)}"
            return library.LLMatcher(vocabulary, library.LLMatcher.grammar_from_lark(lark + NO_FORCING), log_level=0)

        self._matcher = run(compiled, TcinferError, name)
        while error := self._matcher.get_error():
            unknown = UNKNOWN_FORMAT.search(error)
            if schema is None or unknown is None or not _drop_format(schema, unknown[1]):
                raise TcinferError(f"{name}: {_line(error)}")
            self._matcher = run(compiled, TcinferError, name)
        self._V, self._known, self._ends = V, min(V, tokenizer.vocab_size), sorted(tokenizer.eos_ids)
        self._found: tuple[NDArray[np.bool_], bool] | None = None  # by _next, for this place

    def afresh(self) -> Constraint:
        """The same grammar, at its start."""
        other = copy(self)
        other._matcher, other._found = self._matcher.deep_copy(), None
        other._matcher.reset()
        return other

    def allowed(self) -> NDArray[np.bool_]:
        """The ids that may come next, bool [V]; the tokenizer's `eos_ids` exactly where the text may end.

        Not to be written to. Raises TcinferError where the vocabulary has nothing that goes on.
        """
        return self._next()[0]

    def accept(self, token: int) -> None:
        """Go on by this id. Raises TcinferError for one that is not allowed."""
        if not 0 <= token < self._V or not self.allowed()[token]:
            raise TcinferError(f"id {token} is not what the grammar allows here")
        if token not in self._ends:
            self._matcher.consume_token(token)
            self._found = None

    @property
    def done(self) -> bool:
        """Whether nothing may follow but the end."""
        allowed, may_end = self._next()
        return may_end and int(allowed.sum()) == len(self._ends)

    def _next(self) -> tuple[NDArray[np.bool_], bool]:
        """The ids allowed [V], and whether the text may end."""
        if self._found is None:
            mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            if error := self._matcher.get_error():
                if error.startswith("NoExtension"):
                    error = "it asks for text that this vocabulary cannot write"
                raise TcinferError(f"the grammar leads nowhere: {_line(error)}")
            ids = np.unpackbits(mask, count=self._V + 1, bitorder="little").view(np.bool_)
            allowed, may_end = ids[:-1], bool(ids[-1])
            allowed[self._known :] = False  # rows of padding, which a grammar may name by number
            allowed[self._ends] = may_end
            self._found = allowed, may_end
        return self._found


def compiled(tokenizer: Tokenizer, V: int, json_schema: Any = None, grammar: str | None = None) -> Constraint:
    """A constraint to take `afresh`: compiled once for requests that ask for the same one after the other."""
    if json_schema is not None and not isinstance(json_schema, str):
        schema = json_schema
        json_schema = run(lambda: json.dumps(schema), TcinferError, "json_schema is no JSON")
    return _compiled(tokenizer, V, json_schema, grammar)


@lru_cache(maxsize=8)
def _compiled(tokenizer: Tokenizer, V: int, json_schema: str | None, grammar: str | None) -> Constraint:
    return Constraint(tokenizer, V, json_schema, grammar)


class _Words:
    """A vocabulary as llguidance takes it: the bytes of each token, and one token more, the end."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids = ()

    def __init__(self, tokens: list[bytes]) -> None:
        self.tokens, self.eos_token_id = [*tokens, b""], len(tokens)

    def __call__(self, text: str) -> list[int]:
        return []  # the tokens of forced text, of which there is none


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise TcinferError("grammars and JSON schemas need llguidance: pip install 'tcinfer[grammar]'") from None
    return llguidance


@lru_cache(maxsize=2)  # it takes 0.15 s
def _vocabulary(tokenizer: Tokenizer, V: int) -> Any:
    known = min(V, tokenizer.vocab_size)
    if not known:
        raise TcinferError(
            "this file holds no tokenizer, and a grammar is about text: convert again with --tokenizer FILE"
        )
    try:
        tokens = list(map(tokenizer.token_bytes, range(known)))
    except TokenizerError as e:
        raise TcinferError(f"grammars and JSON schemas do not work with this tokenizer: {e}") from None
    return _library().LLTokenizer(_Words([*tokens, *[b""] * (V - known)]))


def _lark(grammar: Any) -> str:
    """A grammar in Lark's syntax; by llguidance's rule it is GBNF unless a line begins with `start:`."""
    if not isinstance(grammar, str):
        raise TcinferError(f"grammar must be a text, not {type(grammar).__name__}")
    from llguidance.gbnf_to_lark import any_to_lark

    return run(lambda: any_to_lark(grammar), TcinferError, "grammar: as GBNF")


def _schema(schema: Any) -> dict[str, Any]:
    """A JSON schema as an object of its own."""
    if isinstance(schema, str):
        text = schema
        schema = run(lambda: json.loads(text), TcinferError, "json_schema is no JSON")
    if schema is True:  # anything
        schema = {}
    if not isinstance(schema, dict):
        raise TcinferError(f'json_schema must be an object, such as {{"type": "string"}}, not {type(schema).__name__}')
    schema = {"x-guidance": WHITE_SPACE, **schema}
    whole = run(lambda: json.dumps(schema, allow_nan=False), TcinferError, "json_schema is no JSON")
    own: dict[str, Any] = json.loads(whole)
    return own


def _drop_format(schema: Any, name: str) -> bool:
    """Take a format out of a schema wherever it stands, and say whether it did. JSON Schema 7.2.1 has formats that one
    does not know ignored."""
    if isinstance(schema, list):
        return any([_drop_format(one, name) for one in schema])
    if not isinstance(schema, dict):
        return False
    found = schema.get("format") == name
    if found:
        del schema["format"]
    return any([_drop_format(one, name) for key, one in schema.items() if key not in VALUES]) or found


def _line(error: str) -> str:
    """llguidance's message without what it quotes and traces, on one line."""
    for trace in ("\n<state>", "\n<backtrace>", "\n   1 |"):
        error = error.partition(trace)[0]
    return " ".join(error.removeprefix("at 1(8): failed to compile JSON schema:").split())[:200]
