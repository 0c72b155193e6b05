"""Commands that measure: bench, perplexity."""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from tcinfer.cli.console import both, interruptible, one_line, say
from tcinfer.cli.options import MEMORY, MODEL, RUNNING, load_model, model_options, notice, open_text, together
from tcinfer.errors import TcinferError

if TYPE_CHECKING:
    from tcinfer.api import Model
    from tcinfer.measure.perplexity import Result

SIZED = re.compile(r"([^:]+)(?::(\d{1,10}))?(?::(\d{1,10}))?")  # mode, window, sinks


@click.command()
@model_options
@click.option("-p", "--prompt", type=int, default=512, show_default=True, metavar="N", help="Tokens of the prompt.")
@click.option(
    "-n", "--tokens", type=int, default=128, show_default=True, metavar="N", help="Tokens decoded one by one."
)
@click.option("-d", "--depth", type=int, multiple=True, metavar="N", help="Tokens of context before; may be repeated.")
@click.option("-r", "--rounds", type=int, default=5, show_default=True, metavar="N", help="Figures are medians of N.")
@click.option("-o", "--output", default="md", show_default=True, metavar="FORMAT", help="md or json.")
@click.option("--json", "output", flag_value="json", help="The same as -o json.")
@click.option("--soak", type=int, metavar="N", help="Instead: stream N tokens, speed and memory in ten parts.")
@click.option("--compare", metavar="PEER", help="llama.cpp: the same file there, round by round (llama-cpp-python).")
def bench(**options: Any) -> None:
    """Measure speed, latency and memory, beside the machine's read bandwidth and, if asked, llama.cpp."""
    from tcinfer.config import check_choice, check_count
    from tcinfer.loader import bundled
    from tcinfer.measure import speed as measuring
    from tcinfer.progress import bar

    for name, least in (("prompt", 0), ("tokens", 1), ("rounds", 1)):
        check_count(f"--{name}", options[name], least)
    depths = options["depth"] or (0,)
    for depth in depths:
        check_count("--depth", depth, 0)
    check_choice("--output", options["output"], ("md", "json"))
    if options["compare"] is not None:
        check_choice("--compare", options["compare"], ("llama.cpp",))
    model = load_model(options)
    if options["soak"] is not None:
        check_count("--soak", options["soak"], 1)
        if options["compare"] is not None:
            raise TcinferError("--soak and --compare exclude each other")
        with interruptible() as check, bar("streaming", options["soak"]) as advance:
            soaked = measuring.soak(model, options["soak"], progress=both(advance, check))
        as_json = options["output"] == "json"
        click.echo(json.dumps([row._asdict() for row in soaked]) if as_json else measuring.soak_table(soaked))
        return
    path = options["model"] or str(bundled())
    figures = options["rounds"] * len(depths) * (3 if options["compare"] else 1)
    with interruptible() as check, bar("measuring", figures) as advance:
        report = measuring.run(
            path,
            model,
            options["prompt"],
            options["tokens"],
            depths,
            options["rounds"],
            options["compare"] is not None,
            both(advance, check),
        )
    click.echo(report.markdown() if options["output"] == "md" else report.json())


