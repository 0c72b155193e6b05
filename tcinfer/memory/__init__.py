"""Memory mechanisms: what a layer remembers of the tokens before, one mechanism a file.

A mechanism is a module of pure functions over (weights, state); it keeps nothing of its own. It has

    Options                 frozen dataclass of its options, or None; every field has a default and becomes the
                            GGUF key `tcinfer.memory.<field>`
    MATRICES                names of the fields of the state that are its second level, [.., D, D] each
    tensors(config, layer)  the weights that it needs in a layer beside the projections: name -> Spec
    state(config, layer, capacity)
                            the arrays that a layer of one sequence keeps: a tuple of Field
    attend(chunk, w, state, q, k, v, x)
                            takes T tokens in (q [T, H, D], k and v [T, G, D], not rotated; x [T, C] the attention
                            input), gives [T, C] out, output projection included, and moves `state` on by T tokens.
                            Any split of a stream into chunks gives the same answers.
    plan(layer, q, k, v, h)
                            the same as steps of a plan, for the numba backend (layer: memory/layer.py): rows in,
                            and the output added to layer.x

To add one: write the file, name it in MODES.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from tcinfer.config import DEFAULT_SINKS, DEFAULT_WINDOW, ModelConfig, check_count
from tcinfer.errors import TcinferError
from tcinfer.memory import infini, local, tensor
from tcinfer.memory.state import ALIGNMENT, Field, Layout, Spec, State

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tcinfer.kernels.cpu.plan import Rows
    from tcinfer.memory.chunk import Chunk
    from tcinfer.memory.layer import Layer

__all__ = ["MODES", "Layout", "Mechanism", "Mode", "State", "bounded", "layout", "mechanism", "tensors", "with_memory"]


class Mechanism(Protocol):
    """One memory mechanism, all layers alike (a module serves)."""

    Options: Any
    MATRICES: tuple[str, ...]

    @staticmethod
    def tensors(config: ModelConfig, layer: int) -> dict[str, Spec]: ...
    @staticmethod
    def state(config: ModelConfig, layer: int, capacity: int) -> tuple[Field, ...]: ...
    @staticmethod
    def attend(
        chunk: Chunk, w: dict[str, Any], state: dict[str, NDArray], q: NDArray, k: NDArray, v: NDArray, x: NDArray
    ) -> NDArray: ...
    @staticmethod
    def plan(layer: Layer, q: Rows, k: Rows, v: Rows, h: Rows) -> None: ...


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
    """The mechanism that `config.memory` names. Raises TcinferError for a name or options that it cannot be."""
    if config.memory not in MODES:
        raise TcinferError(f"memory {config.memory!r} is not one of {', '.join(MODES)}")
    found = MODES[config.memory].mechanism
    if type(config.options) is not (found.Options or type(None)):
        raise TcinferError(f"{config.memory} memory cannot have the options {config.options!r}")
    return found


def tensors(config: ModelConfig, layer: int) -> dict[str, Spec]:
    """The weights that a layer's memory needs, its shared first level (key convolution) included."""
    return local.tensors(config, layer) | mechanism(config).tensors(config, layer)


def layout(config: ModelConfig, capacity: int = 0) -> Layout:
    """Where each array of a sequence's state lies; `capacity` tokens where the first level is unbounded."""
    state = mechanism(config).state
    return Layout(tuple(state(config, layer, capacity) for layer in range(config.n_layers)), capacity)


def bounded(config: ModelConfig) -> bool:
    """Whether the state has one size for ever."""
    return layout(config, 1).nbytes == layout(config, 1 + ALIGNMENT).nbytes


def with_memory(
    config: ModelConfig,
    memory: str | None = None,
    window: int | None = None,
    sinks: int | None = None,
    cache_type: str | None = None,
) -> ModelConfig:
    """`config` with the memory that the user asks for in place of the file's.

    Raises TcinferError where the weights do not allow it or the options contradict each other.
    """
    mode = config.memory if memory is None else memory
    if not isinstance(mode, str) or mode not in MODES:
        raise TcinferError(f"memory {mode!r} is not one of {', '.join(MODES)}")
    changed = mode != config.memory
    if cache_type is not None:
        config = replace(config, cache_type=cache_type)
    if changed and MODES[mode].needs_weights:
        raise TcinferError(
            f"this model has no weights for {mode} memory: its file says {config.memory}; "
            f"any model can run {', '.join(m for m in MODES if not MODES[m].needs_weights)}"
        )
    options = config.options
    if changed:
        options = MODES[mode].mechanism.Options and MODES[mode].mechanism.Options()
    if mode == "full":
        if window is not None or sinks is not None:
            raise TcinferError("full memory has no window and no sinks; choose memory 'window' or 'sinks' for them")
        return replace(config, memory=mode, window=0, sinks=0, options=options)
    if mode == "window" and sinks is not None:
        raise TcinferError("memory 'window' has no sinks; choose memory 'sinks' for them")
    if window is not None:
        check_count("window", window, 1)
    if sinks is not None:
        check_count("sinks", sinks, 0)
    positions = config.sink_positions
    if changed:
        positions = "stored" if config.block.ours else "in-cache"
        if sinks is None:
            sinks = DEFAULT_SINKS if mode == "sinks" else 0
        if window is None:
            window = config.window or DEFAULT_WINDOW
    return replace(
        config,
        memory=mode,
        window=config.window if window is None else window,
        sinks=config.sinks if sinks is None else sinks,
        sink_positions=positions,
        options=options,
    )
