"""ONNX models on fastrnn's kernels, and fastrnn's layers as ONNX models.

`load` makes layers of a model's RNN, LSTM and GRU nodes, and runs the whole model where what stands around them is
only reshaping, elementwise functions, products, reductions and table look-ups; `export` writes a model of a layer.
`Backend` has the interface of `onnx.backend.base.Backend`.

>>> import numpy as np
>>> import fastrnn
>>> from fastrnn.interop.onnx import export, load
>>> gru = fastrnn.GRU(3, 5, num_layers=2, seed=0)
>>> graph = load(export(gru))
>>> x, h_0 = np.ones((10, 4, 3), np.float32), np.zeros((2, 4, 5), np.float32)
>>> y, h_n = graph(x, h_0).values()
>>> bool((y == gru(x, h_0)[0]).all())
True
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

try:
    import onnx
except ImportError as error:
    raise ImportError("fastrnn.interop.onnx needs the package onnx: pip install fastrnn[onnx]") from error
import onnx.backend.base
import onnx.checker
import onnx.inliner
from google.protobuf.message import DecodeError
from onnx import helper, numpy_helper

from ..checks import as_array, describe
from ..parameters import Array
from .onnx_export import export
from .onnx_nodes import INPUTS, WEIGHTS, EquationsLayer, Layer, RecurrentNode, Reversed
from .onnx_operators import FIRST_OPSET, OPERATORS, Node

__all__ = [
    "Backend",
    "EquationsLayer",
    "Graph",
    "PreparedModel",
    "Reversed",
    "export",
    "is_compatible",
    "load",
    "prepare",
    "run_model",
    "run_node",
    "supports_device",
]


class Graph:
    """A model that `load` has read: its recurrent layers, and a function of its inputs.

    ``layers`` has the recurrent nodes' layers by the nodes' names, made unique: `fastrnn.RNN`, `fastrnn.LSTM` and
    `fastrnn.GRU`; an `EquationsLayer`, slower and for inference only, for options that these lack; either inside a
    `Reversed` for a node of direction "reverse". All are called ``layer(x, state, lengths)``. ``inputs`` and
    ``outputs`` are the graph's names, ``optional`` those of inputs that have a default, an initializer, and
    ``unsupported`` the nodes of other operators, with which it cannot be called.
    """

    def __init__(self, model: onnx.ModelProto, weights: Mapping[str, Any] | None = None):
        graph = model.graph
        self.outputs = tuple(value.name for value in graph.output)
        self._constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        self._inputs = {value.name: value for value in graph.input}
        for name, value in (weights or {}).items():
            self._constants[name] = self._checked(name, value).copy()
        self.inputs = tuple(name for name in self._inputs if name not in self._constants)
        # Of these, layers or constants are made, once.
        fixed = set(weights or {})
        self.layers: dict[str, Layer] = {}
        self._nodes: list[Node | RecurrentNode] = []
        unsupported = [f"sparse initializer {tensor.values.name}" for tensor in graph.sparse_initializer]
        opset, names = _opset(model), set[str]()
        for proto in graph.node:
            node = _node(proto, opset, names)
            if node.op in INPUTS:
                recurrent = RecurrentNode(node, self._constants)
                self.layers[node.name] = recurrent.layer
                fixed |= {*node.inputs} - {*recurrent.inputs}
                self._nodes.append(recurrent)
            elif node.op not in OPERATORS or (opset < FIRST_OPSET and node.op != "Constant"):
                unsupported.append(f"{node}" + f" of opset {opset}" * (node.op in OPERATORS))
            elif all(name in self._constants for name in node.inputs if name):
                fixed |= {*node.inputs}
                try:
                    _run(node, self._constants)
                except NotImplementedError as error:
                    unsupported.append(str(error))
            else:
                self._nodes.append(node)
        self.unsupported = tuple(unsupported)
        self.optional = tuple(name for name in self._inputs if name not in fixed and name not in self.inputs)
        self._unread = _unread(self._nodes, self.outputs)
        read = {*self.outputs, *(name for node in self._nodes for name in node.inputs)}
        self._constants = {name: array for name, array in self._constants.items() if name in read}
        for array in self._constants.values():
            array.flags.writeable = False

    def __repr__(self) -> str:
        return f"Graph(inputs={self.inputs}, outputs={self.outputs}, layers={list(self.layers)})"

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Array]:
        """The outputs by name, in the graph's order.

        Inputs are given in the graph's order, without the optional ones, by keywords, or as one mapping by name.

        Raises NotImplementedError if the graph has nodes of operators that are not supported, TypeError or ValueError
        for inputs that are missing, not known, or of a wrong dtype or shape.
        """
        if self.unsupported:
            raise NotImplementedError(
                f"graph: expected operators that are supported, of opset {FIRST_OPSET} or later, got "
                f"{', '.join(self.unsupported)}; its layers can be called"
            )
        given = self._given(args, kwargs)
        arrays: dict[str, Array] = self._constants | given
        for node, unread in zip(self._nodes, self._unread):
            _run(node, arrays)
            for name in unread:
                del arrays[name]
        return {name: _own(arrays[name], given) for name in self.outputs}

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Array]:
        """The inputs by name, checked."""
        if len(args) == 1 and isinstance(args[0], Mapping):
            given = dict(args[0])
        elif len(args) <= len(self.inputs):
            given = dict(zip(self.inputs, args))
        else:
            raise TypeError(f"inputs: expected {', '.join(self.inputs)}, got {len(args)} arrays")
        twice = sorted(given.keys() & kwargs.keys())
        if twice:
            raise TypeError(f"inputs: expected each once, got {', '.join(twice)} twice")
        given |= kwargs
        missing = [name for name in self.inputs if name not in given]
        known = (*self.inputs, *self.optional)
        unknown = [str(name) for name in given if name not in known]
        if missing or unknown:
            raise TypeError(f"inputs: expected {', '.join(known)}; missing {missing}, not known {unknown}")
        return {name: self._checked(name, given[name]) for name in known if name in given}

    def _checked(self, name: str, value: Any) -> Array:
        """What is given for an input, as an array of the dtype and shape that the graph declares."""
        if name not in self._inputs:
            raise ValueError(f"{name}: expected one of the graph's inputs, {', '.join(self._inputs)}")
        declared = self._inputs[name].type.tensor_type
        if not declared.elem_type:
            raise NotImplementedError(f"{name}: expected an input that is a tensor, got one of another type")
        array, dtype = as_array(value, name), helper.tensor_dtype_to_np_dtype(declared.elem_type)
        if array.dtype != dtype:
            raise TypeError(f"{name}: expected dtype {dtype}, got {array.dtype}")
        if declared.HasField("shape"):
            sizes = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in declared.shape.dim]
            if array.ndim != len(sizes) or any(isinstance(n, int) and n != m for n, m in zip(sizes, array.shape)):
                raise ValueError(f"{name}: expected shape ({', '.join(map(str, sizes))}), got {array.shape}")
        return array


def load(path_or_model: str | os.PathLike[str] | onnx.ModelProto, *, weights: Mapping[str, Any] | None = None) -> Graph:
    """Read an ONNX model with RNN, LSTM or GRU nodes.

    Args:
        path_or_model: a file, or a model that the package onnx has read or made.
        weights: arrays by name for those of the graph's inputs that its recurrent nodes take for weights. Other
            models' weights are in the file: initializers, or computed from such; where these are inputs, too, arrays
            given here take their place.

    Every option of the recurrent operators is supported, of every operator set, in float32 and float64. A sequence of
    length 0 keeps its initial state; the specification says nothing of it. Returns a `Graph`.

    Raises FileNotFoundError, ValueError for a file or model that is not valid, has no recurrent nodes, or weights of
    wrong shapes, TypeError for weights of other dtypes, float16 among them.

    >>> from onnx import TensorProto, helper, numpy_helper
    >>> import numpy as np
    >>> weights = {"W": np.ones((1, 20, 3), np.float32), "R": np.ones((1, 20, 5), np.float32)}
    >>> node = helper.make_node("LSTM", ["x", "W", "R"], ["", "h_n"], name="lstm", hidden_size=5)
    >>> x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", "B", 3])
    >>> h_n = helper.make_tensor_value_info("h_n", TensorProto.FLOAT, [1, "B", 5])
    >>> arrays = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    >>> graph = load(helper.make_model(helper.make_graph([node], "g", [x], [h_n], arrays)))
    >>> graph.layers["lstm"].hidden_size
    5
    >>> graph(x=np.ones((10, 2, 3), np.float32))["h_n"].shape
    (1, 2, 5)
    """
    if weights is not None and not isinstance(weights, Mapping):
        raise TypeError(f"weights: expected a mapping, got {describe(weights)}")
    graph = Graph(_valid(_model(path_or_model)), weights)
    if not graph.layers:
        raise ValueError("path_or_model: expected a model with RNN, LSTM or GRU nodes in its graph, got none")
    return graph


def _model(given: Any) -> onnx.ModelProto:
    if isinstance(given, onnx.ModelProto):
        return given
    if not isinstance(given, (str, os.PathLike)):
        raise TypeError(f"path_or_model: expected a path or an onnx.ModelProto, got {describe(given)}")
    if not Path(given).is_file():
        raise FileNotFoundError(f"path_or_model: expected an ONNX file, found none at {os.fspath(given)!r}")
    try:
        return onnx.load(os.fspath(given))
    except (DecodeError, onnx.checker.ValidationError, ValueError) as error:
        raise ValueError(f"path_or_model: expected a whole ONNX file, got {os.fspath(given)!r}: {error}") from error


def _valid(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model, checked, and without functions of its own."""
    # The checker sees names instead of weights, which it would copy, and instead of types, of which it wants more than
    # runtimes do.
    graph = model.graph
    names = dict.fromkeys(value.name for value in [*graph.input, *graph.initializer])
    given, outputs = (
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ()) for name in some]
        for some in (names, [value.name for value in graph.output])
    )
    skeleton = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    skeleton.graph.CopyFrom(helper.make_graph(graph.node, "graph", given, outputs))
    try:
        onnx.checker.check_model(skeleton)
    except onnx.checker.ValidationError as error:
        raise ValueError(f"path_or_model: expected a valid ONNX model: {error}") from error
    return onnx.inliner.inline_local_functions(model) if model.functions else model


