"""For each option of each command: what it is given, and what must then differ or hold (test_flags.py)."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from conftest import SHAKESPEARE as MODEL
from test_cli import Outcome, command, refused

TEXT = "To be, or not to be, that is the question:\nWhether it is nobler in the mind to suffer, or to be no more.\n"
TEMPLATE = "{% for m in messages %}{{ m.content }}\n\n{% endfor %}{% if add_generation_prompt %}JULIET:\n{% endif %}"
STDIN = {"generate": "ROMEO:", "chat": "Romeo, speak to me.\n", "absorb": TEXT}
BASES = {  # what both runs of a command have
    "generate": f"-m {MODEL} -n 24 --seed 3",
    "chat": f"-m {MODEL} -n 24 --seed 3",
    "absorb": f"-m {MODEL} -s new.tcs",
    "bench": f"-m {MODEL} -p 4 -n 2 -r 1 -o json",
    "perplexity": f"-m {MODEL} -f text.txt -o json",
    "convert": "m.gguf -o new.gguf",
    "quantize": "m.gguf new.gguf q8_0",
    "inspect": MODEL,
    "session show": "s.tcs",
    "session verify": "s.tcs",
    "session diff": "s.tcs s.tcs",
}
Holds = Callable[[Outcome, Outcome], object]


class Row(NamedTuple):
    """An option's value (None: a flag), and what holds of the runs without and with it, but not if it did nothing."""

    value: str | None
    holds: Holds
    base: str = ""  # more of both runs
    without: str | None = None  # of the run without it, in place of base
    needs: str = "click"  # a package


def other(a: Outcome, b: Outcome) -> bool:
    return a.status == b.status == 0 and a.out != b.out != ""


def same(a: Outcome, b: Outcome) -> bool:
    return a.status == b.status == 0 and a.out == b.out != ""


def shows(text: str) -> Holds:
    return lambda a, b: b.status == 0 and text in b.out + b.err and text not in a.out + a.err


def refuses(text: str) -> Holds:
    return lambda a, b: a.status == 0 and text in refused(b)


def counts(pattern: str, holds: Callable[[int, int], object]) -> Holds:
    """Of a number in what was printed."""

    def number(run: Outcome) -> int:
        return int(re.findall(pattern, run.out + run.err)[0].replace(",", ""))

    return lambda a, b: holds(number(a), number(b))


def told(holds: Callable[[Any, Any], object]) -> Holds:
    """Of two JSON objects on stdout."""
    return lambda a, b: holds(json.loads(a.out), json.loads(b.out))


def first(report: Any) -> Any:
    return report["rows"][0]


def inspected(path: str) -> Any:
    return json.loads(command("inspect", "--json", path).out)


