"""What `peers.py` measures: each library's ways to compute a case."""

import importlib.util
import sys
from collections import namedtuple
from pathlib import Path

import llvmlite
import numba
import numpy as np

if importlib.util.find_spec("fastrnn") is None:
    sys.path.append(str(Path(__file__).resolve().parent.parent))
import fastrnn

LIBRARIES = [fastrnn, numba, llvmlite, np]
MISSING = {}
try:
    import torch

    LIBRARIES.append(torch)
except ImportError as error:
    MISSING["torch"] = str(error)
try:
    import onnx
    import onnxruntime

    LIBRARIES += [onnx, onnxruntime]
except ImportError as error:
    MISSING["onnxruntime"] = str(error)

TINY = np.float32(1e-42)  # a denormal number: far fewer than float32's digits
# Not peers: what fastrnn's own time is compared with.
OWN = FULL_LENGTH, NORMAL, WHOLE = "full length", "normal numbers", "a whole sequence"

# kind: inference or training, after what is special about it; or a step.
Case = namedtuple("Case", "kind cell T B I H")
# call() is timed and returns y, the state and, training, dx and the weights' gradients; before() runs ahead of a block.
Implementation = namedtuple("Implementation", "library setting call before", defaults=(lambda: None,))


def trains(case):
    return case.kind.endswith(("training", "gradients"))


def options(case):
    _, *nonlinearity = case.cell.split()
    both_ways = {"num_layers": 2, "bidirectional": True} if case.kind.startswith("bidirectional") else {}
    return both_ways | ({"nonlinearity": nonlinearity[0]} if nonlinearity else {})


def layer_of(case):
    return getattr(fastrnn, case.cell.split()[0].upper())(case.I, case.H, **options(case), seed=0)


def lengths_of(case):
    """Of sequences in no order, evenly from 1 (PyTorch takes no 0) to T."""
    if not case.kind.startswith("lengths"):
        return None
    return np.random.default_rng(0).permutation(np.linspace(1, case.T, case.B).round().astype(np.int64))


def calling(case, forward, training=None, start=None):
    """What is timed: ``training()``, or of ``forward(state)``, which returns y and the next state, what the case is."""
    state = start

    def step():
        nonlocal state
        y, state = forward(state)
        return y, state

    if case.kind == "step":
        return step
    return training if trains(case) else lambda: forward(start)


def with_fastrnn(case, weights, x, dy, threads):
    fastrnn.set_num_threads(threads)
    layer, lengths = layer_of(case), lengths_of(case)
    layer.load_state_dict(weights)

    def call(x, dy, lengths=None, start=None):
        def training():
            with layer.parameters.writable():
                pass  # as after an optimiser's update: the weights are packed anew
            (y, state), pullback = layer.vjp(x, start, lengths=lengths)
            dx, _, gradients = pullback(dy)
            return y, state, dx, list(gradients.values())

        return calling(case, lambda state: layer(x, state, lengths), training, start)

    def ours(x, dy, *arguments, library="fastrnn"):
        return Implementation(library, "layer", call(x, dy, *arguments))

    if case.kind.startswith("denormal"):
        tiny_x = x if case.kind == "denormal gradients" else x * TINY
        tiny = ours(tiny_x, dy * TINY, None, layer(tiny_x)[1])
        return [tiny, ours(x, dy, None, layer(x)[1], library=NORMAL)]
    if case.kind.startswith("lengths"):
        return [ours(x, dy, lengths), ours(x, dy, library=FULL_LENGTH)]
    if case.kind == "njit step":
        return njit_steps(case, layer, x)
    if case.kind == "step":
        stream, x_0 = layer.stream(), x[0]
        streamed = Implementation("fastrnn", "stream", lambda: (stream.step(x_0), stream))
        return [ours(x, dy), streamed]
    return [ours(x, dy)]


def njit_steps(case, layer, x):
    """All steps in a compiled loop, and the layer on the whole sequence; of y they return the last."""
    step, packed, state = getattr(fastrnn.kernels, case.cell).step, layer.packed, layer.new_state()

    @numba.njit(nogil=True)
    def run(packed, state, x):
        state.h[...] = 0
        state.s[...] = 0
        for t in range(len(x)):
            step(packed, state, x[t])

    def loop():
        run(packed, state, x)
        return state.h[-1], (state.h, state.s)[: layer.STATES]

    def whole():
        y, state = layer(x)
        return y[-1], state

    return [Implementation("fastrnn", "njit", loop), Implementation(WHOLE, "layer", whole)]


