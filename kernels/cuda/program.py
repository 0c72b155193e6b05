"""The text that a GPU's compiler gets: the words of a pass, the operators' sources, and which of them a plan uses."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tcinfer.kernels.cpu import plan as words

HEADERS = ("common.h", "kinds.h", "staging.h")
SOURCES = (
    "rows.cu",
    "linear.cu",
    "linear_many.cu",
    "ring.cu",
    "attention.cu",
    "attention_many.cu",
    "matrix_memory.cu",
    "tensor_cache.cu",
    "infini.cu",
    "sampling.cu",
)
TOGETHER_THREADS, ALONE_THREADS = 512, 256  # of a block

# Words of a pass beyond those of kernels.cpu.plan. The last one is no argument: blocks count there how many have come.
KEY_HEADS, CHOICES, HOW, ARRIVALS, PASS = range(words.PASS, words.PASS + 5)
SHARED_WORDS = (
    "ROWS IDS SEQUENCE_OF SEQUENCES TABLE OUT_FIRST OUT_ROWS LOGITS SEQUENCE FIELDS FIRST ROW COUNT"
).split()


class Named(NamedTuple):
    """An operator that kernels.cpu does not have. kind: of the weights whose template it is."""

    name: str
    kind: str = ""

    @property
    def full(self) -> str:
        return f"{self.name}_{self.kind}" if self.kind else self.name


def source(together: Iterable[Named], alone: Iterable[Named]) -> str:
    """CUDA C++ with a kernel `together` that runs steps of those operators, and `step_NAME` for each of these.

    In one piece: a compiler's cache that looks at the text alone then notices every change.
    """
    together, alone = sorted(set(together)), sorted(set(alone))
    here = Path(__file__).parent
    numbers = {name: getattr(words, name) for name in SHARED_WORDS}
    numbers |= {"KEY_HEADS": KEY_HEADS, "CHOICES": CHOICES, "HOW": HOW, "ARRIVALS": ARRIVALS}
    lines = [f"enum {{ {', '.join(f'{name} = {value}' for name, value in numbers.items())} }};"]
    lines += [f"#define {name}_THREADS {n}" for name, n in (("TOGETHER", TOGETHER_THREADS), ("ALONE", ALONE_THREADS))]
    for name, operators in (("EACH_TOGETHER", together), ("EACH_ALONE", alone)):
        if operators:
            lines.append(f"#define {name}(X) {' '.join(f'X({o.full})' for o in operators)}")
    parts = [(here / "machine.h").read_text(), "\n".join(lines)]
    parts += [(here / name).read_text() for name in (*HEADERS, *SOURCES)]
    parts += [
        f"OPERATOR void {o.full}(Words a, Words p, Work work) {{ {o.name}<{o.kind}>(a, p, work); }}"
        for o in sorted({*together, *alone})
        if o.kind
    ]
    return "\n".join([*parts, (here / "passes.cu").read_text()])
