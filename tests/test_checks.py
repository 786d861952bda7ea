"""The table of wrong calls: each raises the error that its documentation names, and says what was wrong."""

import os
import re
import subprocess
import sys

import numba
import numpy as np
import pytest
from conftest import ROOT

import fastrnn
from fastrnn import batching, checks
from fastrnn.parameters import Parameters

RNN, LSTM, GRU = fastrnn.RNN, fastrnn.LSTM, fastrnn.GRU
lstm = LSTM(3, 4, num_layers=2, seed=0)
first = LSTM(3, 4, batch_first=True, seed=0)
gru = GRU(3, 4, num_layers=2, seed=0)
both_ways = RNN(3, 4, bidirectional=True, seed=0)
projected = LSTM(3, 4, 2, proj_size=2, seed=0)
x, h = np.ones((5, 2, 3), np.float32), np.ones((2, 2, 4), np.float32)
y = np.ones((5, 2, 4), np.float32)
f32 = np.dtype(np.float32)


class Unconvertible:
    def __array__(self, *args, **kwargs):
        raise RuntimeError("on another device")


@numba.njit
def jitted(a):
    return a


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


CONSTRUCTING = [
    (lambda: LSTM(), TypeError, "input_size"),
    (lambda: LSTM(3), TypeError, "hidden_size"),
    (lambda: LSTM(3.0, 4), TypeError, "input_size: expected an int, got 3.0"),
    (lambda: LSTM("3", 4), TypeError, "input_size: expected an int, got '3'"),
    (lambda: LSTM(None, 4), TypeError, "input_size: expected an int, got None"),
    (lambda: LSTM(True, 4), TypeError, "input_size: expected an int, got True"),
    (lambda: LSTM(0, 4), ValueError, "input_size: expected at least 1, got 0"),
    (lambda: LSTM(3, -4), ValueError, "hidden_size: expected at least 1, got -4"),
    (lambda: LSTM(3, np.float32(4)), TypeError, "hidden_size: expected an int, got float32"),
    (lambda: LSTM(3, [4]), TypeError, "hidden_size: expected an int, got list of 1"),
    (lambda: LSTM(3, 4, num_layers=0), ValueError, "num_layers: expected at least 1, got 0"),
    (lambda: LSTM(3, 4, num_layers=False), TypeError, "num_layers: expected an int, got False"),
    (lambda: LSTM(3, 4, bias=1), TypeError, "bias: expected True or False, got 1"),
    (lambda: LSTM(3, 4, bias=None), TypeError, "bias: expected True or False, got None"),
    (lambda: LSTM(3, 4, batch_first="yes"), TypeError, "batch_first: expected True or False, got 'yes'"),
    (lambda: LSTM(3, 4, 2, dropout=-0.1), ValueError, "dropout: expected a number from 0 to 1, got -0.1"),
    (lambda: LSTM(3, 4, 2, dropout=1.0), ValueError, "dropout: expected a probability less than 1, got 1"),
    (lambda: LSTM(3, 4, 2, dropout=1.5), ValueError, "dropout: expected a number from 0 to 1, got 1.5"),
    (lambda: LSTM(3, 4, 2, dropout=np.nan), ValueError, "dropout: expected a number from 0 to 1, got nan"),
    (lambda: LSTM(3, 4, 2, dropout="0.5"), TypeError, "dropout: expected a number, got '0.5'"),
    (lambda: LSTM(3, 4, 2, dropout=True), TypeError, "dropout: expected a number, got True"),
    (lambda: LSTM(3, 4, 2, dropout=None), TypeError, "dropout: expected a number, got None"),
    (lambda: LSTM(3, 4, dtype=np.float16), TypeError, "dtype: expected float32 or float64, got .*float16"),
    (lambda: LSTM(3, 4, dtype=int), TypeError, "dtype: expected float32 or float64, got .*int"),
    (lambda: LSTM(3, 4, dtype=">f4"), TypeError, "dtype: expected float32 or float64, got '>f4'"),
    (lambda: LSTM(3, 4, dtype="single?"), TypeError, "dtype: expected float32 or float64, got 'single"),
    (lambda: LSTM(3, 4, dtype=None), TypeError, "dtype: expected float32 or float64, got None"),
    (lambda: LSTM(3, 4, dtype=3), TypeError, "dtype: expected float32 or float64, got 3"),
    (lambda: LSTM(3, 4, seed="a"), TypeError, "seed: expected an int, got 'a'"),
    (lambda: LSTM(3, 4, seed=-1), ValueError, "seed: expected at least 0, got -1"),
    (lambda: LSTM(3, 4, proj=5), TypeError, "proj"),
    # What the layers share.
    (lambda: RNN(3.0, 4), TypeError, "input_size: expected an int, got 3.0"),
    (lambda: GRU(3, 0), ValueError, "hidden_size: expected at least 1, got 0"),
    (lambda: RNN(3, 4, 0), ValueError, "num_layers: expected at least 1, got 0"),
    (lambda: RNN(3, 4, bias=None), TypeError, "bias: expected True or False, got None"),
    (lambda: GRU(3, 4, batch_first=1), TypeError, "batch_first: expected True or False, got 1"),
    (lambda: LSTM(3, 4, bidirectional=1), TypeError, "bidirectional: expected True or False, got 1"),
    (lambda: GRU(3, 4, bidirectional=2), TypeError, "bidirectional: expected True or False, got 2"),
    (lambda: RNN(3, 4, bidirectional=None), TypeError, "bidirectional: expected True or False, got None"),
    (lambda: GRU(3, 4, 2, dropout=1), ValueError, "dropout: expected a probability less than 1, got 1"),
    (lambda: RNN(3, 4, recurrent_dropout=1.0), ValueError, "recurrent_dropout: expected a probability less than 1"),
    (lambda: GRU(3, 4, recurrent_dropout=-0.5), ValueError, "recurrent_dropout: expected a number from 0 to 1, got -0"),
    (lambda: LSTM(3, 4, recurrent_dropout=None), TypeError, "recurrent_dropout: expected a number, got None"),
    (lambda: LSTM(3, 4, recurrent_dropout=(0.1, 0.1)), TypeError, "recurrent_dropout: expected a number, got tuple of"),
    (lambda: RNN(3, 4, zoneout=1.0), ValueError, "zoneout: expected a probability less than 1, got 1"),
    (lambda: RNN(3, 4, zoneout=(0.1, 0.2)), TypeError, "zoneout: expected a number, got tuple of 2"),
    (lambda: GRU(3, 4, zoneout=(0.1,)), TypeError, "zoneout: expected a number, got tuple of 1"),
    (lambda: GRU(3, 4, zoneout=None), TypeError, "zoneout: expected a number, got None"),
    (lambda: LSTM(3, 4, zoneout=1), ValueError, "zoneout: expected a probability less than 1, got 1"),
    (lambda: LSTM(3, 4, zoneout=(0.1, 1.0)), ValueError, "zoneout: expected a probability less than 1, got 1"),
    (lambda: LSTM(3, 4, zoneout=(-0.1, 0.1)), ValueError, "zoneout: expected a number from 0 to 1, got -0.1"),
    (lambda: LSTM(3, 4, zoneout=(0.1, "a")), TypeError, "zoneout: expected a number, got 'a'"),
    (
        lambda: LSTM(3, 4, zoneout=(0.1, 0.1, 0.1)),
        ValueError,
        "zoneout: expected a number or two, for h and c, got tuple of ",
    ),
    (lambda: LSTM(3, 4, zoneout=()), ValueError, "zoneout: expected a number or two, for h and c, got tuple of "),
    (lambda: LSTM(3, 4, zoneout=np.array([0.1, 0.1])), TypeError, "zoneout: expected a number, got ndarray"),
    (lambda: RNN(3, 4, dtype=int), TypeError, "dtype: expected float32 or float64, got "),
    (lambda: GRU(3, 4, seed=-1), ValueError, "seed: expected at least 0, got -1"),
    # RNN.
    (lambda: RNN(3, 4, nonlinearity="sine"), ValueError, "nonlinearity: expected one of tanh, relu, .*, got 'sine'"),
    (lambda: RNN(3, 4, nonlinearity=None), ValueError, "nonlinearity: .* compiled by numba.njit, got None"),
    (lambda: RNN(3, 4, nonlinearity=(abs, abs)), ValueError, "nonlinearity: .* by numba.njit, got tuple of 2"),
    (lambda: RNN(3, 4, nonlinearity=(jitted, abs)), ValueError, "nonlinearity: .* by numba.njit, got tuple of 2"),
    (lambda: RNN(3, 4, nonlinearity=(jitted,)), ValueError, "nonlinearity: .* by numba.njit, got tuple of 1"),
    (lambda: RNN(3, 4, nonlinearity=jitted), ValueError, "nonlinearity: .* by numba.njit, got "),
    (lambda: RNN(3, 4, 1, True), ValueError, "nonlinearity: expected one of tanh, relu, identity or .*, got True"),
    (lambda: RNN(3, 4, layer_norm=True), TypeError, "layer_norm"),
    # LSTM.
    (lambda: LSTM(3, 4, proj_size=4), ValueError, "proj_size: expected less than hidden_size, 4, got 4"),
    (lambda: LSTM(3, 4, proj_size=-1), ValueError, "proj_size: expected at least 0, got -1"),
    (lambda: LSTM(3, 4, proj_size=2.0), TypeError, "proj_size: expected an int, got 2.0"),
    (lambda: LSTM(3, 4, proj_size=True), TypeError, "proj_size: expected an int, got True"),
    (lambda: LSTM(3, 4, peephole=1), TypeError, "peephole: expected True or False, got 1"),
    (lambda: LSTM(3, 4, coupled=None), TypeError, "coupled: expected True or False, got None"),
    (lambda: LSTM(3, 4, cell_clip=0), ValueError, "cell_clip: expected a number greater than 0, got 0"),
    (lambda: LSTM(3, 4, cell_clip=-1.0), ValueError, "cell_clip: expected a number .*, got -1.0"),
    (lambda: LSTM(3, 4, cell_clip=np.inf), ValueError, "cell_clip: expected a number .*, got inf"),
    (lambda: LSTM(3, 4, cell_clip="1"), TypeError, "cell_clip: expected a number, got '1'"),
    (lambda: LSTM(3, 4, cell_clip=True), TypeError, "cell_clip: expected a number, got True"),
    (lambda: LSTM(3, 4, layer_norm=1), TypeError, "layer_norm: expected True or False, got 1"),
    (lambda: LSTM(3, 4, nonlinearity="tanh"), TypeError, "nonlinearity"),
    # GRU.
    (lambda: GRU(3, 4, reset_after=0), TypeError, "reset_after: expected True or False, got 0"),
    (lambda: GRU(3, 4, reset_after="no"), TypeError, "reset_after: expected True or False, got 'no'"),
    (lambda: GRU(3, 4, layer_norm="yes"), TypeError, "layer_norm: expected True or False, got 'yes'"),
    (lambda: GRU(3, 4, layer_norm=True, reset_after=False), ValueError, "reset_after: expected True with layer_norm"),
    (lambda: GRU(3, 4, proj_size=2), TypeError, "proj_size"),
]

