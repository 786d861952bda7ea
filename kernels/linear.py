"""The linear layer and the embedding's gradient.

Buffers are C-contiguous arrays of one dtype; all belong to the caller, and nothing is allocated here. ``W`` is the
width of a panel; ``PN`` and ``PK`` are the panels of N and K columns.

    x (M, K), y (M, N)          rows in and out
    packed (PN W (1 + K))       bias and weight, as `fastrnn.packing.pack_linear` makes it
    xs (PK, M, W)               x in panels, which `forward` saves for `backward`

Threads: number ``me`` of ``parties`` calls that run at once does a share of the rows or, of few rows, of the panels,
and of the weight's gradient by tiles. The bits do not depend on the cut. ``multiply`` is `gemm.multiply_addresses`.
"""

from .barrier import meet, portion
from .compiler import kernel
from .denormals import flush_denormals, restore_mode
from .gemm import Left, Panels, load, pack_rows, panels, product, store
from .tile import ROWS, width
from .vector import at, lanes, smaller

# Rows whose part of the weight's gradient is added at once, so that they stay in the second-level cache meanwhile.
ROWS_AT_ONCE = 256


@kernel
def forward(x, packed, y, xs, save, me, parties, barrier, multiply):
    """``y = x @ w.T + bias``, saving for `backward` if ``save``. y is written, and xs if ``save``."""
    mode, (M, K) = flush_denormals(), x.shape
    N = y.shape[1]
    W = width(at(x, 0))
    PN = panels(N, at(x, 0))
    (r0, r1), p0, p1 = portion(M, me, parties), 0, PN
    if save:
        pack_rows(r1 - r0, K, at(x, r0 * K), Panels(at(xs, r0 * W), M * W, W))
    if parties * ROWS > M:
        r0, r1, (p0, p1) = 0, M, portion(PN, me, parties)
    bias, w = Panels(at(packed, 0), W, 0), Panels(at(packed, PN * W), K * W, W)
    product(multiply, p0, p1, W, N, r1 - r0, bias, Panels(at(y, r0 * N), W, N), Left(at(x, r0 * K), K, 1, 1, 0), w, K)
    meet(barrier, parties)
    restore_mode(mode)


@kernel
def backward(dy, xs, packed, dx, dw, db, me, parties, barrier, multiply):
    """The gradients by x, weight and bias. dy (M, N), xs, packed (`pack_linear_back`) are read.

    dx (M, K), dw (N, K), db (N) are written. Each number of dw and db is summed over the rows in ascending order.
    """
    mode, (M, N) = flush_denormals(), dy.shape
    K = dx.shape[1]
    W, L = width(at(dy, 0)), lanes(at(dy, 0))
    PN, PK = panels(N, at(dy, 0)), panels(K, at(dy, 0))
    nothing = Panels(at(packed, 0), 0, 0)

    r0, r1 = portion(M, me, parties)
    w = Panels(at(packed, W), PN * W * W, W)
    target, left = Panels(at(dx, r0 * K), W, K), Left(at(dy, r0 * N), N, 1, 1, 0)
    product(multiply, 0, PK, W, K, r1 - r0, nothing, target, left, w, N)

    group = 2 * ROWS
    groups = (N + group - 1) // group
    for first in range(0, M, ROWS_AT_ONCE):
        rows = smaller(ROWS_AT_ONCE, M - first)
        source = Panels(at(xs, first * W), M * W, W)
        i0, i1 = portion(PK * groups, me, parties)
        for item in range(i0, i1):
            p, n = item // groups, item % groups * group
            target = Panels(at(dw, n * K), W, K)
            left = Left(at(dy, first * N + n), 1, N, 1, 0)
            start = nothing if first == 0 else target
            product(multiply, p, p + 1, W, K, smaller(group, N - n), start, target, left, source, rows)

    vectors = (N + L - 1) // L
    v0, v1 = portion(vectors, me, parties)
    for v in range(v0, v1):
        n = N - v * L
        total = load(at(dy, v * L), n)
        for r in range(1, M):
            total = total + load(at(dy, r * N + v * L), n)
        store(total, at(db, v * L), n)
    meet(barrier, parties)
    restore_mode(mode)


@kernel
def add_rows(dy, indices, dw):
    """``dw[indices[i]] += dy[i]`` in ascending order of i. dy (M, D), indices int64 (M); dw (V, D) is added to."""
    mode, (M, D) = flush_denormals(), dy.shape
    L = lanes(at(dy, 0))
    for i in range(M):
        for j in range(0, D, L):
            target = at(dw, indices[i] * D + j)
            store(load(target, D - j) + load(at(dy, i * D + j), D - j), target, D - j)
    restore_mode(mode)
