"""The converter on Hugging Face style folders: config.json and safetensors, a Tensor Cache beside the base."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import shared
from test_cli import FAST, command, refused
from test_convert import bf16, converted, logits, values

import tcinfer
from tcinfer import converters
from tcinfer.gguf import reader
from tcinfer.loader import Opened

NAN = float("nan")
HF = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,  # no multiple of a block
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
TENSOR_CACHE = {
    "tc_enabled": True,
    "kv_window": 8,
    "tc_two_timescales": True,
    "tc_per_token_gate": True,
    "tc_num_slots": 3,
    "tc_token_rate": True,
    "tc_token_decay": True,
    "key_conv": 2,
    "tc_rope": False,
    "tc_write_then_read": True,
    "tc_layers": 1,
    "tc_decay_init": 0.99,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
Weights = dict[str, np.ndarray]


def weights(tensor_cache: bool = False) -> Weights:
    """Random tensors under the folder's names; the memory's in the upper layer of two."""
    rng = np.random.default_rng(3)
    C, H, G, D, F = 32, 4, 2, 8, 40
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (64, C), "model.norm.weight": (C,)}
    for i in range(2):
        layer = f"model.layers.{i}."
        shapes |= {layer + f"{norm}_layernorm.weight": (C,) for norm in ("input", "post_attention")}
        for name, heads in (("q", H), ("k", G), ("v", G)):
            shapes[layer + f"self_attn.{name}_proj.weight"] = (heads * D, C)
        shapes[layer + "self_attn.o_proj.weight"] = (C, H * D)
        shapes |= {layer + f"mlp.{name}_proj.weight": (F, C) for name in ("gate", "up")}
        shapes[layer + "mlp.down_proj.weight"] = (C, F)
        if tensor_cache:
            shapes[layer + "self_attn.key_conv.weight"] = (2, G, D)
    if tensor_cache:
        attention = "model.layers.1.self_attn."
        shapes |= {attention + f"tc.logit_{n}_{s}": (G,) for n in ("decay", "lr") for s in ("fast", "slow")}
        shapes |= {attention + f"tc.{n}_proj.weight": (G, C) for n in ("rate", "decay")}
        shapes |= {attention + "tc_gate_proj.weight": (1, C), attention + "tc_gate_proj.bias": (1,)}
        shapes |= {attention + "tc_proj.weight": (C, H * D), attention + "tc_proj.bias": (C,)}
        shapes |= {attention + "tc.logit_alpha": (G,), attention + "tc.slot_keys": (G, 3, D)}
    return {n: rng.normal(0, 0.3, shape).astype(np.float32) for n, shape in shapes.items()}


def headed(header: Any, data: bytes = bytes(64), length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype: Any = "F32", shape: Any = (4, 4), offsets: Any = (0, 64)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def folder(path: Path, tensors: Weights | None = None, files: int = 1, dtype: str = "F32", **config: Any) -> Path:
    """A model folder; its tensors go round `files` files."""
    path.mkdir(exist_ok=True, parents=True)
    (path / "config.json").write_text(json.dumps({k: v for k, v in (HF | config).items() if v is not ...}))
    tensors = weights("tensor_cache" in config) if tensors is None else tensors
    for part in range(files):
        header, data = {}, b""
        for n, x in list(tensors.items())[part::files]:
            header[n] = entry(dtype, x.shape, (len(data), len(data) + x.nbytes))
            data += x.tobytes()
        (path / f"model-{part}.safetensors").write_bytes(headed(header, data))
    return path


# What is read


def test_the_model_is_named_after_its_folder(tmp_path: Path) -> None:
    file = converted(folder(tmp_path / "my-model"), tmp_path / "out.gguf")
    assert reader.read(file).metadata["general.name"] == "my-model"


def test_in_the_hubs_cache_the_name_is_not_the_commit(tmp_path: Path) -> None:
    for place, name in (("models--someone--tiny--v2", "tiny--v2"), ("elsewhere", "0123abc")):
        path = folder(tmp_path / place / "snapshots" / "0123abc")
        assert converters.read(path).config.name == name


def test_a_model_with_a_window_is_ours_since_others_would_ignore_it(tmp_path: Path) -> None:
    path = folder(tmp_path / "windowed", model_type="mistral", sliding_window=8)
    model = tcinfer.load(converted(path, tmp_path / "out.gguf"))
    assert (model.config.arch, model.config.memory, model.config.window) == ("tcllama", "window", 8)


def test_stories_from_its_folder_and_from_its_gguf(tmp_path: Path) -> None:
    theirs = shared("models", "stories260K", "stories260K-f32.gguf")
    ours = converted(theirs.parent, tmp_path / "out.gguf")
    mine, other = values(ours), values(theirs)
    assert np.array_equal(other.pop("output.weight"), other["token_embd.weight"])
    assert mine.keys() == other.keys()
    for name, x in mine.items():
        np.testing.assert_array_equal(x, other[name])
    keys, wanted = reader.read(ours).metadata, reader.read(theirs).metadata
    for key in wanted:
        if key.startswith("llama.") and key in keys:
            assert keys[key] == wanted[key], key
    np.testing.assert_array_equal(logits(ours), logits(theirs))
    story = ("generate", *FAST, "-p", "Once upon", "-n", 40, "--temp", 0, "-m")
    assert command(*story, ours).out == command(*story, theirs).out != ""


def test_tensor_cache_tensors_land_where_they_belong(tmp_path: Path) -> None:
    tensors = weights(tensor_cache=True)
    source = folder(tmp_path / "m", tensors, tensor_cache=TENSOR_CACHE)
    done = command("convert", source, "-o", tmp_path / "out.gguf", "--outtype", "q8_0", "--verify")
    assert done.status == 0, done.err
    assert "arguments for training only: tc_decay_init" in done.err
    assert "multiple of the block: blk.0.ffn_down.weight, blk.1.ffn_down.weight" in done.err
    file = reader.read(converted(source, tmp_path / "f32.gguf"))
    got, layer = values(file.path), "model.layers.1.self_attn."
    assert file.metadata["general.architecture"] == "tcllama"
    assert list(file.metadata["tcinfer.memory.mechanism"]) == ["window", "tensor"]
    assert not any(name.startswith("blk.0.tc_") for name in got)
    for ours, theirs in {
        "attn_q.weight": tensors[layer + "q_proj.weight"],  # not permuted
        "attn_key_conv": tensors[layer + "key_conv.weight"],
        "tc_output.weight": tensors[layer + "tc_proj.weight"],
        "tc_output.bias": tensors[layer + "tc_proj.bias"],
        "tc_gate.weight": tensors[layer + "tc_gate_proj.weight"][0],
        "tc_gate.bias": tensors[layer + "tc_gate_proj.bias"],
        "tc_decay": np.stack([tensors[layer + f"tc.logit_decay_{s}"] for s in ("fast", "slow")]),
        "tc_rate": np.stack([tensors[layer + f"tc.logit_lr_{s}"] for s in ("fast", "slow")]),
        "tc_alpha": tensors[layer + "tc.logit_alpha"],
        "tc_slot_keys": tensors[layer + "tc.slot_keys"],
        "tc_rate_proj": tensors[layer + "tc.rate_proj.weight"],
        "tc_decay_proj": tensors[layer + "tc.decay_proj.weight"],
    }.items():
        np.testing.assert_array_equal(got["blk.1." + ours], theirs, ours)
    one, other = (logits(file.path, backend) for backend in ("numpy", "numba"))
    assert np.abs(one - other).max() < 1e-4 * np.abs(one).max()


def test_plain_block_is_the_same_in_both_architectures(tmp_path: Path) -> None:
    """`llama` rotates neighbouring channels of permuted rows, `tcllama` the halves of the rows as they are."""
    plain = converted(folder(tmp_path / "a"), tmp_path / "a.gguf")
    ours = converted(folder(tmp_path / "b", weights(), tensor_cache={"use_kv_cache": False}), tmp_path / "b.gguf")
    assert [reader.read(p).metadata["general.architecture"] for p in (plain, ours)] == ["llama", "tcllama"]
    np.testing.assert_allclose(logits(plain), logits(ours), atol=1e-5)


def test_shards_and_bfloat16(tmp_path: Path) -> None:
    tensors = {n: bf16(x) for n, x in weights().items()}
    whole = values(converted(folder(tmp_path / "a", tensors), tmp_path / "a.gguf"))
    shards = values(converted(folder(tmp_path / "b", tensors, files=3), tmp_path / "b.gguf"))
    halves = {n: (x.view(np.uint32) >> 16).astype("<u2") for n, x in tensors.items()}
    small = values(converted(folder(tmp_path / "c", halves, dtype="BF16"), tmp_path / "c.gguf"))
    for name, x in whole.items():
        np.testing.assert_array_equal(x, shards[name])
        np.testing.assert_array_equal(x, small[name])


def test_head_of_its_own_and_biases(tmp_path: Path) -> None:
    tensors = weights() | {"lm_head.weight": np.ones((64, 32), np.float32)}
    for i in range(2):
        tensors |= {f"model.layers.{i}.self_attn.{n}_proj.bias": np.ones(s, np.float32) for n, s in BIASES}
    source = folder(tmp_path / "m", tensors, model_type="qwen2", tie_word_embeddings=...)
    got = values(converted(source, tmp_path / "out.gguf"))
    assert got["output.weight"].shape == (64, 32)
    assert got["blk.1.attn_k.bias"].shape == (16,)


BIASES = (("q", 32), ("k", 16), ("v", 16))


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_llama3_angles(tmp_path: Path, key: str) -> None:
    """The divisors, computed as the transformers library does."""
    got = values(converted(folder(tmp_path / "m", **{key: LLAMA3}), tmp_path / "out.gguf"))["rope_freqs.weight"]
    angle = 1 / 10000.0 ** (np.arange(0, 8, 2) / 8)
    wavelength = 2 * np.pi / angle
    smooth = (128 / wavelength - 1) / (4 - 1)
    between = (1 - smooth) * angle / 8 + smooth * angle
    slowed = np.where(wavelength > 128, angle / 8, np.where(wavelength < 32, angle, between))
    np.testing.assert_allclose(got, angle / slowed, rtol=1e-6)
    assert len(set(got.round(4))) == 3  # kept, between, slowed


def test_layers_with_a_window_and_layers_without(tmp_path: Path) -> None:
    """Of a model that would be a plain file: it becomes one of ours, because llama.cpp knows nothing of the window."""
    kind = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8}
    for name, told in (
        ("a", {"max_window_layers": 1}),
        ("b", {"layer_types": ["full_attention", "sliding_attention"]}),
    ):
        tensors = weights()
        for i in range(2):
            tensors |= {f"model.layers.{i}.self_attn.{n}_proj.bias": np.ones(s, np.float32) for n, s in BIASES}
        config = Opened(converted(folder(tmp_path / name, tensors, **kind, **told), tmp_path / f"{name}.gguf")).config
        assert (config.arch, config.memory, config.window) == ("tcllama", ("full", "window"), (0, 8))


def test_yarn(tmp_path: Path) -> None:
    told = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    config = Opened(converted(folder(tmp_path / "m", rope_scaling=told), tmp_path / "out.gguf")).config
    assert (config.rope_scaling, config.rope_factor, config.rope_original) == ("yarn", 4.0, 16)


# What is refused

NESTED = "[" * 100_000 + "]" * 100_000
CONFIGS: list[tuple[dict[str, Any], str]] = [
    *(
        ({name: value}, name)
        for name in ("num_attention_heads", "hidden_size", "vocab_size", "num_hidden_layers", "intermediate_size")
        for value in (0, -1, 2**63, None, "4", [4], 4.0, True, NAN)
    ),
    ({"num_key_value_heads": 3}, "not a multiple|has shape"),
    ({"num_key_value_heads": 0}, "num_key_value_heads"),
    ({"head_dim": 2**31 - 1}, "head_dim"),
    ({"head_dim": 7}, "rope_dim|has shape"),
    ({"num_hidden_layers": 2**31 - 1}, "model.layers.2.input_layernorm.weight' is missing"),
    ({"num_hidden_layers": 1}, "is not used"),
    ({"vocab_size": 65}, "has shape [64, 32], the model needs [65, 32]"),
    ({"max_position_embeddings": -1}, "max_position_embeddings"),
    ({"rms_norm_eps": NAN}, "norm_eps must be"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be of type float"),
    ({"rope_theta": 0.0}, "rope_base must be"),
    ({"rope_theta": 10**400}, "rope_theta must be of type float"),
    ({"rope_theta": -1.0, "rope_scaling": LLAMA3}, "rope_theta must be"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling in config.json has no factor"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0}}, "beta_fast 16.0"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0}}, "argument 'mscale' in rope_scaling"),
    ({"rope_scaling": {"rope_type": "dynamic"}}, "rope_scaling 'dynamic' is not supported"),
    ({"rope_scaling": {"rope_type": ["llama3"]}}, "is not supported"),
    ({"rope_scaling": [8.0]}, "rope_scaling in config.json must be an object"),
    ({"rope_scaling": {"type": "linear", "factor": 0.0}}, "rope_factor must be"),
    ({"rope_scaling": {"type": "linear"}}, "rope_scaling in config.json has no factor"),
    ({"rms_norm_eps": 1e300}, "norm_eps must be"),
    ({"rope_scaling": LLAMA3 | {"factor": NAN}}, "factor must be"),
    ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor must be"),
    ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 10**400}}, "original_max_position_embeddings"),
    ({"rope_scaling": LLAMA3 | {"mystery": 1}}, "argument 'mystery' in rope_scaling is not known"),
    ({"rope_scaling": LLAMA3, "head_dim": 2**31 - 2}, "head_dim"),
    ({"model_type": "mamba"}, "model_type 'mamba' is not supported"),
    ({"model_type": ...}, "model_type None is not supported"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"model_type": "mistral", "sliding_window": "many"}, "window must be"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ({"tie_word_embeddings": ...}, "'lm_head.weight' is missing"),
    ({"tie_word_embeddings": False}, "'lm_head.weight' is missing"),
    ({"tensor_cache": [1]}, "tensor_cache in config.json must be an object"),
]
OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"tc_quantum": 1}, "argument 'tc_quantum' in tensor_cache is not known"),
    ({"tc_write_route": "q"}, "write_route 'q' is not defined for grouped queries"),
    ({"tc_num_slots": 2**31 - 1}, "has shape"),
    ({"tc_num_slots": 2}, "has shape"),
    ({"tc_num_slots": 1}, "slot_keys' is not used"),
    ({"tc_layers": -1}, "model.layers.0.self_attn.tc"),
    ({"tc_enabled": False}, "is not used"),
    ({"kv_window": "8"}, "argument kv_window must be of type int"),
    ({"key_conv": 0}, "key_conv.weight' is not used"),
]


@pytest.mark.parametrize(
    ("changes", "says"), CONFIGS + [({"tensor_cache": TENSOR_CACHE | change}, says) for change, says in OPTIONS]
)
def test_config_that_is_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    source = folder(tmp_path / "m", **changes)
    line = refused(command("convert", source, "-o", tmp_path / "out.gguf"))
    assert any(one in line for one in says.split("|")), line
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", NESTED, '{"a":' + NESTED + "}", '{"a": "\\ud800"}', " " * 2**21]
)
def test_config_that_is_no_object(text: str, tmp_path: Path) -> None:
    source = folder(tmp_path / "m")
    (source / "config.json").write_text(text)
    refused(command("convert", source, "-o", tmp_path / "out.gguf"))
    (source / "config.json").unlink()
    assert "no config.json" in refused(command("convert", source, "-o", tmp_path / "out.gguf"))


SAFETENSORS = {
    "empty": b"",
    "short": b"\1\2\3",
    "header of 2^63": headed({"a": entry()}, length=2**63),
    "header of 2^64-1": headed({"a": entry()}, length=2**64 - 1),
    "header past the end": headed({"a": entry()}, length=1000),
    "no JSON": headed(b"{{{{"),
    "a list": headed([1]),
    "deep": headed(NESTED.encode()),
    "invalid UTF-8": headed(b'{"\xff": 1}'),
    "truncated": headed({"a": entry()}, bytes(63)),
    "trailing bytes": headed({"a": entry()}, bytes(65)),
    "overlap": headed({"a": entry(), "b": entry(offsets=(32, 96))}, bytes(96)),
    "gap": headed({"a": entry(), "b": entry(offsets=(96, 160))}, bytes(160)),
    "twice in one place": headed({"a": entry(), "b": entry()}),
    "wrong size": headed({"a": entry(shape=(4, 5))}),
    "backwards": headed({"a": entry(offsets=(64, 0))}),
    "negative": headed({"a": entry(offsets=(-64, 0))}),
    "product of 2^64": headed({"a": entry(shape=(2**32, 2**32))}),
    "shape of strings": headed({"a": entry(shape=("4", "4"))}),
    "unknown type": headed({"a": entry(dtype="F99")}),
    "integers": headed({"a": entry(dtype="I32")}),
    "no offsets": headed({"a": {"dtype": "F32", "shape": [4, 4]}}),
    "a string for an entry": headed({"a": "b"}),
    "control characters": headed({"a\x1b[2J\n": entry(dtype="I32")}),
    "no model": headed({"a": entry()}),
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_broken_safetensors(case: str, tmp_path: Path) -> None:
    source = folder(tmp_path / "m")
    (source / "model-0.safetensors").write_bytes(SAFETENSORS[case])
    line = refused(command("convert", source, "-o", tmp_path / "out.gguf"))
    assert line.startswith(f"tcinfer: {source}: ")


def test_tensors_of_a_folder_that_are_refused(tmp_path: Path) -> None:
    norm, out = "model.layers.1.input_layernorm.weight", ("-o", tmp_path / "out.gguf")
    for case, (change, says) in enumerate(
        (
            ({"model.layers.1.mystery.weight": np.ones(2, np.float32)}, "mystery.weight' is not used"),
            ({norm: np.full(32, NAN, np.float32)}, "'blk.1.attn_norm.weight' holds NaN or Inf"),
            ({norm: np.ones(31, np.float32)}, "has shape [31], the model needs [32]"),
            ({norm: np.ones((0,), np.float32)}, "has shape [0]"),
            ({"model.layers.0.self_attn.q_proj.weight": np.ones((31, 32), np.float32)}, "has shape [31, 32]"),
            ({"lm_head.weight": np.ones((64, 32), np.float32)}, "ties lm_head.weight to the embedding"),
        )
    ):
        assert says in refused(command("convert", folder(tmp_path / str(case), weights() | change), *out))
    twice = folder(tmp_path / "twice", files=2)
    (twice / "more.safetensors").write_bytes((twice / "model-0.safetensors").read_bytes())
    assert "is in two files" in refused(command("convert", twice, *out))
    for path in twice.glob("*.safetensors"):
        path.unlink()
    assert "no *.safetensors" in refused(command("convert", twice, *out))
