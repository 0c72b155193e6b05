"""The numba backend in processes: threads, interruptions, forks, other CPUs, and the cache of compiled code."""

from __future__ import annotations

import os
import platform
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import MODULES, SMALL, build

from tcinfer.engine import compiled
from tcinfer.kernels.cpu import simd

IDS = np.arange(40) % 50

# answers(threads): what a small model gives for a prompt and ten tokens after it, its work shared however little it is
MODEL = """
import os, signal, sys, threading, time
import numpy as np
from conftest import SMALL, build
from tcinfer.engine import compiled

compiled.WORTH_SHARING = 0

def answers(threads, model=None):
    session = (model or build(SMALL, "numba", threads=threads)).session()
    return np.stack([session.feed(np.arange(40) % 50), *(session.feed(i) for i in range(10))])
"""
# The same of one operator, which takes a second to compile
NORM = """
import numpy as np
from plans import Pass, normal

p = Pass(9, threads=2)
(y,) = p.compute(p.norm(p.filled(normal(0, 9, 64)), normal(1, 64), None, 1e-5, False))
print(y.tobytes().hex())
"""


def process(code: str, timeout: float = 60, umask: int = -1, **environment: str) -> str:
    """What a Python process prints that runs this code among the tests' modules. It must end in time, and well."""
    env = os.environ | {"PYTHONPATH": MODULES} | environment
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, umask=umask)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# Threads


@pytest.mark.parametrize("environment", [{}, {"OMP_THREAD_LIMIT": "1", "NUMBA_NUM_THREADS": "1"}], ids=str)
def test_more_threads_than_cpus_come_to_an_end(environment: dict[str, str]) -> None:
    code = "os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1]); want = answers(1)\n"
    code += "for threads in (None, 2, 4, 16): assert np.array_equal(answers(threads), want)"
    process(MODEL + code, **environment)


def test_two_models_in_two_threads_at_once() -> None:
    """Of one pool and of two; each as if it were alone."""
    code = """
    model = {n: build(SMALL, "numba", threads=n) for n in (1, 2, 3)}
    want, got = answers(1, model[1]), {}
    def work(name, model):
        got[name] = [answers(0, model) for _ in range(8)]
    for together in ((2, 2), (2, 3), (2, 3, 3, 1)):
        models = [build(SMALL, "numba", threads=n) for n in together]
        workers = [threading.Thread(target=work, args=pair) for pair in enumerate(models)]
        for w in workers: w.start()
        for w in workers: w.join()
        assert len(got) == len(together)
        assert all(np.array_equal(a, want) for each in got.values() for a in each)
        got.clear()
    """
    process(MODEL + code.replace("\n    ", "\n"))


def test_first_uses_at_once_start_one_set_of_threads() -> None:
    """Two sets would mix: one caller could wait for ever for a worker that the other has woken."""
    code = """
    from plans import Pass, normal
    from tcinfer.kernels.cpu.threads import Threads

    def work(pool, gate, out):
        p = Pass(9)
        p.threads = pool
        y = p.norm(p.filled(normal(0, 9, 64)), normal(1, 64), None, 1e-5, False)
        gate.wait()
        out += p.compute(y)

    sys.setswitchinterval(1e-6)
    for trial in range(1, 51):
        pool, gate, out = Threads(3), threading.Barrier(4), []
        callers = [threading.Thread(target=work, args=(pool, gate, out)) for _ in range(4)]
        for c in callers: c.start()
        for c in callers: c.join()
        assert len(out) == 4
        assert all(np.array_equal(y, out[0]) for y in out)
        assert threading.active_count() == 1 + 2 * trial, trial
    """
    process(MODEL + code.replace("\n    ", "\n"), timeout=30)


