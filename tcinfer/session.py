"""One sequence: its constant-size state, fed with ids, asked for text, copied and put back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tcinfer import memory
from tcinfer.config import CHUNK, check_count
from tcinfer.errors import TcinferError
from tcinfer.memory.state import State
from tcinfer.sampler import Sampling, sample

if TYPE_CHECKING:
    from tcinfer.model import Model
    from tcinfer.tokenizer import Tokenizer

GROWTH = 256  # tokens: the block by which an unbounded cache grows, at least
DEFAULT_TOKENS = 256  # that `generate` writes

Progress = Callable[[int], None]  # called with the number of tokens just taken in


class Piece(NamedTuple):
    """What one token adds to a text. `text` holds complete characters only, so it may be empty."""

    text: str
    id: int


@dataclass(frozen=True)
class Snapshot:
    """A session's whole state at one moment, and the logits it stood before; opaque."""

    model: Model
    state: State
    logits: NDArray[np.float32] | None

    @property
    def nbytes(self) -> int:
        return self.state.nbytes + (0 if self.logits is None else self.logits.nbytes)


class Session:
    """The state of one sequence, made by `model.session()`. Not for several threads at once; sessions are cheap."""

    def __init__(self, model: Model, state: State | None = None, logits: NDArray[np.float32] | None = None) -> None:
        """Called by `model.session()`, at position 0, and by `fork`, which hands over a copy of its state."""
        self.model = model
        self._state = State(memory.layout(model.config, GROWTH)) if state is None else state
        self._logits = logits  # [V] after the last token, what generate goes on from; never written to
        self._torn = False  # a pass was interrupted half way: some layers have moved on, some have not

    @property
    def position(self) -> int:
        """Tokens taken in so far."""
        return self._state.position

    @property
    def nbytes(self) -> int:
        """Bytes of the state; never changes (but for `full` memory, which grows by design)."""
        return self._state.nbytes

    @property
    def outside_window(self) -> int:
        """Tokens taken in that the exact window (and the sinks) no longer hold."""
        config = self.model.config
        return max(0, self.position - config.window - config.sinks) if config.window else 0

    def feed(self, ids: ArrayLike, all_logits: bool = False, progress: Progress | None = None) -> NDArray[np.float32]:
        """Take ids in; logits float32 [V] after the last, or [len(ids), V] after each.

        ids: one id or a sequence of any length. Raises TcinferError, the state untouched, on an id out of range, on
        nothing, on anything that is not whole numbers, and past the end of learned positions.
        """
        checked = self._check(ids)
        self._make_room(len(checked))
        V = self.model.config.vocab_size
        out = _rows(len(checked), V) if all_logits else None
        for a in range(0, len(checked), CHUNK):
            part = checked[a : a + CHUNK]
            last = a + CHUNK >= len(checked)
            self._torn = True
            # Damaged weights show in the logits, which `sample` checks.
            with np.errstate(all="ignore"):
                logits = self.model.forward(self._state, part, "all" if all_logits else "last" if last else "none")
            self._torn = False
            self._logits = logits[-1].copy() if len(logits) else None  # no view: that would keep every row
            if out is not None:
                out[a : a + len(part)] = logits
            if progress is not None:
                progress(len(part))
        return logits[-1] if out is None else out

    def generate(
        self,
        prompt: str | ArrayLike | None = None,
        max_tokens: int = DEFAULT_TOKENS,
        temperature: float = Sampling.temperature,
        top_k: int = Sampling.top_k,
        top_p: float = Sampling.top_p,
        min_p: float = Sampling.min_p,
        seed: int = Sampling.seed,
        stop: str | Sequence[str] = (),
        progress: Progress | None = None,
    ) -> Iterator[Piece]:
        """Go on from here: feed `prompt` (text, ids, or nothing), then yield a Piece for each new token.

        Text gets the BOS token in front where the file says so and the session is empty. Ends after max_tokens (-1:
        never), at an end-of-text token, or before the first of the `stop` strings, which is not part of the text.
        A token that is yielded has been fed: the session holds all that was shown. Raises TcinferError on bad
        arguments at once, before the first piece is asked for.
        """
        how = Sampling(temperature, top_k, top_p, min_p, seed)
        check_count("max_tokens", max_tokens, -1)
        stops = [stop] if isinstance(stop, str) else list(stop) if isinstance(stop, Iterable) else [stop]
        if not all(isinstance(s, str) and s for s in stops):
            raise TcinferError("stop strings must be texts of at least one character")
        ids = self._prompt_ids(prompt)
        if np.size(ids):
            self._check(ids)
        elif self._logits is None:
            raise TcinferError("there is nothing to go on from: give a prompt")
        return self._generate(ids, max_tokens, how, stops, progress)

    def _prompt_ids(self, prompt: str | ArrayLike | None) -> ArrayLike:
        tokenizer = self.model.tokenizer
        bos = self.position == 0 and tokenizer.add_bos
        if isinstance(prompt, str):
            return tokenizer.encode(prompt, bos=bos)
        if prompt is not None:
            return prompt
        return [tokenizer.bos_id] if bos and tokenizer.bos_id is not None else []

    def _generate(
        self, ids: ArrayLike, max_tokens: int, how: Sampling, stops: list[str], progress: Progress | None
    ) -> Iterator[Piece]:
        rng, text = how.rng(), _Text(stops, self.model.tokenizer)
        if np.size(ids):
            self.feed(ids, progress=progress)
        n = 0
        while n != max_tokens:
            self._check_whole()
            assert self._logits is not None
            chosen = sample(self._logits, how, rng)
            n += 1
            if chosen in self.model.tokenizer.eos_ids:
                if rest := text.flush():
                    yield Piece(rest, chosen)
                return
            self.feed(chosen)
            piece = text.push(chosen)
            if n == max_tokens and not text.stopped:
                piece += text.flush()
            yield Piece(piece, chosen)
            if text.stopped:
                return

    def snapshot(self) -> Snapshot:
        """A copy of the whole state, to be put back by `restore` any number of times."""
        self._check_whole()
        return Snapshot(self.model, self._state.copy(), self._logits)

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of any session of the same model. Raises TcinferError for another model's."""
        if not isinstance(snapshot, Snapshot) or snapshot.model is not self.model:
            raise TcinferError("this is no snapshot of a session of this model, as it was loaded")
        self._state, self._logits, self._torn = snapshot.state.copy(), snapshot.logits, False

    def fork(self) -> Session:
        """Another session with the same past; from here on the two never influence each other."""
        self._check_whole()
        return Session(self.model, self._state.copy(), self._logits)

    def reset(self) -> None:
        """Forget everything: position 0, as new."""
        self._state, self._logits, self._torn = State(memory.layout(self.model.config, GROWTH)), None, False

    def _check_whole(self) -> None:
        if self._torn:
            raise TcinferError(
                "this session was interrupted in the middle of a token and its layers disagree; "
                "restore a snapshot, or reset it"
            )

    def _check(self, ids: ArrayLike) -> NDArray[np.int64]:
        """ids as int64 [n], n >= 1, each in the vocabulary and all within what the model can take."""
        self._check_whole()
        config = self.model.config
        try:
            array = np.atleast_1d(np.asarray(ids))
        except (ValueError, TypeError, OverflowError) as e:
            raise TcinferError(f"ids must be a flat list of whole numbers: {e}") from None
        if array.ndim != 1 or not array.size:
            raise TcinferError("ids must be a flat list of at least one id")
        if array.dtype.kind not in "iu":
            raise TcinferError(f"ids must be whole numbers below {2**63}, not {array.dtype}")
        bad = (array < 0) | (array >= config.vocab_size)
        if bad.any():
            at = int(np.argmax(bad))
            raise TcinferError(f"id {array[at]} at index {at} is outside the vocabulary of {config.vocab_size}")
        if config.learned_positions and self.position + array.size > config.context_length:
            raise TcinferError(
                f"this model has learned positions and ends at token {config.context_length}: "
                f"{self.position} are taken, {array.size} more do not fit"
            )
        return array.astype(np.int64)

    def _make_room(self, count: int) -> None:
        """Full memory alone: grow the cache, by doubling, so that `count` more tokens fit."""
        need, have = self.position + count, self._state.layout.capacity
        if need > have and not self.model.bounded:
            capacity = -(-max(need, 2 * have) // GROWTH) * GROWTH
            self._state = self._state.grown(memory.layout(self.model.config, capacity))


def step_many(model: Model, sessions: Sequence[Session], tokens: ArrayLike) -> NDArray[np.float32]:
    """See Model.step_many."""
    sessions = list(sessions)
    if not all(isinstance(s, Session) and s.model is model for s in sessions):
        raise TcinferError("step_many takes sessions of this model, as it was loaded")
    if len({id(s) for s in sessions}) < len(sessions):
        raise TcinferError("step_many takes each session once: their tokens are independent of each other")
    if np.shape(tokens) != (len(sessions),) or not sessions:
        raise TcinferError(f"step_many takes one token for each of at least one session, not {np.shape(tokens)} tokens")
    ids = np.concatenate([session._check(token) for session, token in zip(sessions, np.asarray(tokens), strict=True)])
    out = _rows(len(sessions), model.config.vocab_size)
    for session in sessions:
        session._make_room(1)
    for a in range(0, len(sessions), CHUNK):
        part = sessions[a : a + CHUNK]
        for session in part:
            session._torn = True
        with np.errstate(all="ignore"):
            out[a : a + len(part)] = model.step([s._state for s in part], ids[a : a + len(part)])
        for session, row in zip(part, out[a : a + len(part)], strict=True):
            session._torn, session._logits = False, row.copy()
    return out


def _rows(count: int, vocab_size: int) -> NDArray[np.float32]:
    try:
        return np.empty((count, vocab_size), np.float32)
    except (MemoryError, ValueError):
        size = 4 * count * vocab_size
        raise TcinferError(f"all logits of {count:,} tokens take {size:,} bytes: feed fewer at once") from None


class _Text:
    """Ids in, text out: complete characters, and nothing that may yet turn out to be part of a stop string."""

    def __init__(self, stops: list[str], tokenizer: Tokenizer) -> None:
        self._stops, self._held = stops, ""
        self._decoder = tokenizer.stream() if tokenizer.vocab_size else None  # a file without one: ids, no text
        self.stopped = False

    def push(self, chosen: int) -> str:
        return self._release(self._decoder.push(chosen)) if self._decoder is not None else ""

    def flush(self) -> str:
        """What was held back, now that the text is over."""
        rest = self._release(self._decoder.flush()) if self._decoder is not None else ""
        rest, self._held = rest + self._held, ""
        return rest

    def _release(self, new: str) -> str:
        text = self._held + new
        ends = [at for at in map(text.find, self._stops) if at >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        keep = max((n for s in self._stops for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]
