"""What measure_gpu.py measures with: models of real shapes and random weights, clocks, rows of the table."""

from __future__ import annotations

import gc
import json
import math
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import importable  # noqa: F401
import numpy as np
from conftest import FLOATS
from gguf.quants import quantize
from plans import SCALES, normal, random_matrix, scales

from tcinfer import memory
from tcinfer.api import Model, Session
from tcinfer.config import ModelConfig
from tcinfer.engine import cuda
from tcinfer.kernels.cuda import products
from tcinfer.kernels.cuda.packing import TILE_ROWS
from tcinfer.kernels.cuda.plan import Plan
from tcinfer.kernels.cuda.program import source
from tcinfer.kernels.plan import ONE
from tcinfer.kernels.reference.quants import Kind, Matrix
from tcinfer.memory import tensor_cache
from tcinfer.memory.state import State
from tcinfer.sampling import Sampling
from tcinfer.sampling.choose import Draws
from tcinfer.sequence import advance
from tcinfer.tokenizer import from_metadata
from tcinfer.transformer import tensors

GREEDY = Sampling(temperature=0)
SINKS = 4
RANDOM: set[int] = set()  # ids of the matrices that `matrix` has made and keeps
BLOCK = 256  # rows of a random matrix that are random; then they come again
SPIN = 200_000  # cycles that the device is kept busy with while work for it is prepared: about a tenth of a millisecond
WAITS = 'extern "C" __global__ void spin(long long n) { long long t = clock64(); while (clock64() - t < n); }'
Run = Callable[[], Any]


BACKEND = cuda.Backend


class Shape(NamedTuple):
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool  # the head is the embedding


SHAPES = {
    "135M": Shape(30, 576, 9, 3, 64, 1536, 49152, True),  # SmolLM2
    "1B": Shape(16, 2048, 32, 8, 64, 8192, 128256, True),  # Llama 3.2
    "8B": Shape(32, 4096, 32, 8, 128, 14336, 128256, False),  # Llama 3
}
TINY = Shape(2, 64, 2, 1, 32, 96, 96, True)  # in place of all of them on the stand-in


# Random models


@cache
def matrix(kind: Kind, rows: int, columns: int) -> Matrix:
    """Random weights of a trained model's size; one matrix for whoever asks."""
    some = min(rows, BLOCK)
    if kind in FLOATS:
        data = quantize(normal(7, some, columns) / np.float32(math.sqrt(columns)), kind).view(np.uint8)
    else:
        w = random_matrix(kind, some, columns)
        for i in range(len(SCALES[kind])):
            scales(w, i)[:] *= 1 / (math.sqrt(columns) * w.values.std())
        data = w.data
    data = data.reshape(some, -1)
    made = Matrix(np.resize(data, (rows, data.shape[1])), kind, (rows, columns))
    RANDOM.add(id(made))
    return made


def weights(config: ModelConfig, tied: bool, kinds: Sequence[Kind]) -> dict[str, Any]:
    """Every tensor that a configuration needs, matrix after matrix of the next kind; norms do nothing."""
    out: dict[str, Any] = {}
    for name, spec in tensors(config).items():
        if spec.matrix and (spec.required or not tied):
            out[name] = matrix(kinds[len(out) % len(kinds)], *spec.shape)
        elif spec.required:
            out[name] = np.full(spec.shape, 2.0 if "tc_decay" in name else float("norm" in name), np.float32)
    return out


def config_of(shape: Shape, memory_kind: str, window: int) -> ModelConfig:
    sizes = (shape.vocab, shape.layers, shape.width, shape.heads, shape.kv_heads, shape.head_dim, shape.ffn)
    own = {"arch": "tcllama", "options": tensor_cache.Options()} if memory_kind == "tensor" else {"arch": "llama"}
    names = ("vocab_size", "n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff")
    sinks = SINKS if memory_kind == "sinks" else 0
    fields: dict[str, Any] = dict(zip(names, sizes, strict=True), memory=memory_kind, window=window, sinks=sinks, **own)
    return ModelConfig(context_length=8192, **fields)


