"""Checks and measures the CUDA backend on a GPU, all in one call, and prints a short table last.

    python tests/gpu/measure_gpu.py [--quick] [--golden FOLDER] [--json FILE] [--compiled] [SECTION ...]

Sections, in this order: golden (answers against the published checkpoints and the reference), decode, graph (a token as
one launch a step, for comparison), sessions, prompt, torch (PyTorch beside it), long (a million tokens), sanitize. Each
is a process of its own with its share of the time (--seconds), so that one that fails or hangs takes no other with it;
the exit status is 1 if any did. --compiled: PyTorch's side through torch.compile. --stand-in: everything tiny on CPU
threads in place of a GPU, to test this script.

Needs CuPy, Numba and pytest, for some sections PyTorch and compute-sanitizer; tcinfer need not be installed. Where there
is no network, bring wheels of gguf and platformdirs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from measuring import Bench

ROOT = Path(__file__).resolve().parents[2]
SECONDS, QUICK = 510, 165  # of all sections together
GRACE = 12  # seconds after which a section that should have ended is ended
BUNDLED = "Q8_0,F32"  # kinds of the bundled model's matrices
EVERY = "F32,F16,BF16,Q8_0,Q4_0,Q4_1,Q5_0,Q5_1,Q4_K,Q5_K,Q6_K"
MUST = {"135M": "1,500 tok/s", "1B": "0.50 of the copy", "8B": "0.65 of the copy"}  # Q8_0, window 512
LIMIT = 1e-4  # of the largest logit
HALVES = 5e-3  # the same where activations are halves, or a cache is: products of many rows
GIGA = 1e9


def close(b: Bench, what: str, errors: dict[str, float], limit: float) -> None:
    """A row of the worst of some errors. Raises where it is beyond the limit, or there is none."""
    name, worst = max(errors.items(), key=lambda item: item[1] if item[1] == item[1] else float("inf"))
    good = worst <= limit
    b.row(f"{what} ({len(errors)})", f"worst {worst:.1e}, {name}", f"{limit:.0e}", good)
    if not good:
        raise AssertionError(f"{what}: " + ", ".join(f"{k} {v:.1e}" for k, v in errors.items() if not v <= limit))


def golden(b: Bench) -> None:
    """Answers: the published checkpoints, every mechanism, every kind of weights, sessions together."""
    import test_memory

    names = list(test_memory.CASES)
    names = names[::23] if b.cupy is None else names[::4] if b.quick else names
    checks: list[Callable[[], None]] = [
        lambda: close(b, "mechanisms against the reference", {name: contract(name) for name in names}, LIMIT),
        lambda: every_kind(b),
        lambda: checkpoints(b),
    ]
    failed = []
    for check in checks:
        try:
            check()
        except Exception as e:
            failed.append(brief(e))
    if failed:
        raise AssertionError("; ".join(failed))


def contract(name: str, count: int = 48) -> float:
    """The worst error of a case of tests/test_memory.py, fed in chunks of several sizes; going on from a copy."""
    import numpy as np
    from test_memory import IDS, W, arrays, difference, feed, model_of

    ids, model, reference = IDS[:count], model_of(name, "cuda"), model_of(name, "numpy").session()
    want, errors = reference.feed(ids, all_logits=True), []
    for lengths in ([], [1] * count, [W, 1, W + 1]):
        session = model.session()
        errors.append(difference(feed(session, ids, lengths), want))
        errors += [difference(array, arrays(reference)[key]) for key, array in arrays(session).items()]
    session = model.session()
    session.feed(ids[: count // 2])
    snapshot, fork = session.snapshot(), session.fork()
    on, beside = (feed(s, ids[count // 2 :], [1] * 5) for s in (session, fork))
    fork.restore(snapshot)
    same = np.array_equal(on, beside) and np.array_equal(on, feed(fork, ids[count // 2 :], [1] * 5))
    return max(errors) if same and np.isfinite(errors).all() else float("inf")


def every_kind(b: Bench, count: int = 300) -> None:
    """A model in which every matrix is of another kind, against the reference; many sessions against one at a time."""
    import numpy as np
    from measuring import GREEDY, Shape, config_of, stepping, weights
    from test_memory import difference, feed

    from tcinfer.kernels.reference import Reference
    from tcinfer.kernels.reference.quants import Kind
    from tcinfer.model import Model
    from tcinfer.tokenizer import from_metadata

    count, kinds = (40, BUNDLED) if b.cupy is None else (count, EVERY)
    shape = Shape(3, 256, 4, 2, 64, 512, 320, False)
    config = config_of(shape, "sinks", count // 4)
    bound = weights(config, shape.tied, [Kind[kind] for kind in kinds.split(",")])
    tokenizer, ids = from_metadata({}, shape.vocab), np.random.default_rng(5).integers(0, shape.vocab, count)
    reference, model = (Model(config, bound, tokenizer, ops) for ops in (Reference(), b.ops))
    want = reference.session().feed(ids, all_logits=True)
    single, at_once = (difference(feed(model.session(), ids, n), want) for n in ([1] * (count - 1), []))
    close(b, "kinds of weights, one by one", {kinds: single}, 1e-3)
    close(b, "kinds of weights, at once", {kinds: at_once}, HALVES)

    sessions = [model.session() for _ in range(3 if b.cupy is None else 70)]
    tokens, errors = ids[: len(sessions)], {}
    for i, session in enumerate(sessions):
        session.feed(ids[: 1 + i])
    forks = [session.fork() for session in sessions]
    together = model.step_many(sessions, tokens)
    alone = np.stack([fork.feed(token) for fork, token in zip(forks, tokens, strict=True)])
    errors["logits"] = difference(together, alone)
    chosen = model.step_many(sessions, tokens, GREEDY)
    errors["ids"] = float(sum(c != s.logits.argmax() for c, s in zip(chosen, sessions, strict=True)))
    run, fork = stepping(forks[0]), forks[0].fork()
    first = int(fork.feed(1).argmax())
    errors["an id of one"] = float(run() != first)
    close(b, "sessions together against one by one", errors, HALVES)


def checkpoints(b: Bench) -> None:
    """The golden checkpoints, with the thresholds of tests/test_golden.py."""
    import numpy as np
    from test_golden import FEEDS, memory_of, relative

    from tcinfer import converters
    from tcinfer.loader import load

    found = sorted(b.options.golden.glob("*/golden.npz"))
    if not found:
        b.row("golden checkpoints", f"skipped: none in {b.options.golden}")
        return
    errors = {}
    with tempfile.TemporaryDirectory() as folder:
        for path in found[:2] if b.cupy is None else found:
            name, made = path.parent.name, Path(folder, "model.gguf")
            made.unlink(missing_ok=True)
            converters.convert(path.parent / "ckpt.pt", made, "f32", verify=False)
            model, want = load(made, backend="cuda", cache_type="f32"), np.load(path)
            for way, lengths in FEEDS.items():
                session = model.session()
                parts = np.split(want["tokens"], np.cumsum(lengths)[:-1])
                got = np.concatenate([session.feed(part, all_logits=True) for part in parts])
                states, worst = session._state.layers, relative(got, want["logits"])
                for key in (key for key in want.files if "." in key):
                    memory, layer = key.split(".")
                    kept = memory_of(states[int(layer)], memory, want[key].shape)
                    worst = max(worst, relative(kept, want[key]))
                errors[f"{name} {way}"] = worst
            del model, session
    close(b, "golden checkpoints", errors, LIMIT)


def decode(b: Bench) -> None:
    """A token at a time: bytes that must move over time, beside the bandwidth of a copy."""
    from measuring import Kind, filled, moved, stepping

    rate = b.copy_rate()
    b.row("copy within the device, read and written", f"{rate / GIGA:,.0f} GB/s")
    shown = set()
    for shape, kind, memory, window in cases(b):
        if b.left() < (12 if shape == "8B" else 6):
            b.row(f"{shape} {kind} {memory} {window}", "not reached")
            continue
        model = b.random(shape, Kind[kind], memory, window)
        if kind not in shown:
            shown.add(kind)
            resources(b, kind, model)
        run = stepping(filled(model))
        (seconds,) = b.medians([run], 0.8)
        device = b.device_time(model, run)
        part = moved(model) / seconds / rate
        wanted = MUST[shape] if (kind, memory, window) == ("Q8_0", "sinks", 512) else ""
        good = {"": None, MUST["135M"]: seconds <= 1 / 1500, MUST["1B"]: part >= 0.5, MUST["8B"]: part >= 0.65}[wanted]
        speed = f"{1 / seconds:,.0f} tok/s, {1e3 * seconds:.3f} ms (device {1e3 * device:.3f})"
        b.row(f"{shape} {kind} {memory} {window}", f"{part:.2f} of the copy, {speed}", wanted, good)
        del model, run


def cases(b: Bench) -> Iterable[tuple[str, str, str, int]]:
    """What must be reached first; then the rest, least first."""
    if b.cupy is None:
        return [("1B", "Q8_0", "sinks", 512), ("1B", "Q8_0", "tensor", 512)]
    first = [(shape, "Q8_0", "sinks", 512) for shape in ("1B", "8B", "135M")]
    more = [(shape, kind, "sinks", 512) for shape in ("135M", "1B", "8B") for kind in ("Q4_0", "F16")]
    wide = [("135M", "Q8_0", "sinks", 4096), ("1B", "Q8_0", "tensor", 512), ("1B", "Q8_0", "sinks", 4096)]
    wide += [("8B", "Q8_0", "sinks", 1024), ("8B", "Q8_0", "sinks", 4096)]
    rest = [(shape, kind, "sinks", 4096) for shape in ("135M", "1B", "8B") for kind in ("Q4_0", "F16")]
    return first + wide if b.quick else first + more + wide + rest


def resources(b: Bench, kind: str, model: Any) -> None:
    """What the compiler made of the single launch."""
    kernel = getattr(model._engine._plan, "_together", None)
    with contextlib.suppress(AttributeError):
        b.row(f"{kind}: the launch of a token", f"{kernel.num_regs} registers, {kernel.local_size_bytes} bytes spilled")


def graph(b: Bench) -> None:
    """The token's steps as launches in a CUDA graph, beside the one launch: the slower way can go."""
    import numpy as np
    from measuring import Kind, filled, same_again, stepping

    for shape in ("1B",) if b.cupy is None else ("135M", "1B", "8B"):
        if b.left() < 12:
            b.row(shape, "not reached")
            continue
        model = b.random(shape, Kind.Q8_0)
        plan: Any = model._engine._plan
        start = filled(model)
        mine, other = same_again(start), same_again(start)
        run, again = stepping(mine), stepping(other)
        ids = [run() for _ in range(4)]
        (seconds,) = b.medians([run], 0.5)
        device = b.device_time(model, run)
        b.row(f"{shape} Q8_0: one launch a token", f"{1e3 * seconds:.3f} ms (device {1e3 * device:.3f})")
        whole, launch, found = plan.run_pass, steps_alone(b, model), {}
        for blocks in (1,) if b.cupy is None else (1, 2, 4):
            plan.run_pass = captured(b, lambda blocks=blocks: launch(blocks))
            if not found:
                same = [again() for _ in range(4)] == ids
                near = np.abs(other.logits - logits_after(model, start, ids, whole)).max() / np.abs(other.logits).max()
                plan.run_pass = captured(b, lambda blocks=blocks: launch(blocks))
                b.row(
                    f"{shape} Q8_0: graph against launch",
                    f"{near:.1e}, ids {'the same' if same else 'differ'}",
                    "1e-04",
                )
            (seconds,) = b.medians([again], 0.5)
            found[seconds] = f"{1e3 * seconds:.3f} ms (device {1e3 * b.device_time(model, again):.3f}), {blocks} blocks"
        plan.run_pass = whole
        b.row(f"{shape} Q8_0: a graph of launches", found[min(found)])
        del model, plan, start, mine, other, run, again, whole, launch


