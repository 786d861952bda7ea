"""Sequences of different lengths side by side; threads, and how one call's work is cut into shares that run at once.

A call takes as many helper threads as are free, at most `get_num_threads` less one, and never waits for one: with
none free it runs alone. So calls from many threads share the helpers without a queue, and cannot wait for each other.
The bits of a result do not depend on the number of threads.
"""

import atexit
import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .checks import positive
from .kernels.tile import VECS
from .kernels.vector import LANES_OF

# What one call must have to do, in multiply-adds, before a second thread pays for waking it (tens of microseconds).
WORTH_A_THREAD = 4_000_000
# Rows of the batch with which a share makes full tiles, and nobody has to meet anybody each step.
ROWS_OF_A_SHARE = 24

# Of how many steps sequences are no longer kept for the next call, which would be a lot of memory for little.
MANY_STEPS = 4096

# The barrier of a call that meets nobody, and writes nothing to it.
ALONE = np.zeros(2, np.int64)

Array = NDArray[Any]
Call = Callable[[int, int, NDArray[np.int64]], Any]
Together = Callable[[int, Call], None]


def _current_cpu() -> int:
    """The CPU that the calling thread is on, or -1 where it is not known."""
    return -1 if _sched_getcpu is None else _sched_getcpu()


# Linux's C libraries have it.
_sched_getcpu = getattr(ctypes.CDLL(None), "sched_getcpu", None) if sys.platform == "linux" else None


class _Helper:
    """A thread that makes one call after another."""

    def __init__(self) -> None:
        self.jobs: SimpleQueue[tuple[Call, int, int, NDArray[np.int64], list[BaseException], int] | None] = (
            SimpleQueue()
        )
        self.thread = threading.Thread(target=self._work, name="fastrnn", daemon=True)
        self.thread.start()

    def _work(self) -> None:
        avoided = -1
        while (job := self.jobs.get()) is not None:
            call, me, parties, barrier, errors, cpu = job
            try:
                if cpu != avoided:
                    avoided = cpu
                    _avoid(cpu)
                call(me, parties, barrier)
            except BaseException as error:
                errors.append(error)
                barrier[1] = 1
            del job, call, barrier, errors


def _avoid(cpu: int) -> None:
    """Keep the calling thread off a CPU.

    Linux likes to wake a thread where its waker runs. A caller that then waits at a barrier and a helper that has to
    get there would share that CPU for many time steps, while another one is idle.
    """
    if sys.platform == "linux" and cpu >= 0:
        others = os.sched_getaffinity(os.getpid()) - {cpu}
        if others:
            with suppress(OSError):  # a container may forbid it
                os.sched_setaffinity(0, others)


class _Pool:
    def __init__(self) -> None:
        self.free: list[_Helper] = []
        self.helpers: list[_Helper] = []
        self.lock = threading.Lock()
        self.closed = False

    def take(self, count: int) -> list[_Helper]:
        """At most ``count`` helpers that nobody else has."""
        taken: list[_Helper] = []
        while len(taken) < count and not self.closed:
            try:
                taken.append(self.free.pop())
            except IndexError:
                with self.lock:
                    if self.closed or len(self.helpers) >= get_num_threads() - 1:
                        break
                    try:
                        self.helpers.append(_Helper())
                    except RuntimeError:  # no more threads can be started, or the interpreter is shutting down
                        break
                    taken.append(self.helpers[-1])
        return taken

    def close(self) -> None:
        """End the helpers; from now on every call runs alone."""
        with self.lock:
            self.closed = True
            self.free.clear()
        for helper in self.helpers:
            helper.jobs.put(None)
        for helper in self.helpers:
            helper.thread.join(1)


def _default_num_threads() -> int:
    text = os.environ.get("FASTRNN_NUM_THREADS", "")
    if not text.strip():
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not text.isascii() or not text.strip().isdigit() or int(text) < 1:
        raise ValueError(f"FASTRNN_NUM_THREADS: expected a whole number of at least 1, got {text!r}")
    return int(text)


# None until somebody asks: an environment that is wrong is no reason not to be imported.
_num_threads: int | None = None
_pool = _Pool()


def _forked() -> None:
    global _pool
    _pool = _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
atexit.register(lambda: _pool.close())


