"""From a file to a model that runs: configuration, memory-mapped weights, tokenizer, operators."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from tcinfer import tokenizer
from tcinfer.api import Model
from tcinfer.atomic import expanded
from tcinfer.config import ModelConfig
from tcinfer.engine import backend as engine_backend
from tcinfer.engine.base import EMBEDDING, Backend
from tcinfer.errors import FileError, TcinferError
from tcinfer.gguf import reader, schema
from tcinfer.gguf.reader import TensorInfo
from tcinfer.kernels.reference.quants import KINDS, Matrix, unpack
from tcinfer.memory_options import with_memory
from tcinfer.net import Spec
from tcinfer.transformer import QKV, fused, tensors

BUNDLED = "storyteller.gguf"  # in models/


def bundled() -> Path:
    """The model that comes with the package."""
    path = Path(str(resources.files("tcinfer.models"))) / BUNDLED
    if not path.is_file():
        raise TcinferError(f"the bundled model {BUNDLED} is missing from this installation: name a model file")
    return path


def load(
    path: str | PathLike[str] | None = None,
    backend: str = "auto",
    memory: str | None = None,
    window: int | None = None,
    sinks: int | None = None,
    threads: int | None = None,
    cache_type: str | None = None,
    notice: Callable[[str], None] | None = None,
) -> Model:
    """Open a GGUF model; without a path, the bundled one.

    numba and cuda repack the weights into memory of their own, and let the file go; numpy goes on reading the mapped
    file, which must not change while it is used.

    backend: "numpy" (the reference), "numba", "cuda", or "auto"; memory, window, sinks: in place of the file's own
    (a name of the registry in memory/; tokens; tokens beside the window); threads: of the numba backend, one for
    each CPU unless said; cache_type: of the exact keys and values, "f16" (the default) or "f32"; notice: told in
    a line what is going to take longer than usual, such as compiling for this CPU the first time.
    Raises TcinferError for a file that cannot be run exactly, or options that do not go together.
    """
    return Opened(path).model(engine_backend(backend, threads), memory, window, sinks, cache_type, notice)


# The models that are there, by what `reopened` takes: so that unpickled sessions of one model share it.
_open: WeakValueDictionary[tuple[Any, ...], Model] = WeakValueDictionary()


def reopened(path: str, backend: str, *memory: Any) -> Model:
    """The model that was loaded so (memory: with this memory, window, sinks, cache_type), or else loaded again."""
    model = _open.get((path, backend, *memory))
    return model if model is not None and not model.closed else Opened(path).model(engine_backend(backend), *memory)


def _weights(path: Path, config: ModelConfig) -> dict[str, Any]:
    """A file's weights once more."""
    opened = Opened(path)
    with opened.named():
        return bind(config, opened.file.tensors, dropped(opened.config, config))


class Opened:
    """A model file that was opened, its weights not yet touched: `config`, `tokenizer`, `metadata`."""

    def __init__(self, path: str | PathLike[str] | None = None) -> None:
        """Raises TcinferError for a file that is no model of this version; without a path, the bundled one."""
        if path is not None and not isinstance(path, str | PathLike):
            raise TcinferError(f"a model is named by its path, not by {path!r}")
        self.file = reader.read(bundled() if path is None else expanded(path))
        self.path, self.metadata = self.file.path, self.file.metadata
        with self.named():
            self.config = read_config(self.file)
            self.tokenizer = tokenizer.from_metadata(self.metadata, self.config.vocab_size)

    def model(
        self,
        backend: Backend,
        memory: str | None = None,
        window: int | None = None,
        sinks: int | None = None,
        cache_type: str | None = None,
        notice: Callable[[str], None] | None = None,
    ) -> Model:
        """The model, ready to run; the arguments are those of `load`, backend is from tcinfer.engine."""
        asked = with_memory(self.config, memory, window, sinks, cache_type)
        with self.named():
            weights = bind(asked, self.file.tensors, dropped(self.config, asked))
        for line in (backend.remark, backend.cold):
            if notice is not None and line:
                notice(line)
        key = (str(self.path.absolute()), backend.name, memory, window, sinks, cache_type)
        template = self.metadata.get(tokenizer.CHAT_TEMPLATE)
        more: dict[str, Any] = {"again": (reopened, key), "file": partial(_weights, self.path, asked)}
        more["chat_template"] = template if isinstance(template, str) else None
        _open[key] = model = Model(asked, weights, self.tokenizer, backend, **more)
        return model

    @contextmanager
    def named(self) -> Iterator[None]:
        """Errors within begin with the file's path."""
        try:
            yield
        except TcinferError as e:
            raise FileError(f"{self.path}: {e}") from e


