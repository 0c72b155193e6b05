"""Compiling with Numba: one decorator, and a private cache folder named by what goes into the machine code."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
import numba.core.config
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


def compiled(function: Callable | None = None, **options: Any) -> Any:
    """Compile a function at its first call, without the GIL, and keep the machine code in `cache_folder`."""
    if function is None:
        return lambda f: compiled(f, **options)
    folder = cache_folder()
    config: Any = numba.core.config
    before = config.CACHE_DIR
    config.CACHE_DIR = str(folder) if folder else before  # read while the decorator runs, and only then
    try:
        return numba.njit(nogil=True, fastmath=FASTMATH, error_model="numpy", cache=folder is not None, **options)(
            function
        )
    finally:
        config.CACHE_DIR = before
