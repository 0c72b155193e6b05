"""A user's tokenizer file as GGUF metadata. Nothing is downloaded, and nothing a file holds is run."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tcinfer.converters.sidecars import added_tokens, named_ids, read_bytes, read_object, sidecar
from tcinfer.errors import FileError, TcinferError
from tcinfer.gguf.reader import file_error, short
from tcinfer.tokenizer import (
    ADD_BOS,
    ADD_SPACE_PREFIX,
    BOS,
    BYTE,
    CHARSMAP,
    CONTROL,
    EOS,
    HUGGINGFACE_JSON,
    MERGES,
    MODEL,
    NORMAL,
    PADDING_ID,
    PRE,
    REMOVE_EXTRA_WHITESPACES,
    SCORES,
    TOKENS,
    TYPES,
    UNKNOWN,
    UNKNOWN_ID,
    UNUSED,
    USER_DEFINED,
    from_metadata,
)
from tcinfer.tokenizer.huggingface import ALPHABET, IGNORES_MERGES, PRE_TOKENIZERS, load, run
from tcinfer.tokenizer.kinds import SPACE

_GPT2_END = "<|endoftext|>"

Metadata = dict[str, Any]


def find(folder: Path) -> Path | None:
    """The tokenizer file of a folder, if it has one. Raises FileError where it has several tok*.bin."""
    for name in ("tokenizer.model", "tokenizer.json", "vocab.json", "meta.pkl"):
        needs = [name, "merges.txt"] if name == "vocab.json" else [name]
        if all((folder / needed).is_file() for needed in needs):
            return folder / name
    found = sorted(path for path in folder.glob("tok*.bin") if path.is_file())
    if len(found) > 1:
        raise file_error(folder, f"{found[0].name} and {found[1].name}: name the one to use")
    return found[0] if found else None


def read(path: Path, vocab_size: int) -> Metadata:
    """The `tokenizer.*` metadata for a tokenizer file, or the one in a folder, of a model with so many rows.

    What comes back was tried: the runtime takes it. Raises FileError for whatever is wrong, more tokens than
    rows included.
    """
    path = Path(path)
    if path.is_dir():
        found = find(path)
        if found is None:
            raise file_error(path, "holds no tokenizer file that is known here")
        path = found
    kind = _KINDS.get(path.name) or _KINDS.get(path.suffix)
    if kind is None:
        raise file_error(path, f"is no tokenizer file that is known here ({', '.join(_KINDS)})")
    try:
        metadata = kind(path, vocab_size)
        from_metadata(metadata, vocab_size)
    except Exception as error:  # a damaged file can raise anything
        text = " ".join(str(error).split())[:300]
        if not isinstance(error, TcinferError):
            text = f"damaged ({type(error).__name__}: {text})"
        raise file_error(path, text.removeprefix(f"{path}: ")) from None
    return metadata


def _sentencepiece(path: Path, vocab_size: int) -> Metadata:
    """A SentencePiece model; a charsmap is kept for BPE as well: its normalization is part of its ids."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    schema: Any = sentencepiece_model_pb2  # generated code: mypy sees no names in it
    try:
        proto = schema.ModelProto.FromString(read_bytes(path))
    except DecodeError:
        raise FileError("is no SentencePiece model; if it is another kind, give its tokenizer.json") from None
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if not (proto.HasField("trainer_spec") and proto.HasField("normalizer_spec")):  # they follow the pieces
        raise FileError("is cut short: a SentencePiece model ends with how it was trained and normalizes")
    models = {schema.TrainerSpec.BPE: "llama", schema.TrainerSpec.UNIGRAM: "t5"}
    if trainer.model_type not in models:
        name = schema.TrainerSpec.ModelType.Name(trainer.model_type)
        raise FileError(f"is a SentencePiece {name} model; only BPE and UNIGRAM are supported")
    if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        raise FileError("treats spaces in a way (as suffix, or unescaped) that a GGUF file cannot say")
    metadata: Metadata = {
        MODEL: models[trainer.model_type],
        TOKENS: [piece.piece for piece in proto.pieces],
        SCORES: [piece.score for piece in proto.pieces],
        TYPES: [piece.type for piece in proto.pieces],
        ADD_SPACE_PREFIX: normalizer.add_dummy_prefix,
        REMOVE_EXTRA_WHITESPACES: normalizer.remove_extra_whitespaces,
    }
    if normalizer.precompiled_charsmap:
        metadata[CHARSMAP] = normalizer.precompiled_charsmap
    found = {piece.piece: token for token, piece in enumerate(proto.pieces) if piece.type in (UNKNOWN, CONTROL)}
    names = {
        BOS: trainer.bos_piece,
        EOS: trainer.eos_piece,
        UNKNOWN_ID: trainer.unk_piece,
        PADDING_ID: trainer.pad_piece,
    }
    metadata |= {key: found[name] for key, name in names.items() if name in found}
    _add_tokens(metadata, path.parent, vocab_size)
    metadata[SCORES] += [0.0] * (len(metadata[TOKENS]) - len(metadata[SCORES]))
    return metadata | named_ids(path.parent, metadata[TOKENS])


