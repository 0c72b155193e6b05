"""What an engine is: a model's weights where they are multiplied, and passes over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tcinfer.config import ModelConfig
from tcinfer.kernels.reference.quants import Matrix
from tcinfer.memory.state import AnyState, Layout
from tcinfer.sampling import Sampling

F32 = NDArray[np.float32]
EMBEDDING, HEAD = "token_embd.weight", "output.weight"


class Logits(Protocol):
    """A row of logits, wherever it lies."""

    def fetch(self) -> F32:
        """float32 [V], read only."""


class Here:
    """A row of logits in this machine's memory."""

    def __init__(self, row: F32) -> None:
        """row [V]: its own, and from now on nobody's to write to."""
        row.flags.writeable = False
        self._row = row

    def fetch(self) -> F32:
        return self._row


class How(NamedTuple):
    """How a row's next id is to be chosen, if the engine can do it: the options, and a draw from [0, 1)."""

    sampling: Sampling
    draw: float


class Engine(Protocol):
    """One model on one backend. Passes wait for each other."""

    pass_tokens: int  # most rows of a pass
    ragged: bool  # whether a pass takes several tokens of each of several states
    bytes_per_token: int | None  # of the matrices that each is multiplied with, as the file holds them; None on numpy

    def new_state(self, layout: Layout) -> AnyState:
        """All zeros, where the model runs. Raises TcinferError where there is not so much memory."""

    def placed(self, state: AnyState) -> AnyState:
        """A copy of a state, where the model runs. Raises TcinferError as `new_state` does."""

    def run(self, states: Sequence[Any], counts: Sequence[int], ids: NDArray[np.int64], out_rows: int) -> F32:
        """Take ids [sum of counts] into states, each its part, at most `chunk` in all, and move them on.

        Several states: a token each, but where the engine is `ragged`.
        Returns the logits of the last `out_rows` rows, float32 [out_rows, V].
        """

    def room(self, rows: int) -> None:
        """See to it that `step` can leave the logits of so many rows where they are. Raises TcinferError."""

    def chooses(self, sampling: Sampling) -> bool:
        """Whether `step` chooses ids by such options."""

    def step(
        self, states: Sequence[Any], ids: NDArray[np.int64], hows: Sequence[How] | None = None, first: int = 0
    ) -> tuple[Sequence[Logits], NDArray[np.int64] | None]:
        """A token into each of at most `chunk` states: their logits, which may stay where they are, as rows `first`
        and following, until a later pass takes their place; and the ids that come next, int64 [len(states)], -1 where
        logits are not finite; None where `hows` is, or holds what the engine does not choose by."""


class Backend:
    """What makes engines. name: as the user knows it; cold, remark: what a user should know, in a line each, if loading
    is going to take seconds, and else."""

    name, cold, remark = "", "", ""
    copies = True  # whether engines have weights of their own, or go on reading those that they are given

    def __init__(self, threads: int | None = None) -> None: ...

    def engine(self, config: ModelConfig, weights: dict[str, Any]) -> Engine:
        """weights: a Matrix for each projection, a float32 array for the rest, by the names of transformer.tensors."""
        raise NotImplementedError


def bytes_per_token(weights: dict[str, Any]) -> int:
    """Bytes of the matrices that each token is multiplied with, as the file holds them."""
    return sum(
        value.data.nbytes
        for name, value in weights.items()
        if isinstance(value, Matrix) and not (name == EMBEDDING and HEAD in weights)
    )
