"""Commands about model files: convert, quantize, inspect."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tcinfer.cli.console import one_line, say, terminated
from tcinfer.cli.options import CACHE_TYPE, MEMORY, together
from tcinfer.config import check_choice
from tcinfer.errors import TcinferError

if TYPE_CHECKING:
    from tcinfer.converters.source import Source
    from tcinfer.converters.write import Written


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
@click.option("--chat-template", metavar="FILE", help="A Jinja file; without it, the one beside the checkpoint.")
@click.option("--verify/--no-verify", default=None, help="Decode from both and compare; on below 1 GiB.")
def convert(
    checkpoint: str,
    output: str | None,
    outtype: str,
    tokenizer: str | None,
    chat_template: str | None,
    verify: bool | None,
) -> None:
    """Convert a checkpoint (ckpt.pt, a Hugging Face folder, or GGUF) to GGUF. Needs no PyTorch."""
    outtype = _type("--outtype", outtype)
    path = Path(checkpoint)
    name = path.resolve().name if os.path.isdir(path) else path.stem
    for option, given in (("-o", output), ("--tokenizer", tokenizer), ("--chat-template", chat_template)):
        if given == "":
            raise TcinferError(f"{option} names no file")
    out = Path(output or f"{name}-{outtype}.gguf")
    source, written, found = _convert(path, out, outtype, tokenizer, verify, template=chat_template)
    if found:
        say(one_line(f"tokenizer: {found}"))
    elif any(key.startswith("tokenizer.") for key in source.keys):
        say("tokenizer: the file's own")
    else:
        say("no tokenizer found: the file takes ids alone (--tokenizer FILE)")
    _conclude(out, outtype, source, written)


@click.command()
@click.argument("source", metavar="IN.gguf")
@click.argument("output", metavar="OUT.gguf")
@click.argument("outtype", metavar="TYPE")
@click.option("--verify/--no-verify", default=None, help="Decode from both and compare; on below 1 GiB.")
def quantize(source: str, output: str, outtype: str, verify: bool | None) -> None:
    """Pack a GGUF file's matrices in another type.

    TYPE is f32, f16, bf16, q8_0, q4_0, q4_1, q5_0 or q5_1. Everything else stays as it is: gates, decays and rates in
    f32, the tokenizer, the chat template. Files in q4_k, q5_k and q6_k can be read; what an earlier type has lost does
    not come back.
    """
    outtype = _type("TYPE", outtype)
    out = Path(output)
    model, written, _ = _convert(Path(source), out, outtype, None, verify, "gguf_file")
    _conclude(out, outtype, model, written, "the original")


def _type(what: str, outtype: str) -> str:
    from tcinfer.converters.write import OUTTYPES

    check_choice(what, outtype.lower(), tuple(OUTTYPES))
    return outtype.lower()


def _convert(
    path: Path,
    out: Path,
    outtype: str,
    tokenizer: str | None,
    verify: bool | None,
    only: str | None = None,
    template: str | None = None,
) -> tuple[Source, Written, Path | None]:
    from tcinfer import converters

    signal.signal(signal.SIGTERM, terminated)  # so that what is half-written is removed
    source, written, found = converters.convert(
        path, out, outtype, Path(tokenizer) if tokenizer else None, verify, only, Path(template) if template else None
    )
    for note in source.notes:
        say(f"not used: {one_line(note)}")
    if source.packed and outtype not in ("f32", "f16", "bf16"):
        say(f"from {', '.join(source.packed)} to {outtype}: what each loses adds up; start from f16 or f32 if you can")
    return source, written, found


def _conclude(out: Path, outtype: str, source: Source, written: Written, origin: str = "the checkpoint") -> None:
    """What was written, on stdout; on stderr what is not as asked for."""
    if written.fallback:
        say(f"kept in F16, rows no multiple of the block: {', '.join(written.fallback)}")
    kinds = ", ".join(f"{n} {kind}" for kind, n in written.kinds.items())
    click.echo(f"{out}: {written.nbytes:,} bytes; {source.config.memories} memory; tensors: {kinds}")
    if written.verified:
        worst, largest, count = written.verified
        click.echo(
            f"verified on {count} tokens: logits differ from {origin}'s by at most {worst:.3g} (the largest is "
            f"{largest:.3g}); that is what {outtype} costs"
        )


@click.command()
@click.argument("model", metavar="[MODEL.gguf]", required=False)
@together(*MEMORY, CACHE_TYPE)
@click.option("--json", "as_json", is_flag=True, help="The same as one JSON object.")
def inspect(model: str | None, as_json: bool, **asked: Any) -> None:
    """Show what a model file holds (the bundled one's, without a name): shape, weights, tokenizer, memory, state."""
    import json

    from tcinfer.measure.file import facts, report

    found = facts(model, **asked)
    click.echo(json.dumps(found, indent=2) if as_json else report(found))
