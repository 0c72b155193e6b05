"""The command line: glue only. stdout carries results, stderr everything else."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from tcinfer import __version__
from tcinfer.errors import TcinferError

if TYPE_CHECKING:
    from tcinfer.model import Model
    from tcinfer.session import Session

INTERRUPTED = 130  # exit status after Ctrl-C
TERMINATED = 143  # after SIGTERM
LONGEST_LINE = 5000  # characters of an error; the longest path has 4096


def main() -> None:
    """The `tcinfer` command: one line on stderr and status 1 for every error of the user's, never a traceback."""
    status = 1
    try:
        _use_utf8()
        # not cli(): it has an exit status and a line of its own for a closed pipe and for Ctrl-C
        with cli.make_context("tcinfer", sys.argv[1:]) as context:
            cli.invoke(context)
        sys.stdout.flush()
        status = 0
    except click.exceptions.Exit as e:  # --help, --version
        status = e.exit_code
    except click.ClickException as e:  # no such option, no number where one is needed
        command = e.ctx.command_path if isinstance(e, click.UsageError) and e.ctx else "tcinfer"
        _complain(f"{e.format_message()} See: {command} --help")
    except TcinferError as e:
        _complain(str(e))
    except (KeyboardInterrupt, click.Abort):
        status = INTERRUPTED
    except BrokenPipeError:  # the reader has had enough (`| head`): that is no error
        status = 0
    except OSError as e:  # a full disk under stdout, a path that no system takes
        _complain(f"{e.filename or 'the output cannot be written'}: {e.strerror}")
    except MemoryError:
        _complain("this machine has not enough memory for that")
    _close_stdout()
    sys.exit(status)


def _use_utf8() -> None:
    """Text is UTF-8 whatever the locale says."""
    if sys.stdout is None:  # the shell's >&-
        raise TcinferError("standard output is closed")
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="replace", newline="")


def _complain(text: str) -> None:
    """An error on one line of stderr, whatever a name from a file holds."""
    click.echo(f"tcinfer: {one_line(text)}", err=True)


def one_line(text: str) -> str:
    """`text` of a bearable length, without line ends and what else could move a terminal's cursor."""
    text = text if len(text) <= LONGEST_LINE else text[:LONGEST_LINE] + "..."
    return "".join(c if c.isprintable() else "?" for c in text)


