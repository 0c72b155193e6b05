"""Makes small GGUF files of random float32 weights, one for every option that llama.cpp reads for an architecture.

    python tests/tools/made_up.py OUTDIR

They stand for models that are too large to be here. Each has a tokenizer of its architecture's kind, of 288 tokens.
MODELS names them; `write` writes one, `weights` are its tensors as in the file; made_up_folders.py writes folders.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

VOCABULARY = 288
Weights = dict[str, np.ndarray]


@dataclass(frozen=True)
class MadeUp:
    """A model's shape and options. None: the key is not in the file, and llama.cpp's default holds."""

    arch: str
    n_layers: int = 4
    d_model: int = 64
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 16  # in the file unless it is d_model / n_heads
    d_ff: int = 96
    context_length: int = 512
    eps: float = 1e-6
    rope_base: float | None = 10000.0
    rope_dim: int | None = None  # channels that rotate
    scaling: dict[str, Any] = field(default_factory=dict)  # rope.scaling.*, and "scale_linear", the older key
    factors: bool = False  # phi3: long and short divisors; llama: rope_freqs
    window: int | None = None
    pattern: int | list[bool] | None = None  # which layers have the window
    local_base: float | None = None
    softcap: float | None = None
    tied: bool = True
    biases: bool = False  # of q, k and v
    fused: bool = False  # q, k and v as one matrix
    gate: float = 1.5  # deviation of the gates, more or less
    seed: int = 0


# With d_model 64 and 4 heads a head is 16 wide by default: 32 is a head that only the file knows of.
GEMMA = {"head_dim": 32, "rope_base": 1e6, "window": 8}
PHI = {"fused": True, "tied": False, "eps": 1e-5}
LONG = {"original_context_length": 256, "attn_factor": math.sqrt(1 + math.log(4) / math.log(256))}
YARN = {"type": "yarn", "factor": 4.0, "original_context_length": 64}

LARGE = "gemma3-27b"  # of all its layers: tests of it take long
MODELS = {
    # the first of an architecture has what its published files have
    "gemma3": MadeUp("gemma3", n_layers=7, **GEMMA),
    "gemma3-every": MadeUp(
        "gemma3",
        n_layers=6,
        n_kv_heads=1,
        eps=1e-3,
        head_dim=32,
        rope_base=1e6,
        scaling={"type": "linear", "factor": 8.0, "attn_factor": 1.1},
        window=8,
        pattern=3,
        local_base=20000.0,
        softcap=4.0,
        tied=False,
    ),
    "gemma3-list": MadeUp(
        "gemma3", rope_dim=16, scaling={"scale_linear": 4.0}, pattern=[False, True, True, False], **GEMMA
    ),
    "gemma3-global": MadeUp("gemma3", head_dim=32, rope_base=None, window=0),
    "gemma3-local": MadeUp("gemma3", pattern=0, scaling={"factor": 8.0}, **GEMMA),
    "gemma3-fused": MadeUp("gemma3", pattern=2, fused=True, biases=True, scaling=YARN, **GEMMA),
    "gemma3-27b": MadeUp("gemma3", n_layers=62, d_model=48, n_heads=2, n_kv_heads=1, d_ff=32, rope_base=1e6, window=8),
    "qwen3": MadeUp("qwen3", head_dim=32, rope_base=1e6),
    "qwen3-untied": MadeUp("qwen3", eps=1e-3, scaling={"type": "linear", "factor": 4.0}, tied=False),
    "qwen3-yarn": MadeUp("qwen3", head_dim=32, rope_base=1e6, scaling=YARN),
    "qwen3-none": MadeUp("qwen3", n_kv_heads=4, scaling={"type": "none", "factor": 4.0}, biases=True, fused=True),
    "phi3": MadeUp("phi3", window=8, **PHI),
    "phi3-long": MadeUp(
        "phi3",
        context_length=1024,
        rope_dim=12,
        scaling=LONG | {"type": "longrope"},
        factors=True,
        **PHI | {"tied": True},
    ),
    "phi3-split": MadeUp("phi3", eps=1e-3, scaling=LONG | {"factor": 2.0}, factors=True, biases=True),
    "smollm3": MadeUp("smollm3", n_layers=6, rope_base=5e6),
    "smollm3-every": MadeUp(
        "smollm3", eps=1e-3, head_dim=32, scaling=YARN | {"attn_factor": 1.2}, tied=False, biases=True
    ),
    "llama": MadeUp("llama", n_layers=2, eps=1e-5, factors=True, tied=False),
    "qwen2": MadeUp("qwen2", n_layers=2, biases=True),
}


def weights(model: MadeUp) -> Weights:
    """Every tensor of the file by its name, matrices as [out, in]. Gemma's norms are as stored there, 1 and all."""
    rng = np.random.default_rng(model.seed)
    d, q, k = model.d_model, model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim

    def matrix(rows: int, columns: int, scale: float = 1.0) -> np.ndarray:
        return (scale / math.sqrt(columns) * rng.standard_normal((rows, columns))).astype(np.float32)

    def norm(width: int) -> np.ndarray:
        """Within [0.5, 2], where float32 takes 1 off and adds it again without a loss."""
        return (1 + np.clip(0.2 * rng.standard_normal(width), -0.45, 0.9)).astype(np.float32)

    gemma = model.arch == "gemma3"
    out = {"token_embd.weight": matrix(VOCABULARY, d), "output_norm.weight": norm(d)}
    if not model.tied:
        out["output.weight"] = matrix(VOCABULARY, d)
    if model.factors:
        rotating = (model.rope_dim or model.head_dim) // 2
        names = {"rope_freqs": 8} if model.arch == "llama" else {"rope_factors_long": 16, "rope_factors_short": 2}
        for name, largest in names.items():
            out[f"{name}.weight"] = np.sort(rng.uniform(1, largest, rotating)).astype(np.float32)
    for i in range(model.n_layers):
        blk = f"blk.{i}."
        parts = {"attn_q": matrix(q, d, 1.5), "attn_k": matrix(k, d, 1.5), "attn_v": matrix(k, d)}
        biases = {name: (0.3 * rng.standard_normal(len(part))).astype(np.float32) for name, part in parts.items()}
        if model.fused:
            parts, biases = ({"attn_qkv": np.concatenate(list(each.values()))} for each in (parts, biases))
        out |= {f"{blk}{name}.weight": part for name, part in parts.items()}
        if model.biases:
            out |= {f"{blk}{name}.bias": bias for name, bias in biases.items()}
        if model.arch in ("gemma3", "qwen3"):
            out |= {f"{blk}{name}.weight": norm(model.head_dim) for name in ("attn_q_norm", "attn_k_norm")}
        for name in ("attn_norm", "ffn_norm", *(("post_attention_norm", "post_ffw_norm") if gemma else ())):
            out[f"{blk}{name}.weight"] = norm(d)
        out[f"{blk}attn_output.weight"] = matrix(d, q)
        gate, up = matrix(model.d_ff, d, model.gate), matrix(model.d_ff, d, 1.5)
        both = {"ffn_up": np.concatenate([gate, up])} if model.arch == "phi3" else {"ffn_gate": gate, "ffn_up": up}
        out |= {f"{blk}{name}.weight": part for name, part in both.items()}
        out[f"{blk}ffn_down.weight"] = matrix(d, model.d_ff)
    return out


