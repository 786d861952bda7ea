"""Whole ONNX models: how they are called, what is wrong with them, and ONNX's own tests."""

import copy
import pickle
import subprocess
import sys
import threading
import unittest
import warnings

import numpy as np
import pytest
from oracle import assert_all_same_bits, assert_close

onnx = pytest.importorskip("onnx")

import onnx.backend.test as onnx_tests  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from oracle_onnx import (  # noqa: E402
    DIRECTIONS,
    GATES,
    LATEST,
    arrays_for,
    assert_all_close_to,
    info,
    model_of,
    operator,
    run,
)

from fastrnn.interop import onnx as interop  # noqa: E402
from fastrnn.interop.onnx import load  # noqa: E402


def test_onnx_is_an_extra(monkeypatch):
    code = "import sys, fastrnn, fastrnn.interop; assert 'onnx' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.delitem(sys.modules, "fastrnn.interop.onnx")
    with pytest.raises(ImportError, match=r"needs the package onnx: pip install fastrnn\[onnx\]"):
        import fastrnn.interop.onnx  # noqa: F401


# Graphs.


def constant(name, array):
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array))


def test_weights_are_initializers_constants_or_computed_of_them():
    arrays = arrays_for("GRU", 4, 2, 3, 5, 1)
    expected = operator("GRU", arrays)
    for opset in (1, 12, 17):
        nodes = [constant(name, arrays[name]) for name in "WRB"]
        assert_all_close_to(run("GRU", arrays, before=nodes, opset=opset), expected)
    nodes = [
        constant("W_0", arrays["W"][0]),
        constant("zero", np.array([0])),
        helper.make_node("Unsqueeze", ["W_0", "zero"], ["W"]),
        constant("minus_B", -arrays["B"]),
        helper.make_node("Neg", ["minus_B"], ["B"]),
    ]
    assert_all_close_to(run("GRU", arrays, before=nodes, opset=13), expected)


def test_weights_may_be_given_for_inputs():
    arrays = arrays_for("LSTM", 4, 2, 3, 5, 1, names="WRBP")
    model = model_of("LSTM", arrays, inputs=list(arrays))
    with pytest.raises(
        ValueError, match=r"W of node node \(LSTM\): expected an initializer .*, got 'W', which depends"
    ):
        load(model)
    given = {name: arrays.pop(name) for name in "WRBP"}
    graph = load(model, weights=given)
    assert graph.inputs == ("X", "initial_h", "initial_c")
    expected = operator("LSTM", arrays | given)
    given["R"][:] = np.nan
    assert_all_close_to(graph(arrays), expected)
    with pytest.raises(TypeError, match="weights: expected a mapping, got list of 4"):
        load(model, weights=list(given.values()))
    with pytest.raises(ValueError, match="V: expected one of the graph's inputs, X, W"):
        load(model, weights={"V": given["W"]})
    with pytest.raises(TypeError, match="W: expected dtype float32, got float64"):
        load(model, weights={"W": given["W"].astype(float)})


def test_initializers_that_are_inputs_are_defaults():
    arrays = arrays_for("GRU", 4, 2, 3, 5, 1, names="WRB")
    model = model_of("GRU", arrays)
    zeros = np.zeros_like(arrays["initial_h"])
    model.graph.initializer.append(numpy_helper.from_array(zeros, "initial_h"))
    model.graph.input.append(info("R", arrays["R"], arrays["R"].shape))
    graph = load(model)
    assert (graph.inputs, graph.optional) == (("X",), ("initial_h",))
    x, h = {"X": arrays["X"]}, {"initial_h": arrays["initial_h"]}
    expected, from_zeros = operator("GRU", arrays), operator("GRU", arrays | {"initial_h": zeros})
    for outputs in graph(x | h), graph(arrays["X"], **h), graph(x, **h), load(model, weights=h)(x):
        assert_all_close_to(outputs, expected)
    for outputs in graph(x), graph(arrays["X"]):
        assert_all_close_to(outputs, from_zeros)
    prepared = interop.prepare(model)
    assert_all_close_to(dict(zip(graph.outputs, prepared.run(x | h))), expected)
    assert_all_close_to(dict(zip(graph.outputs, prepared.run(x))), from_zeros)
    # Of weights a layer is made.
    with pytest.raises(TypeError, match=r"inputs: expected X, initial_h; missing \[\], not known \['R'\]"):
        graph(x, R=arrays["R"])
    doubled = {"R": 2 * arrays["R"]}
    assert_all_close_to(load(model, weights=doubled)(x | h), operator("GRU", arrays | doubled))
    with pytest.raises(ValueError, match="initial_h"):
        graph(x, initial_h=h["initial_h"][..., :1])