INPUTS = [
    (None, ValueError, r"x: expected 3 dimensions .* or 2 .*, got shape \(\)"),
    (1.0, ValueError, r"x: expected 3 dimensions .* or 2 .*, got shape \(\)"),
    (zeros(3), ValueError, r"x: expected 3 dimensions .* or 2 .*, got shape \(3,\)"),
    (zeros(1, 5, 2, 3), ValueError, r"x: expected 3 dimensions .* or 2 .*, got shape \(1, 5, 2, 3\)"),
    ([[1.0, 2.0, 3.0], [1.0]], TypeError, "x: expected an array in main memory, got list of 2"),
    (Unconvertible(), TypeError, "x: expected an array in main memory, got Unconvertible: on another device"),
    (zeros(5, 2, 4), ValueError, r"x: expected shape \(.*3\), got \(5, 2, 4\)"),
    (zeros(5, 4), ValueError, r"x: expected shape \(.*3\), got "),
    (zeros(0, 2, 3), ValueError, r"x: expected shape \(.*at least 1.*3\), got \(.*0.*3\)"),
    (zeros(5, 0, 3), ValueError, r"x: expected shape \(.*at least 1.*3\), got \(.*0.*3\)"),
    (zeros(5, 2, 0), ValueError, r"x: expected shape \(.*3\), got \(.*0\)"),
    (zeros(0, 3), ValueError, r"x: expected shape \(at least 1.*3\), got \(0.*3\)"),
    (zeros(5, 2, 3, dtype=np.float64), TypeError, "x: expected dtype float32, got float64"),
    (zeros(5, 2, 3, dtype=np.float16), TypeError, "x: expected dtype float32, got float16"),
    (zeros(5, 2, 3, dtype=int), TypeError, "x: expected dtype float32, got int64"),
    (zeros(5, 2, 3, dtype=bool), TypeError, "x: expected dtype float32, got bool"),
    (zeros(5, 2, 3, dtype=complex), TypeError, "x: expected dtype float32, got complex128"),
    (zeros(5, 2, 3, dtype=">f4"), TypeError, "x: expected dtype float32, got >f4"),
    (zeros(5, 2, 3).astype(object), TypeError, "x: expected dtype float32, got object"),
    ([[[1.0, 2.0, 3.0]]], TypeError, "x: expected dtype float32, got float64"),
]

