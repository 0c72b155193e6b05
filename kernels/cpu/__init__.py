"""The Numba backend: whole passes as plans of compiled operators (plan.py).

`simd`, `vectors` and `tiles` hold vectors, long rows and inner products, `machine` single instructions, `packing` the
layouts of weights, `jit` compiling and its cache, `threads` what runs a plan; `rows`, `linear`, `ring`, `attention`,
`matrix_memory` and the mechanisms' own modules the operators, each with the function that puts it into a plan.
"""

import importlib
from collections.abc import Iterator

from tcinfer.kernels.cpu.jit import OPERATORS, cache_folder, prune
from tcinfer.kernels.cpu.threads import pool, prepare
from tcinfer.kernels.reference import Reference

MODULES = ("attention", "bandwidth", "infini", "linear", "matrix_memory", "ring", "rows", "tensor_cache")


def warm_up() -> Iterator[int]:
    """Compile every operator for this CPU into the cache folder: yields how many are left, at first all of them.

    Removes what earlier versions left there, if nobody has used it for a month.
    """
    for name in MODULES:
        importlib.import_module(f"tcinfer.kernels.cpu.{name}")
    prune()
    prepare()
    for done, made in enumerate(OPERATORS.values()):
        yield len(OPERATORS) - done
        _ = made.address
    yield 0


class Compiled(Reference):
    """Marks a model that runs by plans; its operators one by one are the reference's."""

    name = "numba"
    plans = True

    def __init__(self, threads: int | None = None) -> None:
        """threads: that run a plan together; None is one for each CPU that this process may use."""
        super().__init__()
        self.cold = _cold()  # before the threads' own functions are compiled
        self.threads = pool(threads)


def _cold() -> str:
    folder = cache_folder()
    if folder is None:
        return "compiling for this CPU; there is no private cache folder to keep the result in"
    return "" if any(folder.rglob("*.nbi")) else "compiling for this CPU, once: some seconds"
