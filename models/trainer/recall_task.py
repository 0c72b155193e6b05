"""Multi-query associative recall beyond the window: bindings, filler, then questions each followed by its answer.

    f f f f  k1 v1 k2 v2 ..  f f f f f f f ..  k2 v2 f f k1 v1 f f ..

A question is a key that was bound; its answer is the value of its latest binding. Every key is asked once at most, so
that no earlier question tells the answer, and no key is closer to its question than the window's layers can reach.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

KEYS, VALUES, FILLERS = 64, 32, 32  # three alphabets, one after the other; chance is 1 / VALUES
VOCABULARY = KEYS + VALUES + FILLERS
LEAD = 4  # filler at the start, so that attention sinks hold no binding


@dataclass(frozen=True)
class Task:
    window: int = 16
    pairs: int = 8
    asked: int = 8  # questions in a sequence
    nearest: int = 2  # gap between key and question, in windows
    farthest: int = 16
    twice: bool = False  # half of the keys are bound again, to another value

    @property
    def bindings(self) -> int:
        return self.pairs + (self.pairs // 2 if self.twice else 0)


def draw(task: Task, B: int, numbers: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences [B, T], the positions of the questions [B, asked], and how far back each one's key is.

    Gaps are more than `nearest` windows and at most `farthest`. A layer sees W - 1 tokens back, and its keys one more:
    two layers never see two windows.
    """

    def some(n: int, size: int) -> Tensor:
        """For each sequence, different ones of n numbers, in random order."""
        return torch.rand(B, n, generator=numbers).argsort(1)[:, :size]

    P, n, W = task.pairs, task.bindings, task.window
    length = LEAD + task.farthest * W + 2
    tokens = KEYS + VALUES + torch.randint(FILLERS, (B, length), generator=numbers)
    keys, again = some(KEYS, P), some(P, n - P)
    values = torch.randint(VALUES, (B, P), generator=numbers)
    other = (values.gather(1, again) + torch.randint(1, VALUES, again.shape, generator=numbers)) % VALUES
    tokens[:, LEAD : LEAD + 2 * n : 2] = torch.cat((keys, keys.gather(1, again)), 1)
    tokens[:, LEAD + 1 : LEAD + 2 * n : 2] = KEYS + torch.cat((values, other), 1)

    latest = torch.arange(P).expand(B, P).scatter(1, again, torch.arange(P, n).expand(B, n - P))
    values = values.scatter(1, again, other)
    first = LEAD + 2 * n + task.nearest * W
    places = first + 2 * some((length - first) // 2, min(task.asked, P))
    which = some(P, places.shape[1])
    tokens.scatter_(1, places, keys.gather(1, which))
    tokens.scatter_(1, places + 1, KEYS + values.gather(1, which))
    return tokens, places, places - LEAD - 2 * latest.gather(1, which)
