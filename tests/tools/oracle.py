"""A whole model in float64, one token after another: a second reading of the equations, for the tests alone.

Written from the definitions, not from the package, of which it uses the configuration's fields and the tensors' names.
Nothing is bounded here: every token's query, key, value and attention input stay in Python lists, and the window is a
condition on positions. Slow and plain is the point.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tcinfer.config import LayerConfig, ModelConfig

Weights = dict[str, np.ndarray]
EPS = 1e-5  # beside a norm or a normaliser


def logits(config: ModelConfig, weights: Weights, ids: Any) -> np.ndarray:
    """float64 [T, V]: the logits after each token."""
    return run(config, weights, ids)[0]


def run(config: ModelConfig, weights: Weights, ids: Any) -> tuple[np.ndarray, list[dict[str, np.ndarray]]]:
    """The logits, and each layer's matrices after the last token: {} where the layer has none."""
    weights = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    layers = [Layer(config, weights, i) for i in range(config.n_layers)]
    head = weights.get("output.weight", weights["token_embd.weight"])
    out = []
    for t, token in enumerate(ids):
        x = weights["token_embd.weight"][token]
        if config.rope_dim == 0:
            x = x + weights["position_embd.weight"][t]
        for layer in layers:
            x = layer.step(x)
        out.append(head @ norm(config, x, weights, "output_norm"))
    return np.array(out), [layer.memory for layer in layers]


def norm(config: ModelConfig, x: np.ndarray, w: Weights, name: str) -> np.ndarray:
    """LayerNorm (tcgpt) or RMSNorm (the rest) of one vector."""
    if config.arch == "tcgpt":
        x = x - x.mean()
    x = x / np.sqrt((x * x).mean() + config.norm_eps) * w[name + ".weight"]
    return x + w[name + ".bias"] if name + ".bias" in w else x


def linear(x: np.ndarray, w: Weights, name: str) -> np.ndarray:
    return w[name + ".weight"] @ x + w.get(name + ".bias", 0.0)


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def softmax(x: Any) -> np.ndarray:
    e = np.exp(np.asarray(x) - np.max(x))
    return e / e.sum()


def unit(x: np.ndarray) -> np.ndarray:
    return x / (np.linalg.norm(x) + EPS)


def phi(x: np.ndarray) -> np.ndarray:
    """ELU(x) + 1."""
    return np.where(x > 0, x + 1, np.exp(x))


