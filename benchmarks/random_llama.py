"""GGUF files of plain Llama-family models with random weights, in any shape and any kind of weights.

Blocks of Q4_K, Q5_K and Q6_K, which gguf cannot quantise to, are drawn as bytes: scales and quants at random.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Kind
from numpy.typing import NDArray

DEVIATION = 0.02
# Of a block with random scales and quants: where its float16 `d` lies, how often it is in the deviation, and how often
# the offset `dmin`, which follows it, is in `d`, so that the mean is 0.
K_BLOCKS = {Kind.Q4_K: (0, 258, 7.5), Kind.Q5_K: (0, 520, 15.5), Kind.Q6_K: (208, 1370, 0)}


class Shape(NamedTuple):
    width: int
    layers: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocabulary: int


def shapes_of(shape: Shape, biases: bool) -> dict[str, tuple[int, ...]]:
    """The tensors' names and shapes; the embedding is the head."""
    kv_width = shape.width // shape.heads * shape.kv_heads
    block: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (shape.width,),
        "attn_q.weight": (shape.width, shape.width),
        "attn_k.weight": (kv_width, shape.width),
        "attn_v.weight": (kv_width, shape.width),
        "attn_output.weight": (shape.width, shape.width),
        "ffn_norm.weight": (shape.width,),
        "ffn_gate.weight": (shape.feed_forward, shape.width),
        "ffn_up.weight": (shape.feed_forward, shape.width),
        "ffn_down.weight": (shape.width, shape.feed_forward),
    }
    if biases:
        block |= {"attn_q.bias": (shape.width,), "attn_k.bias": (kv_width,), "attn_v.bias": (kv_width,)}
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (shape.vocabulary, shape.width),
        "output_norm.weight": (shape.width,),
    }
    return shapes | {f"blk.{layer}.{name}": size for layer in range(shape.layers) for name, size in block.items()}


def drawn(rng: np.random.Generator, size: tuple[int, ...], kind: Kind) -> NDArray:
    """A matrix as its file holds it: float16, or the bytes of its rows."""
    if kind not in K_BLOCKS:
        return gguf.quants.quantize(DEVIATION * rng.standard_normal(size, np.float32), kind)
    values, nbytes = GGML_QUANT_SIZES[kind]
    at, times, offset = K_BLOCKS[kind]
    blocks = rng.integers(0, 256, (size[0] * size[1] // values, nbytes), np.uint8)
    d = DEVIATION / times * rng.uniform(0.5, 1.5, len(blocks)).astype(np.float32)
    blocks[:, at : at + 2] = d.astype(np.float16)[:, None].view(np.uint8)
    if offset:
        blocks[:, at + 2 : at + 4] = (offset * d).astype(np.float16)[:, None].view(np.uint8)
    return blocks.reshape(size[0], -1)


def write(
    path: Path,
    shape: Shape,
    kind: Kind = Kind.F16,
    arch: str = "llama",
    tokenizer: Mapping[str, gguf.GGUFValue] | None = None,
    seed: int = 0,
) -> None:
    """Matrices of deviation 0.02, norms of ones; qwen2 has biases. Without a tokenizer it takes ids alone."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name(f"Random Llama, {shape.width} wide")
    if kind == Kind.F16:
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_block_count(shape.layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    writer.add_rope_freq_base(10000)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocabulary)
    for key, entry in (tokenizer or {}).items():
        writer.add_key_value(key, entry.value, entry.type, entry.sub_type)
    for name, size in shapes_of(shape, biases=arch == "qwen2").items():
        if len(size) == 2:
            writer.add_tensor(name, drawn(rng, size, kind), raw_dtype=kind)
        elif name.endswith("bias"):
            writer.add_tensor(name, DEVIATION * rng.standard_normal(size, np.float32))
        else:
            writer.add_tensor(name, np.ones(size, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
