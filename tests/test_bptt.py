"""Truncated BPTT against its definition, window by window with the oracle; against the whole gradient; its memory."""

import weakref

import numpy as np
import oracle
import pytest
from oracle import assert_close, assert_same_bits

import fastrnn
from fastrnn.bptt import truncated_bptt
from fastrnn.models import LanguageModel
from fastrnn.optim import SGD, clip_grad_norm

CELLS = ["RNN", "LSTM", "GRU"]
# T, k1, k2: divisible and not, no way back, some, over window's edges and pieces of windows, all of it.
WINDOWS = [(6, 1, 1), (7, 3, 3), (12, 4, 6), (9, 2, 5), (11, 4, 5), (7, 2, 6), (8, 3, 8), (5, 5, 5), (6, 10, 12)]


def make(cell="LSTM", dtype=np.float64, **options):
    return getattr(fastrnn, cell)(3, 9, **{"num_layers": 2, "dtype": dtype, "seed": 1, **options})


def inputs(layer, T, B=4):
    """``x, state``, and the outputs that `squares` compares with."""
    rng = np.random.default_rng(2)
    x, wanted = (rng.standard_normal((T, B, n)).astype(layer.dtype) for n in (3, 9))
    states = [rng.standard_normal((layer.num_layers, B, 9)).astype(layer.dtype) for _ in range(layer.STATES)]
    return x, tuple(states) if len(states) > 1 else states[0], wanted


def squares(wanted):
    """Half the sum of squares, over the number of all of them."""

    def loss(y, first):
        error = y - wanted[first : first + len(y)]
        return 0.5 * (error**2).sum() / wanted.size, error / wanted.dtype.type(wanted.size)

    return loss


def flat(state):
    return np.concatenate([np.ravel(s) for s in (state if isinstance(state, tuple) else (state,))])


def whole(layer, x, state, wanted):
    """Loss, state and gradients without truncation."""
    (y, after), pullback = layer.vjp(x, state)
    value, dy = squares(wanted)(y, 0)
    return value, after, pullback(dy)[2]


