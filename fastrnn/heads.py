"""What comes before and after recurrent layers: Embedding and Linear."""

from collections.abc import Callable
from typing import Any

import numpy as np

from . import batching, memory, packing
from .checks import as_array, as_indices, as_kernel_array, as_seed, flag, float_dtype, positive
from .kernels import linear as kernels
from .kernels.gemm import multiply_addresses
from .kernels.tile import VECS
from .kernels.vector import LANES_OF
from .parameters import Array, Module, Parameters


class Embedding(Module):
    """A table with a row of numbers for each index: `torch.nn.Embedding` on NumPy arrays.

    Args:
        num_embeddings: rows of the table, V.
        embedding_dim: numbers in a row, D.
        dtype: float32 or float64.
        seed: of the initial table, drawn from N(0, 1); None takes the system's.

    The parameter is ``weight`` (V, D), as in PyTorch.

    Raises TypeError or ValueError for an argument of a wrong type or value.

    >>> import numpy as np
    >>> from fastrnn.heads import Embedding
    >>> embedding = Embedding(10, 3, seed=0)
    >>> y, pullback = embedding.vjp(np.array([[1, 2], [1, 9]]))
    >>> y.shape
    (2, 2, 3)
    >>> pullback(np.ones_like(y))["weight"][:3, 0]  # row 1 was taken twice
    array([0., 2., 1.], dtype=float32)
    """

    parameters: Parameters
    weight: Array

    def __init__(self, num_embeddings: int, embedding_dim: int, dtype: Any = np.float32, seed: int | None = None):
        self.num_embeddings = positive(num_embeddings, "num_embeddings")
        self.embedding_dim = positive(embedding_dim, "embedding_dim")
        self.dtype = float_dtype(dtype)
        self.config = {
            "num_embeddings": self.num_embeddings,
            "embedding_dim": self.embedding_dim,
            "dtype": self.dtype.name,
        }
        weight = np.random.default_rng(as_seed(seed)).standard_normal((self.num_embeddings, self.embedding_dim))
        self.parameters = Parameters({"weight": weight.astype(self.dtype)})

    def __call__(self, indices: Any) -> Array:
        """The rows at ``indices``, integers of any shape, as an array of that shape and (D,).

        Raises TypeError for what is no integers, ValueError for an index out of range.
        """
        return self.weight[as_indices(indices, "indices", self.num_embeddings)]

    def vjp(self, indices: Any) -> tuple[Array, Callable[[Array], dict[str, Array]]]:
        """The rows, and ``pullback(dy)``, which returns the gradient by the whole table, ``{"weight": (V, D)}``."""
        indices = as_indices(indices, "indices", self.num_embeddings)
        y = self.weight[indices]
        shape, rows = y.shape, indices.flatten()

        def pullback(dy: Array) -> dict[str, Array]:
            dy = as_kernel_array(dy, "dy", self.dtype, shape)
            dw = np.zeros((self.num_embeddings, self.embedding_dim), self.dtype)
            kernels.add_rows(dy.reshape(-1, self.embedding_dim), rows, dw)
            return {"weight": dw}

        return y, pullback


