"""Layer normalisation within the LSTM and the GRU (Ba, Kiros and Hinton 2016): loops over a sequence and gate math.

    N(a) = (a - mean(a)) / sqrt(var(a) + 1e-5)
    u = g_ih * N(W_ih x) + b_ih
    v = g_hh * N(W_hh h') + b_hh        over all gates' numbers of a row

    LSTM:   i, f, o = sigmoid(u_* + v_*),  g = tanh(u_g + v_g)
            c = f * c' + i * g
            h = o * tanh(g_c * N(c) + b_c)
    GRU:    r, z = sigmoid(u_* + v_*),  n = tanh(u_n + r * v_n)
            h = (1 - z) * n + z * h'

All other options are those of `recurrent`, as are the sizes, the order of rows, ``steps``, ``chunks``, ``backs``,
`Masks` and ``multiply``. Here matrices are row-major, a row's gates side by side (``M = G H`` numbers, G being the
weights' gates), for a norm reads all of a row.

Buffers are C-contiguous arrays of one dtype, all but x, y and states of one dimension; all belong to the caller, and
nothing is allocated here. ``R`` rows: all N if ``save``, else as many as the largest chunk and the batch have.

    weights     `Weights`
      ih, hh, hr                as `linear.forward` takes them, without biases, or `linear.backward`
      gates (4, M)              b_ih, g_ih, b_hh, g_hh
      units (5, H)              the LSTM's g_c, b_c and peepholes of i, f, o
    buffers     `Buffers`: what `forward` saves for `backward`, and its workspace
      u, v (R, M)               N(W_ih x), N(W_hh h')
      gates (R, slots, H)       LSTM: i, f, g, o; GRU: r, z, n
      before, normal (R, H)     the state s (c, or the GRU's h) before each row; N(c)
      scales (R, 3)             what the norms of u, v and c multiplied by: 1 / sqrt(var + 1e-5)
      xs (PI, N, W), hs (PP, N, W), ms (PH, N, W)
                                x, h as it went into the product, and h before a projection, in panels; only if ``save``
      seen (B, P), m (B, H)     h times the recurrent mask; h before a projection
      scratch (parties, W)      a vector on its way to a number

Threads: ``share = (b0, b1, _, _, me, parties)`` is what a call does of the recurrence: rows b0 to b1 of the batch. What
comes after it is cut by rows or columns. Each number is computed, and each sum over rows taken, the last row first, in
one order whatever the cuts.
"""

from collections import namedtuple

from .activations import sigmoid, tanh
from .barrier import meet, portion
from .compiler import kernel, part
from .denormals import flush_denormals, restore_mode
from .gemm import Left, Panels, load, pack_rows, panels, product, store, zeros
from .lstm import clipped, not_clipped
from .tile import ROWS, width
from .vector import at, fma, lanes, smaller

EPSILON = 1e-5

Weights = namedtuple("Weights", "ih hh hr gates units")
Buffers = namedtuple("Buffers", "u v gates before normal scales xs hs ms seen m scratch")
Work = namedtuple("Work", "du dv dn dp dm d_seen scratch")
Gradients = namedtuple("Gradients", "x h_0 s_0 w_ih w_hh w_hr gates units")


@part
def total(vector, scratch):
    """The sum of a vector's numbers. scratch: address of a vector, written."""
    store(vector, scratch, lanes(scratch))
    even, odd = 0.0, 0.0
    for i in range(0, lanes(scratch), 2):
        even += scratch[i]
        odd += scratch[i + 1]
    return even + odd


@part(inline=False)
def normalise(a, count, scratch):
    """``a = N(a)`` of so many numbers at an address. Returns what the numbers less their mean were multiplied by."""
    L = lanes(a)
    sums = zeros(a)
    for j in range(0, count, L):
        sums = sums + load(at(a, j), count - j)
    mean = total(sums, scratch) / count
    squares = zeros(a)
    for j in range(0, count, L):
        store(load(at(a, j), count - j) - mean, at(a, j), count - j)
        centred = load(at(a, j), count - j)  # loaded again, for it is 0 past the end
        squares = fma(centred, centred, squares)
    scale = 1.0 / (total(squares, scratch) / count + EPSILON) ** 0.5
    for j in range(0, count, L):
        store(load(at(a, j), count - j) * scale, at(a, j), count - j)
    return scale


