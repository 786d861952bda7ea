"""Optimisers against their equations in float64 and against PyTorch; clipping."""

import math

import numpy as np
import pytest
from oracle import assert_close, assert_same_bits

from fastrnn.heads import Embedding, Linear
from fastrnn.optim import SGD, Adam, AdamW, clip_grad_norm, clip_grad_value
from fastrnn.parameters import JoinedParameters

# Odd sizes, so that the ends of vectorised loops are tested.
SIZES = [(1, 1), (3, 17), (63, 65)]

OPTIMIZERS = {
    "sgd": (SGD, {"lr": 0.1}),
    "sgd decay": (SGD, {"lr": 0.1, "weight_decay": 0.03}),
    "momentum": (SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}),
    "nesterov": (SGD, {"lr": 0.05, "momentum": 0.8, "weight_decay": 0.01, "nesterov": True}),
    "adam": (Adam, {"lr": 0.01}),
    "adam all": (Adam, {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}),
    "adamw": (AdamW, {"lr": 0.02}),
    "adamw all": (AdamW, {"lr": 0.02, "betas": (0.7, 0.9), "eps": 1e-4, "weight_decay": 0.2}),
}


def linear_and_gradients(shape, dtype, rng, steps=5):
    linear = Linear(*shape, dtype=dtype, seed=1)
    names = linear.parameters.items()
    return linear, [{n: rng.standard_normal(a.shape).astype(dtype) for n, a in names} for _ in range(steps)]


def equation(kind, settings, p, gradients):
    """The parameter after each gradient in turn, in float64."""
    lr, decay = settings["lr"], settings.get("weight_decay", 0.01 if kind is AdamW else 0)
    p, m, v = p.astype(np.float64), 0, 0
    for t, g in enumerate(gradients, 1):
        g = g.astype(np.float64)
        if kind is SGD:
            momentum = settings.get("momentum", 0)
            g = g + decay * p
            m = momentum * m + g
            p = p - lr * (g + momentum * m if settings.get("nesterov") else m)
            continue
        beta1, beta2 = settings.get("betas", (0.9, 0.999))
        if kind is AdamW:
            p = p * (1 - lr * decay)
        else:
            g = g + decay * p
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        p = p - lr * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + settings.get("eps", 1e-8))
    return p


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("shape", SIZES)
def test_follows_its_equation(name, shape, dtype, rng):
    kind, settings = OPTIMIZERS[name]
    linear, gradients = linear_and_gradients(shape, dtype, rng)
    start = linear.state_dict()
    optimizer = kind(linear.parameters, **settings)
    kept = [{n: g.copy() for n, g in grads.items()} for grads in gradients]
    for grads in gradients:
        optimizer.step(grads)
    for n, p in linear.parameters.items():
        assert_close(p, equation(kind, settings, start[n], [g[n] for g in gradients]), n)
    for a, b in zip(gradients, kept):
        for n in a:
            assert_same_bits(a[n], b[n])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_follows_torch(name, rng):
    torch = pytest.importorskip("torch")
    kind, settings = OPTIMIZERS[name]
    linear, gradients = linear_and_gradients((7, 5), np.dtype(np.float64), rng, 20)
    theirs = {n: torch.nn.Parameter(torch.from_numpy(p.copy())) for n, p in linear.parameters.items()}
    their_optimizer = getattr(torch.optim, kind.__name__)(theirs.values(), **settings)
    optimizer = kind(linear.parameters, **settings)
    for grads in gradients:
        for n, p in theirs.items():
            p.grad = torch.from_numpy(grads[n])
        their_optimizer.step()
        optimizer.step(grads)
        for n, p in theirs.items():
            assert np.abs(linear.parameters[n] - p.detach().numpy()).max() < 1e-13


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_dict_continues_exactly(name, dtype, rng):
    kind, settings = OPTIMIZERS[name]
    linear, gradients = linear_and_gradients((3, 4), dtype, rng)
    other = Linear(3, 4, dtype=dtype)
    optimizer = kind(linear.parameters, **settings)
    for grads in gradients[:3]:
        optimizer.step(grads)
    optimizer.lr = 0.007
    state, parameters = optimizer.state_dict(), linear.state_dict()
    for grads in gradients[3:]:
        optimizer.step(grads)
    other.load_state_dict(parameters)
    continued = kind(other.parameters, **settings)
    continued.load_state_dict(state)
    assert continued.lr == 0.007
    for grads in gradients[3:]:
        continued.step(grads)
    for n in linear.parameters:
        assert_same_bits(other.parameters[n], linear.parameters[n], n)


