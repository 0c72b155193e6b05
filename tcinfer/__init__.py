"""tcinfer runs Tensor Cache transformers, and plain Llama-family models, in memory that does not grow.

import tcinfer
model = tcinfer.load("model.gguf")
for piece in model.session().generate("Once"):
    print(piece.text, end="")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tcinfer.errors import TcinferError

if TYPE_CHECKING:
    from tcinfer.generation import Piece
    from tcinfer.loader import load
    from tcinfer.model import Model
    from tcinfer.sampler import Sampling
    from tcinfer.session import Session, Snapshot

__version__ = "0.1.0"
__all__ = ["Model", "Piece", "Sampling", "Session", "Snapshot", "TcinferError", "__version__", "load"]

_HOMES = {
    "Model": "model",
    "Piece": "generation",
    "Sampling": "sampler",
    "Session": "session",
    "Snapshot": "session",
    "load": "loader",
}


def __getattr__(name: str) -> Any:
    """Import the parts when they are first asked for: `import tcinfer` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'tcinfer' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"tcinfer.{_HOMES[name]}"), name)
