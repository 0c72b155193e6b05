"""What a user is told where there is no GPU to run on, or not enough of one. The driver's part is made up here."""

from __future__ import annotations

import importlib.util
import os
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from conftest import SMALL, build, tcinfer
from host_device import HostDevice, backend, device, use  # noqa: F401

from tcinfer.engine import backend as engine_backend
from tcinfer.errors import TcinferError
from tcinfer.kernels.cuda.device import Device
from tcinfer.kernels.errors import UnavailableError

HAS_CUPY = importlib.util.find_spec("cupy") is not None


class OutOfMemoryError(Exception):
    pass


class Current(nullcontext):
    id = 0


def cupy(
    driver: int = 13000, count: int = 1, capability: tuple[int, int] = (9, 0), error: str = "", nvrtc: str = ""
) -> ModuleType:
    """As much of CuPy as a Device asks before its first launch; no memory is left."""

    def counted() -> int:
        if error:
            raise RuntimeError(error)
        return count

    def compiler() -> tuple[int, int]:
        if nvrtc:
            raise RuntimeError(nvrtc)
        return 13, 0

    def alloc(nbytes: int) -> Any:
        raise OutOfMemoryError

    made: Any = ModuleType("cupy")
    properties = {
        "name": b"NVIDIA Imaginary",
        "major": capability[0],
        "minor": capability[1],
        "multiProcessorCount": 3,
        "sharedMemPerBlockOptin": 101_376,
    }
    runtime = SimpleNamespace(
        getDeviceCount=counted,
        driverGetVersion=lambda: driver,
        runtimeGetVersion=lambda: 13000,
        getDeviceProperties=lambda number: properties,
        memGetInfo=lambda: (1_000, 2_000),
    )
    memory = SimpleNamespace(OutOfMemoryError=OutOfMemoryError)
    made.cuda = SimpleNamespace(
        runtime=runtime, nvrtc=SimpleNamespace(getVersion=compiler), Device=Current, alloc=alloc, memory=memory
    )
    made.get_default_memory_pool = lambda: SimpleNamespace(free_bytes=lambda: 24)
    return made


WITHOUT = {
    "no driver": ({"driver": 0, "error": "cudaErrorInsufficientDriver"}, "there is no NVIDIA driver on this machine"),
    "an old driver": (
        {"driver": 12040, "error": "cudaErrorInsufficientDriver"},
        "driver is for CUDA 12.4, .* 13.0: upd",
    ),
    "no GPU": ({"count": 0}, "there is no NVIDIA GPU"),
    "a GPU that is lost": (
        {"error": "cudaErrorNoDevice:\n no device"},
        r"can be used \(cudaErrorNoDevice: no device\)",
    ),
    "no compiler": ({"nvrtc": "libnvrtc is not there"}, r"Imaginary cannot be used \(libnvrtc is not there\)"),
    "an old GPU": ({"capability": (7, 5)}, "NVIDIA Imaginary has compute capability 7.5; tcinfer needs 8.0"),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_what_is_missing_is_named_with_the_way_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, says = WITHOUT[name]
    monkeypatch.setitem(sys.modules, "cupy", cupy(**options))  # type: ignore[arg-type]
    with pytest.raises(TcinferError, match=says) as caught:
        engine_backend("cuda")
    assert "\n" not in str(caught.value)
    assert "--backend numba" in str(caught.value) or "update" in str(caught.value)


def test_memory_that_does_not_suffice_is_told_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", cupy())
    made = Device()
    assert (made.name, made.multiprocessors) == ("NVIDIA Imaginary", 3)
    with pytest.raises(UnavailableError, match="has 1,024 bytes of memory left, and 5,000 more are needed"):
        made.zeros(5000)


class NVRTCError(Exception):
    pass


def test_machine_code_for_warpgroups_is_kept_where_cupy_keeps_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made, asked = cupy(), []

    def compile_program(text: str, options: tuple[str, ...]) -> None:
        asked.append((text, options))
        if text == "bad":
            raise NVRTCError

    made.cuda.nvrtc = SimpleNamespace(
        NVRTCError=NVRTCError,
        getVersion=lambda: (13, 0),
        createProgram=lambda text, *rest: text,
        compileProgram=compile_program,
        getCUBIN=lambda text: text.upper().encode(),
        getProgramLog=lambda text: "line 1:\nno such name",
        destroyProgram=lambda text: None,
    )
    made.RawModule = lambda **options: options  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", made)
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))
    gpu = Device()
    assert not gpu.warm
    first, again = (gpu.program("good", together)._module for together in (False, True))
    assert Path(first["path"]).read_bytes() == b"GOOD"
    assert first["path"] == again["path"]
    assert (first["enable_cooperative_groups"], again["enable_cooperative_groups"]) == (False, True)
    assert asked == [("good", ("-std=c++17", "-ftz=true", "-arch=sm_90a"))]
    assert gpu.warm
    with pytest.raises(UnavailableError, match=r"cannot compile for NVIDIA Imaginary \(line 1: no such name\)"):
        gpu.program("bad")
    assert len(list((tmp_path / "cache").iterdir())) == 1
    gpu.capability = (8, 9)
    assert gpu.program("good")._module["code"] == "good"


