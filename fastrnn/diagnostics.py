"""Where gradients vanish and explode: norms of a layer's Jacobians through time, and its graph unrolled over the steps.

``python -m fastrnn.diagnostics OUT.png`` draws `example_flows`. Pictures need matplotlib:
``pip install fastrnn[plot]``.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .checks import as_seed, describe, flag, positive
from .graph import Edge, Node, Unrolled, axes, directions, unrolled
from .layers import GRU, LSTM, RNN, Recurrent
from .parameters import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "Edge", "GradientFlow", "Node", "Unrolled", "example_flows", "gradient_flow", "plot_gradient_flow", "unrolled"
]  # fmt: skip

# The largest state whose Jacobians `gradient_flow` decomposes whole, unless told.
EXACT_STATE = 256
# Rows that are pulled back at once: enough for the kernels to be fast, few enough for little memory.
ROWS = 2048
# Random directions that estimate a Frobenius norm.
PROBES = 64
# What a picture shows; matplotlib's margins go some decades further and have to be numbers, too.
SHOWN = 1e-150, 1e150
# Of central differences, for states of order 1: near the cube root of float64's precision.
DIFFERENCE = 1e-5


@dataclass(frozen=True, eq=False)
class GradientFlow:
    """Norms of the Jacobians of each layer's last state by its earlier ones; `gradient_flow` makes it.

    Attributes:
        layers: the rows' names: "l0", with ``bidirectional`` also "l0_reverse", "l1", ...
        lags: steps back from the last one: 0, 1, ..., T.
        largest: largest singular values (len(layers), T + 1), float64, medians over the batch.
        frobenius: Frobenius norms, likewise.
    """

    layers: tuple[str, ...]
    lags: Array
    largest: Array
    frobenius: Array


def gradient_flow(
    layer: Recurrent,
    x: Any,
    state: Any = None,
    *,
    of: str = "state",
    exact: bool | None = None,
    iterations: int = 20,
    seed: int | None = 0,
) -> GradientFlow:
    """How much of a gradient arrives ``lag`` steps earlier: the norms of d s_T / d s_{T - lag} for lag = 0, ..., T.

    A gradient by the last state s_T reaches s_{T - lag} multiplied by the Jacobian, a product of ``lag`` one-step
    Jacobians. Norms that fall with the lag are vanishing gradients, norms that rise exploding ones (Bengio, Simard
    and Frasconi 1994; Pascanu, Mikolov and Bengio 2013).

    Args:
        layer: an RNN, LSTM or GRU. Dropout of every kind is off, and zoneout is its expectation, as in a call.
        x, state: as for a call of ``layer``.
        of: "state": s is all that a step hands to the next, for the LSTM h and c together, for the past acts through
            both. "h": the Jacobian d h_T / d h_{T - lag} alone. The same for RNN and GRU.
        exact: True builds each Jacobian, by pulling all rows of the identity back at once, and decomposes it: for a
            state of R numbers R rows a step. False needs about iterations * T rows a step instead: the largest
            singular value by power iteration, which approaches it from below, the Frobenius norm from 64 random
            directions (Hutchinson 1989). None: True for R up to 256.
        iterations: of the power iteration.
        seed: of the random directions; None takes the system's.

    Each layer of a stack, and each direction, is measured by itself, with its inputs held fixed: paths through other
    layers do not count. The reverse direction's steps count along its own run, so that its last one is at x[0].

    The norms are the medians over the batch: of a typical sequence, and neither of the one that explodes nor of the
    one that dies. They are computed in float64, whatever the layer's dtype. Where a state on the way is not
    finite, they are NaN.

    Raises TypeError or ValueError for an argument of a wrong type or value.

    >>> import numpy as np
    >>> import fastrnn
    >>> from fastrnn.diagnostics import gradient_flow
    >>> lstm = fastrnn.LSTM(3, 16, num_layers=2, seed=0)
    >>> flow = gradient_flow(lstm, np.ones((20, 5, 3), np.float32))
    >>> flow.layers, flow.largest.shape
    (('l0', 'l1'), (2, 21))
    >>> bool(flow.largest[0, 20] < 0.01 * flow.largest[0, 0])  # its forget gates are about 1/2
    True
    """
    if not isinstance(layer, Recurrent):
        raise TypeError(f"layer: expected an RNN, LSTM or GRU, got {describe(layer)}")
    if of not in ("state", "h"):
        raise ValueError(f"of: expected 'state' or 'h', got {describe(of)}")
    iterations, seed = positive(iterations, "iterations"), as_seed(seed)
    exact = None if exact is None else flag(exact, "exact")
    after = layer(x, state)[1]  # raises for wrong arrays
    x = _batch(np.asarray(x, np.float64), layer.batch_first)
    before = _vectors(tuple(map(np.zeros_like, _tuple(after))) if state is None else state)
    before = before.reshape(len(before), -1, before.shape[-1])  # one sequence is a batch of one

    rng = np.random.default_rng(seed)
    names: list[str] = []
    largest, frobenius = [], []
    for k in range(layer.num_layers):
        outputs = []
        for suffix in directions(layer):
            cell = _Cell(layer, k, suffix)
            inputs = x[::-1] if suffix else x
            states = cell.run(inputs, before[len(names)])
            outputs.append(states[1:, :, : cell.width][:: -1 if suffix else 1])
            size = cell.width if of == "h" else states.shape[-1]
            whole = states.shape[-1] <= EXACT_STATE if exact is None else exact
            with np.errstate(all="ignore"):
                logs = _log_norms(cell, inputs, states, size, None if whole else iterations, rng)
                finite = np.isfinite(states[::-1]).all(axis=-1)
                logs = np.where(np.logical_and.accumulate(finite, axis=0), logs, np.nan)
                norms = np.median(np.exp(logs), axis=-1)
            names.append(f"l{k}{suffix}")
            largest.append(norms[0])
            frobenius.append(norms[1])
        x = np.concatenate(outputs, axis=-1)
    return GradientFlow(tuple(names), np.arange(len(x) + 1), np.stack(largest), np.stack(frobenius))


class _Cell:
    """One direction of one layer as a map of whole states, s_t = F(x_t, s_{t-1}), in float64.

    x is (n, I), s (n, R): h and whatever else a state has, side by side.
    """

    def __init__(self, layer: Recurrent, k: int, suffix: str):
        tail = f"_l{k}{suffix}"
        parameters = {
            f"{name.removesuffix(tail)}_l0": array for name, array in layer.parameters.items() if name.endswith(tail)
        }
        off = {
            "input_size": parameters["weight_ih_l0"].shape[1],
            "num_layers": 1,
            "batch_first": False,
            "bidirectional": False,
            "dropout": 0.0,
            "recurrent_dropout": 0.0,
            "zoneout": 0.0,
            "dtype": np.float64,
        }
        self.layer = type(layer)(**{name: off.get(name, value) for name, value in layer.config.items()})
        self.layer.load_state_dict(parameters)
        # The state that one zero step makes has the sizes of every state.
        parts = _tuple(self.layer(np.zeros((1, off["input_size"])))[1])
        self.cuts = np.cumsum([part.shape[-1] for part in parts])
        self.width = int(self.cuts[0])
        self.kept = np.concatenate([np.full(part.shape[-1], p) for part, p in zip(parts, layer.zoneout)])

    def _state(self, s: Array) -> Any:
        parts = tuple(np.ascontiguousarray(part)[None] for part in np.split(s, self.cuts[:-1], axis=-1))
        return parts if len(parts) > 1 else parts[0]

    def __call__(self, x: Array, s: Array) -> Array:
        new = _vectors(self.layer(x[None], self._state(s))[1])[0]
        return self.kept * s + (1 - self.kept) * new

    def run(self, x: Array, s_0: Array) -> Array:
        """The states s_0, ..., s_T: (T + 1, B, R)."""
        states = [s_0]
        for x_t in x:
            states.append(self(x_t, states[-1]))
        return np.stack(states)

    def pull(self, x: Array, s: Array, u: Array) -> Array:
        """Rows u (n, R) by the Jacobian of each row's own step: u F'(s)."""
        _, pullback = self.layer.vjp(x[None], self._state(s))
        return self.kept * u + _vectors(pullback(None, self._state((1 - self.kept) * u))[1])[0]

    def push(self, x: Array, s: Array, v: Array) -> Array:
        """The Jacobian of each row's own step by columns v (n, R) of norm 1: F'(s) v, by central differences."""
        step = DIFFERENCE * np.maximum(1, np.abs(s).max(axis=-1, keepdims=True)) * v
        ends = self(np.concatenate([x, x]), np.concatenate([s + step, s - step]))
        length = np.linalg.norm(step, axis=-1, keepdims=True)
        return np.where(length > 0, (ends[: len(x)] - ends[len(x) :]) / (2 * length), 0 * v)


def _log_norms(
    cell: _Cell, x: Array, states: Array, size: int, iterations: int | None, rng: np.random.Generator
) -> Array:
    """Logarithms of the largest singular values and of the Frobenius norms, (2, T + 1, B), of the Jacobians' leading
    ``size`` rows and columns; exact if ``iterations`` is None."""
    T, B, R = len(x), x.shape[1], states.shape[-1]
    if iterations is None:
        rows, at_once = np.eye(size, R), size
    else:
        # Orthonormal directions, scaled so that the expectation of rows.T @ rows is the identity.
        k = min(PROBES, size)
        rows, at_once = np.zeros((k, R)), max(k, T)
        rows[:, :size] = np.linalg.qr(rng.standard_normal((size, k)))[0].T * (size / k) ** 0.5
    logs = np.empty((2, T + 1, B))
    for b in range(0, B, max(1, ROWS // at_once)):
        some = slice(b, b + max(1, ROWS // at_once))
        for lag, (pulled, log) in enumerate(_pulled(cell, x[:, some], states[:, some], rows)):
            block, norm = _normalised(pulled[:, :, :size], (1, 2))
            log = log + norm
            logs[1, lag, some] = log
            if iterations is None:
                logs[0, lag, some] = log + np.log(_spectral(block))
        if iterations is not None:
            logs[0, :, some] = _by_power_iteration(cell, x[:, some], states[:, some], size, iterations, rng)
    return logs


def _pulled(cell: _Cell, x: Array, states: Array, rows: Array) -> Iterator[tuple[Array, Array]]:
    """``rows`` (k, R) times the Jacobian of each sequence, lag after lag: (B, k, R) of norm 1, and the norm's log (B).

    The norm is kept apart, as a logarithm, so that no product underflows or overflows on its way.
    """
    B, (k, R) = x.shape[1], rows.shape
    u, log = np.broadcast_to(rows, (B, k, R)), np.zeros(B)
    for t in reversed(range(len(x) + 1)):
        u, norm = _normalised(u, (1, 2))
        log = log + norm
        yield u, log
        if t > 0:
            x_t, s = (np.repeat(a, k, axis=0) for a in (x[t - 1], states[t - 1]))
            u = cell.pull(x_t, s, u.reshape(B * k, R)).reshape(B, k, R)


def _by_power_iteration(
    cell: _Cell, x: Array, states: Array, size: int, iterations: int, rng: np.random.Generator
) -> Array:
    """Logarithms of the largest singular values (T + 1, B), from below: of |u J| for unit rows u ever nearer the best.

    All lags at once. Every lag starts from the last step, so those that are still on their way through a step are the
    rows from some lag on. J v, which only turns u towards J v / |J v|, is by differences; the norm itself is not.
    """
    T, B, R = len(x), x.shape[1], states.shape[-1]
    best = np.full((T, B), -np.inf)
    u = np.zeros((T, B, R))
    u[:, :, :size] = rng.standard_normal((T, B, size))

    def through(move: Any, t: int, a: Array) -> Array:
        """The rows of the lags that reach back past step t, moved through it."""
        n = len(a)
        x_t, s = (np.broadcast_to(b, (n, *b.shape)).reshape(n * B, -1) for b in (x[t], states[t]))
        return move(x_t, s, a.reshape(n * B, R)).reshape(n, B, R)

    for i in range(iterations):
        if i > 0:
            for t in range(T):
                u[T - t - 1 :] = _normalised(through(cell.push, t, u[T - t - 1 :]), -1)[0]
            u[:, :, size:] = 0
        u = _normalised(u, -1)[0]
        logs = np.zeros((T, B))
        for t in reversed(range(T)):
            u[T - t - 1 :], norms = _normalised(through(cell.pull, t, u[T - t - 1 :]), -1)
            logs[T - t - 1 :] += norms
        u[:, :, size:] = 0
        u, norms = _normalised(u, -1)
        best = np.maximum(best, logs + norms)
    return np.concatenate([np.zeros((1, B)), best])  # lag 0: the identity


def _normalised(a: Array, axes: int | tuple[int, ...]) -> tuple[Array, Array]:
    """``a`` scaled to norm 1 over ``axes``, where it is not 0, and the norms' logarithms."""
    largest = np.abs(a).max(axis=axes, keepdims=True)  # whose square may under- or overflow
    a = a / np.where(largest == 0, 1, largest)
    norm = np.linalg.norm(a, axis=axes, keepdims=True)
    return a / np.where(norm == 0, 1, norm), np.squeeze(np.log(largest) + np.log(norm), axes)


