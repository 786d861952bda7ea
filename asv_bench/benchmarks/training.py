"""A step of training a language model: forward, loss, pullback, clipping, update."""

import numpy as np

import fastrnn

from .common import Timed, limits

V, D, T, B = 96, 64, 25, 32


class Step(Timed):
    params = (["rnn", "lstm", "gru"], [64, 128])
    param_names = ("cell", "hidden_size")
    in_gate = True

    def prepare(self, cell, hidden_size):
        rng = np.random.default_rng(0)
        choice = {} if cell == "lstm" else {"cell": cell}
        self.model = fastrnn.LanguageModel(V, D, hidden_size, num_layers=1, seed=0, **choice)
        self.optimizer = fastrnn.optim.Adam(self.model.parameters, lr=1e-4)
        self.tokens, self.targets = rng.integers(0, V, (2, T, B))
        weights = [a.size for name, a in self.model.parameters.items() if a.ndim == 2 and "embedding" not in name]
        self.operations = 3 * 2 * T * B * sum(weights)

    def call_step(self, cell, hidden_size):
        _, _, grads = self.model.loss_and_gradients(self.tokens, self.targets)
        fastrnn.clip_grad_norm(grads, 1.0)
        self.optimizer.step(grads)

    def work(self, name):
        return self.operations, limits.MultiplyAdds(np.float32)