def _tokenizer_json(path: Path, vocab_size: int) -> Metadata:
    """A tokenizer.json: `gpt2` where that says all of it, else whole."""
    text = read_bytes(path).decode()
    library = load(text)
    ids = library.get_vocab()
    _room(max(ids.values(), default=-1) + 1, vocab_size)
    plain, whole = _with_template(library)
    adds_bos = len(whole) > len(plain) and whole[1 : 1 + len(plain)] == plain and whole[: len(plain)] != plain
    metadata = None
    if whole == plain or (adds_bos and len(whole) == len(plain) + 1):
        metadata = _gpt2_of_json(json.loads(library.to_str()), ids)
    metadata = metadata or {HUGGINGFACE_JSON: text}
    metadata |= named_ids(path.parent, ids) | {ADD_BOS: adds_bos}
    return metadata | ({BOS: whole[0]} if adds_bos else {})


def _with_template(library: Any) -> tuple[list[int], list[int]]:
    """A text's ids without and with what the post-processor adds."""

    def ids(added: bool) -> list[int]:
        return run(lambda: library.encode("a", add_special_tokens=added).ids, FileError, "cannot be tried")

    try:
        return ids(False), ids(True)
    except FileError:  # a vocabulary that lacks even this letter
        return [], []


def _gpt2_of_json(facts: dict[str, Any], ids: dict[str, int]) -> Metadata | None:
    """`gpt2` metadata for a tokenizer.json as the library writes it, None where ids could differ."""
    model, added, decoder = facts["model"], facts["added_tokens"], facts["decoder"]
    if model["type"] != "BPE" or facts["normalizer"] or not decoder or decoder["type"] != "ByteLevel":
        return None
    if any(model[key] for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")):
        return None
    shape = _without_offsets(facts["pre_tokenizer"])
    ignores = bool(model["ignore_merges"])
    alike = (name for name, known in PRE_TOKENIZERS.items() if shape == _without_offsets(known))
    pre = next((name for name in alike if ignores == (name == IGNORES_MERGES)), None)
    if pre is None:
        return None
    if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in added):
        return None
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    special = {token["content"] for token in added if token["special"]}
    parts = set(ALPHABET).union(*pairs, ("".join(pair) for pair in pairs))
    if not parts <= model["vocab"].keys() - special or any(" " in part for part in parts):
        return None  # the library drops a byte that is no token; and a control token is no part of a word
    kinds = {token["id"]: CONTROL if token["special"] else USER_DEFINED for token in added}
    return _by_id(ids, kinds) | {MODEL: "gpt2", PRE: pre, MERGES: [" ".join(pair) for pair in pairs]}


def _without_offsets(step: Any) -> Any:
    """A pre-tokenizer's JSON without the setting that leaves the ids as they are."""
    if isinstance(step, list):
        return list(map(_without_offsets, step))
    if isinstance(step, dict):
        return {key: _without_offsets(value) for key, value in step.items() if key != "trim_offsets"}
    return step


def _vocab_and_merges(path: Path, vocab_size: int) -> Metadata:
    """GPT-2's vocab.json and merges.txt, given by either of the two."""
    folder = path.parent
    vocabulary = read_object(folder / "vocab.json")
    owner = sidecar(folder, "tokenizer_config.json").get("tokenizer_class")
    if owner not in (None, "GPT2Tokenizer", "GPT2TokenizerFast"):
        raise FileError(f"belongs to a {short(str(owner))}, which needs its tokenizer.json")
    if not all(type(token) is int and token >= 0 for token in vocabulary.values()):
        raise FileError("vocab.json should map each token to its id")
    if len(set(vocabulary.values())) < len(vocabulary):
        raise FileError("vocab.json gives two tokens the same id")
    _room(max(vocabulary.values(), default=-1) + 1, vocab_size)
    lines = read_bytes(folder / "merges.txt").decode().split("\n")
    merges = [line.removesuffix("\r") for line in lines[lines[0].startswith("#version") :] if line.strip()]
    end = vocabulary.get(_GPT2_END)
    kinds = {} if end is None else {end: CONTROL}
    metadata = _by_id(vocabulary, kinds) | {MODEL: "gpt2", PRE: "gpt-2", MERGES: merges}
    metadata |= {} if end is None else {BOS: end, EOS: end}
    _add_tokens(metadata, folder, vocab_size)
    return metadata | named_ids(folder, metadata[TOKENS])


