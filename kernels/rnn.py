"""The vanilla RNN's step, h = f(W_ih x + b_ih + W_hh h' + b_hh).

`recurrent` and `bptt` have the loops, `cell` describes the buffers.

f is one of `TANH`, `RELU` and `IDENTITY`, as ``cell.kind`` says. The kernels named ``*_of`` take ``cells`` as a tuple
of a `Cell`, whose kind is ``(OTHER, f, df)``: functions of a number that Numba has compiled, df taking f's value.
"""

from . import bptt, recurrent
from .activations import tanh
from .compiler import part, specialise
from .gemm import load, store, zeros
from .tile import lanes, map_lanes, where_negative

# (A tuple that began with a function would be another thing to Numba.)
TANH, RELU, IDENTITY, OTHER = range(4)


@part
def advance(cell, extra, u, a, s, save):
    h = load(a, lanes(a))
    if cell.kind == TANH:
        h = tanh(h)
    elif cell.kind == RELU:
        h = where_negative(h, zeros(a), h)
    if save:
        store(h, a, lanes(a))
    return h, s


@part
def retreat(cell, extra, u, a, d, s, dh, ds, n):
    h = load(a, lanes(a))
    if cell.kind == TANH:
        dh = dh * (1.0 - h * h)
    elif cell.kind == RELU:
        dh = where_negative(h * -1.0, dh, h * 0.0)
    store(dh, d, n)
    return zeros(a), ds


forward = specialise(recurrent.forward, __name__, "forward", advance=advance, reset=None)
backward = specialise(bptt.backward, __name__, "backward", retreat=retreat, reset_backward=None, peephole_sums=None)
step = specialise(recurrent.step, __name__, "step", forceinline=True, advance=advance, reset=None)


@part
def advance_of(cell, extra, u, a, s, save):
    h = map_lanes(cell.kind[1], load(a, lanes(a)))
    if save:
        store(h, a, lanes(a))
    return h, s


@part
def retreat_of(cell, extra, u, a, d, s, dh, ds, n):
    store(dh * map_lanes(cell.kind[2], load(a, lanes(a))), d, n)
    return zeros(a), ds


forward_of = specialise(recurrent.forward, __name__, "forward_of", cache=False, advance=advance_of, reset=None)
backward_of = specialise(
    bptt.backward, __name__, "backward_of", cache=False, retreat=retreat_of, reset_backward=None, peephole_sums=None
)
step_of = specialise(recurrent.step, __name__, "step_of", cache=False, forceinline=True, advance=advance_of, reset=None)
