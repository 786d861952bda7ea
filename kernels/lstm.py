"""The LSTM's gate math; `recurrent` and `bptt` have the loops, `cell` describes the buffers.

    i, f, o = sigmoid(...),  g = tanh(...)      each of W_i* x + b_i* + W_h* h' + b_h*
    c = f * c' + i * g
    h = o * tanh(c)

Options: peepholes add w_ci * c', w_cf * c' and w_co * c to the sums of i, f and o; ``cell.clip`` cuts all sums to
[-clip, clip]; coupled, i = 1 - f. Slots: i, f, g, o.
"""

from . import bptt, recurrent
from .activations import sigmoid, tanh
from .compiler import part, specialise
from .gemm import load, store, zeros
from .vector import at, at_least, fma, lanes, where_negative


@part
def advance(cell, extra, u, a, c, save):
    L = lanes(a)
    i, f = sigmoid(load(a, L)), sigmoid(load(at(a, L), L))
    g, o = tanh(load(at(a, 2 * L), L)), sigmoid(load(at(a, 3 * L), L))
    if save:
        store(i, a, L)
        store(f, at(a, L), L)
        store(g, at(a, 2 * L), L)
        store(o, at(a, 3 * L), L)
    c = f * c + i * g
    return o * tanh(c), c


@part
def retreat(cell, extra, u, a, d, c_before, dh, dc, n):
    L = lanes(a)
    i, f, g, o = load(a, L), load(at(a, L), L), load(at(a, 2 * L), L), load(at(a, 3 * L), L)
    tanh_c = tanh(f * c_before + i * g)
    dc = dc + dh * o * (1.0 - tanh_c * tanh_c)
    store(dc * g * i * (1.0 - i), d, n)
    store(dc * c_before * f * (1.0 - f), at(d, L), n)
    store(dc * i * (1.0 - g * g), at(d, 2 * L), n)
    store(dh * tanh_c * o * (1.0 - o), at(d, 3 * L), n)
    return zeros(a), dc * f


forward = specialise(recurrent.forward, __name__, "forward", advance=advance, reset=None)
backward = specialise(bptt.backward, __name__, "backward", retreat=retreat, reset_backward=None, peephole_sums=None)
step = specialise(recurrent.step, __name__, "step", forceinline=True, advance=advance, reset=None)
step_of_arrays = specialise(recurrent.step_of_arrays, __name__, "step_of_arrays", cell_step=step)


@part
def _peephole(cell, extra, k, u):
    L = lanes(extra)
    return load(at(extra, (k * ((cell.H + L - 1) // L) + u) * L), L)


@part
def clipped(cell, a):
    return at_least(at_least(a, -cell.clip) * -1.0, -cell.clip) * -1.0


@part
def not_clipped(cell, activation, gate):
    """1 where a gate's sum lay within its bounds, else 0."""
    zero = gate * 0.0
    high, low = activation(zero + cell.clip), activation(zero - cell.clip)
    return where_negative(low - gate, where_negative(gate - high, zero + 1.0, zero), zero)


@part
def advance_with_options(cell, extra, u, a, c, save):
    L = lanes(a)
    a_f, a_g, a_o = load(at(a, L), L), load(at(a, 2 * L), L), load(at(a, 3 * L), L)
    a_i = a_f if cell.coupled else load(a, L)
    if cell.peephole:
        a_i, a_f = fma(_peephole(cell, extra, 0, u), c, a_i), fma(_peephole(cell, extra, 1, u), c, a_f)
    if cell.clip > 0:
        a_i, a_f, a_g = clipped(cell, a_i), clipped(cell, a_f), clipped(cell, a_g)
    f, g = sigmoid(a_f), tanh(a_g)
    i = 1.0 - f if cell.coupled else sigmoid(a_i)
    c = f * c + i * g
    if cell.peephole:
        a_o = fma(_peephole(cell, extra, 2, u), c, a_o)
    if cell.clip > 0:
        a_o = clipped(cell, a_o)
    o = sigmoid(a_o)
    if save:
        store(i, a, L)
        store(f, at(a, L), L)
        store(g, at(a, 2 * L), L)
        store(o, at(a, 3 * L), L)
    return o * tanh(c), c


@part
def retreat_with_options(cell, extra, u, a, d, c_before, dh, dc, n):
    L = lanes(a)
    i, f, g, o = load(a, L), load(at(a, L), L), load(at(a, 2 * L), L), load(at(a, 3 * L), L)
    c = f * c_before + i * g
    tanh_c = tanh(c)
    da_o = dh * tanh_c * o * (1.0 - o)
    if cell.clip > 0:
        da_o = da_o * not_clipped(cell, sigmoid, o)
    dc = dc + dh * o * (1.0 - tanh_c * tanh_c)
    if cell.peephole:
        dc = fma(da_o, _peephole(cell, extra, 2, u), dc)
    di, df = dc * g, dc * c_before
    if cell.coupled:
        df = df - di
    da_i = di * i * (1.0 - i)
    da_f = df * f * (1.0 - f)
    da_g = dc * i * (1.0 - g * g)
    if cell.clip > 0:
        da_i, da_f = da_i * not_clipped(cell, sigmoid, i), da_f * not_clipped(cell, sigmoid, f)
        da_g = da_g * not_clipped(cell, tanh, g)
    dc_before = dc * f
    if cell.peephole:
        dc_before = fma(da_f, _peephole(cell, extra, 1, u), dc_before)
        if not cell.coupled:
            dc_before = fma(da_i, _peephole(cell, extra, 0, u), dc_before)
    store(da_i, d, n)
    store(da_f, at(d, L), n)
    store(da_g, at(d, 2 * L), n)
    store(da_o, at(d, 3 * L), n)
    return zeros(a), dc_before


@part
def peephole_sums(a, d, c_before):
    """What one row adds to the gradients by the peepholes of i, f and o."""
    L = lanes(a)
    c = load(at(a, L), L) * c_before + load(a, L) * load(at(a, 2 * L), L)
    return load(d, L) * c_before, load(at(d, L), L) * c_before, load(at(d, 3 * L), L) * c


forward_with_options = specialise(
    recurrent.forward, __name__, "forward_with_options", advance=advance_with_options, reset=None
)
backward_with_options = specialise(
    bptt.backward,
    __name__,
    "backward_with_options",
    retreat=retreat_with_options,
    reset_backward=None,
    peephole_sums=peephole_sums,
)
step_with_options = specialise(
    recurrent.step, __name__, "step_with_options", forceinline=True, advance=advance_with_options, reset=None
)
step_of_arrays_with_options = specialise(
    recurrent.step_of_arrays, __name__, "step_of_arrays_with_options", cell_step=step_with_options
)