def logits_after(model: Any, start: Any, ids: list[int], run_pass: Callable) -> Any:
    """What the one launch gives where `stepping` from `start` has given `ids`."""
    from measuring import same_again

    session, model._engine._plan.run_pass = same_again(start), run_pass
    for token in [1, *ids[:-1]]:
        logits = session.feed(token)
    return logits


def steps_alone(b: Bench, model: Any) -> Callable[[int], None]:
    """Launches every step of a single token by itself, with so many blocks for each multiprocessor."""
    import numpy as np

    from tcinfer.kernels.cuda import plan as plans
    from tcinfer.kernels.cuda.program import ALONE_THREADS, source

    plan, address = model._engine._plan, model._engine._pass.address
    kinds = {step.operator.kind for step in plan.steps if step.operator.kind}
    program = b.device.program(source(True, kinds).replace("EACH_TOGETHER(X)", "EACH_ALONE(X)", 1))
    launches = []
    for step in (step for step in plan.steps if step.when & plans.ONE):
        arguments = list(step.arguments or [0])
        if step.operator.name == "linear_one":
            arguments[-1] = 1  # FRESH: shared memory holds nothing of the launch before
        kernel, shared = program.kernel(f"step_{step.operator.full}"), plans._shared([step], ALONE_THREADS)
        launches.append((kernel, plan.upload(np.array(arguments, np.int64)), shared))

    def launch(blocks: int) -> None:
        for kernel, arguments, shared in launches:
            b.device.launch(kernel, arguments, address, blocks * b.device.multiprocessors, ALONE_THREADS, shared)

    return launch


