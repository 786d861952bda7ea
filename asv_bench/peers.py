# ruff: noqa: E402
"""RNN, LSTM, GRU beside PyTorch's and ONNX Runtime's: one process, the same weights and inputs, interleaved, medians.

Every library runs at the best of its settings for the case and the number of threads; results are compared before
anything is timed. A round runs a block of calls of each, back to back, in a rotating order; a ratio is taken within
a round, so that what slows the machine for a while slows both of its sides. Let nothing else run meanwhile.

Kinds: inference and training of one layer; the same of sequences of any length up to T (lengths) and of two layers
both ways (bidirectional); one step called from Python, with the state carried on (step), and in a compiled loop
(njit); and the same time whether numbers are normal or denormal (denormal).
"""

import argparse
import os

CELLS = ("lstm", "gru", "rnn")
KINDS = ("inference", "training", "lengths", "bidirectional", "step", "njit", "denormal")  # a case's begins with one
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--cell", choices=[*CELLS, "all"], default="all")
parser.add_argument("--only", metavar="KIND[,KIND]", default=",".join(KINDS), help="a part of " + ", ".join(KINDS))
parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of every library (default: 1)")
parser.add_argument("--grid", choices=["quick", "full"], default="full")
parser.add_argument("--repeat", type=int, default=9, metavar="R", help="rounds that count (default: 9)")
parser.add_argument("--json", metavar="FILE", help="write everything that was measured")
ARGUMENTS = parser.parse_args()
if ARGUMENTS.threads < 1 or ARGUMENTS.repeat < 1:
    parser.error("--threads and --repeat: expected at least 1")
if not set(ARGUMENTS.only.split(",")) <= set(KINDS):
    parser.error(f"--only: expected some of {', '.join(KINDS)}, got {ARGUMENTS.only}")
THREADS = ARGUMENTS.threads
# Thread pools take their size from the environment when their library is imported: so this comes before the imports.
os.environ |= {f"{name}_NUM_THREADS": str(THREADS) for name in ("OMP", "OPENBLAS", "MKL")}

import gc
import json
import platform
import time
import timeit
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import llvmlite.binding
import numba
import numpy as np
from implementations import (
    FULL_LENGTH,
    LIBRARIES,
    MISSING,
    NORMAL,
    OWN,
    Case,
    Implementation,
    candidates_of,
    fastrnn,
    layer_of,
    lengths_of,
    trains,
)

gemm, tile, at = fastrnn.kernels.gemm, fastrnn.kernels.tile, fastrnn.kernels.vector.at

BLOCK = 0.02  # seconds that a block of calls takes at least
TRIALS = min(3, ARGUMENTS.repeat)  # rounds that choose each library's setting, and warm up
TOLERANCE = 1e-4  # of the largest number: float32 sums over hundreds of steps, in different orders

QUICK = [(100, 1, 64, 64), (100, 1, 256, 256), (100, 32, 256, 256), (37, 5, 40, 200)]
FULL = [(1, 1, 64, 64), (100, 1, 64, 64), (100, 1, 128, 128), (100, 1, 256, 256), (100, 1, 512, 512)]
FULL += [(25, 1, 1024, 1024), (100, 16, 128, 128), (100, 32, 256, 256), (50, 64, 512, 512), (25, 64, 1024, 1024)]
FULL += [(37, 5, 40, 200), (200, 8, 63, 65)]
BATCHES = [(100, 1, 256, 256), *FULL[6:]]
LENGTHS = [(200, 8, 64, 64), (100, 16, 128, 128), (100, 32, 256, 256), (50, 64, 512, 512)]
BOTH_WAYS = [(100, 16, 128, 128), (100, 32, 256, 256)]
DENORMAL = [(37, 5, 40, 200), (100, 1, 256, 256), (100, 32, 256, 256)]
US_OF_STEP = {16: 0.12, 32: 0.20, 64: 0.75, 128: 2.7}  # of an LSTM in compiled code, at most
NJIT = [(20_000, 1, H, H) for H in US_OF_STEP]  # so many steps in one call that the call itself does not count
# Kinds, cells, and shapes (T, B, I, H) of both grids. What a kind is stands in implementations.py.
PLAN = [
    (("inference", "training"), ("lstm", "gru"), FULL, QUICK),
    (("inference", "training"), ("rnn",), BATCHES, QUICK[2:]),
    (("lengths inference", "lengths training"), ("lstm", "gru"), LENGTHS, LENGTHS[:1]),
    (("bidirectional inference", "bidirectional training"), ("lstm",), BOTH_WAYS, BOTH_WAYS[:1]),
    (("step",), ("lstm", "gru"), [(1, 1, 64, 64)], [(1, 1, 64, 64)]),
    (("njit step",), ("lstm", "gru"), NJIT, NJIT[:1]),
    (
        ("denormal inference", "denormal training", "denormal gradients"),
        ("lstm", "gru", "rnn relu", "rnn identity"),
        DENORMAL,
        DENORMAL[:1],
    ),
]
AT_MOST = ("of full length", "of normal numbers", "us a step")  # targets that are upper bounds


