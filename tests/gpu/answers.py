"""What measure_gpu.py checks of a GPU's answers, with the cases and thresholds of the tests for other backends."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import importable  # noqa: F401
import numpy as np
from measuring import GREEDY, Bench, Shape, config_of, stepping, weights
from test_golden import FEEDS, LIMIT, memory_of, relative
from test_memory import CASES, IDS, W, arrays, difference, feed, model_of

from tcinfer import converters
from tcinfer.api import Model
from tcinfer.engine import eager
from tcinfer.kernels.reference.quants import Kind
from tcinfer.loader import load
from tcinfer.tokenizer import from_metadata

FLOATS, HALVES = 1e-3, 5e-3  # of ‖logits‖: of one token, its keys and values halves; of many, in halves throughout
SHAPE = Shape(3, 256, 4, 2, 64, 512, 320, False)  # of the model with weights of every kind
SMALL = ("sinks-in-cache", "infini-delta-gqa-key-conv", "tensor-everything")


def close(b: Bench, what: str, errors: dict[str, float], limit: float) -> None:
    """A row of the worst of some errors; those beyond the limit fail."""
    bad = {name: error for name, error in errors.items() if not error <= limit}
    name, worst = max((bad or errors).items(), key=lambda item: item[1])
    b.row(f"{what} ({len(errors)})", f"worst {worst:.1e}, {name}", f"{limit:g}", not bad)
    if bad:
        raise AssertionError(", ".join(f"{name} {error:.1e}" for name, error in bad.items()))


def apart(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def golden(b: Bench, kinds: Sequence[str]) -> None:
    """Every mechanism, the published checkpoints, weights of each of some kinds, many sessions together."""
    names, count = list(CASES)[:: 23 if b.cupy is None else 4 if b.quick else 1], 20 if b.cupy is None else 48
    with b.attempt("mechanisms"):
        close(b, "mechanisms against the reference", {name: contract(b, name, count) for name in names}, LIMIT["cuda"])
    with b.attempt("golden checkpoints"):
        checkpoints(b)
    with b.attempt("kinds of weights"):
        every_kind(b, kinds, 40 if b.cupy is None else 300)


def small(b: Bench, kinds: Sequence[str]) -> None:
    """What a sanitizer looks at: a few short cases, every allocation the driver's own."""
    if b.cupy is not None:
        b.cupy.cuda.set_allocator(None)
    for name in SMALL:
        b.row(name, f"{contract(b, name, 20):.1e}")
    every_kind(b, kinds, 24)


def contract(b: Bench, name: str, count: int) -> float:
    """The worst error of a case of test_memory.py fed in several ways; infinite if a copy goes on otherwise."""
    b.tidy()
    ids, model, reference = IDS[:count], model_of(name, "cuda"), model_of(name, "numpy").session()
    want, errors = reference.feed(ids, all_logits=True), []
    for lengths in ([], [1] * (count - 1), [W, 1, W + 1]):
        session = model.session()
        errors.append(difference(feed(session, ids, lengths), want))
        errors += [difference(array, arrays(reference)[key]) for key, array in arrays(session).items()]
    session, rest = model.session(), ids[count // 2 :]
    session.feed(ids[: count // 2])
    snapshot, fork = session.snapshot(), session.fork()
    on, beside = (feed(s, rest, [1] * 5) for s in (session, fork))
    fork.restore(snapshot)
    same = np.array_equal(on, beside) and np.array_equal(on, feed(fork, rest, [1] * 5))
    return max(errors) if same and np.isfinite(errors).all() else float("inf")


def checkpoints(b: Bench) -> None:
    """tests/memory/test_golden.py."""
    errors = {}
    for name, want, model in converted(b):
        for way, lengths in FEEDS.items():
            session, parts = model.session(), np.split(want["tokens"], np.cumsum(lengths)[:-1])
            got = np.concatenate([session.feed(part, all_logits=True) for part in parts])
            states, worst = session.state.on_host().layers, [relative(got, want["logits"])]
            for key in (key for key in want.files if "." in key):
                memory, layer = key.split(".")
                worst.append(relative(memory_of(states[int(layer)], memory, want[key].shape), want[key]))
            errors[f"{name} {way}"] = max(worst) if np.isfinite(worst).all() else float("inf")
    if not errors:
        b.row("golden checkpoints", f"skipped: none in {b.options.golden}")
        return
    close(b, "golden checkpoints", errors, LIMIT["cuda"])


def models(b: Bench, kinds: Sequence[str]) -> None:
    """Makes every model that is asked here, so that what is compiled for it is known."""
    for name in CASES:
        model_of(name, "cuda")
    for _ in converted(b):
        pass
    shape = SHAPE
    config = config_of(shape, "sinks", 75)
    bound = weights(config, shape.tied, [Kind[kind] for kind in kinds])
    Model(config, bound, from_metadata({}, shape.vocab), b.backend)


def converted(b: Bench) -> Iterator[tuple[str, Any, Model]]:
    """The golden checkpoints: name, what is expected, the model."""
    with tempfile.TemporaryDirectory() as folder:
        for path in sorted(b.options.golden.glob("*/golden.npz"))[: 1 if b.cupy is None else None]:
            name, to = path.parent.name, Path(folder, f"{path.parent.name}.gguf")
            b.tidy()
            converters.convert(path.parent / "ckpt.pt", to, "f32", verify=False)
            yield name, np.load(path), load(to, backend="cuda", cache_type="f32")


def every_kind(b: Bench, kinds: Sequence[str], count: int) -> None:
    """A model whose matrices are of one kind after the other against the reference; many sessions, and ids chosen."""
    b.tidy()
    shape = SHAPE
    config = config_of(shape, "sinks", count // 4)
    bound, tokenizer = weights(config, shape.tied, [Kind[kind] for kind in kinds]), from_metadata({}, shape.vocab)
    ids = np.random.default_rng(5).integers(0, shape.vocab, count)
    reference, model = (Model(config, bound, tokenizer, on) for on in (eager.Backend(), b.backend))
    want = reference.session().feed(ids, all_logits=True)
    for how, lengths, limit in (("one by one", [1] * (count - 1), FLOATS), ("at once", [], HALVES)):
        close(
            b,
            f"kinds of weights, {how}",
            {" ".join(kinds): apart(feed(model.session(), ids, lengths), want)},
            limit,
        )

    sessions = [model.session() for _ in range(3 if b.cupy is None else 70)]
    for i, session in enumerate(sessions):
        session.feed(np.resize(ids, 1 + i))
    tokens, forks = np.resize(ids, len(sessions)), [session.fork() for session in sessions]
    together = model.step_many(sessions, tokens)
    alone = np.stack([fork.feed(token) for fork, token in zip(forks, tokens, strict=True)])
    chosen = model.step_many(sessions, tokens, GREEDY)
    wrong = sum(int(c) != int(s.logits.argmax()) for c, s in zip(chosen, sessions, strict=True))
    first = int(forks[0].fork().feed(1).argmax())
    wrong += stepping(forks[0])() != first
    close(b, "sessions together against alone", {"logits": apart(together, alone)}, HALVES)
    close(b, "ids chosen on the device that are not the likeliest", {"of many and of one": float(wrong)}, 0)
