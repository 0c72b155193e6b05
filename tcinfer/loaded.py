"""A model's configuration, tokenizer and weights, ready to run passes. It holds no sequence: these share it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from tcinfer import memory
from tcinfer.config import ModelConfig
from tcinfer.engine.base import Backend
from tcinfer.errors import FileError, TcinferError
from tcinfer.kernels.reference.quants import Matrix
from tcinfer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tcinfer.chat.template import ChatTemplate


CLOSED = "this model was closed: load it again"


class Loaded:
    """What a sequence runs on; `tcinfer.Model` is one, with what users ask of it."""

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, Any],
        tokenizer: Tokenizer,
        backend: Backend,
        file: Callable[[], dict[str, Any]] | None = None,
        chat_template: str | None = None,
    ) -> None:
        """weights: by the names of transformer.tensors, a Matrix for each projection and a float32 array for the rest;
        file: gives them again. Where the engine has copied them, the file that they are mapped from is then let go.

        Raises TcinferError where the backend lacks what the model needs.
        """
        self.config, self.tokenizer, self.backend, self._file = config, tokenizer, backend, file
        self.chat_template = chat_template  # Jinja, as the file has it
        self.bounded = memory.bounded(config)  # whether a session's state has one size for ever
        self.engine = backend.engine(config, weights)
        self.pass_tokens = self.engine.pass_tokens  # most tokens that one pass takes
        # threads: of this machine, that run passes together; None where a library or a GPU does
        self.threads, self.bytes_per_token = getattr(backend, "threads", None), self.engine.bytes_per_token
        self.vectors = {name: w for name, w in weights.items() if not isinstance(w, Matrix)}  # norms, gates ...
        self._weights: dict[str, Any] | None = weights
        self.closed = False
        if file is not None and backend.copies:
            self.fingerprint  # noqa: B018  while they are there
            self._weights = None

    @property
    def weights(self) -> dict[str, Any]:
        """All of them, read again where they were let go. Raises FileError for a file that has changed since."""
        if self._weights is not None:
            return self._weights
        if self._file is None:
            raise TcinferError(CLOSED)
        weights = self._file()
        if fingerprint(self.config, weights) != self.fingerprint:
            raise FileError("the model's file has changed since it was loaded: load it again")
        return weights

    @cached_property
    def fingerprint(self) -> bytes:
        """32 bytes that tell this model from others."""
        return fingerprint(self.config, self.weights)

    @cached_property
    def template(self) -> ChatTemplate:
        """What stands around the turns of a conversation: the file's chat template, or ChatML where it has none.

        Raises TcinferError for one that is broken.
        """
        from tcinfer.chat.template import ChatTemplate

        tokenizer, eos = self.tokenizer, min(self.tokenizer.eos_ids, default=None)
        return ChatTemplate(self.chat_template, tokenizer.control_text(tokenizer.bos_id), tokenizer.control_text(eos))

    def close(self) -> None:
        """Give its memory back: nothing of it runs any more."""
        self._weights, self._file, self.vectors, self.engine = None, None, {}, _Closed()
        self.closed = True


class _Closed:
    """In place of a closed model's engine."""

    def __getattr__(self, name: str) -> Any:
        raise TcinferError(CLOSED)


def fingerprint(config: ModelConfig, weights: dict[str, Any]) -> bytes:
    """32 bytes of every weight's name, kind, shape and eight samples."""
    digest = hashlib.blake2b(config.arch.encode(), digest_size=32)
    for name, w in sorted(weights.items()):
        data, kind = (w.data, w.kind.name) if isinstance(w, Matrix) else (np.ascontiguousarray(w).view(np.uint8), "")
        flat, strip = data.reshape(-1), 512  # bytes
        digest.update(f"{name} {kind} {data.shape}".encode())
        for at in {i * max(0, flat.size - strip) // 7: None for i in range(8)}:
            digest.update(flat[at : at + strip].tobytes())
    return digest.digest()
