"""Products with weights. Matrices are repacked at load into rows interleaved by 16 (see packing.py)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from gguf.constants import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from tcinfer.kernels.cpu.jit import Operator, operator
from tcinfer.kernels.cpu.machine import floats, int8s
from tcinfer.kernels.cpu.packing import interleaved, interleaver
from tcinfer.kernels.cpu.plan import Plan, Rows
from tcinfer.kernels.cpu.rows import claim, quantised, quantised_twice, share
from tcinfer.kernels.cpu.simd import LANES
from tcinfer.kernels.cpu.tiles import MANY, byte_tile, float_tile
from tcinfer.kernels.cpu.vectors import delivered
from tcinfer.kernels.packing import FLOATS, PACKINGS, RUN
from tcinfer.kernels.plan import ALIGNMENT, EACH, LOGITS, OUT_FIRST, OUT_ROWS, ROWS, SCRATCH
from tcinfer.kernels.reference.quants import Matrix
from tcinfer.kernels.table import CPU_HEAD, CPU_LINEAR, INTERLEAVE

NEAR = 2**15  # bytes of weights that stay in the first cache while all rows of a chunk go by


def _linear(kind: Kind) -> Operator:
    """y = x Wᵀ + b, or with `gate` float32 [rows]: gate (x Wᵀ + b); put into y, or added to it."""
    packed = kind in PACKINGS
    if packed:
        one, two, many = (byte_tile(kind, n) for n in (1, 2, MANY))
        size, columns_of = interleaved(PACKINGS[kind]).itemsize, RUN
    else:
        one, two, many = (float_tile(kind, n) for n in (1, 2, MANY))
        size, columns_of = LANES * FLOATS[kind], 1

    @operator(name=f"linear_{kind.name}")
    def linear(a, p, thread, threads, taken):  # type: ignore[no-untyped-def]
        w, x, stride, columns, outputs, y, y_stride, bias, gate = a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8]
        add, head = a[9], a[10]
        rows, sums = p[ROWS], p[SCRATCH] + thread * p[EACH]
        if head:  # only the rows whose logits are wanted; if packed, two rows of activations for each
            rows, y = p[OUT_ROWS], p[LOGITS]
            if packed:
                rows *= 2
            else:
                x += stride * p[OUT_FIRST]
        total = floats(sums)
        runs = columns // columns_of
        groups = (outputs + LANES - 1) // LANES
        together = max(1, NEAR // (runs * size)) if rows > MANY else 1
        # few rows wait for memory, which is read best in one long stretch; many keep the thread busy
        least = 1 if rows > MANY else (groups + threads - 1) // threads
        block, last = claim(taken, groups, least, threads)
        while block < last:
            t = 0
            while t < rows:
                left = rows - t
                n = MANY if left >= MANY else 2 if left >= 2 else 1
                from_ = x + t * stride
                for group in range(block, min(last, block + together)):
                    at = w + group * runs * size
                    if packed:
                        if n == MANY:
                            many(at, from_, stride, runs, sums)
                        elif n == 2:
                            two(at, from_, stride, runs, sums)
                        else:
                            one(at, from_, stride, runs, sums)
                    elif n == MANY:
                        many(at, size, from_, stride, runs, LANES, sums, 4 * LANES)
                    elif n == 2:
                        two(at, size, from_, stride, runs, LANES, sums, 4 * LANES)
                    else:
                        one(at, size, from_, stride, runs, LANES, sums, 4 * LANES)
                    done, to = n, t
                    if packed and head:
                        done, to = n // 2, t // 2
                        for u in range(done):
                            for i in range(LANES):
                                total[LANES * u + i] = total[2 * LANES * u + i] + total[2 * LANES * u + LANES + i]
                    shift, factor = bias + 4 * LANES * group if bias else bias, gate + 4 * t if gate else gate
                    lanes, at = min(LANES, outputs - LANES * group), y + to * y_stride + 4 * LANES * group
                    delivered(sums, done, at, y_stride, lanes, shift, factor, add)
                t += n
            block += together
            if block >= last:
                block, last = claim(taken, groups, least, threads)

    return linear


for _kind in (*PACKINGS, *FLOATS):
    _linear(_kind)


def _interleave(kind: Kind) -> Operator:
    packing = PACKINGS.get(kind)
    interleave: Any = interleaver(packing) if packing else None
    columns_of = packing.runs * RUN if packing else 1
    size = packing.block.itemsize if packing else FLOATS[kind]
    packed = packing is not None

    @operator(name=f"interleave_{kind.name}")
    def repack(a, p, thread, threads, taken):  # type: ignore[no-untyped-def]
        w, rows, columns, out, group_bytes = a[0], a[1], a[2], a[3], a[4]
        blocks = columns // columns_of
        first, last = share((rows + LANES - 1) // LANES, thread, threads)
        for group in range(first, last):
            for lane in range(min(LANES, rows - LANES * group)):
                at, to = w + (LANES * group + lane) * blocks * size, out + group * group_bytes
                if packed:
                    interleave(at, blocks, to, lane)
                else:
                    source, target = int8s(at), int8s(to + size * lane)
                    for c in range(columns):
                        for b in range(size):
                            target[LANES * size * c + b] = source[size * c + b]

    return repack


for _kind in (*PACKINGS, *FLOATS):
    _interleave(_kind)


class Weights(NamedTuple):
    """A matrix as products read it."""

    kind: Kind
    shape: tuple[int, int]
    data: NDArray[np.uint8]


def repacked(plan: Plan, w: Matrix) -> Weights:
    """`w` interleaved, once `plan` (of nothing else, at load) has run."""
    rows, columns = w.shape
    packing = PACKINGS.get(w.kind)
    group = columns // RUN * interleaved(packing).itemsize if packing else columns * LANES * FLOATS[w.kind]
    groups = -(-rows // LANES)
    room = np.empty(groups * group + 2 * ALIGNMENT, np.uint8)
    skip = -room.ctypes.data % ALIGNMENT
    data = room[skip : skip + groups * group]
    if rows % LANES:
        data[-group:] = 0  # rows that are not there
    source = np.ascontiguousarray(w.data)
    plan.step(INTERLEAVE, w.kind.name, w=source, rows=rows, columns=columns, out=data, group_bytes=group)
    return Weights(w.kind, w.shape, data)


def small(plan: Plan, values: NDArray[np.float32]) -> Weights:
    """A float32 matrix [rows, columns] as products read it, made here and now."""
    rows, columns = values.shape
    groups = -(-rows // LANES)
    padded = np.zeros((groups * LANES, columns), np.float32)
    padded[:rows] = values
    data = np.ascontiguousarray(padded.reshape(groups, LANES, columns).swapaxes(1, 2))
    return Weights(Kind.F32, (rows, columns), data.view(np.uint8).reshape(-1))


def linear(
    plan: Plan,
    x: Rows,
    w: Weights,
    bias: NDArray | None = None,
    into: Rows | None = None,
    gate: Rows | None = None,
    head: bool = False,
) -> Rows:
    """x Wᵀ + b. into: rows that it is added to; gate: a factor for each row; head: the pass's logits.

    A packed matrix is multiplied by rows quantised to bytes, and the head's by rows quantised twice, once more for what
    the first time left over: it costs little, for the few rows there are, and was a quarter of the error of the logits.
    F32, F16 and BF16 are multiplied by the float32 rows.
    """
    outputs, columns = w.shape
    assert columns == x.columns
    y = into or Rows(plan, 0 if head else outputs)
    read: dict[str, Any] = {"x": x, "stride": x.stride}
    if w.kind in PACKINGS:
        read = {"x": (quantised_twice if head else quantised)(plan, x), "stride": x.bytes_stride}
    read |= {"w": w.data, "columns": columns, "outputs": outputs, "bias": bias, "gate": gate}
    to: dict[str, Any] = {"y": y, "y_stride": 4 * outputs if head else y.stride, "add": into is not None}
    plan.step(CPU_HEAD if head else CPU_LINEAR, w.kind.name, **read, **to, head=head)
    return y
