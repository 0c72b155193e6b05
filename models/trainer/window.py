"""The window (L1) over a stream that arrives in segments, and where a mechanism that remembers more joins it.

Whole segments of T tokens are computed at once, and give exactly what one token after another gives: the query at
position t sees the sinks and the last W keys, its own included. State crosses from segment to segment.

Every stream has positions of its own, from 0: what the wedge and Infini remember depends on them, not only on their
differences.
"""

from dataclasses import dataclass

import torch
from options import ModelArgs
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


class Attention(nn.Module):
    """Exact attention to the window. A mechanism overrides what it adds: nothing is added here."""

    remembers = False  # whether it keeps what has left the window (tensor_cache.py)

    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        self.args = args
        C, H, G, D = args.n_embd, args.n_head, args.kv_heads, args.head_dim
        self.c_attn = nn.Linear(C, (H + 2 * G) * D, bias=False)
        self.c_proj = nn.Linear(H * D, C, bias=False)
        self.add_memory(layer)
        if args.key_conv:
            self.key_conv = KeyConvolution(args)

    def add_memory(self, layer: int) -> None:
        """Parameters of the mechanism, by their published names."""

    def empty(self, B: int, like: Tensor) -> dict[str, Tensor]:
        """What the mechanism carries of B streams that have seen nothing."""
        return {}

    def carried(self, x: Tensor, plain: Tensor) -> dict[str, Tensor]:
        """What of each token stays in the window beside key and value: of x [B, T, C] and keys that are not rotated."""
        return {}

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, local: Tensor, state: dict[str, Tensor], new: dict[str, Tensor]):
        """What the heads give [B, H, T, D], of what local attention gives."""
        return local

    def behind(
        self,
        x: Tensor,
        queries: dict[str, Tensor],
        left: dict[str, Tensor],
        state: dict[str, Tensor],
        new: dict[str, Tensor],
    ) -> Tensor | None:
        """What is added to the layer's output [B, T, C], or None.

        queries [B, H, T, D]: "rotated" and "plain"; left: of the tokens that have left the window what it carried, and
        whether there was one, "valid" [B, T]; empty where nothing ever leaves.
        """
        return None

    def start(self, B: int, like: Tensor) -> dict[str, Tensor]:
        """The state of a layer that has seen nothing."""
        args, G, D = self.args, self.args.kv_heads, self.args.head_dim
        ring = {name: like.new_zeros(B, G, args.ring, D) for name in ("k", "v")}  # full attention: [B, G, 0, D]
        if args.kv_num_sinks:
            ring |= {name: like.new_zeros(B, G, args.kv_num_sinks, D) for name in ("sink_k", "sink_v")}
        if args.key_conv:
            ring["last"] = like.new_zeros(B, G, 1, D)
        return ring | self.empty(B, like)

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
        queries, plain = {"plain": q}, k
        q, k = rotate(q, here, args.interleaved), rotate(k, here, args.interleaved)
        queries["rotated"] = q

        entering = {"k": k, "v": v} | self.carried(x, plain)
        left = {}
        if args.ring:
            earlier = {name: before(state[name], x) for name, x in entering.items()}
            new |= {name: last(state[name], x) for name, x in entering.items()}
            sinks = self.sinks(k, v, state, here, new) if args.kv_num_sinks else []
            local = window_attention(q, k, v, earlier, sinks, here.mask, args.ring)
            left = {name: x[:, :, :T] if x.shape[2] > T else x for name, x in earlier.items()}
            left["valid"] = here.valid[:, :T]
        else:  # nothing ever leaves
            new |= {name: torch.cat((state[name], x), 2) for name, x in entering.items()}
            local = local_attention(q, new["k"], new["v"], here.mask)
        local = self.mixed(q, k, v, local, state, new)
        y = self.c_proj(local.transpose(1, 2).flatten(2))
        more = self.behind(x, queries, left, state, new)
        return (y if more is None else y + more), new

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
