"""ONNX's recurrent operators straight from their equations in float64 NumPy, and models of one node to be compared."""

import itertools

import numpy as np
import pytest
from oracle import assert_close, sigmoid

onnx = pytest.importorskip("onnx")

from onnx import helper, numpy_helper  # noqa: E402

LATEST = onnx.defs.onnx_opset_version()
DIRECTIONS = ["forward", "reverse", "bidirectional"]
GATES = {"RNN": 1, "LSTM": 4, "GRU": 3}
FUNCTIONS = {"RNN": ["Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"]}

# The equations of the operators, one sequence and one step after another.

APPLY = {
    "Relu": lambda x, alpha, beta: np.maximum(x, 0),
    "Tanh": lambda x, alpha, beta: np.tanh(x),
    "Sigmoid": lambda x, alpha, beta: sigmoid(x),
    "Affine": lambda x, alpha, beta: alpha * x + beta,
    "LeakyRelu": lambda x, alpha, beta: np.where(x >= 0, x, alpha * x),
    "ThresholdedRelu": lambda x, alpha, beta: np.where(x >= alpha, x, 0),
    "ScaledTanh": lambda x, alpha, beta: alpha * np.tanh(beta * x),
    "HardSigmoid": lambda x, alpha, beta: np.minimum(np.maximum(alpha * x + beta, 0), 1),
    "Elu": lambda x, alpha, beta: np.where(x >= 0, x, alpha * (np.exp(x) - 1)),
    "Softsign": lambda x, alpha, beta: x / (1 + np.abs(x)),
    "Softplus": lambda x, alpha, beta: np.log(1 + np.exp(x)),
}
# Defaults of the operators of these names. A function takes what it has a default for.
DEFAULTS = {
    "Affine": (1.0, 0.0),
    "LeakyRelu": (0.01, None),
    "ThresholdedRelu": (1.0, None),
    "ScaledTanh": (np.nan, np.nan),
    "HardSigmoid": (0.2, 0.5),
    "Elu": (1.0, None),
}


def functions(op, D, attributes):
    alphas, betas = (list(attributes.get(f"activation_{kind}", [])) for kind in ("alpha", "beta"))
    result = []
    for name in attributes.get("activations", FUNCTIONS[op] * D):
        alpha, beta = DEFAULTS.get(name, (None, None))
        if alpha is not None and alphas:
            alpha = alphas.pop(0)
        if beta is not None and betas:
            beta = betas.pop(0)
        alpha, beta = (None if p is None else float(np.float32(p)) for p in (alpha, beta))
        result.append(lambda x, name=name, alpha=alpha, beta=beta: APPLY[name](x, alpha, beta))
    return np.array_split(np.array(result, object), D)


