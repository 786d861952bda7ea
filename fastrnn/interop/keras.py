"""Layers of Keras 3: SimpleRNN, LSTM and GRU, and Bidirectional ones, as fastrnn's, from memory and files, and back.

>>> import os
>>> os.environ["KERAS_BACKEND"] = "torch"  # or any other
>>> import keras
>>> import numpy as np
>>> from fastrnn.interop.keras import from_keras
>>> theirs = keras.layers.LSTM(5, return_sequences=True)
>>> theirs.build((None, None, 3))
>>> lstm = from_keras(theirs)
>>> x = np.ones((2, 10, 3), np.float32)  # (B, T, I), as Keras has it
>>> y, (h_n, c_n) = lstm(x)
>>> bool(np.allclose(y, theirs(x).detach(), atol=1e-5))
True

What differs in use:

- A layer here always returns the outputs of all steps and the state. What Keras returns without ``return_sequences`` is
  ``h_n[0]``, of a Bidirectional layer ``np.concatenate(list(h_n), -1)``. ``stateful`` is to hand the state on.
- A Keras mask of sequences padded at their right is ``lengths=mask.sum(1)``. The states are the same; outputs past a
  sequence's end are 0 here, as with Keras's ``zero_output_for_mask``.
- Keras's ``dropout`` drops inputs of a layer, the same ones at all steps, which has no counterpart: it is not taken
  over. ``recurrent_dropout`` is; Keras draws it for each gate anew, fastrnn once for all of them. Neither matters but
  in training. So it is with initializers, regularizers and constraints, which are not taken over.
- Keras multiplies float64 matrices in float32, but on TensorFlow. Here float64 is float64.

The weights: Keras's matrices are the transposed ones; its LSTM's gates come in the same order, i, f, g, o, its GRU's as
z, r, n instead of r, z, n. It has one bias where there are two here, but in a GRU with ``reset_after``.
"""

import os
import warnings
from collections import defaultdict
from typing import Any, overload

import numpy as np

from ..checks import describe, flag
from ..layers import GRU, LSTM, RNN
from ..parameters import Array
from ..recurrent import Recurrent
from .keras_files import Node, Weights, imported, read

GATES = {"SimpleRNN": 1, "GRU": 3, "LSTM": 4}
NONLINEARITIES = {"tanh": "tanh", "relu": "relu", "linear": "identity"}
KINDS = f"an {', '.join(reversed(GATES))}, an RNN of one of their cells, or a Bidirectional of one of these"
# Options in which a layer may differ from the Keras layer that its weights are written into.
MAY_DIFFER = {"num_layers", "batch_first", "dropout", "recurrent_dropout", "zoneout", "dtype"}
MERGES = {"sum": "a + b", "mul": "a * b", "ave": "(a + b) / 2", None: "(a, b)"}


def from_keras(layer: Any) -> Recurrent:
    """A layer with the weights of a Keras layer that has been built.

    Args:
        layer: a `keras.layers.SimpleRNN`, `LSTM` or `GRU`, or an `RNN` of one of their cells, or a `Bidirectional` of
            one of these. If a Bidirectional does not join its directions (``merge_mode`` is not "concat"), there is a
            UserWarning that says how to get what it returns: a layer here always joins them.

    Returns an `RNN`, `LSTM` or `GRU` of one layer, with ``batch_first``, of the dtype of Keras's variables.

    Raises TypeError for what is no Keras layer; ValueError for another kind, one without weights yet, or with options
    that have no counterpart, such as ``go_backwards``, or activations other than Keras's own for LSTM and GRU, and
    tanh, relu and linear for SimpleRNN; ImportError if Keras is missing.
    """
    node, cells = _found(layer)
    _warn_of_merging(node)
    return _convert(node, _values(cells))


