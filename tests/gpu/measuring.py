"""What measure_gpu.py measures with: models of real shapes and random weights, clocks, the table, a Llama in PyTorch."""

from __future__ import annotations

import gc
import json
import math
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import importable  # noqa: F401
import numpy as np
from conftest import FLOATS
from gguf.quants import quantize
from plans import SCALES, normal, random_matrix, scales

from tcinfer import kernels, memory
from tcinfer.config import ModelConfig
from tcinfer.kernels.cuda import Cuda, operators
from tcinfer.kernels.cuda import plan as plans_of_gpu
from tcinfer.kernels.reference.quants import Kind, Matrix
from tcinfer.memory import tensor
from tcinfer.memory.state import State
from tcinfer.model import Model, tensors
from tcinfer.sampling import Sampling
from tcinfer.session import Session
from tcinfer.tokenizer import from_metadata

GREEDY = Sampling(temperature=0)
SINKS = 4
SPIN = 200_000  # cycles that the device is kept busy with while work for it is prepared: about a tenth of a millisecond
WAITS = 'extern "C" __global__ void spin(long long n) { long long t = clock64(); while (clock64() - t < n); }'
Run = Callable[[], Any]


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
    """Random weights of a trained model's size, the first 256 rows again and again; one matrix for whoever asks."""
    some = min(rows, 256)
    if kind in FLOATS:
        data = quantize(normal(7, some, columns) / np.float32(math.sqrt(columns)), kind).view(np.uint8)
    else:
        w = random_matrix(kind, some, columns)
        for i in range(len(SCALES[kind])):
            scales(w, i)[:] *= 1 / (math.sqrt(columns) * w.values.std())
        data = w.data
    return Matrix(np.tile(data.reshape(some, -1), (-(-rows // some), 1))[:rows], kind, (rows, columns))


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
    own = {"arch": "tcllama", "options": tensor.Options()} if memory_kind == "tensor" else {"arch": "llama"}
    names = ("vocab_size", "n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff")
    sinks = SINKS if memory_kind == "sinks" else 0
    fields: dict[str, Any] = dict(zip(names, sizes, strict=True), memory=memory_kind, window=window, sinks=sinks, **own)
    return ModelConfig(context_length=8192, **fields)


def packed_once() -> None:
    """A matrix that many layers share is repacked once, sent once, and for the other layers copied on the device."""
    pack, upload = operators.packed, plans_of_gpu.Plan.upload
    done: dict[int, tuple[Matrix, Any]] = {}  # kept, and so their ids are nobody else's
    parts: set[int] = set()

    def packed(w: Matrix) -> Any:
        if id(w) not in done:
            done[id(w)] = w, pack(w)
            parts.update(id(part) for part in done[id(w)][1] if part is not None)
        return done[id(w)][1]

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

    operators.packed, plans_of_gpu.Plan.upload = packed, sent  # type: ignore[method-assign, assignment]


def filled(model: Model, position: int = 5000) -> Session:
    """A session that stands at a position, its state full of random numbers (zeros would cost less)."""
    state, some = State(memory.layout(model.config)), normal(3, 1 << 16)
    for layer in state.layers:
        for name, array in layer.items():
            array[...] = np.resize(some if name in ("k", "v") else some / 100, array.shape)
    state.position = position
    session = model.session()
    session._state = model.adopted(state)
    return session


def same_again(session: Session) -> Session:
    """Another session that stands where this one does."""
    other = session.model.session()
    other._state = session.model.adopted(session._state)
    return other


def moved(model: Model) -> int:
    """Bytes that a token cannot but move: weights, keys and values it sees, matrices read and written."""
    times = {"k": 1, "v": 1, "A": 2, "z": 2}
    fields = [f for _, f, _ in memory.layout(model.config).places()]
    state = sum(times.get(f.name, 0) * math.prod(f.shape) * np.dtype(f.dtype).itemsize for f in fields)
    return (model.bytes_per_token or 0) + state


def stepping(session: Session) -> Callable[[], int]:
    """Feeds the session the id that it stands before, and gives the one chosen next, as `generate` does."""
    session.draws, token = GREEDY.draws(), 1

    def run() -> int:
        nonlocal token
        session._advance(token, GREEDY)
        chosen = session._chosen_ahead(GREEDY)
        if chosen is None:
            raise ArithmeticError("logits are not finite, or were not chosen from on the device")
        token = chosen
        return token

    return run


# Measuring


class Bench:
    """A device, what is measured on it, and how long that may take."""

    def __init__(self, options: Namespace, device: Any, cupy: Any = None) -> None:
        """cupy: None on the stand-in."""
        self.device, self.cupy, self.options = device, cupy, options
        self.ops, self.until = Cuda(device), time.monotonic() + options.seconds
        kernels._cuda = lambda: self.ops  # every model here is of this device
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
        missed = " (missed)" if good is False else ""
        print(f"{self.options.alone}: {what}: {figure}{missed}", flush=True)
        self.tell(section=self.options.alone, what=what, figure=figure + missed, wanted=wanted)

    def tell(self, **fact: Any) -> None:
        with open(self.options.rows, "a") as file:
            file.write(json.dumps(fact) + "\n")

    def random(self, shape: str, kind: Kind, memory_kind: str = "sinks", window: int = 512) -> Model:
        """A model of one of SHAPES, in device memory that the one before has left."""
        self.tidy()
        of = SHAPES[shape] if self.cupy is not None else TINY
        config = config_of(of, memory_kind, window)
        return Model(config, weights(config, of.tied, [kind]), from_metadata({}, of.vocab), self.ops)

    def tidy(self) -> None:
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
        plan: Any = model._engine._plan  # type: ignore[union-attr]
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


# PyTorch


class TorchLlama:
    """The same shape in PyTorch, bf16: fused projections, sdpa over a static cache, a CUDA graph a token."""

    def __init__(self, shape: Shape, longest: int, compiled: bool) -> None:
        """longest: tokens that the caches hold; compiled: what stands around attention goes through torch.compile."""
        import torch

        self.torch, self.shape = torch, shape
        C, D, F, G = shape.width, shape.head_dim, shape.ffn, shape.kv_heads

        def random(*size: int) -> Any:
            return torch.randn(size, device="cuda", dtype=torch.bfloat16) * size[-1] ** -0.5

        def layer() -> tuple[Any, ...]:
            wide = (shape.heads + 2 * G) * D
            caches = [random(G, longest, D) for _ in range(2)]
            return random(wide, C), random(C, shape.heads * D), random(2 * F, C), random(C, F), *caches

        self.layers = [layer() for _ in range(shape.layers)]
        self.embedding = random(shape.vocab, C)
        self.head = self.embedding if shape.tied else random(shape.vocab, C)
        self.ones = torch.ones(C, device="cuda", dtype=torch.bfloat16)
        angles = torch.arange(longest, device="cuda")[:, None] * 1e4 ** (-torch.arange(D // 2, device="cuda") * 2 / D)
        self.cos, self.sin = angles.cos().bfloat16(), angles.sin().bfloat16()
        self.token = torch.zeros(1, dtype=torch.long, device="cuda")
        made = torch.compile if compiled else lambda f: f
        self.before, self.after = made(self._before), made(self._after)

    def _before(self, x: Any, qkv: Any, cos: Any, sin: Any) -> tuple[Any, ...]:
        f, s = self.torch.nn.functional, self.shape
        h = f.linear(f.rms_norm(x, (s.width,), self.ones, 1e-5), qkv).view(-1, s.head_dim)
        turning, v = h.split([s.heads + s.kv_heads, s.kv_heads])
        a, b = turning.chunk(2, -1)
        q, k = self.torch.cat([a * cos - b * sin, a * sin + b * cos], -1).split([s.heads, s.kv_heads])
        return q, k, v

    def _after(self, x: Any, y: Any, out: Any, up: Any, down: Any) -> Any:
        f = self.torch.nn.functional
        x = x + f.linear(y, out)
        gate, value = f.linear(f.rms_norm(x, (self.shape.width,), self.ones, 1e-5), up).chunk(2, -1)
        return x + f.linear(f.silu(gate) * value, down)

    def _token(self, at: Any, context: int, grouped: bool) -> None:
        """at: where in the stream it stands, the last of `context`; grouped: the heads of a key head as its queries."""
        f, s = self.torch.nn.functional, self.shape
        x, cos, sin = self.embedding[self.token], self.cos[at], self.sin[at]
        for qkv, out, up, down, keys, values in self.layers:
            q, k, v = self.before(x, qkv, cos, sin)
            keys.index_copy_(1, at, k[:, None])
            values.index_copy_(1, at, v[:, None])
            q = q.view(1, s.kv_heads, -1, s.head_dim) if grouped else q.view(1, s.heads, 1, s.head_dim)
            seen = keys[None, :, :context], values[None, :, :context]
            y = f.scaled_dot_product_attention(q, *seen, enable_gqa=not grouped)
            x = self.after(x, y.reshape(1, -1), out, up, down)
        logits = f.linear(f.rms_norm(x, (s.width,), self.ones, 1e-5), self.head)
        self.token.copy_(logits.argmax(-1))

    def stepping(self, context: int, grouped: bool) -> Callable[[], int]:
        """A token at the end of such a context, by one graph, and the id it gives."""
        torch = self.torch
        with torch.no_grad():
            at, aside, graph = torch.tensor([context - 1], device="cuda"), torch.cuda.Stream(), torch.cuda.CUDAGraph()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(3):
                    self._token(at, context, grouped)
            torch.cuda.current_stream().wait_stream(aside)
            with torch.cuda.graph(graph):
                self._token(at, context, grouped)

        def run(at: Any = at) -> int:  # the graph reads `at` wherever it lies: it must live as long
            graph.replay()
            return int(self.token.item())

        return run
