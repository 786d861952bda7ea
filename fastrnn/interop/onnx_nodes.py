"""ONNX's recurrent nodes as layers: fastrnn's where they can say the same, or the operators' equations in NumPy.

Equations, defaults, shapes and the names of inputs are those of the operators RNN, LSTM and GRU
(https://onnx.ai/onnx/operators). What the specification leaves open is as in ONNX Runtime: ``clip`` cuts the sums of
gates, not the cell state; ``activation_alpha`` and ``activation_beta`` have numbers only for functions that take them.
"""

from collections.abc import Callable, Mapping
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np

from .. import layers
from ..checks import DTYPES, as_array, as_checked, as_lengths
from ..parameters import Array
from ..recurrent import Recurrent
from .onnx_operators import ACTIVATIONS, Node, reverse

Layer = Callable[..., tuple[Array, Any]]

INPUTS = {
    "RNN": ("X", "W", "R", "B", "sequence_lens", "initial_h"),
    "LSTM": ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P"),
    "GRU": ("X", "W", "R", "B", "sequence_lens", "initial_h"),
}
WEIGHTS = ("W", "R", "B", "P")
STATES = {"RNN": ("initial_h",), "LSTM": ("initial_h", "initial_c"), "GRU": ("initial_h",)}
# The gates in the operators' order, in fastrnn's, and the operators' functions.
GATES = {"RNN": "h", "LSTM": "iofg", "GRU": "zrn"}
OUR_GATES = {"RNN": "h", "LSTM": "ifgo", "GRU": "rzn"}
FUNCTIONS = {"RNN": ["Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"]}
DIRECTIONS = {"forward": 1, "reverse": 1, "bidirectional": 2}


class Applied(NamedTuple):
    """An activation function with its parameters."""

    name: str
    parameters: tuple[float, ...] = ()

    def __call__(self, x: Array) -> Array:
        return ACTIVATIONS[self.name].function(x, *self.parameters)


# What fastrnn's RNN calls them.
NONLINEARITIES = {Applied("Tanh"): "tanh", Applied("Relu"): "relu", Applied("Affine", (1.0, 0.0)): "identity"}


class Options(NamedTuple):
    """A node's attributes, checked. ``functions`` are those of each direction."""

    directions: int
    reverse: bool
    functions: list[list[Applied]]
    clip: float | None
    batch_first: bool
    coupled: bool
    reset_after: bool


class RecurrentNode:
    """A node as a graph runs it: a layer, between arrays shaped as the operator has them.

    ``inputs`` and ``outputs`` are names, as a `Node` has them, but without those of weights.
    """

    def __init__(self, node: Node, constants: Mapping[str, Array]):
        self.node, self.outputs = node, node.outputs
        self.inputs = tuple(key for name, key in zip(INPUTS[node.op], node.inputs) if name not in WEIGHTS)
        options = _options(node)
        weights = _weights(node, constants, options.directions)
        self.dtype, self.hidden_size, self.input_size = weights["W"].dtype, weights["R"].shape[2], weights["W"].shape[2]
        self.directions, self.batch_first = options.directions, options.batch_first
        self.layer: Layer = _fast_layer(node.op, weights, options) or EquationsLayer(node.op, weights, options)
        if options.reverse:
            self.layer = Reversed(self.layer)

    def __str__(self) -> str:
        return str(self.node)

    def __call__(self, X: Array, lengths: Array | None = None, *initial: Array | None) -> tuple[Array, ...]:
        D, H = self.directions, self.hidden_size
        if X.dtype != self.dtype or X.ndim != 3 or X.shape[2] != self.input_size:
            first = "B, T" if self.batch_first else "T, B"
            raise (TypeError if X.dtype != self.dtype else ValueError)(
                f"X: expected shape ({first}, {self.input_size}) and dtype {self.dtype}, got {X.shape} and {X.dtype}"
            )
        B = X.shape[0 if self.batch_first else 1]
        state: Any = None
        if any(s is not None for s in initial):
            shape = (B, D, H) if self.batch_first else (D, B, H)
            given = [
                np.zeros(shape, self.dtype) if s is None else as_checked(s, name, self.dtype, shape)
                for name, s in zip_longest(STATES[self.node.op], initial)
            ]
            given = [s.swapaxes(0, 1) for s in given] if self.batch_first else given
            state = given if self.node.op == "LSTM" else given[0]
        y, state = self.layer(X, state, lengths)
        y, after = y.reshape(*y.shape[:2], D, H), state if self.node.op == "LSTM" else (state,)
        if self.batch_first:
            return y, *(s.swapaxes(0, 1) for s in after)
        return y.swapaxes(1, 2), *after