@part(inline=False)
def _means(d, gain, normal, count, scratch):
    """The means of d * gain and of d * gain * normal."""
    L = lanes(d)
    plain, weighted = zeros(d), zeros(d)
    for j in range(0, count, L):
        n = count - j
        dn = load(at(d, j), n) * load(at(gain, j), n)
        plain, weighted = plain + dn, fma(dn, load(at(normal, j), n), weighted)
    return total(plain, scratch) / count, total(weighted, scratch) / count


@part(inline=False)
def normalise_backward(d, gain, normal, scale, count, scratch):
    """The gradient by what `normalise` read, from that by ``gain * normal``: so many numbers at ``d``, replaced."""
    plain, weighted = _means(d, gain, normal, count, scratch)
    for j in range(0, count, lanes(d)):
        n = count - j
        dn = load(at(d, j), n) * load(at(gain, j), n)
        store((dn - plain - load(at(normal, j), n) * weighted) * scale, at(d, j), n)


@part
def _affine(gates, M, a, j, n):
    """n numbers from number j on of ``gain * a + bias``. gates: address of the bias (M), followed by the gain (M)."""
    return fma(load(at(gates, M + j), n), load(at(a, j), n), load(at(gates, j), n))


@part
def _sums(gates, M, u, v, j, n):
    """``u + v`` as the gates see them."""
    return _affine(gates, M, u, j, n) + _affine(at(gates, 2 * M), M, v, j, n)


# Gate math of one row, whose parts of the buffers are given by their addresses.
#
#     advance(cell, weights, u, v, gates, before, normal, s, h, scratch) -> scale of N(c)
#         reads u, v (both normalised) and before; writes gates, normal, the new s and h
#     retreat(cell, weights, u, v, gates, before, normal, scale, zone, zoned, dm, du, dv, dn, dh, ds, scratch)
#         reads dm, the gradient by the new h; the LSTM replaces ds, that by the new s, by that by the old one, of which
#         ``zone`` was kept if ``zoned``; writes du and dv, the gradients by u and v, and dn: the LSTM's by what N(c)
#         becomes, or the GRU's by v_n; adds to dh what reaches the old h around the products


@part
def lstm_advance(cell, weights, u, v, gates, before, normal, s, h, scratch):
    H, M, L = cell.H, cell.gates * cell.H, lanes(u)
    bias, units = at(weights.gates, 0), at(weights.units, 0)
    of_f = 0 if cell.coupled else H  # where the weights' f begins; i, if there is one, comes before it
    for j in range(0, H, L):
        n, c = H - j, load(at(before, j), H - j)
        a_f, a_g = _sums(bias, M, u, v, of_f + j, n), _sums(bias, M, u, v, of_f + H + j, n)
        a_i, a_o = _sums(bias, M, u, v, j, n), _sums(bias, M, u, v, of_f + 2 * H + j, n)
        if cell.peephole:
            a_i, a_f = fma(load(at(units, 2 * H + j), n), c, a_i), fma(load(at(units, 3 * H + j), n), c, a_f)
        if cell.clip > 0:
            a_i, a_f, a_g = clipped(cell, a_i), clipped(cell, a_f), clipped(cell, a_g)
        f, g = sigmoid(a_f), tanh(a_g)
        i = 1.0 - f if cell.coupled else sigmoid(a_i)
        c = f * c + i * g
        if cell.peephole:
            a_o = fma(load(at(units, 4 * H + j), n), c, a_o)
        if cell.clip > 0:
            a_o = clipped(cell, a_o)
        store(i, at(gates, j), n)
        store(f, at(gates, H + j), n)
        store(g, at(gates, 2 * H + j), n)
        store(sigmoid(a_o), at(gates, 3 * H + j), n)
        store(c, at(s, j), n)
        store(c, at(normal, j), n)
    scale = normalise(normal, H, scratch)
    for j in range(0, H, L):
        n = H - j
        out = fma(load(at(units, j), n), load(at(normal, j), n), load(at(units, H + j), n))
        store(load(at(gates, 3 * H + j), n) * tanh(out), at(h, j), n)
    return scale