def test_graphs_are_called_in_three_ways():
    arrays = arrays_for("RNN", 4, 2, 3, 5, 1)
    graph = load(model_of("RNN", arrays))
    assert (graph.inputs, graph.outputs, graph.unsupported) == (("X", "initial_h"), ("Y", "Y_h"), ())
    X, h = arrays["X"], arrays["initial_h"]
    expected = graph(X, h)
    for got in (graph({"X": X, "initial_h": h}), graph(X=X, initial_h=h), graph(X, initial_h=h)):
        assert_all_same_bits(got, expected)
    for call, error, message in [
        (lambda: graph(X), TypeError, r"inputs: expected X, initial_h; missing \['initial_h'\], not known \[\]"),
        (lambda: graph(X, h, h), TypeError, "inputs: expected X, initial_h, got 3 arrays"),
        (lambda: graph(X, h, X=X), TypeError, "inputs: expected each once, got X twice"),
        (lambda: graph(X, h, Z=X), TypeError, r"missing \[\], not known \['Z'\]"),
        (lambda: graph({"X": X, 3: h}), TypeError, r"missing \['initial_h'\], not known \['3'\]"),
        (lambda: graph(X.astype(float), h), TypeError, "X: expected dtype float32, got float64"),
        (lambda: graph(X[0], h), ValueError, r"X: expected shape \(\?, \?, \?\), got \(2, 3\)"),
        (lambda: graph(X[..., :2], h), ValueError, r"node node \(RNN\): X: expected shape \(T, B, 3\) and dtype"),
        (lambda: graph(X, h[:, :1]), ValueError, r"node node \(RNN\): initial_h: expected shape \(1, 2, 5\), got"),
        (lambda: graph(X[:0], h), ValueError, r"node node \(RNN\): x: expected shape \(at least 1"),
    ]:
        with pytest.raises(error, match=message):
            call()


def test_lengths_are_checked():
    arrays = arrays_for("GRU", 4, 2, 3, 5, 1, lengths=[4, 4])
    for direction in DIRECTIONS[:2]:
        graph = load(model_of("GRU", arrays, direction=direction))
        for lengths in ([5, 1], [-1, 1], [1]):
            with pytest.raises(ValueError, match=r"node node \(GRU\): lengths: expected"):
                graph(arrays["X"], arrays["initial_h"], np.array(lengths, np.int32))


def graph_around(nodes, arrays, outputs, opset=LATEST, **model):
    """A model of an RNN, from X to h (1, B, 5), and of more nodes."""
    rnn = helper.make_node("RNN", ["X", "W", "R"], ["", "h"], name="rnn")
    graph = helper.make_graph(
        [rnn, *nodes],
        "graph",
        [info("X", arrays["X"], ["T", "B", 3])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(arrays[name], name) for name in "WR"],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("mine", 1)]
    return helper.make_model(graph, opset_imports=opsets, **model)


@pytest.mark.parametrize(
    ("op", "opset", "domain", "message"),
    [
        ("Cos", 22, "", r"node cos \(Cos\)"),
        ("Relu", 22, "mine", r"node cos \(mine.Relu\)"),
        ("RNN", 22, "mine", r"node cos \(mine.RNN\)"),
        ("Relu", 6, "", r"node cos \(Relu\) of opset 6"),
    ],
)
def test_other_operators_leave_the_layers(op, opset, domain, message):
    arrays = arrays_for("RNN", 4, 2, 3, 5, 1, names="WR", initial=False)
    model = graph_around([helper.make_node(op, ["h"], ["y"], name="cos", domain=domain)], arrays, ["y"], opset)
    graph = load(model)
    assert not interop.is_compatible(model)
    assert_close(graph.layers["rnn"](arrays["X"])[1], operator("RNN", arrays)["Y_h"])
    with pytest.raises(NotImplementedError, match=f"expected operators that are supported.*, got {message}"):
        graph(arrays["X"])


def test_functions_of_a_model_are_inlined():
    arrays = arrays_for("RNN", 4, 2, 3, 5, 1, names="WR", initial=False)
    twice = helper.make_function(
        "mine", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", LATEST)]
    )
    nodes = [helper.make_node("Twice", ["h"], ["y"], domain="mine")]
    model = graph_around(nodes, arrays, ["y"], functions=[twice])
    assert interop.is_compatible(model)
    assert_close(load(model)(arrays["X"])["y"], 2 * operator("RNN", arrays)["Y_h"])