def captured(b: Bench, launch: Callable[[], None]) -> Callable[[int, int], None]:
    """In place of Plan.run_pass: the same launches as a CUDA graph."""
    if b.cupy is None:
        return lambda kind, address: launch()
    launch()  # modules are loaded, and leave for shared memory is given
    b.device.wait()
    stream = b.cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        launch()
        made = stream.end_capture()
    return lambda kind, address: made.launch()


def sessions(b: Bench) -> None:
    """Tokens a second of many sessions stepped together, and how many there is room for."""
    import numpy as np
    from measuring import GREEDY, Kind, filled, same_again

    from tcinfer.loader import load

    shakespeare = ROOT / "models" / "shakespeare.gguf"  # on the stand-in: smaller
    makers = {
        "135M Q8_0 window 512": lambda: b.random("135M", Kind.Q8_0),
        "bundled model": lambda: load(shakespeare if b.cupy is None else None, backend="cuda"),
    }
    for name, make in makers.items():
        b.tidy()
        model = make()
        c, free, some = model.config, b.device.free_bytes, [filled(model, 700)]
        size, cache = some[0].nbytes, 4 * c.n_layers * 32768 * c.n_kv_heads * c.head_dim
        room = (
            f"{free // size:,} of {size / 1e6:.1f} MB; of full caches at 32k ({cache / 1e6:,.0f} MB) {free // cache:,}"
        )
        b.row(f"{name}: sessions beside the weights", room)
        for count in (1, 3) if b.cupy is None else (1, 64, 1024, 4096):
            what = f"{name}: {count:,} sessions"
            if count * size > 0.9 * free or b.left() < 4:
                b.row(what, "no room" if b.left() >= 4 else "not reached")
                continue
            some += [same_again(some[0]) for _ in range(count - len(some))]
            ids, taken = np.arange(count) % c.vocab_size, []
            started = time.perf_counter()
            while len(taken) < 3 or (time.perf_counter() - started < 1.5 and b.cupy is not None):
                begun = time.perf_counter()
                ids = model.step_many(some, ids, GREEDY)
                taken.append(time.perf_counter() - begun)
            seconds = float(np.median(taken))
            b.row(what, f"{count / seconds:,.0f} tok/s, {1e3 * seconds:.2f} ms a step")
        del model, some


