"""How fast a GPU copies within its memory, read and written: the ceiling for decoding, as kernels/cpu/bandwidth.py."""

from __future__ import annotations

import time
from typing import Any

MOST, LEAST = 2**30, 2**20  # bytes of a copy
COPIES = 5  # of a measurement


class Bandwidth:
    """Measures one device with what memory it has free."""

    def __init__(self, device: Any) -> None:
        """device: device.Device. Raises UnavailableError where its memory is full."""
        self._device, self._nbytes = device, max(LEAST, min(MOST, device.free_bytes // 8))
        self._from, self._to = device.zeros(self._nbytes), device.zeros(self._nbytes)

    def measure(self) -> float:
        """Bytes a second, read and written."""
        device = self._device
        device.copy(self._to.address, self._from.address, self._nbytes)
        device.wait()
        started = time.perf_counter()
        for _ in range(COPIES):
            device.copy(self._to.address, self._from.address, self._nbytes)
        device.wait()
        return 2 * COPIES * self._nbytes / (time.perf_counter() - started)
