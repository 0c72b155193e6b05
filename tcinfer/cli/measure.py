"""Commands that measure: bench."""

from __future__ import annotations

from typing import Any

import click

from tcinfer.cli.console import both, interruptible
from tcinfer.cli.options import load_model, model_options


@click.command()
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
    model = load_model(options)
    if options["soak"] is not None:
        check_count("--soak", options["soak"], 1)
        with interruptible() as check, bar("streaming", options["soak"]) as advance:
            text = measuring.soak(model, options["soak"], progress=both(advance, check))
        click.echo(text)
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
