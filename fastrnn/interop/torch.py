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
- Where there is more to do than to compute numbers, PyTorch's own functions run: while a model is traced, exported or
  compiled (the result needs no fastrnn), in forward-mode differentiation and `torch.func`, on other devices.
- `torch.jit.script`, `torch.fx` and ``quantize_dynamic`` look at a module's class: `restore` the model before.
- A call uses at most `torch.get_num_threads` and `fastrnn.get_num_threads` threads, which are PyTorch's own.

>>> import torch
>>> from fastrnn.interop.torch import LSTM
>>> lstm = LSTM(3, 5, num_layers=2, bidirectional=True)
>>> y, (h_n, c_n) = lstm(torch.ones(10, 2, 3))
>>> y.square().mean().backward()
>>> y.shape, lstm.weight_hh_l1.grad.shape
(torch.Size([10, 2, 10]), torch.Size([20, 5]))
"""

from collections.abc import Callable
from functools import wraps
from types import FunctionType
from typing import Any, NamedTuple

try:
    import torch
except ImportError as error:
    raise ImportError("fastrnn.interop.torch needs PyTorch: pip install fastrnn[torch]") from error
from torch import Tensor, nn

from .torch_functions import DTYPES, FUNCTIONS

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell", "Replacement", "replace", "restore"]


def _on_kernels(forward: Any) -> Any:
    """A ``forward`` of PyTorch's that calls `torch_functions` instead of its own."""
    if "_VF" not in forward.__globals__:
        raise ImportError(f"fastrnn.interop.torch does not know how PyTorch {torch.__version__} calls its functions")
    ours = FunctionType(forward.__code__, {**forward.__globals__, "_VF": FUNCTIONS}, "forward", forward.__defaults__)

    @wraps(forward)
    def run(self: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        # The compiler looks up what a function calls where it was defined.
        return (forward if torch.compiler.is_compiling() else ours)(self, *arguments, **keywords)

    return run


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

    forward = _of_cell(nn.LSTMCell, FUNCTIONS.lstm_cell)


class GRUCell(nn.GRUCell):
    """`torch.nn.GRUCell` on fastrnn's kernels; see the module's text for what differs."""

    forward = _of_cell(nn.GRUCell, FUNCTIONS.gru_cell)


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
        base = type(module).__bases__[0]
        if type(module) in THEIRS:
            module.__class__ = THEIRS[type(module)]
        elif base in THEIRS and nn.utils.parametrize.is_parametrized(module):
            type(module).__bases__ = (THEIRS[base],)  # a parametrised module has a class of its own
        else:
            continue
        restored.append(name)
    return restored
