"""Ctrl-C at any moment: every session is whole afterwards, and goes on to the bit as if nothing had been."""

from __future__ import annotations

import ast
import json
import subprocess
import sys

import pytest
from conftest import SHAKESPEARE

# In a process of its own, with the terminal's own signal; each round is interrupted at another moment.
SCRIPT = """
import json, os, random, signal, sys, threading, time
import numpy as np
import tcinfer
from tcinfer.generation import Request

model = tcinfer.load(sys.argv[1], threads=1)
rng, text = random.Random(5), "First Citizen: Before we proceed any further, hear me speak. "
ids, told = model.tokenizer.encode(text * 40), {}

def interrupted(use, longest):
    "Run use() until a Ctrl-C stops it: whether one did, and what it noted."
    try:
        try:
            threading.Timer(rng.random() * longest, os.kill, (os.getpid(), signal.SIGINT)).start()
            use()
        finally:
            time.sleep(2 * longest)  # one that came late comes here
    except KeyboardInterrupt as e:
        return True, " ".join(getattr(e, "__notes__", ()))
    return False, ""

def judge(name, sessions, stopped=False, note=""):
    "Are they whole, and the same as others that took the same in?"
    row = told.setdefault(name, {"rounds": 0, "stopped": 0, "whole": 0, "same": 0, "noted": 0})
    row["rounds"] += 1
    row["stopped"] += stopped
    row["noted"] += "tokens were taken in" in note
    row["whole"] += all(session.whole and (session.stands or not session.position) for session in sessions)
    same = True
    for session in sessions:
        if session.position:
            other = model.session()
            other.feed(session.recent)
            same = same and np.array_equal(other.logits, session.logits)
    row["same"] += same

for i in range(int(sys.argv[2])):
    one = model.session()
    judge("generate", [one], *interrupted(lambda: list(one.generate(ids[:30], max_tokens=400, seed=i)), 0.05))
    two = model.session()
    judge("feed", [two], *interrupted(lambda: two.feed(ids), 0.03))
    many = [model.session() for _ in range(4)]
    def steps():
        for token in ids[:300]:
            model.step_many(many, [token] * 4)
    judge("step_many", many, *interrupted(steps, 0.05))
    with model.scheduler() as scheduler:
        handles = []
        def submit():
            for seed in range(4):
                handles.append(scheduler.submit(Request.of(ids[:50], max_tokens=100, seed=seed)))
            for handle in handles:
                handle.result()
        found = interrupted(submit, 0.05)
        for handle in handles:
            handle.cancel()
            handle.result()
        judge("scheduler", [handle.session for handle in handles], *found)
print(json.dumps(told))
"""


@pytest.mark.parametrize("rounds", [8, pytest.param(50, marks=pytest.mark.slow)])
def test_interruptions_leave_every_session_whole(rounds: int) -> None:
    command = [sys.executable, "-c", SCRIPT, str(SHAKESPEARE), str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    for name in ("generate", "feed", "step_many", "scheduler"):
        row = told[name]
        assert row["whole"] == row["same"] == row["rounds"] == rounds, (name, row)
    if rounds == 50:  # of a few rounds, chance may have it that most come too late
        assert told["generate"]["stopped"] >= 40
        assert told["feed"]["noted"] >= 10


SIGNALS = """
import os, signal
from tcinfer.interrupts import uninterrupted

told = []
def heard(number, frame):
    told.append(signal.Signals(number).name)
    raise KeyboardInterrupt
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, heard)
try:
    with uninterrupted():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        told.append("end")
except KeyboardInterrupt:
    told.append("raised")
print(told, [signal.getsignal(number) is heard for number in (signal.SIGINT, signal.SIGTERM)])
"""


def test_signals_that_come_together_are_all_heard() -> None:
    done = subprocess.run([sys.executable, "-c", SIGNALS], capture_output=True, text=True, timeout=60)
    told, restored = ast.literal_eval(done.stdout.replace("] [", "], ["))
    assert told[0] == "end"
    assert sorted(told[1:-1]) == ["SIGINT", "SIGINT", "SIGTERM"]
    assert told[-1] == "raised"
    assert restored == [True, True]