def _spectral(a: Array) -> Array:
    """The largest singular values of matrices (B, k, R) of norm 1; NaN for those with a number that is not finite.

    By the eigenvalues of a a^T, in half the time of a decomposition of a: the largest one loses nothing by it.
    """
    finite = np.isfinite(a).all(axis=(1, 2))
    norms = np.full(len(a), np.nan)
    squares = np.linalg.eigvalsh(a[finite] @ a[finite].swapaxes(1, 2))[:, -1]
    norms[finite] = np.sqrt(np.maximum(squares, 0))
    return norms


def _batch(x: Array, batch_first: bool) -> Array:
    """(T, B, I) of what a layer takes."""
    if x.ndim == 2:
        return x[:, None]
    return x.swapaxes(0, 1) if batch_first else x


def _tuple(state: Any) -> tuple[Array, ...]:
    return tuple(state) if isinstance(state, (tuple, list)) else (state,)


def _vectors(state: Any) -> Array:
    """A state's arrays side by side, as float64."""
    return np.concatenate([np.asarray(part, np.float64) for part in _tuple(state)], axis=-1)


def plot_gradient_flow(flows: Mapping[str, GradientFlow], ax: "Axes | None" = None) -> "Axes":
    """Draw the largest singular values over the lag, on a logarithmic axis; flat is good.

    Args:
        flows: what `gradient_flow` returned, by the name in the legend. A flow's layers share a colour.
        ax: matplotlib's axes to draw on; None makes a figure that belongs to no window: it may be made in any thread
            and where there is no screen.

    Returns the axes; ``ax.figure.savefig("flow.png")`` writes the picture. A line ends where the norm leaves
    1e-150 to 1e150.

    Raises TypeError or ValueError for a wrong argument; ImportError without matplotlib.

    >>> import numpy as np
    >>> import fastrnn
    >>> from fastrnn.diagnostics import gradient_flow, plot_gradient_flow
    >>> flow = gradient_flow(fastrnn.LSTM(3, 8, seed=0), np.ones((20, 3), np.float32))
    >>> plot_gradient_flow({"LSTM": flow}).get_yscale()  # doctest: +SKIP
    'log'
    """
    if not isinstance(flows, Mapping):
        raise TypeError(f"flows: expected a dict of GradientFlow, got {describe(flows)}")
    for name, flow in flows.items():
        if not isinstance(flow, GradientFlow):
            raise TypeError(f"flows[{name!r}]: expected a GradientFlow, got {describe(flow)}")
    if not flows:
        raise ValueError("flows: expected at least one GradientFlow, got none")
    ax = axes(ax, 6.4, 4.2)
    styles = ["-", "--", "-.", ":"]
    ax.set_yscale("log")
    ax.axhline(1, color="0.7", linewidth=0.8)
    for i, (name, flow) in enumerate(flows.items()):
        for k, norms in enumerate(flow.largest):
            # A logarithmic axis has no place for 0 and infinity; NaN interrupts the line.
            norms = np.where((norms >= SHOWN[0]) & (norms <= SHOWN[1]), norms, np.nan)
            label = name if len(flow.layers) == 1 else f"{name}, {flow.layers[k]}"
            ax.plot(flow.lags, norms, color=f"C{i % 10}", linestyle=styles[k % len(styles)], label=label)
    ax.set_xlabel("steps back in time")
    ax.set_ylabel("largest singular value of the state's Jacobian")
    ax.legend()
    return ax


