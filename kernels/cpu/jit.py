"""Compiling with Numba: two decorators, and a private cache folder named by what goes into the machine code."""

from __future__ import annotations

import hashlib
import inspect
import os
import shutil
import stat
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache, cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import numba
import numba.core.config
from numba.core import types
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.ccallback import CFunc
from platformdirs import user_cache_path

from tcinfer.kernels.cpu.simd import FAST

UNUSED = 30 * 24 * 3600  # seconds after which another version's machine code may go
FASTMATH = set(FAST)
_making = Lock()  # a cache: threads may load models side by side


@cache
def cache_folder() -> Path | None:
    """A folder of our own (0700) for compiled code; None where there can be none, and kernels compile each time.

    Numba's cache holds pickles, so nobody else may write there; and it does not notice when a function that another
    one calls has changed, so the folder is named by the text of all kernels.
    """
    text = hashlib.sha256(f"{sys.implementation.cache_tag} {numba.__version__}".encode())
    here = Path(__file__).parent
    for source in sorted([*here.glob("*.py"), *here.parent.glob("*.py")]):
        text.update(source.read_bytes())
    try:
        folder = user_cache_path("tcinfer", appauthor=False) / f"kernels-{text.hexdigest()[:16]}"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        private = not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and (
            not hasattr(os, "getuid") or status.st_uid == os.getuid()
        )
        return folder if private and os.access(folder, os.W_OK) else None
    except (OSError, RuntimeError):  # no home
        return None


def prune() -> None:
    """Remove the folders of other versions that nobody has used for a month."""
    own = cache_folder()
    for folder in own.parent.glob("kernels-*") if own else ():
        with suppress(OSError):
            if folder != own and time.time() - max(p.stat().st_atime for p in (folder, *folder.rglob("*"))) > UNUSED:
                shutil.rmtree(folder)


class _Cache(FunctionCache):
    """Numba's cache on disk, one index for each name; a damaged or full one is compiled around, and is no error."""

    def __init__(self, function: Callable, name: str) -> None:
        super().__init__(function)
        # The folder stands for the text of the sources, so that neither their dates nor what functions close over
        # (Numba cannot compare that from one process to the next) need to be looked at.
        self._cache_file = IndexDataCacheFile(self._cache_path, name.replace("<", "").replace(">", ""), "")

    def _index_key(self, signature: Any, codegen: Any) -> Any:
        return signature, codegen.magic_tuple()

    def load_overload(self, *arguments: Any) -> Any:
        try:
            return super().load_overload(*arguments)
        except Exception:  # truncated pickles raise anything
            self.flush()
            return None

    def save_overload(self, *arguments: Any) -> None:
        with suppress(OSError):
            super().save_overload(*arguments)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


def _file_name(function: Callable, name: str) -> str:
    """What a function's machine code is called in the folder."""
    source = Path(inspect.getfile(function))
    if source.parent == Path(__file__).parent:
        return name
    # of a memory's room, whose text is not in the folder's name
    return f"{name}-{hashlib.sha256(source.read_bytes()).hexdigest()[:16]}"


def _cached(dispatcher: Any, function: Callable, name: str) -> None:
    """Give a Numba object a cache of our own in `cache_folder`, where there is one."""
    folder = cache_folder()
    if folder is None:
        return
    config: Any = numba.core.config
    with _making:
        before, config.CACHE_DIR = config.CACHE_DIR, str(folder)  # read by the cache's maker, and only here
        try:
            dispatcher._cache = _Cache(function, name)
        finally:
            config.CACHE_DIR = before


def compiled(function: Callable) -> Any:
    """Compile a function at its first call, without the GIL, and keep the machine code in `cache_folder`."""
    dispatcher = numba.njit(nogil=True, fastmath=FASTMATH, error_model="numpy")(function)
    _cached(dispatcher, function, _file_name(function, function.__qualname__))
    return dispatcher


WORDS = types.CPointer(types.int64)
SIGNATURE = ((WORDS, WORDS, types.int64, types.int64, types.int64), types.void)


class Operator:
    """A compiled function(a, p, thread, threads, taken); plans call it by its address, and asking for that compiles it.

    a: the arguments of one step of a plan, int64; p: what the pass is about (the words in plan.py); the function does
    the share of the work that falls to `thread` of `threads`; taken: the address of a count, 0 at the start, by which
    threads can share out the work as they go (see rows.claim).
    """

    def __init__(self, function: Callable, name: str) -> None:
        self.function, self.name, self.file_name = function, name, _file_name(function, name)

    @cached_property
    def _compiled(self) -> Any:
        options = {"fastmath": FASTMATH, "error_model": "numpy"}
        made = CFunc(self.function, SIGNATURE, locals={}, options=options)
        _cached(made, self.function, self.file_name)
        made.compile()
        return made

    @property
    def address(self) -> int:
        return int(self._compiled.address)

    def __repr__(self) -> str:
        return f"Operator({self.name})"


OPERATORS: dict[str, Operator] = {}  # all there are, for `tcinfer warmup`


def operator(function: Callable | None = None, name: str = "") -> Any:
    """Make an Operator of a function; `name` where one function text serves several (a kind of weights)."""
    if function is None:
        return lambda f: operator(f, name)
    made = Operator(function, name or function.__name__.lstrip("_"))
    assert made.name not in OPERATORS, made.name
    OPERATORS[made.name] = made
    return made