STATES = [
    (h, TypeError, "expected a tuple of 2 arrays, got ndarray"),
    ((h,), TypeError, "expected a tuple of 2 arrays, got tuple of 1"),
    ((h, h, h), TypeError, "expected a tuple of 2 arrays, got tuple of 3"),
    ((), TypeError, "expected a tuple of 2 arrays, got tuple of 0"),
    (3, TypeError, "expected a tuple of 2 arrays, got 3"),
    ({"h": h, "c": h}, TypeError, "expected a tuple of 2 arrays, got dict"),
    ((h, None), TypeError, "expected dtype float32, got object"),
    ((None, h), TypeError, "expected dtype float32, got object"),
    ((h, h.astype(np.float64)), TypeError, "expected dtype float32, got float64"),
    ((h[:1], h), ValueError, r"expected shape \(2, 2, 4\), got \(1, 2, 4\)"),
    ((h, h[:, :1]), ValueError, r"expected shape \(2, 2, 4\), got \(2, 1, 4\)"),
    ((h, h[..., :3]), ValueError, r"expected shape \(2, 2, 4\), got \(2, 2, 3\)"),
    ((h[:, 0], h[:, 0]), ValueError, r"expected shape \(2, 2, 4\), got \(2, 4\)"),
    ((h, Unconvertible()), TypeError, "expected an array in main memory, got Unconvertible"),
]