GREEDY = "--temp 0"
LONG = "--temp 0 -n 60"
DRY = LONG + " --dry-multiplier 0.3"
XTC = "--temp 0.001 --top-k 2 --top-p 1 --min-p 0 --xtc-threshold 0"  # of the two likeliest, the likelier goes
RUNS = {
    "--backend": Row("nonsense", refuses("backend 'nonsense' is not one of auto, numpy, numba, cuda")),
    "--threads": Row("4097", refuses("threads must be a whole number from 1 to 4096")),
}
SAMPLING = RUNS | {
    "--temp": Row("0", other),
    "--dynatemp-range": Row("0.8", other),
    "--dynatemp-exp": Row("9", other, "--dynatemp-range 0.8"),
    "--top-k": Row("1", same, without=GREEDY),
    "--top-p": Row("0", same, without=GREEDY),
    "--min-p": Row("1", same, without=GREEDY),
    "--typical": Row("0.1", other),
    "--top-n-sigma": Row("0.0001", same, without=GREEDY),
    "--xtc-probability": Row("1", lambda a, b: a.out[0] != b.out[0], XTC, without=GREEDY),
    "--xtc-threshold": Row("0.6", same, "--xtc-probability 1", without=""),
    "--dry-multiplier": Row("3", other, LONG),
    "--dry-base": Row("9", other, DRY),
    "--dry-allowed-length": Row("60", same, DRY, without=LONG),
    "--dry-penalty-last-n": Row("0", same, DRY, without=LONG),
    "--dry-sequence-breaker": Row("e", other, DRY),
    "--mirostat": Row("2", other, "--temp 1.5"),
    "--mirostat-ent": Row("0", same, "--mirostat 2", without=GREEDY),
    "--mirostat-lr": Row("1", other, "--mirostat 2 --mirostat-ent 1 --temp 1.5"),
    "--repeat-last-n": Row("0", same, GREEDY + " --repeat-penalty 1.5", without=GREEDY),
    "--repeat-penalty": Row("1.5", other, GREEDY),
    "--presence-penalty": Row("3", other, GREEDY),
    "--frequency-penalty": Row("3", other, GREEDY),
    "--logit-bias": Row("1-inf", lambda a, b: " " in a.out and len(b.out) > 20 and " " not in b.out, GREEDY),
    "--samplers": Row("temperature", other, "--top-k 1"),
    "--seed": Row("4", other),
    "--stop": Row(" ", lambda a, b: b.out.rstrip("\n") == a.out.partition(" ")[0] != a.out),
}
STATE = r"state ([\d,]+) bytes"
GENERATE = SAMPLING | {
    "--model": Row("m.gguf", shows("the cache grows")),
    "--memory": Row("window", counts(STATE, lambda a, b: a > b)),
    "--window": Row("20", shows("10 tokens outside the exact window of 20")),
    "--sinks": Row("3", shows("7 tokens outside the exact window of 20"), "--memory sinks --window 20"),
    "--cache-type": Row("f32", counts(STATE, lambda a, b: a < b)),
    "--prompt": Row("JULIET:\n", shows("prompt 8 tokens")),
    "--file": Row("text.txt", shows(f"prompt {len(TEXT)} tokens")),
    "--session": Row("s.tcs", lambda a, b: json.loads(b.err)["position"] == 12 + 6 + 24, "--stats json"),
    "--save": Row(None, lambda a, b: refused(a) and not b.status and os.path.exists("new.tcs"), "-s new.tcs"),
    "--max-tokens": Row("5", lambda a, b: len(b.out) == 5 and a.out.startswith(b.out)),
    "--json-schema": Row('{"const": 3}', lambda a, b: b.out == "3", needs="llguidance"),
    "--json-schema-file": Row("schema.json", lambda a, b: b.out == "3", needs="llguidance"),
    "--grammar": Row('start: "yea" | "nay"', lambda a, b: b.out in ("yea", "nay"), needs="llguidance"),
    "--grammar-file": Row("grammar.lark", lambda a, b: b.out in ("yea", "nay"), needs="llguidance"),
    "--banned": Row("th", lambda a, b: "th" in a.out and len(b.out) > 20 and "th" not in b.out, LONG),
    "--quiet": Row(None, lambda a, b: (b.out, b.err) == (a.out, "")),
    "--stats": Row("json", lambda a, b: json.loads(b.err)["new_tokens"] == 24),
}
CHAT = SAMPLING | {
    "--model": Row("m.gguf", shows("sinks memory"), "--chat-template t.jinja"),
    "--memory": Row("window", shows("window memory")),
    "--window": Row("20", shows("window 20;")),
    "--sinks": Row("30", shows("30 first tokens kept"), "--memory sinks"),
    "--cache-type": Row("f32", shows("0.6 MB")),
    "--system": Row("Thou art a king.", other),
    "--chat-template": Row("t.jinja", other),
    "--continue": Row(None, shows("the last answer was")),
    "--name": Row("roses", lambda a, b: not b.status and Path("state/tcinfer/chats/roses.jsonl").exists()),
    "--no-save": Row(None, shows("nothing of this chat is kept")),
    "--max-tokens": Row("5", lambda a, b: len(b.out) == 6 and a.out.startswith(b.out[:5])),
    "--quiet": Row(None, lambda a, b: (b.out, b.err) == (a.out, "")),
    "--banned": Row("so", lambda a, b: "so" in a.out and len(b.out) > 20 and "so" not in b.out, LONG),
}
HELD, OUTSIDE = r"tokens in ([\d,]+) bytes", r"([\d,]+) of them outside"
ABSORB = RUNS | {
    "--session": Row("new.2.tcs", lambda a, b: not b.status and os.path.exists("new.2.tcs")),
    "--file": Row("prompt.txt", shows("absorbed 7 tokens")),
    "--every": Row("-1", refuses("--every")),  # the rest: test_absorb_saves_as_often_as_every_says
    "--quiet": Row(None, lambda a, b: a.err != b.err == "" and os.path.exists("new.tcs")),
    "--model": Row("m.gguf", counts(HELD, lambda a, b: a != b)),
    "--memory": Row("window", counts(HELD, lambda a, b: a > b)),
    "--window": Row("20", counts(OUTSIDE, lambda a, b: (a, b) == (0, len(TEXT) - 20))),
    "--sinks": Row("3", counts(OUTSIDE, lambda a, b: b == len(TEXT) - 23), "--memory sinks --window 20"),
    "--cache-type": Row("f32", counts(HELD, lambda a, b: a < b)),
}
VERIFY = {"--model": Row(MODEL, shows("it goes on in "))}
CHECKED = {
    "--verify": Row(None, shows("verified on"), "--no-verify"),
    "--no-verify": Row(None, lambda a, b: not b.status and "verified" in a.out and "verified" not in b.out),
}
CONVERT = CHECKED | {
    "--output": Row("new.2.gguf", lambda a, b: inspected("new.2.gguf")),
    "--outtype": Row("q8_0", counts(r": ([\d,]+) bytes;", lambda a, b: a > b)),
    "--tokenizer": Row("meta.pkl", shows("tokenizer: meta.pkl")),
    "--chat-template": Row("t.jinja", lambda a, b: inspected("new.gguf")["chat_template"]["characters"] > 9),
}
BENCH = RUNS | {
    "--model": Row("m.gguf", told(lambda a, b: b["model"] == "m.gguf")),
    "--memory": Row("window", told(lambda a, b: (a["memory"], b["memory"]) == ("tensor", "window"))),
    "--window": Row("20", told(lambda a, b: first(a)["state_bytes"] > first(b)["state_bytes"])),
    "--sinks": Row("9", told(lambda a, b: first(a)["state_bytes"] < first(b)["state_bytes"])),
    "--cache-type": Row("f32", told(lambda a, b: first(a)["state_bytes"] < first(b)["state_bytes"])),
    "--prompt": Row("3", told(lambda a, b: (a["prompt"], b["prompt"]) == (4, 3))),
    "--tokens": Row("3", told(lambda a, b: len(first(b)["latencies"]) == b["tokens"] == 3)),
    "--depth": Row("40", told(lambda a, b: (first(a)["depth"], first(b)["depth"]) == (0, 40))),
    "--rounds": Row("2", told(lambda a, b: (len(first(a)["decode"]), len(first(b)["decode"])) == (1, 2))),
    "--output": Row("md", lambda a, b: json.loads(a.out) and "| depth |" in b.out),
    "--json": Row(None, told(lambda a, b: a["model"] == b["model"]), "-o md", without="-o json"),
    "--soak": Row("20", shows("\n| 20 | "), "-o md"),
    "--compare": Row("nonsense", refuses("--compare must be one of")),
}
PERPLEXITY = RUNS | {
    "--model": Row("m.gguf", told(lambda a, b: b["model"] == "m.gguf" and first(b)["nll"] > first(a)["nll"])),
    "--memory": Row("window", told(lambda a, b: first(b)["memory"] == "window:128")),
    "--window": Row("20", told(lambda a, b: first(b)["memory"] == "tensor:20")),
    "--sinks": Row("3", told(lambda a, b: first(b)["memory"] == "sinks:128:3"), "--memory sinks"),
    "--cache-type": Row("f32", told(lambda a, b: [*a["state_bytes"].values()] < [*b["state_bytes"].values()])),
    "--file": Row("prompt.txt", told(lambda a, b: (first(a)["tokens"], first(b)["tokens"]) == (len(TEXT) - 1, 6))),
    "--limit": Row("20", told(lambda a, b: first(b)["tokens"] == 19)),
    "--by-position": Row(None, told(lambda a, b: len(a["rows"]) == 1 < len(b["rows"]))),
    "--output": Row("csv", lambda a, b: b.out.startswith("memory,windows,")),
    "--json": Row(None, told(lambda a, b: a["model"] == b["model"]), "-o md", without="-o json"),
    "--plot": Row("new.svg", lambda a, b: "<svg" in Path("new.svg").read_text(), needs="matplotlib"),
}
JSON = {"--json": Row(None, lambda a, b: isinstance(json.loads(b.out), dict))}
BYTES = r"state +([\d,]+) bytes"
INSPECT = JSON | {
    "--memory": Row("window", shows("memory                window")),
    "--window": Row("20", shows("window                20 tokens")),
    "--sinks": Row("3", counts(BYTES, lambda a, b: a < b)),
    "--cache-type": Row("f32", counts(BYTES, lambda a, b: a < b)),
}
TABLES = {
    "": {"--version": Row(None, lambda a, b: re.fullmatch(r"tcinfer [\d.]+\n", b.out))},
    "generate": GENERATE,
    "chat": CHAT,
    "absorb": ABSORB,
    "session verify": VERIFY,
    "convert": CONVERT,
    "quantize": CHECKED,
    "bench": BENCH,
    "perplexity": PERPLEXITY,
    "session show": JSON,
    "session diff": JSON,
    "inspect": INSPECT,
    "doctor": JSON,
}
HELP = Row(None, lambda a, b: b.status == 0 and b.out.startswith("Usage: tcinfer") and not b.err)