def test_outputs_are_nobody_elses_memory():
    arrays = arrays_for("RNN", 4, 2, 3, 5, 1, names="WR", initial=False)
    nodes = [
        helper.make_node("Identity", ["X"], ["x"]),
        helper.make_node("Transpose", ["X"], ["xT"]),
        helper.make_node("Identity", ["R"], ["r"]),
    ]
    graph = load(graph_around(nodes, arrays, ["x", "xT", "r", "h", "W"]))
    before, first = copy.deepcopy(arrays), graph(arrays["X"])
    for array in first.values():
        array[...] = np.nan
    assert_all_same_bits(arrays, before)
    again = graph(arrays["X"])
    assert_all_same_bits({"X": again["x"], "R": again["r"], "W": again["W"]}, before)
    assert_close(again["h"], operator("RNN", arrays)["Y_h"])


def test_graphs_are_copied_pickled_and_shared_by_threads():
    arrays = arrays_for("LSTM", 20, 4, 3, 17, 2, names="WRBP", lengths=[20, 1, 7, 0])
    graph = load(model_of("LSTM", arrays, direction="bidirectional"))
    feeds = {name: array for name, array in arrays.items() if name not in "WRBP"}
    expected, results = graph(feeds), []
    assert_all_same_bits(pickle.loads(pickle.dumps(graph))(feeds), expected)
    threads = [threading.Thread(target=lambda: results.append(copy.deepcopy(graph)(feeds))) for _ in range(4)]
    threads += [threading.Thread(target=lambda: results.append(graph(feeds))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    for result in results:
        assert_all_same_bits(result, expected)


def test_constants_are_computed_once_and_quietly(monkeypatch):
    """Also infinite ones; what nothing reads is not kept."""
    arrays = arrays_for("RNN", 4, 2, 3, 5, 1, names="WR", initial=False)
    nodes = [
        constant("zero", zeros(1)),
        helper.make_node("Log", ["zero"], ["log"]),
        helper.make_node("Max", ["h", "log"], ["y"]),
    ]
    graph = load(graph_around(nodes, arrays, ["y", "log"]))
    monkeypatch.delitem(interop.OPERATORS, "Log")
    outputs = graph(arrays["X"])
    assert_close(outputs["y"], operator("RNN", arrays)["Y_h"])
    assert np.isneginf(outputs["log"]).all()
    assert list(graph._constants) == ["log"]


# What is wrong.


def test_files(tmp_path):
    arrays = arrays_for("LSTM", 4, 2, 3, 5, 1)
    content = model_of("LSTM", arrays).SerializeToString()
    path = tmp_path / "model.onnx"
    with pytest.raises(FileNotFoundError, match=r"path_or_model: expected an ONNX file, found none at '.*model.onnx'"):
        load(path)
    with pytest.raises(FileNotFoundError, match="path_or_model: expected an ONNX file"):
        load(str(tmp_path))
    path.write_bytes(content)
    feeds = {name: array for name, array in arrays.items() if name not in "WRB"}
    assert_all_close_to(load(path)(feeds), operator("LSTM", arrays))
    assert_all_close_to(load(str(path))(feeds), operator("LSTM", arrays))
    for part in [b"", b"not a model at all", *(content[:n] for n in range(1, len(content), 97))]:
        path.write_bytes(part)
        with pytest.raises(ValueError, match=r"path_or_model: expected a (whole|valid) ONNX"):
            load(path)
    with pytest.raises(TypeError, match=r"path_or_model: expected a path or an onnx.ModelProto, got bytes"):
        load(content)


def test_weights_in_files_of_their_own(tmp_path):
    arrays = arrays_for("LSTM", 4, 2, 3, 5, 1)
    model, path = model_of("LSTM", arrays), tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights", size_threshold=0)
    feeds = {name: array for name, array in arrays.items() if name not in "WRB"}
    assert_all_close_to(load(path)(feeds), operator("LSTM", arrays))
    (tmp_path / "weights").unlink()
    with pytest.raises((ValueError, FileNotFoundError), match="weights"):
        load(path)


def changed(**arrays):
    return {**arrays_for("LSTM", 4, 2, 3, 5, 1, names="WRBP"), **arrays}


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


HALF = {name: array.astype(np.float16) for name, array in changed().items()}


@pytest.mark.parametrize(
    ("arrays", "attributes", "error", "message"),
    [
        (HALF, {}, TypeError, r"W of node node \(LSTM\): expected dtype float32 or float64, got float16"),
        (changed(R=zeros(1, 20, 5, dtype=float)), {}, TypeError, "R of .*: expected dtype float32, got float64"),
        (changed(R=zeros(20, 5)), {}, ValueError, r"W, R of .*: expected 3 dimensions each, got W \(1, 20, 3\)"),
        (changed(R=zeros(1, 15, 5)), {}, ValueError, r"R of .*: expected shape \(1, 20, 5\), got \(1, 15, 5\)"),
        (changed(W=zeros(1, 20, 0)), {}, ValueError, "W of .*: expected shape"),
        (changed(W=zeros(2, 20, 3)), {}, ValueError, r"W of .*: expected shape \(1, 20, 3\), got \(2, 20, 3\)"),
        (changed(B=zeros(1, 20)), {}, ValueError, r"B of .*: expected shape \(1, 40\), got \(1, 20\)"),
        (changed(P=zeros(15)), {}, ValueError, r"P of .*: expected shape \(1, 15\), got \(15,\)"),
        (changed(), {"direction": "bidirectional"}, ValueError, r"W of .*: expected shape \(2, 20, 3\)"),
        (changed(), {"direction": "sideways"}, ValueError, "direction of .*: expected one of forward, .* 'sideways'"),
        (changed(), {"layout": 2}, ValueError, "layout of .*: expected 0 or 1, got 2"),
        (changed(), {"hidden_size": 6}, ValueError, "hidden_size of .*: expected 5, as R has, got 6"),
        (changed(), {"clip": 0.0}, ValueError, "clip of .*: expected a finite number greater than 0, got 0"),
        (changed(), {"activations": ["Tanh"]}, ValueError, "activations of .*: expected 3 functions, got 1"),
        (
            changed(),
            {"activations": ["Cos"] * 3},
            ValueError,
            "activations of .*: expected some of Relu, .*, got 'Cos'",
        ),
        (
            changed(),
            {"activations": ["ScaledTanh"] * 3, "activation_alpha": [1.0] * 3, "activation_beta": [1.0] * 2},
            ValueError,
            "activation_beta of .*: expected a number for ScaledTanh, which has no default",
        ),
        (changed(), {"color": 3}, ValueError, "path_or_model: expected a valid ONNX model"),
    ],
)
def test_wrong_nodes(arrays, attributes, error, message):
    with pytest.raises(error, match=message):
        load(model_of("LSTM", arrays, **attributes))


def test_models_without_recurrent_nodes_and_other_wrong_ones():
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    relu = helper.make_node("Relu", ["x"], ["y"])
    with pytest.raises(ValueError, match=r"path_or_model: expected a model with RNN, LSTM or GRU nodes .*, got none"):
        load(helper.make_model(helper.make_graph([relu], "g", [x], [y])))
    with pytest.raises(ValueError, match="path_or_model: expected a valid ONNX model"):
        load(helper.make_model(helper.make_graph([relu], "g", [], [y])))
    arrays = arrays_for("RNN", 4, 2, 3, 5, 1, names="WR", initial=False)
    with pytest.raises(ValueError, match="path_or_model: expected a valid ONNX model: Graph output 'z' is not"):
        load(graph_around([], arrays, ["z"]))
    shape = [constant("shape", np.array([7, 7])), helper.make_node("Reshape", ["h", "shape"], ["y"], name="flat")]
    with pytest.raises(ValueError, match=r"node flat \(Reshape\): cannot reshape"):
        load(graph_around(shape, arrays, ["y"]))(arrays["X"])
    gather = [constant("rows", np.array([7])), helper.make_node("Gather", ["h", "rows"], ["y"], name="rows")]
    with pytest.raises(ValueError, match=r"node rows \(Gather\): index 7 is out of bounds"):
        load(graph_around(gather, arrays, ["y"]))(arrays["X"])


# ONNX's own tests.

RECURRENT = r"^test_(lstm|gru|rnn|simple_rnn)_"
# What no model says beforehand: inputs that are no tensors, training, types that NumPy lacks, the maximum of nothing.
BEYOND = ("_sequence", "_opt", "training_dropout", "cast_", "castlike_")


@pytest.fixture(scope="module")
def backend_tests():
    with warnings.catch_warnings():  # while the cases are made
        warnings.simplefilter("ignore")
        return onnx_tests.loader.load_model_tests(kind="node")


def arrays_of(protos):
    return [numpy_helper.to_array(p) if isinstance(p, TensorProto) else p for p in protos]


def test_onnxs_tests_of_recurrent_nodes():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tests = onnx_tests.BackendTest(interop, __name__).include(RECURRENT)
        result = unittest.TestResult()
        tests.test_suite.run(result)
    assert result.wasSuccessful(), result.errors + result.failures
    others = [test for test, reason in result.skipped if reason == "no matched include pattern" or "cuda" in test.id()]
    assert len(result.skipped) == len(others)
    assert result.testsRun - len(others) >= 18


def test_onnxs_tests_of_all_operators(backend_tests):
    ran = set()
    for test in backend_tests:
        if interop.is_compatible(test.model) and not any(word in test.name for word in BEYOND):
            for given, expected in test.data_sets:
                outputs = interop.run_model(test.model, arrays_of(given))
                for actual, right in zip(outputs, arrays_of(expected), strict=True):
                    assert actual.dtype == right.dtype, test.name
                    np.testing.assert_allclose(actual, right, rtol=test.rtol, atol=test.atol, err_msg=test.name)
            ran |= {node.op_type for node in test.model.graph.node}
    assert ran >= {*interop.OPERATORS, *GATES} - {"Cast", "Not"}


def test_operators_without_such_tests():
    x = np.array([0.0, -1.5, 3.0], np.float32)
    (y,) = interop.run_node(helper.make_node("Cast", ["x"], ["y"], to=TensorProto.INT64), [x])
    np.testing.assert_array_equal(y, np.array([0, -1, 3]), strict=True)
    (y,) = interop.run_node(helper.make_node("Not", ["x"], ["y"]), [x > 0])
    np.testing.assert_array_equal(y, [True, True, False])
    for dtype, least in ((np.float32, -np.inf), (np.int32, np.iinfo(np.int32).min), (bool, False)):
        (y,) = interop.run_node(
            helper.make_node("ReduceMax", ["x", "axes"], ["y"], keepdims=0), [np.empty((0, 2), dtype), np.array([0])]
        )
        np.testing.assert_array_equal(y, np.array([least] * 2, dtype), strict=True)
    for wrong in (TensorProto.BFLOAT16, TensorProto.STRING):
        with pytest.raises(NotImplementedError, match="expected to cast to one of NumPy's types of real numbers"):
            interop.run_node(helper.make_node("Cast", ["x"], ["y"], to=wrong), [x])


def test_the_backends_interface():
    arrays = arrays_for("GRU", 4, 2, 3, 5, 1)
    model = model_of("GRU", arrays)
    X, h = arrays["X"], arrays["initial_h"]
    expected = operator("GRU", arrays)
    prepared = interop.prepare(model)
    for outputs in (prepared.run([X, h]), prepared.run({"X": X, "initial_h": h}), interop.run_model(model, [X, h])):
        assert_all_close_to(outputs._asdict(), expected)
        assert_close(outputs["Y"], expected["Y"])
    node = model.graph.node[0]
    outputs = interop.run_node(node, list(arrays_in_order(node, arrays)))
    assert_all_close_to(outputs._asdict(), expected)
    assert interop.supports_device("CPU")
    assert interop.supports_device("CPU:0")
    assert not interop.supports_device("CUDA")
    for call, error, message in [
        (lambda: prepared.run([X]), TypeError, "inputs: expected X, initial_h, got 1 arrays"),
        (lambda: prepared.run({"X": X}), TypeError, r"missing \['initial_h'\]"),
        (lambda: interop.prepare(model, "CUDA"), ValueError, "device: expected 'CPU', got 'CUDA'"),
        (lambda: interop.prepare("model"), TypeError, "model: expected an onnx.ModelProto, got 'model'"),
        (lambda: interop.run_node(node, [X]), TypeError, "inputs: expected X, W, R, B, initial_h, got 1 arrays"),
    ]:
        with pytest.raises(error, match=message):
            call()
    given = interop.prepare(model_of("GRU", arrays, inputs=list(arrays)))
    with pytest.raises(TypeError, match=r"inputs: expected X, .*; missing"):
        given.run({"X": X})


def arrays_in_order(node, arrays):
    return (arrays[name] for name in node.input if name)
