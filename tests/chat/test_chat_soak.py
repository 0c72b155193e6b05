"""Long chats: memory, latency and descriptors stay what they are, and so does the system prompt."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import smollm2
from terminal import TEMPLATE, Terminal, answer, chats, conversation

from tcinfer import load, memory
from tcinfer.chat.launch import PINNED
from tcinfer.chat.template import fill

TURNS, LIMIT = 200, 8 * 2**20  # turns; bytes from turn 10 on
WINDOW = 512


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.slow
def test_200_turns_in_a_terminal_then_ctrl_c_undo_fork_save_kill_and_continue(home: Path) -> None:
    options = ("chat", "-m", smollm2(), "-n", "12", "--seed", "1")
    log = home / "tcinfer" / "chats" / "long.jsonl"
    with Terminal(home, *options, "--memory", "sinks", "--window", WINDOW, "--name", "long", "-q") as chat:
        chat.until(chat.ready)
        resident, seconds = {}, []
        for turn in range(1, TURNS + 1):
            start = time.monotonic()
            chat.says(f"What do you know about the number {turn}?")
            seconds.append(time.monotonic() - start)
            if turn in (1, 10, 20, 50, 100, 150, TURNS):
                resident[turn] = chat.rss()
        early, late = min(seconds[5:15]), min(seconds[-10:])  # of others at work the best knows least
        print(f"\n{chat.status}")
        print("resident MB after turn", {turn: round(nbytes / 1e6, 1) for turn, nbytes in resident.items()})
        print(f"turn 10: {early:.3f} s, turn {TURNS}: {late:.3f} s (best of ten)")
        assert chat.status.startswith("long | ")

        chat.says("/set max-tokens 500")
        chat.enter("Write a long story.")
        chat.until(chat.streaming)
        chat.stop()
        chat.until(chat.ready)
        assert "(stopped)" in chat.text()
        assert chat.says("/undo") == [f"took back 1 turn; {TURNS} left"]
        chat.enter("Write a long story about a fox.")
        chat.until(chat.streaming)
        chat.stop()
        chat.until(chat.ready)
        partial = "".join(chat.below("Write a long story about a fox.")).removesuffix("(stopped)").partition("^C")[0]
        assert len(partial) > 10
        assert chat.says("/fork branch") == ["branch is as this conversation is now; /switch branch goes there"]
        assert chat.says("/save mine.tcs") == [f"mine.tcs: {(home / 'mine.tcs').stat().st_size:,} bytes"]
        chat.says("/set max-tokens 12")
        chat.says("Thank you.")
        tokens = chat.status.split(" | ")[1]
        print(f"resident MB after all: {chat.rss() / 1e6:.1f}")
        chat.says("/set max-tokens -1")
        chat.enter("Write a long story about a bear.")
        chat.until(chat.streaming)
        chat.kill()

    with Terminal(home, *options, "--continue", "-q") as again:
        again.until(again.ready)
        assert again.status.startswith(f"long | {tokens} | ")
        start = time.monotonic()
        assert again.says("/undo") == [f"took back 1 turn; {TURNS + 1} left"]
        print(f"/undo after --continue, from the log: {time.monotonic() - start:.1f} s")
        (where, last) = again.says("/switch branch")
        assert where.startswith("branch | ")
        assert last.removeprefix("the last answer was: ")[:10] == " ".join(partial.split())[:10]
        again.enter("/exit")
        assert again.status_code() == 0
    records = [json.loads(line) for line in log.read_bytes().splitlines()]
    ids = [i for record in records for i in record.get("in", record.get("out", []))]
    config = json.loads(log.read_bytes().splitlines()[0])["start"]["memory"]
    model = load(smollm2(), backend="numba", **config)
    replayed = model.session()
    replayed.feed(ids)
    kept = model.load_session(log.with_suffix(".tcs"))
    assert kept.position == replayed.position == records[-1]["position"]
    assert np.array_equal(kept.logits, replayed.logits)
    assert late < 1.5 * early
    assert resident[TURNS] - resident[10] < LIMIT


@pytest.mark.slow
def test_3000_turns_of_a_model_of_characters(home: Path) -> None:
    talk, process = conversation(home, tokens=1), psutil.Process()
    seconds, resident, descriptors = [], {}, set()
    for turn in range(1, 3001):
        start = time.process_time()
        answer(talk, "Ay")
        seconds.append(time.process_time() - start)
        if turn % 500 == 0 or turn == 10:
            resident[turn] = process.memory_info().rss
            descriptors.add(process.num_fds())
    early, late = (np.quantile(part, 0.05) for part in (seconds[20:320], seconds[-300:]))  # others are at work too
    print("\nresident MB after turn", {turn: round(nbytes / 1e6, 1) for turn, nbytes in resident.items()})
    print(f"turn 100: {early * 1e3:.2f} ms of CPU, turn 3,000: {late * 1e3:.2f}; descriptors {descriptors}")
    start = time.monotonic()
    assert talk.undo(1000) == 1000
    print(f"/undo 1000 took {time.monotonic() - start:.2f} s")
    talk.close()
    assert len(descriptors) == 1
    assert late < 1.5 * early
    assert resident[3000] - resident[10] < LIMIT


# The system prompt


def pinned_for_ever(path: Path | None, source: str | None, system: str, message: str) -> None:
    made = chats(path, source, memory="sinks", window=64)
    talk = made.begin(system)
    talk.max_tokens = 1
    tokenizer, config = talk.model.tokenizer, talk.model.config
    parts = fill(talk.template.system_part(), system=system)
    count = len(tokenizer.encode_parts(parts, bos=tokenizer.add_bos))
    assert config.sinks == count > 4
    assert config.window == 64
    answer(talk, "Hi")
    layers = [(layer["k"][:count].copy(), layer["v"][:count].copy()) for layer in talk.session.state.layers]
    size, first = talk.session.nbytes, talk.session.position
    while talk.session.position < first + 64 + 1000:
        answer(talk, message)
    assert all(np.abs(k.astype(np.float32)).max() > 0 for k, _ in layers)
    for (k, v), layer in zip(layers, talk.session.state.layers, strict=True):
        assert np.array_equal(layer["k"][:count], k)
        assert np.array_equal(layer["v"][:count], v)
    assert talk.session.nbytes == size
    assert not made.said
    talk.close()


def test_the_system_prompt_is_pinned_in_a_model_of_characters(home: Path) -> None:
    pinned_for_ever(None, TEMPLATE, "Speak softly, my lord.", "And so it goes on. " * 20)


def test_the_system_prompt_is_pinned_in_smollm2(home: Path) -> None:
    pinned_for_ever(smollm2(), None, "You are a pirate. Answer in one sentence.", "And so it goes on. " * 100)


def test_what_is_pinned_has_a_bound_that_is_said_once(home: Path) -> None:
    made = chats(smollm2(), None)
    long = "word " * 3000
    talk = made.begin(long)
    config = talk.model.config
    per_token = memory.layout(config).nbytes / (config.window + config.sinks)
    assert config.sinks == int(PINNED / 23_040) == 1456
    assert config.sinks * per_token <= PINNED
    first = len(made.said)
    (line,) = (text for text in made.said if "system prompt" in text)
    assert line == "the system prompt has 3,009 tokens, of which the first 1,456 are kept for ever"
    talk.close()
    made.begin(long).close()
    assert len(made.said) == first
    made.begin("Short.").close()
    assert len(made.said) == first
    assert not os.listdir(made.folder)


def test_more_sinks_than_the_system_prompt_has_are_taken(home: Path) -> None:
    talk = chats(memory="sinks", window=32, sinks=200).begin("Be kind.")
    assert (talk.model.config.sinks, talk.model.config.window) == (200, 32)
    talk.close()
