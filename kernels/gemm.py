"""Matrix products on register tiles: packing, and the loops over panels of packed weights.

Every matrix that a product reads by rows of its right factor, or writes, lies in *panels*: column blocks of the width
of a tile, ``W = VECS * lanes`` numbers. `Panels` says where. Each element of a product is one chain of multiply-adds
over ``k`` in ascending order, whatever the number of rows, so a row gives the same bits alone and among others.
"""

from collections import namedtuple
from functools import lru_cache

import numpy as np
from numba import types

from .barrier import meet, portion
from .compiler import address_of, kernel, part, specialise
from .tile import ROW_PANELS, ROWS, VECS, row_product, tile_product, tile_product_of_three, width
from .vector import (
    VECTOR_BYTES,
    at,
    call,
    lanes,
    larger,
    load_part,
    load_whole,
    smaller,
    store_part,
    store_whole,
    transpose,
)

# Column j of row i of panel p lies at address + p * panel + i * row + j.
# A row-major matrix is Panels(address, W, row length); one row for all is Panels(address, W, 0).
Panels = namedtuple("Panels", "address panel row")

# Element (i, k) of a left factor, with k = q * K + r, lies at address + i * row + q * block + r * k.
# A row-major matrix has one block; a matrix in panels has a block for each.
Left = namedtuple("Left", "address row k blocks block")

# Some of the gates of a cell: ``count`` of them that lie side by side from vector ``slot`` on. The j-th is number
# (j + rotate) % gates of a weight (gates * H, K).
Window = namedtuple("Window", "slot count rotate")
WHOLE, NOTHING = Window(0, 1, 0), Window(0, 0, 0)

# Bytes of a panel that are read by all rows before those that follow: it and the rows' share stay in the second cache.
LONG = 2**17
# Numbers of a row that `pack` takes at once.
PACKED_AT_ONCE = 256


@part
def panels(columns, address):
    """How many panels hold so many columns."""
    return (columns + width(address) - 1) // width(address)


@part
def load(address, n):
    """A vector of the first ``n`` numbers at ``address``, which may be more than it holds; 0 past them."""
    return load_whole(address) if n >= lanes(address) else load_part(address, n)


@part
def zeros(address):
    """A vector of zeros, of the address's type."""
    return load_part(address, 0)


@part
def store(vector, address, n):
    """Write the first ``n`` numbers of a vector; n may be more than it holds."""
    if n >= lanes(address):
        store_whole(vector, address)
    else:
        store_part(vector, address, n)


@part
def product(multiply, first, last, wide, N, M, start, target, left, packed, K):
    """``target = start + left @ packed`` for the panels ``first`` to ``last`` of a matrix of M rows, N columns.

    multiply: `multiply_addresses` of the dtype.
    wide: columns of a panel, up to ``W``.
    start, target: `Panels`, which may be the same; target is written, nothing past column N.
    left: `Left`, M rows of ``left.blocks * K`` numbers.
    packed: `Panels` of as many rows.
    """
    s = start.address, start.panel, start.row
    c = target.address, target.panel, target.row
    a = left.address, left.row, left.k, left.blocks, left.block
    function = multiply[1] if wide == 3 * lanes(packed.address) else multiply[0]
    call(function, (first, last, wide, N, M, *s, *c, *a, packed.address, packed.panel, packed.row, K))


@part
def _vectors(n, wide, L):
    """The vectors of a tile for n columns of a panel: the fewest that hold them, on which the tile relies, or 3."""
    return 3 if wide == 3 * L else VECS if n > 2 * L else 2 if n > L else 1


@part
def _together(left):
    """How many of so many whole panels to take at once for a single row.

    One row waits for its weights: of several panels, several streams of them are under way.
    """
    return ROW_PANELS if left >= ROW_PANELS else 2 if left >= 2 else 1