# Of a layer with one state.
ONE_STATE = [
    ((h, h), ValueError, r"expected shape \(2, 2, 4\), got \(2, 2, 2, 4\)"),
    ((h,), ValueError, r"expected shape \(2, 2, 4\), got \(1, 2, 2, 4\)"),
    (h[:1], ValueError, r"expected shape \(2, 2, 4\), got \(1, 2, 4\)"),
    (h[:, 0], ValueError, r"expected shape \(2, 2, 4\), got \(2, 4\)"),
    (h[..., :3], ValueError, r"expected shape \(2, 2, 4\), got \(2, 2, 3\)"),
    (h.astype(np.float64), TypeError, "expected dtype float32, got float64"),
    (3, TypeError, "expected dtype float32, got int64"),
    (Unconvertible(), TypeError, "expected an array in main memory, got Unconvertible"),
]

# Of two sequences of up to five steps.
LENGTHS = [
    ([5], ValueError, r"expected shape \(2,\), got \(1,\)"),
    ([5, 5, 5], ValueError, r"expected shape \(2,\), got \(3,\)"),
    ([[5, 5]], ValueError, r"expected shape \(2,\), got \(1, 2\)"),
    (5, ValueError, r"expected shape \(2,\), got \(\)"),
    ([5, 6], ValueError, "expected numbers from 0 to 5, got 6"),
    ([-1, 3], ValueError, "expected numbers from 0 to 5, got -1"),
    (np.array([1, 2**63], np.uint64), ValueError, "expected numbers from 0 to 5, got 9223372036854775808"),
    ([1.0, 2.0], TypeError, "expected integers, got dtype float64"),
    ([True, False], TypeError, "expected integers, got dtype bool"),
    (["a", "b"], TypeError, "expected integers, got dtype <U1"),
    ([None, 1], TypeError, "expected integers, got dtype object"),
    ([], TypeError, "expected integers, got dtype float64"),
    (Unconvertible(), TypeError, "expected an array in main memory, got Unconvertible"),
]

