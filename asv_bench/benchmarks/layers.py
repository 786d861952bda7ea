"""The layers' speed from commit to commit: sequences, lengths, both directions, single steps."""

import numpy as np

import fastrnn

SHAPES = {
    "one sequence, 256 units": (100, 1, 256, 256),
    "32 sequences, 256 units": (50, 32, 256, 256),
    "odd sizes": (50, 5, 40, 200),
}


class Sequence:
    """All sequences of one length. (The LSTM's are in `lstm`.)"""

    params = (["RNN", "GRU"], list(SHAPES))
    param_names = ("cell", "shape")

    def setup(self, cell, shape, both_ways=False, mixed_lengths=False):
        fastrnn.set_num_threads(1)
        T, B, I, H = SHAPES[shape]
        rng = np.random.default_rng(0)
        self.layer = getattr(fastrnn, cell)(I, H, 2 if both_ways else 1, bidirectional=both_ways, seed=0)
        self.lengths = rng.permutation(np.linspace(0, T, B).round().astype(np.int64)) if mixed_lengths else None
        self.x = rng.standard_normal((T, B, I), np.float32)
        self.dy = rng.standard_normal((T, B, 2 * H if both_ways else H), np.float32)
        # Compile, or load what is compiled, before anything is timed.
        self.time_inference(cell, shape)
        self.time_training(cell, shape)

    def time_inference(self, cell, shape):
        self.layer(self.x, lengths=self.lengths)

    def time_training(self, cell, shape):
        """Forward and pullback, with the weights packed anew as after an optimiser's update."""
        with self.layer.parameters.writable():
            pass
        _, pullback = self.layer.vjp(self.x, lengths=self.lengths)
        pullback(self.dy)


class Lengths(Sequence):
    """Sequences of any length, half of T on average."""

    params = (["RNN", "LSTM", "GRU"], ["32 sequences, 256 units", "odd sizes"])

    def setup(self, cell, shape):
        super().setup(cell, shape, mixed_lengths=True)


class BothWays(Sequence):
    """Two layers, each with two directions."""

    params = (["RNN", "LSTM", "GRU"], ["32 sequences, 256 units"])

    def setup(self, cell, shape):
        super().setup(cell, shape, both_ways=True)


class Stream:
    """One step of one sequence, called from Python."""

    params = (["RNN", "LSTM", "GRU"], [64, 256])
    param_names = ("cell", "hidden_size")

    def setup(self, cell, hidden_size):
        fastrnn.set_num_threads(1)
        self.stream = getattr(fastrnn, cell)(hidden_size, hidden_size, seed=0).stream()
        self.x = np.random.default_rng(0).standard_normal((1, hidden_size), np.float32)
        self.time_step(cell, hidden_size)

    def time_step(self, cell, hidden_size):
        self.stream.step(self.x)
