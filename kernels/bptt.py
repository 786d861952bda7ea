"""Backpropagation through time, as all cells share it. `cell` describes cells, buffers and sizes.

Walking back, the gates' gradients of a chunk of steps stay in cache while dx and the weights' gradients take them up.
Every number of a gradient by weights is one sum over the rows, the last one first, whatever the chunks.
"""

from collections import namedtuple
from itertools import accumulate

from .barrier import meet, portion
from .cell import geometry, in_panels, outputs_of, panels_of_gates, place
from .compiler import part
from .denormals import flush_denormals, restore_mode
from .gemm import WHOLE, Left, Panels, load, panels, product, store, zeros
from .tile import VECS, width
from .vector import at, lanes, smaller

# Panels of the right factor of a weight's gradient that stay in the second-level cache while the left one passes.
PANELS_AT_ONCE = 4


@part(inline=False)
def _weight_gradient(d, slab, rows, H, window, gates, units, N, source, dw, nothing, fresh, me, parties, multiply):
    """``dw (+)= d.T @ source`` over so many rows, this party's tiles of it.

    d: address of the gates' gradients, the window's first, in panels of so many units, ``slab`` apart; source: `Panels`
    (rows, N); dw: address of (gates H, N), which is added to unless ``fresh``; nothing: `Panels` of zeros.
    """
    W, L = width(d), lanes(d)
    U, P = (H + L - 1) // L, panels(N, d)
    columns = U * window.count
    i0, i1 = portion(P * columns, me, parties)
    for item in range(i0, i1):
        first = item // (PANELS_AT_ONCE * columns) * PANELS_AT_ONCE
        at_once, rest = smaller(PANELS_AT_ONCE, P - first), item - first * columns
        p, u, g = first + rest % at_once, rest // at_once // window.count, rest // at_once % window.count
        column = at(d, u * L // units * slab + u * L % units + g * L)
        target = Panels(at(dw, ((g + window.rotate) % gates * H + u * L) * N), W, N)
        start = nothing if fresh else target
        product(multiply, p, p + 1, W, N, smaller(L, H - u * L), start, target, Left(column, 1, W, 1, 0), source, rows)


@part(inline=False)
def _column_sums(d, slab, rows, G, sums, fresh, me, parties):
    """``sums (G, W) (+)=`` the sum of so many rows of d, this party's panels of it."""
    W, L = width(d), lanes(d)
    g0, g1 = portion(G, me, parties)
    for g in range(g0, g1):
        n, total = 0 if fresh else L, at(sums, g * W)
        t_0, t_1, t_2, t_3 = load(total, n), load(at(total, L), n), load(at(total, 2 * L), n), load(at(total, 3 * L), n)
        for row in range(rows):
            a = at(d, g * slab + row * W)
            t_0, t_1 = t_0 + load(a, L), t_1 + load(at(a, L), L)
            t_2, t_3 = t_2 + load(at(a, 2 * L), L), t_3 + load(at(a, 3 * L), L)
        store(t_0, total, L)
        store(t_1, at(total, L), L)
        store(t_2, at(total, 2 * L), L)
        store(t_3, at(total, 3 * L), L)


# Where the parts of `backward`'s workspace begin, and its end.
WorkParts = namedtuple("WorkParts", "d dp dh direct dm ds end")


def work_layout(cell, B, rows, buffers, W, L):
    """The `WorkParts` for a batch of B. rows: of the largest chunk. buffers: of d and dp."""
    U, G, _ = panels_of_gates(cell, L)
    PH, PP = -(-cell.H // W), -(-cell.P // W)
    sizes = [
        buffers * G * rows * W,
        buffers * PP * rows * W if cell.P != cell.H else 0,
        PP * B * W,
        PP * B * W,
        PH * B * W if cell.P != cell.H or cell.again.count > 0 else 0,
        U * B * L,
    ]
    return WorkParts(*accumulate(sizes, initial=0))


Gradients = namedtuple("Gradients", "x h_0 s_0 w_ih w_hh w_hr b peepholes")


# In the template below these are each cell's own: see `compiler.specialise`.
retreat = reset_backward = peephole_sums = None


def backward(
    cells,
    packed,
    dy,
    dh_n,
    ds_n,
    buffer,
    buffer_parts,
    d_out,
    work,
    work_parts,
    buffers,
    steps,
    chunks,
    backs,
    most,
    masks,
    fresh,
    share,
    barrier,
    multiply,
):
    """Backpropagation through time. ``buffer``, as `forward` saved it, is read, and may be read again.

    dy (N, P), dh_n (B, P), ds_n (B, H): gradients by the outputs; packed: as `fastrnn.packing` makes it;
    buffer_parts, work_parts (1): records, `cell.BufferParts` and `WorkParts`; most: the rows of the largest chunk of
    ``backs``.
    Written: ``d_out``, the gradients by x (N, I), h_0 (B, P), s_0 (B, H), the weights, as they are shaped, the bias
    (G W), in panels as the gates, and the peepholes (3, U L), those by weights added to unless ``fresh``; and ``work``
    (`WorkParts`), the parts of which are

      d (G, rows, W), dp (PP, rows, W)   gradients by the gates' sums and, of a projection, by y of a chunk, the last
                                         row first; once or, for several parties, twice (``buffers``)
      dh, direct (PP, B, W)              the running gradient by h, and the part of it that does not come through sums
      dm (PH, B, W), ds (U, B, L)        the gradients by m and s
    """
    mode, cell = flush_denormals(), cells[0]
    of_packed, of_buffer, of_work = cell.packed_back, buffer_parts[0], work_parts[0]
    B, I, H, P = len(dh_n), d_out.x.shape[1], cell.H, cell.P
    T, N = len(steps) - 1, len(dy)
    b0, b1, u0, u1, me, parties = share
    W, L, U, G, units = geometry(cell, at(dy, 0))
    PP, PI = panels(P, at(dy, 0)), panels(I, at(dy, 0))
    gates, ss, xs = at(buffer, of_buffer.gates), at(buffer, of_buffer.ss), at(buffer, of_buffer.xs)
    hs, ms = at(buffer, of_buffer.hs), at(buffer, of_buffer.ms)
    dps, dh, direct = at(work, of_work.dp), at(work, of_work.dh), at(work, of_work.direct)
    dm, ds = at(work, of_work.dm), at(work, of_work.ds)
    x_wide, h_wide = cell.x.count * units, cell.h.count * units
    extra, w_again = at(packed, of_packed.extra), at(packed, of_packed.again)
    w_hh, w_ih = at(packed, of_packed.w_hh), at(packed, of_packed.w_ih)
    w_hh, w_ih = Panels(w_hh, G * h_wide * W, W), Panels(w_ih, G * x_wide * W, W)
    nothing, zero = Panels(at(packed, 0), 0, 0), zeros(at(packed, 0))
    cut = u1 - u0 < U
    if masks is not None:
        masked, zoned, projected = masks.h.size > 0, masks.zone_h.size > 0, P != H
        zone_h_row, zone_s_row = P if len(masks.zone_h) > 1 else 0, H if len(masks.zone_s) > 1 else 0
    v0, v1 = outputs_of(cell, share, at(dy, 0))
    p0, p1 = v0 // VECS, (v1 + VECS - 1) // VECS
    slab = most * W

    for b in range(b0, b1):
        for v in range(v0, v1):
            store(load(at(dh_n, b * P + v * L), P - v * L), in_panels(dh, B * W, v, b), L)
        for u in range(u0, u1):
            store(load(at(ds_n, b * H + u * L), H - u * L), at(ds, (u * B + b) * L), L)
    # Lanes past the last unit are never written below, but products read them.
    for i in range(buffers * most if me == 0 and H % units > 0 else 0):
        for j in range(0, W, L):
            store(zero, at(work, (i // most * G + G - 1) * slab + i % most * W + j), L)
    for i in range(buffers * most if me == 0 and P != H else 0):
        for j in range(0, W, L):
            store(zero, at(dps, (i // most * PP + PP - 1) * slab + i % most * W + j), L)
    meet(barrier, parties)

    flip, chunk = 0, len(chunks) - 2
    for q in range(len(backs) - 2, -1, -1):
        first, last = backs[q], backs[q + 1]
        rows = steps[last] - steps[first]
        d, dp = at(work, flip * G * slab), at(dps, flip * PP * slab)
        latest = chunk
        for t in range(last - 1, first - 1, -1):
            while chunks[chunk] > t:
                chunk -= 1
            base = steps[chunks[chunk]]
            g_slab = (steps[chunks[chunk + 1]] - base) * W
            row = steps[t]
            g_t = at(gates, base * G * W + (row - base) * W)
            r0, r1 = b0, smaller(b1, steps[t + 1] - row)
            mirror = steps[last] - 1 - row

            if masks is not None:
                if projected:
                    for v in range(v0, v1):
                        n = P - v * L
                        for b in range(r0, r1):
                            dh_t = load(at(dy, (row + b) * P + v * L), n) + load(in_panels(dh, B * W, v, b), L)
                            kept = zero
                            if zoned:
                                z = load(at(masks.zone_h, (row + b) * zone_h_row + v * L), n)
                                kept, dh_t = z * dh_t, (1.0 - z) * dh_t
                            store(kept, in_panels(direct, B * W, v, b), L)
                            store(dh_t, in_panels(dp, slab, v, mirror - b), n)
                    if cut:
                        meet(barrier, parties)
                    left = Left(at(dp, (mirror - r0) * W), -W, 1, PP, slab)
                    w_hr, target = Panels(w_again, PP * W * W, W), Panels(at(dm, r0 * W), B * W, W)
                    product(multiply, u0 // VECS, -(-u1 // VECS), W, U * L, r1 - r0, nothing, target, left, w_hr, W)

            for u in range(u0, u1):
                n = H - u * L
                for b in range(r0, r1):
                    a, da = place(cell, g_t, g_slab, u, b), place(cell, d, slab, u, mirror - b)
                    s, ds_at = zero, at(ds, (u * B + b) * L)
                    if cell.carries:
                        s = load(at(ss, (u * N + row + b) * L), L)
                    ds_t, ds_kept, dh_kept = load(ds_at, L), zero, zero
                    if P != H:
                        dh_t = load(in_panels(dm, B * W, u, b), L)
                    else:
                        dh_t = load(at(dy, (row + b) * P + u * L), n) + load(in_panels(dh, B * W, u, b), L)
                    if masks is not None:
                        if zoned:
                            z = load(at(masks.zone_s, (row + b) * zone_s_row + u * L), n)
                            ds_kept, ds_t = z * ds_t, (1.0 - z) * ds_t
                            if not projected:
                                z = load(at(masks.zone_h, (row + b) * zone_h_row + u * L), n)
                                dh_kept, dh_t = z * dh_t, (1.0 - z) * dh_t
                    dh_t, ds_t = retreat(cell, extra, u, a, da, s, dh_t, ds_t, n)
                    store(ds_kept + ds_t, ds_at, L)
                    if P == H:
                        store(dh_kept + dh_t, in_panels(direct, B * W, u, b), L)

            if reset_backward is not None:
                if cut:
                    meet(barrier, parties)
                left = Left(at(d, (mirror - r0) * W + cell.again.slot * L), -W, 1, G, slab)
                again, target = Panels(w_again, G * units * W, W), Panels(at(dm, r0 * W), B * W, W)
                product(multiply, u0 // VECS, -(-u1 // VECS), W, U * L, r1 - r0, nothing, target, left, again, units)
                for u in range(u0, u1):
                    for b in range(r0, r1):
                        a, da = place(cell, g_t, g_slab, u, b), place(cell, d, slab, u, mirror - b)
                        h, mask = load(at(ss, (u * N + row + b) * L), L), zero + 1.0
                        if masks is not None:
                            if masked:
                                mask = load(at(masks.h, b * H + u * L), H - u * L)
                        dh_t = mask * reset_backward(a, da, mask * h, load(in_panels(dm, B * W, u, b), L), H - u * L)
                        store(load(in_panels(direct, B * W, u, b), L) + dh_t, in_panels(direct, B * W, u, b), L)

            if cut:
                meet(barrier, parties)
            left = Left(at(d, (mirror - r0) * W + cell.h.slot * L), -W, 1, G, slab)
            start, target = Panels(at(direct, r0 * W), B * W, W), Panels(at(dh, r0 * W), B * W, W)
            if masks is not None:
                start = nothing if masked else start
            product(multiply, p0, p1, W, (P + L - 1) // L * L, r1 - r0, start, target, left, w_hh, h_wide)
            if masks is not None:
                if masked:
                    for v in range(v0, v1):
                        for b in range(r0, r1):
                            dh_t = load(in_panels(dh, B * W, v, b), L) * load(at(masks.h, b * P + v * L), P - v * L)
                            store(load(in_panels(direct, B * W, v, b), L) + dh_t, in_panels(dh, B * W, v, b), L)
        meet(barrier, parties)

        r0, r1 = portion(rows, me, parties)
        target = Panels(at(d_out.x, (steps[last] - 1 - r0) * I), W, -I)
        left = Left(at(d, r0 * W + cell.x.slot * L), W, 1, G, slab)
        product(multiply, 0, PI, W, I, r1 - r0, nothing, target, left, w_ih, x_wide)
        start = (N - steps[last]) * W
        x_rows, h_rows = Panels(at(xs, start), N * W, W), Panels(at(hs, start), N * W, W)
        m_rows = Panels(at(ms, start), N * W, W)
        new = fresh and last == T
        _weight_gradient(
            at(d, cell.x.slot * L), slab, rows, H, cell.x, cell.gates, units, I, x_rows, at(d_out.w_ih, 0),
            nothing, new, me, parties, multiply,
        )  # fmt: skip
        _weight_gradient(
            at(d, cell.h.slot * L), slab, rows, H, cell.h, cell.gates, units, P, h_rows, at(d_out.w_hh, 0),
            nothing, new, me, parties, multiply,
        )  # fmt: skip
        if reset_backward is not None:
            _weight_gradient(
                at(d, cell.again.slot * L), slab, rows, H, cell.again, cell.gates, units, H, m_rows, at(d_out.w_hh, 0),
                nothing, new, me, parties, multiply,
            )  # fmt: skip
        if P != H:
            _weight_gradient(
                dp, slab, rows, P, WHOLE, 1, W, H, m_rows, at(d_out.w_hr, 0), nothing, new, me, parties, multiply
            )
        _column_sums(d, slab, rows, G, at(d_out.b, 0), new, me, parties)
        if peephole_sums is not None:
            first_u, end_u = portion(U if cell.peephole else 0, me, parties)
            for u in range(first_u, end_u):
                sums = at(d_out.peepholes, u * L)
                n = 0 if new else L
                p_i, p_f, p_o = load(sums, n), load(at(sums, U * L), n), load(at(sums, 2 * U * L), n)
                here = latest
                for t in range(last - 1, first - 1, -1):
                    while chunks[here] > t:
                        here -= 1
                    base = steps[chunks[here]]
                    g_slab = (steps[chunks[here + 1]] - base) * W
                    for row in range(steps[t + 1] - 1, steps[t] - 1, -1):
                        a = place(cell, at(gates, base * G * W), g_slab, u, row - base)
                        da = place(cell, d, slab, u, steps[last] - 1 - row)
                        s_i, s_f, s_o = peephole_sums(a, da, load(at(ss, (u * N + row) * L), L))
                        p_i, p_f, p_o = p_i + s_i, p_f + s_f, p_o + s_o
                store(p_i, sums, L)
                store(p_f, at(sums, U * L), L)
                store(p_o, at(sums, 2 * U * L), L)
        flip = (flip + 1) % buffers

    for b in range(b0, b1):
        for v in range(v0, v1):
            store(load(in_panels(dh, B * W, v, b), L), at(d_out.h_0, b * P + v * L), P - v * L)
        for u in range(u0, u1):
            store(load(at(ds, (u * B + b) * L), L), at(d_out.s_0, b * H + u * L), H - u * L)
    meet(barrier, parties)
    restore_mode(mode)
