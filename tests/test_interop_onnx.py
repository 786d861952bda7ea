"""ONNX's recurrent nodes as layers, against the operators' equations in float64 and against ONNX Runtime."""

import copy
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_all_same_bits, assert_close, named

import fastrnn

pytest.importorskip("onnx")

from onnx import TensorProto, helper
from oracle_onnx import (
    APPLY,
    DIRECTIONS,
    FUNCTIONS,
    GATES,
    LATEST,
    arrays_for,
    assert_all_close_to,
    model_of,
    operator,
    run,
    runtime,
)

from fastrnn.interop.onnx import EquationsLayer, Reversed, load

# Nodes, as operator, inputs beside X, W, R, attributes of one direction, and whether fastrnn's own layer runs them.

FAST = [
    ("RNN", "WRB", {}),
    ("RNN", "WR", {"activations": ["relu"]}),
    ("RNN", "WRB", {"activations": ["Affine"]}),
    ("LSTM", "WRB", {}),
    ("LSTM", "WR", {"activations": ["Sigmoid", "tanh", "Tanh"]}),
    ("LSTM", "WRBP", {"clip": 0.5}),
    ("LSTM", "WRBP", {"input_forget": 1, "clip": 1.5}),
    ("LSTM", "WR", {"input_forget": 1}),
    ("GRU", "WRB", {}),
    ("GRU", "WRB", {"linear_before_reset": 1}),
    ("GRU", "WR", {}),
]
SLOW = [
    ("RNN", "WRB", {"clip": 0.5}),
    ("RNN", "WRB", {"activations": ["Affine"], "activation_alpha": [0.9], "activation_beta": [0.1]}),
    ("RNN", "WR", {"activations": ["Sigmoid"]}),
    ("RNN", "WRB", {"activations": ["LeakyRelu"]}),
    ("RNN", "WRB", {"activations": ["ThresholdedRelu"], "activation_alpha": [0.3]}),
    ("RNN", "WRB", {"activations": ["ScaledTanh"], "activation_alpha": [1.7], "activation_beta": [0.7]}),
    ("RNN", "WRB", {"activations": ["HardSigmoid"]}),
    ("RNN", "WRB", {"activations": ["Elu"], "activation_alpha": [0.5]}),
    ("RNN", "WRB", {"activations": ["Softsign"]}),
    ("RNN", "WRB", {"activations": ["Softplus"]}),
    ("LSTM", "WRBP", {"activations": ["HardSigmoid", "Tanh", "Softsign"], "activation_alpha": [0.3]}),
    ("LSTM", "WRBP", {"activations": ["Sigmoid", "LeakyRelu", "Elu"], "activation_alpha": [0.1, 0.6], "clip": 0.8}),
    ("LSTM", "WRB", {"activations": ["HardSigmoid", "Tanh", "Tanh"], "input_forget": 1}),
    ("LSTM", "WR", {"activations": ["Tanh", "Sigmoid", "Tanh"]}),
    ("GRU", "WRB", {"clip": 0.5}),
    ("GRU", "WRB", {"clip": 0.5, "linear_before_reset": 1}),
    ("GRU", "WR", {"activations": ["HardSigmoid", "Softsign"]}),
    ("GRU", "WRB", {"activations": ["Sigmoid", "Relu"], "linear_before_reset": 1}),
]


def in_direction(direction, attributes):
    """The attributes with functions for each direction."""
    D = 1 + (direction == "bidirectional")
    lists = ("activations", "activation_alpha", "activation_beta")
    return {"direction": direction, **{k: v * D if k in lists else v for k, v in attributes.items()}}


def spelled(attributes):
    """With functions as the oracle spells them."""
    names = {name.lower(): name for name in APPLY}
    if "activations" not in attributes:
        return attributes
    return {**attributes, "activations": [names[name.lower()] for name in attributes["activations"]]}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("op", "names", "attributes"), FAST + SLOW, ids=str)
def test_nodes_are_their_equations(op, names, attributes, direction, dtype):
    attributes = in_direction(direction, attributes)
    D = 1 + (direction == "bidirectional")
    for lengths, initial, layout in itertools.product([None, [3, 7, 1, 0, 5]], [False, True], [0, 1]):
        arrays = arrays_for(op, 7, 5, 3, 17, D, dtype, names, lengths, initial)
        expected = operator(op, arrays, **spelled(attributes))
        batch_first = ("X", "initial_h", "initial_c")
        if layout:
            arrays |= {name: arrays[name].swapaxes(0, 1) for name in batch_first if name in arrays}
        got = run(op, arrays, hidden_size=17, **attributes, **({"layout": 1} if layout else {}))
        if layout:
            got = {"Y": got["Y"].transpose(1, 2, 0, 3), **{n: got[n].swapaxes(0, 1) for n in list(got)[1:]}}
        assert_all_close_to(got, expected)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("op", "names", "attributes"), FAST + SLOW, ids=str)
