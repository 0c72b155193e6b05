"""Plans: what a step may be told, and that barriers stand where steps need them, which run in any order between."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from conftest import build
from plans import Pass, normal
from test_memory import CASES, config_of, weights_of

from tcinfer import memory
from tcinfer.api import Model
from tcinfer.engine.compiled import KERNELS
from tcinfer.kernels import table
from tcinfer.kernels.cpu.jit import OPERATORS as COMPILED
from tcinfer.kernels.cpu.plan import module_of
from tcinfer.kernels.cpu.threads import WAIT, WHEN
from tcinfer.kernels.operators import Operator
from tcinfer.kernels.plan import ALWAYS, FEW, ONE, PROMPT, SESSIONS, Plan, Step, as_word

KINDS = (ONE, FEW, PROMPT, SESSIONS)
ROOMS = [o for room in memory.rooms() for o in getattr(room, "OPERATORS", ())]
OPERATORS = [o for o in vars(table).values() if isinstance(o, Operator)] + ROOMS
OF_CPUS = [o for o in OPERATORS if o.equation is not None or o.launch == "none"]
COUNTS = {ONE: 1, FEW: 3, PROMPT: 40}  # tokens of a pass
IDS = np.random.default_rng(3).integers(0, 50, 60)


# Arguments


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda o: f"{o.name}-{len(o.names)}")
def test_a_step_takes_its_operators_arguments_and_no_others(operator: Operator) -> None:
    given = dict.fromkeys(operator.names, 1)
    words = [as_word(1.0) if a.number else 1 for a in operator.arguments]
    assert Plan(1).step(operator, **given).words() == words
    for name in operator.names:
        with pytest.raises(TypeError, match=rf"{operator.name}: missing \['{name}'\], unknown \[\]"):
            Plan(1).step(operator, **{other: 1 for other in given if other != name})
    with pytest.raises(TypeError, match=r"missing \[\], unknown \['other'\]"):
        Plan(1).step(operator, **given, other=1)


def test_a_call_makes_what_is_not_given_and_checks_what_is() -> None:
    x = {"heads": 2, "width": 8}
    p = Pass(3)
    made = p.call(table.HEAD_NORM, x=p.filled(normal(0, 3, 16)), **x, weight=normal(1, 8), eps=1e-5)
    assert made == ()  # it changes its rows
    with pytest.raises(TypeError, match="x has 15 columns, not 16"):
        p.call(table.HEAD_NORM, x=p.filled(normal(0, 3, 15)), **x, weight=normal(1, 8), eps=1e-5)
    with pytest.raises(TypeError, match="missing \\['eps'\\]"):
        p.call(table.HEAD_NORM, x=p.filled(normal(0, 3, 16)), **x, weight=normal(1, 8))
    ring = {"field": 0, "width": 6, "window": 4, "sinks": 0}
    for half in (False, True):
        rows = p.rows(6, half)
        assert p.call(table.TAKE, **ring, rows=rows, half=half).columns == 6
    assert len(p.steps) == 3


# Barriers


def model_of(name: str) -> Model:
    return build(config_of(name), "numba", weights_of(config_of(name)), threads=1)


def hazards(steps: list[Step], waits: list[bool]) -> list[tuple[int, int]]:
    """Pairs of steps of one kind of pass of which one touches what the other writes, and no barrier between."""
    found = []
    for (i, first), (j, second) in itertools.combinations(enumerate(steps), 2):
        (reads, writes), (reads_too, writes_too) = first.touched(), second.touched()
        if (writes & writes_too or writes & reads_too or reads & writes_too) and not any(waits[i:j]):
            found.append((i, j))
    return found


@pytest.mark.parametrize("name", CASES)
def test_steps_that_share_something_have_a_barrier_between_them_and_every_barrier_is_needed(name: str) -> None:
    steps = model_of(name).engine._plan.steps
    for kind in KINDS:
        those = [step for step in steps if step.when & kind]
        waits = [bool(step.wait & kind) for step in those]
        assert len(those) > sum(waits) > 0
        assert not hazards(those, waits)
        for i in np.flatnonzero(waits):
            assert hazards(those, [*waits[:i], False, *waits[i + 1 :]]), f"{those[i].name} needs none"
    for step in steps:  # nobody waits in a pass that he has no part in
        assert not step.wait & ~step.when & ALWAYS


def answers(model: Model, kind: int, seed: int = 0) -> list[np.ndarray]:
    """Logits and states of sessions before and behind the end of a window, after a pass of a kind."""
    sessions = [model.session() for _ in range(5)]
    ids = np.roll(IDS, seed)
    for session, count in zip(sessions, (20, 0, 1, 6, 9), strict=True):
        for token in ids[:count] if count else ():  # one by one: in an order that is not looked at here
            session.feed(token)
    plan, whole = model.engine._plan, model.engine._plan._finished
    plan._finished = getattr(model, "reordered", whole)
    try:
        if kind == SESSIONS:
            logits = model.step_many(sessions, ids[-5:])
        else:
            sessions = sessions[:2]
            logits = np.concatenate([s.feed(ids[-COUNTS[kind] :], all_logits=True) for s in sessions])
    finally:
        plan._finished = whole
    return [logits, *(s.state.buffer for s in sessions)]


def groups(steps: np.ndarray, kind: int, without: int = -1) -> Iterator[list[np.ndarray]]:
    """The rows of a plan that run in a kind of pass, from barrier to barrier; without: the number of one to forget."""
    group: list[np.ndarray] = []
    seen = 0
    for row in steps[steps[:, WHEN] & kind != 0]:
        group.append(row)
        if row[WAIT] & kind:
            if seen != without:
                yield group
                group = []
            seen += 1
    yield group


def backwards(model: Model, kind: int, without: int = -1) -> None:
    """From now on passes of the kind run each group's steps from the last to the first."""
    steps, pass_ = model.engine._plan._finished
    rows = []
    for group in groups(steps, kind, without):
        turned = [row.copy() for row in reversed(group)]
        for row in turned:
            row[WAIT] = 0
        if turned:
            turned[-1][WAIT] = group[-1][WAIT]
        rows += turned
    model.reordered = np.array(rows), pass_  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", CASES)
