"""The files that Hugging Face lays beside a tokenizer: which tokens are added, special, BOS and EOS."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tcinfer.errors import FileError
from tcinfer.gguf.reader import map_file
from tcinfer.tokenizer import ADD_BOS, BOS, CONTROL, EOM, EOS, EOT, USER_DEFINED

TEMPLATE_FILE = "chat_template.jinja"
MOST_BYTES = 1 << 26  # the largest tokenizer.json in use has about 35 MB


def read_bytes(path: Path) -> bytes:
    """A whole file of bounded size. Raises FileError."""
    data = map_file(path)
    if len(data) > MOST_BYTES:
        raise FileError(f"{path.name} has {len(data)} bytes; a tokenizer has at most {MOST_BYTES}")
    return bytes(data)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object. Raises FileError, and ValueError or RecursionError for what is no JSON."""
    found = json.loads(read_bytes(path))
    if not isinstance(found, dict):
        raise FileError(f"{path.name} should hold a JSON object")
    return found


def sidecar(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object that may lie beside a tokenizer; empty where it does not. Raises as `read_object`."""
    return read_object(folder / name) if (folder / name).is_file() else {}


def added_tokens(folder: Path) -> dict[int, tuple[str, int]]:
    """The tokens added to a vocabulary, or called special in it: id to text and type. Raises FileError."""
    listed = json.dumps(sidecar(folder, "special_tokens_map.json"))
    found: dict[Any, tuple[Any, int]] = {
        token: (text, CONTROL if json.dumps(text) in listed else USER_DEFINED)
        for text, token in sidecar(folder, "added_tokens.json").items()
    }
    decoder = sidecar(folder, "tokenizer_config.json").get("added_tokens_decoder", {})
    for token, facts in decoder.items():
        found[int(token)] = facts["content"], CONTROL if facts.get("special") else USER_DEFINED
    for token, (text, _) in found.items():
        if type(token) is not int or token < 0 or not isinstance(text, str):
            raise FileError("the added tokens beside the vocabulary should be texts with ids")
    return found


def named_ids(folder: Path, tokens: Iterable[str] | dict[str, int]) -> dict[str, Any]:
    """BOS, EOS and whether to add BOS, in metadata's terms. A name or id the vocabulary lacks is left out."""
    ids = tokens if isinstance(tokens, dict) else {text: token for token, text in enumerate(tokens)}
    rows = max(ids.values(), default=-1) + 1
    own, special = sidecar(folder, "tokenizer_config.json"), sidecar(folder, "special_tokens_map.json")
    generation, config = sidecar(folder, "generation_config.json"), sidecar(folder, "config.json")

    def named(which: str) -> list[int]:
        texts = [facts.get(f"{which}_token") for facts in (own, special)]
        texts = [text.get("content") if isinstance(text, dict) else text for text in texts]
        found = [ids[text] for text in texts if isinstance(text, str) and text in ids]
        found += _ids(generation.get(f"{which}_token_id"), rows)
        # config.json may only repeat the defaults of its class: it counts where nothing else speaks
        return list(dict.fromkeys(found)) or _ids(config.get(f"{which}_token_id"), rows)

    metadata: dict[str, Any] = dict(zip((EOS, EOT, EOM), named("eos"), strict=False))
    metadata |= dict(zip((BOS,), named("bos"), strict=False))
    if isinstance(own.get("add_bos_token"), bool):
        metadata[ADD_BOS] = own["add_bos_token"] and BOS in metadata
    return metadata


def chat_template(folder: Path) -> str | None:
    """A folder's chat template: a file of its own, or part of tokenizer_config.json. Raises FileError."""
    if (folder / TEMPLATE_FILE).is_file():
        return template_text(folder / TEMPLATE_FILE)
    found: Any = sidecar(folder, "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):  # several by name
        found = {one["name"]: one["template"] for one in found}.get("default")
    if found is not None and not isinstance(found, str):
        raise FileError("chat_template in tokenizer_config.json is no text")
    return found


def template_text(path: Path) -> str:
    """A template file. Raises FileError."""
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError:
        raise FileError(f"{path}: is not valid UTF-8") from None


def _ids(value: Any, rows: int) -> list[int]:
    """An id or a list of ids, as far as they are ids."""
    values = value if isinstance(value, list) else [value]
    return [item for item in values if type(item) is int and 0 <= item < rows]
