"""Decoding with a language model: beam search, and drawing token by token."""

import numpy as np

import fastrnn

from .common import Timed, limits

V, D, H, LENGTH = 96, 64, 128, 32


class _Decoding(Timed):
    def model(self, cell="lstm"):
        choice = {} if cell == "lstm" else {"cell": cell}
        model = fastrnn.LanguageModel(V, D, H, num_layers=1, seed=0, **choice)
        weights = [a.size for name, a in model.parameters.items() if a.ndim == 2 and "embedding" not in name]
        self.operations = 2 * LENGTH * sum(weights)
        return model


class BeamSearch(_Decoding):
    """Of two inputs, whose models run in the search's compiled loop. A beam of 1 is the greedy choice."""

    params = (["lstm", "gru"], [1, 4, 16])
    param_names = ("cell", "beam_size")
    in_gate = True

    def prepare(self, cell, beam_size):
        self.search = self.model(cell).beam_search

    def call_search(self, cell, beam_size):
        self.search(bos=[0, 1], eos=None, beam_size=beam_size, max_length=LENGTH)

    def work(self, name):
        _, beam_size = self._prepared
        return 2 * beam_size * self.operations, limits.MultiplyAdds(np.float32)


class Generate(_Decoding):
    params = (["lstm", "gru"],)
    param_names = ("cell",)

    def prepare(self, cell):
        self.generating = self.model(cell)

    def call_generate(self, cell):
        self.generating.generate(np.array([1, 2, 3]), LENGTH, rng=np.random.default_rng(0))

    def work(self, name):
        return self.operations, limits.MultiplyAdds(np.float32)