CHECKPOINTS = [
    (0, ValueError, "expected at least 1, got 0"),
    (-3, ValueError, "expected at least 1, got -3"),
    (2.0, TypeError, "expected an int, got 2.0"),
    (True, TypeError, "expected an int, got True"),
    ("2", TypeError, "expected an int, got '2'"),
    ([2], TypeError, "expected an int, got list of 1"),
]

GRADIENTS = [
    (y[:4], ValueError, r"dy: expected shape \(5, 2, 4\), got \(4, 2, 4\)"),
    (y[:, :1], ValueError, r"dy: expected shape \(5, 2, 4\), got \(5, 1, 4\)"),
    (y[:, 0], ValueError, r"dy: expected shape \(5, 2, 4\), got \(5, 4\)"),
    (x, ValueError, r"dy: expected shape \(5, 2, 4\), got \(5, 2, 3\)"),
    (y.astype(np.float64), TypeError, "dy: expected dtype float32, got float64"),
    (1.0, TypeError, "dy: expected dtype float32, got float64"),
    (np.float32(1), ValueError, r"dy: expected shape \(5, 2, 4\), got \(\)"),
    (Unconvertible(), TypeError, "dy: expected an array in main memory, got Unconvertible"),
]

REST = [
    (lambda: lstm(), TypeError, "x"),
    (lambda: lstm(x[:, 0], (h, h)), ValueError, r"state.*: expected shape \(2, 4\), got \(2, 2, 4\)"),
    (lambda: first(zeros(5, 2, 4)), ValueError, r"x: expected shape \(.*3\)"),
    (lambda: first.vjp(x)[1](y.swapaxes(0, 1)), ValueError, "dy: expected shape "),
    (lambda: first.vjp(x)[1](y[0]), ValueError, "dy: expected shape "),
    (lambda: first(x, lengths=[2, 2]), ValueError, r"lengths: expected shape \(5,\), got \(2,\)"),
    (lambda: first(x, lengths=[2, 2, 3, 1, 0]), ValueError, "lengths: expected numbers from 0 to 2, got 3"),
    (lambda: gru(x[:, 0], lengths=5), ValueError, r"lengths: expected shape \(1,\), got \(\)"),
    (lambda: gru(x[:, 0], h), ValueError, r"state: expected shape \(2, 4\), got \(2, 2, 4\)"),
    (lambda: both_ways(x, h[:1]), ValueError, r"state: expected shape \(2, 2, 4\), got \(1, 2, 4\)"),
    (lambda: both_ways.vjp(x)[1](y), ValueError, r"dy: expected shape \(5, 2, 8\), got \(5, 2, 4\)"),
    (lambda: both_ways.vjp(x, checkpoint=2)[1](y), ValueError, r"dy: expected shape \(5, 2, 8\), got \(5, 2, 4\)"),
    (lambda: projected(x, (h, h)), ValueError, r"state: expected shape \(2, 2, 2\), got \(2, 2, 4\)"),
    (lambda: projected(x, (h[..., :2], h[..., :2])), ValueError, r"state: expected shape \(2, 2, 4\), got \(2, 2, 2\)"),
    (lambda: projected.vjp(x)[1](y), ValueError, r"dy: expected shape \(5, 2, 2\), got \(5, 2, 4\)"),
    (lambda: both_ways.packed, ValueError, "packed: expected a layer of one direction without zoneout and layer_norm"),
    (lambda: lstm.new_state(0), ValueError, "batch_size: expected at least 1, got 0"),
    (lambda: lstm.vjp(x, rng=3), TypeError, r"rng: expected a numpy.random.Generator, got 3"),
    (lambda: lstm.vjp(x, rng=np.random), TypeError, r"rng: expected a numpy.random.Generator, got module"),
    (lambda: lstm.load_state_dict({}), KeyError, "missing .'weight_ih_l0'"),
    (lambda: lstm.load_state_dict(None), TypeError, "state_dict: expected a mapping, got None"),
    (lambda: lstm.load_state_dict([1, 2]), TypeError, "state_dict: expected a mapping, got list of 2"),
    (lambda: lstm.load_state_dict({**lstm.state_dict(), "bias_ih_l0": None}), ValueError, "bias_ih_l0: expected shape"),
    (lambda: lstm.save(3), TypeError, "path|Path"),
    (lambda: lstm.save(None), TypeError, "path|Path"),
    (lambda: lstm.load(None), TypeError, "path|Path"),
    (lambda: lstm.load("/no/such/file"), FileNotFoundError, "/no/such/file"),
    (lambda: lstm.no_such_name, AttributeError, "LSTM has no attribute 'no_such_name'"),
    (lambda: lstm.parameters["none"], KeyError, "none"),
    (lambda: Parameters({"a": zeros(2)}).__setitem__("b", zeros(2)), KeyError, "b: no such parameter; there are a"),
    (lambda: Parameters({"a": zeros(2)}).__setitem__("a", "text"), ValueError, r"a: expected shape \(2,\), got \(\)"),
    (lambda: fastrnn.set_num_threads(0), ValueError, "n: expected at least 1, got 0"),
    (lambda: fastrnn.set_num_threads(-2), ValueError, "n: expected at least 1, got -2"),
    (lambda: fastrnn.set_num_threads(2.0), TypeError, "n: expected an int, got 2.0"),
    (lambda: fastrnn.set_num_threads(True), TypeError, "n: expected an int, got True"),
    (lambda: fastrnn.set_num_threads("2"), TypeError, "n: expected an int, got '2'"),
    (lambda: fastrnn.set_num_threads(None), TypeError, "n: expected an int, got None"),
    (lambda: checks.integer(2, "n", 3), ValueError, "n: expected at least 3, got 2"),
    (lambda: checks.number("1", "lr"), TypeError, "lr: expected a number, got '1'"),
    (lambda: checks.number(np.inf, "lr"), ValueError, "lr: expected a number from -inf to inf, got inf"),
    (lambda: checks.number(np.nan, "lr", 0), ValueError, "lr: expected a number from 0 to inf, got nan"),
    (lambda: checks.number(-1, "lr", 0), ValueError, "lr: expected a number from 0 to inf, got -1"),
    (lambda: checks.number(10**400, "lr", 0), ValueError, "lr: expected a number from 0 to inf, got 1000"),
    (lambda: checks.as_kernel_array(zeros(2, 3), "a", f32, (2,)), ValueError, r"a: expected shape \(2\), got \(2, 3\)"),
    (lambda: checks.as_kernel_array(zeros(2), "a", f32, (2, None)), ValueError, r"a: expected shape \(2, at least 1\)"),
]


