"""Models whose sequences can be counted, for the tests of decoding and of sampling."""

import numpy as np

from fastrnn.models import LanguageModel


class Toy:
    """A random model whose next token depends on all before. The state is the number of the node in its tree."""

    def __init__(self, V, T, seed=0, spread=2.0, halves=False, dtype=np.float64):
        self.V, self.T, self.calls = V, T, 0
        nodes = (V ** (T + 1) - 1) // max(V - 1, 1) if V > 1 else T + 1
        x = np.random.default_rng(seed).standard_normal((nodes, V)) * spread
        self.log_probs = np.minimum(x - np.log(np.exp(x).sum(1, keepdims=True)), 0)
        if halves:  # sums are exact, and often equal
            self.log_probs = np.round(self.log_probs * 2) / 2
        self.log_probs = self.log_probs.astype(dtype)
        self.log_probs.flags.writeable = False

    def start(self, N=1):
        return np.full(N, -1)

    def __call__(self, tokens, node):
        self.calls += 1
        node = np.where(node < 0, 0, node * self.V + tokens + 1)
        return self.log_probs[node], node

    def sequences(self, eos, T, wanted=lambda tokens: True):
        """All that end, or have T tokens: (log-probability, tokens)."""
        found = []

        def extend(node, tokens, log_prob):
            if len(tokens) == T or (tokens and tokens[-1] == eos):
                found.append((log_prob, tokens))
                return
            for v in range(self.V):
                total = log_prob + float(self.log_probs[node, v])
                if total > -np.inf and wanted((*tokens, v)):
                    extend(node * self.V + v + 1, (*tokens, v), total)

        extend(0, (), 0.0)
        return found


def sequences_of(found, n=0):
    """The tokens of an input's results, without padding."""
    return [tuple(t[:length].tolist()) for t, length in zip(found.tokens[n], found.lengths[n]) if length]


def table_model(rows):
    """The next token's probabilities by the one before; a call's number in the state."""
    with np.errstate(divide="ignore"):
        log_probs = np.log(np.array(rows, np.float64))
    return lambda tokens, state: (log_probs[tokens], state)


def language_model(cell, dtype=np.float64, V=40, layers=2, H=17, seed=3):
    model = LanguageModel(V, 9, H, layers, dtype=dtype, cell=cell, seed=seed)
    model.output.weight = model.output.weight * 6
    states = [np.random.default_rng(1).standard_normal((layers, 5, H)).astype(dtype) for _ in range(model.rnn.STATES)]
    return model, tuple(states) if len(states) > 1 else states[0]