class Reversed:
    """A layer of one direction that reads each sequence from its end to its beginning; called as ``layer`` is."""

    def __init__(self, layer: Any):
        self.layer, self.batch_first = layer, layer.batch_first

    def __repr__(self) -> str:
        return f"Reversed({self.layer!r})"

    def __call__(self, x: Array, state: Any = None, lengths: Any = None) -> tuple[Array, Any]:
        x = as_array(x, "x")
        if x.ndim not in (2, 3) or 0 in x.shape:
            return self.layer(x, state, lengths)  # which says what is wrong
        y, state = self.layer(self._backwards(x, lengths), state, lengths)
        return self._backwards(y, lengths), state

    def _backwards(self, x: Array, lengths: Any) -> Array:
        swap = self.batch_first and x.ndim == 3
        sequences = x[:, None] if x.ndim == 2 else x.swapaxes(0, 1) if swap else x
        T, B = sequences.shape[:2]
        lengths = np.full(B, T) if lengths is None else as_lengths(lengths, "lengths", T, B)
        sequences = reverse(sequences, lengths)
        return sequences[:, 0] if x.ndim == 2 else sequences.swapaxes(0, 1) if swap else sequences


class EquationsLayer:
    """A layer by the operators' equations, one step after another in NumPy; called as fastrnn's layers are.

    It is there for what the fast layers lack: other activation functions, and ``clip`` of RNN and GRU. Inference only.
    """

    def __init__(self, op: str, weights: Mapping[str, Array], options: Options):
        self.op, self.weights, self.options = op, weights, options
        self.dtype, self.batch_first = weights["W"].dtype, options.batch_first
        self.directions, _, self.input_size = weights["W"].shape
        self.hidden_size, self.states = weights["R"].shape[2], 2 if op == "LSTM" else 1
        self.clip = np.inf if options.clip is None else options.clip

    def __repr__(self) -> str:
        return (
            f"EquationsLayer({self.op}, input_size={self.input_size}, hidden_size={self.hidden_size}, "
            f"functions={self.options.functions}, clip={self.options.clip})"
        )

    def __call__(self, x: Array, state: Any = None, lengths: Any = None) -> tuple[Array, Any]:
        """Run over a sequence; arguments and results are those of `fastrnn.recurrent.Recurrent`'s call."""
        x = as_array(x, "x")
        batched = x.ndim == 3
        x = as_checked(x, "x", self.dtype, (None, None, self.input_size) if batched else (None, self.input_size))
        x = x[:, None] if not batched else x.swapaxes(0, 1) if self.batch_first else x
        T, B, _ = x.shape
        shape = (self.directions, B, self.hidden_size) if batched else (self.directions, self.hidden_size)
        if state is None:
            state = tuple(np.zeros(shape, self.dtype) for _ in range(self.states))
        elif self.states == 1:
            state = (state,)
        elif not isinstance(state, (tuple, list)) or len(state) != self.states:
            raise TypeError(f"state: expected a tuple of {self.states} arrays, got {type(state).__name__}")
        before = [as_checked(s, "state", self.dtype, shape).reshape(-1, B, self.hidden_size) for s in state]
        lengths = np.full(B, T) if lengths is None else as_lengths(lengths, "lengths", T, B)
        ys, after = [], []
        with np.errstate(all="ignore"):
            for d in range(self.directions):
                y, states = self._run(d, reverse(x, lengths) if d else x, [s[d] for s in before], lengths)
                ys.append(reverse(y, lengths) if d else y)
                after.append(states)
        y = np.concatenate(ys, 2)
        y = y[:, 0] if not batched else y.swapaxes(0, 1) if self.batch_first else y
        state = tuple(np.stack(s).reshape(shape) for s in zip(*after))
        return y, state if self.states == 2 else state[0]

    def _run(self, d: int, x: Array, states: list[Array], lengths: Array) -> tuple[Array, list[Array]]:
        """One direction over x (T, B, I), from the first step on. Returns y (T, B, H) and the states (B, H)."""
        steps: dict[str, Callable[..., tuple[Array, ...]]] = {"RNN": self._rnn, "LSTM": self._lstm, "GRU": self._gru}
        step = steps[self.op]
        W, R = self.weights["W"][d], self.weights["R"][d]
        Wb, Rb = np.split(self.weights["B"][d], 2) if "B" in self.weights else np.zeros((2, len(W)), self.dtype)
        P = np.split(self.weights["P"][d] if "P" in self.weights else np.zeros(3 * self.hidden_size, self.dtype), 3)
        sums = x @ W.T + Wb
        y = np.zeros((*x.shape[:2], self.hidden_size), self.dtype)
        for t in range(len(x)):
            runs = (t < lengths)[:, None]
            new = step(self.options.functions[d], sums[t], R, Rb, P, *states)
            states = [np.where(runs, s_new, s) for s, s_new in zip(states, new)]
            y[t] = np.where(runs, new[0], 0)
        return y, states

    def _cut(self, a: Array) -> Array:
        return np.clip(a, -self.clip, self.clip)

    # A step each, from Xt W^T + Wb to Ht, of the functions f, g, h.

    def _rnn(self, functions: list[Applied], sums: Array, R: Array, Rb: Array, P: Any, h: Array) -> tuple[Array, ...]:
        (f,) = functions
        return (f(self._cut(sums + h @ R.T + Rb)),)

    def _lstm(
        self, functions: list[Applied], sums: Array, R: Array, Rb: Array, P: Any, h: Array, c: Array
    ) -> tuple[Array, ...]:
        f, g, last = functions
        a_i, a_o, a_f, a_c = np.split(sums + h @ R.T + Rb, 4, axis=1)
        P_i, P_o, P_f = P
        i = f(self._cut(a_i + P_i * c))
        forget = 1 - i if self.options.coupled else f(self._cut(a_f + P_f * c))
        c = forget * c + i * g(self._cut(a_c))
        o = f(self._cut(a_o + P_o * c))
        return o * last(c), c

    def _gru(self, functions: list[Applied], sums: Array, R: Array, Rb: Array, P: Any, h: Array) -> tuple[Array, ...]:
        f, g = functions
        R_zr, R_h = np.split(R, [2 * self.hidden_size])
        Rb_zr, Rb_h = np.split(Rb, [2 * self.hidden_size])
        a_zr, a_h = np.split(sums, [2 * self.hidden_size], axis=1)
        z, r = np.split(f(self._cut(a_zr + h @ R_zr.T + Rb_zr)), 2, axis=1)
        product = r * (h @ R_h.T + Rb_h) if self.options.reset_after else (r * h) @ R_h.T + Rb_h
        n = g(self._cut(a_h + product))
        return ((1 - z) * n + z * h,)


