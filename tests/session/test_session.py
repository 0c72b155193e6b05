"""Sessions as a Python program uses them: feeding, generating, copying, and what happens to bad input."""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest
from conftest import SHAKESPEARE, small

import tcinfer
from tcinfer.api import Session
from tcinfer.config import PASS_TOKENS
from tcinfer.errors import TcinferError
from tcinfer.kernels.reference.eager import Eager
from tcinfer.memory import tensor_cache
from tcinfer.sequence import RECENT

TENSOR = {"memory": "tensor", "window": 8, "options": tensor_cache.Options()}
IDS = np.random.default_rng(0).integers(0, 50, 40)


@pytest.fixture(scope="module")
def shakespeare() -> tcinfer.Model:
    return tcinfer.load(SHAKESPEARE)


def test_feed_takes_one_id_or_many_and_gives_the_last_logits_or_all() -> None:
    model = small(**TENSOR)
    s, t = model.session(), model.session()
    last = s.feed(IDS.tolist())
    rows = t.feed(IDS, all_logits=True)
    assert last.shape == (50,)
    assert last.dtype == rows.dtype == np.float32
    assert rows.shape == (40, 50)
    np.testing.assert_allclose(rows[-1], last, atol=1e-5)
    assert s.position == t.position == 40
    s.feed(3)
    s.feed(np.int32(3))
    assert s.position == 42


@pytest.mark.parametrize(
    "bad",
    [
        [],
        [50],
        [-1],
        [1, 2, 2**40],
        1.5,
        [1.0],
        [True],
        "text",
        [[1, 2], [3, 4]],
        [[1], [2, 3]],
        None,
        [2**64],
        [2**63],
    ],
    ids=str,
)
def test_ids_that_are_none_are_refused_and_change_nothing(bad) -> None:
    s = small(**TENSOR).session()
    s.feed(IDS)
    before = s.state.buffer.copy()
    with pytest.raises(TcinferError):
        s.feed(bad)
    np.testing.assert_array_equal(s.state.buffer, before)
    s.feed(1)


def test_the_message_names_the_id() -> None:
    with pytest.raises(TcinferError, match="id 50 at index 2 is outside the vocabulary of 50"):
        small().session().feed([1, 2, 50])


def test_learned_positions_end_at_the_block_and_say_so() -> None:
    s = small(rope_dim=0).session()
    s.feed(np.zeros(60, int))
    with pytest.raises(TcinferError, match="ends at token 64: 60 are taken, 5 more do not fit"):
        s.feed(np.zeros(5, int))
    assert s.position == 60
    s.feed(np.zeros(4, int))


def test_a_prompt_longer_than_a_chunk_is_the_same_prompt() -> None:
    model = small(**TENSOR)
    ids = np.random.default_rng(1).integers(0, 50, 2 * PASS_TOKENS + 17)
    s, t = model.session(), model.session()
    got = s.feed(ids)
    for part in np.array_split(ids, 31):
        want = t.feed(part)
    np.testing.assert_allclose(got, want, atol=2e-4)


def test_full_memory_grows_and_nothing_else_does() -> None:
    full, bounded = small().session(), small(**TENSOR).session()
    sizes = full.nbytes, bounded.nbytes
    for s in (full, bounded):
        s.feed(np.zeros(1000, int))
    assert full.nbytes > sizes[0]
    assert bounded.nbytes == sizes[1]
    assert full.outside_window == 0
    assert bounded.outside_window == 992


def test_snapshots_forks_and_reset() -> None:
    model = small(**TENSOR)
    s = model.session()
    first = s.feed(IDS)
    snap, fork = s.snapshot(), s.fork()
    after = s.feed([1, 2, 3])
    s.restore(snap)
    assert s.position == 40
    np.testing.assert_array_equal(s.feed([1, 2, 3]), after)
    fork.feed([9, 9])
    np.testing.assert_array_equal(model.session().feed(IDS), first)
    s.reset()
    assert s.position == 0
    np.testing.assert_array_equal(s.feed(IDS), first)
    assert snap.nbytes == s.nbytes + 4 * 50 + 4 * RECENT
    with pytest.raises(TcinferError, match="no snapshot of a session of this model"):
        small(**TENSOR).session().restore(snap)


def test_a_snapshot_of_full_memory_may_be_of_another_size() -> None:
    s = small().session()
    snap = s.snapshot()
    s.feed(np.zeros(600, int))
    s.restore(snap)
    np.testing.assert_array_equal(s.feed(IDS), small().session().feed(IDS))


def test_an_interrupted_pass_leaves_a_session_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(**TENSOR)
    s = model.session()
    snap = s.snapshot()

    def stop(chunk: Eager, x: np.ndarray) -> np.ndarray:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Eager, "gelu", stop)
        with pytest.raises(KeyboardInterrupt):
            s.feed([1])
    for use in (lambda: s.feed([1]), s.snapshot, s.fork, lambda: next(s.generate([1]))):
        with pytest.raises(TcinferError, match="broke off and its layers disagree"):
            use()
    s.restore(snap)
    s.feed([1])