def flops(case):
    lengths = lengths_of(case)
    rows = case.T * case.B if lengths is None else lengths.sum()
    weights = sum(array.size for array in layer_of(case).parameters.values() if array.ndim == 2)
    return 2 * rows * weights * (3 if trains(case) else 1)


def ratio_target(case):
    """The ratio to reach, and against which library (None: the fastest)."""
    one, large = THREADS == 1, case.B >= 16
    if case.kind.startswith("lengths"):
        return 5.0, "torch"
    if case.kind == "bidirectional training":
        return 1.15 if one else 1.10, None
    if (case.kind, case.cell) == ("step", "lstm"):
        return 2.0 if one else None, "onnxruntime"
    if case.kind == "training":
        return {"lstm": 1.15, "gru": 1.8, "rnn": 1.3 if large else None}[case.cell], None
    if case.kind != "inference":
        return None, None
    if case.B == 1:
        return {"lstm": 1.20 if one and case.H < 1024 else 1.05, "gru": 1.20 if one else 1.05}.get(case.cell), None
    return {"lstm": 1.00, "gru": 1.20, "rnn": 1.3}[case.cell] if large else None, None


def targets(case):
    """Every number to reach, if it is measured; None where there is none."""
    peak = {"inference": 0.9 if case.B >= 16 else None, "training": 0.8 if case.B >= 32 else None}
    lstm = case.cell == "lstm"
    return {
        "ratio": ratio_target(case)[0],
        "fraction of peak": peak.get(case.kind) if lstm and THREADS == 1 and case.H >= 256 else None,
        "of full length": 0.6,
        "of normal numbers": 1.2,
        "us a step": US_OF_STEP.get(case.H) if lstm else None,
    }


@numba.njit(nogil=True, boundscheck=False, error_model="numpy")
def tile_products(multiply, repeats, M, K, bias, left, packed, out):
    W = tile.width(at(packed, 0))
    for _ in range(repeats):
        start, target = gemm.Panels(at(bias, 0), W, 0), gemm.Panels(at(out, 0), W, W)
        factor, weights = gemm.Left(at(left, 0), K, 1, 1, 0), gemm.Panels(at(packed, 0), K * W, W)
        gemm.product(multiply, 0, 1, W, W, M, start, target, factor, weights, K)


def peak_of_multiply_adds():
    """The register tile at its best, on all threads at once; and a call's operations."""
    W, M, K, repeats = tile.VECS * fastrnn.kernels.vector.LANES_OF[np.dtype(np.float32)], 8 * tile.ROWS, 512, 500
    rng, sizes = np.random.default_rng(0), (W, M * K, K * W, M * W)
    buffers = [[rng.standard_normal(n, np.float32) for n in sizes] for _ in range(THREADS)]
    pool, multiply = ThreadPoolExecutor(THREADS), gemm.multiply_addresses(np.dtype(np.float32))
    run = lambda own: tile_products(multiply, repeats, M, K, *own)  # noqa: E731
    peak = Implementation("peak", "", lambda: list(pool.map(run, buffers)))
    peak.call()  # compiles
    return peak, THREADS * repeats * 2 * M * W * K