@part
def lstm_retreat(cell, weights, u, v, gates, before, normal, scale, zone, zoned, dm, du, dv, dn, dh, ds, scratch):
    H, L, units = cell.H, lanes(u), at(weights.units, 0)
    of_f = 0 if cell.coupled else H
    for j in range(0, H, L):
        n = H - j
        dh_t, o = load(at(dm, j), n), load(at(gates, 3 * H + j), n)
        tanh_c = tanh(fma(load(at(units, j), n), load(at(normal, j), n), load(at(units, H + j), n)))
        da_o = dh_t * tanh_c * o * (1.0 - o)
        if cell.clip > 0:
            da_o = da_o * not_clipped(cell, sigmoid, o)
        store(da_o, at(du, of_f + 2 * H + j), n)
        store(dh_t * o * (1.0 - tanh_c * tanh_c), at(dn, j), n)
    plain, weighted = _means(dn, units, normal, H, scratch)
    for j in range(0, H, L):
        n = H - j
        i, f, g = load(at(gates, j), n), load(at(gates, H + j), n), load(at(gates, 2 * H + j), n)
        c_before, dc, kept = load(at(before, j), n), load(at(ds, j), n), zeros(u)
        if zoned:
            z = load(at(zone, j), n)
            kept, dc = z * dc, (1.0 - z) * dc
        through_norm = load(at(dn, j), n) * load(at(units, j), n) - plain - load(at(normal, j), n) * weighted
        dc, da_o = fma(through_norm, scale, dc), load(at(du, of_f + 2 * H + j), n)
        if cell.peephole:
            dc = fma(da_o, load(at(units, 4 * H + j), n), dc)
        di, df = dc * g, dc * c_before
        if cell.coupled:
            df = df - di
        da_i, da_f, da_g = di * i * (1.0 - i), df * f * (1.0 - f), dc * i * (1.0 - g * g)
        if cell.clip > 0:
            da_i, da_f = da_i * not_clipped(cell, sigmoid, i), da_f * not_clipped(cell, sigmoid, f)
            da_g = da_g * not_clipped(cell, tanh, g)
        dc_before = dc * f
        if cell.peephole:
            dc_before = fma(da_f, load(at(units, 3 * H + j), n), dc_before)
            if not cell.coupled:
                dc_before = fma(da_i, load(at(units, 2 * H + j), n), dc_before)
        store(kept + dc_before, at(ds, j), n)
        if not cell.coupled:
            store(da_i, at(du, j), n)
            store(da_i, at(dv, j), n)
        store(da_f, at(du, of_f + j), n)
        store(da_f, at(dv, of_f + j), n)
        store(da_g, at(du, of_f + H + j), n)
        store(da_g, at(dv, of_f + H + j), n)
        store(da_o, at(dv, of_f + 2 * H + j), n)


@part
def gru_advance(cell, weights, u, v, gates, before, normal, s, h, scratch):
    H, M, L, bias = cell.H, cell.gates * cell.H, lanes(u), at(weights.gates, 0)
    for j in range(0, H, L):
        n = H - j
        r, z = sigmoid(_sums(bias, M, u, v, j, n)), sigmoid(_sums(bias, M, u, v, H + j, n))
        v_n = _affine(at(bias, 2 * M), M, v, 2 * H + j, n)
        new = tanh(_affine(bias, M, u, 2 * H + j, n) + r * v_n)
        store(r, at(gates, j), n)
        store(z, at(gates, H + j), n)
        store(new, at(gates, 2 * H + j), n)
        h_t = (1.0 - z) * new + z * load(at(before, j), n)
        store(h_t, at(s, j), n)
        store(h_t, at(h, j), n)
    return 1.0


