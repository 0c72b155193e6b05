"""A text as it is written, by one session, for one reader."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from typing import Self

from tcinfer.errors import TcinferError
from tcinfer.generation import Generation, Piece
from tcinfer.sequence import Progress, Sequence, advance


class Text(Iterator[Piece]):
    """A text as it is written: an iterator of its pieces, which can be closed.

    finish_reason: None until it is over, then "stop" or "length"; prompt_tokens, new_tokens: fed so far;
    prompt_seconds, new_seconds: that took, without what the reader does between pieces.
    """

    def __init__(self, session: Sequence, generation: Generation, progress: Progress | None = None) -> None:
        self._session, self._generation, self._progress = session, generation, progress
        self.prompt_tokens = self.new_tokens = 0
        self.prompt_seconds = self.new_seconds = 0.0
        self._pieces = self._written()

    @property
    def finish_reason(self) -> str | None:
        return self._generation.finish_reason

    def __next__(self) -> Piece:
        try:
            return next(self._pieces)
        except ValueError as e:
            if "already executing" not in str(e):
                raise
            raise TcinferError("this text is being read by another thread") from None

    def close(self) -> None:
        """Write no more."""
        self._pieces.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _written(self) -> Generator[Piece, None, None]:
        session, generation, start = self._session, self._generation, time.monotonic()
        with session.held():
            first = session.position
            try:
                if generation.prompt.size:
                    session.feed(generation.prompt, progress=self._progress)
            finally:
                self.prompt_tokens, self.prompt_seconds = session.position - first, time.monotonic() - start
            generation.begin(session)
        while (piece := self._next()) is not None:
            yield piece
            if generation.finish_reason:
                return
        if generation.rest:
            yield Piece(generation.rest, -1)

    def _next(self) -> Piece | None:
        """Choose an id and feed it; None at the end. Nobody else can use the session between the two."""
        session, generation, start = self._session, self._generation, time.monotonic()
        with session.held():
            token = generation.choose(session)
            if token is None:
                return None
            ids = session.check([token])
            session.make_room(1)
            session.model.engine.room(1)
            advance([session], ids, [generation.ahead])
            piece = generation.fed(token)
        self.new_tokens, self.new_seconds = self.new_tokens + 1, self.new_seconds + time.monotonic() - start
        return piece
