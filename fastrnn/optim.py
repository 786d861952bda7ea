"""Optimisers with PyTorch's updates, and the clipping of gradients.

An optimiser is made of a module's ``parameters`` and updates them in place; what it keeps from step to step goes into
a state dict of arrays, and so into a safetensors file.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from .checks import as_array, as_kernel_array, describe, flag, number
from .kernels import optim as kernels
from .parameters import Array, JoinedParameters, Parameters


class Optimizer:
    """What optimisers share. ``lr`` may be set at any time; ``config`` holds the other arguments.

    ``keeps`` names what an optimiser keeps from step to step, an array for each parameter.
    """

    config: dict[str, Any]

    def __init__(self, parameters: Parameters | JoinedParameters, lr: float, keeps: tuple[str, ...]):
        if not isinstance(parameters, (Parameters, JoinedParameters)):
            raise TypeError(f"parameters: expected a module's parameters, got {describe(parameters)}")
        self.parameters = parameters
        self.lr = lr
        self.steps = 0
        self.keeps = keeps
        self._kept = {f"{kept}.{name}": np.zeros_like(array) for kept in keeps for name, array in parameters.items()}

    @property
    def lr(self) -> float:
        """The learning rate."""
        return self._lr

    @lr.setter
    def lr(self, value: float) -> None:
        self._lr = number(value, "lr", 0)

    def step(self, grads: Mapping[str, Array]) -> None:
        """Update every parameter in place.

        Raises TypeError or ValueError if ``grads`` has not the parameters' names, shapes and dtypes; then nothing has
        been updated.
        """
        checked = {name: array.reshape(-1) for name, array in _checked(grads, self.parameters).items()}
        self.steps += 1
        with self.parameters.writable() as arrays:
            for name, array in arrays.items():
                kept = [self._kept[f"{kept}.{name}"].reshape(-1) for kept in self.keeps]
                self._update(array.reshape(-1), checked[name], *kept)

    def _update(self, p: Array, g: Array, *kept: Array) -> None:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Array]:
        """A copy of what is kept from step to step: ``lr``, ``steps``, and an array per parameter for each moment."""
        kept = {name: array.copy() for name, array in self._kept.items()}
        return {"lr": np.array([self.lr]), "steps": np.array([self.steps]), **kept}

    def load_state_dict(self, state_dict: Mapping[str, Array]) -> None:
        """Continue from what `state_dict` returned; nothing changes if it does not fit.

        Raises KeyError for names that are missing or not known, TypeError or ValueError for a wrong dtype or shape.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict: expected a dict of arrays, got {describe(state_dict)}")
        known = ["lr", "steps", *self._kept]
        missing, unknown = [n for n in known if n not in state_dict], [n for n in state_dict if n not in known]
        if missing or unknown:
            raise KeyError(f"state_dict: missing {missing}, not known {unknown}")
        kept = {
            name: np.array(as_kernel_array(state_dict[name], name, mine.dtype, mine.shape))
            for name, mine in self._kept.items()
        }
        steps = as_array(state_dict["steps"], "steps")
        if steps.shape != (1,) or steps.dtype.kind not in "iu" or steps[0] < 0:
            raise ValueError(f"steps: expected an array of one integer of at least 0, got {steps!r}")
        lr = as_array(state_dict["lr"], "lr")
        if lr.shape != (1,):
            raise ValueError(f"lr: expected an array of one number, got shape {lr.shape}")
        self.lr = lr.item()
        self.steps, self._kept = int(steps[0]), kept


class SGD(Optimizer):
    """Stochastic gradient descent with momentum: `torch.optim.SGD` (Sutskever, Martens, Dahl and Hinton 2013).

    ``v = momentum v + g; p -= lr v``, where g is the gradient plus ``weight_decay p``; with ``nesterov``,
    ``p -= lr (g + momentum v)``.

    Args:
        parameters: a module's ``parameters``.
        lr: the learning rate.

    Raises TypeError or ValueError for an argument of a wrong type or value.

    >>> import numpy as np
    >>> from fastrnn.heads import Linear
    >>> from fastrnn.optim import SGD
    >>> linear = Linear(2, 1, bias=False)
    >>> linear.weight = np.zeros((1, 2), np.float32)
    >>> SGD(linear.parameters, lr=0.5).step({"weight": np.ones((1, 2), np.float32)})
    >>> linear.weight
    array([[-0.5, -0.5]], dtype=float32)
    """

    def __init__(
        self,
        parameters: Parameters | JoinedParameters,
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ):
        self.momentum = number(momentum, "momentum", 0)
        self.weight_decay = number(weight_decay, "weight_decay", 0)
        self.nesterov = flag(nesterov, "nesterov")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov: expected a momentum greater than 0 with it, got 0")
        self.config = {"momentum": self.momentum, "weight_decay": self.weight_decay, "nesterov": self.nesterov}
        super().__init__(parameters, lr, ("momentum",) if self.momentum else ())

    def _update(self, p: Array, g: Array, *kept: Array) -> None:
        number = p.dtype.type
        v = kept[0] if kept else np.empty(0, p.dtype)
        kernels.sgd(p, g, v, number(self.lr), number(self.momentum), number(self.weight_decay), self.nesterov)


