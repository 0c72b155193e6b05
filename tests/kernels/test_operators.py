"""Every operator that has an equation, compiled: what it writes is the equation's, and it writes nothing else.

Each has a row in CASES, which draws its arguments as a mechanism may give them. Rows are random, and so is the state.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import Pass
from test_reference import close

from tcinfer import memory
from tcinfer.kernels import table
from tcinfer.kernels.operators import Operator
from tcinfer.kernels.reference.eager import Eager
from tcinfer.kernels.reference.rotary import frequencies
from tcinfer.memory import infini, tensor_cache

F = np.float32
EVER = 2**62
OPERATORS = [o for o in vars(table).values() if isinstance(o, Operator)]
OPERATORS += itertools.chain(*(getattr(room, "OPERATORS", ()) for room in memory.rooms()))
EQUATIONS = {o.name: o for o in OPERATORS if o.equation is not None}
Given = dict[str, Any]


class Drawn:
    """A pass, and arguments for it: one sequence with T tokens, or T sequences with one each.

    They stand before, at and after the place where a window is full. `fields`: of each sequence.
    """

    def __init__(self, draw: Callable[[Any], Any]) -> None:
        self._draw = draw
        self.rng = np.random.default_rng(draw(st.integers(0, 2**31)))
        self.window = self.one(0, 1, 3, 7)
        self.sinks = self.one(0, 2, 9) if self.window else 0
        self.T, full = self.one(1, 2, 5, 40), self.window + self.sinks
        places = st.sampled_from([0, 1, self.sinks, max(0, full - 1), full, full + 1, full + 5, 60])
        together = draw(st.booleans())
        self.first = draw(places) if together else [draw(places) for _ in range(self.T)]
        self.firsts = [self.first] if together else self.first
        self.fields: list[list[np.ndarray]] = [[] for _ in self.firsts]
        self.half = self.one(False, True)
        self.G, self.R, self.D = self.one(1, 2, 3), self.one(1, 2, 5), self.one(2, 8, 24, 34)
        self.H = self.G * self.R
        self.threads = self.one(1, 3)

    @property
    def positions(self) -> np.ndarray:
        """Of each row."""
        return np.concatenate([np.arange(first, first + self.T // len(self.firsts)) for first in self.firsts])

    def one(self, *choices: Any) -> Any:
        return self._draw(st.sampled_from(choices))

    def maybe(self, value: Any) -> Any:
        return self.one(None, value)

    def array(self, *shape: int) -> np.ndarray:
        return self.rng.normal(size=shape).astype(F)

    def rows(self, *shape: int, half: bool = False) -> np.ndarray:
        return self.array(self.T, *shape).astype(np.float16 if half else F)

    def shares(self, *shape: int) -> np.ndarray:
        """Rows of numbers between 0 and 1, some of them at the ends."""
        return np.clip(self.rng.uniform(-0.2, 1.2, (self.T, *shape)), 0, 1).astype(F)

    def positive(self, *shape: int) -> np.ndarray:
        return np.abs(self.rows(*shape)) + F(0.1)

    def field(self, *shape: int, half: bool = False) -> int:
        """An array of the state; its number."""
        for fields in self.fields:
            fields.append(self.array(*shape).astype(np.float16 if half else F))
        return len(self.fields[0]) - 1

    def ring(self, width: int) -> Given:
        """What `take` and `insert` are told of a per-token array."""
        slots = self.sinks + self.window if self.window else max(self.firsts) + self.T
        at = {"field": self.field(slots, width, half=self.half), "rows": self.rows(width, half=self.half)}
        return {**at, "width": width, "half": self.half, "window": self.window, "sinks": self.sinks}

    def turning(self) -> tuple[int, list[np.ndarray | None]]:
        """How many channels of a head turn, and by what: all of them, some, or none."""
        turned = self.one(self.D, self.D // 4 * 2 or self.D, 0)
        return turned, [self.rows(turned // 2) if turned else None for _ in range(2)]

    def slots(self) -> tuple[int, np.ndarray | None]:
        slots = self.one(1, 2, 5)
        return slots, self.array(self.G, slots, self.D) if slots > 1 else None


def angles(d: Drawn) -> Given:
    pairs = d.one(1, 4, 32)
    bounds = {"most": d.one(EVER, d.window + d.sinks), "offset": -d.one(0, d.window)}
    return {"freq": frequencies(2 * pairs, 10000.0), "pairs": pairs, **bounds, "factor": d.one(1.0, 0.75)}


def push(d: Drawn) -> Given:
    turned, (cos, sin) = d.turning()
    last, taps = d.field(d.G, d.D), d.maybe(d.array(2, d.G, d.D))
    far = [d.rows(turned // 2) if cos is not None and there else None for there in 2 * [d.one(False, True)]]
    skipped: Given = {} if far[0] is not None else {"q_far": None}
    skipped |= d.one({}, {"k_out": None, "v_out": None}) | ({} if taps is not None else d.one({}, {"k_plain": None}))
    rows = {"q": d.rows(d.H, d.D), "k": d.rows(d.G, d.D), "v": d.rows(d.G, d.D), "H": d.H, "G": d.G, "D": d.D}
    how = {"half": d.half, "interleaved": d.one(False, True), "turned": turned, "cos": cos, "sin": sin}
    how |= {"cos_far": far[0], "sin_far": far[1], "taps": taps, "last": last if taps is not None else -1}
    return rows | how | skipped


def take(d: Drawn) -> Given:
    d.window = d.window or 4
    return d.ring(d.one(1, 3, 48))


def scan(d: Drawn) -> Given:
    P, rule = d.one(1, 2, 3), d.one("outer", "delta", "wedge")
    E = d.D if rule == "wedge" else d.one(1, 8, 24)
    k, decay, rate = d.rows(d.G, d.D), 1 - 0.9 * d.shares(P, d.G), d.shares(P, d.G)
    idle = d.rng.uniform(size=rate.shape) < 0.2  # these write nothing
    decay[idle], rate[idle] = 1, 0
    pairs = {"k": k / np.linalg.norm(k, axis=-1, keepdims=True), "v": d.rows(d.G, E), "decay": decay, "rate": rate}
    shape = {"field": d.field(P, d.G, d.D, E), "P": P, "G": d.G, "R": d.R, "D": d.D, "E": E}
    how = {"retrieve": d.shares(d.G) if rule == "delta" else None, "wedge": rule == "wedge"}
    how |= {"mix": d.maybe(d.shares(P, d.G, d.R)), "write_first": d.one(False, True)}
    return shape | pairs | how | {"q": d.rows(d.G, d.R, d.D)}


def writes(d: Drawn) -> Given:
    slots, slot_keys = d.slots()
    timescales, (turned, (cos, sin)) = d.one(1, 2), d.turning()
    terms, given = (d.one(False, True), d.one(False, True)), {}
    for name, there in (("entering", d.one(False, True)), ("leaving", d.window > 0 and d.one(False, True))):
        rows = [d.rows(d.G, d.D), d.rows(d.G, d.D), *(d.rows(d.G) if term else None for term in terms)]
        for x in rows:
            if x is not None and name == "leaving":  # where nothing leaves, anything may lie
                x[d.positions - d.window < d.sinks] = np.nan
        given |= {f"{name}_{n}": x if there else None for n, x in zip(("k", "v", "decay", "rate"), rows, strict=True)}
    given |= {"G": d.G, "D": d.D, "window": d.window, "sinks": d.sinks, "timescales": timescales, "slots": slots}
    given |= {"normalize": d.one(False, True), "value_scale": d.one(1.0, -0.5), "temperature": d.one(1.0, 0.2)}
    given |= {"cos": cos, "sin": sin, "turned": turned or d.D, "interleaved": d.one(False, True)}
    given |= {name: d.array(timescales, d.G) for name in ("decays", "rates")}
    return given | {"slot_keys": slot_keys, "route": d.maybe(d.rows(d.G, d.D)) if slots > 1 else None}


def mix(d: Drawn) -> Given:
    (slots, slot_keys), timescales = d.slots(), d.one(1, 2)
    given = {"q": d.rows(d.G, d.R, d.D), "G": d.G, "R": d.R, "D": d.D, "timescales": timescales, "slots": slots}
    given |= {"topk": d.one(1, 2, slots), "temperature": d.one(1.0, 0.2), "slot_keys": slot_keys}
    return given | {"alpha": d.array(d.G) if timescales == 2 else None}


def features(d: Drawn) -> Given:
    z = d.field(d.G, d.D)
    for fields in d.fields:
        np.abs(fields[z], out=fields[z])
    rows = {"q": d.rows(d.G, d.R, d.D), "k": d.rows(d.G, d.D), "z": z}
    return rows | {"G": d.G, "R": d.R, "D": d.D, "eps": 1e-5, "delta": d.one(False, True)}


def blend(d: Drawn) -> Given:
    rows = {"near": d.rows(d.H, d.D), "far": d.rows(d.H, d.D), "norm": d.positive(d.H)}
    return {**rows, "betas": d.array(d.H), "H": d.H, "D": d.D}


def heads(d: Drawn) -> Given:
    return {"heads": d.H, "width": d.D}


CASES: dict[Operator, Callable[[Drawn], Given]] = {
    table.ANGLES: angles,
    table.ADD: lambda d: {"x": d.rows(d.D), "y": d.rows(d.D), "columns": d.D},
    table.SCALE: lambda d: {"x": d.rows(d.D), "columns": d.D, "factor": d.one(0.3, -2.0)},
    table.SOFTCAP: lambda d: {"columns": d.D, "cap": d.one(0.5, 30.0)},
    table.HEAD_NORM: lambda d: {"x": d.rows(d.H, d.D), **heads(d), "weight": d.array(d.D), "eps": d.one(1e-6, 0.1)},
    table.PUSH: push,
    table.TAKE: take,
    table.INSERT: lambda d: d.ring(d.one(1, 3, 48)),
    table.KEEP_LAST: lambda d: {"field": d.field(d.G, d.D), "x": d.rows(d.G * d.D), "width": d.G * d.D},
    table.SCAN: scan,
    infini.FEATURES: features,
    infini.BLEND: blend,
    tensor_cache.WRITES: writes,
    tensor_cache.UNIT: lambda d: {"x": d.rows(d.H, d.D), **heads(d)},
    tensor_cache.MIX: mix,
    tensor_cache.DIVIDE: lambda d: {"x": d.rows(d.H, d.D), "by": d.rows(d.H), **heads(d), "eps": d.one(1e-3, 1.0)},
    tensor_cache.GATE: lambda d: {"logit": d.maybe(d.rows(1)), "bias": d.array(1)},
}
TOLERANCE = {"scan": 1e-5, "blend": 1e-5, "features": 1e-5}


def executed(operator: Operator, d: Drawn, given: Given, logits: np.ndarray) -> list[np.ndarray]:
    """By its equation, one sequence after another: outputs and changed rows, in the table's order."""
    count = d.T // len(d.firsts)
    found: list[list[np.ndarray]] = []
    for s, (first, fields) in enumerate(zip(d.firsts, d.fields, strict=True)):
        part = slice(count * s, count * s + count)
        own = {a.name: given[a.name] for a in operator.arguments if a.name in given}
        own |= {a.name: own[a.name][part] for a in operator.arguments if is_rows(a, own.get(a.name))}
        chunk = Eager(np.zeros(count, np.int64), first, fields, slice(0, count))
        chunk.logits = logits[part]
        made = chunk.call(operator, **own)
        outputs = iter(made if isinstance(made, tuple) else (made,))
        found.append([next(outputs) if a.output else own[a.name] for a in written(operator, given)])
    return [np.concatenate(parts).reshape(d.T, -1) for parts in zip(*found, strict=True)]


