"""Checks and measures the CUDA backend on a GPU, all in one call, and prints a short table last.

    python tests/gpu/measure_gpu.py [--quick] [--golden FOLDER] [--cubins FOLDER] [--json FILE] [SECTION ...]

Sections, in this order: golden (answers, against the published checkpoints and the reference), decode, steps (where the
time of a token and of a prompt goes), sessions, prompt, torch (PyTorch beside it), long (a million tokens), sanitize,
profile (Nsight Compute).
Each is a process of its own with its share of the time (--seconds), so that one that fails or hangs takes no other with
it; the exit status is 1 if any did. --compiled: PyTorch's side through torch.compile. --stand-in: everything tiny, on
CPU threads in place of a GPU, to test this script.

Needs CuPy, Numba and pytest, some sections PyTorch and compute-sanitizer; tcinfer need not be installed. Where there is
no network, bring wheels of gguf and platformdirs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from measuring import Bench

ROOT = Path(__file__).resolve().parents[2]
SECONDS, QUICK = 510, 165  # for all sections together
GRACE = 12  # seconds after which a section that should have ended is ended
BUNDLED, EVERY = "Q8_0,F32", "F32,F16,BF16,Q8_0,Q4_0,Q4_1,Q5_0,Q5_1,Q4_K,Q5_K,Q6_K"  # kinds of a model's matrices
SHAPES = ("1B", "8B", "135M")  # of measuring.py, what matters most first
Case = tuple[str, str, str, int]  # shape, kind, memory, window


def golden(b: Bench) -> None:
    """The answers are right."""
    from answers import golden

    golden(b, (BUNDLED if b.cupy is None else EVERY).split(","))


def small(b: Bench) -> None:
    """What `sanitize` runs."""
    from answers import small

    small(b, (BUNDLED if b.cupy is None else EVERY).split(","))


def decode(b: Bench) -> None:
    """A token at a time: bytes that must move over time, beside the bandwidth of a copy."""
    from measuring import Kind, filled, moved, stepping

    rate, shown = b.copy_rate(), set()
    b.row("copy within the device, read and written", f"{rate / 1e9:,.0f} GB/s")
    for case in decode_cases(b):
        shape, kind, memory, window = case
        what = f"{shape} {kind} {memory} {window}"
        if not b.reached(what, 8 if shape == "8B" else 4):
            continue
        with b.attempt(what):
            model = b.random(shape, Kind[kind], memory, window)
            kernel = getattr(model.engine._plan, "_together", None)
            if kind not in shown and hasattr(kernel, "num_regs"):
                size = f"{kernel.num_regs} registers, {kernel.local_size_bytes} bytes of local memory"
                b.row(f"{kind}: a token's launch", size)
            shown.add(kind)
            run = stepping(filled(model))
            (seconds,) = b.medians([run], 0.8)
            device, part = b.device_time(model, run), moved(model) / seconds / rate
            speed = f"{1 / seconds:,.0f} tok/s, {1e3 * seconds:.3f} ms (device {1e3 * device:.3f})"
            wanted, good = decode_wanted(case, part, 1 / seconds)
            b.row(what, f"{part:.2f} of the copy, {speed}", wanted, good)
        model = run = kernel = None


def decode_cases(b: Bench) -> list[Case]:
    """What must be reached first; then the rest."""
    if b.cupy is None:
        return [("1B", "Q8_0", "sinks", 512), ("1B", "Q8_0", "tensor", 512)]
    sinks = [(shape, kind, "sinks", w) for w in (512, 4096) for kind in ("Q8_0", "Q4_0", "F16") for shape in SHAPES]
    sinks[3:3] = [("1B", "Q8_0", "tensor", 512), ("8B", "Q8_0", "sinks", 1024)]
    return sinks[:5] if b.quick else sinks


def decode_wanted(case: Case, part: float, speed: float) -> tuple[str, bool | None]:
    """What is wanted of a case, and whether it is so."""
    if case == ("135M", "Q8_0", "sinks", 512):
        return "1,500 tok/s", speed >= 1500
    least = {"1B": 0.5, "8B": 0.65}.get(case[0])
    return (f"{least} of the copy", part >= least) if least and case[1:3] == ("Q8_0", "sinks") else ("", None)


TRACED = [(shape, kind, "sinks", 512) for shape, kind in (("1B", "Q8_0"), ("135M", "Q8_0"), ("8B", "Q4_0"))]


def steps(b: Bench) -> None:
    """Where the time goes: by operator, what its slowest block takes and what the meeting after it costs."""
    from measuring import Kind, by_operator, filled, same_again, traced

    for shape, kind, memory, window in TRACED:
        what = f"{shape} {kind}"
        if not b.reached(what, 5):
            continue
        with b.attempt(what):
            model = b.random(shape, Kind[kind], memory, window)
            session = filled(model)
            for line in traced(b, model)(session):
                b.row(f"{what}: a token", line)
            for line in by_operator(b, model, lambda s=session: s.feed([1] * 1024)):
                b.row(f"{what}: 1,024 tokens of a prompt", line)
            some = [same_again(session) for _ in range(3 if b.cupy is None else 64)]
            for line in by_operator(b, model, lambda s=some: s[0].model.step_many(s, [1] * len(s))):
                b.row(f"{what}: {len(some)} sessions", line)
        model = session = some = None


def sessions(b: Bench) -> None:
    """Tokens a second of many sessions stepped together, and how many there is room for."""
    from measuring import Kind, filled, same_again

    makers = {"135M Q8_0, window 512": lambda: b.random("135M", Kind.Q8_0), "bundled model": lambda: bundled(b)}
    for name, make in makers.items():
        with b.attempt(name):
            b.tidy()
            model = make()
            c, free, some = model.config, b.device.free_bytes, [filled(model, 700)]
            size, cache = some[0].nbytes, 4 * c.n_layers * 32768 * c.n_kv_heads * c.head_dim
            full = f"full caches at 32k ({cache / 1e6:,.0f} MB): {free // cache:,}"
            b.row(f"{name}: sessions beside the weights", f"{free // size:,} of {size / 1e6:.1f} MB; {full}")
            for count in (1, 3) if b.cupy is None else (1, 64, 1024, 4096):
                what = f"{name}: {count:,} sessions"
                if count * size > 0.9 * free:
                    b.row(what, "no room")
                elif b.reached(what, 5):
                    some += [same_again(some[0]) for _ in range(count - len(some))]
                    seconds = together(b, model, some)
                    b.row(what, f"{count / seconds:,.0f} tok/s, {1e3 * seconds:.2f} ms a step")
        model = some = None


def together(b: Bench, model: Any, some: list[Any]) -> float:
    """Seconds of a step of all these sessions, greedy, median."""
    import numpy as np
    from measuring import GREEDY

    ids, taken, until = np.arange(len(some)) % model.config.vocab_size, [], time.monotonic() + 1.5
    while len(taken) < 3 or (time.monotonic() < until and b.cupy is not None):
        started = time.perf_counter()
        ids = model.step_many(some, ids, GREEDY)
        taken.append(time.perf_counter() - started)
    return float(np.median(taken[1:]))


def bundled(b: Bench) -> Any:
    """The model that comes with tcinfer; on the stand-in the smaller one."""
    from tcinfer.loader import load

    return load(ROOT / "models" / "shakespeare.gguf" if b.cupy is None else None, backend="cuda")


def prompt(b: Bench) -> None:
    """A long prompt: operations over time, beside the rate of a large product of matrices."""
    import numpy as np
    from measuring import SINKS, Kind, Matrix

    rate, tokens = b.matrix_rate(), 300 if b.cupy is None else 4096 if b.quick else 16384
    b.row("bf16 product of 8192 x 8192", f"{rate / 1e12:,.0f} TFLOP/s" if rate else "none: needs PyTorch")
    for kind in (Kind.Q8_0,) if b.cupy is None else (Kind.Q8_0, Kind.BF16):
        what = f"1B {kind.name}, window 512: {tokens:,} tokens"
        if not b.reached(what, 6):
            continue
        with b.attempt(what):
            model = b.random("1B", kind)
            c, session, taken = model.config, model.session(), []
            layers = [w for name, w in model.weights.items() if name.startswith("blk.") and isinstance(w, Matrix)]
            ids = np.random.default_rng(0).integers(0, c.vocab_size, tokens)
            for _ in range(2 if b.cupy is None else 5):  # the first warms up
                session.reset()
                started = time.perf_counter()
                session.feed(ids)
                taken.append(time.perf_counter() - started)
            seconds = float(np.median(taken[1:]))
            attention = 4 * c.n_layers * c.n_heads * c.head_dim * (c.window + SINKS)
            speed = tokens * (2 * sum(w.shape[0] * w.shape[1] for w in layers) + attention) / seconds
            share = f"{speed / rate:.2f} of the product, " if rate else ""
            figure = f"{share}{speed / 1e12:,.0f} TFLOP/s, {tokens / seconds:,.0f} tok/s"
            b.row(what, figure, "0.35 of the product", speed / rate >= 0.35 if rate else None)
        model = session = layers = None


def torch(b: Bench) -> None:
    """The same shapes in PyTorch, contexts from 1k on, beside a constant memory."""
    from measuring import Kind, filled, stepping

    try:
        from torch_llama import TorchLlama
    except ImportError as e:
        b.row("PyTorch", f"none: {e}")
        return
    contexts, where = ((16, 32), "cpu") if b.cupy is None else ((1024, 32768, 131072), "cuda")
    for shape in ("1B",) if b.cupy is None else ("1B", "135M"):
        with b.attempt(shape):
            kind = Kind.Q8_0 if b.cupy is None else Kind.BF16
            model = b.random(shape, kind)
            run, theirs = stepping(filled(model)), TorchLlama(b.shape(shape), contexts[-1], b.options.compiled, where)
            for i, context in enumerate(contexts):
                what = f"{shape} {kind.name}, window 512, against PyTorch's BF16 at {context:,}"
                if not b.reached(what, 5):
                    continue
                others = []
                for grouped in (True, False):
                    with b.attempt(f"{what}, {'heads grouped' if grouped else 'enable_gqa'}"):
                        others.append(theirs.stepping(context, grouped))
                own, *found = b.medians([run, *others], 0.8 * (1 + len(others)))
                ratio, wanted = min(found) / own, 1.0 if i else 1.2
                speeds = f"{1e3 * own:.3f} ms against {1e3 * min(found):.3f}"
                b.row(what, f"{ratio:.2f}x, {speeds}", f"{wanted:g}x", ratio >= wanted)
        model = run = theirs = others = None


def long(b: Bench) -> None:
    """A million tokens of the bundled model: memory constant to the byte, latency flat."""
    import numpy as np
    from measuring import stepping

    total, timed = (200, 20) if b.cupy is None else (20_000 if b.quick else 1_000_000, 1000)
    model = bundled(b)
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
    used, until = {b.used()}, time.monotonic() + min(120, 0.6 * b.left())  # at 5,000 tokens
    while session.position < total - timed and time.monotonic() < until:
        run()
        if session.position % 1000 == 0:
            used.add(b.used())
    stepped = session.position
    while (rest := total - timed - session.position) > 0 and b.reached(f"all of {total:,} tokens", 5):
        session.feed(ids[:rest])
        used.add(b.used())
    last = latency()
    used.add(b.used())
    b.row("tokens of the bundled model", f"{session.position:,}, one by one up to {stepped:,}", f"{total:,}", rest <= 0)
    b.row("latency", f"{last / first:.2f}x: {1e6 * first:.0f} µs, then {1e6 * last:.0f}", "1.00x", last < 1.05 * first)
    held = f"{max(used)[0]:,} bytes" + (f", but {len(used)} readings: {used}"[:120] if len(used) > 1 else "")
    b.row("device memory from 5,000 tokens on", held, "constant", len(used) == 1)
    b.failed |= rest > 0 or len(used) > 1


def sanitize(b: Bench) -> None:
    """Small cases under compute-sanitizer."""
    command = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if b.cupy is None or not Path(command).exists():
        b.row("compute-sanitizer", "none: needs a GPU" if b.cupy is None else "not found")
        return
    for last, tool in enumerate(("memcheck", "racecheck")):
        limit = max(5.0, min(150.0, b.left() if last else b.left() / 2))
        cubins = ["--cubins", str(b.options.cubins)] if b.options.cubins else []
        small = [*ME, *cubins, "--alone", "small", "--seconds", str(limit), "--rows", os.devnull]
        text, error = ended([command, "--tool", tool, "--print-limit", "10", *small], limit, keep=True)
        lines = [line.strip("= ") for line in text.splitlines() if line.strip("= ")]
        summary = [line for line in lines if "SUMMARY" in line]
        clean = not error and bool(summary) and re.search(r"\b0 errors", summary[-1]) is not None
        b.row(
            tool, "; ".join([*(summary[-1:] or [" ".join(lines[-1:])[:150]]), *([error] if error else [])]), "0", clean
        )
        if not clean:
            b.failed = True
            print("\n".join(lines[-12:]), flush=True)


def golden_models(b: Bench) -> None:
    from answers import models

    models(b, EVERY.split(","))


def decode_models(b: Bench) -> None:
    from measuring import Kind

    for shape, kind, memory, window in decode_cases(b):
        b.random(shape, Kind[kind], memory, window)


def traced_models(b: Bench) -> None:
    from measuring import Kind, traced

    for shape, kind, memory, window in TRACED:
        traced(b, b.random(shape, Kind[kind], memory, window))


def kinds_models(b: Bench) -> None:
    """Of sessions, prompt, torch."""
    from measuring import Kind

    for shape in ("1B", "135M"):
        for kind in (Kind.Q8_0, Kind.BF16):
            b.random(shape, kind)
    bundled(b)


def once(b: Bench) -> None:
    """What `profile` looks at: some tokens of each shape."""
    from measuring import Kind, filled, stepping

    for shape, kind, memory, window in TRACED[:2]:
        run = stepping(filled(b.random(shape, Kind[kind], memory, window)))
        for _ in range(10):
            run()


def profile(b: Bench) -> None:
    """Why the warps of a token's launch wait, by Nsight Compute; instruction by instruction in the traces' folder."""
    command = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
    if b.cupy is None or not Path(command).exists():
        b.row("ncu", "none: needs a GPU" if b.cupy is None else "not found")
        return
    own = [*ME, "--alone", "once", "--seconds", str(b.left()), "--rows", os.devnull]
    own += ["--cubins", str(b.options.cubins)] if b.options.cubins else []
    report = Path(tempfile.mkdtemp(), "report")
    what = [
        "--metrics",
        "group:smsp__pcsamp_warp_stall_reasons",
        "--section",
        "SourceCounters",
        "--clock-control",
        "none",
    ]
    which = ["--kernel-name", "together", "--launch-skip", "5", "--launch-count", "1"]
    text, error = ended([command, *what, *which, "-f", "-o", str(report), *own], b.left() * 0.8, keep=True)
    said, _ = ended([command, "-i", f"{report}.ncu-rep", "--page", "raw"], 20, keep=True)
    found = [line.split() for line in said.splitlines() if "pcsamp_warps_issue_stalled" in line]
    found = sorted(((float(words[-1].replace(",", "")), words[0]) for words in found if len(words) > 1), reverse=True)
    for samples, name in found[:8]:
        b.row(f"{TRACED[0][0]}: {name.removeprefix('smsp__pcsamp_warps_issue_stalled_')}", f"{samples:,.0f} samples")
    if b.options.traces:
        lines, _ = ended([command, "-i", f"{report}.ncu-rep", "--page", "source", "--csv"], 20, keep=True)
        (b.options.traces / "stalls.csv").write_text(lines)
    if error or not found:
        b.row("ncu", f"FAILED: {error} {' '.join(text.split())[-200:]}")
        b.failed = True


class Section(NamedTuple):
    run: Callable[[Bench], None]
    share: float = 0  # of the time
    models: Callable[[Bench], object] = bundled  # makes all that is compiled for it (programs.py)


SECTIONS = {
    "golden": Section(golden, 60, golden_models),
    "decode": Section(decode, 115, decode_models),
    "steps": Section(steps, 30, traced_models),
    "sessions": Section(sessions, 50, kinds_models),
    "prompt": Section(prompt, 35, kinds_models),
    "torch": Section(torch, 45, kinds_models),
    "long": Section(long, 100),
    "sanitize": Section(sanitize, 75, golden_models),
    "profile": Section(profile, 30, traced_models),
}
HIDDEN = {"small": Section(small), "once": Section(once)}
ME = [sys.executable, __file__]


def ended(command: list[str], limit: float, keep: bool = False) -> tuple[str, str]:
    """Run a command, and what it starts, for at most so many seconds: what it said, if kept, and how it failed."""
    output: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if keep else {}
    env = os.environ | {"PYTHONUNBUFFERED": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    process, error = subprocess.Popen(command, env=env, process_group=0, **output), ""
    try:
        said, _ = process.communicate(timeout=limit)
        error = f"exit status {process.returncode}" if process.returncode else ""
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        error = f"ended after {limit:.0f} s"
    return (said or b"").decode(errors="replace"), error


def device_of(options: argparse.Namespace) -> tuple[Any, Any]:
    """The device, and CuPy; the stand-in, and None."""
    import importable  # noqa: F401

    if options.stand_in:
        from host_device import HostDevice

        return HostDevice(), None
    import cupy

    from tcinfer.kernels.cuda.device import Device

    device = Device()
    if options.cubins:
        from_cubins(device, cupy, options.cubins)
    return device, cupy


def from_cubins(device: Any, cupy: Any, folder: Path) -> None:
    """Take programs from a folder that programs.py has filled, if they are there."""
    from programs import cubin_of

    from tcinfer.kernels.cuda.device import Program

    compiled = device.program

    def program(text: str, together: bool = False) -> Program:
        path = cubin_of(folder, text)
        if not path.exists():
            return compiled(text, together)
        return Program(device, cupy.RawModule(path=str(path), enable_cooperative_groups=together))

    device.program = program


def alone(options: argparse.Namespace) -> int:
    """One section, in this process."""
    device, cupy = device_of(options)
    from measuring import Bench

    b, name = Bench(options, device, cupy), device.name
    if cupy is not None:
        name += f", driver for CUDA {cupy.cuda.runtime.driverGetVersion()}, CuPy {cupy.__version__}"
    b.tell(device=name)
    with b.attempt("section"):
        (SECTIONS | HIDDEN)[options.alone].run(b)
    return int(b.failed)


def compiled(options: argparse.Namespace) -> int:
    """Put the program of a text into the compiler's cache."""
    device, _ = device_of(options)
    path, started = Path(options.compile), time.monotonic()
    together = ".together." in path.name
    device.program(path.read_text(), together=together).kernel("together" if together else "step_angles")
    print(f"compiled {path.name} in {time.monotonic() - started:.1f} s", flush=True)
    return 0


