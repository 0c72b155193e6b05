"""Makes GGUF files to measure with: one model in many weight types, and one of a larger model's proportions.

    python benchmarks/make_models.py OUTDIR

SmolLM2-135M is installed as Q4_1 only, and a benchmark of the other types needs the same model in each of them. Its
rows of 576 weights do not divide into the 256 of a K-quant block, so llama.cpp stores most of them as Q5_0 or Q8_0
instead: the K-quants are measured on a model of random weights, 2048 wide, whose every matrix is of the one type.
All are quantised by llama.cpp (the extra `peer`), none is committed (3 GB in all), and those already there are kept.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import random_llama

# The name of a file's type -> llama.cpp's name for that mixture of types.
SMOLLM2 = {kind: kind.upper() for kind in ("bf16", "q4_0", "q5_0", "q5_1", "q8_0", "q4_k_m", "q6_k")}
LLAMA2048 = {"q4_k": "Q4_K_S", "q6_k": "Q6_K", "q4_0": "Q4_0", "q8_0": "Q8_0"}
WIDE = random_llama.Shape(width=2048, layers=8, heads=32, kv_heads=8, feed_forward=8192, vocabulary=32000)


def once(path: Path, make: Callable[[Path], object]) -> Path:
    """The path, which `make` has written in full under a temporary name, unless the file was there before."""
    if not path.exists():
        part = path.with_name(f".{path.name}.part")
        part.unlink(missing_ok=True)
        make(part)
        part.replace(path)
        print(f"{path}: {path.stat().st_size / 1e6:.0f} MB", file=sys.stderr)
    return path


def quantise(source: Path, kind: str, pure: bool = False) -> Callable[[Path], None]:
    """A maker of `source` in llama.cpp's mixture `kind`; `pure`: all matrices of its main type, embeddings too."""
    import llama_cpp

    def make(path: Path) -> None:
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
        params.allow_requantize, params.pure = True, pure
        if llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), params):
            raise RuntimeError(f"llama.cpp could not quantise {source} to {kind}")

    return make


def vocabulary(source: Path, size: int) -> dict[str, gguf.GGUFValue]:
    """The tokenizer's metadata of a GGUF file of byte pairs, cut to its first `size` tokens."""
    values: dict[str, Any] = {}
    for key, field in gguf.GGUFReader(source).fields.items():
        if key.startswith("tokenizer."):
            kind, *item = field.types
            values[key] = gguf.GGUFValue(field.contents(), kind, *item)
    tokens, types, merges = (values[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type", "merges"))
    tokens.value, types.value = tokens.value[:size], types.value[:size]
    kept = set(tokens.value)
    merges.value = [merge for merge in merges.value if merge.replace(" ", "") in kept]
    return values


def make_smollm2(folder: Path, source: Path) -> list[Path]:
    """SmolLM2 in every type of SMOLLM2, from its weights as F16, which are kept; the Q4_1 is a link to the source."""
    q4_1 = once(folder / "smollm2-q4_1.gguf", lambda part: part.symlink_to(source.resolve()))
    f16 = once(folder / "smollm2-f16.gguf", quantise(source, "F16"))
    return [q4_1, f16, *(once(folder / f"smollm2-{kind}.gguf", quantise(f16, SMOLLM2[kind])) for kind in SMOLLM2)]


def make_llama2048(folder: Path, source: Path) -> list[Path]:
    """The random Llama, of one type in each file, with the start of the vocabulary of `source`."""
    paths = {kind: folder / f"llama2048-{kind}.gguf" for kind in LLAMA2048}
    if not all(path.exists() for path in paths.values()):
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            f16 = Path(scratch, "f16.gguf")
            random_llama.write(f16, WIDE, tokenizer=vocabulary(source, WIDE.vocabulary))
            for kind, path in paths.items():
                once(path, quantise(f16, LLAMA2048[kind], pure=True))
    return list(paths.values())


def make(folder: Path) -> dict[str, Path]:
    """All of them, by their names without the ending; those that are there already are kept."""
    from conftest import smollm2

    logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)  # no line for every tensor
    folder.mkdir(parents=True, exist_ok=True)
    return {path.stem: path for path in make_smollm2(folder, smollm2()) + make_llama2048(folder, smollm2())}


if __name__ == "__main__":
    make(Path(sys.argv[1]))