@part
def gru_retreat(cell, weights, u, v, gates, before, normal, scale, zone, zoned, dm, du, dv, dn, dh, ds, scratch):
    H, M, L, bias = cell.H, cell.gates * cell.H, lanes(u), at(weights.gates, 0)
    for j in range(0, H, L):
        n, dh_t, h = H - j, load(at(dm, j), H - j), load(at(before, j), H - j)
        r, z, new = load(at(gates, j), n), load(at(gates, H + j), n), load(at(gates, 2 * H + j), n)
        da_n = dh_t * (1.0 - z) * (1.0 - new * new)
        da_z = dh_t * (h - new) * z * (1.0 - z)
        da_r = da_n * _affine(at(bias, 2 * M), M, v, 2 * H + j, n) * r * (1.0 - r)
        store(da_r, at(du, j), n)
        store(da_r, at(dv, j), n)
        store(da_z, at(du, H + j), n)
        store(da_z, at(dv, H + j), n)
        store(da_n, at(du, 2 * H + j), n)
        store(da_n * r, at(dv, 2 * H + j), n)
        store(da_n * r, at(dn, j), n)
        store(fma(dh_t, z, load(at(dh, j), n)), at(dh, j), n)


@part
def forward(cell, advance, slots, x, h_0, s, weights, y, buffers, steps, chunks, masks, save, share, barrier, multiply):
    """``y`` and the state: the cell over a sequence, saving for `backward` if ``save``.

    x (N, I), h_0 (B, P) are read; y (N, P) is written; s (B, H), the state at first, is replaced by the last one.
    """
    (N, I), B, H, P, M = x.shape, len(h_0), cell.H, cell.P, cell.gates * cell.H
    b0, b1, _, _, me, parties = share
    W, L = width(at(x, 0)), lanes(at(x, 0))
    PM, PP = panels(M, at(x, 0)), panels(P, at(x, 0))
    w_ih, w_hh = Panels(at(weights.ih, PM * W), I * W, W), Panels(at(weights.hh, PM * W), P * W, W)
    nothing, scratch = Panels(at(weights.ih, 0), 0, 0), at(buffers.scratch, me * W)
    masked, zoned, projected, whole = masks.h.size > 0, masks.zone_h.size > 0, P != H, b1 - b0 == B
    zone_h_row, zone_s_row = P if len(masks.zone_h) > 1 else 0, H if len(masks.zone_s) > 1 else 0

    if save:
        r0, r1 = portion(N, me, parties)
        pack_rows(r1 - r0, I, at(x, r0 * I), Panels(at(buffers.xs, r0 * W), N * W, W))
    for q in range(len(chunks) - 1):
        for t in range(chunks[q], chunks[q + 1]):
            row = steps[t]
            r0, r1 = b0, smaller(b1, steps[t + 1] - row)
            if r0 >= r1:
                continue
            # The buffers' first row. Parties are not at one step: what is not saved, they keep in rows of their own.
            base = 0 if save else steps[chunks[q]] if whole else row
            here = row - base
            # All rows of the chunk at once, or step by step if other parties have some of the batch.
            if t == chunks[q] or not whole:
                rows = steps[chunks[q + 1]] - row if whole else r1 - r0
                target, left = Panels(at(buffers.u, (here + r0) * M), W, M), Left(at(x, (row + r0) * I), I, 1, 1, 0)
                product(multiply, 0, PM, W, M, rows, nothing, target, left, w_ih, I)

            h_before = at(h_0, 0) if t == 0 else at(y, steps[t - 1] * P)
            seen = h_before
            if masked:
                seen = at(buffers.seen, 0)
                for b in range(r0, r1):
                    for j in range(b * P, (b + 1) * P, L):
                        n = (b + 1) * P - j
                        store(load(at(h_before, j), n) * load(at(masks.h, j), n), at(seen, j), n)
            if save:
                pack_rows(r1 - r0, P, at(seen, r0 * P), Panels(at(buffers.hs, (row + r0) * W), N * W, W))
            target, left = Panels(at(buffers.v, (here + r0) * M), W, M), Left(at(seen, r0 * P), P, 1, 1, 0)
            product(multiply, 0, PM, W, M, r1 - r0, nothing, target, left, w_hh, P)

            for b in range(r0, r1):
                i = here + b
                u, v, gates = at(buffers.u, i * M), at(buffers.v, i * M), at(buffers.gates, i * slots * H)
                before, normal, s_b = at(buffers.before, i * H), at(buffers.normal, i * H), at(s, b * H)
                h = at(buffers.m, b * H) if projected else at(y, (row + b) * P)
                for j in range(0, H, L):
                    store(load(at(s_b, j), H - j), at(before, j), H - j)
                buffers.scales[3 * i] = normalise(u, M, scratch)
                buffers.scales[3 * i + 1] = normalise(v, M, scratch)
                buffers.scales[3 * i + 2] = advance(cell, weights, u, v, gates, before, normal, s_b, h, scratch)
                if zoned:
                    zone = at(masks.zone_s, (row + b) * zone_s_row)
                    for j in range(0, H, L):
                        z, n = load(at(zone, j), H - j), H - j
                        store(z * load(at(before, j), n) + (1.0 - z) * load(at(s_b, j), n), at(s_b, j), n)

            if projected:
                if save:
                    pack_rows(r1 - r0, H, at(buffers.m, r0 * H), Panels(at(buffers.ms, (row + r0) * W), N * W, W))
                w_hr, left = Panels(at(weights.hr, PP * W), H * W, W), Left(at(buffers.m, r0 * H), H, 1, 1, 0)
                target = Panels(at(y, (row + r0) * P), W, P)
                product(multiply, 0, PP, W, P, r1 - r0, nothing, target, left, w_hr, H)
            for b in range(r0, r1 if zoned else r0):
                for j in range(0, P, L):
                    z, n, h = load(at(masks.zone_h, (row + b) * zone_h_row + j), P - j), P - j, at(y, (row + b) * P + j)
                    store(z * load(at(h_before, b * P + j), n) + (1.0 - z) * load(h, n), h, n)
    meet(barrier, parties)


