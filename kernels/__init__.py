"""Operators: the table of them (`table.py`), the equation of each in NumPy (`reference/`), the kinds of weights that
they read (`packing.py`), and the same operators made fast: for CPUs (`cpu/`, Numba) and for NVIDIA GPUs (`cuda/`, CUDA
C++ through CuPy).

This package imports nothing of the rest of tcinfer.
"""
