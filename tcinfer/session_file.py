"""A session as a file: one fixed layout, as many bytes after ten million tokens as after one. Little-endian.

| bytes | holds |
|---|---|
| 8 | magic `TCSESSN` and a zero |
| 4, 4 | version (u32), bytes of the description (u32) |
| 32 | the model's fingerprint (`Model.fingerprint`) |
| 8, 8 | position; tokens that the state has room for (0 but for `full` memory) |
| 8 | flags: 1 logits are there, 2 random numbers are there |
| 7 x 8 | the random generator and mirostat's mu (`Draws.words`) |
| ... | the description: the configuration that the model ran with, JSON in a canonical form |
| ... | the state: one buffer (`memory/state.py`), the same for every backend |
| 4 x 4096 | the last ids (int32), the one at position p in place p mod 4096: penalties and half-finished characters |
| 4 x vocabulary | the logits after the last token (float32) |
| 32 | BLAKE2b-256 of all that precedes |

Nothing of a file is believed before its length, checksum, description and numbers have been checked; never pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tcinfer import memory
from tcinfer.architectures import architecture
from tcinfer.atomic import Writer, expanded, identity, replacing
from tcinfer.config import LAYERED, ModelConfig
from tcinfer.errors import FileError, TcinferError
from tcinfer.gguf import schema
from tcinfer.gguf.reader import file_error, map_file
from tcinfer.memory.state import State
from tcinfer.sampling.choose import Draws
from tcinfer.sequence import RECENT, Snapshot, rounded_up

if TYPE_CHECKING:
    from tcinfer.loaded import Loaded

MAGIC = b"TCSESSN\0"
VERSION = 1
DRAW_WORDS = 7  # of Draws
HEADER = struct.Struct(f"<8sII32sqqQ{DRAW_WORDS}Q")
DIGEST = 32
LONGEST_DESCRIPTION = 2**16
MOST_LAYERS = 4096
MOST_TOKENS = 2**53  # up to which float64 counts, and angles of rotation are computed from it
HAS_LOGITS, HAS_DRAWS = 1, 2
# What `--memory` and its fellows change: a session goes on in a model that was loaded with the same.
ADDED = ("rope_attention", "rope_original", "attention_scale", "softcap")  # fields that files of before do not have
MEMORY_FIELDS = ("memory", "window", "sinks", "sink_positions", "key_conv", "cache_type", "options")


@dataclass(frozen=True)
class SessionFile:
    """What a file holds, checked but for its fit to a model."""

    path: Path
    nbytes: int
    config: ModelConfig  # that the model ran with
    fingerprint: bytes
    state: State
    ring: NDArray[np.int32]  # [RECENT]
    logits: NDArray[np.float32] | None  # [V]
    draws: Draws | None
    version: tuple[int, ...] | None = None  # of the file (atomic.identity)

    @property
    def position(self) -> int:
        return self.state.position

    def memory_options(self, model: ModelConfig) -> dict[str, Any]:
        """The arguments of `tcinfer.load` with which a model of this configuration, its file's, goes on from here.

        Raises FileError for a session of another model.
        """
        config = self.config
        _check_model(self, model)
        layers = [config.layers[i] for i in model.far]
        memory = layers[0].memory if len({layer.memory for layer in layers}) == 1 else None  # None: as the file has it
        sinks = max(layer.sinks for layer in layers)
        return {
            "memory": memory,
            "window": layers[0].window or None,
            "sinks": sinks if sinks or memory not in (None, "full", "window") else None,
            "cache_type": config.cache_type,
        }


def parts(snapshot: Snapshot) -> Iterator[memoryview]:
    """A session's snapshot in the layout above, piece by piece. Raises TcinferError for one that is damaged."""
    config, state, model = snapshot.model.config, snapshot.state.on_host(), snapshot.model
    try:
        _check_finite(state, snapshot.logits)
    except TcinferError as e:
        raise TcinferError(f"the session {e}: it is damaged, and was not saved") from None
    if not model.bounded:
        state = state.resized(memory.layout(config, rounded_up(state.position)))
    draws, logits = snapshot.draws, snapshot.logits
    description = _described(config)
    flags = HAS_LOGITS * (logits is not None) + HAS_DRAWS * (draws is not None)
    words = draws.words() if draws is not None else (0,) * DRAW_WORDS
    room = 0 if model.bounded else state.layout.capacity
    header = HEADER.pack(MAGIC, VERSION, len(description), model.fingerprint, state.position, room, flags, *words)
    last = np.zeros(config.vocab_size, np.float32) if logits is None else logits
    digest = hashlib.blake2b(digest_size=DIGEST)
    pieces: tuple[Any, ...] = (header, description, state.buffer, snapshot.ring, np.ascontiguousarray(last))
    for piece in pieces:
        view = memoryview(piece).cast("B")
        digest.update(view)
        yield view
    yield memoryview(digest.digest())


