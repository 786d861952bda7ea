"""The kernels: tiles of a product, activations, loss and update, and each cell's four loops."""

import ctypes

import numpy as np
from numba import types

import fastrnn

from . import limits
from .common import CELLS, DTYPES, Case, Timed

SHAPES = {"one": (40, 1, 256, 256), "batch": (20, 32, 128, 128), "odd": (30, 5, 40, 200)}


class Gemm(Timed):
    """A panel of packed weights by some rows: one, a tile of them, and many."""

    params = (DTYPES, ["one row", "one tile", "many rows"])
    param_names = ("dtype", "rows")
    in_gate = True

    def prepare(self, dtype, rows):
        gemm, tile = fastrnn.kernels.gemm, fastrnn.kernels.tile
        self.dtype, self.K = np.dtype(dtype), 512
        self.W = tile.VECS * tile.LANES[getattr(types, self.dtype.name)]
        self.M = {"one row": 1, "one tile": tile.ROWS, "many rows": 8 * tile.ROWS}[rows]
        rng = np.random.default_rng(0)
        sizes = self.W, self.M * self.K, self.K * self.W, self.M * self.W
        self.arrays = bias, left, packed, out = [rng.standard_normal(size, dtype) for size in sizes]
        address = int(gemm.multiply_addresses(self.dtype)[0])
        n, p = ctypes.c_int64, ctypes.c_void_p
        kinds = (n,) * 5 + (p, n, n, p, n, n, p, n, n, n, n, p, n, n, n)
        self.function = ctypes.CFUNCTYPE(None, *kinds)(address)
        start, target, factor, right = (array.ctypes.data for array in (bias, out, left, packed))
        W, M, K = self.W, self.M, self.K
        self.arguments = (0, 1, W, W, M, start, W, 0, target, W, W, factor, K, 1, 1, 0, right, K * W, W, K)

    def call_product(self, dtype, rows):
        for _ in range(20):
            self.function(*self.arguments)

    def work(self, name):
        return 20 * 2 * self.M * self.W * self.K, limits.MultiplyAdds(self.dtype)


class Activations(Timed):
    params = (["sigmoid", "tanh"], DTYPES)
    param_names = ("function", "dtype")
    in_gate = True

    def prepare(self, function, dtype):
        self.x = np.random.default_rng(0).standard_normal(8192, dtype)
        self.y = np.zeros_like(self.x)
        self.function = getattr(fastrnn.kernels.activations, f"{function}_array")

    def call_array(self, function, dtype):
        self.function(self.x, self.y)

    def work(self, name):
        return self.x.nbytes, limits.Reads(self.x.nbytes)


class Cell(Timed):
    """One layer of one direction: inference, the pass that saves for training, the pass back, a step."""

    params = (CELLS, DTYPES, list(SHAPES))
    param_names = ("cell", "dtype", "shape")
    in_gate = True

    def prepare(self, cell, dtype, shape):
        self.case = Case(cell, SHAPES[shape], dtype)
        self.pullback = self.case.forward()
        _, B, I, _ = SHAPES[shape]
        self.stream = self.case.layer.stream(B)
        self.x = np.random.default_rng(0).standard_normal((B, I), dtype)

    def call_infer(self, cell, dtype, shape):
        self.case.infer()

    def call_forward(self, cell, dtype, shape):
        self.case.forward()

    def call_backward(self, cell, dtype, shape):
        self.pullback(self.case.dy)

    def call_step(self, cell, dtype, shape):
        self.stream.step(self.x)

    def work(self, name):
        done, limit = self.case.work(2 if name == "backward" else 1)
        return (done / self.case.T if name == "step" else done), limit


class Loss(Timed):
    """Cross-entropy and its gradient, and Adam's update."""

    params = (DTYPES,)
    param_names = ("dtype",)
    in_gate = True

    def prepare(self, dtype):
        rng = np.random.default_rng(0)
        self.logits, self.targets = rng.standard_normal((256, 96), dtype), rng.integers(0, 96, 256)
        self.layer = fastrnn.Linear(128, 512, dtype=dtype, seed=0)
        self.optimizer = fastrnn.optim.Adam(self.layer.parameters, lr=1e-6)
        self.grads = {name: rng.standard_normal(p.shape, dtype) for name, p in self.layer.parameters.items()}

    def call_cross_entropy(self, dtype):
        fastrnn.cross_entropy(self.logits, self.targets)

    def call_adam(self, dtype):
        self.optimizer.step(self.grads)

    def work(self, name):
        arrays = [self.logits] if name == "cross_entropy" else list(self.grads.values())
        size = sum(array.nbytes for array in arrays) * (1 if name == "cross_entropy" else 4)
        return size, limits.Reads(size)
