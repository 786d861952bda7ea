"""The vanilla RNN's step, h = f(W_ih x + b_ih + W_hh h' + b_hh).

`recurrent` and `bptt` have the loops, `cell` describes the buffers.

f is one of `TANH`, `RELU` and `IDENTITY`, as ``cell.kind`` says, or any function (`kernels_of`).
"""

from collections import namedtuple
from functools import lru_cache

from . import bptt, recurrent
from .activations import tanh
from .compiler import part, renamed, specialise
from .denormals import flush_denormals, heed_denormals
from .gemm import load, store, zeros
from .vector import lanes, map_lanes, where_negative

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
step_of_arrays = specialise(recurrent.step_of_arrays, __name__, "step_of_arrays", cell_step=step)


# In the templates below these are the user's.
f = df = None


# They run as anywhere else: for nothing but units that exist, and, also where they raise, in the thread's own mode.
def _advance_of(cell, extra, u, a, s, save):
    heed_denormals()
    h = map_lanes(f, load(a, lanes(a)), cell.H - u * lanes(a))
    flush_denormals()
    if save:
        store(h, a, lanes(a))
    return h, s


def _retreat_of(cell, extra, u, a, d, s, dh, ds, n):
    heed_denormals()
    slopes = map_lanes(df, load(a, lanes(a)), n)
    flush_denormals()
    store(dh * slopes, d, n)
    return zeros(a), ds


Kernels = namedtuple("Kernels", "forward backward step step_of_arrays")


@lru_cache(64)
def kernels_of(f, df):
    """The kernels for any f, and df in terms of f's value: functions of a number that Numba compiles."""
    own = {"advance": part(renamed(_advance_of, __name__, "advance_of", f=f)), "reset": None}
    back = {"retreat": part(renamed(_retreat_of, __name__, "retreat_of", df=df)), "reset_backward": None}
    step = specialise(recurrent.step, __name__, "step_of", cache=False, forceinline=True, **own)
    return Kernels(
        specialise(recurrent.forward, __name__, "forward_of", cache=False, **own),
        specialise(bptt.backward, __name__, "backward_of", cache=False, peephole_sums=None, **back),
        step,
        specialise(recurrent.step_of_arrays, __name__, "step_of_arrays_of", cache=False, cell_step=step),
    )
