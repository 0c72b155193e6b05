"""What every checkpoint family turns into before it is written: a configuration and named tensors."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tcinfer.config import ModelConfig
from tcinfer.errors import FileError

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint, its values still in the file."""

    name: str  # as the checkpoint has it
    shape: tuple[int, ...]
    load: Callable[[], F32]

    def check(self, *shapes: tuple[int, ...]) -> Tensor:
        """Itself, if it has one of these shapes; else FileError."""
        if self.shape not in shapes:
            raise FileError(f"tensor {self.name!r} has shape {list(self.shape)}, the model needs {list(shapes[0])}")
        return self

    def changed(self, shape: tuple[int, ...], change: Callable[[F32], F32]) -> Tensor:
        """What `change` makes of it, of shape `shape`."""
        return Tensor(self.name, shape, lambda: change(self.load()))


@dataclass
class Source:
    """A checkpoint, read far enough to be written."""

    config: ModelConfig
    tensors: dict[str, Tensor]  # by GGUF name, NumPy order
    folder: Path | None  # where a tokenizer may lie
    notes: list[str] = field(default_factory=list)  # what the file holds that inference does not use
    keys: dict[str, Any] = field(default_factory=dict)  # metadata to keep beside what the configuration says
    packed: tuple[str, ...] = ()  # quantised kinds among the tensors


class Names:
    """The tensors of a checkpoint, each taken once: what is left at the end had no use."""

    def __init__(self, have: Mapping[str, Tensor], biases: bool | None = None) -> None:
        """biases: whether every projection and norm that is moved has one (None: each as it is)."""
        self._left = dict(have)
        self.biases = biases
        self.out: dict[str, Tensor] = {}  # by GGUF name
        self.idle: list[str] = []  # known, but switched off by an option

    def maybe(self, name: str) -> Tensor | None:
        return self._left.pop(name, None)

    def take(self, name: str) -> Tensor:
        """Raises FileError if it is not there."""
        tensor = self.maybe(name)
        if tensor is None:
            raise FileError(f"tensor {name!r} is missing")
        return tensor

    def move(self, theirs: str, ours: str) -> None:
        """A weight, and its bias: one that `biases` asks for, or any that is there."""
        self.out[ours + ".weight"] = self.take(theirs + ".weight")
        bias = self.take(theirs + ".bias") if self.biases else self.maybe(theirs + ".bias")
        if bias is not None and self.biases is False:
            raise FileError(f"tensor {bias.name!r} is there, but the model has no biases")
        if bias is not None:
            self.out[ours + ".bias"] = bias

    def head(self, name: str, embedding: Tensor) -> bool:
        """The head, unless it is the embedding itself; whether it is one of its own."""
        head = self.maybe(name)
        own = head is not None and not np.array_equal(head.load(), embedding.load())
        if head is not None and own:
            self.out["output.weight"] = head
        return own

    def drop(self, prefixes: tuple[str, ...]) -> None:
        """Leave out what begins so, and remember it."""
        for name in [n for n in self._left if n.startswith(prefixes)]:
            del self._left[name]
            self.idle.append(name)

    def finish(self) -> None:
        """Raises FileError for a tensor that nothing took."""
        for name in self._left:
            raise FileError(f"tensor {name!r} is not used by a model with these options")


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 200


def shown(value: Any) -> str:
    """A value as an error shows it. Of a hostile file's nested lists `repr` might never come to an end."""
    return _repr.repr(value)


def name_of(folder: Path) -> str:
    """A model's name from its folder's; what is no UTF-8 in it is replaced.

    The hub's cache has models--OWNER--NAME/snapshots/COMMIT: there the name is NAME.
    """
    name, kept = folder.name, folder.parent.parent.name.split("--", 2)
    if folder.parent.name == "snapshots" and len(kept) == 3 and kept[0] == "models":
        name = kept[2]
    return name.encode("utf-8", "replace").decode()


def typed(args: Mapping[str, Any], name: str, default: Any) -> Any:
    """args[name], or the default; FileError if it is not of the default's type (whole numbers serve for floats)."""
    value = args.get(name, default)
    if type(default) is float and type(value) is int and abs(value) < 2**63:
        return float(value)
    if type(value) is not type(default):
        raise FileError(f"argument {name} must be of type {type(default).__name__}, not {shown(value)}")
    return value


def refuse_unknown(args: Iterable[str], known: Iterable[str], where: str) -> None:
    """FileError for an argument that this version does not know: it might change what the model computes."""
    for name in args:
        if name not in known:
            raise FileError(f"argument {shown(name)} in {where} is not known to this version of tcinfer")
