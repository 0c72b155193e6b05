"""Text that follows a schema or a grammar, whatever ids are chosen among the allowed ones."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import numpy as np
import pytest
from conftest import SHAKESPEARE, smollm2

import tcinfer
from tcinfer.constraint import Constraint
from tcinfer.errors import TcinferError
from tcinfer.tokenizer import BOS, EOS, MODEL, TOKENS, TYPES, Tokenizer, from_metadata

pytest.importorskip("llguidance", reason="llguidance is not installed (extra `grammar`)")

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "é", None]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def characters() -> tuple[Tokenizer, int]:
    """Of shakespeare.gguf: no end of text, few characters, of digits only 3, no braces."""
    model = tcinfer.load(SHAKESPEARE)
    return model.tokenizer, model.config.vocab_size


@pytest.fixture(scope="module")
def bytelevel() -> tuple[Tokenizer, int]:
    model = tcinfer.load(smollm2())
    return model.tokenizer, model.config.vocab_size


@pytest.fixture(params=["characters", "bytelevel"])
def tokens(request: pytest.FixtureRequest) -> tuple[Tokenizer, int]:
    return request.getfixturevalue(request.param)


def tiny(**more: Any) -> Tokenizer:
    """a, b, c, an end, and a control token."""
    pieces = {TOKENS: ["a", "b", "c", "<end>", "<other>"], TYPES: [1, 1, 1, 3, 3], EOS: 3, BOS: 4}
    return from_metadata({MODEL: "char"} | pieces | more, 7)


def wander(c: Constraint, ends: frozenset[int], rng: np.random.Generator, most: int = 500) -> list[int]:
    """Random ids among the allowed ones, until the end."""
    ids: list[int] = []
    while not c.done and len(ids) < most:
        chosen = int(rng.choice(np.flatnonzero(c.allowed())))
        c.accept(chosen)
        if chosen in ends:
            break
        ids.append(chosen)
    assert len(ids) < most
    return ids


def fits_person(found: Any) -> bool:
    return (
        set(found) <= {"name", "age", "tags"}
        and len(found["name"]) <= 8
        and 0 <= found["age"] <= 150
        and isinstance(found["age"], int)
        and len(found.get("tags", [])) <= 3
        and set(found.get("tags", [])) <= {"a", "é", None}
    )


@pytest.mark.parametrize("as_text", [False, True])
def test_whatever_is_chosen_is_json_that_fits_the_schema(bytelevel: tuple[Tokenizer, int], as_text: bool) -> None:
    tokenizer, V = bytelevel
    rng = np.random.default_rng(as_text)
    for _ in range(20):
        c = Constraint(tokenizer, V, json_schema=json.dumps(PERSON) if as_text else PERSON)
        assert fits_person(json.loads(tokenizer.decode(wander(c, tokenizer.eos_ids, rng))))


def test_json_in_few_characters(characters: tuple[Tokenizer, int]) -> None:
    tokenizer, V = characters
    rng = np.random.default_rng(0)
    values = [True, False, None, 3, 33]
    seen = set()
    for _ in range(60):
        c = Constraint(tokenizer, V, json_schema={"enum": values})
        text = ""
        while not c.done and text != "3":  # after which 33 may follow, or the end, of which there is no token
            token = int(rng.choice(np.flatnonzero(c.allowed())))
            c.accept(token)
            text += tokenizer.decode([token])
        seen.add(json.loads(text))
    assert seen == {True, False, None, 3}


def test_what_the_vocabulary_cannot_write_is_no_way_on(characters: tuple[Tokenizer, int]) -> None:
    c = Constraint(*characters, json_schema={"type": "object"})  # no brace
    with pytest.raises(TcinferError, match="text that this vocabulary cannot write"):
        c.allowed()
    c = Constraint(*characters, grammar='start: "ab" ("é" | "c")')
    for token in characters[0].encode("ab"):
        c.accept(token)
    assert np.flatnonzero(c.allowed()).tolist() == characters[0].encode("c")


LARK = 'start: greeting ("," greeting){0,2}\ngreeting: /H[ae]llo/ | "Bye"\n'
GBNF = 'root ::= greeting ("," greeting){0,2}\ngreeting ::= "H" [ae] "llo" | "Bye"\n'


@pytest.mark.parametrize("grammar", [LARK, GBNF, f"%llguidance {{}}\n{LARK}", f"{LARK}// the end"])
def test_a_grammar_is_respected(tokens: tuple[Tokenizer, int], grammar: str) -> None:
    tokenizer, V = tokens
    rng = np.random.default_rng(0)
    texts = {
        tokenizer.decode(wander(Constraint(tokenizer, V, grammar=grammar), tokenizer.eos_ids, rng)) for _ in range(20)
    }
    assert len(texts) > 5
    assert all(re.fullmatch("(Hallo|Hello|Bye)(,(Hallo|Hello|Bye)){0,2}", text) for text in texts)


def test_every_cut_into_tokens_is_allowed(bytelevel: tuple[Tokenizer, int]) -> None:
    tokenizer, V = bytelevel
    c = Constraint(tokenizer, V, grammar='start: "hello"')
    allowed = {tokenizer.token_bytes(int(i)) for i in np.flatnonzero(c.allowed())}
    assert allowed == {piece for piece in map(tokenizer.token_bytes, range(V)) if piece and b"hello".startswith(piece)}
    assert {b"h", b"hel", b"hello"} <= allowed


def test_the_end_may_come_exactly_where_the_text_may_end() -> None:
    tokenizer = tiny()
    c = Constraint(tokenizer, 7, grammar='start: "a" "b"*')
    steps = []
    for token in (0, 1, 1):
        steps.append(np.flatnonzero(c.allowed()).tolist())
        assert not c.done
        c.accept(token)
    assert steps == [[0], [1, 3], [1, 3]]
    c.accept(3)
    c = Constraint(tokenizer, 7, grammar='start: "ab"')
    assert not c.done
    c.accept(0)
    assert not c.done
    c.accept(1)
    assert c.done
    assert np.flatnonzero(c.allowed()).tolist() == [3]
    assert Constraint(tokenizer, 7, grammar='start: ""').done


def test_ids_without_text_are_never_allowed() -> None:
    """Control tokens, rows of padding (5 and 6, here even named) and the end in the middle of the text."""
    c = Constraint(tiny(), 7, grammar="start: /[a-z<>]{1,5}/ | <[6]>")
    assert np.flatnonzero(c.allowed()).tolist() == [0, 1, 2]
    for token in (-1, 3, 4, 5, 6, 7, 2**40):
        with pytest.raises(TcinferError, match="not what the grammar allows"):
            c.accept(token)
    c.accept(2)  # none of these has done any harm
    assert np.flatnonzero(c.allowed()).tolist() == [0, 1, 2, 3]


def test_constraints_of_one_tokenizer_are_apart(characters: tuple[Tokenizer, int]) -> None:
    tokenizer, V = characters
    one, two = (Constraint(tokenizer, V, grammar='start: "ab"') for _ in range(2))
    one.accept(tokenizer.encode("a")[0])
    assert np.flatnonzero(two.allowed()).tolist() == tokenizer.encode("a")


def test_white_space_ends() -> None:
    """JSON allows it without end; a schema may say so."""
    pieces = [" ", "\n", "[", "]"]
    tokenizer = from_metadata({MODEL: "char", TOKENS: pieces}, 4)
    schema = {"type": "array", "maxItems": 0}
    c = Constraint(tokenizer, 4, json_schema=schema)
    c.accept(2)
    c.accept(0)
    assert np.flatnonzero(c.allowed()).tolist() == [3]
    c = Constraint(tokenizer, 4, json_schema=schema | {"x-guidance": {"whitespace_pattern": " +"}})
    for token in (2, *[0] * 100, 3):
        c.accept(token)
    assert c.done


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "a json_schema or a grammar"),
        ({"grammar": "start: /a/", "json_schema": {}}, "a json_schema or a grammar"),
        ({"grammar": 5}, "grammar must be a text, not int"),
        ({"grammar": ""}, "grammar: as GBNF: No 'root' rule"),
        ({"grammar": "start: nowhere"}, r'grammar: at 1\(8\): unknown name: "nowhere"'),
        ({"grammar": "start: /[/"}, "grammar: .*unclosed character class"),
        ({"grammar": "start: " + "(" * 9999}, "nested"),
        ({"grammar": 'start: "\udc80"'}, "grammar: "),
        ({"grammar": "root ::= nowhere"}, "grammar: as GBNF: Rule 'nowhere' not found"),
        ({"grammar": 'root ::= "a" ('}, "grammar: as GBNF: Expected"),
        ({"json_schema": "{"}, "json_schema is no JSON: Expecting property name"),
        ({"json_schema": "[" * 10**5}, "json_schema is no JSON: "),
        ({"json_schema": '{"a":' * 500 + "1" + "}" * 500}, "json_schema: .*recursion limit"),
        ({"json_schema": [1]}, "json_schema must be an object, .* not list"),
        ({"json_schema": "false"}, "json_schema must be an object, .* not bool"),
        ({"json_schema": {"const": {1}}}, "json_schema is no JSON: "),
        ({"json_schema": {"const": float("nan")}}, "json_schema is no JSON: "),
        ({"json_schema": {"type": "foo"}}, "json_schema: Invalid type: foo"),
        ({"json_schema": {"not": {}}}, 'json_schema: Unimplemented keys: ."not".'),
        ({"json_schema": {"type": "integer", "minimum": 3, "maximum": 2}}, "json_schema: Unsatisfiable"),
    ],
)
def test_what_is_no_schema_and_no_grammar(given: dict[str, Any], message: str) -> None:
    with pytest.raises(TcinferError, match=message) as e:
        Constraint(tiny(), 7, **given)
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 300


def test_a_schema_for_anything() -> None:
    for schema in ({}, "{}", "true", True):
        c = Constraint(from_metadata({MODEL: "char", TOKENS: ["{", "}", "x"]}, 3), 3, json_schema=schema)
        assert np.flatnonzero(c.allowed()).tolist() == [0]


def test_tokenizers_without_bytes_and_files_without_tokenizers() -> None:
    class Words(Tokenizer):
        def _bytes(self, token: int) -> bytes:
            return Tokenizer._bytes(self, token)  # raises

    with pytest.raises(TcinferError, match="do not work with this tokenizer"):
        Constraint(Words({}, 3, 4), 4, grammar='start: "a"')
    with pytest.raises(TcinferError, match="holds no tokenizer"):
        Constraint(from_metadata({}, 9), 9, grammar='start: "a"')


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(TcinferError, match=re.escape("pip install 'tcinfer[grammar]'")):
        Constraint(tiny(), 7, grammar='start: "a"')


def test_formats_that_nobody_knows_are_ignored_and_the_others_are_not(bytelevel: tuple[Tokenizer, int]) -> None:
    told = {"const": {"format": "path"}}  # no schema, and no format of one
    one = {"type": "string", "format": "path", "maxLength": 1}
    schema = {
        "type": "object",
        "properties": {"a": one, "b": {"anyOf": [{"type": "string", "format": "password"}, told]}, "c": told},
        "required": ["a", "b", "c"],
        "additionalProperties": False,
    }
    given = json.dumps(schema)
    c = Constraint(*bytelevel, json_schema=schema)
    assert json.dumps(schema) == given
    text = bytelevel[0].encode('{"a":"x","b":{"format":"path"},"c":{"format":"path"}}')
    for token in text:
        c.accept(token)
    assert c.allowed()[sorted(bytelevel[0].eos_ids)].all()
    date = Constraint(*bytelevel, json_schema={"anyOf": [{"type": "string", "format": "date"}, one]})
    assert date.allowed()[bytelevel[0].encode('"')[0]]
    date = Constraint(*bytelevel, json_schema={"type": "string", "format": "date"})
    date.accept(bytelevel[0].encode('"')[0])
    assert not date.allowed()[bytelevel[0].encode("x")[0]]
