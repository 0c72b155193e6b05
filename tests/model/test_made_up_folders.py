"""The made-up Hugging Face folders against transformers: what they say, and their logits beside the oracle's."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf_oracle
import made_up
import numpy as np
import pytest
from conftest import ROOT
from made_up_folders import FOLDERS, folder_tensors, write_folder
from safetensors.numpy import load_file
from test_made_up import CONTEXT, TOKENS, difference, ids


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """transformers, with the checkout off the path: it would take our folder `kernels` for a package of that name."""
    monkeypatch.setattr(sys, "path", [p for p in sys.path if Path(p or ".").resolve() != ROOT])
    pytest.importorskip("torch", reason="torch is not installed (extra `train`)")
    return pytest.importorskip("transformers", reason="transformers is not installed")


def theirs(hub: Any, folder: Path, tokens: list[int]) -> np.ndarray:
    import torch

    options = {"dtype": torch.float64, "attn_implementation": "eager", "output_loading_info": True}
    model, info = hub.AutoModelForCausalLM.from_pretrained(folder, **options)
    assert not any(info.values()), info
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].double().numpy()


@pytest.mark.peer
@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("name", FOLDERS)
def test_logits_of_a_folder_are_those_of_the_file(name: str, version: int, hub: Any, tmp_path: Path) -> None:
    file = made_up.write(FOLDERS[name], tmp_path / "file.gguf")
    folder = write_folder(FOLDERS[name], tmp_path / "folder", version)
    got = difference(gguf_oracle.logits(file, ids(), CONTEXT), theirs(hub, folder, ids()))
    print(f"{name}, {version}: {got:.1e}")
    assert got < 1e-5


@pytest.mark.peer
def test_transformers_takes_the_long_factors_beyond_the_original_context(hub: Any, tmp_path: Path) -> None:
    model, tokens = FOLDERS["phi3-long"], ids(CONTEXT + 1)
    file, folder = made_up.write(model, tmp_path / "file.gguf"), write_folder(model, tmp_path / "folder")
    assert difference(gguf_oracle.logits(file, tokens), theirs(hub, folder, tokens)) < 1e-4  # angles in float32


@pytest.mark.peer
def test_transformers_heeds_the_window_of_phi(hub: Any, tmp_path: Path) -> None:
    """Unlike llama.cpp, and so the file's logits: they part after the first window."""
    model = made_up.MODELS["phi3"]
    window = model.window or 0
    assert 0 < window < TOKENS
    file, folder = made_up.write(model, tmp_path / "file.gguf"), write_folder(model, tmp_path / "folder")
    ours, hf = gguf_oracle.logits(file, ids(), CONTEXT), theirs(hub, folder, ids())
    assert difference(ours[:window], hf[:window]) < 1e-5
    assert np.abs(ours - hf)[window:].max(1).min() > 1e-3


@pytest.mark.peer
@pytest.mark.parametrize("name", FOLDERS)
def test_config_says_what_transformers_would_write(name: str, hub: Any, tmp_path: Path) -> None:
    folder = write_folder(FOLDERS[name], tmp_path)
    ours = json.loads((folder / "config.json").read_text())
    hf = hub.AutoConfig.from_pretrained(folder).to_dict()
    assert ours == {key: hf.get(key, "absent") for key in ours} | {"transformers_version": ours["transformers_version"]}


def test_gemma_has_1_less_in_a_folder_to_the_bit() -> None:
    """So that a converter's sum can be compared with the file exactly."""
    file, folder = made_up.weights(FOLDERS["gemma3"]), folder_tensors(FOLDERS["gemma3"])
    for theirs, ours in (("norm", "output_norm"), ("layers.3.self_attn.q_norm", "blk.3.attn_q_norm")):
        np.testing.assert_array_equal(folder[f"model.{theirs}.weight"] + np.float32(1), file[f"{ours}.weight"])


def test_a_text_half_of_a_model_that_sees(tmp_path: Path) -> None:
    plain, wrapped = (write_folder(FOLDERS["gemma3"], tmp_path / str(each), 4, each) for each in (False, True))
    configs = [json.loads((folder / "config.json").read_text()) for folder in (plain, wrapped)]
    assert configs[1]["model_type"] == "gemma3"
    assert configs[1]["text_config"].items() <= configs[0].items()
    tensors = [load_file(folder / "model.safetensors") for folder in (plain, wrapped)]
    assert {f"language_model.{name}" for name in tensors[0]} < set(tensors[1])
