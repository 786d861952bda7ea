# ruff: noqa: E402
"""`fastrnn.interop.torch` beside `torch.nn`, as PyTorch's users run both: with PyTorch's overhead and its settings.

One process, the same weights and inputs, interleaved: a round runs a block of calls of each, back to back, and a ratio
is taken within a round. Results are compared before anything is timed. Let nothing else run meanwhile.
"""

import argparse
import os

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--threads", type=int, default=1, metavar="N", help="of both (default: 1)")
parser.add_argument("--repeat", type=int, default=9, metavar="R", help="rounds that count (default: 9)")
parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name has this in it")
ARGUMENTS = parser.parse_args()
os.environ |= {f"{name}_NUM_THREADS": str(ARGUMENTS.threads) for name in ("OMP", "OPENBLAS", "MKL")}

import gc
import statistics
import timeit

import implementations  # noqa: F401  (finds fastrnn in a checkout)
import torch
from torch import nn

from fastrnn.interop.torch import replace

SHAPES = [(100, 32, 256, 256), (100, 16, 128, 128)]
CELLS = [(1, 64), (1, 128), (1, 256), (1, 512), (8, 128), (16, 128), (32, 256), (64, 512)]
BLOCK = 0.03  # seconds that a block of calls takes at least


def modules(kind, *sizes):
    """PyTorch's module, and one with the same weights on fastrnn's kernels."""
    theirs, ours = [getattr(nn, kind)(*sizes) for _ in range(2)]
    ours.load_state_dict(theirs.state_dict())
    replace(ours)
    return theirs, ours


def inference(module, *arguments):
    return torch.inference_mode()(lambda: module(*arguments))


def training(module, x, lengths=None):
    x = x.clone().requires_grad_()
    weights = torch.linspace(-1, 1, module.hidden_size)

    def run():
        module.zero_grad()
        x.grad = None
        given = x if lengths is None else nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        y, _ = module(given)
        y = y if lengths is None else y.data
        (y @ weights).sum().backward()
        return y, x.grad, *(p.grad for p in module.parameters())

    return run


def cases():
    for kind, aim in ("LSTM", 1.1), ("GRU", 1.7):
        for T, B, I, H in SHAPES:
            x, pair = torch.randn(T, B, I), modules(kind, I, H)
            yield f"{kind} inference {T, B, I, H}", aim, [inference(module, x) for module in pair]
            yield f"{kind} training {T, B, I, H}", aim, [training(module, x) for module in pair]
            lengths = torch.linspace(1, T, B).round().long()[torch.randperm(B)]
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
            yield f"{kind} packed inference {T, B, I, H}", 4, [inference(module, packed) for module in pair]
            yield f"{kind} packed training {T, B, I, H}", 4, [training(module, x, lengths) for module in pair]
    for kind in "LSTMCell", "GRUCell":
        for B, H in CELLS:
            x, pair = torch.randn(B, H), modules(kind, H, H)
            state = pair[0](x)
            state = tuple(s.detach() for s in state) if kind == "LSTMCell" else state.detach()
            yield f"{kind} {B, H, H}", 1.5, [inference(module, x, state) for module in pair]


def leaves(value):
    return (
        [value] if isinstance(value, torch.Tensor) else [t for part in value if part is not None for t in leaves(part)]
    )


def check(name, theirs, ours):
    for a, b in zip(leaves(theirs), leaves(ours), strict=True):
        if a.is_floating_point() and not (a - b).abs().max() <= 1e-4 * b.abs().max().clamp(min=1e-3):
            raise SystemExit(f"{name}: results are {(a - b).abs().max():.1e} apart")


def calls_in_block(function):
    calls = 1
    while (seconds := timeit.timeit(function, number=calls)) < BLOCK / 4:
        calls *= 4
    return max(1, round(calls * BLOCK / seconds))


def main():
    torch.set_num_threads(ARGUMENTS.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, threads: {ARGUMENTS.threads}, medians of {ARGUMENTS.repeat} rounds")
    print(f"{'case (T, B, I, H) or (B, I, H)':<42}{'ours us':>12}{'torch us':>12}  ratio")
    for name, aim, functions in cases():
        if ARGUMENTS.only not in name:
            continue
        check(name, *[function() for function in functions])
        counts, seconds = [calls_in_block(function) for function in functions], []
        for r in range(ARGUMENTS.repeat + 1):
            gc.collect()
            both = [0.0, 0.0]
            for i in (0, 1) if r % 2 else (1, 0):
                both[i] = timeit.timeit(functions[i], number=counts[i]) / counts[i]
            seconds.append(both)
        ratios = [theirs / ours for theirs, ours in seconds[1:]]  # the first round warms up
        low, ratio, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        theirs, ours = [statistics.median(column) * 1e6 for column in zip(*seconds[1:])]
        missed = "" if ratio >= aim else f"  BELOW {aim}"
        print(f"{name:<42}{ours:12.1f}{theirs:12.1f}  {ratio:.2f} [{low:.2f}, {high:.2f}]{missed}", flush=True)


if __name__ == "__main__":
    main()
