"""The cells' kernels as they are called from the layers: chunks, shares, one step, and what they read and write."""

import threading

import numpy as np
import oracle
import pytest
from fastrnn.kernels import bptt
from fastrnn.kernels import cell as cells
from fastrnn.kernels import recurrent as engine
from fastrnn.kernels.gemm import multiply_addresses
from fastrnn.kernels.tile import VECS
from fastrnn.kernels.vector import LANES_OF
from oracle import assert_close, assert_same_bits

from fastrnn import batching, packing

CASES = [case for case in oracle.CASES if "norm" not in case]


def run(layer, x, before, gradients=None, parties=1, chunk=2, back=3):
    """The kernels' forward, and backward if given gradients, on so many threads. All memory is NaN at first.

    before and gradients are those of one layer and direction. Returns a dict of what they write.
    """
    T, B, I = x.shape
    cell, dtype, save = layer.cell, x.dtype, gradients is not None
    L, multiply, N = LANES_OF[dtype], multiply_addresses(dtype, True), T * B
    W, U = VECS * L, -(-cell.H // L)

    def nan(*shape):
        return np.full(shape, np.nan, dtype)

    def cuts(steps):
        return np.array([*range(0, T, steps), T])

    def most(cuts):
        return int(np.diff(cuts).max()) * B

    steps, chunks, backs = cuts(1) * B, cuts(chunk), cuts(back)
    masks = None if cell.P == cell.H else cells.Masks(nan(0, 0), nan(0, 0), nan(0, 0))
    x_rows, (h_0, s_0) = x.reshape(N, I), (before[0], before[-1])
    out = {"y": nan(N, cell.P), "s_n": nan(B, cell.H)}
    parts, size = packing.buffer_layout(cell, N, B, I, most(chunks), W, L, save, parties)
    buffer = nan(size)
    packs = packing.packs(layer, save)[0, 0]

    def forward(me, barrier):
        share = batching.share_of(me, parties, B, cell.H, dtype, cell.spread)
        written = out["y"], out["s_n"], buffer
        layer.kernels.forward(
            *packs[0],
            x_rows,
            h_0,
            s_0,
            *written,
            parts,
            steps,
            chunks,
            most(chunks),
            masks,
            save,
            share,
            barrier,
            multiply,
        )

    on_threads(parties, forward)
    if not save:
        return out
    dy, dh_n, ds_n = gradients
    weights = nan(cell.gates * cell.H, I), nan(cell.gates * cell.H, cell.P), nan(cell.P, cell.H)
    rest = nan(-(-U // cell.spread), W), nan(3, U * L)
    d_out = bptt.Gradients(nan(N, I), nan(B, cell.P), nan(B, cell.H), *weights, *rest)
    buffers = min(parties, 2)
    work_parts, size = packing.work_layout(cell, B, most(backs), buffers, W, L)
    work = nan(size)

    def backward(me, barrier):
        share = batching.share_of(me, parties, B, cell.H, dtype)
        layer.kernels.backward(
            *packs[1], dy.reshape(N, cell.P), dh_n, ds_n, buffer, parts, d_out, work, work_parts, buffers,
            steps, chunks, backs, most(backs), masks, True, share, barrier, multiply,
        )  # fmt: skip

    on_threads(parties, backward)
    return out | {f"d{name}": array for name, array in d_out._asdict().items()}


def on_threads(parties, function):
    barrier = np.zeros(16, np.int64)
    threads = [threading.Thread(target=function, args=(me, barrier), daemon=True) for me in range(parties)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a party waits for ever"
    assert barrier[1] == 0


def arguments(case, T, B, I, H, dtype):
    """A layer, and x, the state, and (dy, dh_n, ds_n) of its only direction."""
    layer = oracle.make(case, I, H, dtype)
    x, state, dy, dstate = oracle.inputs(layer, T, B)
    before, d_after = ([s[0] for s in (a if isinstance(a, tuple) else (a,))] for a in (state, dstate))
    return layer, x, before, (dy, d_after[0], d_after[1] if len(d_after) > 1 else np.zeros((B, H), dtype))


def assert_same(actual, expected):
    for name, array in expected.items():
        # Not every cell writes all of them; and in panels there are slots and lanes that stand for nothing.
        read = ~np.isnan(array) if name in ("s_n", "db", "ds_0", "dw_hr", "dpeepholes") else np.full(array.shape, True)
        assert_same_bits(actual[name][read], array[read], name)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (5, 3, 7, 9), (4, 1, 17, 70), (7, 13, 65, 33)], ids=str)
@pytest.mark.parametrize(("chunk", "back"), [(1, 1), (2, 3), (7, 7)])
def test_oracle(case, shape, chunk, back, dtype):
    T = shape[0]
    layer, x, before, gradients = arguments(case, *shape, dtype)
    out = run(layer, x, before, gradients, chunk=min(chunk, T), back=min(back, T))
    state = tuple(s[None] for s in before) if len(before) > 1 else before[0][None]
    d_after = tuple(d[None] for d in gradients[1:]) if len(before) > 1 else gradients[1][None]
    expected = oracle.expected(layer, x, state, gradients[0], d_after)
    names = {"y": "y", "dx": "dx", "dh_0": "dh_0", "dw_ih": "weight_ih_l0", "dw_hh": "weight_hh_l0"}
    for mine, theirs in names.items():
        array = expected[theirs][0] if mine == "dh_0" else expected[theirs]
        assert_close(out[mine].reshape(array.shape), array, mine)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", [(5, 9, 3, 5), (5, 2, 3, 300)], ids=["batch cut", "units cut"])
@pytest.mark.parametrize("parties", [2, 3])
def test_parties_give_the_same_bits(case, shape, parties, dtype, monkeypatch):
    monkeypatch.setattr(batching, "ROWS_OF_A_SHARE", 3)
    one, many = (run(*arguments(case, *shape, dtype), parties=p) for p in (1, parties))
    assert_same(many, one)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cut", [1, 2, 3, 6])
def test_chunks_and_saving_do_not_change_a_bit(case, cut, dtype):
    layer, x, before, gradients = arguments(case, 6, 5, 4, 21, dtype)
    whole, saved = (run(layer, x, before, gradients, chunk=n, back=n) for n in (6, cut))
    assert_same(saved, whole)
    plain = run(layer, x, before, chunk=cut)
    assert_same(plain, {name: whole[name] for name in plain})


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("B", [1, 4])
@pytest.mark.parametrize("H", [2, 20, 70])
def test_steps_make_a_sequence(case, B, H, dtype):
    """`step`, again and again, writes what `forward` does, and nothing past its arrays."""
    layer, x, before, _ = arguments(case, 3, B, 5, H, dtype)
    expected = run(layer, x, before)
    P, size = layer.cell.P, engine.step_size(layer.cell, B, VECS * LANES_OF[dtype], LANES_OF[dtype])
    memory = [np.full((3, B, n), np.nan, dtype) for n in (P, H)]
    memory[0][1], memory[1][1] = before[0], before[-1]
    h, s = memory[0][1:2], memory[1 if len(before) > 1 else 0][1:2]
    for x_t, y_t in zip(x, expected["y"].reshape(3, B, P)):
        work = np.full(size + 64, np.nan, dtype)
        layer.kernels.step(layer.packed, engine.State(h, s, work[:size]), x_t)
        assert_same_bits(h[0], y_t)
        assert np.isnan(work[size:]).all()
    if len(before) > 1:
        assert_same_bits(s[0], expected["s_n"])
    assert all(np.isnan(array[::2]).all() for array in memory)