def write(snapshot: Snapshot, path: str | os.PathLike[str], private: bool = False, writer: Writer | None = None) -> int:
    """Write a session's snapshot; returns the file's bytes. private: for its owner's eyes alone; writer: who holds the
    file."""
    pieces = parts(snapshot)
    first = next(pieces)  # what is damaged shows before the file is touched
    with replacing(expanded(path), private, writer) as temporary, open(temporary, "wb") as out:
        return sum(out.write(piece) for piece in (first, *pieces))


def read(path: str | os.PathLike[str]) -> SessionFile:
    """Read a session file, all but its fit to a model checked. Raises FileError."""
    path = expanded(path)
    version = identity(path)
    return replace(unpack(memoryview(map_file(path)), path), version=version)


def unpack(data: memoryview | bytes, path: Path = Path("<bytes>")) -> SessionFile:
    """The same of its bytes; path: what errors name."""
    try:
        return _parsed(path, memoryview(data))
    except TcinferError as e:
        raise file_error(path, str(e)) from None


def fitting(file: SessionFile, model: Loaded) -> Snapshot:
    """What a file holds, to go on from. Raises FileError where it is not of this model, as it was loaded."""
    _check_fit(file, model)
    return Snapshot(model, file.state, file.logits, file.ring, file.draws)


def arrays(state: State) -> Iterator[tuple[int, str, NDArray]]:
    """Every array of a state: its layer, its name, itself."""
    for i, layer in enumerate(state.layers):
        for name, array in layer.items():
            yield i, name, array


def _parsed(path: Path, data: memoryview) -> SessionFile:
    fail = TcinferError
    if bytes(data[: len(MAGIC)]) != MAGIC:
        raise fail("is no session file")
    if len(data) < HEADER.size + DIGEST:
        raise fail("is cut off: the session was not written to its end")
    _, version, described, fingerprint, position, capacity, flags, *words = HEADER.unpack_from(data)
    if version != VERSION:
        raise fail(f"is version {version} of the session format; this tcinfer reads {VERSION}: update it")
    if hashlib.blake2b(data[:-DIGEST], digest_size=DIGEST).digest() != bytes(data[-DIGEST:]):
        raise fail("is damaged or cut off: its checksum does not fit")
    # From here on what is wrong was made wrong.
    if described > min(LONGEST_DESCRIPTION, len(data)):
        raise fail(f"says that its description has {described} bytes")
    config = _config(bytes(data[HEADER.size : HEADER.size + described]), len(data))
    if not 0 <= position <= MOST_TOKENS or capacity < 0 or flags > HAS_LOGITS + HAS_DRAWS:
        raise fail("holds a position, a size or flags that cannot be")
    bounded = memory.bounded(config)
    if capacity != (0 if bounded else rounded_up(position)) or capacity > len(data):
        raise fail(f"has room for {capacity} tokens at position {position}")
    layout = memory.layout(config, capacity)
    sizes = (HEADER.size + described, layout.nbytes, 4 * RECENT, 4 * config.vocab_size, DIGEST)
    if sum(sizes) != len(data):
        raise fail(f"has {len(data):,} bytes where its description makes {sum(sizes):,}")
    at = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    state = State(layout)
    state.buffer[:] = data[at[1] : at[2]]
    ring = np.frombuffer(data[at[2] : at[3]], "<i4").copy()
    logits = np.frombuffer(data[at[3] : at[4]], "<f4").copy()
    if state.position != position:
        raise fail(f"is at position {position} in its header, but at {state.position} in its state")
    if ring.min() < 0 or ring.max() >= config.vocab_size:
        raise fail(f"holds an id outside the vocabulary of {config.vocab_size}")
    _check_finite(state, logits)
    if bool(flags & HAS_LOGITS) != (position > 0):
        raise fail("has logits without a token, or a token without logits")
    draws = Draws.from_words(words) if flags & HAS_DRAWS else None
    return SessionFile(path, len(data), config, fingerprint, state, ring, logits if position else None, draws)


