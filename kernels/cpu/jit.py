"""Compiling with Numba: one decorator, and a private cache folder named by what goes into the machine code."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numba
import numba.core.config
from numba.core.caching import FunctionCache
from platformdirs import user_cache_path

# Sums may be reordered (that is what makes them vector instructions), but NaN and Inf stay what they are.
FASTMATH = {"reassoc", "contract", "nsz", "arcp"}


@cache
def cache_folder() -> Path | None:
    """A folder of our own (0700) for compiled code; None where there can be none, and kernels compile each time.

    Numba's cache holds pickles, so nobody else may write there; and it does not notice when a function that another
    one calls has changed, so the folder is named by the text of all kernels.
    """
    text = hashlib.sha256(numba.__version__.encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        text.update(source.read_bytes())
    folder = user_cache_path("tcinfer", appauthor=False) / f"kernels-{text.hexdigest()[:16]}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        private = not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and (
            not hasattr(os, "getuid") or status.st_uid == os.getuid()
        )
        return folder if private and os.access(folder, os.W_OK) else None
    except OSError:
        return None


class _Cache(FunctionCache):
    """Numba's cache on disk, except that a damaged or full one is compiled around instead of being an error."""

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


def compiled(function: Callable | None = None, **options: Any) -> Any:
    """Compile a function at its first call, without the GIL, and keep the machine code in `cache_folder`."""
    if function is None:
        return lambda f: compiled(f, **options)
    dispatcher = numba.njit(nogil=True, fastmath=FASTMATH, error_model="numpy", **options)(function)
    folder = cache_folder()
    if folder is not None:
        config: Any = numba.core.config
        before, config.CACHE_DIR = config.CACHE_DIR, str(folder)  # read by the cache's maker, and only here
        try:
            dispatcher._cache = _Cache(function)  # what cache=True does, with a cache of our own
        finally:
            config.CACHE_DIR = before
    return dispatcher
