"""What one matrix holds of random pairs, and what is left of them where chunks are written as means."""

import torch
from scan import scan
from torch.nn import functional

WIDTH = 64
Figure = tuple[float, float]  # mean, standard error


def held(
    pairs: int, rule: str, seed: int, rate: float = 1.0, alike: bool = False, chunk: int = 1, D: int = WIDTH
) -> Figure:
    """The share of random unit keys for which A returns what is nearest to their own value, without decay.

    alike: every two keys have cosine 1/2. chunk > 1: one write of the mean key and the mean value of so many pairs, as
    the published training of two timescales does ("Tensor Cache" in docs/mechanisms.md): 1/C² of all C² products
    k_i ⊗ v_j, right or not.
    """
    numbers = torch.Generator().manual_seed(seed)
    trials = 32
    k, v = (functional.normalize(torch.randn(trials, 1, pairs, D, generator=numbers), dim=-1) for _ in range(2))
    if alike:
        k = functional.normalize(k + functional.normalize(torch.randn(D, generator=numbers), dim=0), dim=-1)
    written = [x.unflatten(2, (-1, min(chunk, pairs))).mean(3) for x in (k, v)]
    one, nothing = torch.ones(1), torch.zeros(trials, 1, D, D)
    _, A = scan(written[0][:, :, None], *written, 0 * one, rate * one, nothing, one if rule == "delta" else None)
    right = (k @ A @ v.mT).argmax(-1) == torch.arange(pairs)  # [trials, 1, pairs]
    shares = right.double().mean((1, 2))
    return shares.mean().item(), shares.std().item() / trials**0.5
