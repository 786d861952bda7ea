"""The LSTM: its gate math, a forward and a backward pass over a sequence, and one step.

    i, f, o = sigmoid(...),  g = tanh(...)      each of W_i* x + b_i* + W_h* h' + b_h*
    c = f * c' + i * g
    h = o * tanh(c)

Buffers are C-contiguous arrays of one dtype; all belong to the caller, and nothing is allocated here. ``L`` is the
number of units in a vector, ``U = ceil(H / L)``, ``W = 4 L`` the width of a panel, which holds the gates i, f, g, o
of L units side by side; ``PI`` and ``PH`` are the panels of I and H columns.

    x (T, B, I), y (T, B, H)      the sequence in and out, time first
    h_0, c_0, h_n, c_n (B, H)     states
    packed (U W (1 + I + H))      bias, W_ih, W_hh, as `pack_forward` makes it
    buffer                        workspace, or what `forward` saves for `backward`: the four parts below (`layout`)
      gates (U T B W)             chunk after chunk of time steps, each in panels (U, chunk B, W); or
                                  only one chunk of them, of a single sequence two
      c (T + 1, U, B, L)          cell states, the first one before the sequence; or only the running one
      xs (PI, T B, W)             x in panels; or nothing
      hs (PH, (T + 1) B, W)       h in panels, the first one before the sequence; or nothing

The input's share of the gates needs no recurrence: it is computed for a chunk of time steps at once, in tall tiles.

Threads. ``share = (b0, b1, u0, u1, me, parties)`` is what a call does: rows b0 to b1 of the batch and units u0 L to
u1 L, as number ``me`` of ``parties`` calls that run at once and meet at ``barrier`` (`barrier.meet`). Shares cut either
the batch or the units (at multiples of W), not both. The bits do not depend on the cut.

``multiply`` is `gemm.multiply_address` of the dtype.
"""

from .activations import sigmoid, tanh
from .barrier import meet
from .compiler import kernel, part
from .gemm import Left, Panels, load, pack, pack_rows, pack_transposed, panels, product, store
from .tile import RIDER_ROWS, ROW_PANELS, VECS, at, lanes, row_and_tile_product, width

GATES = 4


@part
def cell(a_i, a_f, a_g, a_o, c):
    """One step from the gates' sums and the old cell state: (i, f, g, o, new c, new h)."""
    i, f, g, o = sigmoid(a_i), sigmoid(a_f), tanh(a_g), sigmoid(a_o)
    c = f * c + i * g
    h = o * tanh(c)
    return i, f, g, o, c, h


@part
def cell_backward(i, f, g, o, c_before, c, dh, dc):
    """The gradients by the gates' sums and by the old cell state: (da_i, da_f, da_g, da_o, dc_before)."""
    tanh_c = tanh(c)
    dc = dc + dh * o * (1.0 - tanh_c * tanh_c)
    da_i = dc * g * i * (1.0 - i)
    da_f = dc * c_before * f * (1.0 - f)
    da_g = dc * i * (1.0 - g * g)
    da_o = dh * tanh_c * o * (1.0 - o)
    return da_i, da_f, da_g, da_o, dc * f


@part
def advance(a, c, c_next, h, n, save):
    """One step of n units (a vector of them at most) of one sequence, whose gates' sums lie at ``a``.

    c is read; c_next, which may be c, and h are written, n numbers each; the gates replace their sums if ``save``.
    """
    L = lanes(a)
    i, f, g, o, c_t, h_t = cell(load(a, L), load(at(a, L), L), load(at(a, 2 * L), L), load(at(a, 3 * L), L), load(c, n))
    if save:
        store(i, a, L)
        store(f, at(a, L), L)
        store(g, at(a, 2 * L), L)
        store(o, at(a, 3 * L), L)
    store(c_t, c_next, n)
    store(h_t, h, n)
    return h_t


