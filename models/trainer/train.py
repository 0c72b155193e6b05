"""Train a language model whose memory is used as streaming will use it.

    python models/trainer/train.py --data books/tales --then books/novels --valid books/valid --out out/storyteller

writes to the output folder `tokenizer.model`, `last.pt` (every --save-every steps; `--resume` goes on from it) and, at
the end, `ckpt.pt`, which `tcinfer convert` reads. Every step draws its text from (seed, step) alone, so a run that was
killed goes on as if it had not been.
"""

import ctypes
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import data
import torch
import vocabulary
from network import GPT, ModelArgs
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn import functional
from window import State

ROWS = 512  # of logits at a time: they stay in the processor's cache
COOLDOWN = 0.3  # of the steps, at the end, bring the learning rate down to zero
CLIP = 1.0
DECAYS = (0.99, 0.998, 0.9995, 0.9999)  # of the heads, in turn: from a page to a chapter
TAPS, ECHO = (0.5, 1.0), 0.1  # how a memory starts
FORMS = ("full", "window", "sinks", "infini", "tensor")
SINKS = 4


@dataclass(frozen=True)
class Run:
    """How a model is trained, beside what it is and what it reads."""

    steps: int
    batch: int
    lr: float
    warmup: int
    weight_decay: float
    seed: int
    bf16: bool
    device: str


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next step: to give it back and fault it in again costs a third of a step."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # MMAP_MAX, TRIM_THRESHOLD, TOP_PAD
            libc.mallopt(option, value)


def nats(model: GPT, hidden: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each token, [B, T]; hidden [B, T, C]."""
    rows = zip(hidden.flatten(0, 1).split(ROWS), targets.flatten().split(ROWS), strict=True)
    losses = [functional.cross_entropy(model.lm_head(x).float(), y, reduction="none") for x, y in rows]
    return torch.cat(losses).view_as(targets)


def learning_rate(step: int, run: Run) -> float:
    """Up in `warmup` steps, level, and down to zero over the last ones: a level run can be prolonged."""
    left = (run.steps - step) / max(1, COOLDOWN * run.steps)
    return run.lr * min((step + 1) / run.warmup, 1.0, left)


def optimizer_of(model: GPT, run: Run) -> torch.optim.AdamW:
    """AdamW; what has two dimensions or more decays, norms and per-head gates and rates do not."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": run.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=run.lr, betas=(0.9, 0.98), fused=True)


