"""What a layer remembers of a stream that arrives in segments: the window (L1) and what lies behind it (L2).

Whole segments of T tokens are computed at once, and give exactly what one token after another gives: the query at
position t sees the sinks and the last W keys, its own included; the memory it reads holds exactly what had left the
window by then, with exactly the decay that streaming applies. State crosses from segment to segment.

Every stream has positions of its own, from 0: what the wedge and Infini remember depends on them, not only on their
differences.
"""

from dataclasses import dataclass

import torch
from options import ModelArgs
from scan import scan
from torch import Tensor, nn
from torch.nn import functional

EPS = 1e-5  # beside norms and normalisers, as published
SUMS = ("A", "z", "last")  # what a layer carries that starts at zero; the ring is known by its valid places


@dataclass
class State:
    """What crosses from one segment to the next."""

    seen: Tensor  # [B] tokens of each stream so far
    layers: list[dict[str, Tensor]]

    def detached(self) -> "State":
        """The same numbers without their history (truncated backpropagation)."""
        layers = [{name: x.detach() for name, x in layer.items()} for layer in self.layers]
        return State(self.seen, layers)

    def trimmed(self) -> "State":
        """The same without the keys that no stream sees any more; for full attention."""
        kept = int(self.seen.max())
        rings = ("k", "v", "plain", "rate", "decay")

        def cut(name: str, x: Tensor) -> Tensor:
            return x[:, :, x.shape[2] - kept :] if name in rings else x

        return State(self.seen, [{name: cut(name, x) for name, x in layer.items()} for layer in self.layers])

    def restarted(self, fresh: Tensor) -> "State":
        """The same, but the streams where fresh [B] is True have seen nothing."""

        def cleared(name: str, x: Tensor) -> Tensor:
            return x.masked_fill(fresh.view(-1, *[1] * (x.dim() - 1)), 0) if name in SUMS else x

        layers = [{name: cleared(name, x) for name, x in layer.items()} for layer in self.layers]
        return State(self.seen.masked_fill(fresh, 0), layers)


@dataclass
class Segment:
    """What all layers share of a segment of T tokens that follows R remembered ones."""

    cos: Tensor  # [B, 1, T, D/2]
    sin: Tensor
    seen: Tensor  # [B]
    valid: Tensor  # [B, R + T] whether a key is one of the stream's own
    mask: Tensor  # what local attention adds to the scores


def segment(args: ModelArgs, state: State, T: int, dtype: torch.dtype) -> Segment:
    device, seen = state.seen.device, state.seen
    half = torch.arange(0, args.head_dim, 2, dtype=torch.float64, device=device)
    place = seen[:, None, None, None] + torch.arange(T, device=device)[:, None]  # [B, 1, T, 1]
    angle = place * args.rope_base ** (-half / args.head_dim)  # [B, 1, T, D/2]
    R = state.layers[0]["k"].shape[2]
    position = seen[:, None] - R + torch.arange(R + T, device=device)  # [B, R + T] of the keys in their streams
    n, W = args.kv_num_sinks, args.ring
    valid = position >= n
    if W:
        blocks = -(-T // W)
        keys = functional.pad(valid, (0, blocks * W - T)).unfold(1, 2 * W, W)  # [B, blocks, 2W]
        i, j = torch.arange(W, device=device)[:, None], torch.arange(2 * W, device=device)
        visible = ((i < j) & (j <= i + W)) & keys[:, :, None]  # [B, blocks, W, 2W]
        if n:
            query = functional.pad(position[:, R:], (0, blocks * W - T)).view(-1, blocks, W, 1)
            visible = torch.cat((torch.arange(n, device=device) <= query, visible), -1)  # [B, blocks, W, n + 2W]
        visible = visible.flatten(0, 1)[:, None]  # [B · blocks, 1, W, ..]
        # a padded query may see nothing: let it see all, its output is dropped
        visible = visible | ~visible.any(-1, keepdim=True)
    else:
        causal = torch.arange(R + T, device=device) <= R + torch.arange(T, device=device)[:, None]
        visible = (causal & valid[:, None])[:, None]  # [B, 1, T, R + T]
    mask = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill(~visible, -torch.inf)
    return Segment(angle.cos().to(dtype), angle.sin().to(dtype), seen, valid, mask)


def rotate(x: Tensor, here: Segment, interleaved: bool) -> Tensor:
    """Each pair of channels turned by its angle: pairs (0,1)(2,3).. or (0,D/2)(1,D/2+1)... x: [B, H, T, D]."""
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
    else:
        a, b = x.chunk(2, -1)
    cos, sin = here.cos.to(x.dtype), here.sin.to(x.dtype)
    turned = (a * cos - b * sin, a * sin + b * cos)
    return torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)


