"""Write a Source as GGUF: quantise, stream, rename; then decode from both and compare."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, LlamaFileType
from gguf.constants import GGMLQuantizationType as Kind
from gguf.gguf_writer import GGUFWriter
from gguf.quants import quantize
from numpy.typing import NDArray
from tcinfer.converters.source import F32, Source

from tcinfer import format as schema
from tcinfer.config import ModelConfig
from tcinfer.errors import FileError
from tcinfer.loader import bind, load, operators
from tcinfer.memory.state import Spec
from tcinfer.model import Model, tensors
from tcinfer.progress import bar
from tcinfer.tokenizer import from_metadata

OUTTYPES = {
    "f32": Kind.F32,
    "f16": Kind.F16,
    "bf16": Kind.BF16,
    "q8_0": Kind.Q8_0,
    "q4_0": Kind.Q4_0,
    "q4_1": Kind.Q4_1,
    "q5_0": Kind.Q5_0,
    "q5_1": Kind.Q5_1,
}
FILE_TYPES = {
    Kind.F32: LlamaFileType.ALL_F32,
    Kind.F16: LlamaFileType.MOSTLY_F16,
    Kind.BF16: LlamaFileType.MOSTLY_BF16,
    Kind.Q8_0: LlamaFileType.MOSTLY_Q8_0,
    Kind.Q4_0: LlamaFileType.MOSTLY_Q4_0,
    Kind.Q4_1: LlamaFileType.MOSTLY_Q4_1,
    Kind.Q5_0: LlamaFileType.MOSTLY_Q5_0,
    Kind.Q5_1: LlamaFileType.MOSTLY_Q5_1,
}
# The largest magnitude that each kind can hold; for the quantised ones, that its float16 scales surely can.
LARGEST = {Kind.F32: float(np.finfo(np.float32).max), Kind.BF16: 3.3895e38}
LARGEST_OF_HALF = 65504.0
VERIFY_TOKENS = 256  # at most: as many as show the memory at work, two windows where they fit


@dataclass
class Written:
    """What a conversion did."""

    path: Path
    nbytes: int
    kinds: dict[str, int] = field(default_factory=dict)  # kind -> tensors
    fallback: list[str] = field(default_factory=list)  # matrices kept in F16: their rows are no multiple of the block


@dataclass(frozen=True)
class Packed:
    """A tensor as it goes into a file (loader.Stored)."""

    kind: Kind
    shape: tuple[int, ...]
    data: NDArray[np.uint8]  # [rows, bytes per row]


def pack(name: str, values: F32, kind: Kind) -> Packed:
    """float32 [...] in the packing of `kind`. Raises FileError for NaN, Inf, or what does not fit the kind."""
    if not np.isfinite(values).all():
        raise FileError(f"tensor {name!r} holds NaN or Inf: this checkpoint is broken")
    if np.abs(values).max(initial=0) > LARGEST.get(kind, LARGEST_OF_HALF):
        other = "f32" if kind == Kind.BF16 else "bf16 or f32"
        raise FileError(f"tensor {name!r} has values beyond the range of {kind.name}: use --outtype {other}")
    packed = quantize(np.ascontiguousarray(values, np.float32), kind)
    rows = values.shape[0] if values.ndim > 1 else 1
    return Packed(kind, values.shape, np.ascontiguousarray(packed).view(np.uint8).reshape(rows, -1))


def kind_of(spec: Spec, wanted: Kind) -> Kind:
    """How a tensor is stored: as wanted if it is a matrix whose rows divide into blocks, F16 if they do not, and
    float32 for all that is no matrix."""
    if not spec.matrix:
        return Kind.F32
    block, _ = GGML_QUANT_SIZES[wanted]
    return Kind.F16 if spec.shape[-1] % block else wanted


def write(source: Source, path: Path, outtype: str, vocabulary: Mapping[str, Any]) -> Written:
    """Write `path`, through a temporary file beside it: it is there whole or not at all.

    vocabulary: the `tokenizer.*` keys. Raises FileError for tensors that the configuration does not have, lacks, or
    that hold NaN.
    """
    wanted = OUTTYPES[outtype]
    specs = tensors(source.config)
    _check_names(source, specs)
    kinds = {name: kind_of(specs[name], wanted) for name in source.tensors}
    done = Written(path, 0)
    writer = GGUFWriter(None, source.config.arch)
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    except OSError as e:
        raise FileError(f"{path}: cannot be written: {e.strerror}") from None
    os.close(handle)
    try:
        keys = schema.to_metadata(source.config) | dict(vocabulary)
        keys |= {"general.file_type": int(FILE_TYPES[wanted]), "general.quantization_version": 2}
        for key, value in keys.items():
            if key != "general.architecture":  # the writer has put it there
                _add(writer, key, value)
        for name, kind in kinds.items():
            _announce(writer, name, specs[name].shape, kind)
        writer.write_header_to_file(Path(temporary))
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with bar("writing", len(kinds)) as advance:
            for name, kind in kinds.items():
                values = source.tensors[name]()
                if values.shape != specs[name].shape:
                    raise FileError(
                        f"tensor {name!r} has shape {list(values.shape)}, the model needs {list(specs[name].shape)}"
                    )
                writer.write_tensor_data(pack(name, values, kind).data)
                done.kinds[kind.name] = done.kinds.get(kind.name, 0) + 1
                if specs[name].matrix and kind != wanted:
                    done.fallback.append(name)
                advance(1)
        writer.close()
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as e:
        raise FileError(f"{path}: cannot be written: {e.strerror}") from None
    finally:
        with suppress(OSError):  # of a full disk; closed already where all went well
            writer.close()
        Path(temporary).unlink(missing_ok=True)
    done.nbytes = path.stat().st_size
    return done


def _check_names(source: Source, specs: Mapping[str, Spec]) -> None:
    for name in source.tensors:
        if name not in specs:
            raise FileError(f"tensor {name!r} has no place in a {source.config.arch} model")
    for name, spec in specs.items():
        if spec.required and name not in source.tensors:
            raise FileError(f"tensor {name!r} is missing")


def _announce(writer: GGUFWriter, name: str, shape: tuple[int, ...], kind: Kind) -> None:
    block, size = GGML_QUANT_SIZES[kind]
    row = (shape[-1] // block) * size
    rows = int(np.prod(shape[:-1], dtype=np.int64)) if len(shape) > 1 else 1
    writer.add_tensor_info(name, (*shape[:-1], row), np.dtype(np.uint8), rows * row, raw_dtype=kind)


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        (writer.add_uint32 if value >= 0 else writer.add_int32)(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def verify(source: Source, path: Path) -> tuple[float, float, int]:
    """Decode the same tokens from the file and from the checkpoint's own tensors.

    Returns max |difference| of the logits, max |logit|, and how many tokens were decoded. Raises FileError for logits
    that are no numbers.
    """
    config = source.config
    ops = operators("numpy", None)
    stored = {name: pack(name, values(), Kind.F32) for name, values in source.tensors.items()}
    original = Model(config, bind(config, stored), from_metadata({}, config.vocab_size), ops)
    count = _verify_tokens(config)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, count)
    with bar("verifying", 2 * count) as advance:
        want = original.session().feed(ids, all_logits=True, progress=advance)
        got = load(path, backend="numpy").session().feed(ids, all_logits=True, progress=advance)
    if not np.isfinite(want).all() or not np.isfinite(got).all():
        raise FileError(f"{path}: was written, but the logits are not finite: the weights are damaged or overflow")
    return float(np.abs(got - want).max()), float(np.abs(want).max()), count


def _verify_tokens(config: ModelConfig) -> int:
    count = min(2 * config.window or VERIFY_TOKENS, VERIFY_TOKENS)
    return min(count, config.context_length) if config.learned_positions else max(count, 32)
