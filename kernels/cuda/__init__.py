"""The CUDA backend: whole passes as plans of operators in CUDA C++, on one NVIDIA GPU through CuPy.

`machine.h` is what operators ask of the machine (inline PTX stands there alone; tests/gpu/host.h is its twin on
CPUs), the other headers what they share, the `.cu` files the operators, `passes.cu` how steps run.
`program` puts their text together, `plan` the steps of a model; `recorder` is what a model's wiring is recorded by,
`products` and `made` what it knows of weights and of the rows that meet them; `packing` is the layout of weights,
`device` the GPU itself.
"""