def before(ring: Tensor, new: Tensor) -> Tensor:
    """The tokens that stand W places before those of `new`, in whole windows.

    ring [B, G, W, ..], the last W tokens; new [B, G, T, ..]. Returns [B, G, T', ..], T' the next multiple of W: the
    first T have left the window when the new ones are in it.
    """
    W, T = ring.shape[2], new.shape[2]
    return torch.cat((ring, new[:, :, : -(-T // W) * W - W]), 2)


def last(ring: Tensor, new: Tensor) -> Tensor:
    """The ring after the new tokens; all of them where it is unbounded."""
    W, T = ring.shape[2], new.shape[2]
    return new[:, :, T - W :] if T >= W else torch.cat((ring[:, :, T:], new), 2)


def local_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention: q [B, H, T, D]; k, v [B, G, S, D]; mask [B, 1, T, S] is added to the scores."""
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    if q.is_cuda:
        return functional.scaled_dot_product_attention(q, k, v, mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.mT + mask  # on a CPU twice as fast as the fused form, for windows
    return scores.softmax(-1) @ v


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, earlier: dict[str, Tensor], sinks: list[Tensor], mask: Tensor, W: int
) -> Tensor:
    """Attention to the sinks and the last W keys, W queries at a time; q [B, H, T, D], k and v [B, G, T, D].

    `earlier` holds keys and values of the windows before [B, G, T', D], `sinks` those of the sinks, [B, G, n, D].
    """
    T, rest = q.shape[2], -q.shape[2] % W

    def blocks(x: Tensor) -> Tensor:
        """[B, G, T, D] -> [B · T'/W, G, W, D]."""
        x = functional.pad(x, (0, 0, 0, W * (-(-T // W)) - x.shape[2])) if x.shape[2] % W else x
        return x.unflatten(2, (-1, W)).transpose(1, 2).flatten(0, 1)

    many = (T + rest) // W
    fixed = [x.repeat_interleave(many, 0) for x in sinks] or [q.new_zeros(0)] * 2
    keys, values = (
        torch.cat([f, blocks(old), blocks(new)] if sinks else [blocks(old), blocks(new)], 2)
        for f, old, new in zip(fixed, (earlier["k"], earlier["v"]), (k, v), strict=True)
    )
    out = local_attention(blocks(q), keys, values, mask)  # [B · T'/W, H, W, D]
    out = out.unflatten(0, (-1, many)).transpose(1, 2).flatten(2, 3)
    return out[:, :, :T] if rest else out


def unit(x: Tensor) -> Tensor:
    """x / (‖x‖ + 1e-5) along the last axis, as published (the norm plus eps, not their maximum)."""
    return x / (x.norm(dim=-1, keepdim=True) + EPS)


class KeyConvolution(nn.Module):
    """k'_t = w_0 k_t + w_1 k_{t−1} per head and channel, before rotation; k_{−1} = 0."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 0.5])[:, None, None] + 0.05 * torch.randn(2, args.kv_heads, args.head_dim)
        self.weight = nn.Parameter(taps)

    def forward(self, k: Tensor, last: Tensor) -> Tensor:
        """k [B, G, T, D]; last [B, G, 1, D]: the unconvolved key before it."""
        w0, w1 = self.weight[:, :, None].to(k.dtype)  # [G, 1, D]
        return w0 * k + w1 * torch.cat((last, k[:, :, :-1]), 2)


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


class Attention(nn.Module):
    """Exact attention to the window, and the memory behind it: c_proj(local) + gate · tc_proj(memory)."""

    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        self.args = args
        C, H, G, D = args.n_embd, args.n_head, args.kv_heads, args.head_dim
        self.c_attn = nn.Linear(C, (H + 2 * G) * D, bias=False)
        self.c_proj = nn.Linear(H * D, C, bias=False)
        self.remembers = args.tc_enabled and not args.infini_enabled
        if self.remembers:
            self.tc_proj = nn.Linear(H * D, C, bias=False)
            self.remembers = args.tc_layers < 0 or layer >= args.n_layer - args.tc_layers
        if self.remembers:
            self.tc = TensorCache(args)
            if args.tc_per_token_gate:
                self.tc_gate_proj = nn.Linear(C, 1)
                nn.init.constant_(self.tc_gate_proj.bias, args.tc_gate_init)
            else:
                self.tc_gate = nn.Parameter(torch.tensor([args.tc_gate_init]))
        if args.infini_enabled:
            self.infini = Infini(args)
        if args.key_conv:
            self.key_conv = KeyConvolution(args)

    def start(self, B: int, like: Tensor) -> dict[str, Tensor]:
        """The state of a layer that has seen nothing."""
        args, G, D = self.args, self.args.kv_heads, self.args.head_dim
        ring = {name: like.new_zeros(B, G, args.ring, D) for name in ("k", "v")}  # full attention: [B, G, 0, D]
        if self.remembers and not args.tc_rope:
            ring["plain"] = ring["k"]
        if self.remembers:
            ring |= {name: like.new_zeros(B, G, args.ring) for name in self.tc.terms(like.new_zeros(B, 1, args.n_embd))}
        if args.kv_num_sinks:
            ring |= {name: like.new_zeros(B, G, args.kv_num_sinks, D) for name in ("sink_k", "sink_v")}
        if args.key_conv:
            ring["last"] = like.new_zeros(B, G, 1, D)
        if self.remembers or args.infini_enabled:
            ring["A"] = like.new_zeros(B, G, D, D)
        if args.infini_enabled:
            ring["z"] = like.new_zeros(B, G, D)
        return ring

    def forward(self, x: Tensor, state: dict[str, Tensor], here: Segment) -> tuple[Tensor, dict[str, Tensor]]:
        """x [B, T, C], the layer's state before it; what to add to the residual, the state after."""
        args, T = self.args, x.shape[1]
        H, G = args.n_head, args.kv_heads
        heads = self.c_attn(x).unflatten(-1, (-1, args.head_dim)).transpose(1, 2)
        q, k, v = heads.split((H, G, G), 1)  # [B, heads, T, D]
        new = {}
        if args.key_conv:
            new["last"] = k[:, :, -1:]
            k = self.key_conv(k, state["last"])
        q_plain, plain = q, k
        q, k = rotate(q, here, args.interleaved), rotate(k, here, args.interleaved)

        entering = {"k": k, "v": v} | ({"plain": plain} if "plain" in state else {})
        entering |= self.tc.terms(x) if self.remembers else {}
        if args.ring:
            earlier = {name: before(state[name], x) for name, x in entering.items()}
            new |= {name: last(state[name], x) for name, x in entering.items()}
            sinks = self.sinks(k, v, state, here, new) if args.kv_num_sinks else []
            local = window_attention(q, k, v, earlier, sinks, here.mask, args.ring)
        else:  # nothing ever leaves
            new |= {name: torch.cat((state[name], x), 2) for name, x in entering.items()}
            local = local_attention(q, new["k"], new["v"], here.mask)
        if args.infini_enabled:
            local, new["A"], new["z"] = self.infini(q, k, v, state["A"], state["z"], local)
        y = self.c_proj(local.transpose(1, 2).flatten(2))
        if self.remembers and args.ring:
            left = {name: x[:, :, :T] if x.shape[2] > T else x for name, x in earlier.items()}
            query, key = (q, left["k"]) if args.tc_rope else (q_plain, left["plain"])
            reads, new["A"] = self.tc(query, key, left["v"], left, here.valid[:, :T], state["A"])
            gate = self.tc_gate_proj(x) if args.tc_per_token_gate else self.tc_gate
            y = y + gate.sigmoid() * self.tc_proj(reads.transpose(1, 2).flatten(2))
        elif self.remembers:
            new["A"] = state["A"]
        return y, new

    def sinks(
        self, k: Tensor, v: Tensor, state: dict[str, Tensor], here: Segment, new: dict[str, Tensor]
    ) -> list[Tensor]:
        """The first n keys and values of each stream [B, G, n, D]: those kept, or those that arrive now."""
        n, T = self.args.kv_num_sinks, k.shape[2]
        at = torch.arange(n, device=k.device) - here.seen[:, None]  # [B, n]: where in this segment
        arrives = ((at >= 0) & (at < T))[:, None, :, None]
        at = at.clamp(0, T - 1)[:, None, :, None]
        for name, x in (("sink_k", k), ("sink_v", v)):
            arriving = x.gather(2, at.expand(-1, x.shape[1], -1, x.shape[3]))
            new[name] = torch.where(arrives, arriving, state[name])
        return [new["sink_k"], new["sink_v"]]
