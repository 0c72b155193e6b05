"""The terminal of a chat: lines in, answers out, and the commands that begin with a slash."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import fields, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from tcinfer.chat import store
from tcinfer.chat.conversation import Conversation
from tcinfer.chat.launch import Chats
from tcinfer.cli.console import both, complain, interruptible, note, printable, say
from tcinfer.cli.screen import Wrapped, unechoed
from tcinfer.errors import TcinferError
from tcinfer.progress import bar
from tcinfer.sampling import Sampling, parsed
from tcinfer.sampling.choose import Draws

if TYPE_CHECKING:
    from tcinfer.generation import Piece
    from tcinfer.progress import Progress

BLOCK = '"""'  # opens and closes a message of several lines
HISTORY = "history"  # of lines typed, beside the conversations


class Command(NamedTuple):
    """What a slash stands for."""

    run: Callable[[Repl, str], None]
    usage: str
    text: str


class Repl:
    """One person at one terminal (or a pipe: then each line is a message, and an error ends it)."""

    def __init__(self, chats: Chats, conversation: Conversation, unsaved: bool = False) -> None:
        """unsaved: the conversations go with the program."""
        self.chats, self.conversation = chats, conversation
        self._files: list[Path] = []  # that go before the next message
        self._rate = ""
        self._unsaved = unsaved
        self.person = sys.stdin.isatty() and sys.stdout.isatty()
        self.done = False

    def run(self) -> None:
        """Until the person leaves, or the pipe ends."""
        for line, block in self._lines():
            try:
                self._take(line, block)
            except TcinferError as e:
                if not self.person:
                    raise
                complain(str(e))
            except KeyboardInterrupt:
                note("interrupted; the conversation is as it was")
                if not self.person:
                    raise
            if self.done:
                return

    def _take(self, line: str, block: bool) -> None:
        """A command, or a message; what stands in a block is a message."""
        if line.startswith("/") and not line.startswith("//") and not block:
            name, _, rest = line.partition(" ")
            command = COMMANDS.get(name)
            if command is None:
                raise TcinferError(f"{name} is no command; /help lists them (// begins a message with a slash)")
            command.run(self, rest.strip())
        elif line.strip() or self._files:
            message = line[1:] if line.startswith("//") and not block else line
            files, self._files = self._files, []
            try:
                self._stream(lambda progress: self.conversation.ask(message, files, progress))
            except (TcinferError, KeyboardInterrupt):
                if files:
                    note(f"not read: {', '.join(map(str, files))}; /read them again if you want to")
                raise

    def _stream(self, answer_of: Callable[[Progress], Iterator[Piece]]) -> None:
        """Show an answer as it comes; Ctrl-C stops it, and what was said stays said.

        Raises KeyboardInterrupt where it came before the answer began: then there is no turn.
        """
        count, began, start = 0, False, time.monotonic()
        shown: TextIO | Wrapped = Wrapped(sys.stdout) if self.person else sys.stdout
        try:
            with interruptible(patient=True) as check, unechoed() if self.person else nullcontext():
                with bar("reading", None) as advance:
                    answer = answer_of(both(advance, check))
                    first = next(answer, None)
                    began = True
                start = time.monotonic()
                with closing(answer):  # type: ignore[type-var]
                    for piece in chain(() if first is None else (first,), answer):
                        shown.write(printable(piece.text))
                        shown.flush()
                        count += 1
                        check()
        except KeyboardInterrupt:
            if not began:
                raise
            self._end_answer(shown)
            note("(stopped)")
        except TcinferError:  # its line begins at the left
            if count:
                self._end_answer(shown)
            raise
        else:
            self._end_answer(shown)
            if self.conversation.cut and self.person:
                note(f"(cut off after {self.conversation.max_tokens:,} tokens; /set max-tokens N allows more)")
        seconds = time.monotonic() - start
        self._rate = f"{count / seconds:,.0f} tokens/s" if seconds > 0 and count > 1 else ""

    @staticmethod
    def _end_answer(shown: TextIO | Wrapped) -> None:
        shown.write("\n")
        shown.flush()

    def _lines(self) -> Iterator[tuple[str, bool]]:
        """Messages and commands, each whole, and whether it came as a block."""
        read = self._prompt() if self.person else _piped
        while True:
            try:
                line = read("> ")
            except KeyboardInterrupt:
                if not self.person:
                    raise
                note("/exit or Ctrl-D leaves")
                continue
            except EOFError:
                return
            try:
                while line.lstrip().startswith(BLOCK) and (line.count(BLOCK) < 2 or not line.rstrip().endswith(BLOCK)):
                    line += "\n" + read(". ")
            except KeyboardInterrupt:
                continue
            except EOFError:  # of a pipe that ends within a block
                line += BLOCK
            text = line.strip()
            block = text.startswith(BLOCK) and len(text) >= 2 * len(BLOCK)
            yield (text[len(BLOCK) : -len(BLOCK)].strip("\n") if block else line), block

    def _prompt(self) -> Callable[[str], str]:
        """Line editing with a history and a status line."""
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.history import FileHistory
        from prompt_toolkit.key_binding import KeyBindings

        keys = KeyBindings()

        @keys.add("escape", "enter")
        def _(event: Any) -> None:  # Alt-Enter: another line of the same message
            event.current_buffer.insert_text("\n")

        path = self.chats.folder / HISTORY
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))  # private before the library writes to it
        completer = WordCompleter(list(COMMANDS), sentence=True)
        session: Any = PromptSession(
            history=FileHistory(str(path)),
            bottom_toolbar=self.status,
            key_bindings=keys,
            completer=completer,
            complete_while_typing=False,
        )
        return lambda mark: session.prompt([("bold", mark)])

    def status(self) -> str:
        """The line below the prompt."""
        session = self.conversation.session
        outside = f"{session.outside_window:,} outside the exact window"
        if not session.model.bounded:
            outside = "the cache grows"
        parts = [self.conversation.log.name, f"{session.position:,} tokens", outside, f"state {size(session.nbytes)}"]
        return " | ".join(part for part in (*parts, self._rate) if part)

    # Commands, each with the rest of its line

    def _help(self, _: str) -> None:
        for command in dict.fromkeys(COMMANDS.values()):
            say(f"  {command.usage:<22}{command.text}")
        say(f"  {BLOCK} ... {BLOCK}           a message of several lines; so does Alt-Enter")
        say("  Ctrl-C                stops an answer; Ctrl-D leaves")

    def _system(self, text: str) -> None:
        if not text:
            say(self.conversation.system or "no system prompt")
            return
        self._goes_to(lambda: self.chats.begin(text))
        note(f"a new conversation, {self.conversation.log.name}, with this system prompt")

    def _clear(self, _: str) -> None:
        before = self.conversation.log.name if self.conversation.log.kept else None
        self._goes_to(lambda: self.chats.begin(self.conversation.system))
        back = f"; /switch {before} goes back" if before else ""
        note(f"a new conversation, {self.conversation.log.name}{back}")

    def _regen(self, _: str) -> None:
        self._stream(self.conversation.again)

    def _undo(self, text: str) -> None:
        count = 0
        try:
            quiet = unechoed() if self.person else nullcontext()
            with interruptible(patient=True) as check, quiet, bar("reading", None) as advance:
                count = self.conversation.undo(whole(text or "1", "/undo"), both(advance, check))
        except KeyboardInterrupt:
            if not count:  # else it came too late
                raise
        note(f"took back {count} turn{'s' * (count > 1)}; {self.conversation.turns} left")

    def _fork(self, name: str) -> None:
        self.conversation.fork(needed(name, "/fork NAME"))
        note(f"{name} is as this conversation is now; /switch {name} goes there")

    def _switch(self, name: str) -> None:
        name = needed(name, "/switch NAME")
        if name == self.conversation.log.name:
            raise TcinferError(f"this is {name!r} already")
        self._goes_to(lambda: self.chats.resume(name))
        self._where()

    def _sessions(self, _: str) -> None:
        for name in store.names(self.chats.folder):
            here = "*" if name == self.conversation.log.name else " "
            say(f"{here} {name:<28}{store.summary(self.chats.folder, name)}")

    def _delete(self, name: str) -> None:
        name = needed(name, "/delete NAME")
        if name == self.conversation.log.name:
            raise TcinferError(f"this is {name!r}: /clear or /switch first")
        store.delete(self.chats.folder, name)
        note(f"{name} is gone")

    def _save(self, path: str) -> None:
        if not path and self._unsaved:
            raise TcinferError("this chat keeps nothing (--no-save); /save FILE.tcs writes a session file")
        if not path:
            say(f"saved after every turn: {self.conversation.log.session_path}")
            return
        path = os.path.expanduser(path)
        say(f"{path}: {self.conversation.session.save(path):,} bytes")

    def _load(self, path: str) -> None:
        path = needed(path, "/load FILE.tcs")
        self._goes_to(lambda: self.chats.begin(self.conversation.system, base=Path(path)))
        self._where()

    def _read(self, path: str) -> None:
        file = Path(needed(path, "/read FILE"))
        if not file.is_file():
            raise TcinferError(f"{file}: no such file")
        self.conversation.check_file(file)
        self._files.append(file)
        note(f"{file} ({file.stat().st_size:,} bytes) goes before your next message")

    def _memory(self, _: str) -> None:
        from tcinfer.measure import memory as insight

        conversation, config = self.conversation, self.conversation.model.config
        session = conversation.session
        held = session.position - session.outside_window
        say(f"window: {held:,} tokens held exactly, {session.outside_window:,} outside; {size(session.nbytes)}")
        layers = insight.layers(config, session.state.on_host())
        if not layers:
            say(f"{config.memories} memory has no second level: the window's share of every answer is 100%")
            return
        last = conversation.last_answer()
        shares = insight.shares(session.model, *last) if last is not None else {}
        for layer in layers:
            share = shares.get(layer.layer)
            came = f", last turn: window {1 - share:.0%}, memory {share:.0%}" if share is not None else ""
            say(f"  layer {layer.layer:<4} norm {layer.norm:<8.3g} {layer.saturation:.0%} saturated{came}")

    def _set(self, text: str) -> None:
        name, _, value = text.partition(" ")
        options = {f.metadata["flags"][-1].lstrip("-"): f.name for f in fields(Sampling)}
        how = self.conversation.sampling
        if not name:
            for flag, field in options.items():
                say(f"  {flag:<24}{getattr(how, field)!r}")
            say(f"  {'max-tokens':<24}{self.conversation.max_tokens}")
        elif name == "max-tokens" and not value:
            say(f"  {name:<24}{self.conversation.max_tokens}")
        elif name == "max-tokens":
            self.conversation.max_tokens = whole(value, "/set max-tokens", least=-1)
        elif name in options and not value:
            say(f"  {name:<24}{getattr(how, options[name])!r}")
        elif name in options:
            how = replace(how, **{options[name]: parsed(options[name], value)})
            self.conversation.sampling = self.chats.sampling = how
            if name == "seed":
                self.conversation.session.draws = Draws.of(how)
        else:
            raise TcinferError(f"there is no setting {name!r}; /set lists them, /set NAME VALUE changes one")

    def _exit(self, _: str) -> None:
        self.done = True

    def _goes_to(self, make: Callable[[], Conversation]) -> None:
        """Another conversation in place of this one, which stays as it is if there is none."""
        new = make()
        old = self.conversation
        new.max_tokens, new.stop, new.banned = old.max_tokens, old.stop, old.banned
        old.close()
        self.conversation, self._files = new, []

    def greet(self) -> None:
        """What runs, and what it takes, before the first word."""
        config, session = self.conversation.model.config, self.conversation.session
        window = f", window {config.widest.window:,}" if config.widest.window else ""
        sinks = f", {config.widest.sinks:,} first tokens kept" if config.widest.sinks else ""
        bound = "whatever the length" if session.model.bounded else "and it grows with every token"
        name = " ".join(printable(config.name or config.arch).split())
        say(f"{name}: {config.memories} memory{window}{sinks}; {size(session.nbytes)}, {bound}")
        note("/help lists the commands, Ctrl-C stops an answer, /exit or Ctrl-D leaves")
        if self._unsaved:
            note("nothing of this chat is kept")
        if session.position:
            self._where()

    def _where(self) -> None:
        """Where the conversation stands."""
        note(self.status())
        if text := self.conversation.last_text():
            note(f"the last answer was: {printable(' '.join(text.split()))[:200]}")


