"""What the kernels compile to for given CPUs: vectors, multiply-adds, no calls, no spills; and how often they compile.

Timings only advise: this blocks. Nothing compiled here is run, so that any machine can compile for any other: this
file, run as a script, is the process that compiles with ``NUMBA_CPU_NAME`` and prints what it finds.
"""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

AVX512 = "+avx512f,+avx512vl,+avx512bw,+avx512dq,+avx2,+fma"
# What Numba compiles for, and which registers and tiles (rows, vectors) are expected there.
CPUS = {
    "skylake-avx512": (AVX512, "zmm", (6, 4)),
    "haswell": ("+avx2,+fma", "ymm", (3, 4)),
}
# Stores of vectors to the stack and loads from it in all of a kernel, as Numba 0.68 compiles it: no more than these.
SPILLS = {
    "skylake-avx512": {
        "lstm.forward float32": (0, 0), "lstm.backward float32": (23, 54), "lstm.step_of_arrays float32": (5, 10),
        "gru.forward float32": (0, 0), "gru.backward float32": (9, 10), "rnn.forward float32": (0, 0),
        "lstm.forward float64": (0, 0), "_multiply_any float32": (0, 0), "_multiply_any float64": (0, 0),
        "_multiply_three float32": (0, 0), "_multiply_three float64": (0, 0),
    },
    "haswell": {
        "lstm.forward float32": (20, 25), "lstm.backward float32": (13, 18), "lstm.step_of_arrays float32": (28, 43),
        "gru.forward float32": (6, 6), "gru.backward float32": (8, 9), "rnn.forward float32": (2, 2),
        "lstm.forward float64": (25, 44), "_multiply_any float32": (6, 6), "_multiply_any float64": (2, 2),
        "_multiply_three float32": (4, 4), "_multiply_three float64": (0, 0),
    },
}  # fmt: skip
# Each kernel's specialisations in all the cases of `every_case`: for each dtype one and, of the loops over a sequence,
# one with masks. A shape, a length or an option that is a number makes none.
SPECIALISATIONS = {
    "rnn.forward": 4, "rnn.backward": 4, "rnn.step_of_arrays": 2,
    "lstm.forward": 4, "lstm.backward": 4, "lstm.step_of_arrays": 2,
    "lstm.forward_with_options": 2, "lstm.backward_with_options": 2, "lstm.step_of_arrays_with_options": 2,
    "gru.forward": 4, "gru.backward": 4, "gru.step_of_arrays": 2,
    "gru.forward_reset_before": 2, "gru.backward_reset_before": 2, "gru.step_of_arrays_reset_before": 2,
    "packing.pack": 2, "packing.pack_transposed": 2, "linear.forward": 2, "linear.backward": 2,
}  # fmt: skip
LIBM = re.compile(
    r"(?<!\w)_?((?:exp|exp2|expm1|log|log1p|tanh|sinh|cosh|pow|ldexp|fma|sqrt)f?|__svml\w+|_ZGV\w+)(?!\w)"
)
ALLOCATOR = re.compile(r"(?<!\w)(NRT_\w*(?:[Aa]lloc|MemInfo_new)\w*|malloc|calloc|realloc|free|memalign)(?!\w)")


def functions_of(kernels, packing):
    """Dispatchers that Python calls, as ``(module, name)``: those whose calls are recorded, and none is run."""
    for name in ("rnn", "lstm", "gru"):
        for stem in ("forward", "backward", "step_of_arrays"):
            for end in ("", "_with_options", "_reset_before"):
                if hasattr(getattr(kernels, name), stem + end):
                    yield getattr(kernels, name), stem + end
    yield packing, "pack"
    yield packing, "pack_transposed"
    yield kernels.linear, "forward"
    yield kernels.linear, "backward"


class Recorder:
    """Stands for a kernel: remembers the types of each call's arguments, and does nothing."""

    def __init__(self, dispatcher):
        self.dispatcher, self.signatures = dispatcher, []

    def __call__(self, *arguments):
        signature = tuple(self.dispatcher.typeof_pyval(argument) for argument in arguments)
        if signature not in self.signatures:
            self.signatures.append(signature)


