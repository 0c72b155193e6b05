"""A plain GGUF model in float64, one token after another, straight from the file: metadata, tensors, definitions.

For gemma3, qwen3, phi3, smollm3, llama and qwen2, as llama.cpp defines them. It uses nothing of tcinfer: a second
reading of the same files, for the tests alone. Every token's keys and values stay, and a window is a condition on
positions. Slow and plain is the point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize

ARCHITECTURES = ("gemma3", "qwen3", "phi3", "smollm3", "llama", "qwen2")
NEIGHBOURS = ("llama", "smollm3")  # rotate channels 2i and 2i + 1; the others i and i + n/2
BETA_FAST, BETA_SLOW = (
    32,
    1,
)  # YaRN: pairs with more turns over the original context stay, with fewer are stretched in full

Activation = Callable[[np.ndarray], np.ndarray]


def gelu(x: np.ndarray) -> np.ndarray:
    """The approximation by tanh, exactly."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def table_gelu(x: np.ndarray) -> np.ndarray:
    """The same as llama.cpp has it on a CPU: a table from float16 to float16, between -10 and 10."""
    half = np.clip(x, -10, 10).astype(np.float16).astype(np.float64)
    table = gelu(half).astype(np.float16).astype(np.float64)
    return np.where(x <= -10, 0, np.where(x >= 10, x, table))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def logits(path: Path | str, ids: Iterable[int], context: int = 0, gelu: Activation = gelu) -> np.ndarray:
    """float64 [T, V]: the logits after each token.

    context: tokens that the runtime has room for, which chooses between Phi's long and short factors (0: the number of
    ids); gelu: Gemma's activation, exact or `table_gelu`.
    """
    ids = list(ids)
    model = Model(path, context or len(ids), gelu)
    return np.array([model.step(token) for token in ids])


