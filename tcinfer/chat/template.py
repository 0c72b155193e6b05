"""A model file's chat template: run where it can do no harm, and what it puts around the turns of any conversation.

Nothing that people say goes through a template. It renders a few short conversations of made-up words; what stands
around the words is its own text, the same in every conversation, and only that may hold control tokens.

It renders in a process of its own, once for a conversation of any length, which costs a tenth of a second. A language
with loops, macros, filters and numbers of any size cannot be fenced operator by operator, and neither a thread nor one
long operation in it can be stopped; a process can, whatever else this one is doing, and the system bounds its memory.
"""

import json
import re
import secrets
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tcinfer.errors import TcinferError

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LONGEST = 256 * 1024  # characters of a template
ROOM = 4 * 2**20  # characters that all its renderings may have together
SECONDS = 2  # for all of them
MEMORY = 128 * 2**20  # bytes, of the process; where the system sets no such limits, the seconds do
KEPT = 64  # shapes of whole conversations that a template remembers
START = 30  # seconds that Python may take to start, on a busy machine

_ROLES = ("system", "user", "assistant", "user", "assistant", "user")
_TURNS = 3  # the third renders as all later ones do
# What a template must not change; what models write that some templates take out again later on.
_AWKWARD = 'é{} <b>&amp; "it\'s"\n\\n {{{{ x }}}}' + " and so on" * 400 + " ü"
_THOUGHT = "<think>\nhm\n</think>\n\nyes"


class Part(NamedTuple):
    """A piece of a turn: the template's own text, or (`who`: "system" or "user") the place of what somebody says."""

    text: str
    who: str | None = None


class _Turns(NamedTuple):
    opening: list[Part]
    next: list[Part]
    rewrites_history: bool


