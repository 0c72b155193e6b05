"""A conversation: turns of a person and a model in one session, taken back, tried again, and kept on disk.

Only what is new is fed: a turn is what the chat template adds to what the session has read. Nothing here grows with
the conversation but its log on disk (store.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tcinfer import session_file
from tcinfer.chat.snapshots import Snapshots
from tcinfer.chat.store import Log
from tcinfer.chat.template import ChatTemplate, Part, fill
from tcinfer.errors import FileError, TcinferError
from tcinfer.generation import LENGTH, UNFINISHED
from tcinfer.sampling import Sampling
from tcinfer.sampling.choose import Draws
from tcinfer.sequence import Snapshot
from tcinfer.tokenizer import stream as text

if TYPE_CHECKING:
    from tcinfer.api import Model, Text
    from tcinfer.generation import Piece
    from tcinfer.progress import Progress

MEASURED = 4096  # tokens of a turn, at most, that are fed again to measure it
LOGGED = 256  # ids of an answer between two lines of the log


class Conversation:
    """What `tcinfer chat` drives. Errors leave the conversation as it was before the call."""

    def __init__(self, model: Model, template: ChatTemplate, log: Log, sampling: Sampling) -> None:
        """log: of a new conversation, or of one to go on with: then its session file, and what the log has beyond it,
        are read. Raises TcinferError where they do not fit the model."""
        self.model, self.template, self.log = model, template, log
        self.sampling = sampling
        self.max_tokens = -1
        self.stop: tuple[str, ...] = ()
        self.banned: tuple[str, ...] = ()
        self.cut = False  # whether the last answer ended because it had `max_tokens`
        self.system: str | None = log.start.get("system")
        self.session = model.session()
        self._snapshots = Snapshots()
        self._stop_ids, self._stops = template.ends(model.tokenizer, self.system is not None)
        if log.turns or log.base_path.exists() or log.session_path.exists():
            self._resume()
        if self.session.draws is None or sampling.seed >= 0:
            self.session.draws = Draws.of(sampling)

    @property
    def turns(self) -> int:
        """Complete ones, a message and its answer each."""
        return self.log.turns

    def ask(self, message: str, files: Sequence[Path] = (), progress: Progress | None = None) -> Iterator[Piece]:
        """The answer to a message, piece by piece; files: whose text goes before it, of any length.

        Closing the iterator keeps what was said so far as the answer. Raises TcinferError, nothing changed, for
        a message that the vocabulary cannot write.
        """
        first = self.session.position == 0
        has_system = self.system is not None
        parts = self.template.opening(has_system) if first else self._next(has_system)
        at = next(i for i, part in enumerate(parts) if part.who == "user")
        before = fill(parts[:at], system=self.system)
        after = fill(parts[at + 1 :], system=self.system)
        with self._or_back() as past:
            self.log.begin(message or ", ".join(path.name for path in files))
            for ids, total in self._encoded(first, before, message, files, after):
                self._feed(ids, progress, total)
                self.log.fed("in", ids)
            answer = self._begun()
        self._snapshots.add(self.turns, past)
        yield from self._answer(past, *answer)

    def check_file(self, path: Path) -> None:
        """Whether the first of its text can be read. Raises TcinferError that names it."""
        try:
            with open(path, "rb") as stream:
                start = stream.read(text.SIZE)
        except OSError as e:
            raise TcinferError(f"{path}: cannot be read: {e.strerror}") from None
        if b"\0" in start:
            raise TcinferError(f"{path}: is no text")
        try:
            self.model.tokenizer.encode(start.decode(errors="ignore"), bos=False, continues=True)
        except TcinferError as e:
            raise TcinferError(f"{path}: {e}") from None

    def again(self, progress: Progress | None = None) -> Iterator[Piece]:
        """Another answer to the last message. Raises TcinferError where there is none; a later one drops the turn."""
        turn = self.turns
        if not turn:
            raise TcinferError("there is no answer to try again yet")
        with self._or_back():
            question = partial(self.log.part, turn, "in")
            fed = self._rewind(turn - 1, progress, sum(map(len, question())))
            before = self.session.snapshot()
            session_file.write(before, self.log.session_path, private=True)
            self._replay(question, progress, fed)
            answer = self._begun()
        self.log.back_to(turn - 1, keep_question=True)
        yield from self._answer(before, *answer)

    def undo(self, turns: int = 1, progress: Progress | None = None) -> int:
        """Take back the last turns; gives how many that were. Raises TcinferError where there are none."""
        count = min(turns, self.turns)
        if count < 1:
            raise TcinferError("there is no turn to take back")
        target = self.turns - count
        with self._or_back():
            self._rewind(target, progress)
            session_file.write(self.session.snapshot(), self.log.session_path, private=True)
        self.log.back_to(target)
        self._snapshots.back_to(target)
        return count

    def last_answer(self) -> tuple[Snapshot, list[int]] | None:
        """The state before the last turn and the turn's ids, if that is at hand and no longer than MEASURED."""
        kept = self._snapshots.nearest(self.turns - 1)
        if not self.turns or kept is None or kept[0] != self.turns - 1:
            return None
        turn = chain.from_iterable(self.log.replay(self.turns - 1, self.turns))
        ids = list(islice(turn, MEASURED + 1))
        return (kept[1], ids) if len(ids) <= MEASURED else None

    def last_text(self) -> str:
        """The last answer, for people."""
        ids = deque(chain.from_iterable(self.log.part(self.turns, "out")) if self.turns else (), MEASURED)
        return self.model.tokenizer.decode(ids)

    def fork(self, name: str) -> None:
        """Keep a copy of all that is here under another name."""
        self.log.copy_to(name)

    def close(self) -> None:
        self.log.close()

    def _next(self, system: bool) -> list[Part]:
        """The template's next turn, without the text that ended the answer, where the session has read that already."""
        tail = self.model.tokenizer.decode(self.session.recent[-UNFINISHED:].tolist())
        return self.template.going_on(system, self._stops, tail)

    def _begun(self) -> tuple[int, Text, Piece | None]:
        """An answer with its first token chosen: what can be wrong with how it is to be chosen has shown by then."""
        start = self.session.position
        pieces = self.session.generate(
            max_tokens=self.max_tokens,
            sampling=replace(self.sampling, seed=-1),  # the conversation's own random numbers go on
            stop=[*self._stops, *self.stop],
            stop_ids=self._stop_ids,
            banned=self.banned,
        )
        return start, pieces, next(pieces, None)

    def _answer(self, past: Snapshot, logged: int, pieces: Text, first: Piece | None) -> Iterator[Piece]:
        """The answer as it comes, written down from position `logged` on; an error drops the turn, back to `past`."""
        session, turns = self.session, self.turns

        def write_down(at_least: int) -> None:
            nonlocal logged
            if session.position - logged >= at_least:
                self.log.fed("out", session.recent[logged - session.position :].tolist())
                logged = session.position

        try:
            try:
                for piece in chain(() if first is None else (first,), pieces):
                    write_down(LOGGED)
                    yield piece
            except GeneratorExit:
                pass  # stopped: what was said stays said
            write_down(1)
            self.cut = pieces.finish_reason == LENGTH
            self.log.end(session.position)
        except BaseException:
            session.restore(past)
            self.log.back_to(turns)
            raise
        session_file.write(session.snapshot(), self.log.session_path, private=True)

    def _encoded(
        self, first: bool, before: list[tuple[str, bool]], message: str, files: Sequence[Path], after: Any
    ) -> Iterator[tuple[list[int], int]]:
        """A turn's ids, and about how many the turn has; one list unless there are files, which are read in pieces."""
        tokenizer = self.model.tokenizer
        bos, continues = first and tokenizer.add_bos, not first
        count = 0
        for piece, share in self._file_texts(files):
            if ids := tokenizer.encode_parts([*before, (piece, False)], bos=bos, continues=continues):
                count += len(ids)
                yield ids, round(count / share)
            before, bos, continues = [], False, True
        ids = tokenizer.encode_parts([*before, (message, False), *after], bos=bos, continues=continues)
        yield ids, count + len(ids)

    @staticmethod
    def _file_texts(files: Sequence[Path]) -> Iterator[tuple[str, float]]:
        """The files' texts in pieces, and the share of all their bytes that was read so far."""
        read, path = 0, Path()
        try:
            size = 0
            for path in files:
                size += path.stat().st_size
            for path in files:
                with open(path, "rb") as stream:
                    for piece in text.pieces(stream):
                        read += len(piece.encode())
                        yield piece, read / max(size, read)
                yield "\n\n", read / max(size, read) if read else 1.0
        except OSError as e:
            raise TcinferError(f"{path}: cannot be read: {e.strerror}") from None

    @contextmanager
    def _or_back(self) -> Iterator[Snapshot]:
        """Yields the state as it is; an exception within puts it, and the log, back there."""
        past, turns = self.session.snapshot(), self.turns
        try:
            yield past
        except BaseException:
            self.session.restore(past)
            self.log.back_to(turns)
            raise

    def _rewind(self, turn: int, progress: Progress | None = None, more: int = 0) -> int:
        """The state after so many turns: from the nearest snapshot, the rest fed again. Random numbers go on.

        more: ids that will be fed after it. Gives how many were fed here.
        """
        draws = self.session.draws
        kept = self._snapshots.nearest(turn)
        if kept is not None:
            start, snapshot = kept
            self.session.restore(snapshot)
        else:
            start = 0
            if self.log.base_path.exists():
                self.session.restore(self.model.load_session(self.log.base_path).snapshot())
            else:
                self.session.reset()
        count = self._replay(lambda: self.log.replay(start, turn), progress, more)
        self.session.draws = draws
        return count

    def _replay(self, parts: Callable[[], Iterator[list[int]]], progress: Progress | None, beside: int = 0) -> int:
        """Feed what the log has, gone through twice: counting takes no time beside feeding. Gives how many ids.

        beside: ids that are fed before or after, for the progress's total.
        """
        count = sum(map(len, parts()))
        for ids in parts():
            self._feed(ids, progress, beside + count)
        return count

    def _feed(self, ids: list[int], progress: Progress | None, total: int) -> None:
        self.session.feed(ids, progress=None if progress is None else partial(progress, total=total))

    def _resume(self) -> None:
        """Go on from the session file, then from what the log has beyond it; from the log alone without one."""
        at = None
        if self.log.session_path.exists():
            try:
                self.session = self.model.load_session(self.log.session_path)
            except FileError as e:
                raise FileError(f"{e}; remove that file to have the conversation fed again from its log") from None
            position = self.session.position
            at = next((turn for turn, end in self.log.positions() if end == position), None) if position else 0
        if at is None:
            self._rewind(self.turns)
            return
        for ids in self.log.replay(at, self.turns):
            self.session.feed(ids)
