"""Text in the making: what is asked for, and which id comes next. Runs no model: whoever does tells it the logits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tcinfer.config import check_count
from tcinfer.errors import TcinferError
from tcinfer.sampling import Sampling, strings
from tcinfer.sampling.choose import Draws, breaker_ids, log_probabilities, sample
from tcinfer.sequence import check_ids

if TYPE_CHECKING:
    from tcinfer.constraint import Constraint
    from tcinfer.loaded import Loaded
    from tcinfer.sequence import Sequence as Past
    from tcinfer.tokenizer import StreamDecoder

DEFAULT_TOKENS = 256
MOST_LOGPROBS = 100
UNFINISHED = 32  # ids: more than any half-finished character has, or most banned strings
STOP, LENGTH = "stop", "length"  # why a text is over


class Piece(NamedTuple):
    """What one token adds to a text."""

    text: str  # complete characters only, so it may be empty
    id: int  # -1: no token, but the end of a text that was held back, in case that a stop string had begun there
    logprobs: dict[int, float] | None = None  # if asked for: of the likeliest ids and this one, natural logarithms


@dataclass(frozen=True)
class Request:
    """A text that is asked for: the arguments of `Session.generate`. Raises TcinferError for what cannot be."""

    prompt: str | ArrayLike | None = None
    max_tokens: int = DEFAULT_TOKENS
    sampling: Sampling = field(default_factory=Sampling)
    stop: str | Sequence[str] = ()
    stop_ids: Sequence[int] = ()
    banned: str | Sequence[str] = ()
    constraint: Constraint | None = None
    json_schema: str | dict[str, Any] | None = None
    grammar: str | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.sampling, Sampling):
            raise TcinferError(f"sampling is a tcinfer.Sampling, not {type(self.sampling).__name__}")
        check_count("max_tokens", self.max_tokens, -1)
        if self.constraint is not None and not hasattr(self.constraint, "allowed"):
            raise TcinferError(f"constraint is a tcinfer.constraint.Constraint, not {type(self.constraint).__name__}")
        if sum(x is not None for x in (self.constraint, self.json_schema, self.grammar)) > 1:
            raise TcinferError("constraint, json_schema and grammar exclude each other")
        if self.logprobs is not None:
            check_count("logprobs", self.logprobs, 0, MOST_LOGPROBS)
        for name in ("stop", "banned"):
            object.__setattr__(self, name, strings(f"{name} strings", getattr(self, name)))

    @classmethod
    def of(cls, prompt: str | ArrayLike | None = None, **options: Any) -> Request:
        """A request; options: its other fields, and those of Sampling one by one (temperature=0, seed=7 ...)."""
        own = {f.name for f in fields(cls)}
        how = {name: value for name, value in options.items() if name not in own}
        asked = {name: value for name, value in options.items() if name in own and (name, value) != ("sampling", None)}
        for name in how.keys() - {f.name for f in fields(Sampling)}:
            known = ", ".join(f.name for f in fields(Sampling))
            raise TcinferError(f"generate has no option {name!r}; sampling has {known}")
        request = cls(prompt, **asked)
        return replace(request, sampling=replace(request.sampling, **how)) if how else request


class Generation:
    """A request at work. `prompt`: the ids to feed first; then, by turns, `choose` an id, feed it, and tell `fed`."""

    def __init__(self, request: Request, past: Past) -> None:
        """past: the sequence that it goes on from, which is looked at and not kept.

        Raises TcinferError for a request that does not fit it.
        """
        model = past.model
        self.request, self.how, self._V = request, request.sampling, model.config.vocab_size
        self._tokenizer = model.tokenizer
        try:
            ends = check_ids(model, request.stop_ids).tolist() if len(request.stop_ids) else []
            self._ends = model.tokenizer.eos_ids.union(ends)
            if self.how.logit_bias:
                check_ids(model, [token for token, _ in self.how.logit_bias])
        except (TypeError, TcinferError) as e:
            raise TcinferError(f"stop_ids and logit_bias: {e}") from None
        self.prompt = _prompt_ids(request.prompt, past)
        if not self.prompt.size and not past.stands:
            raise TcinferError("there is nothing to go on from: give a prompt")
        self._constraint = _constraint_of(request, model)
        self._breaks = None
        if self.how.dry_multiplier:
            self._breaks = breaker_ids(model.tokenizer, self.how.dry_sequence_breakers, self._V)
        self._text: _Text | None = None
        self.count = 0  # ids chosen
        self.finish_reason: str | None = None  # STOP or LENGTH, once it is over
        self.rest = ""  # then: what was held back
        self._logprobs: dict[int, float] | None = None  # of the id just chosen

    @property
    def ahead(self) -> Sampling | None:
        """How the id after the next is chosen, where an engine may do that: from logits and draws alone."""
        return self.how if self._constraint is None and self.count != self.request.max_tokens else None

    def begin(self, past: Past) -> None:
        """The prompt has been fed: text begins behind it."""
        if past.draws is None or self.how.seed >= 0:
            past.draws = Draws.of(self.how)
        decoder, before = None, ""
        if self._tokenizer.vocab_size:  # else: a file without one: ids, no text
            decoder = self._tokenizer.stream()  # in the midst of the text: what is half there is completed
            before = "".join(decoder.push(int(token)) for token in past.recent[-UNFINISHED:])
        self._text = _Text(self.request.stop, self.request.banned, decoder, before)

    def choose(self, past: Past) -> int | None:
        """The id that comes next, to be fed; None where the text is over."""
        text = self._text
        assert text is not None
        if self.count == self.request.max_tokens:  # 0 of them
            self.finish_reason = LENGTH
            return None
        chosen = self._chosen(past, text)
        self.count += 1
        if chosen in self._ends:
            self.finish_reason, self.rest = STOP, text.flush()
            return None
        if self.request.logprobs is not None:
            assert past.logits is not None
            self._logprobs = log_probabilities(past.logits, self.request.logprobs, chosen)
        return chosen

    def fed(self, token: int) -> Piece:
        """The id that was chosen has been fed: what it adds to the text. Sets `finish_reason` where that is the end."""
        text, constraint = self._text, self._constraint
        assert text is not None
        piece = text.push(token)
        if constraint is not None:
            constraint.accept(token)
        if constraint is not None and constraint.done:
            piece, self.finish_reason = piece + text.flush(), STOP
        elif text.stopped:
            self.finish_reason = STOP
        elif self.count == self.request.max_tokens:
            piece, self.finish_reason = piece + text.release(), LENGTH
        return Piece(piece, token, self._logprobs)

    def _chosen(self, past: Past, text: _Text) -> int:
        """As sampled, but again without it where it would complete a banned string."""
        draws, constraint = past.draws, self._constraint
        assert draws is not None
        ahead = past.chosen_ahead(self.how) if constraint is None else None
        if ahead is not None and not text.forbids(ahead):
            return ahead
        logits = past.logits
        assert logits is not None
        allowed = None if constraint is None else constraint.allowed()
        if ahead is not None:
            allowed = np.ones(len(logits), bool)
            allowed[ahead] = False
        mu = draws.mu
        while True:
            draws.mu = mu  # what was not taken is no surprise
            chosen = sample(logits, self.how, draws, past.recent, allowed, self._breaks)
            if not text.forbids(chosen):
                return chosen
            allowed = np.ones(len(logits), bool) if allowed is None else allowed.copy()
            allowed[chosen] = False


def _constraint_of(request: Request, model: Loaded) -> Constraint | None:
    """What a request's text must follow, at its start."""
    if request.constraint is not None:
        return request.constraint.afresh()
    if request.json_schema is None and request.grammar is None:
        return None
    from tcinfer.constraint import compiled

    return compiled(model.tokenizer, model.config.vocab_size, request.json_schema, request.grammar).afresh()


