"""Full, window and sinks memory: the first level alone, and what other mechanisms put behind it.

Exact keys and values of the last `window` tokens lie in a ring, sinks beside it (kernels/reference/ring.py). With
sink_positions "in-cache" (StreamingLLM) the query meets the sinks as if it stood at min(t, n + window - 1): the same
scores as keys rotated by their index in the cache, because only the difference of two rotations counts.
Equations: docs/mechanisms.md, "First level".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from tcinfer.config import LayerConfig
from tcinfer.errors import TcinferError
from tcinfer.kernels.table import INSERT, KEEP_LAST, PUSH, TAKE
from tcinfer.memory.state import Field

if TYPE_CHECKING:
    from tcinfer.net import Net, Rows

Options = None
MATRICES: tuple[str, ...] = ()
PREFIX = ""
LEARNED: dict[str, str] = {}


def check(layer: LayerConfig) -> None:
    """Raise TcinferError where the sizes are not those of the memory that the layer names."""
    if layer.memory == "full" and layer.window:
        raise TcinferError("full memory has no window")
    if layer.memory == "window" and layer.sinks:
        raise TcinferError("window memory has no sinks")
    if layer.memory in ("window", "sinks") and not layer.window:
        raise TcinferError(f"{layer.memory} memory needs a window of at least 1 token")


def state(layer: LayerConfig, capacity: int) -> tuple[Field, ...]:
    """k and v [slots, G, D] of the ring's type, sinks in front; with a key convolution k_last [G, D]."""
    slots = layer.sinks + (layer.window or capacity)
    kv = (slots, layer.n_kv_heads, layer.head_dim)
    fields = (Field("k", kv, layer.cache_dtype, by_token=True), Field("v", kv, layer.cache_dtype, by_token=True))
    return (*fields, Field("k_last", kv[1:])) if layer.key_conv else fields


def wire(net: Net, q: Rows, k: Rows, v: Rows, h: Rows, into: Rows | None) -> Rows:
    """q [H · D], k and v [G · D], not rotated, made of h [C]. The layer's output [C], added to `into`."""
    new = push(net, q, k, v)
    out = attend(net, new)
    settle(net, new, k)
    return net.linear(out, "attn_output", net.config.d_model, into)


class Entering(NamedTuple):
    """What queries, keys and values of a pass have become on their way into the ring, in the order in which PUSH makes
    it; None where not asked for."""

    q: Rows  # [H · D] rotated
    q_far: Rows | None  # the same, as they meet the sinks
    k_new: Rows  # [G · D] of the ring's type: convolved where the model does, rotated
    v_new: Rows
    k: Rows | None  # float32 of the same
    v: Rows | None
    k_plain: Rows | None  # float32, convolved, neither rotated nor rounded


def push(net: Net, q: Rows, k: Rows, v: Rows, rounded: bool = False, plain: bool = False) -> Entering:
    """Convolve, rotate, round.  rounded, plain: make k and v, and k_plain."""
    layer, g, (cos, sin), far = net.layer, net.geometry, net.angles(), (None, None)
    if layer.sinks and layer.sink_positions == "in-cache":
        far = net.angles(most=layer.sinks + layer.window - 1)
    taps, last = None, -1
    if layer.key_conv:
        taps = net.weight("attn_key_conv", (layer.key_conv, layer.n_kv_heads, layer.head_dim))
        last = net.field("k_last")
    heads = {"H": g.heads, "G": g.kv_heads, "D": g.head_dim, "half": g.half, "interleaved": g.interleaved}
    turn = {"turned": g.turned, "cos": cos, "sin": sin, "cos_far": far[0], "sin_far": far[1]}
    asked = {"q_far": far[0] is not None, "k_out": rounded, "v_out": rounded, "k_plain": plain or taps is not None}
    skipped = {name: None for name, wanted in asked.items() if not wanted}
    made = iter(net.call(PUSH, q=q, k=k, v=v, **heads, **turn, taps=taps, last=last, **skipped))
    return Entering(*(None if a.name in skipped else next(made) for a in PUSH.arguments if a.output))


def attend(net: Net, new: Entering) -> Rows:
    """Local attention, rows [H · D]."""
    return net.recorder.attention(net.geometry, new, net.field("k"), net.field("v"))


def _token(net: Net, name: str, width: int) -> dict[str, int]:
    """A per-token array of the state, as operators are told of it."""
    layer = net.layer
    at = {"field": net.field(name), "half": net.is_half(name), "width": width}
    return {**at, "window": layer.window, "sinks": layer.sinks}


def take(net: Net, name: str, rows: Rows, width: int) -> Rows:
    """float32 rows of the tokens that leave the window while each row enters it, of a per-token array; what stands in
    the rows of those with none is nothing.  rows [width]: the pass's own."""
    return net.call(TAKE, rows=rows, **_token(net, name, width))


def settle(net: Net, new: Entering, k: Rows, terms: dict[str, tuple[Rows, int]] | None = None) -> None:
    """Last: what stays is written into the ring.  k: as it was pushed; terms: further per-token arrays, their rows and
    widths."""
    width = net.layer.n_kv_heads * net.layer.head_dim
    for name, (rows, size) in {"k": (new.k_new, width), "v": (new.v_new, width), **(terms or {})}.items():
        net.call(INSERT, rows=rows, **_token(net, name, size))
    if net.layer.key_conv:
        net.call(KEEP_LAST, field=net.field("k_last"), x=k, width=width)