@pytest.mark.parametrize("given_lengths", [False, True])
@pytest.mark.parametrize(("T", "k1", "k2"), WINDOWS)
@pytest.mark.parametrize("cell", CELLS)
def test_definition(cell, T, k1, k2, given_lengths, dtype):
    """The window's loss goes back to a state that the oracle takes for a constant; lengths cut off what lies past."""
    layer = make(cell, dtype)
    x, state, wanted = inputs(layer, T)
    lengths = np.array([T // 2, T, 0, T - 1]) if given_lengths else np.full(4, T)
    loss = squares(wanted)
    total, expected = 0.0, dict.fromkeys(layer.parameters, 0.0)
    for first in range(0, T, k1):
        end = min(first + k1, T)
        start = max(0, end - k2)
        before = state
        if start:
            _, before, _ = oracle.forward(layer, x[:start], state, np.minimum(lengths, start))
        y, after, tape = oracle.forward(layer, x[start:end], before, np.clip(lengths - start, 0, end - start))
        value, dy = loss(y[first - start :], first)
        dy = np.concatenate([np.zeros((first - start, 4, 9)), dy])
        dy *= (np.arange(start, end)[:, None] < lengths)[..., None]
        _, _, grads = oracle.backward(layer, tape, dy, oracle.as_state(layer, [0 * s for s in oracle.as_tuple(after)]))
        total += value
        expected = {name: expected[name] + array for name, array in grads.items()}

    got_total, got_state, got = truncated_bptt(
        layer, x, loss, state, k1=k1, k2=k2, lengths=lengths if given_lengths else None
    )
    assert abs(got_total - total) <= oracle.TOLERANCE[dtype] * total
    assert_close(flat(got_state), flat(after), "state")
    assert list(got) == list(layer.parameters)
    for name, array in expected.items():
        assert_close(got[name], array, name)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("k1", [1, 3, 9])
def test_without_truncation_it_is_the_whole_gradient(cell, k1):
    layer = make(cell)
    x, state, wanted = inputs(layer, 10)
    value, after, grads = whole(layer, x, state, wanted)
    for k2 in (10, 11, 1000):
        got_value, got_after, got = truncated_bptt(layer, x, squares(wanted), state, k1=k1, k2=k2)
        assert abs(got_value - value) < 1e-14
        assert_same_bits(flat(got_after), flat(after))
        for name, array in grads.items():
            assert_close(got[name], array, name)


@pytest.mark.parametrize("k1", [10, 11])
def test_one_window_has_the_bits_of_vjp(k1, dtype):
    layer = make(dtype=dtype)
    x, state, wanted = inputs(layer, 10)
    for before in (state, None):
        value, after, grads = whole(layer, x, before, wanted)
        got_value, got_after, got = truncated_bptt(layer, x, squares(wanted), before, k1=k1)
        assert got_value == value
        assert_same_bits(flat(got_after), flat(after))
        for name, array in grads.items():
            assert_same_bits(got[name], array, name)


@pytest.mark.parametrize("options", [{}, {"dropout": 0.5}, {"zoneout": (0.3, 0.2)}])
def test_gradients_are_slopes(options):
    """Where nothing is cut off; what a later window goes back through keeps the masks that it was run with."""
    layer = make(**options)
    x, state, wanted = inputs(layer, 7)

    def run():
        return truncated_bptt(layer, x, squares(wanted), state, k1=2, k2=7, rng=np.random.default_rng(3))

    grads, kept, rng, step = run()[2], layer.state_dict(), np.random.default_rng(4), 1e-3
    for name, gradient in grads.items():
        along = rng.standard_normal(gradient.shape)
        losses = []
        for k in (1, -1, 2, -2):
            layer.parameters[name] = kept[name] + k * step * along
            losses.append(run()[0])
        layer.parameters[name] = kept[name]
        measured = (8 * (losses[0] - losses[1]) - (losses[2] - losses[3])) / (12 * step)
        assert abs(measured - (gradient * along).sum()) < 1e-8 * np.abs(gradient * along).sum(), name


@pytest.mark.parametrize(("T", "k1", "k2"), WINDOWS)
def test_windows_come_in_turn_with_the_bits_of_one_call(T, k1, k2, dtype):
    layer = make(dtype=dtype)
    x, state, _ = inputs(layer, T)
    firsts, ys = [], []

    def loss(y, first):
        firsts.append(first)
        ys.append(y.copy())
        return 1.5, np.zeros_like(y)

    total, after, grads = truncated_bptt(layer, x, loss, state, k1=k1, k2=k2)
    assert firsts == list(range(0, T, k1))
    assert {len(y) for y in ys[:-1]} <= {k1}
    y, expected = layer(x, state)
    assert_same_bits(np.concatenate(ys), y)
    assert_same_bits(flat(after), flat(expected))
    assert total == 1.5 * len(ys)
    assert not any(array.any() for array in grads.values())


def test_the_state_carries_on_from_call_to_call():
    layer = make()
    x, state, wanted = inputs(layer, 12)
    value, after, grads = truncated_bptt(layer, x, squares(wanted), state, k1=3)
    sums = dict.fromkeys(grads, 0.0)
    total = 0.0
    for first in (0, 6):
        part, state, more = truncated_bptt(
            layer, x[first : first + 6], lambda y, t, first=first: squares(wanted)(y, first + t), state, k1=3
        )
        total += part
        sums = {name: sums[name] + array for name, array in more.items()}
    assert abs(total - value) < 1e-14
    assert_same_bits(flat(state), flat(after))
    for name, array in grads.items():
        assert_close(array, sums[name], name)


def test_batch_first_and_one_sequence(dtype):
    layer, first = make(dtype=dtype), make(dtype=dtype, batch_first=True)
    x, state, wanted = inputs(layer, 7, 1)

    def swapped(y, t):
        assert y.shape[0] == 1
        value, dy = squares(wanted)(y.swapaxes(0, 1), t)
        return value, dy.swapaxes(0, 1)

    def alone(y, t):
        assert y.ndim == 2
        value, dy = squares(wanted)(y[:, None], t)
        return value, dy[:, 0]

    expected = truncated_bptt(layer, x, squares(wanted), state, k1=2, k2=3)
    one = tuple(s[:, 0] for s in state)
    for got in (
        truncated_bptt(first, x.swapaxes(0, 1), swapped, state, k1=2, k2=3),
        truncated_bptt(first, x[:, 0], alone, one, k1=2, k2=3),
        truncated_bptt(layer, x[:, 0], alone, one, k1=2, k2=3),
    ):
        assert got[0] == expected[0]
        assert_same_bits(flat(got[1]), flat(expected[1]))
        for name, array in expected[2].items():
            assert_same_bits(got[2][name], array, name)


@pytest.mark.parametrize(("T", "k1", "k2"), WINDOWS)
def test_no_more_than_k2_steps_are_kept(T, k1, k2, monkeypatch):
    """Counted by the pullbacks that are alive; and every step is run once, each window taken back once."""
    layer = make()
    x, state, wanted = inputs(layer, T)
    vjp, alive, most = layer.vjp, weakref.WeakKeyDictionary(), []
    run, back = [], []

    def counted(x, *args, **kwargs):
        result, pullback = vjp(x, *args, **kwargs)

        def counted_pullback(*args):
            back.append(len(x))
            return pullback(*args)

        run.append(len(x))
        alive[counted_pullback] = len(x)
        most.append(sum(alive.values()))
        return result, counted_pullback

    monkeypatch.setattr(layer, "vjp", counted)
    truncated_bptt(layer, x, squares(wanted), state, k1=k1, k2=k2)
    assert max(most) <= k2
    assert sum(run) == T
    assert sum(back) == sum(min(end, k2) for end in [*range(k1, T, k1), T])
    assert not alive


def test_update_moves_the_parameters_between_windows():
    """Each step is taken back with the parameters that it was run with: by hand, step by step."""
    layer, other = make(), make()
    x, state, wanted = inputs(layer, 9)
    optimizer, windows = SGD(layer.parameters, 0.5, momentum=0.9), []

    def update(grads):
        windows.append({name: array.copy() for name, array in grads.items()})
        clip_grad_norm(grads, 1e-3)  # in place, which is the caller's own affair
        optimizer.step(grads)

    value, after, grads = truncated_bptt(layer, x, squares(wanted), state, k1=2, k2=5, update=update)
    assert len(windows) == 5
    for name, array in grads.items():
        assert_close(array, sum(window[name] for window in windows), name)

    optimizer, total, pullbacks = SGD(other.parameters, 0.5, momentum=0.9), 0.0, []
    for first in range(0, 9, 2):
        dys = []
        for t in range(first, min(first + 2, 9)):
            (y, state), pullback = other.vjp(x[t : t + 1], state)
            pullbacks.append(pullback)
            part, dy = squares(wanted)(y, t)
            total += part
            dys.append(dy)
        dstate, expected = None, dict.fromkeys(grads, 0.0)
        for back, pullback in enumerate(pullbacks[: -5 - 1 : -1]):
            _, dstate, step = pullback(dys[-1 - back] if back < len(dys) else None, dstate)
            expected = {name: expected[name] + array for name, array in step.items()}
        for name, array in expected.items():
            assert_close(windows[first // 2][name], array, name)
        clip_grad_norm(expected, 1e-3)
        optimizer.step(expected)
    assert abs(total - value) < 1e-14
    assert_close(flat(after), flat(state))


def test_losses_that_are_not_finite_come_through():
    layer = make()
    x, _, _ = inputs(layer, 4)
    assert np.isnan(truncated_bptt(layer, x, lambda y, first: (np.float32("nan"), 0 * y), k1=2)[0])


lstm = make(dtype=np.float32)
X = np.ones((5, 2, 3), np.float32)


def unreached(y, first):
    raise AssertionError("called")


def call(x=X, loss=unreached, state=None, layer=lstm, **options):
    return lambda: truncated_bptt(layer, x, loss, state, **{"k1": 2, **options})


WRONG = [
    (call(layer=None), TypeError, "layer: expected a recurrent layer, got None"),
    (call(layer=LanguageModel(3, 2, 2)), TypeError, "layer: expected a recurrent layer, got LanguageModel"),
    (lambda: truncated_bptt(lstm, X, unreached), TypeError, "k1"),
    (call(k1=0), ValueError, "k1: expected at least 1, got 0"),
    (call(k1=2.0), TypeError, "k1: expected an int, got 2.0"),
    (call(k1=None), TypeError, "k1: expected an int, got None"),
    (call(k2=1), ValueError, r"k2 \(k1 or more\): expected at least 2, got 1"),
    (call(k2="3"), TypeError, r"k2 \(k1 or more\): expected an int, got '3'"),
    (call(loss=None), TypeError, "loss: expected a function, got None"),
    (call(update=3), TypeError, "update: expected a function or None, got 3"),
    (call(rng=3), TypeError, "rng: expected a numpy.random.Generator, got 3"),
    (call(X[0, 0]), ValueError, r"x: expected 3 dimensions .* or 2 .*, got shape \(3,\)"),
    (call(X[:0]), ValueError, r"x: expected shape \(at least 1, at least 1, 3\), got \(0, 2, 3\)"),
    (call(X[..., :2]), ValueError, r"x: expected shape \(at least 1, at least 1, 3\), got \(5, 2, 2\)"),
    (call(X.astype(np.float64)), TypeError, "x: expected dtype float32, got float64"),
    (call(state=3), TypeError, "state: expected a tuple of 2 arrays, got 3"),
    (call(lengths=[5, 6]), ValueError, "lengths: expected numbers from 0 to 5, got 6"),
    (call(lengths=[5]), ValueError, r"lengths: expected shape \(2,\), got \(1,\)"),
    (call(lengths=[5, 2.5]), TypeError, "lengths: expected integers, got dtype float64"),
    (call(loss=lambda y, first: 1.0), TypeError, "loss: expected it to return its value and its gradient, got 1.0"),
    (call(loss=lambda y, first: None), TypeError, "loss: expected it to return its value and its gradient, got None"),
    (call(loss=lambda y, first: ("1", y)), TypeError, "loss: expected a number for its value, got '1'"),
    (call(loss=lambda y, first: (y, y)), TypeError, "loss: expected a number for its value, got ndarray"),
    (
        call(loss=lambda y, first: (1, y[:1])),
        ValueError,
        r"loss's gradient: expected shape \(2, 2, 9\), got \(1, 2, 9\)",
    ),
    (call(loss=lambda y, first: (1, None)), TypeError, "loss's gradient: expected dtype float32, got object"),
    (
        call(loss=lambda y, first: (1, y.astype(np.float64))),
        TypeError,
        "loss's gradient: expected dtype float32, got float64",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG)
def test_wrong_calls(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bidirectional": True}, "layer: expected one direction, got a bidirectional layer"),
        ({"recurrent_dropout": 0.1}, "layer: expected no recurrent_dropout, whose masks are one a sequence"),
    ],
)
@pytest.mark.parametrize("cell", CELLS)
def test_layers_that_it_refuses(cell, options, message):
    with pytest.raises(ValueError, match=message):
        call(layer=make(cell, np.float32, **options))()
