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
def main(books: Path, pieces: Path, out: Path, steps: int, memories: tuple[str, ...], seed: int) -> None:
    """Train and convert the models that are compared."""
    for memory in memories:
        folder = out / memory
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(pieces / vocabulary.NAME, folder / vocabulary.NAME)
        if not (folder / "ckpt.pt").exists():
            text = [f"--data={books / 'tales'}", f"--then={books / 'novels'}", f"--valid={books / 'valid'}"]
            own = [f"--memory={memory}", f"--steps={steps}", f"--seed={seed}", f"--out={folder}"]
            more = ["--resume"] if (folder / "last.pt").exists() else []
            click.echo(f"{memory}:", err=True)
            subprocess.run(
                [sys.executable, HERE / "train.py", *text, *(f"--{name}={n}" for name, n in SIZE.items()), *own, *more],
                check=True,
            )
        model = out / f"{memory}.gguf"
        if not model.exists():
            convert = ["convert", folder / "ckpt.pt", "-o", model, "--outtype", "f16"]
            subprocess.run([sys.executable, "-m", "tcinfer", *convert], check=True)


if __name__ == "__main__":
    main()