def _fast_layer(op: str, weights: Mapping[str, Array], options: Options) -> Recurrent | None:
    """fastrnn's own layer that computes the same, if there is one."""
    functions, *others = options.functions
    if any(other != functions for other in others) or (options.clip is not None and op != "LSTM"):
        return None
    given: dict[str, Any]
    if op == "RNN":
        if functions[0] not in NONLINEARITIES:
            return None
        given = {"nonlinearity": NONLINEARITIES[functions[0]]}
    elif functions != [Applied(name) for name in FUNCTIONS[op]]:
        return None
    elif op == "LSTM":
        given = {"peephole": "P" in weights, "cell_clip": options.clip, "coupled": options.coupled}
    else:
        given = {"reset_after": options.reset_after}
    layer: Recurrent = getattr(layers, op)(
        weights["W"].shape[2],
        weights["R"].shape[2],
        bias="B" in weights,
        batch_first=options.batch_first,
        bidirectional=options.directions == 2,
        dtype=weights["W"].dtype,
        seed=0,
        **given,
    )
    parameters = {}
    for d in range(options.directions):
        suffix = "_l0_reverse" if d else "_l0"
        for kind, array in _our_weights(op, {name: a[d] for name, a in weights.items()}, options.coupled).items():
            parameters[kind + suffix] = array
    layer.load_state_dict(parameters)
    return layer


def _our_weights(op: str, weights: Mapping[str, Array], coupled: bool) -> dict[str, Array]:
    """A direction's weights by fastrnn's names, gates in its order.

    Coupled, the operator has i and f = 1 - i, and fastrnn f and i = 1 - f: of either, the other's negative sum.
    """
    ours = {"weight_ih": weights["W"], "weight_hh": weights["R"]}
    if "B" in weights:
        ours["bias_ih"], ours["bias_hh"] = np.split(weights["B"], 2)
    for name, array in ours.items():
        gates = dict(zip(GATES[op], np.split(array, len(GATES[op]))))
        if coupled:
            gates["f"] = -gates.pop("i")
        ours[name] = np.concatenate([gates[gate] for gate in OUR_GATES[op] if gate in gates])
    if "P" in weights:
        P_i, P_o, P_f = np.split(weights["P"], 3)
        peepholes = {"f": -P_i, "o": P_o} if coupled else {"i": P_i, "f": P_f, "o": P_o}
        ours |= {f"weight_c{gate}": array for gate, array in peepholes.items()}
    return ours