def _close_stdout() -> None:
    """Leave nothing for the interpreter to complain of when stdout cannot take what is left."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="tcinfer %(version)s")
def cli() -> None:
    """Run Tensor Cache transformers, and plain Llama-family models, in memory that does not grow."""


def model_options(command: Any) -> Any:
    """The options that choose a model and how it runs."""
    for option in reversed(
        (
            click.option("-m", "--model", metavar="MODEL.gguf", help="The model; without it, the bundled one."),
            click.option(
                "--memory", metavar="MODE", help="full, window, sinks, infini or tensor, in place of the file's own."
            ),
            click.option("--window", type=int, metavar="N", help="Tokens kept exactly."),
            click.option("--sinks", type=int, metavar="N", help="First tokens kept for ever, beside the window."),
            click.option(
                "--backend", default="auto", show_default=True, metavar="NAME", help="auto, numpy, numba or cuda."
            ),
            click.option("--threads", type=int, metavar="N", help="Threads; without it, one for each CPU."),
            click.option("--cache-type", metavar="TYPE", help="Of exact keys and values: f16 (default) or f32."),
        )
    ):
        command = option(command)
    return command


def _load(options: dict[str, Any]) -> Model:
    from tcinfer.loader import load

    return load(
        options["model"],
        backend=options["backend"],
        memory=options["memory"],
        window=options["window"],
        sinks=options["sinks"],
        threads=options["threads"],
        cache_type=options["cache_type"],
        notice=lambda text: click.echo(f"tcinfer: {text}", err=True),
    )


@cli.command()
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

    model = _load(options)
    session = model.session()
    ids = model.tokenizer.encode(_prompt(options["prompt"], options["file"]), bos=model.tokenizer.add_bos)
    marks = [time.monotonic()]  # start, then the end of each part of the prompt
    with _interruptible() as check, bar("reading the prompt", len(ids)) as advance:

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
            stop=[_utf8(text) for text in options["stop"]],
            progress=progress,
        )
        first = next(pieces, None)
    count = 0
    try:
        with _interruptible() as check:
            for piece in () if first is None else chain((first,), pieces):
                check()
                sys.stdout.write(piece.text)
                sys.stdout.flush()
                count += 1
    finally:
        if sys.stdout.isatty() or sys.stderr.isatty():
            click.echo(err=not sys.stdout.isatty())  # the figures begin on a line of their own
        _figures(session, len(ids), marks[-1] - marks[0], count, time.monotonic() - marks[-1])


@contextmanager
def _interruptible() -> Iterator[Callable[[], None]]:
    """Ctrl-C takes effect at the next call of what this yields; a second one at once.

    Between tokens, because a KeyboardInterrupt in the middle of one may land where it is swallowed: Numba compiles
    through callbacks that print exceptions and go on.
    """
    hits: list[int] = []

    def handler(signum: int, _: object) -> None:
        hits.append(signum)
        if len(hits) > 1:
            raise KeyboardInterrupt

    def check() -> None:
        if hits:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield check
        check()
    finally:
        signal.signal(signal.SIGINT, before)


def _prompt(text: str | None, file: str | None) -> str:
    if text is not None and file is not None:
        raise TcinferError("-p and -f exclude each other")
    if text is not None:
        return _utf8(text)
    if file is not None:
        try:
            return _decoded(Path(file).read_bytes())
        except OSError as e:
            raise TcinferError(f"{file}: {e.strerror}") from None
    if sys.stdin is None or sys.stdin.isatty():
        raise TcinferError("no prompt: give -p TEXT or -f FILE, or pipe a text in")
    return _decoded(sys.stdin.buffer.read())


def _utf8(argument: str) -> str:
    return _decoded(os.fsencode(argument))


def _decoded(data: bytes) -> str:
    """Bytes are UTF-8 whatever the locale says."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        click.echo("tcinfer: the text given is not valid UTF-8; what is not was replaced", err=True)
        return data.decode(errors="replace")


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


def rate(tokens: int, seconds: float) -> str:
    """Tokens per second, for people."""
    return f"{tokens / seconds:,.1f} tokens/s" if seconds > 0 and tokens else "no time"


@cli.command()
@click.argument("checkpoint", metavar="CKPT")
@click.option("-o", "--output", metavar="OUT.gguf", help="Without it, CKPT's name and type in this folder.")
@click.option(
    "--outtype",
    default="f16",
    show_default=True,
    metavar="TYPE",
    help="f32, f16, bf16, q8_0, q4_0, q4_1, q5_0 or q5_1. Gates, decays and rates always stay f32.",
)
@click.option("--tokenizer", metavar="FILE", help="Without it, the one that lies beside the checkpoint.")
@click.option("--verify/--no-verify", default=None, help="Decode from both and compare; on below 1 GiB.")
def convert(checkpoint: str, output: str | None, outtype: str, tokenizer: str | None, verify: bool | None) -> None:
    """Convert a checkpoint (ckpt.pt, or a Hugging Face folder) to GGUF. Needs no PyTorch."""
    from tcinfer import converters
    from tcinfer.converters import write

    if outtype not in write.OUTTYPES:
        raise TcinferError(f"--outtype {outtype!r} is not one of {', '.join(write.OUTTYPES)}")
    path = Path(checkpoint)
    name = path.resolve().name if os.path.isdir(path) else path.stem
    out = Path(output or f"{name}-{outtype}.gguf")
    words = Path(tokenizer) if tokenizer else None
    signal.signal(signal.SIGTERM, _terminated)  # so that what is half-written is removed
    source, written, found = converters.convert(path, out, outtype, words, verify)
    for note in source.notes:
        click.echo(f"not used: {one_line(note)}", err=True)
    if written.fallback:
        click.echo(f"kept in F16, rows no multiple of the block: {', '.join(written.fallback)}", err=True)
    which = f"tokenizer: {found}" if found else "no tokenizer found: the file takes ids alone (--tokenizer FILE)"
    click.echo(one_line(which), err=True)
    kinds = ", ".join(f"{n} {kind}" for kind, n in written.kinds.items())
    click.echo(f"{out}: {written.nbytes:,} bytes; {source.config.memory} memory; tensors: {kinds}")
    if written.verified:
        worst, largest, count = written.verified
        click.echo(
            f"verified on {count} tokens: logits differ from the checkpoint's by at most {worst:.3g} (the largest is "
            f"{largest:.3g}); that is what {outtype} costs"
        )