class ChatTemplate:
    """What to feed around each message. Immutable."""

    def __init__(self, source: str | None, bos: str, eos: str) -> None:
        """source: Jinja, as a model file has it; None: ChatML. bos, eos: the texts of those tokens, or "".

        Raises TcinferError for a template that is broken, takes too much, or does not say what people say.
        """
        source = CHATML if source is None else source
        self._source, self._bos, self._eos = source, bos, eos
        self._around: dict[tuple[str, ...], list[Part]] = {}
        if not isinstance(source, str):
            raise _unusable("is not a text")
        if len(source) > LONGEST:
            raise _unusable(f"has {len(source)} characters, but {LONGEST} are the most")
        self._words = [f"{role}{secrets.token_hex(8)}" for role in _ROLES]
        awkward = [_AWKWARD.format(i) for i in range(len(_ROLES))]
        thoughts = [_THOUGHT if role == "assistant" else self._words[i] for i, role in enumerate(_ROLES)]
        self._contents = {"plain": self._words, "awkward": awkward, "thoughts": thoughts}
        cases = [(system, turn, kind) for system in (False, True) for turn in range(_TURNS) for kind in self._contents]
        answers = dict(zip(cases, render(source, bos, eos, [self._conversation(*case) for case in cases]), strict=True))
        self._turns = {False: self._learn(answers, False)}
        try:
            self._turns[True] = self._learn(answers, True)
            self.folds_system = False
        except TcinferError:
            self.folds_system = True  # it knows no system role: the first message begins with the system prompt
            opening, following, rewrites = self._turns[False]
            at = _place(opening, "user")
            folded = [*opening[:at], Part("", "system"), Part("\n\n"), *opening[at:]]
            self._turns[True] = _Turns(folded, following, rewrites)

    def opening(self, system: bool) -> list[Part]:
        """The first turn, from the beginning to where the answer begins; system: with a system prompt."""
        return self._turns[system].opening

    def next(self, system: bool = False) -> list[Part]:
        """Every later turn, from the end of one answer to where the next begins; system: as in the opening.

        A few templates repeat the system prompt in every turn.
        """
        return self._turns[system].next

    def system_part(self, system: bool = True) -> list[Part]:
        """The opening up to the user's message."""
        opening = self.opening(system)
        return opening[: _place(opening, "user")]

    def rewrites_history(self, system: bool = False) -> bool:
        """Whether it would render earlier turns otherwise than they were when they were new."""
        return self._turns[system].rewrites_history

    def around(self, roles: Sequence[str]) -> list[Part]:
        """What to feed for a whole conversation of messages by these roles, up to the next answer; `who` of a place is
        the message's number as text. Raises TcinferError where the template does not take such a conversation."""
        key = tuple(roles)
        if key not in self._around:
            words = [f"m{secrets.token_hex(8)}" for _ in key]
            answer = render(self._source, self._bos, self._eos, [list(zip(key, words, strict=True))])[0]
            if "error" in answer:
                raise TcinferError(f"the chat template refuses these messages: {answer['error']}")
            text, at = answer["text"], [answer["text"].find(word) for word in words]
            if any(text.count(word) != 1 for word in words) or at != sorted(at):
                raise TcinferError("the chat template leaves out, repeats or moves some of these messages")
            if len(self._around) >= KEPT:
                self._around.clear()
            self._around[key] = _parts(text, {word: str(i) for i, word in enumerate(words)})
        return self._around[key]

    def ends(self, tokenizer: Any, system: bool) -> tuple[list[int], list[str]]:
        """What ends an answer beside the tokenizer's own end tokens: the control token, or else the text, with which
        the template goes on after one."""
        parts = self.next(system)
        literal = "" if not parts or parts[0].who else parts[0].text
        if not literal:
            return [], []
        try:
            ids = tokenizer.encode(literal, special=True, continues=True)
        except TcinferError:  # a template that this vocabulary cannot write shows so at the first turn
            return [], []
        if ids and not tokenizer.decode(ids[:1]):
            return ids[:1], []
        breaks = literal[: len(literal) - len(literal.lstrip("\n"))]
        return [], [breaks if len(breaks) > 1 else literal.strip() or literal]

    def going_on(self, system: bool, stops: Sequence[str], tail: str) -> list[Part]:
        """`next`, without the text that ended the answer, where that has been read already: tail ends with it."""
        parts = self.next(system)
        for stop in stops:
            if tail.endswith(stop):
                text = parts[0].text
                parts = [Part(text[text.index(stop) + len(stop) :], None), *parts[1:]]
        return parts

    def _conversation(self, system: bool, turn: int, kind: str) -> list[tuple[str, str]]:
        return list(zip(_ROLES, self._contents[kind], strict=True))[not system : 2 * turn + 2]

    def _learn(self, answers: Mapping[tuple[bool, int, str], Mapping[str, str]], system: bool) -> _Turns:
        texts: list[str] = []
        same = True
        for turn in range(_TURNS):
            answer, awkward, thoughts = (answers[system, turn, kind] for kind in self._contents)
            if error := answer.get("error") or awkward.get("error"):
                raise _unusable(error)
            text = answer["text"]
            counts = [text.count(word) for word in self._words]
            needed = [0, 1] if system and not turn else [2 * turn + 1]
            if max(counts) > 1 or not all(counts[i] for i in needed):
                raise _unusable("leaves out or repeats what is said")
            if awkward["text"] != self._said(text, "awkward"):
                raise _unusable("changes what is said")
            same &= thoughts == {"text": self._said(text, "thoughts")}
            texts.append(text)
        system_word, word, *_, last_answer, last = self._words
        later = texts[-1].rpartition(last_answer)[2]
        following = _parts(later, {system_word: "system", last: "user"})
        if last not in later or any(said in part.text for part in following for said in self._words):
            raise _unusable("puts messages in another order")
        for turn in range(1, _TURNS):
            before, _, after = texts[turn].rpartition(self._words[2 * turn])
            # White space before an answer is the model's to write.
            same &= before.rstrip() == texts[turn - 1].rstrip()
            same &= after.replace(self._words[2 * turn + 1], last) == later
        return _Turns(_parts(texts[0], {system_word: "system", word: "user"}), following, not same)

    def _said(self, text: str, kind: str) -> str:
        """A rendering of the made-up words with other contents in their places."""
        contents = dict(zip(self._words, self._contents[kind], strict=True))
        return re.sub("|".join(contents), lambda match: contents[match[0]], text)


