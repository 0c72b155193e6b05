"""The text that a GPU's compiler gets: the words of a pass, the operators' sources, and which of them a plan uses."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tcinfer.kernels.cpu import plan as words

HEADERS = ("common.h", "kinds.h", "staging.h", "stream.h")
SOURCES = (
    "rows.cu",
    "linear.cu",
    "linear_many.cu",
    "ring.cu",
    "attention.cu",
    "attention_many.cu",
    "matrix_memory.cu",
    "matrix_memory_many.cu",
    "tensor_cache.cu",
    "infini.cu",
    "sampling.cu",
)
TOGETHER_THREADS, ALONE_THREADS = 480, 256  # of a block
LOADER_THREADS = 32  # more, of a token's launch (stream.h)
DESK = 1024  # bytes of a block's shared memory in front of an operator's own (common.h)
HAND = 3072  # more, of a token's launch, for what it is told (passes.cu)
RECORD = 48  # words of a step of a token's launch: its operator, what it ends with, its arguments
HOW_MANY = 5  # numbers that say how a row's next id is chosen: temperature, top_k, top_p, min_p, a draw from [0, 1)
# What a row is made into on its way into a product (staging.h).
PLAIN, RMS_NORM, LAYER_NORM, SWIGLU, GELU, MERGED_PARTS = range(6)
PART_END = 4  # floats behind the channels of a part: their weights' sum, the largest score (attention.cu)
NO_WAIT, WAIT_FOR_BLOCK, WAIT_FOR_GRID = range(3)  # what a step ends with (passes.cu)

# Words of a pass beyond those of kernels.cpu.plan. The last one is no argument: blocks count there how many have come.
KEY_HEADS, CHOICES, HOW, ARRIVALS, PASS = range(words.PASS, words.PASS + 5)
SHARED = (
    *(
        "KEY_HEADS",
        "CHOICES",
        "HOW",
        "ARRIVALS",
        "PASS",
        "TOGETHER_THREADS",
        "ALONE_THREADS",
        "LOADER_THREADS",
        "HOW_MANY",
    ),
    *("PLAIN", "RMS_NORM", "LAYER_NORM", "SWIGLU", "GELU", "MERGED_PARTS", "PART_END"),
    *("NO_WAIT", "WAIT_FOR_BLOCK", "WAIT_FOR_GRID", "DESK", "HAND", "RECORD"),
)

# The operators: of both kinds of program, of a token's one launch, of longer passes. Those of weights have a kind each.
OF_BOTH = (
    *("angles", "push", "take", "insert", "keep_last", "scan", "writes", "ones", "unit", "mix"),
    *("divide", "gate", "features", "blend", "prepare", "choose"),
)
OF_ONE, WEIGHTS_OF_ONE, FORMS_OF_ONE = ("combine",), ("embed", "linear_one"), ("attend_rows", "attend_splits")
OF_MANY, WEIGHTS_OF_MANY, FORMS_OF_MANY = ("attend_many", "scan_many"), ("embed", "linear_many"), ("attend_rows",)
FORMS = tuple(f"{ring}{heads}" for ring in ("Half", "Float") for heads in (1, 2, 3, 4, "Any"))  # attention.cu


class Named(NamedTuple):
    """An operator that kernels.cpu does not have. kind: of the weights, or the form, whose template it is."""

    name: str
    kind: str = ""

    @property
    def full(self) -> str:
        return f"{self.name}_{self.kind}" if self.kind else self.name


def operators(together: bool, kinds: Iterable[str]) -> list[Named]:
    """Those of a token's one launch, in the order of their numbers, or those that are launched alone."""
    plain, weights, forms = (
        (OF_ONE, WEIGHTS_OF_ONE, FORMS_OF_ONE) if together else (OF_MANY, WEIGHTS_OF_MANY, FORMS_OF_MANY)
    )
    made = [Named(name, kind) for kind in sorted(kinds) for name in (forms if kind in FORMS else weights)]
    return [Named(name) for name in (*OF_BOTH, *plain)] + made


def constants() -> str:
    """What Python and CUDA must agree on, as an enum."""
    numbers = {name.upper(): number for name, number in words.WORDS.items()}
    numbers |= {name: getattr(words, name) for name in ("SEQUENCE", "FIELDS", "FIRST", "ROW", "COUNT")}
    numbers |= {name: globals()[name] for name in SHARED}
    return f"enum {{ {', '.join(f'{name} = {value}' for name, value in numbers.items())} }};"


def source(together: bool, kinds: Iterable[str]) -> str:
    """CUDA C++ for models of these kinds of weights and forms of attention.

    Its kernel is `together`, or there is a kernel `step_NAME` for each operator.

    In one piece: a compiler's cache that looks at the text alone then notices every change.
    """
    here, made = Path(__file__).parent, operators(together, kinds)
    each = f"#define EACH_{'TOGETHER' if together else 'ALONE'}(X) {' '.join(_entry(o) for o in made)}"
    parts = [(here / "machine.h").read_text(), constants(), each]
    parts += [(here / name).read_text() for name in (*HEADERS, *SOURCES)]
    parts += [
        f"OPERATOR void {o.full}(Words a, Words p, Work work) {{ {o.name}<{o.kind}>(a, p, work); }}"
        for o in made
        if o.kind
    ]
    return "\n".join([*parts, (here / "passes.cu").read_text()])


def _entry(o: Named) -> str:
    """An operator in a list of them, with the blocks of its own launch that share a multiprocessor."""
    return f"X({o.full}, {2 if o.kind in FORMS else 1})"
