"""Every operator, of every kind of weights, compiled for the GPUs in mind: by nvcc, and by what CuPy compiles with."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

from tcinfer.kernels.cuda.program import FORMS, forms, source
from tcinfer.kernels.reference.quants import KINDS
from tcinfer.memory import rooms

ROOMS = [o for room in rooms() for o in getattr(room, "OPERATORS", ())]
ALL = [*(kind.name for kind in KINDS), *FORMS]
ARCHITECTURES = ("80", "90", "90a", "100")  # 90a: where warpgroups multiply
PROGRAMS = pytest.mark.parametrize("together", [True, False], ids=["together", "alone"])


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@PROGRAMS
def test_nvcc_compiles_everything_without_a_warning(together: bool, architecture: str, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    if f"compute_{architecture.rstrip('a')}" not in known:
        pytest.skip(f"this nvcc does not know sm_{architecture}")
    text = tmp_path / "program.cu"
    text.write_text(source(together, ALL, ROOMS, wide=architecture == "90a"))
    flags = ["-std=c++17", f"-arch=sm_{architecture}", "-cubin", "-Werror", "all-warnings", "-Xptxas", "-v"]
    done = subprocess.run([nvcc, *flags, "-o", str(tmp_path / "out"), str(text)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "wgmma" not in done.stderr  # ptxas says so where it waits for products one by one
    kernels = ["together"] if together else [f"step_{form.full}" for form in forms(False, ALL, ROOMS)]
    for kernel in kernels:
        assert f"Compiling entry function '{kernel}'" in done.stderr
    if together:
        for form in forms(True, ALL, ROOMS):
            if form.operator.launch == "one" and not form.kind:
                assert form.full in done.stderr


@pytest.mark.slow
@PROGRAMS
def test_the_runtime_compiler_takes_it_without_a_header(together: bool) -> None:
    """NVRTC is what CuPy compiles with on a user's machine: it has fewer names than nvcc, and no headers."""
    found = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (found.submodule_search_locations or [])] if found else []
    # in this order: the second looks for the first
    names = ("libnvrtc-builtins.so.*", "libnvrtc.so.*")
    files = [next((f for folder in folders for f in folder.glob(f"**/{name}")), None) for name in names]
    if None in files:
        pytest.skip("NVRTC is not installed (pip install nvidia-cuda-nvrtc)")
    _, nvrtc = (ctypes.CDLL(str(file), ctypes.RTLD_GLOBAL) for file in files)
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    text = source(together, ALL, ROOMS, wide=True).encode()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, b"program.cu", 0, None, None) == 0
    options = (ctypes.c_char_p * 3)(b"-std=c++17", b"-arch=sm_90a", b"-ftz=true")  # the last is CuPy's own
    status = nvrtc.nvrtcCompileProgram(program, 3, options)
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    assert status == 0, log.value.decode()
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, cubin)
    assert (b"together" if together else b"step_linear_many_Q4_K") in cubin.raw
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
