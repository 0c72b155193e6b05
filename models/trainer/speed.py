"""Training speed of each memory beside the window alone: whole steps, interleaved, medians.

python models/trainer/speed.py --bf16
"""

import statistics
import time
from collections.abc import Callable

import click
import torch
from network import GPT, ModelArgs
from train import keep_freed_memory, nats

MEMORIES = {
    "window": {"tc_enabled": False},
    "outer": {"tc_update_rule": "outer"},
    "delta": {"tc_update_rule": "delta"},
    "delta, a rate for each token": {"tc_token_rate": True},
    "delta in the top half": {"tc_layers": 3},
    "wedge": {"tc_update_rule": "wedge"},
    "infini": {"infini_enabled": True},
}


def stepper(args: ModelArgs, batch: int, bf16: bool, device: str) -> Callable[[], float]:
    """A function that takes one training step of B streams of `block_size` tokens, and tells its seconds."""
    model = GPT(args).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    text = torch.randint(args.vocab_size, (batch, args.block_size + 1), device=device)
    state = model.start(batch)

    def step() -> float:
        nonlocal state
        began = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            hidden, state = model.hidden(text[:, :-1], state)
            loss = nats(model, hidden, text[:, 1:]).mean()
        state = state.detached()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # waits for the device
        return time.perf_counter() - began

    return step


@click.command(context_settings={"show_default": True})
@click.option("--width", default=256)
@click.option("--layers", default=6)
@click.option("--window", default=64)
@click.option("--segment", default=512)
@click.option("--batch", default=8)
@click.option("--chunk", default=32, help="Tokens per chunk of the scan.")
@click.option("--rounds", default=7, help="Steps of each, after one to warm up.")
@click.option("--bf16/--float32", default=False)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
def main(
    width: int, layers: int, window: int, segment: int, batch: int, chunk: int, rounds: int, bf16: bool, device: str
):
    """Print tokens per second and the ratio to the window alone."""
    keep_freed_memory()
    shape = {"n_layer": layers, "n_head": width // 64, "n_embd": width, "block_size": segment, "vocab_size": 4096}
    memory = {"kv_window": window, "key_conv": 2, "tc_write_then_read": True, "tc_rope": False, "tc_chunk_size": chunk}
    steps = {
        name: stepper(ModelArgs(**shape, block="llama", **memory | own), batch, bf16, device)
        for name, own in MEMORIES.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            took = step()
            if turn:
                seconds[name].append(took)
    base = statistics.median(seconds["window"])
    click.echo("| memory | tokens/s | of window |\n|---|---:|---:|")
    for name, took in seconds.items():
        middle = statistics.median(took)
        click.echo(f"| {name} | {batch * segment / middle:,.0f} | {base / middle:.2f} |")


if __name__ == "__main__":
    main()
