"""Layers that are fed one step at a time: streams, and the kernels' ``step`` in a user's own compiled loop."""

import copy
import gc
import pickle
import subprocess
import sys
import tracemalloc

import numba
import numpy as np
import oracle
import pytest
from fastrnn.kernels import gru as gru_kernels
from fastrnn.kernels import lstm as lstm_kernels
from fastrnn.kernels import rnn as rnn_kernels
from oracle import BASIC, CASES, assert_same_bits, each, make, named

import fastrnn
from fastrnn.streaming import Stream

IN_PLACE = [case for case in CASES if "norm" not in case]
depths = pytest.mark.parametrize("num_layers", [1, 2])


def sequence(layer, T, B, seed=0):
    x, state, _, _ = oracle.inputs(layer, T, B, seed)
    return x, state


def steps(stream, x):
    """The outputs of a stream for each step of a sequence, copied from its memory."""
    return np.stack([stream.step(x_t).copy() for x_t in x])


def assert_same_states(actual, expected):
    oracle.assert_all_same_bits(named(actual, ""), named(expected, ""))


@depths
@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("options", [{}, {"zoneout": 0.3}], ids=["plain", "zoneout"])
@pytest.mark.parametrize("case", CASES)
def test_a_stream_gives_the_sequences_outputs(case, options, B, num_layers, dtype):
    """Bit for bit, from zeros, and from the state that it was given."""
    layer = make(case, 5, 37, dtype, num_layers=num_layers, **options)
    assert layer.steps_in_place == (case in IN_PLACE and not options)
    x, state = sequence(layer, 6, B)
    stream = layer.stream(B)
    for before in (None, state):
        if before is not None:
            stream.state = before
        y, after = layer(x, before)
        assert_same_bits(steps(stream, x), y)
        assert_same_states(stream.state, after)


@pytest.mark.parametrize("H", [1, 16, 64, 65, 300])
@pytest.mark.parametrize("case", ["RNN", "LSTM", "LSTM proj", "GRU", "GRU reset before"])
def test_streams_of_any_width(case, H, dtype):
    if "proj" in case and H == 1:
        return
    layer = make(case, 70, H, dtype, num_layers=2)
    for B in (1, 2, 9):
        x, _ = sequence(layer, 3, B)
        y, after = layer(x)
        stream = layer.stream(B)
        assert_same_bits(steps(stream, x), y)
        assert_same_states(stream.state, after)


@pytest.mark.parametrize("options", [{"bias": False}, {"batch_first": True}, {"batch_first": True, "zoneout": 0.2}])
@pytest.mark.parametrize("case", BASIC)
def test_options_of_the_layer(case, options):
    layer = make(case, 3, 20, num_layers=2, **options)
    x, _ = sequence(layer, 5, 2)
    y, after = layer(x.swapaxes(0, 1) if layer.batch_first else x)
    stream = layer.stream(2)
    assert_same_bits(steps(stream, x), np.ascontiguousarray(y.swapaxes(0, 1) if layer.batch_first else y))
    assert_same_states(stream.state, after)


def test_nothing_is_dropped():
    layer = make("LSTM", 3, 20, num_layers=2, dropout=0.5, recurrent_dropout=0.5)
    x, _ = sequence(layer, 5, 2)
    assert_same_bits(steps(layer.stream(2), x), layer(x)[0])


@pytest.mark.parametrize("options", [{}, {"zoneout": 0.3}], ids=["plain", "zoneout"])
@pytest.mark.parametrize("case", BASIC)
def test_reset(case, options):
    layer = make(case, 3, 20, num_layers=2, **options)
    x, _ = sequence(layer, 4, 2)
    stream = layer.stream(2)
    y = steps(stream, x)
    assert not np.array_equal(steps(stream, x), y)
    stream.reset()
    assert all(not s.any() for s in named(stream.state, "").values())
    assert_same_bits(steps(stream, x), y)