class Model:
    def __init__(self, path: Path | str, context: int, gelu: Activation = gelu) -> None:
        reader = gguf.GGUFReader(path)
        self.meta = {name: f.contents() for name, f in reader.fields.items() if not name.startswith("tokenizer.")}
        self.w = {t.name: dequantize(t.data, t.tensor_type).astype(np.float64) for t in reader.tensors}
        self.arch = self.meta["general.architecture"]
        if self.arch not in ARCHITECTURES:
            raise ValueError(f"this oracle knows nothing of {self.arch}")
        self.context, self.gelu = context, gelu
        self.d, self.eps = self.get("embedding_length"), self.get("attention.layer_norm_rms_epsilon")
        self.H = self.get("attention.head_count")
        self.G = self.get("attention.head_count_kv", self.H)
        self.D = self.get("attention.key_length", self.d // self.H)
        self.n_layers = self.get("block_count")
        wide = self.arch == "gemma3" and self.n_layers == 62  # Gemma 3 27B, told by its depth
        self.scale = 1 / math.sqrt(self.d // self.H if wide else self.D)
        self.rotations = [self.rotation(i) for i in range(self.n_layers)]
        self.keys: list[list[np.ndarray]] = [[] for _ in range(self.n_layers)]  # rotated, by position, each [G, D]
        self.values: list[list[np.ndarray]] = [[] for _ in range(self.n_layers)]

    def get(self, key: str, default: Any = None) -> Any:
        return self.meta.get(f"{self.arch}.{key}", default)

    # what differs from layer to layer

    def is_local(self, layer: int) -> bool:
        if self.arch != "gemma3" or not self.get("attention.sliding_window", 0):
            return False  # phi3's window is not applied
        pattern = self.get("attention.sliding_window_pattern", 6)
        if isinstance(pattern, list):
            return bool(pattern[layer])
        return pattern == 0 or layer % pattern < pattern - 1

    def rotation(self, layer: int) -> tuple[np.ndarray, float]:
        """The angle of each pair of channels for one position, and what cosine and sine are multiplied by."""
        n = self.get("rope.dimension_count", self.D)
        if self.arch == "smollm3" and (layer + 1) % 4 == 0:
            return np.zeros(0), 1.0
        base, kind = self.get("rope.freq_base", 10000.0), self.get("rope.scaling.type", "linear")
        factor = self.get("rope.scaling.factor", self.get("rope.scale_linear", 0.0)) or 1.0
        if kind == "none":
            factor = 1.0
        if self.is_local(layer):
            base, factor = self.get("rope.freq_base_swa", 10000.0), 1.0
        angles = base ** (-2 * np.arange(n // 2) / n) / self.divisors(n)
        magnitude = self.get("rope.scaling.attn_factor", 1.0)
        if kind != "yarn":
            return angles / factor, magnitude
        original = self.get("rope.scaling.original_context_length", self.get("context_length"))

        def pair(turns: float) -> float:
            """The pair of channels that makes so many turns over the original context."""
            return n * math.log(original / (2 * math.pi * turns)) / (2 * math.log(base))

        low, high = max(0, math.floor(pair(BETA_FAST))), min(n - 1, math.ceil(pair(BETA_SLOW)))
        kept = 1 - np.clip((np.arange(n // 2) - low) / max(0.001, high - low), 0, 1)
        return angles * (kept + (1 - kept) / factor), magnitude * (1 + 0.1 * math.log(factor))

    def divisors(self, n: int) -> np.ndarray:
        name = "rope_freqs"
        if self.arch == "phi3":
            original = self.get("rope.scaling.original_context_length", self.get("context_length"))
            name = "rope_factors_long" if self.context > original else "rope_factors_short"
        return self.w.get(f"{name}.weight", np.ones(n // 2))

    # the parts of a block

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * self.w[name + ".weight"]

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return self.w[name + ".weight"] @ x + self.w.get(name + ".bias", 0.0)

    def rotate(self, x: np.ndarray, layer: int, position: int) -> np.ndarray:
        """x [heads, D]; channels beyond the rotating ones stay."""
        angles, magnitude = self.rotations[layer]
        n = 2 * len(angles)
        cos, sin = magnitude * np.cos(position * angles), magnitude * np.sin(position * angles)
        first, second = (
            (slice(0, n, 2), slice(1, n, 2)) if self.arch in NEIGHBOURS else (slice(n // 2), slice(n // 2, n))
        )
        y = x.copy()
        y[:, first] = x[:, first] * cos - x[:, second] * sin
        y[:, second] = x[:, first] * sin + x[:, second] * cos
        return y

    def qkv(self, h: np.ndarray, blk: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        H, G, D = self.H, self.G, self.D
        if blk + "attn_qkv.weight" in self.w:
            rows = self.linear(h, blk + "attn_qkv")
        else:
            rows = np.concatenate([self.linear(h, blk + name) for name in ("attn_q", "attn_k", "attn_v")])
        q, k, v = np.split(rows.reshape(-1, D), (H, H + G))
        if self.arch in ("gemma3", "qwen3"):
            q, k = self.norm(q, blk + "attn_q_norm"), self.norm(k, blk + "attn_k_norm")
        return q, k, v

    def attend(self, h: np.ndarray, layer: int) -> np.ndarray:
        blk = f"blk.{layer}."
        q, k, v = self.qkv(h, blk)
        position = len(self.keys[layer])
        q = self.rotate(q, layer, position) * self.scale
        self.keys[layer].append(self.rotate(k, layer, position))
        self.values[layer].append(v)
        window = self.get("attention.sliding_window") if self.is_local(layer) else position + 1
        keys, values = (np.array(each[-window:]) for each in (self.keys[layer], self.values[layer]))
        out = []
        for head in range(self.H):
            group = head * self.G // self.H
            scores = keys[:, group] @ q[head]
            shares = np.exp(scores - scores.max())
            out.append(shares @ values[:, group] / shares.sum())
        return self.linear(np.concatenate(out), blk + "attn_output")

    def feed_forward(self, h: np.ndarray, layer: int) -> np.ndarray:
        blk = f"blk.{layer}."
        up = self.linear(h, blk + "ffn_up")
        gate, up = np.split(up, 2) if self.arch == "phi3" else (self.linear(h, blk + "ffn_gate"), up)
        activation = self.gelu if self.arch == "gemma3" else silu
        return self.linear(activation(gate) * up, blk + "ffn_down")

    def step(self, token: int) -> np.ndarray:
        """The logits after one more token."""
        gemma = self.arch == "gemma3"
        x = self.w["token_embd.weight"][token] * (math.sqrt(self.d) if gemma else 1.0)
        for layer in range(self.n_layers):
            blk = f"blk.{layer}."
            a = self.attend(self.norm(x, blk + "attn_norm"), layer)
            x = x + (self.norm(a, blk + "post_attention_norm") if gemma else a)
            f = self.feed_forward(self.norm(x, blk + "ffn_norm"), layer)
            x = x + (self.norm(f, blk + "post_ffw_norm") if gemma else f)
        head = self.w.get("output.weight", self.w["token_embd.weight"])
        out = head @ self.norm(x, "output_norm")
        cap = self.get("final_logit_softcapping", 0.0) if gemma else 0.0
        return cap * np.tanh(out / cap) if cap else out
