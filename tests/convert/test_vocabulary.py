"""tcinfer.converters.vocabulary: every kind of tokenizer file gives the ids of the library that wrote it."""

import json
import pickle
import random
import shutil
import struct
from contextlib import suppress

import pytest
from conftest import SHARED

from tcinfer.converters.vocabulary import find, read
from tcinfer.errors import FileError
from tcinfer.gguf.reader import read as read_gguf
from tcinfer.tokenizer import (
    ADD_BOS,
    BOS,
    CHARSMAP,
    CONTROL,
    EOM,
    EOS,
    EOT,
    HUGGINGFACE_JSON,
    MERGES,
    MODEL,
    PRE,
    TOKENS,
    TYPES,
    UNUSED,
    USER_DEFINED,
    from_metadata,
)
from tcinfer.tokenizer.huggingface import IGNORES_MERGES, PRE_TOKENIZERS

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs {SHARED}")
TEXTS = [
    "", " ", "It's 12345 times  better!\n\n  isn't IT?\t", "née Ångström 你好 🦙 x=1;",
    "<|end|>a<tool>b <|end|>", "   a",
    "\r\n\r\n x", "aAbB...???   ", "don't 'LL 1½ ²³", "<s>a</s>",
]  # fmt: skip


def words(seed=7, count=400):
    rng = random.Random(seed)
    some = ["".join(rng.choices("abcdehlotIT 0123é'", k=rng.randint(2, 8))) for _ in range(count)]
    return [" ".join(rng.choices(some, k=9)) for _ in range(count)]


