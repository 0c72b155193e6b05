"""One NVIDIA GPU through CuPy: memory, compiled programs, launches. All that knows CuPy is here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tcinfer.kernels.errors import UnavailableError

OLDEST = (8, 0)  # compute capability: asynchronous copies and the shapes of the tensor cores' products
EXTRAS = ("cuda13", "cuda12")  # that bring CuPy
TO_DEVICE, TO_HOST, WITHIN = 1, 2, 3  # cudaMemcpyKind


class Buffer:
    """Device memory, freed with this object."""

    def __init__(self, memory: Any, nbytes: int) -> None:
        self._memory, self.nbytes, self.address = memory, nbytes, int(memory.ptr)


class Program:
    """Kernels compiled together."""

    def __init__(self, cupy: Any, text: str, together: bool) -> None:
        self._module = cupy.RawModule(code=text, options=("-std=c++17",), enable_cooperative_groups=together)

    def kernel(self, name: str) -> Any:
        return self._module.get_function(name)


class Device:
    """The GPU that CuPy uses."""

    def __init__(self) -> None:
        """Raises UnavailableError where CuPy, a GPU, or a driver that is new enough is missing."""
        try:
            import cupy
        except Exception as e:  # a library that does not go with another raises anything as it is imported
            extras = " or ".join(f"'tcinfer[{name}]'" for name in EXTRAS)
            raise UnavailableError(
                f"CuPy cannot be loaded ({_line(e)}): pip install {extras}, as the driver's CUDA is"
            ) from e
        self._cupy = cupy
        try:
            count = cupy.cuda.runtime.getDeviceCount()
        except Exception as e:
            raise UnavailableError(_why_none(cupy, e)) from e
        if not count:
            raise UnavailableError("there is no NVIDIA GPU on this machine: use --backend numba")
        properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
        self.name = properties["name"].decode(errors="replace")
        self.capability = properties["major"], properties["minor"]
        if self.capability < OLDEST:
            have, need = (".".join(map(str, c)) for c in (self.capability, OLDEST))
            raise UnavailableError(
                f"{self.name} has compute capability {have}; tcinfer needs {need}: use --backend numba"
            )
        self.multiprocessors: int = properties["multiProcessorCount"]
        self.shared_bytes: int = properties["sharedMemPerBlockOptin"]  # that a block can have
        self._allowed: dict[int, int] = {}  # by kernel: dynamic shared memory that it was given leave for

    @property
    def warm(self) -> bool:
        """Whether something was compiled before on this machine (CuPy keeps it)."""
        return any(Path(os.environ.get("CUPY_CACHE_DIR", "~/.cupy/kernel_cache")).expanduser().glob("*"))

    @property
    def free_bytes(self) -> int:
        """Of the device's memory, what CuPy's pool holds back included."""
        return int(self._cupy.cuda.runtime.memGetInfo()[0]) + int(self._cupy.get_default_memory_pool().free_bytes())

    def zeros(self, nbytes: int) -> Buffer:
        """Device memory, all zero. Raises UnavailableError where there is not so much."""
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
        self._cupy.cuda.runtime.memcpyAsync(to, from_, nbytes, kind, self._cupy.cuda.get_current_stream().ptr)

    def wait(self) -> None:
        """Until all that was launched is done."""
        self._cupy.cuda.get_current_stream().synchronize()

    def program(self, text: str, together: bool = False) -> Program:
        """Compile CUDA C++, or find it in CuPy's cache. together: its kernels' blocks meet while they run."""
        return Program(self._cupy, text, together)

    def launch(
        self, kernel: Any, a: int, p: int, blocks: int, threads: int, shared: int = 0, together: bool = False
    ) -> None:
        """Run a kernel of two addresses. together: every block at once (as its program was compiled)."""
        if shared > self._allowed.get(id(kernel), 48 * 1024):
            if shared > self.shared_bytes:
                raise UnavailableError(
                    f"{self.name} has {self.shared_bytes:,} bytes of shared memory for a block, and this model needs "
                    f"{shared:,}: use --backend numba"
                )
            kernel.max_dynamic_shared_size_bytes = shared
            self._allowed[id(kernel)] = shared
        kernel((blocks,), (threads,), (np.int64(a), np.int64(p)), shared_mem=shared)


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
