"""The matrix memory: one matrix A per head, written pair by pair and read with one product.

One recurrence serves every rule (docs/mechanisms.md, "Matrix memory"). For each token t, key k, value v, query q:

    u_t = rate_t (v_t - c_t k_t A_{t-1})          c = 0: outer, wedge;  1: delta;  1 / (φ(k)·z + eps): Infini
    A_t = decay_t A_{t-1} + k_t ⊗ u_t             retrieval is from the un-decayed A
          (wedge: + rate_t (k_t ⊗ v_t - v_t ⊗ k_t))
    o_t = q_t A_{t-1}   (read first)   or   q_t A_t   (write first)

Planes (slots, timescales) are a leading axis: each has its own decay and rate, and o = Σ_p mix_p q A_p. A token
that is not written to a plane has decay 1 and rate 0 there. `scan` is the exact chunk form,
`scan_recurrent` the recurrence itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]

CHUNK = 32  # tokens solved together: the longest that stays exact in float32 with strong decay


class Writes(NamedTuple):
    """What T tokens write, and how."""

    k: F32  # [T, G, D]
    v: F32  # [T, G, E]
    decay: F32  # [P, T, G]
    rate: F32  # [P, T, G]
    retrieve: F32 | None = None  # c, [T, G]; None is 0
    wedge: bool = False

    def part(self, s: slice) -> Writes:
        """Those of some of the tokens."""
        c = None if self.retrieve is None else self.retrieve[s]
        return Writes(self.k[s], self.v[s], self.decay[:, s], self.rate[:, s], c, self.wedge)


def scan_recurrent(A: F32, q: F32, writes: Writes, mix: F32 | None = None, write_first: bool = False) -> F32:
    """The recurrence, one token at a time; A is changed in place.

    A [P, G, D, E]: P planes, G key heads; q [T, G, R, D]: R query heads to a key head; mix [P, T, G, R] or None for 1.
    Returns o [T, G, R, E].
    """
    k, v, decay, rate, retrieve, wedge = writes
    out = np.empty((*q.shape[:3], v.shape[-1]), np.float32)
    for t in range(len(q)):
        if not write_first:
            out[t] = _read(A, q[t], None if mix is None else mix[:, t])
        u = v[t]  # [G, E], with retrieval [P, G, E]
        if retrieve is not None:
            u = u - retrieve[t][:, None] * (k[t][:, None, :] @ A)[:, :, 0]
        new = rate[:, t, :, None, None] * (k[t][:, :, None] * u[..., None, :])  # [P, G, D, E]
        if wedge:
            new -= rate[:, t, :, None, None] * (v[t][:, :, None] * k[t][:, None, :])
        A *= decay[:, t, :, None, None]
        A += new
        if write_first:
            out[t] = _read(A, q[t], None if mix is None else mix[:, t])
    return out


def _read(A: F32, q: F32, mix: F32 | None) -> F32:
    """Σ_p mix_p q A_p.  A [P, G, D, E], q [G, R, D], mix [P, G, R] or None; returns [G, R, E]."""
    read = q @ A
    return read.sum(0) if mix is None else (mix[..., None] * read).sum(0)


def scan_rows(
    p: Any,
    field: NDArray,
    P: int,
    G: int,
    R: int,
    D: int,
    E: int,
    q: F32,
    k: F32,
    v: F32,
    decay: F32,
    rate: F32,
    retrieve: F32 | None,
    mix: F32 | None,
    wedge: bool,
    write_first: bool,
) -> F32:
    """`scan` of rows as operators have them: decay and rate [T, P, G], mix [T, P, G, R]; field [P, G, D, E]."""
    decay, rate = (np.moveaxis(x, 1, 0) for x in (decay, rate))
    writes = Writes(k, v, decay, rate, retrieve, wedge)
    A = field.reshape(P, G, D, E)
    return scan(A, q, writes, None if mix is None else np.moveaxis(mix, 1, 0), write_first)


def scan(A: F32, q: F32, writes: Writes, mix: F32 | None = None, write_first: bool = False) -> F32:
    """What scan_recurrent computes, by matrix products over chunks; same arguments, A changed in place."""
    step = _chunk if len(q) > 1 else scan_recurrent
    out = np.empty((*q.shape[:3], writes.v.shape[-1]), np.float32)
    for a in range(0, len(q), CHUNK):
        s = slice(a, a + CHUNK)
        out[s] = step(A, q[s], writes.part(s), None if mix is None else mix[:, s], write_first)
    return out


def _chunk(A: F32, q: F32, writes: Writes, mix: F32 | None, write_first: bool) -> F32:
    """One chunk of T tokens; with g_i = log(decay_1 .. decay_i), and only exponents <= 0 ever formed:

    L_ij = rate_i c_i e^(g_{i-1} - g_j) k_i·k_j  (j < i)       (I + L) U = rate (V - c e^(g_{i-1}) K A_0)
    O_i  = e^(g_r) q_i A_0 + Σ_j e^(g_r - g_j) (q_i·k_j) u_j   r = i, j <= i (write first) or r = i - 1, j < i
    A'   = e^(g_T) A_0 + Σ_j e^(g_T - g_j) k_j ⊗ u_j
    """
    k, v, decay, rate, retrieve, wedge = writes
    T = len(q)
    K, V, Q = k.transpose(1, 0, 2), v.transpose(1, 0, 2), q.transpose(1, 2, 0, 3)  # [G,T,D] [G,T,E] [G,R,T,D]
    eta = rate.transpose(0, 2, 1)[..., None]  # [P, G, T, 1]
    log = np.log(np.maximum(decay.transpose(0, 2, 1), 1e-30, dtype=np.float64))  # [P, G, T]
    after = np.cumsum(log, axis=-1)
    before = after - log
    low = np.tri(T, k=-1, dtype=bool)

    def powers(of: NDArray[np.float64], mask: NDArray[np.bool_]) -> F32:  # e^(of_i - g_j), [P, G, T, T]
        gap = np.where(mask, of[..., :, None] - after[..., None, :], -np.inf)
        return np.exp(gap).astype(np.float32)

    if retrieve is None:
        U = eta * V
    else:
        c = retrieve.T[..., None]  # [G, T, 1]
        L = eta * c * powers(before, low) * (K @ K.transpose(0, 2, 1))
        start = np.exp(before)[..., None].astype(np.float32)
        U = np.linalg.solve(L + np.eye(T, dtype=np.float32), eta * (V - c * start * (K @ A)))
    reach, mask = (after, np.tri(T, dtype=bool)) if write_first else (before, low)
    fade = powers(reach, mask)[:, :, None]  # [P, G, 1, T, T]
    to_end = np.exp(after[..., -1:] - after)[..., None].astype(np.float32)  # [P, G, T, 1]
    out = np.exp(reach)[:, :, None, :, None].astype(np.float32) * (Q @ A[:, :, None])  # [P, G, R, T, E]
    out += ((Q @ K[:, None].swapaxes(-1, -2)) * fade) @ U[:, :, None]
    new = (K[None] * to_end).swapaxes(-1, -2) @ U
    if wedge:
        W = eta * K  # the second outer product: values as keys, keys as values
        out -= ((Q @ V[:, None].swapaxes(-1, -2)) * fade) @ W[:, :, None]
        new -= (V[None] * to_end).swapaxes(-1, -2) @ W
    A *= np.exp(after[..., -1]).astype(np.float32)[..., None, None]
    A += new
    if mix is not None:
        out *= mix.transpose(0, 2, 3, 1)[..., None]
    return out.sum(0).transpose(2, 0, 1, 3)
