"""One sequence: its constant-size state, the ids it took in last, and the logits that it stands at.

Passes are run here, of one sequence or of several. A pass that has begun is finished before Ctrl-C is heeded, and
nobody else can use its sequences meanwhile: afterwards each has taken in what the pass was about, or nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tcinfer import memory
from tcinfer.engine.base import Here, How, Logits
from tcinfer.errors import TcinferError
from tcinfer.interrupts import uninterrupted
from tcinfer.memory.state import AnyState

if TYPE_CHECKING:
    from tcinfer.loaded import Loaded
    from tcinfer.sampling import Sampling
    from tcinfer.sampling.choose import Draws

GROWTH = 256  # tokens: the block by which an unbounded cache grows, at least
RECENT = 4096  # ids that a sequence remembers by themselves, for penalties and for half-finished characters
IN_USE = "this session is being used by another thread: give each thread its own (fork)"
BROKEN = "a pass over this session broke off and its layers disagree: restore a snapshot, or go on from its file"

Progress = Callable[[int], None]  # called with the number of tokens just taken in


@dataclass(frozen=True)
class Snapshot:
    """A sequence's whole state at one moment, and the logits it stood before; opaque."""

    model: Loaded
    state: AnyState
    logits: NDArray[np.float32] | None
    ring: NDArray[np.int32]
    draws: Draws | None

    @property
    def nbytes(self) -> int:
        return self.state.nbytes + self.ring.nbytes + (0 if self.logits is None else self.logits.nbytes)