def operator(op, arrays, **attributes):
    """The operator's outputs, in float64, of its inputs by name, with layout 0."""
    a = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
    (T, B, _), (D, G, H) = a["X"].shape, a["R"].shape
    G //= H
    lengths = arrays.get("sequence_lens", np.full(B, T))
    Wb, Rb = np.split(a.get("B", np.zeros((D, 2 * G * H))).reshape(D, 2 * G, H), 2, axis=1)
    P = a.get("P", np.zeros((D, 3 * H))).reshape(D, 3, H)
    W, R = a["W"].reshape(D, G, H, -1), a["R"].reshape(D, G, H, H)
    limit = float(np.float32(attributes.get("clip", np.inf)))
    Y = np.zeros((T, D, B, H))
    Y_h, Y_c = (a.get(f"initial_{s}", np.zeros((D, B, H))).copy() for s in "hc")
    with np.errstate(over="ignore"):
        for (d, (f, *rest)), b in itertools.product(enumerate(functions(op, D, attributes)), range(B)):
            backwards = d == 1 or attributes.get("direction") == "reverse"
            h, c = Y_h[d, b], Y_c[d, b]

            def gate(function, j, more, product=None):
                """A function of what the gate j sums."""
                seen = R[d, j] @ h + Rb[d, j] if product is None else product  # noqa: B023
                a_j = W[d, j] @ x + Wb[d, j] + seen + more  # noqa: B023
                return function(np.clip(a_j, -limit, limit))

            for t in range(lengths[b])[:: -1 if backwards else 1]:
                x = a["X"][t, b]
                if op == "RNN":
                    h = gate(f, 0, 0)
                elif op == "LSTM":
                    g, last = rest
                    i = gate(f, 0, P[d, 0] * c)
                    forget = 1 - i if attributes.get("input_forget") else gate(f, 2, P[d, 2] * c)
                    c = forget * c + i * gate(g, 3, 0)
                    h = gate(f, 1, P[d, 1] * c) * last(c)
                else:
                    z, r = gate(f, 0, 0), gate(f, 1, 0)
                    after = r * (R[d, 2] @ h + Rb[d, 2])
                    product = after if attributes.get("linear_before_reset") else R[d, 2] @ (r * h) + Rb[d, 2]
                    h = (1 - z) * gate(rest[0], 2, 0, product) + z * h
                Y[t, d, b] = h
            Y_h[d, b], Y_c[d, b] = h, c
    return {"Y": Y, "Y_h": Y_h, **({"Y_c": Y_c} if op == "LSTM" else {})}


def arrays_for(op, T, B, I, H, D, dtype=np.float32, names="WRB", lengths=None, initial=True, seed=0):
    """Inputs of the operator, by its names for them."""
    rng, G = np.random.default_rng(seed), GATES[op]
    shapes = {"X": (T, B, I), "W": (D, G * H, I), "R": (D, G * H, H), "B": (D, 2 * G * H), "P": (D, 3 * H)}
    shapes |= {f"initial_{s}": (D, B, H) for s in ("hc" if op == "LSTM" else "h")} if initial else {}
    scale = {"X": 2.0, "W": 1.0, "R": H**-0.5}
    arrays = {
        name: (rng.standard_normal(shape) * scale.get(name, 0.7)).astype(dtype)
        for name, shape in shapes.items()
        if name in ("X", *names) or "initial" in name
    }
    return arrays | ({} if lengths is None else {"sequence_lens": np.array(lengths, np.int32)})


def info(name, array, shape=None):
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), shape or array.shape)


def model_of(op, arrays, opset=LATEST, inputs=None, before=(), **attributes):
    """A model of one node, of which X, the lengths and the state are inputs, the weights initializers."""
    order = ["X", "W", "R", "B", "sequence_lens", "initial_h", *(["initial_c", "P"] if op == "LSTM" else [])]
    outputs = ["Y", "Y_h", "Y_c"][: 3 if op == "LSTM" else 2]
    inputs = [name for name in arrays if name not in "WRBP"] if inputs is None else inputs
    node = helper.make_node(op, [name if name in arrays else "" for name in order], outputs, name="node", **attributes)
    graph = helper.make_graph(
        [*before, node],
        "graph",
        [info(name, arrays[name], [None] * arrays[name].ndim) for name in inputs],
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(arrays["X"].dtype), None)
            for name in outputs
        ],
        [
            numpy_helper.from_array(arrays[name], name)
            for name in "WRBP"
            if name in arrays and name not in inputs and not any(name in n.output for n in before)
        ],
    )
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=max(4, helper.find_min_ir_version_for(opsets)))


def run(op, arrays, **attributes):
    feeds = {name: array for name, array in arrays.items() if name not in "WRBP"}
    from fastrnn.interop.onnx import load

    return load(model_of(op, arrays, **attributes))(feeds)


def runtime(model, feeds):
    """ONNX Runtime's outputs by name."""
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, feeds)))


def assert_all_close_to(actual, expected):
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert_close(actual[name], array.astype(np.float64), name)
