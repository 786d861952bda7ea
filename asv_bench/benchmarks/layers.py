"""The layers: the shapes of the comparison with peers, lengths, both directions, two threads, streams."""

import numpy as np

import fastrnn

from .common import CELLS, Case, Timed, limits

# As in `peers.py`: T, B, I, H.
GRID = [
    (1, 1, 64, 64), (100, 1, 64, 64), (100, 1, 128, 128), (100, 1, 256, 256), (100, 1, 512, 512), (25, 1, 1024, 1024),
    (100, 16, 128, 128), (100, 32, 256, 256), (50, 64, 512, 512), (25, 64, 1024, 1024), (37, 5, 40, 200),
    (200, 8, 63, 65),
]  # fmt: skip
BATCHES = {"small": (200, 8, 64, 64), "middle": (100, 16, 128, 128), "large": (50, 32, 256, 256)}
SHAPES = {", ".join(map(str, shape)): shape for shape in GRID}


class Sequence(Timed):
    """The comparison's grid, one layer."""

    params = (CELLS, list(SHAPES))
    param_names = ("cell", "T, B, I, H")

    def prepare(self, cell, shape):
        self.case = Case(cell, SHAPES[shape], threads=self.threads)

    def call_inference(self, cell, shape):
        self.case.infer()

    def call_training(self, cell, shape):
        self.case.train()

    def work(self, name):
        return self.case.work(3 if name == "training" else 1)


class TwoThreads(Sequence):
    threads = 2


class Lengths(Sequence):
    """Sequences of any length, half of T on average."""

    params = (CELLS, list(BATCHES))
    param_names = ("cell", "batch")

    def prepare(self, cell, batch):
        T, B, *_ = BATCHES[batch]
        lengths = np.random.default_rng(0).permutation(np.linspace(1, T, B).round().astype(np.int64))
        self.case = Case(cell, BATCHES[batch], lengths=lengths)


class BothWays(Sequence):
    """Two layers, each with two directions."""

    params = (CELLS, list(BATCHES))
    param_names = ("cell", "batch")

    def prepare(self, cell, batch):
        self.case = Case(cell, BATCHES[batch], num_layers=2, bidirectional=True)


class Stream(Timed):
    """One step of one sequence, called from Python with the state carried on: by a stream, and by the layer."""

    params = (CELLS, [64, 256])
    param_names = ("cell", "hidden_size")

    def prepare(self, cell, hidden_size):
        layer = getattr(fastrnn, cell)(hidden_size, hidden_size, seed=0)
        self.layer, self.state, self.stream = layer, None, layer.stream()
        self.x = np.random.default_rng(0).standard_normal((1, hidden_size), np.float32)
        self.size = sum(array.nbytes for array in layer.parameters.values())

    def call_step(self, cell, hidden_size):
        self.stream.step(self.x)

    def call_call(self, cell, hidden_size):
        _, self.state = self.layer(self.x[None], self.state)

    def work(self, name):
        return self.size, limits.Reads(self.size)