@click.command()
@together(
    MODEL,
    click.option(
        "--memory",
        multiple=True,
        metavar="MODE",
        help="full, window, sinks or the file's own, or with sizes as window:256, sinks:512:4; may be repeated.",
    ),
    *MEMORY[1:],
    *RUNNING,
)
@click.option("-f", "--file", required=True, metavar="FILE", help="A text of any length; - is standard input.")
@click.option("--limit", type=int, metavar="TOKENS", help="Take no more of the text.")
@click.option("--by-position", is_flag=True, help="Also at 0-1, 1-2, 2-4, 4-8 ... windows from the start.")
@click.option("-o", "--output", default="md", show_default=True, metavar="FORMAT", help="md, csv or json.")
@click.option("--json", "output", flag_value="json", help="The same as -o json.")
@click.option("--plot", metavar="FILE", help="Draw nats per token by position: a name in .svg or .png.")
def perplexity(**options: Any) -> None:
    """Measure how well a text is predicted: nats per token and perplexity.

    Several memories are measured side by side on the same tokens, with their differences from the first. What follows
    a ± is a standard error from the means of one window each, since neighbouring tokens are not independent.

    \b
    Examples:
      tcinfer perplexity -f book.txt --memory tensor --memory window --by-position
      tcinfer perplexity -m model.gguf -f - --memory window:256 --memory sinks:256:4 < book.txt
    """
    from tcinfer.config import check_choice, check_count
    from tcinfer.loader import bundled
    from tcinfer.measure import plot as plotting

    check_choice("--output", options["output"], ("md", "csv", "json"))
    if options["limit"] is not None:
        check_count("--limit", options["limit"], 2)
    plot = Path(options["plot"]) if options["plot"] is not None else None
    if plot is not None:
        plotting.check(plot)
    with _opened(options["file"]) as stream:
        result = _measured(_models(options), stream, options["limit"])
    of = {"model": options["model"] or str(bundled()), "text": options["file"]}
    if options["output"] == "md":
        click.echo(one_line(f"{of['model']} on {of['text']}: {result.whole[0].tokens:,} tokens"))
        click.echo()
        click.echo(result.markdown(options["by_position"]))
    elif options["output"] == "csv":
        click.echo(result.csv(options["by_position"]))
    else:
        click.echo(result.json(options["by_position"], **of))
    if plot is not None:
        result.plot(plot)


def _opened(file: str) -> BinaryIO:
    if file != "-":
        return open_text(file)
    if sys.stdin is None or sys.stdin.isatty():
        raise TcinferError("-f - reads a pipe, and there is none")
    return sys.stdin.buffer


def _models(options: dict[str, Any]) -> dict[str, Model]:
    """A model for each `--memory`, by its name."""
    from tcinfer.measure.perplexity import memory_name

    several = len(options["memory"]) > 1
    chosen = [_sized(text, options, several) for text in options["memory"]] or [options | {"memory": None}]
    models: dict[str, Model] = {}
    for one in chosen:
        model = load_model(one)
        name = memory_name(model.config)
        if name in models:
            raise TcinferError(f"--memory {name} is there twice")
        models[name] = model
    return models


def _sized(text: str, options: dict[str, Any], several: bool) -> dict[str, Any]:
    """The options for one `--memory`; `--window` and `--sinks` are for those of several that can have them."""
    found = SIZED.fullmatch(text)
    if found is None:
        raise TcinferError(f"--memory {text!r}: write a mode, MODE:WINDOW or MODE:WINDOW:SINKS")
    mode, window, sinks = found.groups()
    without = {"full": ("window", "sinks"), "window": ("sinks",)}.get(mode, ()) if several else ()
    own = {name: int(size) for name, size in (("window", window), ("sinks", sinks)) if size}
    return options | dict.fromkeys(without) | own | {"memory": mode}


def _measured(models: dict[str, Model], stream: BinaryIO, limit: int | None) -> Result:
    from tcinfer.measure.perplexity import measure
    from tcinfer.progress import bar
    from tcinfer.tokenizer import stream as text

    tokenizer = next(iter(models.values())).tokenizer
    invalid = cache(partial(say, "tcinfer: the text is not valid UTF-8; what is not was replaced"))  # said once
    ids = partial(text.ids, tokenizer, stream, tokenizer.add_bos, invalid=invalid)
    with interruptible() as check:
        total = None
        if stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            start, total = stream.tell(), 0
            with bar("reading the text", None) as advance:  # to know how long it is, and whether all of it can be
                for part in ids():
                    total += len(part)
                    both(advance, check)(len(part))
                    if limit is not None and total >= limit:
                        total = limit
                        break
            stream.seek(start)
            total = len(models) * max(0, total - 1)
        with bar("scoring", total) as advance:
            return measure(models, ids(), limit, both(advance, check), notice)
