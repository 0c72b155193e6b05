"""Weights as the GPU reads them (the other side of kinds.h): whole 16-byte loads side by side, nothing made larger.

A row is cut into runs of 32 columns, a matrix into chunks of a few rows and up to 32 runs, which a block of the GPU
copies as they are. Of a row's integers the four low bits (all bits where there are 8, or the floats themselves) come
first, 16 bytes at a time: the first 16 bytes of each run, then the second. Bits above the fourth and scales follow.
Formats: the GGUF specification; reference: gguf-py's dequantize.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from tcinfer.kernels.reference.quants import Matrix

RUN = 32  # columns
CHUNK_RUNS = 32  # runs of a chunk, one for each lane of a warp
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
    if w.kind in BYTES:
        size = BYTES[w.kind]
        data = np.zeros((rows, -(-columns // RUN) * RUN * size), np.uint8)
        data[:, : columns * size] = w.data
        arrays: list[NDArray] = [data.reshape(rows, -1, RUN * size)]
    else:
        block, parts = BLOCKS[w.kind]
        blocks = np.ascontiguousarray(w.data).view(block).reshape(rows, -1)  # [rows, blocks]
        low, *others = parts(blocks)
        arrays = [low.reshape(rows, columns // RUN, -1), *(x.reshape(rows, -1) for x in others if x is not None)]
    runs = arrays[0].shape[1]
    of_runs = [runs // array.shape[1] for array in arrays]  # that an entry of each is for
    if rows % per:
        arrays = [np.concatenate([x, np.zeros((per - rows % per, *x.shape[1:]), x.dtype)]) for x in arrays]
    chunks = [
        _chunk([x[:, first // n : (first + CHUNK_RUNS) // n] for x, n in zip(arrays, of_runs, strict=True)], per)
        for first in range(0, runs, CHUNK_RUNS)
    ]
    return Packed(np.concatenate(chunks, 1), runs, chunks[0].shape[1])


def _chunk(arrays: list[NDArray], per: int) -> U8:
    """Chunks [tiles, bytes] of some runs: low [rows, runs, bytes], then arrays [rows, entries]."""
    tiles = len(arrays[0]) // per
    low = arrays[0].reshape(tiles, per, arrays[0].shape[1], -1, 16).swapaxes(2, 3)
    parts = [low.reshape(tiles, -1), *(np.ascontiguousarray(x).view(np.uint8).reshape(tiles, -1) for x in arrays[1:])]
    rest = -sum(part.shape[1] for part in parts) % 16
    return np.concatenate([*parts, np.zeros((tiles, rest), np.uint8)], 1)


def _nibbles(q: NDArray) -> NDArray:
    """Integers below 16 [.., 32] as 16 bytes: those of columns 0 to 15 low, of columns 16 to 31 high."""
    return q[..., :16] | (q[..., 16:] << 4)


def _bits(q: U8, width: int, kind: Any) -> NDArray:
    """Integers of `width` bits [.., 32] as one word, the first column lowest."""
    shifts = np.arange(RUN, dtype=kind) * kind(width)
    return np.bitwise_or.reduce(q.astype(kind) << shifts, axis=-1)


def _pair(first: NDArray, second: NDArray) -> NDArray:
    """Two floats of 16 bits (as uint16) in one word, the first low."""
    return first.astype(np.uint32) | (second.astype(np.uint32) << 16)


Parts = tuple[NDArray, NDArray | None, NDArray | None, NDArray | None]


def _simple(b: Any) -> Parts:
    """Blocks of one run: d, in some kinds m, in some kinds a word of fifth bits."""
    names = b.dtype.names
    d = _pair(b["d"], b["m"]) if "m" in names else b["d"]
    return b["q"].view(np.uint8), b["high"] if "high" in names else None, d, None


def _k_blocks(b: Any) -> Parts:
    """Q4_K and Q5_K: eight runs, two by two in the nibbles of 32 bytes; scales and minima of 6 bits each."""
    q = b["q"].reshape(*b.shape, 4, 1, RUN) >> np.array([0, 4], np.uint8)[:, None] & 15  # [rows, blocks, 4, 2, 32]
    s = b["scales"].astype(np.uint16)  # [rows, blocks, 12]
    scale = np.concatenate([s[..., :4] & 63, (s[..., 8:] & 15) | (s[..., :4] >> 6) << 4], -1)
    least = np.concatenate([s[..., 4:8] & 63, (s[..., 8:] >> 4) | (s[..., 4:8] >> 6) << 4], -1)
    high = None
    if "high" in b.dtype.names:
        fifth = b["high"][..., None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1  # [rows, blocks, 8, 32]
        high = _bits(fifth, 1, np.uint32)
    return _nibbles(q), high, _pair(b["d"], b["dmin"]), scale | (least << 8)


def _q6_k(b: Any) -> Parts:
    """Eight runs: halves of 128 columns, each with 64 bytes of nibbles and 32 bytes of upper bits."""
    shift = np.array([0, 4], np.uint8)[:, None, None]
    low = b["q"].reshape(*b.shape, 2, 1, 2, RUN) >> shift & 15  # [rows, blocks, 2, 2 (nibble), 2, 32]
    pairs = np.array([0, 2, 4, 6], np.uint8)[:, None]
    upper = b["high"].reshape(*b.shape, 2, 1, RUN) >> pairs & 3  # [rows, blocks, 2, 4, 32]
    scales = b["scales"].view(np.uint16)  # [rows, blocks, 8]: two signed bytes each
    return _nibbles(low), _bits(upper, 2, np.uint64), b["d"], scales


def _dtype(*fields: tuple) -> np.dtype:
    return np.dtype(list(fields))


H = "<u2"
BYTES = {Kind.F32: 4, Kind.F16: 2, Kind.BF16: 2}  # of an element
BLOCKS: dict[Kind, tuple[np.dtype, Callable[[Any], Parts]]] = {
    Kind.Q8_0: (_dtype(("d", H), ("q", "i1", 32)), _simple),
    Kind.Q4_0: (_dtype(("d", H), ("q", "u1", 16)), _simple),
    Kind.Q4_1: (_dtype(("d", H), ("m", H), ("q", "u1", 16)), _simple),
    Kind.Q5_0: (_dtype(("d", H), ("high", "<u4"), ("q", "u1", 16)), _simple),
    Kind.Q5_1: (_dtype(("d", H), ("m", H), ("high", "<u4"), ("q", "u1", 16)), _simple),
    Kind.Q4_K: (_dtype(("d", H), ("dmin", H), ("scales", "u1", 12), ("q", "u1", 128)), _k_blocks),
    Kind.Q5_K: (_dtype(("d", H), ("dmin", H), ("scales", "u1", 12), ("high", "u1", 32), ("q", "u1", 128)), _k_blocks),
    Kind.Q6_K: (_dtype(("q", "u1", 128), ("high", "u1", 64), ("scales", "u1", 16), ("d", H)), _q6_k),
}
# ROWS in kinds.h: so many that chunks have 3 to 5 KB.
TILE_ROWS = {kind: 4 for kind in BLOCKS} | {Kind.Q4_0: 8, Kind.Q4_K: 8, Kind.F16: 2, Kind.BF16: 2, Kind.F32: 1}
