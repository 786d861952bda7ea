"""fastrnn's layers and language models as ONNX models."""

import os
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .. import __version__
from ..checks import describe, flag, integer
from ..layers import GRU, LSTM, RNN
from ..models import LanguageModel
from ..parameters import Array, replace_file
from ..recurrent import Recurrent
from .onnx_nodes import GATES, OUR_GATES
from .onnx_operators import FIRST_OPSET

# Since this version of the format, initializers need not be inputs.
FIRST_IR_VERSION = 4
FUNCTIONS = {"tanh": "Tanh", "relu": "Relu", "identity": "Affine"}


def export(
    layer: Recurrent | LanguageModel,
    path: str | os.PathLike[str] | None = None,
    *,
    opset: int = 17,
    lengths: bool = False,
) -> onnx.ModelProto:
    """A layer or a language model as an ONNX model for inference, for any number of steps and sequences.

    Args:
        layer: an RNN, LSTM, GRU or LanguageModel.
        path: if given, the model is written there; an existing file is replaced only once the new one is whole.
        opset: the operator set, from 7 to the latest that the package onnx knows.
        lengths: whether the model has the input ``lengths`` (B,), int32, as a layer's call.

    Inputs are ``x`` (T, B, I), or (B, T, I) with ``batch_first``, and ``h_0`` and, of LSTM, ``c_0``, all required;
    outputs are ``y``, ``h_n`` and ``c_n``: names and shapes are those of the layer's call. A language model has
    ``tokens`` (T, B), int64, for x and ``logits`` for y. Dropout is left out, as in calls. float64 is valid ONNX,
    but ONNX Runtime has no kernels for it; ``cell_clip`` becomes a float32 number in any case.

    Raises ValueError for what the operators cannot express: proj_size, layer_norm, zoneout, and an RNN with functions
    of its own. TypeError for what is no layer.

    >>> import fastrnn
    >>> from fastrnn.interop.onnx import export
    >>> model = export(fastrnn.LSTM(3, 5, num_layers=2, bidirectional=True))
    >>> [node.op_type for node in model.graph.node]
    ['Gather', 'Gather', 'LSTM', 'Transpose', 'Reshape', 'Gather', 'Gather', 'LSTM', 'Transpose', 'Reshape', 'Concat',
     'Concat']
    """
    flag(lengths, "lengths")
    latest = onnx.defs.onnx_opset_version()
    if integer(opset, "opset", FIRST_OPSET) > latest:
        raise ValueError(f"opset: expected at most {latest}, the latest that the package onnx knows, got {opset}")
    if isinstance(layer, LanguageModel):
        if lengths:
            raise ValueError("lengths: expected False for a LanguageModel, whose calls take none, got True")
        graph = _Writer(layer.rnn).language_model(layer)
    elif isinstance(layer, (RNN, LSTM, GRU)):
        graph = _Writer(layer).layer(lengths)
    else:
        raise TypeError(f"layer: expected an RNN, LSTM, GRU or LanguageModel, got {describe(layer)}")
    opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(
        graph,
        opset_imports=opsets,
        ir_version=max(FIRST_IR_VERSION, helper.find_min_ir_version_for(opsets)),
        producer_name="fastrnn",
        producer_version=__version__,
    )
    if path is not None:
        replace_file(path, model.SerializeToString())
    return model


