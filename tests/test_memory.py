"""Memory that is used again: never while anything can still reach it, and not without bound."""

import gc
import itertools
import subprocess
import sys
import threading

import numpy as np
import pytest

import fastrnn
from fastrnn import memory

LARGE = memory.WORTH_KEEPING


@pytest.fixture(autouse=True)
def nothing_kept():
    gc.collect()
    memory._kept.clear()
    yield
    memory._kept.clear()


def block_of(array):
    """The block that an array's memory is in, as long as it is lent."""
    while isinstance(array, np.ndarray):
        array = array.base
    return array.block


def small_pool(monkeypatch, most):
    """A pool of its own, of at most so many bytes."""
    kept = {}
    monkeypatch.setattr(memory._Lent.__del__, "__defaults__", (kept, most))
    monkeypatch.setattr(memory, "_kept", kept)
    return kept


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
    blocks = [memory.empty(n * LARGE // 10, f32) for n in (23, 20, 12, 40)]
    sizes = {n: block_of(b).nbytes for n, b in zip((23, 20, 12, 40), blocks)}
    del blocks
    gc.collect()
    arrays = [memory.empty(n * LARGE // 10, f32) for n in (19, 19, 9, 30)]
    found = [block_of(array).nbytes for array in arrays]
    assert found[:2] == [sizes[20], sizes[23]]
    # Of what would be more than a quarter larger, a new one is made.
    assert found[2] < sizes[12] / 1.25
    assert found[3] < sizes[40] / 1.25
    assert len(memory._kept) == 2
    assert not any(np.may_share_memory(a, b) for a, b in itertools.combinations(arrays, 2))


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
    kept = small_pool(monkeypatch, 5 * LARGE)
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


def test_no_two_threads_get_one_block_nor_too_small_a_one(monkeypatch):
    """Of a pool so small that blocks are given up, and others made where they were, while threads choose."""
    small_pool(monkeypatch, 8 * LARGE)
    wrong, before = [], sys.getswitchinterval()

    def work(number):
        rng = np.random.default_rng(number)
        for size in rng.integers(LARGE, 4 * LARGE, 400).tolist():
            array = memory.empty(size, np.dtype(np.uint8))
            array[:: LARGE // 4] = number
            if array.size != size or not (array[:: LARGE // 4] == number).all():
                wrong.append((number, size, array.size))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not wrong


def test_a_block_is_not_taken_for_another_that_came_in_its_place(monkeypatch):
    """Between looking and taking, all that were seen are gone, and smaller ones kept, be it at the same addresses."""

    class Kept(dict):
        def values(self):
            seen = [*super().values()]
            self.clear()
            for block in seen:
                smaller = block[: LARGE // 2]
                self[id(block)] = smaller
            return seen

    size = 2 * LARGE
    block = np.empty(size, np.uint8)
    monkeypatch.setattr(memory, "_kept", Kept({id(block): block}))
    assert memory._block(size).nbytes >= size


class Cycle:
    pass


def test_the_garbage_collector_may_give_back_at_any_moment():
    """It runs whenever something is made, while blocks are listed, too."""
    arrays = [memory.empty(LARGE + 64 * n, np.dtype(np.uint8)) for n in range(100)]
    del arrays
    for trial in range(40):
        tuples = [(n, n + 1) for n in range(2500)]  # no tuple is left that would be used again
        gc.collect()
        cycle = Cycle()
        cycle.itself, cycle.array = cycle, memory.empty(LARGE, np.dtype(np.uint8))
        del cycle
        tuples += [(n, n + 1) for n in range(480 + 5 * trial)]  # so near is the next collection
        assert memory.empty(LARGE, np.dtype(np.uint8)).size == LARGE


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
