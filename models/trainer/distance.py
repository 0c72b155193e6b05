"""How well models predict whole books, by the distance from the beginning: nats per token, averaged over books.

    python models/trainer/distance.py tensor.gguf window.gguf full.gguf --books books/valid --limit 100000

The command `tcinfer perplexity --by-position` for many books and several files at once, all on the same tokens. Errors
are standard errors over books (or their parts), as is the error of a difference to the first file.
"""

import json
import math
from pathlib import Path

import click
from runtime import one_error, open_models

from tcinfer.api import Model
from tcinfer.measure.perplexity import WHOLE, measure
from tcinfer.measure.plot import axes, check
from tcinfer.progress import bar

Bins = dict[str, dict[str, list[tuple[int, float]]]]  # bin -> model -> (tokens, nats per token) of each book


def read(models: dict[str, Model], books: list[Path], limit: int, cut: int) -> tuple[Bins, dict[str, int]]:
    """Each model on each book, or on each part of `cut` tokens, from an empty state; and its bytes at the end."""
    bins: Bins = {}
    said: set[str] = set()
    encode = next(iter(models.values())).tokenizer
    texts = [encode.encode(book.read_text(encoding="utf-8")) for book in books]
    if cut:
        texts = [ids[at : at + cut] for ids in texts for at in range(0, len(ids) - cut + 1, cut)]
    if not texts:
        raise click.ClickException(f"no text of --cut {cut} tokens")
    with bar("reading", sum(min(len(ids), limit) for ids in texts) * len(models)) as advance:
        for ids in texts:
            result = measure(models, [[encode.bos_id, *ids]], limit, advance, said.add)
            for rows in (*result.bins, result.whole):
                for row in rows:
                    bins.setdefault(row.windows, {}).setdefault(row.memory, []).append((row.tokens, row.nll))
    for text in said:
        click.echo(text, err=True)
    return bins, result.state_bytes


def shown(values: list[tuple[int, float]], form: str) -> str:
    """The mean and its error, which one book alone does not tell."""
    m, error = mean(values)
    return form.format(m) + (f" ± {error:.4f}" if len(values) > 1 else "")


def mean(values: list[tuple[int, float]]) -> tuple[float, float]:
    """The mean over tokens, and its error from the books: sum n_j x_j / n, sqrt(K/(K-1) sum (n_j (x_j - m))^2) / n."""
    n, K = sum(count for count, _ in values), len(values)
    m = sum(count * x for count, x in values) / n
    spread = sum((count * (x - m)) ** 2 for count, x in values)
    return m, math.sqrt(spread * K / max(1, K - 1)) / n


def table(bins: Bins) -> str:
    """A row for each bin; the first model's figure, and of the others the difference to it."""
    first, *others = bins[WHOLE]
    lines = [f"| windows | texts | {first} | " + " | ".join(f"{name} - {first}" for name in others) + " |"]
    lines.append("|---|---:|---:|" + "---:|" * len(others))
    for label, found in bins.items():
        cells = [shown(found[first], "{:.4f}")]
        for name in others:
            pairs = zip(found[name], found[first], strict=True)
            cells.append(shown([(n, x - y) for (n, x), (_, y) in pairs], "{:+.4f}"))
        lines.append(f"| {label} | {len(found[first])} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(bins: Bins, path: Path) -> None:
    """Nats per token against position, a line for each model."""
    with axes(path, "position, in windows", "nats per token") as drawn:
        labels = [label for label in bins if label != WHOLE]
        for name in bins[WHOLE]:
            there = [label for label in labels if name in bins[label]]
            values = [mean(bins[label][name])[0] for label in there]
            drawn.plot([labels.index(label) for label in there], values, "o-", label=name)
        drawn.set_xticks(range(len(labels)), labels, rotation=45, fontsize=8)


@click.command(context_settings={"show_default": True})
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--books", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True, help="*.txt.")
@click.option("--limit", default=100_000, help="Tokens of each book.")
@click.option(
    "--cut",
    default=0,
    type=click.IntRange(0),
    help="Parts of so many tokens, each from an empty state; 0: whole books.",
)
@click.option("--off", is_flag=True, help="The first file also with its memory off.")
@click.option("--plot", "drawing", type=click.Path(path_type=Path), help="An SVG.")
@click.option("--json", "results", type=click.Path(path_type=Path), help="Where to write the figures.")
def main(
    files: tuple[Path, ...],
    books: Path,
    limit: int,
    cut: int,
    off: bool,
    drawing: Path | None,
    results: Path | None,
) -> None:
    """Compare models of one vocabulary on whole books."""
    if drawing:
        with one_error():
            check(drawing)
    texts = sorted(books.glob("*.txt"))
    if not texts:
        raise click.ClickException(f"{books}: no *.txt in this folder")
    with one_error():
        bins, states = read(open_models(files, off), texts, limit, cut)
    click.echo(table(bins))
    click.echo("\nstate bytes: " + ", ".join(f"{name} {size:,}" for name, size in states.items()))
    if results:
        results.write_text(json.dumps({"bins": bins, "state_bytes": states}, indent=1))
    if drawing:
        plot(bins, drawing)


if __name__ == "__main__":
    main()
