"""The GRU's gate math in both forms; `recurrent` and `bptt` have the loops, `cell` describes the buffers.

    r, z = sigmoid(...)                                 each of W_i* x + b_i* + W_h* h' + b_h*
    n = tanh(W_in x + b_in + r * (W_hn h' + b_hn))      reset after the product, or
    n = tanh(W_in x + b_in + W_hn (r * h') + b_hn)      reset before it
    h = (1 - z) * n + z * h'

Slots: n, r, z and, if the reset comes after it, the product W_hn h' + b_hn.
"""

from . import bptt, recurrent
from .activations import sigmoid, tanh
from .compiler import part, specialise
from .gemm import load, store
from .tile import row_and_tile_product_of_three
from .vector import at, lanes


@part
def advance(cell, extra, u, a, h, save):
    L = lanes(a)
    r, z = sigmoid(load(at(a, L), L)), sigmoid(load(at(a, 2 * L), L))
    n = tanh(load(a, L) + r * load(at(a, 3 * L), L))
    if save:
        store(n, a, L)
        store(r, at(a, L), L)
        store(z, at(a, 2 * L), L)
    h = (1.0 - z) * n + z * h
    return h, h


@part
def retreat(cell, extra, u, a, d, h_before, dh, ds, count):
    L = lanes(a)
    n, r, z = load(a, L), load(at(a, L), L), load(at(a, 2 * L), L)
    da_n = dh * (1.0 - z) * (1.0 - n * n)
    store(da_n, d, count)
    store(da_n * load(at(a, 3 * L), L) * r * (1.0 - r), at(d, L), count)
    store(dh * (h_before - n) * z * (1.0 - z), at(d, 2 * L), count)
    store(da_n * r, at(d, 3 * L), count)
    return dh * z, ds


forward = specialise(
    recurrent.forward,
    __name__,
    "forward",
    advance=advance,
    reset=None,
    RIDER_VECS=3,
    rider_product=row_and_tile_product_of_three,
)
backward = specialise(bptt.backward, __name__, "backward", retreat=retreat, reset_backward=None, peephole_sums=None)
step = specialise(recurrent.step, __name__, "step", forceinline=True, advance=advance, reset=None)
step_of_arrays = specialise(recurrent.step_of_arrays, __name__, "step_of_arrays", cell_step=step)


@part
def reset(a, h):
    L = lanes(a)
    r = sigmoid(load(at(a, L), L))
    store(r, at(a, L), L)
    return r * h


@part
def reset_backward(a, d, h, drh, count):
    L = lanes(a)
    r = load(at(a, L), L)
    store(drh * h * r * (1.0 - r), at(d, L), count)
    return drh * r


@part
def advance_reset_before(cell, extra, u, a, h, save):
    L = lanes(a)
    z = sigmoid(load(at(a, 2 * L), L))
    n = tanh(load(a, L))
    if save:
        store(n, a, L)
        store(z, at(a, 2 * L), L)
    h = (1.0 - z) * n + z * h
    return h, h


@part
def retreat_reset_before(cell, extra, u, a, d, h_before, dh, ds, count):
    L = lanes(a)
    n, z = load(a, L), load(at(a, 2 * L), L)
    store(dh * (1.0 - z) * (1.0 - n * n), d, count)
    store(dh * (h_before - n) * z * (1.0 - z), at(d, 2 * L), count)
    return dh * z, ds


forward_reset_before = specialise(
    recurrent.forward, __name__, "forward_reset_before", advance=advance_reset_before, reset=reset
)
backward_reset_before = specialise(
    bptt.backward,
    __name__,
    "backward_reset_before",
    retreat=retreat_reset_before,
    reset_backward=reset_backward,
    peephole_sums=None,
)
step_reset_before = specialise(
    recurrent.step, __name__, "step_reset_before", forceinline=True, advance=advance_reset_before, reset=reset
)
step_of_arrays_reset_before = specialise(
    recurrent.step_of_arrays, __name__, "step_of_arrays_reset_before", cell_step=step_reset_before
)
