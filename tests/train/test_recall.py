"""Associative recall beyond the window: the task asks what only a memory can know, the small model solves it, and the
runtime answers as the trainer does."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from trainer_modules import trainer_modules

import tcinfer
from tcinfer import converters

pytestmark = pytest.mark.peer
torch = pytest.importorskip("torch")

TASKS = [{}, {"twice": True}, {"farthest": 4}, {"pairs": 32}, {"pairs": 4}, {"pairs": 32, "twice": True}]


trainer = pytest.fixture(scope="module")(trainer_modules)


def drawn(trainer, B: int, seed: int = 3, **changes):
    """A task and B of its sequences."""
    task = trainer.recall_task.Task(**changes)
    return task, *trainer.recall_task.draw(task, B, torch.Generator().manual_seed(seed))


# The task


@pytest.mark.parametrize("changes", TASKS, ids=str)
def test_the_answer_is_the_latest_binding_and_stands_nowhere_nearer(trainer, changes):
    task, tokens, asked, gaps = drawn(trainer, 50, **changes)
    W = task.window
    for ids, places, distances in zip(tokens.tolist(), asked.tolist(), gaps.tolist(), strict=True):
        assert len(places) == len({ids[at] for at in places}) > 0
        for at, gap in zip(places, distances, strict=True):
            before = at - 1 - ids[:at][::-1].index(ids[at])  # where the key last stood
            assert (at - before, ids[at + 1]) == (gap, ids[before + 1])
            assert task.nearest * W + 2 <= gap <= task.farthest * W
    filler = trainer.recall_task.KEYS + trainer.recall_task.VALUES
    assert (tokens[:, : trainer.recall_task.LEAD] >= filler).all()  # so that sinks hold no binding


@pytest.mark.parametrize("changes", TASKS, ids=str)
def test_what_a_sequence_holds(trainer, changes):
    """So many keys, each with a value; half of them again with another one; all else is filler."""
    task, tokens, asked, _ = drawn(trainer, 50, **changes)
    KEYS, VALUES = trainer.recall_task.KEYS, trainer.recall_task.VALUES
    for ids, places in zip(tokens.tolist(), asked.tolist(), strict=True):
        bound: dict[int, list[int]] = {}
        for at, token in enumerate(ids):
            if token < KEYS and at not in places:
                bound.setdefault(token, []).append(ids[at + 1])
        again = task.bindings - task.pairs
        assert sorted(map(len, bound.values())) == [1] * (task.pairs - again) + [2] * again
        assert all(KEYS <= value < KEYS + VALUES for values in bound.values() for value in values)
        assert all(len(set(values)) == len(values) for values in bound.values())
        assert sum(token < KEYS + VALUES for token in ids) == 2 * (task.bindings + len(places))


def test_gaps_spread_over_their_range(trainer):
    task, _, _, gaps = drawn(trainer, 500)
    counts = np.histogram(gaps.numpy(), bins=np.array([4, 7, 10, 13, 16]) * task.window)[0]
    assert counts.min() > 0.75 * counts.max()


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("memory", ["window", "sinks", "full", "infini", "outer", "wedge", "delta"])
def test_only_a_memory_can_know(trainer, memory, layers):
    """With all bindings exchanged the window and the sinks see no difference where the keys are asked."""
    recall = trainer.recall
    task, tokens, asked, _ = drawn(trainer, 20)
    lead = trainer.recall_task.LEAD
    other = tokens.clone()
    other[:, lead : lead + 2 * task.pairs] = tokens[:, lead : lead + 2 * task.pairs].roll(1, 0)
    torch.manual_seed(1)
    model = trainer.network.GPT(recall.arguments(layers, **recall.MEMORIES[memory]))
    with torch.no_grad():
        changed = (recall.answers(model, tokens, asked) - recall.answers(model, other, asked)).abs().amax().item()
    assert changed < 1e-6 if memory in ("window", "sinks") else changed > 1e-4


def test_the_seed_decides(trainer):
    recall = trainer.recall
    models = [
        recall.fit(recall.arguments(), trainer.recall_task.Task(), recall.Recipe(steps=3, seed=seed))[0]
        for seed in (1, 1, 2)
    ]
    first, same, other = (torch.cat([p.flatten() for p in model.parameters()]) for model in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


# One matrix


def test_a_matrix_holds_pairs_and_their_means_do_not(trainer):
    held = trainer.recall_matrix.held
    for rule in ("outer", "delta"):
        assert held(32, rule, 1)[0] > 0.99
        assert held(64, rule, 1)[0] > 0.9
        assert held(64, rule, 1, chunk=64)[0] == pytest.approx(1 / 64, abs=0.005)
        assert held(64, rule, 1, chunk=16)[0] == pytest.approx(1 / 16, abs=0.03)
    assert held(64, "outer", 1, alike=True)[0] < held(64, "delta", 1, alike=True)[0]


# Trained models


@pytest.fixture(scope="module")
def trained(trainer, tmp_path_factory):
    out = tmp_path_factory.mktemp("recall")
    done = CliRunner().invoke(trainer.recall.main, ["train", "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0
    return out


@pytest.mark.slow
def test_delta_recalls_to_sixteen_windows(trained):
    (row,) = json.loads((trained / "train.json").read_text())
    assert row["all gaps"][0] >= 0.95
    assert row["12-16 W"][0] >= 0.95
    assert row["steps"] < 600


@pytest.mark.slow
@pytest.mark.parametrize("feed", ["at once", "one by one", "ragged"])
def test_the_runtime_recalls_as_well(trainer, trained, backend, feed):
    converters.convert(trained / "ckpt.pt", trained / "model.gguf", "f32", verify=True)
    model = tcinfer.load(trained / "model.gguf", backend=backend, cache_type="f32")
    _, tokens, asked, _ = drawn(trainer, 25, seed=0)
    network, _ = trainer.network.load(trained / "ckpt.pt")
    with torch.no_grad():
        wanted = trainer.recall.answers(network, tokens, asked).numpy()
    right = []
    for ids, places, logits in zip(tokens.numpy(), asked.numpy(), wanted, strict=True):
        cuts = {"at once": [], "one by one": range(1, len(ids)), "ragged": [1, 4, 21, 23, 60, 61, 200]}[feed]
        session = model.session()
        got = np.concatenate([session.feed(part, all_logits=True) for part in np.split(ids, cuts)])[places]
        assert np.abs(got - logits).max() < 1e-3 * np.abs(logits).max()
        right.append(got.argmax(-1) == ids[places + 1])
    assert np.mean(right) >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize(
    ("memory", "changes", "steps", "low", "high"),
    [
        ("window", {}, 200, 0, 0.05),
        ("sinks", {}, 200, 0, 0.05),
        ("full", {}, 600, 0.95, 1),
        ("delta", {"twice": True}, 600, 0.95, 1),
        ("outer", {"twice": True}, 600, 0.4, 0.85),
        ("delta", {"farthest": 4}, 600, 0.9, 1),
    ],
)
def test_what_the_memories_recall(trainer, memory, changes, steps, low, high):
    """Tested to 16 windows, whatever they were trained on."""
    recall = trainer.recall
    task = trainer.recall_task.Task(**changes)
    model, _ = recall.fit(recall.arguments(**recall.MEMORIES[memory]), task, recall.Recipe(steps))
    right, gaps = recall.recalled(model, replace(task, farthest=16))
    assert low <= right.double().mean() <= high
    if low:
        assert low <= right[gaps > 12 * task.window].double().mean() <= high
