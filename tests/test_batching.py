"""Threads: the same bits for any number of them, and calls from many threads, forked processes, at the end of one."""

import os
import subprocess
import sys
import threading
import time
import warnings

import numpy as np
import pytest
from conftest import ROOT
from oracle import assert_same_bits
from test_layers import assert_all_same_bits, everything, inputs

import fastrnn
from fastrnn import batching

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
                done = np.zeros((B, units), int)
                for me in range(parties):
                    b0, b1, u0, u1, _, _ = batching.share_of(me, parties, B, H, dtype)
                    assert b0 < b1
                    assert u0 < u1
                    done[b0:b1, u0:u1] += 1
                assert (done == 1).all(), (B, H, parties)


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


def in_a_fork(function):
    """Whether ``function()`` returns true in a forked child, which must end in time."""
    with warnings.catch_warnings():
        # From Python 3.12 on, forking a process that has threads warns: here this is the point.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if function() else 2
        finally:
            os._exit(code)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.002)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return False


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


def test_large_empty_arrays_begin_on_a_cache_line(dtype):
    for count in (0, 1, 1000, 5000, 5001):
        array = batching.empty(count, dtype)
        assert array.shape == (count,)
        assert array.dtype == dtype
        assert array.flags.carray
        assert count < 5000 or array.ctypes.data % 64 == 0


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