def prompt(b: Bench) -> None:
    """A long prompt: operations over time, beside the rate of a large product of matrices."""
    import numpy as np
    from measuring import SINKS, Kind, Matrix

    rate, tokens, window = b.matrix_rate(), 300 if b.cupy is None else 4096 if b.quick else 16384, 512
    b.row("bf16 product of 8192 x 8192", "none: needs PyTorch" if rate is None else f"{rate / 1e12:,.0f} TFLOP/s")
    for kind in (Kind.Q8_0,) if b.cupy is None else (Kind.Q8_0, Kind.BF16):
        model = b.random("1B", kind, window=window)
        c, session = model.config, model.session()
        ids = np.random.default_rng(0).integers(0, c.vocab_size, tokens)
        held = sum(
            w.shape[0] * w.shape[1] for n, w in model.weights.items() if n.startswith("blk.") and isinstance(w, Matrix)
        )
        taken = []
        for _ in range(2 if b.cupy is None else 5):  # the first warms up
            session.reset()
            started = time.perf_counter()
            session.feed(ids)
            taken.append(time.perf_counter() - started)
        seconds = float(np.median(taken[1:]))
        work = tokens * (2 * held + 4 * c.n_layers * c.n_heads * c.head_dim * (window + SINKS))
        part = None if rate is None else work / seconds / rate
        figure = f"{work / seconds / 1e12:,.0f} TFLOP/s, {tokens / seconds:,.0f} tok/s"
        share = "" if part is None else f"{part:.2f} of the product, "
        b.row(f"1B {kind.name}: {tokens:,} tokens", share + figure, "0.35", None if part is None else part >= 0.35)
        del model, session


