"""Packing, and products on register tiles, against NumPy: values, memory left alone, and bits."""

import numba
import numpy as np
import pytest
from fastrnn.kernels import gemm
from fastrnn.kernels.gemm import NOTHING, WHOLE, Left, Panels, Window, multiply_addresses
from fastrnn.kernels.tile import ROWS, VECS
from fastrnn.kernels.vector import LANES_OF, VECTOR_BYTES, at
from oracle import assert_close, assert_same_bits


@numba.njit
def call_product(multiply, first, last, wide, N, M, start, target, left, packed, K):
    """`gemm.product`, which Python cannot call. A factor is memory, where it begins there, and strides."""
    gemm.product(
        multiply, first, last, wide, N, M,
        Panels(at(start[0], start[1]), start[2], start[3]), Panels(at(target[0], target[1]), target[2], target[3]),
        Left(at(left[0], left[1]), left[2], left[3], left[4], left[5]),
        Panels(at(packed[0], packed[1]), packed[2], packed[3]), K,
    )  # fmt: skip


@numba.njit
def call_pack_rows(rows, N, source, target, first, panel, row):
    gemm.pack_rows(rows, N, at(source, 0), Panels(at(target, first), panel, row))


def width(dtype):
    return VECS * LANES_OF[np.dtype(dtype)]