@kernel
def pack_forward(w_ih, w_hh, b_ih, b_hh, out):
    """Pack the weights for `forward` and `step`. w_ih: (4 H, I), w_hh: (4 H, H), biases: (4 H); out is written."""
    H, I = w_hh.shape[1], w_ih.shape[1]
    W = width(at(out, 0))
    L = W // GATES
    U = (H + L - 1) // L
    for i in range(U * W):
        u, g, l = i // W, i // L % GATES, i % L
        j = u * L + l
        out[i] = b_ih[g * H + j] + b_hh[g * H + j] if j < H else 0
    pack(at(w_ih, 0), GATES, H, I, at(out, U * W))
    pack(at(w_hh, 0), GATES, H, H, at(out, U * W * (1 + I)))


@kernel
def pack_backward(w_ih, w_hh, out):
    """Pack the weights for `backward`. out (W + U W W (PH + PI)), written: a row of zeros, W_hh, W_ih."""
    H, I = w_hh.shape[1], w_ih.shape[1]
    W = width(at(out, 0))
    U = (H + W // GATES - 1) // (W // GATES)
    for j in range(W):
        out[j] = 0
    pack_transposed(at(w_hh, 0), GATES, H, H, at(out, W))
    pack_transposed(at(w_ih, 0), GATES, H, I, at(out, W + U * W * W * panels(H, at(out, 0))))


@part
def layout(T, B, I, H, L, chunk, save):
    """Where gates, c, xs and hs begin in the buffer, and its size."""
    W, U = VECS * L, (H + L - 1) // L
    c = U * (T if save else chunk if B > 1 else 2 * chunk) * B * W
    xs = c + (T + 1 if save else 1) * U * B * L
    hs = xs + (-(-I // W) * T * B * W if save else 0)
    return 0, c, xs, hs, hs + (-(-H // W) * (T + 1) * B * W if save else 0)


@kernel
def forward(x, h_0, c_0, packed, y, c_n, buffer, save, chunk, share, barrier, multiply):
    """``y, c_n``: the LSTM over a sequence, saving for `backward` if ``save``. h_n is the last step of y.

    y, c_n and buffer (`layout`) are written.
    """
    T, B, I = x.shape
    H = h_0.shape[1]
    b0, b1, u0, u1, me, parties = share
    W, L = width(at(x, 0)), lanes(at(x, 0))
    U = (H + L - 1) // L
    bias = Panels(at(packed, 0), W, 0)
    w_ih, w_hh = Panels(at(packed, U * W), I * W, W), Panels(at(packed, U * W * (1 + I)), H * W, W)
    at_gates, at_c, at_xs, at_hs, _ = layout(T, B, I, H, L, chunk, save)
    gates, c, xs, hs = at(buffer, at_gates), at(buffer, at_c), at(buffer, at_xs), at(buffer, at_hs)
    c_step = U * B * L if save else 0

    if save:
        r0, r1 = me * T * B // parties, (me + 1) * T * B // parties
        pack_rows(r1 - r0, I, at(x, r0 * I), Panels(at(xs, r0 * W), T * B * W, W))
        if me == 0:
            pack_rows(B, H, at(h_0, 0), Panels(hs, (T + 1) * B * W, W))
    for u in range(u0, u1):
        for b in range(b0, b1):
            store(load(at(c_0, b * H + u * L), H - u * L), at(c, (u * B + b) * L), L)

    ahead = 0
    for first in range(0, T, chunk):
        n = min(chunk, T - first)
        half = first // chunk % 2 * chunk if B == 1 else 0
        chunk_gates = at(gates, (first if save else half) * B * U * W)
        slab = n * B * W
        # All rows of the chunk at once, or step by step if other parties have some of the batch.
        steps, rows = (1, n * B - ahead) if b1 - b0 == B else (n, b1 - b0)
        for u in range(u0, u1):
            for s in range(steps):
                target = Panels(at(chunk_gates, (s * B + b0 + ahead) * W), slab, W)
                left = Left(at(x, ((first + s) * B + b0 + ahead) * I), I, 1, 1, 0)
                product(multiply, u, u + 1, U * W, rows, bias, target, left, w_ih, I)

        # A single sequence waits for W_hh to be read. Meanwhile, tile by tile, it does part of the next chunk's input.
        rider, riders, next_slab = 0, 0, 0
        next_gates, next_x = chunk_gates, at(x, 0)
        tiles = (u1 - u0) * VECS
        if B == 1 and first + n < T:
            next_n = min(chunk, T - first - n)
            next_gates = at(gates, (first + n if save else chunk - half) * U * W)
            next_x, next_slab = at(x, (first + n) * I), next_n * W
            blocks = min(next_n // RIDER_ROWS, n * ((u1 - u0) // ROW_PANELS) // max(1, tiles))
            riders, ahead = blocks * tiles, blocks * RIDER_ROWS

        for s in range(n):
            t = first + s
            h = at(h_0, b0 * H) if t == 0 else at(y, ((t - 1) * B + b0) * H)
            g_t = at(chunk_gates, s * B * W)
            target = Panels(at(g_t, b0 * W), slab, W)
            # Every other step goes backwards: the weights read last are still in the nearest cache, and read first.
            stride = ROW_PANELS if b1 - b0 == 1 else 1
            for v in range(u0, u1, stride):
                lo = v if t % 2 == 0 else max(u0, u1 - stride - (v - u0))
                hi = min(v + stride, u1) if t % 2 == 0 else u1 - (v - u0)
                if rider < riders and hi - lo == ROW_PANELS:
                    j, u, r = rider % VECS * L, u0 + rider // VECS % (u1 - u0), rider // tiles * RIDER_ROWS
                    row_and_tile_product(
                        at(g_t, lo * slab), slab, h, at(w_hh.address, lo * w_hh.panel), w_hh.panel, H,
                        at(bias.address, u * W + j), at(next_gates, u * next_slab + r * W + j),
                        at(next_x, r * I), I, at(w_ih.address, u * w_ih.panel + j), I,
                    )  # fmt: skip
                    rider += 1
                else:
                    product(multiply, lo, hi, U * W, b1 - b0, target, target, Left(h, H, 1, 1, 0), w_hh, H)
                for u in range(lo, hi):
                    for b in range(b0, b1):
                        a, c_t = at(g_t, u * slab + b * W), at(c, t * c_step + (u * B + b) * L)
                        y_t = at(y, (t * B + b) * H + u * L)
                        h_t = advance(a, c_t, at(c_t, c_step), y_t, H - u * L, save)
                        if save:
                            row = (u // VECS * (T + 1) + t + 1) * B + b
                            store(h_t, at(hs, row * W + u % VECS * L), L)
            if u1 - u0 < U:
                meet(barrier, parties)

    for u in range(u0, u1):
        for b in range(b0, b1):
            store(load(at(c, T * c_step + (u * B + b) * L), L), at(c_n, b * H + u * L), H - u * L)
    meet(barrier, parties)


@part(inline=False)
def _weight_gradient(d, slab, rows, H, N, source, dw, nothing, fresh, me, parties, multiply):
    """``dw (+)= d.T @ source`` over so many rows, this party's tiles of it.

    d: address of the gates' gradients in panels (U, slab); source: `Panels` (rows, N); dw: address of (4 H, N), which
    is added to unless ``fresh``; nothing: `Panels` of zeros.
    """
    W = width(d)
    L = W // GATES
    U = (H + L - 1) // L
    P = panels(N, d)
    count = P * U * GATES
    for item in range(me * count // parties, (me + 1) * count // parties):
        p, u, g = item % P, item // P // GATES, item // P % GATES
        left = Left(at(d, u * slab + g * L), 1, W, 1, 0)
        target = Panels(at(dw, (g * H + u * L) * N), W, N)
        product(multiply, p, p + 1, N, min(L, H - u * L), nothing if fresh else target, target, left, source, rows)


@part(inline=False)
def _bias_gradient(d, slab, rows, H, db, fresh, me, parties):
    """``db (4 H) (+)=`` the sum of so many rows of d, this party's units of it."""
    W = width(d)
    L = W // GATES
    U = (H + L - 1) // L
    for u in range(me * U // parties, (me + 1) * U // parties):
        n = 0 if fresh else H - u * L
        at_i, at_f, at_g, at_o = at(db, u * L), at(db, H + u * L), at(db, 2 * H + u * L), at(db, 3 * H + u * L)
        i, f, g, o = load(at_i, n), load(at_f, n), load(at_g, n), load(at_o, n)
        for row in range(rows):
            a = at(d, u * slab + row * W)
            i, f = i + load(a, L), f + load(at(a, L), L)
            g, o = g + load(at(a, 2 * L), L), o + load(at(a, 3 * L), L)
        n = H - u * L
        store(i, at_i, n)
        store(f, at_f, n)
        store(g, at_g, n)
        store(o, at_o, n)


@part
def work_layout(B, H, L, back, buffers):
    """Where dgates, dh and dc begin in `backward`'s workspace, and its size."""
    W, U = VECS * L, (H + L - 1) // L
    dh = buffers * U * back * B * W
    dc = dh + -(-H // W) * B * W
    return 0, dh, dc, dc + U * B * L


@kernel
def backward(
    dy,
    dh_n,
    dc_n,
    packed,
    buffer,
    dx,
    dh_0,
    dc_0,
    dw_ih,
    dw_hh,
    db,
    work,
    buffers,
    chunk,
    back,
    share,
    barrier,
    multiply,
):
    """Backpropagation through time. ``buffer``, as `forward` saved it, is read, and may be read again.

    dy (T, B, H); dh_n, dc_n (B, H): gradients by the outputs; packed: from `pack_backward`; chunk: as in `forward`.
    Written: dx (T, B, I); dh_0, dc_0 (B, H); dw_ih (4 H, I), dw_hh (4 H, H), db (4 H); and ``work`` (`work_layout`):
    dgates (U, back B, W), once or, for several parties, twice (``buffers``), dh (PH, B, W) and dc (U, B, L).

    Walking back, the gates' derivatives of ``back`` steps stay in cache while dx and the weights' gradients take
    them up.
    """
    T, B, H = dy.shape
    I = dx.shape[2]
    b0, b1, u0, u1, me, parties = share
    W, L = width(at(dy, 0)), lanes(at(dy, 0))
    U, PH, PI = (H + L - 1) // L, panels(H, at(dy, 0)), panels(I, at(dy, 0))
    at_gates, at_c, at_xs, at_hs, _ = layout(T, B, I, H, L, chunk, True)
    gates, c, xs, hs = at(buffer, at_gates), at(buffer, at_c), at(buffer, at_xs), at(buffer, at_hs)
    at_dgates, at_dh, at_dc, _ = work_layout(B, H, L, back, buffers)
    dgates, dh, dc = at(work, at_dgates), at(work, at_dh), at(work, at_dc)
    slab = back * B * W
    nothing = Panels(at(packed, 0), 0, 0)
    w_hh, w_ih = Panels(at(packed, W), U * W * W, W), Panels(at(packed, W + PH * U * W * W), U * W * W, W)
    p0 = u0 // VECS
    p1 = p0 + (u1 - u0 + VECS - 1) // VECS

    for u in range(u0, u1):
        for b in range(b0, b1):
            store(load(at(dc_n, b * H + u * L), H - u * L), at(dc, (u * B + b) * L), L)
            store(load(at(dh_n, b * H + u * L), H - u * L), at(dh, (u // VECS * B + b) * W + u % VECS * L), L)

    if H % L > 0 and u1 == U:
        # Lanes past the last unit are never written below, but products read them.
        for i in range(buffers * back):
            for j in range(W * b0, W * b1):
                at(dgates, i // back * U * slab + (U - 1) * slab + i % back * B * W)[j] = 0

    flip = 0
    last = T
    while last > 0:
        first = max(0, last - back)
        n = last - first
        d = at(dgates, flip * U * slab)
        for t in range(last - 1, first - 1, -1):
            before = t // chunk * chunk
            steps = min(chunk, T - before)
            row0 = (t - first) * B
            for u in range(u0, u1):
                for b in range(b0, b1):
                    a = at(gates, (before * U + u * steps + t - before) * B * W + b * W)
                    dh_at = at(dh, (u // VECS * B + b) * W + u % VECS * L)
                    dc_at = at(dc, (u * B + b) * L)
                    da = at(d, u * slab + (row0 + b) * W)
                    c_at = at(c, ((t * U + u) * B + b) * L)
                    da_i, da_f, da_g, da_o, dc_t = cell_backward(
                        load(a, L),
                        load(at(a, L), L),
                        load(at(a, 2 * L), L),
                        load(at(a, 3 * L), L),
                        load(c_at, L),
                        load(at(c_at, U * B * L), L),
                        load(at(dy, (t * B + b) * H + u * L), H - u * L) + load(dh_at, L),
                        load(dc_at, L),
                    )
                    store(da_i, da, H - u * L)
                    store(da_f, at(da, L), H - u * L)
                    store(da_g, at(da, 2 * L), H - u * L)
                    store(da_o, at(da, 3 * L), H - u * L)
                    store(dc_t, dc_at, L)
            if u1 - u0 < U:
                meet(barrier, parties)
            left = Left(at(d, (row0 + b0) * W), W, 1, U, slab)
            product(multiply, p0, p1, PH * W, b1 - b0, nothing, Panels(at(dh, b0 * W), B * W, W), left, w_hh, W)
        meet(barrier, parties)

        rows = n * B
        r0, r1 = me * rows // parties, (me + 1) * rows // parties
        target = Panels(at(dx, (first * B + r0) * I), W, I)
        left = Left(at(d, r0 * W), W, 1, U, slab)
        for p in range(PI):
            product(multiply, p, p + 1, I, r1 - r0, nothing, target, left, w_ih, W)
        fresh = last == T
        source = Panels(at(xs, first * B * W), T * B * W, W)
        _weight_gradient(d, slab, rows, H, I, source, at(dw_ih, 0), nothing, fresh, me, parties, multiply)
        source = Panels(at(hs, first * B * W), (T + 1) * B * W, W)
        _weight_gradient(d, slab, rows, H, H, source, at(dw_hh, 0), nothing, fresh, me, parties, multiply)
        _bias_gradient(d, slab, rows, H, at(db, 0), fresh, me, parties)
        last = first
        flip = (flip + 1) % buffers

    for u in range(u0, u1):
        for b in range(b0, b1):
            dh_at = at(dh, (u // VECS * B + b) * W + u % VECS * L)
            store(load(dh_at, L), at(dh_0, b * H + u * L), H - u * L)
            store(load(at(dc, (u * B + b) * L), L), at(dc_0, b * H + u * L), H - u * L)
    meet(barrier, parties)


@kernel
def step(x, h, c, packed, gates, multiply):
    """One step for a batch. x (B, I); h, c (B, H): replaced by the new ones; gates (U B W): workspace."""
    B, I = x.shape
    H = h.shape[1]
    W, L = width(at(x, 0)), lanes(at(x, 0))
    U = (H + L - 1) // L
    bias = Panels(at(packed, 0), W, 0)
    w_ih, w_hh = Panels(at(packed, U * W), I * W, W), Panels(at(packed, U * W * (1 + I)), H * W, W)
    target = Panels(at(gates, 0), B * W, W)
    stride = min(U, VECS)
    for u in range(0, U, stride):
        last = min(u + stride, U)
        product(multiply, u, last, U * W, B, bias, target, Left(at(x, 0), I, 1, 1, 0), w_ih, I)
        product(multiply, u, last, U * W, B, target, target, Left(at(h, 0), H, 1, 1, 0), w_hh, H)
    for u in range(U):
        for b in range(B):
            a, here = at(gates, (u * B + b) * W), b * H + u * L
            advance(a, at(c, here), at(c, here), at(h, here), H - u * L, False)