def torch(b: Bench) -> None:
    """The same shapes in PyTorch, contexts from 1k on, beside a constant memory."""
    from measuring import SHAPES, Kind, TorchLlama, filled, stepping

    if b.cupy is None:
        b.row("PyTorch", "none: needs a GPU")
        return
    contexts = (1024, 32768, 131072)
    for shape in ("1B", "135M"):
        model, theirs = b.random(shape, Kind.BF16), TorchLlama(SHAPES[shape], contexts[-1], b.options.compiled)
        run = stepping(filled(model))
        for context in contexts:
            what = f"{shape} BF16: window 512 against PyTorch at {context:,}"
            if b.left() < 5:
                b.row(what, "not reached")
                continue
            runs = []
            for grouped in (True, False):
                try:
                    runs.append(theirs.stepping(context, grouped))
                except Exception as e:
                    b.row(what, f"PyTorch, {'grouped' if grouped else 'enable_gqa'}: {brief(e)}")
            own, *others = b.medians([run, *runs], 0.8 * (1 + len(runs)))
            speeds = f"{1e3 * own:.3f} ms against {1e3 * min(others):.3f}"
            wanted = "1.2" if context == 1024 else "ahead"
            ratio = min(others) / own
            b.row(what, f"{ratio:.2f}x, {speeds}", wanted, ratio >= (1.2 if context == 1024 else 1))
            del runs
        del model, theirs, run


def long(b: Bench) -> None:
    """A million tokens of the bundled model: memory constant to the byte, latency flat."""
    import numpy as np
    from measuring import stepping

    from tcinfer.loader import load

    total, timed = (300, 20) if b.cupy is None else (20_000 if b.quick else 1_000_000, 1000)
    model = load(ROOT / "models" / "shakespeare.gguf" if b.cupy is None else None, backend="cuda")
    session = model.session()
    ids, run = np.random.default_rng(0).integers(0, model.config.vocab_size, 1 << 15), stepping(session)

    def latency() -> float:
        taken = []
        for _ in range(timed):
            started = time.perf_counter()
            run()
            taken.append(time.perf_counter() - started)
        return float(np.median(taken))

    session.feed(ids[: 4 * timed])
    first = latency()
    used, start = {b.used()}, time.perf_counter()  # at 5,000 tokens
    while session.position < total - timed and time.perf_counter() - start < min(120, b.left() / 2):
        run()
        if session.position % 1000 == 0:
            used.add(b.used())
    stepped = session.position
    while (rest := total - timed - session.position) > 0:
        if b.left() < 8:
            b.row("tokens", f"stopped at {session.position:,}", f"{total:,}", False)
            break
        session.feed(ids[: min(rest, len(ids))])
        used.add(b.used())
    last = latency()
    used.add(b.used())
    b.row("tokens of the bundled model", f"{session.position:,}, up to {stepped:,} one by one", f"{total:,}")
    held = f"{min(used)[0]:,} bytes, {'constant' if len(used) == 1 else f'{len(used)} different readings: {used}'}"
    b.row("device memory from 5,000 tokens on", held[:160], "constant", len(used) == 1)
    both = f"{1e3 * last:.3f} ms at the end, {1e3 * first:.3f} at the start"
    b.row("latency", f"{last / first:.2f}x: {both}", "1.00x", last / first < 1.05)
    if len(used) > 1:
        raise AssertionError("device memory changed")


