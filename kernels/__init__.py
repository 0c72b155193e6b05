"""Operators: the equation in NumPy (`reference/`), and the same operator made fast (`cpu/`, Numba).

This package imports nothing of the rest of tcinfer.
"""

from __future__ import annotations

import importlib.util

from tcinfer.kernels.reference import Reference

BACKENDS = ("auto", "numpy", "numba", "cuda")


class UnavailableError(Exception):
    """A backend that was asked for by name cannot run here; the message says why and what to do."""


def backend(name: str = "auto", threads: int | None = None) -> Reference:
    """The operators of one backend; "auto" is numba where it is installed, else numpy. Raises UnavailableError."""
    if name not in BACKENDS:
        raise UnavailableError(f"backend {name!r} is not one of {', '.join(BACKENDS)}")
    if name == "cuda":
        raise UnavailableError("backend 'cuda' is not in this version; use 'numba' or 'numpy'")
    if name == "numpy" or (name == "auto" and importlib.util.find_spec("numba") is None):
        return Reference(threads)
    try:
        from tcinfer.kernels.cpu import Compiled
    except ImportError as e:
        raise UnavailableError(f"backend 'numba' cannot be loaded ({e}); use 'numpy', or install numba") from e
    return Compiled(threads)