def write(model: MadeUp, path: Path, **more: int) -> Path:
    """The file, its tokenizer included. more: further keys of the architecture, "." written as "__"."""
    writer = gguf.GGUFWriter(path, model.arch)
    writer.add_name("Made up")
    _add_shape(writer, model)
    _add_options(writer, model)
    {"gemma3": _gemma_words, "phi3": _phi_words, "llama": _phi_words}.get(model.arch, _byte_pairs)(writer, model.arch)
    for key, value in more.items():
        writer.add_uint32(f"{model.arch}.{key.replace('__', '.')}", value)
    for name, values in weights(model).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_shape(writer: gguf.GGUFWriter, model: MadeUp) -> None:
    writer.add_block_count(model.n_layers)
    writer.add_context_length(model.context_length)
    writer.add_embedding_length(model.d_model)
    writer.add_feed_forward_length(model.d_ff)
    writer.add_head_count(model.n_heads)
    writer.add_head_count_kv(model.n_kv_heads)
    writer.add_layer_norm_rms_eps(model.eps)
    if model.head_dim * model.n_heads != model.d_model:
        writer.add_key_length(model.head_dim)
        writer.add_value_length(model.head_dim)


def _add_options(writer: gguf.GGUFWriter, model: MadeUp) -> None:
    a = model.arch
    for key, value in (
        ("rope.freq_base", model.rope_base),
        ("rope.freq_base_swa", model.local_base),
        ("final_logit_softcapping", model.softcap),
    ):
        if value is not None:
            writer.add_float32(f"{a}.{key}", value)
    if model.rope_dim is not None:
        writer.add_rope_dimension_count(model.rope_dim)
    if model.window is not None:
        writer.add_sliding_window(model.window)
    if isinstance(model.pattern, list):
        writer.add_array(f"{a}.attention.sliding_window_pattern", model.pattern)
    elif model.pattern is not None:
        writer.add_uint32(f"{a}.attention.sliding_window_pattern", model.pattern)
    for name, value in model.scaling.items():
        key = f"{a}.rope.scale_linear" if name == "scale_linear" else f"{a}.rope.scaling.{name}"
        add: dict[type, Callable[..., None]] = {
            str: writer.add_string,
            int: writer.add_uint32,
            float: writer.add_float32,
        }
        add[type(value)](key, value)


