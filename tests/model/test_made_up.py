"""The float64 oracle of GGUF files, and tcinfer, against llama.cpp: made-up models with every option that it reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf_oracle
import made_up
import numpy as np
import pytest
from made_up import MODELS

import tcinfer
from tcinfer import converters

TOKENS = 70  # more than eight windows of 8
CONTEXT = 256  # llama.cpp rounds up to such a multiple
F32 = 0  # ggml's number of the type
GEMMAS = [name for name in MODELS if name.startswith("gemma3")]


def ids(count: int = TOKENS) -> list[int]:
    return np.random.default_rng(7).integers(0, made_up.VOCABULARY, count).tolist()


def llama_cpp_logits(path: Path, tokens: list[int], context: int = CONTEXT) -> np.ndarray:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra `peer`)")
    options: dict[str, Any] = {"n_ctx": context, "n_batch": 32, "n_threads": 2, "type_k": F32, "type_v": F32}
    peer = llama_cpp.Llama(str(path), logits_all=True, flash_attn=False, verbose=False, **options)
    peer.eval(tokens)
    return np.array(peer.scores[: len(tokens)], np.float64)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """name -> the made-up model's file, written once."""
    folder = tmp_path_factory.mktemp("made-up")

    def get(name: str) -> Path:
        path = folder / f"{name}.gguf"
        return path if path.exists() else made_up.write(MODELS[name], path)

    return get


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest, in parts of the largest logit."""
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def compare(path: Path, context: int = CONTEXT, gelu: gguf_oracle.Activation = gguf_oracle.gelu) -> float:
    ours, theirs = gguf_oracle.logits(path, ids(), context, gelu), llama_cpp_logits(path, ids(), context)
    got = difference(ours, theirs)
    print(f"{path.stem}, {gelu.__name__}: {got:.1e}")
    return got


@pytest.mark.peer
@pytest.mark.parametrize("name", [name for name in MODELS if name not in GEMMAS])
def test_the_oracle_against_llama_cpp(name: str, file: Callable[[str], Path]) -> None:
    assert compare(file(name)) < 1e-4


@pytest.mark.peer
@pytest.mark.parametrize("name", GEMMAS)
def test_gemma_against_llama_cpp(name: str, file: Callable[[str], Path], tmp_path: Path) -> None:
    """llama.cpp looks GELU up in a table of float16, where a rounding error can choose another entry.

    With gates so large that GELU is 0 or its argument, everything else is compared; then GELU, more coarsely.
    """
    large = made_up.write(replace(MODELS[name], gate=1e5), tmp_path / f"{name}-large.gguf")
    assert compare(large, gelu=gguf_oracle.table_gelu) < 1e-4
    assert compare(file(name), gelu=gguf_oracle.table_gelu) < (1e-3 if name == "gemma3-27b" else 4e-4)
    assert compare(file(name)) < 3e-3


@pytest.mark.peer
@pytest.mark.parametrize("name", ["phi3-long", "phi3-split"])
def test_a_context_beyond_the_original_one_takes_the_long_factors(name: str, file: Callable[[str], Path]) -> None:
    assert compare(file(name), 2 * CONTEXT) < 1e-4


def ours(path: Path, backend: str, memory: str | None = None) -> np.ndarray:
    model = tcinfer.load(path, backend=backend, memory=memory, cache_type="f32")
    return model.session().feed(ids(), all_logits=True).astype(np.float64)


def like_llama_cpp(name: str) -> tuple[str | None, int]:
    """The memory and the context with which the two compute the same: without Phi's window, with its long factors."""
    return "full" if MODELS[name].arch == "phi3" else None, 2 * CONTEXT if MODELS[name].factors else CONTEXT


@pytest.mark.peer
@pytest.mark.parametrize("name", [name for name in MODELS if name not in GEMMAS])
def test_ours_against_llama_cpp(name: str, backend: str, file: Callable[[str], Path]) -> None:
    memory, context = like_llama_cpp(name)
    assert difference(ours(file(name), backend, memory), llama_cpp_logits(file(name), ids(), context)) < 1e-4


