"""Packing, and products on register tiles, against NumPy: values, memory left alone, and bits."""

import numba
import numpy as np
import pytest
from fastrnn.kernels import gemm
from fastrnn.kernels.gemm import Left, Panels, multiply_address
from fastrnn.kernels.tile import LANES_OF, ROWS, VECS, at
from oracle import assert_close, assert_same_bits


@numba.njit
def call_product(multiply, first, last, N, M, start, s, target, c, left, a, packed, p, K):
    """`gemm.product`, which Python cannot call. Each array is followed by its strides, as `Panels` and `Left` name."""
    gemm.product(
        multiply, first, last, N, M,
        Panels(at(start, 0), s[0], s[1]), Panels(at(target, 0), c[0], c[1]),
        Left(at(left, 0), a[0], a[1], a[2], a[3]), Panels(at(packed, 0), p[0], p[1]), K,
    )  # fmt: skip


@numba.njit
def call_pack(w, gates, H, K, out):
    gemm.pack(at(w, 0), gates, H, K, at(out, 0))


@numba.njit
def call_pack_transposed(w, gates, H, N, out):
    gemm.pack_transposed(at(w, 0), gates, H, N, at(out, 0))


@numba.njit
def call_pack_rows(rows, N, source, target, panel, row):
    gemm.pack_rows(rows, N, at(source, 0), Panels(at(target, 0), panel, row))


