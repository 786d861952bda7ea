"""The recurrent layers: RNN, LSTM and GRU. What they share is in `fastrnn.recurrent`."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
from numba.extending import is_jitted

from .checks import describe, flag, integer, number
from .kernels import gru as gru_kernels
from .kernels import lstm as lstm_kernels
from .kernels import rnn as rnn_kernels
from .kernels.cell import Cell
from .kernels.gemm import NOTHING, WHOLE, Window
from .masks import drop, masks
from .recurrent import Gradients, Pullback, Recurrent

__all__ = ["GRU", "LSTM", "RNN", "Gradients", "Pullback", "Recurrent", "drop", "masks"]

LSTM_WITH_OPTIONS = SimpleNamespace(
    forward=lstm_kernels.forward_with_options,
    backward=lstm_kernels.backward_with_options,
    step=lstm_kernels.step_with_options,
    step_of_arrays=lstm_kernels.step_of_arrays_with_options,
)
GRU_RESET_BEFORE = SimpleNamespace(
    forward=gru_kernels.forward_reset_before,
    backward=gru_kernels.backward_reset_before,
    step=gru_kernels.step_reset_before,
    step_of_arrays=gru_kernels.step_of_arrays_reset_before,
)
NONLINEARITIES = {"tanh": rnn_kernels.TANH, "relu": rnn_kernels.RELU, "identity": rnn_kernels.IDENTITY}


class RNN(Recurrent):
    """A stack of vanilla recurrent layers: `torch.nn.RNN` on NumPy arrays.

    h = f(W_ih x + b_ih + W_hh h' + b_hh)   (Elman 1990)

    Args:
        input_size: numbers in a step of the input, I.
        hidden_size: units of each layer, H.
        num_layers: layers, each of which reads the outputs of the one before.
        nonlinearity: f: "tanh", "relu" or "identity"; or any differentiable function of a number, as a pair
            ``(f, df)`` of functions compiled by `numba.njit`, where df takes f's value and returns the derivative.
        bias: whether there are biases.
        batch_first: whether a batch has shape (B, T, I) instead of (T, B, I).
        dropout: the probability with which `vjp`, for training, drops each output of each layer but the last.
        bidirectional: whether a second set of weights reads the sequences backwards. Outputs of both directions are
            joined.
        recurrent_dropout: the probability with which `vjp` drops a unit of h before it is multiplied by W_hh, the same
            ones at all steps of a sequence (Gal and Ghahramani 2016).
        zoneout: the probability with which a unit keeps its old h at a step (Krueger et al. 2017): drawn in `vjp`; in
            calls nothing is drawn, and h is the mean of old and new that it stands for.
        dtype: float32 or float64: that of parameters, inputs and outputs.
        seed: of the initial parameters, uniform within 1/sqrt(H) of 0, and of dropout; None takes the system's.

    The state is h, (num_layers * directions, B, H). Parameters, as attributes and in `state_dict`:
    ``weight_ih_l{k}`` (H, I, or H, directions * H for k > 0), ``weight_hh_l{k}`` (H, H), ``bias_ih_l{k}`` and
    ``bias_hh_l{k}`` (H), and the other direction's with the suffix ``_reverse``, as PyTorch has them.

    Raises TypeError or ValueError for an argument of a wrong type or value.

    >>> import numpy as np
    >>> import fastrnn
    >>> rnn = fastrnn.RNN(3, 5, bidirectional=True, seed=0)
    >>> y, h_n = rnn(np.ones((10, 2, 3), np.float32))
    >>> y.shape, h_n.shape
    ((10, 2, 10), (2, 2, 5))
    """

    STATES = 1

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str | tuple[Callable[..., Any], Callable[..., Any]] = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
        dtype: Any = np.float32,
        seed: int | None = None,
    ):
        self.nonlinearity = nonlinearity
        if isinstance(nonlinearity, str) and nonlinearity in NONLINEARITIES:
            kind = NONLINEARITIES[nonlinearity]
        elif isinstance(nonlinearity, tuple) and len(nonlinearity) == 2 and all(map(is_jitted, nonlinearity)):
            kind = rnn_kernels.OTHER
        else:
            raise ValueError(
                f"nonlinearity: expected one of {', '.join(NONLINEARITIES)} or a pair of functions compiled by "
                f"numba.njit, got {describe(nonlinearity)}"
            )
        H = integer(hidden_size, "hidden_size", 1)
        self.cell = Cell(H, H, 1, 1, 4, WHOLE, WHOLE, NOTHING, False, False, 0.0, False, kind)
        super().__init__(
            input_size, H, num_layers, bias, batch_first, dropout, bidirectional, recurrent_dropout, zoneout,
            dtype, seed, nonlinearity=nonlinearity,
        )  # fmt: skip

    @property
    def kernels(self) -> Any:
        return rnn_kernels.kernels_of(*self.nonlinearity) if isinstance(self.nonlinearity, tuple) else rnn_kernels


class LSTM(Recurrent):
    """A stack of long short-term memory layers: `torch.nn.LSTM` on NumPy arrays.

    i, f, o = sigmoid(W_i* x + b_i* + W_h* h' + b_h*), g = tanh(likewise), c = f * c' + i * g, h = o * tanh(c)
    (Hochreiter and Schmidhuber 1997; the forget gate: Gers, Schmidhuber and Cummins 2000).

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, recurrent_dropout, dtype, seed:
            as for `RNN`.
        proj_size: if not 0, h is projected to so many outputs P < H: h = W_hr (o * tanh(c)) (Sak, Senior and
            Beaufays 2014).
        peephole: the gates see the cell state: w_ci * c', w_cf * c' and w_co * c are added to the sums of i, f and o
            (Gers, Schraudolph and Schmidhuber 2002).
        cell_clip: if not None, the sums of all gates are cut to [-cell_clip, cell_clip], as by the attribute clip of
            ONNX's LSTM.
        coupled: i = 1 - f, without weights of its own (Greff et al. 2017).
        zoneout: as for `RNN`, or a pair, for h and for c.
        layer_norm: both products and the cell state are normalised (Ba, Kiros and Hinton 2016, arXiv:1607.06450):
            with N(a) = (a - mean(a)) / sqrt(var(a) + 1e-5) over all gates' numbers of a step, the sums are
            g_ih * N(W_ih x) + b_ih + g_hh * N(W_hh h') + b_hh, and h = o * tanh(g_c * N(c) + b_c).

    The state is ``(h, c)``. Parameters, as attributes and in `state_dict`: ``weight_ih_l{k}`` (4 H, I, or
    4 H, directions * H for k > 0), ``weight_hh_l{k}`` (4 H, H), ``bias_ih_l{k}`` and ``bias_hh_l{k}`` (4 H), with the
    gates in the order i, f, g, o (coupled: f, g, o), ``weight_hr_l{k}`` (P, H), ``weight_ci_l{k}``, ``weight_cf_l{k}``
    and ``weight_co_l{k}`` (H), and the other direction's with the suffix ``_reverse``: names, shapes and order are
    PyTorch's. With a projection P stands for H where h is read. ``layer_norm`` adds ``weight_ln_ih_l{k}`` and
    ``weight_ln_hh_l{k}`` (4 H), ``weight_ln_c_l{k}`` and ``bias_ln_c_l{k}`` (H): g_ih, g_hh, g_c, b_c, first 1 and 0.

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

    STATES = 2

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        *,
        peephole: bool = False,
        cell_clip: float | None = None,
        coupled: bool = False,
        recurrent_dropout: float = 0.0,
        zoneout: float | tuple[float, float] = 0.0,
        layer_norm: bool = False,
        dtype: Any = np.float32,
        seed: int | None = None,
    ):
        H = integer(hidden_size, "hidden_size", 1)
        self.proj_size = integer(proj_size, "proj_size", 0)
        if self.proj_size >= H:
            raise ValueError(f"proj_size: expected less than hidden_size, {H}, got {proj_size}")
        self.peephole, self.coupled = flag(peephole, "peephole"), flag(coupled, "coupled")
        self.layer_norm = flag(layer_norm, "layer_norm")
        self.cell_clip = None if cell_clip is None else number(cell_clip, "cell_clip", 0)
        if self.cell_clip == 0:
            raise ValueError("cell_clip: expected a number greater than 0, got 0")
        # Slots i, f, g, o, of which a coupled cell's weights have the last three.
        window = Window(1, 3, 0) if self.coupled else Window(0, 4, 0)
        self.cell = Cell(
            H, self.proj_size or H, window.count, 4, 1, window, window, NOTHING,
            True, self.peephole, self.cell_clip or 0.0, self.coupled, 0,
        )  # fmt: skip
        super().__init__(
            input_size, H, num_layers, bias, batch_first, dropout, bidirectional, recurrent_dropout, zoneout,
            dtype, seed, proj_size=self.proj_size, peephole=self.peephole, cell_clip=self.cell_clip,
            coupled=self.coupled, layer_norm=self.layer_norm,
        )  # fmt: skip

    @property
    def kernels(self) -> Any:
        return LSTM_WITH_OPTIONS if self.peephole or self.cell_clip or self.coupled else lstm_kernels

    def _kinds(self, inputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from super()._kinds(inputs)
        H = self.cell.H
        if self.proj_size:
            yield "weight_hr", (self.proj_size, H)
        if self.peephole:
            yield from ((f"weight_c{gate}", (H,)) for gate in ("fo" if self.coupled else "ifo"))


class GRU(Recurrent):
    """A stack of gated recurrent units: `torch.nn.GRU` on NumPy arrays.

    r, z = sigmoid(W_i* x + b_i* + W_h* h' + b_h*), h = (1 - z) * n + z * h', with

    n = tanh(W_in x + b_in + r * (W_hn h' + b_hn)), or, if not ``reset_after``,
    n = tanh(W_in x + b_in + W_hn (r * h') + b_hn)   (Cho et al. 2014)

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, recurrent_dropout, zoneout,
            dtype, seed: as for `RNN`.
        reset_after: whether the reset gate acts after the product, as in cuDNN and PyTorch, or on the state before it.
        layer_norm: both products are normalised (Ba, Kiros and Hinton 2016, arXiv:1607.06450): with N as for `LSTM`,
            g_ih * N(W_ih x) stands for W_ih x, and g_hh * N(W_hh h') for W_hh h'. Only with ``reset_after``.

    The state is h, (num_layers * directions, B, H). Parameters as for `LSTM`, with the gates in the order r, z, n
    and without those of c.

    Raises TypeError or ValueError for an argument of a wrong type or value.

    >>> import numpy as np
    >>> import fastrnn
    >>> gru = fastrnn.GRU(3, 5, num_layers=2, seed=0)
    >>> x = np.ones((10, 2, 3), np.float32)
    >>> y, h_n = gru(x, lengths=[4, 10])
    >>> bool((y[4:, 0] == 0).all())  # past its end
    True
    """

    STATES = 1

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        reset_after: bool = True,
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
        layer_norm: bool = False,
        dtype: Any = np.float32,
        seed: int | None = None,
    ):
        H = integer(hidden_size, "hidden_size", 1)
        self.reset_after, self.layer_norm = flag(reset_after, "reset_after"), flag(layer_norm, "layer_norm")
        if self.layer_norm and not self.reset_after:
            raise ValueError("reset_after: expected True with layer_norm, got False")
        # Slots n, r, z and W_hn h'. W_ih's gates are n, r, z in this order; W_hh's r, z and the last, or r, z, then n.
        slots, h, again = (4, Window(1, 3, 0), NOTHING) if self.reset_after else (3, Window(1, 2, 0), Window(0, 1, 2))
        self.cell = Cell(H, H, 3, slots, 1, Window(0, 3, 2), h, again, True, False, 0.0, False, 0)
        super().__init__(
            input_size, H, num_layers, bias, batch_first, dropout, bidirectional, recurrent_dropout, zoneout,
            dtype, seed, reset_after=self.reset_after, layer_norm=self.layer_norm,
        )  # fmt: skip

    @property
    def kernels(self) -> Any:
        return gru_kernels if self.reset_after else GRU_RESET_BEFORE
