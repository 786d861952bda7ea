"""Threads that meet at the barrier."""

import threading
import time

import numba
import numpy as np
import pytest
from fastrnn.kernels.barrier import meet


@numba.njit(nogil=True)
def meet_often(me, parties, rounds, seen, barrier):
    """How often a party was found behind right after the barrier, or ahead of the next one."""
    wrong = 0
    for r in range(rounds):
        seen[16 * me] = r + 1
        meet(barrier, parties)
        for other in range(parties):
            wrong += seen[16 * other] != r + 1
        meet(barrier, parties)
    return wrong


@numba.njit(nogil=True)
def meet_once(barrier, parties):
    meet(barrier, parties)


def run_threads(functions):
    results = [None] * len(functions)

    def run(i):
        results[i] = functions[i]()

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a thread waits for ever"
    return results


@pytest.mark.parametrize("parties", [1, 2, 3, 7])
def test_threads_meet(parties):
    """Nobody leaves before all have come, nor comes a second time before all have left."""
    barrier, seen = np.zeros(16, np.int64), np.zeros(16 * parties, np.int64)
    meet_often(0, 1, 1, seen.copy(), barrier.copy())  # compiled before the threads start
    calls = [lambda me=me: meet_often(me, parties, 100, seen, barrier) for me in range(parties)]
    assert run_threads(calls) == [0] * parties
    assert barrier[1] == 0


def test_a_flag_calls_the_barrier_off():
    barrier = np.zeros(16, np.int64)
    meet_once(barrier, 1)

    def call_off():
        time.sleep(0.05)
        barrier[1] = 1

    run_threads([lambda: meet_once(barrier, 3), lambda: meet_once(barrier, 3), call_off])
    # For good: whoever comes later is not held either.
    run_threads([lambda: meet_once(barrier, 3)])
