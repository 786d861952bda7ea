"""Denormal numbers are 0 to a kernel: those that vanishing gradients are full of would slow many CPUs a hundredfold.

Each kernel sets its thread's mode so, and sets it back before it ends. What `activations` maps over arrays, and what
only moves numbers, leaves the mode alone.

    mode = flush_denormals()
    ...
    restore_mode(mode)
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .vector import I32, I64

BYTES = ir.IntType(8).as_pointer()
# x86's MXCSR: denormals are zeros (bit 6), flush to zero (15). aarch64's FPCR: flush to zero (24).
FLUSH = {"x86": 0x8040, "aarch64": 1 << 24}


def _architecture(builder):
    return next((name for name in FLUSH if builder.module.triple.startswith(name)), None)


def _call(builder, name, result, *args):
    """Call an intrinsic of LLVM's; nothing that reads or writes memory is moved past it."""
    fence = ir.FunctionType(ir.VoidType(), [])
    builder.asm(fence, "", "~{memory}", [], True)
    signature = ir.FunctionType(result, [a.type for a in args])
    value = builder.call(cgutils.get_or_insert_function(builder.module, signature, name), args)
    builder.asm(fence, "", "~{memory}", [], True)
    return value


def _read(builder):
    if _architecture(builder) == "aarch64":
        return _call(builder, "llvm.aarch64.get.fpcr", I64)
    place = cgutils.alloca_once(builder, I32)
    _call(builder, "llvm.x86.sse.stmxcsr", ir.VoidType(), builder.bitcast(place, BYTES))
    return builder.zext(builder.load(place), I64)


def _write(builder, mode):
    if _architecture(builder) == "aarch64":
        _call(builder, "llvm.aarch64.set.fpcr", ir.VoidType(), mode)
    else:
        place = cgutils.alloca_once_value(builder, builder.trunc(mode, I32))
        _call(builder, "llvm.x86.sse.ldmxcsr", ir.VoidType(), builder.bitcast(place, BYTES))


def _unless_flushing(builder, mode):
    flush = I64(FLUSH[_architecture(builder)])
    return builder.if_then(builder.icmp_unsigned("!=", builder.and_(mode, flush), flush), likely=True)


@intrinsic
def flush_denormals(typing):
    """From now on denormal numbers are 0 to this thread, as operands and results. Returns the mode before."""

    def codegen(context, builder, signature, args):
        if _architecture(builder) is None:
            return I64(0)
        mode = _read(builder)
        with _unless_flushing(builder, mode):
            _write(builder, builder.or_(mode, I64(FLUSH[_architecture(builder)])))
        return mode

    return types.int64(), codegen


@intrinsic
def heed_denormals(typing):
    """From now on this thread computes with denormal numbers, as it does outside of kernels."""

    def codegen(context, builder, signature, args):
        if _architecture(builder) is not None:
            _write(builder, builder.and_(_read(builder), I64(~FLUSH[_architecture(builder)])))
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def restore_mode(typing, mode):
    """Set the mode that `flush_denormals` returned."""

    def codegen(context, builder, signature, args):
        if _architecture(builder) is not None:
            with _unless_flushing(builder, args[0]):
                _write(builder, args[0])
        return context.get_dummy_value()

    return types.void(types.int64), codegen
