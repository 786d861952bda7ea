"""The table of wrong calls: each raises the error that its documentation names, and says what was wrong."""

import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

import fastrnn
from fastrnn import batching, checks
from fastrnn.parameters import Parameters

LSTM = fastrnn.LSTM
lstm = LSTM(3, 4, num_layers=2, seed=0)
first = LSTM(3, 4, batch_first=True, seed=0)
x, h = np.ones((5, 2, 3), np.float32), np.ones((2, 2, 4), np.float32)
y = np.ones((5, 2, 4), np.float32)
f32 = np.dtype(np.float32)


class Unconvertible:
    def __array__(self, *args, **kwargs):
        raise RuntimeError("on another device")


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
    (lambda: LSTM(3, 4, seed="a"), TypeError, "[sS]eed"),
    (lambda: LSTM(3, 4, seed=-1), ValueError, "[sS]eed|non-negative"),
    (lambda: LSTM(3, 4, proj=5), TypeError, "proj"),
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
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(("given", "error", "message"), INPUTS, ids=ids(INPUTS))
@pytest.mark.parametrize("layer", [lstm, first], ids=["time first", "batch first"])
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


@pytest.mark.parametrize(("given", "error", "message"), GRADIENTS, ids=ids(GRADIENTS))
def test_gradients(given, error, message):
    with pytest.raises(error, match=message):
        lstm.vjp(x)[1](given)


@pytest.mark.parametrize(("call", "error", "message"), REST, ids=ids(REST))
def test_the_rest(call, error, message):
    before, threads = lstm.state_dict(), batching.get_num_threads()
    with pytest.raises(error, match=message):
        call()
    assert batching.get_num_threads() == threads
    assert all(np.array_equal(lstm.parameters[name], array) for name, array in before.items())


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "", " ", "1e3", "²"])
def test_a_wrong_environment_variable(value):
    run = with_variable(value)
    assert run.returncode == 1
    assert f"ValueError: FASTRNN_NUM_THREADS: expected a whole number of at least 1, got {value!r}" in run.stderr


@pytest.mark.parametrize(("value", "threads"), [("1", 1), ("3", 3), (" 2 ", 2)])
def test_the_environment_variable(value, threads):
    run = with_variable(value)
    assert run.stdout.split() == [str(threads)], run.stderr


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
    assert lstm(x, [h, h])[0].shape == y.shape
    assert lstm(x[:1, :1])[0].shape == (1, 1, 4)
    a = zeros(2, 3)
    assert checks.as_kernel_array(a, "a", f32, (2, None)) is a
