"""What the memory is worth: validation loss by distance, with the memory and with its gate closed.

    python models/trainer/evaluate.py --data tinyshakespeare.txt --checkpoint out/shakespeare/ckpt.pt

Streams of `--length` characters, each from an empty state. The full-sequence forward computes exactly what
streaming does, so no token loop is needed.
"""

import pickle
from pathlib import Path

import click
import torch
from network import GPT, load
from torch import Tensor
from torch.nn import functional


@torch.no_grad()
def loss_by_position(model: GPT, tokens: Tensor, length: int, batch: int = 8) -> Tensor:
    """Nats per character at every position, [length], averaged over consecutive streams of the text."""
    count = (len(tokens) - 1) // length
    inputs, targets = (tokens[shift : shift + count * length].view(count, length) for shift in (0, 1))
    losses = [
        functional.cross_entropy(model(x).mT, y, reduction="none").double().sum(0)
        for x, y in zip(inputs.split(batch), targets.split(batch), strict=True)
    ]
    return torch.stack(losses).sum(0) / count


@click.command(context_settings={"show_default": True})
@click.option("--data", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True)
@click.option("--checkpoint", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True)
@click.option("--length", default=2048, help="Characters per stream.")
def main(data: Path, checkpoint: Path, length: int) -> None:
    """Compare the validation loss with the memory and without it, inside the window and beyond."""
    model, _ = load(checkpoint)
    stoi = pickle.loads((checkpoint.parent / "meta.pkl").read_bytes())["stoi"]
    text = data.read_text(encoding="utf-8")
    tokens = torch.tensor([stoi[character] for character in text[int(0.9 * len(text)) :]])

    with_memory = loss_by_position(model, tokens, length)
    for name, parameter in model.named_parameters():
        if name.endswith("tc_gate"):
            parameter.data.fill_(-torch.inf)
    without = loss_by_position(model, tokens, length)

    W, block = model.args.kv_window, model.args.block_size
    click.echo(f"{'positions':>14} {'memory':>8} {'without':>8} {'gain':>8}")
    for start, stop in ((0, W), (W, block), (block, length), (W, length)):
        if start >= stop:
            continue
        on, off = with_memory[start:stop].mean(), without[start:stop].mean()
        click.echo(f"{f'{start}..{stop - 1}':>14} {on:8.4f} {off:8.4f} {off - on:+8.4f}")


if __name__ == "__main__":
    main()
