"""Memory mechanisms: what a layer remembers of the tokens before, one mechanism a file.

A mechanism is a module of pure functions over (weights, state); it keeps nothing of its own. It has

    Options                 frozen dataclass of its options, or None; every field has a default and becomes the
                            GGUF key `tcinfer.memory.<field>`
    tensors(config, layer)  the weights that it needs in a layer beside the projections: name -> Spec
    state(config, layer, capacity)
                            the arrays that a layer of one sequence keeps: a tuple of Field
    attend(chunk, w, state, q, k, v, x)
                            takes T tokens in (q [T, H, D], k and v [T, G, D], not rotated; x [T, C] the attention
                            input), gives [T, C] out, output projection included, and moves `state` on by T tokens.
                            Any split of a stream into chunks gives the same answers.

To add one: write the file, name it in MODES.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from tcinfer.memory import infini, local, tensor
from tcinfer.memory.state import Field, Layout, Spec, State

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tcinfer.config import ModelConfig
    from tcinfer.memory.chunk import Chunk

__all__ = ["MODES", "Layout", "Mechanism", "Mode", "State", "layout", "mechanism", "tensors"]


class Mechanism(Protocol):
    """One memory mechanism, all layers alike (a module serves)."""

    Options: Any

    @staticmethod
    def tensors(config: ModelConfig, layer: int) -> dict[str, Spec]: ...
    @staticmethod
    def state(config: ModelConfig, layer: int, capacity: int) -> tuple[Field, ...]: ...
    @staticmethod
    def attend(
        chunk: Chunk, w: dict[str, Any], state: dict[str, NDArray], q: NDArray, k: NDArray, v: NDArray, x: NDArray
    ) -> NDArray: ...


class Mode(NamedTuple):
    """A name that `--memory` takes: the mechanism behind it, and whether a model must be trained for it."""

    mechanism: Any
    needs_weights: bool


MODES = {
    "full": Mode(local, needs_weights=False),
    "window": Mode(local, needs_weights=False),
    "sinks": Mode(local, needs_weights=False),
    "infini": Mode(infini, needs_weights=True),
    "tensor": Mode(tensor, needs_weights=True),
}


def mechanism(config: ModelConfig) -> Mechanism:
    """The mechanism that `config.memory` names."""
    return MODES[config.memory].mechanism


def tensors(config: ModelConfig, layer: int) -> dict[str, Spec]:
    """The weights that a layer's memory needs, its shared first level (key convolution) included."""
    return local.tensors(config, layer) | mechanism(config).tensors(config, layer)


def layout(config: ModelConfig, capacity: int = 0) -> Layout:
    """Where each array of a sequence's state lies; `capacity` tokens where the first level is unbounded."""
    state = mechanism(config).state
    return Layout(tuple(state(config, layer, capacity) for layer in range(config.n_layers)))