def to_panels(matrix, fill=0):
    """(panels, rows, W): column blocks of a tile's width; ``fill`` stands past the last column."""
    rows, columns = matrix.shape
    W = VECS * LANES_OF[matrix.dtype]
    wide = np.full((rows, -(-columns // W) * W), fill, matrix.dtype)
    wide[:, :columns] = matrix
    return np.ascontiguousarray(wide.reshape(rows, -1, W).swapaxes(0, 1))


def product(start, left, right, first=0, last=None):
    """``start + left @ right`` in a row-major target, whose surroundings are checked to be untouched."""
    (M, K), N = left.shape, right.shape[1]
    W = VECS * LANES_OF[left.dtype]
    # NaN past the last column: it may be read, and must not be seen, neither in the target nor around it.
    packed = to_panels(right, fill=np.nan)
    last = len(packed) if last is None else last
    memory = np.full((M + 2, N + 7), 123, left.dtype)
    target, inside = memory[1:], np.zeros(memory.shape, bool)
    inside[1 : M + 1, first * W : min(N, last * W)] = True
    start = np.broadcast_to(start, (M, N)) if start.ndim == 2 else start
    start_row = N if start.ndim == 2 else 0
    start, left = np.ascontiguousarray(start), np.ascontiguousarray(left)
    call_product(
        multiply_address(left.dtype),
        first, last, N, M, start.ravel(), (W, start_row), target, (W, N + 7), left.ravel(), (K, 1, 1, 0),
        packed.ravel(), (K * W, W), K,
    )  # fmt: skip
    assert (memory[~inside] == 123).all()
    return target[:M, :N]


def matrices(M, N, K, dtype, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in ((M, N), (M, K), (K, N)))


def exact(start, left, right):
    return start.astype(np.float64) + left.astype(np.float64) @ right.astype(np.float64)


@pytest.mark.parametrize("M", [1, 2, ROWS, ROWS + 1, 13, 49])
@pytest.mark.parametrize("N", [1, 9, 17, 47, 64, 65, 259])
@pytest.mark.parametrize("K", [1, 3, 33])
def test_product(M, N, K, dtype):
    start, left, right = matrices(M, N, K, dtype)
    assert_close(product(start, left, right), exact(start, left, right))


@pytest.mark.parametrize("N", [17, 130, 515])
def test_one_start_row_for_all(N, dtype):
    start, left, right = matrices(11, N, 5, dtype)
    assert_close(product(start[0], left, right), exact(start[0], left, right))


@pytest.mark.parametrize("M", [1, 2])
@pytest.mark.parametrize("panels", [1, 4, 5, 8])
@pytest.mark.parametrize("short", [0, 1])
def test_whole_panels_and_one_column_less(M, panels, short, dtype):
    """One row alone is multiplied by four panels at once, where there are four."""
    start, left, right = matrices(M, panels * VECS * LANES_OF[dtype] - short, 3, dtype)
    assert_close(product(start, left, right), exact(start, left, right))


@pytest.mark.parametrize("M", [1, 7])
def test_only_the_asked_panels_are_written(M, dtype):
    start, left, right = matrices(M, 5 * VECS * LANES_OF[dtype] + 3, 4, dtype)
    W = VECS * LANES_OF[dtype]
    for first, last in [(0, 1), (1, 3), (1, 5), (5, 6), (2, 2)]:
        columns = slice(first * W, last * W)
        if first < last:
            got = product(start, left, right, first, last)
            assert_close(got[:, columns], exact(start, left, right)[:, columns])


@pytest.mark.parametrize("M", [1, 5, 20])
def test_target_may_be_its_own_start(M, dtype):
    start, left, right = matrices(M, 70, 6, dtype)
    W, packed, target = VECS * LANES_OF[dtype], to_panels(right), start.copy()
    strides = (W, 70)
    call_product(
        multiply_address(left.dtype),
        0, len(packed), 70, M, target.ravel(), strides, target.ravel(), strides, left.ravel(), (6, 1, 1, 0),
        packed.ravel(), (6 * W, W), 6,
    )  # fmt: skip
    assert_same_bits(target, np.ascontiguousarray(product(start, left, right)))


@pytest.mark.parametrize("M", [1, 5, 20])
def test_left_factor_in_panels_and_target_in_panels(M, dtype):
    """As the backward pass multiplies gates' gradients, which lie in panels, all of whose columns count."""
    W = VECS * LANES_OF[dtype]
    start, left, right = matrices(M, 2 * W, 3 * W, dtype)
    a, p, target = to_panels(left), to_panels(right), np.full((2, M, W), np.nan, dtype)
    call_product(
        multiply_address(left.dtype),
        0, 2, 2 * W, M, to_panels(start).ravel(), (M * W, W), target.ravel(), (M * W, W),
        a.ravel(), (W, 1, 3, M * W), p.ravel(), (3 * W * W, W), W,
    )  # fmt: skip
    expected = product(start, left, right)
    assert_same_bits(target.swapaxes(0, 1).reshape(M, 2 * W), np.ascontiguousarray(expected))


@pytest.mark.parametrize("M", [1, 5, 20])
def test_left_factor_transposed(M, dtype):
    """As the backward pass makes weights' gradients: rows of the left factor are columns in memory."""
    start, left, right = matrices(M, 37, 9, dtype)
    W, packed, target = VECS * LANES_OF[dtype], to_panels(right), np.empty((M, 37), dtype)
    call_product(
        multiply_address(left.dtype),
        0, len(packed), 37, M, start.ravel(), (W, 37), target.ravel(), (W, 37),
        np.ascontiguousarray(left.T).ravel(), (1, M, 1, 0), packed.ravel(), (9 * W, W), 9,
    )  # fmt: skip
    assert_same_bits(target, np.ascontiguousarray(product(start, left, right)))


@pytest.mark.parametrize("N", [5, 64, 300])
def test_a_row_has_the_same_bits_alone_and_among_others(N, dtype):
    start, left, right = matrices(29, N, 41, dtype)
    whole = product(start, left, right)
    for M in range(1, 29):
        part = product(start[29 - M :], left[29 - M :], right)
        assert_same_bits(np.ascontiguousarray(part), np.ascontiguousarray(whole[29 - M :]), M)


@pytest.mark.parametrize("H", [1, 5, 16, 17])
@pytest.mark.parametrize("K", [1, 6])
def test_pack(H, K, dtype):
    L = LANES_OF[dtype]
    U = -(-H // L)
    w = np.random.default_rng(0).standard_normal((4, H, K)).astype(dtype)
    expected = np.zeros((4, U * L, K), dtype)
    expected[:, :H] = w
    expected = expected.reshape(4, U, L, K).transpose(1, 3, 0, 2)
    out = np.full(expected.size + 8, np.nan, dtype)
    call_pack(w.ravel(), 4, H, K, out)
    assert_same_bits(out[:-8], np.ascontiguousarray(expected).ravel())
    assert np.isnan(out[-8:]).all()


@pytest.mark.parametrize("H", [1, 5, 16, 17])
@pytest.mark.parametrize("N", [1, 64, 67])
def test_pack_transposed(H, N, dtype):
    L = LANES_OF[dtype]
    U = -(-H // L)
    w = np.random.default_rng(0).standard_normal((4, H, N)).astype(dtype)
    rows = np.zeros((4, U * L, N), dtype)
    rows[:, :H] = w
    rows = rows.reshape(4, U, L, N).swapaxes(0, 1).reshape(U * 4 * L, N)
    expected = to_panels(rows)
    out = np.full(expected.size + 8, np.nan, dtype)
    call_pack_transposed(w.ravel(), 4, H, N, out)
    assert_same_bits(out[:-8], expected.ravel())
    assert np.isnan(out[-8:]).all()


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("N", [1, 15, 64, 67])
def test_pack_rows(rows, N, dtype):
    source = np.random.default_rng(0).standard_normal((rows, N)).astype(dtype)
    expected = to_panels(source)
    out = np.full(expected.size + 8, np.nan, dtype)
    W = expected.shape[2]
    call_pack_rows(rows, N, source.ravel(), out, rows * W, W)
    assert_same_bits(out[:-8], expected.ravel())
    assert np.isnan(out[-8:]).all()