def with_torch(case, weights, x, dy, threads):
    torch.set_num_threads(threads)
    weights = {name: torch.from_numpy(array) for name, array in weights.items()}
    x, dy = torch.from_numpy(x).requires_grad_(trains(case)), torch.from_numpy(dy)
    layer = getattr(torch.nn, case.cell.upper())(case.I, case.H, **options(case))
    layer.load_state_dict(weights)
    lengths = lengths_of(case)
    if lengths is None:
        run = lambda state: layer(x, state)  # noqa: E731
    else:
        lengths = torch.from_numpy(lengths)

        def run(state):
            y, state = layer(torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False), state)
            return torch.nn.utils.rnn.pad_packed_sequence(y, total_length=case.T)[0], state

    def training():
        layer.zero_grad(set_to_none=True)
        x.grad = None
        y, state = run(None)
        y.backward(dy)
        return y, state, x.grad, [parameter.grad for parameter in layer.parameters()]

    def implementation(setting, on):
        call = calling(case, torch.inference_mode()(run), training)
        return Implementation("torch", setting, call, lambda: torch.backends.mkldnn.set_flags(on))

    found = [implementation("oneDNN", True), implementation("no oneDNN", False)]  # which is faster depends on the shape
    if case.kind == "step":
        cell = getattr(torch.nn, case.cell.upper() + "Cell")(case.I, case.H)
        cell.load_state_dict({name.removesuffix("_l0"): array for name, array in weights.items()})

        @torch.inference_mode()
        def run_cell(state):
            state = cell(x[0], state)
            return state[0] if case.cell == "lstm" else state, state

        found.append(Implementation("torch cell", "default", calling(case, run_cell)))
    return found


def with_onnxruntime(case, weights, x, dy, threads):
    if trains(case) or case.kind.startswith("bidirectional"):
        return []
    # ONNX has the gates in the order i, o, f, c or z, r, h; PyTorch has i, f, g, o or r, z, n.
    order = {"lstm": [0, 3, 1, 2], "gru": [1, 0, 2], "rnn": [0]}[case.cell]
    W, R, *b = (a.reshape(len(order), case.H, -1)[order].reshape(a.shape) for a in weights.values())
    constants, lengths = {"W": W[None], "R": R[None], "b": np.concatenate(b)[None]}, lengths_of(case)
    if lengths is not None:
        constants["lengths"] = lengths.astype(np.int32)
    states = ["h", "c"] if case.cell == "lstm" else ["h"]
    shapes = {"y": (case.T, 1, case.B, case.H)} | dict.fromkeys(states, (1, case.B, case.H))
    start = {name + "0": np.zeros(shapes[name], np.float32) for name in states} if case.kind == "step" else {}
    feeds = {"x": x, **start}
    inputs = ["x", *constants, *(["", *start] if start else [])]
    attributes = {"linear_before_reset": 1} if case.cell == "gru" else {}
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(case.cell.upper(), inputs, list(shapes), hidden_size=case.H, **attributes)],
        case.cell,
        [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, a.shape) for n, a in feeds.items()],
        [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, shape) for n, shape in shapes.items()],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 14)], ir_version=8)

    def implementations(spinning, end):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.add_session_config_entry("session.intra_op.allow_spinning", spinning)
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

        def forward(state):
            y, *state = session.run(None, feeds if state is None else {"x": x, **dict(zip(start, state))})
            return y, state

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
    return [*implementations("0", ""), *(implementations("1", ", spinning") if threads > 1 else [])]


def candidates_of(case, threads):
    rng, weights = np.random.default_rng(0), layer_of(case).state_dict()
    x = rng.standard_normal((case.T, case.B, case.I), np.float32)
    dy = rng.standard_normal((case.T, case.B, case.H * (2 if "bidirectional" in options(case) else 1)), np.float32)
    makers = {"fastrnn": with_fastrnn, "torch": with_torch, "onnxruntime": with_onnxruntime}
    if case.kind.startswith("denormal"):
        weights |= {name: np.zeros_like(array) for name, array in weights.items() if "bias" in name}
    if case.kind.startswith(("denormal", "njit")):
        makers = {"fastrnn": with_fastrnn}
    return [c for name, make in makers.items() if name not in MISSING for c in make(case, weights, x, dy, threads)]