@part
def product_of_row(first, last, wide, N, start, target, left, packed, K):
    """As `product`, for a row ``left`` of K numbers at an address, without a call: for what is too short for one."""
    L = lanes(left)
    p = first
    while p < last:
        n = smaller(wide, N - p * wide)
        vecs = _vectors(n, wide, L)
        together = _together(smaller(last, N // wide) - p) if vecs >= 3 else 1
        row_product(
            1, vecs, together, together * wide if together > 1 else n,
            at(start.address, p * start.panel), start.panel, at(target.address, p * target.panel), target.panel,
            Left(left, K, 1, 1, 0), at(packed.address, p * packed.panel), packed.panel, packed.row, K,
        )  # fmt: skip
        p += together


# In the template below a tile of any width or, to compile less where it is not needed, of 3 vectors.
tile = None


def _multiply(
    first,
    last,
    wide,
    N,
    M,
    start,
    s_panel,
    s_row,
    target,
    c_panel,
    c_row,
    left,
    a_row,
    a_k,
    blocks,
    block,
    packed,
    p_panel,
    p_row,
    K,
):
    """The work of `product`, as a C function: compiled once for all kernels, which would each compile it again."""
    L = lanes(packed)
    # Of a long panel that several tiles read, so much at once as stays near the CPU, for all panels; then the next.
    # The chain of each number's multiply-adds is the same.
    most, length = LONG // (wide // L * VECTOR_BYTES), blocks * K
    if M <= ROWS or length <= 2 * most:
        most = length
    several, rows_at_once = (larger(1, most // K), K) if blocks > 1 else (1, most)
    for q in range(0, blocks, several):
        for k in range(0, K, rows_at_once):
            some, count = smaller(several, blocks - q), smaller(rows_at_once, K - k)
            p = first
            while p < last:
                s, s_step = at(start, p * s_panel), s_row
                c, c_step = at(target, p * c_panel), c_row
                if q + k > 0:
                    s, s_step = c, c_step
                n, together = smaller(wide, N - p * wide), 1
                vecs = _vectors(n, wide, L)
                if M == 1 and vecs >= 3:
                    together = _together(smaller(last, N // wide) - p)
                if together > 1:
                    n, s_step, c_step = together * wide, s_panel, c_panel
                i, b = 0, at(packed, p * p_panel + (q * K + k) * p_row)
                for tiles in range((M + ROWS - 1) // ROWS, 0, -1):
                    # Tiles of nearly the same height: full ones and a thin rest would leave the rest slow.
                    rows = M - i if tiles == 1 else (M - i + tiles - 1) // tiles
                    a = Left(at(left, i * a_row + q * block + k * a_k), a_row, a_k, some, block)
                    si, ci = at(s, i * s_step), at(c, i * c_step)
                    tile(rows, vecs, together, n, si, s_step, ci, c_step, a, b, p_panel, p_row, count)
                    i += rows
                p += together


_multiply_any = specialise(_multiply, __name__, "_multiply_any", tile=tile_product)
_multiply_three = specialise(_multiply, __name__, "_multiply_three", tile=tile_product_of_three)


@lru_cache(None)
def multiply_addresses(dtype, three=False):
    """What `product` calls for arrays of a NumPy dtype: two addresses, int64, valid in this process.

    The second one, for panels of three vectors, is 0 unless ``three``.
    """
    n, number = types.int64, types.CPointer(types.float32 if dtype == np.float32 else types.float64)
    panels = (number, n, n)
    signature = types.void(n, n, n, n, n, *panels, *panels, number, n, n, n, n, *panels, n)
    addresses = address_of(_multiply_any, signature), address_of(_multiply_three, signature) if three else 0
    addresses = np.array(addresses)
    addresses.flags.writeable = False
    return addresses


@kernel
def before_a_line(memory):
    """How many numbers of an array come before the first one on a cache line."""
    return -memory.ctypes.data % 64 // memory.itemsize


@part
def copy_row(source, target, n):
    """target (W) = source (n), and 0 past it; n may be less than 0 or more than W."""
    L = lanes(source)
    for j in range(0, width(source), L):
        store_whole(load(at(source, j), n - j), at(target, j))


@kernel
def pack(w, count, rotate, gates, units, out, me, parties, barrier):
    """Pack some gates of a weight for products ``x @ w.T``: ``count`` of them, as a `Window` that is so rotated.

    w: (gates * H, K). out: (panels, K, count, units) numbers, written: so many units of every one of these gates stand
    together, so that a panel holds all of them; units past H are 0. Number ``me`` of ``parties`` calls does a share.
    """
    w_0, packed, H, K = at(w, 0), at(out, 0), w.shape[0] // gates, w.shape[1]
    wide, V = count * units, lanes(packed)
    PH = (H + units - 1) // units
    p0, p1 = portion(PH, me, parties)
    for p in range(p0, p1):
        # So many numbers of some rows, of all gates: rows far apart pass more quickly a stretch at a time.
        for first in range(0, K, PACKED_AT_ONCE):
            last = smaller(first + PACKED_AT_ONCE, K)
            for i in range(0, wide, V):
                g, unit = (i // units + rotate) % gates, p * units + i % units
                source, target = at(w_0, (g * H + unit) * K), at(packed, p * K * wide + i)
                squares = last - (last - first) % V if unit + V <= H else first
                for k in range(first, squares, V):
                    transpose(at(source, k), K, at(target, k * wide), wide)
                for k in range(squares, last):
                    for l in range(V):
                        target[k * wide + l] = source[l * K + k] if unit + l < H else 0
    meet(barrier, parties)


@kernel
def pack_transposed(w, count, rotate, gates, units, out, me, parties, barrier):
    """Pack some gates of a weight for products ``d @ w``, with d in panels as products with `pack`'s leave them.

    w: (gates * H, N). out: (panels of N, panels of H, count, units, W) numbers, written: rows in the order of `pack`'s
    columns, 0 for units past H and columns past N. Number ``me`` of ``parties`` calls does a share.
    """
    w_0, packed, H, N = at(w, 0), at(out, 0), w.shape[0] // gates, w.shape[1]
    W, wide = width(packed), count * units
    rows = (H + units - 1) // units * wide
    i0, i1 = portion(rows, me, parties)
    for i in range(i0, i1):
        g, unit = (i // units % count + rotate) % gates, i // wide * units + i % units
        source = at(w_0, (g * H + unit) * N)
        for p in range(panels(N, packed)):
            copy_row(at(source, p * W), at(packed, (p * rows + i) * W), N - p * W if unit < H else 0)
    meet(barrier, parties)


@part(inline=False)
def pack_rows(rows, N, source, target):
    """Copy a row-major matrix into panels. source: address of (rows, N). target: `Panels`, written, 0 past N."""
    W = width(source)
    for i in range(rows):
        for p in range(panels(N, source)):
            copy_row(at(source, i * N + p * W), at(target.address, p * target.panel + i * target.row), N - p * W)
