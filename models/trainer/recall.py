"""The smallest model whose memory works: multi-query associative recall beyond the window, in minutes on a CPU.

    python models/trainer/recall.py train --out out/recall        # one model, ckpt.pt for `tcinfer convert`
    python models/trainer/recall.py table --out out/recall        # every memory: accuracy against gap and pairs
    python models/trainer/recall.py ablations --out out/recall    # which parts of the design recall needs
    python models/trainer/recall.py capacity --out out/recall     # what one matrix holds; what chunk means leave of it

Each prints Markdown tables and writes its figures as JSON to the output folder; all follow from the seed. W is the
window. After ± stands the standard error: over seeds, or with one seed over questions (binomial).

The task is that of Arora et al. 2023, "Zoology", arXiv 2312.04927.
"""

import json
import time
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import click
import torch
from network import GPT, ModelArgs
from recall_matrix import WIDTH, Figure, held
from recall_task import VOCABULARY, Task, draw
from torch import Tensor
from torch.nn import functional

SOLVED, LAST = 0.99, 8  # solved is a task when that share of the last so many batches is right: each batch is new
COOLDOWN = 100  # last steps, in which the learning rate goes down to zero; they begin when the task is solved
GAPS, PAIRS = (2, 4, 8, 12, 16), (4, 16, 32)  # of the tables' columns: gaps in windows
PLAIN = {"tc_enabled": False}
MEMORIES = {
    "window": PLAIN,
    "sinks": PLAIN | {"kv_num_sinks": 4},
    "full": PLAIN | {"kv_window": 0},
    "infini": PLAIN | {"infini_enabled": True},
    "outer": {"tc_update_rule": "outer"},
    "wedge": {"tc_update_rule": "wedge"},
    "delta": {"tc_update_rule": "delta"},
}
PUBLISHED = {
    name: getattr(ModelArgs, name)
    for name in ("key_conv", "tc_write_then_read", "tc_rope", "tc_lr_init", "tc_gate_init", "tc_decay_init")
}
ABLATIONS = {
    "delta": {},
    "frozen rates": {"tc_freeze_decay_lr": True},
    "per-token gate": {"tc_per_token_gate": True},
    "outer": {"tc_update_rule": "outer"},
    "wedge": {"tc_update_rule": "wedge"},
    "read-then-write": {"tc_write_then_read": False},
    "rotary in memory": {"tc_rope": True},
    "rotary in memory, outer": {"tc_rope": True, "tc_update_rule": "outer"},
    "write rate .05, gate -2": {"tc_lr_init": 0.05, "tc_gate_init": -2.0},
    "no key convolution": {"key_conv": 0},
    "published": PUBLISHED,
    "published, outer": PUBLISHED | {"tc_update_rule": "outer"},
    "full attention": MEMORIES["full"],
    "full attention, no key convolution": MEMORIES["full"] | {"key_conv": 0},
    "window": MEMORIES["window"],
}


@dataclass(frozen=True)
class Recipe:
    """How a model is trained."""

    steps: int  # at most
    batch: int = 32
    lr: float = 3e-3
    warmup: int = 20
    seed: int = 1


def arguments(layers: int = 1, **changes) -> ModelArgs:
    """The model that solves the task; or one that differs from it."""
    solves = ModelArgs(
        n_layer=layers,
        n_head=1,
        n_embd=WIDTH,
        vocab_size=VOCABULARY,
        kv_window=Task.window,
        key_conv=2,
        tc_write_then_read=True,
        tc_rope=False,
        tc_lr_init=0.4,
        tc_gate_init=0.0,
        tc_decay_init=0.999,
    )
    return replace(solves, **changes)


def answers(model: GPT, tokens: Tensor, asked: Tensor) -> Tensor:
    """Logits [B, n, V] at the questions, whose positions are asked [B, n]."""
    hidden, _ = model.hidden(tokens)
    return model.lm_head(hidden.gather(1, asked[..., None].expand(-1, -1, hidden.shape[-1])))


def fit(args: ModelArgs, task: Task, recipe: Recipe) -> tuple[GPT, int]:
    """A model trained until it has solved the task or the steps are spent; and the steps that took.

    Only answers count in the loss. Every batch is as long as one of farthest, farthest / 2, .., 4 windows: near keys
    teach what far ones then only have to keep.
    """
    torch.manual_seed(recipe.seed)
    numbers = torch.Generator().manual_seed(recipe.seed)
    model = GPT(args)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(3)  # N(0, 0.02²) is too quiet for so narrow a model
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.01)
    lengths = [task.farthest >> i for i in range(task.farthest.bit_length() - 2)]
    recent: list[float] = []
    step, end = 0, recipe.steps
    while step < end:
        farthest = lengths[int(torch.randint(len(lengths), (), generator=numbers))]
        tokens, asked, _ = draw(replace(task, farthest=farthest), recipe.batch, numbers)
        logits, wanted = answers(model, tokens, asked), tokens.gather(1, asked + 1)
        loss = functional.cross_entropy(logits.mT, wanted)
        optimizer.param_groups[0]["lr"] = recipe.lr * min(1, (step + 1) / recipe.warmup, (end - step) / COOLDOWN)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent = [*recent, (logits.argmax(-1) == wanted).float().mean().item()][-LAST:]
        step += 1
        if len(recent) == LAST and sum(recent) >= LAST * SOLVED:
            end = min(end, step + COOLDOWN)
    return model.eval(), step


@torch.no_grad()
def recalled(model: GPT, task: Task, batches: int = 8, batch: int = 64) -> tuple[Tensor, Tensor]:
    """Of each question, whether the model's answer is right, and its gap; drawn from seed 0, never trained on."""
    numbers = torch.Generator().manual_seed(0)
    right, gaps = [], []
    for _ in range(batches):
        tokens, asked, gap = draw(task, batch, numbers)
        right.append(answers(model, tokens, asked).argmax(-1) == tokens.gather(1, asked + 1))
        gaps.append(gap)
    return torch.cat(right).flatten(), torch.cat(gaps).flatten()


