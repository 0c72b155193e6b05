"""The trainer's command: what it writes runs, a killed run goes on, bad options are one clear error."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import shared
from test_trainer import GOLDEN, difference, torch, whole
from trainer_modules import TRAINER, trainer_modules

import tcinfer
from tcinfer import converters

pytestmark = pytest.mark.peer

trainer = pytest.fixture(scope="module")(trainer_modules)

TINY = {
    "vocab": 300,
    "layers": 2,
    "remember": 1,
    "width": 16,
    "heads": 2,
    "window": 8,
    "segment": 16,
    "document": 64,
    "batch": 4,
    "warmup": 2,
    "steps": 6,
    "save-every": 3,
}
SMALL = ["--float32", *(f"--{name}={value}" for name, value in TINY.items())]
KEPT = ("model", "model_args", "iter_num", "best_val_loss", "config")  # the published keys; last.pt has the optimizer


def prose(seed: int, paragraphs: int = 120) -> str:
    """Paragraphs of made-up words."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abdefgilmnorstu", k=rng.randint(2, 7))) for _ in range(60)]
    return "\n\n".join(" ".join(rng.choices(words, k=rng.randint(3, 25))) + "." for _ in range(paragraphs)) + "\n\n"


@pytest.fixture
def text(tmp_path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for seed in range(2):
        (folder / f"{seed}.txt").write_text(prose(seed))
    return folder


@pytest.fixture
def run(trainer, tmp_path, text) -> Callable:
    """The command in this process, with its output folder below tmp_path; its result."""
    from click.testing import CliRunner

    def invoke(out: str, *options: str):
        return CliRunner().invoke(trainer.train.main, [f"--data={text}", f"--out={tmp_path / out}", *SMALL, *options])

    return invoke


def checkpoint(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def assert_equal(a: Any, b: Any) -> None:
    """Tensors bit by bit, in dictionaries and lists."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        a, b = list(a.values()), list(b.values())
    if isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b


def test_the_command_writes_a_checkpoint_that_runs(run, trainer, tmp_path, text):
    result = run("out", f"--valid={text}", f"--then={text / '1.txt'}")
    assert result.exit_code == 0, result.output
    assert "step 3: loss" in result.output
    assert "step 6: loss" in result.output
    assert "recall" in result.output
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["ckpt.pt", "last.pt", "tokenizer.model"]
    kept, last = checkpoint(out / "ckpt.pt"), checkpoint(out / "last.pt")
    assert kept.keys() == set(KEPT)
    assert last.keys() == {*KEPT, "optimizer", "state"}
    assert kept["iter_num"] == 6
    if GOLDEN:
        published = checkpoint(shared("golden", "tc-delta", "ckpt.pt"))
        assert published.keys() == {*KEPT, "optimizer"}
        assert all(isinstance(kept[key], type(published[key])) for key in KEPT)

    model, _ = trainer.network.load(out / "ckpt.pt")
    converters.convert(out / "ckpt.pt", tmp_path / "model.gguf", "f32", verify=False)
    runtime = tcinfer.load(tmp_path / "model.gguf", cache_type="f32")
    words = prose(0)[:200]
    ids = trainer.vocabulary.load(out / "tokenizer.model").encode(words)
    assert len(ids) > 50
    assert runtime.tokenizer.encode(words) == ids
    got = runtime.session().feed(ids, all_logits=True)
    assert difference(torch.from_numpy(got), whole(model, torch.tensor([ids]))[0]) < 1e-4


@pytest.mark.parametrize("memory", ["full", "window", "sinks", "infini"])
def test_every_memory_trains(memory, run, trainer, tmp_path):
    result = run("out", f"--memory={memory}", "--block=gpt", "--characters", "--bf16", "--steps=2")
    assert result.exit_code == 0, result.output
    args = trainer.network.load(tmp_path / "out" / "ckpt.pt")[0].args
    assert (args.kv_window, args.kv_num_sinks > 0) == (0 if memory == "full" else 8, memory == "sinks")
    assert (args.tc_enabled, args.infini_enabled) == (False, memory == "infini")


def test_training_learns_and_frozen_rates_stay(run, trainer, tmp_path):
    result = run("out", "--steps=60", "--save-every=30", "--frozen-rates", "--share=0", "--lr=0.01")
    assert result.exit_code == 0, result.output
    early, late = (float(result.output.split(f"step {step}: loss ")[1].split(",")[0]) for step in (30, 60))
    assert late < early - 0.2
    weights = checkpoint(tmp_path / "out" / "ckpt.pt")["model"]
    decays = weights["transformer.h.1.attn.tc.logit_decay_fast"].sigmoid().tolist()
    limit = 0.5 ** (1 / TINY["document"])  # what is longer than that is not trained
    assert decays == pytest.approx([min(trainer.train.DECAYS[i], limit) for i in (0, 2)], abs=1e-5)  # of two heads
    assert weights["transformer.h.1.attn.tc.logit_lr_fast"].sigmoid().tolist() == pytest.approx([0.3, 0.3])


def test_a_resumed_run_takes_the_same_steps(run, trainer, tmp_path, monkeypatch):
    assert run("whole").exit_code == 0
    step = trainer.data.Streams.step

    def interrupted(self, number, steps):
        if number == 5:
            raise RuntimeError("power cut")
        return step(self, number, steps)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.data.Streams, "step", interrupted)
        assert isinstance(run("cut").exception, RuntimeError)
    assert checkpoint(tmp_path / "cut" / "last.pt")["iter_num"] == 3
    assert not (tmp_path / "cut" / "ckpt.pt").exists()
    result = run("cut", "--resume")
    assert result.exit_code == 0, result.output
    a, b = (checkpoint(tmp_path / out / "last.pt") for out in ("whole", "cut"))
    assert_equal(a, b)


def test_a_run_goes_on_as_another_only_where_that_can_be(run, tmp_path):
    assert run("out", "--steps=3").exit_code == 0
    first = checkpoint(tmp_path / "out" / "last.pt")
    for options, says in (
        (["--steps=3"], "holds a run: go on with --resume"),
        (["--resume", "--steps=2"], "3 steps were taken already"),
        (["--resume", "--steps=3", "--width=32"], "has another n_embd, n_inner"),
        (["--resume", "--memory=window"], "has another tc_enabled"),
    ):
        done = run("out", *options)
        assert (done.exit_code, type(done.exception)) == (1, SystemExit)
        assert says in " ".join(done.output.split())
    assert_equal(checkpoint(tmp_path / "out" / "last.pt"), first)
    done = run("out", "--resume", "--steps=6", "--share=0.5", "--batch=2")
    assert done.exit_code == 0, done.output
    assert "from step 3 on with another steps, batch, share; memories start empty" in done.output
    assert checkpoint(tmp_path / "out" / "ckpt.pt")["iter_num"] == 6
    (tmp_path / "out" / "ckpt.pt").unlink()
    assert run("out", "--resume", "--steps=6", "--weight-decay=0").exit_code == 0
    assert checkpoint(tmp_path / "out" / "ckpt.pt")["iter_num"] == 6


@pytest.mark.slow
def test_a_killed_process_goes_on(tmp_path, text):
    def start(out: str, *options: str) -> subprocess.Popen:
        arguments = [f"--data={text}", f"--out={tmp_path / out}", *SMALL, "--steps=40", "--save-every=4", "--threads=1"]
        command = [sys.executable, str(TRAINER / "train.py"), *arguments, *options]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    process, until = start("cut"), time.monotonic() + 100
    while not (tmp_path / "cut" / "last.pt").exists() and time.monotonic() < until:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "cut" / "ckpt.pt").exists()
    for resumed in (start("cut", "--resume"), start("whole")):
        printed = resumed.communicate()[0]
        assert resumed.returncode == 0, printed
    a, b = (checkpoint(tmp_path / out / "last.pt") for out in ("whole", "cut"))
    for part in ("model", "optimizer", "state"):
        assert_equal(a[part], b[part])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resume"], "nothing to resume: .*last.pt does not exist"),
        (["--document=72"], "--document 72 is not a multiple of --segment 16"),
        (["--heads=3"], "n_head 3 must divide n_embd"),
        (["--document=16384"], "16384"),
        (["--width=18"], "n_embd 18 is not a multiple of twice n_head 2"),
        (["--valid={}/short.txt"], "no text of more than --document"),
        (["--data={}/nothing"], "nothing: no \\*.txt in this folder"),
        (["--data={}/latin.txt"], "latin.txt: not UTF-8"),
        (["--vocab=4096"], "--vocab 4096 "),
    ],
    ids=[
        "nothing to resume",
        "document",
        "heads",
        "text too short",
        "width",
        "valid",
        "no text",
        "not UTF-8",
        "vocabulary",
    ],
)
def test_bad_options_are_one_clear_error(options, message, run, tmp_path):
    (tmp_path / "nothing").mkdir()
    (tmp_path / "short.txt").write_text("Too short.")
    (tmp_path / "latin.txt").write_bytes(b"na\xefve " * 999)
    result = run("out", *(option.format(tmp_path) for option in options))
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), result.exception
    [line] = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert re.search(message, line)
