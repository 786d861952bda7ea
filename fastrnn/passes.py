"""The forward and the backward pass of a layer over rows: of all its layers and directions, and of one.

States are tuples of arrays (num_layers * directions, B, features), or lists of a direction's, (B, features).
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from . import batching, layer_norm, memory, packing
from .batching import Sequences
from .checks import as_kernel_array
from .kernels.tile import ROW_PANELS, VECS
from .kernels.vector import LANES_OF
from .masks import Masks, kernel_masks, no_masks
from .packing import Key, Packs, Sums
from .parameters import Array

if TYPE_CHECKING:
    from .recurrent import Recurrent

# What each direction's backward pass reads of its forward pass.
Tape = dict[Key, Any]

# Rows whose input projections are computed at once: enough for tall tiles, few enough that the gates are still in a
# cache when the recurrence adds to them. A W_ih that is not is read anew for every chunk: more rows share a large one.
ROWS_FORWARD, MOST_ROWS_FORWARD = 192, 640
BYTES_FOR_A_ROW = 24_000
# The same for a single sequence: so many steps give time for one row of rider tiles.
ROWS_FORWARD_ALONE = ROW_PANELS * VECS + 1
# Rows over which the gates' derivatives are gathered before the weights' gradients take them up.
ROWS_BACKWARD = 512


def run(
    layer: "Recurrent",
    x: Array,
    before: tuple[Array, ...],
    sequences: Sequences,
    masks: Masks,
    packs: Packs,
    tape: Tape | None = None,
    checkpoint: int | None = None,
) -> tuple[Array, tuple[Array, ...], Any]:
    """Run all layers over rows x (N, I). Returns y, the state after it, and if there is a tape the backward pass.

    That takes dy, the gradient by the state after it, the sums of gradients by weights, to which it adds its own,
    and the tape, as it is now; it returns dx and the gradient by the state before it.
    """
    P, D = layer.cell.P, layer.directions
    ordered = sequences.lengths is not None
    before = tuple([sequences.sorted(s) for s in before]) if ordered else before
    after = tuple([np.empty_like(s) for s in before])
    run_one: Any = partial(run_direction, layer)
    if checkpoint is not None and sequences.N > 0:
        run_one = partial(run_stretches, layer, checkpoint)
    backwards = {}
    for k in range(layer.num_layers):
        if ("dropout", k) in masks:
            x = x * masks[("dropout", k)]
        ys = []
        for d in range(D):
            states = [s[k * D + d] for s in before], [s[k * D + d] for s in after]
            x_d, y = sequences.reversed(x) if d else x, np.empty((sequences.N, P), layer.dtype)
            backwards[k, d] = run_one((k, d), x_d, y, *states, sequences, masks, packs[k, d], tape)
            ys.append(sequences.reversed(y) if d else y)
        x = ys[0] if D == 1 else np.concatenate(ys, 1)

    def backward(dy: Array, d_after: tuple[Array, ...], sums: Sums, tape: Tape) -> tuple[Array, tuple[Array, ...]]:
        d_after = tuple([sequences.sorted(s) for s in d_after])
        d_before = tuple([np.empty_like(s) for s in d_after])
        for k in reversed(range(layer.num_layers)):
            dxs = []
            for d in range(D):
                states = [s[k * D + d] for s in d_after], [s[k * D + d] for s in d_before]
                dy_d = dy if D == 1 else np.ascontiguousarray(dy[:, d * P : (d + 1) * P])
                dx = backwards[k, d](sequences.reversed(dy_d) if d else dy_d, *states, sums, tape)
                dxs.append(sequences.reversed(dx) if d else dx)
            dy = dxs[0] if D == 1 else dxs[0] + dxs[1]
            if ("dropout", k) in masks:
                dy = dy * masks[("dropout", k)]
        return dy, tuple([sequences.unsorted(s) for s in d_before])

    return x, tuple([sequences.unsorted(s) for s in after]) if ordered else after, backward


def run_direction(
    layer: "Recurrent",
    key: Key,
    x: Array,
    y: Array,
    before: list[Array],
    after: list[Array],
    sequences: Sequences,
    masks: Masks,
    packs: tuple[Any, Any],
    tape: Tape | None,
) -> Any:
    """Run one direction of a layer. Writes ``y, after``. Returns the backward pass, if there is a tape.

    States are in the rows' order of sequences.
    """
    cell, dtype, functions, (N, I), B = layer.cell, layer.dtype, layer.kernels, x.shape, sequences.B
    if N == 0:
        for state, s_0 in zip(after, before):
            state[...] = s_0
        return partial(_backward_of_nothing, layer, key, I)
    if layer.layer_norm:
        return layer_norm.run_direction(layer, key, x, y, before, after, sequences, masks, packs, tape)
    size = cell.gates * cell.H * I * dtype.itemsize
    rows = max(ROWS_FORWARD, min(size // BYTES_FOR_A_ROW, MOST_ROWS_FORWARD)) if B > 1 else ROWS_FORWARD_ALONE
    steps, chunks = sequences.steps, sequences.chunks(rows)
    work, save = N * cell.gates * cell.H * (I + cell.P), tape is not None
    parties = batching.parties_for(work, B, cell.H, dtype)
    most = sequences.largest(chunks)
    L, multiply = LANES_OF[dtype], layer.multiply
    parts, size = packing.buffer_layout(cell, N, B, I, most, VECS * L, L, save, parties)
    buffer = memory.empty(size, dtype)
    mask_arrays = kernel_masks(masks, key, dtype)
    if mask_arrays is None and cell.P != cell.H:
        mask_arrays = no_masks(dtype)
    h_0, s_0, s_n = before[0], before[-1], after[-1]

    def call(me: int, parties: int, barrier: Array) -> None:
        functions.forward(
            *packs[0], x, h_0, s_0, y, s_n, buffer, parts, steps, chunks, most, mask_arrays, save,
            sequences.share(me, parties, cell.H, dtype, cell.spread), barrier, multiply,
        )  # fmt: skip

    batching.together(parties, call)
    after[0][...] = sequences.last(y, h_0)
    if tape is None:
        return None
    tape[key] = buffer

    def backward(dy: Array, d_after: list[Array], d_before: list[Array], sums: Sums, tape: Tape) -> Array:
        backs = sequences.chunks(ROWS_BACKWARD)
        parties = batching.parties_for(2 * work, B, cell.H, dtype)
        # Two buffers, so that one is filled while another thread still reads the other.
        buffers, most, fresh = min(parties, 2), sequences.largest(backs), key not in sums
        work_parts, size = packing.work_layout(cell, B, most, buffers, VECS * L, L)
        space = memory.empty(size, dtype)
        out = layer._packing.gradients(layer, sums, key, N, I, d_before)
        dh_n, ds_n = d_after[0], d_after[-1] if layer.STATES == 2 else out.s_0

        def call(me: int, parties: int, barrier: Array) -> None:
            functions.backward(
                *packs[1], dy, dh_n, ds_n, tape[key], parts, out, space, work_parts, buffers, steps, chunks, backs,
                most, mask_arrays, fresh, sequences.share(me, parties, cell.H, dtype), barrier, multiply,
            )  # fmt: skip

        batching.together(parties, call)
        return out.x

    return backward


def run_stretches(
    layer: "Recurrent",
    checkpoint: int,
    key: Key,
    x: Array,
    y: Array,
    before: list[Array],
    after: list[Array],
    sequences: Sequences,
    masks: Masks,
    packs: tuple[Any, Any],
    tape: Tape | None,
) -> Any:
    """As `run_direction`, over at least one row, of so many steps at a time.

    They are run again when the backward pass comes to them.
    """
    state, stretches = before, []
    for part, first, last in sequences.stretches(checkpoint):
        part_masks = {
            name: m[first:last] if len(m) == sequences.N and name[0] != "recurrent" else m for name, m in masks.items()
        }
        stretches.append((first, last, state, part, part_masks))
        state = [np.empty_like(s) for s in state]
        run_direction(layer, key, x[first:last], y[first:last], stretches[-1][2], state, part, part_masks, packs, None)
    for s_n, s in zip(after, state):
        s_n[...] = s

    def backward(dy: Array, d_after: list[Array], d_before: list[Array], sums: Sums, _: Tape) -> Array:
        dx, d_state = np.empty_like(x), d_after
        for first, last, state, part, part_masks in reversed(stretches):
            tape: Tape = {}
            y_again, after_again = np.empty_like(y[first:last]), [np.empty_like(s) for s in state]
            again = run_direction(layer, key, x[first:last], y_again, state, after_again, part, part_masks, packs, tape)
            d_next, d_state = d_state, [np.empty_like(s) for s in d_state]
            dx[first:last] = again(
                as_kernel_array(dy[first:last], "dy", dy.dtype, (None, None)), d_next, d_state, sums, tape
            )
        for d_0, d in zip(d_before, d_state):
            d_0[...] = d
        return dx

    return backward


def _backward_of_nothing(
    layer: "Recurrent",
    key: Key,
    I: int,
    dy: Array,
    d_after: list[Array],
    d_before: list[Array],
    sums: Sums,
    _: Tape,
) -> Array:
    """The backward pass over no rows."""
    for d_state, d in zip(d_before, d_after):
        d_state[...] = d
    if key not in sums:
        for array in layer._packing.gradients(layer, sums, key, 0, I, d_before)[3:]:
            array[...] = 0
    return np.empty((0, I), layer.dtype)
