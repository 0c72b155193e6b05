"""Commands about this machine: warmup."""

from __future__ import annotations

import click


@click.command()
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