def all_compiled(options: argparse.Namespace) -> None:
    """Every program that the sections need, each compiled in a process of its own, before anything is measured."""
    import importable  # noqa: F401
    from programs import cubin_of, recorded, written

    with tempfile.TemporaryDirectory() as folder:
        texts = recorded(options.sections, options.golden, options.quick)
        if options.cubins:
            texts = [text for text in texts if not cubin_of(options.cubins, text[0]).exists()]
        paths = written(texts, Path(folder))
        awaited([subprocess.Popen([*ME, "--compile", str(path)]) for path in paths], 90)


def everything(options: argparse.Namespace) -> int:
    """Every section that was asked for, each in a process of its own, and the table."""
    started, failed = time.monotonic(), False
    if not options.stand_in:
        all_compiled(options)
    flags = [f"--{name}" for name in ("quick", "stand-in", "compiled") if getattr(options, name.replace("-", "_"))]
    for name in ("cubins", "traces"):
        flags += [f"--{name}", str(getattr(options, name))] if getattr(options, name) else []
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows")
        rows.touch()
        for i, name in enumerate(options.sections):
            begun = time.monotonic()
            share = SECTIONS[name].share / sum(SECTIONS[other].share for other in options.sections[i:])
            limit = max(5.0, (options.seconds - (begun - started)) * share)
            told = len(rows.read_text())
            print(f"--- {name}: {limit:.0f} s at most", flush=True)
            own = ["--alone", name, "--seconds", str(limit), "--rows", str(rows), "--golden", str(options.golden)]
            _, error = ended([*ME, *flags, *own], limit + GRACE)
            failed |= bool(error)
            if error and "FAILED" not in rows.read_text()[told:]:
                failure(rows, name, error)
            print(f"--- {name}: {time.monotonic() - begun:.0f} s", flush=True)
        facts = [json.loads(line) for line in rows.read_text().splitlines()]
    device, date = next((fact["device"] for fact in facts if "device" in fact), "no device"), time.strftime("%Y-%m-%d")
    if options.json:
        options.json.write_text(json.dumps({"device": device, "date": date, "facts": facts}, indent=1))
    print(f"\n{device}; {date}; {time.monotonic() - started:.0f} s\n\n| | what | figure | wanted |\n|---|---|---|---|")
    for row in (fact for fact in facts if "section" in fact):
        print(f"| {row['section']} | {row['what']} | {row['figure']} | {row['wanted']} |")
    return int(failed)


