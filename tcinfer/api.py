"""Models and sessions as users have them: the one place where sequences, texts, files and schedulers meet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tcinfer import memory, session_file
from tcinfer.atomic import Writer, expanded, followed, identity
from tcinfer.errors import TcinferError
from tcinfer.generation import DEFAULT_TOKENS, UNFINISHED, Generation, Request
from tcinfer.loaded import CLOSED, Loaded
from tcinfer.sampling import Sampling, strings
from tcinfer.sampling.choose import Draws, breaker_ids, sample
from tcinfer.sequence import Progress, Snapshot, advance, check_ids, rows_of_logits
from tcinfer.sequence import Sequence as Past
from tcinfer.text import Text

if TYPE_CHECKING:
    from tcinfer.constraint import Constraint
    from tcinfer.handle import Answer
    from tcinfer.progress import Progress as Total
    from tcinfer.scheduler import Scheduler


class Model(Loaded):
    """A model ready to run: `config`, `tokenizer`, and weights that any number of sessions share.

    A context manager: at its end it is closed. Pickled, it is loaded from its file again, or found where it is open.
    """

    def __init__(self, *loaded: Any, again: tuple[Any, ...] | None = None, **more: Any) -> None:
        """loaded: as Loaded takes it; again: a function and its arguments that give this model in another process."""
        super().__init__(*loaded, **more)
        self._again = again

    def __repr__(self) -> str:
        c = self.config
        return f"<tcinfer.Model {c.name or 'without a name'}: {c.arch}, memory {c.memories}, on {self.backend.name}>"

    def __reduce__(self) -> tuple[Any, ...]:
        if self._again is None:
            raise TcinferError("this model was not loaded from a file, and cannot be pickled")
        return self._again

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def learned(self) -> list[dict[str, Any]]:
        """What each layer's memory has learned (gates, half-lives of decays, write rates ...), empty without one."""
        if self.closed:
            raise TcinferError(CLOSED)
        return [
            room.learned(self._weights_of(i)) if (room := memory.room(layer.memory)).LEARNED else {}
            for i, layer in enumerate(self.config.layers)
        ]

    def _weights_of(self, layer: int) -> dict[str, Any]:
        start = f"blk.{layer}."
        return {name.removeprefix(start): w for name, w in self.vectors.items() if name.startswith(start)}

    def session(self, past: Snapshot | None = None) -> Session:
        """A new sequence, at position 0 or with a past. Raises TcinferError if its state does not fit this machine."""
        return Session(self, past)

    def load_session(self, path: str | PathLike[str]) -> Session:
        """Go on from a file that `session.save` wrote: the same logits, to the bit (on the same backend).

        Raises TcinferError for a file that is damaged, of another model, of other memory options, or of a newer
        version.
        """
        return self.attach(session_file.read(path))

    def attach(self, file: session_file.SessionFile) -> Session:
        """The same for a file that was read. Raises FileError where it is not of this model, as it was loaded."""
        session = Session(self, session_file.fitting(file, self))
        session.versions[_name(file.path)] = file.version
        return session

    def chat(self, messages: Sequence[Mapping[str, str]], **options: Any) -> Text:
        """The answer to a conversation, in a session of its own; messages: {"role": ..., "content": ...} each, of any
        roles that the model's chat template takes; options: as `Session.generate`.

        What people say is never read as a control token. Raises TcinferError for messages that cannot be.
        """
        session, progress = self.session(), options.pop("progress", None)
        return Text(session, Generation(self.chat_request(messages, **options), session), progress)

    def chat_request(self, messages: Sequence[Mapping[str, str]], **options: Any) -> Request:
        """The same as a request, for a scheduler; options: of a `Request`."""
        if not messages or not all(
            isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        ):
            raise TcinferError('messages are at least one {"role": text, "content": text}')
        from tcinfer.chat.template import fill

        said = {str(i): m["content"] for i, m in enumerate(messages)}
        parts = fill(self.template.around([m["role"] for m in messages]), **said)
        return _request(self, parts, True, any(m["role"] == "system" for m in messages), options)

    def scheduler(self, **options: Any) -> Scheduler:
        """What works on many requests at once, in a thread of its own; options: as `tcinfer.scheduler.Scheduler`."""
        from tcinfer.scheduler import Scheduler  # with asyncio, which a command does without

        return Scheduler(self, self.session, **options)

    def generate_many(self, prompts: Sequence[str | ArrayLike], **options: Any) -> list[Answer]:
        """A text for each of many prompts, in their order; options: those of a `Request`, for all of them.

        What the prompts begin with alike is read once. With a seed, all start from the same random numbers, as each
        would by itself. Raises TcinferError where one of them cannot be, and then gives none.
        """
        if isinstance(prompts, str) or not hasattr(prompts, "__iter__"):
            raise TcinferError("generate_many takes a list of prompts")
        past = self.session()
        ids = [Generation(Request.of(prompt), past).prompt for prompt in prompts]
        if shared := _shared(ids):
            past.feed(ids[0][:shared])
        start = past.snapshot()
        requests = [Request.of(one[shared:], **options) for one in ids]
        if not self.bounded and any(request.max_tokens < 0 for request in requests):
            raise TcinferError("max_tokens -1 has no end, and this model's cache grows with every token: give a number")
        context = max((len(one) + max(0, r.max_tokens) for one, r in zip(ids, requests, strict=True)), default=1)
        with self.scheduler(max_queue=len(ids), context=None if self.bounded else context) as scheduler:
            handles = [scheduler.submit(request, start, keep=False, whole=True) for request in requests]
            answers = [handle.result() for handle in handles]
        return [replace(answer, prompt_tokens=answer.prompt_tokens + shared) for answer in answers]

    def step_many(
        self, sessions: Sequence[Session], tokens: ArrayLike, sampling: Sampling | Sequence[Sampling] | None = None
    ) -> NDArray[Any]:
        """Feed one token to each of many sessions, sharing each pass over the weights; logits [len(sessions), V].

        With `sampling`, one for all or one for each, the ids that come next instead, int64 [len(sessions)], each drawn
        by its session's own random numbers: on a GPU the logits then need not leave it.
        The same as feeding each by itself (bit for bit on CPUs), and much faster: reading the weights is most of the
        cost of a token. Raises TcinferError, all sessions untouched, for a token out of range or a session that is not
        this model's or is named twice.
        """
        sessions = list(sessions) if hasattr(sessions, "__iter__") else []
        if not all(isinstance(s, Session) and s.model is self for s in sessions):
            raise TcinferError("step_many takes sessions of this model, as it was loaded")
        if len({id(s) for s in sessions}) < len(sessions):
            raise TcinferError("step_many takes each session once: their tokens are independent of each other")
        if not sessions:
            raise TcinferError("step_many takes at least one session")
        ids, count = check_ids(self, tokens), len(sessions)
        if len(ids) != count:
            raise TcinferError(f"step_many takes one token for each session, not {len(ids)} for {count}")
        hows = self._hows(sampling, count)
        with ExitStack() as held:
            for session in sessions:
                held.enter_context(session.held())
            return self._stepped(sessions, ids, hows, sampling is not None)

    def _stepped(
        self, sessions: list[Session], ids: NDArray[np.int64], hows: list[Sampling | None], chosen: bool
    ) -> NDArray[Any]:
        """The same, checked; chosen: the ids that come next are asked for."""
        count = len(ids)
        for session in sessions:
            session.check_fits(1)
        chooses = any(how is not None and self.engine.chooses(how) for how in hows)
        self.engine.room(count if chooses else min(count, self.pass_tokens))
        for session, how in zip(sessions, hows, strict=True):
            session.make_room(1)
            if how is not None and session.draws is None:
                session.draws = Draws.of(how)
        V = self.config.vocab_size
        out: NDArray[Any] = np.empty(count, np.int64) if chosen else rows_of_logits(count, V)
        for a in range(0, count, self.pass_tokens):
            part = slice(a, a + self.pass_tokens)
            advance(list[Past](sessions[part]), ids[part], hows[part], a if chooses else 0)
            for i, (session, how) in enumerate(zip(sessions[part], hows[part], strict=True), a):
                out[i] = session.logits if how is None else self._next(session, how)  # type: ignore[assignment]
        return out

    def _hows(self, sampling: Sampling | Sequence[Sampling] | None, count: int) -> list[Sampling | None]:
        """One for each of `count` sessions, checked."""
        several = sampling is not None and not isinstance(sampling, Sampling)
        hows: list[Any] = list(sampling) if several else [sampling] * count  # type: ignore[arg-type]
        if several and (len(hows) != count or not all(isinstance(how, Sampling) for how in hows)):
            raise TcinferError(f"sampling is one tcinfer.Sampling for all, or one for each of {count} sessions")
        for how in dict.fromkeys(hows):
            if how is not None and how.logit_bias:
                check_ids(self, [token for token, _ in how.logit_bias])
        return hows

    def _next(self, session: Session, how: Sampling) -> int:
        """The id that comes next."""
        if (ahead := session.chosen_ahead(how)) is not None:
            return ahead
        logits, breaks = session.logits, None
        assert logits is not None
        assert session.draws is not None
        if how.dry_multiplier:
            breaks = breaker_ids(self.tokenizer, how.dry_sequence_breakers, self.config.vocab_size)
        return sample(logits, how, session.draws, session.recent, None, breaks)


