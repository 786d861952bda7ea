"""What PyTorch's functions of recurrent layers and cells compute, on fastrnn's kernels: `FUNCTIONS`, by their names.

Each takes what the function of ``torch._VF`` of the same name takes, and calls that one where kernels cannot do it.
"""

import copy
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.weak import WeakTensorKeyDictionary

from .. import batching, layers, packing, passes
from ..batching import Sequences, full_sequences
from ..kernels import contents, direct
from ..kernels.vector import LANES_OF
from ..masks import Masks
from ..packing import Gradients
from ..parameters import Array, Parameters
from ..passes import Tape
from ..recurrent import Recurrent
from . import torch_threads

DTYPES = {torch.float32: np.float32, torch.float64: np.float64}


class _Lent(Parameters):
    """Parameters that stay in torch's memory, in which nobody has written since."""

    def __init__(self, arrays: dict[str, Array]):
        super().__init__({})
        self._arrays = arrays


class _Empty:
    """A layer before parameters are lent to it."""

    dtype: Any

    def _initial(self, name: str, shape: tuple[int, ...], bound: float) -> Array:
        return np.empty(shape, self.dtype)


class _RNN(_Empty, layers.RNN):
    pass


class _LSTM(_Empty, layers.LSTM):
    pass


class _GRU(_Empty, layers.GRU):
    pass


# What PyTorch's functions compute, by their names, and how many gates a layer of it has.
KINDS: dict[str, tuple[Callable[..., Recurrent], int]] = {
    "rnn_tanh": (partial(_RNN, nonlinearity="tanh"), 1),
    "rnn_relu": (partial(_RNN, nonlinearity="relu"), 1),
    "lstm": (_LSTM, 4),
    "gru": (_GRU, 3),
}


class _Weights(NamedTuple):
    """A module's weights as a call found them, and a layer to which they are lent."""

    where: list[Any]
    arrays: dict[str, Array]
    places: Array
    contents: bytes
    layer: Recurrent


# By the first weight, with which they go.
_kept: Any = WeakTensorKeyDictionary()


