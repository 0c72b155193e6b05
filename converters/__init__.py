"""Converters: one file a checkpoint family, each turning it into a Source that `write` makes a GGUF file of.

A family is a module with `recognises(path) -> bool` and `read(path) -> Source`. To add one: write the file, name it
in FAMILIES.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from tcinfer.errors import FileError, TcinferError

if TYPE_CHECKING:
    from tcinfer.converters.source import Source
    from tcinfer.converters.write import Written

FAMILIES = ("huggingface", "tcgpt", "gguf_file")


def read(path: Path, only: str | None = None) -> Source:
    """The checkpoint at `path`, whichever family it is of, or of the family `only` whatever its name looks like.

    Raises FileError, its message beginning with the path.
    """
    from importlib import import_module

    if not os.path.exists(path):  # unlike Path.exists, False for a name that no system takes
        raise FileError(f"{path}: no such file or folder")
    for name in FAMILIES if only is None else (only,):
        family = import_module(f"tcinfer.converters.{name}")
        if only or family.recognises(path):
            try:
                return family.read(path)
            except TcinferError as e:
                text = str(e)
                raise FileError(text if text.startswith(str(path)) else f"{path}: {text}") from None
            except OSError as e:
                raise FileError(f"{e.filename or path}: cannot be read: {e.strerror}") from None
            except RecursionError:
                raise FileError(f"{path}: nested too deeply to be a model") from None
    raise FileError(f"{path}: no checkpoint of the published trainer (ckpt.pt), folder with config.json, or GGUF file")


def convert(
    path: Path,
    out: Path,
    outtype: str = "f16",
    tokenizer: Path | None = None,
    verify: bool | None = None,
    only: str | None = None,
    chat_template: Path | None = None,
) -> tuple[Source, Written, Path | None]:
    """Convert the checkpoint at `path` to the GGUF file `out`, with the tokenizer named, found beside it, or its own.

    verify: decode from both and compare before `out` is put in its place (None: files below 1 GiB); only: as for read;
    chat_template: a Jinja file in place of the one found.
    Returns what was read, what was written, and the tokenizer's file (None: the checkpoint's own, or there is none, and
    the file takes ids alone). Raises FileError; `out` is then as it was.
    """
    from tcinfer.converters import sidecars, vocabulary, write
    from tcinfer.tokenizer import CHAT_TEMPLATE

    source = read(path, only)
    if os.path.exists(out) and os.path.samefile(path, out):
        raise FileError(f"{out}: is the checkpoint itself; name another file")
    words, keys = tokenizer, source.keys
    if words is None and source.folder is not None:
        words = vocabulary.find(source.folder)
    try:
        if words is not None:
            keys = {key: value for key, value in keys.items() if not key.startswith("tokenizer.")}
            keys |= vocabulary.read(words, source.config.vocab_size)
            if template := sidecars.chat_template(words.parent):
                keys[CHAT_TEMPLATE] = template
        if chat_template is not None:
            keys = keys | {CHAT_TEMPLATE: sidecars.template_text(chat_template)}
        return source, write.write(source, out, outtype, keys, verify), words
    except TcinferError as e:
        text = str(e)
        named = any(str(p) in text for p in (path, out, words) if p is not None)
        raise FileError(text if named else f"{path}: {text}") from None
