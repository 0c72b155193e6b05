"""The Numba backend: whole passes as plans of compiled operators (plan.py).

`simd`, `vectors` and `tiles` hold vectors, long rows and inner products, `machine` single instructions, `packing` the
layouts of weights, `jit` compiling and its cache, `threads` what runs a plan; `rows`, `linear`, `ring`, `attention` and
`matrix_memory` the operators; `recorder` what a model's wiring is recorded by.
"""
