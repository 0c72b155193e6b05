"""The operators that a model's plan is made of, of the numba backend; the same names as in kernels/cuda/operators.py.

What the mechanisms of memory add (`ring`, `matrix_memory`, `tensor_cache`, `infini`) is put into plans of both backends
by the functions here in kernels/cpu: operators of the same names and arguments exist in CUDA.
"""

from tcinfer.kernels.cpu.attention import attention
from tcinfer.kernels.cpu.linear import linear, small
from tcinfer.kernels.cpu.rows import angles, embed, gelu, norm, swiglu

__all__ = ["angles", "attention", "embed", "gelu", "linear", "norm", "small", "swiglu"]
