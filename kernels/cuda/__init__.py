"""The CUDA backend: whole passes as plans of operators in CUDA C++, on one NVIDIA GPU through CuPy.

`machine.h` is what operators ask of the machine (inline PTX stands there alone; `host.h` is its twin on CPUs, for
tests), `common.h`, `panels.h`, `kinds.h`, `staging.h` and `stream.h` what they share, the `.cu` files the operators,
`passes.cu` how steps are run. `program` puts their text together, `plan` the steps of a model, `recorder` is what a
model's wiring is recorded by, `packing` the layout of weights, `device` the GPU itself.
"""
