"""Tensor Cache: what leaves the window is written into one matrix per key head, and later queries read from it.

The memory holds exactly what had left the window by the position of a query, with exactly the decay that streaming
applies. Equations: docs/mechanisms.md, "Tensor Cache".
"""

import torch
from options import ModelArgs
from scan import scan
from torch import Tensor, nn
from torch.nn import functional
from window import EPS, Attention


def unit(x: Tensor) -> Tensor:
    """x / (‖x‖ + 1e-5) along the last axis, as published (the norm plus eps, not their maximum)."""
    return x / (x.norm(dim=-1, keepdim=True) + EPS)


class TensorCache(nn.Module):
    """L2 of Tensor Cache: one D×D matrix per key head, decay λ = σ(logit_decay), write rate η = σ(logit_lr)."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        G = args.kv_heads
        for name, start in (("decay", args.tc_decay_init), ("lr", args.tc_lr_init)):
            logit = torch.full((G,), torch.tensor(start).logit().clamp(-10, 10).item())
            if args.tc_freeze_decay_lr:
                self.register_buffer(f"logit_{name}_fast", logit)
            else:
                self.register_parameter(f"logit_{name}_fast", nn.Parameter(logit))
        for name, wanted in (("rate_proj", args.tc_token_rate), ("decay_proj", args.tc_token_decay)):
            if wanted:
                self.add_module(name, nn.Linear(args.n_embd, G, bias=False))

    def terms(self, x: Tensor) -> dict[str, Tensor]:
        """Of each token, fixed when it arrives: its part of the logits, x [B, T, C] -> [B, G, T]."""
        projections = {"rate": "rate_proj", "decay": "decay_proj"}
        return {name: getattr(self, p)(x).mT for name, p in projections.items() if hasattr(self, p)}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, terms: dict[str, Tensor], valid: Tensor, A: Tensor):
        """The reads [B, H, T, D] and the new A. q [B, H, T, D]; the evicted pairs k, v [B, G, T, D], their terms
        [B, G, T], and whether there was one [B, T]."""
        args = self.args
        q = unit(q) if args.tc_normalize_q else q
        k = unit(k) if args.tc_normalize_k else k
        log_decay = functional.logsigmoid(self.logit_decay_fast[:, None] + terms.get("decay", 0))
        rate = (self.logit_lr_fast[:, None] + terms.get("rate", 0)).sigmoid() * valid[:, None]  # [B, G, T]
        reads, A = scan(
            q.unflatten(1, (k.shape[1], -1)),
            k,
            args.tc_value_scale * v,
            log_decay,
            rate,
            A,
            retrieve=torch.ones_like(rate) if args.tc_update_rule == "delta" else None,
            wedge=args.tc_update_rule == "wedge",
            write_first=args.tc_write_then_read,
            chunk=args.tc_chunk_size,
        )
        return reads.flatten(1, 2), A


class TensorCacheAttention(Attention):
    """c_proj(local) + gate · tc_proj(memory)."""

    def add_memory(self, layer: int) -> None:
        args = self.args
        self.tc_proj = nn.Linear(args.n_head * args.head_dim, args.n_embd, bias=False)
        self.remembers = args.tc_layers < 0 or layer >= args.n_layer - args.tc_layers
        if not self.remembers:
            return
        self.tc = TensorCache(args)
        if args.tc_per_token_gate:
            self.tc_gate_proj = nn.Linear(args.n_embd, 1)
            nn.init.constant_(self.tc_gate_proj.bias, args.tc_gate_init)
        else:
            self.tc_gate = nn.Parameter(torch.tensor([args.tc_gate_init]))

    def empty(self, B: int, like: Tensor) -> dict[str, Tensor]:
        if not self.remembers:
            return {}
        args, G, D = self.args, self.args.kv_heads, self.args.head_dim
        out = {name: like.new_zeros(B, G, args.ring) for name in self.tc.terms(like.new_zeros(B, 1, args.n_embd))}
        out |= {} if args.tc_rope else {"plain": like.new_zeros(B, G, args.ring, D)}
        return out | {"A": like.new_zeros(B, G, D, D)}

    def carried(self, x: Tensor, plain: Tensor) -> dict[str, Tensor]:
        if not self.remembers:
            return {}
        return self.tc.terms(x) | ({} if self.args.tc_rope else {"plain": plain})

    def behind(
        self,
        x: Tensor,
        queries: dict[str, Tensor],
        left: dict[str, Tensor],
        state: dict[str, Tensor],
        new: dict[str, Tensor],
    ) -> Tensor | None:
        if not self.remembers:
            return None
        if not left:
            new["A"] = state["A"]
            return None
        query, key = ("rotated", "k") if self.args.tc_rope else ("plain", "plain")
        reads, new["A"] = self.tc(queries[query], left[key], left["v"], left, left["valid"], state["A"])
        gate = self.tc_gate_proj(x) if self.args.tc_per_token_gate else self.tc_gate
        return gate.sigmoid() * self.tc_proj(reads.transpose(1, 2).flatten(2))