def to_panels(matrix, wide=None, fill=0):
    """(panels, rows, wide): column blocks, as wide as a tile if not said; ``fill`` stands past the last column."""
    rows, columns = matrix.shape
    wide = wide or width(matrix.dtype)
    panels = -(-columns // wide)
    whole = np.full((rows, panels * wide), fill, matrix.dtype)
    whole[:, :columns] = matrix
    return np.ascontiguousarray(whole.reshape(rows, panels, wide).swapaxes(0, 1))


def laid_out(matrix, order, wide=None, fill=np.nan):
    """A matrix in panels, as `call_product` takes it. NaN is what may be read, and must not be seen."""
    panels = to_panels(matrix, wide, fill)
    _, rows, wide = panels.shape
    if order == "gaps":
        memory = np.full((len(panels), rows, wide + 5), np.nan, matrix.dtype)
        memory[:, :, :wide] = panels
        return np.append(memory.ravel(), np.full(wide, np.nan, matrix.dtype)), 0, rows * (wide + 5), wide + 5
    if order == "backwards":
        return panels[:, ::-1].ravel(), (rows - 1) * wide, rows * wide, -wide
    return panels.ravel(), 0, rows * wide, wide


def by_rows(matrix):
    """A left factor in row-major order."""
    return np.ascontiguousarray(matrix).ravel(), 0, matrix.shape[1], 1, 1, 0


def product(start, left, right, first=0, last=None, vecs=VECS, order="tight"):
    """``start + left @ right`` in a row-major target, whose surroundings are checked to be untouched."""
    (M, K), N = left.shape, right.shape[1]
    wide = vecs * LANES_OF[left.dtype]
    packed = laid_out(right, order, wide)
    last = -(-N // wide) if last is None else last
    memory = np.full((M + 2, N + 7), 123, left.dtype)
    inside = np.zeros(memory.shape, bool)
    inside[1 : M + 1, first * wide : min(N, last * wide)] = True
    start_row = N if start.ndim == 2 else 0
    call_product(
        multiply_addresses(left.dtype, True), first, last, wide, N, M,
        (np.ascontiguousarray(start).ravel(), 0, wide, start_row), (memory.ravel(), N + 7, wide, N + 7),
        by_rows(left), packed, K,
    )  # fmt: skip
    assert (memory[~inside] == 123).all()
    return memory[1 : M + 1, :N].copy()


def matrices(M, N, K, dtype, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in ((M, N), (M, K), (K, N)))


def exact(start, left, right):
    return start.astype(np.float64) + left.astype(np.float64) @ right.astype(np.float64)


def row_by_row(start, left, right, vecs=VECS):
    rows = range(len(left))
    return np.concatenate([product(start[i : i + 1], left[i : i + 1], right, vecs=vecs) for i in rows])


def rows_of_a_long_panel(vecs):
    """The most that are not read piece by piece."""
    return 2 * (gemm.LONG // (vecs * VECTOR_BYTES))


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


@pytest.mark.parametrize("vecs", range(1, VECS + 1))
@pytest.mark.parametrize("M", [1, 2, ROWS + 1])
@pytest.mark.parametrize("panels", [1, 4, 5, 8])
@pytest.mark.parametrize("short", [0, 1])
def test_panels_of_any_width(vecs, M, panels, short, dtype):
    """Whole ones and one column less. One row alone is multiplied by several panels at once, where there are enough."""
    start, left, right = matrices(M, panels * vecs * LANES_OF[dtype] - short, 3, dtype)
    got = product(start, left, right, vecs=vecs)
    assert_close(got, exact(start, left, right))
    assert_same_bits(got, product(start, left, right))


@pytest.mark.parametrize("order", ["gaps", "backwards"])
@pytest.mark.parametrize("vecs", [2, VECS])
@pytest.mark.parametrize("M", [1, 7])
@pytest.mark.parametrize("N", [3, 130, 512])
def test_rows_of_the_right_factor_anywhere(order, vecs, M, N, dtype):
    start, left, right = matrices(M, N, 9, dtype)
    assert_same_bits(product(start, left, right, vecs=vecs, order=order), product(start, left, right))


@pytest.mark.parametrize("M", [1, 7])
@pytest.mark.parametrize("vecs", [1, 3, VECS])
def test_only_the_asked_panels_are_written(M, vecs, dtype):
    wide = vecs * LANES_OF[dtype]
    start, left, right = matrices(M, 5 * wide + 3, 4, dtype)
    for first, last in [(0, 1), (1, 3), (1, 5), (5, 6), (2, 2)]:
        columns = slice(first * wide, last * wide)
        got = product(start, left, right, first, last, vecs)
        if first < last:
            assert_close(got[:, columns], exact(start, left, right)[:, columns])


@pytest.mark.parametrize("M", [1, 5, 20])
def test_target_may_be_its_own_start(M, dtype):
    start, left, right = matrices(M, 70, 6, dtype)
    W, target = width(dtype), start.copy()
    mine = target.ravel(), 0, W, 70
    packed = laid_out(right, "tight")
    call_product(multiply_addresses(dtype, True), 0, -(-70 // W), W, 70, M, mine, mine, by_rows(left), packed, 6)
    assert_same_bits(target, product(start, left, right))


@pytest.mark.parametrize("M", [1, 5, 20])
@pytest.mark.parametrize("order", ["tight", "gaps", "backwards"])
@pytest.mark.parametrize("used", [1, VECS])
@pytest.mark.parametrize("long", [False, True])
def test_all_factors_in_panels(M, order, used, long, dtype):
    """As the backward pass multiplies gates' gradients: of each panel a few vectors, the last row first in memory."""
    W, wide = width(dtype), used * LANES_OF[dtype]
    blocks = rows_of_a_long_panel(VECS) // wide + 2 if long else 3
    start, left, right = matrices(M, 2 * W, blocks * wide, dtype)
    a = np.full((blocks, M, W), np.nan, dtype)
    a[:, :, :wide] = to_panels(left, wide)
    a, a_first, a_panel, a_row = laid_out(a.swapaxes(0, 1).reshape(M, blocks * W), order)
    starts, targets = laid_out(start, order), laid_out(np.full_like(start, 123), order)
    # The right factor's rows are those of all three blocks, one after the other.
    packed = laid_out(right, order)
    call_product(
        multiply_addresses(dtype, True),
        0,
        2,
        W,
        2 * W,
        M,
        starts,
        targets,
        (a, a_first, a_row, 1, blocks, a_panel),
        packed,
        wide,
    )
    wanted = laid_out(row_by_row(start, left, right), order)[0]
    assert_same_bits(targets[0][~np.isnan(wanted)], wanted[~np.isnan(wanted)])
    assert np.isnan(targets[0][np.isnan(wanted)]).all()


@pytest.mark.parametrize("M", [ROWS, ROWS + 1, 20])
@pytest.mark.parametrize("vecs", [1, 3, VECS])
@pytest.mark.parametrize("more", [0, 1, 37])
def test_long_panels_give_the_same_bits(M, vecs, more, dtype):
    """Several tiles read them piece by piece, and a single row as a whole."""
    start, left, right = matrices(M, 2 * vecs * LANES_OF[dtype] + 3, rows_of_a_long_panel(vecs) + more, dtype)
    whole = product(start, left, right, vecs=vecs)
    assert_same_bits(whole, row_by_row(start, left, right, vecs))
    assert_close(whole, exact(start, left, right))
    assert_same_bits(product(start[0], left, right, vecs=vecs)[0], whole[0])


@pytest.mark.parametrize("M", [1, 5, 20])
@pytest.mark.parametrize("order", ["tight", "backwards"])
def test_left_factor_transposed(M, order, dtype):
    """As the backward pass makes weights' gradients: rows of the left factor are columns in memory."""
    start, left, right = matrices(M, 37, 9, dtype)
    W, target = width(dtype), np.empty((M, 37), dtype)
    across = np.ascontiguousarray(left.T if order == "tight" else left.T[::-1]).ravel()
    a = (across, 0, 1, M, 1, 0) if order == "tight" else (across, 8 * M, 1, -M, 1, 0)
    starts, targets = (start.ravel(), 0, W, 37), (target.ravel(), 0, W, 37)
    packed = laid_out(right, order)
    call_product(multiply_addresses(dtype, True), 0, -(-37 // W), W, 37, M, starts, targets, a, packed, 9)
    assert_same_bits(target, product(start, left, right))


@pytest.mark.parametrize("vecs", [1, VECS])
@pytest.mark.parametrize("N", [5, 64, 300])
def test_a_row_has_the_same_bits_alone_and_among_others(N, vecs, dtype):
    start, left, right = matrices(29, N, 41, dtype)
    whole = product(start, left, right, vecs=vecs)
    for M in range(1, 29):
        part = product(start[29 - M :], left[29 - M :], right, vecs=vecs)
        assert_same_bits(part, whole[29 - M :], M)


# What cells take from their weights: gates of a layer, and of those the window's, in its order.
WINDOWS = [(4, Window(0, 4, 0)), (1, WHOLE), (3, Window(1, 3, 0)), (3, Window(0, 3, 2)), (3, Window(1, 2, 0))]
WINDOWS += [(3, Window(0, 1, 2)), (3, NOTHING)]
windows = pytest.mark.parametrize(("gates", "window"), WINDOWS, ids=str)


def gates_in_order(w, window, units):
    """(panels, count, units, K) of w (gates, H, K): the window's gates of so many units, 0 past the last unit."""
    gates, H, K = w.shape
    panels = -(-H // units)
    rows = np.zeros((window.count, panels * units, K), w.dtype)
    for j in range(window.count):
        rows[j, :H] = w[(j + window.rotate) % gates]
    return rows.reshape(window.count, panels, units, K).swapaxes(0, 1)


def in_turn(kernel, parties, *arguments):
    """Parties one after another, which find that all have come to the barrier."""
    for me in range(parties):
        kernel(*arguments, me, parties, np.array([0, 1]))


@windows
@pytest.mark.parametrize("parties", [1, 3])
@pytest.mark.parametrize("vecs", [1, 3])
@pytest.mark.parametrize("H", [1, 5, 16, 17, 50])
@pytest.mark.parametrize("K", [1, 6, 35, 300])
def test_pack(gates, window, vecs, H, K, parties, dtype):
    units = vecs * LANES_OF[dtype]
    w = np.random.default_rng(0).standard_normal((gates, H, K)).astype(dtype)
    expected = gates_in_order(w, window, units).transpose(0, 3, 1, 2)
    out = np.full(expected.size + 8, np.nan, dtype)
    in_turn(gemm.pack, parties, w.reshape(-1, K), window.count, window.rotate, gates, units, out)
    assert_same_bits(out[:-8], np.ascontiguousarray(expected).ravel())
    assert np.isnan(out[-8:]).all()


@windows
@pytest.mark.parametrize("parties", [1, 3])
@pytest.mark.parametrize("vecs", [1, VECS])
@pytest.mark.parametrize("H", [1, 5, 16, 17])
@pytest.mark.parametrize("N", [1, 64, 67])
def test_pack_transposed(gates, window, vecs, H, N, parties, dtype):
    units = vecs * LANES_OF[dtype]
    w = np.random.default_rng(0).standard_normal((gates, H, N)).astype(dtype)
    expected = to_panels(gates_in_order(w, window, units).reshape(-1, N))
    out = np.full(expected.size + 8, np.nan, dtype)
    in_turn(gemm.pack_transposed, parties, w.reshape(-1, N), window.count, window.rotate, gates, units, out)
    assert_same_bits(out[:-8], expected.ravel())
    assert np.isnan(out[-8:]).all()


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("N", [1, 15, 64, 67])
def test_pack_rows(rows, N, backwards, dtype):
    source = np.random.default_rng(0).standard_normal((rows, N)).astype(dtype)
    expected = to_panels(source[::-1] if backwards else source)
    out = np.full(expected.size + 8, np.nan, dtype)
    W = width(dtype)
    first, row = ((rows - 1) * W, -W) if backwards else (0, W)
    call_pack_rows(rows, N, source.ravel(), out, first, rows * W, row)
    assert_same_bits(out[:-8], expected.ravel())
    assert np.isnan(out[-8:]).all()
