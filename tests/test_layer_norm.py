"""Layer normalisation beyond what all layers promise: the norm itself, its invariances, memory and long sequences."""

import numpy as np
import pytest
from fastrnn.kernels import layer_norm as kernels
from fastrnn.kernels.compiler import kernel
from fastrnn.kernels.vector import at
from oracle import (
    CASES,
    EPSILON,
    assert_all_close,
    assert_all_same_bits,
    assert_close,
    assert_same_bits,
    each,
    everything,
    expected,
    inputs,
    lengths_for,
    make,
    normalise_backward,
)

import fastrnn
from fastrnn import batching, layer_norm, memory, recurrent

NORMS = [case for case in CASES if "norm" in case]
GUARD = 70  # more than a panel is wide


@kernel(cache=False)
def normalise(a, first, count, scratch):
    return kernels.normalise(at(a, first), count, at(scratch, 0))


@kernel(cache=False)
def normalise_back(d, gain, normal, first, scale, count, scratch):
    kernels.normalise_backward(at(d, first), at(gain, 0), at(normal, 0), scale, count, at(scratch, 0))


def guarded(array):
    memory = np.full(array.size + 2 * GUARD, np.nan, array.dtype)
    memory[GUARD:-GUARD] = array
    return memory


# The norm.


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 64, 70, 400])
@pytest.mark.parametrize(("scale", "shift"), [(1, 0), (1e-3, 0), (1e-6, 0), (1e6, 0), (1, 30)])
def test_norm(count, scale, shift, dtype, rng):
    """Of so many numbers, and of nothing beside them."""
    a = (scale * rng.standard_normal(count) + shift).astype(dtype)
    exact = a.astype(np.float64)
    deviation = np.sqrt(exact.var(keepdims=True) + EPSILON)
    memory = guarded(a)
    got = normalise(memory, GUARD, count, np.full(64, np.nan, dtype))
    assert abs(got * deviation[0] - 1) < 1e-5
    # The mean is rounded relative to the numbers, not to what is left without it.
    room = 4 * count**0.5 * np.finfo(dtype).eps * (1 + np.abs(exact).max() / deviation[0])
    n = (exact - exact.mean()) / deviation
    np.testing.assert_allclose(memory[GUARD:-GUARD], n, rtol=0, atol=room)
    assert np.isnan(memory[:GUARD]).all()
    assert np.isnan(memory[-GUARD:]).all()

    gain, d = rng.uniform(0.5, 2, count).astype(dtype), rng.standard_normal(count).astype(dtype)
    memory, normal = guarded(d), n.astype(dtype)
    normalise_back(memory, gain, normal, GUARD, float(1 / deviation[0]), count, np.full(64, np.nan, dtype))
    dn = gain.astype(np.float64) * d
    da = normalise_backward(normal.astype(np.float64), deviation, dn)
    # Of few numbers nearly all cancels: the error is relative to what it is the rest of.
    room = 20 * np.finfo(dtype).eps * np.abs(dn).max() / deviation[0]
    np.testing.assert_allclose(memory[GUARD:-GUARD], da, rtol=0, atol=room)
    assert np.isnan(memory[:GUARD]).all()
    assert np.isnan(memory[-GUARD:]).all()


def test_norm_of_equal_numbers_is_zero(dtype):
    a = np.full(37, 3, dtype)
    normalise(a, 0, 37, np.empty(64, dtype))
    assert_same_bits(a, np.zeros(37, dtype))


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0"])
@pytest.mark.parametrize("case", NORMS)
def test_a_norm_does_not_see_what_all_sums_share(case, name):
    """Not a number added to all of them, nor, but for epsilon, a factor."""
    layer = make(case, 6, 10, np.float64)
    x, state, _, _ = inputs(layer, 5, 3)
    x, state = 100 * x, each(state, lambda s: 100 * s)  # the first step's variance is far above epsilon
    x, y = x[:1], layer(x[:1], state)[0]
    w = layer.state_dict()[name]
    layer.load_state_dict({name: w + np.linspace(-1, 1, w.shape[1])}, strict=False)
    assert_close(layer(x, state)[0], y, slack=100)
    layer.load_state_dict({name: 3 * w}, strict=False)
    np.testing.assert_allclose(layer(x, state)[0], y, atol=1e-5)
    layer.load_state_dict({name: w[::-1]}, strict=False)
    assert np.abs(layer(x, state)[0] - y).max() > 1e-2


