"""The loop over a sequence that all cells share, and one step of a stack. `cell` describes cells, buffers and sizes.

The input's share of the gates needs no recurrence: it is computed for a chunk of steps at once, in tall tiles.
"""

from collections import namedtuple

from .barrier import meet, portion
from .cell import geometry, in_panels, outputs_of, panels_of_gates, place
from .denormals import flush_denormals, restore_mode
from .gemm import Left, Panels, load, panels, product, product_of_row, store
from .tile import RIDER_ROWS, ROW_PANELS, VECS, row_and_tile_product
from .vector import at, larger, smaller

# In the templates below these are each cell's own: see `compiler.specialise`.
advance = reset = None
RIDER_VECS, rider_product = VECS, row_and_tile_product


def forward(
    cells,
    packed,
    x,
    h_0,
    s_0,
    y,
    s_n,
    buffer,
    buffer_parts,
    steps,
    chunks,
    most,
    masks,
    save,
    share,
    barrier,
    multiply,
):
    """``y, s_n``: the cell over a sequence, saving for `bptt.backward` if ``save``. y, s_n and buffer are written.

    cells: of which the first is this one. packed: the weights of all. buffer_parts (1): a record, `cell.BufferParts`.
    most: the rows of the largest chunk.
    """
    mode, cell, of_buffer = flush_denormals(), cells[0], buffer_parts[0]
    B, I, H, P = len(h_0), x.shape[1], cell.H, cell.P
    T, N = len(steps) - 1, len(x)
    of_packed, (b0, b1, u0, u1, me, parties) = cell.packed, share
    W, L, U, G, units = geometry(cell, at(x, 0))
    gates, s, ss, hm = at(buffer, of_buffer.gates), at(buffer, 0), at(buffer, of_buffer.ss), at(buffer, of_buffer.hm)
    m, xs = at(buffer, of_buffer.m), at(buffer, of_buffer.xs)
    hs, ms = at(buffer, of_buffer.hs), at(buffer, of_buffer.ms)
    x_wide, h_wide = cell.x.count * units, cell.h.count * units
    bias, extra, w_again = at(packed, of_packed.bias), at(packed, of_packed.extra), at(packed, of_packed.again)
    w_ih, w_hh = at(packed, of_packed.w_ih), at(packed, of_packed.w_hh)
    w_ih, w_hh = Panels(w_ih, I * x_wide, x_wide), Panels(w_hh, P * h_wide, h_wide)
    cut, VP = u1 - u0 < U, (P + L - 1) // L
    if masks is not None:
        masked, zoned, projected = masks.h.size > 0, masks.zone_h.size > 0, P != H
        zone_h_row, zone_s_row = P if len(masks.zone_h) > 1 else 0, H if len(masks.zone_s) > 1 else 0
        v0, v1 = outputs_of(cell, share, at(x, 0))
    g0, g1 = (u0, u1) if cell.spread == 1 else (u0 // VECS, (u1 + VECS - 1) // VECS)

    r0, r1 = portion(N if save else 0, me, parties)
    for r in range(r0, r1):
        for v in range(panels(I, xs) * VECS):
            store(load(at(x, r * I + v * L), I - v * L), in_panels(xs, N * W, v, N - 1 - r), L)
    r0, r1 = portion(B, me, parties)
    for b in range(r0, r1):
        for v in range(VP):
            here, n = b * P + v * L, P - v * L
            h = load(at(h_0, here), n)
            if masks is not None:
                if masked:
                    h = h * load(at(masks.h, here), n)
                    store(h, at(hm, here), n)
            if save and b < steps[1]:
                store(h, in_panels(hs, N * W, v, N - 1 - b), L)
    if cell.carries:
        for u in range(u0, u1):
            for b in range(b0, b1):
                store(load(at(s_0, b * H + u * L), H - u * L), at(s, (u * B + b) * L), L)
    if masks is not None:
        meet(barrier, parties)

    ahead = 0
    for q in range(len(chunks) - 1):
        first, last = chunks[q], chunks[q + 1]
        base, rows = steps[first], steps[last] - steps[first]
        # All rows of the chunk at once, or step by step if other parties have some of the batch.
        whole = b1 - b0 == B
        half = q % 2 * most if B == 1 else 0 if whole else me * most
        chunk_gates, slab = at(gates, (base if save else half) * G * W), rows * W
        for g in range(g0, g1):
            for t in range(first, first + 1 if whole else last):
                r0 = steps[t] + b0 + ahead
                r1 = steps[last] if whole else smaller(steps[t] + b1, steps[t + 1])
                start = Panels(at(bias, cell.x.slot * L), W, 0)
                target = Panels(at(chunk_gates, (r0 - base) * W + cell.x.slot * L), slab, W)
                left = Left(at(x, r0 * I), I, 1, 1, 0)
                product(multiply, g, g + 1, x_wide, U * L * cell.x.count, r1 - r0, start, target, left, w_ih, I)
                for slot in range(cell.x.slot + cell.x.count, cell.slots):
                    for r in range(r0 - ahead - base, r1 - base):
                        store(load(at(bias, g * W + slot * L), L), at(chunk_gates, g * slab + r * W + slot * L), L)

        # A single sequence waits for W_hh to be read. Meanwhile, tile by tile, it does part of the next chunk's input.
        rider, riders, next_slab, ahead = 0, 0, 0, 0
        next_gates, next_x, vecs = chunk_gates, at(x, 0), x_wide // L
        tiles = (g1 - g0) * vecs
        if B == 1 and last < T and x_wide == h_wide and vecs == RIDER_VECS:
            next_n = chunks[q + 2] - last
            next_gates = at(gates, (last if save else most - half) * G * W)
            next_x, next_slab = at(x, last * I), next_n * W
            blocks = smaller(next_n // RIDER_ROWS, rows * ((g1 - g0) // ROW_PANELS) // larger(1, tiles))
            riders, ahead = blocks * tiles, blocks * RIDER_ROWS

        for t in range(first, last):
            row = steps[t]
            r0, r1 = b0, smaller(b1, steps[t + 1] - row)
            n_next = steps[t + 2] - steps[t + 1] if t + 1 < T else 0
            mirror, mirror_next = N - 1 - row, N - 1 - steps[t + 1]  # rows, the last one first
            h_before = at(h_0, 0) if t == 0 else at(y, steps[t - 1] * P)
            h = h_before
            if masks is not None:
                h = at(hm, t % 2 * B * P) if masked else h_before
            g_t = at(chunk_gates, (row - base) * W)
            target = Panels(at(g_t, r0 * W + cell.h.slot * L), slab, W)
            left = Left(at(h, r0 * P), P, 1, 1, 0)
            if reset is not None:
                product(multiply, g0, g1, h_wide, U * L * cell.h.count, r1 - r0, target, target, left, w_hh, P)
                for u in range(u0, u1):
                    for b in range(r0, r1):
                        rh = reset(place(cell, g_t, slab, u, b), load(at(h, b * H + u * L), H - u * L))
                        store(rh, at(m, b * H + u * L), H - u * L)
                        if save:
                            store(rh, in_panels(ms, N * W, u, mirror - b), L)
                if cut:
                    meet(barrier, parties)
                target = Panels(at(g_t, r0 * W + cell.again.slot * L), slab, W)
                left = Left(at(m, r0 * H), H, 1, 1, 0)
            # Every other step goes backwards: the weights read last are still in the nearest cache, and read first.
            stride = ROW_PANELS if r1 - r0 == 1 else 1
            for v in range(g0, g1 if r0 < r1 else g0, stride):
                lo = v if t % 2 == 0 else larger(g0, g1 - stride - (v - g0))
                hi = smaller(v + stride, g1) if t % 2 == 0 else g1 - (v - g0)
                if reset is not None:
                    again = Panels(w_again, H * units, units)
                    product(multiply, lo, hi, units, U * L, r1 - r0, target, target, left, again, H)
                elif rider < riders and hi - lo == ROW_PANELS:
                    g, j, r = g0 + rider // vecs % (g1 - g0), rider % vecs * L, rider // tiles * RIDER_ROWS
                    slot = g * W + cell.x.slot * L + j
                    rider_product(
                        at(g_t, lo * slab + cell.h.slot * L), slab, h, at(w_hh.address, lo * w_hh.panel),
                        w_hh.panel, w_hh.row, P, at(bias, slot), at(next_gates, slot + g * (next_slab - W) + r * W), W,
                        at(next_x, r * I), I, at(w_ih.address, g * w_ih.panel + j), I,
                    )  # fmt: skip
                    rider += 1
                else:
                    product(multiply, lo, hi, h_wide, U * L * cell.h.count, r1 - r0, target, target, left, w_hh, P)
                for u in range(lo * cell.spread, smaller(hi * cell.spread, U)):
                    n = H - u * L
                    for b in range(r0, r1):
                        s_at = at(s, (u * B + b) * L)
                        s_before = load(s_at, L)
                        h_t, s_t = advance(cell, extra, u, place(cell, g_t, slab, u, b), s_before, save)
                        if masks is not None:
                            if zoned:
                                z = load(at(masks.zone_s, (row + b) * zone_s_row + u * L), n)
                                s_t = z * s_before + (1.0 - z) * s_t
                        if cell.carries:
                            store(s_t, s_at, L)
                            if save:
                                store(s_before, at(ss, (u * N + row + b) * L), L)
                        if masks is None:
                            store(h_t, at(y, (row + b) * H + u * L), n)
                            if save and b < n_next:
                                store(h_t, in_panels(hs, N * W, u, mirror_next - b), L)
                        else:
                            store(h_t, at(m, (B + b) * H + u * L), n)
                            if save and projected:
                                store(h_t, in_panels(ms, N * W, u, mirror - b), L)

            if masks is not None:
                if projected:
                    if cut:
                        meet(barrier, parties)
                    w_hr, left = Panels(w_again, H * W, W), Left(at(m, (B + r0) * H), H, 1, 1, 0)
                    start, target = Panels(at(packed, 0), 0, 0), Panels(at(y, (row + r0) * P), W, P)
                    product(multiply, v0 // VECS, -(-v1 // VECS), W, P, r1 - r0, start, target, left, w_hr, H)
                for v in range(v0, v1):
                    n = P - v * L
                    for b in range(r0, r1):
                        y_at = at(y, (row + b) * P + v * L)
                        h_t = load(y_at if projected else at(m, (B + b) * H + v * L), n)
                        if zoned:
                            z = load(at(masks.zone_h, (row + b) * zone_h_row + v * L), n)
                            h_t = z * load(at(h_before, b * P + v * L), n) + (1.0 - z) * h_t
                        store(h_t, y_at, n)
                        if masked:
                            h_t = h_t * load(at(masks.h, b * P + v * L), n)
                            store(h_t, at(hm, ((t + 1) % 2 * B + b) * P + v * L), n)
                        if save and b < n_next:
                            store(h_t, in_panels(hs, N * W, v, mirror_next - b), L)
            if cut:
                meet(barrier, parties)

    if cell.carries:
        for u in range(u0, u1):
            for b in range(b0, b1):
                store(load(at(s, (u * B + b) * L), L), at(s_n, b * H + u * L), H - u * L)
    meet(barrier, parties)
    restore_mode(mode)


# For `step`: what a stack of layers of one direction, one cell, is, and its state. Arrays but for ``multiply``.
#   cells (num_layers)               the cell, as a `RECORD` for each layer
#   weights                          of all of them
#   h (num_layers, B, P), s (num_layers, B, H)    of a cell without a state of its own s is h
#   work (`step_size`)               workspace
Packed = namedtuple("Packed", "cells weights multiply")
State = namedtuple("State", "h s work")


def step_size(cell, B, W, L):
    """The size of the workspace for `step`: gates (G, B, W) and m (B, H)."""
    return panels_of_gates(cell, L)[1] * B * W + B * cell.H


def step(packed, state, x):
    """One step of a stack of layers for a batch. x (B, I) is read, and of ``state`` all is written.

    The output is the last layer's h, ``state.h[-1]``.
    """
    mode, (B, I), cell = flush_denormals(), x.shape, packed.cells[0]
    H, P, multiply = cell.H, cell.P, packed.multiply
    W, L, U, G, units = geometry(cell, at(x, 0))
    gates, m = at(state.work, 0), at(state.work, G * B * W)
    x_wide, h_wide = cell.x.count * units, cell.h.count * units
    x_k = at(x, 0)
    for k in range(len(packed.cells)):
        weights, parts, h, s = packed.weights, packed.cells[k].packed, at(state.h, k * B * P), at(state.s, k * B * H)
        bias, extra, again = at(weights, parts.bias), at(weights, parts.extra), at(weights, parts.again)
        w_ih, w_hh = at(weights, parts.w_ih), at(weights, parts.w_hh)
        w_ih, w_hh = Panels(w_ih, I * x_wide, x_wide), Panels(w_hh, P * h_wide, h_wide)
        start, target = Panels(at(bias, cell.x.slot * L), W, 0), Panels(at(gates, cell.x.slot * L), B * W, W)
        target_h = Panels(at(gates, cell.h.slot * L), B * W, W)
        if B == 1:
            product_of_row(0, G, x_wide, U * L * cell.x.count, start, target, x_k, w_ih, I)
            for slot in range(cell.x.slot + cell.x.count, cell.slots):
                for g in range(G):
                    store(load(at(bias, g * W + slot * L), L), at(gates, g * W + slot * L), L)
            product_of_row(0, G, h_wide, U * L * cell.h.count, target_h, target_h, h, w_hh, P)
        else:
            product(multiply, 0, G, x_wide, U * L * cell.x.count, B, start, target, Left(x_k, I, 1, 1, 0), w_ih, I)
            for slot in range(cell.x.slot + cell.x.count, cell.slots):
                for i in range(G * B):
                    store(load(at(bias, i // B * W + slot * L), L), at(gates, i * W + slot * L), L)
            from_h = Left(h, P, 1, 1, 0)
            product(multiply, 0, G, h_wide, U * L * cell.h.count, B, target_h, target_h, from_h, w_hh, P)
        if reset is not None:
            for u in range(U):
                for b in range(B):
                    n, here = H - u * L, b * H + u * L
                    store(reset(place(cell, gates, B * W, u, b), load(at(h, here), n)), at(m, here), n)
            w_again, target = Panels(again, H * units, units), Panels(at(gates, 0), B * W, W)
            product(multiply, 0, G, units, U * L, B, target, target, Left(m, H, 1, 1, 0), w_again, H)
        h_new = h if P == H else m
        for u in range(U):
            n = H - u * L
            for b in range(B):
                here = b * H + u * L
                h_t, s_t = advance(cell, extra, u, place(cell, gates, B * W, u, b), load(at(s, here), n), False)
                store(s_t, at(s, here), n)
                store(h_t, at(h_new, here), n)
        if P != H:
            w_hr, nothing = Panels(again, H * W, W), Panels(at(weights, parts.zeros), 0, 0)
            PP = panels(P, again)
            product(multiply, 0, PP, W, P, B, nothing, Panels(h, W, P), Left(m, H, 1, 1, 0), w_hr, H)
        x_k, I = h, P
    restore_mode(mode)


# In the template below it is a cell's.
cell_step = None


def step_of_arrays(cells, weights, multiply, h, s, work, x):
    """`step` for Python, which hands over arrays in less time than named tuples of them."""
    cell_step(Packed(cells, weights, multiply), State(h, s, work), x)
