"""Record a real chat as a picture: `python docs/record.py MODEL.gguf docs/chat.svg`.

Types into `tcinfer chat` in a terminal of its own, as a person would, and draws the screen as it then stands. Needs
the extra `test` (pexpect, pyte).
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
import time
from itertools import groupby
from pathlib import Path

import pexpect
import pyte
from rich.console import Console
from rich.text import Text

COLUMNS, ROWS = 100, 34
SAID = (
    ("My name is Anna and I grow roses. Suggest one tool I need.", 12),
    ("/fork roses", 1),
    ("Write a long story about the sea.", -0.4),  # stopped after so many seconds
    ("/undo", 1),
    ("What do I grow?", 12),
    ("/memory", 1),
)


def record(model: Path) -> pyte.Screen:
    """The screen after all that is said."""
    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.Stream(screen)
    command = str(Path(sys.executable).parent / "tcinfer")
    arguments = ["chat", "-m", str(model), "--memory", "sinks", "--window", "512", "--temp", "0.3", "--seed", "5"]
    arguments += ["-n", "200", "-sys", "You are a gardener. Answer in one short sentence."]
    with tempfile.TemporaryDirectory() as state:
        env = os.environ | {"XDG_STATE_HOME": state, "TERM": "xterm-256color"}
        child = pexpect.spawn(command, arguments, env=env, dimensions=(ROWS, COLUMNS), encoding="utf-8", timeout=60)

        screen.write_process_input = child.send  # a terminal answers where its cursor is: the status line needs it

        def show(seconds: float) -> None:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                try:
                    stream.feed(child.read_nonblocking(4096, timeout=0.1))
                except pexpect.TIMEOUT:
                    continue

        def wait_for_prompt() -> None:
            end = time.monotonic() + 60
            while time.monotonic() < end:
                show(0.3)
                if screen.display[screen.cursor.y].rstrip() == ">":
                    return
            raise TimeoutError("no prompt came: " + "\n".join(screen.display))

        wait_for_prompt()
        for text, seconds in SAID:
            child.send(text + "\r")
            if seconds < 0:
                show(-seconds)
                child.sendintr()
            show(0.5)
            wait_for_prompt()
        child.sendeof()
        child.close()
    return screen


def draw(screen: pyte.Screen, path: Path) -> None:
    """The screen as an SVG."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    for y in range(ROWS):
        line = Text()
        for reverse, cells in groupby((screen.buffer[y][x] for x in range(COLUMNS)), key=lambda cell: cell.reverse):
            line.append("".join(cell.data for cell in cells), "reverse" if reverse else "")
        console.print(line, no_wrap=True, crop=True)
    path.write_text(console.export_svg(title="tcinfer chat"))


if __name__ == "__main__":
    draw(record(Path(sys.argv[1])), Path(sys.argv[2]))
