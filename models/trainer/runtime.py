"""What the scripts of the proof share: models opened in tcinfer, and plots of one look."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from tcinfer.errors import TcinferError
from tcinfer.loader import load
from tcinfer.model import Model
from tcinfer.perplexity import check_plot

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
            if first.config.memory in ("full", "window"):
                raise click.ClickException(f"{files[0]}: {first.config.memory} memory cannot be switched off")
            models[OFF] = load(files[0], memory="window")
    words = "Once upon a time, in \u201cthat\u201d old house."
    for name, model in models.items():
        same = model.config.vocab_size == first.config.vocab_size
        if not same or model.tokenizer.encode(words) != first.tokenizer.encode(words):
            raise click.ClickException(f"{name} has another vocabulary than {files[0].stem}")
    return models


@contextmanager
def axes_of(path: Path, x: str, y: str) -> Iterator:
    """Axes to draw lines on; then the file. `check_drawing` comes before the long work."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "tcinfer"}):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.add_subplot(xlabel=x, ylabel=y)
        yield axes
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(path, metadata={"Date": None})


def check_drawing(path: Path | None) -> None:
    """Raises click.ClickException where a plot cannot be drawn there."""
    if path:
        with one_error():
            check_plot(path)