def test_an_interruption_between_chunks_leaves_a_whole_session() -> None:
    s = small(**TENSOR).session()

    def stop(n: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        s.feed(np.zeros(2 * PASS_TOKENS, int), progress=stop)
    assert s.position == PASS_TOKENS
    s.feed([1])


def test_all_logits_are_not_kept_by_the_session() -> None:
    s = small(**TENSOR).session()
    s.feed(IDS, all_logits=True)
    assert s._logits is not None
    assert s._logits.fetch().base is None


def test_arguments_of_the_wrong_kind_are_our_errors(shakespeare: tcinfer.Model) -> None:
    s = shakespeare.session()
    for wrong in (
        lambda: s.restore(b"x"),
        lambda: tcinfer.load(5),
        lambda: tcinfer.load(memory=["window"]),
        lambda: shakespeare.tokenizer.encode(5),
        lambda: shakespeare.tokenizer.decode([1.5]),
        lambda: shakespeare.tokenizer.decode(3),
        lambda: s.feed({1: 2}),
    ):
        with pytest.raises(TcinferError):
            wrong()
    assert s.position == 0


def test_numpy_numbers_are_numbers(shakespeare: tcinfer.Model) -> None:
    pieces = shakespeare.session().generate("a", max_tokens=np.int64(3), temperature=np.float32(0.5), top_k=np.int32(5))
    assert len(list(pieces)) == 3


def test_generate_yields_a_piece_a_token_and_has_fed_it(shakespeare: tcinfer.Model) -> None:
    s = shakespeare.session()
    seen = []
    for piece in s.generate("ROMEO:", max_tokens=30, temperature=0.8, seed=1):
        seen.append(piece)
        assert s.position == 6 + len(seen)
    assert len(seen) == 30
    assert "".join(p.text for p in seen) == shakespeare.tokenizer.decode([p.id for p in seen])
    again = [p for p in shakespeare.session().generate("ROMEO:", max_tokens=30, seed=1)]
    assert again == seen
    assert [p for p in shakespeare.session().generate("ROMEO:", max_tokens=30, seed=2)] != seen


def test_generate_goes_on_from_where_the_session_stands(shakespeare: tcinfer.Model) -> None:
    whole = [p.id for p in shakespeare.session().generate("ROMEO:", max_tokens=20, temperature=0)]
    s = shakespeare.session()
    start = [p.id for p in s.generate("ROMEO:", max_tokens=8, temperature=0)]
    assert start + [p.id for p in s.generate(max_tokens=12, temperature=0)] == whole
    t = shakespeare.session()
    t.feed(shakespeare.tokenizer.encode("ROMEO:"))
    assert [p.id for p in t.generate(max_tokens=20, temperature=0)] == whole


@pytest.mark.parametrize("stop", ["\n", ["\n\n", "e"], ["th", "the"]], ids=str)
def test_stop_strings_end_the_text_and_are_not_part_of_it(shakespeare: tcinfer.Model, stop) -> None:
    def text(**options) -> str:
        return "".join(p.text for p in shakespeare.session().generate("ROMEO:\n", max_tokens=200, seed=3, **options))

    free = text()
    cuts = [free.find(s) for s in ([stop] if isinstance(stop, str) else stop) if s in free]
    assert cuts
    assert text(stop=stop) == free[: min(cuts)]


def test_a_held_back_beginning_of_a_stop_string_is_not_lost(shakespeare: tcinfer.Model) -> None:
    free = "".join(p.text for p in shakespeare.session().generate("ROMEO:\n", max_tokens=40, seed=3))
    stop = free[-3:] + "\x00"  # begins at the very end of the text and never completes
    text = "".join(p.text for p in shakespeare.session().generate("ROMEO:\n", max_tokens=40, seed=3, stop=stop))
    assert text == free


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": float("nan")},
        {"temperature": -1},
        {"temperature": float("inf")},
        {"temperature": True},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"seed": -2},
        {"seed": 2**64},
        {"max_tokens": -2},
        {"max_tokens": 2**63},
        {"stop": [""]},
        {"stop": [1]},
        {"stop": 5},
        {"stop": None},
        {"prompt": ""},
        {"prompt": None},
        {"prompt": [99]},
        {"prompt": "\N{SNOWMAN}"},
    ],
    ids=str,
)
def test_bad_arguments_of_generate_are_refused_before_anything_is_fed(shakespeare: tcinfer.Model, options) -> None:
    s = shakespeare.session()
    with pytest.raises(TcinferError):
        s.generate(**{"prompt": "a", **options})
    assert s.position == 0


def test_ids_run_without_a_tokenizer_and_text_is_refused() -> None:
    s = small().session()
    pieces = list(s.generate([1, 2, 3], max_tokens=5, seed=1))
    assert [p.text for p in pieces] == [""] * 5
    with pytest.raises(TcinferError, match="no tokenizer"):
        s.generate("text")


def test_threads_may_each_run_a_session_of_one_model(backend: str) -> None:
    model = small(backend, **TENSOR)
    want = model.session().feed(IDS)
    got: list[np.ndarray] = []

    def run() -> None:
        s: Session = model.session()
        for i in IDS[:-1]:
            s.feed(i)
        got.append(s.feed(IDS[-1]))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(got) == 8
    for logits in got:
        np.testing.assert_array_equal(logits, got[0])
        np.testing.assert_allclose(logits, want, atol=2e-5)


def test_weights_that_are_no_numbers_are_reported_when_a_token_is_drawn() -> None:
    model = small()
    model.weights["output_norm.weight"] = np.full(32, np.nan, np.float32)
    with pytest.raises(TcinferError, match="not finite"):
        next(model.session().generate([1]))


def test_the_package_imports_nothing_heavy_and_the_runtime_never_torch() -> None:
    code = (
        "import sys, tcinfer; assert 'numpy' not in sys.modules;"
        "s = tcinfer.load().session(); s.feed(1);"
        "assert 'torch' not in sys.modules; assert 'rich' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
