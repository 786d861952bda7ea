# ruff: noqa: E402
"""The LSTM beside PyTorch's and ONNX Runtime's: one process, the same weights and inputs, interleaved, medians.

Every library runs at the best of its settings for the case and the number of threads; results are compared before
anything is timed. A round runs a block of calls of each, back to back, in a rotating order; a ratio is taken within
a round, so that what slows the machine for a while slows both of its sides. Let nothing else run meanwhile.
"""

import argparse
import os

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of every library (default: 1)")
parser.add_argument("--grid", choices=["quick", "full"], default="full")
parser.add_argument("--repeat", type=int, default=9, metavar="R", help="rounds that count (default: 9)")
parser.add_argument("--json", metavar="FILE", help="write everything that was measured")
ARGUMENTS = parser.parse_args()
if ARGUMENTS.threads < 1 or ARGUMENTS.repeat < 1:
    parser.error("--threads and --repeat: expected at least 1")
THREADS = ARGUMENTS.threads
# Thread pools take their size from the environment when their library is imported: so this comes before the imports.
os.environ |= {f"{name}_NUM_THREADS": str(THREADS) for name in ("OMP", "OPENBLAS", "MKL")}

import gc
import importlib.util
import json
import platform
import sys
import time
import timeit
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import llvmlite.binding
import numba
import numpy as np

if importlib.util.find_spec("fastrnn") is None:
    sys.path.append(str(Path(__file__).resolve().parent.parent))
import fastrnn

fastrnn.set_num_threads(THREADS)
gemm, tile = fastrnn.kernels.gemm, fastrnn.kernels.tile
libraries = [fastrnn, numba, llvmlite, np]
MISSING = {}
try:
    import torch

    torch.set_num_threads(THREADS)
    libraries.append(torch)
except ImportError as error:
    MISSING["torch"] = str(error)
try:
    import onnx
    import onnxruntime

    libraries += [onnx, onnxruntime]
except ImportError as error:
    MISSING["onnxruntime"] = str(error)

BLOCK = 0.02  # seconds that a block of calls takes at least
TRIALS = min(3, ARGUMENTS.repeat)  # rounds that choose each library's setting, and warm up
TOLERANCE = 1e-4  # of the largest number: float32 sums over hundreds of steps, in different orders
RESULTS = ("y", "h", "c", "dx", "weight_ih", "weight_hh", "bias_ih", "bias_hh")
QUICK = [(100, 1, 64, 64), (100, 1, 256, 256), (100, 32, 256, 256), (37, 5, 40, 200)]
FULL = [(1, 1, 64, 64), (100, 1, 64, 64), (100, 1, 128, 128), (100, 1, 256, 256), (100, 1, 512, 512)]
FULL += [(25, 1, 1024, 1024), (100, 16, 128, 128), (100, 32, 256, 256), (50, 64, 512, 512), (25, 64, 1024, 1024)]
FULL += [(37, 5, 40, 200), (200, 8, 63, 65)]

# kind: "inference", "training" or "step", the call on one step that carries its state on, as a decoder makes it.
Case = namedtuple("Case", "kind T B I H")
# call() is timed and returns y, (h, c) and, training, dx and the weights' gradients; before() runs ahead of a block.
Implementation = namedtuple("Implementation", "library setting call before", defaults=(lambda: None,))


def flops(case):
    return 2 * case.T * case.B * 4 * case.H * (case.I + case.H) * (3 if case.kind == "training" else 1)


def targets(case):
    """The ratio to reach, against which library (None: the fastest), and the fraction of the peak to reach."""
    large = THREADS == 1 and case.H >= 256
    if case.kind == "step":
        return 2.0 if THREADS == 1 else None, "onnxruntime", None
    if case.kind == "training":
        return 1.15, None, 0.8 if large and case.B >= 32 else None
    if case.B == 1:
        return 1.20 if THREADS == 1 and case.H < 1024 else 1.05, None, None
    return (1.00, None, 0.9 if large else None) if case.B >= 16 else (None, None, None)


def calling(case, forward, training=None):
    """What is timed: ``training()``, or of ``forward(state)``, which returns y and the next state, what the case is."""
    state = None

    def step():
        nonlocal state
        y, state = forward(state)
        return y, state

    return {"inference": lambda: forward(None), "training": training, "step": step}[case.kind]


def with_fastrnn(case, weights, x, dy):
    lstm = fastrnn.LSTM(case.I, case.H)
    lstm.load_state_dict(weights)

    def training():
        with lstm.parameters.writable():
            pass  # as after an optimiser's update: the weights are packed anew
        (y, state), pullback = lstm.vjp(x)
        dx, _, gradients = pullback(dy)
        return y, state, dx, list(gradients.values())

    return [Implementation("fastrnn", "default", calling(case, lambda state: lstm(x, state), training))]


