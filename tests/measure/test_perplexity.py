"""Perplexity: against plain sums over all logits, by position, several memories, and the command around it."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import sys
import time
from itertools import chain
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import SHAKESPEARE, shared, small, tcinfer
from test_cli import FAST, PLAY, command, refused, start, write_model

import tcinfer as package
from tcinfer import TcinferError
from tcinfer.api import Model
from tcinfer.measure import perplexity
from tcinfer.measure.perplexity import Row, measure
from tcinfer.tokenizer import stream as text

WINDOW = {"memory": "window", "window": 8}
NAN = float("nan")


def some_ids(count: int, vocabulary: int = 50) -> list[int]:
    return np.random.default_rng(1).integers(0, vocabulary, count).tolist()


def losses(model: Model, ids: list[int]) -> np.ndarray:
    """-log p of ids[1:], in plain NumPy."""
    logits = model.session().feed(ids, all_logits=True)[:-1].astype(np.float64)
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    p = powers / powers.sum(-1, keepdims=True)
    return -np.log(p[np.arange(len(p)), ids[1:]])


def batch_error(values: np.ndarray, positions: np.ndarray, length: int) -> float:
    """The standard error from batch means, as its definition goes."""
    batches = [values[positions // length == k] for k in np.unique(positions // length)]
    m, K = values.mean(), len(batches)
    return np.sqrt(K / (K - 1) * sum((b.sum() - len(b) * m) ** 2 for b in batches)) / len(values)


def close(row: Row) -> tuple:
    return row.memory, row.windows, row.tokens, pytest.approx(row.nll), pytest.approx(row.error)


# The figures


def test_overall_and_by_position_against_plain_numpy(backend: str) -> None:
    model, ids = small(backend, **WINDOW), some_ids(601)
    result = measure({"m": model}, [ids])
    want, positions = losses(model, ids), np.arange(1, 601)
    (row,) = result.whole
    assert (row.memory, row.windows, row.first, row.last, row.tokens) == ("m", "all", 1, 600, 600)
    assert row.nll == pytest.approx(want.mean(), rel=1e-6)
    assert row.error == pytest.approx(batch_error(want, positions, 8), rel=1e-5)
    assert row.figures["perplexity"] == pytest.approx(np.exp(want.mean()), rel=1e-5)
    assert (row.difference, row.difference_error) == (None, None)
    names = ["0-1", "1-2", "2-4", "4-8", "8-16", "16-32", "32-64", "64-128"]
    assert [row.windows for (row,) in result.bins] == names
    for (row,) in result.bins:
        inside = (positions >= row.first) & (positions <= row.last)
        a, b = (8 * int(edge) for edge in row.windows.split("-"))
        assert (row.first, row.last) == (max(1, a), min(b - 1, 600))
        assert row.tokens == inside.sum()
        assert row.nll == pytest.approx(want[inside].mean(), rel=1e-6)
        if b - a >= 32:
            assert row.error == pytest.approx(batch_error(want[inside], positions[inside], 8), rel=1e-5)
        else:
            assert row.error is None


def test_bins_add_up_to_the_whole() -> None:
    result = measure({"m": small(**WINDOW)}, [some_ids(1000)])
    rows = [row for (row,) in result.bins]
    assert sum(row.tokens for row in rows) == result.whole[0].tokens == 999
    assert sum(row.tokens * row.nll for row in rows) == pytest.approx(999 * result.whole[0].nll)
    assert [row.first for row in rows[1:]] == [row.last + 1 for row in rows[:-1]]


@pytest.mark.parametrize("size", [1, 7, 256, 257])
def test_parts_of_any_size_make_no_difference(size: int, backend: str) -> None:
    model, ids = small(backend, **WINDOW), some_ids(700)
    whole = measure({"m": model}, [ids])
    parts = measure({"m": model}, (ids[a : a + size] for a in range(0, 700, size)))
    for one, other in zip(chain(*parts.bins, parts.whole), chain(*whole.bins, whole.whole), strict=True):
        assert one == other or close(one) == close(other)


def test_several_memories_see_the_same_tokens_and_differences_are_of_pairs() -> None:
    models = {
        "full": small(memory="full"),
        "window": small(**WINDOW),
        "sinks": small(memory="sinks", window=8, sinks=2),
    }
    ids = some_ids(600)
    result = measure(models, [ids])
    first, *others = (losses(model, ids) for model in models.values())
    for row, other in zip(result.whole[1:], others, strict=True):
        assert row.nll == pytest.approx(other.mean(), rel=1e-6)
        assert row.difference == pytest.approx((other - first).mean(), rel=1e-5)
        assert row.difference_error == pytest.approx(batch_error(other - first, np.arange(1, 600), 8), rel=1e-4)
    assert result.window == 8  # of the first that has one
    assert result.state_bytes["window"] < result.state_bytes["full"]


def test_window_is_full_memory_while_everything_fits() -> None:
    models = {"full": small(memory="full"), "window": small(memory="window", window=64)}
    result = measure(models, [some_ids(300)])
    (_, inside), (_, outside), *_ = result.bins
    assert inside.difference == pytest.approx(0, abs=1e-6)
    assert abs(outside.difference) > 1e-4


def test_a_window_of_one_has_no_first_bin() -> None:
    result = measure({"m": small(memory="window", window=1)}, [some_ids(9)])
    assert [(row.windows, row.tokens) for (row,) in result.bins] == [("1-2", 1), ("2-4", 2), ("4-8", 4), ("8-16", 1)]


def test_long_windows_are_cut_into_equal_batches() -> None:
    values, positions = np.random.default_rng(0).normal(size=4999), np.arange(1, 5000)
    sums = perplexity._Sums(1500, 1)  # three batches of 500 a window
    for a in range(0, 4999, 100):
        sums.add(values[None, a : a + 100])
    (row,), _ = sums.rows(["m"])
    assert row.error == pytest.approx(batch_error(values, positions, 500))


def test_full_memory_alone_counts_in_the_context_it_was_trained_on() -> None:
    assert measure({"m": small()}, [some_ids(99)]).window == 64
    assert measure({"m": small(context_length=0)}, [some_ids(99)]).window == 512


def test_full_memory_past_its_context_is_said_once() -> None:
    said: list[str] = []
    measure({"m": small()}, [some_ids(65)], notice=said.append)  # 64 taken in, the 65th predicted
    assert said == []
    measure({"m": small(), "w": small(**WINDOW)}, [some_ids(1000)], notice=said.append)
    (line,) = said
    assert "past the 64 tokens" in line


def test_limit_and_progress_count_tokens() -> None:
    taken: list[int] = []
    result = measure({"a": small(), "b": small(**WINDOW)}, [some_ids(9), some_ids(991)], 300, taken.append)
    assert result.whole[0].tokens == 299
    assert sum(taken) == 2 * 299


@pytest.mark.parametrize("scale", [1, 1e4, 1e37])
def test_losses_of_logits_of_any_size(scale: float) -> None:
    logits = (np.random.default_rng(0).normal(size=(5, 200_000)) * scale).astype(np.float32)  # a row at a time
    exact = logits.astype(np.float64)
    top = exact.max(-1)
    want = top + np.log(np.exp(exact - top[:, None]).sum(-1)) - exact[range(5), [3, 1, 4, 1, 5]]
    np.testing.assert_allclose(perplexity.nll(logits, [3, 1, 4, 1, 5]), want, rtol=1e-12)


@pytest.mark.parametrize(
    ("ids", "options", "says"),
    [
        ([], {}, "too short"),
        ([[]], {}, "too short"),
        ([[1]], {}, "too short"),
        ([[1, 2]], {"limit": 1}, "limit must be a whole number from 2"),
        ([[1, 50]], {}, "id 50 is outside the vocabulary of 50"),
        ([[1, -1]], {}, "id -1 is outside the vocabulary of 50"),
        ([[1, 2], [50, 3]], {}, "outside the vocabulary"),
    ],
)
def test_what_cannot_be_measured(ids: list[list[int]], options: dict, says: str) -> None:
    with pytest.raises(TcinferError, match=says):
        measure({"m": small()}, ids, **options)


def test_logits_that_are_not_finite() -> None:
    with pytest.raises(TcinferError, match="not finite"):
        perplexity.nll(np.array([[1, NAN]], np.float32), [0])


def test_learned_positions_end() -> None:
    model = small(rope_dim=0, context_length=20)
    assert measure({"m": model}, [some_ids(21)]).whole[0].tokens == 20
    with pytest.raises(TcinferError, match="ends at token 20: limit"):
        measure({"m": model}, [some_ids(22)])


def test_names_of_memories() -> None:
    def name(**changes: object) -> str:
        return perplexity.memory_name(small(**changes).config)

    assert name() == "full"
    assert name(memory="window", window=9) == "window:9"
    assert name(memory="sinks", window=9, sinks=3) == "sinks:9:3"


# A trained model


@pytest.mark.slow
def test_shakespeare_on_its_validation_text(tmp_path: Path) -> None:
    whole = shared("data", "shakespeare", "tinyshakespeare.txt").read_text()
    rest = whole[int(len(whole) * 0.9) :]
    (tmp_path / "rest").write_text(rest)
    done = tcinfer("perplexity", "-m", SHAKESPEARE, "-f", str(tmp_path / "rest"), "-o", "json")
    assert (done.returncode, done.stderr) == (0, "")
    (row,) = json.loads(done.stdout)["rows"]
    assert row["tokens"] == len(rest) - 1
    assert abs(row["nll"] - 1.5364) < 0.02  # the card's, on streams of 2,048 of this text

    model, ids = package.load(SHAKESPEARE, backend="numpy"), package.load(SHAKESPEARE).tokenizer.encode(rest[:1000])
    result = measure({"m": model}, [ids])
    assert result.whole[0].nll == pytest.approx(losses(model, ids).mean(), rel=1e-6)


# The command

SCORE = ("perplexity", "-m", SHAKESPEARE)
SAMPLE = "First Citizen:\nBefore we proceed any further, hear me speak.\n" * 25


@pytest.fixture
def sample(tmp_path: Path) -> str:
    (tmp_path / "sample.txt").write_text(SAMPLE)
    return str(tmp_path / "sample.txt")


def test_formats_agree(sample: str) -> None:
    rest = (*SCORE, "-f", sample, "--memory", "tensor", "--memory", "window:64", "--by-position")
    found = json.loads(command(*rest, "-o", "json").out)
    rows = found["rows"]
    assert found["window"] == 128
    assert found["text"] == sample
    assert len(rows) == 2 * (1 + 5)
    lines = list(csv.DictReader(io.StringIO(command(*rest, "-o", "csv").out)))
    assert lines == [{k: "" if v is None else str(v) for k, v in row.items()} for row in rows]
    done = command(*rest)
    assert done.err == ""
    for row in rows:
        assert f"{row['nll']:.4f}" in done.out
        if row["difference"] is not None:
            assert f"{row['difference']:+.4f}" in done.out
        if row["difference_error"] is not None:
            assert f" ± {row['difference_error']:.4f}" in done.out
    assert "| tensor:128 | 0.33 |" in done.out
    tables = [line.count("|") for line in done.out.splitlines() if line.startswith("|")]
    assert tables == [6] * 4 + [6] * 7


def test_without_by_position_there_is_one_row_for_each(sample: str) -> None:
    done = command("perplexity", *PLAY, "-f", sample, "--limit", 500, "-o", "csv")
    assert [line.split(",")[:4] for line in done.out.splitlines()[1:]] == [["tensor:128", "all", "1", "499"]]


def test_a_pipe_and_a_file_are_the_same(sample: str) -> None:
    rest = (*SCORE, "--memory", "window:16", "--memory", "sinks:16:2", "-o", "csv", "--by-position")
    with open(sample) as file:
        outs = {
            tcinfer(*rest, "-f", sample).stdout,
            tcinfer(*rest, "-f", "-", input=SAMPLE).stdout,
            tcinfer(*rest, "-f", "-", input=None, stdin=file).stdout,
        }
    assert len(outs) == 1
    assert outs.pop().count("\n") > 10


def test_window_and_sinks_are_for_those_that_have_them(sample: str) -> None:
    rest = ("perplexity", *PLAY, "-f", sample, "--limit", 100, "-o", "json", "--window", 20, "--sinks", 2)
    memories = ("full", "window", "sinks", "sinks:30", "sinks:30:3", "tensor")
    found = json.loads(command(*rest, *chain(*(("--memory", memory) for memory in memories))).out)
    want = ["full", "window:20", "sinks:20:2", "sinks:30:2", "sinks:30:3", "tensor:20:2"]
    assert [row["memory"] for row in found["rows"]] == want
    assert list(found["state_bytes"]) == want
    assert "full memory has no window" in refused(command(*rest, "--memory", "full"))


def test_bos_stands_at_the_start_where_the_file_says_so() -> None:
    path = shared("models", "stories260K", "stories260K-f32.gguf")
    model, said = package.load(path, backend="numpy"), "Once upon a time there was a little cat."
    ids = model.tokenizer.encode(said, bos=True)
    done = tcinfer("perplexity", *FAST, "-m", str(path), "-f", "-", "-o", "json", input=said)
    (row,) = json.loads(done.stdout)["rows"]
    assert row["tokens"] == len(ids) - 1
    assert row["nll"] == pytest.approx(losses(model, ids).mean(), rel=1e-6)


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_plots(sample: str, tmp_path: Path, suffix: str) -> None:
    paths = [tmp_path / f"{i}{suffix}" for i in range(2)]
    for path in paths:
        done = command(*SCORE, "-f", sample, "--memory", "tensor", "--memory", "window:64", "--plot", path)
        assert (done.status, done.err) == (0, "")
    one, two = (path.read_bytes() for path in paths)
    assert one == two
    assert one.startswith(b"\x89PNG") if suffix == ".png" else b"<svg" in one[:1000]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("-f nowhere.txt", "nowhere.txt: No such file"),
        ("-f /", "Is a directory"),
        ("-f /dev/null", "too short"),
        ("-f SAMPLE -o xml", "--output must be one of md, csv, json"),
        ("-f SAMPLE --limit 1", "--limit must be a whole number from 2"),
        ("-f SAMPLE --memory nonsense", "not one of full, window, sinks, infini, tensor"),
        ("-f SAMPLE --memory infini", "no weights for infini"),
        ("-f SAMPLE --memory window:x", "MODE:WINDOW:SINKS"),
        ("-f SAMPLE --memory window:", "MODE:WINDOW:SINKS"),
        ("-f SAMPLE --memory window:8:2", "has no sinks"),
        ("-f SAMPLE --memory window:0", "window must be a whole number from 1"),
        ("-f SAMPLE --memory window:99999999999999999999", "MODE:WINDOW:SINKS"),
        ("-f SAMPLE --memory tensor --memory tensor:128", "tensor:128 is there twice"),
        ("-f SAMPLE --plot plot.pdf", "plot.pdf: a plot's name ends in .svg or .png"),
        ("-f SAMPLE --plot nowhere/plot.svg", "nowhere/plot.svg: cannot be written: No such file"),
        ("-f SAMPLE --plot .", "ends in .svg or .png"),
        ("--limit 5", "Missing option '-f'"),
    ],
)
def test_what_is_refused(sample: str, arguments: str, says: str) -> None:
    words = [sample if word == "SAMPLE" else word for word in arguments.split()]
    assert says in refused(command("perplexity", *PLAY, *words))


def test_text_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "text").write_text(SAMPLE * 1500 + "é")
    started = time.monotonic()
    assert "U+00E9" in refused(command("perplexity", *PLAY, "-f", tmp_path / "text"))
    assert time.monotonic() - started < 5


def test_invalid_utf8_is_said_once(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m.gguf", "ab\ufffd", vocab_size=3)
    (tmp_path / "text").write_bytes(b"a\xffb\xff" * 50_000)
    done = command("perplexity", *FAST, "-m", model, "-f", tmp_path / "text", "--memory", "window:4", "--limit", 200)
    assert (done.status, done.err.count("not valid UTF-8")) == (0, 1)
    assert "199 tokens" in done.out


def test_past_the_trained_context_is_said_on_stderr(sample: str) -> None:
    done = command("perplexity", *PLAY, "-f", sample, "--memory", "full", "--limit", 400)
    assert done.status == 0
    assert re.fullmatch("tcinfer: full memory goes past the 256 tokens .*\n", done.err)


def test_no_plots_without_matplotlib(sample: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'tcinfer[plot]'" in refused(command(*SCORE, "-f", sample, "--plot", "a.svg"))


def test_interrupt_ends_with_130_and_no_traceback(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with start("perplexity", *PLAY, "-f", str(tmp_path / "pipe")) as process, open(tmp_path / "pipe", "wb", 0) as pipe:
        pipe.write(b"word " * 30_000)  # more than a pipe holds: when it is written, the first piece is being scored
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "")


class Endless(io.RawIOBase):
    """A long text that nobody holds; notes the process's resident memory at each read."""

    def __init__(self, size: int) -> None:
        self.left, self.resident = size, list[int]()

    def read(self, size: int = -1) -> bytes:
        self.resident.append(psutil.Process().memory_info().rss)
        part = (b"abba ab " * (size // 8))[: self.left]
        self.left -= len(part)
        return part


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    tiny = {"n_layers": 1, "d_model": 4, "d_ff": 4, "n_heads": 1, "n_kv_heads": 1, "head_dim": 4, "rope_dim": 4}
    path = write_model(tmp_path / "m.gguf", "ab ", vocab_size=3, memory="window", window=4, **tiny)
    model, stream = package.load(path), Endless(2 * 10**6)
    result = measure({"m": model}, text.ids(model.tokenizer, stream))
    assert result.whole[0].tokens == 2 * 10**6 - 1
    settled, *_, last = stream.resident[len(stream.resident) // 10 :]
    assert last - settled < 4 * 2**20
