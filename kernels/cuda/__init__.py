"""The CUDA backend: whole passes as plans of operators in CUDA C++, on one NVIDIA GPU through CuPy.

`machine.h` is what operators ask of the machine (inline PTX stands there alone; `host.h` is its twin on CPUs, for
tests), `common.h`, `kinds.h`, `staging.h` and `stream.h` what they share, the `.cu` files the operators, `passes.cu`
how steps are run. `program` puts their text together, `plan` the steps of a model, `operators` has the functions that
make steps, `packing` the layout of weights, `device` the GPU itself.
"""

from __future__ import annotations

from typing import Any

from tcinfer.kernels.reference import Reference


class Cuda(Reference):
    """Marks a model that runs by plans on a GPU; its operators one by one are the reference's."""

    name = "cuda"
    plans = True

    def __init__(self, device: Any = None) -> None:
        """device: in place of the GPU that CuPy uses (tests).

        Raises UnavailableError where there is no GPU that can be used.
        """
        super().__init__()
        if device is None:
            from tcinfer.kernels.cuda.device import Device

            device = Device()
        self.device = device

    @property
    def cold(self) -> str:  # type: ignore[override]
        return "" if self.device.warm else "compiling for this GPU, once: up to a minute"
