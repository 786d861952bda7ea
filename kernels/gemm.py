"""Matrix products on register tiles: packing, and the loops over panels of packed weights.

Every matrix that a product reads by rows of its right factor, or writes, lies in *panels*: column blocks of the width
of a tile, ``W = VECS * lanes`` numbers. `Panels` says where. Each element of a product is one chain of multiply-adds
over ``k`` in ascending order, whatever the number of rows, so a row gives the same bits alone and among others.
"""

from collections import namedtuple
from functools import lru_cache

import numpy as np
from numba import types

from .compiler import address_of, kernel, part
from .tile import (
    ROW_PANELS,
    ROWS,
    VECS,
    at,
    call,
    lanes,
    load_part,
    load_whole,
    store_part,
    store_whole,
    tile_product,
    transpose,
    width,
)

# Column j of row i of panel p lies at address + p * panel + i * row + j.
# A row-major matrix is Panels(address, W, row length); one row for all is Panels(address, W, 0).
Panels = namedtuple("Panels", "address panel row")

# Element (i, k) of a left factor, with k = q * K + r, lies at address + i * row + q * block + r * k.
# A row-major matrix has one block; a matrix in panels has a block for each.
Left = namedtuple("Left", "address row k blocks block")


@part
def panels(columns, address):
    """How many panels hold so many columns."""
    return (columns + width(address) - 1) // width(address)


@part
def load(address, n):
    """A vector of the first ``n`` numbers at ``address``, which may be more than it holds; 0 past them."""
    return load_whole(address) if n >= lanes(address) else load_part(address, n)


@part
def store(vector, address, n):
    """Write the first ``n`` numbers of a vector; n may be more than it holds."""
    if n >= lanes(address):
        store_whole(vector, address)
    else:
        store_part(vector, address, n)


@part
def product(multiply, first, last, N, M, start, target, left, packed, K):
    """``target = start + left @ packed`` for the panels ``first`` to ``last`` of a matrix of M rows, N columns.

    multiply: `multiply_address` of the dtype.
    start, target: `Panels`, which may be the same; target is written, nothing past column N.
    left: `Left`, M rows of ``left.blocks * K`` numbers.
    packed: `Panels` of as many rows, one after another.
    """
    s = start.address, start.panel, start.row
    c = target.address, target.panel, target.row
    a = left.address, left.row, left.k, left.blocks, left.block
    call(multiply, (first, last, N, M, *s, *c, *a, packed.address, packed.panel, K))


@kernel(no_cpython_wrapper=True)
def _multiply(
    first,
    last,
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
    K,
):
    """The work of `product`, as a C function: compiled once for all kernels, which would each compile it again."""
    W, L = width(packed), lanes(packed)
    p = first
    while p < last:
        s, s_step = at(start, p * s_panel), s_row
        c, c_step = at(target, p * c_panel), c_row
        # One row waits for its weights: with several panels at once, several streams of them are under way.
        several = M == 1 and p + ROW_PANELS <= last and (p + ROW_PANELS) * W <= N
        if several:
            n, vecs, s_step, c_step = ROW_PANELS * W, ROW_PANELS * VECS, s_panel, c_panel
        else:
            n = min(W, N - p * W)
            vecs = VECS if n > 2 * L else 2 if n > L else 1
        i = 0
        for tiles in range((M + ROWS - 1) // ROWS, 0, -1):
            # Tiles of nearly the same height: full ones and a thin rest would leave the rest slow.
            rows = (M - i + tiles - 1) // tiles
            a = Left(at(left, i * a_row), a_row, a_k, blocks, block)
            si, ci = at(s, i * s_step), at(c, i * c_step)
            tile_product(rows, vecs, n, si, s_step, ci, c_step, a, at(packed, p * p_panel), p_panel, K)
            i += rows
        p += ROW_PANELS if several else 1


@lru_cache(None)
def multiply_address(dtype):
    """What `product` calls for arrays of a NumPy dtype: an address, valid in this process."""
    n, number = types.int64, types.CPointer(types.float32 if dtype == np.float32 else types.float64)
    panels = (number, n, n)
    return address_of(_multiply, types.void(n, n, n, n, *panels, *panels, number, n, n, n, n, number, n, n))


@part
def copy_row(source, target, n):
    """target (W) = source (n), and 0 past it."""
    L = lanes(source)
    for j in range(0, width(source), L):
        # Past the end nothing is read: the address only has to be one.
        store_whole(load(at(source, min(j, n)), max(n - j, 0)), at(target, j))


@part(inline=False)
def pack(w, gates, H, K, out):
    """Pack a weight for products ``x @ w.T``.

    w: address of (gates * H, K). out: address of (U, K, gates, L), written: L units of every gate stand together, so
    that a panel holds all gates of its units. ``L = W // gates``, ``U = ceil(H / L)``; units past H are 0.
    """
    L, V = width(out) // gates, lanes(out)
    for i in range((H + L - 1) // L * gates * L):
        u, g, l = i // (gates * L), i // L % gates, i % L
        exists = u * L + l < H
        row = at(w, (g * H + u * L + l if exists else 0) * K)
        target = at(out, (u * K * gates + g) * L + l)
        squares = K // V if u * L + l // V * V + V <= H else 0
        if l % V == 0:
            for k in range(0, squares * V, V):
                transpose(at(row, k), K, at(target, k * gates * L), gates * L)
        for k in range(squares * V, K):
            target[k * gates * L] = row[k] if exists else 0


@part(inline=False)
def pack_transposed(w, gates, H, N, out):
    """Pack a weight for products ``d @ w``, with d in panels as products with `pack`'s leave them.

    w: address of (gates * H, N). out: address of (panels of N, U * gates * L, W), written: rows in the order of
    `pack`'s columns, 0 for units past H and columns past N.
    """
    W = width(out)
    L = W // gates
    U = (H + L - 1) // L
    for p in range(panels(N, out)):
        n = min(W, N - p * W)
        for i in range(U * gates * L):
            u, g, l = i // (gates * L), i // L % gates, i % L
            exists = u * L + l < H
            source = at(w, (g * H + u * L + l) * N + p * W if exists else 0)
            copy_row(source, at(out, (p * U * gates * L + i) * W), n if exists else 0)


@part(inline=False)
def pack_rows(rows, N, source, target):
    """Copy a row-major matrix into panels. source: address of (rows, N). target: `Panels`, written, 0 past N."""
    W = width(source)
    for p in range(panels(N, source)):
        n = min(W, N - p * W)
        for i in range(rows):
            copy_row(at(source, i * N + p * W), at(target.address, p * target.panel + i * target.row), n)
