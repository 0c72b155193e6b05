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
    from tcinfer.api import Model, Session, Text
    from tcinfer.generation import Piece, Request
    from tcinfer.loader import load
    from tcinfer.sampling import Sampling
    from tcinfer.sequence import Snapshot

__version__ = "0.1.0"
_HOMES = {
    "Model": "api",
    "Piece": "generation",
    "Request": "generation",
    "Sampling": "sampling",
    "Session": "api",
    "Snapshot": "sequence",
    "Text": "api",
    "load": "loader",
}
__all__ = [
    "Model",
    "Piece",
    "Request",
    "Sampling",
    "Session",
    "Snapshot",
    "TcinferError",
    "Text",
    "__version__",
    "load",
]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    """Import the parts when they are first asked for: `import tcinfer` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'tcinfer' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"tcinfer.{_HOMES[name]}"), name)
