"""How well models predict a text of any length: nats per token and perplexity, by the distance from its start.

All models go through the same tokens side by side in one pass, so that a pipe will do and differences are of pairs.
Positions count tokens from 0; the token at position 0 has nothing to be predicted from. They fall into bins 0-1, 1-2,
2-4, 4-8 ... windows.

Errors are standard errors of the mean. Neighbouring tokens are correlated (one hard passage, one subject), and an error
that takes them as independent is too small. So they come from batch means: the text is cut into batches of one window
(of parts of one where it is longer than LONGEST_BATCH), and for K batches of n_j tokens whose losses add up to s_j,
with n = sum n_j and the mean m = sum s_j / n,

    error^2 = K / (K - 1) * sum_j (s_j - n_j m)^2 / n^2

Fewer than FEWEST batches have no error: how much windows differ cannot be known from so few. The error of a difference
between two models comes from the same formula over the differences token by token, and is far smaller than either's.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tcinfer.api import Model
from tcinfer.config import DEFAULT_WINDOW, PASS_TOKENS, ModelConfig, check_count
from tcinfer.errors import TcinferError
from tcinfer.measure import plot

LONGEST_BATCH = 512  # tokens
FEWEST = 4  # batches
AT_ONCE = 2**17  # logits that are float64 at the same time: 1 MB stays near the core
WHOLE = "all"

F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Row:
    """What one model made of the tokens at positions first ... last. Errors are None where batches were too few."""

    memory: str
    windows: str  # which bin, such as "2-4", or WHOLE
    first: int
    last: int
    tokens: int
    nll: float  # nats per token
    error: float | None
    difference: float | None  # to the first model's nll; None for the first itself
    difference_error: float | None

    @property
    def figures(self) -> dict[str, Any]:
        """All of it by name, with the perplexity."""
        return asdict(self) | {"perplexity": math.exp(self.nll) if self.nll < 700 else math.inf}


@dataclass(frozen=True)
class Result:
    """What `measure` found."""

    window: int  # tokens: the unit of the bins
    state_bytes: dict[str, int]  # of each model's session, at the end
    whole: list[Row]  # one for each model
    bins: list[list[Row]]  # the same in each bin

    def markdown(self, by_position: bool = False) -> str:
        """A table with a line for each model and, if asked, one with a line for each bin."""
        first, *others = (row.memory for row in self.whole)
        lines = _table(
            ["memory", "state MB", "nats/token", "perplexity", *([f"against {first}"] if others else [])],
            [
                [
                    row.memory,
                    f"{self.state_bytes[row.memory] / 1e6:,.2f}",
                    _figure(row.nll, row.error),
                    f"{row.figures['perplexity']:,.3f}",
                    *([_difference(row)] if others else []),
                ]
                for row in self.whole
            ],
        )
        if by_position:
            lines += ["", f"Nats per token by position, in windows of {self.window:,}:", ""]
            lines += _table(
                ["position", "tokens", first, *(name for other in others for name in (other, f"against {first}"))],
                [
                    [row.windows, f"{row.tokens:,}", _figure(row.nll, row.error)]
                    + [cell for other in rest for cell in (_figure(other.nll, other.error), _difference(other))]
                    for row, *rest in self.bins
                ],
            )
        return "\n".join(lines)

    def csv(self, by_position: bool = False) -> str:
        """A line for each model, and for each in each bin; what is not known is empty."""
        out = io.StringIO()
        rows = [row.figures for row in self._rows(by_position)]
        writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue().rstrip("\n")

    def json(self, by_position: bool = False, **facts: Any) -> str:
        """The same as an object, with these facts about the run."""
        rows = [row.figures for row in self._rows(by_position)]
        return json.dumps({**facts, "window": self.window, "state_bytes": self.state_bytes, "rows": rows})

    def plot(self, path: Path) -> None:
        """Draw nats per token against position, as SVG or PNG; the same figures give the same bytes."""
        with plot.axes(path, f"position, in windows of {self.window:,} tokens", "nats per token") as axes:
            for rows in zip(*self.bins, strict=True):
                middles = [(row.first + row.last + 1) / 2 / self.window for row in rows]
                errors = [math.nan if row.error is None else row.error for row in rows]  # nan: no bar
                axes.errorbar(middles, [row.nll for row in rows], errors, marker="o", capsize=3, label=rows[0].memory)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")

    def _rows(self, by_position: bool) -> list[Row]:
        return self.whole + (list(chain.from_iterable(self.bins)) if by_position else [])


def memory_name(config: ModelConfig) -> str:
    """A memory in a word, as `--memory` takes it: full, window:256, sinks:512:4, tensor:128."""
    return ":".join([config.memories, *(str(n) for n in (config.widest.window, config.widest.sinks) if n)])


def measure(
    models: Mapping[str, Model],
    ids: Iterable[Sequence[int]],
    limit: int | None = None,
    progress: Callable[[int], None] = lambda n: None,
    notice: Callable[[str], None] = lambda text: None,
) -> Result:
    """Score a text with each of some models of the same vocabulary, in memory that does not grow with the text.

    models: by the names that the result uses; ids: of the text in parts of any size, BOS included, as `text.ids` gives
    them; limit: of those, take so many at most; progress: told of each token scored by each model; notice: told in a
    line what makes figures questionable. Bins and batches go by the first window that a model has; without any, by
    the context that the first was trained on, or DEFAULT_WINDOW.

    Raises TcinferError for a text of fewer than two tokens and for logits that are not finite.
    """
    if not models:
        raise TcinferError("there is no model to measure")
    if limit is not None:
        check_count("limit", limit, 2)
    configs = [model.config for model in models.values()]
    sessions = [model.session() for model in models.values()]
    window = next((c.widest.window for c in configs if c.widest.window), configs[0].context_length or DEFAULT_WINDOW)
    sums = _Sums(window, len(sessions))
    reaches = {label: _reach(model) for label, model in models.items()}
    stream = islice(chain.from_iterable(ids), limit)
    before = list(islice(stream, 1))
    while targets := list(islice(stream, PASS_TOKENS)):
        taken = sums.position - 1 + len(targets)  # tokens in each session after this pass
        for label in [label for label, reach in reaches.items() if taken > reach]:
            reach = reaches.pop(label)
            if models[label].config.learned_positions:
                raise TcinferError(f"the model has learned positions and ends at token {reach}: limit the text to that")
            notice(
                f"{label} memory goes past the {reach:,} tokens that the model was trained on, growing with each token"
            )
        inputs, losses = [*before, *targets[:-1]], []
        for session in sessions:
            losses.append(nll(session.feed(inputs, all_logits=True), targets))
            progress(len(targets))
        sums.add(np.stack(losses))
        before = targets[-1:]
    if sums.position == 1:
        raise TcinferError("the text is too short to measure: it needs at least two tokens")
    whole, bins = sums.rows(list(models))
    states = {label: session.nbytes for label, session in zip(models, sessions, strict=True)}
    return Result(window, states, whole, bins)


def _reach(model: Model) -> float:
    """Tokens that a session is good for."""
    limited = model.config.context_length and (model.config.learned_positions or not model.bounded)
    return model.config.context_length if limited else math.inf


def nll(logits: NDArray[np.float32], targets: Sequence[int]) -> F64:
    """-log softmax(logits)[target] for each row: logits [T, V], targets [T]; nats [T]. All sums are in float64."""
    T, V = logits.shape
    if wrong := [target for target in targets if not 0 <= target < V]:
        raise TcinferError(f"id {wrong[0]} is outside the vocabulary of {V}")
    out, step = np.empty(T), max(1, AT_ONCE // V)
    scratch = np.empty((min(T, step), V))
    with np.errstate(all="ignore"):  # what is not finite is seen below
        for a in range(0, T, step):
            part = logits[a : a + step]  # [t, V]
            t = len(part)
            top = part.max(-1, keepdims=True).astype(np.float64)  # [t, 1]
            powers = np.exp(np.subtract(part, top, out=scratch[:t]), out=scratch[:t])
            chosen = part[np.arange(t), targets[a : a + t]]
            out[a : a + t] = np.log(powers.sum(-1)) - (chosen - top[:, 0])
    if not np.isfinite(out).all():
        raise TcinferError("the model computed logits that are not finite: its weights are damaged or overflow")
    return out


class _Sums:
    """Losses in bins, as running sums over batches of [1, n_j, n_j^2, s_j, s_j n_j, s_j^2] for each series.

    The series are each model's losses, and then those of all but the first less the first's.
    """

    def __init__(self, window: int, models: int) -> None:
        self.position = 1  # of the next token to be scored
        self._window, self._models = window, models
        self._length = math.ceil(window / math.ceil(window / LONGEST_BATCH))  # of a batch
        self._bins: dict[int, F64] = {}  # [series, 6] each
        self._n, self._s = 0, np.zeros(2 * models - 1)  # of the batch at hand

    def add(self, losses: F64) -> None:
        """The next tokens' losses [models, T]."""
        series = np.concatenate([losses, losses[1:] - losses[:1]])  # [series, T]
        while series.shape[1]:
            into = self.position % self._window
            left = min(self._length - into % self._length, self._window - into)  # of the batch
            part, series = series[:, :left], series[:, left:]
            self._n += part.shape[1]
            self._s = self._s + part.sum(1)
            self.position += part.shape[1]
            if part.shape[1] == left:
                self._close()

    def _close(self) -> None:
        """The batch at hand is over."""
        n, s, at = self._n, self._s, ((self.position - 1) // self._window).bit_length()
        batch = np.stack(np.broadcast_arrays(1.0, n, n * n, s, s * n, s * s), -1)
        self._bins[at] = self._bins.get(at, 0.0) + batch
        self._n, self._s = 0, np.zeros_like(s)

    def rows(self, names: Sequence[str]) -> tuple[list[Row], list[list[Row]]]:
        """Of the whole, and of each bin, a row for each model."""
        if self._n:
            self._close()
        last, bins = self.position - 1, []
        for at, sums in self._bins.items():
            a, b = 2**at // 2, 2**at  # in windows
            first, end = max(a * self._window, 1), min(b * self._window, self.position)
            bins.append(self._rows(names, f"{a}-{b}", first, end - 1, sums))
        return self._rows(names, WHOLE, 1, last, np.sum(list(self._bins.values()), 0)), bins

    def _rows(self, names: Sequence[str], windows: str, first: int, last: int, sums: F64) -> list[Row]:
        found = [_mean(*one) for one in sums.tolist()]
        own, to_first = found[: self._models], [(None, None), *found[self._models :]]
        return [
            Row(label, windows, first, last, int(sums[0, 1]), *mean, *difference)
            for label, mean, difference in zip(names, own, to_first, strict=True)
        ]


def _mean(K: float, n: float, nn: float, s: float, sn: float, ss: float) -> tuple[float, float | None]:
    """A mean and its error from the sums over K batches of 1, n_j, n_j^2, s_j, s_j n_j, s_j^2."""
    m = s / n
    return m, math.sqrt(max(0.0, ss - 2 * m * sn + m * m * nn) * K / (K - 1)) / n if K >= FEWEST else None


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _figure(value: float, error: float | None, sign: str = "") -> str:
    return f"{value:{sign}.4f}" + (f" ± {error:.4f}" if error is not None else "")


def _difference(row: Row) -> str:
    return _figure(row.difference, row.difference_error, "+") if row.difference is not None else ""
