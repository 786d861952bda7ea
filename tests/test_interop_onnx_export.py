"""Layers and language models as ONNX models, and models that PyTorch exports, which are read back."""

import io
import itertools
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import CASES, assert_all_same_bits, assert_close, inputs, make, named

import fastrnn
from fastrnn.models import LanguageModel

onnx = pytest.importorskip("onnx")

from oracle_onnx import LATEST, assert_all_close_to, runtime  # noqa: E402

from fastrnn.interop.onnx import export, load  # noqa: E402

# What the operators can express.
EXPORTED = [case for case in CASES if "proj" not in case and "norm" not in case and "softsign" not in case]
CASES_OF_LANGUAGE_MODELS = list(itertools.product(["rnn", "lstm", "gru"], [1, 2]))


def feeds_of(layer, T, B, lengths=None):
    """Inputs of the exported model, and what the layer makes of them."""
    x, state, _, _ = inputs(layer, T, B)
    x = np.ascontiguousarray(x.swapaxes(0, 1)) if layer.batch_first else x
    y, after = layer(x, state, lengths)
    feeds = {"x": x, **named(state, "_0")} | ({} if lengths is None else {"lengths": np.array(lengths, np.int32)})
    return feeds, {"y": y, **named(after, "_n")}


@pytest.mark.parametrize("lengths", [None, [7, 1, 5]], ids=["whole", "ragged"])
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "both ways"])
@pytest.mark.parametrize("case", EXPORTED)
def test_layers_run_in_onnx_runtime_and_come_back(case, bidirectional, num_layers, lengths):
    for bias, batch_first in itertools.product([True, False], [False, True]):
        options = {"bias": bias, "batch_first": batch_first, "bidirectional": bidirectional, "num_layers": num_layers}
        layer = make(case, 3, 17, **options)
        model = export(layer, lengths=lengths is not None)
        onnx.checker.check_model(model, full_check=True)
        feeds, expected = feeds_of(layer, 7, 3, lengths)
        assert_all_close_to(runtime(model, feeds), expected)
        graph = load(model)
        assert_all_same_bits(graph(feeds), expected)
        assert [type(other) for other in graph.layers.values()] == [type(layer)] * num_layers


@given(
    case=st.sampled_from(EXPORTED),
    sizes=st.tuples(*[st.sampled_from([1, 2, 3, 17])] * 3, st.sampled_from([1, 3, 17, 63, 65])),
    bidirectional=st.booleans(),
    num_layers=st.sampled_from([1, 2]),
    opset=st.integers(7, LATEST),
    data=st.data(),
)
def test_layers_of_any_shape(case, sizes, bidirectional, num_layers, opset, data):
    T, B, I, H = sizes
    lengths = data.draw(st.none() | st.lists(st.integers(1, T), min_size=B, max_size=B))
    layer = make(case, I, H, bidirectional=bidirectional, num_layers=num_layers)
    model = export(layer, opset=opset, lengths=lengths is not None)
    assert model.opset_import[0].version == opset
    onnx.checker.check_model(model, full_check=True)
    feeds, expected = feeds_of(layer, T, B, lengths)
    assert_all_same_bits(load(model)(feeds), expected)
    if opset <= 20:  # which all its versions know that are about
        assert_all_close_to(runtime(model, feeds), expected)


@pytest.mark.parametrize("case", EXPORTED)
def test_float64_comes_back(case):
    """To the same bits; a limit that float32 has, as the operator's attribute is of this type."""
    layer = make(
        case, 3, 17, np.float64, num_layers=2, bidirectional=True, **({"cell_clip": 0.625} if "clip" in case else {})
    )
    feeds, expected = feeds_of(layer, 7, 3, [7, 1, 5])
    assert_all_same_bits(load(export(layer, lengths=True))(feeds), expected)


@pytest.mark.parametrize("case", ["RNN", "LSTM", "LSTM peephole", "GRU", "GRU reset before"])
def test_float64_in_onnxs_reference(case):
    """Which knows one direction, and no lengths."""
    reference = pytest.importorskip("onnx.reference")
    layer = make(case, 3, 5, np.float64, num_layers=2)
    feeds, expected = feeds_of(layer, 7, 3)
    outputs = reference.ReferenceEvaluator(export(layer)).run(None, feeds)
    assert_all_close_to(dict(zip(expected, outputs)), expected)


