"""The vanilla RNN's step, h = f(W_ih x + b_ih + W_hh h' + b_hh).

`recurrent` and `bptt` have the loops, `cell` describes the buffers.

f is one of `TANH`, `RELU` and `IDENTITY`, as ``cell.kind`` says; or, for the kernels named ``*_of``, that of
``functions = (OTHER, f, df)``, functions of a number that Numba has compiled, df taking f's value.
"""

from . import bptt, recurrent
from .activations import tanh
from .cell import Cell
from .compiler import kernel, part
from .gemm import NOTHING, WHOLE, load, store, zeros
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


@kernel
def forward(cells, *arguments):
    """As `recurrent.forward`, without s."""
    recurrent.forward(cells[0], advance, None, *arguments)


@kernel
def backward(cells, *arguments):
    """As `bptt.backward`, without s."""
    bptt.backward(cells[0], retreat, None, None, *arguments)


@kernel(forceinline=True)
def step(packed, state, x):
    """As `recurrent.step`, without s."""
    recurrent.step(advance, None, packed, state, x)


@part
def _with(functions, cell):
    """The cell, its kind being functions."""
    return Cell(
        cell.H, cell.P, cell.gates, cell.slots, cell.spread, WHOLE, WHOLE, NOTHING,
        cell.carries, cell.peephole, cell.clip, cell.coupled, functions,
    )  # fmt: skip


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


@kernel(cache=False)
def forward_of(functions, cells, *arguments):
    """As `recurrent.forward`, without s."""
    recurrent.forward(_with(functions, cells[0]), advance_of, None, *arguments)


@kernel(cache=False)
def backward_of(functions, cells, *arguments):
    """As `bptt.backward`, without s."""
    bptt.backward(_with(functions, cells[0]), retreat_of, None, None, *arguments)


@kernel(cache=False, forceinline=True)
def step_of(functions, packed, state, x):
    """As `recurrent.step`, without s."""
    cells = (_with(functions, packed.cells[0]),)
    with_functions = recurrent.Packed(cells, packed.offsets, packed.weights, packed.multiply)
    recurrent.step(advance_of, None, with_functions, state, x)
