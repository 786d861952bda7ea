# ruff: noqa: E402
"""Beam search of an LSTM language model beside the same search in PyTorch, and greedy decoding beside NumPy.

One process, the same weights, interleaved; figures are medians of rounds, and ratios are taken within a round. The
results are compared before anything is timed. Let nothing else run meanwhile.
"""

import argparse
import os

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of every library (default: 1)")
parser.add_argument("--quick", action="store_true", help="only some of the cases")
parser.add_argument("--repeat", type=int, default=7, metavar="R", help="rounds (default: 7)")
ARGUMENTS = parser.parse_args()
if ARGUMENTS.threads < 1 or ARGUMENTS.repeat < 1:
    parser.error("--threads and --repeat: expected at least 1")
# Thread pools take their size from the environment when their library is imported: so this comes before the imports.
os.environ |= {f"{name}_NUM_THREADS": str(ARGUMENTS.threads) for name in ("OMP", "OPENBLAS", "MKL", "FASTRNN")}

import sys
import timeit
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import fastrnn

HIDDEN, STEPS = 256, 100
SECONDS = 0.05  # that a round of one library takes at least
CASES = [(V, K, N) for V in (100, 10_000) for K in (1, 5, 20) for N in (1, 16)]
QUICK = [(100, 5, 1), (10_000, 5, 1), (100, 20, 16)]
NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
TOLERANCE = 1e-5  # of the log-probability: float32 sums over a hundred steps, in different orders


class TorchBeams:
    """The search as one writes it in PyTorch: LSTMCell, log_softmax, topk over K x V, index_select."""

    def __init__(self, model):
        V, E, H = model.num_tokens, model.embedding.embedding_dim, model.rnn.hidden_size
        self.embedding, self.cell = torch.nn.Embedding(V, E), torch.nn.LSTMCell(E, H)
        self.output = torch.nn.Linear(H, V)
        for part, theirs in (("embedding", self.embedding), ("rnn", self.cell), ("output", self.output)):
            arrays = getattr(model, part).state_dict().items()
            theirs.load_state_dict({name.removesuffix("_l0"): torch.from_numpy(array) for name, array in arrays})

    @torch.inference_mode()
    def search(self, bos, K, N, steps):
        H, V = self.cell.hidden_size, self.output.out_features
        h, c = torch.zeros(N * K, H), torch.zeros(N * K, H)
        scores = torch.full((N, K), -torch.inf)
        scores[:, 0] = 0
        tokens, first = torch.full((N * K,), bos), torch.arange(N)[:, None] * K
        history = []
        for _ in range(steps):
            h, c = self.cell(self.embedding(tokens), (h, c))
            log_probs = torch.log_softmax(self.output(h), 1)
            scores, best = (scores.view(N * K, 1) + log_probs).view(N, K * V).topk(K)
            parents = (best // V + first).view(-1)
            tokens = (best % V).view(-1)
            h, c = h.index_select(0, parents), c.index_select(0, parents)
            history.append((parents, tokens))
        rows, sequence = torch.arange(N) * K, []
        for parents, tokens in reversed(history):
            sequence.append(tokens[rows])
            rows = parents[rows]
        return torch.stack(sequence[::-1], 1).numpy(), scores.numpy()


class NumpyGreedy:
    """A GRU decoder as one writes it in NumPy, from the equations, one sequence, one token at a time."""

    def __init__(self, model):
        parameters = model.parameters
        self.embedding = parameters["embedding.weight"]
        self.w_out, self.b_out = parameters["output.weight"], parameters["output.bias"]
        self.w, self.u, self.b, self.c = (np.split(parameters[f"rnn.{name}_l0"], 3) for name in NAMES)

    def search(self, bos, steps):
        sigmoid = lambda a: 1 / (1 + np.exp(-a))  # noqa: E731
        (w_r, w_z, w_n), (u_r, u_z, u_n), (b_r, b_z, b_n), (c_r, c_z, c_n) = self.w, self.u, self.b, self.c
        h, token, tokens = np.zeros(len(u_r), np.float32), bos, []
        for _ in range(steps):
            x = self.embedding[token]
            r = sigmoid(w_r @ x + b_r + u_r @ h + c_r)
            z = sigmoid(w_z @ x + b_z + u_z @ h + c_z)
            n = np.tanh(w_n @ x + b_n + r * (u_n @ h + c_n))
            h = (1 - z) * n + z * h
            logits = self.w_out @ h + self.b_out
            probabilities = np.exp(logits - logits.max())
            token = int((probabilities / probabilities.sum()).argmax())
            tokens.append(token)
        return tokens


def ratio(ours, theirs):
    """Microseconds of both, and the quartiles of theirs by ours within a round."""
    calls = [max(1, int(SECONDS / timeit.timeit(call, number=1))) for call in (ours, theirs)]
    seconds = np.array(
        [[timeit.timeit(call, number=n) / n for call, n in zip((ours, theirs), calls)] for _ in range(ARGUMENTS.repeat)]
    )
    return np.median(seconds, 0) * 1e6, np.quantile(seconds[:, 1] / seconds[:, 0], [0.5, 0.25, 0.75])


def report(name, tokens, target, ours, theirs):
    (us, their_us), (middle, low, high) = ratio(ours, theirs)
    print(
        f"{name:34}{us:12.0f}{their_us:12.0f}{tokens / us * 1e6:12.0f}{middle:8.2f} [{low:.2f}, {high:.2f}]"
        f"{'' if middle >= target else f'  BELOW {target}'}",
        flush=True,
    )


def beams(V, K, N):
    model = fastrnn.LanguageModel(V, HIDDEN, HIDDEN, seed=1)
    model.output.weight = model.output.weight * 4  # not all tokens alike
    peer = TorchBeams(model)
    ours = lambda: model.beam_search(bos=[0] * N, eos=None, beam_size=K, max_length=STEPS, num_return=K)  # noqa: E731
    theirs = lambda: peer.search(0, K, N, STEPS)  # noqa: E731
    found, (_, scores) = ours(), theirs()
    off = np.abs(found.log_probs / scores - 1).max()
    if not off < TOLERANCE:
        raise SystemExit(f"V {V}, beam {K}, batch {N}: log-probabilities are {off:.1e} off each other")
    target = 3.0 if (K, N) == (5, 1) else 1.5
    report(f"LSTM {HIDDEN}, V {V}, beam {K}, batch {N}", N * STEPS, target, ours, theirs)


def greedy():
    model = fastrnn.LanguageModel(74, 128, 128, cell="gru", seed=0)
    peer = NumpyGreedy(model)
    ours = lambda: model.greedy(bos=0, eos=None, max_length=20)  # noqa: E731
    theirs = lambda: peer.search(0, 20)  # noqa: E731
    if ours().tokens[0, 0].tolist() != theirs():
        raise SystemExit("greedy: other tokens than NumPy's")
    report("GRU 128, V 74, greedy, batch 1", 20, 10.0, ours, theirs)


def main():
    torch.set_num_threads(ARGUMENTS.threads)
    fastrnn.set_num_threads(ARGUMENTS.threads)
    print(f"threads: {ARGUMENTS.threads}; torch {torch.__version__}, numpy {np.__version__}")
    print(f"{'case':34}{'ours us':>12}{'theirs us':>12}{'tokens/s':>12}{'ratio':>8}")
    greedy()
    for case in QUICK if ARGUMENTS.quick else CASES:
        beams(*case)


if __name__ == "__main__":
    main()