# Tokenizers: bytes, a few words, and unused tokens up to VOCABULARY, as padded vocabularies have them.

NORMAL, UNKNOWN, CONTROL, UNUSED, BYTE = (
    gguf.TokenType[name] for name in ("NORMAL", "UNKNOWN", "CONTROL", "UNUSED", "BYTE")
)
PIECES = ["▁", *"etaoinshr", "th", "he", "▁t", "▁th", "▁the"]
MERGES = ["t h", "h e", "Ġ t", "i n", "Ġ a", "e r", "Ġt h", "Ġth e", "o n", "r e"]


def _pieces(writer: gguf.GGUFWriter, special: dict[str, int]) -> None:
    """SentencePiece: special tokens, bytes, pieces."""
    words = [(name, kind) for name, kind in special.items()]
    words += [(f"<0x{byte:02X}>", BYTE) for byte in range(256)] + [(piece, NORMAL) for piece in PIECES]
    words += [(f"<unused{i}>", UNUSED) for i in range(VOCABULARY - len(words))]
    first = len(special) + 256
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([word for word, _ in words])
    writer.add_token_scores([float(first - i) if i >= first else 0.0 for i in range(len(words))])
    writer.add_token_types([kind for _, kind in words])


def _gemma_words(writer: gguf.GGUFWriter, arch: str) -> None:
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    _pieces(writer, {name: UNKNOWN if name == "<unk>" else CONTROL for name in names})
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)


def _phi_words(writer: gguf.GGUFWriter, arch: str) -> None:
    _pieces(writer, {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL, "<|end|>": CONTROL})
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def _byte_pairs(writer: gguf.GGUFWriter, arch: str) -> None:
    """GPT-2's: a printable character for each byte, merged words, special tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    words = [(chr(byte), NORMAL) for byte in printable] + [(chr(256 + i), NORMAL) for i in range(len(others))]
    words += [(merge.replace(" ", ""), NORMAL) for merge in MERGES]
    end = len(words)
    words += [("<|endoftext|>", CONTROL), ("<|im_start|>", CONTROL), ("<|im_end|>", CONTROL)]
    words += [(f"[PAD{i}]", UNUSED) for i in range(len(words), VOCABULARY)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smaug-bpe" if arch == "smollm3" else "qwen2")
    writer.add_token_list([word for word, _ in words])
    writer.add_token_types([kind for _, kind in words])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end + 2)
    writer.add_add_bos_token(False)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, model in MODELS.items():
        print(write(model, folder / f"{name}.gguf"))
