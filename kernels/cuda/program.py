"""The text that a GPU's compiler gets: the words of a pass, the operators' sources, and which of them a plan uses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from tcinfer.kernels import plan as words
from tcinfer.kernels.operators import Operator
from tcinfer.kernels.table import GPU

HEADERS = ("common.h", "panels.h", "kinds.h", "staging.h", "stream.h", "outputs.h")
SOURCES = (
    *("rows.cu", "linear.cu", "linear_few.cu", "linear_tiles.cu", "linear_exact.cu", "linear_wide.cu"),
    *("linear_many.cu", "ring.cu", "attention.cu", "attention_many.cu"),
    *("matrix_memory.cu", "matrix_memory_many.cu", "sampling.cu"),
)
TOGETHER_THREADS, ALONE_THREADS = 512, 256  # of a block
LOADER_THREADS = 32  # more, of a token's launch (stream.h)
DESK = 1024  # bytes of a block's shared memory in front of an operator's own (common.h)
WIDE_CAPABILITY = (9, 0)  # compute capability of GPUs where warpgroups multiply (linear_wide.cu)
HAND = 3072  # more, of a token's launch, for what it is told (passes.cu)
RECORD = 48  # words of a step of a token's launch: its operator, what it ends with, its arguments
HOW_MANY = 5  # numbers that say how a row's next id is chosen: temperature, top_k, top_p, min_p, a draw from [0, 1)
# What a row is made into on its way into a product (staging.h).
PLAIN, RMS_NORM, LAYER_NORM, SWIGLU, GELU, GEGLU, MERGED_PARTS = range(7)
PART_END = 4  # floats behind the channels of a part: their weights' sum, the largest score (attention.cu)
WAIT_FOR_GRID = words.GRID  # what a step ends with (passes.cu)
MOST_MERGED = 4  # parts of a row that a product puts together as it reads them

# Words of a pass beyond those of kernels.plan. The last one is no argument: blocks count there how many have come.
KEY_HEADS, CHOICES, HOW, ARRIVALS, PASS = range(words.PASS, words.PASS + 5)
SHARED = (
    *("KEY_HEADS", "CHOICES", "HOW", "ARRIVALS", "PASS", "TOGETHER_THREADS", "ALONE_THREADS", "LOADER_THREADS"),
    *("HOW_MANY", "PLAIN", "RMS_NORM", "LAYER_NORM", "SWIGLU", "GELU", "GEGLU", "MERGED_PARTS", "PART_END"),
    *("WAIT_FOR_GRID", "MOST_MERGED", "DESK", "HAND", "RECORD"),
)
FORMS = tuple(f"{ring}{heads}" for ring in ("Half", "Float") for heads in (1, 2, 3, 4, "Any"))  # attention.cu


class Form(NamedTuple):
    """An operator as a program has it. kind: of the weights, or the form of attention, whose template it is."""

    operator: Operator
    kind: str = ""

    @property
    def full(self) -> str:
        return f"{self.operator.name}_{self.kind}" if self.kind else self.operator.name


def forms(together: bool, kinds: Iterable[str], rooms: Sequence[Operator]) -> list[Form]:
    """Those of a token's one launch, in the order of their numbers, or those that are launched alone.

    kinds: of weights and forms of attention that a plan uses; rooms: the operators of the memories.
    """
    launch = "one" if together else "many"
    there = [o for o in (*GPU.values(), *rooms) if o.launch in ("all", launch)]
    made = [
        Form(o, kind) for kind in sorted(kinds) for o in there if o.forms == ("ring" if kind in FORMS else "weights")
    ]
    return [Form(o) for o in there if not o.forms] + made


def constants(rooms: Sequence[Operator] = (), wide: bool = False) -> str:
    """What Python and CUDA must agree on, as enums: the words of a pass, and for each operator NAME_at::ARGUMENT.

    wide: whether warpgroups multiply (linear_wide.cu).
    """
    numbers = {name.upper(): number for name, number in words.WORDS.items()}
    numbers |= {name: getattr(words, name) for name in ("SEQUENCE", "FIELDS", "FIRST", "ROW", "COUNT")}
    numbers |= {name: globals()[name] for name in SHARED} | {"WARPGROUPS": int(wide)}
    texts = [f"enum {{ {', '.join(f'{name} = {value}' for name, value in numbers.items())} }};"]
    for operator in {o.name: o for o in (*GPU.values(), *rooms, *(o.many for o in rooms if o.many))}.values():
        texts.append(f"namespace {operator.name}_at {{ enum {{ {', '.join(operator.names)} }}; }}")
    return "\n".join(texts)


def source(together: bool, kinds: Iterable[str], rooms: Sequence[Operator], wide: bool = False) -> str:
    """CUDA C++ for models of these kinds of weights and forms of attention.

    Its kernel is `together`, or there is a kernel `step_NAME` for each operator.

    In one piece: a compiler's cache that looks at the text alone then notices every change.
    """
    here, made = Path(__file__).parent, forms(together, kinds, rooms)
    each = f"#define EACH_{'TOGETHER' if together else 'ALONE'}(X) {' '.join(_entry(form) for form in made)}"
    parts = [(here / "machine.h").read_text(), constants(rooms, wide), each]
    parts += [(here / name).read_text() for name in (*HEADERS, *SOURCES)]
    parts += [resources.files(home).joinpath("cuda.cu").read_text() for home in dict.fromkeys(o.home for o in rooms)]
    how = "OPERATOR" if together else "FUNCTION"  # products of warpgroups are not made in functions that are called
    parts += [
        f"{how} void {form.full}(Words a, Words p, Work work) {{ {form.operator.name}<{form.kind}>(a, p, work); }}"
        for form in made
        if form.kind
    ]
    return "\n".join([*parts, (here / "passes.cu").read_text()])


def _entry(form: Form) -> str:
    """An operator in a list of them, with the blocks of its own launch that share a multiprocessor."""
    return f"X({form.full}, {2 if form.kind in FORMS else 1})"
