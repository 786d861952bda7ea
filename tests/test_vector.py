"""Vectors' loads, stores and arithmetic."""

import numba
import numpy as np
import pytest
from fastrnn.kernels import vector
from fastrnn.kernels.vector import at


@numba.njit
def copy_part(source, target, n):
    vector.store_part(vector.load_part(at(source, 0), n), at(target, 0), n)


@numba.njit
def load_part_store_whole(source, target, n):
    vector.store_whole(vector.load_part(at(source, 0), n), at(target, 0))


@numba.njit
def load_part_or_store_whole(source, target, n, other):
    vector.store_whole(vector.load_part_or(at(source, 0), n, other), at(target, 0))


@numba.njit
def folded(x):
    a = vector.load_whole(at(x, 0))
    return vector.largest_lane(a), vector.sum_of_lanes(a)


@numba.njit
def arithmetic(x, y, z, out):
    a, b, c = vector.load_whole(at(x, 0)), vector.load_whole(at(y, 0)), vector.load_whole(at(z, 0))
    n = vector.lanes(at(x, 0))
    results = (
        a + b, a - b, a * b, a / b, a + 0.5, 2.0 - b, vector.fma(a, b, c), vector.absolute(a), vector.copysign(a, b),
        vector.at_least(a, 0.25), vector.where_negative(a, b, c),
    )  # fmt: skip
    for i in range(len(results)):
        vector.store_whole(results[i], at(out, i * n))


@numba.njit
def mapped(function, x, n, out):
    vector.store_whole(vector.map_lanes(function, vector.load_whole(at(x, 0)), n), at(out, 0))


@numba.njit
def half_of(a):
    return a * np.float32(0.5)


@numba.njit
def softsign(a):
    """float64 whatever it takes, by another function and a branch."""
    return 2 * half_of(a) / (1.0 + abs(a)) if a < 4 else a - 7


@numba.njit
def sign(a):
    """An integer."""
    return 1 if a > 0 else -1


def test_part_of_a_vector(dtype):
    L = vector.LANES_OF[dtype]
    source = np.arange(1, L + 1, dtype=dtype)
    for n in range(L + 1):
        target = np.full(L, -1, dtype)
        copy_part(source, target, n)
        assert target.tolist() == [*source[:n], *[-1] * (L - n)]
        load_part_store_whole(source, target, n)
        assert target.tolist() == [*source[:n], *[0] * (L - n)]
        for other in (-np.inf, 0.1):
            load_part_or_store_whole(source, target, n, other)
            assert target.tolist() == [*source[:n], *[dtype.type(other)] * (L - n)]


def test_all_numbers_of_a_vector(dtype, rng):
    x = rng.standard_normal(vector.LANES_OF[dtype]).astype(dtype)
    for _ in x:
        x = np.roll(x, 1)
        largest, total = folded(x)
        assert largest == x.max()
        np.testing.assert_allclose(total, x.astype(np.float64).sum(), rtol=0, atol=1e-14)
        spoilt = x.copy()
        spoilt[0] = np.nan
        assert np.isnan(folded(spoilt)[1])
    assert folded(np.full_like(x, -np.inf)) == (-np.inf, -np.inf)
    # Summed in float64: in float32 the ones would be lost.
    x[:] = 1
    x[0] = 2.0**25
    assert folded(x)[1] == 2**25 + len(x) - 1


def test_arithmetic(dtype, rng):
    """Bit for bit NumPy's, but for the fused multiply-add, which rounds once where NumPy rounds twice."""
    L = vector.LANES_OF[dtype]
    x, y, z = rng.standard_normal((3, L)).astype(dtype)
    x[0] = np.nan
    half, two, quarter = (dtype.type(v) for v in (0.5, 2, 0.25))
    expected = [
        x + y, x - y, x * y, x / y, x + half, two - y, x * y + z, np.abs(x), np.copysign(x, y),
        np.maximum(x, quarter), np.where(x < 0, y, z),
    ]  # fmt: skip
    out = np.empty((len(expected), L), dtype)
    arithmetic(x, y, z, out.ravel())
    for i, row in enumerate(expected):
        tolerance = 4 * np.finfo(dtype).eps if i == 6 else 0
        np.testing.assert_allclose(out[i], row, rtol=tolerance, atol=tolerance, err_msg=str(i))


@pytest.mark.parametrize("function", [half_of, softsign, sign])
def test_a_function_of_each_number(function, dtype):
    """Its result takes the vector's dtype, and each lane is its own; those past the first n stay as they are."""
    x = np.linspace(-3, 6, L := vector.LANES_OF[dtype]).astype(dtype)
    x[1] = np.nan
    for n in (L + 3, L, L - 1, 1, 0):
        out = np.zeros_like(x)
        mapped(function, x, n, out)
        np.testing.assert_array_equal(out, np.array([function(a) for a in x[:n]] + x[n:].tolist()).astype(dtype))