def with_torch(case, weights, x, dy):
    weights = {name: torch.from_numpy(array) for name, array in weights.items()}
    x, dy = torch.from_numpy(x).requires_grad_(case.kind == "training"), torch.from_numpy(dy)
    lstm, cell = torch.nn.LSTM(case.I, case.H), torch.nn.LSTMCell(case.I, case.H)
    lstm.load_state_dict(weights)
    cell.load_state_dict({name.removesuffix("_l0"): array for name, array in weights.items()})
    forward = torch.inference_mode()(lambda state: lstm(x, state))
    forward_cell = torch.inference_mode()(lambda state: ((after := cell(x[0], state))[0], after))

    def training():
        lstm.zero_grad(set_to_none=True)
        x.grad = None
        y, state = lstm(x)
        y.backward(dy)
        return y, state, x.grad, [parameter.grad for parameter in lstm.parameters()]

    def implementation(setting, on):
        call = calling(case, forward, training)
        return Implementation("torch", setting, call, lambda: torch.backends.mkldnn.set_flags(on))

    found = [implementation("oneDNN", True), implementation("no oneDNN", False)]  # which is faster depends on the shape
    return found + [Implementation("torch LSTMCell", "default", calling(case, forward_cell))] * (case.kind == "step")


def with_onnxruntime(case, weights, x, dy):
    if case.kind == "training":
        return []
    # ONNX has the gates in the order i, o, f, c; PyTorch has i, f, g, o.
    W, R, *b = (a.reshape(4, case.H, -1)[[0, 3, 1, 2]].reshape(a.shape) for a in weights.values())
    constants = {"W": W[None], "R": R[None], "b": np.concatenate(b)[None]}
    start = {name: np.zeros((1, case.B, case.H), np.float32) for name in ("h0", "c0")} if case.kind == "step" else {}
    feeds = {"x": x, **start}
    shapes = {"y": (case.T, 1, case.B, case.H), "h": (1, case.B, case.H), "c": (1, case.B, case.H)}
    inputs = ["x", *constants, *(["", *start] if start else [])]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("LSTM", inputs, list(shapes), hidden_size=case.H)],
        "lstm",
        [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, a.shape) for n, a in feeds.items()],
        [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, shape) for n, shape in shapes.items()],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 14)], ir_version=8)

    def implementations(spinning, end):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = THREADS, 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.add_session_config_entry("session.intra_op.allow_spinning", spinning)
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

        def forward(state):
            y, h, c = session.run(None, feeds if state is None else {"x": x, "h0": state[0], "c0": state[1]})
            return y, (h, c)

        # Bound, all stands in memory given once: a state that is carried on in two places in turn, and a step's own x.
        value, x_bound = onnxruntime.OrtValue.ortvalue_from_numpy, x.copy()
        places = [[np.zeros(shape, np.float32) for shape in shapes.values()] for _ in range(2)]
        bindings = [session.io_binding(), session.io_binding()]
        for binding, outputs, others in zip(bindings, places, places[::-1], strict=True):
            for name, array in zip(feeds, [x_bound, *others[1:]]):
                binding.bind_ortvalue_input(name, value(array))
            for name, array in zip(shapes, outputs):
                binding.bind_ortvalue_output(name, value(array))

        def bound():
            if start:
                np.copyto(x_bound, x)
            session.run_with_iobinding(bindings[0])
            bindings.reverse()
            places.reverse()
            return places[1]

        yield Implementation("onnxruntime", "run" + end, calling(case, forward))
        yield Implementation("onnxruntime", "io-binding" + end, bound)

    # One thread has no others that could spin.
    return [*implementations("0", ""), *(implementations("1", ", spinning") if THREADS > 1 else [])]


@numba.njit(nogil=True, boundscheck=False, error_model="numpy")
def tile_products(multiply, repeats, M, K, bias, left, packed, out):
    W = tile.width(tile.at(packed, 0))
    for _ in range(repeats):
        start, target = gemm.Panels(tile.at(bias, 0), W, 0), gemm.Panels(tile.at(out, 0), W, W)
        factor, weights = gemm.Left(tile.at(left, 0), K, 1, 1, 0), gemm.Panels(tile.at(packed, 0), K * W, W)
        gemm.product(multiply, 0, 1, W, M, start, target, factor, weights, K)


def peak_of_multiply_adds():
    """The register tile at its best, on all threads at once; and a call's operations."""
    W, M, K, repeats = tile.VECS * tile.LANES_OF[np.dtype(np.float32)], 8 * tile.ROWS, 512, 500
    rng, sizes = np.random.default_rng(0), (W, M * K, K * W, M * W)
    buffers = [[rng.standard_normal(n, np.float32) for n in sizes] for _ in range(THREADS)]
    pool, multiply = ThreadPoolExecutor(THREADS), gemm.multiply_address(np.dtype(np.float32))
    run = lambda own: tile_products(multiply, repeats, M, K, *own)  # noqa: E731
    peak = Implementation("peak", "", lambda: list(pool.map(run, buffers)))
    peak.call()  # compiles
    return peak, THREADS * repeats * 2 * M * W * K


def numbers(result):
    """All arrays of a result, flattened."""
    if isinstance(result, (tuple, list)):
        return [array for part in result for array in numbers(part)]
    return [np.array(result.detach().numpy() if hasattr(result, "detach") else result).ravel()]


