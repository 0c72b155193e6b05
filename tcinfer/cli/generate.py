"""`tcinfer generate`."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from tcinfer.cli.console import argument, both, interruptible, invalid, printable, rate, say, stdin_waits
from tcinfer.cli.options import (
    CONSTRAINT,
    FILE_PATH,
    banned_option,
    constraint,
    load_model,
    model_options,
    notice,
    open_text,
    sampling,
    sampling_options,
    stop_option,
    together,
)
from tcinfer.config import check_choice, check_count
from tcinfer.errors import TcinferError
from tcinfer.sampling import strings

if TYPE_CHECKING:
    from tcinfer.api import Session


@click.command()
@model_options
@click.option("-p", "--prompt", metavar="TEXT", help="What to go on from.")
@click.option("-f", "--file", metavar="FILE", help="The prompt is this file's text, of any size.")
@click.option(
    "-s",
    "--session",
    "path",
    type=FILE_PATH,
    metavar="FILE.tcs",
    help="Go on from this session; the file stays as it is.",
)
@click.option("--save", is_flag=True, help="Write the session back to -s FILE.tcs (made if it is not there).")
@click.option("-n", "--max-tokens", type=int, default=256, show_default=True, metavar="N", help="-1: no end.")
@sampling_options
@stop_option
@banned_option
@together(*CONSTRAINT)
@click.option("-q", "--quiet", is_flag=True, help="No figures on stderr.")
@click.option("--stats", metavar="FORMAT", default="text", show_default=True, help="Of the figures: text or json.")
def generate(**options: Any) -> None:
    """Go on from a prompt (-p, -f, or standard input) and stream the text.

    stdout carries the new text alone; the last line on stderr tells tokens, tokens per second, bytes of state, and
    how many tokens lie outside the exact window.

    \b
    Examples:
      tcinfer generate -p "Once upon a time" -n 200 --seed 1
      tcinfer generate -m model.gguf --memory sinks --window 512 < book.txt
      tcinfer generate -m model.gguf -p "A person:" --json-schema-file person.json
      tcinfer generate -s notes.tcs -p "What was the name?" --temp 0
    """
    from tcinfer import session_file
    from tcinfer.atomic import Writer, check_writable

    check_choice("--stats", options["stats"], ("text", "json"))
    check_count("max_tokens", options["max_tokens"], -1)
    how = sampling(options)
    stop, banned = (
        strings(f"{name} strings", [argument(text) for text in options[name]]) for name in ("stop", "banned")
    )
    path = options["path"]
    if options["save"] and path is None:
        raise TcinferError("--save needs the session's file: -s FILE.tcs")
    file = session_file.read(path) if path is not None and not (options["save"] and not os.path.exists(path)) else None
    writer = Writer(path) if options["save"] else None
    prompt = _prompt(options["prompt"], options["file"], file is not None, options["quiet"])
    with prompt as stream, writer or nullcontext():
        model = load_model(options, file)
        session = model.session() if file is None else model.attach(file)
        if options["save"] and file is None:
            session.begins(path)
        follow = constraint(options, model)
        if options["save"]:
            check_writable(Path(path), writer)  # what cannot be written should show before the work
        figures = Figures()
        try:
            _read(session, stream, figures)
            pieces = session.generate(None, options["max_tokens"], how, stop, (), banned, follow)
            _write(pieces, figures)
        finally:
            refused = isinstance(sys.exception(), TcinferError) and not figures.new_tokens
            if options["save"] and session.whole and not refused:
                session.save(path, writer)
            if not options["quiet"] and not refused:  # an error is one line, and nothing beside it
                figures.show(session, options["stats"])


@dataclass
class Figures:
    """What a run took."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    new_tokens: int = 0
    new_seconds: float = 0.0

    def show(self, session: Session, form: str) -> None:
        """One line on stderr."""
        if form == "json":
            place = {"position": session.position, "outside_window": session.outside_window}
            say(json.dumps(asdict(self) | place | {"state_bytes": session.nbytes}))
            return
        config = session.model.config
        outside = f"{session.outside_window:,} tokens outside the exact window of {config.widest.window:,}"
        if not session.model.bounded:
            outside = "the cache grows with every token (--memory window or sinks does not)"
            if session.position > config.context_length > 0:
                outside += f"; the model was trained on {config.context_length:,} tokens at most"
        say(
            f"prompt {self.prompt_tokens:,} tokens, {rate(self.prompt_tokens, self.prompt_seconds)}; "
            f"new {self.new_tokens:,} tokens, {rate(self.new_tokens, self.new_seconds)}; "
            f"state {session.nbytes:,} bytes; {outside}"
        )


def _read(session: Session, stream: BinaryIO, figures: Figures) -> None:
    """Feed a prompt of any size."""
    from tcinfer.progress import bar
    from tcinfer.tokenizer.stream import ids_and_total

    tokenizer, start, first = session.model.tokenizer, time.monotonic(), session.position
    with interruptible() as check, bar("reading the prompt", None) as advance:
        bos = first == 0 and tokenizer.add_bos
        parts = ids_and_total(tokenizer, stream, bos=bos, continues=first > 0, invalid=invalid)
        for part, total in check.waits(parts):
            session.feed(part, progress=partial(both(advance, check), total=total))
            figures.prompt_tokens = session.position - first
            figures.prompt_seconds = time.monotonic() - start


def _write(pieces: Iterator[Any], figures: Figures) -> None:
    """The new text to stdout as it comes."""
    start, terminal = time.monotonic(), sys.stdout.isatty()
    try:
        with interruptible() as check, closing(pieces):  # type: ignore[type-var]
            for piece in pieces:
                sys.stdout.write(printable(piece.text) if terminal else piece.text)
                sys.stdout.flush()
                figures.new_tokens += 1
                check()
    finally:
        figures.new_seconds = time.monotonic() - start
        if sys.stdout.isatty() or sys.stderr.isatty():
            click.echo(err=not sys.stdout.isatty())  # the figures begin on a line of their own


def _prompt(text: str | None, file: str | None, optional: bool, quiet: bool) -> BinaryIO:
    """The prompt's bytes, from where it is given; nothing where that is optional."""
    if text is not None and file is not None:
        raise TcinferError("-p and -f exclude each other")
    if text is not None:
        if not quiet and stdin_waits():
            notice("standard input is not read, for -p gives the prompt")
        return BytesIO(os.fsencode(text))
    if file is not None:
        return open_text(file)
    if sys.stdin is not None and not sys.stdin.isatty():
        return sys.stdin.buffer
    if optional:
        return BytesIO()
    raise TcinferError("no prompt: give -p TEXT or -f FILE, or pipe a text in")
