"""What a machine can do at most: multiply-adds a second, and bytes read a second from memory of some size.

The loops are LLVM's assembly, compiled for the CPU at hand by the compiler that Numba brings, and share no code with
the package: they stay as they are from commit to commit, so that histories from different machines can be compared, and
the gate divides by their times. Editing them breaks both.
"""

import ctypes
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import llvmlite.binding as llvm
import numpy as np

# Chains of multiply-adds: more than any CPU has under way at once, fewer than it has registers.
CHAINS = 12
# Vectors read in one round of the loop.
READS = 8
SAMPLE_SECONDS = 0.002

_MULTIPLY_ADDS = """
define void @run(ptr %p, i64 %n) {{
entry:
  %x = load {vector}, ptr %p, align 8
  br label %loop
loop:
  %i = phi i64 [ 0, %entry ], [ %next, %loop ]
{phis}
{fmas}
  %next = add i64 %i, 1
  %more = icmp slt i64 %next, %n
  br i1 %more, label %loop, label %done
done:
{stores}
  ret void
}}
declare {vector} @llvm.fma.{suffix}({vector}, {vector}, {vector})
"""

_READS = """
define void @run(ptr %p, i64 %n, i64 %times) {{
entry:
  br label %again
again:
  %t = phi i64 [ 0, %entry ], [ %t_next, %end ]
  br label %loop
loop:
  %i = phi i64 [ 0, %again ], [ %next, %loop ]
{phis}
{loads}
  %next = add i64 %i, {step}
  %more = icmp slt i64 %next, %n
  br i1 %more, label %loop, label %end
end:
{keeps}
  %t_next = add i64 %t, 1
  %once_more = icmp slt i64 %t_next, %times
  br i1 %once_more, label %again, label %done
done:
  ret void
}}
"""


@cache
def vector_bytes():
    features = llvm.get_host_cpu_features()
    return 64 if features.get("avx512f") else 32 if features.get("avx") else 16


def _lines(template, count):
    return "\n".join(template.format(j=j) for j in range(count))


def _compiled(assembly, counts):
    """The C function ``run(pointer, *counts)`` of a module, compiled for this CPU; it is called without the GIL."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features().flatten()
    machine = llvm.Target.from_default_triple().create_target_machine(llvm.get_host_cpu_name(), features, opt=3)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(assembly), machine)
    engine.finalize_object()
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p, *(ctypes.c_int64,) * counts)(engine.get_function_address("run"))
    function.engine = engine  # which owns the code
    return function


@cache
def _multiply_adds(dtype):
    lanes = vector_bytes() // dtype.itemsize
    vector = f"<{lanes} x {'float' if dtype == np.float32 else 'double'}>"
    return _compiled(
        _MULTIPLY_ADDS.format(
            vector=vector,
            suffix=f"v{lanes}f{dtype.itemsize * 8}",
            phis=_lines(f"  %a{{j}} = phi {vector} [ %x, %entry ], [ %b{{j}}, %loop ]", CHAINS),
            fmas=_lines(
                f"  %b{{j}} = call {vector} @llvm.fma.v{lanes}f{dtype.itemsize * 8}"
                f"({vector} %a{{j}}, {vector} %x, {vector} %x)",
                CHAINS,
            ),
            stores=_lines(f"  store volatile {vector} %b{{j}}, ptr %p, align 8", CHAINS),
        ),
        1,
    )


@cache
def _reads():
    vector = f"<{vector_bytes() // 8} x i64>"
    load = (
        f"  %i{{j}} = add i64 %i, {{j}}\n"
        f"  %p{{j}} = getelementptr {vector}, ptr %p, i64 %i{{j}}\n"
        f"  %v{{j}} = load {vector}, ptr %p{{j}}, align 8\n"
        f"  %b{{j}} = xor {vector} %a{{j}}, %v{{j}}"
    )
    return _compiled(
        _READS.format(
            step=READS,
            phis=_lines(f"  %a{{j}} = phi {vector} [ zeroinitializer, %again ], [ %b{{j}}, %loop ]", READS),
            loads=_lines(load, READS),
            keeps=_lines(f'  call void asm sideeffect "", "x"({vector} %b{{j}})', READS),
        ),
        2,
    )


class MultiplyAdds:
    """A call does ``work`` floating-point operations, without touching memory, on so many threads at once."""

    def __init__(self, dtype, threads=1, rounds=40_000):
        dtype = np.dtype(dtype)
        self._run, self._rounds = _multiply_adds(dtype), rounds
        self._x = [np.full(64, 0.5, dtype) for _ in range(threads)]
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None
        self.work = threads * 2 * CHAINS * vector_bytes() // dtype.itemsize * rounds

    def _one(self, x):
        self._run(x.ctypes.data, self._rounds)

    def __call__(self):
        if self._pool is None:
            self._one(self._x[0])
        else:
            list(self._pool.map(self._one, self._x))


class Reads:
    """A call reads an array of so many bytes, or a little more, until it has read at least 2 MB: ``work`` bytes."""

    def __init__(self, nbytes):
        self._vectors = -(-nbytes // (READS * vector_bytes())) * READS
        size = self._vectors * vector_bytes()
        memory = np.ones(size + 64, np.uint8)
        first = -memory.ctypes.data % 64
        self._memory, self._run = memory[first:], _reads()
        self._times = -(-2_000_000 // size)
        self.work = self._times * size

    def __call__(self):
        self._run(self._memory.ctypes.data, self._vectors, self._times)


class Sampler:
    """Times calls of a function, so many in a sample that it lasts at least 2 ms."""

    def __init__(self, call, clock=time.perf_counter):
        self.call, self.calls, self.clock = call, 1, clock
        call()
        while (seconds := min(self.sample() for _ in range(3))) * self.calls < SAMPLE_SECONDS:
            self.calls = max(self.calls + 1, min(10 * self.calls, int(1.2 * SAMPLE_SECONDS / seconds) + 1))

    def sample(self):
        """The mean seconds of a call, in one sample."""
        call, clock, calls = self.call, self.clock, range(self.calls)
        begin = clock()
        for _ in calls:
            call()
        return (clock() - begin) / self.calls


def fraction(call, work, limit, clock=time.perf_counter, rounds=15):
    """What part of the limit's rate a call that does so much work reaches, each at its best of interleaved samples."""
    ours, most = Sampler(call, clock), Sampler(limit, clock)
    seconds = [(ours.sample(), most.sample()) for _ in range(rounds)]
    best, best_of_limit = (min(column) for column in zip(*seconds, strict=True))
    return (work / best) / (limit.work / best_of_limit)