def set_num_threads(n: int) -> None:
    """Let calls use up to ``n`` threads. The default is ``FASTRNN_NUM_THREADS``, or the CPUs this process may use.

    >>> import fastrnn
    >>> before = fastrnn.get_num_threads()
    >>> fastrnn.set_num_threads(1)
    >>> fastrnn.get_num_threads()
    1
    >>> fastrnn.set_num_threads(before)
    """
    global _num_threads
    _num_threads = positive(n, "n")


def get_num_threads() -> int:
    """How many threads a call may use. Raises ValueError if ``FASTRNN_NUM_THREADS`` is no number, and none was set."""
    global _num_threads
    if _num_threads is None:
        _num_threads = _default_num_threads()
    return _num_threads


@contextmanager
def threads_of(n: int, team: Together | None = None) -> Iterator[None]:
    """In a ``with`` block, let the calling thread's calls use at most ``n`` threads, besides `get_num_threads`.

    team: runs them in place of `together`'s helpers.
    """
    before = _most(), getattr(_own, "team", None)
    _own.most, _own.team = min(n, before[0]), team
    try:
        yield
    finally:
        _own.most, _own.team = before


def _most() -> int:
    return getattr(_own, "most", sys.maxsize)


# What one thread has set for itself.
_own = threading.local()


def together(parties: int, call: Call) -> None:
    """Make ``call(me, parties, barrier)`` once for every ``me``, at once, on up to ``parties`` threads.

    Each call must end by meeting the others at the barrier, so that the first one's end is the end of all.
    """
    if parties == 1:
        call(0, 1, ALONE)
        return
    team = getattr(_own, "team", None)
    if team is not None:
        team(parties, call)
        return
    pool = _pool
    helpers = pool.take(parties - 1)
    if not helpers:
        call(0, 1, ALONE)
        return
    barrier = np.zeros(16, np.int64)  # two cache lines: nothing else is written beside it
    parties = 1 + len(helpers)
    errors: list[BaseException] = []
    cpu = _current_cpu()
    try:
        for me, helper in enumerate(helpers, 1):
            helper.jobs.put((call, me, parties, barrier, errors, cpu))
        call(0, parties, barrier)
    except BaseException:
        barrier[1] = 1  # the others must not wait for this one
        raise
    finally:
        # They have met this one at the end, or soon will; what is left of the job is no reason for the next to wait.
        pool.free.extend(helpers)
    if barrier[1]:
        raise errors[0]


Share = tuple[int, int, int, int, int, int]