def numbers(result):
    """All arrays of a result, flattened."""
    result = getattr(result, "state", result)  # of a stream
    if isinstance(result, (tuple, list)):
        return [array for part in result for array in numbers(part)]
    return [np.array(result.detach().numpy() if hasattr(result, "detach") else result).ravel()]


def disagreements(case, implementations):
    """How far all are from the first one, fastrnn, relative to an array's largest number; SystemExit if too far."""
    found, expected = {}, None
    names = ["y", "h", *(["c"] if case.cell == "lstm" else [])]
    names += ["dx", *layer_of(case).parameters] if trains(case) else []
    for each in implementations:
        each.before()
        each.call()  # the second call of a step has a state to carry
        if each.library in (FULL_LENGTH, NORMAL):
            continue  # of other numbers
        arrays = numbers(each.call())
        expected = expected or arrays
        for name, array, mine in zip(names, arrays, expected, strict=True):
            off = float(np.abs(array - mine).max() / max(np.abs(mine).max(), 1e-30))
            if not off < TOLERANCE:  # a NaN is not, either
                raise SystemExit(f"{case}: {each.library} ({each.setting}): {name} is {off:.1e} off fastrnn's")
            found[f"{each.library}, {each.setting}: {name}"] = off
    return found


def settle():
    """Wait until threads that spin for more work, of whichever library, have gone to sleep and left their CPUs idle."""
    for _ in range(20):
        busy = time.process_time()
        time.sleep(0.05)
        if time.process_time() - busy < 0.0005:
            return


def seconds_of_call(implementation, calls):
    """The mean over a block of calls, without garbage collection."""
    implementation.before()
    if THREADS > 1:
        settle()
    if calls > 1:
        implementation.call()  # wakes threads and caches
    return timeit.timeit(implementation.call, number=calls) / calls


def calls_in_block(implementation):
    calls = 1
    while (seconds := seconds_of_call(implementation, calls)) * calls < BLOCK / 4:
        calls *= 4
    return int(np.ceil(BLOCK / seconds))


def interleave(blocks, rounds):
    """Seconds of a call, (blocks, rounds), of blocks that are pairs of an implementation and a number of calls."""
    seconds = np.empty((len(blocks), rounds))
    for r in range(rounds):
        gc.collect()
        for i in np.roll(range(len(blocks)), r):
            seconds[i, r] = seconds_of_call(*blocks[i])
    return seconds


def measure(case, peak, peak_flops):
    candidates = candidates_of(case, THREADS)
    disagreement = disagreements(case, candidates)
    blocks = [(each, calls_in_block(each)) for each in [*candidates, peak]]
    trials = np.median(interleave(blocks, TRIALS), 1).tolist()
    best = {blocks[i][0].library: blocks[i] for i in np.argsort(trials)[::-1]}  # the fastest comes last: it stays
    seconds = dict(zip(best, interleave(list(best.values()), ARGUMENTS.repeat)))
    peak_rates, ours = peak_flops / seconds.pop("peak"), seconds["fastrnn"]
    ratios = {name: np.quantile(s / ours, [0.25, 0.5, 0.75]).tolist() for name, s in seconds.items() if s is not ours}
    fraction = float(np.median(flops(case) / ours / peak_rates))
    against = ratio_target(case)[1]
    peers = [name for name in ratios if name not in OWN]
    compared = against or min(peers, key=lambda name: ratios[name][1], default=None)
    measures = {f"of {name}": 1 / ratios[name][1] for name in OWN if name in ratios}
    if case.kind == "njit step":
        measures["us a step"] = float(np.median(ours)) / case.T * 1e6
    reached = {"fraction of peak": fraction, **measures}
    if compared in ratios:
        reached["ratio"] = ratios[compared][1]
    judged = [(of, aim, reached[of], of in AT_MOST) for of, aim in targets(case).items() if aim and of in reached]
    return {
        **case._asdict(),
        "median_seconds": {name: float(np.median(s)) for name, s in seconds.items()},
        "rounds": {name: s.tolist() for name, s in seconds.items()},
        "settings": {name: best[name][0].setting for name in seconds},
        "trials": {f"{c.library}, {c.setting}": t for c, t in zip(candidates, trials)},
        "disagreement": disagreement,  # of each with fastrnn
        "gflops": float(flops(case) / np.median(ours) / 1e9),
        "peak_gflops": float(np.median(peak_rates) / 1e9),
        "fraction_of_peak": fraction,
        "ratios": ratios,  # their time by ours: quartiles
        "compared": compared,
        "measures": measures,
        "targets": [
            {"of": of, "target": aim, "reached": n, "at_most": most, "met": n <= aim if most else n >= aim}
            for of, aim, n, most in judged
        ],
    }


