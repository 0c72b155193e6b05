"""The trainer: what it trains is what streaming computes, and what it saves is the published format."""

import math
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.peer
torch = pytest.importorskip("torch")

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT.parent / "shared" / "golden"
TOY = [
    "--layers=2",
    "--heads=2",
    "--width=16",
    "--block=24",
    "--window=8",
    "--chunk=5",
    "--batch=4",
    "--lr=0.01",
]


@pytest.fixture(scope="module", autouse=True)
def trainer_on_path():
    """The trainer is not part of the installed package: import it from its folder."""
    folder = str(ROOT / "models" / "trainer")
    sys.path.insert(0, folder)
    yield
    sys.path.remove(folder)
    for name in ("evaluate", "network", "scan", "train"):
        sys.modules.pop(name, None)


def memory_step(A, q, pair, decay, rate, rule):
    """Read with the old state, then write the pair. q, k, v: [B, H, D]; A: [B, H, D, D]; decay, rate: [H]."""
    read = torch.einsum("bhd,bhde->bhe", q, A)
    if pair is not None:
        k, v = pair
        retrieved = torch.einsum("bhd,bhde->bhe", k, A)
        u = v - retrieved if rule == "delta" else v
        write = torch.einsum("bhd,bhe->bhde", k, u)
        if rule == "wedge":
            write = write - torch.einsum("bhd,bhe->bhde", v, k)
        A = decay[:, None, None] * A + rate[:, None, None] * write
    return read, A


