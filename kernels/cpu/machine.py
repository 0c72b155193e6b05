"""Machine instructions for compiled functions: memory by address, half floats, atomic counters, waiting."""

from __future__ import annotations

import sys
from typing import Any

from llvmlite import ir
from numba.core import types

from tcinfer.kernels.cpu.simd import F32, I8, I16, I32, I64, Lanes, call_function, intrinsic, load, pointer, store


def _pointer_to(kind: Any, element: Any) -> Any:
    @intrinsic(types.CPointer(kind), types.int64)
    def view(builder: Any, address: Any) -> Any:
        """The memory at an address (int64) as an array without bounds: p[i] reads and writes."""
        return pointer(builder, address, 0, element)

    return view


floats, doubles = _pointer_to(types.float32, F32), _pointer_to(types.float64, ir.DoubleType())
int8s, int64s = _pointer_to(types.int8, I8), _pointer_to(types.int64, I64)


@intrinsic(types.float64, types.int64)
def number(builder: Any, b: Any) -> Any:
    """A float64 that travelled as an int64 among the arguments of a step."""
    return builder.bitcast(b, ir.DoubleType())


@intrinsic(types.float32, types.int64)
def load_half(builder: Any, address: Any) -> Lanes:
    """The 16-bit float at an address, as float32."""
    return load(builder, address, 0, I16, 1).half()


@intrinsic(types.float32, types.int64)
def load_brain(builder: Any, address: Any) -> Lanes:
    """The bfloat16 at an address, as float32."""
    return (load(builder, address, 0, I16, 1).wide() << 16).bits(F32)


@intrinsic(types.void, types.int64, types.float32)
def store_half(builder: Any, address: Any, x: Any) -> None:
    """float32 to an address as a 16-bit float, rounded to nearest."""
    store(Lanes(builder, x).to_half(), address)


@intrinsic(types.float32, types.float32)
def exp(builder: Any, x: Any) -> Lanes:
    """e^x of one float32, as Lanes.exp."""
    return Lanes(builder, x).exp()


@intrinsic(types.int64, types.int64, types.int64)
def atomic_add(builder: Any, address: Any, value: Any) -> Any:
    """Add to the int64 at an address, as one step for all threads; returns what it was."""
    return builder.atomic_rmw("add", pointer(builder, address, 0, I64), value, "acq_rel")


@intrinsic(types.int64, types.int64, types.int64)
def atomic_swap(builder: Any, address: Any, value: Any) -> Any:
    """Put a value into the int64 at an address; returns what it was."""
    return builder.atomic_rmw("xchg", pointer(builder, address, 0, I64), value, "acq_rel")


@intrinsic(types.int64, types.int64)
def atomic_load(builder: Any, address: Any) -> Any:
    """The int64 at an address, as other threads have left it."""
    return builder.load_atomic(pointer(builder, address, 0, I64), "acquire", 8)


@intrinsic(types.boolean, *[types.int64] * 3)
def atomic_replace(builder: Any, address: Any, old: Any, new: Any) -> Any:
    """If the int64 at an address is `old`, put `new` there; whether it was."""
    at = pointer(builder, address, 0, I64)
    return builder.extract_value(builder.cmpxchg(at, old, new, "acq_rel", "acquire"), 1)


@intrinsic(types.void)
def pause(builder: Any) -> None:
    """Tell the CPU that this thread is waiting in a loop."""
    if "x86" in builder.module.triple or "i686" in builder.module.triple:
        call_function(builder, "llvm.x86.sse2.pause", ir.VoidType())


@intrinsic(types.void)
def give_way(builder: Any) -> None:
    """Let another thread have this CPU."""
    call_function(builder, "SwitchToThread" if sys.platform == "win32" else "sched_yield", I32)


@intrinsic(types.void, types.int64, *[types.CPointer(types.int64)] * 2, *[types.int64] * 3)
def call(builder: Any, function: Any, a: Any, p: Any, thread: Any, threads: Any, taken: Any) -> None:
    """Call an operator by its address: function(a, p, thread, threads, taken)."""
    arguments = [a, p, thread, threads, taken]
    kind = ir.FunctionType(ir.VoidType(), [x.type for x in arguments])
    builder.call(pointer(builder, function, 0, kind), arguments)