def label(row):
    return "{cell} {kind} ({T}, {B}, {I}, {H}) ".format(**row)


def line(row, width):
    us = {name: f"{seconds * 1e6:.1f}" for name, seconds in row["median_seconds"].items()}
    text = f"{label(row):{width}}{us['fastrnn']:>10}{row['gflops']:9.1f}{row['fraction_of_peak']:6.0%}"
    text += f"{us.get('torch', ''):>10}{us.get('onnxruntime', ''):>10} "
    for name, (low, ratio, high) in row["ratios"].items():
        # Judged beside one library, shown beside all.
        if name == row["compared"] or (row["kind"].startswith(("step", "lengths")) and name not in OWN):
            text += f"  {ratio:.2f} [{low:.2f}, {high:.2f}] {name}, {row['settings'][name]};"
    text += "".join(f"  {n:.2f} {name};" for name, n in row["measures"].items())
    missed = [target for target in row["targets"] if not target["met"]]
    return text + "".join(f" {'ABOVE' if t['at_most'] else 'BELOW'} {t['target']:.2f} {t['of']};" for t in missed)


def cases():
    cells, kinds = CELLS if ARGUMENTS.cell == "all" else (ARGUMENTS.cell,), ARGUMENTS.only.split(",")
    found = [
        Case(kind, cell, *shape)
        for the_kinds, the_cells, full, quick in PLAN
        for cell in the_cells
        for kind in the_kinds
        for shape in (full if ARGUMENTS.grid == "full" else quick)
    ]
    found = [case for case in found if case.cell.split()[0] in cells and case.kind.split()[0] in kinds]
    return found or parser.error(f"--cell {ARGUMENTS.cell} --only {ARGUMENTS.only}: nothing to measure")


def main():
    planned = cases()
    width = max(len(label(case._asdict())) for case in planned)
    report = {
        "cpu": numba.config.CPU_NAME or llvmlite.binding.get_host_cpu_name(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "platform": platform.platform(),
        "date": time.strftime("%Y-%m-%d %H:%M %z"),
        "versions": {"python": platform.python_version()} | {m.__name__: m.__version__ for m in LIBRARIES},
        "missing": MISSING,
        **{name: value for name, value in vars(ARGUMENTS).items() if name != "json"},
    }
    print("{cpu}, {cpus} CPUs, {platform}, {date}".format(**report))
    print(", ".join(f"{name} {version}" for name, version in report["versions"].items()))
    print(*[f"left out: {name} ({error})\n" for name, error in MISSING.items()], sep="", end="")
    print(f"threads: {THREADS}; medians of {ARGUMENTS.repeat} rounds; ratio: the fastest peer's time by ours\n")
    print(f"{'case (T, B, I, H)':{width}}{'ours us':>10}{'GFLOP/s':>9}{'peak':>6}{'torch us':>10}{'ort us':>10}  ratio")
    rows, peak = [], peak_of_multiply_adds()
    for case in planned:
        rows.append(measure(case, *peak))
        print(line(rows[-1], width), flush=True)
    met = [target["met"] for row in rows for target in row["targets"]]
    print(f"\nmultiply-add peak: {np.median([row['peak_gflops'] for row in rows]):.1f} GFLOP/s")
    print(f"targets met: {sum(met)} of {len(met)}")
    report |= {"rows": rows, "targets": len(met), "targets_met": sum(met)}
    if ARGUMENTS.json:
        Path(ARGUMENTS.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