class _Writer:
    """The nodes and the weights of a graph around a recurrent layer."""

    def __init__(self, rnn: Recurrent):
        _check(rnn)
        self.rnn, self.op = rnn, next(kind.__name__ for kind in (RNN, LSTM, GRU) if isinstance(rnn, kind))
        self.states = ("h", "c")[: rnn.STATES]
        self.dtype = helper.np_dtype_to_tensor_dtype(rnn.dtype)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def layer(self, lengths: bool) -> onnx.GraphProto:
        rnn = self.rnn
        x, batch = "x", ["B", "T"] if rnn.batch_first else ["T", "B"]
        inputs = [helper.make_tensor_value_info(x, self.dtype, [*batch, rnn.input_size])]
        inputs += self._state_infos("0")
        if lengths:
            inputs.append(helper.make_tensor_value_info("lengths", TensorProto.INT32, ["B"]))
        if rnn.batch_first:
            x = self._node("Transpose", [x], "x_time_first", perm=[1, 0, 2])
        self._stack(x, "y_time_first" if rnn.batch_first else "y", "lengths" if lengths else "")
        if rnn.batch_first:
            self._node("Transpose", ["y_time_first"], "y", perm=[1, 0, 2])
        outputs = [helper.make_tensor_value_info("y", self.dtype, [*batch, rnn.directions * rnn.hidden_size])]
        return self._graph(inputs, outputs)

    def language_model(self, model: LanguageModel) -> onnx.GraphProto:
        inputs = [helper.make_tensor_value_info("tokens", TensorProto.INT64, ["T", "B"]), *self._state_infos("0")]
        x = self._node("Gather", [self._constant("embedding.weight", model.embedding.weight), "tokens"], "x")
        self._stack(x, "y", "")
        weight = self._constant("output.weight", model.output.parameters["weight"].T)
        product = self._node("MatMul", ["y", weight], "logits_without_bias")
        self._node("Add", [product, self._constant("output.bias", model.output.parameters["bias"])], "logits")
        return self._graph(inputs, [helper.make_tensor_value_info("logits", self.dtype, ["T", "B", model.num_tokens])])

    def _graph(self, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]) -> onnx.GraphProto:
        return helper.make_graph(self.nodes, self.op, inputs, [*outputs, *self._state_infos("n")], self.initializers)

    def _state_infos(self, when: str) -> list[onnx.ValueInfoProto]:
        shape: list[Any] = [self.rnn.num_layers * self.rnn.directions, "B", self.rnn.hidden_size]
        return [helper.make_tensor_value_info(f"{s}_{when}", self.dtype, shape) for s in self.states]

    def _constant(self, name: str, array: Array) -> str:
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def _node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def _stack(self, x: str, y: str, lengths: str) -> None:
        """All layers, from x (T, B, I) to y (T, B, directions * H), and from the states h_0, c_0 to h_n, c_n."""
        L, D, H = self.rnn.num_layers, self.rnn.directions, self.rnn.hidden_size
        ends: dict[str, list[str]] = {s: [] for s in self.states}
        # Zeros keep a size as it is: of T here and, after the transposition, of B.
        shape = self._constant("shape_of_y", np.array([0, 0, D * H] if D == 2 else [0, -1, H], np.int64))
        for k in range(L):
            before, after = [f"{s}_0" for s in self.states], [f"{s}_n" for s in self.states]
            if L > 1:
                rows = self._constant(f"rows_l{k}", np.arange(k * D, (k + 1) * D))
                before = [self._node("Gather", [s, rows], f"{s}_l{k}", axis=0) for s in before]
                after = [f"{s}_l{k}" for s in after]
            weights = {name: self._constant(f"{name}_l{k}", array) for name, array in self._weights(k).items()}
            inputs = [x, weights["W"], weights["R"], weights.get("B", ""), lengths, *before]
            inputs += [weights["P"]] if "P" in weights else []
            outputs = [f"Y_l{k}", *after]
            self.nodes.append(helper.make_node(self.op, inputs, outputs, name=f"{self.op}_l{k}", **self._attributes()))
            x = outputs[0]
            if D == 2:
                x = self._node("Transpose", [x], f"Y_transposed_l{k}", perm=[0, 2, 1, 3])
            x = self._node("Reshape", [x, shape], y if k == L - 1 else f"y_l{k}")
            for s, name in zip(self.states, after):
                ends[s].append(name)
        if L > 1:
            for s, names in ends.items():
                self._node("Concat", names, f"{s}_n", axis=0)

    def _attributes(self) -> dict[str, Any]:
        rnn, D = self.rnn, self.rnn.directions
        attributes: dict[str, Any] = {
            "hidden_size": rnn.hidden_size,
            "direction": "bidirectional" if rnn.bidirectional else "forward",
        }
        if isinstance(rnn, RNN):
            attributes["activations"] = [FUNCTIONS[str(rnn.nonlinearity)]] * D
            if rnn.nonlinearity == "identity":
                attributes |= {"activation_alpha": [1.0] * D, "activation_beta": [0.0] * D}
        if isinstance(rnn, LSTM):
            if rnn.cell_clip is not None:
                attributes["clip"] = rnn.cell_clip
            if rnn.coupled:
                attributes["input_forget"] = 1
        if isinstance(rnn, GRU):
            attributes["linear_before_reset"] = int(rnn.reset_after)
        return attributes

    def _weights(self, k: int) -> dict[str, Array]:
        """A layer's weights by the operator's names, each (directions, ...)."""
        directions = [self._of_direction(k, d) for d in range(self.rnn.directions)]
        return {name: np.stack([weights[name] for weights in directions]) for name in directions[0]}

    def _of_direction(self, k: int, d: int) -> dict[str, Array]:
        rnn, H = self.rnn, self.rnn.hidden_size
        kinds = ["weight_ih", "weight_hh"] + ["bias_ih", "bias_hh"] * rnn.bias
        ours = {kind: rnn.parameters[rnn.names[k, d][kind]] for kind in kinds}
        peepholes = {}
        if rnn.cell.peephole:
            peepholes = {gate: rnn.parameters[rnn.names[k, d][f"weight_c{gate}"]] for gate in self._peepholes()}
        ordered = {kind: self._ordered(array.reshape(-1, H, *array.shape[1:])) for kind, array in ours.items()}
        weights = {"W": ordered["weight_ih"], "R": ordered["weight_hh"]}
        if rnn.bias:
            weights["B"] = np.concatenate([ordered["bias_ih"], ordered["bias_hh"]])
        if peepholes:
            weights["P"] = np.concatenate([self._coupled(peepholes)[gate] for gate in "iof"])
        return weights

    def _peepholes(self) -> str:
        return "fo" if self.rnn.cell.coupled else "ifo"

    def _ordered(self, gates: Array) -> Array:
        """Rows for each of our gates (gates, H, ...) as rows in the operator's order (gates * H, ...)."""
        names = "fgo" if self.rnn.cell.coupled else OUR_GATES[self.op]
        by_name = self._coupled(dict(zip(names, gates)))
        return np.concatenate([by_name[gate] for gate in GATES[self.op]])

    def _coupled(self, gates: dict[str, Array]) -> dict[str, Array]:
        """With the operator's i, if coupled: its i is our 1 - f, which f's negative sum gives; it needs no f."""
        if not self.rnn.cell.coupled:
            return gates
        return {**gates, "i": -gates["f"], "f": np.zeros_like(gates["f"])}


def _check(rnn: Recurrent) -> None:
    """Raise ValueError for what the operators cannot express."""
    if rnn.cell.P != rnn.cell.H:
        raise ValueError(f"proj_size: expected 0, as ONNX's operators have no projection, got {rnn.cell.P}")
    if rnn.layer_norm:
        raise ValueError("layer_norm: expected False, as ONNX's operators have no layer normalisation, got True")
    if any(rnn.zoneout):
        raise ValueError(f"zoneout: expected 0, as ONNX's operators have none, got {rnn.config['zoneout']}")
    if isinstance(rnn, RNN) and not isinstance(rnn.nonlinearity, str):
        raise ValueError(f"nonlinearity: expected one of {', '.join(FUNCTIONS)}, got functions of the user's own")