COMMANDS = {
    "/help": Command(Repl._help, "/help", "this list"),
    "/system": Command(Repl._system, "/system [TEXT]", "a new conversation with this system prompt; alone: shows it"),
    "/regen": Command(Repl._regen, "/regen", "another answer to the last message"),
    "/undo": Command(Repl._undo, "/undo [N]", "take back the last turn, or the last N"),
    "/fork": Command(Repl._fork, "/fork NAME", "keep a copy of this conversation under another name"),
    "/switch": Command(Repl._switch, "/switch NAME", "go on with another conversation"),
    "/sessions": Command(Repl._sessions, "/sessions", "all conversations, the latest first"),
    "/delete": Command(Repl._delete, "/delete NAME", "remove another conversation and its files"),
    "/save": Command(Repl._save, "/save [FILE.tcs]", "a session file; alone: where this is saved after every turn"),
    "/load": Command(Repl._load, "/load FILE.tcs", "a new conversation that goes on from a session file"),
    "/read": Command(Repl._read, "/read FILE", "a file's text, of any length, goes before the next message"),
    "/memory": Command(Repl._memory, "/memory", "what the memory holds, and its share in the last turn"),
    "/set": Command(Repl._set, "/set [NAME VALUE]", "an option of sampling, such as temp 0.5; alone: all of them"),
    "/clear": Command(Repl._clear, "/clear", "a new conversation; this one is kept"),
    "/exit": Command(Repl._exit, "/exit", "leave; `tcinfer chat --continue` comes back"),
}
COMMANDS["/bye"] = COMMANDS["/quit"] = COMMANDS["/exit"]


def _piped(_: str) -> str:
    """A line of a pipe."""
    line = sys.stdin.buffer.readline()
    if not line:
        raise EOFError
    return line.decode(errors="replace").rstrip("\r\n")


def size(nbytes: int) -> str:
    """Bytes for people."""
    return f"{nbytes / 1e6:,.1f} MB" if nbytes >= 1e5 else f"{nbytes:,} bytes"


def needed(text: str, usage: str) -> str:
    if not text:
        raise TcinferError(f"{usage}: what is missing is the name")
    return os.path.expanduser(text)


def whole(text: str, usage: str, least: int = 1) -> int:
    """A whole number. Raises TcinferError."""
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise TcinferError(f"{usage} takes a whole number from {least}, not {text[:40]!r}")
    return number
