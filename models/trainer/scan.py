"""The matrix memory over a whole sequence: the exact chunk form of the token-by-token recurrence.

For each pair written, with key k, value v, decay λ, write rate η and retrieval c, and for the query q beside it:

    u_i = η_i (v_i − c_i k_i A_{i−1})        c = 0: outer, wedge;  1: delta;  1 / (φ(k)·z + ε): Infini's delta
    A_i = λ_i A_{i−1} + k_iᵀ u_i             retrieval is from the un-decayed state
          (wedge: + η_i (k_iᵀ v_i − v_iᵀ k_i))
    o_i = q_i A_{i−1}  (read first, as published)   or   q_i A_i  (write first)

Source: docs/mechanisms.md, "Matrix memory" and "Chunk form".
"""

import torch
from torch import Tensor
from torch.nn import functional

CHUNK = 32  # tokens solved together: the longest that stays exact in float32 with strong decay


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    rate: Tensor,
    A: Tensor,
    retrieve: Tensor | None = None,
    wedge: bool = False,
    write_first: bool = False,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """The N reads [B, G, R, N, E], and the state after the last write [B, G, D, E].

    q [B, G, R, N, D]: R query heads to a key head; k [B, G, N, D]; v [B, G, N, E]; A [B, G, D, E]. log_decay (log λ),
    rate (η) and retrieve (c; None is 0) broadcast to [B, G, N]. Any chunk length gives the same result. Computed in
    float32, whatever autocast says; float64 stays float64.

    A chunk of C pairs, i, j = 1..C, with a_i = λ_1 ⋯ λ_i and P_ij = a_i / a_j (never formed by that division):

        (I + L) U0 = diag(η) V,   (I + L) Y = diag(η c a_{i−1}) K       L_ij = η_i c_i P_{i−1,j} k_i·k_j,  j < i
        U  = U0 − Y A_0
        A' = a_C A_0 + Σ_j P_Cj k_jᵀ u_j
        O  = diag(a_i) Q A_0 + (P ∘ Q Kᵀ) U                             j ≤ i; read first: a_{i−1}, P_{i−1,j}, j < i

    Everything but the passing of A from chunk to chunk is done for all chunks at once.
    """
    precision = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, log_decay, rate, A = (x.to(precision) for x in (q, k, v, log_decay, rate, A))
        if wedge:  # the outer rule for (k, v) less the outer rule for (v, k): both are linear in A
            keyed, A = scan(q, k, v, log_decay, rate, A, write_first=write_first, chunk=chunk)
            none = torch.zeros_like(A)
            swapped, S = scan(q, v, k, log_decay, rate, none, write_first=write_first, chunk=chunk)
            return keyed - swapped, A - S
        return _scan(q, k, v, log_decay, rate, A, retrieve, write_first, chunk)


def _scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    rate: Tensor,
    A: Tensor,
    retrieve: Tensor | None,
    write_first: bool,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """`scan` for the rules whose writes are k ⊗ u, all arguments of one precision."""
    N = k.shape[2]
    C = min(chunk, N)

    def chunks(x: Tensor, axis: int) -> Tensor:
        """Axis of length N (1: the same for all) to two, [n, C]; the tail's padding writes nothing."""
        x = x.expand(*x.shape[:axis], N, *x.shape[axis + 1 :])
        padding = (0, 0) * (x.dim() - 1 - axis) + (0, -N % C)
        return functional.pad(x, padding).unflatten(axis, (-1, C))

    Q, K, V = chunks(q, 3), chunks(k, 2), chunks(v, 2)  # [B, G, R, n, C, D], [B, G, n, C, D], [B, G, n, C, E]
    eta = chunks(_three(rate), 2)[..., None]  # [B or 1, G, n, C, 1]
    after = chunks(_three(log_decay), 2).cumsum(-1)  # [B or 1, G, n, C]: log a_i
    before = after - chunks(_three(log_decay), 2)  # log a_{i−1}
    strictly = torch.ones(C, C, dtype=torch.bool, device=q.device).tril(-1)  # j < i
    seen, at = (
        (strictly | torch.eye(C, dtype=torch.bool, device=q.device), after) if write_first else (strictly, before)
    )

    U, Y = eta * V, None
    if retrieve is not None:
        eta = eta * chunks(_three(retrieve.to(k.dtype)), 2)[..., None]
        L = eta * _powers(before, after, strictly) * (K @ K.mT)  # [B, G, n, C, C]
        sides = torch.cat((U, eta * before.exp()[..., None] * K), -1)
        solved = torch.linalg.solve_triangular(L, sides, upper=False, unitriangular=True)
        U, Y = solved.split((V.shape[-1], K.shape[-1]), -1)
    weighted = (K * (after[..., -1:] - after).exp()[..., None]).mT  # [B, G, n, D, C]
    added, whole = weighted @ U, after[..., -1].exp()[..., None, None]  # [B, G, n, D, E], [B or 1, G, n, 1, 1]
    erased = added if Y is None else weighted @ Y  # [B, G, n, D, D]

    starts = []  # A at the start of each chunk
    for kept, gone, come in zip(whole.unbind(2), erased.unbind(2), added.unbind(2), strict=True):
        starts.append(A)
        A = kept * A + come if Y is None else kept * A + come - gone @ A
    state = torch.stack(starts, 2)  # [B, G, n, D, E]
    if Y is not None:
        U = U - Y @ state
    scores = (Q @ K.mT[:, :, None]) * _powers(at, after, seen)[:, :, None]  # [B, G, R, n, C, C]
    reads = at.exp()[:, :, None, ..., None] * (Q @ state[:, :, None]) + scores @ U[:, :, None]
    reads = reads.flatten(3, 4)
    return (reads if N % C == 0 else reads[:, :, :, :N]), A


def _three(x: Tensor) -> Tensor:
    """Leading axes of length 1 up to [B, G, N]."""
    return x[(None,) * (3 - x.dim())]


def _powers(upper: Tensor, lower: Tensor, seen: Tensor) -> Tensor:
    """exp(upper_i − lower_j) where `seen` [C, C], else 0: products of decays, none above 1; [.., C] -> [.., C, C]."""
    exponent = upper[..., :, None] - lower[..., None, :]
    return exponent.masked_fill(~seen, -torch.inf).exp()
