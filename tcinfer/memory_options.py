"""What a user asks of a model's memory, in place of its file's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tcinfer.architectures import architecture
from tcinfer.config import DEFAULT_SINKS, DEFAULT_WINDOW, LayerConfig, ModelConfig, check_count
from tcinfer.errors import TcinferError
from tcinfer.memory import MODES, room

FIELDS = ("memory", "window", "sinks", "sink_positions", "options")  # of a layer, that may change


def with_memory(
    config: ModelConfig,
    memory: str | None = None,
    window: int | None = None,
    sinks: int | None = None,
    cache_type: str | None = None,
) -> ModelConfig:
    """`config` with the memory that the user asks for in place of the file's.

    Where some layers see farther back than others, what is asked for is for those that see farthest: the others were
    trained with their own window, and keep it. Raises TcinferError where the weights do not allow it or the options
    contradict each other.
    """
    if memory is not None and (not isinstance(memory, str) or memory not in MODES):
        raise TcinferError(f"memory {memory!r} is not one of {', '.join(MODES)}")
    if memory is not None and MODES[memory].needs_weights and all(memory != layer.memory for layer in config.layers):
        raise TcinferError(
            f"this model has no weights for {memory} memory: its file says {config.memories}; "
            f"any model can run {', '.join(m for m in MODES if not MODES[m].needs_weights)}"
        )
    if window is not None:
        check_count("window", window, 1)
    if sinks is not None:
        check_count("sinks", sinks, 0)
    if cache_type is not None:
        config = replace(config, cache_type=cache_type)
    there = [config.layers[i] for i in config.far]
    another = memory is not None and any(layer.memory != memory for layer in there) and not MODES[memory].needs_weights
    ours = architecture(config.arch).OURS
    mixed = config.farthest is None  # then sinks stand beside a window wherever one is
    asked = [
        _asked(layer, memory if another else None, window, sinks, ours, mixed) if layer in there else layer
        for layer in config.layers
    ]
    changed: dict[str, Any] = {name: tuple(getattr(layer, name) for layer in asked) for name in FIELDS}
    return replace(config, **changed)


def _asked(
    layer: LayerConfig, memory: str | None, window: int | None, sinks: int | None, ours: bool, mixed: bool
) -> LayerConfig:
    """A layer with another memory, window or sinks; None: its own."""
    mode, changed = memory or layer.memory, memory is not None
    if mixed and memory is None and sinks is not None and mode in ("window", "sinks"):
        mode = "sinks" if sinks else "window"
    made = room(mode).Options
    options = layer.options if not changed else made and made()
    if mode == "full":
        if window is not None or sinks is not None:
            raise TcinferError("full memory has no window and no sinks; choose memory 'window' or 'sinks' for them")
        return replace(layer, memory=mode, window=0, sinks=0, options=options)
    if mode == "window" and sinks is not None and not mixed:
        raise TcinferError("memory 'window' has no sinks; choose memory 'sinks' for them")
    positions = layer.sink_positions
    if changed:
        positions = "stored" if ours else "in-cache"
        if sinks is None:
            sinks = DEFAULT_SINKS if mode == "sinks" else 0
        if window is None:
            window = layer.window or DEFAULT_WINDOW
    window, sinks = layer.window if window is None else window, layer.sinks if sinks is None else sinks
    return replace(layer, memory=mode, window=window, sinks=sinks, sink_positions=positions, options=options)
