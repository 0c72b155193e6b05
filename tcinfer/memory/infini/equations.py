"""What Infini-attention adds to ring and matrix: its feature map, its normaliser, its gate.

Compiled: compiled.py, cuda.cu. Source: docs/mechanisms.md, "Infini-attention".
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tcinfer.kernels.operators import Operator
from tcinfer.kernels.reference.pointwise import elu_plus_one, sigmoid

F32 = NDArray[np.float32]
EPS = np.float32(1e-5)


def features(
    p: Any, q: F32, k: F32, z: F32, G: int, R: int, D: int, eps: float, delta: bool
) -> tuple[F32, F32, F32, F32]:
    """φ(q) [T, G, R, D], φ(k) [T, G, D], 1 / (φ(k)·z + eps) [T, G] (0 where the rule is not delta) and φ(q)·z + eps
    [T, G, R], with z [G, D] before each write; moves z on."""
    fq, fk = elu_plus_one(q), elu_plus_one(k)
    after = z + np.cumsum(fk, axis=0)  # [T, G, D]
    before = np.concatenate([z[None], after[:-1]])
    z[:] = after[-1]
    retrieve = 1 / ((fk * before).sum(-1) + np.float32(eps))
    return fq, fk, retrieve if delta else np.zeros_like(retrieve), (fq * before[:, :, None]).sum(-1) + np.float32(eps)


def blended(near: F32, far: F32, norm: F32, betas: F32, H: int, D: int) -> tuple[F32, F32]:
    """What local attention and memory each add, [T, H · D]: (1 - σ(β)) near and σ(β) far / norm, head by head.

    near, far [T, H · D]; norm [T, H]; betas [H].
    """
    share, shape = sigmoid(betas)[:, None], (len(near), H, D)
    parts = (1 - share) * near.reshape(shape), share * far.reshape(shape) / norm.reshape(*shape[:2], 1)
    return parts[0].reshape(len(near), -1), parts[1].reshape(len(near), -1)


def blend(p: Any, near: F32, far: F32, norm: F32, betas: F32, H: int, D: int) -> None:
    """σ(β) far / norm + (1 - σ(β)) near, in place of near.  near, far [T, H, D]; norm [T, H]."""
    here, there = blended(near, far, norm, betas, H, D)
    near[:] = (here + there).reshape(near.shape)


FEATURES = Operator(
    "features",
    "q<G.R.D k<G.D @z<> G R D eps:f delta fq>G.R.D fk>G.D retrieve>G norm>G.R",
    "tcinfer.memory.infini",
    features,
    by_head=True,
)
BLEND = Operator("blend", "near<>H.D far<H.D norm<H betas H D", "tcinfer.memory.infini", blend, by_head=True)