def every_case(fastrnn, np):
    """Calls of layers of every kind, in many shapes."""
    shapes = [(1, 1, 1, 1), (3, 1, 2, 5), (4, 2, 3, 64), (2, 9, 65, 33), (5, 3, 17, 200)]
    options = [
        {}, {"num_layers": 2, "bidirectional": True}, {"bias": False, "batch_first": True}, {"zoneout": 0.1},
        {"recurrent_dropout": 0.1}, {"num_layers": 2, "dropout": 0.1},
    ]  # fmt: skip
    own = {
        "RNN": [{"nonlinearity": "relu"}],
        "LSTM": [{"peephole": True}, {"cell_clip": 1.0}, {"coupled": True}, {"proj_size": 1}],
        "GRU": [{"reset_after": False}],
    }
    for dtype in ("float32", "float64"):
        for cell, more in own.items():
            for option in options + more:
                for T, B, I, H in shapes:
                    if option.get("proj_size", 0) >= H:
                        continue
                    layer = getattr(fastrnn, cell)(I, H, dtype=dtype, seed=0, **option)
                    x = np.zeros((B, T, I) if layer.batch_first else (T, B, I), dtype)
                    for lengths in (None, list(range(T - 1, T - 1 + B)) if B == 2 else None):
                        keywords = {} if lengths is None else {"lengths": [min(n, T) for n in lengths]}
                        layer(x, **keywords)
                        (y, _), pullback = layer.vjp(x, **keywords)
                        pullback(y)
        head = fastrnn.Linear(5, 3, dtype=dtype, seed=0)
        y, pullback = head.vjp(np.zeros((4, 5), dtype))
        pullback(y)


def body_of(assembly, name):
    """The lines of one function of a module's assembly."""
    quoted = f'"?{re.escape(name)}"?'
    return re.search(rf"^{quoted}:\n(.*?)^\s+\.size\s+{quoted}", assembly, re.S | re.M)[1]


def tiles_of(assembly):
    """The lines of all the functions that are one tile's, which a module has beside its own."""
    names = re.findall(r'^("?)(tile\.[\w.]+)\1:$', assembly, re.M)
    return "".join(body_of(assembly, name) for _, name in names)


def measured(body):
    """What is counted in a function: vector instructions by register, scalar arithmetic, calls, spills."""
    calls = set(re.findall(r"movabsq\s+\$([A-Za-z_]\w*)", body)) | set(re.findall(r"callq?\s+([A-Za-z_]\w*)", body))
    arithmetic = r"v(?:fn?m(?:add|sub)\d*|mul|add|sub|div)"
    return {
        "multiply-adds": {
            r: len(re.findall(rf"vfn?m(?:add|sub)\w*p[sd]\s.*%{r}", body)) for r in ("zmm", "ymm", "xmm")
        },
        "products": {r: len(re.findall(rf"vmulp[sd]\s.*%{r}", body)) for r in ("zmm", "ymm", "xmm")},
        "scalar": len(re.findall(rf"\s{arithmetic}s[sd]\s", body)),
        "libm": sorted({match[1] for call in calls if (match := LIBM.fullmatch(call))}),
        "allocator": sorted({match[1] for call in calls if (match := ALLOCATOR.fullmatch(call))}),
        "spills": len(re.findall(r"vmov\w+\s+%[xyz]mm\d+, -?\d*\(%rsp\)", body)),
        "reloads": len(re.findall(r"\s-?\d*\(%rsp\)(?:\{\w+\})?, %[xyz]mm", body)),
        "loops": loops(body),
    }


def loops(body):
    """Of every loop of a single block that multiplies and adds: how many multiply-adds, and vectors on the stack."""
    found = []
    for label, block in re.findall(r"^(\.LBB\w+):\n((?:(?!^\.LBB).*\n)*)", body, re.M):
        if re.search(rf"\sj\w+\s+{re.escape(label)}$", block, re.M):
            count = len(re.findall(r"\svfn?m(?:add|sub)\w*p[sd]\s", block))
            if count:
                found.append([count, len(re.findall(r"\(%rsp\).*%[xyz]mm|%[xyz]mm\d+, -?\d*\(%rsp\)", block))])
    return sorted(found)