def _layer_of(kind: str, weights: Sequence[Tensor], num_layers: int, bias: bool, bidirectional: bool) -> Recurrent:
    """A layer with these weights, which is the last call's if they have not changed."""
    where: list[Any] = [kind, num_layers, bias, bidirectional]
    where += [(weight.data_ptr(), weight.shape, weight.stride()) for weight in weights]
    known = _kept.get(weights[0])
    if known is None or known.where != where:
        for weight in weights:
            if weight.device.type != "cpu" or weight.dtype not in DTYPES or weight.dtype != weights[0].dtype:
                raise TypeError(
                    "weights: expected float32 or float64 on the CPU, all of one dtype, got "
                    f"{weight.dtype} on {weight.device}; torch.nn's own modules may run them (see restore)"
                )
        make, gates = KINDS[kind]
        H, I, P = len(weights[0]) // gates, weights[0].shape[1], weights[1].shape[1]
        _check_shapes(weights, [(len(weights[1]), I)])
        projection = {"proj_size": P} if kind == "lstm" and P < H else {}
        dtype = DTYPES[weights[0].dtype]
        layer = make(I, H, num_layers, bias=bias, bidirectional=bidirectional, dtype=dtype, **projection)
        _check_shapes(weights, [array.shape for array in layer.parameters.values()])
        arrays = dict(zip(layer.parameters, map(_array, weights)))
        places = np.array([(array.ctypes.data, array.nbytes // 4) for array in arrays.values()])
        known = _Weights(where, arrays, places, b"", layer)
    sums = np.zeros(contents.LANES, np.uint32)
    contents.add(known.places, sums)
    now = sums.tobytes()
    if known.contents != now:
        layer = copy.copy(known.layer)
        layer.parameters = _Lent(known.arrays)
        known = known._replace(contents=now, layer=layer)
        # The copy of a weight that is not contiguous serves one call only.
        if all(weight.is_contiguous() for weight in weights):
            _kept[weights[0]] = known
    return known.layer


def _check_shapes(weights: Sequence[Tensor], shapes: list[tuple[int, ...]]) -> None:
    """Raise for weights that somebody has put in the place of others: kernels do not look where they read."""
    for weight, shape in zip(weights, shapes):
        if weight.shape != shape:
            raise RuntimeError(f"weights: expected shape {shape}, got {tuple(weight.shape)}")


def _array(tensor: Tensor) -> Array:
    """A tensor as kernels read arrays: its own memory, or a copy if it is not contiguous."""
    array = tensor.detach().resolve_neg().numpy()
    return array if array.flags.carray else np.array(array, order="C")


class _Form(NamedTuple):
    """How outputs are shaped: here, for a view of what autograd knows could not be detached in place."""

    leading: tuple[int, ...]
    batch_first: bool
    cell: bool

    def of(self, y: Array, after: tuple[Array, ...]) -> tuple[Tensor, ...]:
        """Tensors of y, from rows (N, features), and of a state (num_layers * directions, B, features)."""
        y = y.reshape(*self.leading, -1)
        y = y.swapaxes(0, 1) if self.batch_first else y
        return (torch.from_numpy(y), *[torch.from_numpy(s[0] if self.cell else s) for s in after])

    def back(self, dy: Tensor, d_after: Sequence[Tensor]) -> tuple[Array, tuple[Array, ...]]:
        """The inverse, for gradients."""
        rows = _array(dy.transpose(0, 1) if self.batch_first else dy)
        arrays = map(_array, d_after)
        return rows.reshape(-1, rows.shape[-1]), tuple([d[None] if self.cell else d for d in arrays])


class _Run(torch.autograd.Function):
    """A layer over rows: y and the state after it, of x (N, I), the state before it, and the weights."""

    @staticmethod
    def forward(ctx: Any, layer: Recurrent, sequences: Sequences, masks: Masks, form: _Form, *tensors: Tensor) -> Any:
        tape: Tape = {}
        outputs, ctx.run_backward = _run(layer, sequences, masks, form, tensors[: 1 + layer.STATES], tape)
        ctx.layer, ctx.keys, ctx.form = layer, list(tape), form
        ctx.save_for_backward(*map(torch.from_numpy, tape.values()))
        return outputs

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "create_graph: expected False, got True: fastrnn's kernels have no second derivative, torch.nn's own "
                "modules have one (see fastrnn.interop.torch.restore)"
            )
        tape = {key: buffer.numpy() for key, buffer in zip(ctx.keys, ctx.saved_tensors)}
        sums: dict[Any, Any] = {}
        try:
            gradients = ctx.form.back(d_outputs[0], d_outputs[1:])
        except RuntimeError as error:
            raise NotImplementedError(
                "gradients: expected tensors of numbers, got a batch of them (is_grads_batched, vectorize): torch.nn's "
                "own modules take one (see fastrnn.interop.torch.restore)"
            ) from error
        with _torchs_threads():
            dx, d_before = ctx.run_backward(*gradients, sums, tape)
        grads: Gradients = packing.named(ctx.layer, sums)
        arrays = dx, *d_before, *(grads[name] for name in ctx.layer.parameters)
        needed = ctx.needs_input_grad[4:]
        return None, None, None, None, *(torch.from_numpy(a) if need else None for a, need in zip(arrays, needed))


def _torchs_threads() -> Any:
    return batching.threads_of(torch.get_num_threads(), torch_threads.together if torch_threads.available() else None)


def _run(
    layer: Recurrent,
    sequences: Sequences,
    masks: Masks,
    form: _Form,
    tensors: Sequence[Tensor],
    tape: Tape | None = None,
) -> tuple[tuple[Tensor, ...], Any]:
    """``(y, *state)`` of ``x, *state``, and the backward pass if there is a tape."""
    rows, *before = map(_array, tensors)
    one_step = sequences.T == 1 and sequences.B < batching.ROWS_OF_A_SHARE and layer.steps_in_place and not masks
    if one_step and tape is None:
        after, backward = tuple([s.copy() for s in before]), None
        y = layer._step(rows, after)[0]
    else:
        with _torchs_threads():
            packs = packing.packs(layer, tape is not None)
            y, after, backward = passes.run(layer, rows, tuple(before), sequences, masks, packs, tape)
    return form.of(y, after), backward


def _recurrence(
    layer: Recurrent, weights: Sequence[Tensor], sequences: Sequences, masks: Masks, form: _Form, *tensors: Tensor
) -> Any:
    """``y, *state`` of ``x, *state``, with a graph if one is asked for."""
    dtype = weights[0].dtype
    for name, tensor in zip(("input", "hx", "hx"), tensors):
        if not tensor.is_cpu:
            raise TypeError(f"{name}: expected a tensor on the CPU, got one on {tensor.device}")
        if tensor.dtype != dtype and not torch.is_autocast_enabled("cpu"):
            raise TypeError(f"{name}: expected the weights' {dtype}, got {tensor.dtype}")
    tensors = tuple([tensor.to(dtype) for tensor in tensors])
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*tensors, *weights)):
        return _Run.apply(layer, sequences, masks, form, *tensors, *weights)
    return _run(layer, sequences, masks, form, tensors)[0]


