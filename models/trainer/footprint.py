"""State bytes against context: a model's constant memory beside the full cache of the same model, element for element.

    python models/trainer/footprint.py storyteller.gguf --plot footprint.svg

The full cache holds a key and a value of every token in every layer, in the type of the model's own ring; the model's
state is what `Session.nbytes` counts, after so many tokens were really taken in where `--measured` allows.
"""

from pathlib import Path

import click
import numpy as np
from runtime import one_error, open_models

from tcinfer.api import Model
from tcinfer.measure.plot import axes, check

CONTEXTS = (64, 128, 256, 1024, 4096, 16_384, 131_072, 1_048_576, 10_485_760)  # tokens


def full_cache(model: Model, tokens: int) -> int:
    """Bytes of the keys and values of so many tokens."""
    c = model.config
    return 2 * tokens * sum(x.n_kv_heads * x.head_dim * np.dtype(x.cache_dtype).itemsize for x in c.layers)


def rows(model: Model, measured: int) -> list[tuple[int, int, int]]:
    """(tokens, bytes of the state, bytes of a full cache) for each context."""
    session, found = model.session(), []
    for tokens in CONTEXTS:
        if tokens <= measured:
            session.feed(np.arange(session.position, tokens) % model.config.vocab_size)
        found.append((tokens, session.nbytes, full_cache(model, tokens)))
    return found


def plot(found: list[tuple[int, int, int]], path: Path) -> None:
    with axes(path, "context, tokens", "MB") as drawn:
        tokens, own, full = zip(*found, strict=True)
        drawn.loglog(tokens, [n / 1e6 for n in full], "o-", label="full cache")
        drawn.loglog(tokens, [n / 1e6 for n in own], "o-", label="Tensor Cache")


@click.command(context_settings={"show_default": True})
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--measured", default=131_072, help="Tokens that are really taken in; the rest is arithmetic.")
@click.option("--plot", "drawing", type=click.Path(path_type=Path), help="An SVG.")
def main(file: Path, measured: int, drawing: Path | None) -> None:
    """Print state bytes by context."""
    if drawing:
        with one_error():
            check(drawing)
    (model,) = open_models((file,), off=False).values()
    if model.config.memories == "full":
        raise click.ClickException(f"{file}: full memory has no state of one size")
    found = rows(model, measured)
    click.echo("| context | state | full cache | full / state |\n|---:|---:|---:|---:|")
    for tokens, own, full in found:
        click.echo(f"| {tokens:,} | {own:,} | {full:,} | {full / own:,.1f} |")
    if drawing:
        plot(found, drawing)


if __name__ == "__main__":
    main()