def test_an_interruption_anywhere_leaves_threads_that_work() -> None:
    """Ctrl-C at hundreds of moments of a token; then the session goes back, and gives the same answers as before."""
    code = """
    model = build(SMALL, "numba", threads=2)
    session = model.session()
    session.feed([1, 2, 3])
    start, prompt = session.snapshot(), np.arange(20)
    def after():
        session.restore(start)
        return np.stack([session.feed(prompt), session.feed(5)])
    fired = 0
    def stop(*_):
        global fired
        fired += 1
        raise KeyboardInterrupt
    want, rng, count = after(), np.random.default_rng(0), 0
    signal.signal(signal.SIGALRM, stop)
    for turn, moment in enumerate(rng.uniform(20e-6, 400e-6, 300)):
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, moment)
                while fired == turn:  # Python drops what is raised in a finalizer
                    session.restore(start)
                    session.feed(5)
            except KeyboardInterrupt:
                count += 1
        except KeyboardInterrupt:
            pass
        time.sleep(0.002)  # the workers go to sleep
        assert np.array_equal(after(), want)
    assert count > 270
    """
    process(MODEL + code.replace("\n    ", "\n"))


def test_an_interruption_where_python_looks_for_signals_leaves_no_lock() -> None:
    """Ctrl-C at the start and end of each Python function that hands work to sleeping threads, one after the other."""
    code = """
    model = build(SMALL, "numba", threads=2)
    session = model.session()
    session.feed([1, 2, 3])
    start = session.snapshot()
    def after():
        session.restore(start)
        return session.feed(5)
    def trace(frame, event, _):
        global left
        if event in ("call", "return") and frame.f_code.co_filename.endswith(("cpu/threads.py", "threading.py")):
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace
    want = after()
    for turn in range(1, 1000):
        time.sleep(0.02)  # the workers go to sleep
        session.restore(start)
        left = turn
        try:
            sys.settrace(trace)
            session.feed(5)
            break
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        assert np.array_equal(after(), want), turn
    assert 1 < turn < 999
    """
    process(MODEL + code.replace("\n    ", "\n"))


# Forks


def test_a_forked_process_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "WORTH_SHARING", 0)
    model = build(SMALL, "numba", threads=2)
    want = model.session().feed(IDS)
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(model.session().feed(IDS), want) else 1)
    deadline = time.monotonic() + 30
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            pytest.fail("the child hangs")
        time.sleep(0.01)
    assert ended == (child, 0)
    np.testing.assert_array_equal(model.session().feed(IDS), want)


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_workers_of_multiprocessing_compute(how: str, tmp_path: Path) -> None:
    main = """
    model = build(SMALL, "numba", threads=2)
    def work(_):
        return answers(0, model)
    if __name__ == "__main__":
        import multiprocessing
        want = answers(0, model)
        with multiprocessing.get_context("HOW").Pool(3) as workers:
            assert all(np.array_equal(got, want) for got in workers.map(work, range(6)))
        print("done")
    """
    script = tmp_path / "script.py"
    script.write_text(MODEL + main.replace("\n    ", "\n").replace("HOW", how))
    assert process(f"import subprocess, sys; subprocess.run([sys.executable, {str(script)!r}], check=True)") == "done\n"


# Other CPUs

TIERS = {
    "avx2": ("haswell", "+avx2,+fma,+f16c,+bmi,+bmi2,+avx,+sse4.2,+popcnt"),
    "generic": ("x86-64", "+sse2"),
}
HERE = Path(__file__).parent
QUICK = ["test_kernels.py", "-k", "test_products_with_weights and (1- or 9-)"]