class Sequence:
    """The state of one sequence, and what moves it on."""

    state: AnyState  # the arrays of all layers; written to by passes alone
    draws: Draws | None  # what sampling keeps between tokens; made by the first text that is asked for
    _logits: Logits | None  # never written to: snapshots share it
    _ahead: tuple[Sampling, float, int] | None  # how the engine chose the next id already, with which draw; the id

    def __init__(self, model: Loaded, past: Snapshot | None = None) -> None:
        """At position 0, or with a past to go on from."""
        self.model, self._user = model, dict[str, int]()  # for what it is used just now, and by which thread
        if past is None:
            self.reset()
        else:
            self.restore(past)

    @property
    def position(self) -> int:
        """Tokens taken in so far."""
        return self.state.position

    @property
    def nbytes(self) -> int:
        """Bytes of the state; never changes (but for `full` memory, which grows by design)."""
        return self.state.nbytes

    @property
    def outside_window(self) -> int:
        """Tokens taken in that the exact window (and the sinks) no longer hold."""
        layer = self.model.config.widest
        return max(0, self.position - layer.window - layer.sinks) if layer.window else 0

    @property
    def whole(self) -> bool:
        """False once a pass broke off in the middle (memory ran out): only `restore` and `reset` help then."""
        return not self._torn

    @property
    def logits(self) -> NDArray[np.float32] | None:
        """float32 [V] after the last token, what a text goes on from; read only. None before the first."""
        return None if self._logits is None else self._logits.fetch()

    @property
    def stands(self) -> bool:
        """Whether there are logits."""
        return self._logits is not None

    @property
    def recent(self) -> NDArray[np.int32]:
        """The last ids, oldest first: at most RECENT of them."""
        at = self.position % RECENT
        return self._ring[:at] if self.position < RECENT else np.concatenate([self._ring[at:], self._ring[:at]])

    def feed(self, ids: ArrayLike, all_logits: bool = False, progress: Progress | None = None) -> NDArray[np.float32]:
        """Take ids in; logits float32 [V] after the last, or [len(ids), V] after each.

        ids: one id or a sequence of any length. Ctrl-C stops between passes, the sequence whole, and its
        KeyboardInterrupt notes how many tokens were taken in. Raises TcinferError, the state untouched, on an id out of
        range, on nothing, on anything that is not whole numbers, and past the end of learned positions.
        """
        with self.held():
            return self._feed(self.check(ids), all_logits, progress)

    def _feed(self, checked: NDArray[np.int64], all_logits: bool, progress: Progress | None) -> NDArray[np.float32]:
        model = self.model
        self.make_room(len(checked))
        model.engine.room(min(len(checked), model.pass_tokens) if all_logits else 1)
        out = rows_of_logits(len(checked), model.config.vocab_size) if all_logits else None
        start = self.position
        try:
            for a in range(0, len(checked), model.pass_tokens):
                part = checked[a : a + model.pass_tokens]
                logits = run([self], [part], len(part) if all_logits else 1)
                if out is not None:
                    out[a : a + len(part)] = logits
                if progress is not None:
                    progress(len(part))
        except KeyboardInterrupt as e:
            e.add_note(f"{self.position - start:,} of {len(checked):,} tokens were taken in")
            raise
        return logits[-1] if out is None else out

    def snapshot(self) -> Snapshot:
        """A copy of the whole state, to be put back by `restore` any number of times."""
        with self.used():
            past = self._past()
            ring, draws = past.ring.copy(), _copy(past.draws)
            return Snapshot(self.model, self.model.engine.placed(past.state), past.logits, ring, draws)

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of any sequence of the same model. Raises TcinferError for another model's."""
        if not isinstance(snapshot, Snapshot) or snapshot.model is not self.model:
            raise TcinferError("this is no snapshot of a session of this model, as it was loaded")
        with self.used():
            self.state, self._torn = self.model.engine.placed(snapshot.state), False
            self._logits = None if snapshot.logits is None else Here(snapshot.logits)
            self._ring, self.draws, self._ahead = snapshot.ring.copy(), _copy(snapshot.draws), None

    def fork(self) -> Self:
        """Another sequence with the same past; from here on the two never influence each other."""
        with self.used():
            return type(self)(self.model, self._past())  # which copies

    def reset(self) -> None:
        """Forget everything: position 0, as new."""
        with self.used():
            self.state = self.model.engine.new_state(memory.layout(self.model.config, GROWTH))
            self._logits = None
            self._ring = np.zeros(RECENT, np.int32)  # the id at position p in p mod RECENT
            self._torn = False  # a pass broke off half way: some layers have moved on, some have not
            self.draws = self._ahead = None

    def _past(self) -> Snapshot:
        """All of it as it is, nothing copied; within `used`."""
        if self._torn:
            raise TcinferError(BROKEN)
        return Snapshot(self.model, self.state, self.logits, self._ring, self.draws)

    @contextmanager
    def held(self) -> Iterator[None]:
        """A block, of several passes perhaps, in which nobody else uses the sequence. Raises TcinferError where
        somebody does."""
        self.take("holder")
        try:
            yield
        finally:
            self.release("holder")

    @contextmanager
    def used(self) -> Iterator[None]:
        """A short block in which nobody else uses the sequence. Raises TcinferError where somebody does."""
        with uninterrupted():
            self.take()
            try:
                yield
            finally:
                self.release()

    def take(self, purpose: str = "pass") -> None:
        """From here to `release` no other thread uses the sequence. Raises TcinferError where one does.

        In one step that an exception cannot cut in two; what one has left taken is its own thread's to take again.
        """
        if self._others() or self._user.setdefault(purpose, get_ident()) != get_ident():
            raise TcinferError(IN_USE)

    def release(self, purpose: str = "pass") -> None:
        self._user.pop(purpose, None)

    def lend(self) -> None:
        """To this thread, for one purpose, until `take_back`. Raises TcinferError where somebody has it."""
        if self._others() or "lent" in self._user:
            raise TcinferError(IN_USE)
        self._user["lent"] = get_ident()

    def take_back(self) -> None:
        self._user.pop("lent", None)

    def _others(self) -> bool:
        """Whether another thread has it."""
        return any(thread != get_ident() for thread in list(self._user.values()))

    def begin(self) -> None:
        """A pass is about to change the state."""
        self._torn, self._logits, self._ahead = True, None, None

    def taken(self, ids: NDArray[np.int64]) -> None:
        """A pass has taken ids in (and has moved the position on)."""
        if len(ids) == 1:
            self._ring[(self.position - 1) % RECENT] = ids[0]
        else:
            last = ids[-RECENT:]
            self._ring[np.arange(self.position - len(last), self.position) % RECENT] = last
        self._torn = False

    def stand(self, logits: Logits, ahead: tuple[Sampling, float, int] | None = None) -> None:
        """The logits after the last token; ahead: how the engine has chosen the next id, by which draw, and the id."""
        self._logits, self._ahead = logits, ahead

    def chosen_ahead(self, how: Sampling) -> int | None:
        """The next id, if it was chosen when the last one was fed, just as `sample` would now; takes its draw."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0] != how or self.draws is None:
            return None
        if how.temperature and not self.draws.take(ahead[1]):
            return None
        return None if ahead[2] < 0 else ahead[2]  # below 0: not finite, which `sample` reports

    def check_whole(self) -> None:
        """Raise TcinferError where a pass broke off, or somebody else's runs."""
        if self._torn:
            raise TcinferError(IN_USE if self._others() else BROKEN)

    def check(self, ids: ArrayLike) -> NDArray[np.int64]:
        """ids as int64 [n], n >= 1, each in the vocabulary and all within what the model can take."""
        array = check_ids(self.model, ids)
        self.check_fits(array.size)
        return array

    def check_fits(self, count: int) -> None:
        """That so many tokens more can be taken in."""
        self.check_whole()
        config = self.model.config
        if config.learned_positions and self.position + count > config.context_length:
            raise TcinferError(
                f"this model has learned positions and ends at token {config.context_length}: "
                f"{self.position} are taken, {count} more do not fit"
            )

    def make_room(self, count: int) -> None:
        """Full memory alone: grow the cache, by doubling, so that `count` more tokens fit."""
        need, have = self.position + count, self.state.layout.capacity
        if need > have and not self.model.bounded:
            self.state = self.state.resized(memory.layout(self.model.config, rounded_up(max(need, 2 * have))))