def test_between_barriers_any_order_gives_the_same_bits(name: str) -> None:
    """What a step reads that it does not say would be another's, left over from the pass with other tokens before."""
    model = model_of(name)
    for kind in KINDS:
        want = answers(model, kind)
        answers(model, kind, 7)
        assert max(map(len, groups(model.engine._plan._finished[0], kind))) > 1
        backwards(model, kind)
        got = answers(model, kind)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b, f"kind {kind}")
        del model.reordered


@pytest.mark.parametrize("name", ["window", "infini-delta-gqa-key-conv", "tensor-everything"])
def test_across_a_barrier_the_order_matters(name: str) -> None:
    """Or the test above would not notice a barrier that is missing."""
    model = model_of(name)
    for kind in KINDS:
        want, those = answers(model, kind), [step for step in model.engine._plan.steps if step.when & kind]
        behind = [after.operator for step, after in itertools.pairwise(those) if step.wait & kind]
        for barrier, operator in enumerate(behind):
            answers(model, kind, 7)
            backwards(model, kind, barrier)
            got = answers(model, kind)
            same = all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))
            # what leaves a window of 7 was in the ring before, but for long passes
            assert not same or (operator is table.TAKE and kind != PROMPT), (kind, barrier)
            del model.reordered


# What compiled kernels unpack


def kernels() -> dict[str, dict[int, str]]:
    """Of every compiled operator, by its name: which argument it calls what."""
    found = {}
    for module in (*KERNELS, *sorted({module_of(o) for o in ROOMS})):
        tree = ast.parse(Path(str(import_module(module).__file__)).read_text())
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            marks = [d for d in function.decorator_list if "operator" in ast.dump(d)]
            if marks:
                found[_name(function, marks[0])] = dict(_unpacked(function))
    return found


def _name(function: ast.FunctionDef, mark: ast.expr) -> str:
    """Of the operator; without the kind of weights or of the ring that it is of."""
    if isinstance(mark, ast.Call):
        (text,) = (k.value for k in mark.keywords if k.arg == "name")
        assert isinstance(text, ast.JoinedStr)
        return str(text.values[0].value).rstrip("_")  # type: ignore[attr-defined]
    return function.name.lstrip("_")


def _unpacked(function: ast.FunctionDef) -> Iterator[tuple[int, str]]:
    for node in ast.walk(function):
        if not isinstance(node, ast.Assign):
            continue
        targets, values = node.targets[0], node.value
        pairs = zip(targets.elts, values.elts, strict=True) if isinstance(values, ast.Tuple) else [(targets, values)]
        for target, value in pairs:
            for part in ast.walk(value):
                if isinstance(part, ast.Subscript) and isinstance(part.value, ast.Name) and part.value.id == "a":
                    yield part.slice.value, target.id  # type: ignore[attr-defined]


def test_compiled_kernels_unpack_their_arguments_in_the_tables_order() -> None:
    found = kernels()
    assert found.keys() == {o.name for o in OF_CPUS}
    for operator in OF_CPUS:
        assert [found[operator.name].get(i) for i in range(len(operator.names))] == list(operator.names), operator
        assert len(found[operator.name]) == len(operator.names)
        assert any(name == operator.name or name.startswith(f"{operator.name}_") for name in COMPILED), operator
