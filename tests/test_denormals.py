"""Denormal numbers are 0 to kernels, whose callers keep their own mode."""

import numba
import numpy as np
import pytest
from fastrnn.kernels import denormals, direct, optim, search
from fastrnn.kernels import lstm as kernels
from fastrnn.kernels.denormals import flush_denormals, restore_mode

import fastrnn
from fastrnn import batching

SMALLEST = {dtype: np.finfo(dtype).smallest_subnormal for dtype in (np.float32, np.float64)}
NORMAL = {dtype: np.finfo(dtype).smallest_normal for dtype in (np.float32, np.float64)}
T, B, I, H = 5, 4, 7, 17
CELLS = [("RNN", {"nonlinearity": "identity"}), ("RNN", {}), ("LSTM", {}), ("GRU", {}), ("GRU", {"reset_after": False})]
CELLS += [("LSTM", {"layer_norm": True}), ("GRU", {"layer_norm": True}), ("LSTM", {"proj_size": 3, "peephole": True})]


@numba.njit
def mode_of_this_thread():
    mode = flush_denormals()
    restore_mode(mode)
    return mode


@numba.njit
def halves(x, out):
    """Half of x before, while and after denormals are flushed."""
    out[0] = x[0] / 2
    mode = flush_denormals()
    out[1] = x[0] / 2
    within = flush_denormals()
    restore_mode(within)
    out[2] = x[0] / 2
    restore_mode(mode)
    out[3] = x[0] / 2


def denormal(shape, dtype, seed=0):
    """Numbers between the least normal one and 0, of either sign."""
    numbers = np.random.default_rng(seed).uniform(-0.9, 0.9, shape) * NORMAL[dtype]
    numbers = numbers.astype(dtype)
    assert (np.abs(numbers) < NORMAL[dtype]).all()
    assert np.count_nonzero(numbers) > 0.9 * numbers.size
    return numbers


def no_denormals(*arrays):
    return all(((a == 0) | (np.abs(a) >= NORMAL[a.dtype.type])).all() for a in arrays)


@pytest.fixture(autouse=True)
def same_mode():
    """Whatever a test does leaves the mode as it was, and that flushes nothing."""
    before = mode_of_this_thread()
    yield
    assert mode_of_this_thread() == before
    assert not before & max(denormals.FLUSH.values())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_flushed_in_between_alone(dtype):
    out = np.full(4, np.nan, dtype)
    halves(np.array([NORMAL[dtype]], dtype), out)
    assert out.tolist() == [NORMAL[dtype] / dtype(2), 0, 0, NORMAL[dtype] / dtype(2)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("cell", "options"), CELLS)
@pytest.mark.parametrize("batch", [B, 64])
def test_layers_take_denormals_for_zeros(cell, options, dtype, batch):
    """Input, state and gradient: the same bits as for zeros, on one thread and two."""
    layer = getattr(fastrnn, cell)(I, H, 2, dtype=dtype, seed=0, **options)
    x, dy = denormal((T, batch, I), dtype), denormal((T, batch, layer.output_size), dtype, 1)
    states = tuple(denormal(s.shape, dtype, 2) for s in layer._state_arrays(None, "state", batch, True))
    state = states if len(states) > 1 else states[0]
    zero = tuple(np.zeros_like(s) for s in states)
    zero_state = zero if len(zero) > 1 else zero[0]
    y, _ = layer(x, state)
    expected, _ = layer(np.zeros_like(x), zero_state)
    np.testing.assert_array_equal(y, expected)
    (y, _), pullback = layer.vjp(x, state)
    np.testing.assert_array_equal(y, expected)
    dx, d_state, grads = pullback(dy)
    assert no_denormals(y, dx, *(d_state if len(states) > 1 else [d_state]), *grads.values())
    assert not np.any(dx)


def test_steps_take_denormals_for_zeros():
    lstm = fastrnn.LSTM(I, H, seed=0)
    x, zeros = denormal((2, I), np.float32), np.zeros((2, I), np.float32)
    stream, expected = lstm.stream(2), lstm.stream(2)
    np.testing.assert_array_equal(stream.step(x), expected.step(zeros))
    state, expected_state = lstm.new_state(2), lstm.new_state(2)
    numba.njit(lambda packed, state, x: kernels.step(packed, state, x))(lstm.packed, state, x)
    kernels.step(lstm.packed, expected_state, zeros)
    np.testing.assert_array_equal(state.h, expected_state.h)
    cell, one = fastrnn.LSTMCell(I, H, seed=0), np.ones((2, I), np.float32)
    for given, clean in (x, zeros), (one, one):
        for a, b in zip(cell(given), cell(clean)):
            np.testing.assert_array_equal(a, b)


def test_steps_in_place_take_denormals_for_zeros():
    layer = fastrnn.GRU(I, H, seed=0)
    h, sums = np.zeros((1, H), np.float32), np.empty(4 * 64, np.float32)
    weights = [layer.parameters[f"{name}_l0"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    found = []
    for x in denormal((1, I), np.float32), np.zeros((1, I), np.float32):
        h_n = np.full_like(h, np.nan)
        addresses = [a.ctypes.data for a in (x, h, h, *weights, h_n, h_n)]
        direct.gru_step(layer.records, sums, 1, I, True, *addresses, 0, 1, batching.ALONE)
        found.append(h_n)
    np.testing.assert_array_equal(*found)


def test_output_layer_and_loss():
    linear, x = fastrnn.Linear(5, 70, bias=False, seed=0), denormal((3, 5), np.float32)
    assert not np.any(linear(x))
    _, pullback = linear.vjp(np.ones_like(x))
    assert not np.any(pullback(denormal((3, 70), np.float32))[0])
    embedding = fastrnn.Embedding(5, 7, seed=0)
    _, pullback = embedding.vjp(np.array([1, 1, 3]))
    assert not np.any(pullback(denormal((3, 7), np.float32))["weight"])
    # exp(-95) is denormal.
    logits = np.array([[0, -95.0, -50.0]], np.float32)
    _, gradient = fastrnn.losses.cross_entropy(logits, np.array([2]))
    assert gradient[0, 1] == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_optimisers(dtype):
    """A moment that only decays comes to rest at 0."""
    one, g = dtype(1), np.zeros(3, dtype)
    p, m, v = np.ones(3, dtype), np.full(3, NORMAL[dtype]), np.full(3, NORMAL[dtype])
    optim.adam(p, g, m, v, one, dtype(0.9), dtype(0.99), dtype(0.1), dtype(0.01), one, dtype(1e-8), dtype(0), one)
    assert not np.any(m)
    assert not np.any(v)
    v = np.full(3, NORMAL[dtype])
    optim.sgd(p, g, v, one, dtype(0.9), dtype(0), False)
    assert not np.any(v)
    assert optim.sum_of_squares(np.full(9, SMALLEST[np.float32])) == 0


def test_decoding():
    """A token whose probability is denormal has none."""
    x = np.array([[0, -95.0]], np.float32)
    model = fastrnn.LanguageModel(5, 3, 4, seed=0)
    model.greedy(bos=0, eos=None, max_length=3)
    drawn = fastrnn.sample(
        lambda tokens, state: (np.repeat(x.astype(np.float64), len(tokens), 0), state),
        None, bos=0, eos=None, num_samples=2, max_length=3, rng=np.random.default_rng(0),
    )  # fmt: skip
    assert not np.any(drawn.tokens)
    y = np.empty(x.shape)
    search.log_softmax(x, y)
    assert y.tolist() == x.tolist()
