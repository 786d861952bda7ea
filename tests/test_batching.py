"""How sequences stand in rows; and threads: the same bits for any number of them, and calls from many threads, forked
processes, at the end of one.
"""

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from conftest import ROOT, in_a_fork
from fastrnn.kernels.tile import VECS
from hypothesis import assume, given
from hypothesis import strategies as st
from oracle import assert_all_same_bits, assert_same_bits, everything, inputs, lengths_for, make

import fastrnn
from fastrnn import batching
from fastrnn.batching import Sequences

pytestmark = pytest.mark.usefixtures("small_shares", "pool")


@pytest.fixture
def pool(monkeypatch):
    """A pool of its own for each test."""
    pool = batching._Pool()
    monkeypatch.setattr(batching, "_pool", pool)
    yield pool
    pool.close()


@pytest.fixture
def shares(monkeypatch):
    """The shares that calls have taken, each with the thread that took it."""
    taken, share_of = [], batching.share_of

    def record(*args):
        share = share_of(*args)
        taken.append((share, threading.get_ident()))
        return share

    monkeypatch.setattr(batching, "share_of", record)
    return taken


def wait_for_helpers():
    """A helper is free again a moment after the call it helped has returned."""
    pool, deadline = batching._pool, time.monotonic() + 30
    while len(pool.free) < len(pool.helpers):
        assert time.monotonic() < deadline, "a helper never comes back"
        time.sleep(0.0005)


def run_threads(functions, seconds=60):
    errors = []

    def run(function):
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,), daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0, deadline - time.monotonic()))
        assert not thread.is_alive(), "a call never returns"
    assert not errors, errors


@pytest.mark.parametrize(
    ("sizes", "cut"),
    [((5, 65, 4, 17), "batch"), ((5, 30, 3, 65), "batch"), ((6, 3, 5, 450), "units"), ((6, 1, 70, 300), "units")],
    ids=str,
)
def test_the_same_bits_for_any_number_of_threads(sizes, cut, dtype, shares):
    T, B, I, H = sizes
    lstm = fastrnn.LSTM(I, H, 2, dtype=dtype, seed=0)
    given = inputs(lstm, T, B)
    batching.set_num_threads(1)
    expected = everything(lstm, *given)
    parties = set()
    for n in (2, 3, 4, 7, 1):
        batching.set_num_threads(n)
        wait_for_helpers()
        shares.clear()
        assert_all_same_bits(everything(lstm, *given), expected)
        for (b0, b1, _, _, _, count), _ in shares:
            parties.add(count)
            if count > 1:
                assert (b1 - b0 < B) == (cut == "batch")
        if n > 1:
            assert len({thread for _, thread in shares}) > 1, "no helper took part"
    assert max(parties) > 3