def turn(x, t, base):
    """Rotary position t on interleaved pairs, as multiplication by e^(i t base^(−2m/D)). x: [..., D]."""
    D = x.shape[-1]
    pairs = torch.view_as_complex(x.unflatten(-1, (D // 2, 2)).contiguous())
    angle = t * base ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


def stream(model, tokens):
    """Logits [B, T, V], token by token, each layer holding a window of W pairs and one matrix per head."""
    args, weights = model.args, model.state_dict()
    B, T = tokens.shape
    H, D, W = args.n_head, args.n_embd // args.n_head, args.kv_window or T
    windows = [[] for _ in range(args.n_layer)]
    states = [torch.zeros(B, H, D, D, dtype=torch.float64) for _ in range(args.n_layer)]

    def norm(x, weight):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() * weight

    logits = []
    for t in range(T):
        x = weights["transformer.wte.weight"][tokens[:, t]]  # [B, d]
        for i, window in enumerate(windows):
            w = {key.removeprefix(f"transformer.h.{i}."): value for key, value in weights.items()}
            qkv = norm(x, w["ln1.weight"]) @ w["attn.c_attn.weight"].T
            q, k, v = (part.view(B, H, D) for part in qkv.chunk(3, -1))
            q, k = turn(q, t, args.rope_base), turn(k, t, args.rope_base)
            evicted = window.pop(0) if len(window) == W else None
            window.append((k, v))
            K, V = (torch.stack(parts, 2) for parts in zip(*window, strict=True))  # [B, H, ≤W, D]
            attention = (torch.einsum("bhd,bhsd->bhs", q, K) / math.sqrt(D)).softmax(-1)
            local = torch.einsum("bhs,bhsd->bhd", attention, V).flatten(1) @ w["attn.c_proj.weight"].T
            x = x + local
            if args.tc_enabled:
                if evicted:
                    k_evicted, v_evicted = evicted
                    evicted = k_evicted / (k_evicted.norm(dim=-1, keepdim=True) + 1e-5), v_evicted
                decay, rate = w["attn.tc.logit_decay_fast"].sigmoid(), w["attn.tc.logit_lr_fast"].sigmoid()
                read, states[i] = memory_step(states[i], q, evicted, decay, rate, args.tc_update_rule)
                x = x + w["attn.tc_gate"].sigmoid() * (read.flatten(1) @ w["attn.tc_proj.weight"].T)
            hidden = norm(x, w["ln2.weight"]) @ w["mlp.fc.weight"].T
            x = x + (hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2) @ w["mlp.proj.weight"].T
        logits.append(norm(x, weights["transformer.ln_f.weight"]) @ weights["lm_head.weight"].T)
    return torch.stack(logits, 1)


@pytest.mark.parametrize("chunk", [1, 5, 16, 64])
@pytest.mark.parametrize("rule", ["delta", "outer", "wedge"])
def test_scan_equals_the_recurrence(rule, chunk):
    from scan import scan

    torch.manual_seed(0)
    B, H, N, D = 2, 3, 37, 8
    q, k, v = torch.randn(3, B, H, N, D, dtype=torch.float64)
    k = k / k.norm(dim=-1, keepdim=True)
    decay, rate = torch.tensor([0.2, 0.9, 0.9999]).double(), torch.tensor([0.05, 0.5, 1.0]).double()
    A = start = torch.randn(B, H, D, D, dtype=torch.float64)
    reads = []
    for i in range(N):
        read, A = memory_step(A, q[:, :, i], (k[:, :, i], v[:, :, i]), decay, rate, rule)
        reads.append(read)
    O, final = scan(q, k, v, decay.log(), rate, rule, chunk, start)  # noqa: E741
    assert (O - torch.stack(reads, 2)).abs().max() < 1e-10
    assert (final - A).abs().max() < 1e-10
    O32, _ = scan(q.float(), k.float(), v.float(), decay.log().float(), rate.float(), rule, chunk, start.float())
    assert O32.dtype == torch.float32
    assert (O32 - O).abs().max() < 1e-5 * O.abs().max()


@pytest.mark.parametrize("rule", ["delta", "outer", "wedge", "none"])
@pytest.mark.parametrize("T", [7, 8, 9, 40])  # shorter than the window, as long, one eviction, ragged chunks
def test_full_sequence_equals_streaming(rule, T):
    from network import GPT, ModelArgs

    torch.manual_seed(1)
    memory = {"tc_update_rule": rule} if rule != "none" else {"tc_enabled": False}
    args = ModelArgs(n_layer=3, n_head=2, n_embd=16, vocab_size=11, kv_window=8, tc_chunk_size=5, **memory)
    model = GPT(args).double()
    with torch.no_grad():
        for parameter in model.parameters():  # far from the start, so that every part moves the logits
            parameter.add_(0.3 * torch.randn_like(parameter))
    tokens = torch.randint(11, (2, T))
    with torch.no_grad():
        assert (model(tokens) - stream(model, tokens)).abs().max() < 1e-10


@pytest.mark.skipif(not GOLDEN.exists(), reason="golden checkpoints absent")
@pytest.mark.parametrize("name", ["tc-delta", "tc-outer", "tc-wedge", "window", "full"])
def test_golden_logits(name):
    from network import load

    model, _ = load(GOLDEN / name / "ckpt.pt")
    golden = np.load(GOLDEN / name / "golden.npz")
    with torch.no_grad():
        logits = model.double()(torch.from_numpy(golden["tokens"])[None])[0].numpy()
    assert np.abs(logits - golden["logits"]).max() < 1e-5 * np.abs(golden["logits"]).max()


@pytest.mark.skipif(not GOLDEN.exists(), reason="golden checkpoints absent")
@pytest.mark.parametrize("name", ["tc-per-token-gate", "tc-two-timescales", "tc-slots-k", "sinks", "infini-delta"])
def test_other_options_are_refused(name):
    from network import load

    with pytest.raises(ValueError, match="the trainer supports only"):
        load(GOLDEN / name / "ckpt.pt")


@pytest.fixture
def run(tmp_path):
    """Run the command on a small text; returns the result."""
    from click.testing import CliRunner
    from train import main

    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog.\n" * 40)

    def invoke(out, *options):
        return CliRunner().invoke(main, [f"--data={text}", f"--out={tmp_path / out}", *TOY, *options])

    return invoke


@pytest.mark.parametrize(("rule", "golden"), [("delta", "tc-delta"), ("none", "window")])
def test_checkpoint_has_the_published_format(run, tmp_path, rule, golden):
    result = run("out", "--steps=4", "--eval-every=2", f"--rule={rule}")
    assert result.exit_code == 0, result.output
    checkpoint = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    assert "best validation loss" in result.output
    assert not list((tmp_path / "out").glob("*.part"))

    meta = pickle.loads((tmp_path / "out" / "meta.pkl").read_bytes())
    assert meta.keys() == {"vocab_size", "itos", "stoi"}
    assert meta["vocab_size"] == len(meta["itos"]) == checkpoint["model_args"]["vocab_size"]
    assert all(meta["stoi"][character] == i for i, character in meta["itos"].items())

    if not GOLDEN.exists():
        pytest.skip("golden checkpoints absent")
    published = torch.load(GOLDEN / golden / "ckpt.pt", weights_only=False)
    assert checkpoint.keys() == published.keys()
    assert list(checkpoint["model_args"]) == list(published["model_args"])
    assert checkpoint["model"].keys() == published["model"].keys()
    for key in ("optimizer", "model_args", "iter_num", "best_val_loss", "config"):
        assert type(checkpoint[key]) is type(published[key])
    for key, value in checkpoint["model"].items():
        assert value.dim() == published["model"][key].dim()


def test_resumed_run_takes_the_same_steps(run, tmp_path, monkeypatch):
    import train

    options = ["--steps=12", "--eval-every=3", "--dropout=0.1"]
    assert run("whole", *options).exit_code == 0

    sample, calls = train.sample_batch, iter(range(7))

    def interrupted(*arguments):
        if next(calls, None) is None:
            raise RuntimeError("power cut")
        return sample(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train, "sample_batch", interrupted)
        assert isinstance(run("cut", *options).exception, RuntimeError)
    assert torch.load(tmp_path / "cut" / "last.pt")["iter_num"] == 6
    assert run("cut", *options, "--resume").exit_code == 0

    whole, cut = (torch.load(tmp_path / name / "last.pt") for name in ("whole", "cut"))
    assert whole["iter_num"] == cut["iter_num"] == 12
    assert whole["best_val_loss"] == cut["best_val_loss"]
    for key, value in whole["model"].items():
        torch.testing.assert_close(cut["model"][key], value, rtol=0, atol=0)


def test_training_learns(run):
    result = run("out", "--steps=120", "--eval-every=60", "--warmup=10")
    assert float(result.output.split("best validation loss")[1].split()[0]) < 1.0


def test_evaluate_compares_memory_with_window(run, tmp_path):
    from click.testing import CliRunner
    from evaluate import main

    run("out", "--steps=60", "--warmup=10")  # the memory starts almost silent
    paths = [f"--data={tmp_path / 'text.txt'}", f"--checkpoint={tmp_path / 'out' / 'ckpt.pt'}"]
    result = CliRunner().invoke(main, [*paths, "--length=40"])
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.output.splitlines()[1:]]
    assert [row[0] for row in rows] == ["0..7", "8..23", "24..39", "8..39"]
    assert float(rows[0][3]) == 0  # inside the window the memory is silent
    assert float(rows[3][3]) != 0


def test_nothing_to_resume(run):
    result = run("empty", "--resume")
    assert result.exit_code != 0
    assert "nothing to resume" in result.output