def example_flows(T: int = 60, input_size: int = 8, hidden_size: int = 32, seed: int = 0) -> dict[str, GradientFlow]:
    """The textbook's picture: gradients that vanish, explode and hold, for `plot_gradient_flow`.

    Args:
        T: steps.
        input_size: numbers in a step of the input, normally distributed.
        hidden_size: units of each layer, H.
        seed: of parameters and inputs.

    Returns the flows of an RNN as it is initialised, whose gradients vanish; the same RNN with recurrent weights five
    times as large, whose gradients explode; and a GRU and an LSTM, whose gates are biased to keep the state, as Gers,
    Schmidhuber and Cummins (2000) advise for the LSTM's forget gate: theirs hold.

    Raises TypeError or ValueError for an argument of a wrong type or value.
    """
    T, H = positive(T, "T"), positive(hidden_size, "hidden_size")
    x = np.random.default_rng(as_seed(seed)).standard_normal((T, 4, positive(input_size, "input_size")))
    rnn, large, gru, lstm = (kind(input_size, H, dtype=np.float64, seed=seed) for kind in (RNN, RNN, GRU, LSTM))
    large.weight_hh_l0 = 5 * large.weight_hh_l0
    for layer in (gru, lstm):
        with layer.parameters.writable() as arrays:
            arrays["bias_hh_l0"][H : 2 * H] += 3  # z of the GRU, f of the LSTM
    named = {"tanh RNN": rnn, "tanh RNN, weights x 5": large, "GRU, update bias 3": gru, "LSTM, forget bias 3": lstm}
    return {name: gradient_flow(layer, x) for name, layer in named.items()}


def _main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fastrnn.diagnostics", description="Draw gradients that vanish, explode and hold."
    )
    parser.add_argument("out", metavar="OUT.png", help="the picture's file")
    out = parser.parse_args(argv).out
    figure: Any = plot_gradient_flow(example_flows()).figure
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    _main()
