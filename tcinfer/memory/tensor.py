"""Tensor Cache (mechanisms.md 1.2): what leaves the window is written into a fixed-size matrix, and read from it.

    y_t = attn_output(local_t) + σ(gate) tc_output(memory_t)        memory_t = Σ_planes mix q̃_t A

A holds one plane per timescale and slot. Each written pair (k̃, v) changes it by the rule's recurrence
(kernels/reference/matrix_memory.py) with decay λ = σ(logit) and write rate η = σ(logit), per key head; without a
write nothing decays. Read comes before write unless write_then_read. Options beyond the published ones are those of
memory-that-works.md section 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tcinfer.config import ModelConfig, check_choice, check_count, check_number, check_types
from tcinfer.errors import TcinferError
from tcinfer.kernels.reference.matrix_memory import Writes
from tcinfer.memory import local
from tcinfer.memory.chunk import Chunk
from tcinfer.memory.state import Field, Spec

if TYPE_CHECKING:
    from tcinfer.kernels.cpu.plan import Rows
    from tcinfer.memory.layer import Layer

F32 = NDArray[np.float32]


MATRICES = ("A",)


@dataclass(frozen=True)
class Options:
    """Defaults are the published trainer's (mechanisms.md 1.2)."""

    rule: str = "delta"  # "outer", "delta" or "wedge"
    layers: int = -1  # -1: every layer has a memory; n: the top n have
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
        check_count("layers", self.layers, -1)
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


def tensors(config: ModelConfig, layer: int) -> dict[str, Spec]:
    o: Options = config.options
    G, D, C = config.n_kv_heads, config.head_dim, config.d_model
    if o.slots > 1 and o.write_route == "q" and config.n_heads != G:
        raise TcinferError("write_route 'q' is not defined for grouped queries: several queries would choose one slot")
    if not enabled(config, layer):
        return {}
    specs = {
        "tc_output.weight": Spec((C, config.n_heads * D), matrix=True),
        "tc_output.bias": Spec((C,), required=False),
        "tc_gate.bias": Spec((1,)),
        "tc_decay": Spec((o.timescales, G)),
        "tc_rate": Spec((o.timescales, G)),
    }
    if o.token_gate:
        specs["tc_gate.weight"] = Spec((C,))
    if o.two_timescales:
        specs["tc_alpha"] = Spec((G,))
    if o.slots > 1:
        specs["tc_slot_keys"] = Spec((G, o.slots, D))
    if o.token_rate:
        specs["tc_rate_proj"] = Spec((G, C))
    if o.token_decay:
        specs["tc_decay_proj"] = Spec((G, C))
    return specs


def enabled(config: ModelConfig, layer: int) -> bool:
    """Whether a layer has a memory: the top `layers` of them, or all."""
    o: Options = config.options
    return o.layers < 0 or layer >= config.n_layers - o.layers


def state(config: ModelConfig, layer: int, capacity: int) -> tuple[Field, ...]:
    o: Options = config.options
    G, D = config.n_kv_heads, config.head_dim
    first = local.state(config, layer, capacity)
    if not enabled(config, layer):
        return first
    fields = (*first, Field("A", (o.timescales * o.slots, G, D, D)))
    if o.normalize_read:
        fields = (*fields, Field("z", (1, G, D)))
    ring = (first[0].shape[0], G)  # one number per cached token and head
    fields += tuple(Field(name, ring) for name in _terms(o))
    return fields


def _terms(o: Options) -> tuple[str, ...]:
    """The per-token terms that wait in the ring with their token until it is written."""
    return ("decay_term",) * o.token_decay + ("rate_term",) * o.token_rate