def figure(rights: list[Tensor]) -> Figure:
    """The share of what is right, one tensor of each seed, and its standard error."""
    shares = torch.stack([right.double().mean() for right in rights])
    mean, n = shares.mean().item(), len(rights)
    error = shares.std().item() / n**0.5 if n > 1 else (mean * (1 - mean) / len(rights[0])) ** 0.5
    return mean, error


def measure(args: ModelArgs, task: Task, recipe: Recipe, seeds: int) -> tuple[dict, GPT, int]:
    """A row of models trained from that many seeds, tested on gaps to 16 windows and on other numbers of pairs.

    And the first of the models, with its steps.
    """
    began = time.process_time()
    runs = [fit(args, task, replace(recipe, seed=recipe.seed + i)) for i in range(seeds)]
    models, steps = zip(*runs, strict=True)
    row = {"seeds": seeds, "steps": sum(steps) / seeds, "CPU seconds": (time.process_time() - began) / seeds}
    far = replace(task, farthest=GAPS[-1])
    found = [recalled(model, far) for model in models]
    row["all gaps"] = figure([right for right, _ in found])
    for near, beyond in pairwise(GAPS):
        low, high = near * task.window, beyond * task.window
        row[f"{near}-{beyond} W"] = figure([right[(gap > low) & (gap <= high)] for right, gap in found])
    for n in PAIRS:
        row[f"{n} pairs"] = figure([recalled(model, replace(far, pairs=n))[0] for model in models])
    return row, *runs[0]


class Table:
    """Rows printed as Markdown as they come, and kept in a JSON file."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, []

    def add(self, row: dict) -> None:
        if not self.rows:
            click.echo(f"| {' | '.join(row)} |\n|{'---|' * len(row)}")
        cells = [f"{x:.0f}" if isinstance(x, float) else str(x) for x in row.values() if not isinstance(x, tuple)]
        cells += ["{:.3f} ± {:.3f}".format(*x) for x in row.values() if isinstance(x, tuple)]
        click.echo(f"| {' | '.join(cells)} |")
        self.rows.append(row)
        self.path.write_text(json.dumps(self.rows, indent=1))


def train(out: Path, recipe: Recipe, seeds: int) -> None:
    """The delta model alone; the first seed's checkpoint, which `tcinfer convert` reads."""
    args, task = arguments(), Task()
    row, model, step = measure(args, task, recipe, seeds)
    Table(out / "train.json").add({"memory": "delta"} | row)
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": {},
        "model_args": args.saved(),
        "iter_num": step,
        "best_val_loss": torch.tensor(1 - row["all gaps"][0]),
        "config": asdict(recipe) | asdict(task),
    }
    torch.save(checkpoint, out / "ckpt.pt")


def table(out: Path, recipe: Recipe, seeds: int) -> None:
    """Every memory behind the same window and key convolution, one layer."""
    tasks = {"once": Task(), "latest wins": Task(twice=True), "once, trained to 4 W": Task(farthest=4)}
    rows = Table(out / "table.json")
    for name, task in tasks.items():
        for memory, changes in MEMORIES.items():
            row, *_ = measure(arguments(**changes), task, recipe, seeds)
            rows.add({"keys bound": name, "memory": memory} | row)


def ablations(out: Path, recipe: Recipe, seeds: int) -> None:
    """Two layers, for without a key convolution it takes one to join key and value; trained on gaps to 4 W."""
    rows = Table(out / "ablations.json")
    for name, changes in ABLATIONS.items():
        row, *_ = measure(arguments(layers=2, **changes), Task(farthest=4), recipe, seeds)
        rows.add({"variant": name} | row)


def capacity(out: Path, recipe: Recipe, seeds: int) -> None:
    """No training: what one matrix of 64 x 64 holds of random pairs."""
    rows = Table(out / "capacity.json")
    for pairs in (8, 16, 32, 48, 64, 96, 128, 256):
        row = {"pairs": pairs, "pairs / D": f"{pairs / WIDTH:.3g}"}
        for rule, rate in (("outer", 1.0), ("delta", 1.0), ("delta", 0.4)):
            for keys in ("", ", keys alike"):
                row[f"{rule} η {rate:g}{keys}"] = held(pairs, rule, recipe.seed, rate, alike=bool(keys))
        rows.add(row)
    click.echo()
    rows = Table(out / "chunk-means.json")
    for chunk in (1, 2, 4, 16, 64):
        found = {}
        for rule in ("outer", "delta"):
            for n in (64, 128):
                found[f"{n} pairs, {rule}"] = held(n, rule, recipe.seed, chunk=chunk)
        rows.add({"pairs averaged in a write": chunk} | found)


@click.command(context_settings={"show_default": True})
@click.argument("what", type=click.Choice(["train", "table", "ablations", "capacity"]))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Output folder.")
@click.option("--steps", default=1500, help="Of training at most; it ends when the task is solved.")
@click.option("--seed", default=1, type=click.IntRange(1), help="Of the first model.")
@click.option("--seeds", default=1, help="Models trained for each row.")
def main(what: str, out: Path, steps: int, seed: int, seeds: int) -> None:
    """Multi-query associative recall beyond the window."""
    torch.set_num_threads(1)  # so small a model gains nothing from more
    out.mkdir(parents=True, exist_ok=True)
    run = {"train": train, "table": table, "ablations": ablations, "capacity": capacity}[what]
    run(out, Recipe(steps, seed=seed), seeds)


if __name__ == "__main__":
    main()