def to_keras(layer: Recurrent, return_sequences: bool = True, name: str | None = None) -> Any:
    """A new Keras layer with a layer's weights, options and dtype.

    Args:
        layer: an `RNN`, `LSTM` or `GRU`. Dropout between layers becomes `keras.layers.Dropout`.
        return_sequences: whether the Keras layer returns the outputs of all steps, or the last ones.
        name: the Keras layer's; None takes one of Keras's.

    Returns a `keras.layers.SimpleRNN`, `LSTM` or `GRU`, or a `Bidirectional` of one; of a layer with ``num_layers``
    greater than 1, a `keras.Sequential` of them. Where Keras has one bias, it is the sum of the two.

    Raises TypeError for what is no layer; ValueError for options that Keras lacks: peephole, cell_clip, coupled,
    proj_size, layer_norm, zoneout, and other nonlinearities than tanh, relu and identity; ImportError if Keras is
    missing.

    >>> import os
    >>> os.environ["KERAS_BACKEND"] = "torch"
    >>> import fastrnn
    >>> from fastrnn.interop.keras import to_keras
    >>> gru = fastrnn.GRU(3, 5, bidirectional=True, reset_after=False)
    >>> bidirectional = to_keras(gru, name="encoder")
    >>> bidirectional.name, bidirectional.forward_layer.units, bidirectional.forward_layer.reset_after
    ('encoder', 5, False)
    """
    keras = imported("keras")
    kind, options = _options_of(layer)
    sequences, alone = flag(return_sequences, "return_sequences"), name if layer.num_layers == 1 else None
    stack: list[Any] = []
    for k in range(layer.num_layers):
        options["return_sequences"] = sequences or k + 1 < layer.num_layers
        made = getattr(keras.layers, kind)(layer.hidden_size, name=None if layer.bidirectional else alone, **options)
        if layer.bidirectional:
            made = keras.layers.Bidirectional(made, name=alone, dtype=layer.dtype.name)
        made.build((None, None, layer._inputs_of(k)))
        stack.append(made)
    assign(stack, layer)
    if layer.num_layers == 1:
        return stack[0]
    layers = [keras.Input((None, layer.input_size), dtype=layer.dtype.name), stack[0]]
    for made in stack[1:]:
        layers += [keras.layers.Dropout(layer.dropout, dtype=layer.dtype.name)] if layer.dropout else []
        layers.append(made)
    return keras.Sequential(layers, name=name)


def assign(keras_layer: Any, layer: Recurrent) -> None:
    """Write a layer's weights into Keras layers that have been built, such as those that it came from.

    Args:
        keras_layer: a Keras layer as `from_keras` takes it; for a layer with ``num_layers`` greater than 1, as many in
            a list, or a `keras.Sequential` of them, whose other layers are left as they are.
        layer: an `RNN`, `LSTM` or `GRU`.

    Raises TypeError or ValueError, as `from_keras` and `to_keras` do, and where the two differ in anything but dtype
    and dropout; then nothing has been written.
    """
    keras = imported("keras")
    _options_of(layer)
    given = keras_layer if isinstance(keras_layer, (list, tuple)) else [keras_layer]
    if isinstance(keras_layer, keras.Sequential):
        recurrent = keras.layers.RNN, keras.layers.Bidirectional
        given = [each for each in keras_layer.layers if isinstance(each, recurrent)]
    if len(given) != layer.num_layers:
        raise ValueError(f"keras_layer: expected as many layers as num_layers, {layer.num_layers}, got {len(given)}")
    writes: list[tuple[Any, Array]] = []
    for k, theirs in enumerate(given):
        node, cells = _found(theirs)
        now = _convert(node, _values(cells))
        want = {"class": type(layer).__name__, **layer.config, "input_size": layer._inputs_of(k)}
        got = {"class": type(now).__name__, **now.config}
        for option in [option for option in want if option not in MAY_DIFFER and want[option] != got.get(option)]:
            raise ValueError(
                f"keras_layer: expected {option} {want[option]!r}, as the layer has it, got {got.get(option)!r} in "
                f"{theirs.name!r}"
            )
        for d, cell in enumerate(cells):
            arrays = {kind: layer.parameters[name] for kind, name in layer.names[k, d].items()}
            writes += zip(_variables(cell), _weights_of(layer, arrays))
    for variable, array in writes:
        variable.assign(array)


@overload
def load(
    path: str | os.PathLike[str], name: None = None, *, reset_after: bool | None = None, nonlinearity: str = "tanh"
) -> dict[str, Recurrent]: ...


@overload
def load(
    path: str | os.PathLike[str], name: str, *, reset_after: bool | None = None, nonlinearity: str = "tanh"
) -> Recurrent: ...


