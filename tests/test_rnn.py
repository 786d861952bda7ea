"""The RNN with a function of the user's: it is compiled, called and left as it would be anywhere else."""

import subprocess
import sys

import numba
import numpy as np
import pytest
from oracle import assert_close, inputs

import fastrnn

DTYPES = ["float32", "float64"]
POINTS = np.linspace(-8, 8, 1001)
TANH = np.tanh(POINTS)

# `pick` is the user's, and called from f as well: it must count references to what it returns.
SHARED = """
import numba
import numpy as np
import fastrnn

TABLE = np.linspace(0, 1, 5)

@numba.njit
def pick(a, b, first):
    if first:
        return a
    return b

@numba.njit
def f(x):
    return np.tanh(x) + 0 * pick(TABLE, TABLE, x > 0)[0]

@numba.njit
def both(a, b):
    return pick(a, b, True), pick(b, a, True)

rnn = fastrnn.RNN(3, 5, nonlinearity=(f, numba.njit(lambda y: 1 - y * y)), dtype="float64")
rnn(np.ones((2, 1, 3)))
for i in range(2000):
    a, b = np.arange(1000.0) + i, np.arange(1000.0) - i
    for array in a, b:
        array.flags.writeable = False
    c, d = both(a, b)
    assert (c[5], d[5]) == (5 + i, 5 - i)
"""


@numba.njit
def interpolated(a):
    return np.interp(a, POINTS, TANH)


@numba.njit
def allocated(a):
    numbers = np.zeros(3)
    numbers[1] = np.tanh(a)
    return numbers.sum()


@numba.njit
def tanh_slope(y):
    return 1 - y * y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("f", [interpolated, allocated])
def test_functions_that_allocate(f, dtype):
    own, plain = (fastrnn.RNN(3, 5, nonlinearity=n, dtype=dtype, seed=0) for n in ((f, tanh_slope), "tanh"))
    x = inputs(plain, 4, 2)[0]
    off = 1e-4 if f is interpolated else 0  # between the points
    for (y, pullback), (z, expected) in [(own.vjp(x), plain.vjp(x))]:
        for a, b in zip((y[0], pullback(y[0])[0]), (z[0], expected(y[0])[0])):
            np.testing.assert_allclose(a, b, rtol=off, atol=off + 100 * np.finfo(dtype).eps)
    assert f(0.5) == pytest.approx(np.tanh(0.5), abs=1e-4)


def test_functions_that_others_call_too():
    """In a process of its own, which would be aborted."""
    done = subprocess.run([sys.executable, "-c", SHARED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@numba.njit
def limited(a):
    if a > 100:
        raise ValueError("too large", a)
    return a


@pytest.mark.parametrize("T", [1, 3])
def test_functions_that_raise(T):
    """The error is the function's, and the thread computes as before: denormal numbers are no zeros."""
    rnn = fastrnn.RNN(3, 5, nonlinearity=(limited, numba.njit(lambda y: 1.0)), seed=0, dtype="float64")
    tiny = np.full(3, 1e-310)
    for _ in range(3):
        with pytest.raises(ValueError, match="too large"):
            rnn(np.full((T, 2, 3), 1e6))
        assert (tiny * 0.5).all()
    assert np.isfinite(rnn(np.ones((T, 2, 3)))[0]).all()


@numba.njit
def root(a):
    return a**0.5


@numba.njit
def root_slope(y):
    return 0.5 / y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H", [1, 5, 16, 63, 65])
def test_functions_are_called_for_units_that_there_are(H, dtype):
    """For others, whose sums are 0, this one would divide by it."""
    rnn = fastrnn.RNN(3, H, nonlinearity=(root, root_slope), seed=0, dtype=dtype)
    for name, array in rnn.parameters.items():
        setattr(rnn, name, np.abs(array) + 0.1)
    with pytest.raises(ZeroDivisionError):
        root_slope(0.0)
    x = np.abs(inputs(rnn, 3, 2)[0])
    (y, _), pullback = rnn.vjp(x)
    sums = x @ rnn.weight_ih_l0.T + rnn.bias_ih_l0 + rnn.bias_hh_l0
    sums[1:] += y[:-1] @ rnn.weight_hh_l0.T
    assert_close(y, np.sqrt(sums))
    assert np.isfinite(pullback(np.ones_like(y))[0]).all()
