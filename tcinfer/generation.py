"""Text from a session: choose a token, feed it, show what it adds; until something ends it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tcinfer.config import check_count
from tcinfer.errors import TcinferError
from tcinfer.sampler import breaker_ids, sample
from tcinfer.sampling import Sampling, strings

if TYPE_CHECKING:
    from tcinfer.constraint import Constraint
    from tcinfer.session import Progress, Session
    from tcinfer.tokenizer import StreamDecoder

UNFINISHED = 32  # ids: more than any half-finished character has, or most banned strings


class Piece(NamedTuple):
    """What one token adds to a text. `text` holds complete characters only, so it may be empty."""

    text: str
    id: int


class Generation:
    """One call of `session.generate`, its arguments checked."""

    def __init__(
        self,
        session: Session,
        prompt: str | ArrayLike | None,
        max_tokens: int,
        sampling: Sampling | None,
        options: dict[str, Any],
        stop: str | Sequence[str],
        stop_ids: Sequence[int],
        banned: str | Sequence[str],
        constraint: Constraint | None,
    ) -> None:
        """See Session.generate. Raises TcinferError for arguments that cannot be."""
        if sampling is not None and not isinstance(sampling, Sampling):
            raise TcinferError(f"sampling is a tcinfer.Sampling, not {type(sampling).__name__}")
        try:
            self._how = replace(sampling or Sampling(), **options)
        except TypeError:
            known = ", ".join(Sampling.__dataclass_fields__)
            wrong = next(name for name in options if name not in Sampling.__dataclass_fields__)
            raise TcinferError(f"generate has no option {wrong!r}; sampling has {known}") from None
        check_count("max_tokens", max_tokens, -1)
        self._session, self._max_tokens, self._constraint = session, max_tokens, constraint
        if constraint is not None and not hasattr(constraint, "allowed"):
            raise TcinferError(f"constraint is a tcinfer.constraint.Constraint, not {type(constraint).__name__}")
        try:
            ends = session._check_ids(stop_ids).tolist() if len(stop_ids) else []
            self._ends = session.model.tokenizer.eos_ids.union(ends)
            if self._how.logit_bias:
                session._check_ids([token for token, _ in self._how.logit_bias])
        except (TypeError, TcinferError) as e:
            raise TcinferError(f"stop_ids and logit_bias: {e}") from None
        self._stops, self._banned = strings("stop strings", stop), strings("banned strings", banned)
        self._ids = self._prompt_ids(prompt)
        if not self._ids.size and session.logits is None:
            raise TcinferError("there is nothing to go on from: give a prompt")

    def _prompt_ids(self, prompt: str | ArrayLike | None) -> NDArray[np.int64]:
        tokenizer, at = self._session.model.tokenizer, self._session.position
        bos = at == 0 and tokenizer.add_bos
        if isinstance(prompt, str):
            prompt = tokenizer.encode(prompt, bos=bos, continues=at > 0)
        elif prompt is None:
            prompt = [tokenizer.bos_id] if bos and tokenizer.bos_id is not None else []
        with suppress(ValueError):  # a list of lists, which `_check` names
            if not np.size(prompt):
                return np.empty(0, np.int64)
        return self._session._check(prompt)

    def pieces(self, progress: Progress | None) -> Iterator[Piece]:
        """Feed the prompt, then a Piece for each token chosen."""
        session, tokenizer = self._session, self._session.model.tokenizer
        if self._ids.size:
            session.feed(self._ids, progress=progress)
        if session.draws is None or self._how.seed >= 0:
            session.draws = self._how.draws()
        text = _Text(self._stops, self._banned, *self._decoder())
        breaks = None
        if self._how.dry_multiplier:
            breaks = breaker_ids(tokenizer, self._how.dry_sequence_breakers, session.model.config.vocab_size)
        n = 0
        while n != self._max_tokens:
            session._check_whole()
            chosen = self._choose(text, breaks)
            n += 1
            if chosen in self._ends:
                if rest := text.flush():
                    yield Piece(rest, chosen)
                return
            session._advance(chosen, self._how if n != self._max_tokens and self._constraint is None else None)
            if self._constraint is not None:
                self._constraint.accept(chosen)
            piece = text.push(chosen)
            if self._constraint is not None and self._constraint.done:
                yield Piece(piece + text.flush(), chosen)
                return
            if n == self._max_tokens and not text.stopped:
                piece += text.release()
            yield Piece(piece, chosen)
            if text.stopped:
                return

    def _choose(self, text: _Text, breaks: NDArray[np.bool_] | None) -> int:
        """The next id: as sampled, but again without it where it would complete a banned string."""
        session = self._session
        assert session.draws is not None
        ahead = session._chosen_ahead(self._how) if self._constraint is None else None
        if ahead is not None and not text.forbids(ahead):
            return ahead
        assert session.logits is not None
        allowed = None if self._constraint is None else self._constraint.allowed()
        if ahead is not None:
            allowed = np.ones(len(session.logits), bool)
            allowed[ahead] = False
        mu = session.draws.mu
        while True:
            session.draws.mu = mu  # what was not taken is no surprise
            chosen = sample(session.logits, self._how, session.draws, session.recent, allowed, breaks)
            if not text.forbids(chosen):
                return chosen
            allowed = np.ones(len(session.logits), bool) if allowed is None else allowed.copy()
            allowed[chosen] = False

    def _decoder(self) -> tuple[StreamDecoder | None, str]:
        """A decoder in the midst of the session's text, and the end of that text: what is half there is completed."""
        tokenizer = self._session.model.tokenizer
        if not tokenizer.vocab_size:  # a file without one: ids, no text
            return None, ""
        decoder = tokenizer.stream()
        return decoder, "".join(decoder.push(int(token)) for token in self._session.recent[-UNFINISHED:])


class _Text:
    """Ids in, text out: complete characters, and nothing that may yet turn out to be part of a stop string."""

    def __init__(self, stops: Sequence[str], banned: Sequence[str], decoder: StreamDecoder | None, before: str) -> None:
        """before: the text that stands before this one; a banned string may have begun there."""
        self._stops, self._banned, self._decoder = stops, banned, decoder
        self._held = ""  # the beginning of a stop string, perhaps
        self._longest = max(map(len, banned), default=1) - 1
        self._tail = self._ending(before)
        self.stopped = False

    def forbids(self, token: int) -> bool:
        """Whether this token would complete a banned string."""
        if not self._banned or self._decoder is None:
            return False
        text = self._tail + self._decoder.peek(token)
        return any(s in text for s in self._banned)

    def push(self, token: int) -> str:
        if self._decoder is None:
            return ""
        new = self._decoder.push(token)
        self._tail = self._ending(self._tail + new)
        return self._release(new)

    def _ending(self, text: str) -> str:
        """As much of a text's end as a banned string needs to be seen."""
        return text[-self._longest :] if self._longest else ""

    def flush(self) -> str:
        """All that was held back, now that the text is over."""
        rest = self._release(self._decoder.flush()) if self._decoder is not None else ""
        return rest + self.release()

    def release(self) -> str:
        """What was held back for a stop string's sake; a half-finished character stays for what may come."""
        rest, self._held = self._held, ""
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
