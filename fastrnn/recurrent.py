"""What recurrent layers share: stacking, directions, dropout, lengths, calls and vector-Jacobian products.

`Recurrent` is the layers' base; a layer says what its cell is and which kernels run it. A direction of a layer of the
stack has the key (layer, 0 or 1), and runs over rows as the kernels read them.
"""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from . import batching, layer_norm, packing
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
from .kernels.tile import ROW_PANELS, VECS
from .kernels.vector import LANES_OF
from .masks import Masks, draw_masks, kernel_masks, no_masks
from .packing import Gradients, Key, Packs, Sums
from .parameters import Array, Module, Parameters

if TYPE_CHECKING:
    from .streaming import Stream

Pullback = Callable[..., tuple[Array, Any, Gradients]]
# What each direction's backward pass reads of its forward pass.
Tape = dict[Key, Any]

# Rows whose input projections are computed at once: enough for tall tiles, few enough that the gates are still in a
# cache when the recurrence adds to them. A W_ih that is not is read anew for every chunk: more rows share a large one.
ROWS_FORWARD, MOST_ROWS_FORWARD = 192, 640
BYTES_FOR_A_ROW = 24_000
# The same for a single sequence: so many steps give time for one row of rider tiles.
ROWS_FORWARD_ALONE = ROW_PANELS * VECS + 1
# Rows over which the gates' derivatives are gathered before the weights' gradients take them up.
ROWS_BACKWARD = 512


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
        self.record = np.array([self.cell], cells.RECORD)
        self.input_size = positive(input_size, "input_size")
        self.hidden_size = positive(hidden_size, "hidden_size")
        self.num_layers = positive(num_layers, "num_layers")
        self.bias, self.batch_first = flag(bias, "bias"), flag(batch_first, "batch_first")
        self.dropout = probability(dropout, "dropout")
        self.bidirectional = flag(bidirectional, "bidirectional")
        self.recurrent_dropout = probability(recurrent_dropout, "recurrent_dropout")
        self.zoneout = self._zoneout(zoneout)
        # Whether the kernels' ``step`` runs the layer.
        self.steps_in_place = not (self.bidirectional or any(self.zoneout) or self.layer_norm)
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
        self._rng = np.random.default_rng(as_seed(seed))
        bound = self.hidden_size**-0.5
        # Each direction's parameters: their names by kind.
        self.names: dict[Key, dict[str, str]] = {}
        arrays = {}
        for k, d in self._keys():
            shapes = dict(self._kinds(self._inputs_of(k)))
            self.names[k, d] = {kind: self._name(kind, k, d) for kind in shapes}
            arrays |= {self.names[k, d][kind]: self._initial(kind, shape, bound) for kind, shape in shapes.items()}
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
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

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

    def _inputs_of(self, k: int) -> int:
        return self.input_size if k == 0 else self.directions * self.cell.P

    def _keys(self) -> Iterator[Key]:
        return ((k, d) for k in range(self.num_layers) for d in range(self.directions))

    @property
    def _packing(self) -> Any:
        """Whose functions say how weights and gradients lie for the kernels."""
        return layer_norm if self.layer_norm else packing

    @property
    def multiply(self) -> tuple[int, int]:
        """The addresses of what the kernels call, in this process."""
        return multiply_addresses(self.dtype, 3 in (self.cell.x.count, self.cell.h.count))

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
        packed, offsets = packing.packed_of(self)
        return steps.Packed(self.record, np.array(offsets[:-1], np.int64), packed, self.multiply)

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
        return steps.State(h, s, np.empty(packing.step_size(self.cell, B, LANES_OF[self.dtype]), self.dtype))

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
            return tuple([np.zeros((layers, batch, n), self.dtype) for n in (cell.P, cell.H)[: self.STATES]])
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
        y, after, _ = self._run(sequences.rows(x), before, sequences, self._expected_masks(), packs)
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
            x = x.copy()  # it is read again
        masks = draw_masks(self, sequences, rng or self._rng)
        packs = self._packing.packs(self, save=True)
        tape: Tape = {}
        rows, after, backward = self._run(sequences.rows(x), before, sequences, masks, packs, tape, checkpoint)
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

    def _run(
        self,
        x: Array,
        before: tuple[Array, ...],
        sequences: Sequences,
        masks: Masks,
        packs: Packs,
        tape: Tape | None = None,
        checkpoint: int | None = None,
    ) -> tuple[Array, tuple[Array, ...], Any]:
        """Run all layers over rows x (N, I). Returns y, the state after it, and if there is a tape the backward pass.

        That takes dy, the gradient by the state after it, the sums of gradients by weights, to which it adds its own,
        and the tape, as it is now; it returns dx and the gradient by the state before it.
        """
        P, D = self.cell.P, self.directions
        ordered = sequences.lengths is not None
        before = tuple([sequences.sorted(s) for s in before]) if ordered else before
        after = tuple([np.empty_like(s) for s in before])
        run = self._run_direction if checkpoint is None else partial(self._run_stretches, checkpoint)
        backwards = {}
        for k in range(self.num_layers):
            if ("dropout", k) in masks:
                x = x * masks[("dropout", k)]
            ys = []
            for d in range(D):
                states = [s[k * D + d] for s in before], [s[k * D + d] for s in after]
                x_d, y = sequences.reversed(x) if d else x, np.empty((sequences.N, P), self.dtype)
                backwards[k, d] = run((k, d), x_d, y, *states, sequences, masks, packs[k, d], tape)
                ys.append(sequences.reversed(y) if d else y)
            x = ys[0] if D == 1 else np.concatenate(ys, 1)

        def backward(dy: Array, d_after: tuple[Array, ...], sums: Sums, tape: Tape) -> tuple[Array, tuple[Array, ...]]:
            d_after = tuple([sequences.sorted(s) for s in d_after])
            d_before = tuple([np.empty_like(s) for s in d_after])
            for k in reversed(range(self.num_layers)):
                dxs = []
                for d in range(D):
                    states = [s[k * D + d] for s in d_after], [s[k * D + d] for s in d_before]
                    dy_d = dy if D == 1 else np.ascontiguousarray(dy[:, d * P : (d + 1) * P])
                    dx = backwards[k, d](sequences.reversed(dy_d) if d else dy_d, *states, sums, tape)
                    dxs.append(sequences.reversed(dx) if d else dx)
                dy = dxs[0] if D == 1 else dxs[0] + dxs[1]
                if ("dropout", k) in masks:
                    dy = dy * masks[("dropout", k)]
            return dy, tuple([sequences.unsorted(s) for s in d_before])

        return x, tuple([sequences.unsorted(s) for s in after]) if ordered else after, backward

    def _run_direction(
        self,
        key: Key,
        x: Array,
        y: Array,
        before: list[Array],
        after: list[Array],
        sequences: Sequences,
        masks: Masks,
        packs: tuple[Any, Any],
        tape: Tape | None,
    ) -> Any:
        """Run one direction of a layer. Writes ``y, after``. Returns the backward pass, if there is a tape.

        States are in the rows' order of sequences.
        """
        cell, dtype, functions, (N, I), B = self.cell, self.dtype, self.kernels, x.shape, sequences.B
        if N == 0:
            for state, s_0 in zip(after, before):
                state[...] = s_0
            return partial(self._backward_of_nothing, key, I, sequences)
        if self.layer_norm:
            return layer_norm.run_direction(self, key, x, y, before, after, sequences, masks, packs, tape)
        size = cell.gates * cell.H * I * dtype.itemsize
        rows = max(ROWS_FORWARD, min(size // BYTES_FOR_A_ROW, MOST_ROWS_FORWARD)) if B > 1 else ROWS_FORWARD_ALONE
        steps, chunks = sequences.steps, sequences.chunks(rows)
        work, save = N * cell.gates * cell.H * (I + cell.P), tape is not None
        parties = batching.parties_for(work, B, cell.H, dtype)
        most = sequences.largest(chunks)
        size = packing.buffer_size(cell, N, B, I, most, LANES_OF[dtype], save, parties)
        buffer, multiply = batching.empty(size, dtype), self.multiply
        mask_arrays = kernel_masks(masks, key, dtype)
        if mask_arrays is None and cell.P != cell.H:
            mask_arrays = no_masks(dtype)
        h_0, s_0, s_n = before[0], before[-1], after[-1]

        def call(me: int, parties: int, barrier: Array) -> None:
            functions.forward(
                self.record, x, h_0, s_0, packs[0], y, s_n, buffer, steps, chunks, most, mask_arrays, save,
                sequences.share(me, parties, cell.H, dtype), barrier, multiply,
            )  # fmt: skip

        batching.together(parties, call)
        after[0][...] = sequences.last(y, h_0)
        if tape is None:
            return None
        tape[key] = buffer

        def backward(dy: Array, d_after: list[Array], d_before: list[Array], sums: Sums, tape: Tape) -> Array:
            backs = sequences.chunks(ROWS_BACKWARD)
            parties = batching.parties_for(2 * work, B, cell.H, dtype)
            # Two buffers, so that one is filled while another thread still reads the other.
            buffers, L = min(parties, 2), LANES_OF[dtype]
            most = sequences.largest(backs)
            space, fresh = batching.empty(packing.work_size(cell, B, most, buffers, L), dtype), key not in sums
            out = self._packing.gradients(self, sums, key, N, I, d_before)
            dh_n, ds_n = d_after[0], d_after[-1] if self.STATES == 2 else out.s_0

            def call(me: int, parties: int, barrier: Array) -> None:
                functions.backward(
                    self.record, dy, dh_n, ds_n, packs[1], tape[key], out, space, buffers, steps, chunks, backs, most,
                    mask_arrays, fresh, sequences.share(me, parties, cell.H, dtype), barrier, multiply,
                )  # fmt: skip

            batching.together(parties, call)
            return out.x

        return backward

    def _run_stretches(
        self,
        checkpoint: int,
        key: Key,
        x: Array,
        y: Array,
        before: list[Array],
        after: list[Array],
        sequences: Sequences,
        masks: Masks,
        packs: tuple[Any, Any],
        tape: Tape | None,
    ) -> Any:
        """As `_run_direction`, of so many steps at a time, which are run again when the backward pass comes to them."""
        state, stretches = before, []
        for part, first, last in sequences.stretches(checkpoint):
            part_masks = {
                name: m[first:last] if len(m) == sequences.N and name[0] != "recurrent" else m
                for name, m in masks.items()
            }
            stretches.append((first, last, state, part, part_masks))
            state = [np.empty_like(s) for s in state]
            self._run_direction(
                key, x[first:last], y[first:last], stretches[-1][2], state, part, part_masks, packs, None
            )
        for s_n, s in zip(after, state):
            s_n[...] = s

        def backward(dy: Array, d_after: list[Array], d_before: list[Array], sums: Sums, _: Tape) -> Array:
            dx, d_state = np.empty_like(x), d_after
            for first, last, state, part, part_masks in reversed(stretches):
                tape: Tape = {}
                y_again, after_again = np.empty_like(y[first:last]), [np.empty_like(s) for s in state]
                again = self._run_direction(
                    key, x[first:last], y_again, state, after_again, part, part_masks, packs, tape
                )
                d_next, d_state = d_state, [np.empty_like(s) for s in d_state]
                dx[first:last] = again(np.ascontiguousarray(dy[first:last]), d_next, d_state, sums, tape)
            for d_0, d in zip(d_before, d_state):
                d_0[...] = d
            return dx

        return backward

    def _backward_of_nothing(
        self, key: Key, I: int, sequences: Sequences, dy: Array, d_after: Any, d_before: Any, sums: Sums, _: Tape
    ) -> Array:
        """The backward pass over no rows."""
        for d_state, d in zip(d_before, d_after):
            d_state[...] = d
        if key not in sums:
            for array in self._packing.gradients(self, sums, key, 0, I, d_before)[3:]:
                array[...] = 0
        return np.empty((0, I), self.dtype)

    def _step(self, x: Array, state: tuple[Array, ...]) -> Array:
        """One step of all layers, of one direction, on the calling thread. x (B, I). Changes the state; y (1, B, P)."""
        work = np.empty(packing.step_size(self.cell, len(x), LANES_OF[self.dtype]), self.dtype)
        self.kernels.step_of_arrays(*self.packed, state[0], state[-1], work, x)
        return state[0][-1:].copy()

    def _expected_masks(self) -> Masks:
        """What stands for the masks when nothing is drawn: zoneout's probabilities, one row for all."""
        if self.steps_in_place or not any(self.zoneout):
            return {}
        sizes = {"zoneout_h": (self.zoneout[0], self.cell.P), "zoneout_s": (self.zoneout[-1], self.cell.H)}
        return {(name, *key): np.full((1, n), p, self.dtype) for key in self._keys() for name, (p, n) in sizes.items()}