@pytest.mark.peer
@pytest.mark.parametrize("name", GEMMAS)
def test_our_gemma_against_llama_cpp(name: str, backend: str, file: Callable[[str], Path], tmp_path: Path) -> None:
    """Ours has no table: with large gates it makes no difference, else as much as for the oracle."""
    large = made_up.write(replace(MODELS[name], gate=1e5), tmp_path / "large.gguf")
    assert difference(ours(large, backend), llama_cpp_logits(large, ids())) < 1e-4
    assert difference(ours(file(name), backend), llama_cpp_logits(file(name), ids())) < 3e-3


@pytest.mark.peer
@pytest.mark.parametrize("name", MODELS)
def test_files_that_we_write_are_plain_files(name: str, file: Callable[[str], Path], tmp_path: Path) -> None:
    """llama.cpp gives the same for them, to the bit."""
    path, (_, context) = tmp_path / "again.gguf", like_llama_cpp(name)
    converters.convert(file(name), path, "f32")
    old, new = (llama_cpp_logits(each, ids(), context) for each in (file(name), path))
    np.testing.assert_array_equal(new, old)


# name, and what is changed in it: all that the comparison above would not notice if neither side read it
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("gemma3", {"window": None}),
    ("gemma3", {"window": 9}),
    ("gemma3", {"pattern": 5}),
    ("gemma3", {"rope_base": None}),
    ("gemma3", {"local_base": 11000.0}),
    ("gemma3-27b", {"n_layers": 61}),
    ("gemma3-every", {"scaling": {}}),
    ("gemma3-every", {"scaling": {"factor": 8.0}}),
    ("gemma3-every", {"softcap": None}),
    ("gemma3-every", {"eps": 1e-6}),
    ("gemma3-list", {"pattern": [False, True, False, True]}),
    ("gemma3-list", {"rope_dim": None}),
    ("gemma3-list", {"scaling": {}}),
    ("gemma3-local", {"pattern": 1}),
    ("gemma3-fused", {"scaling": {}}),
    ("qwen3-untied", {"scaling": {}}),
    ("qwen3-untied", {"eps": 1e-6}),
    ("qwen3-yarn", {"scaling": {}}),
    ("qwen3-yarn", {"scaling": {"factor": 4.0}}),
    ("phi3-long", {"rope_dim": None}),
    ("phi3-long", {"scaling": {"original_context_length": 256}}),
    ("phi3-split", {"scaling": {"original_context_length": 256, "attn_factor": made_up.LONG["attn_factor"]}}),
    ("smollm3-every", {"scaling": made_up.YARN}),
]


@pytest.mark.parametrize(("name", "changes"), OPTIONS)
def test_every_option_matters(name: str, changes: dict[str, Any], file: Callable[[str], Path], tmp_path: Path) -> None:
    other = made_up.write(replace(MODELS[name], **changes), tmp_path / "other.gguf")
    with_it, without = (gguf_oracle.logits(path, ids(32), CONTEXT) for path in (file(name), other))
    assert difference(without, with_it) > 2e-3


@pytest.mark.parametrize(("name", "changes"), [("phi3", {"window": None}), ("qwen3-none", {"scaling": {}})])
def test_what_does_not_matter(name: str, changes: dict[str, Any], file: Callable[[str], Path], tmp_path: Path) -> None:
    other = made_up.write(replace(MODELS[name], **changes), tmp_path / "other.gguf")
    with_it, without = (gguf_oracle.logits(path, ids(32), CONTEXT) for path in (file(name), other))
    np.testing.assert_array_equal(with_it, without)


def test_phi_chooses_its_factors_by_the_context(file: Callable[[str], Path]) -> None:
    short, long = (gguf_oracle.logits(file("phi3-long"), ids(), context) for context in (CONTEXT, CONTEXT + 1))
    assert difference(short, long) > 1e-2
