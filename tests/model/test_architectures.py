"""Every architecture that is not the Llama family's: made-up models with every option, beside a float64 oracle.

The oracle (gguf_oracle.py) agrees with llama.cpp and transformers (test_made_up.py, test_made_up_folders.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_oracle
import numpy as np
import pytest
from conftest import but_slow
from made_up import LARGE, MODELS, VOCABULARY, write
from made_up_folders import FOLDERS, write_folder

import tcinfer
from tcinfer import converters
from tcinfer.api import Model
from tcinfer.config import ModelConfig
from tcinfer.errors import TcinferError
from tcinfer.gguf.reader import read
from tcinfer.loader import read_config
from tcinfer.memory_options import with_memory
from tcinfer.session_file import read as read_session

IDS = np.random.default_rng(1).integers(0, VOCABULARY, 70)  # more than eight windows of 8
LIMIT = 2e-5  # of the largest logit
FAR = 100_000  # a context beyond what any of the models was trained with first
NAMES = [name for name in MODELS if name not in ("llama", "qwen2")]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder, made = tmp_path_factory.mktemp("made-up"), {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = write(MODELS[name], folder / f"{name}.gguf")
        return made[name]

    return get


def opened(path: Path, backend: str = "numpy", **options: Any) -> Model:
    return tcinfer.load(path, backend=backend, cache_type="f32", **options)


def asked(name: str) -> dict[str, Any]:
    """phi3 runs with its window, as it was trained and llama.cpp does not; and with the divisors of long distances."""
    return {"memory": "full"} if MODELS[name].arch == "phi3" and MODELS[name].window else {}


def expected(name: str, path: Path) -> np.ndarray:
    return gguf_oracle.logits(path, IDS, FAR if name in ("phi3-long", "phi3-split") else 0)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.mark.parametrize("name", but_slow(MODELS, LARGE))
def test_logits_are_the_oracles(name: str, backend: str, file: Callable[[str], Path]) -> None:
    """At once, in ragged chunks, one by one, and beside other sessions."""
    model, want = opened(file(name), backend, **asked(name)), expected(name, file(name))
    for starts in ([], [1, 4, 9, 30, 31, 55], range(1, len(IDS))):
        session = model.session()
        got = [session.feed(part, all_logits=True) for part in np.split(IDS, starts)]
        assert difference(np.concatenate(got), want) < LIMIT, starts
    together = [model.session() for _ in range(3)]
    for i, one in enumerate(together):
        one.feed(IDS[: 10 + 20 * i])
    for step in range(3):
        got = model.step_many(together, [IDS[10 + 20 * i + step] for i in range(3)])
        assert difference(got, want[[10 + 20 * i + step for i in range(3)]]) < LIMIT


def test_phi_takes_the_divisors_of_what_it_can_see(file: Callable[[str], Path]) -> None:
    path = file("phi3-long")  # trained with 256 tokens first
    near, far = (gguf_oracle.logits(path, IDS, context) for context in (0, FAR))
    assert difference(near, far) > 1e-3
    assert difference(opened(path).session().feed(IDS, all_logits=True), far) < LIMIT
    window = opened(path, memory="window", window=200)  # longer than the text, within the first context
    assert difference(window.session().feed(IDS, all_logits=True), near) < LIMIT


class Remembering(gguf_oracle.Model):
    """The oracle with a window of ours, and sinks that stand before it, in layers without one of their own.

    Keys are rotated by their place among those that a query sees, not by their position.
    """

    def __init__(self, path: Path, window: int, sinks: int = 0) -> None:
        super().__init__(path, len(IDS))
        self.asked = window, sinks

    def attend(self, h: np.ndarray, layer: int) -> np.ndarray:
        blk = f"blk.{layer}."
        q, k, v = self.qkv(h, blk)
        self.keys[layer].append(k)
        self.values[layer].append(v)
        t = len(self.keys[layer]) - 1
        window, sinks = (self.get("attention.sliding_window"), 0) if self.is_local(layer) else self.asked
        seen = [i for i in range(t + 1) if i < sinks or i > t - window]
        q = self.rotate(q, layer, len(seen) - 1) * self.scale
        keys = np.array([self.rotate(self.keys[layer][i], layer, place) for place, i in enumerate(seen)])
        values = np.array([self.values[layer][i] for i in seen])
        groups = np.arange(self.H) * self.G // self.H
        scores = np.einsum("ihd,hd->hi", keys[:, groups], q)
        shares = np.exp(scores - scores.max(1, keepdims=True))
        shares /= shares.sum(1, keepdims=True)
        return self.linear(np.einsum("hi,ihd->hd", shares, values[:, groups]).ravel(), blk + "attn_output")


ASKED: list[tuple[str, int, int]] = [
    ("gemma3", 20, 0),
    ("gemma3", 20, 3),
    ("gemma3", 5, 2),  # less than the local layers see
    ("gemma3-every", 8, 1),
    ("qwen3-yarn", 9, 4),
    ("phi3-long", 9, 2),
    ("smollm3-every", 9, 2),
]


@pytest.mark.parametrize(("name", "window", "sinks"), ASKED)
def test_logits_far_beyond_a_window_that_was_asked_for(
    name: str, window: int, sinks: int, backend: str, file: Callable[[str], Path]
) -> None:
    options = {"memory": "sinks", "sinks": sinks} if sinks else {"memory": "window"}
    model, definition = opened(file(name), backend, window=window, **options), Remembering(file(name), window, sinks)
    assert difference(model.session().feed(IDS, all_logits=True), np.array([definition.step(i) for i in IDS])) < LIMIT


def test_phi_runs_with_the_window_it_was_trained_with(backend: str, file: Callable[[str], Path]) -> None:
    """As transformers does (test_made_up_folders.py); llama.cpp does not."""
    model, window = opened(file("phi3"), backend), MODELS["phi3"].window
    assert (model.config.memory, model.config.window) == ("window", window)
    definition = Remembering(file("phi3"), window or 0)
    assert difference(model.session().feed(IDS, all_logits=True), np.array([definition.step(i) for i in IDS])) < LIMIT


FORMS = [(name, version, False) for name in FOLDERS for version in (4, 5)]
FORMS += [(name, 5, True) for name in FOLDERS if name.startswith("gemma3")]


@pytest.mark.parametrize(
    ("name", "version", "wrapped"),
    [pytest.param(*form, marks=[pytest.mark.slow] * (form[0] == LARGE)) for form in FORMS],
)
def test_a_folder_becomes_the_same_model(name: str, version: int, wrapped: bool, tmp_path: Path) -> None:
    """To the bit, whichever transformers wrote it, and as the text half of a model that sees."""
    model = FOLDERS[name]
    write(model, tmp_path / "want.gguf")
    folder = write_folder(model, tmp_path / "folder", version, wrapped)
    converters.convert(folder, tmp_path / "got.gguf", "f32")
    got, want = (opened(tmp_path / f"{one}.gguf", **asked(name)) for one in ("got", "want"))
    np.testing.assert_array_equal(*(m.session().feed(IDS, all_logits=True) for m in (got, want)))


@pytest.mark.parametrize("outtype", ["f32", "q8_0"])
@pytest.mark.parametrize("name", but_slow(NAMES, LARGE))
def test_a_file_that_is_written_again_says_the_same(
    name: str, outtype: str, file: Callable[[str], Path], tmp_path: Path
) -> None:
    """And computes what the new file holds, as the oracle does."""
    path = tmp_path / "again.gguf"
    converters.convert(file(name), path, outtype)
    old, new = read(file(name)), read(path)
    assert read_config(new) == read_config(old)
    words = [{key: str(value) for key, value in f.metadata.items() if "tokenizer" in key} for f in (old, new)]
    assert words[0] == words[1]
    got = opened(path, **asked(name)).session().feed(IDS, all_logits=True)
    assert difference(got, expected(name, path)) < LIMIT


def gemma(file: Callable[[str], Path]) -> ModelConfig:
    return read_config(read(file("gemma3")))


@pytest.mark.parametrize(("mode", "sinks"), [("window", 0), ("sinks", 3)])
def test_what_is_asked_of_gemma_is_for_its_global_layers(
    mode: str, sinks: int, backend: str, file: Callable[[str], Path], tmp_path: Path
) -> None:
    before = gemma(file)
    config = with_memory(before, mode, 20, sinks or None)
    for old, new in zip(before.layers, config.layers, strict=True):
        assert (new.memory, new.window, new.sinks) == (
            (old.memory, old.window, old.sinks) if old.window else (mode, 20, sinks)
        )
    model = opened(file("gemma3"), backend, memory=mode, window=20, sinks=sinks or None)
    session = model.session()
    assert model.bounded
    size = session.nbytes
    logits = session.feed(np.resize(IDS, 300), all_logits=True)
    assert np.isfinite(logits).all()
    assert session.nbytes == size
    assert difference(logits[:20], expected("gemma3", file("gemma3"))[:20]) < LIMIT  # nothing has left yet
    fork = session.fork()
    session.save(tmp_path / "s.tcs")
    again = model.load_session(tmp_path / "s.tcs")
    want = session.feed(IDS[:9])
    np.testing.assert_array_equal(fork.feed(IDS[:9]), want)
    np.testing.assert_array_equal(again.feed(IDS[:9]), want)
    options = read_session(tmp_path / "s.tcs").memory_options(before)
    assert with_memory(before, **options) == model.config


@pytest.mark.parametrize("name", ["gemma3", "gemma3-local"])
def test_gemma_as_it_is_copied_saved_and_put_back(
    name: str, backend: str, file: Callable[[str], Path], tmp_path: Path
) -> None:
    """Past where a cache grows for the first time; with local layers alone nothing grows."""
    model = opened(file(name), backend)
    session = model.session()
    size = session.nbytes
    session.feed(np.resize(IDS, 300))
    assert (session.nbytes == size) == model.bounded == (name == "gemma3-local")
    before, fork = session.snapshot(), session.fork()
    session.save(tmp_path / "s.tcs")
    again, want = model.load_session(tmp_path / "s.tcs"), session.feed(IDS[:30], all_logits=True)
    session.feed(IDS)
    session.restore(before)
    for copy in (session, fork, again):
        np.testing.assert_array_equal(copy.feed(IDS[:30], all_logits=True), want)


@pytest.mark.parametrize(("mode", "window", "sinks"), [("window", 8, None), ("window", 5, None), ("sinks", 8, 1)])
def test_a_session_of_gemma_tells_the_memory_it_had(
    mode: str, window: int, sinks: int | None, file: Callable[[str], Path], tmp_path: Path
) -> None:
    """Where global layers see no farther than the local ones, whose window is 8."""
    model = opened(file("gemma3"), memory=mode, window=window, sinks=sinks)
    session = model.session()
    session.feed(IDS)
    session.save(tmp_path / "s.tcs")
    file_s = gemma(file)
    assert with_memory(file_s, **read_session(tmp_path / "s.tcs").memory_options(file_s)) == model.config


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gemma3", {"query_pre_attn_scalar": 100}, "query_pre_attn_scalar"),
    ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ("gemma3", {"hidden_activation": "silu"}, "hidden_activation"),
    ("gemma3", {"layer_types": ["full_attention"]}, "layer_types"),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}, "use_sliding_window"),
    *(
        (name, {"tensor_cache": {"tc_enabled": True}}, "tensor_cache")
        for name in ("gemma3", "qwen3", "phi3", "smollm3")
    ),
    ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 9, "layer_types": None}, "use_sliding_window"),
    ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}, "no_rope_layers"),
    ("phi3", {"rope_scaling": {"type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}}, "numbers for"),
]
SCALED = {"rope_type": "linear", "factor": 2.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32}
LONGROPE = {"type": "longrope", "long_factor": [2.0] * 8, "short_factor": [1.0] * 8}
REFUSED += [
    ("phi3", {"rope_scaling": LONGROPE | {"attention_factor": "3"}}, "rope_attention"),
    ("phi3", {"rope_scaling": LONGROPE | {"mscale": 2.0}}, "mscale"),
    ("phi3", {"sliding_window": "8"}, "sliding_window"),
    ("gemma3", {"rope_parameters": {"full_attention": {}, "sliding_attention": SCALED}}, "sliding_attention"),
    ("gemma3", {"rope_parameters": {"full_attention": LLAMA3, "sliding_attention": {}}}, "llama3"),
    ("gemma3", {"rope_scaling": LLAMA3}, "llama3"),
    ("phi3", {"rope_scaling": LONGROPE | {"factor": -1}}, "factor"),
    ("smollm3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
]


@pytest.mark.parametrize(("name", "changes", "says"), REFUSED)
def test_what_would_give_wrong_answers_is_refused(
    name: str, changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    folder = write_folder(FOLDERS[name], tmp_path / "folder", 4)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(TcinferError, match=says) as caught:
        converters.convert(folder, tmp_path / "out.gguf", "f32")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(
    ("name", "key", "says"),
    [
        ("gemma3", "rope__dimension_count_swa", "rope.dimension_count"),
        ("gemma3", "attention__key_length_swa", "attention.key_length"),
        ("smollm3", "rope__dimension_count", "whole head"),
    ],
)
def test_a_file_whose_heads_would_be_misread_is_refused(name: str, key: str, says: str, tmp_path: Path) -> None:
    model = next(model for model in MODELS.values() if model.arch == name)
    path = write(model, tmp_path / "file.gguf", **{key: model.head_dim // 2})
    with pytest.raises(TcinferError, match=says):
        tcinfer.load(path)


@pytest.mark.parametrize(
    ("changes", "factor"),
    [({"attention_factor": None}, None), ({"factor": 8.0}, 8.0), ({"factor": None, "attention_factor": None}, None)],
)
def test_longrope_scales_scores_by_the_factor_that_it_names(
    changes: dict[str, Any], factor: float | None, tmp_path: Path
) -> None:
    """As transformers: by the ratio of the two contexts where it names none; null is as good as absent."""
    folder = write_folder(FOLDERS["phi3-long"], tmp_path / "folder", 4)
    config = json.loads((folder / "config.json").read_text())
    scaling = {name: x for name, x in config["rope_scaling"].items() if name != "attention_factor"}
    config["rope_scaling"] = scaling | changes
    (folder / "config.json").write_text(json.dumps(config))
    converters.convert(folder, tmp_path / "out.gguf", "f32")
    original = config.get("original_max_position_embeddings", scaling.get("original_max_position_embeddings"))
    ratio = factor or config["max_position_embeddings"] / original
    want = math.sqrt(1 + math.log(ratio) / math.log(original))
    assert tcinfer.load(tmp_path / "out.gguf").config.rope_attention == pytest.approx(want, rel=1e-6)
