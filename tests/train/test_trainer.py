"""The trainer: what it trains is what streaming computes, and what it saves the runtime runs.

The reference is oracle.py, one token after another, which shares nothing with the trainer: the weights reach it
through the checkpoint and the converter.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from conftest import SHARED, shared
from trainer_modules import trainer_modules

import tcinfer
from tcinfer import converters
from tcinfer.converters import tcgpt

pytestmark = pytest.mark.peer
torch = pytest.importorskip("torch")
pytest.importorskip("sentencepiece")

trainer = pytest.fixture(scope="module")(trainer_modules)


# The scan


def recurrence(q, k, v, decay, rate, A, c, wedge, write_first):
    """The definition, pair after pair. q [B, G, R, N, D]; k, v [B, G, N, D]; decay, rate, c [B, G, N]; A [B, G, D, D].

    Returns the reads [B, G, R, N, D] and the last A.
    """
    reads = []
    for i in range(k.shape[2]):
        key, value, old = k[:, :, i], v[:, :, i], A
        u = value - c[:, :, i, None] * torch.einsum("bgd,bgde->bge", key, A)
        change = torch.einsum("bgd,bge->bgde", key, u)
        if wedge:
            change = change - change.mT
        A = decay[:, :, i, None, None] * A + rate[:, :, i, None, None] * change
        reads.append(torch.einsum("bgrd,bgde->bgre", q[:, :, :, i], A if write_first else old))
    return torch.stack(reads, 3), A


@pytest.mark.parametrize("write_first", [False, True])
@pytest.mark.parametrize("chunk", [1, 5, 16, 64])
@pytest.mark.parametrize("terms", ["per head", "per token"])
@pytest.mark.parametrize("rule", ["delta", "outer", "wedge", "infini"])
def test_scan_equals_the_recurrence(rule, terms, chunk, write_first, trainer):
    torch.manual_seed(0)
    B, G, R, N, D = 2, 3, 2, 37, 8
    q = torch.randn(B, G, R, N, D, dtype=torch.float64)
    k, v = torch.randn(2, B, G, N, D, dtype=torch.float64)
    A = torch.randn(B, G, D, D, dtype=torch.float64)
    decay, rate = torch.tensor([0.2, 0.9, 0.9999]).double()[:, None], torch.tensor([0.05, 0.5, 1.0]).double()[:, None]
    if terms == "per token":
        decay, rate = (torch.rand(2, B, G, N, dtype=torch.float64) * 0.9 + 0.1).unbind()
    if rule == "infini":
        k = torch.nn.functional.elu(k) + 1
        seen = torch.rand(B, G, 1, D, dtype=torch.float64) + k.cumsum(2) - k
        c = 1 / ((k * seen).sum(-1) + 1e-5)
        decay, rate = torch.ones(2, 1, dtype=torch.float64)
    else:
        k = k / k.norm(dim=-1, keepdim=True)
        c = torch.full((B, G, N), float(rule == "delta"), dtype=torch.float64)
    wedge, full = rule == "wedge", torch.ones(B, G, N, dtype=torch.float64)
    want, last = recurrence(q, k, v, decay * full, rate * full, A, c, wedge, write_first)

    def scanned(dtype):
        arguments = [x.to(dtype) for x in (q, k, v, decay.log(), rate, A)]
        retrieve = None if rule in ("outer", "wedge") else c.to(dtype)
        return trainer.scan.scan(*arguments, retrieve=retrieve, wedge=wedge, write_first=write_first, chunk=chunk)

    for got, right in zip(scanned(torch.float64), (want, last), strict=True):
        assert difference(got, right) < 1e-10
    for got, right in zip(scanned(torch.float32), (want, last), strict=True):
        assert got.dtype == torch.float32
        assert difference(got, right) < 1e-5 * right.abs().max()
    with torch.autocast("cpu", torch.bfloat16):  # no product of the memory is rounded to bfloat16
        assert difference(scanned(torch.float32)[0], want) < 1e-5 * want.abs().max()


# Training equals streaming

WINDOW = 6
PLAIN = {"tc_enabled": False}
EVERY = {  # every option beside the rule
    "tc_write_then_read": True,
    "key_conv": 2,
    "tc_rope": False,
    "tc_token_rate": True,
    "tc_token_decay": True,
    "tc_per_token_gate": True,
    "tc_normalize_q": True,
    "tc_value_scale": 0.5,
    "n_kv_head": 2,
    "block": "llama",
}
CASES: dict[str, dict[str, Any]] = {
    "delta": {},
    "outer": {"tc_update_rule": "outer"},
    "wedge": {"tc_update_rule": "wedge"},
    "window": PLAIN,
    "sinks": PLAIN | {"kv_num_sinks": 2},
    "infini-delta": {"infini_enabled": True},
    "infini-linear": {"infini_enabled": True, "infini_update_rule": "linear"},
    "infini-sinks": {"infini_enabled": True, "kv_num_sinks": 2},
    "full": PLAIN | {"kv_window": 0},
    "full-with-memory": {"kv_window": 0},
    "window-of-one": {"kv_window": 1},
    "write-then-read": {"tc_write_then_read": True},
    "key-conv": {"key_conv": 2},
    "memory-without-rope": {"tc_rope": False},
    "token-rate": {"tc_token_rate": True},
    "token-decay": {"tc_token_decay": True},
    "token-gate": {"tc_per_token_gate": True},
    "top-layer": {"tc_layers": 1},
    "no-layer": {"tc_layers": 0},
    "normalized-q": {"tc_normalize_q": True},
    "plain-k": {"tc_normalize_k": False, "tc_update_rule": "outer"},
    "value-scale": {"tc_value_scale": 0.5},
    "frozen-rates": {"tc_freeze_decay_lr": True},
    "grouped": {"n_kv_head": 2},
    "llama": {"block": "llama"},
    "llama-width": {"block": "llama", "n_inner": 40},
    "every": EVERY,
    "every-top-outer": EVERY | {"tc_layers": 1, "tc_update_rule": "outer"},
    "every-wedge-gpt": EVERY | {"tc_update_rule": "wedge", "block": "gpt", "tc_freeze_decay_lr": True},
    "llama-window": PLAIN | {"block": "llama", "n_kv_head": 1, "key_conv": 2},
    "llama-sinks": PLAIN | {"block": "llama", "n_kv_head": 2, "key_conv": 2, "kv_num_sinks": 2},
    "llama-infini": {"infini_enabled": True, "block": "llama", "n_kv_head": 2, "key_conv": 2},
    "llama-full": PLAIN | {"block": "llama", "n_kv_head": 2, "kv_window": 0},
}
every_case = pytest.mark.parametrize("case", CASES)


def made(trainer, case: str):
    """A model of float32 weights, far from the start, so that every part moves the logits; evaluated."""
    args = trainer.options.ModelArgs(
        **{
            "n_layer": 2,
            "n_head": 4,
            "n_embd": 32,
            "block_size": 32,
            "vocab_size": 17,
            "kv_window": WINDOW,
            "tc_chunk_size": 5,
            "tc_decay_init": 0.9,
            "tc_lr_init": 0.3,
            "tc_gate_init": 0.0,
        }
        | CASES[case]
    )
    torch.manual_seed(1)
    model = trainer.network.GPT(args).eval()
    with torch.no_grad():
        for x in [*model.parameters(), *model.buffers()]:
            x.add_(0.3 * torch.randn_like(x))
    return model


def tokens_of(model, B: int = 2, T: int = 41):
    return torch.randint(model.args.vocab_size, (B, T), generator=torch.Generator().manual_seed(2))


def saved(model, folder: Path) -> Path:
    """A checkpoint of a model as the train command writes it."""
    torch.save({"model": model.state_dict(), "model_args": model.args.saved()}, folder / "ckpt.pt")
    return folder / "ckpt.pt"


def difference(a, b) -> float:
    return (a - b).abs().max().item()


@torch.no_grad()
def whole(model, tokens):
    return model(tokens)[0]


@every_case
def test_full_sequence_equals_streaming(case, trainer, tmp_path):
    model = made(trainer, case)
    source, tokens = tcgpt.read(saved(model, tmp_path)), tokens_of(model)
    weights = {name: tensor.load() for name, tensor in source.tensors.items()}
    want = torch.tensor(np.array([oracle.logits(source.config, weights, row.tolist()) for row in tokens]))
    assert 1 < want.abs().max() < 20
    assert difference(whole(model, tokens), want) < 1e-4
    assert difference(whole(model.double(), tokens), want) < 1e-10


def test_every_option_moves_the_logits(trainer):
    """So that the test above would notice an option that does nothing on both sides."""
    shape = ("n_kv_head", "block", "n_inner")
    for case, changes in CASES.items():
        if set(changes) & set(shape) or case in ("delta", "frozen-rates"):
            continue
        model = made(trainer, case)
        plain = trainer.network.GPT(trainer.options.ModelArgs(**vars(made(trainer, "delta").args))).eval()
        plain.load_state_dict(model.state_dict(), strict=False)
        assert difference(whole(model, tokens_of(model)), whole(plain, tokens_of(model))) > 1e-2, case


@pytest.mark.parametrize("parts", [[1] * 41, [7, 1, 1, 13, 6, 2, 11], [WINDOW - 1, 30, WINDOW], [3, 38]])
@every_case
def test_segments_with_their_state_equal_the_whole(case, parts, trainer):
    model = made(trainer, case).double()
    tokens, state, logits = tokens_of(model), None, []
    with torch.no_grad():
        for part in tokens.split(parts, 1):
            out, state = model(part, state)
            logits.append(out)
    assert difference(torch.cat(logits, 1), whole(model, tokens)) < 1e-10
    assert state.seen.tolist() == [41, 41]


STARTS = [[0, 14, 15], [0], [0, 5, 32], [0, 5, 14, 15, 32]]  # of the documents of four streams
CUTS = [0, 5, 14, 15, 27, 32, 41]  # of the segments


@every_case
def test_a_restarted_stream_is_a_fresh_one(case, trainer):
    """Streams restarted at different times, side by side: each gives what it gives alone, from nothing."""
    model = made(trainer, case).double()
    tokens, logits = tokens_of(model, len(STARTS)), []
    state = model.start(len(STARTS))
    with torch.no_grad():
        for start, stop in pairwise(CUTS):
            state = state.restarted(torch.tensor([start in starts for starts in STARTS]))
            out, state = model(tokens[:, start:stop], state)
            state = state.detached()
            logits.append(out)
    got = torch.cat(logits, 1)
    for stream, starts in enumerate(STARTS):
        for start, stop in pairwise([*starts, 41]):
            alone = whole(model, tokens[stream : stream + 1, start:stop])[0]
            assert difference(got[stream, start:stop], alone) < 1e-10
    assert state.seen.tolist() == [41 - starts[-1] for starts in STARTS]


def test_full_attention_drops_what_no_stream_sees(trainer):
    """Else a training run with full attention keeps every token that it ever read."""
    model = made(trainer, "full")
    state = model.start(2)
    with torch.no_grad():
        for step in range(6):
            state = state.restarted(torch.tensor([step % 2 == 0, step % 2 == 1]))
            _, state = model(tokens_of(model, T=4), state)
    assert state.layers[0]["k"].shape[2] <= 8


@every_case
def test_gradients_reach_every_weight(case, trainer):
    model = made(trainer, case)
    tokens = tokens_of(model)
    logits, state = model(tokens[:, :20])
    again, _ = model(tokens[:, 20:], state.restarted(torch.tensor([True, False])))
    torch.cat((logits, again), 1).square().mean().backward()
    args = model.args
    silent = () if args.tc_layers < 0 and args.kv_window else ("tc_proj", "tc_gate", "attn.tc.")
    for name, parameter in model.named_parameters():
        if not any(part in name for part in silent):
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name


# The runtime

CONVERTED = [
    "delta",
    "outer",
    "wedge",
    "window",
    "sinks",
    "infini-delta",
    "full",
    "grouped",
    "every",
    "every-top-outer",
    "every-wedge-gpt",
    "llama-sinks",
    "llama-infini",
]


@pytest.mark.parametrize("case", CONVERTED)
def test_the_runtime_gives_the_same_logits(case, trainer, tmp_path):
    model = made(trainer, case)
    converters.convert(saved(model, tmp_path), tmp_path / "model.gguf", "f32", verify=False)
    [tokens], [want] = tokens_of(model, 1), whole(model, tokens_of(model, 1))
    for backend in ("numpy", "numba"):
        session = tcinfer.load(tmp_path / "model.gguf", backend=backend, cache_type="f32").session()
        parts = tokens.split([1, 17, 1, 1, 21])
        got = np.concatenate([session.feed(part.tolist(), all_logits=True) for part in parts])
        assert difference(torch.from_numpy(got), want) < 1e-4


# The published checkpoints

GOLDEN = sorted(path.parent.name for path in SHARED.glob("golden/*/ckpt.pt"))
REFUSED = {  # and what it is that the trainer does not build
    "full-learned-positions": "bias",
    "tc-normalized-read": "tc_normalize_read",
    "tc-per-token-gate": "bias",
    "tc-rope-scaled": "rope_scaling_factor",
    "tc-slots-k": "tc_num_slots",
    "tc-slots-q": "tc_num_slots",
    "tc-two-timescales": "tc_two_timescales",
    "tc-write-on-insert": "tc_write_on_evict",
}


@pytest.mark.parametrize("name", [name for name in GOLDEN if name not in REFUSED])
def test_golden_logits(name, trainer):
    model, _ = trainer.network.load(shared("golden", name, "ckpt.pt"))
    golden = np.load(shared("golden", name, "golden.npz"))
    got, want = whole(model.double(), torch.from_numpy(golden["tokens"])[None])[0], torch.from_numpy(golden["logits"])
    assert difference(got, want) < 1e-6 * want.abs().max()


@pytest.mark.parametrize("name", [name for name in GOLDEN if name in REFUSED])
def test_what_is_not_built_is_refused(name, trainer):
    with pytest.raises(ValueError, match=f"the trainer supports only .*{REFUSED[name]}"):
        trainer.network.load(shared("golden", name, "ckpt.pt"))


@pytest.mark.parametrize("name", ["tc-delta", "window", "sinks", "infini-delta"])
def test_saved_arguments_are_the_published_ones(name, trainer):
    published = torch.load(shared("golden", name, "ckpt.pt"), weights_only=True)
    args = trainer.options.ModelArgs(**published["model_args"])
    assert list(args.saved().items()) == list(published["model_args"].items())
    assert trainer.network.GPT(args).state_dict().keys() == published["model"].keys()


@every_case
def test_saved_arguments_come_back(case, trainer):
    args, published = made(trainer, case).args, list(trainer.options.ModelArgs().saved())
    assert trainer.options.ModelArgs(**args.saved()) == args
    assert len(published) == 40
    assert list(args.saved())[:40] == published
    assert set(list(args.saved())[40:]) <= CASES[case].keys() | {"n_inner"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tc_update_rule": "hebb"}, "tc_update_rule must be one of outer, delta, wedge, not 'hebb'"),
        ({"key_conv": 3}, "key_conv must be one of 0, 2"),
        ({"n_head": 5}, "n_head 5 must divide n_embd"),
        ({"n_kv_head": 5}, "n_kv_head 5 must divide n_head"),
        ({"kv_num_sinks": 4}, "a Tensor Cache has no sinks"),
        ({"kv_num_sinks": 4, "kv_window": 4, "tc_enabled": False}, "leaves no room"),
    ],
)
def test_impossible_arguments_are_refused(changes, message, trainer):
    with pytest.raises(ValueError, match=message):
        trainer.options.ModelArgs(**changes)
