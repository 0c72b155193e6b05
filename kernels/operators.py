"""The table of operators: what a step of a plan can be.

A row names an operator's arguments in the order in which its compiled forms take them, says what is read and written,
and holds the equation in NumPy. An argument is written as

    name          a word: a whole number, or the address of weights, which nobody writes
    name:f        a word that holds the bits of a float64 (kernels take them back by `number`)
    name<         rows that are read          name>  rows that are written, for the next steps
    name<>        rows that are changed       name~  rows that the operator works in by itself
    @name<        (and so on) the number of a field of the state
    %name<        (and so on) no argument, but a buffer that is a word of the pass

and rows may have a shape behind the mark, one row a token: `k<G.D` is [rows, G, D], each a word of the same operator or
a number; `k>G.D/half` has float16 elements where the word `half` is set. From these marks plans know the barriers that
they need (plan.py), and the memory of what is written.

An equation takes the chunk (reference/chunk.py) and then every argument that is no output, by name: rows as float32
arrays [T, *shape], fields as the arrays of the state. It gives what it writes, in order, and changes the rest in place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

ARGUMENT = re.compile(r"([@%]?)(\w+)(:f|<>|<|>|~|)([\w.]*)(?:/(\w+))?$")
Room = Callable[[Mapping[str, int]], int]


@dataclass(frozen=True)
class Argument:
    """One argument of an operator."""

    name: str
    reads: bool = False
    writes: bool = False
    private: bool = False  # rows that only this operator works in
    field: bool = False  # the number of a field of the state
    word: bool = False  # no argument, but a word of the pass
    shape: tuple[str, ...] = ()  # of a row: names of words, or numbers
    number: bool = False  # a float64
    half: str = ""  # the word that says whether elements are float16

    @property
    def output(self) -> bool:
        """Whether the operator makes it: rows that are written and not read."""
        return self.writes and not (self.reads or self.field or self.word or self.private)

    def columns(self, words: Mapping[str, Any]) -> int:
        """Elements of one row."""
        product = 1
        for size in self.shape:
            product *= int(size) if size.isdigit() else int(words[size])
        return product


def _argument(text: str) -> Argument:
    found = ARGUMENT.match(text)
    assert found, text
    kind, name, mark, shape, half = found.groups()
    return Argument(
        name,
        reads="<" in mark,
        writes=">" in mark or mark == "~",
        private=mark == "~",
        field=kind == "@",
        word=kind == "%",
        shape=tuple(shape.split(".")) if shape else (),
        number=mark == ":f",
        half=half or "",
    )


class Operator:
    """A row of the table."""

    def __init__(
        self,
        name: str,
        arguments: str,
        home: str,
        equation: Callable[..., Any] | None = None,
        *,
        by_head: bool = False,
        scratch: Room | None = None,
        work: Room | None = None,
        shared: Callable[[Mapping[str, int], int], int] | None = None,
        launch: str = "all",
        forms: str = "",
        large: bool = False,
        many: Operator | None = None,
        beside: tuple[str, ...] = (),
    ) -> None:
        """home: the module of kernels/cpu and the file of kernels/cuda, or the package of a memory's room, which has
        `compiled.py` and `cuda.cu`; equation: of one that backends share.

        On CPUs: scratch: bytes for each thread, by the arguments; work: multiplications a row, about.

        On a GPU: launch says whether it is part of a token's "one" launch, of those of "many" rows, of "all" or, where
        CPUs alone have it, "none"; forms: whether it has one for each kind of "weights" or of "ring"; by_head: one
        block does what belongs to a row and a key head; shared: bytes of shared memory, by the arguments (and `wide`,
        whether warpgroups multiply) and the warps of a block; large: its blocks fill a multiprocessor; many: another
        form for many rows of a sequence, with the same arguments; beside: operators that it may run beside in a
        token's pass, though they name the same field, because a token's own slot of the ring is none that it reads.
        """
        self.name, self.home, self.equation = name, home, equation
        self.every = tuple(_argument(text) for text in arguments.split())  # words of the pass included
        self.arguments = tuple(a for a in self.every if not a.word)
        self.by_head, self.scratch, self.work, self.shared = by_head, scratch, work, shared
        self.launch, self.forms, self.large, self.many, self.beside = launch, forms, large, many, beside
        names = [a.name for a in self.every]
        assert len(set(names)) == len(names), name

    @cached_property
    def private(self) -> tuple[Argument, ...]:
        return tuple(a for a in self.arguments if a.private)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of the arguments, in order."""
        return tuple(a.name for a in self.arguments)

    def check(self, given: Mapping[str, Any]) -> None:
        """Raise TypeError unless exactly the operator's arguments are given."""
        if given.keys() != set(self.names):
            missing, unknown = set(self.names) - given.keys(), given.keys() - set(self.names)
            raise TypeError(f"operator {self.name}: missing {sorted(missing)}, unknown {sorted(unknown)}")

    def __repr__(self) -> str:
        return f"Operator({self.name})"
