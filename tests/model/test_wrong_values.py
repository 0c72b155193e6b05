"""Values of a wrong kind in what other programs write: config.json of folders, keys of GGUF files. Each is run, or
refused as a TcinferError; none ends in a traceback."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import made_up
import numpy as np
import pytest
from conftest import but_slow
from made_up import LARGE
from made_up_folders import FOLDERS, write_folder

from tcinfer import converters
from tcinfer.errors import TcinferError
from tcinfer.gguf import reader, schema

WRONG: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    3,
    2.5,
    1e30,
    float("nan"),
    "x",
    "",
    [],
    [1, "x"],
    ["x"] * 64,
    {},
    {"x": 1},
)
ARRAYS = (
    np.array([1, 2], np.int32),
    np.array([8] * 62, np.uint32),
    np.array([True] * 4),
    np.array([0.5] * 4),
    [],
    ["x"],
)


def places(value: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Where an object holds a value, nested ones included."""
    for key, inner in value.items():
        yield (*at, key)
        if isinstance(inner, dict):
            yield from places(inner, (*at, key))


@pytest.mark.parametrize("version", [pytest.param(4, marks=pytest.mark.slow), 5])
@pytest.mark.parametrize("name", but_slow(FOLDERS, LARGE))
def test_any_value_of_a_folders_configuration_is_read_or_refused(name: str, version: int, tmp_path: Path) -> None:
    folder = write_folder(FOLDERS[name], tmp_path, version)
    written = json.loads((folder / "config.json").read_text())
    more = {"partial_rotary_factor": 1.0, "max_window_layers": 1, "rope_parameters": {"sliding_attention": {}}}
    refused = []
    for place in [
        *places(written),
        *((key,) for key in more if key not in written),
        ("rope_parameters", "sliding_attention"),
    ]:
        for value in WRONG:
            changed = copy.deepcopy(more | written) if place[0] in more else copy.deepcopy(written)
            inner = changed
            for key in place[:-1]:
                inner = inner.setdefault(key, {})
            inner[place[-1]] = value
            (folder / "config.json").write_text(json.dumps(changed))
            try:
                converters.read(folder)
            except TcinferError as e:
                refused.append(str(e))
    assert len(refused) > 50
    assert not any("\n" in line for line in refused)


@pytest.mark.parametrize("name", made_up.MODELS)
def test_any_value_of_a_files_keys_is_read_or_refused(name: str, tmp_path: Path) -> None:
    file = reader.read(made_up.write(made_up.MODELS[name], tmp_path / "file.gguf"))
    arch = str(file.metadata["general.architecture"])
    own = {f"{arch}.{key}" for key in (*schema.STANDARD.values(), schema.VALUE_LENGTH, *schema.UNSUPPORTED)}
    own |= {key for key in file.metadata if key.startswith(f"{arch}.")}
    vocabulary, refused = file.tensors["token_embd.weight"].shape[0], []
    for base in (file.metadata, dict(file.metadata) | {f"{arch}.block_count": 62}):
        for key in sorted(own):
            for value in (*WRONG, *ARRAYS):
                try:
                    schema.from_metadata(dict(base) | {key: value}, vocabulary, 1000)
                except TcinferError as e:
                    refused.append(str(e))
    assert len(refused) > 50
    assert not any("\n" in line for line in refused)
