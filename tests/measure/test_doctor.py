"""Commands about the machine: doctor against what the machine says otherwise, completion in a real shell."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from conftest import tcinfer
from test_cli import COMMAND, command, refused

from tcinfer import cli, loader
from tcinfer.errors import TcinferError
from tcinfer.measure import machine as doctor


def found(**options: Any) -> dict[str, Any]:
    done = tcinfer("doctor", "--json", **options)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def python(code: str, **options: Any) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, **options)


def test_what_is_installed_and_usable() -> None:
    told = found()
    for package in ("numpy", "numba"):
        assert told["backends"][package] == metadata.version(package)
    assert told["compiler"] == metadata.version("llvmlite")
    assert told["python"].endswith(sys.version.split()[0])
    assert told["cpu"]["name"] in Path("/proc/cpuinfo").read_text()
    features = set(Path("/proc/cpuinfo").read_text().split())
    expected = "avx512vnni" if "avx512_vnni" in features else "avx2" if "avx2" in features else "generic"
    assert told["cpu"]["instructions"] == expected
    assert told["model"]["path"] == str(loader.bundled())
    assert told["extras"].keys() == {"llguidance", "matplotlib", "llama-cpp-python", "torch"}


def test_the_cpus_that_this_process_may_use() -> None:
    one = {min(os.sched_getaffinity(0))}
    assert found(preexec_fn=lambda: os.sched_setaffinity(0, one))["cpu"]["usable"] == 1
    assert found()["cpu"]["usable"] == len(os.sched_getaffinity(0))


def test_the_table_ends_with_what_to_do(tmp_path: Path) -> None:
    cold = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "XDG_STATE_HOME": str(tmp_path / "state")}
    done = tcinfer("doctor", env=cold)
    *_, last = done.stdout.splitlines()
    assert (done.returncode, last.split(": ")[1]) == (0, "run tcinfer warmup")
    assert "cold: 0 of " in done.stdout
    assert f"{tmp_path}/state/tcinfer, not there yet" in done.stdout
    (tmp_path / "state" / "tcinfer").mkdir(parents=True, mode=0o700)
    told = found(env=cold)
    assert told["state_folder"] == {"path": f"{tmp_path}/state/tcinfer", "there": True, "private": True}
    assert told["operators"]["compiled"] == 0
    (folder,) = (tmp_path / "cache" / "tcinfer").iterdir()
    assert told["operators"]["cache"]["path"] == str(folder)
    folder.chmod(0o777)  # compiled code that others could change is not used
    shared_folder = found(env=cold)
    assert shared_folder["operators"]["cache"] is None
    assert "no private cache folder" in shared_folder["advice"][0]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777


def test_a_machine_that_has_compiled_nothing_yet_is_told_so_once(tmp_path: Path) -> None:
    """Before the threads' own functions are compiled, which a look at the cache would find."""
    new = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    code = "from tcinfer.engine import backend; print(backend('numba', 1).cold)"
    assert python(code, env=new).stdout == "compiling for this CPU, once: some seconds\n"
    assert python(code, env=new).stdout == "\n"


def test_operators_that_were_compiled_count(tmp_path: Path) -> None:
    cold = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    code = "from tcinfer.kernels.cpu import rows\nfrom tcinfer.kernels.cpu.jit import OPERATORS\n"
    assert python(code + "OPERATORS['norm'].address, OPERATORS['gelu'].address", env=cold).returncode == 0
    operators = found(env=cold)["operators"]
    assert (operators["compiled"], operators["all"] > 2) == (2, True)
    files = [path for path in tmp_path.rglob("*.nb?") if path.is_file()]
    assert operators["bytes"] == sum(path.stat().st_size for path in files)
    assert "partly warm" in tcinfer("doctor", env=cold).stdout


def test_ready_when_all_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = {"path": "/x", "there": True, "private": True}
    operators = {"cache": folder, "all": 5, "compiled": 5, "bytes": 10}
    monkeypatch.setattr(doctor, "_compiled", lambda: ("avx2", operators))
    done = command("doctor")
    assert (done.status, done.out.splitlines()[-1]) == (0, "everything is ready")
    assert "warm: 5 of 5 compiled" in done.out


def test_without_numba_it_runs_and_says_what_is_slow() -> None:
    code = "import sys\nsys.modules['numba'] = None\nsys.argv = ['tcinfer', 'doctor']\n"
    done = python(code + "from tcinfer.cli import main\nmain()")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--backend numpy runs, slowly" in done.stdout.splitlines()[-1]


def test_what_cannot_run_exits_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tcinfer.loader", None)
    done = command("doctor")
    assert done.status == 1
    assert "install tcinfer again" in done.out


def test_a_bundled_model_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def bundled() -> Path:
        raise TcinferError("it is missing")

    monkeypatch.setattr(loader, "bundled", bundled)
    done = command("doctor")
    assert done.status == 0
    assert "the bundled model is missing" in done.out