def attend(chunk: Chunk, w: dict[str, Any], state: dict[str, NDArray], q: F32, k: F32, v: F32, x: F32) -> F32:
    near = local.push(chunk, w, state, q, k, v)
    y = chunk.linear(local.merge(near.out), w, "attn_output")
    if "tc_output.weight" not in w:  # a layer below the top `layers`
        return y
    ops, o = chunk.ops, chunk.config.options
    queries = near.q if o.rope else q
    if o.normalize_q:
        queries = ops.unit(queries)
    queries = queries.reshape(*k.shape[:2], -1, k.shape[-1])  # [T, G, R, D]
    writes = _writes(chunk, w, state, near, x)
    mix = None
    if o.slots > 1:
        writes = _route_write(chunk, w, writes.k if o.write_route == "k" else queries[:, :, 0], writes)
        mix = _route_read(chunk, w, queries)
    if o.two_timescales:
        slow = ops.sigmoid(w["tc_alpha"])[:, None]  # [G, 1]
        fast = np.ones((o.slots, *queries.shape[:3]), np.float32) if mix is None else mix
        mix = np.concatenate([fast, slow * fast])
    read = ops.scan(state["A"], queries, writes, mix, o.write_then_read)  # [T, G, R, D]
    if o.normalize_read:
        counts = writes._replace(v=np.ones((*v.shape[:2], 1), np.float32), retrieve=None, wedge=False)
        norm = ops.scan(state["z"][..., None], queries, counts, write_first=o.write_then_read)
        read = read / np.maximum(np.abs(norm), np.float32(o.normalize_read_eps))
    gate = w["tc_gate.bias"] if not o.token_gate else (x @ w["tc_gate.weight"])[:, None] + w["tc_gate.bias"]
    far = ops.sigmoid(gate) * chunk.linear(local.merge(read), w, "tc_output")
    chunk.contributed(y, far)
    return y + far


def _writes(chunk: Chunk, w: dict[str, Any], state: dict[str, NDArray], near: local.Pushed, x: F32) -> Writes:
    """The pair that each token of the chunk writes; decay and rate [timescales, T, G].

    Where a token writes none, decay is 1 and rate 0.
    """
    config, ops, T = chunk.config, chunk.ops, chunk.count
    o: Options = config.options
    out = near.evicted.total  # the last `out` tokens of the chunk each evict one
    written = np.full(T, o.write_on_insert)
    terms = {
        name: x @ w["tc_" + name.replace("_term", "_proj")].T for name in _terms(o)
    }  # [T, G] of the tokens entering
    left = {name: near.evicted.take(state[name], term) for name, term in terms.items()}
    for name, term in terms.items():
        local.insert(chunk, state[name], term)
    keys, values = (near.k if o.rope else near.k_plain).copy(), near.v.copy()
    if o.write_on_evict and out:
        written[-out:] = True
        keys[-out:] = near.k_out if o.rope else chunk.rotate(near.k_out, near.evicted.first, back=True)
        values[-out:] = near.v_out
        for name in terms:
            terms[name][-out:] = left[name]
    if o.normalize_k:
        keys = ops.unit(keys)
    if o.value_scale != 1:
        values *= np.float32(o.value_scale)
    decay = ops.sigmoid(w["tc_decay"][:, None] + terms.get("decay_term", np.float32(0)))  # [timescales, T or 1, G]
    rate = ops.sigmoid(w["tc_rate"][:, None] + terms.get("rate_term", np.float32(0)))
    on = written[:, None]
    retrieve = np.ones(keys.shape[:2], np.float32) if o.rule == "delta" else None
    return Writes(keys, values, _where(on, decay, 1), _where(on, rate, 0), retrieve, o.rule == "wedge")


def _where(written: NDArray[np.bool_], value: F32, otherwise: float) -> F32:
    out: F32 = np.full(np.broadcast_shapes(written.shape, value.shape), otherwise, np.float32)
    np.copyto(out, value, where=written)
    return out


def _logits(chunk: Chunk, w: dict[str, Any], x: F32) -> F32:
    """Router logits cos(x, slot key) / (√D τ).  x [.., G, R, D]; returns [.., G, R, S]."""
    unit = chunk.ops.unit
    D = x.shape[-1]
    keys = unit(w["tc_slot_keys"])[:, None]  # [G, 1, S, D]
    # Not a matrix product: there equal slots could differ in the last bit, and the first would not always win.
    cos: F32 = (unit(x)[..., None, :] * keys).sum(-1)
    return cos / np.float32(math.sqrt(D) * chunk.config.options.router_temperature)


