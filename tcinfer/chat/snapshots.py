"""Snapshots of a conversation under a budget of bytes, near ones dense and far ones sparse."""

from __future__ import annotations

from tcinfer.sequence import Snapshot

BUDGET = 64 * 2**20  # bytes
MOST = 16  # snapshots: small ones too are not free to look through


class Snapshots:
    """The state after some of the turns. What is not here is replayed from the nearest that is."""

    def __init__(self, budget: int = BUDGET) -> None:
        self._budget = budget
        self._kept: list[tuple[int, Snapshot]] = []  # (turns so far, state), rising

    @property
    def nbytes(self) -> int:
        return sum(snapshot.nbytes for _, snapshot in self._kept)

    def add(self, turn: int, snapshot: Snapshot) -> None:
        """Keep the state after so many turns; others go if the budget says so, the newest never."""
        self.back_to(turn - 1)
        self._kept.append((turn, snapshot))
        while len(self._kept) > 1 and (self.nbytes > self._budget or len(self._kept) > MOST):
            turns = [-1, *(turn for turn, _ in self._kept)]
            # The one whose absence costs least: a short way to its neighbours, seen from now.
            gaps = [(turns[i + 2] - turns[i]) / (turns[-1] - turns[i + 1] + 1) for i in range(len(self._kept) - 1)]
            del self._kept[gaps.index(min(gaps))]

    def nearest(self, turn: int) -> tuple[int, Snapshot] | None:
        """The latest that is not after so many turns."""
        return next((kept for kept in reversed(self._kept) if kept[0] <= turn), None)

    def back_to(self, turn: int) -> None:
        """Forget what came after so many turns."""
        self._kept = [kept for kept in self._kept if kept[0] <= turn]
