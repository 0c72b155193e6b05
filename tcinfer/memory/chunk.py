"""What one pass through the model knows: the operators, the configuration, and where in the stream it stands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tcinfer.config import ModelConfig
from tcinfer.kernels.reference import Reference
from tcinfer.kernels.reference.rotary import angles

T = TypeVar("T")
F32 = NDArray[np.float32]


class Chunk:
    """`count` tokens at positions first .. first + count - 1, the same for every layer that they pass through."""

    def __init__(
        self, ops: Reference, config: ModelConfig, freq: NDArray[np.float64] | None, first: int, count: int
    ) -> None:
        self.ops, self.config, self.first, self.count = ops, config, first, count
        self._freq = freq  # float64 [D / 2], or None where nothing rotates
        self._memo: dict[Any, Any] = {}
        self.layer = 0  # that the tokens are passing through
        self.shares: dict[int, F32] | None = None  # where wanted, by layer: what `contributed` was told

    def memo(self, key: Any, make: Callable[[], T]) -> T:
        """make(), once for all layers: for what depends on the positions alone."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def contributed(self, near: F32, far: F32) -> None:
        """A mechanism tells what window and memory each add to its output, [T, ..]: kept is the memory's share, [T],
        of the sum of both lengths."""
        if self.shares is not None:
            a, b = (np.linalg.norm(x.reshape(self.count, -1), axis=-1) for x in (near, far))
            self.shares[self.layer] = b / np.maximum(a + b, np.float32(1e-30))

    def rotate(self, x: F32, first: int, most: int | None = None, back: bool = False) -> F32:
        """x [T, H, D] turned to positions first, first + 1, .. (none above `most`), or turned back from them."""
        freq = self._freq
        if freq is None:
            return x

        def make() -> tuple[F32, F32]:
            positions = np.arange(first, first + len(x), dtype=np.int64)
            return angles(positions if most is None else np.minimum(positions, most), freq)

        cos, sin = self.memo(("rotate", first, len(x), most), make)
        return self.ops.rotate(x, cos, -sin if back else sin, self.config.block.rotary)

    def rounded(self, x: F32) -> F32:
        """x as the ring's type holds it."""
        return x.astype(self.config.cache_dtype).astype(np.float32, copy=False)

    def linear(self, x: F32, w: dict[str, Any], name: str) -> F32:
        """x Wᵀ + b with the layer's `name`.weight and, where there is one, `name`.bias.  [T, in] -> [T, out]."""
        return self.ops.linear(x, w[name + ".weight"], w.get(name + ".bias"))