def test_shares_cover_everything_once(dtype):
    """And none is empty: the barrier inside the kernels counts on units to do for every party."""
    batching.set_num_threads(64)
    for B in (1, 3, 8, 30):
        for H in (1, 17, 129, 300):
            for parties in range(1, batching.parties_for(1e9, B, H, dtype) + 1):
                units = -(-H // batching.LANES_OF[dtype])
                for vectors in (1, VECS):
                    done = np.zeros((B, units), int)
                    for me in range(parties):
                        b0, b1, u0, u1, _, _ = batching.share_of(me, parties, B, H, dtype, vectors)
                        assert b0 < b1
                        assert u0 < u1
                        assert u0 % vectors == 0
                        done[b0:b1, u0:u1] += 1
                    assert (done == 1).all(), (B, H, parties, vectors)


def test_small_work_is_not_cut(monkeypatch, shares):
    monkeypatch.setattr(batching, "WORTH_A_THREAD", 1e12)
    batching.set_num_threads(4)
    lstm = fastrnn.LSTM(4, 17)
    everything(lstm, *inputs(lstm, 3, 40))
    assert {thread for _, thread in shares} == {threading.get_ident()}


@pytest.mark.parametrize("n", [2, 3])
def test_many_threads_call_at_once(n):
    batching.set_num_threads(n)
    shapes = [(4, 9, 3, 5), (3, 1, 6, 200), (5, 40, 2, 9), (2, 2, 5, 140)]
    cases = []
    for dtype in (np.float32, np.float64):
        for T, B, I, H in shapes:
            lstm = fastrnn.LSTM(I, H, 2, dtype=dtype, seed=1)
            given = inputs(lstm, T, B)
            cases.append((lstm, given, everything(lstm, *given)))

    def work(first):
        for i in range(20):
            lstm, given, expected = cases[(first + i) % len(cases)]
            assert_all_same_bits(everything(lstm, *given), expected)

    run_threads([lambda first=first: work(first) for first in range(12)])
    wait_for_helpers()
    assert len(batching._pool.helpers) == n - 1


def test_threads_train_on_one_layer_while_its_parameters_change():
    """Each result is that of the old parameters or of the new ones."""
    batching.set_num_threads(2)
    lstm = fastrnn.LSTM(3, 9, seed=2)
    x = inputs(lstm, 4, 8)[0]
    states = [fastrnn.LSTM(3, 9, seed=seed).state_dict()["weight_hh_l0"] for seed in (3, 4)]
    possible = []
    for state in states:
        lstm.weight_hh_l0 = state
        possible.append(lstm(x)[0].tobytes())
    stop = time.monotonic() + 0.5

    def read():
        while time.monotonic() < stop:
            assert lstm(x)[0].tobytes() in possible

    def write():
        i = 0
        while time.monotonic() < stop:
            lstm.weight_hh_l0 = states[i % 2]
            i += 1

    run_threads([read, read, read, write])


@pytest.mark.parametrize("case", ["RNN", "LSTM proj", "GRU", "GRU reset before"])
def test_many_threads_call_any_layer_with_lengths(case):
    batching.set_num_threads(3)
    calls = []
    for T, B, H in [(4, 9, 5), (3, 2, 140)]:
        layer = make(case, 3, H, num_layers=2)
        arguments = inputs(layer, T, B)
        for lengths in (None, lengths_for(T, B)):
            calls.append((layer, arguments, lengths, everything(layer, *arguments, lengths=lengths)))

    def work(first):
        for i in range(8):
            layer, arguments, lengths, expected = calls[(first + i) % len(calls)]
            assert_all_same_bits(everything(layer, *arguments, lengths=lengths), expected)

    run_threads([lambda first=first: work(first) for first in range(6)])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("sizes", [(5, 30, 4, 17), (5, 1, 4, 200)], ids=["batch cut", "units cut"])
def test_a_forked_child_computes(sizes, shares):
    """After the parent has used its helpers, which the child has not; and while another thread is in a call."""
    T, B, I, H = sizes
    batching.set_num_threads(3)
    lstm = fastrnn.LSTM(I, H, dtype=np.float32, seed=5)
    given = inputs(lstm, T, B)
    expected = everything(lstm, *given)

    def child():
        for _ in range(3):
            wait_for_helpers()
            shares.clear()
            assert_all_same_bits(everything(lstm, *given), expected)
        return len({thread for _, thread in shares}) > 1

    assert in_a_fork(child)
    going = threading.Event()

    def keep_calling():
        while not going.is_set():
            everything(lstm, *given)

    thread = threading.Thread(target=keep_calling, daemon=True)
    thread.start()
    try:
        assert all(in_a_fork(child) for _ in range(6))
    finally:
        going.set()
        thread.join(60)
    assert not thread.is_alive()
    assert_all_same_bits(everything(lstm, *given), expected)


class Stop(BaseException):
    """As KeyboardInterrupt: no Exception."""


@pytest.mark.parametrize("who", [0, 1, 2])
@pytest.mark.parametrize("sizes", [(5, 30, 4, 17), (5, 1, 4, 300)], ids=["batch cut", "units cut"])
def test_an_error_in_any_share_is_raised_and_the_pool_works_on(who, sizes, monkeypatch, shares):
    """``who`` 0 is the caller itself, the others are helpers."""
    T, B, I, H = sizes
    batching.set_num_threads(3)
    lstm = fastrnn.LSTM(I, H, dtype=np.float64, seed=6)
    given = inputs(lstm, T, B)
    expected = everything(lstm, *given)
    share_of = batching.share_of

    def fail(me, *rest):
        if me == who:
            raise Stop("share", me)
        return share_of(me, *rest)

    for _ in range(5):
        wait_for_helpers()
        with monkeypatch.context() as patch:
            patch.setattr(batching, "share_of", fail)
            with pytest.raises(Stop) as caught:
                lstm(given[0])
        assert caught.value.args == ("share", who)
    wait_for_helpers()
    shares.clear()
    assert_all_same_bits(everything(lstm, *given), expected)
    assert max(share[-1] for share, _ in shares) == 3, "the pool has lost a helper"
    wait_for_helpers()
    assert len(set(map(id, batching._pool.free))) == len(batching._pool.free) == 2


def test_together_without_helpers_is_one_call():
    calls = []
    batching.together(1, lambda *args: calls.append(args))
    [(me, parties, barrier)] = calls
    assert (me, parties) == (0, 1)
    assert not barrier.any()


def test_together_when_no_thread_can_be_started(monkeypatch):
    def refuse(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    batching.set_num_threads(3)
    lstm = fastrnn.LSTM(4, 9)
    x = inputs(lstm, 3, 20)[0]
    y, _ = lstm(x)
    batching.set_num_threads(1)
    assert_same_bits(lstm(x)[0], y)


@pytest.mark.parametrize("busy", [None, 0, 1], ids=["nobody busy", "a caller busy", "a helper busy"])
def test_a_closed_pool_gives_no_helpers(busy, pool):
    """Not even those of a call that goes on while the pool is closed: nobody makes the calls that they are given."""
    batching.set_num_threads(2)
    released = threading.Event()

    def call(me, parties, barrier):
        if me == busy:
            released.wait(60)

    caller = threading.Thread(target=batching.together, args=(2, call), daemon=True)
    caller.start()
    if busy != 0:
        caller.join(60)
    while not pool.helpers:
        time.sleep(0.001)
    threading.Timer(0.1, released.set).start()
    pool.close()
    released.set()
    caller.join(60)
    seen = []
    batching.together(2, lambda me, parties, barrier: seen.append((me, parties)))
    assert seen == [(0, 1)]


# Sequences in rows.


@st.composite
def batches(draw):
    """``T, B, lengths``, None standing for whole sequences."""
    T, B = draw(st.integers(1, 9)), draw(st.integers(1, 8))
    lengths = draw(st.none() | st.lists(st.integers(0, T), min_size=B, max_size=B))
    return T, B, None if lengths is None else np.array(lengths)


def rows_of(T, B, lengths):
    """Step t and sequence b of each row, and the sequences in the rows' order: loops instead of indices."""
    lengths = [T] * B if lengths is None else lengths.tolist()
    order = sorted(range(B), key=lambda b: -lengths[b])
    return [(t, b) for t in range(T) for b in order if lengths[b] > t], order, lengths


def numbered(T, B, features=2):
    """No two numbers are the same, and none is 0."""
    return np.arange(1, 1 + T * B * features, dtype=np.float32).reshape(T, B, features)


@given(batches())
def test_rows_and_padding(batch):
    T, B, _ = batch
    sequences, (places, _, ends), x = Sequences(*batch), rows_of(*batch), numbered(T, B)
    assert len(places) == sequences.N
    rows = sequences.rows(x)
    assert rows.tolist() == [x[place].tolist() for place in places]
    steps = sequences.steps.tolist()
    assert len(steps) == 1 + max(ends)
    assert [steps[t + 1] - steps[t] for t in range(max(ends))] == [sum(n > t for n in ends) for t in range(max(ends))]
    padded = sequences.padded(rows)
    assert padded.shape == x.shape
    for t in range(T):
        for b in range(B):
            assert padded[t, b].tolist() == (x[t, b].tolist() if t < ends[b] else [0, 0])
    assert rows.flags.c_contiguous


@given(batches())
def test_sequences_reversed(batch):
    """Each by itself: its last step takes the place of its first."""
    T, B, _ = batch
    sequences, (places, _, ends), x = Sequences(*batch), rows_of(*batch), numbered(T, B)
    rows = sequences.rows(x)
    got = sequences.reversed(rows)
    assert got.flags.c_contiguous
    assert got.tolist() == [x[ends[b] - 1 - t, b].tolist() for t, b in places]
    assert sequences.reversed(got).tolist() == rows.tolist()


@given(batches())
def test_states_sorted_and_unsorted(batch):
    sequences, (_, order, _), state = Sequences(*batch), rows_of(*batch), numbered(1, batch[1])[0]
    got = sequences.sorted(state)
    assert got.tolist() == [state[b].tolist() for b in order]
    assert sequences.unsorted(got).tolist() == state.tolist()
    # Of several layers at once.
    both = np.stack([state, 2 * state])
    got = sequences.sorted(both)
    assert got.flags.c_contiguous
    assert got.tolist() == both[:, order].tolist()
    assert sequences.unsorted(got).tolist() == both.tolist()


@given(batches())
def test_the_last_row_of_each_sequence(batch):
    T, B, _ = batch
    sequences, (_, order, ends), x = Sequences(*batch), rows_of(*batch), numbered(T, B)
    before = -numbered(1, B)[0]
    kept = before.copy()
    got = sequences.last(sequences.rows(x), before)
    assert got.tolist() == [(x[ends[b] - 1, b] if ends[b] else before[i]).tolist() for i, b in enumerate(order)]
    assert before.tolist() == kept.tolist()


@given(batches(), st.integers(1, 100))
def test_chunks(batch, rows):
    """From the first step to the last, none empty, and about as large as asked for: a step is not cut."""
    sequences = Sequences(*batch)
    assume(sequences.N)
    chunks = sequences.chunks(rows)
    steps = sequences.steps
    assert chunks[0] == 0
    assert chunks[-1] == len(steps) - 1
    assert (np.diff(chunks) > 0).all()
    sizes = np.diff(steps[chunks])
    assert sizes.max() <= sequences.largest(chunks)
    assert sequences.largest(chunks) <= sequences.B * -(-int(sizes.max()) // sequences.B)
    assert sizes.max() < rows + 2 * sequences.B
    assert len(sizes) <= 1.5 * sequences.N / rows + 1


@given(batches(), st.integers(1, 10))
def test_stretches(batch, count):
    """One after another they are the rows, and each has the sequences in the rows' order."""
    T, B, _ = batch
    sequences, (_, order, ends), x = Sequences(*batch), rows_of(*batch), numbered(T, B)
    rows, at, first_step = sequences.rows(x), 0, 0
    for part, first, last in sequences.stretches(count):
        assert first == at
        assert last - first == part.N > 0
        assert part.B == B
        assert 0 < part.T <= count
        wanted = np.zeros((part.T, B, 2), np.float32)
        for i, b in enumerate(order):
            n = min(max(ends[b] - first_step, 0), part.T)
            wanted[:n, i] = x[first_step : first_step + n, b]
        assert part.padded(rows[first:last]).tolist() == wanted.tolist()
        # Sorting does not change what is sorted already.
        assert part.sorted(np.arange(B)[:, None]).ravel().tolist() == list(range(B))
        at, first_step = last, first_step + part.T
    assert at == sequences.N
    assert first_step == max(ends)


@given(batches(), st.integers(1, 4), st.sampled_from([1, 17, 130, 300]))
def test_shares_of_ragged_batches(batch, parties, hidden):
    """They cover the batch, or its units, in order and once."""
    sequences, dtype = Sequences(*batch), np.dtype(np.float32)
    units = -(-hidden // batching.LANES_OF[dtype])
    shares = [sequences.share(me, parties, hidden, dtype) for me in range(parties)]
    assert [share[4:] for share in shares] == [(me, parties) for me in range(parties)]
    assert all(type(number) is int for share in shares for number in share)
    whole = [batching.share_of(me, parties, sequences.B, hidden, dtype) for me in range(parties)]
    assert [share[2:] for share in shares] == [share[2:] for share in whole]
    by_rows = any(b1 - b0 < sequences.B for b0, b1, *_ in whole)
    if by_rows:
        assert [b0 for b0, *_ in shares] == [0, *[b1 for _, b1, *_ in shares[:-1]]]
        assert shares[-1][1] == sequences.B
        assert all(b0 <= b1 for b0, b1, *_ in shares)
        assert all(share[2:4] == (0, units) for share in shares)
    else:
        assert all(share[:2] == (0, sequences.B) for share in shares)


@pytest.mark.parametrize("parties", [2, 3, 7])
@pytest.mark.parametrize("kind", ["any", "a few long ones", "mostly empty", "whole"])
def test_shares_of_ragged_batches_have_about_as_many_rows(kind, parties, rng):
    B, T = 240, 50
    lengths = {
        "any": rng.integers(0, T + 1, B),
        "a few long ones": np.where(np.arange(B) % 10 == 3, T, 2),
        "mostly empty": np.where(np.arange(B) % 3 == 1, rng.integers(1, T + 1, B), 0),
        "whole": np.full(B, T),
    }[kind]
    sequences, ends = Sequences(T, B, lengths), np.sort(lengths)[::-1]
    shares = [sequences.share(me, parties, 8, np.dtype(np.float32)) for me in range(parties)]
    assert shares[0][1] < B
    rows = [int(ends[b0:b1].sum()) for b0, b1, *_ in shares]
    assert sum(rows) == sequences.N
    # A sequence is not cut.
    assert max(abs(n - sequences.N / parties) for n in rows) <= T


@pytest.mark.parametrize("case", ["RNN", "LSTM", "LSTM proj", "GRU reset before"])
@pytest.mark.parametrize("options", [{}, {"recurrent_dropout": 0.3, "zoneout": 0.2}], ids=["plain", "masked"])
@pytest.mark.parametrize("lengths", [[9] + [0] * 19, [0] * 19 + [1], [9, 9] + [1] * 18], ids=str)
def test_threads_that_have_no_rows(lengths, options, case):
    """One sequence is not cut, so some threads have nothing to do but to meet the others."""
    layer = make(case, 3, 20, num_layers=2, **options)
    arguments = inputs(layer, 9, 20)

    def results():
        return everything(layer, *arguments, rng=np.random.default_rng(1), lengths=lengths)

    batching.set_num_threads(1)
    expected = results()
    batching.set_num_threads(4)
    for _ in range(3):
        wait_for_helpers()
        assert_all_same_bits(results(), expected)
    assert len(batching._pool.helpers) == 3


# The end of the interpreter.

SETUP = """
import atexit, sys, threading, time
{before}
import numpy as np
import fastrnn
from fastrnn import batching
batching.WORTH_A_THREAD, batching.ROWS_OF_A_SHARE = 0, 4
fastrnn.set_num_threads({threads})
lstms = [fastrnn.LSTM(3, 5, seed=0), fastrnn.LSTM(3, 200, seed=0)]
xs = [np.ones((50, 40, 3), np.float32), np.ones((50, 1, 3), np.float32)]

def work():
    for lstm, x in zip(lstms, xs):
        (y, state), pullback = lstm.vjp(x)
        pullback(y, state)
        assert np.isfinite(y).all()
    return y.sum()

def for_ever():
    while True:
        work()
"""


def run_script(script, threads, before=""):
    code = SETUP.format(before=before, threads=threads) + script
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-X", "faulthandler", "-W", "error", "-c", code]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize(
    ("script", "before", "expected"),
    [
        ("work(); print('done')", "", "done"),
        ("threading.Thread(target=work).start(); print('done')", "", "done"),
        (
            "work()\nfor _ in range(5): threading.Thread(target=for_ever, daemon=True).start()\n"
            "time.sleep(0.2); print('done')",
            "",
            "done",
        ),
        ("work(); atexit.register(lambda: (work(), print('done')))", "", "done"),
        ("work()", "atexit.register(lambda: (work(), print('done')))", "done"),
        ("work(); raise SystemExit(0)", "atexit.register(lambda: print('done'))", "done"),
    ],
    ids=["plain", "other thread", "daemons", "atexit", "atexit after the pool's", "exit"],
)
def test_the_interpreter_ends_well(script, before, expected, threads):
    run = run_script(script, threads, before)
    assert (run.returncode, run.stderr, run.stdout.strip()) == (0, "", expected)
