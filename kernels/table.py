"""The operators that plans are made of; those of a memory mechanism stand in its room. How to read a row: operators.py.

First those that both compiled backends have and whose equation the NumPy backend executes; then each backend's own,
into which its recorder takes apart what a block is made of (embedding, norm, product, activation, attention).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tcinfer.kernels.operators import Operator
from tcinfer.kernels.reference import matrix_memory, pointwise, ring, rotary

Words = Mapping[str, int]
LANES = 16  # numbers that CPU kernels take side by side: one AVX-512 register, two of AVX2, four of Arm
MANY = 8  # rows of activations that a CPU product takes at once, at most
BLOCK = 256  # positions in a block of attention
QUERIES = 24  # query rows (tokens times heads of a group) that CPUs take together in a long pass, about


def padded(count: int) -> int:
    """Up to whole vectors."""
    return -(-count // LANES) * LANES


# Of every backend

ANGLES = Operator("angles", "freq pairs most offset factor:f cos>pairs sin>pairs", "rows", rotary.angles)
ADD = Operator("add", "x<>columns y<columns columns", "rows", pointwise.add)
SCALE = Operator("scale", "x<>columns columns factor:f", "rows", pointwise.scale)
SOFTCAP = Operator("softcap", "columns cap:f %logits<>", "rows", pointwise.softcap)
HEAD_NORM = Operator("head_norm", "x<>heads.width heads width weight eps:f", "rows", pointwise.head_norm, by_head=True)
PUSH_ARGUMENTS = (
    "q<H.D k<G.D v<G.D H G D half interleaved turned cos< sin< cos_far< sin_far< "
    "q_out>H.D q_far>H.D k_new>G.D/half v_new>G.D/half k_out>G.D v_out>G.D k_plain>G.D taps @last< scratch~G.D"
)
PUSH = Operator("push", PUSH_ARGUMENTS, "ring", ring.push, by_head=True)
TAKE = Operator("take", "@field< rows<width/half width half window sinks out>width", "ring", ring.take, by_head=True)
INSERT = Operator("insert", "@field> rows<width/half width half window sinks", "ring", ring.insert, by_head=True)
KEEP_LAST = Operator("keep_last", "@field> x<width width", "ring", ring.keep_last, by_head=True)


def _scan_many_room(a: Words, warps: int) -> int:
    D = a["D"]
    columns, stages, pitch = 32 if D <= 64 else 16, 2 if D <= 128 else 1, -(-D // 4) * 4 | 4
    return 4 * (columns * pitch + stages * (32 * (pitch + max(pitch, 36)) + 36 * columns) + 36 * columns + 2568)


SCAN_ARGUMENTS = (
    "@field<> P G R D E q<G.R.D k<G.D v<G.E decay<P.G rate<P.G retrieve<G mix<P.G.R out>G.R.E wedge write_first"
)
SCAN = Operator(
    "scan",
    SCAN_ARGUMENTS,
    "matrix_memory",
    matrix_memory.scan_rows,
    by_head=True,
    scratch=lambda a: 4 * LANES * (1 + a["R"]),
    work=lambda a: 3 * a["P"] * a["G"] * a["D"] * a["E"],
    shared=lambda a, warps: 4 * 32 * (a["D"] + 1 + 8 * warps),
    many=Operator("scan_many", SCAN_ARGUMENTS, "matrix_memory_many", launch="many", shared=_scan_many_room, large=True),
)

# CPUs

CPU_EMBED = Operator("embed", "table columns x> stride positions", "rows", launch="none")
CPU_NORM = Operator("norm", "x< columns y> stride weight bias eps:f layer out> out_stride", "rows", launch="none")
CPU_GATED = Operator("gated", "gate< up<> columns stride out> out_stride tanh", "rows", launch="none")
CPU_GELU = Operator("gelu", "x<> columns stride out> out_stride", "rows", launch="none")
QUANTISE = Operator("quantise", "x< stride columns out> out_stride", "rows", launch="none")
QUANTISE_TWICE = Operator(
    "quantise_twice", "x< stride columns out> out_stride", "rows", launch="none", scratch=lambda a: 4 * 32
)
LINEAR_ARGUMENTS = "w x< stride columns outputs y<> y_stride bias gate< add head"
CPU_LINEAR, CPU_HEAD = (
    Operator(
        "linear",
        LINEAR_ARGUMENTS + more,
        "linear",
        launch="none",
        scratch=lambda a: 4 * LANES * MANY,
        work=lambda a: a["outputs"] * a["columns"],
    )
    for more in ("", " %logits>")
)
INTERLEAVE = Operator("interleave", "w rows columns out group_bytes", "linear", launch="none")
ATTEND_FEW = Operator(
    "attend_few",
    "q< q_far< q_stride @k_field< @v_field< k_new< v_new< H G D window sinks %parts>",
    "attention",
    launch="none",
    scratch=lambda a: 4 * (a["H"] // a["G"]) * (BLOCK + a["D"]) + 4 * LANES * padded(a["D"]) + 8 * LANES,
)
COMBINE_FEW = Operator(
    "combine",
    "out> stride H G D window sinks %parts<",
    "attention",
    launch="none",
    scratch=lambda a: 4 * (padded(a["D"]) + LANES),
)
GATHER = Operator(
    "gather",
    "@k_field< @v_field< k_new< v_new< G D window sinks %gathered>",
    "attention",
    launch="none",
    scratch=lambda a: 8 * LANES,
)
ATTEND_GATHERED = Operator(
    "attend_many",
    "q< q_far< q_stride out> H G D window sinks %gathered<",
    "attention",
    launch="none",
    scratch=lambda a: (
        4 * (max(QUERIES, a["H"] // a["G"]) + LANES) * (a["D"] + BLOCK + 2 * (padded(a["D"]) + LANES) + 1)
    ),
)
LOOK = Operator("look", "data size sums", "bandwidth", launch="none")  # measures how fast memory is read

# GPUs. `make` to `eps`: what a row is made into on its way into a product (staging.h).

MATRIX = "at runs tile_bytes chunk_bytes"  # of kinds.h
STAGED = "make x< x_stride columns weight< offset eps:f fresh"


def _attention_room(a: Words, warps: int) -> int:
    return warps * (128 + 16 * (min(256, max(32, 1 << (a["D"] - 1).bit_length())) + 2))


def _attend_many_room(a: Words, warps: int) -> int:
    return 512 * max(32, 1 << (a["D"] - 1).bit_length()) if a["D"] <= 128 else 98304


ATTENTION = "q< q_far< q_stride @k_field< @v_field< k_new< v_new< H G D window sinks out> splits parts>"
GPU_EMBED = Operator("embed", f"{MATRIX} columns x> stride positions", "rows", forms="weights")
# a token's key and value go into the ring at once, if nothing needs what they take the place of
GPU_PUSH = Operator("push", f"{PUSH_ARGUMENTS} @k_field> @v_field> window sinks", "ring", by_head=True)
PREPARE = Operator("prepare", f"{STAGED} rows> rows_stride factors> head", "rows")


def _linear_one(more: str) -> Operator:
    after = "bias gate< add pair second y_2> bias_2 third y_3> bias_3"
    arguments = f"{MATRIX} outputs y<> {after} shift each more how how_more number {STAGED}{more}"
    return Operator(
        "linear_one",
        arguments,
        "linear",
        launch="one",
        forms="weights",
        shared=lambda a, warps: 16 * 8 * 33 * -(-a["runs"] // 32),  # of floats; as bytes less
    )


def _linear_many(more: str) -> Operator:
    after = "bias gate< add pair second y_2> y_2_stride bias_2 third y_3> y_3_stride bias_3"
    arguments = f"{MATRIX} outputs rows< rows_stride factors< y<> y_stride {after} head columns{more}"
    return Operator(
        "linear_many",
        arguments,
        "linear_many",
        launch="many",
        forms="weights",
        shared=lambda a, warps: 196608 if a["wide"] else 98304,
        large=True,
    )


LINEAR_ONE, HEAD_ONE = _linear_one(""), _linear_one(" %logits>")
LINEAR_MANY, HEAD_MANY = _linear_many(""), _linear_many(" %logits>")
by_rows: dict[str, Any] = {"forms": "ring", "shared": _attention_room, "beside": ("insert",)}
ATTEND_ROWS = Operator("attend_rows", ATTENTION, "attention", by_head=True, **by_rows)
ATTEND_SPLITS = Operator("attend_splits", ATTENTION, "attention", launch="one", **by_rows)
ATTEND_MANY = Operator("attend_many", ATTENTION, "attention_many", launch="many", shared=_attend_many_room, large=True)
COMBINE_SPLITS = Operator("combine", "parts< out> stride H D splits", "attention", launch="one")
LEADERS = Operator("leaders", "vocabulary %logits< leaders>", "sampling", launch="one")
CHOOSE = Operator("choose", "vocabulary %logits< leaders<", "sampling", shared=lambda a, warps: 24720)

_all = [o for row in list(globals().values()) if isinstance(row, Operator) for o in (row, row.many) if o]
GPU = {o.name: o for o in _all if o.launch != "none"}  # by name, those that GPUs have
