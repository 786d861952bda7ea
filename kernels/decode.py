"""Decoding with a language model: the loop over steps, with the model's layers, the choice of tokens, and the states.

`search` has what is chosen and by which method; sizes and names are those of its text, and `recurrent`'s.
"""

from . import gru, linear, lstm, rnn
from .barrier import meet
from .cell import geometry, place
from .compiler import kernel, part, specialise
from .denormals import flush_denormals, restore_mode
from .gemm import Left, Panels, copy_row, load, product, product_of_row, store
from .recurrent import Packed, State
from .search import METHODS, OPEN, some_open
from .tile import width
from .vector import at, smaller

# In the templates below these are a method and what a cell has.
choose = advance = first_layer = cell_step = None


@part
def _reorder(state, parents, s, row):
    """Row k of search s becomes what row ``parents[k]`` was. state: (num_layers, S K, features), row: (K, features)."""
    K, D = len(parents), state.shape[2]
    moved = False
    for k in range(K):
        moved |= parents[k] != k
    for layer in range(len(state) if moved else 0):
        for k in range(K):
            if parents[k] != k:
                for j in range(D):
                    row[k, j] = state[layer, s * K + parents[k], j]
        for k in range(K):
            if parents[k] != k:
                for j in range(D):
                    state[layer, s * K + k, j] = row[k, j]


@part
def _input_gates(packed, x, M, I, target):
    """The first layer's gates but for what h adds: M rows of `Panels`, written. x: address of (M, I)."""
    cell, parts = packed.cells[0], packed.cells[0].packed
    W, L, U, G, units = geometry(cell, x)
    first, wide = cell.x.slot * L, cell.x.count * units
    bias, w_ih = at(packed.weights, parts.bias), Panels(at(packed.weights, parts.w_ih), I * wide, wide)
    start = Panels(at(bias, first), W, 0)
    gates = Panels(at(target.address, first), target.panel, target.row)
    product(packed.multiply, 0, G, wide, U * L * cell.x.count, M, start, gates, Left(x, I, 1, 1, 0), w_ih, I)
    for j in range(first + cell.x.count * L, cell.slots * L, L):
        for g in range(G):
            for i in range(M):
                store(load(at(bias, g * W + j), L), at(target.address, g * target.panel + i * target.row + j), L)


@kernel
def input_table(packed, embedding, table):
    """`_input_gates` of every token: embedding (V, E) is read; table (V, any), which has room for them, written."""
    mode, W = flush_denormals(), width(at(table, 0))
    _input_gates(packed, at(embedding, 0), len(table), embedding.shape[1], Panels(at(table, 0), W, table.shape[1]))
    restore_mode(mode)


def _first_layer(packed, state):
    """`recurrent.step` of the first layer, whose gates have what `_input_gates` says. It has no projection or reset."""
    B, cell, parts = state.h.shape[1], packed.cells[0], packed.cells[0].packed
    h, s, gates = at(state.h, 0), at(state.s, 0), at(state.work, 0)
    H, (W, L, U, G, units) = cell.H, geometry(cell, h)
    extra, w_hh = at(packed.weights, parts.extra), at(packed.weights, parts.w_hh)
    wide, columns = cell.h.count * units, U * L * cell.h.count
    w_hh, target = Panels(w_hh, H * wide, wide), Panels(at(gates, cell.h.slot * L), B * W, W)
    if B == 1:
        product_of_row(0, G, wide, columns, target, target, h, w_hh, H)
    else:
        product(packed.multiply, 0, G, wide, columns, B, target, target, Left(h, H, 1, 1, 0), w_hh, H)
    for u in range(U):
        for b in range(B):
            n, here = H - u * L, b * H + u * L
            a = place(cell, gates, B * W, u, b)
            h_t, s_t = advance(cell, extra, u, a, load(at(s, here), n), False)
            store(s_t, at(s, here), n)
            store(h_t, at(h, here), n)


def _decode(packed, state, states, embedding, table, output, search, first, last, x, logits, rows, parties, barrier):
    """Steps ``first`` to ``last`` of all searches, or until all are closed; which step comes next.

    packed, state: as `recurrent.step` takes them, of S K rows; state is written. states: 2 if s is not h.
    embedding (V, E), and table, as `input_table` makes it, or of no rows, are read.
    output: the output layer's weights, as `linear.forward` takes them.
    x (S K, E), logits (some K, V), rows (K, H): workspace. parties, barrier: as for `barrier.meet`, for which a party
    that has no searches left calls with ``last = first``.
    """
    mode, (S, K) = flush_denormals(), search.log_probs.shape
    at_once, B, E, h = len(logits) // K, S * K, x.shape[1], state.h[-1]
    W, gates = width(at(x, 0)), at(state.work, 0)
    upper = Packed(packed.cells[1:], packed.weights, packed.multiply)
    upper_state = State(state.h[1:], state.s[1:], state.work)
    t, going = first, True
    while t < last and going:
        for r in range(B):
            token = search.starts[r // K] if t == 0 else search.tokens[r // K, t - 1, r % K]
            if len(table) > 0:
                for p in range(table.shape[1] // W):
                    copy_row(at(table, token * table.shape[1] + p * W), at(gates, (p * B + r) * W), W)
            else:
                for j in range(E):
                    x[r, j] = embedding[token, j]
        if len(table) == 0:
            _input_gates(packed, at(x, 0), B, E, Panels(gates, B * W, W))
        first_layer(packed, state)
        if len(upper.cells) > 0:
            cell_step(upper, upper_state, state.h[0])
        going = False
        for s0 in range(0, S, at_once):
            s1 = smaller(s0 + at_once, S)
            if not some_open(search, s0, s1):
                continue
            y = logits[: (s1 - s0) * K]
            linear.forward(h[s0 * K : s1 * K], output, y, output, False, 0, 1, barrier, packed.multiply)
            for s in range(s0, s1):
                if search.open[s] == OPEN:
                    choose(search, t, s, y, (s - s0) * K)
                if search.open[s] == OPEN:
                    going = True
                    _reorder(state.h, search.parents[s, t], s, rows)
                    if states == 2:
                        _reorder(state.s, search.parents[s, t], s, rows)
        t += 1
    meet(barrier, parties)
    restore_mode(mode)
    return t


CELLS = {
    cell.step: specialise(_first_layer, __name__, f"first_layer_{name}", advance=cell.advance)
    for name, cell in (("rnn", rnn), ("lstm", lstm), ("gru", gru))
}
DECODE = {
    (kind, step): specialise(
        _decode, __name__, f"decode_{kind.__name__}_{layer.__name__}", choose=f, cell_step=step, first_layer=layer
    )
    for kind, f in METHODS.items()
    for step, layer in CELLS.items()
}
