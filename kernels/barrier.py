"""The barrier at which the threads of one call meet: an int64 array of arrivals, and a flag that calls it off."""

import sys

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .compiler import part
from .vector import I32, I64, at


@intrinsic
def _arrive(typing, barrier):
    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", args[0], I64(1), "acq_rel")

    return types.int64(barrier), codegen


@intrinsic
def _read(typing, barrier):
    def codegen(context, builder, signature, args):
        return builder.load_atomic(args[0], "acquire", 8)

    return types.int64(barrier), codegen


@intrinsic
def _pause(typing):
    """Tell the CPU that this is a spin loop."""

    def codegen(context, builder, signature, args):
        hints = {"x86": ("llvm.x86.sse2.pause", []), "aarch64": ("llvm.aarch64.hint", [I32(1)])}
        for architecture, (name, arguments) in hints.items():
            if builder.module.triple.startswith(architecture):
                kind = ir.FunctionType(ir.VoidType(), [a.type for a in arguments])
                builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)
        return context.get_dummy_value()

    return types.void(), codegen


_sleep = types.ExternalFunction("Sleep" if sys.platform == "win32" else "usleep", types.int32(types.uint32))


@part
def portion(n, me, parties):
    """Number ``me``'s part of n things that are shared out among parties: the first one, and that after the last."""
    return me * n // parties, (me + 1) * n // parties


@part(inline=False)
def meet(barrier, parties):
    """Wait until all ``parties`` threads have arrived. ``barrier``: int64 (2), zeros at first, shared by them.

    Spins, and sleeps for a moment when that takes long: a party may wait for this CPU. (It would not do to yield: two
    threads on one CPU would then take turns for ever, each too lately run to be moved to an idle one.) Returns at
    once, for good, when ``barrier[1]`` is set: whoever leaves the others in the lurch sets it.
    """
    if parties == 1:
        return
    arrived = _arrive(at(barrier, 0))
    target = (arrived // parties + 1) * parties
    spins = 0
    while _read(at(barrier, 0)) < target and _read(at(barrier, 1)) == 0:
        spins += 1
        if spins & 4095:
            _pause()
        else:
            _sleep(types.uint32(1))