def test_nodes_are_onnx_runtimes(op, names, attributes, direction):
    attributes = spelled(in_direction(direction, attributes))
    for lengths, initial in itertools.product([None, [3, 7, 1, 5]], [False, True]):
        if attributes.get("activations", [""])[0] == "Affine" and "activation_alpha" not in attributes:
            attributes = {**attributes, "activation_alpha": [1.0, 1.0], "activation_beta": [0.0, 0.0]}
        arrays = arrays_for(op, 7, 4, 3, 13, 1 + (direction == "bidirectional"), np.float32, names, lengths, initial)
        model = model_of(op, arrays, opset=14, hidden_size=13, **attributes)
        feeds = {name: array for name, array in arrays.items() if name not in "WRBP"}
        assert_all_close_to(load(model)(feeds), runtime(model, feeds))


@given(
    op=st.sampled_from(list(GATES)),
    sizes=st.tuples(*[st.sampled_from([1, 2, 3, 17])] * 3, st.sampled_from([1, 3, 17, 63, 65])),
    direction=st.sampled_from(DIRECTIONS),
    slow=st.booleans(),
    data=st.data(),
)
def test_nodes_of_any_shape(op, sizes, direction, slow, data):
    T, B, I, H = sizes
    D = 1 + (direction == "bidirectional")
    lengths = data.draw(st.none() | st.lists(st.integers(0, T), min_size=B, max_size=B))
    attributes = {"direction": direction}
    if slow:
        attributes["activations"] = ["Softsign"] * len(FUNCTIONS[op]) * D
    arrays = arrays_for(op, T, B, I, H, D, np.float64, "WRB", lengths)
    assert_all_close_to(run(op, arrays, hidden_size=H, **attributes), operator(op, arrays, **attributes))


