"""The layers against PyTorch's, with every gradient, and against the operators that ONNX Runtime runs."""

import numpy as np
import oracle
import pytest
from oracle import assert_close, everything, inputs, named

import fastrnn

CELLS = [("RNN", {}), ("RNN", {"nonlinearity": "relu"}), ("LSTM", {}), ("LSTM", {"proj_size": 7}), ("GRU", {})]
# The operators' order of gates, as places in ours.
ONNX_GATES = {"RNN": [0], "LSTM": [0, 3, 1, 2], "GRU": [1, 0, 2]}

# PyTorch's own, of how it computes them.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def check_against_pytorch(cell, options, T, B, lengths, dtype=np.float64, tolerance=1e-10):
    """Outputs, states and every gradient, to the tolerance or, for None, to the oracle's of the dtype."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    theirs = getattr(torch.nn, cell)(6, 19, **options, dtype=getattr(torch, np.dtype(dtype).name))
    ours = getattr(fastrnn, cell)(6, 19, **options, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    x, state, dy, dstate = inputs(ours, T, B)
    if options.get("batch_first"):
        x, dy = (np.ascontiguousarray(a.swapaxes(0, 1)) for a in (x, dy))
    tensors = {"x": torch.tensor(x, requires_grad=True)}
    tensors |= {name: torch.tensor(s, requires_grad=True) for name, s in named(state, "_0").items()}
    given, *before = tensors.values()
    before = tuple(before) if cell == "LSTM" else before[0]
    if lengths is None:
        y, after = theirs(given, before)
    else:
        rnn, layout = torch.nn.utils.rnn, {"batch_first": ours.batch_first}
        packed = rnn.pack_padded_sequence(given, torch.tensor(lengths), enforce_sorted=False, **layout)
        packed, after = theirs(packed, before)
        y, _ = rnn.pad_packed_sequence(packed, total_length=T, **layout)
    outputs = {"y": y, **named(after, "_n")}
    torch.autograd.backward(list(outputs.values()), [torch.tensor(a) for a in (dy, *named(dstate, "").values())])
    expected = {name: tensor.detach() for name, tensor in outputs.items()}
    expected |= {f"{name} of vjp": tensor for name, tensor in expected.items()}
    expected |= {f"d{name}": tensor.grad for name, tensor in tensors.items()}
    expected |= {name: parameter.grad for name, parameter in theirs.named_parameters()}

    got = everything(ours, x, state, dy, dstate, lengths=lengths)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        if tolerance is None:
            assert_close(got[name], tensor.numpy().astype(np.float64), name)
        else:
            np.testing.assert_allclose(got[name], tensor.numpy(), rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "both ways"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["time first", "batch first"])
@pytest.mark.parametrize("lengths", [None, [7, 1, 9, 4, 9]], ids=["whole", "ragged"])
@pytest.mark.parametrize(("cell", "options"), CELLS, ids=str)
def test_pytorch(cell, options, bias, bidirectional, batch_first, lengths):
    options = {**options, "bias": bias, "bidirectional": bidirectional, "batch_first": batch_first, "num_layers": 2}
    check_against_pytorch(cell, options, 9, 5, lengths)


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "both ways"])
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize(("cell", "options"), CELLS, ids=str)
def test_pytorch_in_each_dtype(cell, options, num_layers, bidirectional, dtype):
    options = {**options, "num_layers": num_layers, "bidirectional": bidirectional}
    check_against_pytorch(cell, options, 9, 4, None, dtype, None)


@pytest.mark.parametrize(("cell", "options"), CELLS, ids=str)
def test_pytorch_where_padding_is_longer_than_any_sequence(cell, options):
    check_against_pytorch(cell, {**options, "bidirectional": True}, 9, 3, [2, 5, 3])


@pytest.mark.parametrize(("cell", "options"), CELLS, ids=str)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "both ways"])
def test_parameters_are_pytorchs(cell, options, bidirectional):
    """Names, order and shapes."""
    torch = pytest.importorskip("torch")
    options = {**options, "bidirectional": bidirectional, "num_layers": 2}
    theirs, ours = getattr(torch.nn, cell)(3, 9, **options), getattr(fastrnn, cell)(3, 9, **options)
    assert [(n, tuple(a.shape)) for n, a in theirs.named_parameters()] == [
        (n, a.shape) for n, a in ours.parameters.items()
    ]


# ONNX Runtime.


def onnx_weights(layer):
    """A layer's parameters as the operator of one layer has them: by its own names, each (directions, ...)."""
    H, cell = layer.hidden_size, type(layer).__name__
    weights = {"W": [], "R": [], "B": [], "P": []}
    for d in range(1 + layer.bidirectional):
        w = {name: a.astype(np.float32) for name, a in oracle.weights_of(layer, 0, d).items()}
        ordered = {}
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            gates = w[name].reshape(-1, H, *w[name].shape[1:])
            if layer.config.get("coupled"):
                # The operator has i and f = 1 - i: its i is our 1 - f, which a negative sum gives.
                f, g, o = gates
                gates = np.stack([-f, 0 * f, g, o])
            ordered[name] = gates[ONNX_GATES[cell]].reshape(-1, *w[name].shape[1:])
        weights["W"].append(ordered["weight_ih"])
        weights["R"].append(ordered["weight_hh"])
        weights["B"].append(np.concatenate([ordered["bias_ih"], ordered["bias_hh"]]))
        if layer.config.get("peephole"):
            f, o = w["weight_cf"], w["weight_co"]
            weights["P"].append(np.concatenate([-f, o, 0 * f] if layer.config["coupled"] else [w["weight_ci"], o, f]))
    return {name: np.stack(arrays) for name, arrays in weights.items() if arrays}