def is_rows(a: Any, value: Any) -> bool:
    return isinstance(value, np.ndarray) and not a.field and (a.reads or a.writes)


def written(operator: Operator, given: Given) -> list[Any]:
    """Those arguments that are rows that the operator makes or changes."""
    changed = [a for a in operator.arguments if a.writes and not (a.field or a.private)]
    return [a for a in changed if given.get(a.name, 0) is not None]


def compiled(operator: Operator, d: Drawn, given: Given, logits: np.ndarray) -> tuple[list[np.ndarray], list]:
    """The same in a plan, and the fields; raises AssertionError where it writes what it does not say."""
    p = Pass(d.T, d.first, d.threads)
    rows = {a.name: p.filled(given[a.name]) for a in operator.arguments if is_rows(a, given.get(a.name))}
    made = p.call(operator, **given | rows)
    outputs = iter(made if isinstance(made, tuple) else (made,))
    results = [next(outputs) if a.output else rows[a.name] for a in written(operator, given)]
    held = [[np.concatenate([x.ravel(), np.full(32, 7, x.dtype)]) for x in fields] for fields in d.fields]
    before = [[x.tobytes() for x in fields] for fields in held]
    read = [rows[a.name] for a in operator.arguments if a.name in rows and not a.writes]
    weights = {name: x.tobytes() for name, x in given.items() if isinstance(x, np.ndarray)}
    kept = [p.array(x).tobytes() for x in read]
    words = {"out_rows": d.T, "logits": logits.ctypes.data}
    got = p.compute(*results, fields=held if held[0] else ((),), **words)
    changed = {given[a.name] for a in operator.arguments if a.field and a.writes}
    for own, old in zip(held, before, strict=True):
        for i, (x, was) in enumerate(zip(own, old, strict=True)):
            assert (x[-32:] == 7).all(), "written behind a field"
            assert i in changed or x.tobytes() == was, "a field changed"
    assert [p.array(x).tobytes() for x in read] == kept, "rows changed that are only read"
    assert {name: given[name].tobytes() for name in weights} == weights, "weights changed"
    return got, [
        [x[:-32].reshape(y.shape) for x, y in zip(a, b, strict=True)] for a, b in zip(held, d.fields, strict=True)
    ]


@pytest.mark.parametrize("name", EQUATIONS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_compiled_form_is_the_equation(name: str, data: st.DataObject) -> None:
    operator, d = EQUATIONS[name], Drawn(data.draw)
    arguments, logits = CASES[operator](d), 3 * d.rows(d.D)
    capped = logits.copy()
    got, fields = compiled(operator, d, arguments, logits)
    want = executed(operator, d, arguments, capped)  # changes rows and fields
    if operator is table.TAKE:  # where nothing leaves, anything may stand
        leaves = d.positions - d.window >= d.sinks
        got, want = ([rows[leaves] for rows in found] for found in (got, want))
    for x, y in zip(got, want, strict=True):
        close(x.astype(F), y.astype(F), 1e-3 if d.half and operator is table.PUSH else TOLERANCE.get(name, 2e-6))
    for own, others in zip(fields, d.fields, strict=True):
        for x, y in zip(own, others, strict=True):
            close(x, y, TOLERANCE.get(name, 0))
    close(logits, capped)


def test_every_operator_with_an_equation_has_a_case() -> None:
    assert set(CASES) == set(EQUATIONS.values())