def report(wanted):
    """Compile what is wanted and the products of `gemm`; print what is found of each, and all specialisations."""
    import numpy as np
    from fastrnn.kernels import cell, gemm, gru, linear, lstm, rnn  # noqa: F401

    import fastrnn
    from fastrnn import kernels

    recorders, found = {}, {}
    for module, name in list(functions_of(kernels, fastrnn.packing)):
        recorders[f"{module.__name__.rpartition('.')[2]}.{name}"] = recorder = Recorder(getattr(module, name))
        setattr(module, name, recorder)
    # These hold the kernels themselves.
    for namespace, end in (
        (fastrnn.layers.LSTM_WITH_OPTIONS, "lstm.{}_with_options"),
        (
            fastrnn.layers.GRU_RESET_BEFORE,
            "gru.{}_reset_before",
        ),
    ):
        for name in ("forward", "backward", "step_of_arrays"):
            setattr(namespace, name, recorders[end.format(name)])
    np.seterr(all="ignore")  # the arrays are never written
    addresses = gemm.multiply_addresses
    for module in (fastrnn.recurrent, fastrnn.heads):
        module.multiply_addresses = lambda *arguments: np.zeros(2, np.int64)
    every_case(fastrnn, np)
    found["specialisations"] = {name: len(recorder.signatures) for name, recorder in recorders.items()}
    for each in wanted:
        name, dtype = each.split()
        dispatcher, signatures = recorders[name].dispatcher, recorders[name].signatures
        signature = next(s for s in signatures if dtype in str(s[1]))
        dispatcher.compile(signature)
        compiled = dispatcher.overloads[signature]
        assembly = compiled.library.get_asm_str()
        found[each] = measured(body_of(assembly, compiled.fndesc.mangled_name) + tiles_of(assembly))
    for dtype in ("float32", "float64"):
        addresses(np.dtype(dtype), True)
    for function in (gemm._multiply_any, gemm._multiply_three):
        for compiled in function.overloads.values():
            key = f"{function.py_func.__name__} {compiled.signature.args[5].dtype}"
            assembly = compiled.library.get_asm_str()
            found[key] = measured(body_of(assembly, compiled.fndesc.mangled_name) + tiles_of(assembly))
    json.dump(found, sys.stdout)


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What each CPU's process found, all at once."""

    def run(cpu):
        env = {**os.environ, "NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": CPUS[cpu][0]}
        # Assembly can be had only of what is compiled in the process: hence a cache of its own.
        env |= {"NUMBA_CACHE_DIR": str(tmp_path_factory.mktemp(cpu)), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-W", "error", __file__, *(name for name in SPILLS[cpu] if "." in name)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    with ThreadPoolExecutor(len(CPUS)) as pool:
        return dict(zip(CPUS, pool.map(run, CPUS), strict=True))


each_kernel = pytest.mark.parametrize(("cpu", "kernel"), [(cpu, kernel) for cpu in CPUS for kernel in SPILLS[cpu]])


@each_kernel
def test_arithmetic_is_in_whole_vectors(cpu, kernel, reports):
    found, (_, register, _) = reports[cpu][kernel], CPUS[cpu]
    vectors = {r: found["multiply-adds"][r] + found["products"][r] for r in ("zmm", "ymm", "xmm")}
    assert vectors.pop(register) > 0
    assert set(vectors.values()) == {0}
    assert found["scalar"] == 0
    if "backward" not in kernel:  # whose gate math is products of three and more factors
        assert found["multiply-adds"][register] > 0


@each_kernel
def test_nothing_is_called_that_computes_or_allocates(cpu, kernel, reports):
    assert reports[cpu][kernel]["libm"] == reports[cpu][kernel]["allocator"] == []


@each_kernel
def test_spills(cpu, kernel, reports):
    """A number that has come down is to be written above."""
    found, (spills, reloads) = reports[cpu][kernel], SPILLS[cpu][kernel]
    assert found["spills"] <= spills
    assert found["reloads"] <= reloads


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_products_have_a_loop_for_each_tile(cpu, dtype, reports):
    """Of as many multiply-adds as the tile has vectors; with nothing on the stack."""
    _, _, (rows, vecs) = CPUS[cpu]
    for kernel, widths in (f"_multiply_any {dtype}", (1, 2, vecs)), (f"_multiply_three {dtype}", (3,)):
        found = reports[cpu][kernel]["loops"]
        # Of a single row LLVM may do several rounds at once.
        assert {r * v for r in range(2, rows + 1) for v in widths} <= {count for count, _ in found}
        assert {on_stack for _, on_stack in found} == {0}


@pytest.mark.parametrize("cpu", CPUS)
def test_how_often_kernels_are_compiled(cpu, reports):
    assert reports[cpu]["specialisations"] == SPECIALISATIONS


def test_what_is_looked_for_is_found():
    """In a loop as it must not be: a spill, a reload, a scalar product, half a vector, and calls."""
    body = """
.LBB0_1:
	vfmadd231ps	64(%rsi), %zmm1, %zmm2
	vfmadd231ps	%ymm3, %ymm1, %ymm2
	vmulss	%xmm1, %xmm2, %xmm3
	vmovups	%zmm2, 192(%rsp)
	vaddps	-64(%rsp), %zmm2, %zmm2
	movabsq	$expf, %rax
	callq	*%rax
	movabsq	$NRT_MemInfo_alloc_aligned, %rax
	callq	*%rax
	callq	malloc
	jne	.LBB0_1
"""
    found = measured(body)
    assert found["multiply-adds"] == {"zmm": 1, "ymm": 1, "xmm": 0}
    assert found["scalar"] == 1
    assert found["libm"] == ["expf"]
    assert found["allocator"] == ["NRT_MemInfo_alloc_aligned", "malloc"]
    assert (found["spills"], found["reloads"]) == (1, 1)
    assert found["loops"] == [[2, 2]]


if __name__ == "__main__":
    report(sys.argv[1:])
