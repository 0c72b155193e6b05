"""Plots of one look, with the extra `plot` (matplotlib)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tcinfer.atomic import check_writable, replacing
from tcinfer.errors import TcinferError

KINDS = (".svg", ".png")


def check(path: Path) -> None:
    """Raise TcinferError, before the long work, where a plot cannot be drawn there."""
    if path.suffix not in KINDS:
        raise TcinferError(f"{path}: a plot's name ends in {' or '.join(KINDS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise TcinferError("plots need matplotlib: pip install 'tcinfer[plot]'") from None
    check_writable(path)


@contextmanager
def axes(path: Path, x: str, y: str) -> Iterator[Any]:
    """matplotlib axes to draw labelled lines on; then the file, SVG or PNG: the same figures give the same bytes."""
    check(path)
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "tcinfer"}):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        it = figure.add_subplot(xlabel=x, ylabel=y)
        yield it
        it.grid(alpha=0.3)
        it.legend()
        undated = {"Date": None} if path.suffix == ".svg" else None
        with replacing(path) as temporary:
            figure.savefig(temporary, format=path.suffix[1:], dpi=150, metadata=undated)
