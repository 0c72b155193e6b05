"""The Numba backend: operators whose loops NumPy runs slowly, compiled; the rest are the reference's own."""

from tcinfer.kernels.cpu import attention, matrix_memory, pointwise
from tcinfer.kernels.reference import Reference


class Compiled(Reference):
    """The reference with its decode loops compiled."""

    name = "numba"

    gelu = staticmethod(pointwise.gelu)
    attention = staticmethod(attention.attention)
    scan = staticmethod(matrix_memory.scan)
