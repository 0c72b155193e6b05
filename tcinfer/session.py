"""One sequence: its constant-size state, fed with ids, asked for text, copied, put back and kept as a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tcinfer import memory
from tcinfer.engine.base import Here, How, Logits
from tcinfer.errors import TcinferError
from tcinfer.memory.state import AnyState

if TYPE_CHECKING:
    from tcinfer.constraint import Constraint
    from tcinfer.generation import Piece
    from tcinfer.model import Model
    from tcinfer.sampler import Draws, Sampling

GROWTH = 256  # tokens: the block by which an unbounded cache grows, at least
RECENT = 4096  # ids that a session remembers by themselves, for penalties and for half-finished characters
DEFAULT_TOKENS = 256  # that `generate` writes

Progress = Callable[[int], None]  # called with the number of tokens just taken in


@dataclass(frozen=True)
class Snapshot:
    """A session's whole state at one moment, and the logits it stood before; opaque."""

    model: Model
    state: AnyState
    logits: NDArray[np.float32] | None
    ring: NDArray[np.int32]
    draws: Draws | None

    @property
    def nbytes(self) -> int:
        return self.state.nbytes + self.ring.nbytes + (0 if self.logits is None else self.logits.nbytes)


class Session:
    """The state of one sequence, made by `model.session()`. Not for several threads at once; sessions are cheap."""

    draws: Draws | None  # what sampling keeps between tokens; made by the first `generate`
    _logits: Logits | None  # never written to: snapshots share it
    _ahead: tuple[Sampling, float, int] | None  # how the engine chose the next id already, with which draw; the id

    def __init__(self, model: Model, past: Snapshot | None = None) -> None:
        """Called by `model.session()`, at position 0, and by `fork` and `load_session` with a past to go on from."""
        self.model = model
        if past is None:
            self.reset()
        else:
            self.restore(past)

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
        layer = self.model.config.widest
        return max(0, self.position - layer.window - layer.sinks) if layer.window else 0

    @property
    def whole(self) -> bool:
        """False once a token was interrupted half way: only `restore` and `reset` help then."""
        return not self._torn

    @property
    def logits(self) -> NDArray[np.float32] | None:
        """float32 [V] after the last token, what `generate` goes on from; read only. None before the first."""
        return None if self._logits is None else self._logits.fetch()

    @property
    def recent(self) -> NDArray[np.int32]:
        """The last ids, oldest first: at most RECENT of them."""
        at = self.position % RECENT
        return self._ring[:at] if self.position < RECENT else np.concatenate([self._ring[at:], self._ring[:at]])

    def feed(self, ids: ArrayLike, all_logits: bool = False, progress: Progress | None = None) -> NDArray[np.float32]:
        """Take ids in; logits float32 [V] after the last, or [len(ids), V] after each.

        ids: one id or a sequence of any length. Raises TcinferError, the state untouched, on an id out of range, on
        nothing, on anything that is not whole numbers, and past the end of learned positions.
        """
        checked = self._check(ids)
        self._make_room(len(checked))
        self.model.engine.room(min(len(checked), self.model.chunk) if all_logits else 1)
        V = self.model.config.vocab_size
        out = _rows(len(checked), V) if all_logits else None
        for a in range(0, len(checked), self.model.chunk):
            part = checked[a : a + self.model.chunk]
            self._begin()
            # Damaged weights show in the logits, which `sample` checks.
            with np.errstate(all="ignore"):
                logits = self.model.engine.run([self._state], [len(part)], part, len(part) if all_logits else 1)
            self._taken(part, Here(logits[-1].copy()))  # no view: that would keep every row
            if out is not None:
                out[a : a + len(part)] = logits
            if progress is not None:
                progress(len(part))
        return logits[-1] if out is None else out

    def generate(
        self,
        prompt: str | ArrayLike | None = None,
        max_tokens: int = DEFAULT_TOKENS,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        banned: str | Sequence[str] = (),
        constraint: Constraint | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> Iterator[Piece]:
        """Go on from here: feed `prompt` (text, ids, or nothing), then yield a Piece for each new token.

        Text gets the BOS token in front where the file says so and the session is empty. Ends after max_tokens (-1:
        never), at an end-of-text token or one of `stop_ids`, none of which is fed, or before the first of the `stop`
        strings, which is not part of the text.
        `banned` strings never come up in the text. How tokens are chosen: `sampling`, or its fields one by one
        (temperature=0, top_k=1, seed=7 ...); seed -1 goes on with the session's own random numbers, which its
        snapshots, forks and files carry. constraint: a grammar or JSON schema that the text must follow. A token
        that is yielded has been fed: the session holds all that was shown. Raises TcinferError on bad arguments at
        once, before the first piece is asked for.
        """
        from tcinfer.generation import Generation

        ends = (stop, stop_ids, banned)
        return Generation(self, prompt, max_tokens, sampling, options, *ends, constraint).pieces(progress)

    def snapshot(self) -> Snapshot:
        """A copy of the whole state, to be put back by `restore` any number of times."""
        self._check_whole()
        return Snapshot(
            self.model, self.model.engine.placed(self._state), self.logits, self._ring.copy(), _copy(self.draws)
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of any session of the same model. Raises TcinferError for another model's."""
        if not isinstance(snapshot, Snapshot) or snapshot.model is not self.model:
            raise TcinferError("this is no snapshot of a session of this model, as it was loaded")
        self._state, self._torn = self.model.engine.placed(snapshot.state), False
        self._logits = None if snapshot.logits is None else Here(snapshot.logits)
        self._ring, self.draws, self._ahead = snapshot.ring.copy(), _copy(snapshot.draws), None

    def fork(self) -> Session:
        """Another session with the same past; from here on the two never influence each other."""
        self._check_whole()
        return Session(self.model, Snapshot(self.model, self._state, self.logits, self._ring, self.draws))  # it copies

    def reset(self) -> None:
        """Forget everything: position 0, as new."""
        self._state = self.model.engine.new_state(memory.layout(self.model.config, GROWTH))
        self._logits = None
        self._ring = np.zeros(RECENT, np.int32)  # the id at position p in p mod RECENT
        self._torn = False  # a pass was interrupted half way: some layers have moved on, some have not
        self.draws = self._ahead = None

    def save(self, path: str | PathLike[str]) -> int:
        """Write the session to a file, in one step, and give its bytes: the same number however long the session is.

        `model.load_session` goes on from it, to the bit (session_file.py has the layout). Raises TcinferError, the
        file at `path` as it was, where it cannot be written.
        """
        from tcinfer import session_file

        return session_file.write(self.snapshot(), path)

    def _advance(self, token: int, how: Sampling | None = None) -> None:
        """As `feed` with one token, its logits left where they are until they are asked for.

        how: the next id will be chosen in this way (`_chosen_ahead`); some engines do it in the same pass.
        """
        ids, engine = self._check(token), self.model.engine
        self._make_room(1)
        engine.room(1)
        hows, draw = None, 0.0
        if how is not None and engine.chooses(how):
            assert self.draws is not None
            draw = self.draws.peek() if how.temperature else 0.0
            hows = [How(how, draw)]
        self._begin()
        with np.errstate(all="ignore"):
            (logits,), chosen = engine.step([self._state], ids, hows)
        self._taken(ids, logits)
        if how is not None and chosen is not None:
            self._ahead = how, draw, int(chosen[0])

    def _chosen_ahead(self, how: Sampling) -> int | None:
        """The next id, if it was chosen when the last one was fed, just as `sample` would now; takes its draw."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0] != how or self.draws is None:
            return None
        if how.temperature and not self.draws.take(ahead[1]):
            return None
        return None if ahead[2] < 0 else ahead[2]  # below 0: not finite, which `sample` reports

    def _begin(self) -> None:
        """A pass is about to change the state."""
        self._torn, self._logits, self._ahead = True, None, None

    def _taken(self, ids: NDArray[np.int64], logits: Logits) -> None:
        """A pass has taken ids in (and has moved the position on)."""
        if len(ids) == 1:
            self._ring[(self.position - 1) % RECENT] = ids[0]
        else:
            self._ring[np.arange(self.position - len(ids), self.position) % RECENT] = ids
        self._logits, self._torn = logits, False

    def _check_whole(self) -> None:
        if self._torn:
            raise TcinferError(
                "this session was interrupted in the middle of a token and its layers disagree; "
                "restore a snapshot, or reset it"
            )

    def _check(self, ids: ArrayLike) -> NDArray[np.int64]:
        """ids as int64 [n], n >= 1, each in the vocabulary and all within what the model can take."""
        array = self._check_ids(ids)
        self._check_fits(array.size)
        return array

    def _check_fits(self, count: int) -> None:
        """That so many tokens more can be taken in."""
        self._check_whole()
        config = self.model.config
        if config.learned_positions and self.position + count > config.context_length:
            raise TcinferError(
                f"this model has learned positions and ends at token {config.context_length}: "
                f"{self.position} are taken, {count} more do not fit"
            )

    def _check_ids(self, ids: ArrayLike) -> NDArray[np.int64]:
        """ids as int64 [n], n >= 1, each in the vocabulary."""
        vocab_size = self.model.config.vocab_size
        try:
            array = np.atleast_1d(np.asarray(ids))
        except (ValueError, TypeError, OverflowError) as e:
            raise TcinferError(f"ids must be a flat list of whole numbers: {e}") from None
        if array.ndim != 1 or not array.size:
            raise TcinferError("ids must be a flat list of at least one id")
        if array.dtype.kind not in "iu":
            raise TcinferError(f"ids must be whole numbers below {2**63}, not {array.dtype}")
        bad = (array < 0) | (array >= vocab_size)
        if bad.any():
            at = int(np.argmax(bad))
            raise TcinferError(f"id {array[at]} at index {at} is outside the vocabulary of {vocab_size}")
        return array.astype(np.int64)

    def _make_room(self, count: int) -> None:
        """Full memory alone: grow the cache, by doubling, so that `count` more tokens fit."""
        need, have = self.position + count, self._state.layout.capacity
        if need > have and not self.model.bounded:
            self._state = self._state.resized(memory.layout(self.model.config, rounded_up(max(need, 2 * have))))


def rounded_up(tokens: int) -> int:
    """The room that an unbounded cache takes for so many tokens."""
    return max(1, -(-tokens // GROWTH)) * GROWTH


def _copy(draws: Draws | None) -> Draws | None:
    return None if draws is None else draws.copy()


def step_many(model: Model, sessions: Sequence[Session], tokens: ArrayLike, sampling: Sampling | None) -> NDArray:
    """See Model.step_many."""
    from tcinfer.sampler import NOT_FINITE, breaker_ids, sample

    sessions, breaks = list(sessions), None
    if not all(isinstance(s, Session) and s.model is model for s in sessions):
        raise TcinferError("step_many takes sessions of this model, as it was loaded")
    if len({id(s) for s in sessions}) < len(sessions):
        raise TcinferError("step_many takes each session once: their tokens are independent of each other")
    if not sessions:
        raise TcinferError("step_many takes at least one session")
    ids = sessions[0]._check_ids(tokens)
    if len(ids) != len(sessions):
        raise TcinferError(f"step_many takes one token for each session, not {len(ids)} for {len(sessions)}")
    if sampling is not None and sampling.logit_bias:
        sessions[0]._check_ids([token for token, _ in sampling.logit_bias])
    if sampling is not None and sampling.dry_multiplier:
        breaks = breaker_ids(model.tokenizer, sampling.dry_sequence_breakers, model.config.vocab_size)
    for session in sessions:
        session._check_fits(1)
    engine = model.engine
    chooses = sampling is not None and engine.chooses(sampling)
    engine.room(len(sessions) if chooses else min(len(sessions), model.chunk))
    for session in sessions:
        session._make_room(1)
        if sampling is not None and session.draws is None:
            session.draws = sampling.draws()
    out = np.empty(len(sessions), np.int64) if sampling else _rows(len(sessions), model.config.vocab_size)
    for a in range(0, len(sessions), model.chunk):
        part, theirs, hows = sessions[a : a + model.chunk], ids[a : a + model.chunk], None
        for session in part:
            session._begin()
        if sampling is not None and chooses:
            draws = [s.draws.rng.random() if sampling.temperature else 0.0 for s in part]  # type: ignore[union-attr]
            hows = [How(sampling, draw) for draw in draws]
        with np.errstate(all="ignore"):
            logits, chosen = engine.step([s._state for s in part], theirs, hows, a if chooses else 0)
        for i, (session, row) in enumerate(zip(part, logits, strict=True)):
            session._taken(theirs[i : i + 1], row)
        if chosen is not None and chosen.min() < 0:
            raise TcinferError(NOT_FINITE)
        for i, (session, row) in enumerate(zip(part, logits, strict=True)):
            if sampling is None:
                out[a + i] = row.fetch()
            elif chosen is not None:
                out[a + i] = chosen[i]
            else:
                assert session.draws is not None
                out[a + i] = sample(row.fetch(), sampling, session.draws, session.recent, None, breaks)
    return out


def _rows(count: int, vocab_size: int) -> NDArray[np.float32]:
    try:
        return np.empty((count, vocab_size), np.float32)
    except (MemoryError, ValueError):
        size = 4 * count * vocab_size
        raise TcinferError(f"all logits of {count:,} tokens take {size:,} bytes: feed fewer at once") from None
