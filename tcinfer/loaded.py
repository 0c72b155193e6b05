"""A model's configuration, tokenizer and weights, ready to run passes. It holds no sequence: these share it."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Any

import numpy as np

from tcinfer import memory
from tcinfer.config import ModelConfig
from tcinfer.engine.base import Backend
from tcinfer.kernels.reference.quants import Matrix
from tcinfer.tokenizer import Tokenizer


class Loaded:
    """What a sequence runs on; `tcinfer.Model` is one, with what users ask of it."""

    def __init__(self, config: ModelConfig, weights: dict[str, Any], tokenizer: Tokenizer, backend: Backend) -> None:
        """weights: by the names of transformer.tensors, a Matrix for each projection and a float32 array for the rest.

        Raises TcinferError where the backend lacks what the model needs.
        """
        self.config, self.tokenizer, self.weights, self.backend = config, tokenizer, weights, backend
        self.bounded = memory.bounded(config)  # whether a session's state has one size for ever
        self.engine = backend.engine(config, weights)
        self.chunk = self.engine.chunk  # most tokens that one pass takes
        # threads: of this machine, that run passes together; None where a library or a GPU does
        self.threads, self.bytes_per_token = getattr(backend, "threads", None), self.engine.bytes_per_token

    @cached_property
    def fingerprint(self) -> bytes:
        """32 bytes that tell this model from others: of every tensor its name, kind, shape and eight samples."""
        digest = hashlib.blake2b(self.config.arch.encode(), digest_size=32)
        for name, w in sorted(self.weights.items()):
            data, kind = (
                (w.data, w.kind.name) if isinstance(w, Matrix) else (np.ascontiguousarray(w).view(np.uint8), "")
            )
            flat, strip = data.reshape(-1), 512  # bytes
            digest.update(f"{name} {kind} {data.shape}".encode())
            for at in {i * max(0, flat.size - strip) // 7: None for i in range(8)}:
                digest.update(flat[at : at + strip].tobytes())
        return digest.digest()