def ids(table):
    return [str(i) for i in range(len(table))]


@pytest.mark.parametrize(("call", "error", "message"), CONSTRUCTING, ids=ids(CONSTRUCTING))
def test_constructing(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    # The argument comes first, but where Python itself has refused it.
    assert re.match(message, str(caught.value)) or "__init__()" in str(caught.value)


@pytest.mark.parametrize(("given", "error", "message"), INPUTS, ids=ids(INPUTS))
@pytest.mark.parametrize("layer", [lstm, first, gru, both_ways], ids=["LSTM", "batch first", "GRU", "both ways"])
def test_inputs(given, error, message, layer):
    with pytest.raises(error, match=message):
        layer(given)
    with pytest.raises(error, match=message):
        layer.vjp(given)


@pytest.mark.parametrize(("given", "error", "message"), STATES, ids=ids(STATES))
def test_states(given, error, message):
    with pytest.raises(error, match="state.*: " + message):
        lstm(x, given)
    with pytest.raises(error, match="state.*: " + message):
        lstm.vjp(x, given)
    with pytest.raises(error, match="dstate.*: " + message):
        lstm.vjp(x)[1](y, given)


@pytest.mark.parametrize(("given", "error", "message"), ONE_STATE, ids=ids(ONE_STATE))
@pytest.mark.parametrize("layer", [gru, both_ways], ids=["GRU", "both ways"])
def test_one_state(given, error, message, layer):
    with pytest.raises(error, match="^state: " + message):
        layer(x, given)
    with pytest.raises(error, match="^state: " + message):
        layer.vjp(x, given)
    pullback = layer.vjp(x)[1]
    with pytest.raises(error, match="^dstate: " + message):
        pullback(None, given)


@pytest.mark.parametrize(("given", "error", "message"), LENGTHS, ids=ids(LENGTHS))
@pytest.mark.parametrize("layer", [lstm, gru, both_ways], ids=["LSTM", "GRU", "both ways"])
def test_lengths(given, error, message, layer):
    with pytest.raises(error, match="^lengths: " + message):
        layer(x, lengths=given)
    with pytest.raises(error, match="^lengths: " + message):
        layer.vjp(x, lengths=given)


@pytest.mark.parametrize(("given", "error", "message"), CHECKPOINTS, ids=ids(CHECKPOINTS))
@pytest.mark.parametrize("layer", [lstm, gru], ids=["LSTM", "GRU"])
def test_checkpoints(given, error, message, layer):
    with pytest.raises(error, match="^checkpoint: " + message):
        layer.vjp(x, checkpoint=given)


@pytest.mark.parametrize(("given", "error", "message"), GRADIENTS, ids=ids(GRADIENTS))
@pytest.mark.parametrize("options", [{}, {"checkpoint": 2}, {"lengths": [3, 5]}], ids=str)
@pytest.mark.parametrize("layer", [lstm, gru], ids=["LSTM", "GRU"])
def test_gradients(given, error, message, options, layer):
    with pytest.raises(error, match=message):
        layer.vjp(x, **options)[1](given)


@pytest.mark.parametrize(("call", "error", "message"), REST, ids=ids(REST))
def test_the_rest(call, error, message):
    before, threads = lstm.state_dict(), batching.get_num_threads()
    with pytest.raises(error, match=message):
        call()
    assert batching.get_num_threads() == threads
    assert all(np.array_equal(lstm.parameters[name], array) for name, array in before.items())


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "1e3", "²"])
def test_a_wrong_environment_variable(value):
    run = with_variable(value)
    assert run.returncode == 1
    assert f"ValueError: FASTRNN_NUM_THREADS: expected a whole number of at least 1, got {value!r}" in run.stderr


