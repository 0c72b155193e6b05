"""GPT with a Tensor Cache, as published, except that training sees exactly what streaming will.

    x ← x + attn(ln1(x));  x ← x + mlp(ln2(x));  logits = wte · ln_f(x)
    attn(x)_t = c_proj(local_t) + σ(tc_gate) · tc_proj(mem_t)

`local_t` is softmax attention over the last W tokens, t included. `mem_t = q_t A_t`, where A_t is the memory
after the tokens 0..t−W−1 have been written, in that order: token t−W leaves the window at step t and is
written after that step's read. Parameter names and shapes are those of the published checkpoints.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from scan import scan
from torch import Tensor, nn
from torch.nn import functional


@dataclass
class ModelArgs:
    """The published checkpoints' `model_args`: the same keys, in the same order."""

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 1024
    bias: bool = False
    vocab_size: int = 50304
    dropout: float = 0.0
    use_rope: bool = True
    rope_base: int = 10000
    use_kv_cache: bool = True
    kv_window: int = 512  # W; 0 is full attention
    kv_num_sinks: int = 0
    tc_enabled: bool = True
    tc_layers: int = -1
    tc_update_rule: str = "delta"
    tc_write_on_evict: bool = True
    tc_write_on_insert: bool = False
    tc_freeze_decay_lr: bool = False
    tc_two_timescales: bool = False
    tc_chunk_size: int = 64  # speed only: the chunk form is exact
    tc_decay_init: float = 0.995
    tc_lr_init: float = 0.05
    tc_gate_init: float = -2.0
    tc_normalize_k: bool = True
    tc_normalize_q: bool = False
    tc_value_scale: float = 1.0
    tc_decay_slow_init: float = 0.9995
    tc_lr_slow_init: float = 0.01
    tc_alpha_init: float = 0.5
    tc_num_slots: int = 1
    tc_read_topk: int = 1
    tc_router_temp: float = 1.0
    tc_write_route: str = "k"
    tc_use_in_full_forward: bool = True
    tc_per_token_gate: bool = False
    tc_normalize_read: bool = False
    tc_normalize_read_eps: float = 1.0
    infini_enabled: bool = False
    infini_update_rule: str = "delta"
    infini_segment_size: int = 256


# Options of the published model that this trainer does not build, with the only value it takes.
FIXED = {
    "bias": False,
    "use_rope": True,
    "use_kv_cache": True,
    "kv_num_sinks": 0,
    "tc_layers": -1,
    "tc_write_on_evict": True,
    "tc_write_on_insert": False,
    "tc_freeze_decay_lr": False,
    "tc_two_timescales": False,
    "tc_num_slots": 1,
    "tc_use_in_full_forward": True,
    "tc_per_token_gate": False,
    "tc_normalize_read": False,
    "infini_enabled": False,
}


def rotate(x: Tensor, base: float) -> Tensor:
    """Rotary positions t = 0..T−1: each pair (x_2m, x_2m+1) turned by t · base^(−2m/D). x: [B, H, T, D]."""
    T, D = x.shape[-2:]
    frequency = base ** (-torch.arange(0, D, 2, dtype=torch.float64, device=x.device) / D)
    angle = torch.arange(T, dtype=torch.float64, device=x.device)[:, None] * frequency  # [T, D/2]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def unit(x: Tensor) -> Tensor:
    """x / (‖x‖ + 1e-5) along the last axis, as published (the norm plus eps, not their maximum)."""
    return x / (x.norm(dim=-1, keepdim=True) + 1e-5)


class TensorCache(nn.Module):
    """L2: what left the window, one D×D matrix per head; λ = σ(logit_decay_fast), η = σ(logit_lr_fast)."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        decay, rate = torch.tensor([args.tc_decay_init, args.tc_lr_init]).logit().clamp(-10, 10).tolist()
        self.logit_decay_fast = nn.Parameter(torch.full((args.n_head,), decay))
        self.logit_lr_fast = nn.Parameter(torch.full((args.n_head,), rate))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Every query's read, zero where nothing has been evicted yet. q, k, v and the result: [B, H, T, D].

        The write with index s = t − W belongs to query t: queries W..T−1 go with pairs 0..T−W−1.
        """
        args, W, evicted = self.args, self.args.kv_window, q.shape[2] - self.args.kv_window
        if W == 0 or evicted <= 0:
            return torch.zeros_like(q)
        q, k, v = q[:, :, W:], k[:, :, :evicted], args.tc_value_scale * v[:, :, :evicted]
        q = unit(q) if args.tc_normalize_q else q
        k = unit(k) if args.tc_normalize_k else k
        log_decay, rate = functional.logsigmoid(self.logit_decay_fast), self.logit_lr_fast.sigmoid()
        read, _ = scan(q, k, v, log_decay, rate, args.tc_update_rule, args.tc_chunk_size)
        return functional.pad(read, (0, 0, W, 0)).to(q.dtype)


