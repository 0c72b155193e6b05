"""The language model: a stack of blocks over segments of token streams, published GPT or Llama-style.

    x ← x + attention(ln1(x));  x ← x + mlp(ln2(x));  logits = wte · ln_f(x)

Parameter names and shapes are those of the published checkpoints (docs/mechanisms.md, "Published checkpoints").
"""

from pathlib import Path

import torch
from memory import attention
from options import ModelArgs
from torch import Tensor, nn
from torch.nn import functional
from window import State, segment


def norm(args: ModelArgs) -> nn.Module:
    kind = nn.LayerNorm(args.n_embd, eps=1e-5, bias=False) if args.block == "gpt" else nn.RMSNorm(args.n_embd, eps=1e-5)
    return kind


class MLP(nn.Module):
    """proj(gelu(fc(x))) with the exact (erf) GELU, or proj(silu(gate(x)) · fc(x))."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.fc = nn.Linear(args.n_embd, args.inner, bias=False)
        self.proj = nn.Linear(args.inner, args.n_embd, bias=False)
        self.gate = nn.Linear(args.n_embd, args.inner, bias=False) if args.block == "llama" else None

    def forward(self, x: Tensor) -> Tensor:
        up = self.fc(x)
        return self.proj(functional.gelu(up) if self.gate is None else functional.silu(self.gate(x)) * up)


class Block(nn.Module):
    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        self.ln1, self.ln2 = norm(args), norm(args)
        self.attn = attention(args, layer)
        self.mlp = MLP(args)
        self.dropout = nn.Dropout(args.dropout)

    def forward(self, x: Tensor, state: dict[str, Tensor], here) -> tuple[Tensor, dict[str, Tensor]]:
        y, state = self.attn(self.ln1(x), state, here)
        x = x + self.dropout(y)
        return x + self.dropout(self.mlp(self.ln2(x))), state


class GPT(nn.Module):
    """Tokens [B, T] to logits [B, T, V], the head tied to the embedding; and the state to go on from."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(args.vocab_size, args.n_embd),
                "drop": nn.Dropout(args.dropout),
                "h": nn.ModuleList(Block(args, i) for i in range(args.n_layer)),
                "ln_f": norm(args),
            }
        )
        self.lm_head = nn.Linear(args.n_embd, args.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        self.initialize()

    def initialize(self) -> None:
        """Matrices N(0, 0.02²); those that end a residual branch times 1/√(2L); per-token terms start at zero."""
        for name, parameter in self.named_parameters():
            if name.endswith(("rate_proj.weight", "decay_proj.weight", "tc_gate_proj.weight")):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                residual = name.endswith(("attn.c_proj.weight", "mlp.proj.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * self.args.n_layer) ** 0.5 if residual else 0.02)

    def start(self, B: int) -> State:
        """The state of B streams that have seen nothing."""
        like = self.lm_head.weight
        layers = [block.attn.start(B, like) for block in self.transformer.h]
        return State(torch.zeros(B, dtype=torch.long, device=like.device), layers)

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        x, state = self.hidden(tokens, state)
        return self.lm_head(x), state

    def hidden(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """What the head sees, [B, T, C]."""
        B, T = tokens.shape
        state = self.start(B) if state is None else state if self.args.ring else state.trimmed()
        x = self.transformer.drop(self.transformer.wte(tokens))
        here = segment(self.args, state, T, x.dtype)
        layers = []
        for block, before in zip(self.transformer.h, state.layers, strict=True):
            x, after = block(x, before, here)
            layers.append(after)
        return self.transformer.ln_f(x), State(state.seen + T, layers)


def load(path: Path | str) -> tuple[GPT, dict]:
    """The model of a published or own `ckpt.pt`, in evaluation mode, and the whole checkpoint."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if beyond := checkpoint["model_args"].keys() - ModelArgs.__dataclass_fields__:
        raise ValueError(f"the trainer supports only the options in options.py, not {', '.join(sorted(beyond))}")
    args = ModelArgs(**checkpoint["model_args"])
    model = GPT(args)
    weights = {key.removeprefix("_orig_mod."): value for key, value in checkpoint["model"].items()}
    if args.tc_layers >= 0:  # published checkpoints hold the idle layers' memories too
        idle = tuple(f"transformer.h.{i}.attn.tc" for i in range(args.n_layer - args.tc_layers))
        weights = {k: v for k, v in weights.items() if not k.startswith(idle) or k in model.state_dict()}
    model.load_state_dict(weights)
    return model.eval(), checkpoint
