"""The runtime in a notebook: IPython's own shell runs cells, Ctrl-C in the middle of one, and top-level await."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

CELLS = """
import json, os, signal, sys, threading
from IPython.core.interactiveshell import InteractiveShell

shell = InteractiveShell.instance()

def cell(code):
    "What a cell raised, by its name."
    error = shell.run_cell(code, silent=False).error_in_exec
    return type(error).__name__ if error else None

def interrupted(code, after):
    threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT)).start()
    return cell(code)

told = {}
told["load"] = cell("import tcinfer; model = tcinfer.load(threads=1); session = model.session()")
told["shown"] = cell("model"), repr(shell.user_ns["_"])
told["generate"] = interrupted("for piece in session.generate('Once', max_tokens=-1, seed=1): pass", 0.5)
session = shell.user_ns["session"]
told["whole"] = session.whole, session.position > 1
told["on"] = cell("said = ''.join(p.text for p in session.generate(max_tokens=5))"), len(shell.user_ns["said"]) > 0
told["feed"] = interrupted("session.feed(model.tokenizer.encode('a word and ' * 20000))", 0.5)
told["still whole"] = session.whole
submit = "scheduler = model.scheduler(); handle = scheduler.submit(tcinfer.Request.of('Once', max_tokens=9))"
told["scheduler"] = cell(submit)
told["await"] = cell("answer = await handle"), shell.user_ns["answer"].finish_reason
told["async for"] = cell(
    "texts = [p.text async for p in scheduler.submit(tcinfer.Request.of('Once', max_tokens=9, seed=1))]"
)
told["waiting"] = interrupted("scheduler.submit(tcinfer.Request.of('Once', max_tokens=-1)).result()", 0.5)
told["after"] = cell("text = scheduler.submit(tcinfer.Request.of('Once', max_tokens=4)).result().text")
told["close"] = cell("scheduler.close()")
print("TOLD " + json.dumps(told))
"""


def test_cells_run_and_ctrl_c_loses_nothing(tmp_path: object) -> None:
    pytest.importorskip("IPython")
    done = subprocess.run([sys.executable, "-c", CELLS], capture_output=True, text=True, timeout=100, cwd=str(tmp_path))
    told = json.loads(done.stdout.rpartition("TOLD ")[2]) if "TOLD" in done.stdout else done.stderr[-3000:]
    assert told == {
        "load": None,
        "shown": [None, told["shown"][1]],
        "generate": "KeyboardInterrupt",
        "whole": [True, True],
        "on": [None, True],
        "feed": "KeyboardInterrupt",
        "still whole": True,
        "scheduler": None,
        "await": [None, "length"],
        "async for": None,
        "waiting": "KeyboardInterrupt",
        "after": None,
        "close": None,
    }
    assert told["shown"][1].startswith("<tcinfer.Model ")
