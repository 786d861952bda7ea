"""The LSTM kernels as they are called from the layer: one step, shares, and what they read and write."""

import threading

import numpy as np
import oracle
import pytest
from fastrnn.kernels import lstm
from fastrnn.kernels.gemm import multiply_address
from fastrnn.kernels.tile import LANES_OF, VECS
from oracle import assert_close, assert_same_bits

from fastrnn import batching


def weights(I, H, dtype, rng):
    shapes = {"weight_ih_l0": (4 * H, I), "weight_hh_l0": (4 * H, H), "bias_ih_l0": 4 * H, "bias_hh_l0": 4 * H}
    arrays = {name: rng.uniform(-0.5, 0.5, shape).astype(dtype) for name, shape in shapes.items()}
    for array in arrays.values():
        array.flags.writeable = False  # as the layer hands them over: another type to Numba
    return arrays


def run(parameters, x, h_0, c_0, gradients=None, parties=1, chunk=2, back=3):
    """`lstm.forward`, and `lstm.backward` if given (dy, dh_n, dc_n), on so many threads. All memory is NaN at first.

    Returns a dict of what they write.
    """
    T, B, I = x.shape
    H, dtype = h_0.shape[1], x.dtype
    L, save, multiply = LANES_OF[dtype], gradients is not None, multiply_address(dtype)
    W, U = VECS * L, -(-H // L)

    def nan(*shape):
        return np.full(shape, np.nan, dtype)

    packed = nan(U * W * (1 + I + H))
    lstm.pack_forward(*parameters.values(), packed)
    out = {"y": nan(T, B, H), "c_n": nan(B, H)}
    buffer = nan(lstm.layout.py_func(T, B, I, H, L, chunk, save)[-1])

    def forward(me, barrier):
        share = batching.share_of(me, parties, B, H, dtype)
        lstm.forward(x, h_0, c_0, packed, out["y"], out["c_n"], buffer, save, chunk, share, barrier, multiply)

    on_threads(parties, forward)
    if not save:
        return out
    dy, dh_n, dc_n = gradients
    packed_back = nan(W + U * W * W * (-(-H // W) + -(-I // W)))
    lstm.pack_backward(parameters["weight_ih_l0"], parameters["weight_hh_l0"], packed_back)
    out |= {"dx": nan(T, B, I), "dh_0": nan(B, H), "dc_0": nan(B, H)}
    out |= {"dw_ih": nan(4 * H, I), "dw_hh": nan(4 * H, H), "db": nan(4 * H)}
    buffers = min(parties, 2)
    work = nan(lstm.work_layout.py_func(B, H, L, back, buffers)[-1])

    def backward(me, barrier):
        share = batching.share_of(me, parties, B, H, dtype)
        written = (out[name] for name in ("dx", "dh_0", "dc_0", "dw_ih", "dw_hh", "db"))
        lstm.backward(
            dy, dh_n, dc_n, packed_back, buffer, *written, work, buffers, chunk, back, share, barrier, multiply
        )  # fmt: skip

    on_threads(parties, backward)
    return out


def on_threads(parties, function):
    barrier = np.zeros(16, np.int64)
    threads = [threading.Thread(target=function, args=(me, barrier), daemon=True) for me in range(parties)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a party waits for ever"
    assert barrier[1] == 0


def arguments(T, B, I, H, dtype):
    rng = np.random.default_rng([T, B, I, H])
    parameters = weights(I, H, dtype, rng)
    arrays = [
        rng.standard_normal(shape).astype(dtype) for shape in ((T, B, I), (B, H), (B, H), (T, B, H), (B, H), (B, H))
    ]
    return parameters, arrays[:3], arrays[3:]


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (5, 3, 7, 9), (4, 1, 17, 70), (7, 13, 65, 33)], ids=str)
@pytest.mark.parametrize(("chunk", "back"), [(1, 1), (2, 3), (7, 7)])
def test_oracle(shape, chunk, back, dtype):
    parameters, inputs, gradients = arguments(*shape, dtype)
    out = run(parameters, *inputs, gradients, chunk=min(chunk, shape[0]), back=min(back, shape[0]))
    x, h_0, c_0 = inputs
    y, _, c_n, tape = oracle.forward(parameters, x, h_0[None], c_0[None])
    assert_close(out["y"], y)
    assert_close(out["c_n"], c_n[0])
    dy, dh_n, dc_n = gradients
    dx, dh_0, dc_0, grads = oracle.backward(parameters, tape, dy, dh_n[None], dc_n[None])
    expected = {"dx": dx, "dh_0": dh_0[0], "dc_0": dc_0[0], "db": grads["bias_ih_l0"]}
    expected |= {"dw_ih": grads["weight_ih_l0"], "dw_hh": grads["weight_hh_l0"]}
    for name, array in expected.items():
        assert_close(out[name], array, name)


@pytest.mark.parametrize("shape", [(5, 9, 3, 5), (5, 2, 3, 300)], ids=["batch cut", "units cut"])
@pytest.mark.parametrize("parties", [2, 3])
def test_parties_give_the_same_bits(shape, parties, dtype, monkeypatch):
    monkeypatch.setattr(batching, "ROWS_OF_A_SHARE", 3)
    parameters, inputs, gradients = arguments(*shape, dtype)
    one, many = (run(parameters, *inputs, gradients, parties=p) for p in (1, parties))
    for name, array in one.items():
        assert_same_bits(many[name], array, name)


@pytest.mark.parametrize("chunk", [1, 2, 3, 6])
def test_chunks_and_saving_do_not_change_a_bit(chunk, dtype):
    parameters, inputs, gradients = arguments(6, 5, 4, 21, dtype)
    saved, plain = run(parameters, *inputs, gradients, chunk=6), run(parameters, *inputs, chunk=chunk)
    assert_same_bits(plain["y"], saved["y"])
    assert_same_bits(plain["c_n"], saved["c_n"])


@pytest.mark.parametrize("B", [1, 4])
@pytest.mark.parametrize("H", [1, 20, 70])
def test_steps_make_a_sequence(B, H, dtype):
    """`step`, again and again, writes what `forward` does, and nothing past its arrays."""
    parameters, (x, h_0, c_0), _ = arguments(3, B, 5, H, dtype)
    expected = run(parameters, x, h_0, c_0)
    W = VECS * LANES_OF[dtype]
    U = -(-H // LANES_OF[dtype])
    packed = np.full(U * W * (1 + 5 + H), np.nan, dtype)
    lstm.pack_forward(*parameters.values(), packed)
    memory = np.full((4, B, H), np.nan, dtype)
    h, c = memory[1], memory[3]
    h[:], c[:] = h_0, c_0
    for x_t, y_t in zip(x, expected["y"]):
        lstm.step(x_t, h, c, packed, np.full(U * B * W, np.nan, dtype), multiply_address(dtype))
        assert_same_bits(h, y_t)
    assert_same_bits(c, expected["c_n"])
    assert np.isnan(memory[::2]).all()