@part(inline=False)
def _weight_gradient(d, rows, N, K, source, dw, nothing, fresh, me, parties, multiply):
    """``dw (+)= d.T @ source`` over so many rows, the last one first: this party's tiles of it.

    d: address of (rows, N). source: `Panels` (rows, K). dw: address of (N, K), added to unless ``fresh``.
    """
    W, group = width(d), 2 * ROWS
    groups, last = (N + group - 1) // group, rows - 1
    backwards = Panels(at(source.address, last * source.row), source.panel, -source.row)
    count = groups * panels(K, d)
    i0, i1 = portion(count, me, parties)
    for item in range(i0, i1):
        p, n = item // groups, item % groups * group
        target, left = Panels(at(dw, n * K), W, K), Left(at(d, last * N + n), 1, -N, 1, 0)
        start = nothing if fresh else target
        product(multiply, p, p + 1, W, K, smaller(group, N - n), start, target, left, backwards, rows)


@part(inline=False)
def _gain_and_bias(d, d_row, normal, normal_row, rows, bias, gain, n, fresh):
    """Add the sums over so many rows, the last one first, of d and d * normal to n numbers of bias and gain."""
    plain, weighted = load(bias, 0 if fresh else n), load(gain, 0 if fresh else n)
    for r in range(rows - 1, -1, -1):
        d_r = load(at(d, r * d_row), n)
        plain, weighted = plain + d_r, fma(d_r, load(at(normal, r * normal_row), n), weighted)
    store(plain, bias, n)
    store(weighted, gain, n)


@part(inline=False)
def _peepholes(cell, du, gates, before, rows, sums, n, fresh):
    """Likewise to n numbers of the gradients by the peepholes, (3, H) at ``sums``. gates: n columns of (rows, 4, H)."""
    H, M = cell.H, cell.gates * cell.H
    of_f = 0 if cell.coupled else H
    s_i, s_f = load(sums, 0 if fresh else n), load(at(sums, H), 0 if fresh else n)
    s_o = load(at(sums, 2 * H), 0 if fresh else n)
    for r in range(rows - 1, -1, -1):
        d, a, c_before = at(du, r * M), at(gates, r * 4 * H), load(at(before, r * H), n)
        c = load(at(a, H), n) * c_before + load(a, n) * load(at(a, 2 * H), n)
        s_i, s_f = fma(load(d, n), c_before, s_i), fma(load(at(d, of_f), n), c_before, s_f)
        s_o = fma(load(at(d, of_f + 2 * H), n), c, s_o)
    store(s_i, sums, n)
    store(s_f, at(sums, H), n)
    store(s_o, at(sums, 2 * H), n)


