"""The whole model as one wiring: embedding, the blocks of its architecture, norm and head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tcinfer.architectures import architecture
from tcinfer.config import ModelConfig
from tcinfer.memory import layout
from tcinfer.net import Dry, Net, Recorder, Spec


def transformer(
    recorder: Recorder,
    config: ModelConfig,
    weights: Callable[[str, Spec], Any],
    shares: dict[int, NDArray[np.float32]] | None = None,
) -> None:
    """Wire the model, its logits last; weights and shares as Net takes them."""
    kind = architecture(config.arch)
    net = Net(recorder, config, weights, layout(config).layers, kind.ROTARY, shares)
    x = kind.embed(net) if hasattr(kind, "embed") else net.embed()
    recorder.hold()
    for i in range(config.n_layers):
        net.enter(i)
        x = kind.block(net, x)
        recorder.reuse()
    net.logits(net.norm(x, "output_norm", kind.NORM, whole=True))


def tensors(config: ModelConfig) -> dict[str, Spec]:
    """Every weight that a model of this configuration has, by its GGUF name."""
    dry = Dry()
    transformer(dry, config, dry.weights)
    return dry.specs