def test_a_model_and_a_session_that_do_not_fit_are_told(device: HostDevice, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    class Small(HostDevice):
        left = 10**9

        def zeros(self, nbytes: int) -> Any:
            if nbytes > self.left:
                raise UnavailableError(f"{nbytes:,} more are needed")
            return super().zeros(nbytes)

    small = Small()
    small.programs = device.programs
    use(small, monkeypatch)
    model = build(SMALL, "cuda")
    session = model.session()
    session.feed([1, 2, 3])
    small.left = 1000
    for allocates in (
        model.session,
        session.fork,
        lambda: session.feed([1] * 300),
        lambda: session.feed([1] * 9, True),
    ):
        with pytest.raises(TcinferError, match="more are needed"):
            allocates()
    small.left = 10**9
    assert session.whole
    assert session.logits is not None
    session.feed(4)
    small.left = 10_000
    with pytest.raises(TcinferError, match="more are needed"):
        build(SMALL, "cuda")


def test_a_model_whose_rows_do_not_fit_a_block_is_refused_before_its_first_token(
    device: HostDevice,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = HostDevice()
    small.programs, small.shared_bytes, small.capability = device.programs, 120_000, (8, 9)
    use(small, monkeypatch)
    with pytest.raises(TcinferError, match=r"has 120,000 bytes of shared memory .* needs 1\d\d,"):
        build(replace(SMALL, d_ff=32768), "cuda")


def test_a_fork_is_refused(backend: str) -> None:  # noqa: F811
    model = build(SMALL, backend)
    session = model.session()
    model.engine._owner += 1  # type: ignore[union-attr]
    with pytest.raises(TcinferError, match="does not outlive a fork"):
        session.feed(1)


@pytest.mark.skipif(HAS_CUPY, reason="CuPy is installed")
def test_without_cupy_the_extras_are_named() -> None:
    done = tcinfer("generate", "--backend", "cuda", "-p", "x")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "pip install 'cupy-cuda13x[ctk]' or 'cupy-cuda12x[ctk]'" in done.stderr


FAKE = """
class _Runtime:
    getDeviceCount = staticmethod(lambda: 0)
class cuda:
    runtime = _Runtime
"""


@pytest.mark.skipif(HAS_CUPY, reason="CuPy is installed")
def test_auto_falls_back_to_the_cpu_and_says_so(tmp_path: Path) -> None:
    """With a CuPy that finds no GPU; without any CuPy there is nothing to say."""
    (tmp_path / "cupy.py").write_text(FAKE)
    arguments = ("generate", "-p", "Once", "-n", "5", "--temp", "0", "--quiet")
    plain = tcinfer(*arguments)
    fallen = tcinfer(*arguments, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert plain.returncode == fallen.returncode == 0
    assert plain.stdout == fallen.stdout
    assert "GPU" not in plain.stderr + fallen.stderr  # as --quiet promises
    loud = tcinfer(*arguments[:-1], env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert "no GPU is used, but the CPU (numba): there is no NVIDIA GPU on this machine\n" in loud.stderr