def load(
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    reset_after: bool | None = None,
    nonlinearity: str = "tanh",
) -> dict[str, Recurrent] | Recurrent:
    """Layers from a file that Keras 3 wrote, ``.keras`` or ``.weights.h5``; Keras is not needed for it, but h5py is.

    Args:
        path: the file.
        name: of one layer, as Keras has it; None: all that `from_keras` would take. Layers of models in models are
            found, too. Where several have the same name, each goes by its path in the file.
        reset_after, nonlinearity: of GRUs and SimpleRNNs of whose options the file says nothing. A ``.weights.h5``
            file holds arrays only, and so does a ``.keras`` file of a subclassed model. Their shapes tell the cell,
            sizes and directions, and reset_after unless there is no bias. Activations and merge_mode they do not tell:
            they are taken to be Keras's defaults, the activation of SimpleRNN to be ``nonlinearity``.

    Returns the layer ``name``; or a dict of the layers by their names. They are as `from_keras` makes them.

    Raises FileNotFoundError; KeyError if there is no such layer; ValueError for a file of another kind or that is not
    whole, and for layers that `from_keras` would refuse; ImportError if h5py is missing.

    >>> import os, tempfile
    >>> import h5py
    >>> import numpy as np
    >>> from fastrnn.interop.keras import load
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "model.weights.h5")
    ...     with h5py.File(path, "w") as file:  # as Keras does it: keras.layers.GRU(5) on 3 inputs
    ...         for i, shape in enumerate([(3, 15), (5, 15), (2, 15)]):
    ...             file[f"layers/gru/cell/vars/{i}"] = np.ones(shape, np.float32)
    ...     load(path, "gru").bias_ih_l0.shape
    (15,)
    """
    if nonlinearity not in NONLINEARITIES.values():
        raise ValueError(
            f"nonlinearity: expected one of {', '.join(NONLINEARITIES.values())}, got {describe(nonlinearity)}"
        )
    activation = next(theirs for theirs, ours in NONLINEARITIES.items() if ours == nonlinearity)
    if reset_after is not None:
        flag(reset_after, "reset_after")
    nodes, groups, names = read(path)
    # What a file describes as another layer may yet have arrays of these shapes.
    groups = {p: weights for p, weights in groups.items() if p not in nodes or _is_known(nodes[p])}

    paths = defaultdict(list)
    for place in groups:
        paths[nodes[place]["config"]["name"] if place in nodes else names[place]].append(place)
    found = {key if len(places) == 1 else p: p for key, places in paths.items() for p in places}
    if name is not None and name not in found:
        several = f", which of {', '.join(paths[name])}?" if name in paths else ""
        raise KeyError(f"name: expected one of {', '.join(found) or 'no layers'}, got {describe(name)}{several}")
    layers = {}
    for key, place in found.items():
        if name is None or key == name:
            node = nodes[place] if place in nodes else _guess(key, groups[place], reset_after, activation)
            _warn_of_merging(node)
            layers[key] = _convert(node, groups[place])
    return layers if name is None else layers[name]


# From Keras's descriptions and arrays.


def _found(layer: Any) -> tuple[Node, list[Any]]:
    """The description of a Keras layer, and the cell of each direction, if it is one that there is here."""
    keras = imported("keras")
    if not isinstance(layer, keras.layers.Layer):
        raise TypeError(f"layer: expected a Keras layer, got {describe(layer)}")
    node = keras.saving.serialize_keras_object(layer)
    if not _is_known(node):
        inner = node["config"].get("layer")
        of = f" of {inner['class_name']}" if isinstance(inner, dict) else ""
        raise ValueError(f"layer: expected {KINDS}, got {node['class_name']}{of}")
    directions = [layer.forward_layer, layer.backward_layer] if node["class_name"] == "Bidirectional" else [layer]
    cells = [direction.cell for direction in directions]
    if not all(hasattr(cell, "kernel") for cell in cells):
        raise ValueError(f"layer: expected one that has been built or called, got {layer.name!r} without weights")
    for cell in cells:
        _check_dtypes(layer.name, {variable.dtype for variable in _variables(cell)})
    return node, cells


def _values(cells: list[Any]) -> list[Weights]:
    torch = imported("keras").backend.backend() == "torch"

    def value(variable: Any) -> Array:
        # Keras's own conversion of PyTorch's tensors makes NumPy 2 warn.
        return np.array(variable.value.detach().cpu().numpy() if torch else variable.value)

    return [[value(variable) for variable in _variables(cell)] for cell in cells]


