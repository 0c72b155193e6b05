"""`tcinfer bench` and `tcinfer warmup`: real runs, small."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import shared, smollm2, tcinfer

import tcinfer as package
from tcinfer.measure import speed as bench

QUICK = ("-p", "8", "-n", "4", "-r", "2")


def test_a_table_with_a_row_for_each_depth() -> None:
    done = tcinfer("bench", *QUICK, "-d", "0", "-d", "300")
    assert done.returncode == 0, done.stderr
    head, empty, names, rule, *rows = done.stdout.splitlines()
    assert "tensor memory" in head
    assert "GB/s" in head
    assert empty == ""
    assert names.split(" | ")[1:4] == ["depth", "prompt 8 tok/s", "decode tok/s"]
    assert [row.split(" | ")[1] for row in rows] == ["0", "300"]
    assert all(row.count("|") == names.count("|") == rule.count("|") for row in rows)


def test_json_says_the_same_and_more() -> None:
    report = json.loads(tcinfer("bench", *QUICK, "-o", "json", "--threads", "1").stdout)
    (row,) = report["rows"]
    assert (report["threads"], report["prompt"], report["tokens"]) == (1, 8, 4)
    assert len(row["prompt"]) == len(row["decode"]) == 2
    assert len(row["latencies"]) == 8
    assert row["state_bytes"] == package.load().session().nbytes
    assert row["resident_bytes"] > 50e6
    assert row["of_bandwidth"] > 0
    assert report["weight_bytes"] < package.loader.bundled().stat().st_size


def test_no_prompt_no_column() -> None:
    assert "prompt" not in tcinfer("bench", "-p", "0", "-n", "2", "-r", "1").stdout


def test_soak_streams_so_many_tokens_in_constant_state() -> None:
    lines = tcinfer("bench", "--soak", "1000").stdout.splitlines()[2:]
    cells = [line.strip("| ").split(" | ") for line in lines]
    assert [c[0] for c in cells] == [f"{n:,}" for n in range(100, 1001, 100)]
    assert len({c[3] for c in cells}) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("-n", "0"), "--tokens must be a whole number from 1"),
        (("-p", "-1"), "--prompt must be a whole number from 0"),
        (("-d", "-5"), "--depth"),
        (("-r", "0"), "--rounds"),
        (("--soak", "0"), "--soak"),
        (("-o", "xml"), "--output must be one of md, json"),
        (("--compare", "ollama"), "--compare must be one of"),
        (("--backend", "numpy"), "bench measures compiled backends: use --backend numba or cuda"),
        (("--cache-type", "f8"), "cache_type must be one of f16, f32"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(arguments: tuple[str, ...], said: str) -> None:
    done = tcinfer("bench", *arguments)
    assert done.returncode == 1
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_figures_are_medians_and_ratios_to_the_better_peer() -> None:
    rows = [
        bench.Measured(bench.OURS, 0, [10, 30, 20], [100.0], [1.0]),
        bench.Measured("a", 0, [5.0], [50.0], [1.0]),
        bench.Measured("b", 0, [4.0], [80.0], [1.0]),
        bench.Measured("b", 9, [400.0], [800.0], [1.0]),
    ]
    report = bench.Report("m", "full", 2, "avx2", 1e9, 5_000_000, 8, 4, rows)
    assert report.ratios(rows[0]) == {"prompt": 4, "decode": 1.25}
    assert report.of_bandwidth(rows[0]) == 0.5
    assert "prompt 4.00x, decode 1.25x" in report.markdown()


@pytest.mark.slow
def test_warmup_leaves_nothing_to_compile(tmp_path: Path) -> None:
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    first = tcinfer("warmup", env=env)
    assert first.returncode == 0, first.stderr
    assert "operators ready" in first.stdout
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nb*")}
    done = tcinfer("generate", "-p", "a", "-n", "1", env=env)
    assert "compiling" not in done.stderr
    written = {path for path in tmp_path.rglob("*.nb*") if files.get(path) != path.stat().st_mtime_ns}
    assert not written


@pytest.mark.peer
def test_beside_llama_cpp() -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra `peer`)")
    done = tcinfer("bench", "-m", str(smollm2()), "--memory", "full", *QUICK, "--compare", "llama.cpp")
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()[4:]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == ["tcinfer", "llama.cpp", "llama.cpp, flash attention"]
    assert "x" in rows[0].split(" | ")[-1]


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x -= x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


@pytest.mark.peer
def test_logits_are_nearer_to_the_reference_than_llama_cpps() -> None:
    """400 tokens of a novel, SmolLM2 Q4_1: mean KL from float32 weights times float32 activations; and one by one the
    same bits as at once."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra `peer`)")
    path = smollm2()
    text = shared("data", "books", "valid", "Jane_Austen__Persuasion.txt").read_text()[5000:8000]
    reference = package.load(path, backend="numpy", cache_type="f32")
    ids = reference.tokenizer.encode(text)[:400]
    want = log_softmax(reference.session().feed(ids, all_logits=True))

    def distance(logits: np.ndarray) -> float:
        got = log_softmax(logits)
        top1 = (got.argmax(1) == want.argmax(1)).mean()
        kl = float((np.exp(want) * (want - got)).sum(1).mean())
        print(f"KL {kl:.2e}, top-1 {top1:.4f}")
        return kl

    model = package.load(path)
    ours = model.session().feed(ids, all_logits=True)
    session = model.session()
    np.testing.assert_array_equal(np.stack([session.feed(i) for i in ids[:200]]), ours[:200])
    theirs = []
    for flash in (False, True):
        peer = llama_cpp.Llama(str(path), n_ctx=512, n_batch=512, logits_all=True, verbose=False, flash_attn=flash)
        peer.eval(ids)
        theirs.append(distance(np.array(peer.scores[:400])))
    assert distance(ours) <= min(theirs)