@pytest.mark.parametrize("left_out", ["initial_h", "initial_c"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_one_of_two_states_may_be_left_out(left_out, direction, dtype):
    arrays = arrays_for("LSTM", 5, 3, 3, 5, 1 + (direction == "bidirectional"), dtype)
    del arrays[left_out]
    assert_all_close_to(run("LSTM", arrays, direction=direction), operator("LSTM", arrays, direction=direction))
    model = model_of("LSTM", arrays, direction=direction)
    while not model.graph.node[0].input[-1]:  # names at the end need not be there
        del model.graph.node[0].input[-1]
    feeds = {name: array for name, array in arrays.items() if name not in "WRB"}
    assert_all_close_to(load(model)(feeds), operator("LSTM", arrays, direction=direction))


def test_functions_may_differ_between_directions():
    arrays = arrays_for("RNN", 5, 3, 3, 5, 2, np.float64)
    attributes = {"direction": "bidirectional", "activations": ["Elu", "LeakyRelu"], "activation_alpha": [0.5, 0.2]}
    assert_all_close_to(run("RNN", arrays, **attributes), operator("RNN", arrays, **attributes))
    attributes["activations"] = ["Tanh", "LeakyRelu"]  # which takes the first number
    assert_all_close_to(run("RNN", arrays, **attributes), operator("RNN", arrays, **attributes))


@pytest.mark.parametrize("op", list(GATES))
@pytest.mark.parametrize("opset", [1, 7, 13, 14, 21, 22, LATEST])
def test_operator_sets(op, opset):
    arrays = arrays_for(op, 4, 3, 3, 5, 2, lengths=[4, 1, 2])
    assert_all_close_to(
        run(op, arrays, opset=opset, hidden_size=5, direction="bidirectional"),
        operator(op, arrays, direction="bidirectional"),
    )


@pytest.mark.parametrize("op", list(GATES))
@pytest.mark.parametrize("slow", [False, True], ids=["fast", "slow"])
def test_nan_and_padding(op, slow, dtype):
    """NaN comes out of the sequence that it went into, and what is past an end is not read."""
    attributes = {"activations": ["Relu"] * len(FUNCTIONS[op])} if slow and op != "RNN" else {}
    attributes |= {"clip": 100.0} if slow and op == "RNN" else {}
    arrays = arrays_for(op, 6, 3, 3, 5, 1, dtype, lengths=[6, 2, 4])
    right = run(op, arrays, **attributes)
    arrays["X"][1, 0], arrays["X"][2:, 1] = np.nan, np.nan
    before = copy.deepcopy(arrays)
    got = run(op, arrays, **attributes)
    assert_all_same_bits(arrays, before)
    assert np.isnan(got["Y"][1:, 0, 0]).all()
    assert np.isnan(got["Y_h"][0, 0]).all()
    assert_all_same_bits(
        {name: got[name][..., 1:, :] for name in got}, {name: right[name][..., 1:, :] for name in right}
    )


# Layers.


@pytest.mark.parametrize(("op", "names", "attributes"), FAST + SLOW, ids=str)
def test_layers_are_fastrnns_where_they_can_be(op, names, attributes):
    graph = load(model_of(op, arrays_for(op, 3, 2, 3, 5, 1, names=names), **attributes))
    layer = graph.layers["node"]
    fast = any(attributes is other for _, _, other in FAST)
    assert type(layer) is (getattr(fastrnn, op) if fast else EquationsLayer)
    reversed_layer = load(
        model_of(op, arrays_for(op, 3, 2, 3, 5, 1, names=names), direction="reverse", **attributes)
    ).layers["node"]
    assert type(reversed_layer) is Reversed
    assert type(reversed_layer.layer) is type(layer)


@pytest.mark.parametrize("op", list(GATES))
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize("slow", [False, True], ids=["fast", "slow"])
def test_layers_are_called_alike(op, direction, layout, slow):
    """Batches and single sequences, with and without lengths and states, as the node has them."""
    D = 1 + (direction == "bidirectional")
    arrays = arrays_for(op, 6, 3, 3, 5, D, lengths=[6, 2, 4])
    attributes = {"activations": ["Softsign"] * len(FUNCTIONS[op]) * D} if slow else {}
    expected = operator(op, arrays, direction=direction, **attributes)
    (layer,) = load(model_of(op, arrays, direction=direction, layout=layout, **attributes)).layers.values()
    state = tuple(arrays[f"initial_{s}"] for s in ("hc" if op == "LSTM" else "h"))
    x = arrays["X"].swapaxes(0, 1) if layout else arrays["X"]
    y, after = layer(x, state if op == "LSTM" else state[0], arrays["sequence_lens"])
    right = expected["Y"].swapaxes(1, 2).reshape(6, 3, D * 5)
    assert_close(y, right.swapaxes(0, 1) if layout else right)
    assert_all_close_to(named(after, ""), dict(zip(named(after, ""), list(expected.values())[1:])))
    one = tuple(s[:, 2] for s in state)
    y_1, after_1 = layer(arrays["X"][:4, 2], one if op == "LSTM" else one[0])
    assert_close(y_1, right[:4, 2])
    for s, right_s in zip(named(after_1, "").values(), list(expected.values())[1:]):
        assert_close(s, right_s[:, 2])
    y, _ = layer(x)
    zeros = {name: array for name, array in arrays.items() if name in "XWRB"}
    right = operator(op, zeros, direction=direction, **attributes)["Y"].swapaxes(1, 2).reshape(6, 3, D * 5)
    assert_close(y, right.swapaxes(0, 1) if layout else right)
    for wrong in (x[..., :2], x[:0], x[0, 0]):
        with pytest.raises(ValueError, match="x: expected"):
            layer(wrong)
    with pytest.raises(ValueError, match="lengths: expected"):
        layer(x, lengths=[1, 2, 9])
    with pytest.raises((TypeError, ValueError), match="state: expected"):
        layer(x, (x,))
    with pytest.raises(TypeError, match="x: expected dtype"):
        layer(x.astype(int))


def test_layers_names_are_unique():
    arrays = arrays_for("RNN", 3, 2, 5, 5, 1, initial=False)
    names = ["", "a", "RNN", "a", ""]
    nodes = []
    for i, name in enumerate(names):
        nodes.append(helper.make_node("RNN", [f"x{i}", "W", "R", "B"], ["", f"h{i}"], name=name))
        nodes.append(helper.make_node("Identity", [f"h{i}"], [f"x{i + 1}"]))
    model = model_of("RNN", arrays)
    model.graph.ClearField("node")
    model.graph.node.extend(nodes)
    model.graph.input[0].name = "x0"
    model.graph.ClearField("output")
    model.graph.output.append(helper.make_tensor_value_info("x5", TensorProto.FLOAT, None))
    graph = load(model)
    assert list(graph.layers) == ["RNN", "a", "RNN_1", "a_1", "RNN_2"]
    h = arrays["X"]
    for layer in graph.layers.values():
        h = layer(h)[1]
    assert_all_same_bits(graph(arrays["X"]), {"x5": h})
