"""Machine instructions for compiled functions: memory by address, half floats, atomic counters, waiting."""

from __future__ import annotations

import sys
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

from tcinfer.kernels.cpu.simd import F32, I16, I32, I64, Lanes, intrinsic, load, store


def _pointer_to(element: Any) -> Any:
    @intrinsic
    def view(typingctx: Any, address: Any) -> Any:
        """The memory at an address (int64) as an array without bounds: p[i] reads and writes."""
        want = types.CPointer(element)

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(want))

        return want(types.int64), codegen

    return view


floats, doubles = _pointer_to(types.float32), _pointer_to(types.float64)
int8s, int64s = _pointer_to(types.int8), _pointer_to(types.int64)


@intrinsic
def number(typingctx: Any, b: Any) -> Any:
    """A float64 that travelled as an int64 among the arguments of a step."""
    return types.float64(types.int64), lambda context, builder, signature, a: builder.bitcast(a[0], ir.DoubleType())


@intrinsic
def load_half(typingctx: Any, address: Any) -> Any:
    """The 16-bit float at an address, as float32."""
    return types.float32(
        types.int64
    ), lambda context, builder, signature, a: load(builder, a[0], 0, I16, 1).half().value


@intrinsic
def load_brain(typingctx: Any, address: Any) -> Any:
    """The bfloat16 at an address, as float32."""
    return types.float32(
        types.int64
    ), lambda context, builder, signature, a: (load(builder, a[0], 0, I16, 1).wide() << 16).bits(F32).value


@intrinsic
def store_half(typingctx: Any, address: Any, x: Any) -> Any:
    """float32 to an address as a 16-bit float, rounded to nearest."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        store(Lanes(builder, arguments[1]).to_half(), arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), codegen


@intrinsic
def exp(typingctx: Any, x: Any) -> Any:
    """e^x of one float32, as Lanes.exp."""
    return types.float32(types.float32), lambda context, builder, signature, a: Lanes(builder, a[0]).exp().value


@intrinsic
def atomic_add(typingctx: Any, address: Any, value: Any) -> Any:
    """Add to the int64 at an address, as one step for all threads; returns what it was."""
    return types.int64(types.int64, types.int64), lambda context, builder, signature, a: builder.atomic_rmw(
        "add", builder.inttoptr(a[0], I64.as_pointer()), a[1], "acq_rel"
    )


@intrinsic
def atomic_swap(typingctx: Any, address: Any, value: Any) -> Any:
    """Put a value into the int64 at an address; returns what it was."""
    return types.int64(types.int64, types.int64), lambda context, builder, signature, a: builder.atomic_rmw(
        "xchg", builder.inttoptr(a[0], I64.as_pointer()), a[1], "acq_rel"
    )


@intrinsic
def atomic_load(typingctx: Any, address: Any) -> Any:
    """The int64 at an address, as other threads have left it."""
    return types.int64(types.int64), lambda context, builder, signature, a: builder.load_atomic(
        builder.inttoptr(a[0], I64.as_pointer()), "acquire", 8
    )


@intrinsic
def atomic_replace(typingctx: Any, address: Any, old: Any, new: Any) -> Any:
    """If the int64 at an address is `old`, put `new` there; whether it was."""

    def codegen(context: Any, builder: Any, signature: Any, a: Any) -> Any:
        at = builder.inttoptr(a[0], I64.as_pointer())
        return builder.extract_value(builder.cmpxchg(at, a[1], a[2], "acq_rel", "acquire"), 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


@intrinsic
def pause(typingctx: Any) -> Any:
    """Tell the CPU that this thread is waiting in a loop."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if "x86" in builder.module.triple or "i686" in builder.module.triple:
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def give_way(typingctx: Any) -> Any:
    """Let another thread have this CPU."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        name = "SwitchToThread" if sys.platform == "win32" else "sched_yield"
        builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(I32, []), name), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def call(typingctx: Any, function: Any, a: Any, p: Any, thread: Any, threads: Any, taken: Any) -> Any:
    """Call an operator by its address: function(a, p, thread, threads, taken)."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function, *rest = arguments
        kind = ir.FunctionType(ir.VoidType(), [x.type for x in rest])
        builder.call(builder.inttoptr(function, kind.as_pointer()), rest)
        return context.get_dummy_value()

    return types.void(
        types.int64, types.CPointer(types.int64), types.CPointer(types.int64), *[types.int64] * 3
    ), codegen
