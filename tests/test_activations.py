"""Accuracy and special values of sigmoid and tanh, and that they are vectors' arithmetic, not calls."""

import os
import re
import subprocess
import sys

import mpmath
import numpy as np
import pytest
from conftest import ROOT
from fastrnn.kernels import activations

FUNCTIONS = ["sigmoid", "tanh"]
INTEGERS = {np.dtype(np.float32): np.uint32, np.dtype(np.float64): np.uint64}


def apply(name, x):
    y = np.empty_like(x)
    getattr(activations, f"{name}_array")(x, y)
    return y


def errors(name, x):
    """A function from results to their largest error in ulp, against 40 digits."""
    with mpmath.workdps(40):
        numbers = [mpmath.mpf(float(v)) for v in x]
        values = [mpmath.tanh(v) if name == "tanh" else 1 / (1 + mpmath.exp(-v)) for v in numbers]
    spacing = np.spacing(np.abs(np.array([float(v) for v in values])).astype(x.dtype)).astype(np.float64)

    def ulps(y):
        with mpmath.workdps(40):
            return max(float(abs(mpmath.mpf(float(a)) - v) / mpmath.mpf(s)) for a, v, s in zip(y, values, spacing))

    return ulps


def samples(dtype, rng):
    info, integer = np.finfo(dtype), INTEGERS[dtype]
    # Any bits, NaN and infinities left out, are magnitudes of every order, subnormal ones among them.
    anything = rng.integers(0, np.iinfo(integer).max, 2000, integer, endpoint=True).view(dtype)
    edge = (87, 104) if dtype == np.float32 else (708, 745)
    return {
        "dense": np.linspace(-30, 30, 2001).astype(dtype),
        "any bits": anything[np.isfinite(anything)],
        "near 0": (rng.standard_normal(1000) * np.geomspace(1e-9, 1, 1000)).astype(dtype),
        "subnormal": info.smallest_subnormal * np.arange(-50, 51, dtype=dtype),
        "least": np.array([info.tiny, -info.tiny, info.max, -info.max, info.eps, -info.eps]),
        "sigmoid subnormal": -np.linspace(edge[0] - 1, edge[1] + 1, 2001).astype(dtype),
        "far": np.linspace(-4 * edge[1], 4 * edge[1], 1001).astype(dtype),
    }


@pytest.mark.parametrize("name", FUNCTIONS)
def test_within_four_ulp(name, dtype, rng):
    for what, x in samples(dtype, rng).items():
        assert errors(name, x)(apply(name, x)) <= 4, what


@pytest.mark.parametrize("name", FUNCTIONS)
def test_within_four_ulp_on_a_million_numbers(name):
    """float32 only: float64 arithmetic is exact enough to compare with, and fast."""
    bits = np.arange(0, 2**32, 4099, dtype=np.uint64).astype(np.uint32)
    x = bits.view(np.float32)
    x = x[np.isfinite(x)]
    with np.errstate(over="ignore"):
        wide = x.astype(np.float64)
        expected = np.tanh(wide) if name == "tanh" else 1 / (1 + np.exp(-wide))
    spacing = np.spacing(np.abs(expected).astype(np.float32)).astype(np.float64)
    assert (np.abs(apply(name, x) - expected) / spacing).max() <= 4


def test_sigmoid_is_relatively_accurate_far_below_zero(dtype):
    """Where 1 - sigmoid(-x) would be 0, sigmoid is still exp(x)."""
    x = -np.arange(40, 86, dtype=dtype)
    np.testing.assert_allclose(apply("sigmoid", x), np.exp(x), rtol=4 * np.finfo(dtype).eps)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nan_gives_nan(name, dtype, rng):
    """Quiet and signalling, of either sign, with any payload; and other lanes of the vector are not touched."""
    info = np.finfo(dtype)
    exponent, sign = (2**info.nexp - 1) << info.nmant, 1 << (info.bits - 1)
    payloads = [1, 2**info.nmant - 1, 2 ** (info.nmant - 1), *rng.integers(1, 2**info.nmant, 60).tolist()]
    x = np.array([bits | exponent | s for bits in payloads for s in (0, sign)], INTEGERS[dtype]).view(dtype)
    assert np.isnan(x).all()
    assert np.isnan(apply(name, x)).all()
    mixed = np.ones(67, dtype)
    mixed[::3] = np.nan
    assert (np.isnan(apply(name, mixed)) == np.isnan(mixed)).all()


def test_limits_and_signed_zero(dtype):
    x = np.array([-np.inf, -1000, -0.0, 0.0, 1000, np.inf], dtype)
    assert apply("sigmoid", x).tolist() == [0, 0, 0.5, 0.5, 1, 1]
    y = apply("tanh", x)
    assert y.tolist() == [-1, -1, 0, 0, 1, 1]
    assert np.signbit(y).tolist() == [True, True, True, False, False, False]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("n", range(1, 41))
def test_every_length_writes_its_own_elements_only(name, dtype, n, rng):
    x = rng.standard_normal(n + 64).astype(dtype)
    memory = np.full(n + 128, np.nan, dtype)
    guard = memory.copy()
    getattr(activations, f"{name}_array")(x[:n], memory[64 : 64 + n])
    whole = apply(name, x)
    assert memory[64 : 64 + n].tobytes() == whole[:n].tobytes()
    assert memory[:64].tobytes() == guard[:64].tobytes()
    assert memory[64 + n :].tobytes() == guard[64 + n :].tobytes()


ASSEMBLY = """
import math, numba, numpy as np
from fastrnn.kernels import activations

@numba.njit
def control(x, y):
    for i in range(x.size):
        y[i] = math.exp(x[i]) + math.tanh(x[i])

for function in (control, activations.sigmoid_array, activations.tanh_array):
    for dtype in (np.float32, np.float64):
        function(np.ones(9, dtype), np.ones(9, dtype))
    for assembly in function.inspect_asm().values():
        print("===", function.__name__)
        print(assembly)
"""


def test_no_call_in_the_loop(tmp_path):
    """Assembly can be had of code compiled in this process only: hence a process with a cache of its own."""
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-W", "error", "-c", ASSEMBLY], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    library = re.compile(r"(?<!\w)_?(expf?|exp2f?|expm1f?|tanhf?|powf?|ldexpf?|__svml\w+|_ZGV\w+)(?!\w)")
    blocks = run.stdout.split("=== ")[1:]
    assert len(blocks) == 6
    for block in blocks:
        found = library.findall(block)
        assert bool(found) == block.startswith("control"), found