def _warn_of_merging(node: Node) -> None:
    mode = node["config"].get("merge_mode", "concat")
    if mode != "concat":
        warnings.warn(
            f"merge_mode of {node['config']['name']!r}: expected 'concat', got {mode!r}: the layer joins the outputs y "
            f"of both directions. With a, b = np.split(y, 2, -1), Keras's are {MERGES[mode]}",
            stacklevel=3,
        )


def _convert(node: Node, weights: list[Weights]) -> Recurrent:
    """The layer for a Keras layer of one direction or two, with the weights of each."""
    config, name = node["config"], node["config"]["name"]
    nodes = [config["layer"], config["backward_layer"]] if node["class_name"] == "Bidirectional" else [node]
    made = [_arguments(direction, name, bool(d)) for d, direction in enumerate(nodes)]
    if made[0] != made[-1]:
        raise ValueError(f"backward_layer of {name!r}: expected the forward layer's options, {made[0]}, got {made[1]}")
    kind, units, arguments = made[0]
    kernel = weights[0][0]
    _check_arrays(name, kind, units, weights, arguments)
    layer = {"SimpleRNN": RNN, "LSTM": LSTM, "GRU": GRU}[kind](
        kernel.shape[0], units, batch_first=True, bidirectional=len(nodes) == 2, dtype=kernel.dtype, **arguments
    )
    for d, arrays in enumerate(weights):
        for parameter, array in _parameters(kind, arguments, arrays).items():
            layer.parameters[layer.names[0, d][parameter]] = array
    return layer


def _arguments(node: Node, name: str, reverse: bool) -> tuple[str, int, dict[str, Any]]:
    """The kind of a Keras layer of one direction, its units, and the arguments that make such a layer here."""
    kind, config = _kind(node), node["config"]
    if node["class_name"] == "RNN":
        config = {**config, **config["cell"]["config"]}
    plain = kind == "SimpleRNN"
    for option, default, values in (
        ("go_backwards", False, (reverse,)),
        ("activation", "tanh", tuple(NONLINEARITIES) if plain else ("tanh",)),
        ("recurrent_activation", "sigmoid", ("sigmoid",)),
    ):
        got = config.get(option, default)
        if got not in values:
            direction = "backward_layer of " if reverse else ""
            raise ValueError(
                f"{option} of {direction}{name!r}: expected {' or '.join(map(repr, values))}, got {describe(got)}"
            )
    arguments = {"bias": config.get("use_bias", True), "recurrent_dropout": config.get("recurrent_dropout", 0.0)}
    if plain:
        arguments["nonlinearity"] = NONLINEARITIES[config.get("activation", "tanh")]
    if kind == "GRU":
        arguments["reset_after"] = config.get("reset_after", True)
    return kind, config["units"], arguments


def _kind(node: Node) -> str:
    """The name of the Keras layer of one direction that this describes, or "" if it is another."""
    described = node["config"].get("cell") if node["class_name"] == "RNN" else node
    if not isinstance(described, dict) or not _is_keras(described) or not _is_keras(node):
        return ""
    kind = described["class_name"] if described is node else described["class_name"].removesuffix("Cell")
    return kind if kind in GATES else ""


def _is_known(node: Node) -> bool:
    """Whether there is such a layer here, of one direction or two."""
    if node["class_name"] != "Bidirectional":
        return bool(_kind(node))
    inner = node["config"].get("layer"), node["config"].get("backward_layer")
    return _is_keras(node) and all(isinstance(each, dict) and _kind(each) for each in inner)


def _is_keras(node: Node) -> bool:
    return str(node.get("module")).split(".")[0] == "keras" and not node.get("registered_name")


def _check_arrays(name: str, kind: str, units: int, weights: list[Weights], arguments: dict[str, Any]) -> None:
    """Raise ValueError unless the arrays are of this kind of layer."""
    inputs, gates = weights[0][0].shape[0], GATES[kind] * units
    shapes: list[tuple[int, ...]] = [(inputs, gates), (units, gates)]
    if arguments["bias"]:
        shapes.append((2, gates) if arguments.get("reset_after") else (gates,))
    for arrays in weights:
        got = [array.shape for array in arrays]
        if got != shapes or min(inputs, units) < 1:
            raise ValueError(f"weights of {name!r}: expected arrays of shapes {shapes}, got {got}")
        _check_dtypes(name, {array.dtype.name for array in arrays})


