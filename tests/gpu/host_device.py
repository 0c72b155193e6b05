"""What the tests use in place of a GPU: CUDA text compiled by g++ and run thread by thread (host.h)."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import pytest
from numpy.typing import NDArray

from tcinfer.engine import cuda

BACKEND = cuda.Backend

HEADER = Path(__file__).resolve().parent / "host.h"  # and what it includes, beside it
FLAGS = [
    "-O1",
    "-std=c++20",
    "-DHOST",
    "-ffp-contract=off",
    "-fno-strict-aliasing",  # kernels read the same bytes as several types
    "-fsanitize=alignment,bounds,shift-exponent",  # what a GPU refuses or does otherwise ends the launch
    "-fsanitize-undefined-trap-on-error",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-Wno-unused-function",
    "-Wno-unused-parameter",
    "-shared",
    "-fPIC",
]
ALIGNMENT = 256
GUARD = np.full(64, 0xA5, np.uint8)
WEEK = 7 * 24 * 3600


class Buffer:
    """Device memory: `nbytes` zeros at `address`, and a guard behind them; lives as long as the object."""

    def __init__(self, nbytes: int) -> None:
        self.room = np.zeros(nbytes + ALIGNMENT + len(GUARD), np.uint8)
        self.nbytes = nbytes
        start = -self.room.ctypes.data % ALIGNMENT
        self.address = self.room.ctypes.data + start
        self.guard = self.room[start + nbytes :][: len(GUARD)]
        self.guard[:] = GUARD


@dataclass(frozen=True)
class Kernel:
    """A kernel of a program, by its address."""

    program: Program
    name: str
    address: int


LAUNCHED: list[Program] = []  # that have stacks, the last one last: a process may have some 65,000 maps
MOST_LAUNCHED = 8


class Program:
    """A compiled text, loaded."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.PyDLL(str(path))  # keeps the interpreter's lock: launch() is for one thread at a time
        self.launch = self.library.launch
        self.launch.restype = ctypes.c_char_p
        self.launch.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_uint] * 3 + [ctypes.c_int, ctypes.c_uint]

    def kernel(self, name: str) -> Kernel:
        """The kernel of that name."""
        symbol = f"_Z{len(name)}{name}PKxS0_"  # name(const int64 *, const int64 *), as C++ spells it
        function = getattr(self.library, symbol)
        return Kernel(self, name, ctypes.cast(function, ctypes.c_void_p).value or 0)


@cache
def compiler() -> str:
    """What g++ says of itself."""
    return subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout + os.uname().machine


@cache
def folder() -> Path:
    """Where compiled programs are kept, for this user alone; those that no run has asked for in a week go."""
    path = platformdirs.user_cache_path("tcinfer") / "host_device"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        for old in path.iterdir():
            if old.stat().st_mtime < time.time() - WEEK:
                old.unlink(missing_ok=True)
    except OSError:
        pass
    return path if os.access(path, os.W_OK) else Path(tempfile.mkdtemp(prefix="tcinfer-"))


def compiled(source: str) -> Path:
    """The shared library of a program's text, from the cache or from g++."""
    headers = (path.read_text() for path in sorted(HEADER.parent.glob("host*.h")))
    text = "\0".join([source, *headers, *FLAGS, compiler()])
    path = folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.so"
    if path.exists():
        os.utime(path)
        return path
    handle, made = tempfile.mkstemp(dir=path.parent)
    os.close(handle)
    command = ["g++", *FLAGS, "-include", str(HEADER), "-x", "c++", "-", "-o", made]
    done = subprocess.run(command, input=source, capture_output=True, text=True)
    if done.returncode:
        os.unlink(made)
        raise AssertionError(f"g++ refuses the program:\n{done.stderr}")
    os.replace(made, path)
    return path