def _options(node: Node) -> Options:
    attributes = node.attributes
    direction, layout, clip = (attributes.get(*a) for a in (("direction", "forward"), ("layout", 0), ("clip", None)))
    if direction not in DIRECTIONS:
        raise ValueError(f"direction of {node}: expected one of {', '.join(DIRECTIONS)}, got {direction!r}")
    if layout not in (0, 1):
        raise ValueError(f"layout of {node}: expected 0 or 1, got {layout}")
    if clip is not None and not 0 < clip < np.inf:
        raise ValueError(f"clip of {node}: expected a finite number greater than 0, got {clip}")
    return Options(
        directions=DIRECTIONS[direction],
        reverse=direction == "reverse",
        functions=_functions(node, DIRECTIONS[direction]),
        clip=clip,
        batch_first=layout == 1,
        coupled=bool(attributes.get("input_forget", 0)),
        reset_after=bool(attributes.get("linear_before_reset", 0)),
    )


def _functions(node: Node, directions: int) -> list[list[Applied]]:
    """The activation functions of each direction."""
    count = len(FUNCTIONS[node.op])
    names = node.attributes.get("activations") or FUNCTIONS[node.op] * directions
    if len(names) != count * directions:
        raise ValueError(f"activations of {node}: expected {count * directions} functions, got {len(names)}")
    spelled = {name.lower(): name for name in ACTIVATIONS}
    numbers = {kind: iter(node.attributes.get(f"activation_{kind}", ())) for kind in ("alpha", "beta")}
    functions = []
    for given in names:
        name = spelled.get(given.lower())
        if name is None:
            raise ValueError(f"activations of {node}: expected some of {', '.join(ACTIVATIONS)}, got {given!r}")
        parameters = []
        for kind, default in ACTIVATIONS[name].defaults.items():
            parameter = next(numbers[kind], default)
            if parameter is None:
                raise ValueError(f"activation_{kind} of {node}: expected a number for {name}, which has no default")
            parameters.append(parameter)
        functions.append(Applied(name, tuple(parameters)))
    return [functions[d * count : (d + 1) * count] for d in range(directions)]


def _weights(node: Node, constants: Mapping[str, Array], D: int) -> dict[str, Array]:
    """The weights that the node has, by the operator's names for them, each (directions, ...)."""
    weights = {}
    keys = {name: key for name, key in zip(INPUTS[node.op], node.inputs) if name in WEIGHTS and key}
    if not {"W", "R"} <= keys.keys():
        raise ValueError(f"W, R of {node}: expected both, got {', '.join(keys) or 'none'}")
    for name, key in keys.items():
        if key not in constants:
            raise ValueError(
                f"{name} of {node}: expected an initializer or what is computed from such, got {key!r}, which depends "
                "on the graph's inputs or on operators that are not supported"
            )
        weights[name] = constants[key]
        if weights[name].dtype not in DTYPES or weights[name].dtype != weights["W"].dtype:
            expected = "float32 or float64" if name == "W" else weights["W"].dtype
            raise TypeError(f"{name} of {node}: expected dtype {expected}, got {weights[name].dtype}")
    if weights["W"].ndim != 3 or weights["R"].ndim != 3:
        got = ", ".join(f"{name} {weights[name].shape}" for name in "WR")
        raise ValueError(f"W, R of {node}: expected 3 dimensions each, got {got}")
    G, H, I = len(GATES[node.op]), weights["R"].shape[2], weights["W"].shape[2]
    shapes = {"W": (D, G * H, I), "R": (D, G * H, H), "B": (D, 2 * G * H), "P": (D, 3 * H)}
    for name, array in weights.items():
        if array.shape != shapes[name] or 0 in array.shape:
            raise ValueError(f"{name} of {node}: expected shape {shapes[name]}, got {array.shape}")
    if node.attributes.get("hidden_size", H) != H:
        raise ValueError(f"hidden_size of {node}: expected {H}, as R has, got {node.attributes['hidden_size']}")
    return weights