def test_learning_rate_may_be_set(rng):
    linear, gradients = linear_and_gradients((3, 4), np.dtype(np.float64), rng)
    before = linear.state_dict()
    optimizer = Adam(linear.parameters, lr=1.0)
    optimizer.lr = 0
    optimizer.step(gradients[0])
    assert_same_bits(linear.weight, before["weight"])
    with pytest.raises(ValueError, match="lr: expected a number from 0"):
        optimizer.lr = -1


def test_joined_parameters_move_and_what_is_derived_follows(rng):
    linear, embedding = Linear(3, 4, seed=0), Embedding(5, 3, seed=0)
    x = embedding(np.arange(5))
    before = linear(x)
    joined = JoinedParameters({"a": embedding, "b": linear})
    SGD(joined, 0.5).step({n: np.ones_like(p) for n, p in joined.items()})
    assert np.abs(linear(x) - (before - 0.5 * (x.sum(1, keepdims=True) + 1))).max() < 1e-5
    assert np.abs(embedding(np.arange(5)) - (x - 0.5)).max() < 1e-6
    assert not linear.weight.flags.writeable


def test_nan_stays_where_it_is(dtype, rng):
    for kind, settings in OPTIMIZERS.values():
        linear, (grads, *_) = linear_and_gradients((3, 17), dtype, rng)
        grads["weight"][3, 1] = np.nan
        kind(linear.parameters, **settings).step(grads)
        assert np.argwhere(np.isnan(linear.weight)).tolist() == [[3, 1]]
        assert np.isfinite(linear.bias).all()


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_wrong_gradients_change_nothing(name, rng):
    kind, settings = OPTIMIZERS[name]
    linear, (grads, *_) = linear_and_gradients((3, 4), np.dtype(np.float32), rng)
    optimizer = kind(linear.parameters, **settings)
    parameters, state = linear.state_dict(), optimizer.state_dict()
    wrong = [
        (None, TypeError, "grads: expected a dict of arrays, got None"),
        ({"weight": grads["weight"]}, ValueError, r"grads: .*missing \['bias'\]"),
        (grads | {"more": grads["bias"]}, ValueError, r"grads: .*not known \['more'\]"),
        (grads | {"bias": grads["bias"][1:]}, ValueError, r"grads\['bias'\]: expected shape \(4\)"),
        (grads | {"bias": grads["bias"].astype(float)}, TypeError, r"grads\['bias'\]: expected dtype float32"),
    ]
    for bad, error, message in wrong:
        with pytest.raises(error, match=message):
            optimizer.step(bad)
    for n, p in parameters.items():
        assert_same_bits(linear.parameters[n], p)
    for n, s in optimizer.state_dict().items():
        assert_same_bits(s, state[n])


@pytest.mark.parametrize("sizes", [[1], [3, 17], [63, 65, 8]])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clip_grad_norm(sizes, max_norm, dtype, rng):
    grads = {str(n): rng.standard_normal((n, 2)).astype(dtype) for n in sizes}
    grads["strided"] = rng.standard_normal((6, 4)).astype(dtype)[::2, ::3]
    before = {n: g.astype(np.float64) for n, g in grads.items()}
    norm = clip_grad_norm(grads, max_norm)
    expected = math.sqrt(sum((g**2).sum() for g in before.values()))
    assert type(norm) is float
    assert abs(norm - expected) <= 1e-13 * expected
    for n, g in grads.items():
        assert_close(g, before[n] * min(1, max_norm / (expected + 1e-6)), n)


def test_clip_grad_norm_of_extreme_numbers():
    grads = {"a": np.full(3, 1e25, np.float32)}
    assert abs(clip_grad_norm(grads, 1.0) / 3**0.5 / 1e25 - 1) < 1e-6
    assert np.abs(grads["a"] - 3**-0.5).max() < 1e-6
    grads = {"a": np.array([1, np.nan]), "b": np.ones(3)}
    assert math.isnan(clip_grad_norm(grads, 1.0))
    assert np.isnan(grads["a"]).all()
    assert np.isnan(grads["b"]).all()
    assert clip_grad_norm({"a": np.zeros(3)}, 1.0) == 0


