"""The schema: every configuration survives the way through a file's keys, and what is not known is refused by name."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from conftest import SMALL
from hypothesis import given, settings
from hypothesis import strategies as st

from tcinfer.config import ModelConfig
from tcinfer.errors import TcinferError
from tcinfer.gguf import schema
from tcinfer.memory import MODES, infini, room, tensor_cache

PLAIN = replace(SMALL, cache_type="f16")  # chosen when a file is opened, so that it does not travel in one
TENSOR = replace(PLAIN, memory="tensor", window=8, options=tensor_cache.Options())
CONFIGS = {
    "full": PLAIN,
    "learned positions": replace(PLAIN, rope_dim=0),
    "window": replace(PLAIN, memory="window", window=8, name="a name"),
    "sinks": replace(PLAIN, memory="sinks", window=8, sinks=4, sink_positions="in-cache"),
    "infini": replace(PLAIN, memory="infini", window=8, options=infini.Options(rule="linear")),
    "tensor": TENSOR,
    "llama block": replace(TENSOR, arch="tcllama", n_kv_heads=2, rope_scaling="linear", rope_factor=4.0, key_conv=2),
    "plain": replace(PLAIN, arch="llama", rope_base=500000.0),
    "layers that differ": replace(
        PLAIN,
        arch="tcllama",
        n_heads=(4, 2),
        n_kv_heads=(2, 1),
        d_ff=(64, 32),
        rope_dim=(8, 4),
        rope_base=(1e4, 1e6),
        rope_scaling=("none", "yarn"),
        rope_factor=(1.0, 2.0),
        memory=("sinks", "tensor"),
        window=(8, 16),
        sinks=(4, 0),
        sink_positions=("in-cache", "stored"),
        key_conv=(0, 2),
        options=(None, tensor_cache.Options(slots=2)),
    ),
    "plain with a window": replace(PLAIN, arch="qwen2", memory="window", window=16),
}


def through(config: ModelConfig) -> ModelConfig:
    """The configuration after its keys were written as 32-bit values and read again."""
    keys = {k: float(np.float32(v)) if isinstance(v, float) else v for k, v in schema.to_metadata(config).items()}
    return schema.from_metadata(keys, config.vocab_size, 100)


def same(a: ModelConfig, b: ModelConfig) -> bool:
    """Equal up to the rounding of floats to 32 bits."""
    close = pytest.approx(a.norm_eps, rel=1e-6) == b.norm_eps
    return close and replace(a, norm_eps=1e-5) == replace(b, norm_eps=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_survives_its_keys(name: str) -> None:
    assert same(through(CONFIGS[name]), CONFIGS[name])


@settings(deadline=None)
@given(st.data())
def test_every_option_of_the_tensor_cache_survives(data: st.DataObject) -> None:
    drawn = {
        "rule": data.draw(st.sampled_from(["outer", "delta", "wedge"])),
        "write_route": data.draw(st.sampled_from("kq")),
        "slots": data.draw(st.integers(1, 5)),
        "read_topk": data.draw(st.integers(1, 5)),
        "router_temperature": data.draw(st.floats(0.125, 8, width=32)),
        "normalize_read_eps": data.draw(st.floats(0.125, 8, width=32)),
        "value_scale": data.draw(st.floats(-4, 4, width=32)),
    }
    flags = [f.name for f in fields(tensor_cache.Options) if f.type == "bool" and f.name != "normalize_read"]
    drawn |= {name: data.draw(st.booleans()) for name in flags}
    options, there = tensor_cache.Options(**drawn), data.draw(st.tuples(st.booleans(), st.booleans()))
    memories = tuple("tensor" if here else "window" for here in there)
    config = replace(TENSOR, memory=memories, options=tuple(options if here else None for here in there))
    assert same(through(config), config)


@pytest.mark.parametrize(
    ("top", "memories"), [(-1, "tensor"), (0, "window"), (1, ("window", "tensor")), (2, "tensor"), (5, "tensor")]
)
def test_a_file_from_before_layers_could_differ_names_how_many_have_a_matrix(top: int, memories: object) -> None:
    config = schema.from_metadata(schema.to_metadata(TENSOR) | {"tcinfer.memory.layers": top}, 50, 100)
    assert config.memory == memories
    assert [layer.options for layer in config.layers] == [
        TENSOR.options if layer.memory == "tensor" else None for layer in config.layers
    ]


@pytest.mark.parametrize("mode", MODES)
def test_every_option_has_a_key_of_its_own(mode: str) -> None:
    options = room(mode).Options
    names = [f.name for f in fields(options)] if options else []
    assert not set(names) & set(schema.FIRST_LEVEL.values())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tcinfer.schema_version", 2, "tcinfer.schema_version is 2.*update tcinfer"),
        ("tcinfer.schema_version", "1", "must be of type int"),
        ("tcinfer.schema_version", None, "'tcinfer.schema_version' is missing"),
        ("tcinfer.memory.mechanism", "compressive", "'compressive' is not known"),
        ("tcinfer.memory.mechanism", "infini", "'infini'|is missing|not known"),
        ("tcinfer.memory.compression", 4, "'tcinfer.memory.compression' is not known"),
        ("tcinfer.memory.rule", "oja", "rule must be one of outer, delta, wedge"),
        ("tcinfer.memory.rule", None, "'tcinfer.memory.rule' is missing"),
        ("tcinfer.memory.slots", 0, "slots must be"),
        ("tcinfer.memory.slots", True, "must be of type int, not True"),
        ("tcinfer.memory.value_scale", float("nan"), "value_scale"),
        ("tcgpt.attention.alibi", 1, "'tcgpt.attention.alibi' is not known"),
        ("tcgpt.embedding_length", None, "'tcgpt.embedding_length' is missing"),
        ("tcgpt.attention.head_count", 0, "n_heads must be"),
        ("tcgpt.embedding_length", np.array([32, 32]), "not an array of 2"),
        ("tcgpt.attention.head_count", np.array([4, 4, 4]), "n_heads has 3 values, and the model 2 layers"),
        ("tcgpt.attention.head_count", np.array([4, 0]), "n_heads must be"),
        ("tcinfer.memory.mechanism", ["tensor", "tensor", "tensor"], "has not one value for each of 2 layers"),
        ("tcinfer.memory.mechanism", ["tensor", 1], "must be of type str"),
        ("tcinfer.memory.slots", [1, 2, 3], "'tcinfer.memory.slots' has 3 values"),
        ("tcgpt.attention.head_count_kv", 3, "not a multiple of n_kv_heads 3"),
        ("tcgpt.attention.value_length", 4, "differs from the key length"),
        ("tcgpt.block_count", 2**31, "the file has 100 tensors|n_layers"),
        ("tcgpt.attention.layer_norm_epsilon", float("nan"), "norm_eps"),
        ("tcgpt.attention.layer_norm_epsilon", None, "layer_norm_epsilon' is missing"),
        ("tcgpt.rope.freq_base", 1e300, "rope_base must be"),
        ("tcinfer.memory.value_scale", 1e300, "value_scale must be"),
        ("tcinfer.memory.router_temperature", 1e-300, "router_temperature must be"),
        ("tcgpt.rope.freq_base", 0.0, "rope_base must be"),
        ("tcgpt.rope.dimension_count", 10, "rope_dim 10 is not supported"),
        ("tcgpt.rope.dimension_count", 3, "rope_dim 3 is not supported"),
        ("tcgpt.vocab_size", 49, "the embedding has 50 rows"),
        ("general.architecture", "mamba", "architecture 'mamba' is not supported"),
        ("general.architecture", None, "no model"),
    ],
)
def test_a_key_that_is_wrong_is_refused_by_name(key: str, value: object, message: str) -> None:
    keys = schema.to_metadata(TENSOR)
    if value is None:
        del keys[key]
    else:
        keys[key] = value
    with pytest.raises(TcinferError, match=message):
        schema.from_metadata(keys, 50, 100)


@pytest.mark.parametrize("key", schema.UNSUPPORTED)
def test_a_plain_file_that_needs_more_than_we_have_is_refused(key: str) -> None:
    harmless = schema.UNSUPPORTED[key]
    for other, message in (
        (not harmless if isinstance(harmless, bool) else harmless + 3, "is not supported"),
        ([1.0, 2.0], "not an array"),
    ):
        keys = schema.to_metadata(CONFIGS["plain"]) | {f"llama.{key}": other}
        with pytest.raises(TcinferError, match=f"llama.{key}.*{message}"):
            schema.from_metadata(keys, 50, 100)


@pytest.mark.parametrize("key", ["rope.scaling.factor", "rope.scale_linear"])
def test_a_factor_without_a_type_is_linear_in_a_plain_file(key: str) -> None:
    config = schema.from_metadata(schema.to_metadata(CONFIGS["plain"]) | {f"llama.{key}": 4.0}, 50, 100)
    assert (config.rope_scaling, config.rope_factor) == ("linear", 4.0)


def test_a_plain_file_may_have_keys_that_say_nothing() -> None:
    keys = schema.to_metadata(CONFIGS["plain"]) | {"llama.expert_count": 0, "llama.pooling_type": 1}
    assert same(schema.from_metadata(keys, 50, 100), CONFIGS["plain"])