def rotate(config: LayerConfig, arch: str, w: Weights, x: np.ndarray, position: int) -> np.ndarray:
    """One head's vector at a position; the vector itself where the model has learned positions."""
    if config.rope_dim == 0:
        return x
    D, base, scale = config.rope_dim, config.rope_base, 1.0  # the first channels rotate
    if config.rope_scaling == "ntk" and config.rope_factor > 1:
        base *= config.rope_factor ** (D / (D - 2))
    elif config.rope_scaling == "linear":
        scale = config.rope_factor
    divisors = w.get("rope_freqs.weight", np.ones(D // 2))
    y = x.copy()
    for i in range(D // 2):
        a, b = (2 * i, 2 * i + 1) if arch in ("tcgpt", "llama") else (i, i + D // 2)
        angle = position * base ** (-2 * i / D) / scale / divisors[i]
        c, s = math.cos(angle), math.sin(angle)
        y[a], y[b] = x[a] * c - x[b] * s, x[a] * s + x[b] * c
    return y


class Layer:
    """One block and everything it has seen. Lists are indexed by position; vectors are [head, D], never rotated."""

    def __init__(self, config: ModelConfig, weights: Weights, index: int) -> None:
        prefix = f"blk.{index}."
        self.config, self.rope_weights = config.layers[index], weights
        self.block = config
        self.w = {name.removeprefix(prefix): v for name, v in weights.items() if name.startswith(prefix)}
        self.t = -1
        self.q: list[np.ndarray] = []
        self.k: list[np.ndarray] = []  # after the convolution
        self.v: list[np.ndarray] = []
        self.x: list[np.ndarray] = []  # attention inputs
        self.unconvolved = np.zeros((self.config.n_kv_heads, config.head_dim))
        self.memory: dict[str, np.ndarray] = {}
        config = self.config
        G, D, o = config.n_kv_heads, config.head_dim, config.options
        if config.memory == "infini":
            self.memory = {"M": np.zeros((G, D, D)), "z": np.zeros((G, D))}
        elif config.memory == "tensor":
            self.memory = {"A": np.zeros((1 + o.two_timescales, o.slots, G, D, D)), "z": np.zeros((G, D))}

    def step(self, x: np.ndarray) -> np.ndarray:
        """The block's output for the next token."""
        config, w = self.config, self.w
        self.t += 1
        h = norm(self.block, x, w, "attn_norm")
        k = linear(h, w, "attn_k").reshape(-1, config.head_dim)
        if config.key_conv:
            w0, w1 = w["attn_key_conv"]
            k, self.unconvolved = w0 * k + w1 * self.unconvolved, k
        self.q.append(linear(h, w, "attn_q").reshape(-1, config.head_dim))
        self.k.append(k)
        self.v.append(linear(h, w, "attn_v").reshape(-1, config.head_dim))
        self.x.append(h)
        x = x + self.attend()
        h = norm(self.block, x, w, "ffn_norm")
        up = linear(h, w, "ffn_up")
        if self.block.arch == "tcgpt":
            h = np.array([u * 0.5 * (1 + math.erf(u / math.sqrt(2))) for u in up])
        else:
            gate = linear(h, w, "ffn_gate")
            h = gate * sigmoid(gate) * up
        return x + linear(h, w, "ffn_down")

    def attend(self) -> np.ndarray:
        """What attention and memory add to the residual stream."""
        local = np.array([self.local(head) for head in range(self.config.n_heads)])
        if self.config.memory == "infini":
            beta = sigmoid(self.w["infini_beta"])[:, None]
            local = beta * self.infini() + (1 - beta) * local
        y = linear(local.ravel(), self.w, "attn_output")
        if self.config.memory == "tensor" and self.memory:
            logit = self.w["tc_gate.bias"][0] + self.w.get("tc_gate.weight", np.zeros_like(y)).ravel() @ self.x[-1]
            y = y + sigmoid(logit) * linear(self.tensor().ravel(), self.w, "tc_output")
        return y

    def group(self, head: int) -> int:
        """The KV head that a query head reads."""
        return head * self.config.n_kv_heads // self.config.n_heads

    def at(self, x: np.ndarray, position: int) -> np.ndarray:
        return rotate(self.config, self.block.arch, self.rope_weights, x, position)

    # first level: full, window, sinks

    def visible(self) -> list[int]:
        """Positions that the exact attention of the newest token sees: the sinks and the last W, itself included."""
        W, t = self.config.window, self.t
        return [i for i in range(t + 1) if W == 0 or i < self.config.sinks or i > t - W]

    def local(self, head: int) -> np.ndarray:
        g, seen = self.group(head), self.visible()
        places = range(len(seen)) if self.config.sink_positions == "in-cache" else seen
        q = self.at(self.q[-1][head], places[-1])
        scores = [q @ self.at(self.k[i][g], p) / math.sqrt(len(q)) for i, p in zip(seen, places, strict=True)]
        return sum(p * self.v[i][g] for p, i in zip(softmax(scores), seen, strict=True))

    # Infini: every token is written as it comes, after the read

    def infini(self) -> np.ndarray:
        M, z, t = self.memory["M"], self.memory["z"], self.t
        out = []
        for head, q in enumerate(self.q[-1]):
            g, f = self.group(head), phi(self.at(q, t))
            out.append(f @ M[g] / (f @ z[g] + EPS))
        for g, (k, v) in enumerate(zip(self.k[-1], self.v[-1], strict=True)):
            f = phi(self.at(k, t))
            if self.config.options.rule == "delta":
                v = v - f @ M[g] / (f @ z[g] + EPS)
            M[g] += np.outer(f, v)
            z[g] += f
        return np.array(out)

    # Tensor Cache: what leaves the window is written, read before write

    def tensor(self) -> np.ndarray:
        """[H, D]: this token's read, and its write."""
        if self.config.options.write_then_read:
            self.write()
            return self.read()
        out = self.read()
        self.write()
        return out

    def query(self, head: int) -> np.ndarray:
        o, q = self.config.options, self.q[-1][head]
        q = self.at(q, self.t) if o.rope else q
        return unit(q) if o.normalize_q else q

    def read(self) -> np.ndarray:
        o, A = self.config.options, self.memory["A"]
        out = []
        for head in range(self.config.n_heads):
            g, q = self.group(head), self.query(head)
            shares = self.shares(g, q)
            reads = [sum(shares[s] * (q @ A[m, s, g]) for s in range(o.slots)) for m in range(len(A))]
            read = reads[0]
            if o.two_timescales:
                read = read + sigmoid(self.w["tc_alpha"][g]) * reads[1]
            if o.normalize_read:
                read = read / max(abs(q @ self.memory["z"][g]), o.normalize_read_eps)
            out.append(read)
        return np.array(out)

    def routes(self, g: int, x: np.ndarray) -> np.ndarray:
        """The router's logit of each slot."""
        o = self.config.options
        return np.array([unit(x) @ unit(key) for key in self.w["tc_slot_keys"][g]]) / (
            math.sqrt(len(x)) * o.router_temperature
        )

    def shares(self, g: int, q: np.ndarray) -> np.ndarray:
        """The weight of each slot in a read: softmax over the largest logits, 0 elsewhere."""
        o = self.config.options
        if o.slots == 1:
            return np.ones(1)
        route = self.routes(g, q)
        best = np.argsort(-route)[: o.read_topk]
        shares = np.zeros(o.slots)
        shares[best] = softmax(route[best])
        return shares

    def write(self) -> None:
        o, t, W = self.config.options, self.t, self.config.window
        left = t - W if W and t - W >= self.config.sinks else None
        if o.write_on_evict and left is not None:
            self.fold(left)
        elif o.write_on_insert:
            self.fold(t)

    def fold(self, i: int) -> None:
        """Write the pair of position i."""
        o, A, z = self.config.options, self.memory["A"], self.memory["z"]
        for g in range(self.config.n_kv_heads):
            k, v = self.k[i][g], o.value_scale * self.v[i][g]
            k = self.at(k, i) if o.rope else k
            k = unit(k) if o.normalize_k else k
            s = 0
            if o.slots > 1:
                if o.write_route == "q" and self.config.n_heads != self.config.n_kv_heads:
                    raise NotImplementedError("undefined: which query of the group routes the group's key")
                s = int(np.argmax(self.routes(g, k if o.write_route == "k" else self.query(g))))
            for m in range(len(A)):
                decay, rate = self.w["tc_decay"][m, g], self.w["tc_rate"][m, g]
                if o.token_decay:
                    decay = decay + self.w["tc_decay_proj"][g] @ self.x[i]
                if o.token_rate:
                    rate = rate + self.w["tc_rate_proj"][g] @ self.x[i]
                decay, rate, old = sigmoid(decay), sigmoid(rate), A[m, s, g]
                change = np.outer(k, v)
                if o.rule == "delta":
                    change = np.outer(k, v - k @ old)
                elif o.rule == "wedge":
                    change = change - change.T
                A[m, s, g] = decay * old + rate * change
                if m == 0:
                    z[g] = decay * z[g] + rate * k
