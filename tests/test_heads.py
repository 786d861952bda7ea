"""Embedding and Linear against NumPy in float64, and against PyTorch."""

import threading

import numpy as np
import pytest
from fastrnn.kernels import linear as kernels
from fastrnn.kernels.gemm import multiply_addresses
from fastrnn.kernels.tile import VECS
from fastrnn.kernels.vector import LANES_OF
from oracle import assert_close, assert_same_bits

from fastrnn import batching
from fastrnn.heads import Embedding, Linear

SHAPES = [(1, 1, 1), (3, 17, 63), (65, 65, 1), (17, 1, 65), (63, 63, 17), (300, 65, 70), (1, 130, 600)]


def linear_and_data(M, K, N, dtype, rng, bias=True):
    linear = Linear(K, N, bias=bias, dtype=dtype, seed=1)
    return linear, rng.standard_normal((M, K)).astype(dtype), rng.standard_normal((M, N)).astype(dtype)


def expected(linear, x, dy):
    w, x, dy = (a.astype(np.float64) for a in (linear.weight, x, dy))
    bias = linear.bias.astype(np.float64) if linear.config["bias"] else 0
    return x @ w.T + bias, dy @ w, dy.T @ x, dy.sum(0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_its_equation(shape, bias, dtype, rng):
    linear, x, dy = linear_and_data(*shape, dtype, rng, bias)
    y, pullback = linear.vjp(x)
    dx, grads = pullback(dy)
    y_, dx_, dw_, db_ = expected(linear, x, dy)
    assert_close(y, y_, "y")
    assert_close(dx, dx_, "dx")
    assert_close(grads["weight"], dw_, "dw")
    assert list(grads) == list(linear.parameters)
    if bias:
        assert_close(grads["bias"], db_, "db")
    assert_same_bits(linear(x), y)


@pytest.mark.parametrize("shape", SHAPES)
def test_linear_bits_do_not_depend_on_threads_or_batch(shape, dtype, rng, small_shares):
    linear, x, dy = linear_and_data(*shape, dtype, rng)
    results = []
    for threads in (1, 2, 3):
        batching.set_num_threads(threads)
        y, pullback = linear.vjp(x)
        results.append((y, *pullback(dy)))
    for y, dx, grads in results[1:]:
        assert_same_bits(y, results[0][0])
        assert_same_bits(dx, results[0][1])
        for name in grads:
            assert_same_bits(grads[name], results[0][2][name], name)
    assert_same_bits(linear(x[-1:]), y[-1:])


def test_linear_pullback_keeps_its_own_memory(dtype, rng):
    linear, x, dy = linear_and_data(30, 17, 9, dtype, rng)
    _, dx_, dw_, _ = expected(linear, x, dy)
    _, pullback = linear.vjp(x)
    x[:] = np.nan
    linear.weight = np.full_like(linear.weight, np.nan)
    results = []
    workers = [threading.Thread(target=lambda: results.append(pullback(dy))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 4
    for dx, grads in results:
        assert_close(dx, dx_)
        assert_close(grads["weight"], dw_)


def test_linear_takes_any_layout_and_leaves_it_as_it_was(dtype, rng):
    linear = Linear(6, 5, dtype=dtype, seed=0)
    x = rng.standard_normal((6, 3, 4)).astype(dtype).T
    x.flags.writeable = False
    before = x.copy()
    y, pullback = linear.vjp(x)
    assert y.shape == (4, 3, 5)
    dy = np.asfortranarray(np.ones_like(y))
    dx, _ = pullback(dy)
    assert dx.shape == x.shape
    assert_same_bits(x, before)
    assert_same_bits(y, linear(x.copy()))
    assert_same_bits(linear(x[1, 2]), y[1, 2])
    with linear.parameters.writable():
        assert_same_bits(linear(x), y)


def test_linear_kernels_write_every_number_and_nothing_else(dtype, rng):
    linear, x, dy = linear_and_data(7, 19, 21, dtype, rng)
    guarded = [np.full(n + 64, np.nan, dtype) for n in (7 * 21, 7 * 19, 21 * 19, 21)]
    y, dx, dw, db = (
        g[:n].reshape(s) for g, n, s in zip(guarded, (147, 133, 399, 21), ((7, 21), (7, 19), (21, 19), 21))
    )
    xs = np.full(-(-19 // (VECS * LANES_OF[dtype])) * 7 * VECS * LANES_OF[dtype], np.nan, dtype)
    kernels.forward(x, linear._pack_forward(), y, xs, True, 0, 1, batching.ALONE, multiply_addresses(dtype, True))
    kernels.backward(dy, xs, linear._pack_backward(), dx, dw, db, 0, 1, batching.ALONE, multiply_addresses(dtype, True))
    for actual, right in zip((y, dx, dw, db), expected(linear, x, dy)):
        assert_close(actual, right)
    assert all(np.isnan(g[-64:]).all() for g in guarded)


def test_linear_nan_comes_out_where_it_went_in(dtype, rng):
    linear, x, dy = linear_and_data(5, 3, 4, dtype, rng)
    x[2, 1] = np.nan
    y, pullback = linear.vjp(x)
    assert (np.isnan(y).any(1) == [False, False, True, False, False]).all()
    _, grads = pullback(dy)
    assert (np.isnan(grads["weight"]).any(0) == [False, True, False]).all()


def test_linear_agrees_with_torch(dtype, rng):
    torch = pytest.importorskip("torch")
    linear, x, dy = linear_and_data(33, 20, 10, dtype, rng)
    theirs = torch.nn.Linear(20, 10, dtype=getattr(torch, dtype.name))
    linear.load_state_dict(theirs.state_dict())
    tx = torch.from_numpy(x).requires_grad_()
    ty = theirs(tx)
    ty.backward(torch.from_numpy(dy))
    y, pullback = linear.vjp(x)
    dx, grads = pullback(dy)
    assert_close(y, ty.detach().double().numpy())
    assert_close(dx, tx.grad.double().numpy())
    for name, parameter in theirs.named_parameters():
        assert_close(grads[name], parameter.grad.double().numpy(), name)


def test_initial_parameters_are_distributed_as_torchs():
    linear = Linear(100, 1000, seed=0)
    for name in ("weight", "bias"):
        assert np.abs(linear.parameters[name]).max() <= 0.1
        assert abs(linear.parameters[name].std() - 0.1 / 3**0.5) < 3e-3
    weight = Embedding(300, 300, seed=0).weight
    assert abs(weight.mean()) < 0.02
    assert abs(weight.std() - 1) < 0.02
    assert_same_bits(Linear(3, 4, seed=5).weight, Linear(3, 4, seed=5).weight)
    assert (Linear(3, 4, seed=5).weight != Linear(3, 4, seed=6).weight).all()


@pytest.mark.parametrize("shape", [(), (1,), (7, 5), (2, 3, 4)])
@pytest.mark.parametrize("D", [1, 17, 65])
def test_embedding_takes_rows_and_adds_gradients(shape, D, dtype, rng):
    embedding = Embedding(11, D, dtype=dtype, seed=0)
    indices = rng.integers(0, 11, shape, dtype=np.uint8 if D == 17 else np.int64)
    y, pullback = embedding.vjp(indices)
    assert_same_bits(y, embedding.weight[indices])
    assert_same_bits(embedding(indices), y)
    dy = rng.standard_normal(y.shape).astype(dtype)
    expected = np.zeros((11, D))
    np.add.at(expected, indices, dy.astype(np.float64))
    if indices.ndim:
        indices[:] = 0
    assert_close(pullback(dy)["weight"], expected)
    assert_same_bits(pullback(dy)["weight"], pullback(dy)["weight"])


X = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Linear(0, 2), ValueError, "in_features: expected at least 1, got 0"),
        (lambda: Linear(2, 1.5), TypeError, "out_features: expected an int, got 1.5"),
        (lambda: Linear(2, 2, bias=1), TypeError, "bias: expected True or False"),
        (lambda: Linear(2, 2, dtype=np.int32), TypeError, "dtype: expected float32 or float64"),
        (lambda: Linear(2, 2, seed=-1), ValueError, "seed: expected at least 0, got -1"),
        (lambda: Embedding(2, 2, seed=0.5), TypeError, "seed: expected an int, got 0.5"),
        (lambda: Linear(4, 2)(X), ValueError, r"x: expected shape \(at least 1, 4\), got \(2, 3\)"),
        (lambda: Linear(3, 2)(X.astype(float)), TypeError, "x: expected dtype float32, got float64"),
        (lambda: Linear(3, 2)(np.float32(1)), ValueError, r"x: expected shape \(..., 3\), got \(\)"),
        (lambda: Linear(3, 2)(X[:0]), ValueError, "x: expected shape"),
        (lambda: Linear(4, 2).vjp(X), ValueError, "x: expected shape"),
        (lambda: Linear(3, 2).vjp(X)[1](X), ValueError, r"dy: expected shape \(2, 2\), got \(2, 3\)"),
        (lambda: Linear(3, 2).vjp(X)[1](np.ones((2, 2))), TypeError, "dy: expected dtype float32"),
        (lambda: Embedding(0, 2), ValueError, "num_embeddings: expected at least 1"),
        (lambda: Embedding(2, "3"), TypeError, "embedding_dim: expected an int, got '3'"),
        (lambda: Embedding(2, 3, dtype="int8"), TypeError, "dtype: expected float32 or float64"),
        (lambda: Embedding(2, 3)([0, 2]), ValueError, "indices: expected indices from 0 to 1, got 2"),
        (lambda: Embedding(2, 3)([-1]), ValueError, "indices: expected indices from 0 to 1, got -1"),
        (lambda: Embedding(2, 3)([0.0]), TypeError, "indices: expected integers, got dtype float64"),
        (lambda: Embedding(2, 3)([True]), TypeError, "indices: expected integers, got dtype bool"),
        (lambda: Embedding(2, 3)(np.zeros(0, int)), ValueError, "indices: expected at least one index"),
        (lambda: Embedding(2, 3).vjp([2]), ValueError, "indices: expected indices from 0 to 1"),
        (lambda: Embedding(2, 3).vjp([0, 1])[1](X[:1]), ValueError, "dy: expected shape"),
    ],
)
def test_wrong_calls(call, error, message):
    with pytest.raises(error, match=message):
        call()