def _nanogpt(path: Path, vocab_size: int) -> Metadata:
    """nanoGPT's meta.pkl for characters: `itos` is what an id stands for."""
    from tcinfer.converters.pickles import load_plain

    meta = load_plain(path)
    table = meta.get("itos") if isinstance(meta, dict) else None
    if isinstance(table, dict):
        table = [table.get(token) for token in range(len(table))]
    if not isinstance(table, list) or not all(isinstance(item, str) and len(item) == 1 for item in table):
        raise FileError("should hold `itos`, a character for each id from 0 on")
    if "stoi" in meta and meta["stoi"] != {character: token for token, character in enumerate(table)}:
        raise FileError("its `stoi` and `itos` do not agree")
    return {MODEL: "char", TOKENS: table}


def _llama2c(path: Path, vocab_size: int) -> Metadata:
    """llama2.c's tok*.bin: a longest length, then a score, a length and the bytes of each piece."""
    data = read_bytes(path)
    pieces: list[str] = []
    scores: list[float] = []
    position = 4
    while position < len(data):
        if len(data) - position < 8:
            raise FileError(f"ends within token {len(pieces)}")
        score, length = struct.unpack_from("<fi", data, position)
        position += 8
        if not 0 <= length <= len(data) - position:
            raise FileError(f"token {len(pieces)} should have {length} bytes, {len(data) - position} are left")
        pieces.append(data[position : position + length].decode().replace(" ", SPACE))
        scores.append(score)
        position += length
    _room(len(pieces), vocab_size)
    if len(pieces) < 259:
        raise FileError(f"has {len(pieces)} tokens; 259 come before the first that is text")
    pieces[:3] = "<unk>", "<s>", "</s>"  # the file has line ends around two of them
    return {
        MODEL: "llama",
        TOKENS: pieces,
        SCORES: scores,
        TYPES: [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * (len(pieces) - 259),
        BOS: 1,
        EOS: 2,
        UNKNOWN_ID: 0,
        ADD_BOS: True,
        ADD_SPACE_PREFIX: True,
    }


_KINDS: dict[str, Callable[[Path, int], Metadata]] = {
    "vocab.json": _vocab_and_merges,
    "merges.txt": _vocab_and_merges,
    ".model": _sentencepiece,
    ".json": _tokenizer_json,
    ".pkl": _nanogpt,
    ".bin": _llama2c,
}


def _room(tokens: int, vocab_size: int) -> None:
    if tokens > vocab_size:
        raise FileError(f"the tokenizer has {tokens} tokens, but the model's vocabulary is {vocab_size}")


def _by_id(ids: dict[str, int], kinds: dict[int, int]) -> Metadata:
    """Tokens and types in the order of their ids; an id that nothing has is an unused token."""
    names = {token: text for text, token in ids.items()}
    count = max(names, default=-1) + 1
    return {
        TOKENS: [names.get(token, f"[PAD{token}]") for token in range(count)],
        TYPES: [kinds.get(token, NORMAL if token in names else UNUSED) for token in range(count)],
    }


def _add_tokens(metadata: Metadata, folder: Path, vocab_size: int) -> None:
    """Put in the tokens that Hugging Face's files beside a vocabulary add to it, or call special."""
    added = added_tokens(folder)
    tokens, types = metadata[TOKENS], metadata[TYPES]
    _room(max([len(tokens) - 1, *added]) + 1, vocab_size)
    for token, (text, kind) in sorted(added.items()):
        for filler in range(len(tokens), token + 1):
            tokens.append(f"[PAD{filler}]")
            types.append(UNUSED)
        if types[token] == UNUSED:
            tokens[token] = text
        if tokens[token] == text and types[token] in (NORMAL, UNUSED, USER_DEFINED):
            types[token] = kind