@torch.no_grad()
def start_remembering(model: GPT) -> None:
    """Start every memory as a quiet induction memory, which language alone takes long to find (mimetic initialisation).

    A query looks like the key of the same content (W_q = W_k), a key is mostly its predecessor's (taps 0.5 and 1), and
    what is read goes back to where it came from, softly (W_out = ECHO W_v^T). Heads remember for different times.
    A model without a Tensor Cache starts its queries and keys so in every layer: comparisons begin alike.
    """
    layers = [block.attn for block in model.transformer.h]
    for attention in [layer for layer in layers if layer.remembers] or layers:
        args, group = model.args, model.args.n_head // model.args.kv_heads
        wide, narrow = args.n_head * args.head_dim, args.kv_heads * args.head_dim
        q, k, v = attention.c_attn.weight.split((wide, narrow, narrow))
        spread = [part.unflatten(0, (args.kv_heads, -1)).repeat_interleave(group, 0).flatten(0, 1) for part in (k, v)]
        q.copy_(spread[0])
        if args.key_conv:
            attention.key_conv.weight.copy_(torch.tensor(TAPS)[:, None, None].expand_as(attention.key_conv.weight))
        if not attention.remembers:
            continue
        attention.tc_proj.weight.copy_(ECHO * spread[1].T)
        logits = attention.tc.logit_decay_fast
        logits.copy_(torch.tensor([DECAYS[i * len(DECAYS) // len(logits)] for i in range(len(logits))]).logit())


@torch.no_grad()
def limit_decays(model: GPT, document: int) -> None:
    """No half-life longer than a document: what such a head holds of many documents is what no training has seen.

    Without it, what the storyteller's memory helps at 64 windows is three quarters gone at 1,000.
    """
    limit = torch.tensor(0.5 ** (1 / document)).logit().item()
    for block in model.transformer.h:
        if block.attn.remembers:
            block.attn.tc.logit_decay_fast.clamp_(max=limit)


def goes_on(last: dict, args: ModelArgs, config: dict) -> bool:
    """Whether a checkpoint's run goes on as it was; where another text or schedule is asked for, memories start empty.

    Raises click.ClickException for another model, or fewer steps than were taken.
    """
    if last["iter_num"] > config["steps"]:
        raise click.ClickException(f"--resume: {last['iter_num']} steps were taken already, more than --steps")
    old, new = last["model_args"], args.saved()
    if other := sorted(k for k in old | new if old.get(k) != new.get(k)):
        raise click.ClickException(f"--resume: the run in the output folder has another {', '.join(other)}")
    changed = [k for k, v in config.items() if k != "device" and last["config"].get(k) != v]
    if changed:
        click.echo(f"from step {last['iter_num']} on with another {', '.join(changed)}; memories start empty", err=True)
    return not changed


def result(checkpoint: dict) -> dict:
    """What of a checkpoint is the trained model."""
    return {k: v for k, v in checkpoint.items() if k not in ("optimizer", "state")}


def save(path: Path, checkpoint: dict) -> None:
    """Write to a temporary file and rename, so that a reader never meets half a checkpoint."""
    partial = path.with_name(path.name + ".part")
    torch.save(checkpoint, partial)
    os.replace(partial, path)


@torch.no_grad()
def validate(model: GPT, library: data.Library, block: int, documents: int = 8) -> tuple[float, float]:
    """Nats per token, and the share of answers' and repeats' tokens predicted right; language alone has about 0.37."""
    model.eval()
    total = tokens = hits = asked = 0
    for number in range(documents):
        ids, weights = (torch.from_numpy(x).to(model.lm_head.weight.device) for x in library.document(number))
        state = None
        for at in range(0, library.recipe.length, block):
            x, y = ids[None, at : at + block].long(), ids[None, at + 1 : at + block + 1].long()
            hidden, state = model.hidden(x, state)
            logits = model.lm_head(hidden)
            loss = functional.cross_entropy(logits.mT, y, reduction="none")
            weight = weights[None, at + 1 : at + block + 1]
            told, plain = weight > 1, weight == 1
            total, tokens = total + loss[plain].sum().item(), tokens + plain.sum().item()
            hits, asked = hits + (logits.argmax(-1) == y)[told].sum().item(), asked + told.sum().item()
    model.train()
    return total / tokens, hits / max(1, asked)


def train(
    args: ModelArgs,
    run: Run,
    recipe: data.Recipe,
    books: list[Path],
    valid: Path | None,
    out: Path,
    resume: bool,
    save_every: int,
    compiled: bool,
) -> GPT:
    """Train, or go on training; the model, its checkpoint in `out`."""
    pieces = vocabulary.load(out / vocabulary.NAME)
    libraries = [data.Library(data.tokenize(data.read(path), pieces), pieces, recipe, run.seed) for path in books]
    asking = replace(recipe, share=1.0, emphasis=2.0)
    check = data.Library(data.tokenize(data.read(valid), pieces), pieces, asking, 0) if valid else None
    for library, path in zip([*libraries, *filter(None, [check])], [*books, valid], strict=False):
        if not library.places:
            raise click.ClickException(f"{path}: no text of more than --document {recipe.length} tokens")
    streams = data.Streams(libraries, run.batch, args.block_size, run.seed)

    torch.manual_seed(run.seed)
    model = GPT(args)
    start_remembering(model)
    limit_decays(model, recipe.length)
    model.to(run.device)
    optimizer = optimizer_of(model, run)
    step, state, average = 0, None, None
    config = asdict(run) | asdict(recipe) | {"tokens": [library.tokens for library in libraries]}
    if resume:
        last = torch.load(out / "last.pt", map_location=run.device, weights_only=True)
        same = goes_on(last, args, config)
        model.load_state_dict(last["model"])
        optimizer.load_state_dict(last["optimizer"])
        for group, decay in zip(optimizer.param_groups, (run.weight_decay, 0.0), strict=True):
            group["weight_decay"] = decay
        step, average = last["iter_num"], last["best_val_loss"].item()
        state = State(**last["state"]) if same else None
        if step == run.steps:  # and perhaps there is no ckpt.pt, of a run that had other ends
            save(out / "ckpt.pt", result(last))
    hidden = torch.compile(model.hidden) if compiled else model.hidden
    columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[status]}"), speed_estimate_period=120) as progress:
        size, amount = sum(p.numel() for p in model.parameters()), sum(library.tokens for library in libraries)
        progress.console.print(f"{size:,} parameters, {amount:,} tokens of books")
        task = progress.add_task("training", total=run.steps, completed=step, status="")
        began, first = time.monotonic(), step
        while step < run.steps:
            batch = streams.step(step, run.steps).to(run.device)
            state = model.start(run.batch) if state is None else state.restarted(batch.fresh)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, run)
            with torch.autocast(run.device, torch.bfloat16, enabled=run.bf16):
                x, state = hidden(batch.inputs, state)
                losses = nats(model, x, batch.targets)
            state = state.detached()
            loss = (losses * batch.weights).sum() / batch.weights.numel()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            limit_decays(model, recipe.length)
            step += 1
            plain = losses.detach()[batch.weights == 1].mean().item()
            average = plain if average is None else 0.98 * average + 0.02 * plain
            speed = (step - first) * batch.inputs.numel() / (time.monotonic() - began)
            progress.update(task, completed=step, status=f"loss {average:.3f}, {speed:,.0f} tokens/s")
            if step % save_every == 0 or step == run.steps:
                checkpoint = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "model_args": args.saved(),
                    "iter_num": step,
                    "best_val_loss": torch.tensor(average, dtype=torch.float64),  # of the text trained on, averaged
                    "config": config,
                    "state": vars(state),
                }
                if step == run.steps:  # first: last.pt of a whole run comes with it
                    save(out / "ckpt.pt", result(checkpoint))
                save(out / "last.pt", checkpoint)
                found = validate(model, check, args.block_size) if check else ()
                shown = ", validation {:.4f}, recall {:.3f}".format(*found) if found else ""
                progress.console.print(f"step {step}: loss {average:.4f}{shown}, {speed:,.0f} tokens/s")
    return model


def form_of(form: str, window: int) -> dict:
    """model_args of one of the memories that are compared, each with its window of as many tokens."""
    plain = {"tc_enabled": False, "kv_window": window}
    return {
        "full": plain | {"kv_window": 0},
        "window": plain,
        "sinks": plain | {"kv_num_sinks": SINKS},
        "infini": plain | {"infini_enabled": True},
        "tensor": {"kv_window": window, "tc_enabled": True},
    }[form]


@click.command(context_settings={"show_default": True})
@click.option(
    "--data",
    "first",
    type=click.Path(exists=True, path_type=Path),
    required=True,
    help="Text: a file or a folder of *.txt.",
)
@click.option("--then", type=click.Path(exists=True, path_type=Path), help="More text, mixed in more and more.")
@click.option("--valid", type=click.Path(exists=True, path_type=Path), help="Text to validate on.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Output folder.")
@click.option(
    "--resume",
    is_flag=True,
    help="Go on from last.pt in the output folder; another text or schedule starts with empty memories.",
)
@click.option(
    "--memory", type=click.Choice(FORMS), default="tensor", help="What lies behind the window, if there is one."
)
@click.option(
    "--rule", type=click.Choice(["delta", "outer", "wedge"]), default="delta", help="How the memory is written."
)
@click.option("--block", "kind", type=click.Choice(["llama", "gpt"]), default="llama", help="The kind of block.")
@click.option("--layers", default=6, type=click.IntRange(1))
@click.option("--remember", default=3, help="How many of the top layers have a memory; -1: all.")
@click.option("--heads", default=4, type=click.IntRange(1))
@click.option("--kv-heads", default=0, type=click.IntRange(0), help="Key heads; 0: as many as heads.")
@click.option("--width", default=256, type=click.IntRange(1))
@click.option("--window", default=64, type=click.IntRange(8), help="Tokens of exact attention.")
@click.option("--key-conv/--no-key-conv", default=True, help="A key also carries its predecessor.")
@click.option("--write-then-read/--read-then-write", default=True)
@click.option("--memory-rope/--no-memory-rope", default=False, help="Whether the memory sees rotated keys.")
@click.option("--token-rate/--no-token-rate", default=True, help="A write rate of each token's own.")
@click.option("--token-gate/--scalar-gate", default=False)
@click.option("--learned-rates/--frozen-rates", default=True)
@click.option(
    "--rate", default=0.3, type=click.FloatRange(0, 1, min_open=True, max_open=True), help="Write rate at the start."
)
@click.option("--vocab", default=4096, help="Pieces of a new vocabulary.")
@click.option("--characters", is_flag=True, help="A vocabulary of characters instead.")
@click.option("--steps", default=5000, type=click.IntRange(1))
@click.option("--batch", default=8, type=click.IntRange(1), help="Streams read side by side.")
@click.option(
    "--segment",
    default=512,
    type=click.IntRange(1),
    help="Tokens of each stream a step; the memory goes on to the next.",
)
@click.option(
    "--document",
    default=4096,
    type=click.IntRange(1),
    help="Tokens until a stream starts anew; a multiple of --segment.",
)
@click.option(
    "--share", default=0.8, type=click.FloatRange(0, 1), help="Of the documents that have exercises for the memory."
)
@click.option("--emphasis", default=4.0, type=click.FloatRange(1), help="Weight of their answers in the loss.")
@click.option("--lr", default=2e-3, help="Learning rate between warm-up and the last third.")
@click.option("--warmup", default=200, type=click.IntRange(1), help="Steps of linear warm-up.")
@click.option("--weight-decay", default=0.1)
@click.option("--bf16/--float32", default=True, help="Matrix products in bfloat16; the memory's stay float32.")
@click.option("--compile", "compiled", is_flag=True, help="torch.compile; slower on a CPU.")
@click.option("--save-every", default=250, type=click.IntRange(1), help="Steps between checkpoints.")
@click.option("--seed", default=1)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
@click.option("--threads", default=0, help="CPU threads; 0: torch's choice.")
def main(first: Path, then: Path | None, valid: Path | None, out: Path, resume: bool, **o) -> None:
    """Train a language model on books, its memory on exercises between their pages."""
    if resume and not (out / "last.pt").exists():
        raise click.ClickException(f"nothing to resume: {out / 'last.pt'} does not exist")
    if not resume and (out / "last.pt").exists():
        raise click.ClickException(f"{out} holds a run: go on with --resume, or choose another folder")
    if o["document"] % o["segment"]:
        raise click.ClickException(f"--document {o['document']} is not a multiple of --segment {o['segment']}")
    if o["threads"]:
        torch.set_num_threads(o["threads"])
    keep_freed_memory()
    books = [first, then] if then else [first]
    out.mkdir(parents=True, exist_ok=True)
    if not (out / vocabulary.NAME).exists():
        texts = [text for path in books for text in data.read(path)]
        vocabulary.train(texts, o["vocab"], out / vocabulary.NAME, o["characters"], o["seed"])
    try:
        args = ModelArgs(
            n_layer=o["layers"],
            n_head=o["heads"],
            n_kv_head=o["kv_heads"],
            n_embd=o["width"],
            block_size=o["segment"],
            vocab_size=vocabulary.load(out / vocabulary.NAME).get_piece_size(),
            block=o["kind"],
            key_conv=2 if o["key_conv"] else 0,
            **form_of(o["memory"], o["window"]),
            tc_layers=o["remember"],
            tc_update_rule=o["rule"],
            tc_lr_init=o["rate"],
            tc_gate_init=0.0,
            tc_write_then_read=o["write_then_read"],
            tc_rope=o["memory_rope"],
            tc_token_rate=o["token_rate"],
            tc_per_token_gate=o["token_gate"],
            tc_freeze_decay_lr=not o["learned_rates"],
        )
    except ValueError as e:
        raise click.ClickException(str(e)) from None
    run = Run(o["steps"], o["batch"], o["lr"], o["warmup"], o["weight_decay"], o["seed"], o["bf16"], o["device"])
    recipe = data.Recipe(o["document"], o["window"], o["share"], o["emphasis"])
    train(args, run, recipe, books, valid, out, resume, o["save_every"], o["compiled"])


if __name__ == "__main__":
    main()
