"""Operators: the table of them (`table.py`), the equation of each in NumPy (`reference/`), and the same made fast, for
CPUs (`cpu/`, Numba) and for NVIDIA GPUs (`cuda/`, CUDA C++ through CuPy).

This package imports nothing of the rest of tcinfer.
"""