def test_inputs_and_outputs_are_declared():
    model = export(make("LSTM", 3, 5, num_layers=2, bidirectional=True, batch_first=True), lengths=True)

    def shapes(values):
        return {
            value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values
        }

    state = [4, "B", 5]
    assert shapes(model.graph.input) == {"x": ["B", "T", 3], "h_0": state, "c_0": state, "lengths": ["B"]}
    assert shapes(model.graph.output) == {"y": ["B", "T", 10], "h_n": state, "c_n": state}
    assert (model.producer_name, model.producer_version) == ("fastrnn", fastrnn.__version__)


def test_dropout_is_left_out():
    layer = make("LSTM", 3, 5, num_layers=2, dropout=0.5, recurrent_dropout=0.5)
    feeds, expected = feeds_of(layer, 4, 2)
    assert_all_same_bits(load(export(layer))(feeds), expected)


def test_subclasses_are_exported_as_what_they_are():
    class Mine(fastrnn.GRU):
        pass

    (layer,) = load(export(Mine(3, 5))).layers.values()
    assert type(layer) is fastrnn.GRU


@pytest.mark.parametrize(("cell", "num_layers"), CASES_OF_LANGUAGE_MODELS)
def test_language_models(cell, num_layers, dtype, rng):
    model = LanguageModel(11, 5, 17, num_layers, cell=cell, seed=0, dtype=dtype)
    tokens = rng.integers(0, 11, (6, 3))
    _, state = model(tokens)
    logits, after = model(tokens, state)
    exported = export(model)
    onnx.checker.check_model(exported, full_check=True)
    feeds, expected = {"tokens": tokens, **named(state, "_0")}, {"logits": logits, **named(after, "_n")}
    got = load(exported)(feeds)
    assert_all_close_to(got, expected)
    assert_all_same_bits({**got, "logits": 0 * logits}, {**expected, "logits": 0 * logits})
    if dtype == np.float32:
        assert_all_close_to(runtime(exported, feeds), expected)
    with pytest.raises(ValueError, match=r"node x \(Gather\): index \d+ is out of bounds"):
        load(exported)({**feeds, "tokens": tokens + 11})


def test_files_are_replaced_only_by_whole_ones(tmp_path, monkeypatch):
    layer, path = make("GRU", 3, 5), tmp_path / "gru.onnx"
    model = export(layer, path)
    assert os.listdir(tmp_path) == ["gru.onnx"]
    assert path.read_bytes() == model.SerializeToString()
    feeds, expected = feeds_of(layer, 4, 2)
    assert_all_same_bits(load(path)(feeds), expected)
    before = path.read_bytes()

    def fail(*args):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="the disk is full"):
        export(make("LSTM", 3, 5), str(path))
    assert os.listdir(tmp_path) == ["gru.onnx"]
    assert path.read_bytes() == before
    monkeypatch.undo()
    export(make("LSTM", 3, 5), str(path))
    assert list(load(path).layers) == ["LSTM_l0"]
    with pytest.raises(FileNotFoundError):
        export(layer, tmp_path / "no" / "gru.onnx")


LAYER = fastrnn.GRU(3, 5, seed=0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: export(make("LSTM proj", 3, 9)), ValueError, "proj_size: expected 0, .*, got 3"),
        (lambda: export(make("LSTM norm", 3, 5)), ValueError, "layer_norm: expected False"),
        (lambda: export(make("GRU norm", 3, 5)), ValueError, "layer_norm: expected False"),
        (
            lambda: export(make("LSTM", 3, 5, zoneout=(0.0, 0.25))),
            ValueError,
            r"zoneout: expected 0, .*, got \(0.0, 0.25",
        ),
        (lambda: export(make("RNN softsign", 3, 5)), ValueError, "nonlinearity: expected one of tanh, relu, identity"),
        (
            lambda: export(fastrnn.LSTMCell(3, 5)),
            TypeError,
            "layer: expected an RNN, LSTM, GRU or LanguageModel, got LSTMCell",
        ),
        (lambda: export(LAYER, opset=6), ValueError, "opset: expected at least 7, got 6"),
        (lambda: export(LAYER, opset=LATEST + 1), ValueError, f"opset: expected at most {LATEST}"),
        (lambda: export(LAYER, opset="17"), TypeError, "opset: expected an int, got '17'"),
        (lambda: export(LAYER, lengths=[3]), TypeError, "lengths: expected True or False, got list of 1"),
        (
            lambda: export(LanguageModel(3, 4, 5), lengths=True),
            ValueError,
            "lengths: expected False for a LanguageModel",
        ),
    ],
)
def test_wrong_calls(call, error, message):
    with pytest.raises(error, match=message):
        call()