@pytest.mark.parametrize("options", [{}, {"zoneout": 0.3}], ids=["plain", "zoneout"])
@pytest.mark.parametrize("case", [*BASIC, "LSTM proj"])
def test_the_state_is_copied_both_ways(case, options):
    layer = make(case, 3, 20, num_layers=2, **options)
    x, state = sequence(layer, 4, 2)
    stream = layer.stream(2)
    stream.state = state
    given = each(state, np.copy)
    before = stream.state
    assert isinstance(before, tuple) == ("LSTM" in case)
    assert_same_states(before, given)
    y = steps(stream, x)
    # What was given, and what was taken before, is as it was.
    assert_same_states(state, given)
    assert_same_states(before, given)
    # Writing to either does not reach the stream.
    after = stream.state
    each(state, lambda s: s.fill(7))
    each(stream.state, lambda s: s.fill(7))
    assert_same_states(stream.state, after)
    stream.state = before
    assert_same_bits(steps(stream, x), y)


def test_none_is_a_state_of_zeros():
    layer = make("LSTM", 3, 20)
    x, _ = sequence(layer, 4, 2)
    stream = layer.stream(2)
    y = steps(stream, x)
    stream.state = None
    assert_same_bits(steps(stream, x), y)


@pytest.mark.parametrize(
    ("case", "change", "error", "message"),
    [
        ("LSTM", lambda h, c: h, TypeError, "state: expected a tuple of 2 arrays, got ndarray"),
        ("LSTM", lambda h, c: (h,), TypeError, "state: expected a tuple of 2 arrays, got tuple of 1"),
        ("LSTM", lambda h, c: (h, c[:, :1]), ValueError, r"state: expected shape \(2, 3, 4\), got \(2, 1, 4\)"),
        ("LSTM", lambda h, c: (h[:, 0], c[:, 0]), ValueError, r"state: expected shape \(2, 3, 4\), got \(2, 4\)"),
        ("LSTM", lambda h, c: (h, c.astype(np.float64)), TypeError, "state: expected dtype float32, got float64"),
        ("GRU", lambda h, c: (h, c), ValueError, r"state: expected shape \(2, 3, 4\), got \(2, 2, 3, 4\)"),
        ("GRU", lambda h, c: h[0], ValueError, r"state: expected shape \(2, 3, 4\), got \(3, 4\)"),
        ("RNN", lambda h, c: h.astype(int), TypeError, "state: expected dtype float32, got int64"),
    ],
)
def test_a_wrong_state_changes_nothing(case, change, error, message):
    layer = make(case, 3, 4, num_layers=2)
    x, _ = sequence(layer, 2, 3)
    stream = layer.stream(3)
    steps(stream, x)
    before = stream.state
    h = np.ones((2, 3, 4), np.float32)
    with pytest.raises(error, match="^" + message):
        stream.state = change(h, h)
    assert_same_states(stream.state, before)


@pytest.mark.parametrize("options", [{}, {"zoneout": 0.3}], ids=["plain", "zoneout"])
@pytest.mark.parametrize("case", BASIC)
def test_a_change_of_parameters_is_seen(case, options):
    """At the next step, and inside ``writable`` at each; the state goes on."""
    layer = make(case, 3, 20, num_layers=2, **options)
    x, _ = sequence(layer, 1, 2)
    stream = layer.stream(2)

    def check():
        y, after = layer(x, stream.state)
        assert_same_bits(stream.step(x[0]), y[0])
        assert_same_states(stream.state, after)
        return y

    check()
    check()
    seen = []
    layer.weight_hh_l1 = -layer.weight_hh_l1
    seen.append(check())
    with layer.parameters.writable() as arrays:
        for _ in range(3):
            arrays["weight_ih_l0"] += 0.25
            seen.append(check())
    seen.append(check())
    layer.load_state_dict(make(case, 3, 20, num_layers=2, seed=2).state_dict())
    seen.append(check())
    assert len({y.tobytes() for y in seen}) == len(seen)


def test_streams_of_one_layer_do_not_meet():
    layer = make("GRU", 3, 20, num_layers=2)
    x, _ = sequence(layer, 6, 3)
    streams = [layer.stream(1) for _ in range(3)]
    y = np.stack([np.concatenate([s.step(x_t[b : b + 1]).copy() for b, s in enumerate(streams)]) for x_t in x])
    assert_same_bits(y, layer(x)[0])


# What a step takes and returns.


def misaligned(a):
    memory = np.zeros(a.nbytes + 1, np.uint8)
    copy = np.ndarray(a.shape, a.dtype, memory.data, 1)
    copy[...] = a
    return copy


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


