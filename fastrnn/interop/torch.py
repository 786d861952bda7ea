"""PyTorch's recurrent modules on fastrnn's kernels: change one import, or `replace` those of a whole model.

``LSTM``, ``GRU``, ``RNN`` and their cells are subclasses of PyTorch's modules of the same names, of which they inherit
everything; ``forward`` is PyTorch's code too, but calls the kernels here. They run on the CPU in float32 and float64.

- No activations are copied: kernels read torch's memory, and torch takes over theirs.
- Weights may be changed in any way, also through ``.data`` or a NumPy view, which version counters do not see: each
  call looks at their contents, in the time that reading them takes.
- Dropout draws the masks that PyTorch's modules draw from the same random state.
- Under autocast weights are used as they are, and outputs have their precision.
- What the backward pass needs are saved tensors as PyTorch's modules have them: freed with the graph, and seen by
  `torch.utils.checkpoint` and `torch.autograd.graph.saved_tensors_hooks`.
- There is no second derivative: ``create_graph=True`` raises NotImplementedError.
- While a model is traced, exported or compiled, PyTorch's own functions run, so that the result needs no fastrnn.
- A call uses at most `torch.get_num_threads` and `fastrnn.get_num_threads` threads, which are PyTorch's own.

>>> import torch
>>> from fastrnn.interop.torch import LSTM
>>> lstm = LSTM(3, 5, num_layers=2, bidirectional=True)
>>> y, (h_n, c_n) = lstm(torch.ones(10, 2, 3))
>>> y.square().mean().backward()
>>> y.shape, lstm.weight_hh_l1.grad.shape
(torch.Size([10, 2, 10]), torch.Size([20, 5]))
"""

import copy
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from types import FunctionType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

try:
    import torch
except ImportError as error:
    raise ImportError("fastrnn.interop.torch needs PyTorch: pip install fastrnn[torch]") from error
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .. import batching, layers, packing, passes
from ..batching import Sequences, full_sequences
from ..kernels import contents, direct
from ..kernels.vector import LANES_OF
from ..masks import Masks
from ..packing import Gradients, step_size
from ..parameters import Array, Parameters
from ..passes import Tape
from ..recurrent import Recurrent
from . import torch_threads

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell", "Replacement", "replace", "restore"]

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
        projection = {} if P == H else {"proj_size": P}
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
    array = tensor.detach().numpy()
    return array if array.flags.carray else np.array(array, order="C")


class _Run(torch.autograd.Function):
    """A layer over rows: y and the state after it, of x (N, I), the state before it, and the weights."""

    @staticmethod
    def forward(ctx: Any, layer: Recurrent, sequences: Sequences, masks: Masks, *tensors: Tensor) -> Any:
        tape: Tape = {}
        outputs, ctx.run_backward = _run(layer, sequences, masks, tensors[: 1 + layer.STATES], tape)
        ctx.layer, ctx.keys = layer, list(tape)
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
        dy, *d_after = map(_array, d_outputs)
        sums: dict[Any, Any] = {}
        with _torchs_threads():
            dx, d_before = ctx.run_backward(dy, tuple(d_after), sums, tape)
        grads: Gradients = packing.named(ctx.layer, sums)
        arrays = dx, *d_before, *(grads[name] for name in ctx.layer.parameters)
        needed = ctx.needs_input_grad[3:]
        return None, None, None, *(torch.from_numpy(a) if need else None for a, need in zip(arrays, needed))


def _torchs_threads() -> Any:
    return batching.threads_of(torch.get_num_threads(), torch_threads.together if torch_threads.available() else None)


def _run(
    layer: Recurrent, sequences: Sequences, masks: Masks, tensors: Sequence[Tensor], tape: Tape | None = None
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
    return (torch.from_numpy(y), *map(torch.from_numpy, after)), backward


def _recurrence(
    layer: Recurrent, weights: Sequence[Tensor], sequences: Sequences, masks: Masks, *tensors: Tensor
) -> Any:
    """``y, *state`` of ``x, *state``, with a graph if one is asked for."""
    dtype = weights[0].dtype
    for name, tensor in zip(("input", "hx", "hx"), tensors):
        if tensor.device.type != "cpu":
            raise TypeError(f"{name}: expected a tensor on the CPU, got one on {tensor.device}")
        if tensor.dtype != dtype and not torch.is_autocast_enabled("cpu"):
            raise TypeError(f"{name}: expected the weights' {dtype}, got {tensor.dtype}")
    tensors = tuple([tensor.to(dtype) for tensor in tensors])
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*tensors, *weights)):
        return _Run.apply(layer, sequences, masks, *tensors, *weights)
    return _run(layer, sequences, masks, tensors)[0]


