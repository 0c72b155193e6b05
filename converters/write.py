"""Write a Source as GGUF: quantise, stream, rename; then decode from both and compare."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, LlamaFileType
from gguf.constants import GGMLQuantizationType as Kind
from gguf.gguf_writer import GGUFValue, GGUFWriter
from gguf.quants import quantize

from tcinfer.api import Model
from tcinfer.atomic import replacing
from tcinfer.converters.source import F32, Source
from tcinfer.engine import backend
from tcinfer.errors import FileError, TcinferError
from tcinfer.gguf import schema
from tcinfer.gguf.reader import TensorInfo
from tcinfer.loader import bind, load
from tcinfer.memory_options import with_memory
from tcinfer.net import Spec
from tcinfer.progress import bar
from tcinfer.tokenizer import from_metadata
from tcinfer.transformer import file_tensors

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
VERIFIED_BELOW = 2**30  # bytes of output up to which a file is verified unless told otherwise
VERIFY_WINDOW = 32  # tokens; twice as many are decoded


class Verified(NamedTuple):
    """How far the written file's logits are from the checkpoint's own."""

    worst: float  # max |difference|
    largest: float  # max |logit|
    tokens: int


@dataclass
class Written:
    """What a conversion did."""

    path: Path
    nbytes: int
    kinds: dict[str, int] = field(default_factory=dict)  # kind -> tensors
    verified: Verified | None = None
    fallback: list[str] = field(default_factory=list)  # matrices kept in F16: their rows are no multiple of the block


def pack(name: str, values: F32, kind: Kind) -> TensorInfo:
    """float32 [...] in the packing of `kind`. Raises FileError for NaN, Inf, or what does not fit the kind."""
    if not np.isfinite(values).all():
        raise FileError(f"tensor {name!r} holds NaN or Inf: this checkpoint is broken")
    if np.abs(values).max(initial=0) > LARGEST.get(kind, LARGEST_OF_HALF):
        other = "f32" if kind == Kind.BF16 else "bf16 or f32"
        raise FileError(f"tensor {name!r} has values beyond the range of {kind.name}: use the type {other}")
    packed = quantize(np.ascontiguousarray(values, np.float32), kind)
    rows = values.shape[0] if values.ndim > 1 else 1
    return TensorInfo(name, kind, values.shape, np.ascontiguousarray(packed).view(np.uint8).reshape(rows, -1))


def kind_of(spec: Spec, wanted: Kind) -> Kind:
    """How a tensor is stored: as wanted if it is a matrix whose rows divide into blocks, F16 if they do not, and
    float32 for all that is no matrix."""
    if not spec.matrix:
        return Kind.F32
    block, _ = GGML_QUANT_SIZES[wanted]
    return Kind.F16 if spec.shape[-1] % block else wanted


def write(
    source: Source, path: Path, outtype: str, vocabulary: Mapping[str, Any], check: bool | None = None
) -> Written:
    """Write `path`, through a temporary file beside it: it is there whole and verified, or not at all.

    vocabulary: the `tokenizer.*` keys, and others to keep; check: whether to verify (None: files below 1 GiB). Raises
    FileError for tensors that the configuration does not have, lacks, or that hold NaN, and for a file that would not
    run.
    """
    wanted = OUTTYPES[outtype]
    specs = file_tensors(source.config, source.tensors)
    _check_names(source, specs)
    kinds = {name: kind_of(specs[name], wanted) for name in source.tensors}
    done = Written(path, 0)
    with replacing(path) as temporary:
        writer = GGUFWriter(None, source.config.arch)
        try:
            keys = schema.to_metadata(source.config) | dict(vocabulary)
            keys |= {"general.file_type": int(FILE_TYPES[wanted]), "general.quantization_version": 2}
            for key, value in keys.items():
                if key != "general.architecture":  # the writer has put it there
                    _add(writer, key, value)
            for name, kind in kinds.items():
                _announce(writer, name, specs[name].shape, kind)
            writer.write_header_to_file(temporary)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            with bar("writing", len(kinds)) as advance:
                for name, kind in kinds.items():
                    writer.write_tensor_data(pack(name, source.tensors[name].load(), kind).data)
                    done.kinds[kind.name] = done.kinds.get(kind.name, 0) + 1
                    if specs[name].matrix and kind != wanted:
                        done.fallback.append(name)
                    advance(1)
            writer.close()
        finally:
            with suppress(OSError):  # of a full disk; closed already where all went well
                writer.close()
        done.nbytes = os.path.getsize(temporary)
        if check or (check is None and done.nbytes < VERIFIED_BELOW):
            done.verified = _verified(source, temporary, path, wanted)
    return done


def _check_names(source: Source, specs: Mapping[str, Spec]) -> None:
    for name, tensor in source.tensors.items():
        if name not in specs:
            raise FileError(f"tensor {name!r} has no place in a {source.config.arch} model")
        tensor.check(specs[name].shape)
    for name, spec in specs.items():
        if spec.required and name not in source.tensors:
            raise FileError(f"tensor {name!r} is missing")


def _announce(writer: GGUFWriter, name: str, shape: tuple[int, ...], kind: Kind) -> None:
    block, size = GGML_QUANT_SIZES[kind]
    row = (shape[-1] // block) * size
    rows = int(np.prod(shape[:-1], dtype=np.int64)) if len(shape) > 1 else 1
    writer.add_tensor_info(name, (*shape[:-1], row), np.dtype(np.uint8), rows * row, raw_dtype=kind)


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, GGUFValue):  # of a type of its own
        writer.add_key_value(key, value.value, value.type, value.sub_type)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        (writer.add_uint32 if value >= 0 else writer.add_int32)(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _verified(source: Source, temporary: Path, path: Path, kind: Kind) -> Verified:
    try:
        found = verify(source, temporary)
    except TcinferError as e:
        raise FileError(f"{str(e).replace(str(temporary), str(path))}; nothing was written") from None
    if kind == Kind.F32 and found.worst > 1e-3 * found.largest:
        raise FileError(f"{path}: would compute other logits, by {found.worst:.3g}; nothing was written")
    return found


def verify(source: Source, path: Path) -> Verified:
    """Decode the same tokens from the file and from the checkpoint's own tensors.

    Raises FileError for a file that cannot be loaded, and for logits that are no numbers.
    """
    config = source.config
    window = config.widest.window
    if window > VERIFY_WINDOW:  # the same weights in a smaller window: the memory is at work at once
        window, config = VERIFY_WINDOW, with_memory(config, window=VERIFY_WINDOW)
    stored = {name: pack(name, tensor.load(), Kind.F32) for name, tensor in source.tensors.items()}
    original = Model(config, bind(config, stored), from_metadata({}, config.vocab_size), backend())
    written = load(path, window=window or None)
    count = 2 * (config.widest.sinks + VERIFY_WINDOW)
    if config.learned_positions:
        count = min(count, config.context_length)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, count)
    with bar("verifying", 2 * count) as advance:
        want = original.session().feed(ids, all_logits=True, progress=advance)
        got = written.session().feed(ids, all_logits=True, progress=advance)
    if not np.isfinite(want).all() or not np.isfinite(got).all():
        raise FileError("the logits are not finite: the weights are damaged or overflow")
    return Verified(float(np.abs(got - want).max()), float(np.abs(want).max()), count)
