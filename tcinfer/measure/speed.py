"""How fast a model runs here, beside the memory's bandwidth and, if asked, beside llama.cpp on the same file.

Everything is measured in rounds, one thing after the other and around again, so that a machine that slows down slows
all of them; figures are medians over the rounds, ratios are of medians.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tcinfer.api import Model, Session
from tcinfer.errors import TcinferError

SEED = 0
OURS = "tcinfer"
WARMING = 64  # tokens before each round that are not timed: clocks rise, caches fill
SETTLING = 0.1  # seconds in which the threads of what ran before stop waiting for more
DEEPEST_PEER = 16_384  # tokens of context up to which a growing cache is built for comparison


class Runner(Protocol):
    """One engine with a sequence: what is timed."""

    name: str

    def start(self, depth: int) -> None: ...  # from nothing to a context of so many tokens
    def back(self) -> None: ...  # to that context again
    def feed(self, ids: NDArray[np.int64]) -> None: ...  # and have the last one's logits


@dataclass
class Measured:
    """One runner at one depth; speeds in tokens per second, latencies in milliseconds of single tokens."""

    name: str
    depth: int
    prompt: list[float] = field(default_factory=list)  # a figure a round
    decode: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    state_bytes: int = 0
    resident_bytes: int = 0

    def median(self, what: str) -> float:
        values = getattr(self, what)
        return float(np.median(values)) if values else float("nan")

    def spread(self, what: str) -> float:
        """Half the distance between the quartiles, as a part of the median."""
        if not getattr(self, what):
            return float("nan")
        low, high = np.percentile(getattr(self, what), (25, 75))
        return float((high - low) / 2 / self.median(what))


@dataclass
class Report:
    """What `run` found out."""

    model: str
    memory: str
    threads: int  # 0 on a GPU
    tier: str  # of the CPU's instructions, or the GPU's name
    bandwidth: float  # bytes per second that this machine reads (a GPU reads and writes), median
    weight_bytes: int  # of the matrices that each token needs, as the file holds them
    prompt: int
    tokens: int
    rows: list[Measured]

    def of_bandwidth(self, row: Measured) -> float:
        """The part of the bandwidth that decoding uses, were the weights all that is read."""
        return row.median("decode") * self.weight_bytes / self.bandwidth

    def ratios(self, row: Measured) -> dict[str, float]:
        """Ours over the better of the peers at the same depth, for prompt and decode."""
        out = {}
        for what in ("prompt", "decode"):
            peers = [r.median(what) for r in self.rows if r.depth == row.depth and r.name != OURS and getattr(r, what)]
            if peers:
                out[what] = row.median(what) / max(peers)
        return out

    def markdown(self) -> str:
        """A line on the machine, and a table; columns that nothing was measured for are left out."""
        compared = any(row.name != OURS for row in self.rows)
        columns: dict[str, list[str]] = {}
        for row in self.rows:
            ours, ratios = row.name == OURS, self.ratios(row)
            p50, p90, p99 = np.percentile(row.latencies, (50, 90, 99))
            cells = {
                "": row.name,
                "depth": f"{row.depth:,}",
                f"prompt {self.prompt} tok/s": _with_spread(row, "prompt", 0) if self.prompt else None,
                "decode tok/s": _with_spread(row, "decode", 1),
                "ms p50 / p90 / p99": f"{p50:.2f} / {p90:.2f} / {p99:.2f}",
                "of bandwidth": f"{self.of_bandwidth(row):.2f}",
                "state MB": f"{row.state_bytes / 1e6:,.1f}" if ours else "",
                "resident MB": f"{row.resident_bytes / 1e6:,.0f}" if ours else "",
                "against the better llama.cpp": (_ratios(ratios) if ours else "") if compared else None,
            }
            for name, cell in cells.items():
                if cell is not None:
                    columns.setdefault(name, []).append(cell)
        machine = f"{self.threads} threads, {self.tier}; reads" if self.threads else f"{self.tier}; copies"
        lines = [
            f"{self.model}, {self.memory} memory, {machine} {self.bandwidth / 1e9:.1f} GB/s; "
            f"{self.weight_bytes / 1e6:.1f} MB of weights a token",
            "",
            "| " + " | ".join(columns) + " |",
            "|---" + "|---:" * (len(columns) - 1) + "|",
        ]
        return "\n".join(lines + ["| " + " | ".join(cells) + " |" for cells in zip(*columns.values(), strict=True)])

    def json(self) -> str:
        rows = []
        for row in self.rows:
            figures = {"of_bandwidth": self.of_bandwidth(row), "ratios": self.ratios(row) if row.name == OURS else {}}
            medians = {f"{what}_median": row.median(what) for what in ("prompt", "decode") if getattr(row, what)}
            rows.append(asdict(row) | medians | figures)
        return json.dumps({**asdict(self), "rows": rows})


def _with_spread(row: Measured, what: str, digits: int) -> str:
    return f"{row.median(what):,.{digits}f} ± {row.spread(what):.0%}"


def _ratios(ratios: dict[str, float]) -> str:
    return ", ".join(f"{what} {value:.2f}x" for what, value in ratios.items())


class _Ours:
    name = OURS

    def __init__(self, model: Model) -> None:
        self.session: Session = model.session()
        self._ids = _ids(model)

    def start(self, depth: int) -> None:
        self.session.reset()
        if depth:
            self.session.feed(self._ids(depth))
        self._snapshot = self.session.snapshot()

    def back(self) -> None:
        self.session.restore(self._snapshot)

    def feed(self, ids: NDArray[np.int64]) -> None:
        self.session.feed(ids)


class _LlamaCpp:
    """llama.cpp through its own C interface, the whole context in its cache."""

    def __init__(self, path: str, context: int, threads: int, flash: bool, ids: Callable[[int], NDArray]) -> None:
        try:
            import llama_cpp
        except ImportError:
            raise TcinferError("--compare llama.cpp needs llama-cpp-python: pip install llama-cpp-python") from None
        self.name = f"llama.cpp{', flash attention' if flash else ''}"
        self._api, self._ids, self._depth = llama_cpp, ids, 0
        options: dict[str, Any] = {
            "n_ctx": context,
            "n_batch": 512,
            "n_ubatch": 512,
            "flash_attn": flash,
            "verbose": False,
        }
        try:
            self._model = llama_cpp.Llama(path, n_threads=threads, n_threads_batch=threads, **options)
        except ValueError as e:
            raise TcinferError(f"llama.cpp cannot run this file: {e}") from None
        self._context = self._model._ctx.ctx
        self._batch = llama_cpp.llama_batch_init(512, 0, 1)

    def start(self, depth: int) -> None:
        self._api.llama_memory_clear(self._memory, True)
        self._position, self._depth = 0, depth
        if depth:
            self.feed(self._ids(depth))

    @property
    def _memory(self) -> Any:
        return self._api.llama_get_memory(self._context)

    def back(self) -> None:
        self._api.llama_memory_seq_rm(self._memory, 0, self._depth, -1)
        self._position = self._depth

    def feed(self, ids: NDArray[np.int64]) -> None:
        for a in range(0, len(ids), 512):
            part, batch = ids[a : a + 512], self._batch
            batch.n_tokens = len(part)
            for i, token in enumerate(part):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = (
                    int(token),
                    self._position + i,
                    1,
                    0,
                )
                batch.logits[i] = a + i == len(ids) - 1
            if self._api.llama_decode(self._context, batch):
                raise TcinferError("llama.cpp cannot decode this model here")
            self._position += len(part)
        self._api.llama_get_logits_ith(self._context, -1)


def _ids(model: Model) -> Callable[[int], NDArray[np.int64]]:
    return lambda count: np.random.default_rng(SEED).integers(0, model.config.vocab_size, count)


def run(
    path: str,
    model: Model,
    prompt: int = 512,
    tokens: int = 128,
    depths: Sequence[int] = (0,),
    rounds: int = 5,
    peer: bool = False,
    progress: Callable[[int], None] = lambda n: None,
) -> Report:
    """Measure reading a prompt and decoding at each depth, `rounds` times; progress is told of each figure."""
    if model.bytes_per_token is None:
        raise TcinferError("bench measures compiled backends: use --backend numba or cuda")
    if peer and model.threads is None:
        raise TcinferError("--compare runs llama.cpp on the CPU: use --backend numba beside it")
    ids, reads = _ids(model), []
    runs: list[tuple[Runner, Measured]] = []
    for depth in depths:  # first, while this process holds nothing else
        own = _Ours(model)
        own.start(depth)
        runs.append((own, Measured(OURS, depth, state_bytes=own.session.nbytes, resident_bytes=resident())))
    for depth in depths if peer else ():
        for flash in (False, True) if depth <= DEEPEST_PEER else ():
            context = depth + max(prompt, tokens, WARMING) + 1
            assert model.threads is not None
            other = _LlamaCpp(path, context, model.threads.count, flash, ids)
            other.start(depth)
            runs.append((other, Measured(other.name, depth)))
    machine, bandwidth = _machine(model)
    for _ in range(rounds):
        reads.append(bandwidth.measure())
        for runner, row in runs:
            time.sleep(SETTLING)
            runner.back()
            runner.feed(ids(WARMING))
            _round(runner, row, ids(max(prompt, tokens)), prompt, tokens)
            progress(1)
    return Report(
        path,
        model.config.memories,
        model.threads.count if model.threads else 0,
        machine,
        float(np.median(reads)),
        model.bytes_per_token,
        prompt,
        tokens,
        sorted((row for _, row in runs), key=lambda row: row.depth),
    )


def _machine(model: Model) -> tuple[str, Any]:
    """What the model runs on, and what measures the bandwidth of its memory."""
    if model.threads is None:
        from tcinfer.kernels.cuda.bandwidth import Bandwidth as Copies

        device = model.backend.device  # type: ignore[attr-defined]
        return device.name, Copies(device)
    from tcinfer.kernels.cpu.bandwidth import Bandwidth
    from tcinfer.kernels.cpu.simd import TIER

    assert model.bytes_per_token is not None
    return TIER, Bandwidth(model.threads, model.bytes_per_token)


def _round(runner: Runner, row: Measured, ids: NDArray[np.int64], prompt: int, tokens: int) -> None:
    if prompt:
        runner.back()
        started = time.perf_counter()
        runner.feed(ids[:prompt])
        row.prompt.append(prompt / (time.perf_counter() - started))
    runner.back()
    taken = []
    for i in range(tokens):
        started = time.perf_counter()
        runner.feed(ids[i : i + 1])
        taken.append(time.perf_counter() - started)
    if taken:
        row.decode.append(1 / float(np.median(taken)))
        row.latencies += [1000 * t for t in taken]


class Soaked(NamedTuple):
    """One part of a soak."""

    tokens: int  # so far
    tokens_per_second: float
    ms_p50: float  # of a token
    ms_p99: float
    state_bytes: int
    resident_bytes: int


def soak(model: Model, tokens: int, parts: int = 10, progress: Callable[[int], None] = lambda n: None) -> list[Soaked]:
    """Stream `tokens` tokens one by one through one session: speed and memory in each of `parts`."""
    session, ids = model.session(), _ids(model)(tokens)
    rows = []
    for part in np.array_split(ids, min(parts, tokens)):
        taken = []
        for token in part:
            started = time.perf_counter()
            session.feed(token)
            taken.append(1000 * (time.perf_counter() - started))
            progress(1)
        p50, p99 = (float(p) for p in np.percentile(taken, (50, 99)))
        rows.append(Soaked(session.position, 1000 / p50, p50, p99, session.nbytes, resident()))
    return rows


def soak_table(rows: list[Soaked]) -> str:
    """A soak for people."""
    lines = ["| tokens | tokens/s | ms p50 / p99 | state MB | resident MB |", "|---:|---:|---:|---:|---:|"]
    for r in rows:
        lines.append(
            f"| {r.tokens:,} | {r.tokens_per_second:,.1f} | {r.ms_p50:.2f} / {r.ms_p99:.2f} | "
            f"{r.state_bytes / 1e6:,.2f} | {r.resident_bytes / 1e6:,.1f} |"
        )
    return "\n".join(lines)


def resident() -> int:
    """Bytes of memory that this process occupies."""
    import psutil

    return int(psutil.Process().memory_info().rss)