def _sequence_function(kind: str) -> Callable[..., Any]:
    """Stands for PyTorch's function of the same name, and takes what it takes: padded sequences or packed ones."""
    original = getattr(torch._VF, kind)

    def run(x: Tensor, *arguments: Any) -> Any:
        packed = not isinstance(arguments[2], bool)
        states = _states(kind, arguments[1 if packed else 0])
        if states is None or _is_torchs(x):
            return original(x, *arguments)
        if packed:
            batch_sizes, _, weights, bias, num_layers, dropout, train, bidirectional = arguments
            sequences, batch_first = _packed_sequences(batch_sizes), False
            if len(x) != sequences.N:
                raise RuntimeError(
                    f"input: expected data of {sequences.N} rows, as batch_sizes add up to, got {len(x)}"
                )
        else:
            _, weights, bias, num_layers, dropout, train, bidirectional, batch_first = arguments
            x = x.transpose(0, 1) if batch_first else x
            sequences = full_sequences(*x.shape[:2])
        layer = _layer_of(kind, weights, num_layers, bias, bidirectional)
        leading, masks = x.shape[:-1], {}
        if train and dropout:
            size = layer.directions * layer.cell.P
            for k in range(1, num_layers):
                ones = torch.ones(*leading, size, dtype=weights[0].dtype)
                masks["dropout", k] = _array(nn.functional.dropout(ones, dropout)).reshape(-1, size)
        form = _Form(leading, batch_first, False)
        return _recurrence(layer, weights, sequences, masks, form, x.reshape(-1, x.shape[-1]), *states)

    return run


