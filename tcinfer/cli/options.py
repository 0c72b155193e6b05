"""Options that several commands take, and what they stand for."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from tcinfer.cli.console import argument, decoded, say
from tcinfer.errors import TcinferError
from tcinfer.sampling import Sampling, bias

if TYPE_CHECKING:
    from tcinfer.api import Model
    from tcinfer.constraint import Constraint
    from tcinfer.session_file import SessionFile

MODEL = click.option("-m", "--model", metavar="MODEL.gguf", help="The model; without it, the bundled one.")
MEMORY = (
    click.option("--memory", metavar="MODE", help="full, window or sinks, in place of the file's own."),
    click.option("--window", type=int, metavar="N", help="Tokens kept exactly."),
    click.option("--sinks", type=int, metavar="N", help="First tokens kept for ever, beside the window."),
)
CACHE_TYPE = click.option("--cache-type", metavar="TYPE", help="Of exact keys and values: f16 (default) or f32.")
RUNNING = (
    click.option("--backend", default="auto", show_default=True, metavar="NAME", help="auto, numpy, numba or cuda."),
    click.option("--threads", type=int, metavar="N", help="Threads; without it, one for each CPU."),
    CACHE_TYPE,
)
CONSTRAINT = (
    click.option(
        "-j", "--json-schema", metavar="SCHEMA", help="The text is JSON that fits this schema ({}: any JSON)."
    ),
    click.option("--json-schema-file", metavar="FILE", help="Likewise, the schema from a file."),
    click.option("--grammar", metavar="TEXT", help="The text follows this grammar (Lark as in llguidance, or GBNF)."),
    click.option("--grammar-file", metavar="FILE", help="Likewise, the grammar from a file."),
)


def together(*options: Any) -> Any:
    """A decorator that gives a command all of these, in this order."""

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


model_options = together(MODEL, *MEMORY, *RUNNING)  # that choose a model and how it runs


class _FilePath(click.ParamType):
    """A path as people write it: `~` is a home, also where no shell has seen to it (--session=~/x.tcs)."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> str:
        from tcinfer.atomic import expanded

        return str(expanded(value))


FILE_PATH = _FilePath()


def load_model(options: dict[str, Any], like: SessionFile | None = None, bounded: str = "") -> Model:
    """The model that these options name; like: with the memory of this session unless they say otherwise.

    bounded: why it gets sinks memory where nobody chose and its own would grow; without it, its own.
    """
    from tcinfer.engine import backend
    from tcinfer.loader import Opened
    from tcinfer.memory import bounded as has_one_size

    runs = backend(options["backend"], options["threads"])
    opened = Opened(options["model"])
    memory = {name: options[name] for name in ("memory", "window", "sinks", "cache_type")}
    had = like.memory_options(opened.config) if like is not None else {}
    if had and options["memory"] in (None, had["memory"]):
        memory = {name: had[name] if value is None else value for name, value in memory.items()}
    elif bounded and options["memory"] is None and not has_one_size(opened.config):
        notice(f"{bounded}: sinks memory is used (--memory full keeps all)")
        memory["memory"] = "sinks"
    return opened.model(runs, **memory, notice=None if options.get("quiet") else notice)


def notice(text: str) -> None:
    """A line on stderr about what is going to take longer."""
    say(f"tcinfer: {text}")


def _sampling_option(f: Any) -> Any:
    several = isinstance(f.default, tuple)
    text = f.metadata["help"]
    return click.option(
        *f.metadata["flags"],
        f.name,
        type=str if several else type(f.default),
        default=None if several else f.default,
        multiple=several,
        show_default=not several,
        metavar=f.metadata["metavar"],
        help=text,
    )


sampling_options = together(*map(_sampling_option, fields(Sampling)))  # how tokens are chosen
stop_option = click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be repeated.")
banned_option = click.option(
    "--banned", multiple=True, metavar="TEXT", help="Text that never comes up; may be repeated."
)


def sampling(options: dict[str, Any]) -> Sampling:
    """What the sampling options say."""
    values = {f.name: options[f.name] for f in fields(Sampling)}
    values["logit_bias"] = [bias(text) for text in values["logit_bias"]]
    breakers = [argument(text) for text in values["dry_sequence_breakers"]]
    values["dry_sequence_breakers"] = breakers or Sampling.dry_sequence_breakers
    return Sampling(**values)


def constraint(options: dict[str, Any], model: Model) -> Constraint | None:
    """What the text must follow, if anything."""
    given = {name: options[name] for name in ("json_schema", "json_schema_file", "grammar", "grammar_file")}
    chosen = [name for name, value in given.items() if value is not None]
    if not chosen:
        return None
    if len(chosen) > 1:
        one, two = (f"--{name.replace('_', '-')}" for name in chosen[:2])
        raise TcinferError(f"{one} and {two} exclude each other")
    from tcinfer.constraint import Constraint

    name = chosen[0]
    text = read_text(given[name]) if name.endswith("_file") else argument(given[name])
    kind = name.removesuffix("_file")
    return Constraint(model.tokenizer, model.config.vocab_size, **{kind: text})


def open_text(path: str) -> BinaryIO:
    """A file of any size, to be read once."""
    try:
        return open(path, "rb")
    except OSError as e:
        raise TcinferError(f"{path}: {e.strerror}") from None


def read_text(path: str) -> str:
    """A whole file's text."""
    try:
        return decoded(Path(path).read_bytes())
    except OSError as e:
        raise TcinferError(f"{path}: {e.strerror}") from None