class HostDevice:
    """The CPU as a device; `seed` is the order of threads: 0 ascending, 1 descending, others shuffled."""

    name = "CPU threads standing in for a GPU"
    multiprocessors = 3
    capability = (9, 0)
    shared_bytes = 232448 - 1024
    warm = True
    free_bytes = 1 << 27

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.buffers: weakref.WeakSet[Buffer] = weakref.WeakSet()
        self.programs: dict[str, Program] = {}

    def zeros(self, nbytes: int) -> Buffer:
        """New device memory of zeros."""
        buffer = Buffer(nbytes)
        self.buffers.add(buffer)
        return buffer

    def own(self, address: int, nbytes: int) -> None:
        """Asserts that a range lies within one buffer."""
        assert any(b.address <= address and address + nbytes <= b.address + b.nbytes for b in self.buffers), (
            f"{nbytes} bytes at {address:#x} are in no buffer"
        )

    def put(self, address: int, array: NDArray[Any]) -> None:
        """Copies an array's bytes to the device."""
        self.own(address, array.nbytes)
        ctypes.memmove(address, np.ascontiguousarray(array).ctypes.data, array.nbytes)

    def get(self, address: int, array: NDArray[Any]) -> NDArray[Any]:
        """Fills a contiguous array from the device."""
        assert array.flags.carray, "the array must be contiguous and writeable"
        self.own(address, array.nbytes)
        ctypes.memmove(array.ctypes.data, address, array.nbytes)
        return array

    def copy(self, to: int, from_: int, nbytes: int) -> None:
        """Copies bytes on the device."""
        self.own(to, nbytes)
        self.own(from_, nbytes)
        ctypes.memmove(to, from_, nbytes)

    def wait(self) -> None:
        """Returns at once: a launch has ended when it returns."""

    def program(self, source: str, together: bool = False) -> Program:
        """Compiles a text that is complete but for what host.h gives."""
        if source not in self.programs:
            self.programs[source] = Program(compiled(source))
        return self.programs[source]

    def launch(
        self, kernel: Kernel, a: int, p: int, blocks: int, threads: int, shared: int = 0, together: bool = False
    ) -> None:
        """Runs a kernel to its end. `together`: all blocks at once, as many as a GPU of this shape could hold."""
        assert shared <= self.shared_bytes, f"{kernel.name}: {shared} bytes of shared memory"
        each = min(32, 2048 // threads, (self.shared_bytes + 1024) // (shared + 1024))
        assert not together or blocks <= each * self.multiprocessors, f"{kernel.name}: {blocks} blocks at once"
        if kernel.program in LAUNCHED:
            LAUNCHED.remove(kernel.program)
        elif len(LAUNCHED) == MOST_LAUNCHED:
            LAUNCHED.pop(0).library.release()
        LAUNCHED.append(kernel.program)
        error = kernel.program.launch(kernel.address, a, p, blocks, threads, shared, together, self.seed)
        assert error is None, f"{kernel.name}: {error.decode()}"

    def captured(self, run: Callable[[], None]) -> Callable[[], None]:
        """Launches again what `run` does."""
        return run

    def check(self) -> None:
        """Asserts that nothing was written behind any buffer."""
        for buffer in self.buffers:
            assert np.array_equal(buffer.guard, GUARD), f"something wrote behind a buffer of {buffer.nbytes} bytes"


def host_device(seed: int = 0) -> HostDevice:
    """A device for a test, which is skipped where there is no g++."""
    if not sys.platform.startswith("linux") or shutil.which("g++") is None:
        pytest.skip("needs g++ on Linux")
    return HostDevice(seed)


def use(device: HostDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make backend "cuda" run on this device."""
    monkeypatch.setattr(cuda, "Backend", lambda threads=None: BACKEND(threads, device))


# Fixtures, for tests that import them (a conftest.py here would hide the one above)


@pytest.fixture(scope="session")
def device() -> HostDevice:
    """One for all: what was compiled is kept."""
    return host_device()


@pytest.fixture
def backend(device: HostDevice, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """In place of the fixture of tests/conftest.py: contracts of all backends run on "cuda", the stand-in here.

    Afterwards nothing has been written beside what was allocated.
    """
    use(device, monkeypatch)
    yield "cuda"
    device.check()
