"""One step of a layer as a layer: RNNCell, LSTMCell and GRUCell, for loops that are written by hand."""

from collections.abc import Callable
from typing import Any

import numpy as np

from .checks import as_array, describe
from .layers import GRU, LSTM, RNN
from .parameters import Array, Module
from .recurrent import Gradients, Recurrent

Pullback = Callable[[Any], tuple[Array, Any, Gradients]]


class _Cell(Module):
    """What cells share: a layer of which only one step is run, and parameters without its number in their names."""

    _layer: Recurrent

    def __init__(self, layer: Recurrent):
        self._layer, self.parameters = layer, layer.parameters
        self.input_size, self.hidden_size, self.dtype = layer.input_size, layer.hidden_size, layer.dtype
        names = ("input_size", "hidden_size", "bias", "nonlinearity", "reset_after", "dtype")
        self.config = {name: layer.config[name] for name in names if name in layer.config}

    def _sequence(self, x: Array) -> tuple[Array, bool]:
        """x as a sequence of one step, and whether it is a batch."""
        x = as_array(x, "x")
        if x.ndim not in (1, 2):
            raise ValueError(f"x: expected 2 dimensions (a batch) or 1, got shape {x.shape}")
        return x[None], x.ndim == 2

    def _stacked(self, state: Any, name: str) -> Any:
        """A state as that of a stack of one layer."""
        if state is None:
            return None
        if self._layer.STATES == 1:
            return as_array(state, name)[None]
        if not isinstance(state, (tuple, list)) or len(state) != self._layer.STATES:
            raise TypeError(f"{name}: expected a tuple of {self._layer.STATES} arrays, got {describe(state)}")
        return tuple(as_array(s, name)[None] for s in state)

    def _unstacked(self, state: Any) -> Any:
        return tuple(s[0] for s in state) if self._layer.STATES > 1 else state[0]

    def __call__(self, x: Array, state: Any = None) -> Any:
        """Take one step.

        Args:
            x: (B, I), or (I,) of one sequence.
            state: before the step, as it is returned; None stands for zeros.

        Returns the state after the step: h, or (h, c) of an LSTM, each (B, H), or (H,).

        Raises TypeError or ValueError for arrays of a wrong dtype or shape.
        """
        return self._unstacked(self._layer(self._sequence(x)[0], self._stacked(state, "state"))[1])

    def vjp(self, x: Array, state: Any = None) -> tuple[Any, Pullback]:
        """As a call, for training: ``state_1, pullback``.

        ``pullback(dstate_1)`` takes the gradient of a loss by the state after the step, shaped as it is, and returns
        ``dx, dstate, grads``: the gradients by x, by the state before the step, and by each parameter, a dict by name.
        """
        (_, after), layer_pullback = self._layer.vjp(self._sequence(x)[0], self._stacked(state, "state"))

        def pullback(dstate: Any) -> tuple[Array, Any, Gradients]:
            dx, d_before, grads = layer_pullback(None, self._stacked(dstate, "dstate"))
            return dx[0], self._unstacked(d_before), grads

        return self._unstacked(after), pullback


class _Unnumbered:
    """A layer's parameters without its number in their names."""

    def _name(self, kind: str, k: int, d: int) -> str:
        return kind


class _OneRNN(_Unnumbered, RNN):
    pass


class _OneLSTM(_Unnumbered, LSTM):
    pass


class _OneGRU(_Unnumbered, GRU):
    pass


class RNNCell(_Cell):
    """One step of a vanilla RNN: `torch.nn.RNNCell` on NumPy arrays.

    Arguments and equations are `fastrnn.RNN`'s. Parameters: ``weight_ih`` (H, I), ``weight_hh`` (H, H), ``bias_ih``
    and ``bias_hh`` (H).

    >>> import numpy as np
    >>> import fastrnn
    >>> cell = fastrnn.RNNCell(3, 5, seed=0)
    >>> h = None
    >>> for x_t in np.ones((10, 2, 3), np.float32):
    ...     h = cell(x_t, h)
    >>> h.shape
    (2, 5)
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: Any = "tanh",
        *,
        dtype: Any = np.float32,
        seed: int | None = None,
    ):
        super().__init__(_OneRNN(input_size, hidden_size, 1, nonlinearity, bias, dtype=dtype, seed=seed))


class LSTMCell(_Cell):
    """One step of an LSTM: `torch.nn.LSTMCell` on NumPy arrays.

    Arguments and equations are `fastrnn.LSTM`'s. Parameters: ``weight_ih`` (4 H, I), ``weight_hh`` (4 H, H),
    ``bias_ih`` and ``bias_hh`` (4 H), with the gates in the order i, f, g, o.

    >>> import numpy as np
    >>> import fastrnn
    >>> cell = fastrnn.LSTMCell(3, 5, seed=0)
    >>> h, c = cell(np.ones((2, 3), np.float32))
    >>> (h, c), pullback = cell.vjp(np.ones((2, 3), np.float32), (h, c))
    >>> dx, (dh, dc), grads = pullback((np.ones_like(h), np.zeros_like(c)))
    >>> dx.shape, sorted(grads)
    ((2, 3), ['bias_hh', 'bias_ih', 'weight_hh', 'weight_ih'])
    """

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, *, dtype: Any = np.float32, seed: int | None = None
    ):
        super().__init__(_OneLSTM(input_size, hidden_size, bias=bias, dtype=dtype, seed=seed))


class GRUCell(_Cell):
    """One step of a GRU: `torch.nn.GRUCell` on NumPy arrays.

    Arguments and equations are `fastrnn.GRU`'s. Parameters as for `LSTMCell`, with the gates in the order r, z, n.

    >>> import numpy as np
    >>> import fastrnn
    >>> cell = fastrnn.GRUCell(3, 5, seed=0)
    >>> cell(np.ones(3, np.float32)).shape  # of one sequence
    (5,)
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        reset_after: bool = True,
        dtype: Any = np.float32,
        seed: int | None = None,
    ):
        super().__init__(_OneGRU(input_size, hidden_size, bias=bias, reset_after=reset_after, dtype=dtype, seed=seed))