@contextmanager
def _pass(sequences: list[Sequence], parts: list[NDArray[np.int64]]) -> Iterator[None]:
    """A pass that takes each part into its sequence, its engine called within. Damaged weights show in the logits,
    which `sample` checks."""
    with uninterrupted(), np.errstate(all="ignore"):
        held = []
        try:
            for sequence in sequences:
                sequence.take()
                held.append(sequence)
            for sequence in sequences:
                sequence.begin()
            yield
            for sequence, part in zip(sequences, parts, strict=True):
                sequence.taken(part)
        finally:
            for sequence in held:
                sequence.release()


def run(sequences: list[Sequence], parts: list[NDArray[np.int64]], out_rows: int) -> NDArray[np.float32]:
    """One pass: a part for each sequence; the logits of the last `out_rows` rows, float32 [out_rows, V].

    There must be room for the parts (`make_room`). The last sequence stands at the last row's logits, if that is one of
    them, and the others at none.
    """
    ids = parts[0] if len(parts) == 1 else np.concatenate(parts)
    with _pass(sequences, parts):
        logits = sequences[0].model.engine.run([s.state for s in sequences], [len(p) for p in parts], ids, out_rows)
        if out_rows:
            sequences[-1].stand(Here(logits[-1].copy()))  # no view: that would keep every row
        return logits


def advance(
    sequences: list[Sequence], ids: NDArray[np.int64], hows: list[Sampling | None] | None = None, first: int = 0
) -> NDArray[np.int64] | None:
    """One pass with a token for each sequence, at most a chunk of them, after which they stand at its logits.

    hows: how each next id is to be chosen, or None; where the engine chooses by all that are told it does so in the
    same pass, and `chosen_ahead` knows. Its choices are returned, -1 where logits are not finite; None where it made
    none. first: row of the engine's room for logits.
    """
    engine, asked = sequences[0].model.engine, None
    some = next((how for how in hows or () if how is not None), None)
    if some is not None and hows is not None and all(how is None or engine.chooses(how) for how in hows):
        asked = [
            How(how or some, s.draws.peek() if how and how.temperature and s.draws else 0.0)
            for s, how in zip(sequences, hows, strict=True)
        ]
    with _pass(sequences, list(ids[:, None])):
        logits, chosen = engine.step([s.state for s in sequences], ids, asked, first)
        for i, sequence in enumerate(sequences):
            if asked is None or chosen is None or hows is None or hows[i] is None:
                sequence.stand(logits[i])
            else:
                sequence.stand(logits[i], (*asked[i], int(chosen[i])))
    return chosen


def check_ids(model: Loaded, ids: ArrayLike) -> NDArray[np.int64]:
    """ids as int64 [n], n >= 1, each in the vocabulary. Raises TcinferError."""
    vocab_size = model.config.vocab_size
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


def rounded_up(tokens: int) -> int:
    """The room that an unbounded cache takes for so many tokens."""
    return max(1, -(-tokens // GROWTH)) * GROWTH


def rows_of_logits(count: int, vocab_size: int) -> NDArray[np.float32]:
    """Room for them, float32 [count, V]. Raises TcinferError where there is none."""
    try:
        return np.empty((count, vocab_size), np.float32)
    except (MemoryError, ValueError):
        size = 4 * count * vocab_size
        raise TcinferError(f"all logits of {count:,} tokens take {size:,} bytes: feed fewer at once") from None


def _copy(draws: Draws | None) -> Draws | None:
    return None if draws is None else draws.copy()
