"""The comparison of the paper at a size that can be trained five times: what lies behind the same window.

    python models/trainer/compare.py --books ../shared/data/books --vocabulary out/storyteller --out out/compare

trains full, window, sinks, infini and tensor on the same text in the same order, for the same steps, with the same key
convolution, one after the other; and converts each. A run that was cut off goes on where it stopped. What comes out is
for `distance.py` and `ask.py`.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import click
import vocabulary
from train import FORMS

HERE = Path(__file__).parent
SIZE = {
    "layers": 4,
    "remember": 4,
    "heads": 3,
    "width": 192,
    "window": 64,
    "segment": 512,
    "document": 2048,
    "batch": 8,
}


@click.command(context_settings={"show_default": True})
@click.option("--books", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--vocabulary", "pieces", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Output folder.")
@click.option("--steps", default=1500)
@click.option("--memory", "memories", type=click.Choice(FORMS), multiple=True, default=FORMS)
@click.option("--seed", default=1)
@click.option("--threads", default=0, help="CPU threads of each; 0: torch's choice.")
def main(books: Path, pieces: Path, out: Path, steps: int, memories: tuple[str, ...], seed: int, threads: int) -> None:
    """Train and convert the models that are compared."""
    if not (pieces / vocabulary.NAME).exists():
        raise click.ClickException(f"{pieces}: no {vocabulary.NAME} in this folder")
    text = [f"--data={books / 'tales'}", f"--then={books / 'novels'}", f"--valid={books / 'valid'}"]
    size = [f"--{name}={n}" for name, n in SIZE.items()]
    for memory in memories:
        folder = out / memory
        if not (folder / vocabulary.NAME).exists():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(pieces / vocabulary.NAME, folder / vocabulary.NAME)
        own = [f"--memory={memory}", f"--steps={steps}", f"--seed={seed}", f"--threads={threads}", f"--out={folder}"]
        more = ["--resume"] if (folder / "last.pt").exists() else []
        click.echo(f"{memory}:", err=True)
        run([HERE / "train.py", *text, *size, *own, *more])
        run(["-m", "tcinfer", "convert", folder / "ckpt.pt", "-o", out / f"{memory}.gguf", "--outtype", "f16"])


def run(command: list) -> None:
    """A Python process that has said itself what went wrong, if something did."""
    if status := subprocess.run([sys.executable, *command], check=False).returncode:
        sys.exit(status)


if __name__ == "__main__":
    main()
