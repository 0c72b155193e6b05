"""The reference backend: every operator as its plain equation, in NumPy."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tcinfer.kernels.reference import attention, matrix_memory, pointwise, quants, rotary

F32 = NDArray[np.float32]


class Reference:
    """The operators by name. A faster backend derives from this class and replaces the ones it has."""

    name = "numpy"
    cold = ""  # what a user should know if loading is going to take seconds
    remark = ""  # what else a user should know, in a line
    plans = False  # whether a model runs as one plan on `threads` or on `device`, and not operator by operator
    threads: Any = None
    device: Any = None

    def __init__(self, threads: int | None = None) -> None:
        """threads: of the matrix products, which are NumPy's own (process-wide); None leaves them as they are."""
        if threads is not None:
            from threadpoolctl import threadpool_limits

            threadpool_limits(threads, user_api="blas")

    def linear(self, x: F32, w: quants.Matrix, bias: F32 | None = None) -> F32:
        return quants.linear(x, w, bias)

    rms_norm = staticmethod(pointwise.rms_norm)
    layer_norm = staticmethod(pointwise.layer_norm)
    sigmoid = staticmethod(pointwise.sigmoid)
    swiglu = staticmethod(pointwise.swiglu)
    gelu = staticmethod(pointwise.gelu)
    elu_plus_one = staticmethod(pointwise.elu_plus_one)
    unit = staticmethod(pointwise.unit)
    softmax = staticmethod(attention.softmax)
    attention = staticmethod(attention.attention)
    rotate = staticmethod(rotary.rotate)
    scan = staticmethod(matrix_memory.scan)
