"""Texts in parts: control tokens are a template's alone, tokens reach across borders, a text goes on from another."""

import json
import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import KINDS, bpe, char, hf_bytes, spm

from tcinfer.errors import TokenizerError
from tcinfer.tokenizer import BOS, CONTROL, EOS, HUGGINGFACE_JSON, NORMAL, TOKENS, TYPES, from_metadata


def hf(**steps):
    """A tokenizer.json of bytes, with other steps; its token <end> takes white space after it, <mask> before it."""
    found = json.loads(hf_bytes()) | steps
    for token, name in enumerate(["<end>", "<mask>"], 263):
        added = found["added_tokens"][0] | {"id": token, "content": name, "rstrip": name == "<end>"}
        found["added_tokens"].append(added | {"lstrip": name == "<mask>"})
        found["model"]["vocab"][name] = token
    return {HUGGINGFACE_JSON: json.dumps(found)}


def metaspace(scheme):
    step = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": True}
    return hf(normalizer=None, pre_tokenizer={"type": "Sequence", "pretokenizers": [step]})


def byte_level():
    """A tokenizer.json of byte-level BPE that puts a space first."""
    level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    tokens = bpe(extra=[])[TOKENS]
    model = {"type": "BPE", "vocab": {name: i for i, name in enumerate(tokens)}, "merges": ["h e", "he l", "Ġ hel"]}
    found = json.loads(hf_bytes()) | {"normalizer": None, "pre_tokenizer": level, "decoder": level, "model": model}
    for i, token in enumerate(found["added_tokens"]):
        token["id"] = len(tokens) + i
    return {HUGGINGFACE_JSON: json.dumps(found)}


JSON = {"prepend": hf(), "first": metaspace("first"), "always": metaspace("always"), "byte level": byte_level()}
PLAIN = ["a", "ab", "b", "hel", "h", "i", " ", "  ", "\n", "é", "🦙", "it's", "12"]
# Kind -> (its metadata, texts of control tokens, texts that are none)
CASES = {
    **{name: (KINDS[name], ["<s>", "</s>"], PLAIN) for name in ("llama", "llama, no prefix")},
    **{name: (KINDS[name], ["<|a|>", "<|ab|>"], PLAIN) for name in ("gpt2", "qwen2", "smollm", "llama-bpe")},
    "llama, users": (spm(users=["<u>", "b  b"]), ["<s>", "</s>"], [*PLAIN, "<u>"]),
    "char": (char(**{TOKENS: [*"\n abc<s>", "<s>"], TYPES: [NORMAL] * 8 + [CONTROL]}), ["<s>"], list("abcs> \n")),
    **{name: (metadata, ["<s>"], PLAIN) for name, metadata in JSON.items()},
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def case(request):
    metadata, controls, plain = CASES[request.param]
    return from_metadata(metadata, None), controls, plain


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_parts_are_the_whole(case, data):
    tokenizer, controls, plain = case
    said = st.tuples(st.lists(st.sampled_from(plain)).map("".join), st.just(False))
    own = st.tuples(st.lists(st.sampled_from([*plain, *controls])).map("".join), st.just(True))
    parts = data.draw(st.lists(st.one_of(said, own), max_size=6))
    cut = []
    for text, special in parts:  # a border between parts of the same kind is none, even within a control token
        at = data.draw(st.integers(0, len(text)))
        cut += [(text[:at], special), (text[at:], special)]
    whole = "".join(text for text, _ in parts)
    for continues in (False, True):
        assert tokenizer.encode_parts(cut, continues=continues) == tokenizer.encode(
            whole, special=True, continues=continues
        )
        assert tokenizer.encode_parts([(text, False) for text, _ in cut]) == tokenizer.encode(whole)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_what_people_say_is_never_a_control_token(case, data):
    tokenizer, controls, plain = case
    pieces = [text[a:b] for text in controls for a in range(len(text)) for b in range(a + 1, len(text) + 1)]
    hostile = st.lists(st.sampled_from([*pieces, *controls, *plain]), max_size=6).map("".join)
    halves = [text[:n] for text in controls for n in range(1, len(text))]
    rests = [text[n:] for text in controls for n in range(1, len(text))]
    before, said, after = data.draw(st.sampled_from(halves)), data.draw(hostile), data.draw(st.sampled_from(rests))
    if tokenizer.vocab_size < 20:  # characters: it cannot write them all
        before, after = "<", ">"
        said = "".join(c for c in said if c in "abc<s> \n")
    control_ids = {tokenizer.encode(text, special=True)[0] for text in controls}
    for parts in (
        [(said, False)],
        [(before, True), (said, False), (after, True)],
        [(before, False), (said, True), (after, False)] if said in plain else [(before, True), (after, False)],
    ):
        ids = tokenizer.encode_parts(parts)
        assert not control_ids & set(ids)
        whole = "".join(text for text, _ in parts)
        assert tokenizer.decode(ids).lstrip(" ") == whole.lstrip(" ")  # Metaspace takes one as the prefix


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_text_that_continues(case, data):
    tokenizer, _, plain = case
    first, second = (data.draw(st.lists(st.sampled_from(plain)).map("".join)) for _ in range(2))
    first = "a" + first  # a space in front is a matter of each kind
    stream = tokenizer.stream()
    ids = tokenizer.encode(first) + tokenizer.encode(second, continues=True)
    text = "".join(map(stream.push, ids)) + stream.flush()
    assert text.removeprefix(" ") == first + second


def test_a_continued_text_has_no_prefix_space():
    assert from_metadata(spm(), None).encode("ab", continues=True) == [263]
    assert from_metadata(spm(), None).encode(" ab", continues=True) == from_metadata(spm(), None).encode("ab") == [264]
    assert from_metadata(KINDS["llama, no prefix"], None).encode("ab", continues=True) == [263]
    for name, metadata in JSON.items():
        tokenizer = from_metadata(metadata, None)
        assert tokenizer.encode(" hi", continues=True) == tokenizer.encode("hi"), name
        assert tokenizer.encode("hi", continues=True) != tokenizer.encode("hi"), name


def test_after_a_control_token_the_prefix_is_as_in_the_whole():
    llama = from_metadata(spm(), None)
    assert llama.encode("<s>ab", special=True, continues=True) == [1, 264]
    assert llama.encode_parts([("ab", False), ("<s>", True), ("ab", False)], continues=True) == [263, 1, 264]
    first = from_metadata(JSON["first"], None)
    assert first.encode("hi<s>hi", special=True) == [262, 1, 261]


@pytest.mark.parametrize("name", JSON)
def test_control_tokens_as_the_library_sees_them(name):
    import tokenizers

    tokenizer = from_metadata(JSON[name], None)
    library = tokenizers.Tokenizer.from_str(JSON[name][HUGGINGFACE_JSON])
    library.no_truncation()
    rng = random.Random(3)
    pieces = ["<s>", "<unk>", "hi", "h", " ", "\n", "é", "<"] + ["<end>", "<mask>"] * (name != "byte level")
    for _ in range(500):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 8)))
        assert tokenizer.encode(text, special=True) == library.encode(text, add_special_tokens=False).ids, text