def _cell_function(kind: str) -> Callable[..., Any]:
    """Stands for PyTorch's function of a cell, and takes what it takes."""
    original, gates = getattr(torch._VF, f"{kind}_cell"), KINDS[kind][1]

    def run(x: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> Any:
        states = _states(kind, hx)
        if states is None or _is_torchs(x):
            return original(x, hx, w_ih, w_hh, b_ih, b_hh)
        if b_ih is None and b_hh is not None:
            b_ih = torch.zeros_like(b_hh)
        elif b_hh is None and b_ih is not None:
            b_hh = torch.zeros_like(b_ih)
        weights = (w_ih, w_hh) if b_ih is None or b_hh is None else (w_ih, w_hh, b_ih, b_hh)
        (B, I), (rows, H) = x.shape, w_hh.shape
        shapes = (B, I), *((B, H),) * len(states), (rows, I), (rows, H), (rows,), (rows,)
        plain = rows == gates * H and _plain((x, *states, *weights), shapes)
        if plain and B <= direct.FEW_ROWS:
            after = _step_directly(kind, len(weights) == 4, B, I, H, x, states, weights)
        else:
            if w_ih.shape[1] != I:
                raise RuntimeError(f"input: expected shape (B, {w_ih.shape[1]}), got {tuple(x.shape)}")
            for state in states:
                if state.shape != (B, H):
                    raise RuntimeError(f"hx: expected shape {(B, H)}, got {tuple(state.shape)}")
            layer = _layer_of(kind, weights, 1, len(weights) == 4, False)
            if plain and B * I * H < batching.WORTH_A_THREAD // 4:
                after = _step(layer, x, states)
            else:
                before, form = [state.unsqueeze(0) for state in states], _Form((B,), False, True)
                after = _recurrence(layer, weights, full_sequences(1, B), {}, form, x, *before)[1:]
        return tuple(after) if len(after) > 1 else after[0]

    return run


def _states(kind: str, hx: Any) -> tuple[Tensor, ...] | None:
    """The states that hx is; None if it is not as PyTorch's function of this kind takes it, which says so."""
    if kind != "lstm":
        return (hx,) if isinstance(hx, Tensor) else None
    return tuple(hx) if isinstance(hx, (tuple, list)) and len(hx) == 2 else None


def _is_torchs(x: Tensor) -> bool:
    """Whether PyTorch's own function is to run: where there is nothing to do, or more than to compute numbers."""
    return (
        type(x) not in (Tensor, nn.Parameter)
        or torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or not x.is_cpu
        or x.numel() == 0
        or forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _plain(tensors: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> bool:
    """Whether no graph is asked for, and all is of one dtype on the CPU, contiguous and of these shapes."""
    if torch.is_grad_enabled():
        return False
    dtype = tensors[0].dtype
    for tensor, shape in zip(tensors, shapes):
        if tensor.shape != shape or tensor.dtype is not dtype or not tensor.is_contiguous():
            return False
        if tensor.is_neg() or not tensor.is_cpu:
            return False
    return dtype in DTYPES


def _step_directly(
    kind: str, bias: bool, B: int, I: int, H: int, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]
) -> list[Tensor]:
    """The state after one step of a few rows, with weights as they lie."""
    step, record, slots = _direct_step(kind, H)
    after = [torch.empty_like(state) for state in states]
    places = [tensor.data_ptr() for tensor in weights]
    h, h_n = states[0].data_ptr(), after[0].data_ptr()
    s, s_n = states[-1].data_ptr(), after[-1].data_ptr()
    arguments = B, I, bias, x.data_ptr(), h, s, places[0], places[1], places[-2], places[-1], h_n, s_n

    def call(me: int, parties: int, barrier: Array) -> None:
        step(record, np.empty(slots * B, DTYPES[x.dtype]), *arguments, me, parties, barrier)

    work = max(B, 4) * KINDS[kind][1] * H * (I + H)  # to read a weight takes as long as some multiply-adds with it
    if work < batching.WORTH_A_THREAD:
        call(0, 1, batching.ALONE)
    else:
        with _torchs_threads():
            batching.together(batching.parties_for(work, B, H, np.dtype(DTYPES[x.dtype])), call)
    return after


def _step(layer: Recurrent, x: Tensor, states: Sequence[Tensor]) -> list[Tensor]:
    """The state after one step, on the calling thread."""
    after = [state.clone() for state in states]
    layer._step(x.numpy(), tuple([state.numpy()[None] for state in after]))
    return after


@lru_cache(256)
def _direct_step(kind: str, H: int) -> tuple[Any, Array, int]:
    layer = KINDS[kind][0](1, H)
    step = {"lstm": direct.lstm_step, "gru": direct.gru_step}.get(kind, direct.rnn_step)
    return step, layer.records, layer.cell.slots * LANES_OF[np.dtype(np.float32)]


def _packed_sequences(batch_sizes: Tensor) -> Sequences:
    """How the rows of a PackedSequence stand: as the kernels have them."""
    return _sequences_of(batch_sizes.numpy().tobytes())


@lru_cache(64)
def _sequences_of(batch_sizes: bytes) -> Sequences:
    sizes = np.frombuffer(batch_sizes, np.int64)
    if len(sizes) == 0 or sizes[-1] < 1 or (np.diff(sizes) > 0).any():
        raise RuntimeError(f"batch_sizes: expected numbers of at least 1, none more than the one before, got {sizes}")
    T, B = len(sizes), int(sizes[0])
    return Sequences(T, B, None if sizes[-1] == B else np.searchsorted(-sizes, -np.arange(B), side="left"))


FUNCTIONS = SimpleNamespace(
    **{kind: _sequence_function(kind) for kind in KINDS},
    **{f"{kind}_cell": _cell_function(kind) for kind in KINDS},
)
