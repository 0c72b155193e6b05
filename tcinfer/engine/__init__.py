"""Engines: how passes through a model are run, one backend a file. `base` says what an engine is."""

from __future__ import annotations

import importlib.util
from importlib import import_module
from typing import TYPE_CHECKING

from tcinfer.config import check_count
from tcinfer.errors import TcinferError

if TYPE_CHECKING:
    from tcinfer.engine.base import Backend

BACKENDS = ("auto", "numpy", "numba", "cuda")
MODULES = {"numpy": "eager", "numba": "compiled", "cuda": "cuda"}


def backend(name: str = "auto", threads: int | None = None) -> Backend:
    """A backend by name, ready to make engines. "auto" is the first that is there: cuda, where CuPy is installed and
    finds a GPU, numba, numpy. Raises TcinferError where it cannot run, or for a count of threads that cannot be."""
    if threads is not None:
        check_count("threads", threads, 1, 4096)
    if name not in BACKENDS:
        raise TcinferError(f"backend {name!r} is not one of {', '.join(BACKENDS)}")
    if name != "auto":
        return _made(name, threads)
    remark = ""
    if importlib.util.find_spec("cupy") is not None:
        try:
            return _made("cuda", threads)
        except TcinferError as e:
            remark = str(e).removesuffix(": use --backend numba")
    other = _made("numba" if importlib.util.find_spec("numba") else "numpy", threads)
    if remark:
        other.remark = f"no GPU is used, but the CPU ({other.name}): {remark}"
    return other


def _made(name: str, threads: int | None) -> Backend:
    try:
        module = import_module(f"{__name__}.{MODULES[name]}")
        return module.Backend(threads)
    except ImportError as e:
        raise TcinferError(f"backend {name!r} cannot be loaded ({e}); use 'numpy', or install what it needs") from e
