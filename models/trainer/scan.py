"""The memory over a whole sequence: the exact chunk form of Tensor Cache's token-by-token recurrence."""

import torch
from torch import Tensor

RULES = ("delta", "outer", "wedge")


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    rate: Tensor,
    rule: str,
    chunk: int,
    A: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Read then write N pairs; return the reads [B, H, N, D] and the final state A [B, H, D, D].

    Token by token, with decay λ and rate η per head; each read sees the state before its write, as published:

        o_i = q_i A_i
        u_i = η v_i                    (outer)
        u_i = η (v_i − k_i A_i)        (delta: retrieves from the un-decayed state)
        A_{i+1} = λ A_i + k_iᵀ u_i     (wedge: λ A_i + η (k_iᵀ v_i − v_iᵀ k_i))

    A chunk of C tokens, i, j = 0..C−1, from the state A; a_i = λ^i, P_ij = λ^(i−1−j) for j < i, else 0:

        outer: U = η V
        delta: (I + η P∘KKᵀ) U = η (V − diag(a) K A)        one unit lower triangular solve
        O  = diag(a) Q A + (P∘QKᵀ) U
        A' = λ^C A + Kᵀ diag(λ^(C−1−j)) U

    Only non-negative powers of λ are formed. Any split into chunks gives the same result; the last may be
    short. q, k, v: [B, H, N, D]; log_decay (log λ), rate: [H]. Computed in float32; float64 stays float64.
    """
    if rule not in RULES:
        raise ValueError(f"unknown update rule {rule!r}, expected one of {', '.join(RULES)}")
    precision = torch.promote_types(q.dtype, torch.float32)
    q, k, v, log_decay, rate = (x.to(precision) for x in (q, k, v, log_decay, rate))
    if A is None:
        A = q.new_zeros(*q.shape[:2], k.shape[-1], v.shape[-1])  # [B, H, D, D]
    with torch.autocast(q.device.type, enabled=False):
        if rule == "wedge":  # the outer rule for (k, v) less the outer rule for (v, k): both are linear in A
            keyed, A = scan(q, k, v, log_decay, rate, "outer", chunk, A)
            swapped, S = scan(q, v, k, log_decay, rate, "outer", chunk)
            return keyed - swapped, A - S
        reads = []
        for Q, K, V in zip(*(x.split(chunk, dim=2) for x in (q, k, v)), strict=True):
            read, A = _scan_chunk(Q, K, V, log_decay, rate, rule, A)
            reads.append(read)
    return torch.cat(reads, dim=2), A


def _scan_chunk(
    Q: Tensor, K: Tensor, V: Tensor, log_decay: Tensor, rate: Tensor, rule: str, A: Tensor
) -> tuple[Tensor, Tensor]:
    """One chunk of `scan`, in its letters: Q, K, V [B, H, C, D], A [B, H, D, D]."""
    C = Q.shape[2]
    i = torch.arange(C, dtype=Q.dtype, device=Q.device)
    a = _powers(log_decay, i)[..., None]  # [H, C, 1]: λ^i
    P = _powers(log_decay, (i[:, None] - i - 1).clamp(min=0)).tril(-1)  # [H, C, C]: λ^(i−1−j), j < i
    eta = rate[:, None, None]  # [H, 1, 1]

    if rule == "delta":
        L = eta * P * (K @ K.mT)  # [B, H, C, C], strictly lower; the solve takes its diagonal as ones
        U = torch.linalg.solve_triangular(L, eta * (V - a * (K @ A)), upper=False, unitriangular=True)
    else:
        U = eta * V  # [B, H, C, D]

    O = a * (Q @ A) + (P * (Q @ K.mT)) @ U  # noqa: E741
    A = _powers(log_decay, i.new_tensor(C))[..., None, None] * A + (a.flip(1) * K).mT @ U
    return O, A


def _powers(log_decay: Tensor, n: Tensor) -> Tensor:
    """λ^n for every head: log_decay [H], n [...] -> [H, ...]."""
    return torch.exp(log_decay.view(-1, *[1] * n.dim()) * n)
