"""What the scripts of the proof share: models opened in tcinfer, and its errors."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from tcinfer.api import Model
from tcinfer.errors import TcinferError
from tcinfer.loader import load

OFF = "memory off"  # the name of the first model without its memory


@contextmanager
def one_error() -> Iterator[None]:
    """tcinfer's errors as click's: one line, exit status 1."""
    try:
        yield
    except TcinferError as e:
        raise click.ClickException(str(e)) from None


def open_models(files: tuple[Path, ...], off: bool) -> dict[str, Model]:
    """Models of one vocabulary by the names of their files; off: at the end, the first one's with the window alone."""
    if len({file.stem for file in files}) < len(files):
        raise click.ClickException("two files have one name, and the columns are named after them: rename one")
    with one_error():
        models = {file.stem: load(file) for file in files}
        first = next(iter(models.values()))
        if off:
            if first.config.memories in ("full", "window"):
                raise click.ClickException(f"{files[0]}: {first.config.memories} memory cannot be switched off")
            models[OFF] = load(files[0], memory="window")
    words = "Once upon a time, in \u201cthat\u201d old house."
    for name, model in models.items():
        same = model.config.vocab_size == first.config.vocab_size
        if not same or model.tokenizer.encode(words) != first.tokenizer.encode(words):
            raise click.ClickException(f"{name} has another vocabulary than {files[0].stem}")
    return models