def test_nothing_optional_is_imported() -> None:
    code = (
        "import sys; sys.argv = ['tcinfer', 'doctor']\nfrom tcinfer.cli import main\ntry: main()\nexcept SystemExit: "
    )
    code += "print(*sys.modules)"
    done = python(code)
    imported = set(done.stdout.splitlines()[-1].split())
    assert "numba" in imported
    assert not {"torch", "matplotlib", "llama_cpp", "llguidance"} & imported


@pytest.mark.parametrize(
    ("script", "gpus"),
    [
        ("echo 'NVIDIA H100, 81559 MiB'; echo 'NVIDIA\033[2J, 1 MiB'", 2),
        ("echo 'no driver'; exit 9", 0),
        ("exec sleep 60", 0),
    ],
)
def test_gpus_that_a_tool_names(script: str, gpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if Path("/proc/driver/nvidia/gpus").exists():
        pytest.skip("this machine has one, and its driver is asked first")
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(doctor, "PATIENCE", 0.5)
    told = doctor.facts()
    assert len(told["gpus"]) == gpus
    table = doctor.report(told)
    assert all(line.isprintable() for line in table.splitlines())
    assert ("NVIDIA H100, 81559 MiB" in table) == (gpus > 0)
    assert ("none found" in table) == (gpus == 0)


# Completion


def completed(*words: str) -> list[str]:
    """What click's bash script would get for these words, the last one being typed."""
    env = os.environ | {
        "_TCINFER_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(words),
        "COMP_CWORD": str(len(words) - 1),
    }
    done = tcinfer(env=env)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def test_commands_options_and_choices() -> None:
    assert set(completed("tcinfer", "")) == {f"plain,{name}" for name in cli.cli.commands}
    assert completed("tcinfer", "quan") == ["plain,quantize"]
    assert completed("tcinfer", "inspect", "--j") == ["plain,--json"]
    assert completed("tcinfer", "completion", "") == ["plain,bash", "plain,zsh", "plain,fish"]


@pytest.mark.parametrize(
    "words", ["inspect", "quantize", "quantize a.gguf", "convert", "convert -o", "convert --tokenizer", "generate -m"]
)
def test_files_are_left_to_the_shell(words: str) -> None:
    assert completed("tcinfer", *words.split(), "mod") == ["file,mod"]


@pytest.mark.parametrize("words", ["generate --seed", "generate --memory", "quantize a.gguf b.gguf"])
def test_what_is_no_file_is_not(words: str) -> None:
    assert completed("tcinfer", *words.split(), "mod") == []


def test_completion_starts_without_numpy() -> None:
    asking = {"_TCINFER_COMPLETE": "bash_complete", "COMP_WORDS": "tcinfer ", "COMP_CWORD": "1"}
    code = "import sys\nfrom tcinfer.cli import main\ntry: main()\nexcept SystemExit: print(*sys.modules)"
    done = python(code, env=os.environ | asking)
    assert not {"numpy", "gguf", "numba"} & set(done.stdout.splitlines()[-1].split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_completes_with_the_script(tmp_path: Path) -> None:
    import pexpect

    (tmp_path / "only-this.gguf").touch()
    env = os.environ | {"PATH": f"{Path(COMMAND).parent}:{os.environ['PATH']}", "PS1": "$ ", "INPUTRC": "/dev/null"}
    with pexpect.spawn("bash", ["--norc", "-i"], cwd=str(tmp_path), env=env, encoding="utf-8", timeout=60) as shell:
        shell.sendline('eval "$(tcinfer completion bash)"; echo re""ady')
        shell.expect("ready")
        shell.send("tcinfer insp\t")
        shell.expect("inspect ")
        shell.send("on\t")
        shell.expect("only-this.gguf")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_are_clicks_own(shell: str) -> None:
    done = tcinfer("completion", shell)
    assert done.returncode == 0
    assert f"_TCINFER_COMPLETE={shell}_complete" in done.stdout
    if which := shutil.which(shell):
        check = subprocess.run([which, "-n"], input=done.stdout, capture_output=True, text=True)
        assert (check.returncode, check.stderr) == (0, "")


def test_other_shells_are_refused() -> None:
    assert "'bash', 'zsh', 'fish'" in refused(command("completion", "tcsh"))
    for asked in ("tcsh_source", "bash_complete", "bash_nonsense", ""):  # nor is there a line being typed
        done = tcinfer(env=os.environ | {"_TCINFER_COMPLETE": asked})
        assert (done.returncode, done.stdout, done.stderr) == (1, "", "")


def test_the_help_tells_how_to_install_it() -> None:
    assert 'eval "$(tcinfer completion bash)"' in command("completion", "--help").out
