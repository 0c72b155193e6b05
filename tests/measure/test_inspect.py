"""What `inspect` says of a file, against the file read another way."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from conftest import SHAKESPEARE, SMALL, build, random_weights, shared, smollm2
from test_cli import command, refused, write_model
from test_hostile_cli import model_file

import tcinfer
from tcinfer import memory
from tcinfer.gguf import reader
from tcinfer.loader import bundled
from tcinfer.measure.file import WIDTH, facts, report
from tcinfer.memory.tensor_cache import Options

TENSOR = {"memory": "tensor", "window": 16, "options": Options()}


def logits_of(path: Path, name: str) -> np.ndarray:
    """A tensor that is stored as float32, in float64."""
    tensor = reader.read(path).tensors[name]
    return tensor.data.view("<f4").astype(np.float64).reshape(tensor.shape)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def test_the_bundled_model_in_figures() -> None:
    found = facts()
    file = gguf.GGUFReader(bundled())
    assert found["bytes"] == bundled().stat().st_size
    assert found["parameters"] == sum(int(tensor.n_elements) for tensor in file.tensors)
    for entry in found["tensor_types"]:
        those = [tensor for tensor in file.tensors if tensor.tensor_type.name == entry["type"]]
        assert (entry["tensors"], entry["bytes"]) == (len(those), sum(int(tensor.n_bytes) for tensor in those))
    assert sum(entry["tensors"] for entry in found["tensor_types"]) == found["tensors"] == len(file.tensors)
    config = tcinfer.load(backend="numpy").config
    assert {name: getattr(config, name) for name in found["sizes"]} == found["sizes"]
    options = config.layers[-1].options  # the lower layers have none
    assert found["memory"]["options"] == {f.name: getattr(options, f.name) for f in fields(options)}
    assert [layer["layer"] for layer in found["layers"]] == list(range(config.n_layers))


def test_gates_half_lives_and_rates_of_every_head() -> None:
    for i, layer in enumerate(facts(SHAKESPEARE)["layers"]):
        decay, rate = (logits_of(SHAKESPEARE, f"blk.{i}.tc_{name}") for name in ("decay", "rate"))
        assert np.shape(layer["decay"]) == np.shape(layer["half_life_tokens"]) == (1, 4)
        np.testing.assert_allclose(
            layer["gate"], sigmoid(logits_of(SHAKESPEARE, f"blk.{i}.tc_gate.bias"))[0], rtol=1e-6
        )
        np.testing.assert_allclose(layer["write_rate"], sigmoid(rate), rtol=1e-6)
        np.testing.assert_allclose(layer["half_life_tokens"], math.log(0.5) / np.log(sigmoid(decay)), rtol=1e-4)
        kept = np.power(np.array(layer["decay"]), layer["half_life_tokens"])  # what is left after that many writes
        np.testing.assert_allclose(kept, 0.5, rtol=1e-9)
        assert layer["token_dependent"] == []


SINKS = {"memory": "sinks", "window": 12, "sinks": 3}
NARROW = {"head_dim": 2, "rope_dim": 2, "cache_type": "f16"}  # a token's keys are less than a cache line


@pytest.mark.parametrize("changes", [TENSOR, SINKS, TENSOR | NARROW], ids=["tensor", "sinks", "narrow heads"])
def test_state_and_the_full_cache_beside_it(changes: dict[str, Any], tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", **changes)
    state = facts(path)["state"]
    model = tcinfer.load(path, backend="numpy")
    full = replace(model.config, memory="full", window=0, sinks=0, options=None)
    assert state["bytes"] == model.session().nbytes
    tokens = state["full_cache_larger_from"]
    assert memory.layout(full, tokens).nbytes > state["bytes"] >= memory.layout(full, tokens - 1).nbytes
    per_token = model.config.n_layers * model.config.n_kv_heads * model.config.head_dim * 2 * 2  # float16
    assert state["full_cache_bytes_per_token"] == per_token


def test_a_full_cache_grows() -> None:
    path = shared("models", "stories260K", "stories260K-f32.gguf")
    found = facts(path)
    assert found["state"] == {
        "bounded": False,
        "bytes": None,
        "full_cache_bytes_per_token": 640,
        "full_cache_larger_from": None,
    }
    assert found["layers"][0]["gate"] is None
    assert "learned" not in report(found)


def test_json_is_the_facts(tmp_path: Path) -> None:
    done = command("inspect", "--json")
    assert (done.status, done.err) == (0, "")
    assert json.loads(done.out) == facts()
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    refused(command("inspect", path, "--json"))


def test_two_timescales_and_terms_of_the_token(tmp_path: Path) -> None:
    options = Options(two_timescales=True, token_gate=True, token_rate=True, token_decay=True)
    path = write_model(tmp_path / "m.gguf", **TENSOR | {"options": options})
    found = facts(path)
    assert np.shape(found["layers"][1]["write_rate"]) == (2, 4)
    assert len(found["layers"][1]["slow_share"]) == 4
    assert set(found["layers"][0]["token_dependent"]) == {"gate", "half_life_tokens", "write_rate"}
    text = report(found)
    assert text.count("base + token term") == 1 + 2 + 2
    for words in ("half-life in written tokens, base + token term, slow", "write rate, base + token term, fast"):
        assert words in text
    one = write_model(tmp_path / "one.gguf", **TENSOR | {"options": Options(token_rate=True)})
    assert facts(one)["layers"][0]["token_dependent"] == ["write_rate"]


def test_infini_shares_and_layers_without_a_memory(tmp_path: Path) -> None:
    infini = facts(write_model(tmp_path / "i.gguf", memory="infini", window=8, options=memory.infini.Options()))
    assert all(len(layer["memory_share"]) == 4 and layer["gate"] is None for layer in infini["layers"])
    assert "memory's share" in report(infini)
    one = {"memory": ("window", "tensor"), "options": (None, Options())}
    top = report(facts(write_model(tmp_path / "t.gguf", **TENSOR | one)))
    assert "  layer 1" in top
    assert "  layer 0" not in top


def test_decays_at_both_ends(tmp_path: Path) -> None:
    """As the runtime has them, in float32: what does not decay there has no half-life."""
    decay = np.array([[40.0, -200.0, 0.0, 8.0]], np.float32)
    path = model_file(tmp_path / "m.gguf", {}, {"blk.0.tc_decay": decay}, **TENSOR)
    found = facts(path)
    half_lives = found["layers"][0]["half_life_tokens"][0]
    assert (half_lives[0], half_lives[1]) == (None, 0.0)
    assert half_lives[2] == pytest.approx(1)
    assert half_lives[3] == pytest.approx(math.log(0.5) / -math.log1p(math.exp(-8)), rel=1e-3)
    assert json.dumps(found, allow_nan=False)
    (line,) = (line for line in report(found).splitlines() if line.startswith("  layer 0"))
    assert "never     0     1 2,067 " in line


@pytest.mark.parametrize("heads", [12, 24])
def test_many_heads_side_by_side_or_in_summary(heads: int, tmp_path: Path) -> None:
    wide = {"n_heads": heads, "n_kv_heads": heads, "d_model": 8 * heads}
    found = facts(write_model(tmp_path / "m.gguf", **TENSOR | wide))
    text = report(found)
    assert all(len(line) <= WIDTH for line in text.splitlines()[1:])  # the first has the path
    rates = found["layers"][0]["write_rate"][0]
    assert len(rates) == heads
    rows = [line.split() for line in text.splitlines() if line.startswith("  layer 0")]
    shown = [[float(x) for x in row[2:]] for row in rows]
    if heads == 12:
        assert any(np.allclose(row[-12:], rates, rtol=0.01) for row in shown if len(row) >= 12)
    else:
        assert "write rate (least, median, largest)" in text
        assert any(np.allclose(row[-3:], [min(rates), np.median(rates), max(rates)], rtol=0.01) for row in shown)


def test_types_by_the_names_of_their_tensors(tmp_path: Path) -> None:
    weights = {f"blk.{i}.{name}.weight": w for i in range(2) for name, w in {"attn_q": 0, "ffn_up": 0}.items()}
    values = random_weights(SMALL)
    half = {name: values[name].astype(np.float16) for name in weights if name != "blk.1.ffn_up.weight"}
    path = model_file(tmp_path / "m.gguf", {}, half, **TENSOR)
    entries = {entry["type"]: entry for entry in facts(path)["tensor_types"]}
    assert set(entries["F16"]["names"]) == {"attn_q", "ffn_up (1 of 2)"}
    assert entries["F16"]["tensors"] == 3
    names = set(entries["F32"]["names"])
    assert {"ffn_up (1 of 2)", "*_norm", "*.bias", "attn_k", "tc_*"} <= names
    assert not {"attn_*", "ffn_*", "attn_q"} & names


def test_smollm2_tokenizer_template_and_types() -> None:
    found = facts(smollm2())
    assert found["tokenizer"] == {
        "kind": "gpt2",
        "pre": "smollm",
        "tokens": 49152,
        "bos": {"id": 1, "text": "<|im_start|>"},
        "eos": [{"id": 2, "text": "<|im_end|>"}],
        "adds_bos": False,
    }
    assert found["chat_template"] == {"characters": 368, "chatml": True}
    assert [entry["names"] for entry in found["tensor_types"] if entry["type"] == "Q4_1"] == [["ffn_*", "attn_*"]]
    text = report(found)
    assert "BOS 1 <|im_start|>, not added; EOS 2 <|im_end|>" in text
    assert "ChatML, 368 characters" in text


def test_special_tokens_of_a_whole_tokenizer_json(tmp_path: Path) -> None:
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {"id": 2, "content": "</s>", "special": True}
            | {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        ],
        "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "</s>": 2}, "unk_token": "a"},
    }
    keys = {"tokenizer.huggingface.json": json.dumps(tokenizer), "tokenizer.ggml.eos_token_id": 2}
    path = model_file(tmp_path / "m.gguf", keys, {})
    words = facts(path)["tokenizer"]
    assert (words["kind"], words["eos"], words["bos"]) == ("tokenizer.json", [{"id": 2, "text": "</s>"}], None)


def test_nothing_of_a_file_moves_the_cursor_or_breaks_the_json(tmp_path: Path) -> None:
    evil = "a\x1b[2J\r\nstate 0 bytes " + "x" * 500
    keys = {
        "general.name": evil,
        "tokenizer.ggml.pre": [1, 2],  # no kind that is used here looks at it
        "tokenizer.ggml.tokens": [chr(0x61 + i) for i in range(49)] + [evil],
        "tokenizer.ggml.token_type": [1] * 49 + [3],
        "tokenizer.ggml.bos_token_id": 49,
        "tokenizer.ggml.eos_token_id": 49,
        "tokenizer.chat_template": [1, 2],
    }
    path = model_file(tmp_path / "m.gguf", keys, {})
    done = command("inspect", path)
    assert done.status == 0, done.err
    lines = done.out.splitlines()
    assert all(line.isprintable() for line in lines)
    assert all(len(line) <= WIDTH for line in lines[1:])
    assert sum(line.startswith("state ") for line in lines) == 1
    found = json.loads(command("inspect", path, "--json").out)
    assert (found["name"], found["tokenizer"]["bos"]["text"]) == (evil, evil)
    assert (found["tokenizer"]["pre"], found["chat_template"]) == (None, None)


def test_a_model_as_built_has_the_parameters_that_are_told(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", **TENSOR)
    weights = build(replace(SMALL, **TENSOR)).weights
    assert facts(path)["parameters"] == sum(math.prod(w.shape) for w in weights.values())
