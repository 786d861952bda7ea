"""What a cell is, its weights and its buffers: the terms of the loops in `recurrent` and `bptt`.

A cell is a `Cell`, which says how its gates lie in memory, and its gate math, which it hands to the loops as functions
of one vector of units (`lstm`, `gru` and `rnn` each have theirs):

    advance(cell, extra, u, a, s, save) -> h, s
        one step of units u L to (u + 1) L of one sequence, whose gates' sums lie at ``a``, slot after slot; s is the
        state that a unit carries beside the product (the LSTM's c; the GRU's is h itself). If ``save``, the sums are
        replaced by what `retreat` needs.
    retreat(cell, extra, u, a, d, s, dh, ds, n) -> dh_before, ds_before
        its gradient, from that by the new h and s, and what `advance` left at ``a``. That by the sums of each gate, n
        of them, is written to ``d``; dh_before leaves out what reaches h through the sums.
    reset(a, h) -> r * h,  reset_backward(a, d, h, drh, n) -> dh_before
        of the GRU of 2014, whose candidate's sums take up W_hn (r * h): the other gates, and their gradient; of other
        cells None.

Sizes: T steps, N rows in all (a row is one step of one sequence), B sequences, I inputs, H units, P outputs (H, but
for an LSTM with a projection); ``L`` numbers are a vector, ``W = 4 L`` the width of a panel, ``U = ceil(H / L)``, ``G``
the panels of gates, ``PI, PH, PP`` the panels of I, H and P columns.

Sequences stand side by side, the longest first: step t has rows steps[t] to steps[t + 1], one for each sequence that
is as long. Buffers are C-contiguous arrays of one dtype; all belong to the caller, and nothing is allocated here.

    x (N, I), y (N, P)            the rows in and out
    h_0 (B, P), s_0, s_n (B, H)   states; h_n are the last rows of y
    steps int64 (T + 1)           where each step's rows begin, and N
    chunks, backs int64           the first step of each chunk of the forward and the backward pass, and T
    packed                        the weights, as `fastrnn.packing` makes them: `PackedParts` or `BackParts`
    buffer                        workspace, or what `forward` saves for `backward`: the parts below (`layout`)
      s (U, B, L)                 the running state s
      hm (2, B, P)                h times the recurrent mask, of every other step
      m (2, B, H)                 r * h; and h as it comes from `advance`, if something is yet to be done to it
      ss (U, N, L)                s before each row
      xs (PI, N W), hs (PP, N W)  x, and h as it went into the product, in panels, the last row first
      ms (PH, N W)                likewise r * h, or h before its projection
      gates (G N W)               chunk after chunk, each in panels (G, its rows, W); or only room for the largest
                                  chunk, for each party, and of a single sequence for two

Masks. ``masks.h`` (B, P), or empty, multiplies h before the recurrent product. ``masks.zone_h`` (N or 1, P) and
``zone_s`` (N or 1, H), or empty, say how much of the old state stays: h = z h' + (1 - z) h. With neither of them, nor a
projection, ``masks`` is None, and less is compiled.

Threads. ``share = (b0, b1, u0, u1, me, parties)`` is what a call does: rows b0 to b1 of the batch and units u0 L to
u1 L, as number ``me`` of ``parties`` calls that run at once and meet at ``barrier`` (`barrier.meet`). Shares cut either
the batch or the units, not both: backward at multiples of W, forward between any panels of gates. The bits do not
depend on the cut.

``multiply`` are `gemm.multiply_addresses` of the dtype.
"""

from collections import namedtuple
from itertools import accumulate

import numpy as np

from .barrier import portion
from .compiler import part
from .gemm import Window, panels
from .tile import VECS, width
from .vector import at, lanes, smaller

# gates: how many the weights have. slots: how many vectors a vector of units has in memory. spread: how many vectors
# of units share a panel: 1 or, if they have one slot each, `VECS`. x, h: the gates that W_ih and W_hh add to; again:
# that which W_hh adds to with r * h. carries: whether there is a state s. peephole, clip, coupled: the LSTM's options.
# kind: the RNN's nonlinearity.
Cell = namedtuple("Cell", "H P gates slots spread x h again carries peephole clip coupled kind")

Masks = namedtuple("Masks", "h zone_h zone_s")

# Where the parts of an array begin, one after another, and where the last one ends. Kernels are told, in records: the
# numbers take Python no time, and code that computes them would take long to compile.
#   PackedParts   of the weights for `recurrent`: zeros, bias, W_ih, W_hh, those of the second product, the peepholes
#   BackParts     of the weights for `bptt`
#   BufferParts   of the buffer
PackedParts = namedtuple("PackedParts", "zeros bias w_ih w_hh again extra end")
BackParts = namedtuple("BackParts", "zeros w_hh w_ih again extra end")
BufferParts = namedtuple("BufferParts", "s hm m ss xs hs ms gates end")


