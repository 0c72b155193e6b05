"""The transformer: ids and a sequence's state in, logits out. It holds no sequence state, so sessions share it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tcinfer import memory
from tcinfer.config import CHUNK, ModelConfig
from tcinfer.errors import TcinferError
from tcinfer.kernels.errors import UnavailableError
from tcinfer.kernels.reference import Reference
from tcinfer.kernels.reference.quants import Matrix
from tcinfer.kernels.reference.rotary import frequencies
from tcinfer.memory.chunk import Chunk
from tcinfer.memory.state import AnyState, DeviceState, Layout, Spec, State
from tcinfer.sampling import Sampling, on_device
from tcinfer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tcinfer.device_engine import DeviceEngine, Later
    from tcinfer.engine import Engine
    from tcinfer.session import Session

F32 = NDArray[np.float32]


def tensors(config: ModelConfig) -> dict[str, Spec]:
    """Every weight that a model of this configuration has, by its GGUF name."""
    C, F, D = config.d_model, config.d_ff, config.head_dim
    block = config.block

    def norm(name: str) -> dict[str, Spec]:
        bias = {f"{name}.bias": Spec((C,), required=False)} if block.norm == "layer" else {}
        return {f"{name}.weight": Spec((C,)), **bias}

    def projection(name: str, out: int, into: int) -> dict[str, Spec]:
        return {
            f"{name}.weight": Spec((out, into), matrix=True),
            f"{name}.bias": Spec((out,), required=False),
        }

    specs = {"token_embd.weight": Spec((config.vocab_size, C), matrix=True)}
    if config.learned_positions:
        specs["position_embd.weight"] = Spec((config.context_length, C))
    else:
        specs["rope_freqs.weight"] = Spec((D // 2,), required=False)
    for i in range(config.n_layers):
        layer = norm("attn_norm") | norm("ffn_norm")
        layer |= projection("attn_q", config.n_heads * D, C) | projection("attn_output", C, config.n_heads * D)
        layer |= projection("attn_k", config.n_kv_heads * D, C) | projection("attn_v", config.n_kv_heads * D, C)
        layer |= projection("ffn_up", F, C) | projection("ffn_down", C, F)
        if block.mlp == "swiglu":
            layer |= projection("ffn_gate", F, C)
        layer |= memory.tensors(config, i)
        specs |= {f"blk.{i}.{name}": spec for name, spec in layer.items()}
    # a head of its own; without one it is the embedding
    return specs | norm("output_norm") | {"output.weight": Spec((config.vocab_size, C), required=False, matrix=True)}


class Model:
    """A model ready to run: `config`, `tokenizer`, and weights that any number of sessions share."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Any], tokenizer: Tokenizer, ops: Reference) -> None:
        """weights: by the names of `tensors`, a Matrix for each projection and a float32 array for the rest."""
        self.config, self.tokenizer, self.ops, self.weights = config, tokenizer, ops, weights
        self._embedding: Matrix = weights["token_embd.weight"]
        self._head: Matrix = weights.get("output.weight", self._embedding)
        self._positions: F32 | None = weights.get("position_embd.weight")
        self._final = {k: v for k, v in weights.items() if k.startswith("output_norm.")}
        self._layers: list[dict[str, Any]] = [{} for _ in range(config.n_layers)]
        for name, value in weights.items():
            if name.startswith("blk."):
                _, i, rest = name.split(".", 2)
                self._layers[int(i)][rest] = value
        self._freq: NDArray[np.float64] | None = None
        if not config.learned_positions:
            self._freq = frequencies(
                config.head_dim,
                config.rope_base,
                config.rope_scaling,
                config.rope_factor,
                weights.get("rope_freqs.weight"),
            )
        self._attend = memory.mechanism(config).attend
        self._engine: Engine | DeviceEngine | None = None
        if ops.device is not None:
            from tcinfer.device_engine import DeviceEngine

            with _enough():
                self._engine = DeviceEngine(config, weights, self._freq, ops.device)
        elif ops.plans:
            from tcinfer.engine import Engine

            self._engine = Engine(config, weights, self._freq, ops.threads)
        self.chunk = CHUNK if self._engine is None else self._engine.chunk  # most tokens that one pass takes
        self.bounded = memory.bounded(config)  # whether a session's state has one size for ever

    @property
    def bytes_per_token(self) -> int | None:
        """Bytes of the matrices that each token is multiplied with, as the file holds them; None on numpy."""
        return self._engine.bytes_per_token if self._engine is not None else None

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

        return session_file.load(self, path)

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

    def chooses(self, how: Sampling) -> bool:
        """Whether `choose` can: the model runs on a GPU, and this way of sampling is one that it has there."""
        return self.ops.device is not None and on_device(how, self.config.vocab_size)

    def choose(
        self, states: Sequence[AnyState], ids: NDArray[np.int64], hows: Sequence[tuple[Sampling, float]], first: int = 0
    ) -> tuple[list[Later], NDArray[np.int64]]:
        """As `step`, and choose what comes next on the GPU; hows: for each state how, and a draw from [0, 1).

        Returns the logits, still there (as rows `first` and following: there must be room), and the ids, int64
        [len(states)]; -1 where the logits are not finite.
        """
        engine: Any = self._engine
        rows = np.array([(h.temperature, h.top_k or len(self._embedding.data), h.top_p, h.min_p, u) for h, u in hows])
        return engine.choose(states, ids, rows, first)

    def new_state(self, layout: Layout) -> AnyState:
        """All zeros, where the model runs. Raises TcinferError where there is not so much memory."""
        return State(layout) if self.ops.device is None else DeviceState(layout, self.ops.device)

    def adopted(self, state: AnyState) -> AnyState:
        """A copy of a state, where the model runs. Raises TcinferError as `new_state` does."""
        if self.ops.device is None or not isinstance(state, State):
            return state.copy()
        return DeviceState.placed(state, self.ops.device)

    def make_room(self, rows: int) -> None:
        """For the logits of so many rows of a pass. Raises TcinferError where a GPU has not so much memory."""
        if self.ops.device is not None:
            with _enough():
                self._engine.make_room(rows)  # type: ignore[union-attr]

    def step(self, states: Sequence[AnyState], ids: NDArray[np.int64]) -> F32:
        """One token for each of at most `chunk` states; logits [len(states), V]."""
        if self._engine is not None:
            return self._engine.run(states, [1] * len(states), ids, len(states))
        return np.concatenate([self.forward(state, ids[i : i + 1]) for i, state in enumerate(states)])

    def forward(
        self, state: AnyState, ids: NDArray[np.int64], logits: str = "last", shares: dict[int, F32] | None = None
    ) -> F32:
        """Take ids [T] in, moving `state` on by T tokens; logits of the "last" token [1, V], of "all" [T, V], or
        "none" [0, V].  shares: if given, is told for each layer with a memory its share [T] in what the layer adds;
        such a pass runs by the reference, whatever the backend."""
        if self._engine is not None and shares is None:
            return self._engine.run([state], [len(ids)], ids, {"last": 1, "all": len(ids), "none": 0}[logits])
        config, ops = self.config, self.ops
        first, T = state.position, len(ids)
        chunk = Chunk(ops, config, self._freq, first, T)
        chunk.shares = shares
        x = self._embedding.rows(ids)  # [T, C]
        if self._positions is not None:
            x = x + self._positions[first : first + T]
        for chunk.layer, (w, layer_state) in enumerate(zip(self._layers, state.layers, strict=True)):
            h = self._norm(x, w, "attn_norm")
            q = chunk.linear(h, w, "attn_q").reshape(T, config.n_heads, config.head_dim)
            k = chunk.linear(h, w, "attn_k").reshape(T, config.n_kv_heads, config.head_dim)
            v = chunk.linear(h, w, "attn_v").reshape(T, config.n_kv_heads, config.head_dim)
            x = x + self._attend(chunk, w, layer_state, q, k, v, h)
            h = self._norm(x, w, "ffn_norm")
            up = chunk.linear(h, w, "ffn_up")  # [T, F]
            h = ops.gelu(up) if config.block.mlp == "gelu" else ops.swiglu(chunk.linear(h, w, "ffn_gate"), up)
            x = x + chunk.linear(h, w, "ffn_down")
        state.position = first + T
        x = x[{"last": slice(T - 1, T), "all": slice(T), "none": slice(0)}[logits]]
        if not len(x):
            return np.empty((0, config.vocab_size), np.float32)
        return ops.linear(self._norm(x, self._final, "output_norm"), self._head)

    def _norm(self, x: F32, w: Mapping[str, Any], name: str) -> F32:
        if self.config.block.norm == "rms":
            return self.ops.rms_norm(x, w[name + ".weight"], self.config.norm_eps)
        return self.ops.layer_norm(x, w[name + ".weight"], w.get(name + ".bias"), self.config.norm_eps)


@contextmanager
def _enough() -> Iterator[None]:
    """What a device lacks is the user's to know."""
    try:
        yield
    except UnavailableError as e:
        raise TcinferError(str(e)) from None
