"""Vectors' loads and stores, the tile's shape, and the barrier."""

import threading
import time

import numba
import numpy as np
import pytest
from fastrnn.kernels import tile
from fastrnn.kernels.barrier import meet
from fastrnn.kernels.tile import at


@numba.njit
def copy_part(source, target, n):
    tile.store_part(tile.load_part(at(source, 0), n), at(target, 0), n)


@numba.njit
def load_part_store_whole(source, target, n):
    tile.store_whole(tile.load_part(at(source, 0), n), at(target, 0))


@numba.njit
def arithmetic(x, y, z, out):
    a, b, c = tile.load_whole(at(x, 0)), tile.load_whole(at(y, 0)), tile.load_whole(at(z, 0))
    n = tile.lanes(at(x, 0))
    results = (
        a + b, a - b, a * b, a / b, a + 0.5, 2.0 - b, tile.fma(a, b, c), tile.absolute(a), tile.copysign(a, b),
        tile.at_least(a, 0.25), tile.where_negative(a, b, c),
    )  # fmt: skip
    for i in range(len(results)):
        tile.store_whole(results[i], at(out, i * n))


@numba.njit
def mapped(function, x, out):
    tile.store_whole(tile.map_lanes(function, tile.load_whole(at(x, 0))), at(out, 0))


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


@numba.njit(nogil=True)
def meet_often(me, parties, rounds, seen, barrier):
    """How often a party was found behind right after the barrier, or ahead of the next one."""
    wrong = 0
    for r in range(rounds):
        seen[16 * me] = r + 1
        meet(barrier, parties)
        for other in range(parties):
            wrong += seen[16 * other] != r + 1
        meet(barrier, parties)
    return wrong


@numba.njit(nogil=True)
def meet_once(barrier, parties):
    meet(barrier, parties)


def run_threads(functions):
    results = [None] * len(functions)

    def run(i):
        results[i] = functions[i]()

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a thread waits for ever"
    return results


def test_a_tile_fits_the_registers():
    """Three quarters hold sums: what is left must do for the factors."""
    assert 4 * tile.ROWS * tile.VECS <= 3 * tile.REGISTERS
    assert tile.LANES_OF[np.dtype(np.float32)] == 2 * tile.LANES_OF[np.dtype(np.float64)] == tile.VECTOR_BYTES // 4


def test_part_of_a_vector(dtype):
    L = tile.LANES_OF[dtype]
    source = np.arange(1, L + 1, dtype=dtype)
    for n in range(L + 1):
        target = np.full(L, -1, dtype)
        copy_part(source, target, n)
        assert target.tolist() == [*source[:n], *[-1] * (L - n)]
        load_part_store_whole(source, target, n)
        assert target.tolist() == [*source[:n], *[0] * (L - n)]


def test_arithmetic(dtype, rng):
    """Bit for bit NumPy's, but for the fused multiply-add, which rounds once where NumPy rounds twice."""
    L = tile.LANES_OF[dtype]
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
    """Its result takes the vector's dtype, and each lane is its own."""
    x = np.linspace(-3, 6, tile.LANES_OF[dtype]).astype(dtype)
    x[1] = np.nan
    out = np.zeros_like(x)
    mapped(function, x, out)
    np.testing.assert_array_equal(out, np.array([function(a) for a in x]).astype(dtype))


@pytest.mark.parametrize("parties", [1, 2, 3, 7])
def test_threads_meet(parties):
    """Nobody leaves before all have come, nor comes a second time before all have left."""
    barrier, seen = np.zeros(16, np.int64), np.zeros(16 * parties, np.int64)
    meet_often(0, 1, 1, seen.copy(), barrier.copy())  # compiled before the threads start
    calls = [lambda me=me: meet_often(me, parties, 100, seen, barrier) for me in range(parties)]
    assert run_threads(calls) == [0] * parties
    assert barrier[1] == 0


def test_a_flag_calls_the_barrier_off():
    barrier = np.zeros(16, np.int64)
    meet_once(barrier, 1)

    def call_off():
        time.sleep(0.05)
        barrier[1] = 1

    run_threads([lambda: meet_once(barrier, 3), lambda: meet_once(barrier, 3), call_off])
    # For good: whoever comes later is not held either.
    run_threads([lambda: meet_once(barrier, 3)])
