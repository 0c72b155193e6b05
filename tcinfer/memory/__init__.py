"""Memory mechanisms: what a layer remembers of the tokens before. One room each, and a row in MODES.

A room is a module or, where it has operators of its own, a package. It has

    Options                 frozen dataclass of its options, or None; every field has a default and becomes the
                            GGUF key `tcinfer.memory.<field>`
    MATRICES                names of the fields of the state that are its second level, [.., D, D] each
    OPERATORS               its own, if any: rows as in kernels/table.py, with their equations in `equations.py`, and
                            their compiled forms in `compiled.py` (CPUs) and `cuda.cu` (GPUs)
    check(layer)            raises TcinferError where a layer's sizes are none that it can have
    state(layer, capacity)  the arrays that a layer of one sequence keeps: a tuple of Field
    wire(net, q, k, v, h, into)
                            takes tokens in (q [H · D], k and v [G · D], not rotated; h [C] the attention input), gives
                            [C] out, output projection included, added to `into` if there is one, and moves the state
                            on. Any split of a stream into chunks gives the same answers. The weights that it needs
                            beside the projections are those that it asks the net for.
    PREFIX                  with which the names of its own weights begin, "" where it has none
    LEARNED                 what its weights say, for `inspect`: name -> how people read it
    learned(weights)        those of a layer's weights, where there are any

and, where a model must be trained for it, `checkpoint.py`: how the published trainer names its options and tensors
(converters/trainer_args.py).

To add one: write the room, name it in MODES.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from tcinfer.config import LayerConfig, ModelConfig
from tcinfer.errors import TcinferError
from tcinfer.memory.state import ALIGNMENT, Layout

if TYPE_CHECKING:
    from tcinfer.net import Net, Rows


class Mode(NamedTuple):
    """A name that `--memory` takes: the room behind it, and whether a model must be trained for it."""

    room: str
    needs_weights: bool = False


MODES = {
    "full": Mode("ring"),
    "window": Mode("ring"),
    "sinks": Mode("ring"),
    "infini": Mode("infini", needs_weights=True),
    "tensor": Mode("tensor_cache", needs_weights=True),
}


def room(mode: str) -> Any:
    """The room of a mode. Raises TcinferError for a name that is none."""
    if mode not in MODES:
        raise TcinferError(f"memory {mode!r} is not one of {', '.join(MODES)}")
    return import_module(f"{__name__}.{MODES[mode].room}")


def rooms() -> list[Any]:
    """All rooms, each once."""
    return list({mode.room: room(name) for name, mode in MODES.items()}.values())


def mechanism(layer: LayerConfig) -> Any:
    """The room of the memory that a layer names. Raises TcinferError for a name, options or sizes that it cannot be."""
    found = room(layer.memory)
    if type(layer.options) is not (found.Options or type(None)):
        raise TcinferError(f"{layer.memory} memory cannot have the options {layer.options!r}")
    found.check(layer)
    return found


def remember(net: Net, q: Rows, k: Rows, v: Rows, h: Rows, into: Rows | None = None) -> Rows:
    """Wire the memory of the net's layer; see `wire` above."""
    return mechanism(net.layer).wire(net, q, k, v, h, into)


def layout(config: ModelConfig, capacity: int = 0) -> Layout:
    """Where each array of a sequence's state lies; `capacity` tokens where the first level is unbounded."""
    return Layout(tuple(mechanism(layer).state(layer, capacity) for layer in config.layers), capacity)


def bounded(config: ModelConfig) -> bool:
    """Whether the state has one size for ever."""
    return layout(config, 1).nbytes == layout(config, 1 + ALIGNMENT).nbytes