def failure(rows: Path, section: str, error: str, where: str = "") -> None:
    """A row of a section that could not write it itself."""
    with rows.open("a") as file:
        row = {"section": section, "what": "section", "figure": f"FAILED: {error}", "wanted": "", "traceback": where}
        file.write(json.dumps(row) + "\n")


def awaited(processes: Sequence[subprocess.Popen], seconds: float) -> None:
    """Until all have ended, or were ended."""
    until = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION")
    for flag in ("--quick", "--stand-in", "--compiled"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--golden", type=Path, default=ROOT.parent / "shared" / "golden", metavar="FOLDER")
    parser.add_argument("--cubins", type=Path, metavar="FOLDER", help="what programs.py has compiled")
    parser.add_argument("--traces", type=Path, metavar="FOLDER", help="where `steps` leaves its clocks")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--seconds", type=float)
    for inner in ("--alone", "--rows", "--compile"):  # of the processes that this one starts
        parser.add_argument(inner, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    options.sections = [name for name in SECTIONS if not options.sections or name in options.sections]
    options.seconds = options.seconds or (QUICK if options.quick else SECONDS)
    if not options.compile and not options.alone:
        return everything(options)
    try:
        return compiled(options) if options.compile else alone(options)
    except Exception as e:  # before a section has begun
        error = f"{type(e).__name__}: {' '.join(str(e).split())}"
        print(f"{options.compile or options.alone}: {error}", flush=True)
        if options.rows:
            failure(Path(options.rows), options.alone, error, traceback.format_exc())
        return 1


if __name__ == "__main__":
    sys.exit(main())