def sanitize(b: Bench) -> None:
    """Small cases under compute-sanitizer."""
    command = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if b.cupy is None or not Path(command).exists():
        b.row("compute-sanitizer", "none: needs a GPU" if b.cupy is None else "not found")
        return
    bad = []
    for i, tool in enumerate(("memcheck", "racecheck")):
        limit = max(5, min(150, b.left() / (2 - i) - 2))
        small = [sys.executable, __file__, "--alone", "small", "--seconds", str(limit), "--rows", os.devnull]
        out, _ = ended([command, "--tool", tool, "--print-limit", "10", *small], limit, keep=True)
        lines = [line for line in out.splitlines() if line.strip()]
        summary = [line.strip("= ") for line in lines if "SUMMARY" in line]
        clean = bool(summary) and "0 errors" in summary[-1] and "small cases: all right" in out
        b.row(
            tool,
            summary[-1] if summary else f"no summary after {limit:.0f} s: {' '.join(lines[-1:])[:150]}",
            "0",
            clean,
        )
        if not clean:
            bad.append(tool)
            print("\n".join(lines[-12:]), flush=True)
    if bad:
        raise AssertionError(f"not clean: {', '.join(bad)}")


def small(b: Bench) -> None:
    """What the sanitizer looks at: a few short cases, every allocation the driver's own."""
    if b.cupy is not None:
        b.cupy.cuda.set_allocator(None)
    for name in ("sinks-in-cache", "infini-delta-gqa-key-conv", "tensor-everything"):
        b.row(name, f"{contract(name, 20):.1e}")
    every_kind(b, 40)
    print("small cases: all right", flush=True)


SECTIONS: dict[str, tuple[Callable[[Bench], None], float, tuple[str, ...]]] = {  # its share of time; kinds compiled
    "golden": (golden, 60, ("F32", EVERY)),
    "decode": (decode, 115, ("Q8_0", "Q4_0", "F16")),
    "graph": (graph, 30, ("Q8_0",)),
    "sessions": (sessions, 50, ("Q8_0", BUNDLED)),
    "prompt": (prompt, 35, ("Q8_0", "BF16")),
    "torch": (torch, 45, ("BF16",)),
    "long": (long, 100, (BUNDLED,)),
    "sanitize": (sanitize, 75, ("F32", EVERY)),
}


def brief(e: BaseException) -> str:
    """An error in one line, and where it arose."""
    at = traceback.extract_tb(e.__traceback__)[-1:]
    where = "".join(f" ({Path(frame.filename).name}:{frame.lineno})" for frame in at)
    return f"{type(e).__name__}: {' '.join(str(e).split())[:300]}{where}"


