"""Cross-entropy against NumPy in float64, and the exponential that it is made of."""

import math

import mpmath
import numpy as np
import pytest
from fastrnn.kernels import activations
from fastrnn.kernels import losses as kernels
from fastrnn.kernels.compiler import kernel
from oracle import assert_close, assert_same_bits

from fastrnn import batching
from fastrnn.losses import cross_entropy


def expected(logits, targets):
    """Loss and gradient, row by row, in float64."""
    V = logits.shape[-1]
    x, t = logits.reshape(-1, V).astype(np.float64), targets.reshape(-1)
    losses, gradient = [], []
    for row, target in zip(x, t):
        e = np.exp(row - row.max())
        losses.append(math.log(e.sum()) + row.max() - row[target])
        gradient.append((e / e.sum() - (np.arange(V) == target)) / len(t))
    return np.mean(losses), np.stack(gradient).reshape(logits.shape)


def data(shape, V, dtype, rng, scale=3.0):
    return (scale * rng.standard_normal((*shape, V))).astype(dtype), rng.integers(0, V, shape)


@pytest.mark.parametrize("V", [1, 2, 3, 17, 63, 64, 65, 1000])
@pytest.mark.parametrize("shape", [(), (1,), (3, 17)])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_is_its_equation(shape, V, scale, dtype, rng):
    logits, targets = data(shape, V, dtype, rng, scale)
    before = logits.copy()
    loss, dlogits = cross_entropy(logits, targets)
    loss_, dlogits_ = expected(logits, targets)
    assert type(loss) is float
    # The loss is the difference of numbers as large as the logits, and its exponentials' sum is of their dtype.
    assert abs(loss - loss_) <= 8 * np.finfo(dtype).eps * max(1, abs(loss_))
    assert np.abs(dlogits - dlogits_).max() <= 20 * np.finfo(dtype).eps / max(1, targets.size)
    assert_same_bits(logits, before)


def test_gradient_is_the_slope(rng):
    logits, targets = data((3, 2), 5, np.float64, rng)
    _, dlogits = cross_entropy(logits, targets)
    for place in np.ndindex(logits.shape):
        step = np.zeros_like(logits)
        step[place] = 1e-5
        slope = (cross_entropy(logits + step, targets)[0] - cross_entropy(logits - step, targets)[0]) / 2e-5
        assert abs(slope - dlogits[place]) < 1e-9


@pytest.mark.parametrize("offset", [-1e4, 1e4])
@pytest.mark.parametrize("V", [3, 65])
def test_large_logits(offset, V, dtype):
    logits = np.full((2, V), offset, dtype)
    loss, dlogits = cross_entropy(logits, np.array([0, V - 1]))
    assert abs(loss - math.log(V)) < 4e-7
    assert_close(dlogits, expected(logits, np.array([0, V - 1]))[1])
    logits[:, 1] = -offset
    loss, _ = cross_entropy(logits, np.array([1, 1]))
    assert abs(loss - (0 if offset < 0 else 2e4 + math.log(V - 1))) < 1e-6


@pytest.mark.parametrize("V", [3, 65])
def test_infinite_and_nan_logits(V, dtype, rng):
    logits, targets = data((4,), V, dtype, rng)
    targets[:] = 0
    logits[1, 1:] = -np.inf
    loss, dlogits = cross_entropy(logits, targets)
    with np.errstate(divide="ignore"):
        loss_, dlogits_ = expected(logits, targets)
    assert abs(loss - loss_) < 1e-6
    assert (dlogits[1] == 0).all()
    assert_close(dlogits, dlogits_)
    # Each place of a vector, and the row's end, where numbers are not taken by whole vectors.
    for place in range(V):
        spoilt = logits.copy()
        spoilt[2, place] = np.nan
        loss, dlogits = cross_entropy(spoilt, targets)
        assert math.isnan(loss)
        assert np.isnan(dlogits[2]).all()
        assert np.isfinite(dlogits[[0, 1, 3]]).all()


@pytest.mark.parametrize("V", [3, 65])
def test_bits_do_not_depend_on_threads(V, dtype, rng, small_shares):
    logits, targets = data((40,), V, dtype, rng)
    results = []
    for threads in (1, 2, 3):
        batching.set_num_threads(threads)
        results.append(cross_entropy(logits, targets))
    for loss, dlogits in results[1:]:
        assert loss == results[0][0]
        assert_same_bits(dlogits, results[0][1])


def test_kernel_writes_every_number_and_nothing_else(dtype, rng):
    logits, targets = data((3,), 21, dtype, rng)
    losses, dlogits = np.full(4, np.nan), np.full((4, 21), np.nan, dtype)
    kernels.cross_entropy(logits, targets, losses[:3], dlogits[:3], 0, 1, batching.ALONE)
    assert abs(losses[:3].mean() - expected(logits, targets)[0]) < 1e-6
    assert_close(dlogits[:3], expected(logits, targets)[1])
    assert np.isnan(losses[3])
    assert np.isnan(dlogits[3]).all()


@pytest.mark.parametrize("shape", [(5,), (4, 6)])
def test_agrees_with_torch(shape, dtype, rng):
    torch = pytest.importorskip("torch")
    logits, targets = data(shape, 30, dtype, rng)
    theirs = torch.from_numpy(logits).double().requires_grad_()
    value = torch.nn.functional.cross_entropy(theirs.reshape(-1, 30), torch.from_numpy(targets).reshape(-1))
    value.backward()
    loss, dlogits = cross_entropy(logits, targets)
    assert abs(loss - value.item()) <= 8 * np.finfo(dtype).eps * value.item()
    assert_close(dlogits, theirs.grad.numpy())


@kernel
def exp_array(x, y):
    activations._map(activations.exp_nonpositive, x, y)


def test_exponential_is_within_four_ulp(dtype):
    least = -103.9 if dtype == np.float32 else -745.1
    z = np.concatenate([np.linspace(least, 0, 3000), -np.geomspace(1e-30, 1, 500), [0.0, -0.0]]).astype(dtype)
    y = np.empty_like(z)
    exp_array(z, y)
    with mpmath.workdps(40):
        for a, b in zip(z, y):
            exact = mpmath.exp(mpmath.mpf(float(a)))
            assert abs(float(b) - exact) <= 4 * mpmath.mpf(float(np.spacing(dtype.type(float(exact))))), a
    special = np.array([-np.inf, -1e30, np.nan, 0], dtype)
    y = np.empty_like(special)
    exp_array(special, y)
    assert_same_bits(y[[0, 1, 3]], np.array([0, 0, 1], dtype))
    assert np.isnan(y[2])


L = np.zeros((2, 3), np.float32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: cross_entropy(L.astype(int), [0, 1]), TypeError, "logits: expected dtype float32 or float64, got int"),
        (lambda: cross_entropy(np.float32(1), 0), ValueError, "logits: expected shape"),
        (lambda: cross_entropy(L[:0], np.zeros(0, int)), ValueError, "logits: expected shape"),
        (lambda: cross_entropy(L, [0]), ValueError, r"targets: expected shape \(2,\), got \(1,\)"),
        (lambda: cross_entropy(L, [0, 3]), ValueError, "targets: expected indices from 0 to 2, got 3"),
        (lambda: cross_entropy(L, [-1, 0]), ValueError, "targets: expected indices from 0 to 2, got -1"),
        (lambda: cross_entropy(L, [0.0, 1.0]), TypeError, "targets: expected integers, got dtype float64"),
    ],
)
def test_wrong_calls(call, error, message):
    with pytest.raises(error, match=message):
        call()
