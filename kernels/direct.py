"""One step of a cell with weights that lie as their owner has them, for who cannot know whether a packed copy is true.

A few rows are multiplied in the time that reading the weights takes; more are faster with packed ones. What `recurrent`
calls a cell's ``advance`` stands for that name in the template `step`.
"""

from . import gru, lstm, rnn
from .compiler import part, specialise
from .gemm import load, store, zeros
from .tile import at, fma, lanes, pointer, sum_of

advance = None

# Up to so many rows, reading the weights once takes less time than looking at them and then reading their packed copy.
FEW_ROWS = 4


@part(inline=False)
def add_products(w, rows, x, K, target):
    """target (8) += w (rows, K) @ x (K), all addresses; with fewer than 8 rows the last one stands for the others."""
    L = lanes(x)
    last = rows - 1
    w1, w2, w3 = at(w, min(1, last) * K), at(w, min(2, last) * K), at(w, min(3, last) * K)
    w4, w5, w6, w7 = at(w, min(4, last) * K), at(w, min(5, last) * K), at(w, min(6, last) * K), at(w, min(7, last) * K)
    a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = zeros(x)
    for k in range(0, K, L):
        n = K - k
        v = load(at(x, k), n)
        a0, a1 = fma(load(at(w, k), n), v, a0), fma(load(at(w1, k), n), v, a1)
        a2, a3 = fma(load(at(w2, k), n), v, a2), fma(load(at(w3, k), n), v, a3)
        a4, a5 = fma(load(at(w4, k), n), v, a4), fma(load(at(w5, k), n), v, a5)
        a6, a7 = fma(load(at(w6, k), n), v, a6), fma(load(at(w7, k), n), v, a7)
    target[0] += sum_of(a0)
    target[1] += sum_of(a1)
    target[2] += sum_of(a2)
    target[3] += sum_of(a3)
    target[4] += sum_of(a4)
    target[5] += sum_of(a5)
    target[6] += sum_of(a6)
    target[7] += sum_of(a7)


@part
def add_window(cell, window, bias, w, x, B, K, u, sums, biased):
    """Add, for vector ``u`` of the units, a weight's products with x (B, K) and its bias to the sums' slots."""
    L = lanes(sums)
    for j in range(window.count):
        first = (j + window.rotate) % cell.gates * cell.H + u * L
        for b in range(B):
            target = at(sums, (b * cell.slots + window.slot + j) * L)
            if biased:
                store(load(target, L) + load(at(bias, first), cell.H - u * L), target, L)
            for i in range(0, min(L, cell.H - u * L), 8):
                add_products(at(w, (first + i) * K), cell.H - u * L - i, at(x, b * K), K, at(target, i))


def step(cells, sums, B, I, biased, x, h, s, w_ih, w_hh, b_ih, b_hh, h_n, s_n):
    """One step of a batch.

    cells (1): the cell, as a `RECORD`, without options. sums (at least B * slots * a vector): workspace.
    x (B, I), h, s (B, H), w_ih (gates * H, I), w_hh (gates * H, H), b_ih, b_hh (gates * H, if ``biased``): addresses of
    C-contiguous arrays of the type of ``sums``, which are read. h_n, s_n (B, H): likewise, written. Without a state of
    its own a cell has h for s.
    """
    cell, a = cells[0], at(sums, 0)
    H, L = cell.H, lanes(a)
    x, h, s, h_n, s_n = pointer(x, sums), pointer(h, sums), pointer(s, sums), pointer(h_n, sums), pointer(s_n, sums)
    for u in range((H + L - 1) // L):
        for i in range(B * cell.slots):
            store(zeros(a), at(a, i * L), L)
        add_window(cell, cell.x, pointer(b_ih, sums), pointer(w_ih, sums), x, B, I, u, a, biased)
        add_window(cell, cell.h, pointer(b_hh, sums), pointer(w_hh, sums), h, B, H, u, a, biased)
        for b in range(B):
            here, n = b * H + u * L, H - u * L
            h_t, s_t = advance(cell, a, u, at(a, b * cell.slots * L), load(at(s, here), n), False)
            store(s_t, at(s_n, here), n)
            store(h_t, at(h_n, here), n)


rnn_step = specialise(step, __name__, "rnn_step", advance=rnn.advance)
lstm_step = specialise(step, __name__, "lstm_step", advance=lstm.advance)
gru_step = specialise(step, __name__, "gru_step", advance=gru.advance)