class Attention(nn.Module):
    """Exact window attention (L1) plus the gated read of the memory (L2)."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        d = args.n_embd
        self.c_attn = nn.Linear(d, 3 * d, bias=False)
        self.c_proj = nn.Linear(d, d, bias=False)
        self.dropout = nn.Dropout(args.dropout)
        if args.tc_enabled:
            self.tc = TensorCache(args)
            self.tc_proj = nn.Linear(d, d, bias=False)
            self.tc_gate = nn.Parameter(torch.tensor([args.tc_gate_init]))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x: [B, T, d]; mask: [T, T], True where query t sees key s."""
        q, k, v = (self.split_heads(part) for part in self.c_attn(x).chunk(3, dim=-1))  # [B, H, T, D]
        q, k = rotate(q, self.args.rope_base), rotate(k, self.args.rope_base)
        y = self.c_proj(merge_heads(functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)))
        if self.args.tc_enabled:
            y = y + self.tc_gate.sigmoid() * self.tc_proj(merge_heads(self.tc(q, k, v)))
        return self.dropout(y)

    def split_heads(self, x: Tensor) -> Tensor:
        """[B, T, H·D] -> [B, H, T, D]."""
        return x.unflatten(-1, (self.args.n_head, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, T, D] -> [B, T, H·D]."""
    return x.transpose(1, 2).flatten(2)


class MLP(nn.Module):
    """proj(gelu(fc(x))), four times wider inside, the exact (erf) GELU."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.fc = nn.Linear(args.n_embd, 4 * args.n_embd, bias=False)
        self.proj = nn.Linear(4 * args.n_embd, args.n_embd, bias=False)
        self.dropout = nn.Dropout(args.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.proj(functional.gelu(self.fc(x))))


class Block(nn.Module):
    """x ← x + attn(ln1(x)); x ← x + mlp(ln2(x))."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(args.n_embd, bias=False)
        self.attn = Attention(args)
        self.ln2 = nn.LayerNorm(args.n_embd, bias=False)
        self.mlp = MLP(args)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x), mask)
        return x + self.mlp(self.ln2(x))


class GPT(nn.Module):
    """The language model: tokens [B, T] to logits [B, T, V], the head tied to the embedding."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        for name, value in FIXED.items():
            if getattr(args, name) != value:
                raise ValueError(f"the trainer supports only {name}={value}, not {getattr(args, name)}")
        self.args = args
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(args.vocab_size, args.n_embd),
                "drop": nn.Dropout(args.dropout),
                "h": nn.ModuleList(Block(args) for _ in range(args.n_layer)),
                "ln_f": nn.LayerNorm(args.n_embd, bias=False),
            }
        )
        self.lm_head = nn.Linear(args.n_embd, args.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        self.initialize()

    def initialize(self) -> None:
        """Matrices N(0, 0.02²); those that end a residual branch times 1/√(2L); not tc_proj, as published."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("attn.c_proj.weight", "mlp.proj.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * self.args.n_layer) ** 0.5 if residual else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.transformer.drop(self.transformer.wte(tokens))  # [B, T, d]
        mask = window_mask(tokens.shape[1], self.args.kv_window, tokens.device)
        for block in self.transformer.h:
            x = block(x, mask)
        return self.lm_head(self.transformer.ln_f(x))


def window_mask(T: int, W: int, device: torch.device) -> Tensor:
    """[T, T], True where t − W < s ≤ t: the last W tokens, t included; every s ≤ t when W is 0."""
    seen = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    return seen.triu(1 - W) if W else seen


def load(path: Path | str) -> tuple[GPT, dict]:
    """The model of a published or own `ckpt.pt`, in evaluation mode, and the whole checkpoint."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    model = GPT(ModelArgs(**checkpoint["model_args"]))
    model.load_state_dict({key.removeprefix("_orig_mod."): value for key, value in checkpoint["model"].items()})
    return model.eval(), checkpoint


def model_args(model: GPT) -> dict:
    """The checkpoint's `model_args` entry."""
    return asdict(model.args)