def _sequence_function(kind: str) -> Callable[..., Any]:
    """Stands for PyTorch's function of the same name, and takes what it takes: padded sequences or packed ones."""
    original = getattr(torch._VF, kind)

    def run(x: Tensor, *arguments: Any) -> Any:
        if _recorded() or x.numel() == 0:
            return original(x, *arguments)
        if not isinstance(arguments[2], bool):
            batch_sizes, hx, weights, bias, num_layers, dropout, train, bidirectional = arguments
            sequences, batch_first = _packed_sequences(batch_sizes), False
        else:
            hx, weights, bias, num_layers, dropout, train, bidirectional, batch_first = arguments
            x = x.transpose(0, 1) if batch_first else x
            sequences = full_sequences(*x.shape[:2])
        layer = _layer_of(kind, weights, num_layers, bias, bidirectional)
        leading, masks = x.shape[:-1], {}
        if train and dropout:
            size = layer.directions * layer.cell.P
            for k in range(1, num_layers):
                ones = torch.ones(*leading, size, dtype=weights[0].dtype)
                masks["dropout", k] = _array(nn.functional.dropout(ones, dropout)).reshape(-1, size)
        states = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        y, *after = _recurrence(layer, weights, sequences, masks, x.reshape(-1, x.shape[-1]), *states)
        y = y.view(*leading, -1)
        return y.transpose(0, 1) if batch_first else y, *after

    return run