def _route_write(chunk: Chunk, w: dict[str, Any], x: F32, writes: Writes) -> Writes:
    """Only the slot that x [T, G, D] is nearest to is written: decay and rate [timescales · S, T, G]."""
    best = np.argmax(_logits(chunk, w, x[:, :, None]), axis=-1)[..., 0]  # [T, G]
    hit = best == np.arange(chunk.config.options.slots)[:, None, None]  # [S, T, G]
    planes = (-1, *best.shape)
    return writes._replace(
        decay=_where(hit, writes.decay[:, None], 1).reshape(planes),
        rate=_where(hit, writes.rate[:, None], 0).reshape(planes),
    )


def _route_read(chunk: Chunk, w: dict[str, Any], queries: F32) -> F32:
    """Softmax over a query's `read_topk` best slots.  queries [T, G, R, D]; returns [S, T, G, R]."""
    logits = _logits(chunk, w, queries)
    S, topk = chunk.config.options.slots, chunk.config.options.read_topk
    if topk < S:
        order = np.argsort(-logits, axis=-1, kind="stable")[..., topk:]  # ties: the first slot wins
        np.put_along_axis(logits, order, np.float32(-np.inf), axis=-1)
    return np.moveaxis(chunk.ops.softmax(logits), -1, 0)


def plan(layer: Layer, q: Rows, k: Rows, v: Rows, h: Rows) -> None:
    from tcinfer.kernels.cpu import matrix_memory
    from tcinfer.kernels.cpu import tensor_cache as tc

    if not enabled(layer.config, layer.number):
        local.plan(layer, q, k, v, h)
        return
    config, w, p = layer.config, layer.weights, layer.plan
    o: Options = config.options
    G, D = config.n_kv_heads, config.head_dim
    R = config.n_heads // G
    terms = {name: layer.project(h, w["tc_" + name.replace("_term", "_proj")]) for name in _terms(o)}
    new = layer.push(q, k, v, rounded=o.write_on_insert, plain=o.write_on_insert and not o.rope)
    entering, leaving = None, None
    if o.write_on_insert:
        key = new.k if o.rope else new.k_plain
        assert key is not None
        assert new.v is not None
        entering = tc.Source(key, new.v, **terms)
    if o.write_on_evict and config.window:
        k_out, v_out = (layer.take(n, at, new.stride, G * D) for n, at in (("k", new.k_new), ("v", new.v_new)))
        left = {name: layer.take(name, x.address, x.stride, G) for name, x in terms.items()}
        leaving = tc.Source(k_out, v_out, **left)
        p.wait()
    queries = new.q if o.rope else q
    if o.normalize_q:
        queries = tc.unit(p, queries, D)
    route = None
    if o.slots > 1 and o.write_route == "q":
        route = queries
    slot_keys = w.get("tc_slot_keys")
    writes = tc.writes(
        p,
        (G, D, o.timescales, o.slots),
        entering,
        leaving,
        (config.window, config.sinks),
        (0, 0) if o.rope else layer.positions.leaving,
        layer.geometry.interleaved,
        w["tc_decay"],
        w["tc_rate"],
        normalize=o.normalize_k,
        value_scale=o.value_scale,
        rule=o.rule,
        slot_keys=slot_keys,
        temperature=o.router_temperature,
        route=route,
    )
    mix = None
    if o.slots > 1 or o.two_timescales:
        routing = (o.timescales, o.slots, o.read_topk, o.router_temperature)
        mix = tc.mix(p, queries, (G, R, D), *routing, slot_keys, w.get("tc_alpha"))
    planes = o.timescales * o.slots
    read = matrix_memory.scan(
        p, layer.field("A"), planes, (G, R, D, D), queries, writes, mix, write_first=o.write_then_read
    )
    if o.normalize_read:
        counts = writes._replace(v=tc.ones(p, G), retrieve=None, wedge=False)
        norm = matrix_memory.scan(p, layer.field("z"), 1, (G, R, D, 1), queries, counts, write_first=o.write_then_read)
        tc.divide(p, read, norm, D, o.normalize_read_eps)
    logit = layer.project(h, w["tc_gate.weight"][None]) if o.token_gate else None
    gate = tc.gate(p, w["tc_gate.bias"], logit)
    out = layer.attend(new)
    layer.settle(new, k, terms)
    layer.linear(out, "attn_output", into=layer.x)
    layer.linear(read, "tc_output", into=layer.x, gate=gate)