class Linear(Module):
    """``y = x W^T + b``, such as the output layer ``o_t = W_ho h_t``: `torch.nn.Linear` on NumPy arrays.

    Args:
        in_features, out_features: numbers in a row of x and of y.
        bias: whether there is one.
        dtype: float32 or float64.
        seed: of the initial parameters, uniform within 1/sqrt(in_features) of 0; None takes the system's.

    Parameters are ``weight`` (out_features, in_features) and ``bias`` (out_features), as in PyTorch.

    Raises TypeError or ValueError for an argument of a wrong type or value.

    >>> import numpy as np
    >>> from fastrnn.heads import Linear
    >>> linear = Linear(3, 2, seed=0)
    >>> y, pullback = linear.vjp(np.ones((5, 4, 3), np.float32))
    >>> y.shape
    (5, 4, 2)
    >>> dx, grads = pullback(np.ones_like(y))
    >>> dx.shape, grads["weight"].shape, grads["bias"]
    ((5, 4, 3), (2, 3), array([20., 20.], dtype=float32))
    """

    parameters: Parameters

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, dtype: Any = np.float32, seed: int | None = None
    ):
        self.in_features = positive(in_features, "in_features")
        self.out_features = positive(out_features, "out_features")
        has_bias = flag(bias, "bias")
        self.dtype = float_dtype(dtype)
        self.config = {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": has_bias,
            "dtype": self.dtype.name,
        }
        rng = np.random.default_rng(as_seed(seed))
        bound = self.in_features**-0.5
        arrays = {"weight": rng.uniform(-bound, bound, (self.out_features, self.in_features)).astype(self.dtype)}
        if has_bias:
            arrays["bias"] = rng.uniform(-bound, bound, self.out_features).astype(self.dtype)
        self.parameters = Parameters(arrays)

    def _panels(self, columns: int) -> int:
        return -(-columns // (VECS * LANES_OF[self.dtype]))

    def _pack_forward(self) -> Array:
        return packing.pack_linear(self.parameters["weight"], self.parameters["bias"] if self.config["bias"] else 0)

    def _pack_backward(self) -> Array:
        return packing.pack_linear_back(self.parameters["weight"])

    def _rows(self, x: Any, name: str) -> tuple[Array, tuple[int, ...]]:
        """``x`` as a matrix, and the shape without the last dimension."""
        x = as_array(x, name)
        if x.ndim == 0:
            raise ValueError(f"{name}: expected shape (..., {self.in_features}), got ()")
        x = as_kernel_array(x, name, self.dtype, (None,) * (x.ndim - 1) + (self.in_features,))
        return x.reshape(-1, self.in_features), x.shape[:-1]

    def _parties(self, rows: int, times: int) -> int:
        work = times * rows * self.in_features * self.out_features
        return batching.parties_for(work, rows, self.out_features, self.dtype)

    def _forward(self, x: Array, save: bool) -> tuple[Array, Array]:
        M, W = len(x), VECS * LANES_OF[self.dtype]
        packed, multiply = self.parameters.derived("forward", self._pack_forward), multiply_addresses(self.dtype)
        y = np.empty((M, self.out_features), self.dtype)
        xs = memory.empty(self._panels(self.in_features) * M * W if save else 0, self.dtype)

        def call(me: int, parties: int, barrier: Array) -> None:
            kernels.forward(x, packed, y, xs, save, me, parties, barrier, multiply)

        batching.together(self._parties(M, 1), call)
        return y, xs

    def __call__(self, x: Array) -> Array:
        """``x W^T + b`` for x of shape (..., in_features): an array of shape (..., out_features).

        Raises TypeError or ValueError for an array of a wrong dtype or shape.
        """
        x, shape = self._rows(x, "x")
        return self._forward(x, save=False)[0].reshape(*shape, self.out_features)

    def vjp(self, x: Array) -> tuple[Array, Callable[[Array], tuple[Array, dict[str, Array]]]]:
        """The outputs, and ``pullback(dy)``, which returns ``dx, grads``, gradients by x and by each parameter.

        The pullback reads nothing that later calls change: it may be called again, from any thread, and after the
        parameters have moved on.
        """
        x, shape = self._rows(x, "x")
        y, xs = self._forward(x, save=True)
        packed, multiply = self.parameters.derived("backward", self._pack_backward), multiply_addresses(self.dtype)
        M = len(x)

        def pullback(dy: Array) -> tuple[Array, dict[str, Array]]:
            dy = as_kernel_array(dy, "dy", self.dtype, (*shape, self.out_features)).reshape(M, self.out_features)
            dx = np.empty((M, self.in_features), self.dtype)
            dw = np.empty((self.out_features, self.in_features), self.dtype)
            db = np.empty(self.out_features, self.dtype)

            def call(me: int, parties: int, barrier: Array) -> None:
                kernels.backward(dy, xs, packed, dx, dw, db, me, parties, barrier, multiply)

            batching.together(self._parties(M, 2), call)
            grads = {"weight": dw, "bias": db} if self.config["bias"] else {"weight": dw}
            return dx.reshape(*shape, self.in_features), grads

        return y.reshape(*shape, self.out_features), pullback