LAYOUTS = {
    "fortran": np.asfortranarray,
    "strided": lambda a: np.repeat(a, 2, axis=1)[:, ::2],
    "reversed": lambda a: a[::-1, ::-1].copy()[::-1, ::-1],
    "read-only": read_only,
    "misaligned": misaligned,
    "a list": lambda a: list(a),
    "a subclass": lambda a: a.view(np.recarray),
    "a memory view": memoryview,
}


COPY = """
import pickle, sys
stream, x = pickle.load(open(sys.argv[1], "rb"))
print(stream.step(x).tobytes().hex())
"""


@pytest.mark.parametrize("options", [{}, {"zoneout": 0.3}], ids=["plain", "zoneout"])
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda stream: pickle.loads(pickle.dumps(stream))])
def test_copies_go_on_by_themselves(copied, options):
    layer = make("LSTM", 3, 17, num_layers=2, **options)
    x = sequence(layer, 4, 2)[0]
    stream = layer.stream(2)
    stream.step(x[0])
    other = copied(stream)
    assert_same_bits(steps(other, x[1:]), steps(stream, x[1:]))
    assert_same_states(other.state, stream.state)


def test_a_copy_in_another_process(tmp_path):
    """Where nothing lies at the addresses that it had here."""
    layer = make("LSTM", 3, 17)
    x = sequence(layer, 2, 3)[0]
    stream = layer.stream(3)
    stream.step(x[0])
    (tmp_path / "stream").write_bytes(pickle.dumps((stream, x[1])))
    done = subprocess.run([sys.executable, "-c", COPY, tmp_path / "stream"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == stream.step(x[1]).tobytes().hex()


@pytest.mark.parametrize("options", [{}, {"zoneout": 0.3}], ids=["plain", "zoneout"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_x_of_any_layout(layout, options, dtype):
    layer = make("LSTM", 4, 20, dtype, **options)
    x, _ = sequence(layer, 3, 2)
    y = steps(layer.stream(2), x)
    stream = layer.stream(2)
    for x_t, y_t in zip(x, y):
        given = layout(x_t)
        assert_same_bits(stream.step(given), y_t)
        np.testing.assert_array_equal(given, x_t)


def test_steps_of_any_layout_compile_nothing_anew():
    layer = make("LSTM", 4, 20)
    stream = layer.stream(2)
    x, _ = sequence(layer, 1, 2)
    stream.step(x[0])
    before = len(lstm_kernels.step_of_arrays.signatures)
    for layout in LAYOUTS.values():
        stream.step(layout(x[0]))
    assert len(lstm_kernels.step_of_arrays.signatures) == before


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.ones(3, np.float32), ValueError, r"x: expected shape \(2, 3\), got \(3,\)"),
        (np.ones((1, 3), np.float32), ValueError, r"x: expected shape \(2, 3\), got \(1, 3\)"),
        (np.ones((3, 3), np.float32), ValueError, r"x: expected shape \(2, 3\), got \(3, 3\)"),
        (np.ones((2, 4), np.float32), ValueError, r"x: expected shape \(2, 3\), got \(2, 4\)"),
        (np.ones((1, 2, 3), np.float32), ValueError, r"x: expected shape \(2, 3\), got \(1, 2, 3\)"),
        (np.ones((2, 3)), TypeError, "x: expected dtype float32, got float64"),
        (np.ones((2, 3), int), TypeError, "x: expected dtype float32, got int64"),
        (np.ones((2, 3), ">f4"), TypeError, "x: expected dtype float32, got >f4"),
        ([[1.0], [1.0, 2.0]], TypeError, "x: expected an array in main memory, got list of 2"),
        (None, TypeError, "x: expected dtype float32, got object"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"zoneout": 0.3}], ids=["plain", "zoneout"])
def test_a_wrong_x_changes_nothing(x, error, message, options):
    stream = make("GRU", 3, 4, **options).stream(2)
    stream.step(np.ones((2, 3), np.float32))
    before = stream.state
    with pytest.raises(error, match="^" + message):
        stream.step(x)
    assert_same_states(stream.state, before)


@pytest.mark.parametrize("options", [{}, {"zoneout": 0.3}], ids=["plain", "zoneout"])
@pytest.mark.parametrize("case", ["GRU", "LSTM proj"])
def test_outputs_are_the_streams_own_memory(case, options):
    """The same each time, of which only the stream changes anything."""
    layer = make(case, 3, 12, num_layers=2, **options)
    stream = layer.stream(2)
    x, _ = sequence(layer, 2, 2)
    first = stream.step(x[0])
    value = first.copy()
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 0
    second = stream.step(x[1])
    assert first.ctypes.data == second.ctypes.data
    assert first.shape == (2, layer.output_size)
    assert not np.array_equal(first, value)
    assert_same_bits(first, named(stream.state, "")["h"][-1])


def allocated(function, times):
    """What so many calls leave behind, and the most that one of them has, in bytes.

    The least of five rounds: other threads of the process allocate now and then, a call does so in every round.
    """
    kept, most = [], []
    gc.collect()
    gc.disable()
    try:
        for _ in range(500):  # the interpreter's free lists fill, which a collection has emptied
            function()
        tracemalloc.start()
        function()
        for _ in range(5):
            before, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            for _ in range(times // 5):
                function()
            after, peak = tracemalloc.get_traced_memory()
            kept.append(after - before)
            most.append(peak - before)
    finally:
        tracemalloc.stop()
        gc.enable()
    return min(kept), min(most)


@depths
@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("case", IN_PLACE)
def test_a_step_allocates_nothing(case, B, num_layers):
    """Nothing that stays, and in passing less than one row of anything: Numba's own few small objects."""
    layer = make(case, 600, 400, num_layers=num_layers)
    stream, x = layer.stream(B), np.ones((B, 600), np.float32)
    kept, most = allocated(lambda: stream.step(x), 1000 if num_layers == 1 else 200)
    assert kept < 200
    assert most < 1600


@pytest.mark.parametrize("layout", ["fortran", "strided", "reversed", "read-only", "misaligned"])
def test_nor_for_an_x_that_has_to_be_copied(layout):
    layer = make("GRU", 900, 8)
    stream, x = layer.stream(3), LAYOUTS[layout](np.ones((3, 900), np.float32))
    kept, most = allocated(lambda: stream.step(x), 1000)
    assert kept < 200
    assert most < 3600


@pytest.mark.parametrize("case", CASES)
def test_a_layer_of_two_directions_is_refused(case):
    layer = make(case, 3, 4, bidirectional=True)
    with pytest.raises(ValueError, match=r"^stream: expected a layer of one direction"):
        layer.stream()
    with pytest.raises(ValueError, match=r"^packed: expected a layer of one direction without zoneout and layer_norm"):
        _ = layer.packed


@pytest.mark.parametrize(
    ("batch_size", "error", "message"),
    [(0, ValueError, "at least 1, got 0"), (2.0, TypeError, "an int, got 2.0"), (True, TypeError, "an int, got True")],
)
def test_wrong_batch_sizes(batch_size, error, message):
    layer = make("GRU", 3, 4)
    for function in (layer.stream, lambda n: Stream(layer, n), layer.new_state):
        with pytest.raises(error, match=f"^batch_size: expected {message}"):
            function(batch_size)


def test_a_stream_knows_its_layer():
    layer = make("GRU", 3, 4)
    stream = layer.stream(np.int64(5))
    assert isinstance(stream, Stream)
    assert stream.layer is layer
    assert stream.batch_size == 5
    assert layer.stream().batch_size == 1


# Compiled loops of the user's own.


@numba.njit
def run_rnn(packed, state, x, y):
    for t in range(len(x)):
        rnn_kernels.step(packed, state, x[t])
        y[t] = state.h[-1]


step_of_softsign = rnn_kernels.kernels_of(oracle.softsign, oracle.softsign_slope).step


@numba.njit
def run_softsign(packed, state, x, y):
    for t in range(len(x)):
        step_of_softsign(packed, state, x[t])
        y[t] = state.h[-1]


@numba.njit
def run_lstm(packed, state, x, y):
    for t in range(len(x)):
        lstm_kernels.step(packed, state, x[t])
        y[t] = state.h[-1]


@numba.njit
def run_lstm_with_options(packed, state, x, y):
    for t in range(len(x)):
        lstm_kernels.step_with_options(packed, state, x[t])
        y[t] = state.h[-1]


@numba.njit
def run_gru(packed, state, x, y):
    for t in range(len(x)):
        gru_kernels.step(packed, state, x[t])
        y[t] = state.h[-1]


@numba.njit
def run_gru_reset_before(packed, state, x, y):
    for t in range(len(x)):
        gru_kernels.step_reset_before(packed, state, x[t])
        y[t] = state.h[-1]


def loop_of(case):
    if case.startswith("LSTM"):
        return run_lstm if case in ("LSTM", "LSTM proj") else run_lstm_with_options
    if case.startswith("GRU"):
        return run_gru_reset_before if case == "GRU reset before" else run_gru
    return run_softsign if case == "RNN softsign" else run_rnn


@pytest.mark.parametrize("case", IN_PLACE)
def test_a_loop_of_the_users(case, dtype):
    """Any depth and batch: bit for bit what the layer gives; one function is compiled for all of them."""
    run = loop_of(case)
    for num_layers in (1, 2, 3):
        for B, H in ((1, 20), (3, 70)):
            layer = make(case, 5, H, dtype, num_layers=num_layers)
            x, given = sequence(layer, 6, B)
            state, y = layer.new_state(B), np.empty((6, B, layer.output_size), dtype)
            run(layer.packed, state, x, y)
            wanted, after = layer(x)
            assert_same_bits(y, wanted)
            assert_same_states(states_of(layer, state), after)
            # And from a state of one's own.
            for array, s in zip((state.h, state.s), named(given, "").values()):
                array[...] = s
            run(layer.packed, state, x, y)
            assert_same_bits(y, layer(x, given)[0])
    assert len({sig[2].dtype for sig in run.signatures}) == len(run.signatures)


def states_of(layer, state):
    return (state.h, state.s) if isinstance(layer, fastrnn.LSTM) else state.h


def test_a_loop_over_rows_that_do_not_lie_together_is_refused():
    """Kernels read memory as if they did."""
    layer, x = make("LSTM", 3, 4), np.zeros((2, 5, 3), np.float32)
    with pytest.raises(numba.TypingError, match="expected a C-contiguous array, got array"):
        lstm_kernels.step(layer.packed, layer.new_state(2), x[:, 0])


@pytest.mark.parametrize("case", IN_PLACE)
def test_a_new_state_is_of_zeros(case, dtype):
    layer = make(case, 5, 21, dtype, num_layers=2)
    state = layer.new_state(3)
    assert state.h.shape == (2, 3, layer.output_size)
    assert state.h.dtype == state.s.dtype == state.work.dtype == dtype
    assert not state.h.any()
    assert not state.s.any()
    assert state.s.shape == (2, 3, 21)
    assert layer.new_state().h.shape[1] == 1


@pytest.mark.parametrize("case", BASIC)
def test_packed_weights_follow_the_parameters(case):
    """Those taken before stay as they were."""
    layer = make(case, 5, 20, num_layers=2)
    x, _ = sequence(layer, 4, 2)
    run = loop_of(case)

    def outputs(packed):
        y = np.empty((4, 2, 20), np.float32)
        run(packed, layer.new_state(2), x, y)
        return y

    old, before = layer.packed, layer(x)[0]
    assert layer.packed is old
    layer.weight_hh_l1 = -layer.weight_hh_l1
    after = layer(x)[0]
    assert not np.array_equal(after, before)
    assert_same_bits(outputs(layer.packed), after)
    assert_same_bits(outputs(old), before)
    with layer.parameters.writable() as arrays:
        arrays["weight_ih_l0"] += 0.5
        assert_same_bits(outputs(layer.packed), layer(x)[0])
        arrays["weight_ih_l0"] += 0.5
        assert_same_bits(outputs(layer.packed), layer(x)[0])
    assert_same_bits(outputs(old), before)


@pytest.mark.parametrize(
    ("case", "options"),
    [
        *[(case, {"zoneout": 0.1}) for case in BASIC],
        ("LSTM", {"zoneout": (0.0, 0.1)}),
        ("LSTM norm", {}),
        ("GRU norm", {}),
    ],
    ids=str,
)
def test_layers_that_have_no_packed_weights(case, options):
    layer = make(case, 3, 4, **options)
    with pytest.raises(ValueError, match=r"^packed: expected a layer of one direction without zoneout and layer_norm"):
        _ = layer.packed
    # Zoneout of probability 0 is none.
    assert make(case.split()[0], 3, 4, zoneout=0.0).packed