def test_a_token_takes_white_space_of_its_own_part_only():
    tokenizer = from_metadata(hf(), None)
    assert tokenizer.encode("<end> \n<s>", special=True) == [263, 1]
    ids = tokenizer.encode_parts([("<end>\n", True), (" \nhi\n", False), ("\n<mask>", True)])
    assert [ids[0], ids[-1]] == [263, 264]
    assert tokenizer.decode(ids).strip(" ") == "\nhi\n"


def test_one_bos():
    tokenizer = from_metadata(spm(), None)
    assert tokenizer.encode("ab", bos=True) == [1, 264]
    assert tokenizer.encode("<s>ab", bos=True, special=True) == [1, 264]
    assert tokenizer.encode_parts([("<s>", True), ("ab", False)], bos=True) == [1, 264]
    assert tokenizer.encode_parts([("<s>", False), ("ab", False)], bos=True)[:2] != [1, 1]
    assert tokenizer.encode_parts([], bos=True) == [1]
    assert tokenizer.encode_parts([]) == []
    with pytest.raises(TokenizerError, match="no BOS"):
        from_metadata(bpe(), None).encode_parts([("a", True)], bos=True)
    with pytest.raises(TokenizerError, match="a text is needed"):
        tokenizer.encode_parts([("a", True), (b"b", True)])


def test_control_text():
    for metadata in (spm(), {HUGGINGFACE_JSON: hf_bytes(), BOS: 1, EOS: 0}):
        tokenizer = from_metadata(metadata, None)
        assert tokenizer.control_text(tokenizer.bos_id) == "<s>"
        assert tokenizer.control_text(tokenizer.eos_id) in ("</s>", "<unk>")
        assert tokenizer.control_text(260) == tokenizer.control_text(None) == ""


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 260), max_size=30), more=st.lists(st.integers(0, 260), max_size=3))
@pytest.mark.parametrize("name", ["llama", "gpt2", "json"])
def test_peek_is_push_without_pushing(name, ids, more):
    tokenizer = from_metadata(KINDS[name], 300)
    stream, plain = tokenizer.stream(), tokenizer.stream()
    for token in ids:
        for other in more:
            stream.peek(other)
        with pytest.raises(TokenizerError):
            stream.peek(-1)
        seen = stream.peek(token)
        assert seen == stream.push(token) == plain.push(token)
    assert stream.flush() == plain.flush()


def test_linear_time(case):
    tokenizer, (control, *_), _ = case
    for parts in (
        [("a" * 10, i % 2 == 0) for i in range(20_000)],
        [(control, True), ("\n " * 100_000, False), (control * 20_000, True), (control * 20_000, False)],
        [(" " * 200_000 + control, True)],
    ):
        if tokenizer.vocab_size < 20 and parts[0][0] == control:
            continue
        start = time.perf_counter()
        tokenizer.encode_parts(parts, continues=True)
        assert time.perf_counter() - start < 2


def test_threads():
    for metadata in (spm(), JSON["first"]):
        tokenizer = from_metadata(metadata, None)
        expected = [from_metadata(metadata, None).encode("hi ab", continues=i % 2 == 1) for i in range(2)]
        with ThreadPoolExecutor(8) as pool:
            jobs = [pool.submit(tokenizer.encode, "hi ab", continues=i % 2 == 1) for i in range(200)]
        assert [job.result() for job in jobs] == expected * 100
