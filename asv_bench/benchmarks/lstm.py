"""The LSTM's speed from commit to commit. Beside other libraries it is measured by `peers.py`."""

import numpy as np

import fastrnn

SHAPES = {
    "one sequence, 128 units": (100, 1, 128, 128),
    "one sequence, 512 units": (50, 1, 512, 512),
    "32 sequences, 256 units": (50, 32, 256, 256),
    "odd sizes": (50, 5, 40, 200),
}


class Sequence:
    params = (list(SHAPES), [1, 2])
    param_names = ("shape", "threads")

    def setup(self, shape, threads):
        fastrnn.set_num_threads(threads)
        T, B, I, H = SHAPES[shape]
        rng = np.random.default_rng(0)
        self.lstm = fastrnn.LSTM(I, H, seed=0)
        self.x = rng.standard_normal((T, B, I), np.float32)
        self.dy = rng.standard_normal((T, B, H), np.float32)
        # Compile, or load what is compiled, before anything is timed.
        self.time_inference(shape, threads)
        self.time_training(shape, threads)

    def time_inference(self, shape, threads):
        self.lstm(self.x)

    def time_training(self, shape, threads):
        """Forward and pullback, with the weights packed anew as after an optimiser's update."""
        with self.lstm.parameters.writable():
            pass
        _, pullback = self.lstm.vjp(self.x)
        pullback(self.dy)


class Step:
    """One step of one sequence, called from Python with the state that the last call left."""

    params = (64, 256)
    param_names = ("hidden_size",)

    def setup(self, hidden_size):
        fastrnn.set_num_threads(1)
        self.lstm = fastrnn.LSTM(hidden_size, hidden_size, seed=0)
        self.x = np.random.default_rng(0).standard_normal((1, 1, hidden_size), np.float32)
        self.state = None
        self.time_step(hidden_size)

    def time_step(self, hidden_size):
        _, self.state = self.lstm(self.x, self.state)