def read_config(file: reader.GGUFFile) -> ModelConfig:
    """What a file says of its model. Raises TcinferError."""
    embedding = file.tensors.get(EMBEDDING)
    schema.architecture(file.metadata)
    if embedding is None or len(embedding.shape) != 2:
        raise FileError(f"no matrix {EMBEDDING!r}: this file holds no weights to run (a vocabulary?)")
    return schema.from_metadata(file.metadata, embedding.shape[0], len(file.tensors))


def _apart(config: ModelConfig, specs: Mapping[str, Spec], stored: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors by the names of `specs`, those that the file has fused taken apart; nothing is copied."""
    out = dict(stored)
    for whole, parts in fused(config, specs, QKV).items():
        tensor = stored.get(whole)
        counts = [specs[part].shape[0] for part in parts]
        if tensor is None or tensor.shape[0] != sum(counts):
            continue  # not there, or not fused: what is missing is told by name
        del out[whole]
        vector, first = len(tensor.shape) == 1, 0
        data = tensor.data.reshape(tensor.shape[0], -1)
        for part, count in zip(parts, counts, strict=True):
            rows = data[first : first + count]
            shape = (count, *tensor.shape[1:])
            out[part] = TensorInfo(part, tensor.kind, shape, rows.reshape(1, -1) if vector else rows)
            first += count
    return out


def dropped(file: ModelConfig, asked: ModelConfig) -> set[str]:
    """Tensors of the file's own memory that the memory asked for does not use."""
    return set(tensors(file)) - set(tensors(asked))


def bind(config: ModelConfig, stored: Mapping[str, TensorInfo], without: Iterable[str] = ()) -> dict[str, Any]:
    """The weights by name, as Model takes them: a Matrix for each projection, float32 for the rest.

    Raises FileError for a tensor that is missing, of a wrong shape, of a kind that this version cannot unpack, or
    that no part of the model uses.
    """
    specs = tensors(config)
    stored = _apart(config, specs, stored)
    for name in stored:
        if name not in specs and name not in without:
            raise FileError(f"tensor {name!r} has no place in a {config.arch} model of this version")
    weights: dict[str, Any] = {}
    for name, spec in specs.items():
        tensor = stored.get(name)
        if tensor is None:
            if spec.required:
                raise FileError(f"tensor {name!r} is missing")
            continue
        if tuple(tensor.shape) != spec.shape:
            raise FileError(f"tensor {name!r} has shape {list(tensor.shape)}, the model needs {list(spec.shape)}")
        if tensor.kind not in KINDS:
            known = ", ".join(kind.name for kind in KINDS)
            raise FileError(f"tensor {name!r} is {tensor.kind.name}; this version unpacks {known}")
        if spec.matrix:
            weights[name] = Matrix(tensor.data, tensor.kind, (spec.shape[0], spec.shape[1]))
        else:
            values = np.array(unpack(tensor.data, tensor.kind).reshape(spec.shape))  # none of the file's own bytes
            if not np.isfinite(values).all():
                raise FileError(f"tensor {name!r} holds NaN or Inf")
            weights[name] = values
    return weights