def packed_once() -> None:
    """A random matrix is repacked once, as fast as it was made, and sent once: for other layers it is copied there."""
    pack, join, upload = products.packed, products.joined, Plan.upload
    done: dict[int, Any] = {}
    parts: set[int] = set()  # ids of arrays in `done`

    def packed(w: Matrix) -> Any:
        if id(w) not in RANDOM:
            return pack(w)
        if id(w) not in done:
            some = pack(Matrix(w.data[:BLOCK], w.kind, (len(w.data[:BLOCK]), w.shape[1])))
            tiles, size = -(-len(w.data) // TILE_ROWS[w.kind]), some.chunks.shape[1]
            done[id(w)] = some._replace(chunks=np.resize(some.chunks, (tiles, size)))
            parts.add(id(done[id(w)].chunks))
        return done[id(w)]

    def sent(plan: Any, array: Any) -> int:
        there = plan.__dict__.setdefault("sent", {})
        if id(array) not in parts:
            return upload(plan, array)
        if id(array) not in there:
            there[id(array)] = upload(plan, array)
            return there[id(array)]
        address = plan.allocate(array.nbytes)
        plan.device.copy(address, there[id(array)], array.nbytes)
        return address

    def joined(matrices: Sequence[Matrix], by_turns: bool = False) -> Matrix:
        if len(matrices) == 1 or not all(id(m) in RANDOM for m in matrices):
            return join(matrices, by_turns)
        return matrix(Kind(matrices[0].kind), sum(m.shape[0] for m in matrices), matrices[0].shape[1])

    products.packed, products.joined, Plan.upload = packed, joined, sent  # type: ignore[method-assign, assignment]


def filled(model: Model, position: int = 5000) -> Session:
    """A session that stands at a position, its state full of random numbers (zeros would cost less)."""
    state, some = State(memory.layout(model.config)), normal(3, 1 << 16)
    for layer in state.layers:
        for name, array in layer.items():
            array[...] = np.resize(some if name in ("k", "v") else some / 100, array.shape)
    state.position = position
    session = model.session()
    session.state = model.engine.placed(state)
    return session


def same_again(session: Session) -> Session:
    """Another session that stands where this one does."""
    other = session.model.session()
    other.state = session.model.engine.placed(session.state)
    return other


def moved(model: Model) -> int:
    """Bytes that a token cannot but move: weights, keys and values it sees, matrices read and written."""
    times = {"k": 1, "v": 1, "A": 2, "z": 2}
    fields = [f for _, f, _ in memory.layout(model.config).places()]
    state = sum(times.get(f.name, 0) * math.prod(f.shape) * np.dtype(f.dtype).itemsize for f in fields)
    return (model.bytes_per_token or 0) + state


def stepping(session: Session) -> Callable[[], int]:
    """Feeds the session the id that it stands before, and gives the one chosen next, as `generate` does."""
    session.draws, token = Draws.of(GREEDY), 1

    def run() -> int:
        nonlocal token
        advance([session], np.array([token]), [GREEDY])
        chosen = session.chosen_ahead(GREEDY)
        if chosen is None:
            raise ArithmeticError("logits are not finite, or were not chosen from on the device")
        token = chosen
        return token

    return run


# Measuring


def brief(e: BaseException) -> str:
    """An error in one line, and where it arose."""
    at = traceback.extract_tb(e.__traceback__)[-1:]
    where = "".join(f" ({Path(frame.filename).name}:{frame.lineno})" for frame in at)
    return f"{type(e).__name__}: {' '.join(str(e).split())[:300]}{where}"


class Bench:
    """A device, what is measured on it, and how long that may take."""

    def __init__(self, options: Namespace, device: Any, cupy: Any = None) -> None:
        """cupy: None on the stand-in."""
        self.device, self.cupy, self.options = device, cupy, options
        self.backend = BACKEND(None, device)
        self.until, self.failed = time.monotonic() + options.seconds, False
        cuda.Backend = lambda threads=None: self.backend  # type: ignore[misc, assignment]  # every model is of it
        packed_once()
        if cupy is not None:
            self._spin = cupy.RawKernel(WAITS, "spin")
            self._events = cupy.cuda.Event(), cupy.cuda.Event()

    @property
    def quick(self) -> bool:
        return self.options.quick or self.cupy is None

    def left(self) -> float:
        """Seconds."""
        return self.until - time.monotonic()

    def row(self, what: str, figure: str, wanted: str = "", good: bool | None = None) -> None:
        """A row of the table, printed and kept at once: what comes later may end this process."""
        figure += " (missed)" if good is False else ""
        print(f"{self.options.alone}: {what}: {figure}", flush=True)
        self.tell(section=self.options.alone, what=what, figure=figure, wanted=wanted)

    def tell(self, **fact: Any) -> None:
        with open(self.options.rows, "a") as file:
            file.write(json.dumps(fact) + "\n")

    def reached(self, what: str, seconds: float) -> bool:
        """Whether so much time is left; a row says so if not."""
        if self.left() < seconds:
            self.row(what, "not reached")
        return self.left() >= seconds

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """An error within is a row, and the section's failure in the end."""
        try:
            yield
        except Exception as e:
            self.row(what, f"FAILED: {brief(e)}")
            self.tell(traceback=traceback.format_exc())
            self.failed = True

    def random(self, shape: str, kind: Kind, memory_kind: str = "sinks", window: int = 512) -> Model:
        """A model of a shape, in device memory that the one before has left."""
        self.tidy()
        of = self.shape(shape)
        config = config_of(of, memory_kind, window)
        return Model(config, weights(config, of.tied, [kind]), from_metadata({}, of.vocab), self.backend)

    def shape(self, name: str) -> Shape:
        return SHAPES[name] if self.cupy is not None else TINY

    def tidy(self) -> None:
        """Free what nothing refers to any more."""
        gc.collect()
        if self.cupy is not None:
            self.cupy.get_default_memory_pool().free_all_blocks()

    def used(self) -> tuple[int, int]:
        """Bytes of device memory: in use here, and free for anybody."""
        if self.cupy is None:
            return sum(b.nbytes for b in self.device.buffers), 0
        return self.cupy.get_default_memory_pool().used_bytes(), self.cupy.cuda.runtime.memGetInfo()[0]

    def timed(self, run: Run) -> float:
        """Seconds of the device's own time that takes what `run` launches; it is launched while the device spins."""
        if self.cupy is None:
            started = time.perf_counter()
            run()
            return time.perf_counter() - started
        first, last = self._events
        self._spin((1,), (1,), (np.int64(SPIN),))
        first.record()
        run()
        last.record()
        last.synchronize()
        return float(self.cupy.cuda.get_elapsed_time(first, last)) / 1e3

    def device_time(self, model: Model, run: Run, count: int = 20) -> float:
        """Seconds of the device's own time in a pass that `run` makes, median."""
        plan: Any = model.engine._plan  # type: ignore[union-attr]
        taken, pass_ = [], plan.run_pass
        plan.run_pass = lambda *a: taken.append(self.timed(lambda: pass_(*a)))
        try:
            for _ in range(2 if self.cupy is None else count):
                run()
        finally:
            plan.run_pass = pass_
        return float(np.median(taken))

    def medians(self, runs: Sequence[Run], seconds: float = 1.0, rounds: int = 5) -> list[float]:
        """Seconds of each by the clock on the wall, median of rounds in which all take turns."""
        counts = []
        for run in runs:
            run()
            started = time.perf_counter()
            run(), run()
            counts.append(max(1, int(seconds / rounds / (time.perf_counter() - started) * 2)))
        if self.cupy is None:
            counts, rounds = [1] * len(runs), 2
        taken: list[list[float]] = [[] for _ in runs]
        for _ in range(rounds):
            for run, count, of in zip(runs, counts, taken, strict=True):
                started = time.perf_counter()
                for _ in range(count):
                    run()
                of.append((time.perf_counter() - started) / count)
        return [float(np.median(of)) for of in taken]

    def copy_rate(self) -> float:
        """Bytes a second of a large copy within the device, read and written, median."""
        nbytes, part = ((2 << 30), 64 << 20) if self.cupy is not None else (1 << 16, 1 << 12)
        a, b = self.device.zeros(nbytes), self.device.zeros(nbytes)
        self.device.put(a.address, np.random.default_rng(0).integers(0, 256, part, dtype=np.uint8))
        for at in range(part, nbytes, part):
            self.device.copy(a.address + at, a.address, part)
        times = [self.timed(lambda: self.device.copy(b.address, a.address, nbytes)) for _ in range(12)]
        return 2 * nbytes / float(np.median(times[2:]))

    def matrix_rate(self, n: int = 8192) -> float | None:
        """Operations a second of a product of two bf16 matrices by PyTorch; None where that is not to be had."""
        if self.cupy is None:
            return None
        try:
            import torch
        except ImportError:
            return None
        a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        times = []
        for _ in range(13):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            a @ b
            last.record()
            last.synchronize()
            times.append(first.elapsed_time(last) / 1e3)
        return 2 * n**3 / float(np.median(times[3:]))


# Where the time goes


def traced(b: Bench, model: Any) -> Callable[[Session], list[str]]:
    """A token's launch that writes down when each block begins to wait after each step, and when it goes on."""
    plan = model.engine._plan
    one, blocks = [step for step in plan.steps if step.when & ONE], b.device.multiprocessors
    text = source(True, {step.kind for step in plan.steps if step.kind}, plan.rooms)
    stamp = (
        "if (thread() == 0) ((int64 *)plan[PLAN_FIELDS + 1])[(2 * step + met) * gridDim.x + blockIdx.x] = clock64();"
    )
    text = f"#define STAMP(step, met) {stamp}\n{text}"
    kernel = b.device.program(text, together=True).kernel("together")

    def run(session: Session) -> list[str]:
        room = b.device.zeros(16 * len(one) * blocks)
        plain, told = (plan._together, plan._steps), b.device.get(plan._steps, np.empty(10, np.int64))
        plan._together, plan._steps = kernel, plan.keep(np.append(told, room.address))
        step, taken = stepping(session), []
        try:
            for _ in range(2 if b.cupy is None else 12):
                step()
                taken.append(b.device.get(room.address, np.empty((len(one), 2, blocks), np.int64)))
        finally:
            plan._together, plan._steps = plain
        times = np.array(taken[-8:], np.float64)  # [tokens, steps, 2, blocks]
        work = times[:, :, 0] - np.concatenate([times[:, :1, 0], times[:, :-1, 1]], 1)
        wait = times[:, :, 1] - times[:, :, 0]
        whole = float(np.median((times[:, -1, 1] - times[:, 0, 0]).max(-1)))
        found: dict[str, list[np.ndarray]] = {}
        for i, s in enumerate(one):
            row = np.median([work[:, i].max(-1), work[:, i].mean(-1), wait[:, i].min(-1)], 1)
            shape = f" {s.arguments['outputs']}x{32 * s.arguments['runs']}" if s.operator.name == "linear_one" else ""
            found.setdefault(s.name + shape, []).append(row)
        lines = [f"{whole:,.0f} cycles from the first step's end, slower by the stamps"]
        for name, rows in sorted(found.items(), key=lambda item: -np.sum(item[1])):
            slowest, mean, meeting = np.mean(rows, 0)
            lines.append(f"{name} x{len(rows)}: {slowest:,.0f} (mean {mean:,.0f}) and {meeting:,.0f} to meet")
        if b.options.traces:
            names = np.array([s.name for s in one])
            path = b.options.traces / f"{len(list(b.options.traces.iterdir()))}.npz"
            np.savez_compressed(path, times=times[-3:].astype(np.int64), names=names)
        return lines

    return run


def by_operator(b: Bench, model: Any, run: Run) -> list[str]:
    """The launches of a pass of many rows, each timed by itself."""
    plan, launch, found = model.engine._plan, b.device.launch, {}
    names = {}
    for (_, at, *_), step in zip(plan._launches, [step for step in plan.steps if step.when & ~ONE], strict=True):
        shape = (
            f" {step.arguments['outputs']}x{32 * step.arguments['runs']}" if step.operator.name == "linear_many" else ""
        )
        names[at] = step.name + shape

    def timed(kernel: Any, a: int, *rest: Any, **named: Any) -> None:
        seconds = b.timed(lambda: launch(kernel, a, *rest, **named))
        found.setdefault(names[a], []).append(seconds)

    run()
    plain = plan.run_pass
    b.device.launch, plan.run_pass = timed, lambda *pass_: plan.launches(*pass_)()
    try:
        run(), run()
    finally:
        del b.device.launch
        plan.run_pass = plain
    total = sum(map(sum, found.values())) / 2
    rows = sorted(found.items(), key=lambda item: -sum(item[1]))
    return [f"{1e3 * total:.2f} ms in launches"] + [
        f"{name} x{len(times) // 2}: {1e6 * np.median(times):.1f} µs, {sum(times) / 2 / total:.0%}"
        for name, times in rows[:10]
    ]