def on_tier(tier: str, *arguments: str) -> None:
    if platform.machine() not in ("x86_64", "AMD64") or (tier == "avx2" and simd.TIER == "generic"):
        pytest.skip("this CPU cannot run it")
    code = f"""
import sys, pytest
from tcinfer.kernels.cpu import simd
assert simd.TIER == {tier!r}, simd.TIER
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-m", "not slow", *sys.argv[1:]]))
"""
    name, features = TIERS[tier]
    env = os.environ | {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("tier", TIERS)
def test_products_of_a_lesser_cpu(tier: str) -> None:
    on_tier(tier, *QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("tier", TIERS)
def test_all_operators_of_a_lesser_cpu(tier: str) -> None:
    on_tier(tier, "test_kernels.py", "test_operators.py", "test_attention.py", "test_engine.py")


# The cache of compiled code


def kernels(cache: Path) -> Path:
    """The one folder of compiled code in a cache."""
    (folder,) = (cache / "tcinfer").glob("kernels-*")
    return folder


def files(cache: Path) -> dict[str, tuple[int, int]]:
    """Its files, with what shows whether they were written anew."""
    return {path.name: (path.stat().st_ino, path.stat().st_size) for path in kernels(cache).rglob("*.nb*")}


@pytest.mark.slow
def test_two_first_runs_at_once(tmp_path: Path) -> None:
    """Both compile everything and keep it in the same place; both are right, and the next one compiles nothing."""
    code, outputs = MODEL + "print(answers(2).tobytes().hex())", []
    env = {"XDG_CACHE_HOME": str(tmp_path)}
    runs = [threading.Thread(target=lambda: outputs.append(process(code, 120, **env))) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    want = process(code)
    assert outputs == [want, want]
    before = files(tmp_path)
    assert process(code, **env) == want
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    "damage", ["cut", *(pytest.param(damage, marks=pytest.mark.slow) for damage in ("empty", "noise"))]
)
def test_a_damaged_cache_is_compiled_around(tmp_path: Path, damage: str) -> None:
    env = {"XDG_CACHE_HOME": str(tmp_path)}
    want = process(NORM, **env)
    good = files(tmp_path)
    contents = {path: path.read_bytes() for path in kernels(tmp_path).rglob("*.nb*")}
    assert len(contents) >= 8
    for path, old in contents.items():
        path.write_bytes({"empty": b"", "cut": old[: len(old) // 2], "noise": bytes(reversed(old))}[damage])
    assert process(NORM, **env) == want
    assert process(NORM, **env) == want
    assert files(tmp_path).keys() == good.keys()


@pytest.mark.slow
def test_without_a_place_for_a_cache_it_compiles(tmp_path: Path) -> None:
    want = process(NORM)
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "tcinfer").write_text("no folder")
    nowhere = NORM + "from tcinfer.kernels.cpu.jit import cache_folder; assert cache_folder() is None"
    for env in (
        {"XDG_CACHE_HOME": "/proc/nonexistent"},
        {"XDG_CACHE_HOME": str(tmp_path / "file")},
        {"XDG_CACHE_HOME": str(tmp_path)},
        {"XDG_CACHE_HOME": "", "HOME": "/proc/nonexistent"},
    ):
        assert process(nowhere, **env) == want
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "tcinfer"]


def test_without_a_home_it_compiles() -> None:
    """As a user that the system does not know, as in some containers."""
    code = """
import os, pwd

def unknown(uid):
    raise KeyError(uid)

os.environ.pop("HOME", None)
os.environ.pop("XDG_CACHE_HOME", None)
pwd.getpwuid = unknown
"""
    assert process(code + NORM) == process(NORM)


@pytest.mark.slow
def test_nobody_else_can_write_into_the_cache(tmp_path: Path) -> None:
    """It holds code that is run: a folder that others may write to, or that is another user's, is not used."""
    env = {"XDG_CACHE_HOME": str(tmp_path)}
    want = process(NORM, umask=0, **env)
    folder = kernels(tmp_path)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    kept = files(tmp_path)
    for path in folder.rglob("*.nb*"):
        path.write_bytes(b"")  # a process that looked at these would write them anew
    spoilt = files(tmp_path)
    assert spoilt != kept
    for mode in (0o720, 0o702):
        folder.chmod(mode)
        assert process(NORM, **env) == want
        assert files(tmp_path) == spoilt, oct(mode)
    if os.getuid() == 0:
        folder.chmod(0o700)
        os.chown(folder, 12345, -1)
        assert process(NORM, **env) == want
        assert files(tmp_path) == spoilt
        os.chown(folder, 0, -1)
    folder.chmod(0o700)
    assert process(NORM, **env) == want
    assert files(tmp_path) != spoilt
