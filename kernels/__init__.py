"""Operators: the equation in NumPy (`reference/`), and the same made fast, for CPUs (`cpu/`, Numba) and for NVIDIA GPUs
(`cuda/`, CUDA C++ through CuPy).

This package imports nothing of the rest of tcinfer.
"""

from __future__ import annotations

import importlib.util

from tcinfer.kernels.errors import UnavailableError
from tcinfer.kernels.reference import Reference

__all__ = ["BACKENDS", "Reference", "UnavailableError", "backend"]

BACKENDS = ("auto", "numpy", "numba", "cuda")


def backend(name: str = "auto", threads: int | None = None) -> Reference:
    """The operators of one backend. "auto" is the first that is there: cuda, where CuPy is installed and finds a GPU,
    numba, numpy. Raises UnavailableError."""
    if name not in BACKENDS:
        raise UnavailableError(f"backend {name!r} is not one of {', '.join(BACKENDS)}")
    if name == "cuda":
        return _cuda()
    if name == "auto" and importlib.util.find_spec("cupy") is not None:
        try:
            return _cuda()
        except UnavailableError as e:
            other = backend("numba" if importlib.util.find_spec("numba") else "numpy", threads)
            why = str(e).removesuffix(": use --backend numba")
            other.remark = f"no GPU is used, but the CPU ({other.name}): {why}"
            return other
    if name == "numpy" or (name == "auto" and importlib.util.find_spec("numba") is None):
        return Reference(threads)
    try:
        from tcinfer.kernels.cpu import Compiled
    except ImportError as e:
        raise UnavailableError(f"backend 'numba' cannot be loaded ({e}); use 'numpy', or install numba") from e
    return Compiled(threads)


def _cuda() -> Reference:
    try:
        from tcinfer.kernels.cuda import Cuda, operators  # noqa: F401
    except ImportError as e:  # numba, whose plans it shares
        raise UnavailableError(f"backend 'cuda' cannot be loaded ({e}); use 'numpy', or install numba") from e
    return Cuda()
