"""Recurrent layers: stacking, dropout between layers, calls and vector-Jacobian products.

`Recurrent` is all that the layers share; a layer says how its cell's kernels are called.
"""

import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import numpy as np

from . import batching
from .checks import as_array, as_kernel_array, as_seed, describe, flag, float_dtype, positive, probability
from .kernels import lstm as lstm_kernels
from .kernels.gemm import multiply_address
from .kernels.tile import LANES_OF, ROW_PANELS, VECS
from .parameters import Array, Module, Parameters, read_only

Gradients = dict[str, Array]
Pullback = Callable[..., tuple[Array, Any, Gradients]]
Backward = Callable[[Array, list[Array], list[Array]], tuple[Array, Gradients]]

# Rows of the batch, over time steps, whose input projections are computed at once: enough for tall tiles, few enough
# that the gates are still in the second-level cache when the recurrence adds to them.
ROWS_FORWARD = 48
# The same for a single sequence: so many steps give time for one row of rider tiles.
ROWS_FORWARD_ALONE = ROW_PANELS * VECS + 1
# Rows over which the gates' derivatives are gathered before the weights' gradients take them up.
ROWS_BACKWARD = 512


class Recurrent(Module):
    """What recurrent layers share. A layer says how many ``GATES`` and ``STATES`` it has and runs its kernels.

    Inside, arrays are (T, B, features) and a state is a tuple of arrays (num_layers, B, hidden_size).
    """

    GATES: int
    STATES: int
    parameters: Parameters

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        dtype: Any = np.float32,
        seed: int | None = None,
    ):
        self.input_size = positive(input_size, "input_size")
        self.hidden_size = positive(hidden_size, "hidden_size")
        self.num_layers = positive(num_layers, "num_layers")
        self.bias, self.batch_first = flag(bias, "bias"), flag(batch_first, "batch_first")
        self.dropout = probability(dropout, "dropout")
        self.dtype = float_dtype(dtype)
        if self.dropout and self.num_layers == 1:
            warnings.warn("dropout acts between layers: with num_layers=1 it does nothing", stacklevel=2)
        self.config = {
            "input_size": self.input_size,
            "hidden_size": self.hidden_size,
            "num_layers": self.num_layers,
            "bias": self.bias,
            "batch_first": self.batch_first,
            "dropout": self.dropout,
            "dtype": self.dtype.name,
        }
        self._rng = np.random.default_rng(as_seed(seed))
        bound = self.hidden_size**-0.5
        self.parameters = Parameters(
            {name: self._rng.uniform(-bound, bound, shape).astype(self.dtype) for name, shape in self._shapes()}
        )

    def _shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        gates, H = self.GATES, self.hidden_size
        for k in range(self.num_layers):
            yield f"weight_ih_l{k}", (gates * H, self.input_size if k == 0 else H)
            yield f"weight_hh_l{k}", (gates * H, H)
            if self.bias:
                yield f"bias_ih_l{k}", (gates * H,)
                yield f"bias_hh_l{k}", (gates * H,)

    def _weights(self, k: int) -> tuple[Array, Array, Array, Array]:
        """W_ih, W_hh, b_ih, b_hh of a layer, all of one Numba type."""
        arrays = [self.parameters[f"weight_ih_l{k}"], self.parameters[f"weight_hh_l{k}"]]
        if self.bias:
            arrays += [self.parameters[f"bias_ih_l{k}"], self.parameters[f"bias_hh_l{k}"]]
        else:
            arrays += [np.zeros(self.GATES * self.hidden_size, self.dtype)] * 2
        w_ih, w_hh, b_ih, b_hh = map(read_only, arrays)
        return w_ih, w_hh, b_ih, b_hh

    def _inputs(self, x: Array, state: Any) -> tuple[Array, tuple[Array, ...], bool]:
        """The arguments, checked and laid out as the kernels read them, and whether they were a batch."""
        x = x if type(x) is np.ndarray else as_array(x, "x")
        batched = x.ndim == 3
        if not batched and x.ndim != 2:
            raise ValueError(f"x: expected 3 dimensions (a batch) or 2 (one sequence), got shape {x.shape}")
        T, B = x.shape[0] or None, x.shape[1] or None  # None: any size but this
        x = as_kernel_array(x, "x", self.dtype, (T, B, self.input_size) if batched else (T, self.input_size))
        x = self._time_first(x, batched)
        return x, self._state_arrays(state, "state", x.shape[1], batched), batched

    def _state_arrays(self, state: Any, name: str, batch: int, batched: bool) -> tuple[Array, ...]:
        shape = (self.num_layers, batch, self.hidden_size)
        if state is None:
            return tuple([np.zeros(shape, self.dtype) for _ in range(self.STATES)])
        if self.STATES == 1:
            state = (state,)
        elif not isinstance(state, (tuple, list)) or len(state) != self.STATES:
            raise TypeError(f"{name}: expected a tuple of {self.STATES} arrays, got {describe(state)}")
        if batched:
            return tuple([as_kernel_array(s, name, self.dtype, shape) for s in state])
        return tuple([as_kernel_array(s, name, self.dtype, shape[::2]).reshape(shape) for s in state])

    def _time_first(self, x: Array, batched: bool) -> Array:
        """What the user gave, with three dimensions, as the kernels read it: the inverse of `_sequence`."""
        if not batched:
            return x[:, None]
        return np.ascontiguousarray(x.swapaxes(0, 1)) if self.batch_first else x

    def _sequence(self, y: Array, batched: bool) -> Array:
        """An output sequence as the user gave the input."""
        if not batched:
            return y[:, 0]
        return y.swapaxes(0, 1) if self.batch_first else y

    def _state(self, state: tuple[Array, ...], batched: bool) -> Any:
        state = state if batched else tuple(s[:, 0] for s in state)
        return state if self.STATES > 1 else state[0]

    def __call__(self, x: Array, state: Any = None) -> tuple[Array, Any]:
        """Run over a sequence, for inference: dropout is off.

        Args:
            x: (T, B, I), or (B, T, I) with ``batch_first``, or one sequence (T, I).
            state: before the first step; each array of it (num_layers, B, H), or (num_layers, H) for one sequence.
                None stands for zeros.

        Returns ``y, state``: the last layer's outputs, shaped as ``x`` with H in place of I, and the state after the
        last step, with which the next call continues.

        Raises TypeError or ValueError for arrays of a wrong dtype or shape.
        """
        x, before, batched = self._inputs(x, state)
        if len(x) == 1 and x.shape[1] < batching.ROWS_OF_A_SHARE:
            x, after = self._step(x[0], before)
        else:
            after = tuple([np.empty_like(s) for s in before])
            for k in range(self.num_layers):
                x, _ = self._forward(k, x, [s[k] for s in before], [s[k] for s in after], save=False)
        return self._sequence(x, batched), self._state(after, batched)

    def vjp(self, x: Array, state: Any = None, rng: np.random.Generator | None = None) -> tuple[Any, Pullback]:
        """Run over a sequence, for training, and remember what backpropagation through time needs.

        Args:
            x, state: as for a call.
            rng: draws the dropout masks; None takes the layer's own, seeded by ``seed``.

        Returns ``(y, state), pullback``. ``pullback(dy, dstate=None)`` takes the gradients of a loss by y and by the
        state after the last step, shaped as they are (None for zeros), and returns ``dx, dstate_0, grads``: the
        gradients by x, by the state before the first step, and by each parameter, a dict by name. It reads nothing
        that later calls change: it may be called again, from any thread, and after the parameters have moved on.

        Raises TypeError or ValueError for arrays of a wrong dtype or shape.
        """
        if rng is not None and not isinstance(rng, np.random.Generator):
            raise TypeError(f"rng: expected a numpy.random.Generator, got {describe(rng)}")
        x, before, batched = self._inputs(x, state)
        after = tuple([np.empty_like(s) for s in before])
        shape_y, shape_x = (*x.shape[:2], self.hidden_size), x.shape
        backwards: list[tuple[Backward, Callable[[Array], Array] | None]] = []
        for k in range(self.num_layers):
            dropped = None
            if k > 0 and self.dropout > 0:
                x, dropped = drop(x, self.dropout, rng or self._rng)
            x, backward = self._forward(k, x, [s[k] for s in before], [s[k] for s in after], save=True)
            backwards.append((backward, dropped))

        def pullback(dy: Array | None, dstate: Any = None) -> tuple[Array, Any, Gradients]:
            if dy is None:
                d = np.zeros(shape_y, self.dtype)
            else:
                shape = self._sequence(np.broadcast_to(0, shape_y), batched).shape
                d = self._time_first(as_kernel_array(dy, "dy", self.dtype, shape), batched)
            d_after = self._state_arrays(dstate, "dstate", shape_y[1], batched)
            d_before = tuple(np.empty_like(s) for s in d_after)
            gradients: Gradients = {}
            for k in reversed(range(self.num_layers)):
                backward, dropped = backwards[k]
                d, layer_gradients = backward(d, [s[k] for s in d_after], [s[k] for s in d_before])
                gradients = {**layer_gradients, **gradients}
                if dropped is not None:
                    d = dropped(d)
            return self._sequence(d.reshape(shape_x), batched), self._state(d_before, batched), gradients

        return (self._sequence(x, batched), self._state(after, batched)), pullback

    def _forward(self, k: int, x: Array, before: list[Array], after: list[Array], save: bool) -> tuple[Array, Any]:
        """Run layer k. Writes ``after``. Returns its outputs and, if ``save``, its backward pass, a `Backward`."""
        raise NotImplementedError

    def _step(self, x: Array, before: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
        """One step of all layers on the calling thread. x (B, I). Returns y (1, B, H) and the state after it."""
        raise NotImplementedError


class LSTM(Recurrent):
    """A stack of long short-term memory layers: `torch.nn.LSTM` on NumPy arrays.

    i, f, o = sigmoid(W_i* x + b_i* + W_h* h' + b_h*), g = tanh(likewise), c = f * c' + i * g, h = o * tanh(c)
    (Hochreiter and Schmidhuber 1997; the forget gate: Gers, Schmidhuber and Cummins 2000).

    Args:
        input_size: numbers in a step of the input, I.
        hidden_size: units of each layer, H.
        num_layers: layers, each of which reads the outputs of the one before.
        bias: whether there are biases.
        batch_first: whether a batch has shape (B, T, I) instead of (T, B, I).
        dropout: the probability with which `vjp`, for training, drops each output of each layer but the last.
        dtype: float32 or float64: that of parameters, inputs and outputs.
        seed: of the initial parameters, uniform within 1/sqrt(H) of 0, and of dropout; None takes the system's.

    The state is ``(h, c)``. Parameters, as attributes and in `state_dict`: ``weight_ih_l{k}`` (4 H, I, or 4 H, H for
    k > 0), ``weight_hh_l{k}`` (4 H, H), ``bias_ih_l{k}`` and ``bias_hh_l{k}`` (4 H), with the gates in the order
    i, f, g, o: names, shapes and order are PyTorch's.

    Raises TypeError or ValueError for an argument of a wrong type or value.

    >>> import numpy as np
    >>> import fastrnn
    >>> lstm = fastrnn.LSTM(64, 128, num_layers=2, seed=0)
    >>> x = np.ones((10, 32, 64), np.float32)  # ten steps of 32 sequences
    >>> y, (h_n, c_n) = lstm(x)
    >>> y.shape, h_n.shape, c_n.shape
    ((10, 32, 128), (2, 32, 128), (2, 32, 128))
    >>> (y, state), pullback = lstm.vjp(x)
    >>> dx, (dh_0, dc_0), grads = pullback(np.ones_like(y))
    >>> dx.shape, grads["weight_ih_l0"].shape
    ((10, 32, 64), (512, 64))
    """

    GATES = lstm_kernels.GATES
    STATES = 2

    def _pack_forward(self, k: int) -> Array:
        w_ih, w_hh, b_ih, b_hh = self._weights(k)
        H, I = self.hidden_size, w_ih.shape[1]
        W = VECS * LANES_OF[self.dtype]
        packed = batching.empty(-(-H // LANES_OF[self.dtype]) * W * (1 + I + H), self.dtype)
        lstm_kernels.pack_forward(w_ih, w_hh, b_ih, b_hh, packed)
        return packed

    def _pack_backward(self, k: int) -> Array:
        w_ih, w_hh, _, _ = self._weights(k)
        H, I = self.hidden_size, w_ih.shape[1]
        W = VECS * LANES_OF[self.dtype]
        packed = batching.empty(W + -(-H // LANES_OF[self.dtype]) * W * W * (-(-H // W) + -(-I // W)), self.dtype)
        lstm_kernels.pack_backward(w_ih, w_hh, packed)
        return packed

    def _forward(self, k: int, x: Array, before: list[Array], after: list[Array], save: bool) -> tuple[Array, Any]:
        T, B, I = x.shape
        H, dtype = self.hidden_size, self.dtype
        packed = self.parameters.derived(("forward", k), partial(self._pack_forward, k))
        chunk, size = lstm_plan(T, B, I, H, LANES_OF[dtype], save)
        y = np.empty((T, B, H), dtype)
        buffer = batching.empty(size, dtype)
        multiply = multiply_address(dtype)
        (h_0, c_0), (h_n, c_n) = before, after

        def call(me: int, parties: int, barrier: Array) -> None:
            share = batching.share_of(me, parties, B, H, dtype)
            lstm_kernels.forward(x, h_0, c_0, packed, y, c_n, buffer, save, chunk, share, barrier, multiply)

        work = T * B * 4 * H * (I + H)
        batching.together(batching.parties_for(work, B, H, dtype), call)
        h_n[:] = y[-1]
        if not save:
            return y, None
        packed_back = self.parameters.derived(("backward", k), partial(self._pack_backward, k))

        def backward(dy: Array, d_after: list[Array], d_before: list[Array]) -> tuple[Array, Gradients]:
            (dh_n, dc_n), (dh_0, dc_0) = d_after, d_before
            dx = np.empty((T, B, I), dtype)
            dw_ih, dw_hh, db = np.empty((4 * H, I), dtype), np.empty((4 * H, H), dtype), np.empty(4 * H, dtype)
            back = steps_in_chunk(T, B, ROWS_BACKWARD)
            parties = batching.parties_for(2 * work, B, H, dtype)
            # Two buffers, so that one is filled while another thread still reads the other.
            buffers = min(parties, 2)
            space = batching.empty(lstm_kernels.work_layout.py_func(B, H, LANES_OF[dtype], back, buffers)[-1], dtype)

            def call(me: int, parties: int, barrier: Array) -> None:
                share = batching.share_of(me, parties, B, H, dtype)
                lstm_kernels.backward(
                    dy, dh_n, dc_n, packed_back, buffer, dx, dh_0, dc_0, dw_ih, dw_hh, db,
                    space, buffers, chunk, back, share, barrier, multiply,
                )  # fmt: skip

            batching.together(parties, call)
            gradients = {f"weight_ih_l{k}": dw_ih, f"weight_hh_l{k}": dw_hh}
            if self.bias:
                gradients |= {f"bias_ih_l{k}": db, f"bias_hh_l{k}": db.copy()}
            return dx, gradients

        return y, backward

    def _step(self, x: Array, before: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
        h, c = before[0].copy(), before[1].copy()
        B, lanes, multiply = len(x), LANES_OF[self.dtype], multiply_address(self.dtype)
        gates = batching.empty(-(-self.hidden_size // lanes) * B * VECS * lanes, self.dtype)
        for k in range(self.num_layers):
            packed = self.parameters.derived(("forward", k), partial(self._pack_forward, k))
            lstm_kernels.step(x, h[k], c[k], packed, gates, multiply)
            x = h[k]
        return h[-1:].copy(), (h, c)


@lru_cache(1024)
def lstm_plan(T: int, B: int, I: int, H: int, L: int, save: bool) -> tuple[int, int]:
    """The time steps in a chunk of the forward pass, and the size of its buffer."""
    chunk = steps_in_chunk(T, B, ROWS_FORWARD if B > 1 else ROWS_FORWARD_ALONE)
    return chunk, lstm_kernels.layout.py_func(T, B, I, H, L, chunk, save)[-1]


def steps_in_chunk(T: int, B: int, rows: int) -> int:
    """How many time steps make about so many rows, all chunks being nearly of one length."""
    most = max(1, round(rows / B))
    return -(-T // -(-T // most))


def drop(x: Array, probability: float, rng: np.random.Generator) -> tuple[Array, Callable[[Array], Array]]:
    """``x`` with elements set to 0 at random and the others scaled up to keep the mean, and the pullback."""
    mask = (rng.random(x.shape, np.float32) >= probability) * x.dtype.type(1 / (1 - probability))
    return x * mask, lambda dy: dy * mask