def ended(command: list[str], limit: float, keep: bool = False) -> tuple[str, str]:
    """Run a command and what it starts for at most so many seconds: its output, if kept, and how it failed, if it did."""
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"} if keep else {}
    env = os.environ | {"PYTHONUNBUFFERED": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    process = subprocess.Popen(command, env=env, process_group=0, **output)
    try:
        text, _ = process.communicate(timeout=limit)
        return text or "", f"exit status {process.returncode}" if process.returncode else ""
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        text, _ = process.communicate()
        return text or "", f"ended after {limit:.0f} s"


def device_of(options: argparse.Namespace) -> tuple[Any, Any]:
    """The device, and CuPy; the stand-in, and None."""
    import importable  # noqa: F401

    if options.stand_in:
        from host_device import HostDevice

        return HostDevice(), None
    import cupy

    from tcinfer.kernels.cuda.device import Device

    return Device(), cupy


def alone(options: argparse.Namespace) -> int:
    """One section, in this process."""
    try:
        device, cupy = device_of(options)
        from measuring import Bench

        b = Bench(options, device, cupy)
        name = device.name
        if cupy is not None:
            name += f", CUDA {cupy.cuda.runtime.driverGetVersion()}, CuPy {cupy.__version__}"
        b.tell(device=name)
        (small if options.alone == "small" else SECTIONS[options.alone][0])(b)
    except Exception as e:
        with open(options.rows, "a") as file:
            fact = {"section": options.alone, "what": "FAILED", "figure": brief(e), "wanted": ""}
            file.write(json.dumps(fact | {"traceback": traceback.format_exc()}) + "\n")
        print(f"{options.alone}: FAILED: {brief(e)}", flush=True)
        return 1
    return 0


def compile_(options: argparse.Namespace) -> None:
    """Put the programs of some kinds of weights into the compiler's cache."""
    device, _ = device_of(options)
    from tcinfer.kernels.cuda.program import operators, source

    kinds = set(options.compile.split(","))
    for together in (True, False):
        program = device.program(source(together, kinds), together=together)
        name = "together" if together else f"step_{operators(False, kinds)[0].full}"
        print(options.compile, name, program.kernel(name).num_regs, "registers", flush=True)


def everything(options: argparse.Namespace, argv: list[str]) -> int:
    """Every section that was asked for, each in a process of its own, and the table."""
    started, me, failed = time.monotonic(), [sys.executable, __file__], False
    kinds = sorted({kind for name in options.sections for kind in SECTIONS[name][2]}, key=len, reverse=True)
    warming = [] if options.stand_in else [subprocess.Popen([*me, "--compile", kind]) for kind in kinds]
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows")
        rows.touch()
        for i, name in enumerate(options.sections):
            if i or name != "golden":
                waited(warming, 60)  # they would disturb what is measured
            begun = time.monotonic()
            share = SECTIONS[name][1] / sum(SECTIONS[other][1] for other in options.sections[i:])
            seconds = max(5.0, (options.seconds - (begun - started)) * share)
            print(f"--- {name}: {seconds:.0f} s at most", flush=True)
            said = rows.read_text()
            how = [*me, *argv, "--alone", name, "--seconds", str(seconds), "--rows", str(rows)]
            _, error = ended(how, seconds + GRACE)
            if error and "FAILED" not in rows.read_text()[len(said) :]:
                with rows.open("a") as file:
                    fact = {"section": name, "what": "FAILED", "figure": error, "wanted": ""}
                    file.write(json.dumps(fact) + "\n")
            failed |= bool(error)
            print(f"--- {name}: {time.monotonic() - begun:.0f} s", flush=True)
        facts = [json.loads(line) for line in rows.read_text().splitlines()]
    waited(warming, 0)
    device = next((fact["device"] for fact in facts if "device" in fact), "no device")
    table, date = [fact for fact in facts if "section" in fact], time.strftime("%Y-%m-%d")
    if options.json:
        options.json.write_text(json.dumps({"device": device, "date": date, "rows": table}, indent=1))
    print(f"\n{device}; {date}; {time.monotonic() - started:.0f} s\n\n| | what | figure | wanted |\n|---|---|---|---|")
    for row in table:
        print(f"| {row['section']} | {row['what']} | {row['figure']} | {row['wanted']} |")
    return int(failed)


def waited(processes: list[subprocess.Popen], seconds: float) -> None:
    """Until all have ended, or were ended."""
    until = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    processes.clear()


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", choices=[*SECTIONS, []])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--stand-in", action="store_true")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--golden", type=Path, default=ROOT.parent / "shared" / "golden", metavar="FOLDER")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--seconds", type=float, help="for all sections together")
    for hidden in ("--alone", "--rows", "--compile"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.sections = [name for name in SECTIONS if not options.sections or name in options.sections]
    options.seconds = options.seconds or (QUICK if options.quick else SECONDS)
    if options.compile:
        compile_(options)
        return 0
    return alone(options) if options.alone else everything(options, [a for a in argv if a not in SECTIONS])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
