"""Weights as the GPU reads them (the other side of kinds.h): whole 16-byte loads side by side, nothing made larger.

A row is cut into runs of 32 columns, a matrix into chunks of a few rows and up to 32 runs, which a block of the GPU
copies as they are. Of a row's integers the four low bits (all bits where there are 8, or the floats themselves) come
first, 16 bytes at a time: the first 16 bytes of each run, then the second. Bits above the fourth and scales follow.
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import numpy as np
from gguf.constants import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from tcinfer.kernels.packing import FLOATS, PACKINGS, RUN, Packing
from tcinfer.kernels.reference.quants import KINDS, Matrix

CHUNK_RUNS = 32  # runs of a chunk, one for each lane of a warp
# ROWS in kinds.h, 4 of a kind that is not named: so many that chunks have 3 to 5 KB.
TILE_ROWS = dict.fromkeys(KINDS, 4) | {Kind.Q4_0: 8, Kind.Q4_K: 8, Kind.F16: 2, Kind.BF16: 2, Kind.F32: 1}
U8 = NDArray[np.uint8]


class Packed(NamedTuple):
    """A matrix in the GPU's layout."""

    chunks: U8  # [tiles, bytes], a tile being the chunks of some rows
    runs: int  # of a row
    chunk: int  # bytes of a chunk of 32 runs


def packed(w: Matrix) -> Packed:
    """A matrix in the GPU's layout; the values are the same to the bit."""
    rows, columns = w.shape
    per = TILE_ROWS[w.kind]
    if w.kind in FLOATS:
        size = FLOATS[w.kind]
        data = np.zeros((rows, -(-columns // RUN) * RUN * size), np.uint8)
        data[:, : columns * size] = w.data
        parts: list[NDArray] = [data.reshape(rows, -1, RUN * size)]
    else:
        parts = _parts(w.data, PACKINGS[w.kind])
    runs = parts[0].shape[1]
    of_runs = [runs // part.shape[1] for part in parts]  # that an entry of each is for
    if rows % per:
        parts = [np.concatenate([x, np.zeros((per - rows % per, *x.shape[1:]), x.dtype)]) for x in parts]
    chunks = [
        _chunk([x[:, first // n : (first + CHUNK_RUNS) // n] for x, n in zip(parts, of_runs, strict=True)], per)
        for first in range(0, runs, CHUNK_RUNS)
    ]
    return Packed(np.concatenate(chunks, 1), runs, chunks[0].shape[1])


def _chunk(parts: list[NDArray], per: int) -> U8:
    """Chunks [tiles, bytes] of some runs, from parts [rows, entries, ..], the low bits first."""
    tiles = len(parts[0]) // per
    low = parts[0].reshape(tiles, per, parts[0].shape[1], -1, 16).swapaxes(2, 3)
    flat = [np.ascontiguousarray(x).reshape(tiles, -1).view(np.uint8) for x in (low, *parts[1:])]
    rest = -sum(x.shape[1] for x in flat) % 16
    return np.concatenate([*flat, np.zeros((tiles, rest), np.uint8)], 1)


class _Blocks:
    """All blocks [rows, blocks] of a matrix, for kernels/packing.py to read: blocks of eight runs."""

    def __init__(self, blocks: NDArray) -> None:
        self.blocks = blocks

    def bytes(self, field: str, at: int) -> U8:
        return self.blocks[field][..., at : at + RUN]

    def byte(self, field: str, at: int) -> U8:
        return self.blocks[field][..., at]


def _parts(data: U8, packing: Packing) -> list[NDArray]:
    """Of packed rows, each [rows, entries, ..]: low bits, high bits if any, d and m, s and t if any.

    An entry is a run's, or, of d and m, a block's. Low bits: column 16 + i's nibble above column i's, or signed bytes;
    high bits: column after column, the first lowest. Blocks of one run are stored so.
    """
    blocks = np.ascontiguousarray(data).view(packing.block)
    names = blocks.dtype.names or ()
    d = np.concatenate([blocks[name].view(np.uint16) for name in ("d", "m") if name in names], 2)
    if packing.runs == 1:
        return [blocks["q"], *([blocks["high"].view(np.uint32)] if packing.high else []), d]
    runs = packing.read(_Blocks(blocks), packing.bits)

    def of_runs(arrays: list[U8]) -> U8:
        """Arrays [rows, blocks, ..], one for each run of a block or two, as [rows, runs, bytes]."""
        return np.stack(arrays, 2).reshape(len(data), blocks.shape[1] * len(runs), -1)

    parts: list[NDArray] = [of_runs([q[..., :16] & 15 | q[..., 16:] << 4 for q, _ in runs])]
    if packing.high:
        per = 8 // packing.high  # columns of a byte
        bits = [reduce(np.bitwise_or, (q[..., i::per] >> 4 << packing.high * i for i in range(per))) for q, _ in runs]
        parts.append(of_runs(bits))
    return [*parts, d, of_runs([part for _, by in runs for part in by])]
