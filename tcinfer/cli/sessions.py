"""Commands about session files: absorb, session show, diff, fork, verify."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tcinfer.cli.console import invalid, one_line, rate, say, terminated
from tcinfer.cli.options import FILE_PATH, load_model, model_options, open_text
from tcinfer.config import check_number
from tcinfer.errors import TcinferError

if TYPE_CHECKING:
    from tcinfer.session_file import SessionFile

LIVE = 0.3  # seconds without more input after which what is there is taken in


@click.command()
@click.option(
    "-s",
    "--session",
    "path",
    type=FILE_PATH,
    required=True,
    metavar="FILE.tcs",
    help="Gone on with; made if not there.",
)
@click.option("-f", "--file", metavar="FILE", help="Read this; without it, standard input.")
@click.option(
    "--every",
    type=float,
    default=10,
    show_default=True,
    metavar="SECONDS",
    help="Save so often when busy; at a pause anyway.",
)
@click.option("-q", "--quiet", is_flag=True, help="No figures on stderr.")
@model_options
def absorb(path: str, file: str | None, every: float, quiet: bool, **options: Any) -> None:
    """Feed a stream of any length into a session file, saving it as it goes.

    Memory and file stay as small as they are, however long the stream is. Ctrl-C or SIGTERM saves and ends. Ask what
    it read with `tcinfer generate -s FILE.tcs -p "..."`, which leaves the file as it is.

    \b
    Examples:
      tail -f server.log | tcinfer absorb -s log.tcs -m model.gguf
      tcinfer absorb -s book.tcs -m model.gguf --memory sinks --window 512 -f book.txt
    """
    from tcinfer import session_file
    from tcinfer.atomic import Writer
    from tcinfer.progress import bar

    check_number("--every", every, 0)
    found = session_file.read(path) if os.path.exists(path) else None
    if file is None and (sys.stdin is None or sys.stdin.isatty()):
        raise TcinferError("nothing to absorb: give -f FILE, or pipe a text in")
    with open_text(file) if file is not None else sys.stdin.buffer as stream, Writer(path) as writer:
        model = load_model(options, found, bounded="this model's own cache would grow with the stream")
        session = model.session() if found is None else model.attach(found)
        session.save(path, writer)  # what cannot be written should show before hours of reading
        first, start = session.position, time.monotonic()
        signal.signal(signal.SIGTERM, terminated)  # as Ctrl-C: after the pass at hand, and once it is saved
        try:
            with bar("absorbing", None) as advance:
                live = None if file is not None else LIVE
                session.absorb(stream, path, every, live, advance, invalid, writer)
        finally:
            count, seconds = session.position - first, time.monotonic() - start
            refused = isinstance(sys.exception(), TcinferError) and not count
            if refused and found is None:
                os.unlink(path)
            if not quiet and not refused:
                size = os.path.getsize(path)
                say(
                    f"absorbed {count:,} tokens, {rate(count, seconds)}; {path}: {session.position:,} tokens in "
                    f"{size:,} bytes, {session.outside_window:,} of them outside the exact window"
                )


@click.group()
def session() -> None:
    """Look at session files, compare, copy and check them."""


FILE = click.argument("file", type=FILE_PATH, metavar="FILE.tcs")
AS_JSON = click.option("--json", "as_json", is_flag=True, help="The same facts as one JSON object.")


@session.command()
@FILE
@AS_JSON
def show(file: str, as_json: bool) -> None:
    """What a session file holds: its model, its place in the stream, its memory layer by layer."""
    from tcinfer import session_file

    facts = _facts(session_file.read(file))
    if as_json:
        click.echo(json.dumps(facts))
        return
    layers = facts.pop("layers")
    for name, value in facts.items():
        shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        click.echo(f"{name.replace('_', ' '):<22}{one_line(shown)}")
    for layer in layers:
        click.echo(f"  layer {layer['layer']:<14}norm {layer['norm']:.4g}, {layer['saturation']:.0%} saturated")


def _facts(file: SessionFile) -> dict[str, Any]:
    from tcinfer.measure import memory as insight

    config = file.config
    held = config.widest.window + config.widest.sinks if config.widest.window else file.position
    return {
        "file": str(file.path),
        "bytes": file.nbytes,
        "model": f"{config.name or 'without a name'} ({config.arch}, {config.n_layers} layers of {config.d_model})",
        "fingerprint": file.fingerprint.hex()[:16],
        "memory": config.memories,
        "window": config.widest.window,
        "sinks": config.widest.sinks,
        "cache_type": config.cache_type,
        "tokens": file.position,
        "outside_window": max(0, file.position - held),
        "state_bytes": file.state.nbytes,
        "random_numbers": file.draws is not None,
        "layers": [layer._asdict() for layer in insight.layers(config, file.state)],
    }


@session.command()
@FILE
@click.argument("other", type=FILE_PATH, metavar="OTHER.tcs")
@AS_JSON
def diff(file: str, other: str, as_json: bool) -> None:
    """How far two sessions of one model are from each other: tokens, then each layer's arrays."""
    import numpy as np

    from tcinfer import session_file

    one, two = session_file.read(file), session_file.read(other)
    if one.fingerprint != two.fingerprint or one.config != two.config:
        raise TcinferError(f"{one_line(file)} and {one_line(other)} are of different models or memory options")
    apart = []
    if one.state.layout == two.state.layout:
        for (layer, name, a), (_, _, b) in zip(
            session_file.arrays(one.state), session_file.arrays(two.state), strict=True
        ):
            x, y = a.astype(np.float64), b.astype(np.float64)
            if distance := float(np.linalg.norm(x - y)):
                size = max(float(np.linalg.norm(x)), float(np.linalg.norm(y)))
                apart.append({"layer": layer, "name": name, "apart": distance / size})
    same = one.position == two.position and bool((one.ring == two.ring).all())
    same = same and one.state.layout == two.state.layout and not apart
    if as_json:
        click.echo(json.dumps({"tokens": [one.position, two.position], "same": same, "arrays": apart}))
        return
    click.echo(f"{'tokens':<22}{one.position:,} and {two.position:,}")
    for array in apart:
        click.echo(f"  layer {array['layer']:<3} {array['name']:<11}{array['apart']:.3g} of its length apart")
    click.echo("the same state" if same else "different states")


@session.command()
@FILE
@click.argument("copy", type=FILE_PATH, metavar="NEW.tcs")
def fork(file: str, copy: str) -> None:
    """Copy a session file, whole or not at all, once it has been checked."""
    from tcinfer import atomic, session_file

    found = session_file.read(file)
    if os.path.exists(copy):
        raise TcinferError(f"{one_line(copy)}: is there already; choose another name, or remove it")
    atomic.copy(Path(file), Path(copy))
    click.echo(f"{one_line(copy)}: {found.position:,} tokens in {found.nbytes:,} bytes")


@session.command()
@FILE
@click.option("-m", "--model", metavar="MODEL.gguf", help="Also check that it goes on in this model.")
def verify(file: str, model: str | None) -> None:
    """Check every byte of a session file; with -m, also that it goes on in that model."""
    from tcinfer import session_file
    from tcinfer.engine import backend
    from tcinfer.loader import Opened

    found = session_file.read(file)
    fits = ""
    if model is not None:
        opened = Opened(model)
        asked = found.memory_options(opened.config)
        opened.model(backend("numpy"), **asked).attach(found)
        fits = f"; it goes on in {one_line(model)}"
    click.echo(f"{one_line(file)}: whole, {found.position:,} tokens in {found.nbytes:,} bytes{fits}")
