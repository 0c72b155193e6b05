"""Infini-attention: every token is written into a matrix per key head as it arrives, and read beside the window."""

import torch
from options import ModelArgs
from scan import scan
from torch import Tensor, nn
from torch.nn import functional
from window import EPS, Attention


class Infini(nn.Module):
    """Infini-attention's memory, mixed with local attention inside the heads: every token is written as it arrives.

    m_t = φ(q_t) M / (φ(q_t)·z + ε);  M += φ(k_t)ᵀ(v_t − φ(k_t) M / (φ(k_t)·z + ε)) or φ(k_t)ᵀv_t;  z += φ(k_t);
    φ(x) = ELU(x) + 1. Read before write. Source: docs/mechanisms.md, "Infini-attention".
    """

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.delta, self.chunk = args.infini_update_rule == "delta", args.tc_chunk_size
        self.beta = nn.Parameter(torch.zeros(args.n_head))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, M: Tensor, z: Tensor, local: Tensor):
        """What the heads give [B, H, T, D], and the new M, z [B, G, D].  q, local [B, H, T, D]; k, v [B, G, T, D]."""
        q = functional.elu(q.to(z.dtype).unflatten(1, (k.shape[1], -1))) + 1  # [B, G, R, T, D]
        k = functional.elu(k.to(z.dtype)) + 1  # not bfloat16: z is a sum over all that was read
        after = z[:, :, None] + k.cumsum(2)  # [B, G, T, D]
        before = torch.cat((z[:, :, None], after[:, :, :-1]), 2)
        one = k.new_ones(1)
        retrieve = 1 / ((k * before).sum(-1) + EPS) if self.delta else None
        reads, M = scan(q, k, v, 0 * one, one, M, retrieve, chunk=self.chunk)
        reads = reads / ((q * before[:, :, None]).sum(-1, keepdim=True) + EPS)
        share = self.beta.sigmoid()[:, None, None]
        return share * reads.flatten(1, 2) + (1 - share) * local, M, after[:, :, -1]


class InfiniAttention(Attention):
    """c_proj of what the heads mix of window and memory."""

    def add_memory(self, layer: int) -> None:
        self.infini = Infini(self.args)

    def empty(self, B: int, like: Tensor) -> dict[str, Tensor]:
        G, D = self.args.kv_heads, self.args.head_dim
        return {"A": like.new_zeros(B, G, D, D), "z": like.new_zeros(B, G, D)}

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, local: Tensor, state: dict[str, Tensor], new: dict[str, Tensor]):
        local, new["A"], new["z"] = self.infini(q, k, v, state["A"], state["z"], local)
        return local
