"""What Tensor Cache memory adds to ring and matrix: which pair a row writes and how, and how queries read.

Compiled: compiled.py, cuda.cu. Source: docs/mechanisms.md, "Tensor Cache".
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tcinfer.kernels.operators import Operator
from tcinfer.kernels.reference import pointwise
from tcinfer.kernels.reference.attention import softmax
from tcinfer.kernels.reference.pointwise import sigmoid
from tcinfer.kernels.reference.rotary import rotate

F32 = NDArray[np.float32]
HOME = "tcinfer.memory.tensor_cache"


def writes(
    p: Any,
    entering_k: F32 | None,
    entering_v: F32 | None,
    entering_decay: F32 | None,
    entering_rate: F32 | None,
    leaving_k: F32 | None,
    leaving_v: F32 | None,
    leaving_decay: F32 | None,
    leaving_rate: F32 | None,
    G: int,
    D: int,
    window: int,
    sinks: int,
    timescales: int,
    slots: int,
    normalize: bool,
    value_scale: float,
    temperature: float,
    cos: F32 | None,
    sin: F32 | None,
    turned: int,
    interleaved: bool,
    decays: F32,
    rates: F32,
    slot_keys: F32 | None,
    route: F32 | None,
) -> tuple[F32, F32, F32, F32]:
    """The pair that each row writes: the one that leaves the window, where one does, else the one that enters.

    k and v [T, G, D] of both, None where such pairs are not written; _decay, _rate [T, G]: terms of their logits; cos,
    sin [T, turned / 2]: angles by which leaving keys are turned back, or None; decays, rates [timescales, G]: logits;
    slot_keys [G, slots, D]; route [T, G, D]: what chooses the slot instead of the key. Returns k and v [T, G, D],
    decay and rate [T, timescales, slots, G]: 1 and 0 where a row writes nothing, and of slots that it does not choose.
    """
    T = p.count
    left = np.zeros(T, bool) if leaving_k is None else p.positions - window >= sinks
    written = left if entering_k is None else np.ones(T, bool)
    if leaving_k is not None and cos is not None and sin is not None:
        leaving_k = rotate(leaving_k, cos[:, None], -sin[:, None], "interleaved" if interleaved else "half")

    def chosen(entering: F32 | None, leaving: F32 | None) -> F32:  # [T, ..] of what each row writes, else zeros
        shape = next(x.shape[1:] for x in (entering, leaving) if x is not None)
        out = np.zeros((T, *shape), np.float32)
        for rows, source in ((~left, entering), (left, leaving)):
            if source is not None:
                out[rows] = source[rows]
        return out

    if entering_k is None and leaving_k is None:
        k = v = np.zeros((T, G, D), np.float32)
    else:
        k, v = chosen(entering_k, leaving_k), chosen(entering_v, leaving_v) * np.float32(value_scale)
    if normalize:
        k = pointwise.unit(k)
    terms = [
        chosen(a, b) if a is not None or b is not None else np.zeros((T, G), np.float32)
        for a, b in ((entering_decay, leaving_decay), (entering_rate, leaving_rate))
    ]
    on = np.broadcast_to(written[:, None, None], (T, slots, G))
    if slots > 1:
        assert slot_keys is not None
        choosing = route if route is not None else k
        best = np.argmax(cosines(choosing[:, :, None], slot_keys, temperature), axis=-1)[..., 0]  # [T, G]
        on = on & (best[:, None] == np.arange(slots)[:, None])
    decay, rate = (
        np.where(on[:, None], sigmoid(logits[None] + term[:, None])[:, :, None], np.float32(otherwise))
        for logits, term, otherwise in ((decays, terms[0], 1), (rates, terms[1], 0))
    )
    return k, v, decay, rate


def cosines(x: F32, slot_keys: F32, temperature: float) -> F32:
    """Router logits cos(x, slot key) / (√D τ).  x [.., G, R, D], slot_keys [G, S, D]; returns [.., G, R, S]."""
    keys = pointwise.unit(slot_keys)[:, None]  # [G, 1, S, D]
    # Not a matrix product: there equal slots could differ in the last bit, and the first would not always win.
    cos: F32 = (pointwise.unit(x)[..., None, :] * keys).sum(-1)
    return cos / np.float32(math.sqrt(x.shape[-1]) * temperature)


def unit(p: Any, x: F32, heads: int, width: int) -> F32:
    """Each head divided by its norm.  x [T, heads, width]."""
    return pointwise.unit(x)


def mix(
    p: Any,
    q: F32,
    G: int,
    R: int,
    D: int,
    timescales: int,
    slots: int,
    topk: int,
    temperature: float,
    slot_keys: F32 | None,
    alpha: F32 | None,
) -> F32:
    """How much of each plane a query reads, [T, timescales, slots, G, R].

    Softmax over a query's `topk` best slots, of equal ones the first; σ(alpha) of the slow ones. q [T, G, R, D],
    slot_keys [G, slots, D], alpha [G].
    """
    shares = np.ones((slots, *q.shape[:3]), np.float32)
    if slots > 1:
        assert slot_keys is not None
        logits = cosines(q, slot_keys, temperature)  # [T, G, R, S]
        if topk < slots:
            order = np.argsort(-logits, axis=-1, kind="stable")[..., topk:]
            np.put_along_axis(logits, order, np.float32(-np.inf), axis=-1)
        shares = np.moveaxis(softmax(logits), -1, 0)
    planes = [shares]
    if timescales == 2:
        assert alpha is not None
        planes.append(sigmoid(alpha)[:, None] * shares)
    return np.moveaxis(np.stack(planes), 2, 0)


def divide(p: Any, x: F32, by: F32, heads: int, width: int, eps: float) -> None:
    """x [T, heads, width] /= max(|by [T, heads]|, eps), in place."""
    x /= np.maximum(np.abs(by), np.float32(eps))[..., None]


def gate(p: Any, logit: F32 | None, bias: F32) -> F32:
    """σ(logit + bias) of each row, [T, 1].  logit [T, 1] or None for 0, bias [1]."""
    return sigmoid(np.broadcast_to(bias, (p.count, 1)) if logit is None else logit + bias)


SOURCE = "{0}_k<G.D {0}_v<G.D {0}_decay<G {0}_rate<G"
WRITES = Operator(
    "writes",
    f"{SOURCE.format('entering')} {SOURCE.format('leaving')} G D window sinks timescales slots normalize value_scale:f "
    "temperature:f cos< sin< turned interleaved decays rates slot_keys route<G.D "
    "k>G.D v>G.D decay>timescales.slots.G rate>timescales.slots.G work~slots.G",
    HOME,
    writes,
    by_head=True,
    shared=lambda a, warps: 4 * a["slots"],
)
UNIT = Operator("unit", "x<heads.width heads width y>heads.width", HOME, unit, by_head=True)
MIX = Operator(
    "mix",
    "q<G.R.D G R D timescales slots topk temperature:f slot_keys alpha mix>timescales.slots.G.R work~2.slots.G.R",
    HOME,
    mix,
    by_head=True,
    shared=lambda a, warps: 8 * a["slots"],
)
DIVIDE = Operator("divide", "x<>heads.width by<heads heads width eps:f", HOME, divide, by_head=True)
GATE = Operator("gate", "logit<1 bias gate>1", HOME, gate, by_head=True)
