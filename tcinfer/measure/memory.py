"""What a session's second level holds, and how much of an answer came from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tcinfer import memory
from tcinfer.config import PASS_TOKENS, ModelConfig
from tcinfer.engine.eager import Engine
from tcinfer.loaded import Loaded
from tcinfer.memory.state import State
from tcinfer.sequence import Sequence as Past
from tcinfer.sequence import Snapshot


class LayerMemory(NamedTuple):
    """The second level of one layer."""

    layer: int
    norm: float  # Frobenius norm of its matrices, root mean square over planes and heads
    saturation: float  # share of its directions in use, 0 to 1: effective rank / head_dim, mean over the same


def layers(config: ModelConfig, state: State) -> list[LayerMemory]:
    """Norm and saturation of each layer that has a second level.

    The effective rank of A with singular values s is (Σ s²)² / Σ s⁴ (participation ratio): 1 where one pair is all it
    holds, head_dim where every direction holds as much.
    """
    found = []
    for i, arrays in enumerate(state.layers):
        planes = [arrays[name] for name in memory.mechanism(config.layers[i]).MATRICES]
        if planes:
            A = np.concatenate([a.reshape(-1, *a.shape[-2:]) for a in planes]).astype(np.float64)  # [n, D, D]
            squared = np.linalg.svd(A, compute_uv=False) ** 2  # [n, D]
            energy = squared.sum(-1)
            rank = energy**2 / np.maximum((squared**2).sum(-1), 1e-300)
            found.append(LayerMemory(i, float(np.sqrt(energy.mean())), float((rank / A.shape[-1]).mean())))
    return found


def shares(model: Loaded, before: Snapshot, ids: Sequence[int]) -> dict[int, float]:
    """By layer, the memory's share in what attention added while these ids were read or written.

    Of the last PASS_TOKENS ids, which follow on the snapshot. For each token and layer it is the length of what the
    memory added over the sum of that and of what the window added; layers without a memory are not in it.
    """
    if not len(ids):
        return {}
    session = Past(model, before)
    checked, first = session.check(ids), max(0, len(ids) - PASS_TOKENS)
    if first:
        session.feed(checked[:first])
    session.make_room(len(checked) - first)
    found: dict[int, NDArray[np.float32]] = {}  # [T] of each layer; computed by the reference, whatever the backend
    Engine(model.config, model.weights).forward(session.state.on_host().copy(), checked[first:], 0, found)
    return {layer: float(share.mean()) for layer, share in found.items()}
