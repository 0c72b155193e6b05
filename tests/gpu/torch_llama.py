"""A Llama in PyTorch as one would write it to be fast, beside which measure_gpu.py sets ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu


class TorchLlama:
    """The same shape in PyTorch, bf16: fused projections, sdpa over a static cache, a CUDA graph a token."""

    def __init__(self, shape: Any, longest: int, compiled: bool = False, where: str = "cuda") -> None:
        """shape: of measuring.py; longest: tokens that the caches hold; compiled: what stands around attention goes
        through torch.compile; where: on a CPU without graphs."""
        self.shape, self.where = shape, where
        C, D, F, G = shape.width, shape.head_dim, shape.ffn, shape.kv_heads

        def random(*size: int) -> Any:
            return torch.randn(size, device=where, dtype=torch.bfloat16) * size[-1] ** -0.5

        def layer() -> tuple[Any, ...]:
            wide = (shape.heads + 2 * G) * D
            caches = [random(G, longest, D) for _ in range(2)]
            return random(wide, C), random(C, shape.heads * D), random(2 * F, C), random(C, F), *caches

        self.layers = [layer() for _ in range(shape.layers)]
        self.embedding = random(shape.vocab, C)
        self.head = self.embedding if shape.tied else random(shape.vocab, C)
        self.ones = torch.ones(C, device=where, dtype=torch.bfloat16)
        angles = torch.arange(longest, device=where)[:, None] * 1e4 ** (-torch.arange(D // 2, device=where) * 2 / D)
        self.cos, self.sin = angles.cos().bfloat16(), angles.sin().bfloat16()
        self.token = torch.zeros(1, dtype=torch.long, device=where)
        made = torch.compile if compiled else lambda f: f
        self.before, self.after = made(self._before), made(self._after)

    def _before(self, x: Any, qkv: Any, cos: Any, sin: Any) -> tuple[Any, ...]:
        s = self.shape
        h = linear(rms_norm(x, (s.width,), self.ones, 1e-5), qkv).view(-1, s.head_dim)
        turning, v = h.split([s.heads + s.kv_heads, s.kv_heads])
        a, b = turning.chunk(2, -1)
        q, k = torch.cat([a * cos - b * sin, a * sin + b * cos], -1).split([s.heads, s.kv_heads])
        return q, k, v

    def _after(self, x: Any, y: Any, out: Any, up: Any, down: Any) -> Any:
        x = x + linear(y, out)
        gate, value = linear(rms_norm(x, (self.shape.width,), self.ones, 1e-5), up).chunk(2, -1)
        return x + linear(silu(gate) * value, down)

    def _token(self, at: Any, context: int, grouped: bool) -> None:
        """at: where in the stream it stands, the last of `context`; grouped: the heads of a key head as its queries."""
        s = self.shape
        x, cos, sin = self.embedding[self.token], self.cos[at], self.sin[at]
        for qkv, out, up, down, keys, values in self.layers:
            q, k, v = self.before(x, qkv, cos, sin)
            keys.index_copy_(1, at, k[:, None])
            values.index_copy_(1, at, v[:, None])
            q = q.view(1, s.kv_heads, -1, s.head_dim) if grouped else q.view(1, s.heads, 1, s.head_dim)
            seen = keys[None, :, :context], values[None, :, :context]
            y = scaled_dot_product_attention(q, *seen, enable_gqa=not grouped)
            x = self.after(x, y.reshape(1, -1), out, up, down)
        logits = linear(rms_norm(x, (s.width,), self.ones, 1e-5), self.head)
        self.token.copy_(logits.argmax(-1))

    def stepping(self, context: int, grouped: bool) -> Callable[[], int]:
        """A token at the end of such a context, by one graph, and the id it gives."""
        at = torch.tensor([context - 1], device=self.where)

        @torch.no_grad()
        def token() -> None:
            self._token(at, context, grouped)

        replay = token
        if self.where == "cuda":
            aside, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(3):
                    token()
            torch.cuda.current_stream().wait_stream(aside)
            with torch.cuda.graph(graph):
                token()
            replay = graph.replay

        def run(held: Any = at) -> int:  # the graph reads `at` where it lies
            replay()
            return int(self.token.item())

        return run