class Sequences:
    """Which step of which sequence stands in which row of the kernels' arrays.

    Sequences lie side by side, step after step, the longest one first: step t has rows ``steps[t]`` to
    ``steps[t + 1]``, one for each sequence that is as long. Without lengths that is (T, B) as it is.
    """

    def __init__(self, T: int, B: int, lengths: Array | None = None):
        self.T, self.B, self.lengths = T, B, lengths
        if lengths is None:
            self.steps = np.arange(T + 1, dtype=np.int64) * B
            self.N = T * B
            return
        self.order = np.argsort(-lengths, kind="stable")
        ends = lengths[self.order]
        counts = np.searchsorted(-ends, -np.arange(ends[0]), side="left")  # sequences longer than t
        self.steps = np.concatenate([[0], np.cumsum(counts)])
        self.N = int(self.steps[-1])
        t = np.repeat(np.arange(len(counts)), counts)
        b = np.arange(self.N) - np.repeat(self.steps[:-1], counts)
        self._index = t * B + self.order[b]
        self._mirror = self.steps[ends[b] - 1 - t] + b
        self._last = self.steps[np.maximum(ends - 1, 0)] + np.arange(B)
        self._some = ends > 0

    def stretches(self, count: int) -> Iterator["tuple[Sequences, int, int]"]:
        """So many steps at a time, of sequences in the rows' order: how they stand, and their first and last row."""
        T = len(self.steps) - 1
        ends = None if self.lengths is None else self.lengths[self.order]
        for first in range(0, T, count):
            last = min(first + count, T)
            lengths = None if ends is None else np.clip(ends - first, 0, last - first)
            yield Sequences(last - first, self.B, lengths), int(self.steps[first]), int(self.steps[last])

    def rows(self, x: Array) -> Array:
        """(T, B, features) as rows (N, features)."""
        flat = x.reshape(self.T * self.B, x.shape[2])
        return flat if self.lengths is None else flat.take(self._index, 0)

    def padded(self, rows: Array) -> Array:
        """Rows (N, features) as (T, B, features), 0 past each sequence's end."""
        shape = (self.T, self.B, rows.shape[1])
        if self.lengths is None:
            return rows.reshape(shape)
        x = np.zeros((self.T * self.B, rows.shape[1]), rows.dtype)
        x[self._index] = rows
        return x.reshape(shape)

    def reversed(self, rows: Array) -> Array:
        """Each sequence's rows (N, features), the last one first."""
        if self.lengths is not None:
            return rows.take(self._mirror, 0)
        return np.ascontiguousarray(rows.reshape(self.T, self.B, -1)[::-1]).reshape(rows.shape)

    def sorted(self, state: Array) -> Array:
        """A state (..., B, features) in the rows' order of sequences; itself, if that is the user's."""
        return state if self.lengths is None else state.take(self.order, -2)

    def unsorted(self, state: Array) -> Array:
        """A state in the rows' order in the user's; itself, if that is the same."""
        if self.lengths is None:
            return state
        out = np.empty_like(state)
        out[..., self.order, :] = state
        return out

    def last(self, y: Array, h_0: Array) -> Array:
        """The last row of each sequence, or what was before it, if it is empty."""
        if self.lengths is None:
            return y[self.N - self.B :]
        h_n = h_0.copy()
        h_n[self._some] = y[self._last[self._some]]
        return h_n

    def chunks(self, rows: int) -> Array:
        """Steps at which to cut so that each chunk has about so many rows, ending with the number of steps."""
        if self.lengths is None:
            return full_chunks(self.T, self.B, rows)
        cuts = np.searchsorted(self.steps, np.arange(0, self.N, rows))
        return np.unique(np.append(cuts, len(self.steps) - 1))

    def largest(self, chunks: Array) -> int:
        """The rows of the largest chunk."""
        if self.lengths is None:
            return -(-self.T // (len(chunks) - 1)) * self.B
        return int(np.diff(self.steps[chunks]).max())

    def share(self, me: int, parties: int, hidden: int, dtype: np.dtype, vectors: int = VECS) -> Share:
        """Party ``me``'s share, as `share_of` gives it, but that parts of the batch have about as many rows."""
        b0, b1, *rest = share_of(me, parties, self.B, hidden, dtype, vectors)
        if self.lengths is not None and b1 - b0 < self.B:
            ends = np.cumsum(self.lengths[self.order])
            cuts = np.searchsorted(ends, np.arange(parties + 1) * self.N / parties).tolist()
            b0, b1 = cuts[me], cuts[me + 1] if me + 1 < parties else self.B
        return (b0, b1, *rest)  # type: ignore[return-value]


def full_sequences(T: int, B: int) -> Sequences:
    """B sequences of T steps."""
    return _full_sequences(T, B) if T < MANY_STEPS else Sequences(T, B)


_full_sequences = lru_cache(1024)(Sequences)


@lru_cache(1024)
def full_chunks(T: int, B: int, rows: int) -> Array:
    """All chunks being nearly of one length."""
    count = -(-T // max(1, round(rows / B)))
    return np.arange(count + 1, dtype=np.int64) * T // count


def parties_for(work: float, batch: int, hidden: int, dtype: np.dtype) -> int:
    """How many threads a call of so many multiply-adds may use."""
    if work < WORTH_A_THREAD or (threads := min(get_num_threads(), _most())) == 1:
        return 1
    return min(threads, max(batch // 4, -(-hidden // (VECS * LANES_OF[dtype]))))


def share_of(me: int, parties: int, batch: int, hidden: int, dtype: np.dtype, vectors: int = VECS) -> Share:
    """Party ``me``'s share ``(b0, b1, u0, u1, me, parties)`` of the rows of a batch or of the vectors of units.

    vectors: how many of these stay together.
    """
    units = -(-hidden // LANES_OF[dtype])
    if parties == 1:
        return 0, batch, 0, units, 0, 1
    panels = -(-units // VECS)
    # What part of the time the threads are busy: the largest share counts, and a thin one wastes some of its tiles.
    by_rows = batch / parties / (-(-batch // parties) + 1)
    by_units = units / parties / min(units, -(-panels // parties) * VECS)
    if batch // parties >= ROWS_OF_A_SHARE or parties > panels or (parties <= batch and by_rows > by_units):
        return me * batch // parties, (me + 1) * batch // parties, 0, units, me, parties
    parts = -(-units // vectors)
    # The first party, which calls the others, has the most.
    first, last = -(-me * parts // parties), -(-(me + 1) * parts // parties)
    return 0, batch, first * vectors, min(units, last * vectors), me, parties
