"""What this machine offers: `facts` looks, `report` tells. Nothing is compiled, and no optional library imported."""

from __future__ import annotations

import os
import platform
import shutil
import stat
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from tcinfer import __version__
from tcinfer.chat.store import state_folder
from tcinfer.errors import TcinferError

EXTRAS = ("llguidance", "matplotlib", "llama-cpp-python", "torch")
CUPY = ("cupy-cuda13x", "cupy-cuda12x", "cupy")
LABEL = 18  # columns of the report's first one
PATIENCE = 5  # seconds for nvidia-smi


def facts() -> dict[str, Any]:
    """All of it as plain values, ready for JSON; `advice` is what would make tcinfer faster, `broken` what stops it."""
    found: dict[str, Any] = {
        "tcinfer": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": platform.platform(),
        "cpu": {"name": _cpu(), "usable": _usable(), "instructions": None},
        "backends": {"numpy": _version("numpy"), "numba": None, "cuda": _cupy()},
        "compiler": _version("llvmlite"),
        "operators": None,
        "state_folder": None,
        "extras": {name: _version(name) for name in EXTRAS},
        "gpus": _gpus(),
        "model": None,
        "advice": [],
        "broken": [],
    }
    try:
        found["state_folder"] = _folder(state_folder())
    except TcinferError as e:
        found["advice"].append(str(e))
    try:
        from tcinfer.loader import bundled

        path = bundled()
        found["model"] = {"path": str(path), "bytes": path.stat().st_size}
    except ImportError as e:
        found["broken"].append(f"{e}: install tcinfer again")
    except TcinferError:
        found["advice"].append("the bundled model is missing: install tcinfer again, or name a model")
    try:
        found["cpu"]["instructions"], found["operators"] = _compiled()
        found["backends"]["numba"] = _version("numba")
    except Exception as e:  # a library that does not go with another raises anything as it is imported
        found["advice"].append(
            f"numba cannot be loaded ({e}); --backend numpy runs, slowly: pip install --upgrade numba"
        )
        return found
    found["advice"] += _about_cache(found["operators"])
    if found["gpus"] and not found["backends"]["cuda"]:
        found["advice"].append("the GPU is not used: pip install 'cupy-cuda13x[ctk]', or cuda12x for an older driver")
    return found


def _compiled() -> tuple[str, dict[str, Any]]:
    """The instructions that are used, and how many operators are compiled in the cache of this version.

    Raises whatever importing Numba may raise.
    """
    from tcinfer.engine.compiled import operators as all_operators
    from tcinfer.kernels.cpu.jit import cache_folder
    from tcinfer.kernels.cpu.simd import TIER
    from tcinfer.kernels.cpu.threads import run_steps

    named = {made.file_name for made in all_operators()}
    folder = cache_folder()
    operators: dict[str, Any] = {"cache": folder and _folder(folder), "all": len(named), "compiled": 0, "bytes": 0}
    # Numba has a folder within for each installation, which every compiled function knows.
    for file in Path(run_steps.stats.cache_path).iterdir() if folder else ():
        with suppress(OSError):  # another process may be writing there
            operators["bytes"] += file.stat().st_size
        operators["compiled"] += file.suffix == ".nbi" and file.stem in named
    return TIER, operators


def _about_cache(operators: dict[str, Any]) -> list[str]:
    if operators["cache"] is None:
        return ["there is no private cache folder, so every start compiles: set XDG_CACHE_HOME to a folder of yours"]
    missing = operators["all"] - operators["compiled"]
    return [f"{missing} of {operators['all']} operators are not compiled yet: run tcinfer warmup"] if missing else []


def _folder(path: Path) -> dict[str, Any]:
    """Whether a folder is there, and closed to writers other than its owner."""
    with suppress(OSError):
        mode = path.stat().st_mode
        return {"path": str(path), "there": True, "private": not mode & (stat.S_IWGRP | stat.S_IWOTH)}
    return {"path": str(path), "there": False, "private": False}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cupy() -> str | None:
    """The version of CuPy, under whichever of its names it is installed."""
    return next(filter(None, map(_version, CUPY)), None)


def _cpu() -> str:
    with suppress(OSError), open("/proc/cpuinfo", errors="replace") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _usable() -> int:
    """CPUs that this process may use, which is how many threads there are unless --threads says otherwise."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus() -> list[str]:
    """NVIDIA's, by name; by its driver's files, or else by its own tool."""
    names = []
    for file in Path("/proc/driver/nvidia/gpus").glob("*/information"):
        with suppress(OSError):
            lines = [line.partition(":") for line in file.read_text(errors="replace").splitlines()]
            names += [value.strip() for name, _, value in lines if name.strip() == "Model"]
    tool = shutil.which("nvidia-smi")
    if not names and tool:
        command = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader"]
        with suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=PATIENCE)
            names = done.stdout.splitlines() if not done.returncode else []
    return names


def report(found: dict[str, Any]) -> str:
    """`facts` as a table of printable characters; its last line says what to do, if anything."""
    cpu, backends, compiled, state = (found[name] for name in ("cpu", "backends", "operators", "state_folder"))
    rows = [
        ("tcinfer", f"{found['tcinfer']}; {found['python']}, {sys.executable}"),
        ("platform", found["platform"]),
        ("CPU", f"{cpu['name']}; instructions: {cpu['instructions'] or 'unknown without numba'}"),
        ("threads", f"{cpu['usable']}, one for each CPU that this process may use"),
        ("GPU", "; ".join(found["gpus"]) or "none found"),
        ("numpy", backends["numpy"] or "not installed"),
        ("numba", f"{backends['numba']}, llvmlite {found['compiler']}" if backends["numba"] else "cannot be used"),
        ("cuda", f"CuPy {backends['cuda']}" if backends["cuda"] else "CuPy is not installed"),
        ("operators", _operators(compiled) if compiled else "none"),
        ("cache folder", _place(compiled and compiled["cache"])),
        ("state folder", _place(state) if state else "none"),
        ("bundled model", "{path}, {bytes:,} bytes".format(**found["model"]) if found["model"] else "missing"),
        *((name, version or "not installed") for name, version in found["extras"].items()),
    ]
    lines = [f"{label:<{LABEL}}{text}" for label, text in rows]
    lines += found["broken"] + found["advice"] or ["everything is ready"]
    return "\n".join("".join(c if c.isprintable() else "?" for c in line) for line in lines)


def _operators(found: dict[str, Any]) -> str:
    state = "warm" if found["compiled"] == found["all"] else "cold" if not found["compiled"] else "partly warm"
    return f"{state}: {found['compiled']} of {found['all']} compiled, {found['bytes'] / 1e6:.1f} MB"


def _place(folder: dict[str, Any] | None) -> str:
    if folder is None:
        return "none that is private"
    if not folder["there"]:
        return f"{folder['path']}, not there yet"
    return f"{folder['path']}, {'private' if folder['private'] else 'others may write there (chmod go-w)'}"