def _opset(model: onnx.ModelProto) -> int:
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)


def _node(proto: onnx.NodeProto, opset: int, names: set[str]) -> Node:
    """A node of the graph, under a name that is not among ``names``, to which it is added."""
    base = proto.name or proto.op_type
    name, count = base, 1
    while name in names:
        name, count = f"{base}_{count}", count + 1
    names.add(name)
    op = proto.op_type if proto.domain in ("", "ai.onnx") else f"{proto.domain}.{proto.op_type}"
    attributes = {}
    for attribute in proto.attribute:
        value = helper.get_attribute_value(attribute)
        if isinstance(value, bytes):
            value = value.decode(errors="replace")
        elif attribute.type == onnx.AttributeProto.STRINGS:
            value = [text.decode(errors="replace") for text in value]
        attributes[attribute.name] = value
    return Node(name, op, tuple(proto.input), tuple(proto.output), attributes, opset)


def _run(node: Node | RecurrentNode, arrays: dict[str, Array]) -> None:
    """Run a node, from ``arrays`` into it."""
    inputs: list[Any] = [arrays[name] if name else None for name in node.inputs]
    try:
        with np.errstate(all="ignore"):
            results = node(*inputs) if isinstance(node, RecurrentNode) else OPERATORS[node.op](node, *inputs)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{node}: {error}") from error
    except TypeError as error:
        raise TypeError(f"{node}: {error}") from error
    for name, result in zip(node.outputs, results if isinstance(results, tuple) else (results,)):
        if name:
            arrays[name] = np.asarray(result)


