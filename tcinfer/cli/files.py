"""Commands about model files: convert, inspect."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import click

from tcinfer.cli.console import one_line, terminated
from tcinfer.errors import TcinferError


@click.command()
@click.argument("checkpoint", metavar="CKPT")
@click.option("-o", "--output", metavar="OUT.gguf", help="Without it, CKPT's name and type in this folder.")
@click.option(
    "--outtype",
    default="f16",
    show_default=True,
    metavar="TYPE",
    help="f32, f16, bf16, q8_0, q4_0, q4_1, q5_0 or q5_1. Gates, decays and rates always stay f32.",
)
@click.option("--tokenizer", metavar="FILE", help="Without it, the one that lies beside the checkpoint.")
@click.option("--verify/--no-verify", default=None, help="Decode from both and compare; on below 1 GiB.")
def convert(checkpoint: str, output: str | None, outtype: str, tokenizer: str | None, verify: bool | None) -> None:
    """Convert a checkpoint (ckpt.pt, or a Hugging Face folder) to GGUF. Needs no PyTorch."""
    from tcinfer import converters
    from tcinfer.converters import write

    if outtype not in write.OUTTYPES:
        raise TcinferError(f"--outtype {outtype!r} is not one of {', '.join(write.OUTTYPES)}")
    path = Path(checkpoint)
    name = path.resolve().name if os.path.isdir(path) else path.stem
    out = Path(output or f"{name}-{outtype}.gguf")
    words = Path(tokenizer) if tokenizer else None
    signal.signal(signal.SIGTERM, terminated)  # so that what is half-written is removed
    source, written, found = converters.convert(path, out, outtype, words, verify)
    for note in source.notes:
        click.echo(f"not used: {one_line(note)}", err=True)
    if written.fallback:
        click.echo(f"kept in F16, rows no multiple of the block: {', '.join(written.fallback)}", err=True)
    which = f"tokenizer: {found}" if found else "no tokenizer found: the file takes ids alone (--tokenizer FILE)"
    click.echo(one_line(which), err=True)
    kinds = ", ".join(f"{n} {kind}" for kind, n in written.kinds.items())
    click.echo(f"{out}: {written.nbytes:,} bytes; {source.config.memory} memory; tensors: {kinds}")
    if written.verified:
        worst, largest, count = written.verified
        click.echo(
            f"verified on {count} tokens: logits differ from the checkpoint's by at most {worst:.3g} (the largest is "
            f"{largest:.3g}); that is what {outtype} costs"
        )


@click.command()
@click.argument("model", metavar="[MODEL.gguf]", required=False)
def inspect(model: str | None) -> None:
    """Show what a model file holds (the bundled one's, without a name): shape, memory, state, weights."""
    from tcinfer.inspect import report

    click.echo(report(model))
