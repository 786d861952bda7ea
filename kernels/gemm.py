"""Matrix products on register tiles: packing, and the loops over panels of packed weights.

Every matrix that a product reads by rows of its right factor, or writes, lies in *panels*: column blocks of the width
of a tile, ``W = VECS * lanes`` numbers. `Panels` says where. Each element of a product is one chain of multiply-adds
over ``k`` in ascending order, whatever the number of rows, so a row gives the same bits alone and among others.
"""

from collections import namedtuple

from .tile import (
    ROWS,
    VECS,
    at,
    lanes,
    part,
    tile_fma,
    tile_load,
    tile_load_part,
    tile_store,
    tile_store_part,
)

# Column j of row i of panel p lies at address + p * panel + i * row + j.
# A row-major matrix is Panels(address, W, row length); one row for all is Panels(address, W, 0).
Panels = namedtuple("Panels", "address panel row")

# Element (i, k) of a left factor, with k = q * K + r, lies at address + i * row + q * block + r * k.
# A row-major matrix has one block; a matrix in panels has a block for each.
Left = namedtuple("Left", "address row k blocks block")


@part
def width(address):
    """Columns of a panel."""
    return VECS * lanes(address)


@part
def panels(columns, address):
    """How many panels hold so many columns."""
    return (columns + width(address) - 1) // width(address)


@part
def _tile_product(rows, n, start, start_row, target, target_row, left, packed, K):
    """target (rows, n) = start + left @ packed, one tile. ``rows`` is a literal."""
    W = width(target)
    t = tile_load(rows, VECS, start, start_row) if n == W else tile_load_part(rows, VECS, start, start_row, n)
    for q in range(left.blocks):
        a = at(left.address, q * left.block)
        p = at(packed, q * K * W)
        for k in range(K):
            t = tile_fma(t, at(a, k * left.k), left.row, at(p, k * W))
    if n == W:
        tile_store(t, target, target_row)
    else:
        tile_store_part(t, target, target_row, n)


@part
def _four_panels(start, target, left, packed, K):
    """One row of four panels: four streams of weights keep the CPU's loads busy where a row waits for its weights."""
    W = width(packed.address)
    s, c, stride = start.panel, target.panel, packed.panel
    t0 = tile_load(1, VECS, start.address, 0)
    t1 = tile_load(1, VECS, at(start.address, s), 0)
    t2 = tile_load(1, VECS, at(start.address, 2 * s), 0)
    t3 = tile_load(1, VECS, at(start.address, 3 * s), 0)
    for q in range(left.blocks):
        for r in range(K):
            a = at(left.address, q * left.block + r * left.k)
            p = at(packed.address, (q * K + r) * W)
            t0 = tile_fma(t0, a, 0, p)
            t1 = tile_fma(t1, a, 0, at(p, stride))
            t2 = tile_fma(t2, a, 0, at(p, 2 * stride))
            t3 = tile_fma(t3, a, 0, at(p, 3 * stride))
    tile_store(t0, target.address, 0)
    tile_store(t1, at(target.address, c), 0)
    tile_store(t2, at(target.address, 2 * c), 0)
    tile_store(t3, at(target.address, 3 * c), 0)


@part(inline=False)
def product(first, last, N, M, start, target, left, packed, K):
    """``target = start + left @ packed`` for the panels ``first`` to ``last`` of a matrix of M rows, N columns.

    start, target: `Panels`, which may be the same; target is written, nothing past column N.
    left: `Left`, M rows of ``left.blocks * K`` numbers.
    packed: `Panels` of as many rows, one after another.
    """
    W = width(packed.address)
    p = first
    while p < last:
        s, c = at(start.address, p * start.panel), at(target.address, p * target.panel)
        weights = at(packed.address, p * packed.panel)
        if M == 1 and p + 4 <= last and (p + 4) * W <= N:
            weights = Panels(weights, packed.panel, W)
            _four_panels(Panels(s, start.panel, 0), Panels(c, target.panel, 0), left, weights, K)
            p += 4
            continue
        n = min(W, N - p * W)
        i = 0
        for tiles in range((M + ROWS - 1) // ROWS, 0, -1):
            # Tiles of nearly the same height: full ones and a thin rest would leave the rest slow.
            rows = (M - i + tiles - 1) // tiles
            si, ci = at(s, i * start.row), at(c, i * target.row)
            a = Left(at(left.address, i * left.row), left.row, left.k, left.blocks, left.block)
            if ROWS >= 6 and rows == 6:
                _tile_product(6, n, si, start.row, ci, target.row, a, weights, K)
            elif ROWS >= 5 and rows == 5:
                _tile_product(5, n, si, start.row, ci, target.row, a, weights, K)
            elif ROWS >= 4 and rows == 4:
                _tile_product(4, n, si, start.row, ci, target.row, a, weights, K)
            elif ROWS >= 3 and rows == 3:
                _tile_product(3, n, si, start.row, ci, target.row, a, weights, K)
            elif rows == 2:
                _tile_product(2, n, si, start.row, ci, target.row, a, weights, K)
            else:
                _tile_product(1, n, si, start.row, ci, target.row, a, weights, K)
            i += rows
        p += 1


@part
def copy_row(source, target, n):
    """target (W) = source (n), and 0 past it."""
    if n == width(target):
        tile_store(tile_load(1, VECS, source, 0), target, 0)
    else:
        tile_store(tile_load_part(1, VECS, source, 0, n), target, 0)


@part(inline=False)
def pack(w, gates, H, K, out):
    """Pack a weight for products ``x @ w.T``.

    w: address of (gates * H, K). out: address of (U, K, gates, L), written: L units of every gate stand together, so
    that a panel holds all gates of its units. ``L = W // gates``, ``U = ceil(H / L)``; units past H are 0.
    """
    L = width(out) // gates
    for i in range((H + L - 1) // L * gates * L):
        u, g, l = i // (gates * L), i // L % gates, i % L
        exists = u * L + l < H
        row = at(w, (g * H + u * L + l if exists else 0) * K)
        target = at(out, (u * K * gates + g) * L + l)
        for k in range(K):
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