def _check_finite(state: State, logits: NDArray[np.float32] | None) -> None:
    for layer, name, array in arrays(state):
        if not np.isfinite(array).all():
            raise TcinferError(f"holds NaN or Inf in {name} of layer {layer}")
    if logits is not None and not np.isfinite(logits).all():
        raise TcinferError("holds NaN or Inf in its logits")


def _described(config: ModelConfig) -> bytes:
    """A configuration in its one canonical form."""
    return json.dumps(asdict(config), sort_keys=True, separators=(",", ":")).encode()


def _config(description: bytes, nbytes: int) -> ModelConfig:
    """The configuration described, in a file of so many bytes. Raises TcinferError where it is none."""
    try:
        values = json.loads(description)
        known = {f.name: f for f in fields(ModelConfig)}
        if not isinstance(values, dict) or not set(known) - set(ADDED) <= set(values) <= set(known):
            raise TcinferError("its description is that of another version, or of no model")
        architecture(str(values["arch"]))
        values = {name: tuple(value) if type(value) is list else value for name, value in values.items()}
        for name, value in values.items():
            kinds = {"s": (str,), "i": (int,), "f": (int, float)}.get(str(known[name].type)[0])  # of `options` none
            several = value if name in LAYERED and type(value) is tuple else (value,)
            if kinds is not None and any(type(one) not in kinds for one in several):
                raise TcinferError(f"{name} in its description is {value!r}"[:200])
        config = ModelConfig(**_with_options(values))
        # A layout is a list of layers: bound it before it is made.
        if config.n_layers > MOST_LAYERS or config.vocab_size * 4 > nbytes:
            raise TcinferError("its description is of a larger session than the file holds")
        for layer in dict.fromkeys(config.layers):
            memory.mechanism(layer)
    except (ValueError, TypeError, RecursionError, OverflowError, MemoryError) as e:
        raise TcinferError(f"its description is no model's configuration: {e}") from None
    return config


def _with_options(values: dict[str, Any]) -> dict[str, Any]:
    """The mechanisms' options made of what describes them. Raises TypeError for what does not."""
    modes, options = values["memory"], values["options"]
    top_key = getattr(memory.room(modes), "TOP_KEY", "") if isinstance(modes, str) else ""
    if top_key and isinstance(options, Mapping) and top_key in options:  # before layers could differ
        top = options[top_key]
        options = {name: value for name, value in options.items() if name != top_key}
        modes = schema.top_layers(modes, top, values["n_layers"], values["window"], values["sinks"])

    def made(mode: Any, given: Any) -> Any:
        of = memory.room(mode).Options
        return of(**given) if of is not None and isinstance(given, Mapping) else None if of is None else given

    if type(modes) is tuple or type(options) is tuple:
        count = len(modes if type(modes) is tuple else options)
        modes, options = (x if type(x) is tuple else (x,) * count for x in (modes, options))
        options = tuple(made(mode, given) for mode, given in zip(modes, options, strict=True))
    else:
        options = made(modes, options)
    return values | {"memory": modes, "options": options}


def _check_model(file: SessionFile, ours: ModelConfig) -> None:
    theirs = file.config
    shape = [f.name for f in fields(ModelConfig) if f.name not in (*MEMORY_FIELDS, "name")]
    different = [name for name in shape if getattr(ours, name) != getattr(theirs, name)]
    if different:
        name = different[0]
        raise FileError(
            f"{file.path}: is of another model ({_named(theirs)}): its {name} is {getattr(theirs, name)!r}, "
            f"this model's {getattr(ours, name)!r}; name its own with -m"
        )


def _named(config: ModelConfig) -> str:
    return f"{config.arch}, {config.name!r}" if config.name else f"{config.arch}, without a name"


def _check_fit(file: SessionFile, model: Loaded) -> None:
    ours, theirs = model.config, file.config
    _check_model(file, ours)
    for name in MEMORY_FIELDS:
        if getattr(ours, name) != getattr(theirs, name):
            raise FileError(
                f"{file.path}: was made with {name} {getattr(theirs, name)!r}, and this model runs with "
                f"{getattr(ours, name)!r}: load the model as it was then"
            )
    if file.fingerprint != model.fingerprint:
        raise FileError(
            f"{file.path}: is of another model of the same shape ({_named(theirs)}): its weights differ; "
            "name its own with -m"
        )
