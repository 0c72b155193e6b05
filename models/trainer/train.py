"""Train a character-level GPT with a Tensor Cache; the defaults are the published toy recipe.

    python models/trainer/train.py --data tinyshakespeare.txt --out out/shakespeare

writes to the output folder `ckpt.pt` (the best validation loss so far), `last.pt` (the latest evaluation,
which `--resume` continues) and `meta.pkl` (the characters). Every step draws its batch and its dropout from
(seed, step) alone, so a resumed run takes the same steps as an uninterrupted one.
"""

import math
import os
import pickle
from pathlib import Path

import click
import torch
from network import GPT, ModelArgs, model_args
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from scan import RULES
from torch import Tensor
from torch.nn import functional


def encode(text: str) -> tuple[Tensor, dict]:
    """The text as character ids [N], and nanoGPT's meta: vocab_size, itos, stoi."""
    characters = sorted(set(text))
    stoi = {character: i for i, character in enumerate(characters)}
    meta = {"vocab_size": len(characters), "itos": dict(enumerate(characters)), "stoi": stoi}
    return torch.tensor([stoi[character] for character in text]), meta


def sample_batch(tokens: Tensor, batch: int, block: int) -> tuple[Tensor, Tensor]:
    """Random windows of the text and the same windows one character later, each [batch, block]."""
    starts = torch.randint(len(tokens) - block, (batch, 1))
    windows = tokens[starts + torch.arange(block + 1)]
    return windows[:, :-1], windows[:, 1:]


def nats(model: GPT, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy per character."""
    return functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


@torch.no_grad()
def validation_loss(model: GPT, tokens: Tensor, batch: int) -> float:
    """Mean nats per character over the whole split in consecutive blocks (a short tail is left out)."""
    block = min(model.args.block_size, len(tokens) - 1)
    count = (len(tokens) - 1) // block
    inputs, targets = (tokens[shift : shift + count * block].view(count, block) for shift in (0, 1))
    model.eval()
    pairs = zip(inputs.split(batch), targets.split(batch), strict=True)
    total = sum(len(x) * nats(model, x, y).item() for x, y in pairs)
    model.train()
    return total / count


def learning_rate(step: int, steps: int, warmup: int, peak: float, floor: float) -> float:
    """Linear warm-up to the peak, then half a cosine down to the floor at the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2


def make_optimizer(model: GPT, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW; matrices decay, norms, gates and rates do not."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), fused=True)


def save(path: Path, checkpoint: dict) -> None:
    """Write to a temporary file and rename, so that a reader never meets half a checkpoint."""
    partial = path.with_name(path.name + ".part")
    torch.save(checkpoint, partial)
    os.replace(partial, path)


def train(data: Path, out: Path, config: dict, resume: bool) -> float:
    """Train as the command's options in `config` say; return the best validation loss."""
    out.mkdir(parents=True, exist_ok=True)
    tokens, meta = encode(data.read_text(encoding="utf-8"))
    train_tokens, val_tokens = tokens.tensor_split([int(0.9 * len(tokens))])
    torch.manual_seed(config["seed"])

    last = torch.load(out / "last.pt", map_location="cpu", weights_only=True) if resume else None
    model = GPT(ModelArgs(**last["model_args"]) if last else new_model_args(config, meta["vocab_size"]))
    optimizer = make_optimizer(model, config["lr"], config["weight_decay"])
    step, best = 0, math.inf
    if last:
        if model.args.vocab_size != meta["vocab_size"]:
            raise click.ClickException(f"{data} has other characters than the text of {out / 'last.pt'}")
        model.load_state_dict(last["model"])
        optimizer.load_state_dict(last["optimizer"])
        step, best = last["iter_num"], last["best_val_loss"].item()
    (out / "meta.pkl").write_bytes(pickle.dumps(meta))

    steps, batch, block = config["steps"], config["batch"], model.args.block_size
    columns = (
        "[progress.description]{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, TextColumn("{task.fields[status]}")) as progress:
        size = sum(p.numel() for p in model.parameters())
        progress.console.print(f"{size:,} parameters, {len(train_tokens):,} characters to train on")
        task = progress.add_task("training", total=steps, completed=step, status="")
        while step < steps:
            torch.manual_seed(config["seed"] * 1_000_003 + step)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, config["warmup"], config["lr"], config["min_lr"])
            loss = nats(model, *sample_batch(train_tokens, batch, block))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            speed = (progress.tasks[task].speed or 0) * batch * block
            progress.update(task, completed=step, status=f"loss {loss.item():.3f}, {speed:,.0f} tokens/s")

            if step % config["eval_every"] == 0 or step == steps:
                val = validation_loss(model, val_tokens, batch)
                progress.console.print(f"step {step}: loss {loss.item():.4f}, validation {val:.4f}")
                checkpoint = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "model_args": model_args(model),
                    "iter_num": step,
                    "best_val_loss": torch.tensor(min(best, val)),
                    "config": config,
                }
                save(out / "last.pt", checkpoint)
                if val < best:
                    best = val
                    save(out / "ckpt.pt", checkpoint)
    return best


def new_model_args(config: dict, vocab_size: int) -> ModelArgs:
    """The command's options as `model_args`; the rule `none` is the window alone."""
    memory = config["rule"] != "none"
    return ModelArgs(
        n_layer=config["layers"],
        n_head=config["heads"],
        n_embd=config["width"],
        block_size=config["block"],
        vocab_size=vocab_size,
        dropout=config["dropout"],
        kv_window=config["window"],
        tc_enabled=memory,
        tc_update_rule=config["rule"] if memory else "delta",
        tc_chunk_size=config["chunk"],
    )


@click.command(context_settings={"show_default": True})
@click.option("--data", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True, help="UTF-8 text.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Output folder.")
@click.option("--resume", is_flag=True, help="Continue from last.pt in the output folder, with its model options.")
@click.option("--steps", default=2000)
@click.option("--batch", default=20, help="Sequences per step.")
@click.option("--lr", default=1e-3, help="Peak learning rate.")
@click.option("--min-lr", default=1e-5, help="Learning rate of the last step.")
@click.option("--warmup", default=100, help="Steps of linear warm-up.")
@click.option("--weight-decay", default=0.1)
@click.option("--dropout", default=0.0)
@click.option("--layers", default=4)
@click.option("--heads", default=4)
@click.option("--width", default=128)
@click.option("--block", default=256, help="Characters per training sequence.")
@click.option("--window", default=128, help="Tokens of exact attention; 0: all.")
@click.option("--rule", type=click.Choice([*RULES, "none"]), default="delta", help="How the memory is written.")
@click.option("--chunk", default=64, help="Tokens per chunk of the scan (speed only).")
@click.option("--eval-every", default=250, help="Steps between evaluations.")
@click.option("--seed", default=1337)
@click.option("--threads", default=0, help="CPU threads; 0: torch's choice.")
def main(data: Path, out: Path, resume: bool, threads: int, **config: int | float | str) -> None:
    """Train a character-level model on a text; its last tenth is for validation."""
    if resume and not (out / "last.pt").exists():
        raise click.ClickException(f"nothing to resume: {out / 'last.pt'} does not exist")
    if threads:
        torch.set_num_threads(threads)
    best = train(data, out, {**config, "dataset": data.stem}, resume)
    click.echo(f"best validation loss {best:.4f} nats per character")


if __name__ == "__main__":
    main()