def disagreements(implementations):
    """How far all are from the first one, fastrnn, relative to an array's largest number; SystemExit if too far."""
    found, expected = {}, None
    for each in implementations:
        each.before()
        each.call()  # the second call of a step has a state to carry
        arrays = numbers(each.call())
        expected = expected or arrays
        for name, array, mine in zip(RESULTS[: len(expected)], arrays, expected, strict=True):
            off = float(np.abs(array - mine).max() / max(np.abs(mine).max(), 1e-30))
            if not off < TOLERANCE:  # a NaN is not, either
                raise SystemExit(f"{each.library} ({each.setting}): {name} is {off:.1e} off fastrnn's")
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
    rng, weights = np.random.default_rng(0), fastrnn.LSTM(case.I, case.H, seed=0).state_dict()
    x, dy = (rng.standard_normal((case.T, case.B, size), np.float32) for size in (case.I, case.H))
    makers = {"fastrnn": with_fastrnn, "torch": with_torch, "onnxruntime": with_onnxruntime}
    candidates = [c for name, make in makers.items() if name not in MISSING for c in make(case, weights, x, dy)]
    disagreement = disagreements(candidates)
    blocks = [(each, calls_in_block(each)) for each in [*candidates, peak]]
    trials = np.median(interleave(blocks, TRIALS), 1).tolist()
    best = {blocks[i][0].library: blocks[i] for i in np.argsort(trials)[::-1]}  # the fastest comes last: it stays
    seconds = dict(zip(best, interleave(list(best.values()), ARGUMENTS.repeat)))
    peak_rates, ours = peak_flops / seconds.pop("peak"), seconds["fastrnn"]
    ratios = {name: np.quantile(s / ours, [0.25, 0.5, 0.75]).tolist() for name, s in seconds.items() if s is not ours}
    fraction = float(np.median(flops(case) / ours / peak_rates))
    target, against, target_of_peak = targets(case)
    compared = against or min(ratios, key=lambda name: ratios[name][1], default=None)
    judged = [("ratio", ratios[compared][1], target)] if target and compared in ratios else []
    judged += [("fraction of peak", fraction, target_of_peak)] if target_of_peak else []
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
        "targets": [{"of": of, "target": aim, "reached": n, "met": n >= aim} for of, n, aim in judged],
    }


def line(row):
    us = [row["median_seconds"].get(name, np.nan) * 1e6 for name in ("fastrnn", "torch", "onnxruntime")]
    text = "{kind} ({T}, {B}, {I}, {H})".format(**row).ljust(29)
    text += f"{us[0]:10.1f}{row['gflops']:9.1f}{row['fraction_of_peak']:6.0%}{us[1]:10.1f}{us[2]:10.1f} "
    for name, (low, ratio, high) in row["ratios"].items():
        if name == row["compared"] or row["kind"] == "step":  # judged beside one library, shown beside all
            text += f"  {ratio:.2f} [{low:.2f}, {high:.2f}] {name}, {row['settings'][name]};"
    return text + "".join(f" BELOW {t['of']} {t['target']:.2f};" for t in row["targets"] if not t["met"])


def main():
    report = {
        "cpu": numba.config.CPU_NAME or llvmlite.binding.get_host_cpu_name(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "platform": platform.platform(),
        "date": time.strftime("%Y-%m-%d %H:%M %z"),
        "versions": {"python": platform.python_version()} | {m.__name__: m.__version__ for m in libraries},
        "missing": MISSING,
        **{name: value for name, value in vars(ARGUMENTS).items() if name != "json"},
    }
    print("{cpu}, {cpus} CPUs, {platform}, {date}".format(**report))
    print(", ".join(f"{name} {version}" for name, version in report["versions"].items()))
    print(*[f"left out: {name} ({error})\n" for name, error in MISSING.items()], sep="", end="")
    print(f"threads: {THREADS}; medians of {ARGUMENTS.repeat} rounds; ratio: the fastest peer's time by ours\n")
    print(f"{'case (T, B, I, H)':29}{'ours us':>10}{'GFLOP/s':>9}{'peak':>6}{'torch us':>10}{'ort us':>10}  ratio")
    shapes = FULL if ARGUMENTS.grid == "full" else QUICK
    cases = [Case(kind, *shape) for kind in ("inference", "training") for shape in shapes]
    rows, peak = [], peak_of_multiply_adds()
    for case in [*cases, Case("step", 1, 1, 64, 64)]:
        rows.append(measure(case, *peak))
        print(line(rows[-1]), flush=True)
    met = [target["met"] for row in rows for target in row["targets"]]
    print(f"\nmultiply-add peak: {np.median([row['peak_gflops'] for row in rows]):.1f} GFLOP/s")
    print(f"targets met: {sum(met)} of {len(met)}")
    report |= {"rows": rows, "targets": len(met), "targets_met": sum(met)}
    if ARGUMENTS.json:
        Path(ARGUMENTS.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