@part
def backward(
    cell, retreat, slots, dy, weights, buffers, d_out, work, steps, backs, masks, fresh, share, barrier, multiply
):
    """Backpropagation through time. ``buffers``, as `forward` saved them, are read, and may be read again.

    dy (N, P) and weights are read. ``d_out``: the gradients by x (N, I), written; by the states, h_0 (B, P) and
    s_0 (B, H), at first those by the last ones; and by the weights, gates (4, M) and units (5, H), added to unless
    ``fresh``. The GRU writes nothing to units. ``work``, R rows being those of the largest chunk, is written:

      du, dv (R, M)             gradients by u and v, then by W_ih x and W_hh h'
      dn (R, H), dp (R, P)      as `retreat` says; the gradient by h before its zoneout
      dm (B, H), d_seen (B, P)  gradients by h before its projection, and by h as the product saw it
      scratch (parties, W)      as `Buffers`'
    """
    (N, P), I, H, M = dy.shape, d_out.x.shape[1], cell.H, cell.gates * cell.H
    b0, b1, _, _, me, parties = share
    W, L = width(at(dy, 0)), lanes(at(dy, 0))
    PM, PP, PH, PI = panels(M, at(dy, 0)), panels(P, at(dy, 0)), panels(H, at(dy, 0)), panels(I, at(dy, 0))
    w_ih, w_hh = Panels(at(weights.ih, W), PM * W * W, W), Panels(at(weights.hh, W), PM * W * W, W)
    nothing, scratch = Panels(at(weights.ih, 0), 0, 0), at(work.scratch, me * W)
    masked, zoned, projected = masks.h.size > 0, masks.zone_h.size > 0, P != H
    zone_h_row, zone_s_row = P if len(masks.zone_h) > 1 else 0, H if len(masks.zone_s) > 1 else 0
    du, dv, dn, dp, dh = at(work.du, 0), at(work.dv, 0), at(work.dn, 0), at(work.dp, 0), at(d_out.h_0, 0)
    gain_ih, gain_hh = at(weights.gates, M), at(weights.gates, 3 * M)

    for q in range(len(backs) - 2, -1, -1):
        base, rows = steps[backs[q]], steps[backs[q + 1]] - steps[backs[q]]
        new = fresh and q == len(backs) - 2
        for t in range(backs[q + 1] - 1, backs[q] - 1, -1):
            row, here = steps[t], steps[t] - base
            r0, r1 = b0, smaller(b1, steps[t + 1] - row)
            if r0 >= r1:
                continue
            for b in range(r0, r1):
                for j in range(0, P, L):
                    n, dh_at = P - j, at(dh, b * P + j)
                    dh_t, kept = load(at(dy, (row + b) * P + j), n) + load(dh_at, n), zeros(dh)
                    if zoned:
                        z = load(at(masks.zone_h, (row + b) * zone_h_row + j), n)
                        kept, dh_t = z * dh_t, (1.0 - z) * dh_t
                    store(kept, dh_at, n)
                    store(dh_t, at(dp, (here + b) * P + j), n)
            if projected:
                w_hr, left = Panels(at(weights.hr, W), PP * W * W, W), Left(at(dp, (here + r0) * P), P, 1, 1, 0)
                product(multiply, 0, PH, W, H, r1 - r0, nothing, Panels(at(work.dm, r0 * H), W, H), left, w_hr, P)
            for b in range(r0, r1):
                i, k = here + b, row + b
                u, v, gates = at(buffers.u, k * M), at(buffers.v, k * M), at(buffers.gates, k * slots * H)
                before, normal = at(buffers.before, k * H), at(buffers.normal, k * H)
                zone, dm = at(masks.zone_s, k * zone_s_row), at(work.dm, b * H) if projected else at(dp, i * P)
                retreat(
                    cell, weights, u, v, gates, before, normal, 1.0 * buffers.scales[3 * k + 2], zone, zoned, dm,
                    at(du, i * M), at(dv, i * M), at(dn, i * H), at(dh, b * P), at(d_out.s_0, b * H), scratch,
                )  # fmt: skip
                normalise_backward(at(dv, i * M), gain_hh, v, 1.0 * buffers.scales[3 * k + 1], M, scratch)
            left = Left(at(dv, (here + r0) * M), M, 1, 1, 0)
            direct, d_seen = Panels(at(dh, r0 * P), W, P), Panels(at(work.d_seen, r0 * P), W, P)
            if masked:
                product(multiply, 0, PP, W, P, r1 - r0, nothing, d_seen, left, w_hh, M)
                for b in range(r0, r1):
                    for j in range(b * P, (b + 1) * P, L):
                        n = (b + 1) * P - j
                        seen = load(at(masks.h, j), n) * load(at(work.d_seen, j), n)
                        store(load(at(dh, j), n) + seen, at(dh, j), n)
            else:
                product(multiply, 0, PP, W, P, r1 - r0, direct, direct, left, w_hh, M)
        meet(barrier, parties)

        # What the gains and biases get: from here on du is still by u, and dn has what dv no longer has.
        vectors = (H + L - 1) // L
        u, v, normal = at(buffers.u, base * M), at(buffers.v, base * M), at(buffers.normal, base * H)
        i0, i1 = portion(vectors, me, parties)
        for item in range(i0, i1):
            j, n = item * L, H - item * L
            for g in range(cell.gates):
                k = g * H + j
                sums = at(d_out.gates, k)
                _gain_and_bias(at(du, k), M, at(u, k), M, rows, sums, at(sums, M), n, new)
                apart = slots == 3 and g == 2  # the GRU's v_n
                d, d_row = at(dn, j) if apart else at(du, k), H if apart else M
                _gain_and_bias(d, d_row, at(v, k), M, rows, at(sums, 2 * M), at(sums, 3 * M), n, new)
            if slots == 4:
                sums = at(d_out.units, j)
                _gain_and_bias(at(dn, j), H, at(normal, j), H, rows, at(sums, H), sums, n, new)
                if cell.peephole:
                    gates, before = at(buffers.gates, base * slots * H + j), at(buffers.before, base * H + j)
                    _peepholes(cell, at(du, j), gates, before, rows, at(sums, 2 * H), n, new)
        meet(barrier, parties)

        r0, r1 = portion(rows, me, parties)
        for r in range(r0, r1):
            k = base + r
            normalise_backward(at(du, r * M), gain_ih, at(u, r * M), 1.0 * buffers.scales[3 * k], M, scratch)
        target, left = Panels(at(d_out.x, (base + r0) * I), W, I), Left(at(du, r0 * M), M, 1, 1, 0)
        product(multiply, 0, PI, W, I, r1 - r0, nothing, target, left, w_ih, M)
        meet(barrier, parties)

        xs, hs = Panels(at(buffers.xs, base * W), N * W, W), Panels(at(buffers.hs, base * W), N * W, W)
        _weight_gradient(du, rows, M, I, xs, at(d_out.w_ih, 0), nothing, new, me, parties, multiply)
        _weight_gradient(dv, rows, M, P, hs, at(d_out.w_hh, 0), nothing, new, me, parties, multiply)
        if projected:
            ms = Panels(at(buffers.ms, base * W), N * W, W)
            _weight_gradient(dp, rows, P, H, ms, at(d_out.w_hr, 0), nothing, new, me, parties, multiply)
        meet(barrier, parties)


@kernel
def lstm_forward(cells, *arguments):
    """As `forward`, s being c."""
    mode = flush_denormals()
    forward(cells[0], lstm_advance, 4, *arguments)
    restore_mode(mode)


@kernel
def lstm_backward(cells, *arguments):
    """As `backward`, s being c."""
    mode = flush_denormals()
    backward(cells[0], lstm_retreat, 4, *arguments)
    restore_mode(mode)


@kernel
def gru_forward(cells, *arguments):
    """As `forward`, s being h."""
    mode = flush_denormals()
    forward(cells[0], gru_advance, 3, *arguments)
    restore_mode(mode)


@kernel
def gru_backward(cells, *arguments):
    """As `backward`; the gradient by h is all in that by h_0, and s_0 is neither read nor written."""
    mode = flush_denormals()
    backward(cells[0], gru_retreat, 3, *arguments)
    restore_mode(mode)
