"""The plan of a model on a GPU while it is recorded: what tcinfer/net.py asks of a backend.

What a norm or an activation makes of a row is not computed by itself: it is told to the products that read it, which
compute it on the way in (staging.h): for a token as whole numbers of 24 bits, or as floats where weights are; those of
many rows read halves that `prepare` has written, each row divided by a power of two that keeps it in their range.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from tcinfer.kernels.cuda.made import Made, Parts
from tcinfer.kernels.cuda.products import MANY, PLACE, Products
from tcinfer.kernels.cuda.program import GEGLU, GELU, LAYER_NORM, MOST_MERGED, PART_END, RMS_NORM, SWIGLU
from tcinfer.kernels.plan import FEW, ONE, PROMPT, SESSIONS, Geometry, Rows
from tcinfer.kernels.reference.quants import Matrix
from tcinfer.kernels.table import ATTEND_MANY, ATTEND_ROWS, ATTEND_SPLITS, GPU_EMBED

SPLIT = 32  # keys of a head that a block takes at least, of a token's
LONG_SPLIT, MOST_SPLITS = 256, 64  # the same for a key head, where there are more keys
LARGEST_HEAD = 256  # that attend_many has room for


class Recorder(Products):
    """A plan of products, and what else a block is made of."""

    def embed(self, table: Matrix, positions: NDArray | None) -> Rows:
        """The rows of the embedding that the pass's ids name, plus those of learned positions, if there are any."""
        x = self.rows(table.shape[1])
        rows: dict[str, Any] = {"columns": x.columns, "x": x, "stride": x.stride, "positions": positions}
        self.await_((table,), [self.step(GPU_EMBED, table.kind.name, **dict.fromkeys(PLACE, 0), **rows)])
        return x

    def norm(self, x: Rows, weight: NDArray, bias: NDArray | None, eps: float, layer: bool) -> Rows:
        """RMS norm, or layer norm with its mean and its bias."""
        parameters = self.keep(weight), self.keep(bias), float(eps)
        return Made(self, x.columns, (LAYER_NORM if layer else RMS_NORM, x.address, x.stride, x.columns, *parameters))

    def gated(self, gate: Rows, up: Rows, activation: str) -> Rows:
        """act(gate) · up; activation: "silu" or "gelu_tanh". The product that has just made both makes this instead."""
        make = GEGLU if activation == "gelu_tanh" else SWIGLU
        if self.pair(gate, up, make):
            return gate
        return Made(self, up.columns, (make, up.address, up.stride, up.columns, gate.address, 0, 0))

    def gelu(self, x: Rows) -> Rows:
        """The exact form."""
        return Made(self, x.columns, (GELU, x.address, x.stride, x.columns, 0, 0, 0))

    def attention(self, geometry: Geometry, new: Any, k_field: int, v_field: int) -> Rows:
        """Each row's query over what it sees of its sequence's ring and of the pass's own rows. Rows [H * D].

        A token's keys are divided among several blocks.
        """
        H, G, D, window, sinks = geometry.heads, geometry.kv_heads, geometry.head_dim, geometry.window, geometry.sinks
        out, half = self.rows(H * D), geometry.half
        common = {"q": new.q, "q_far": new.q_far, "q_stride": new.q.stride, "k_field": k_field, "v_field": v_field}
        common |= {"k_new": new.k_new, "v_new": new.v_new, "H": H, "G": G, "D": D, "window": window, "sinks": sinks}
        whole = common | {"out": out, "splits": 1, "parts": None}
        form = form_of(half, H // G, D)
        keys = window + sinks if window else LONG_SPLIT * MOST_SPLITS
        tensor_cores = half and D % 2 == 0 and D <= LARGEST_HEAD
        by_itself = SESSIONS if tensor_cores else MANY
        splits = max(1, min(MOST_MERGED, keys // SPLIT, self.device.multiprocessors // H))
        split_form = form_of(half, 1, D)
        if keys > 2 * LONG_SPLIT * MOST_MERGED:
            splits = min(MOST_SPLITS, keys // LONG_SPLIT)
            split_form = form_of(half, min(H // G, 2), D)  # registers have no room for more
        parts = self.room(4 * H * splits * (D + PART_END))
        if splits > 1:
            divided = common | {"out": None, "splits": splits, "parts": parts}
            self.step(ATTEND_SPLITS, split_form, ONE, **divided)
        self.step(ATTEND_ROWS, form, by_itself if splits > 1 else by_itself | ONE, **whole)
        if tensor_cores:
            self.step(ATTEND_MANY, "", FEW | PROMPT, **whole)
        if splits == 1:
            return out
        found = Parts(out, parts, H, D, splits)
        if splits > MOST_MERGED or D % 4:
            found.address  # noqa: B018  the step that puts them together
        return found


def form_of(half: bool, heads: int, D: int) -> str:
    """The form of attend_rows (attention.cu) for so many query heads of a key head, with D channels."""
    plain = D % 8 == 0 and D <= 256 if half else D % 4 == 0 and D <= 128
    return ("Half" if half else "Float") + (str(min(heads, 4)) if plain else "Any")
