"""`tcinfer generate`."""

from __future__ import annotations

import sys
import time
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tcinfer.cli.console import argument, decoded, interruptible, rate
from tcinfer.cli.options import load_model, model_options
from tcinfer.errors import TcinferError

if TYPE_CHECKING:
    from tcinfer.session import Session


@click.command()
@model_options
@click.option("-p", "--prompt", metavar="TEXT", help="What to go on from.")
@click.option("-f", "--file", metavar="FILE", help="The prompt is this file's text.")
@click.option("-n", "--max-tokens", type=int, default=256, show_default=True, metavar="N", help="-1: no end.")
@click.option("--temp", type=float, default=0.8, show_default=True, metavar="T", help="0: always the likeliest.")
@click.option("--top-k", type=int, default=40, show_default=True, metavar="K", help="0: off.")
@click.option("--top-p", type=float, default=0.95, show_default=True, metavar="P", help="1: off.")
@click.option("--min-p", type=float, default=0.05, show_default=True, metavar="P", help="0: off.")
@click.option("--seed", type=int, default=-1, show_default=True, metavar="S", help="-1: another text each time.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be repeated.")
def generate(**options: Any) -> None:
    """Go on from a prompt (-p, -f, or standard input) and stream the text.

    stdout carries the new text alone; the last line on stderr tells tokens, tokens per second, bytes of state, and
    how many tokens lie outside the exact window.
    """
    from tcinfer.progress import bar

    model = load_model(options)
    session = model.session()
    ids = model.tokenizer.encode(_prompt(options["prompt"], options["file"]), bos=model.tokenizer.add_bos)
    marks = [time.monotonic()]  # start, then the end of each part of the prompt
    with interruptible() as check, bar("reading the prompt", len(ids)) as advance:

        def progress(n: int) -> None:
            marks.append(time.monotonic())
            del marks[1:-1]
            advance(n)
            check()

        pieces = session.generate(
            ids or None,
            max_tokens=options["max_tokens"],
            temperature=options["temp"],
            top_k=options["top_k"],
            top_p=options["top_p"],
            min_p=options["min_p"],
            seed=options["seed"],
            stop=[argument(text) for text in options["stop"]],
            progress=progress,
        )
        first = next(pieces, None)
    count = 0
    try:
        with interruptible() as check:
            for piece in () if first is None else chain((first,), pieces):
                check()
                sys.stdout.write(piece.text)
                sys.stdout.flush()
                count += 1
    finally:
        if sys.stdout.isatty() or sys.stderr.isatty():
            click.echo(err=not sys.stdout.isatty())  # the figures begin on a line of their own
        _figures(session, len(ids), marks[-1] - marks[0], count, time.monotonic() - marks[-1])


def _prompt(text: str | None, file: str | None) -> str:
    if text is not None and file is not None:
        raise TcinferError("-p and -f exclude each other")
    if text is not None:
        return argument(text)
    if file is not None:
        try:
            return decoded(Path(file).read_bytes())
        except OSError as e:
            raise TcinferError(f"{file}: {e.strerror}") from None
    if sys.stdin is None or sys.stdin.isatty():
        raise TcinferError("no prompt: give -p TEXT or -f FILE, or pipe a text in")
    return decoded(sys.stdin.buffer.read())


def _figures(session: Session, prompt: int, reading: float, new: int, writing: float) -> None:
    config = session.model.config
    outside = f"{session.outside_window:,} tokens outside the exact window of {config.window:,}"
    if not session.model.bounded:
        outside = "the cache grows with every token (--memory window or sinks does not)"
        if session.position > config.context_length > 0:
            outside += f"; the model was trained on {config.context_length:,} tokens at most"
    click.echo(
        f"prompt {prompt:,} tokens, {rate(prompt, reading)}; new {new:,} tokens, {rate(new, writing)}; "
        f"state {session.nbytes:,} bytes; {outside}",
        err=True,
    )