def _terminated(*_: Any) -> NoReturn:
    sys.exit(TERMINATED)


@cli.command()
@click.argument("model", metavar="[MODEL.gguf]", required=False)
def inspect(model: str | None) -> None:
    """Show what a model file holds (the bundled one's, without a name): shape, memory, state, weights."""
    from tcinfer.inspect import report

    click.echo(report(model))


@cli.command()
@model_options
@click.option("-p", "--prompt", type=int, default=512, show_default=True, metavar="N", help="Tokens of the prompt.")
@click.option(
    "-n", "--tokens", type=int, default=128, show_default=True, metavar="N", help="Tokens decoded one by one."
)
@click.option("-d", "--depth", type=int, multiple=True, metavar="N", help="Tokens of context before; may be repeated.")
@click.option("-r", "--rounds", type=int, default=5, show_default=True, metavar="N", help="Figures are medians of N.")
@click.option("-o", "--output", default="md", show_default=True, metavar="FORMAT", help="md or json.")
@click.option("--soak", type=int, metavar="N", help="Instead: stream N tokens, speed and memory in ten parts.")
@click.option("--compare", metavar="PEER", help="llama.cpp: the same file there, round by round (llama-cpp-python).")
def bench(**options: Any) -> None:
    """Measure speed, latency and memory, beside the machine's read bandwidth and, if asked, llama.cpp."""
    from tcinfer import bench as measuring
    from tcinfer.config import check_choice, check_count
    from tcinfer.loader import bundled
    from tcinfer.progress import bar

    for name, least in (("prompt", 0), ("tokens", 1), ("rounds", 1)):
        check_count(f"--{name}", options[name], least)
    depths = options["depth"] or (0,)
    for depth in depths:
        check_count("--depth", depth, 0)
    check_choice("--output", options["output"], ("md", "json"))
    check_choice("--compare", options["compare"], (None, "llama.cpp"))
    model = _load(options)
    if options["soak"] is not None:
        check_count("--soak", options["soak"], 1)
        with _interruptible() as check, bar("streaming", options["soak"]) as advance:
            text = measuring.soak(model, options["soak"], progress=_both(advance, check))
        click.echo(text)
        return
    path = options["model"] or str(bundled())
    figures = options["rounds"] * len(depths) * (3 if options["compare"] else 1)
    with _interruptible() as check, bar("measuring", figures) as advance:
        report = measuring.run(
            path,
            model,
            options["prompt"],
            options["tokens"],
            depths,
            options["rounds"],
            options["compare"] is not None,
            _both(advance, check),
        )
    click.echo(report.markdown() if options["output"] == "md" else report.json())


def _both(advance: Callable[[int], None], check: Callable[[], None]) -> Callable[[int], None]:
    """Progress that Ctrl-C can end."""

    def progress(n: int) -> None:
        advance(n)
        check()

    return progress


@cli.command()
def warmup() -> None:
    """Compile everything for this CPU now, so that no first run waits for it."""
    from tcinfer.loader import operators
    from tcinfer.progress import bar

    operators("numba", None)  # or the reason why there is none
    from tcinfer.kernels import cpu
    from tcinfer.kernels.cpu.jit import cache_folder

    steps = cpu.warm_up()
    total = next(steps)
    with bar("compiling", total) as advance:
        for _ in steps:
            advance(1)
    where = cache_folder()
    click.echo(
        f"{total} operators ready in {where}" if where else "compiled, but there is no private folder to keep it in"
    )
