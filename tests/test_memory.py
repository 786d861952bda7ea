"""Memory that is used again: never while anything can still reach it, and not without bound."""

import gc
import subprocess
import sys
import threading

import numpy as np
import pytest

import fastrnn
from fastrnn import memory

LARGE = memory.WORTH_KEEPING


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    gc.collect()
    memory._kept.clear()
    yield
    memory._kept.clear()


def block_of(array):
    """The block that an array's memory is in, as long as it is lent."""
    while isinstance(array, np.ndarray):
        array = array.base
    return array.block


@pytest.mark.parametrize("count", [0, 1, 1000, 5000, 5001, 300_000, 300_001])
def test_large_arrays_begin_on_a_cache_line(count, dtype):
    array = memory.empty(count, dtype)
    assert array.shape == (count,)
    assert array.dtype == dtype
    assert array.flags.carray
    assert count < 5000 or array.ctypes.data % 64 == 0


def test_what_is_given_back_is_used_again(dtype):
    first = memory.empty(LARGE, dtype)
    address = first.ctypes.data
    del first
    assert len(memory._kept) == 1
    # Somewhat smaller, and of any dtype.
    again = memory.empty(LARGE * dtype.itemsize // 5, np.dtype(np.float32))
    assert not memory._kept
    assert abs(again.ctypes.data - address) < 64
    other = memory.empty(LARGE, dtype)
    assert not np.may_share_memory(again, other)


def test_the_smallest_block_that_fits_is_taken():
    f32 = np.dtype(np.float32)
    blocks = [memory.empty(n * LARGE, f32) for n in (5, 3, 8, 2)]
    sizes = {n: block_of(b).nbytes for n, b in zip((5, 3, 8, 2), blocks)}
    del blocks
    gc.collect()
    assert block_of(three := memory.empty(3 * LARGE - 5, f32)).nbytes == sizes[3]
    assert block_of(more := memory.empty(3 * LARGE, f32)).nbytes == sizes[5]
    # Of what would be more than half unused, a new one is made.
    assert block_of(small := memory.empty(LARGE // 2, f32)).nbytes < sizes[2] // 2
    assert len(memory._kept) == 2
    assert not np.may_share_memory(three, more)
    assert not np.may_share_memory(more, small)


@pytest.mark.parametrize(
    "view",
    [
        lambda a: a[7:],
        lambda a: a[3:][3:].reshape(-1, 1)[::2].T,
        lambda a: a.view(np.uint8),
        lambda a: np.broadcast_to(a, (2, a.size)),
        memoryview,
        lambda a: np.frombuffer(memoryview(a), np.uint8),
        lambda a: np.asarray(a).view(type("Array", (np.ndarray,), {}))[1:].view(np.ndarray)[1:],
        lambda a: np.lib.stride_tricks.sliding_window_view(a, 3)[5:],
    ],
)
def test_a_view_of_any_kind_holds_the_block(view):
    array = memory.empty(LARGE, np.dtype(np.float32))
    held = view(array)
    del array
    gc.collect()
    assert not memory._kept
    assert not np.may_share_memory(np.asarray(held), memory.empty(LARGE, np.dtype(np.float32)))
    memory._kept.clear()
    del held
    gc.collect()
    assert len(memory._kept) == 1


def test_no_more_than_a_limit_is_kept(monkeypatch):
    kept = {}
    lent = memory._Lent
    monkeypatch.setattr(lent.__del__, "__defaults__", (kept, 5 * LARGE))
    monkeypatch.setattr(memory, "_kept", kept)
    uint8 = np.dtype(np.uint8)
    arrays = [memory.empty(LARGE + n, uint8) for n in range(8)]
    blocks = [block_of(array) for array in arrays]
    while arrays:
        del arrays[0]
    # The last ones: what was given back first went first.
    assert [id(block) for block in blocks[-4:]] == [*kept]
    memory.empty(6 * LARGE, uint8)
    assert not kept


def test_without_memory_what_is_kept_goes_first(monkeypatch):
    memory.empty(LARGE, np.dtype(np.float32))
    assert memory._kept
    empty = np.empty

    def scarce(*arguments):
        if memory._kept:
            raise MemoryError
        return empty(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(memory.np, "empty", scarce)
        assert memory.empty(4 * LARGE, np.dtype(np.float32)).size == 4 * LARGE


def test_no_two_threads_get_one_block():
    wrong, f64 = [], np.dtype(np.float64)

    def work(number):
        for _ in range(300):
            arrays = [memory.empty(LARGE // 8 + 1, f64) for _ in range(3)]
            for k, array in enumerate(arrays):
                array[::1000] = 10 * number + k
            for k, array in enumerate(arrays):
                if not (array[::1000] == 10 * number + k).all():
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_pullback_survives_what_runs_after_it(rng):
    """Its tape and its packed weights are not given to later calls."""
    lstm = fastrnn.LSTM(40, 200, seed=0)
    x = rng.standard_normal((100, 5, 40), np.float32)
    (y, _), pullback = lstm.vjp(x)
    dx, _, gradients = pullback(np.ones_like(y))
    for _ in range(3):
        lstm.parameters["weight_hh_l0"] = lstm.weight_hh_l0 * 2
        other, other_pullback = lstm.vjp(-x)
        other_pullback(other[0])
    dx_again, _, gradients_again = pullback(np.ones_like(y))
    np.testing.assert_array_equal(dx, dx_again)
    for name, gradient in gradients.items():
        np.testing.assert_array_equal(gradient, gradients_again[name])


@pytest.mark.parametrize(
    "place", ["array", "sys.kept = array", "np.kept = array", "import fastrnn.cli as c; c.x = array"]
)
def test_the_interpreter_ends_without_a_word(place):
    code = f"import sys, numpy as np; from fastrnn import memory; array = memory.empty(2**20, np.dtype('f4')); {place}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
