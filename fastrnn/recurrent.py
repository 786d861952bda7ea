"""What recurrent layers share: parameters, calls, lengths, vector-Jacobian products. `passes` runs them.

`Recurrent` is the layers' base; a layer says what its cell is and which kernels run it. A direction of a layer of the
stack has the key (layer, 0 or 1).
"""

import warnings
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from . import batching, layer_norm, packing, passes
from .batching import Sequences, full_sequences
from .checks import (
    as_array,
    as_checked,
    as_kernel_array,
    as_lengths,
    as_seed,
    describe,
    flag,
    float_dtype,
    positive,
    probability,
)
from .kernels import cell as cells
from .kernels import recurrent as steps
from .kernels.gemm import multiply_addresses
from .kernels.tile import VECS
from .kernels.vector import LANES_OF
from .masks import Masks, draw_masks
from .packing import Gradients, Key, Sums
from .parameters import Array, Module, Parameters

if TYPE_CHECKING:
    from .streaming import Stream

Pullback = Callable[..., tuple[Array, Any, Gradients]]


class Recurrent(Module):
    """What recurrent layers share. A layer says how many ``STATES`` it has and what its ``cell`` is.

    ``kernels`` has its functions forward, backward and step; ``cell`` is as `fastrnn.kernels.cell` describes it.
    Inside, sequences are rows and a state is a tuple of arrays (num_layers * directions, B, features).
    """

    STATES: int
    parameters: Parameters
    cell: cells.Cell
    layer_norm = False

    @property
    def kernels(self) -> Any:
        raise NotImplementedError

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        recurrent_dropout: float,
        zoneout: Any,
        dtype: Any,
        seed: int | None,
        **options: Any,
    ):
        self.input_size = positive(input_size, "input_size")
        self.hidden_size = positive(hidden_size, "hidden_size")
        self.num_layers = positive(num_layers, "num_layers")
        self.bias, self.batch_first = flag(bias, "bias"), flag(batch_first, "batch_first")
        self.dropout = probability(dropout, "dropout")
        self.bidirectional = flag(bidirectional, "bidirectional")
        self.directions = 2 if self.bidirectional else 1
        self.recurrent_dropout = probability(recurrent_dropout, "recurrent_dropout")
        self.zoneout = self._zoneout(zoneout)
        self.dtype = float_dtype(dtype)
        if self.dropout and self.num_layers == 1:
            warnings.warn("dropout acts between layers: with num_layers=1 it does nothing", stacklevel=3)
        self.config = {
            "input_size": self.input_size,
            "hidden_size": self.hidden_size,
            "num_layers": self.num_layers,
            "bias": self.bias,
            "batch_first": self.batch_first,
            "dropout": self.dropout,
            "bidirectional": self.bidirectional,
            **options,
            "recurrent_dropout": self.recurrent_dropout,
            "zoneout": self.zoneout[0] if len(set(self.zoneout)) == 1 else self.zoneout,
            "dtype": self.dtype.name,
        }
        L, inputs = LANES_OF[self.dtype], [self._inputs_of(k) for k, _ in self._keys()]
        self.records = cells.records(self.cell, inputs, VECS * L, L)
        self._rng = np.random.default_rng(as_seed(seed))
        bound = self.hidden_size**-0.5
        arrays = {}
        for key, names in self.names.items():
            for kind, shape in self._kinds(self._inputs_of(key[0])):
                arrays[names[kind]] = self._initial(kind, shape, bound)
        self.parameters = Parameters(arrays)

    def _initial(self, kind: str, shape: tuple[int, ...], bound: float) -> Array:
        if "_ln_" in kind:
            return layer_norm.initial(self, kind, shape)
        return self._rng.uniform(-bound, bound, shape).astype(self.dtype)

    def _zoneout(self, zoneout: Any) -> tuple[float, ...]:
        """The probability for each state."""
        if self.STATES == 2 and isinstance(zoneout, (tuple, list)):
            if len(zoneout) != 2:
                raise ValueError(f"zoneout: expected a number or two, for h and c, got {describe(zoneout)}")
            return tuple(probability(p, "zoneout") for p in zoneout)
        return (probability(zoneout, "zoneout"),) * self.STATES

    @property
    def output_size(self) -> int:
        """Outputs of each direction: the size of h."""
        return self.cell.P

    def _name(self, kind: str, k: int, d: int) -> str:
        return f"{kind}_l{k}{'_reverse' if d else ''}"

    def _kinds(self, inputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The parameters of one direction, and their shapes."""
        gates, H, P = self.cell.gates, self.cell.H, self.cell.P
        yield "weight_ih", (gates * H, inputs)
        yield "weight_hh", (gates * H, P)
        if self.bias:
            yield "bias_ih", (gates * H,)
            yield "bias_hh", (gates * H,)
        if self.layer_norm:
            yield from layer_norm.kinds(self)

    @cached_property
    def names(self) -> dict[Key, dict[str, str]]:
        """Those of each direction's parameters, by kind."""
        return {
            (k, d): {kind: self._name(kind, k, d) for kind, _ in self._kinds(self._inputs_of(k))}
            for k, d in self._keys()
        }

    def _inputs_of(self, k: int) -> int:
        return self.input_size if k == 0 else self.directions * self.cell.P

    def _keys(self) -> Iterator[Key]:
        return ((k, d) for k in range(self.num_layers) for d in range(self.directions))

    @property
    def _packing(self) -> Any:
        """Whose functions say how weights and gradients lie for the kernels."""
        return layer_norm if self.layer_norm else packing

    @property
    def multiply(self) -> Array:
        """The addresses of what the kernels call, in this process."""
        return multiply_addresses(self.dtype, 3 in (self.cell.x.count, self.cell.h.count))

    @cached_property
    def steps_in_place(self) -> bool:
        """Whether the kernels' ``step`` runs the layer."""
        return not (self.bidirectional or self.layer_norm or any(self.zoneout))

    @cached_property
    def _work_of_a_row(self) -> int:
        """Numbers of workspace that a step takes for each sequence."""
        L = LANES_OF[self.dtype]
        return steps.step_size(self.cell, 1, VECS * L, L)

    def stream(self, batch_size: int = 1) -> "Stream":
        """The layer as one that is fed one step at a time and remembers its state: a `fastrnn.streaming.Stream`."""
        from .streaming import Stream

        return Stream(self, batch_size)

    @property
    def packed(self) -> steps.Packed:
        """The weights as `fastrnn.kernels`' functions ``step`` take them, from compiled code too; see `new_state`.

        A named tuple of arrays, which is made again when parameters have changed; what was taken before stays as it
        was. Raises ValueError for layers that have no such step: bidirectional ones, with zoneout or layer_norm.
        """
        if not self.steps_in_place:
            raise ValueError(f"packed: expected a layer of one direction without zoneout and layer_norm, got {self}")
        return self.parameters.derived("packed", self._make_packed)

    def _make_packed(self) -> steps.Packed:
        return steps.Packed(self.records, packing.packed_of(self), self.multiply)

    def new_state(self, batch_size: int = 1) -> steps.State:
        """A state of zeros, with workspace, that `fastrnn.kernels`' functions ``step`` change in place.

        >>> import numba
        >>> import numpy as np
        >>> import fastrnn
        >>> from fastrnn.kernels import lstm as kernels
        >>> lstm = fastrnn.LSTM(3, 5, num_layers=2, seed=0)
        >>> @numba.njit
        ... def run(packed, state, x):
        ...     for t in range(len(x)):
        ...         kernels.step(packed, state, x[t])
        >>> x = np.ones((10, 1, 3), np.float32)
        >>> state = lstm.new_state()
        >>> run(lstm.packed, state, x)
        >>> y, (h_n, c_n) = lstm(x)
        >>> bool((state.h == h_n).all() and (state.s == c_n).all())
        True
        """
        B, layers = positive(batch_size, "batch_size"), self.num_layers
        h = np.zeros((layers, B, self.cell.P), self.dtype)
        s = np.zeros((layers, B, self.cell.H), self.dtype) if self.STATES == 2 else h
        return steps.State(h, s, np.empty(B * self._work_of_a_row, self.dtype))

    # Arguments and results, as the user has them and as the kernels do.

    def _inputs(self, x: Array, state: Any) -> tuple[Array, tuple[Array, ...], bool]:
        """The arguments, checked: x (T, B, I), the state, and whether x was a batch."""
        x = x if type(x) is np.ndarray else as_array(x, "x")
        batched = x.ndim == 3
        if not batched and x.ndim != 2:
            raise ValueError(f"x: expected 3 dimensions (a batch) or 2 (one sequence), got shape {x.shape}")
        T, B = x.shape[0] or None, x.shape[1] or None  # None: any size but this
        x = as_kernel_array(x, "x", self.dtype, (T, B, self.input_size) if batched else (T, self.input_size))
        x = self._time_first(x, batched)
        return x, self._state_arrays(state, "state", x.shape[1], batched), batched

    @staticmethod
    def _sequences(x: Array, lengths: Any) -> Sequences:
        """How the sequences of x (T, B, I) stand in rows."""
        T, B, _ = x.shape
        return full_sequences(T, B) if lengths is None else Sequences(T, B, as_lengths(lengths, "lengths", T, B))

    def _state_arrays(self, state: Any, name: str, batch: int, batched: bool) -> tuple[Array, ...]:
        layers, cell = self.num_layers * self.directions, self.cell
        if state is None:
            h = np.zeros((layers, batch, cell.P), self.dtype)
            return (h, np.zeros((layers, batch, cell.H), self.dtype)) if self.STATES == 2 else (h,)
        shapes = ((layers, batch, cell.P), (layers, batch, cell.H))
        if self.STATES == 1:
            state = (state,)
        elif not isinstance(state, (tuple, list)) or len(state) != self.STATES:
            raise TypeError(f"{name}: expected a tuple of {self.STATES} arrays, got {describe(state)}")
        if batched:
            return tuple([as_kernel_array(s, name, self.dtype, shape) for s, shape in zip(state, shapes)])
        return tuple(
            [as_kernel_array(s, name, self.dtype, shape[::2]).reshape(shape) for s, shape in zip(state, shapes)]
        )

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

    # Running.

    def __call__(self, x: Array, state: Any = None, lengths: Any = None) -> tuple[Array, Any]:
        """Run over a sequence, for inference: nothing is drawn at random.

        Args:
            x: (T, B, I), or (B, T, I) with ``batch_first``, or one sequence (T, I).
            state: before the first step; each array of it (num_layers * directions, B, H), or without B for one
                sequence. None stands for zeros.
            lengths: of B sequences, from 0 to T, in any order; None: all are T long.

        Returns ``y, state``: the last layer's outputs, shaped as ``x`` with directions * H in place of I, 0 past a
        sequence's end; and the state after each sequence's last step, with which the next call continues.

        Raises TypeError or ValueError for arrays of a wrong dtype or shape.
        """
        x, before, batched = self._inputs(x, state)
        if lengths is None and len(x) == 1 and x.shape[1] < batching.ROWS_OF_A_SHARE and self.steps_in_place:
            y = self._step(x[0], after := before if state is None else tuple([s.copy() for s in before]))
            return self._sequence(y, batched), self._state(after, batched)
        sequences = self._sequences(x, lengths)
        packs = self._packing.packs(self, save=False)
        y, after, _ = passes.run(self, sequences.rows(x), before, sequences, self._expected_masks(), packs)
        return self._sequence(sequences.padded(y), batched), self._state(after, batched)

    def vjp(
        self,
        x: Array,
        state: Any = None,
        rng: np.random.Generator | None = None,
        lengths: Any = None,
        checkpoint: int | None = None,
    ) -> tuple[Any, Pullback]:
        """Run over a sequence, for training, and remember what backpropagation through time needs.

        Args:
            x, state, lengths: as for a call.
            rng: draws the masks of dropout, recurrent dropout and zoneout; None takes the layer's own, seeded by
                ``seed``.
            checkpoint: keep only the state before every so many steps, and run forward again from there when the
                gradient is asked for: besides each layer's input and output, memory for T / checkpoint states and
                checkpoint steps instead of T (Chen et al. 2016, arXiv:1604.06174), for a third more time, and the same
                bits.

        Returns ``(y, state), pullback``. ``pullback(dy=None, dstate=None)`` takes the gradients of a loss by y and by
        the state after the last step, shaped as they are (None for zeros), and returns ``dx, dstate_0, grads``: the
        gradients by x, by the state before the first step, and by each parameter, a dict by name. It reads nothing
        that later calls change: it may be called again, from any thread, and after the parameters have moved on.

        Raises TypeError or ValueError for arrays of a wrong dtype or shape.
        """
        if rng is not None and not isinstance(rng, np.random.Generator):
            raise TypeError(f"rng: expected a numpy.random.Generator, got {describe(rng)}")
        x, before, batched = self._inputs(x, state)
        B, sequences = x.shape[1], self._sequences(x, lengths)
        if checkpoint is not None:
            checkpoint = positive(checkpoint, "checkpoint")
            x, before = x.copy(), tuple([s.copy() for s in before])  # they are read again
        masks = draw_masks(self, sequences, rng or self._rng)
        packs = self._packing.packs(self, save=True)
        tape: passes.Tape = {}
        rows, after, backward = passes.run(self, sequences.rows(x), before, sequences, masks, packs, tape, checkpoint)
        y = self._sequence(sequences.padded(rows), batched)
        shape = y.shape

        def pullback(dy: Array | None = None, dstate: Any = None) -> tuple[Array, Any, Gradients]:
            if dy is None:
                d = np.zeros((sequences.N, self.directions * self.cell.P), self.dtype)
            else:
                # With checkpoints the kernels take stretch after stretch: only that is copied, if it has to be.
                check = as_checked if checkpoint else as_kernel_array
                d = sequences.rows(self._time_first(check(dy, "dy", self.dtype, shape), batched))
            sums: Sums = {}
            d, d_before = backward(d, self._state_arrays(dstate, "dstate", B, batched), sums, tape)
            return (
                self._sequence(sequences.padded(d), batched),
                self._state(d_before, batched),
                self._packing.named(self, sums),
            )

        return (y, self._state(after, batched)), pullback

    def _step(self, x: Array, state: tuple[Array, ...]) -> Array:
        """One step of all layers, of one direction, on the calling thread. x (B, I). Changes the state; y (1, B, P)."""
        packed = self.parameters.derived("packed", self._make_packed)
        work = np.empty(len(x) * self._work_of_a_row, self.dtype)
        self.kernels.step_of_arrays(*packed, state[0], state[-1], work, x)
        return state[0][-1:].copy()

    def _expected_masks(self) -> Masks:
        """What stands for the masks when nothing is drawn: zoneout's probabilities, one row for all."""
        if not any(self.zoneout):
            return {}
        sizes = {"zoneout_h": (self.zoneout[0], self.cell.P), "zoneout_s": (self.zoneout[-1], self.cell.H)}
        return {(name, *key): np.full((1, n), p, self.dtype) for key in self._keys() for name, (p, n) in sizes.items()}
