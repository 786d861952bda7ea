"""One step of a cell with weights that lie as their owner has them, for who cannot know whether a packed copy is true.

A few rows are multiplied in the time that reading the weights takes; many are faster with packed ones. What `recurrent`
calls a cell's ``advance`` stands for that name in the template `step`.
"""

from . import gru, lstm, rnn
from .barrier import meet, portion
from .compiler import part, specialise
from .denormals import flush_denormals, restore_mode
from .gemm import load, store, zeros
from .tile import dot_products
from .vector import at, lanes, pointer, smaller

advance = None

# Up to so many rows, reading the weights once takes less time than looking at them and then reading their packed copy.
FEW_ROWS = 64


@part
def add_products(cell, window, bias, w, x, B, K, u, sums, biased):
    """Add, for vector ``u`` of the units, a weight's products with x (B, K) and its bias to the sums' slots."""
    L = lanes(sums)
    rows = smaller(L, cell.H - u * L)
    for j in range(window.count):
        first = (j + window.rotate) % cell.gates * cell.H + u * L
        for b in range(B):
            target = at(sums, (b * cell.slots + window.slot + j) * L)
            total = load(target, L) + dot_products(at(w, first * K), K, rows, at(x, b * K), K)
            store(total + load(at(bias, first), rows) if biased else total, target, L)


def step(cells, sums, B, I, biased, x, h, s, w_ih, w_hh, b_ih, b_hh, h_n, s_n, me, parties, barrier):
    """One step of a batch.

    cells (1): the cell, as a `RECORD`, without options. sums (at least B * slots * a vector): a party's workspace.
    x (B, I), h, s (B, H), w_ih (gates * H, I), w_hh (gates * H, H), b_ih, b_hh (gates * H, if ``biased``): addresses of
    C-contiguous arrays of the type of ``sums``, which are read. h_n, s_n (B, H): likewise, written. Without a state of
    its own a cell has h for s. Number ``me`` of ``parties`` calls that run at once does a share of the units.
    """
    mode, cell, a = flush_denormals(), cells[0], at(sums, 0)
    H, L = cell.H, lanes(a)
    x, h, s, h_n, s_n = pointer(x, sums), pointer(h, sums), pointer(s, sums), pointer(h_n, sums), pointer(s_n, sums)
    U = (H + L - 1) // L
    u0, u1 = portion(U, me, parties)
    for u in range(u0, u1):
        for i in range(B * cell.slots):
            store(zeros(a), at(a, i * L), L)
        add_products(cell, cell.x, pointer(b_ih, sums), pointer(w_ih, sums), x, B, I, u, a, biased)
        add_products(cell, cell.h, pointer(b_hh, sums), pointer(w_hh, sums), h, B, H, u, a, biased)
        for b in range(B):
            here, n = b * H + u * L, H - u * L
            h_t, s_t = advance(cell, a, u, at(a, b * cell.slots * L), load(at(s, here), n), False)
            store(s_t, at(s_n, here), n)
            store(h_t, at(h_n, here), n)
    meet(barrier, parties)
    restore_mode(mode)


rnn_step = specialise(step, __name__, "rnn_step", advance=rnn.advance)
lstm_step = specialise(step, __name__, "lstm_step", advance=lstm.advance)
gru_step = specialise(step, __name__, "gru_step", advance=gru.advance)
