"""What all benchmarks share: how they are set up and sampled, and a layer with its arguments.

A class of benchmarks derives from `Timed` and has

    params, param_names
        as asv takes them.
    prepare(*params)
        makes layers, seeded, and arrays, written once so that their memory is there. What a commit does not have, it
        may ask for all the same: that raises, and asv leaves the benchmark out for this commit.
    call_NAME(*params)
        what is timed.
    work(NAME)
        what a call of it does, and the `limits` of the machine that it is beside: operations and
        `limits.MultiplyAdds`, or bytes and `limits.Reads` of memory of that size. None: there is no such limit.

Of each there is then ``time_NAME``, sampled as `limits.Sampler` does, and ``track_NAME_fraction``: what part of that
limit it reaches, measured in the same process, its samples in turn with the limit's. ``in_gate`` says whether
`asv_bench.gate` takes the class unless asked.
"""

import inspect
import os
import time
from contextlib import contextmanager
from functools import partial

import numpy as np

import fastrnn

from . import limits

DTYPES = ["float32", "float64"]
CELLS = ["RNN", "LSTM", "GRU"]


@contextmanager
def skipped_where_missing():
    """Commits without what is asked for raise these; asv leaves a benchmark out if its setup is not implemented."""
    try:
        yield
    except (AttributeError, ImportError, TypeError) as error:
        raise NotImplementedError(f"not in this commit: {error}") from error


def pin(threads):
    """So many threads, and a single one on one CPU, where the system lets a process choose."""
    fastrnn.set_num_threads(threads)
    if threads == 1 and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


class Timed:
    # asv times single calls where there is a setup, and the setup again between them: too little of what takes
    # microseconds. So its call is a whole sample, and its clock goes on by the mean time of a call in that sample.
    number = 1
    repeat = (5, 30, 1.0)
    warmup_time = 0.05
    timeout = 300
    in_gate = False
    threads = 1
    _prepared = None

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        for name in cls.names():
            setattr(cls, f"time_{name}", _timing(cls, name))
            setattr(cls, f"track_{name}_fraction", _tracking(cls, name))

    def __init__(self):
        self._elapsed = 0.0

    @classmethod
    def names(cls):
        """Of what is timed."""
        return [name.removeprefix("call_") for name in dir(cls) if name.startswith("call_")]

    def prepare(self, *params):
        raise NotImplementedError

    def work(self, name):
        return None

    def setup(self, *params):
        """Prepare, compile, and choose how many calls make a sample: once, though asv asks before every sample."""
        if self._prepared == params:
            return
        with skipped_where_missing():
            pin(self.threads)
            self.prepare(*params)
            self.calls = {name: partial(getattr(self, f"call_{name}"), *params) for name in self.names()}
            # One thread's own time stands still while another process has its CPU.
            self.clock = time.thread_time if self.threads == 1 else time.perf_counter
            self.samplers = {name: limits.Sampler(call, self.clock) for name, call in self.calls.items()}
        self._prepared = params

    def timer(self):
        return self._elapsed


def _timing(cls, name):
    def timing(self, *params):
        self._elapsed += self.samplers[name].sample()

    timing.__name__ = f"time_{name}"
    return _standing_for(cls, name, timing)


def _tracking(cls, name):
    def tracking(self, *params):
        found = self.work(name)
        if found is None:
            raise NotImplementedError(f"{name}: the machine has no such limit")
        return limits.fraction(self.calls[name], *found, self.clock)

    tracking.__name__, tracking.unit = f"track_{name}_fraction", "fraction of the machine's limit"
    return _standing_for(cls, name, tracking)


def _standing_for(cls, name, made):
    """asv begins a new history when a benchmark's source changes: this is the source that counts."""
    call = getattr(cls, f"call_{name}")
    made.__doc__, made.pretty_source = call.__doc__, inspect.getsource(call) + inspect.getsource(cls.prepare)
    return made


class Case:
    """A layer, sequences of a shape (T, B, I, H), and a gradient by its outputs."""

    def __init__(self, cell, shape, dtype="float32", lengths=None, threads=1, **options):
        T, B, I, H = shape
        rng, self.threads = np.random.default_rng(0), threads
        precision = {} if dtype == "float32" else {"dtype": dtype}
        self.layer = getattr(fastrnn, cell)(I, H, seed=0, **precision, **options)
        directions = 2 if options.get("bidirectional") else 1
        self.x = rng.standard_normal((T, B, I), dtype)
        self.dy = rng.standard_normal((T, B, directions * H), dtype)
        self.keywords = {} if lengths is None else {"lengths": lengths}
        self.rows = T * B if lengths is None else int(np.sum(lengths))
        self.weights = sum(array.size for array in self.layer.parameters.values() if array.ndim == 2)
        self.T, self.B, self.dtype = T, B, np.dtype(dtype)

    def infer(self):
        self.layer(self.x, **self.keywords)

    def forward(self):
        """For training: what backpropagation needs is kept."""
        _, pullback = self.layer.vjp(self.x, **self.keywords)
        return pullback

    def train(self):
        """Forward and pullback, with the weights packed anew as after an optimiser's update."""
        with self.layer.parameters.writable():
            pass
        self.forward()(self.dy)

    def work(self, products=1):
        """Of so many products with every weight: a single sequence waits for them to be read, a batch does not."""
        if self.B == 1:
            size = self.weights * self.dtype.itemsize
            return products * self.T * size, limits.Reads(size)
        return 2 * products * self.rows * self.weights, limits.MultiplyAdds(self.dtype, self.threads)
