"""Tensor Cache: what leaves the window is written into a fixed-size matrix, and read from it.

    y_t = attn_output(local_t) + σ(gate) tc_output(memory_t)        memory_t = Σ_planes mix q̃_t A

A holds one plane per timescale and slot. Each written pair (k̃, v) changes it by the rule's recurrence
(kernels/reference/matrix_memory.py) with decay λ = σ(logit) and write rate η = σ(logit), per key head; without a
write nothing decays. Read comes before write unless write_then_read. Source: docs/mechanisms.md, "Tensor Cache".

| tensor of a layer | shape | what |
|---|---|---|
| `tc_output.*` | [C, H D] | projection of the memory's read |
| `tc_gate.bias`, `.weight` | [1], [C] | gate logit; its weight where it depends on the token |
| `tc_decay`, `tc_rate` | [timescales, G] | logits of decay and write rate, fast first |
| `tc_alpha` | [G] | logit of the slow read's share |
| `tc_slot_keys` | [G, S, D] | router |
| `tc_rate_proj`, `tc_decay_proj` | [G, C] | per-token terms of the logits |
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tcinfer.config import LayerConfig, check_choice, check_count, check_number, check_types
from tcinfer.errors import TcinferError
from tcinfer.kernels.reference.pointwise import sigmoid
from tcinfer.kernels.table import SCAN
from tcinfer.memory import ring
from tcinfer.memory.state import Field
from tcinfer.memory.tensor_cache.equations import DIVIDE, GATE, MIX, UNIT, WRITES

if TYPE_CHECKING:
    from tcinfer.net import Net, Rows

MATRICES = ("A",)
PREFIX = "tc_"
TOP_KEY = "layers"  # of files from before layers could differ: how many of the last ones have a matrix, -1 for all
LEARNED = {
    "gate": "gate",
    "half_life_tokens": "half-life in written tokens",
    "write_rate": "write rate",
    "slow_share": "share of slow reads",
}
OPERATORS = (WRITES, UNIT, MIX, DIVIDE, GATE)


@dataclass(frozen=True)
class Options:
    """Defaults are the published trainer's."""

    rule: str = "delta"  # "outer", "delta" or "wedge"
    write_on_evict: bool = True  # the pair that left the window is written
    write_on_insert: bool = False  # where none was, the current pair is written
    write_then_read: bool = False  # this step's write is seen by this step's read
    slots: int = 1  # matrices per head, chosen by the router
    read_topk: int = 1  # slots that a query reads
    router_temperature: float = 1.0
    write_route: str = "k"  # what chooses the slot written: "k" the key, "q" the current query
    two_timescales: bool = False  # a slow set of matrices beside the fast one
    token_gate: bool = False  # the gate is a function of the token, not one number
    normalize_k: bool = True  # k̃ = k / (‖k‖ + 1e-5)
    normalize_q: bool = False
    normalize_read: bool = False  # divide by max(|q·z|, eps), z the same sum over keys alone
    normalize_read_eps: float = 1.0
    value_scale: float = 1.0
    rope: bool = True  # False: the memory sees q and k before rotation
    token_rate: bool = False  # write rate σ(logit + w·x), x of the token that is written
    token_decay: bool = False  # likewise the decay

    def __post_init__(self) -> None:
        check_types(self)
        check_choice("rule", self.rule, ("outer", "delta", "wedge"))
        check_choice("write_route", self.write_route, ("k", "q"))
        check_count("slots", self.slots, 1)
        check_count("read_topk", self.read_topk, 1)
        check_number("router_temperature", self.router_temperature, 0, above=True)
        check_number("normalize_read_eps", self.normalize_read_eps, 0, above=True)
        check_number("value_scale", self.value_scale, -math.inf)
        if self.normalize_read and (self.slots > 1 or self.two_timescales):
            raise TcinferError("normalize_read goes with one slot and one timescale only")

    @property
    def timescales(self) -> int:
        return 2 if self.two_timescales else 1


def check(layer: LayerConfig) -> None:
    """Raise TcinferError for options that the layer's heads do not allow."""
    o: Options = layer.options
    if o.slots > 1 and o.write_route == "q" and layer.n_heads != layer.n_kv_heads:
        raise TcinferError("write_route 'q' is not defined for grouped queries: several queries would choose one slot")


def state(layer: LayerConfig, capacity: int) -> tuple[Field, ...]:
    """The ring's, A [timescales · slots, G, D, D], z [1, G, D] where reads are normalised, and [ring, G] of each term
    that waits in the ring with its token."""
    o: Options = layer.options
    G, D = layer.n_kv_heads, layer.head_dim
    fields = (*ring.state(layer, capacity), Field("A", (o.timescales * o.slots, G, D, D)))
    if o.normalize_read:
        fields = (*fields, Field("z", (1, G, D)))
    return fields + tuple(Field(name, (fields[0].shape[0], G), by_token=True) for name in _terms(o))


def _terms(o: Options) -> tuple[str, ...]:
    """The per-token terms that wait in the ring with their token until it is written."""
    return ("decay_term",) * o.token_decay + ("rate_term",) * o.token_rate