def _check_dtypes(name: str, dtypes: set[str]) -> None:
    if dtypes not in ({"float32"}, {"float64"}):
        raise ValueError(f"dtype of {name!r}: expected float32 or float64, got {', '.join(sorted(dtypes))}")


def _parameters(kind: str, arguments: dict[str, Any], arrays: Weights) -> dict[str, Array]:
    """Parameters of one direction, from Keras's arrays."""
    kernel, recurrent, *bias = arrays
    parameters = {"weight_ih": kernel.T, "weight_hh": recurrent.T}
    if bias and arguments.get("reset_after"):
        parameters |= {"bias_ih": bias[0][0], "bias_hh": bias[0][1]}
    elif bias:
        parameters |= {"bias_ih": bias[0], "bias_hh": np.zeros_like(bias[0])}
    return {name: _reorder(kind, array) for name, array in parameters.items()}


def _reorder(kind: str, array: Array) -> Array:
    """Rows of gates, from Keras's order to fastrnn's, or back: a GRU's first two change places."""
    if kind != "GRU":
        return array
    z, r, n = np.split(array, 3)
    return np.concatenate([r, z, n])


def _guess(name: str, weights: list[Weights], reset_after: bool | None, activation: str) -> Node:
    """A description of a layer from nothing but its arrays."""
    _, recurrent, *bias = weights[0]
    units, gates = recurrent.shape
    kind = next(kind for kind, n in GATES.items() if gates == n * units)
    config = {"name": name, "units": units, "use_bias": bool(bias)}
    if kind == "GRU":
        config["reset_after"] = bias[0].ndim == 2 if bias else reset_after
        if config["reset_after"] is None:
            raise ValueError(
                f"reset_after: expected True or False, which the arrays of {name!r}, a GRU without bias, do not tell, "
                "got None"
            )
    if kind == "SimpleRNN":
        config["activation"] = activation
    node = {"module": "keras.layers", "class_name": kind, "config": config}
    if len(weights) == 1:
        return node
    both = {"name": name, "merge_mode": "concat", "layer": node}
    both["backward_layer"] = {**node, "config": {**config, "go_backwards": True}}
    return {"module": "keras.layers", "class_name": "Bidirectional", "config": both}


# To Keras's.


def _options_of(layer: Recurrent) -> tuple[str, dict[str, Any]]:
    """The name of Keras's kind of layer, and the options that make such a one; ValueError if there is none."""
    kind = {RNN: "SimpleRNN", LSTM: "LSTM", GRU: "GRU"}.get(type(layer))  # type: ignore[call-overload]
    if kind is None:
        raise TypeError(f"layer: expected an RNN, LSTM or GRU, got {describe(layer)}")
    for option in ("peephole", "coupled", "layer_norm", "cell_clip", "proj_size", "zoneout"):
        if layer.config.get(option):
            raise ValueError(f"{option}: expected none, which Keras's {kind} lacks, got {layer.config[option]!r}")
    options = {"use_bias": layer.bias, "recurrent_dropout": layer.recurrent_dropout, "dtype": layer.dtype.name}
    if isinstance(layer, GRU):
        options["reset_after"] = layer.reset_after
    if isinstance(layer, RNN):
        activations = {ours: theirs for theirs, ours in NONLINEARITIES.items()}
        if not isinstance(layer.nonlinearity, str):
            raise ValueError(f"nonlinearity: expected one of {', '.join(activations)}, got a pair of functions")
        options["activation"] = activations[layer.nonlinearity]
    return kind, options


def _variables(cell: Any) -> list[Any]:
    return [cell.kernel, cell.recurrent_kernel] + ([] if cell.bias is None else [cell.bias])


def _weights_of(layer: Recurrent, arrays: dict[str, Array]) -> Weights:
    """Keras's arrays, from the parameters of one direction."""
    kind, _ = _options_of(layer)
    arrays = {name: _reorder(kind, array) for name, array in arrays.items()}
    weights = [arrays["weight_ih"].T, arrays["weight_hh"].T]
    if layer.bias:
        biases = arrays["bias_ih"], arrays["bias_hh"]
        weights.append(np.stack(biases) if layer.config.get("reset_after") else sum(biases))
    return weights
