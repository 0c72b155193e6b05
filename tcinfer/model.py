"""A model ready to run: configuration, tokenizer and weights. It holds no sequence state, so sessions share it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tcinfer import memory
from tcinfer.config import ModelConfig
from tcinfer.engine.base import Backend
from tcinfer.kernels.reference.quants import Matrix
from tcinfer.sampling import Sampling
from tcinfer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tcinfer.session import Session

F32 = NDArray[np.float32]


class Model:
    """A model ready to run: `config`, `tokenizer`, and weights that any number of sessions share."""

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

    def session(self) -> Session:
        """A new sequence at position 0. Raises TcinferError if its state does not fit this machine."""
        from tcinfer.session import Session  # for the reader's comfort alone: a model knows nothing of its sessions

        return Session(self)

    def load_session(self, path: str | PathLike[str]) -> Session:
        """Go on from a file that `session.save` wrote: the same logits, to the bit (on the same backend).

        Raises TcinferError for a file that is damaged, of another model, of other memory options, or of a newer
        version.
        """
        from tcinfer import session_file

        return session_file.attach(self, session_file.read(path))

    def step_many(
        self, sessions: Sequence[Session], tokens: ArrayLike, sampling: Sampling | None = None
    ) -> NDArray[Any]:
        """Feed one token to each of many sessions, sharing each pass over the weights; logits [len(sessions), V].

        With `sampling`, the ids that come next instead, int64 [len(sessions)], each drawn by its session's own random
        numbers: on a GPU the logits then need not leave it.
        The same as feeding each by itself (bit for bit on CPUs), and much faster: reading the weights is most of the
        cost of a token. Raises TcinferError, all sessions untouched, for a token out of range or a session that is not
        this model's or is named twice.
        """
        from tcinfer.session import step_many

        return step_many(self, sessions, tokens, sampling)