def run_onnx(layer, x, state, lengths, **attributes):
    """``y`` and the state's arrays, from the operator of the layer's name. All is float32."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    cell, floats = type(layer).__name__, onnx.TensorProto.FLOAT
    weights = onnx_weights(layer)
    feeds = {"x": x, "lengths": np.asarray(lengths, np.int32), **named(state, "_0")}
    names = ["x", "W", "R", "B", "lengths", *named(state, "_0"), *(["P"] if "P" in weights else [])]
    outputs = ["y", *named(state, "_n")]
    attributes |= {"hidden_size": layer.hidden_size, "direction": "bidirectional" if layer.bidirectional else "forward"}
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(cell, names, outputs, **attributes)],
        cell,
        [
            onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for name, a in feeds.items()
        ],
        [onnx.helper.make_tensor_value_info(name, floats, None) for name in outputs],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 14)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    y, *after = session.run(None, feeds)
    T, D, B, H = y.shape
    return {"y": y.swapaxes(1, 2).reshape(T, B, D * H), **dict(zip(outputs[1:], after))}


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "both ways"])
@pytest.mark.parametrize(
    ("cell", "options", "attributes"),
    [
        ("RNN", {}, {}),
        ("RNN", {"nonlinearity": "relu"}, {"activations": ["Relu"]}),
        ("LSTM", {}, {}),
        ("LSTM", {"peephole": True}, {}),
        ("LSTM", {"peephole": True, "cell_clip": 0.5}, {"clip": 0.5}),
        ("LSTM", {"coupled": True}, {"input_forget": 1}),
        ("LSTM", {"coupled": True, "peephole": True, "cell_clip": 0.5}, {"input_forget": 1, "clip": 0.5}),
        ("GRU", {"reset_after": True}, {"linear_before_reset": 1}),
        ("GRU", {"reset_after": False}, {"linear_before_reset": 0}),
    ],
    ids=str,
)
def test_onnx(cell, options, attributes, bidirectional):
    layer = getattr(fastrnn, cell)(5, 13, bidirectional=bidirectional, seed=1, **options)
    with layer.parameters.writable() as arrays:
        for array in arrays.values():
            array *= 2  # so that much is clipped
    x, state, _, _ = inputs(layer, 8, 6)
    lengths = [3, 8, 1, 5, 8, 2]
    if "activations" in attributes:
        attributes = {**attributes, "activations": attributes["activations"] * (1 + bidirectional)}
    expected = run_onnx(layer, x, state, lengths, **attributes)
    y, after = layer(x, state, lengths)
    got = {"y": y, **named(after, "_n")}
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert_close(got[name], array.astype(np.float64), name)
