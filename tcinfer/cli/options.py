"""Options that several commands take, and what they stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from tcinfer.cli.console import say

if TYPE_CHECKING:
    from tcinfer.model import Model

MODEL = click.option("-m", "--model", metavar="MODEL.gguf", help="The model; without it, the bundled one.")
RUNNING = (
    click.option("--memory", metavar="MODE", help="full, window, sinks, infini or tensor, in place of the file's own."),
    click.option("--window", type=int, metavar="N", help="Tokens kept exactly."),
    click.option("--sinks", type=int, metavar="N", help="First tokens kept for ever, beside the window."),
    click.option("--backend", default="auto", show_default=True, metavar="NAME", help="auto, numpy, numba or cuda."),
    click.option("--threads", type=int, metavar="N", help="Threads; without it, one for each CPU."),
    click.option("--cache-type", metavar="TYPE", help="Of exact keys and values: f16 (default) or f32."),
)


def model_options(command: Any) -> Any:
    """The options that choose a model and how it runs."""
    for option in reversed((MODEL, *RUNNING)):
        command = option(command)
    return command


def load_model(options: dict[str, Any]) -> Model:
    """The model that these options name."""
    from tcinfer.loader import load

    return load(
        options["model"],
        backend=options["backend"],
        memory=options["memory"],
        window=options["window"],
        sinks=options["sinks"],
        threads=options["threads"],
        cache_type=options["cache_type"],
        notice=lambda text: say(f"tcinfer: {text}"),
    )