@pytest.mark.parametrize(("value", "threads"), [("1", 1), ("3", 3), (" 2 ", 2)])
def test_the_environment_variable(value, threads):
    run = with_variable(value)
    assert run.stdout.split() == [str(threads)], run.stderr


@pytest.mark.parametrize("value", ["", " "])
def test_an_empty_environment_variable_is_none(value):
    assert int(with_variable(value).stdout) == len(os.sched_getaffinity(0))


def with_variable(value):
    env = {**os.environ, "FASTRNN_NUM_THREADS": value, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    code = "import fastrnn; print(fastrnn.get_num_threads())"
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, encoding="utf-8")


def test_what_is_right_is_taken():
    """The limits of what the table refuses."""
    assert checks.integer(np.int32(3), "n", 3) == 3
    assert checks.probability(0, "p") == 0.0
    assert checks.number(np.float32(0.5), "p", 0.5, 0.5) == 0.5
    assert checks.flag(np.True_, "f") is True
    assert checks.float_dtype("float64") == checks.float_dtype(float) == np.float64
    assert LSTM(np.int64(1), 1, dropout=0).input_size == 1
    assert LSTM(3, 4, proj_size=3, cell_clip=1e-9, zoneout=[0, 0.99]).output_size == 3
    assert LSTM(3, 4, proj_size=np.int64(0), cell_clip=None, peephole=np.False_).output_size == 4
    assert RNN(3, 4, nonlinearity=(jitted, jitted), zoneout=0.999, recurrent_dropout=0).output_size == 4
    assert GRU(3, 4, layer_norm=False, reset_after=False, bidirectional=np.True_).directions == 2
    for lengths in ([0, 5], (0, 5), np.array([0, 5], np.uint8), np.array([0, 9, 5])[::2]):
        assert not gru(x, lengths=lengths)[0][:, 0].any()
    assert gru.vjp(x, checkpoint=np.int32(100))[0][0].shape == y.shape
    assert gru(x[:, 0], lengths=[3])[0].shape == (5, 4)
    assert lstm(x, [h, h])[0].shape == y.shape
    assert lstm(x[:1, :1])[0].shape == (1, 1, 4)
    a = zeros(2, 3)
    assert checks.as_kernel_array(a, "a", f32, (2, None)) is a