def byte_level(pre="gpt-2", added=("<tool>",), alphabet=True, ignore_merges=None):
    """A byte-level BPE tokenizer trained by the library, cut as one of ours."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    shape = {"pre_tokenizer": PRE_TOKENIZERS[pre], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    ignores = pre == IGNORES_MERGES if ignore_merges is None else ignore_merges
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=ignores))
    tokenizer.pre_tokenizer = tokenizers.Tokenizer.from_str(json.dumps(shape)).pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if alphabet else [],
    )  # fmt: skip
    tokenizer.train_from_iterator(words(), trainer)
    tokenizer.add_tokens(list(added))
    return tokenizer


def same(metadata, library, texts=TEXTS):
    """The runtime's ids and texts are the library's, with control tokens and without."""
    tokenizer = from_metadata(metadata, None)
    for text in texts:
        for special in (False, True):
            library.encode_special_tokens = not special
            ids = library.encode(text, add_special_tokens=False).ids
            assert tokenizer.encode(text, special=special) == ids
            assert tokenizer.decode(ids) == library.decode(ids)


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_tokenizer_json_that_is_gpt2(tmp_path, pre):
    library = byte_level(pre)
    library.save(str(tmp_path / "tokenizer.json"))
    metadata = read(tmp_path, library.get_vocab_size())
    assert (metadata[MODEL], metadata[ADD_BOS]) == ("gpt2", False)
    same_rules = PRE_TOKENIZERS[metadata[PRE]] == PRE_TOKENIZERS[pre]  # some have two names
    assert (same_rules, metadata[PRE] == IGNORES_MERGES) == (True, pre == IGNORES_MERGES)
    assert metadata[TYPES][library.token_to_id("<|end|>")] == CONTROL
    assert metadata[TYPES][library.token_to_id("<tool>")] == USER_DEFINED
    same(metadata, library)


def normalized(library):
    from tokenizers import normalizers

    library.normalizer = normalizers.NFKC()


def split_otherwise(library):
    from tokenizers import pre_tokenizers

    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def stripping(library):
    from tokenizers import AddedToken

    library.add_tokens([AddedToken("<strip>", lstrip=True)])


def ending(library):
    from tokenizers.processors import TemplateProcessing

    token = library.token_to_id("<|end|>")
    library.post_processor = TemplateProcessing(single="$A <|end|>", special_tokens=[("<|end|>", token)])


def merged_control(library):
    library.add_special_tokens(["he"])


def decoding_otherwise(library):
    from tokenizers import decoders

    library.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])


@pytest.mark.parametrize("change", [normalized, split_otherwise, stripping, ending, merged_control, decoding_otherwise])
def test_tokenizer_json_that_goes_whole(tmp_path, change):
    library = byte_level()
    assert "he" in library.get_vocab()
    change(library)
    library.save(str(tmp_path / "tokenizer.json"))
    metadata = read(tmp_path / "tokenizer.json", 500)
    assert HUGGINGFACE_JSON in metadata
    assert MODEL not in metadata
    texts = ["a <strip>  b ﬁ"] + [text for text in TEXTS if change is not merged_control or "he" not in text]
    same(metadata, library, texts)


def test_whole_when_merges_are_ignored_otherwise_or_bytes_are_missing(tmp_path):
    for library in (byte_level("gpt-2", ignore_merges=True), byte_level(alphabet=False)):
        library.save(str(tmp_path / "tokenizer.json"))
        metadata = read(tmp_path, 500)
        assert HUGGINGFACE_JSON in metadata
        same(metadata, library)


def test_template_that_puts_bos_first(tmp_path):
    from tokenizers.processors import TemplateProcessing

    library = byte_level("llama-bpe")
    token = library.token_to_id("<|end|>")
    library.post_processor = TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", token)])
    library.save(str(tmp_path / "tokenizer.json"))
    metadata = read(tmp_path, 500)
    assert (metadata[MODEL], metadata[BOS], metadata[ADD_BOS]) == ("gpt2", token, True)
    tokenizer = from_metadata(metadata, 500)
    assert tokenizer.encode("hello", bos=tokenizer.add_bos) == library.encode("hello").ids


def test_sidecars_name_bos_and_eos(tmp_path):
    library = byte_level(added=["<tool>", "<eot>"])
    end, eot = map(library.token_to_id, ("<|end|>", "<eot>"))
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 3, "bos_token_id": 50256}))
    assert EOS in read(tmp_path, 500)
    assert BOS not in read(tmp_path, 500)  # 50256 is a default of the class, no token here
    own = {"eos_token": {"content": "<|end|>"}, "bos_token": "<|end|>", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(own))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [eot, end, 7, 999]}))
    metadata = read(tmp_path, 500)
    assert [metadata[key] for key in (BOS, EOS, EOT, EOM)] == [end, end, eot, 7]
    assert not metadata[ADD_BOS]  # the tokenizer.json's own template decides
    assert from_metadata(metadata, 500).eos_ids == {end, eot, 7}


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc"])
def test_sentencepiece(tmp_path, kind, rule):
    library = sentencepiece_model(tmp_path, kind, normalization_rule_name=rule, user_defined_symbols=["<u>"])
    metadata = read(tmp_path, library.vocab_size())
    assert metadata[MODEL] == {"bpe": "llama", "unigram": "t5"}[kind]
    assert (CHARSMAP in metadata) == (rule != "identity")
    assert [metadata[key] for key in (BOS, EOS)] == [1, 2]
    tokenizer = from_metadata(metadata, None)
    for text in [*TEXTS, "<u> a<u>b", "ﬁ  ａ "]:
        assert tokenizer.encode(text) == library.encode(text)


def sentencepiece_model(folder, kind, **more):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words()), model_prefix=str(folder / "tokenizer"), vocab_size=120,
        model_type=kind, hard_vocab_limit=False, minloglevel=2, **more,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def test_sentencepiece_with_added_tokens(tmp_path):
    library = sentencepiece_model(tmp_path, "bpe")
    rows = library.vocab_size()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<tool>": rows + 1, "<|im|>": rows}))
    decoder = {str(rows): {"content": "<|im|>", "special": True}, str(rows + 3): {"content": "<x>"}}
    own = {"added_tokens_decoder": decoder, "eos_token": "<|im|>", "add_bos_token": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(own))
    metadata = read(tmp_path, rows + 4)
    assert metadata[TYPES][rows:] == [CONTROL, USER_DEFINED, UNUSED, USER_DEFINED]
    tokenizer = from_metadata(metadata, rows + 4)
    assert tokenizer.eos_ids == {rows}
    assert not tokenizer.add_bos
    assert rows in tokenizer.encode("ab<|im|><tool>", special=True)
    assert rows not in tokenizer.encode("ab<|im|><tool>")
    assert tokenizer.encode("<tool>")[-1] == rows + 1
    with pytest.raises(FileError, match=f"{rows + 4} tokens.* {rows}$"):
        read(tmp_path, rows)


@pytest.mark.parametrize("kind", ["word", "char"])
def test_sentencepiece_kinds_refused_by_name(tmp_path, kind):
    sentencepiece_model(tmp_path, kind)
    with pytest.raises(FileError, match=kind.upper()):
        read(tmp_path, 10_000)


def test_sentencepiece_with_spaces_as_suffix_is_refused(tmp_path):
    sentencepiece_model(tmp_path, "bpe", treat_whitespace_as_suffix=True)
    with pytest.raises(FileError, match="as suffix"):
        read(tmp_path, 10_000)


@needs_shared
def test_vocab_json_and_merges(tmp_path):
    folder = SHARED / "data/tokenizers/gpt2"
    metadata = read(folder, 50257)
    known = read_gguf(SHARED / "data/tokenizers/gguf_vocab/ggml-vocab-gpt-2.gguf").metadata
    for key in (MODEL, PRE, TOKENS, MERGES, BOS, EOS):
        assert metadata[key] == known[key]
    assert metadata[TYPES] == known[TYPES].tolist()
    assert read(folder / "merges.txt", 50257) == metadata == read(folder / "vocab.json", 60000)
    with pytest.raises(FileError, match=r"50257 tokens.* 50256"):
        read(folder, 50256)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(folder / name, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    with pytest.raises(FileError, match="CLIPTokenizer"):
        read(tmp_path, 50257)


@needs_shared
def test_llama2c():
    folder = SHARED / "models/stories260K"
    metadata = read(folder, 512)
    known = read_gguf(folder / "stories260K-f32.gguf").metadata
    plain = {key: getattr(known[key], "tolist", lambda key=key: known[key])() for key in metadata}
    assert metadata == plain
    assert {key for key in known if key.startswith("tokenizer.")} == set(metadata)
    with pytest.raises(FileError, match=r"512 tokens.* 511"):
        read(folder, 511)


def meta(folder, **more):
    table = list("\n abé")
    content = {"vocab_size": 5, "itos": dict(enumerate(table)), "stoi": {c: i for i, c in enumerate(table)}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(content | more))
    return folder / "meta.pkl"


def test_nanogpt(tmp_path):
    metadata = read(meta(tmp_path), 5)
    assert metadata == {MODEL: "char", TOKENS: list("\n abé")}
    assert from_metadata(metadata, 5).encode("é b") == [4, 1, 3]
    for bad in ({"itos": {1: "a"}}, {"itos": {0: "ab"}}, {"itos": {}}, {"stoi": {"a": 0}}, {"itos": 3}):
        with pytest.raises(FileError):
            read(meta(tmp_path, **bad), 4)
    with pytest.raises(FileError, match=r"5 tokens.* 4"):
        read(meta(tmp_path), 4)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(print))
    with pytest.raises(FileError):
        read(tmp_path, 5)


def test_find(tmp_path):
    assert find(tmp_path) is None
    with pytest.raises(FileError, match="no tokenizer file"):
        read(tmp_path, 10)
    (tmp_path / "vocab.json").write_text("{}")
    assert find(tmp_path) is None
    names = ["tok512.bin", "meta.pkl", "merges.txt", "tokenizer.json", "tokenizer.model"]
    for name in names:
        (tmp_path / name).write_text("{}")
        assert find(tmp_path) == tmp_path / ("vocab.json" if name == "merges.txt" else name)
    for name in names[1:]:
        (tmp_path / name).unlink()
    (tmp_path / "tok32000.bin").write_text("")
    with pytest.raises(FileError, match="name the one"):
        find(tmp_path)
    with pytest.raises(FileError, match="no tokenizer file"):
        read(tmp_path / "words.txt", 10)


def piece(length, data=b"", score=0.0):
    return struct.pack("<fi", score, length) + data


BAD = {
    "tokenizer.json": [
        b"", b"{}", b"[" * 10**6, b'{"model":' * 10**5, b"\xff\xfe", b'{"model": {"type": "BPE"}}', b"null",
        b'{"model": {"type": "BPE", "vocab": {"a": 4294967295}, "merges": []}}',
    ],
    "tokenizer.model": [b"", b"\0", b"IQ== 0\nIg== 1\n", b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x05\x0a\x03abc"],
    "tok9.bin": [
        b"\0", b"\7\0\0\0", b"\7\0\0\0" + piece(2**31 - 1), b"\7\0\0\0" + piece(-1),
        b"\7\0\0\0" + piece(9, b"a"),
        b"\7\0\0\0" + piece(1, b"\xff"), b"\7\0\0\0" + piece(1, b"a") * 258,
        b"\7\0\0\0" + piece(1, b"a") * 300,
        b"\7\0\0\0" + piece(1, b"a")[:5],
    ],
    "vocab.json": [
        b"", b"[]", b"[" * 10**6, b'{"a": "b"}', b'{"a": 0, "b": 0}', b'{"a": -1}', b'{"a": true}',
        b'{"": 0}',
        b'{"a": 99999999999}', b'{"\\ud800": 0}', b'{"a": 0}',
    ],
    "meta.pkl": [b"", b"x", b"\x80\x04N."],
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_files(tmp_path, name):
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    for content in BAD[name]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(FileError) as caught:
            read(tmp_path / name, 300)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(str(tmp_path))


def test_bad_sidecars(tmp_path):
    library = sentencepiece_model(tmp_path, "bpe")
    for name in (
        "tokenizer_config.json",
        "added_tokens.json",
        "generation_config.json",
        "special_tokens_map.json",
    ):
        for content in (
            "",
            "[]",
            "[" * 10**6,
            '{"added_tokens_decoder": [1]}',
            '{"a": -1}',
            '{"a": {}}',
            "\xff",
        ):
            (tmp_path / name).write_text(content, "latin-1")
            with suppress(FileError):
                read(tmp_path, library.vocab_size())
        (tmp_path / name).unlink()
    (tmp_path / "added_tokens.json").write_text('{"x": 2000000000}')
    with pytest.raises(FileError, match="2000000001 tokens"):
        read(tmp_path, library.vocab_size())


def test_truncated_files(tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    sentencepiece_model(tmp_path, "unigram")
    for name in ("tokenizer.json", "tokenizer.model"):
        whole = (tmp_path / name).read_bytes()
        for size in range(0, len(whole), len(whole) // 40):
            (tmp_path / name).write_bytes(whole[:size])
            with suppress(FileError):
                read(tmp_path / name, 500)