def _shared(prompts: list[NDArray[np.int64]]) -> int:
    """Ids with which all begin alike, at most all but one of the shortest."""
    if len(prompts) < 2:
        return 0
    most = min(map(len, prompts)) - 1
    same = np.all([one[:most] == prompts[0][:most] for one in prompts], axis=0)
    return most if same.all() else int(np.argmin(same))


class Session(Past):
    """The state of one sequence, made by `model.session()`. One thread at a time may use it; sessions are cheap.

    `copy.copy` is a fork. Pickled, it is its bytes and its model.
    """

    def __init__(self, model: Loaded, past: Snapshot | None = None) -> None:
        """At position 0, or with a past to go on from."""
        super().__init__(model, past)
        self.versions: dict[str, Any] = {}  # of the files that it was read from and saved to
        self._system: str | None = None  # with which `chat` began: some templates repeat it in every turn

    def __repr__(self) -> str:
        name, memories = self.model.config.name or "a model without a name", self.model.config.memories
        return f"<tcinfer.Session of {name}: memory {memories}, position {self.position:,}, {self.nbytes:,} bytes>"

    def fork(self) -> Self:
        """Another session with the same past; from here on the two never influence each other."""
        other = super().fork()
        other.versions, other._system = dict(self.versions), self._system
        return other

    def __copy__(self) -> Session:
        return self.fork()

    def __deepcopy__(self, _: object) -> Session:
        return self.fork()

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self.model, self.to_bytes(), self._system)

    def to_bytes(self) -> bytes:
        """The session as `save` writes it: as many bytes however long it is."""
        return b"".join(session_file.parts(self.snapshot()))

    @staticmethod
    def from_bytes(model: Model, data: bytes) -> Session:
        """A session that goes on from `to_bytes`. Raises FileError for bytes that are damaged or of another model."""
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TcinferError(f"a session's bytes are bytes, not {type(data).__name__}")
        return model.attach(session_file.unpack(data))

    @property
    def memory(self) -> list[dict[str, NDArray[Any]]]:
        """The arrays of each layer's state by name, read only: the ring's `k` and `v`, and what its memory has beside.

        On a CPU they are what the session goes on writing to: copy what is to be kept.
        """
        layers = [{name: array.view() for name, array in layer.items()} for layer in self.state.on_host().layers]
        for layer in layers:
            for array in layer.values():
                array.flags.writeable = False
        return layers

    def generate(
        self,
        prompt: str | ArrayLike | None = None,
        max_tokens: int = DEFAULT_TOKENS,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        banned: str | Sequence[str] = (),
        constraint: Constraint | None = None,
        json_schema: str | dict[str, Any] | None = None,
        grammar: str | None = None,
        logprobs: int | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> Text:
        """Go on from here: feed `prompt` (text, ids, or nothing), then yield a Piece for each new token.

        Text gets the BOS token in front where the file says so and the session is empty. Ends after max_tokens (-1:
        never), at an end-of-text token or one of `stop_ids`, none of which is fed, or before the first of the `stop`
        strings, which is not part of the text.
        `banned` strings never come up in the text. How tokens are chosen: `sampling`, or its fields one by one
        (temperature=0, top_k=1, seed=7 ...); seed -1 goes on with the session's own random numbers, which its
        snapshots, forks and files carry. json_schema, grammar (llguidance's Lark, or GBNF): what the text must follow;
        constraint: the same, compiled before. logprobs: with each piece, of so many likely ids and its own. A token
        that is yielded has been fed: the session holds all that was shown. Raises TcinferError on bad arguments at
        once, before the first piece is asked for.
        """
        own: dict[str, Any] = {
            "stop": stop,
            "stop_ids": stop_ids,
            "banned": banned,
            "constraint": constraint,
            "logprobs": logprobs,
        }
        own |= {"json_schema": json_schema, "grammar": grammar}
        request = Request.of(prompt, max_tokens=max_tokens, sampling=sampling, **own, **options)
        return Text(self, Generation(request, self), progress)

    def chat(self, message: str, system: str | None = None, **options: Any) -> Text:
        """The answer to one more message, in the model's chat template; system: with the first one; options: as
        `generate`. Nothing is written to disk: `save` keeps the conversation."""
        from tcinfer.chat.template import fill

        template, first = self.model.template, self.position == 0
        if system is not None and not first:
            raise TcinferError("a system prompt comes before the first message")
        if first:
            self._system = system
            parts = template.opening(system is not None)
        else:
            has, tail = self._system is not None, self.model.tokenizer.decode(self.recent[-UNFINISHED:].tolist())
            parts = template.going_on(has, template.ends(self.model.tokenizer, has)[1], tail)
        progress, said = options.pop("progress", None), fill(parts, system=self._system, user=message)
        request = _request(self.model, said, first, self._system is not None, options)
        return Text(self, Generation(request, self), progress)

    def begins(self, path: str | PathLike[str]) -> None:
        """`path` is to be this session's file, and is not there yet: where somebody else makes it, `save` says so."""
        self.versions[_name(path)] = None

    def save(self, path: str | PathLike[str], writer: Writer | None = None) -> int:
        """Write the session to a file, in one step, and give its bytes: the same number however long the session is.

        `model.load_session` goes on from it, to the bit (session_file.py has the layout). writer: who holds the file
        (`atomic.Writer`), so that nobody else writes it between one save and the next. Raises TcinferError, the file at
        `path` as it was, where it cannot be written, where somebody else is writing it, and where it has changed since
        this session was read from it or saved there.
        """
        file = expanded(path)
        name, now = _name(path), identity(file)
        if now is not None and self.versions.get(name, now) != now:
            raise TcinferError(f"{path}: has changed since this session read or wrote it: choose another name")
        size = session_file.write(self.snapshot(), file, writer=writer)
        self.versions[name] = identity(file)
        return size

    def absorb(
        self,
        stream: BinaryIO,
        path: str | PathLike[str] | None = None,
        every: float = 10.0,
        live: float | None = None,
        progress: Total | None = None,
        invalid: Callable[[], None] | None = None,
        writer: Writer | None = None,
    ) -> int:
        """Feed a stream of UTF-8 text of any length, a file or a pipe, and give how many tokens that were.

        path: a session file, saved every so many seconds and at the end, also one that Ctrl-C or an error brings.
        live: seconds after which what came so far of a pipe is taken in, and saved, though more may come. progress:
        told (n, total) as tokens are fed, None of a total that is not known; invalid: called once if there are bytes
        that are no UTF-8, each of which becomes U+FFFD. writer: as for `save`. Raises TcinferError.
        """
        from tcinfer.absorb import absorb

        if not hasattr(stream, "read"):
            raise TcinferError('absorb takes a stream of bytes, such as open(path, "rb"); feed takes ids')
        save = (lambda: None) if path is None else partial(self.save, path, writer)
        return absorb(self, stream, save, every, live, progress, invalid)


def _request(
    model: Loaded, parts: list[tuple[str, bool]], first: bool, system: bool, options: dict[str, Any]
) -> Request:
    """For the answer to what a template has made of messages (`fill`); first: nothing stands before them."""
    tokenizer = model.tokenizer
    ids = tokenizer.encode_parts(parts, bos=first and tokenizer.add_bos, continues=not first)
    stop_ids, stops = model.template.ends(tokenizer, system)
    more: dict[str, Any] = {"stop": [*stops, *strings("stop strings", options.pop("stop", ()))]}
    more["stop_ids"] = [*stop_ids, *options.pop("stop_ids", ())]
    return Request.of(ids, **more, **options)


def _name(path: str | PathLike[str]) -> str:
    """A file's, whatever path leads to it."""
    return str(followed(expanded(path)).absolute())


def _unpickled(model: Model, data: bytes, system: str | None) -> Session:
    session = Session.from_bytes(model, data)
    session._system = system
    return session