# Models that PyTorch exports, in the TorchScript format.

PYTORCHS_WARNINGS = [
    "ignore:You are using the legacy TorchScript-based ONNX export:DeprecationWarning",
    "ignore:The feature will be removed:DeprecationWarning",
    "ignore:Converting a tensor to a Python boolean",
    "ignore:Exporting a model to ONNX with a batch_size other than 1:UserWarning",
]


def from_pytorch(module, arguments, names, axes, **options):
    torch = pytest.importorskip("torch")
    file = io.BytesIO()
    torch.onnx.export(module, arguments, file, dynamo=False, input_names=names, dynamic_axes=axes, **options)
    return load(onnx.load_from_string(file.getvalue()))


def assert_as_pytorch(outputs, tensors):
    for output, tensor in zip(outputs.values(), tensors, strict=True):
        assert_close(output, tensor.detach().double().numpy())


@pytest.mark.parametrize("opset", [9, 12, 17])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}, {"num_layers": 2, "bias": False}],
    ids=str,
)
@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])
@pytest.mark.filterwarnings(*PYTORCHS_WARNINGS)
def test_pytorchs_models(cell, options, opset):
    """Embedding, layers, Linear; whether the exporter computes what is constant or leaves it to the reader."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(11, 5)
            self.rnn = getattr(torch.nn, cell)(5, 7, **options)
            self.output = torch.nn.Linear(14 if options.get("bidirectional") else 7, 11)
            self.classes = torch.nn.Linear(11, 4)

        def forward(self, tokens):
            y, state = self.rnn(self.embedding(tokens))
            logits = self.output(y)
            return torch.log_softmax(self.classes(torch.relu(logits[:, -1])), -1), torch.tanh(logits), state

    model = Model().eval()
    tokens = torch.randint(0, 11, (6, 4))
    a, b, state = model(tokens)
    for folding in (False, True):
        graph = from_pytorch(
            model,
            (tokens[:3, :2],),
            ["tokens"],
            {"tokens": {0: "first", 1: "second"}},
            opset_version=opset,
            do_constant_folding=folding,
        )
        assert [type(layer).__name__ for layer in graph.layers.values()] == [cell] * options.get("num_layers", 1)
        assert_as_pytorch(graph(tokens.numpy()), [a, b, *(state if cell == "LSTM" else [state])])


@pytest.mark.filterwarnings(*PYTORCHS_WARNINGS)
def test_pytorchs_packed_sequences_and_states():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = torch.nn.LSTM(5, 7, num_layers=2, bidirectional=True)

        def forward(self, x, lengths, h_0, c_0):
            packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths)
            y, (h_n, c_n) = self.rnn(packed, (h_0, c_0))
            return torch.nn.utils.rnn.pad_packed_sequence(y)[0], h_n, c_n

    model = Model().eval()
    x, lengths, (h, c) = torch.randn(6, 3, 5), torch.tensor([6, 3, 1]), torch.randn(2, 4, 3, 7)
    names = ["x", "lengths", "h_0", "c_0"]
    axes = {"x": {0: "T", 1: "B"}, "lengths": {0: "B"}, "h_0": {1: "B"}, "c_0": {1: "B"}}
    graph = from_pytorch(model, (x[:4, :2], torch.tensor([4, 2]), h[:, :2], c[:, :2]), names, axes)
    outputs = graph(*(tensor.numpy() for tensor in (x, lengths, h, c)))
    assert_as_pytorch(outputs, model(x, lengths, h, c))