def _cell_function(kind: str) -> Callable[..., Any]:
    """Stands for PyTorch's function of a cell, and takes what it takes."""
    original, gates = getattr(torch._VF, f"{kind}_cell"), KINDS[kind][1]

    def run(x: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> Any:
        if _recorded() or x.numel() == 0:
            return original(x, hx, w_ih, w_hh, b_ih, b_hh)
        states = (hx,) if isinstance(hx, Tensor) else tuple(hx)
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
                before = [state.unsqueeze(0) for state in states]
                after = [s.squeeze(0) for s in _recurrence(layer, weights, full_sequences(1, B), {}, x, *before)[1:]]
        return tuple(after) if len(after) > 1 else after[0]

    return run


def _plain(tensors: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> bool:
    """Whether no graph is asked for, and all is of one dtype on the CPU, contiguous and of these shapes."""
    if torch.is_grad_enabled():
        return False
    dtype = tensors[0].dtype
    for tensor, shape in zip(tensors, shapes):
        if tensor.shape != shape or tensor.dtype is not dtype or not tensor.is_contiguous() or not tensor.is_cpu:
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
    arrays = [state.numpy()[None] for state in after]
    work = np.empty(step_size(layer.cell, len(x), LANES_OF[layer.dtype]), layer.dtype)
    layer.kernels.step_of_arrays(*layer.packed, arrays[0], arrays[-1], work, x.numpy())
    return after


@lru_cache(256)
def _direct_step(kind: str, H: int) -> tuple[Any, Array, int]:
    layer = KINDS[kind][0](1, H)
    step = {"lstm": direct.lstm_step, "gru": direct.gru_step}.get(kind, direct.rnn_step)
    return step, layer.record, layer.cell.slots * LANES_OF[np.dtype(np.float32)]


def _recorded() -> bool:
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


def _packed_sequences(batch_sizes: Tensor) -> Sequences:
    """How the rows of a PackedSequence stand: as the kernels have them."""
    return _sequences_of(batch_sizes.numpy().tobytes())


@lru_cache(64)
def _sequences_of(batch_sizes: bytes) -> Sequences:
    sizes = np.frombuffer(batch_sizes, np.int64)
    T, B = len(sizes), int(sizes[0])
    return Sequences(T, B, None if sizes[-1] == B else np.searchsorted(-sizes, -np.arange(B), side="left"))


_FUNCTIONS = SimpleNamespace(
    **{kind: _sequence_function(kind) for kind in KINDS},
    **{f"{kind}_cell": _cell_function(kind) for kind in KINDS},
)


def _on_kernels(forward: Any) -> Any:
    """A ``forward`` of PyTorch's that calls functions of this module instead of its own."""
    if "_VF" not in forward.__globals__:
        raise ImportError(f"fastrnn.interop.torch does not know how PyTorch {torch.__version__} calls its functions")
    ours = FunctionType(forward.__code__, {**forward.__globals__, "_VF": _FUNCTIONS}, "forward", forward.__defaults__)
    ours.__doc__ = forward.__doc__
    return ours


def _of_cell(theirs: Any, function: Callable[..., Any]) -> Any:
    """A cell's ``forward``, which finds a module's own parameters sooner: to look for them by name takes longer."""
    general, names = _on_kernels(theirs.forward), ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]

    def forward(self: nn.Module, input: Tensor, hx: Any = None) -> Any:
        own = self._parameters
        if hx is None or input.dim() != 2 or list(own) != names:
            return general(self, input, hx)
        return function(input, hx, *own.values())

    forward.__doc__ = theirs.forward.__doc__
    return forward


class RNN(nn.RNN):
    """`torch.nn.RNN` on fastrnn's kernels; see the module's text for what differs."""

    forward = _on_kernels(nn.RNN.forward)


class LSTM(nn.LSTM):
    """`torch.nn.LSTM` on fastrnn's kernels; see the module's text for what differs."""

    forward = _on_kernels(nn.LSTM.forward)


class GRU(nn.GRU):
    """`torch.nn.GRU` on fastrnn's kernels; see the module's text for what differs."""

    forward = _on_kernels(nn.GRU.forward)


class RNNCell(nn.RNNCell):
    """`torch.nn.RNNCell` on fastrnn's kernels; see the module's text for what differs."""

    forward = _on_kernels(nn.RNNCell.forward)


class LSTMCell(nn.LSTMCell):
    """`torch.nn.LSTMCell` on fastrnn's kernels; see the module's text for what differs."""

    forward = _of_cell(nn.LSTMCell, _FUNCTIONS.lstm_cell)


class GRUCell(nn.GRUCell):
    """`torch.nn.GRUCell` on fastrnn's kernels; see the module's text for what differs."""

    forward = _of_cell(nn.GRUCell, _FUNCTIONS.gru_cell)


OURS: dict[Any, Any] = {
    nn.RNN: RNN, nn.LSTM: LSTM, nn.GRU: GRU, nn.RNNCell: RNNCell, nn.LSTMCell: LSTMCell, nn.GRUCell: GRUCell,
}  # fmt: skip
THEIRS = {ours: theirs for theirs, ours in OURS.items()}


class Replacement(NamedTuple):
    """What `replace` did: the names of the modules that it replaced, and of those that it left, with the reason."""

    replaced: list[str]
    left: dict[str, str]


def replace(model: nn.Module) -> Replacement:
    """Let all recurrent modules of a model run on fastrnn's kernels.

    They stay the objects that they are, with their parameters and hooks; only their class changes. Left are subclasses
    of PyTorch's modules, and what is not on the CPU in float32 or float64.

    >>> import torch
    >>> from fastrnn.interop.torch import replace
    >>> model = torch.nn.ModuleDict({"encoder": torch.nn.GRU(3, 5), "decoder": torch.nn.GRUCell(3, 5).half()})
    >>> replace(model)
    Replacement(replaced=['encoder'], left={'decoder': 'torch.float16 on cpu'})
    """
    replaced, left = [], {}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.RNNBase, nn.RNNCellBase)) or isinstance(module, tuple(THEIRS)):
            continue
        others = [w for w in module.parameters() if w.device.type != "cpu" or w.dtype not in DTYPES]
        if type(module) not in OURS:
            left[name] = f"a subclass: {type(module).__module__}.{type(module).__qualname__}"
        elif others:
            left[name] = f"{others[0].dtype} on {others[0].device}"
        else:
            module.__class__ = OURS[type(module)]
            replaced.append(name)
    return Replacement(replaced, left)


def restore(model: nn.Module) -> list[str]:
    """Undo `replace`, and return the names of the modules that are PyTorch's own again.

    >>> import torch
    >>> from fastrnn.interop.torch import GRU, restore
    >>> gru = GRU(3, 5)
    >>> restore(gru), type(gru)
    ([''], <class 'torch.nn.modules.rnn.GRU'>)
    """
    restored = []
    for name, module in model.named_modules():
        if type(module) in THEIRS:
            module.__class__ = THEIRS[type(module)]
            restored.append(name)
    return restored