@pytest.mark.parametrize("special", [1.0, 1e3, math.inf, math.nan])
def test_clip_grad_norm_agrees_with_torch(special, rng):
    torch = pytest.importorskip("torch")
    grads = {"a": rng.standard_normal((5, 3)), "b": np.array([special, 2.0])}
    theirs = [torch.nn.Parameter(torch.zeros(g.shape, dtype=torch.float64)) for g in grads.values()]
    for p, g in zip(theirs, grads.values()):
        p.grad = torch.from_numpy(g.copy())
    norm = torch.nn.utils.clip_grad_norm_(theirs, 1.5).item()
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(clip_grad_norm(grads, 1.5), norm, rtol=1e-13)
    for p, g in zip(theirs, grads.values()):
        np.testing.assert_allclose(g, p.grad.numpy(), rtol=1e-12)


def test_clip_grad_value(dtype):
    grads = {"a": np.array([-3, -0.5, 0, 2, np.nan], dtype)}
    assert clip_grad_value(grads, 1.0) is None
    np.testing.assert_array_equal(grads["a"], np.array([-1, -0.5, 0, 1, np.nan], dtype))


def read_only():
    array = np.ones(2)
    array.flags.writeable = False
    return array


P = Linear(3, 2, seed=0).parameters
G = {"a": np.ones(2)}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SGD({}, 0.1), TypeError, "parameters: expected a module's parameters, got dict"),
        (lambda: SGD(P, -0.1), ValueError, "lr: expected a number from 0"),
        (lambda: SGD(P, "1"), TypeError, "lr: expected a number, got '1'"),
        (lambda: SGD(P, 0.1, momentum=-1), ValueError, "momentum: expected a number from 0"),
        (lambda: SGD(P, 0.1, weight_decay=math.nan), ValueError, "weight_decay: expected a number from 0"),
        (lambda: SGD(P, 0.1, nesterov=True), ValueError, "nesterov: expected a momentum greater than 0"),
        (lambda: SGD(P, 0.1, 0.9, nesterov=1), TypeError, "nesterov: expected True or False"),
        (lambda: Adam(P, betas=0.9), TypeError, "betas: expected two numbers, got 0.9"),
        (lambda: Adam(P, betas=(0.9, 1)), ValueError, r"betas\[1\]: expected a number from 0"),
        (lambda: Adam(P, eps=-1), ValueError, "eps: expected a number from 0"),
        (lambda: AdamW(P, weight_decay=-1), ValueError, "weight_decay: expected a number from 0"),
        (lambda: Adam(P).load_state_dict({}), KeyError, "state_dict: missing .*'lr', 'steps', 'exp_avg.weight'"),
        (lambda: Adam(P).load_state_dict(3), TypeError, "state_dict: expected a dict"),
        (lambda: SGD(P, 1).load_state_dict(Adam(P).state_dict()), KeyError, "not known .*'exp_avg.weight'"),
        (
            lambda: SGD(P, 1).load_state_dict({"lr": [1.0], "steps": [-1]}),
            ValueError,
            "steps: expected an array of one int",
        ),
        (lambda: SGD(P, 1).load_state_dict({"lr": 1.0, "steps": [1]}), ValueError, "lr: expected an array of one"),
        (
            lambda: Adam(P).load_state_dict(Adam(Linear(4, 2).parameters).state_dict()),
            ValueError,
            r"exp_avg.weight: expected shape \(2, 3\), got \(2, 4\)",
        ),
        (lambda: clip_grad_norm(G, -1), ValueError, "max_norm: expected a number from 0"),
        (lambda: clip_grad_norm([np.ones(2)], 1), TypeError, "grads: expected a dict of arrays, got list of 1"),
        (lambda: clip_grad_norm({"a": [1.0]}, 1), TypeError, r"grads\['a'\]: expected an array"),
        (lambda: clip_grad_norm({"a": np.ones(2, int)}, 1), TypeError, r"grads\['a'\]: expected dtype float32 or"),
        (lambda: clip_grad_norm({"a": read_only()}, 0.1), ValueError, r"grads\['a'\]: .* read-only"),
        (lambda: clip_grad_value(G, None), TypeError, "clip_value: expected a number, got None"),
        (lambda: clip_grad_value({"a": read_only()}, 1), ValueError, r"grads\['a'\]: .* read-only"),
    ],
)
def test_wrong_calls(call, error, message):
    with pytest.raises(error, match=message):
        call()