def record_of(kind):
    """The dtype of a record of integers, named as a named tuple's."""
    return np.dtype([(name, np.int64) for name in kind._fields])


# As kernels take a cell: an array of records, for Numba unpacks it faster than a tuple.
_FIELDS = {"x": record_of(Window), "h": record_of(Window), "again": record_of(Window), "clip": np.float64}
_PARTS = [("packed", record_of(PackedParts)), ("packed_back", record_of(BackParts))]
RECORD = np.dtype([(name, _FIELDS.get(name, np.int64)) for name in Cell._fields] + _PARTS)


def records(cell, inputs, W, L):
    """A `RECORD` for each of a layer's directions, of so many inputs. All their `PackedParts` are in one array."""
    records, end = [], 0
    for I in inputs:
        packed = PackedParts(*[end + place for place in packed_layout(cell, I, W, L)])
        records.append((*cell, packed, packed_back_layout(cell, I, W, L)))
        end = packed.end
    return np.array(records, RECORD)


def panels_of_gates(cell, L):
    """``U, G, units``: as `geometry` has them."""
    U = -(-cell.H // L)
    return U, -(-U // cell.spread), cell.spread * L


def packed_layout(cell, I, W, L):
    """The `PackedParts` of a direction with I inputs."""
    U, G, units = panels_of_gates(cell, L)
    sizes = [
        W,
        G * W,
        G * cell.x.count * units * I,
        G * cell.h.count * units * cell.P,
        G * cell.again.count * units * cell.H if cell.P == cell.H else -(-cell.P // W) * W * cell.H,
        3 * U * L if cell.peephole else 0,
    ]
    return PackedParts(*accumulate(sizes, initial=0))


def packed_back_layout(cell, I, W, L):
    """The `BackParts` of a direction with I inputs."""
    U, G, units = panels_of_gates(cell, L)
    PI, PH, PP = -(-I // W), -(-cell.H // W), -(-cell.P // W)
    sizes = [
        W,
        PP * W * G * cell.h.count * units,
        PI * W * G * cell.x.count * units,
        PH * W * G * cell.again.count * units if cell.P == cell.H else PH * W * PP * W,
        3 * U * L if cell.peephole else 0,
    ]
    return BackParts(*accumulate(sizes, initial=0))


def layout(cell, N, B, I, rows, W, L, save, parties):
    """The `BufferParts` for so many parties. rows: of the largest chunk."""
    U, G, _ = panels_of_gates(cell, L)
    PI, PH, PP = -(-I // W), -(-cell.H // W), -(-cell.P // W)
    saved = N * W if save else 0
    sizes = [
        U * B * L,
        -(-2 * B * cell.P // L) * L,
        -(-2 * B * cell.H // L) * L,
        U * N * L if save and cell.carries else 0,
        PI * saved,
        PP * saved,
        PH * saved if cell.P != cell.H or cell.again.count > 0 else 0,
        G * W * (N if save else parties * rows if B > 1 else 2 * rows),
    ]
    return BufferParts(*accumulate(sizes, initial=0))


@part
def geometry(cell, address):
    """``W, L, U, G, units``: units are those of a panel of gates."""
    W, L = width(address), lanes(address)
    U = (cell.H + L - 1) // L
    return W, L, U, U if cell.spread == 1 else (U + VECS - 1) // VECS, cell.spread * L


@part
def in_panels(base, slab, v, row):
    """The address of vector v of a row of a matrix in panels ``slab`` numbers apart."""
    W, L = width(base), lanes(base)
    return at(base, v // VECS * slab + row * W + v % VECS * L)


@part
def place(cell, base, slab, u, row):
    """The address of the first slot of vector u of units, in panels of gates ``slab`` apart."""
    return at(base, u * slab + row * width(base)) if cell.spread == 1 else in_panels(base, slab, u, row)


@part
def outputs_of(cell, share, address):
    """The vectors of y, of which there are as many as of units but where h is projected, that a share does."""
    _, _, u0, u1, me, parties = share
    _, L, U, _, _ = geometry(cell, address)
    if cell.P == cell.H:
        return u0, u1
    vectors = (cell.P + L - 1) // L
    if u1 - u0 == U:
        return 0, vectors
    PP = panels(cell.P, address)
    p0, p1 = portion(PP, me, parties)
    return smaller(vectors, p0 * VECS), smaller(vectors, p1 * VECS)