def _prompt_ids(prompt: str | ArrayLike | None, past: Past) -> NDArray[np.int64]:
    """A prompt as ids to feed, int64 [n]; checked, n may be 0."""
    tokenizer, at = past.model.tokenizer, past.position
    bos = at == 0 and tokenizer.add_bos
    if isinstance(prompt, str):
        prompt = tokenizer.encode(prompt, bos=bos, continues=at > 0)
    elif prompt is None:
        prompt = [tokenizer.bos_id] if bos and tokenizer.bos_id is not None else []
    with suppress(ValueError):  # a list of lists, which `check` names
        if not np.size(prompt):
            past.check_whole()
            return np.empty(0, np.int64)
    return past.check(prompt)


class _Text:
    """Ids in, text out: complete characters, and nothing that may yet turn out to be part of a stop string."""

    def __init__(self, stops: Iterable[str], banned: Iterable[str], decoder: StreamDecoder | None, before: str) -> None:
        """before: the text that stands before this one; a banned string may have begun there."""
        self._stops, self._banned, self._decoder = tuple(stops), tuple(banned), decoder
        self._held = ""  # the beginning of a stop string, perhaps
        self._longest = max(map(len, self._banned), default=1) - 1
        self._tail = self._ending(before)
        self.stopped = False

    def forbids(self, token: int) -> bool:
        """Whether this token would complete a banned string."""
        if not self._banned or self._decoder is None:
            return False
        text = self._tail + self._decoder.peek(token)
        return any(s in text for s in self._banned)

    def push(self, token: int) -> str:
        """What may be shown after one more token."""
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
