"""Train a word-level language model in PyTorch: an ordinary program, but for one import.

    python examples/torch_language_model.py --rnn torch
    python examples/torch_language_model.py --rnn fastrnn

Embedding, dropout, two recurrent layers, an output layer that shares the embedding's weights; the state is carried
from window to window without its graph, gradients are clipped, and the best model is kept in a file (Zaremba, Sutskever
and Vinyals 2014; tied weights: Press and Wolf 2017). Both runs draw the same initial weights and dropout masks.
"""

import argparse
import importlib
import math
import os
import re
import time
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import nn

# The one import that changes.
MODULES = {"torch": "torch.nn", "fastrnn": "fastrnn.interop.torch"}


class Model(nn.Module):
    def __init__(self, rnn, cell, words, size, layers, dropout):
        super().__init__()
        self.embedding = nn.Embedding(words, size)
        self.rnn = getattr(rnn, cell)(size, size, layers, dropout=dropout)
        self.output = nn.Linear(size, words)
        self.output.weight = self.embedding.weight
        self.dropout = nn.Dropout(dropout)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.zeros_(self.output.bias)

    def forward(self, tokens, state):
        y, state = self.rnn(self.dropout(self.embedding(tokens)), state)
        return self.output(self.dropout(y)), state


def detached(state):
    return tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()


def batches(tokens, batch):
    """The text as ``batch`` long columns: (T, batch)."""
    steps = len(tokens) // batch
    return tokens[: steps * batch].view(batch, steps).t().contiguous()


def windows(columns, length):
    for first in range(0, len(columns) - 1, length):
        last = min(first + length, len(columns) - 1)
        yield columns[first:last], columns[first + 1 : last + 1]


def evaluate(model, columns, length):
    model.eval()
    total, state = 0.0, None
    with torch.inference_mode():
        for x, target in windows(columns, length):
            logits, state = model(x, state)
            total += nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten()).item() * len(x)
    model.train()
    return total / (len(columns) - 1)


def read_words(file):
    text = Path(file).read_text("utf-8") if file else "\n".join(topics.values())
    return re.findall(r"\w+|[^\w\s]|\n", text.lower())


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", nargs="?", help="a file of text; the documentation of Python's language without one")
    parser.add_argument("--rnn", choices=MODULES, default="fastrnn")
    parser.add_argument("--cell", choices=["LSTM", "GRU"], default="LSTM")
    parser.add_argument("--size", type=int, default=256, help="of an embedding, and units of a layer")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dropout", type=float, default=0.3)
    parser.add_argument("--vocabulary", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--updates", type=int, help="stop after so many, with the loss of each")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", help="a file for the best model")
    return parser.parse_args()


def main():
    args = arguments()
    torch.manual_seed(0)
    if args.threads:
        torch.set_num_threads(args.threads)
    words = read_words(args.text)
    known = [word for word, _ in Counter(words).most_common(args.vocabulary - 1)]
    place = {word: i for i, word in enumerate(known, 1)}
    tokens = torch.tensor([place.get(word, 0) for word in words])
    held_out = len(tokens) // 20
    train, valid = batches(tokens[:-held_out], args.batch), batches(tokens[-held_out:], min(args.batch, 8))

    rnn = importlib.import_module(MODULES[args.rnn])
    model = Model(rnn, args.cell, args.vocabulary, args.size, args.layers, args.dropout)
    optimizer = torch.optim.Adam(model.parameters(), args.lr)
    best, updates = math.inf, 0
    for epoch in range(args.epochs):
        state, start, total = None, time.perf_counter(), 0.0
        for x, target in windows(train, args.window):
            optimizer.zero_grad()
            logits, state = model(x, state)
            state = detached(state)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            optimizer.step()
            total, updates = total + loss.item() * len(x), updates + 1
            if args.updates:
                print(f"update {updates} loss {loss.item():.6f}")
                if updates == args.updates:
                    return
        seconds, inside = time.perf_counter() - start, evaluate(model, valid, args.window)
        print(
            f"epoch {epoch + 1}: training {total / (len(train) - 1):.4f}, validation {inside:.4f} nats a word, "
            f"{train.numel() / seconds:,.0f} words a second",
            flush=True,
        )
        if args.out and inside < best:
            torch.save(model.state_dict(), args.out + ".partial")
            os.replace(args.out + ".partial", args.out)
        best = min(best, inside)


if __name__ == "__main__":
    main()
