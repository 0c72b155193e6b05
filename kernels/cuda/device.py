"""One NVIDIA GPU through CuPy: memory, compiled programs, launches. All that knows CuPy is here."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tcinfer.kernels.cuda.program import WIDE_CAPABILITY
from tcinfer.kernels.errors import UnavailableError

OLDEST = (8, 0)  # compute capability: asynchronous copies and the shapes of the tensor cores' products
PACKAGES = "'cupy-cuda13x[ctk]' or 'cupy-cuda12x[ctk]'"  # as the extras cuda13 and cuda12
OPTIONS = ("-std=c++17", "-ftz=true")  # the second is one that CuPy adds itself
TO_DEVICE, TO_HOST, WITHIN = 1, 2, 3  # cudaMemcpyKind


class Buffer:
    """Device memory, freed with this object."""

    def __init__(self, memory: Any, nbytes: int) -> None:
        self._memory, self.nbytes, self.address = memory, nbytes, int(memory.ptr)


class Program:
    """Kernels compiled together."""

    def __init__(self, device: Device, module: Any) -> None:
        self._device, self._module = device, module

    def kernel(self, name: str) -> Any:
        """A kernel that may have all the shared memory there is: models with the same text share it, large and small.

        Raises UnavailableError where the text cannot be compiled.
        """
        with self._device.current:
            try:
                found = self._module.get_function(name)
            except Exception as e:
                raise UnavailableError(f"CuPy cannot compile for {self._device.name} ({_line(e)})") from e
            found.max_dynamic_shared_size_bytes = self._device.shared_bytes
            return found


class Device:
    """The GPU that CuPy uses."""

    def __init__(self) -> None:
        """Raises UnavailableError where CuPy, a GPU, or a driver that is new enough is missing."""
        try:
            import cupy
        except Exception as e:  # a library that does not go with another raises anything as it is imported
            raise UnavailableError(
                f"CuPy cannot be loaded ({_line(e)}): pip install {PACKAGES}, by the CUDA that nvidia-smi tells"
            ) from e
        self._cupy = cupy
        try:
            count = cupy.cuda.runtime.getDeviceCount()
        except Exception as e:
            raise UnavailableError(_why_none(cupy, e)) from e
        if not count:
            raise UnavailableError("there is no NVIDIA GPU on this machine: use --backend numba")
        self.current = cupy.cuda.Device()  # every call enters it: a thread may have another one
        properties = cupy.cuda.runtime.getDeviceProperties(self.current.id)
        self.name = properties["name"].decode(errors="replace")
        self.capability = properties["major"], properties["minor"]
        if self.capability < OLDEST:
            have, need = (".".join(map(str, c)) for c in (self.capability, OLDEST))
            raise UnavailableError(
                f"{self.name} has compute capability {have}; tcinfer needs {need}: use --backend numba"
            )
        self.multiprocessors: int = properties["multiProcessorCount"]
        self.shared_bytes: int = properties["sharedMemPerBlockOptin"]  # that a block can have
        try:
            cupy.cuda.runtime.memGetInfo()
            cupy.cuda.nvrtc.getVersion()
        except Exception as e:  # a full GPU, or CuPy without the compiler that its extra [ctk] brings
            raise UnavailableError(f"{self.name} cannot be used ({_line(e)}): use --backend numba") from e

    @property
    def warm(self) -> bool:
        """Whether something was compiled before on this machine (CuPy keeps it)."""
        return any(_cache().glob("*"))

    @property
    def free_bytes(self) -> int:
        """Of the device's memory, what CuPy's pool holds back included."""
        with self.current:
            left = self._cupy.cuda.runtime.memGetInfo()[0]
            return int(left) + int(self._cupy.get_default_memory_pool().free_bytes())

    def zeros(self, nbytes: int) -> Buffer:
        """Device memory, all zero. Raises UnavailableError where there is not so much."""
        with self.current:
            try:
                memory = self._cupy.cuda.alloc(max(nbytes, 1))
            except self._cupy.cuda.memory.OutOfMemoryError as e:
                raise UnavailableError(
                    f"{self.name} has {self.free_bytes:,} bytes of memory left, and {nbytes:,} more are needed: close "
                    "sessions or other programs, choose a smaller window, or --backend numba"
                ) from e
            memory.memset_async(0, nbytes)
            return Buffer(memory, nbytes)

    def put(self, address: int, array: NDArray) -> None:
        """Copy an array to the device."""
        array = np.ascontiguousarray(array)
        self._memcpy(address, array.ctypes.data, array.nbytes, TO_DEVICE)  # from pageable memory: read when it returns

    def get(self, address: int, array: NDArray) -> NDArray:
        """Fill an array from the device, once all that was launched before is done."""
        assert array.flags.c_contiguous
        self._memcpy(array.ctypes.data, address, array.nbytes, TO_HOST)
        self.wait()
        return array

    def copy(self, to: int, from_: int, nbytes: int) -> None:
        """From one place of the device to another."""
        self._memcpy(to, from_, nbytes, WITHIN)

    def _memcpy(self, to: int, from_: int, nbytes: int, kind: int) -> None:
        with self.current:
            self._cupy.cuda.runtime.memcpyAsync(to, from_, nbytes, kind, self._cupy.cuda.get_current_stream().ptr)

    def wait(self) -> None:
        """Until all that was launched is done."""
        with self.current:
            self._cupy.cuda.get_current_stream().synchronize()

    def program(self, text: str, together: bool = False) -> Program:
        """Compile CUDA C++, or find it in CuPy's cache. together: its kernels' blocks meet while they run."""
        wide = self.capability == WIDE_CAPABILITY
        what = {"path": self._compiled(text)} if wide else {"code": text, "options": OPTIONS[:1]}
        return Program(self, self._cupy.RawModule(**what, enable_cooperative_groups=together))

    def _compiled(self, text: str) -> str:
        """A file of machine code that no other architecture understands (CuPy itself compiles for all later ones)."""
        nvrtc = self._cupy.cuda.nvrtc
        key = "\0".join([text, *OPTIONS, str(nvrtc.getVersion())])
        path = _cache() / f"tcinfer-{hashlib.sha256(key.encode()).hexdigest()[:32]}.cubin"
        if not path.exists():
            try:
                code = machine_code(nvrtc, text)
                path.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as f:
                    f.write(code)
                os.replace(f.name, path)
            except Exception as e:
                raise UnavailableError(f"CuPy cannot compile for {self.name} ({_line(e)})") from e
        return str(path)

    def launch(
        self, kernel: Any, a: int, p: int, blocks: int, threads: int, shared: int = 0, together: bool = False
    ) -> None:
        """Run a kernel of two addresses. together: every block at once (as its program was compiled)."""
        with self.current:
            kernel((blocks,), (threads,), (np.int64(a), np.int64(p)), shared_mem=shared)

    def captured(self, run: Callable[[], None]) -> Callable[[], None]:
        """What `run` launches, as a graph: with the same arguments, and without the time that each launch takes."""
        with self.current:
            stream = self._cupy.cuda.Stream(non_blocking=True)
            with stream:
                stream.begin_capture()
                run()
                graph = stream.end_capture()

        def again() -> None:
            with self.current:
                graph.launch(self._cupy.cuda.get_current_stream())

        return again


def machine_code(nvrtc: Any, text: str) -> bytes:
    """CUDA C++ compiled for compute capability 9.0 with all that it has (sm_90a). nvrtc: cupy.cuda.nvrtc."""
    program = nvrtc.createProgram(text, "tcinfer.cu", (), ())
    try:
        nvrtc.compileProgram(program, (*OPTIONS, "-arch=sm_90a"))
        return nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError as e:
        raise RuntimeError(nvrtc.getProgramLog(program)) from e
    finally:
        nvrtc.destroyProgram(program)


def _cache() -> Path:
    """Where CuPy keeps what it has compiled."""
    return Path(os.environ.get("CUPY_CACHE_DIR", "~/.cupy/kernel_cache")).expanduser()


def _why_none(cupy: Any, error: Exception) -> str:
    """What a user can do where the driver does not answer."""
    driver, runtime = cupy.cuda.runtime.driverGetVersion(), cupy.cuda.runtime.runtimeGetVersion()
    if not driver:
        return "there is no NVIDIA driver on this machine, and so no GPU to use: use --backend numba"
    if driver < runtime:
        have, need = (f"{version // 1000}.{version % 1000 // 10}" for version in (driver, runtime))
        return f"the NVIDIA driver is for CUDA {have}, and the installed CuPy is for {need}: update the driver"
    return f"no NVIDIA GPU can be used ({_line(error)}): use --backend numba"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