class Adam(Optimizer):
    """Adaptive moment estimation: `torch.optim.Adam` (Kingma and Ba 2015).

    ``m = beta1 m + (1 - beta1) g; v = beta2 v + (1 - beta2) g^2``, and, both divided by ``1 - beta^steps``,
    ``p -= lr m / (sqrt(v) + eps)``, where g is the gradient plus ``weight_decay p``.

    Args:
        parameters: a module's ``parameters``.
        lr: the learning rate.
        betas: beta1 and beta2.

    Raises TypeError or ValueError for an argument of a wrong type or value.

    >>> import numpy as np
    >>> from fastrnn.heads import Linear
    >>> from fastrnn.optim import Adam
    >>> linear = Linear(2, 1, bias=False)
    >>> linear.weight = np.zeros((1, 2), np.float32)
    >>> Adam(linear.parameters, lr=0.5).step({"weight": np.array([[10, -3]], np.float32)})
    >>> linear.weight.round(3)
    array([[-0.5,  0.5]], dtype=float32)
    """

    DECOUPLED = False

    def __init__(
        self,
        parameters: Parameters | JoinedParameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise TypeError(f"betas: expected two numbers, got {describe(betas)}")
        self.betas = number(betas[0], "betas[0]", 0, 1 - 2**-53), number(betas[1], "betas[1]", 0, 1 - 2**-53)
        self.eps = number(eps, "eps", 0)
        self.weight_decay = number(weight_decay, "weight_decay", 0)
        self.config = {"betas": list(self.betas), "eps": self.eps, "weight_decay": self.weight_decay}
        super().__init__(parameters, lr, ("exp_avg", "exp_avg_sq"))

    def _update(self, p: Array, g: Array, *kept: Array) -> None:
        (beta1, beta2), number = self.betas, p.dtype.type
        step_size = self.lr / (1 - beta1**self.steps)
        root = math.sqrt(1 - beta2**self.steps)
        l2, keep = (0, 1 - self.lr * self.weight_decay) if self.DECOUPLED else (self.weight_decay, 1)
        numbers = (step_size, beta1, beta2, 1 - beta1, 1 - beta2, root, self.eps, l2, keep)
        kernels.adam(p, g, *kept, *[number(x) for x in numbers])


class AdamW(Adam):
    """Adam with decoupled weight decay: `torch.optim.AdamW` (Loshchilov and Hutter 2019).

    As `Adam`, but weights decay by themselves, ``p *= 1 - lr weight_decay``, not through the gradient.

    >>> from fastrnn.heads import Linear
    >>> from fastrnn.optim import AdamW
    >>> AdamW(Linear(2, 1).parameters).weight_decay
    0.01
    """

    DECOUPLED = True

    def __init__(
        self,
        parameters: Parameters | JoinedParameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ):
        super().__init__(parameters, lr, betas, eps, weight_decay)


def clip_grad_norm(grads: dict[str, Array], max_norm: float) -> float:
    """Scale gradients, in place, so that their global 2-norm is at most ``max_norm``; returns the norm before.

    (Pascanu, Mikolov and Bengio 2013; as PyTorch's ``clip_grad_norm_``.) A norm that is not finite raises nothing: a
    NaN among the gradients makes all of them NaN.

    Raises TypeError or ValueError for a wrong argument; then nothing has been scaled.

    >>> import numpy as np
    >>> from fastrnn.optim import clip_grad_norm
    >>> grads = {"weight": np.array([3.0, 4.0])}
    >>> clip_grad_norm(grads, 1.0), grads["weight"].round(3)
    (5.0, array([0.6, 0.8]))
    """
    max_norm = number(max_norm, "max_norm", 0)
    _check_writable(grads)
    total = 0.0
    for name, array in grads.items():
        total += kernels.sum_of_squares(as_kernel_array(array, name, array.dtype, array.shape).reshape(-1))
    norm = math.sqrt(total)
    scale = max_norm / (norm + 1e-6)
    if not scale >= 1:
        for array in grads.values():
            array *= array.dtype.type(scale)
    return norm


def clip_grad_value(grads: dict[str, Array], clip_value: float) -> None:
    """Cut every number of the gradients, in place, to the range from ``-clip_value`` to ``clip_value``.

    Raises TypeError or ValueError for a wrong argument; then nothing has been cut.

    >>> import numpy as np
    >>> from fastrnn.optim import clip_grad_value
    >>> grads = {"weight": np.array([3.0, -0.5])}
    >>> clip_grad_value(grads, 1.0)
    >>> grads["weight"]
    array([ 1. , -0.5])
    """
    clip_value = number(clip_value, "clip_value", 0)
    _check_writable(grads)
    for array in grads.values():
        np.clip(array, -clip_value, clip_value, out=array)


def _check_writable(grads: Any) -> None:
    if not isinstance(grads, Mapping):
        raise TypeError(f"grads: expected a dict of arrays, got {describe(grads)}")
    for name, array in grads.items():
        if not isinstance(array, np.ndarray):
            raise TypeError(f"grads[{name!r}]: expected an array, got {describe(array)}")
        if array.dtype not in (np.float32, np.float64):
            raise TypeError(f"grads[{name!r}]: expected dtype float32 or float64, got {array.dtype}")
        if not array.flags.writeable:
            raise ValueError(f"grads[{name!r}]: expected an array that may be written to, got a read-only one")


def _checked(grads: Any, parameters: Mapping[str, Array]) -> dict[str, Array]:
    """The gradients as kernels read them."""
    if not isinstance(grads, Mapping):
        raise TypeError(f"grads: expected a dict of arrays, got {describe(grads)}")
    missing, unknown = [n for n in parameters if n not in grads], [n for n in grads if n not in parameters]
    if missing or unknown:
        raise ValueError(f"grads: expected the parameters' names, got missing {missing}, not known {unknown}")
    return {n: as_kernel_array(grads[n], f"grads[{n!r}]", p.dtype, p.shape) for n, p in parameters.items()}
