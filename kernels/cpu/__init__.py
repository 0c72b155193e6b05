"""The Numba backend: operators whose loops NumPy runs slowly, compiled; the rest are the reference's own."""

from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tcinfer.kernels.cpu import attention, linear, matrix_memory, pointwise
from tcinfer.kernels.cpu.jit import cache_folder
from tcinfer.kernels.cpu.threads import Threads
from tcinfer.kernels.reference import Reference
from tcinfer.kernels.reference.quants import Matrix

F32 = NDArray[np.float32]


class Compiled(Reference):
    """The reference with its decode loops compiled; quantised weights stay packed."""

    name = "numba"

    def __init__(self, threads: int | None = None) -> None:
        """threads: of every product with weights; None is one for each CPU that this process may use."""
        super().__init__()
        self._threads = Threads(threads)

    def running(self) -> AbstractContextManager[Any]:
        """NumPy's own library keeps to the thread that calls it: its threads would only wait for ours, spinning."""
        return self._threads.alone()

    @property
    def cold(self) -> str:  # type: ignore[override]
        folder = cache_folder()
        if folder is None:
            return "compiling for this CPU; there is no private cache folder to keep the result in"
        return "" if any(folder.rglob("*.nbi")) else "compiling for this CPU, once: some seconds"

    def linear(self, x: F32, w: Matrix, bias: F32 | None = None) -> F32:
        return linear.linear(x, w, bias, self._threads)

    gelu = staticmethod(pointwise.gelu)
    attention = staticmethod(attention.attention)
    scan = staticmethod(matrix_memory.scan)