def _unread(nodes: list[Node | RecurrentNode], outputs: tuple[str, ...]) -> list[list[str]]:
    """After each node, the names of arrays that are not read any more."""
    unread, read = [], {"", *outputs}
    for node in reversed(nodes):
        names = {*node.inputs, *node.outputs}
        unread.append(sorted(names - read))
        read |= names
    return unread[::-1]


def _own(array: Array, given: dict[str, Array]) -> Array:
    """An output that is nobody else's memory: not the user's, nor the constants', which are read-only."""
    if not array.flags.writeable or any(np.may_share_memory(array, other) for other in given.values()):
        return array.copy()
    return array


# The interface of ONNX's backends.


class PreparedModel(onnx.backend.base.BackendRep):
    """A model that `Backend.prepare` has made ready. Weights may be inputs, as in the tests that ONNX has for nodes."""

    def __init__(self, model: onnx.ModelProto):
        self.model = _valid(model)
        given = {value.name for value in model.graph.input} - {tensor.name for tensor in model.graph.initializer}
        used = {
            name
            for node in self.model.graph.node
            if node.op_type in INPUTS
            for kind, name in zip(INPUTS[node.op_type], node.input)
            if kind in WEIGHTS
        }
        self.inputs = tuple(value.name for value in model.graph.input if value.name in given)
        self._weights = given & used
        self._graph = None if self._weights else Graph(self.model)

    def run(self, inputs: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The outputs, a named tuple, of inputs given as a sequence in the graph's order or as a mapping by name."""
        if isinstance(inputs, np.ndarray):
            inputs = [inputs]
        if not isinstance(inputs, Mapping):
            if len(inputs) != len(self.inputs):
                raise TypeError(f"inputs: expected {', '.join(self.inputs)}, got {len(inputs)} arrays")
            inputs = dict(zip(self.inputs, inputs))
        missing = [name for name in self._weights if name not in inputs]
        if missing:
            raise TypeError(f"inputs: expected {', '.join(self.inputs)}; missing {missing}")
        graph = self._graph or Graph(self.model, {name: inputs[name] for name in self._weights})
        outputs = graph({name: array for name, array in inputs.items() if name not in self._weights})
        return onnx.backend.base.namedtupledict("Outputs", list(outputs))(*outputs.values())


class Backend(onnx.backend.base.Backend):
    """ONNX's backend interface: runs whole models of the operators that `Graph` knows, on the CPU.

    >>> from onnx import helper
    >>> import numpy as np
    >>> from fastrnn.interop.onnx import Backend
    >>> Backend.run_node(helper.make_node("Relu", ["x"], ["y"]), [np.array([-1, 2], np.float32)])
    Outputs(y=array([0., 2.], dtype=float32))
    """

    @classmethod
    def is_compatible(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> bool:
        """Whether all of the model's operators are supported."""
        nodes = onnx.inliner.inline_local_functions(model).graph.node if model.functions else model.graph.node
        known = {*INPUTS, *OPERATORS} if _opset(model) >= FIRST_OPSET else {*INPUTS}
        return cls.supports_device(device) and all(
            node.domain in ("", "ai.onnx") and node.op_type in known for node in nodes
        )

    @classmethod
    def prepare(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> PreparedModel:
        """Make a model ready to run. Raises ValueError for one that is not valid or for another device than CPU."""
        if not cls.supports_device(device):
            raise ValueError(f"device: expected 'CPU', got {device!r}")
        if not isinstance(model, onnx.ModelProto):
            raise TypeError(f"model: expected an onnx.ModelProto, got {describe(model)}")
        return PreparedModel(model)

    @classmethod
    def run_node(
        cls, node: onnx.NodeProto, inputs: Any, device: str = "CPU", outputs_info: Any = None, **kwargs: Any
    ) -> tuple[Any, ...]:
        """Run one node on a sequence of arrays, one for each input that is not left out."""
        names = [name for name in dict.fromkeys(node.input) if name]
        arrays = [np.asarray(array) for array in inputs]
        if len(names) != len(arrays):
            raise TypeError(f"inputs: expected {', '.join(names)}, got {len(arrays)} arrays")
        declared = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in zip(names, arrays)
        ]
        # The checker wants outputs to have some type; nothing depends on which.
        outputs = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in node.output if name]
        opset = kwargs.get("opset_version", onnx.defs.onnx_opset_version())
        graph = helper.make_graph([node], node.op_type, declared, outputs)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
        return cls.prepare(model, device).run(arrays)

    @classmethod
    def supports_device(cls, device: str) -> bool:
        """Whether it is the CPU."""
        return device.split(":")[0] == "CPU"


is_compatible = Backend.is_compatible
prepare = Backend.prepare
run_model = Backend.run_model
run_node = Backend.run_node
supports_device = Backend.supports_device