# The layers.


@pytest.mark.parametrize("cell", [fastrnn.LSTM, fastrnn.GRU])
def test_initial_parameters(cell, dtype):
    options = {"num_layers": 2, "bidirectional": True, "dtype": dtype, "seed": 4}
    layer, plain = cell(3, 5, layer_norm=True, **options), cell(3, 5, **options)
    added = {name: array for name, array in layer.parameters.items() if name not in plain.parameters}
    assert len(added) == 4 * (4 if cell is fastrnn.LSTM else 2)
    for name, array in added.items():
        assert_same_bits(array, np.full_like(array, 0 if name.startswith("bias_ln_c") else 1), name)
    # The others are drawn as without it.
    assert_all_same_bits({n: a for n, a in layer.parameters.items() if n in plain.parameters}, plain.state_dict())


def test_wrong_arguments():
    with pytest.raises(ValueError, match="reset_after: expected True with layer_norm"):
        fastrnn.GRU(3, 4, reset_after=False, layer_norm=True)
    for cell in (fastrnn.LSTM, fastrnn.GRU):
        with pytest.raises(TypeError, match="layer_norm: expected True or False"):
            cell(3, 4, layer_norm=1)


@pytest.mark.parametrize("sizes", [(40, 26, 5, 20), (300, 1, 4, 9), (7, 120, 3, 8)], ids=str)
@pytest.mark.parametrize("case", NORMS)
def test_long_sequences(case, sizes, dtype, small_shares):
    """More rows than any chunk: near the equations, and the same bits for any number of threads and stretches."""
    T, B, I, H = sizes
    layer = make(case, I, H, dtype)
    given = inputs(layer, T, B)
    assert T * B > layer_norm.ROWS_BACKWARD > layer_norm.ROWS_FORWARD
    for lengths in (None, lengths_for(T, B)):
        wanted = everything(layer, *given, lengths=lengths)
        if dtype == np.float64:  # over so many steps small errors grow, to what says little about float32
            assert_all_close(layer, wanted, expected(layer, *given, lengths))
        for threads, checkpoint in [(2, None), (3, 6), (1, 32)]:
            batching.set_num_threads(threads)
            got = everything(layer, *given, lengths=lengths, checkpoint=checkpoint)
            assert_all_same_bits(got, wanted)
        batching.set_num_threads(1)


class GuardedNumpy:
    """NumPy, but memory that it leaves uninitialised is full of NaN, and so is what lies around it."""

    def __init__(self):
        self.memories = []

    def __getattr__(self, name):
        return getattr(np, name)

    def empty(self, shape, dtype=np.float64):
        size = int(np.prod(shape))
        self.memories.append(np.full(size + 2 * GUARD, np.nan, dtype))
        return self.memories[-1][GUARD : GUARD + size].reshape(shape)

    def empty_like(self, array):
        return self.empty(array.shape, array.dtype)

    def assert_untouched(self):
        for array in self.memories:
            assert np.isnan(array[:GUARD]).all()
            assert np.isnan(array[-GUARD:]).all()


RANDOM = {"dropout": 0.5, "recurrent_dropout": 0.4, "zoneout": 0.3}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("random", [{}, RANDOM], ids=["plain", "masked"])
@pytest.mark.parametrize("sizes", [(7, 9, 5, 21), (12, 40, 3, 8), (3, 2, 70, 130)], ids=str)
@pytest.mark.parametrize("case", NORMS)
def test_memory(case, sizes, random, threads, dtype, monkeypatch, small_shares):
    """What is uninitialised is never read, and nothing is written past an array."""
    T, B, I, H = sizes
    layer = make(case, I, H, dtype, num_layers=2, bidirectional=True, **random)
    given, options = inputs(layer, T, B), [{}, {"lengths": lengths_for(T, B)}, {"checkpoint": 2}]
    wanted = [everything(layer, *given, np.random.default_rng(3), **o) for o in options]
    guard = GuardedNumpy()
    for module in (layer_norm, recurrent):
        monkeypatch.setattr(module, "np", guard)
    monkeypatch.setattr(memory, "empty", guard.empty)
    layer.load_state_dict(layer.state_dict())  # the packed weights, too, are made anew
    batching.set_num_threads(threads)
    for o, results in zip(options, wanted):
        assert_all_same_bits(everything(layer, *given, np.random.default_rng(3), **o), results)
    assert len(guard.memories) > 100
    guard.assert_untouched()