def wire(net: Net, q: Rows, k: Rows, v: Rows, h: Rows, into: Rows | None) -> Rows:
    """As ring.wire, the gated read of the memory added."""
    layer, C = net.layer, net.config.d_model
    o: Options = layer.options
    H, G, D = layer.n_heads, layer.n_kv_heads, layer.head_dim
    group = {"G": G, "R": H // G, "D": D}
    planes = o.timescales * o.slots
    slot_keys = net.weight("tc_slot_keys", (G, o.slots, D)) if o.slots > 1 else None
    terms = {name: net.project(h, net.weight(f"tc_{name.replace('_term', '_proj')}", (G, C))) for name in _terms(o)}
    new = ring.push(net, q, k, v, rounded=o.write_on_insert, plain=o.write_on_insert and not o.rope)
    queries = new.q if o.rope else q
    if o.normalize_q:
        queries = net.call(UNIT, x=queries, heads=H, width=D)
    pairs = _pairs(net, new, terms) | _back(net) | {"normalize": o.normalize_k, "value_scale": o.value_scale}
    sizes = {"G": G, "D": D, "window": layer.window, "sinks": layer.sinks, "timescales": o.timescales, "slots": o.slots}
    steady = {name: net.weight(f"tc_{name[:-1]}", (o.timescales, G)) for name in ("decays", "rates")}
    by = queries if o.slots > 1 and o.write_route == "q" else None
    route = {"route": by, "slot_keys": slot_keys, "temperature": o.router_temperature}
    wk, wv, decay, rate = net.call(WRITES, **pairs, **sizes, **steady, **route)
    mix = None
    if planes > 1:
        alpha = net.weight("tc_alpha", (G,)) if o.two_timescales else None
        routing = {"slots": o.slots, "topk": o.read_topk, "temperature": o.router_temperature}
        mix = net.call(MIX, q=queries, **group, timescales=o.timescales, **routing, slot_keys=slot_keys, alpha=alpha)
    scanned: dict[str, Any] = {**group, "q": queries, "k": wk, "decay": decay, "rate": rate}
    scanned |= {"write_first": o.write_then_read}
    delta = {"retrieve": net.ones(G) if o.rule == "delta" else None, "wedge": o.rule == "wedge"}
    read = net.call(SCAN, field=net.field("A"), P=planes, E=D, v=wv, mix=mix, **delta, **scanned)
    if o.normalize_read:
        counts = {"P": 1, "E": 1, "v": net.ones(G), "mix": None, "retrieve": None, "wedge": False}
        norm = net.call(SCAN, field=net.field("z"), **counts, **scanned)
        net.call(DIVIDE, x=read, by=norm, heads=H, width=D, eps=o.normalize_read_eps)
    logit = net.project(h, net.weight("tc_gate.weight", (C,))[None]) if o.token_gate else None
    gate = net.call(GATE, logit=logit, bias=net.weight("tc_gate.bias", (1,)))
    out = ring.attend(net, new)
    ring.settle(net, new, k, {name: (rows, G) for name, rows in terms.items()})
    net.contributed(lambda: (net.linear(out, "attn_output", C), net.linear(read, "tc_output", C, gate=gate)))
    y = net.linear(out, "attn_output", C, into)
    return net.linear(read, "tc_output", C, y, gate)


def _pairs(net: Net, new: ring.Entering, terms: dict[str, Rows]) -> dict[str, Any]:
    """Where written pairs come from: those that enter and those that leave, None where they are not written."""
    o: Options = net.layer.options
    G, D = net.layer.n_kv_heads, net.layer.head_dim
    names = ("k", "v", "decay", "rate")
    entering: tuple[Any, ...] = (None,) * 4
    leaving: tuple[Any, ...] = (None,) * 4
    if o.write_on_insert:
        key = new.k if o.rope else new.k_plain
        entering = (key, new.v, terms.get("decay_term"), terms.get("rate_term"))
    if o.write_on_evict and net.layer.window:
        sources = {"k": (new.k_new, G * D), "v": (new.v_new, G * D), **{n: (x, G) for n, x in terms.items()}}
        left = {name: ring.take(net, name, rows, width) for name, (rows, width) in sources.items()}
        leaving = (left["k"], left["v"], left.get("decay_term"), left.get("rate_term"))
    found = {f"entering_{name}": x for name, x in zip(names, entering, strict=True)}
    return found | {f"leaving_{name}": x for name, x in zip(names, leaving, strict=True)}


def _back(net: Net) -> dict[str, Any]:
    """Angles by which leaving keys are turned back, where the memory sees them unrotated."""
    cos, sin = (None, None) if net.layer.options.rope else net.angles(offset=-net.layer.window, inverse=True)
    return {"cos": cos, "sin": sin, "turned": net.geometry.turned, "interleaved": net.geometry.interleaved}


def learned(weights: dict) -> dict[str, Any]:
    """What a layer's weights say of its memory, for `inspect`: its gate, and lists by head of the rest; of decays and
    rates a list for each timescale, the fast one first. What also depends on the token is told without that."""

    def of(name: str) -> Any:
        return sigmoid(weights[name]).tolist() if name in weights else None

    decay = of("tc_decay")
    terms = {"gate": "tc_gate.weight", "half_life_tokens": "tc_decay_proj", "write_rate": "tc_rate_proj"}
    return {
        "gate": of("tc_gate.bias")[0],
        "decay": decay,
        "half_life_tokens": [[_half_life(x) for x in heads] for heads in decay],
        "write_rate": of("tc_rate"),
        "slow_share": of("tc_alpha"),
        "token_dependent": [fact for fact, name in terms.items() if name in weights],
    }


def _half_life(decay: float) -> float | None:
    """Writes after which half is left: ln ½ / ln λ; None where nothing decays."""
    if decay >= 1:
        return None
    return math.log(0.5) / math.log(decay) if decay > 0 else 0.0
