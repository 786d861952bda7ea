"""The GRU's gate math in both forms; `recurrent` and `bptt` have the loops, `cell` describes the buffers.

    r, z = sigmoid(...)                                 each of W_i* x + b_i* + W_h* h' + b_h*
    n = tanh(W_in x + b_in + r * (W_hn h' + b_hn))      reset after the product, or
    n = tanh(W_in x + b_in + W_hn (r * h') + b_hn)      reset before it
    h = (1 - z) * n + z * h'

Slots: n, r, z and, if the reset comes after it, the product W_hn h' + b_hn.
"""

from . import bptt, recurrent
from .activations import sigmoid, tanh
from .compiler import kernel, part
from .gemm import load, store
from .tile import at, lanes


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


@kernel
def forward(cells, *arguments):
    """As `recurrent.forward`, s being h."""
    recurrent.forward(cells[0], advance, None, *arguments)


@kernel
def backward(cells, *arguments):
    """As `bptt.backward`, s being h."""
    bptt.backward(cells[0], retreat, None, None, *arguments)


@kernel(forceinline=True)
def step(packed, state, x):
    """As `recurrent.step`, s being h."""
    recurrent.step(advance, None, packed, state, x)


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


@kernel
def forward_reset_before(cells, *arguments):
    """As `recurrent.forward`, s being h."""
    recurrent.forward(cells[0], advance_reset_before, reset, *arguments)


@kernel
def backward_reset_before(cells, *arguments):
    """As `bptt.backward`, s being h."""
    bptt.backward(cells[0], retreat_reset_before, reset_backward, None, *arguments)


@kernel(forceinline=True)
def step_reset_before(packed, state, x):
    """As `recurrent.step`, s being h."""
    recurrent.step(advance_reset_before, reset, packed, state, x)
