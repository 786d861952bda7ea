"""The operators of ONNX that stand around recurrent nodes, in NumPy.

Each is a function of its node, for the attributes, and of the node's inputs, None for those left out. It returns an
array, or a tuple of one for each output. Meanings and defaults are the specification's (https://onnx.ai/onnx/operators),
of every operator set since 7; where an attribute became an input later, both are read.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from onnx import helper, numpy_helper

from ..parameters import Array

# Since this operator set, binary operators broadcast as NumPy does.
FIRST_OPSET = 7


class Node(NamedTuple):
    """A node of a graph. ``inputs`` and ``outputs`` are names of arrays, "" for those left out."""

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    opset: int

    def __str__(self) -> str:
        return f"node {self.name} ({self.op})"


class Activation(NamedTuple):
    """A function of x and of its parameters, alpha and beta, with their defaults; None: there is none."""

    function: Callable[..., Array]
    defaults: dict[str, float | None]


def sigmoid(x: Array) -> Array:
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


# Written so that NaN stays NaN.
ACTIVATIONS = {
    "Relu": Activation(lambda x: np.maximum(x, 0), {}),
    "Tanh": Activation(np.tanh, {}),
    "Sigmoid": Activation(sigmoid, {}),
    "Affine": Activation(lambda x, alpha, beta: alpha * x + beta, {"alpha": 1.0, "beta": 0.0}),
    "LeakyRelu": Activation(lambda x, alpha: np.where(x >= 0, x, alpha * x), {"alpha": float(np.float32(0.01))}),
    "ThresholdedRelu": Activation(lambda x, alpha: np.where(x < alpha, 0, x), {"alpha": 1.0}),
    "ScaledTanh": Activation(lambda x, alpha, beta: alpha * np.tanh(beta * x), {"alpha": None, "beta": None}),
    "HardSigmoid": Activation(
        lambda x, alpha, beta: np.clip(alpha * x + beta, 0, 1), {"alpha": float(np.float32(0.2)), "beta": 0.5}
    ),
    "Elu": Activation(lambda x, alpha: np.where(x >= 0, x, alpha * np.expm1(np.minimum(x, 0))), {"alpha": 1.0}),
    "Softsign": Activation(lambda x: x / (1 + np.abs(x)), {}),
    "Softplus": Activation(lambda x: np.logaddexp(x, 0), {}),
}


def _activation(node: Node, x: Array) -> Array:
    function, defaults = ACTIVATIONS[node.op]
    return function(x, *[node.attributes.get(name, default) for name, default in defaults.items()])


def _elementwise(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda node, *inputs: function(*inputs)


def _of_many(function: Callable[[Array, Array], Array]) -> Callable[..., Array]:
    """A function of any number of arrays, from one of two."""

    def operator(node: Node, first: Array, *others: Array) -> Array:
        for other in others:
            first = function(first, other)
        return first

    return operator


def _divide(node: Node, a: Array, b: Array) -> Array:
    if a.dtype.kind not in "iu":
        return a / b
    quotient = a // b
    return quotient + ((quotient < 0) & (quotient * b != a)).astype(a.dtype)  # towards 0


def _power(node: Node, a: Array, b: Array) -> Array:
    return np.power(a, b).astype(a.dtype)


def _axes(node: Node, axes: Array | None) -> tuple[int, ...] | None:
    """The input ``axes``, or the attribute that it once was."""
    given = node.attributes.get("axes") if axes is None else axes.tolist()
    return None if given is None else tuple(given)


def _reduction(function: Callable[..., Array]) -> Callable[..., Array]:
    def operator(node: Node, x: Array, axes: Array | None = None) -> Array:
        chosen = _axes(node, axes)
        if not chosen and node.attributes.get("noop_with_empty_axes", 0):
            return x
        reduced = function(x, axis=chosen or None, keepdims=bool(node.attributes.get("keepdims", 1)))
        return np.asarray(reduced).astype(x.dtype)

    return operator


def _maximum(x: Array, **options: Any) -> Array:
    """Of nothing, the least number of the dtype."""
    least = np.iinfo(x.dtype).min if x.dtype.kind in "iu" else False if x.dtype.kind == "b" else -np.inf
    return np.asarray(np.max(x, initial=least, **options))


def _argmax(node: Node, x: Array) -> Array:
    axis, keepdims = node.attributes.get("axis", 0), bool(node.attributes.get("keepdims", 1))
    if node.attributes.get("select_last_index", 0):
        return x.shape[axis] - 1 - np.argmax(np.flip(x, axis), axis, keepdims=keepdims)
    return np.asarray(np.argmax(x, axis, keepdims=keepdims))


def _matmul(node: Node, a: Array, b: Array) -> Array:
    if a.ndim > 2 and b.ndim == 2:  # one product instead of one for each step
        return np.matmul(a.reshape(-1, a.shape[-1]), b).reshape(*a.shape[:-1], b.shape[1])
    return np.asarray(np.matmul(a, b))


def _gemm(node: Node, a: Array, b: Array, c: Array | None = None) -> Array:
    attributes = node.attributes
    alpha, beta = attributes.get("alpha", 1.0), attributes.get("beta", 1.0)
    y = np.matmul(a.T if attributes.get("transA", 0) else a, b.T if attributes.get("transB", 0) else b)
    y = y if alpha == 1 else (alpha * y).astype(y.dtype)
    return y if c is None else y + (c if beta == 1 else (beta * c).astype(c.dtype))


def _clip(node: Node, x: Array, least: Array | None = None, most: Array | None = None) -> Array:
    least, most = (node.attributes.get(name, a) for name, a in (("min", least), ("max", most)))
    x = x if least is None else np.maximum(x, np.asarray(least, x.dtype))
    return x if most is None else np.minimum(x, np.asarray(most, x.dtype))


def _softmax(node: Node, x: Array) -> Array:
    return np.exp(_log_softmax(node, x))


def _log_softmax(node: Node, x: Array) -> Array:
    if node.opset >= 13:
        axes: Any = node.attributes.get("axis", -1)
    else:  # over all axes from this one
        axes = tuple(range(node.attributes.get("axis", 1) % max(x.ndim, 1), x.ndim))
    x = x - x.max(axes, keepdims=True)
    return x - np.log(np.exp(x).sum(axes, keepdims=True))


def _cast(node: Node, x: Array) -> Array:
    dtype = helper.tensor_dtype_to_np_dtype(node.attributes["to"])
    if dtype.isbuiltin != 1 or dtype.kind not in "biuf":
        raise NotImplementedError(f"{node}: expected to cast to one of NumPy's types of real numbers, got {dtype}")
    return x.astype(dtype)


def _dropout(node: Node, x: Array, ratio: Array | None = None, training: Array | None = None) -> Any:
    if training is not None and training:
        raise NotImplementedError(f"{node}: expected inference, got training_mode True")
    return (x, np.ones(x.shape, bool))


# Shapes.


def _transpose(node: Node, x: Array) -> Array:
    return np.transpose(x, node.attributes.get("perm"))


def _squeeze(node: Node, x: Array, axes: Array | None = None) -> Array:
    return np.squeeze(x, _axes(node, axes))


def _unsqueeze(node: Node, x: Array, axes: Array | None = None) -> Array:
    return np.expand_dims(x, _axes(node, axes) or ())


def _reshape(node: Node, x: Array, shape: Array) -> Array:
    sizes = shape.tolist()
    if not node.attributes.get("allowzero", 0):
        sizes = [n or x.shape[i] for i, n in enumerate(sizes)]
    return x.reshape(sizes)


def _flatten(node: Node, x: Array) -> Array:
    axis = node.attributes.get("axis", 1)
    rows = int(np.prod(x.shape[:axis]))
    return x.reshape(rows, x.size // rows if rows else int(np.prod(x.shape[axis:])))


def _expand(node: Node, x: Array, shape: Array) -> Array:
    return np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(shape.tolist())))


def _shape(node: Node, x: Array) -> Array:
    return np.array(x.shape[node.attributes.get("start", 0) : node.attributes.get("end")], np.int64)


# Parts.


def _concat(node: Node, *inputs: Array) -> Array:
    return np.concatenate(inputs, node.attributes["axis"])


def _split(node: Node, x: Array, sizes: Array | None = None) -> tuple[Array, ...]:
    axis, count = node.attributes.get("axis", 0), len(node.outputs)
    given = node.attributes.get("split") if sizes is None else sizes.tolist()
    if given is None:
        part = -(-x.shape[axis] // count)
        given = [part] * (count - 1) + [x.shape[axis] - part * (count - 1)]
    if sum(given) != x.shape[axis] or min(given) < 0:
        raise ValueError(f"split: expected sizes that add up to {x.shape[axis]}, got {given}")
    return tuple(np.split(x, np.cumsum(given)[:-1], axis))


def _slice(
    node: Node,
    x: Array,
    starts: Array | None = None,
    ends: Array | None = None,
    axes: Array | None = None,
    steps: Array | None = None,
) -> Array:
    first, last = (
        node.attributes[name] if a is None else a.tolist() for name, a in (("starts", starts), ("ends", ends))
    )
    chosen = _axes(node, axes) or range(len(first))
    index = [slice(None)] * x.ndim
    for axis, *bounds in zip(chosen, first, last, [1] * len(first) if steps is None else steps.tolist()):
        index[axis] = slice(*bounds)
    return x[tuple(index)]


def _gather(node: Node, x: Array, indices: Array) -> Array:
    return np.take(x, indices, node.attributes.get("axis", 0))


def _reverse_sequence(node: Node, x: Array, lengths: Array) -> Array:
    time, batch = node.attributes.get("time_axis", 0), node.attributes.get("batch_axis", 1)
    return np.moveaxis(reverse(np.moveaxis(x, (time, batch), (0, 1)), lengths), (0, 1), (time, batch))


def reverse(x: Array, lengths: Array) -> Array:
    """Sequences x (T, B, ...), each of them backwards within its length."""
    steps = np.arange(len(x))[:, None]
    order = np.where(steps < lengths, lengths - 1 - steps, steps)
    return np.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), 0)


# Constants.


def _constant(node: Node) -> Array:
    for name, value in node.attributes.items():
        if name == "value":
            return numpy_helper.to_array(value)
        if name in ("value_float", "value_floats"):
            return np.array(value, np.float32)
        if name in ("value_int", "value_ints"):
            return np.array(value, np.int64)
    raise NotImplementedError(f"{node}: expected a tensor or numbers, got {', '.join(node.attributes)}")


def _constant_of_shape(node: Node, shape: Array) -> Array:
    value = numpy_helper.to_array(node.attributes["value"]) if "value" in node.attributes else np.zeros(1, np.float32)
    return np.full(tuple(shape.tolist()), value.reshape(-1)[0])


OPERATORS: dict[str, Callable[..., Any]] = {
    **{name: _activation for name in ACTIVATIONS if name not in ("Affine", "ScaledTanh", "ThresholdedRelu")},
    **{name: _elementwise(function) for name, function in (
        ("Abs", np.abs), ("Add", np.add), ("And", np.logical_and), ("Equal", np.equal), ("Exp", np.exp),
        ("Greater", np.greater), ("GreaterOrEqual", np.greater_equal), ("Identity", lambda x: x), ("Less", np.less),
        ("LessOrEqual", np.less_equal), ("Log", np.log), ("Mul", np.multiply), ("Neg", np.negative),
        ("Not", np.logical_not), ("Or", np.logical_or), ("Size", lambda x: np.array(x.size)), ("Sqrt", np.sqrt),
        ("Sub", np.subtract), ("Where", np.where),
    )},
    "ArgMax": _argmax,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Div": _divide,
    "Dropout": _dropout,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Gemm": _gemm,
    "LogSoftmax": _log_softmax,
    "MatMul": _matmul,
    "Max": _of_many(np.maximum),
    "Min": _of_many(np.minimum),
    "Pow": _power,
    "ReduceMax": _reduction(_maximum),
    "ReduceMean": _reduction(np.mean),
    "ReduceSum": _reduction(np.sum),
    "Reshape": _reshape,
    "ReverseSequence": _reverse_sequence,
    "Shape": _shape,
    "Slice": _slice,
    "Softmax": _softmax,
    "Split": _split,
    "Squeeze": _squeeze,
    "Sum": _of_many(np.add),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}  # fmt: skip