def fill(parts: Sequence[Part], **said: str | None) -> list[tuple[str, bool]]:
    """Parts with what was said, for `Tokenizer.encode_parts`: control tokens count in the template's text only."""
    return [(said.get(part.who) or "", False) if part.who else (part.text, True) for part in parts]


def render(source: str, bos: str, eos: str, conversations: Sequence[Sequence[tuple[str, str]]]) -> list[dict[str, str]]:
    """Conversations (role, content) up to the next answer: {"text": ...}, or {"error": ...} where one is refused.

    Raises TcinferError where the template takes too much of anything.
    """
    request = {"source": source, "bos": bos, "eos": eos, "conversations": conversations, "seconds": SECONDS}
    command = [sys.executable, "-P", "-m", __name__]
    try:
        child = subprocess.run(command, input=json.dumps(request).encode(), capture_output=True, timeout=START)
        if child.returncode == 0:
            return json.loads(child.stdout)
        why = child.stderr.decode(errors="replace").strip()
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        why = str(error)
    if not why or "Timeout (" in why or why.endswith("MemoryError"):  # not even an error could be said
        raise _unusable(f"takes more than {SECONDS} seconds or {MEMORY >> 20} MiB")
    raise _unusable(f"could not be run: {_line(why.splitlines()[-1])}")


def _parts(text: str, places: Mapping[str, str]) -> list[Part]:
    pieces = re.split(f"({'|'.join(places)})", text)
    return [Part("", places[piece]) if piece in places else Part(piece) for piece in pieces if piece]


def _place(parts: Sequence[Part], who: str) -> int:
    return next(i for i, part in enumerate(parts) if part.who == who)


def _unusable(why: str) -> TcinferError:
    return TcinferError(f"the chat template {why}; --chat-template chatml uses the plain one")


def _line(text: str) -> str:
    """A message that may be anything, as one line."""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())[:200]


def _serve() -> None:
    """The process of its own: a request on stdin, answers on stdout."""
    import faulthandler

    request = json.load(sys.stdin)
    environment = _environment()
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    except (ImportError, ValueError):  # Windows has none; a lower one may be there already
        pass
    faulthandler.dump_traceback_later(request["seconds"], exit=True)  # its thread does not wait for the interpreter
    try:
        template = environment.from_string(request["source"])
    except Exception as error:
        json.dump([{"error": _cause(error)}] * len(request["conversations"]), sys.stdout)
        return
    answers: list[dict[str, str]] = []
    room = ROOM
    for conversation in request["conversations"]:
        try:
            text = template.render(
                messages=[{"role": role, "content": content} for role, content in conversation],
                add_generation_prompt=True,
                tools=None,
                documents=None,
                bos_token=request["bos"],
                eos_token=request["eos"],
            )
            room -= len(text)
            answers.append({"text": text} if room >= 0 else {"error": "writes too much for a few short messages"})
        except Exception as error:
            answers.append({"error": _cause(error)})
    json.dump(answers, sys.stdout)


def _environment() -> Any:
    """Jinja as Hugging Face's apply_chat_template has it."""
    from datetime import datetime

    import jinja2.ext
    import jinja2.sandbox

    now = datetime.now()  # one time for all renderings: they are compared

    class Generation(jinja2.ext.Extension):
        """{% generation %}, which marks answers for training, marks nothing here."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=now.strftime)
    return environment


def _cause(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return f"takes more than {MEMORY >> 20} MiB"
    name = "" if type(error).__name__ == "TemplateError" else f"{type(error).__name__}: "  # raise_exception's
    return f"fails: {_line(name + str(error))}"


if __name__ == "__main__":
    _serve()
