"""The layers against the oracle, finite differences and PyTorch; what they promise about bits, memory and NaN."""

import threading

import numpy as np
import oracle
import pytest
from fastrnn.kernels import lstm as lstm_kernels
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_close, assert_same_bits

import fastrnn
from fastrnn import batching, layers

SIZES = [1, 3, 17, 63, 65]


def inputs(lstm, T, B, seed=0):
    """``x, state, dy, dstate`` for a layer that is not batch_first."""
    rng = np.random.default_rng(seed)
    state_shape = (lstm.num_layers, B, lstm.hidden_size)
    shapes = [(T, B, lstm.input_size), state_shape, state_shape, (T, B, lstm.hidden_size), state_shape, state_shape]
    x, h_0, c_0, dy, dh_n, dc_n = (rng.standard_normal(shape).astype(lstm.dtype) for shape in shapes)
    return x, (h_0, c_0), dy, (dh_n, dc_n)


def everything(lstm, x, state, dy, dstate, rng=None):
    """All that call and vjp give, as a dict of arrays by name."""
    y, (h_n, c_n) = lstm(x, state)
    (y_vjp, (h_vjp, c_vjp)), pullback = lstm.vjp(x, state, rng)
    dx, (dh_0, dc_0), grads = pullback(dy, dstate)
    results = {"y": y, "h_n": h_n, "c_n": c_n, "y of vjp": y_vjp, "h_n of vjp": h_vjp, "c_n of vjp": c_vjp}
    return results | {"dx": dx, "dh_0": dh_0, "dc_0": dc_0} | grads


def assert_all_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert_same_bits(np.ascontiguousarray(actual[name]), np.ascontiguousarray(array), name)


def check_against_oracle(lstm, x, state, dy, dstate):
    got = everything(lstm, x, state, dy, dstate)
    h_0, c_0 = state
    y, h_n, c_n, tape = oracle.forward(lstm.parameters, x, h_0, c_0)
    dx, dh_0, dc_0, grads = oracle.backward(lstm.parameters, tape, dy, *dstate)
    expected = {"y": y, "h_n": h_n, "c_n": c_n, "dx": dx, "dh_0": dh_0, "dc_0": dc_0, **grads}
    for name, array in expected.items():
        assert_close(got[name], array, name)
    for name in ("y", "h_n", "c_n"):
        assert_same_bits(got[name], got[f"{name} of vjp"], name)
    assert_same_bits(got["h_n"][-1], got["y"][-1])


def tall_samples():
    """Every size in every place, and every pair of places with both large and both small."""
    places = [tuple(SIZES[(i + j * k) % 5] for j in range(4)) for k in range(1, 5) for i in range(5)]
    return places + [(1, 1, 1, 1), (65, 1, 1, 65), (1, 65, 65, 1), (65, 65, 3, 17)]


# Values and gradients.


@pytest.mark.parametrize(("T", "B", "I", "H"), tall_samples())
def test_oracle(T, B, I, H, dtype):
    lstm = fastrnn.LSTM(I, H, dtype=dtype, seed=1)
    check_against_oracle(lstm, *inputs(lstm, T, B))


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_oracle_of_a_stack(num_layers, bias, dtype):
    lstm = fastrnn.LSTM(7, 18, num_layers, bias=bias, dtype=dtype, seed=2)
    assert len(lstm.parameters) == num_layers * (4 if bias else 2)
    check_against_oracle(lstm, *inputs(lstm, 6, 5))


@given(
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 30), st.integers(1, 70), st.integers(1, 70)),
    num_layers=st.integers(1, 3),
    bias=st.booleans(),
    dtype=st.sampled_from(["float32", "float64"]),
    threads=st.integers(1, 3),
)
def test_oracle_of_any_shape(sizes, num_layers, bias, dtype, threads):
    T, B, I, H = sizes
    batching.set_num_threads(threads)
    lstm = fastrnn.LSTM(I, H, num_layers, bias=bias, dtype=dtype, seed=3)
    check_against_oracle(lstm, *inputs(lstm, T, B))


@pytest.mark.parametrize("scale", [1e-3, 30])
def test_oracle_of_tiny_and_saturated_gates(scale, dtype):
    lstm = fastrnn.LSTM(5, 9, dtype=dtype, seed=4)
    x, state, dy, dstate = inputs(lstm, 5, 4)
    check_against_oracle(lstm, (scale * x).astype(dtype), state, dy, dstate)


def test_parts_left_out_stand_for_zeros(dtype):
    lstm = fastrnn.LSTM(4, 20, 2, dtype=dtype, seed=5)
    x, (h_0, _), dy, (dh_n, dc_n) = inputs(lstm, 7, 3)
    zeros = np.zeros_like(h_0)
    assert_same_bits(lstm(x)[0], lstm(x, (zeros, zeros))[0])
    _, pullback = lstm.vjp(x)
    for left_out, full in [
        ((dy,), (dy, (zeros, zeros))),
        ((dy, None), (dy, (zeros, zeros))),
        ((None, (dh_n, dc_n)), (np.zeros_like(dy), (dh_n, dc_n))),
    ]:
        (dx, dstate, grads), (dx_full, dstate_full, grads_full) = pullback(*left_out), pullback(*full)
        actual, expected = {"dx": dx, "dh": dstate[0], "dc": dstate[1], **grads}, {"dx": dx_full, "dh": dstate_full[0]}
        assert_all_same_bits(actual, {**expected, "dc": dstate_full[1], **grads_full})
        assert all(np.abs(array).max() > 0 for array in actual.values())


def test_batch_first_and_one_sequence(dtype):
    """Other layouts of the same numbers: the same bits."""
    lstm = fastrnn.LSTM(4, 20, 2, dtype=dtype, seed=6)
    first = fastrnn.LSTM(4, 20, 2, dtype=dtype, batch_first=True)
    first.load_state_dict(lstm.state_dict())
    x, state, dy, dstate = inputs(lstm, 7, 3)
    expected = everything(lstm, x, state, dy, dstate)
    got = everything(first, x.swapaxes(0, 1), state, dy.swapaxes(0, 1), dstate)
    for name in ("y", "y of vjp", "dx"):
        got[name] = got[name].swapaxes(0, 1)
    assert_all_same_bits(got, expected)

    one = everything(lstm, x[:, :1], tuple(s[:, :1] for s in state), dy[:, :1], tuple(s[:, :1] for s in dstate))
    for layer in (lstm, first):
        got = everything(layer, x[:, 0], tuple(s[:, 0] for s in state), dy[:, 0], tuple(s[:, 0] for s in dstate))
        assert got["y"].shape == (7, 20)
        assert got["h_n"].shape == got["dc_0"].shape == (2, 20)
        expected = {name: array if name in lstm.parameters else array[:, 0] for name, array in one.items()}
        assert_all_same_bits(got, expected)


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("dropout", [0, 0.5])
def test_finite_differences(num_layers, dropout):
    """The gradients along random directions of each argument, by differences of fourth order, dropout masks fixed."""
    if dropout and num_layers == 1:
        return
    lstm = fastrnn.LSTM(3, 5, num_layers, dropout=dropout, dtype=np.float64, seed=7)
    x, state, dy, dstate = inputs(lstm, 6, 4)
    _, pullback = lstm.vjp(x, state, np.random.default_rng(8))
    dx, (dh_0, dc_0), grads = pullback(dy, dstate)
    at = {"x": x, "h_0": state[0], "c_0": state[1], **lstm.state_dict()}
    gradients = {"x": dx, "h_0": dh_0, "c_0": dc_0, **grads}

    def loss(name, shift):
        moved = {**at, name: at[name] + shift}
        lstm.load_state_dict({n: moved[n] for n in lstm.parameters})
        (y, (h_n, c_n)), _ = lstm.vjp(moved["x"], (moved["h_0"], moved["c_0"]), np.random.default_rng(8))
        return (y * dy).sum() + (h_n * dstate[0]).sum() + (c_n * dstate[1]).sum()

    rng, step = np.random.default_rng(9), 1e-3
    assert gradients.keys() == at.keys()
    for name, gradient in gradients.items():
        along = rng.standard_normal(gradient.shape)
        near, far = (loss(name, k * step * along) - loss(name, -k * step * along) for k in (1, 2))
        measured = (8 * near - far) / (12 * step)
        assert abs(measured - (gradient * along).sum()) < 1e-8 * np.abs(gradient * along).sum(), name


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_pytorch(num_layers, bias, batch_first, dtype):
    torch = pytest.importorskip("torch")
    options = {"num_layers": num_layers, "bias": bias, "batch_first": batch_first}
    theirs = torch.nn.LSTM(6, 19, **options, dtype=getattr(torch, dtype.name))
    ours = fastrnn.LSTM(6, 19, **options, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    x, state, dy, dstate = inputs(ours, 9, 4)
    if batch_first:
        x, dy = (np.ascontiguousarray(a.swapaxes(0, 1)) for a in (x, dy))
    tensors = [torch.tensor(a, requires_grad=True) for a in (x, *state)]
    y, after = theirs(tensors[0], tuple(tensors[1:]))
    torch.autograd.backward([y, *after], [torch.tensor(a) for a in (dy, *dstate)])
    got = everything(ours, x, state, dy, dstate)
    expected = {"y": y, "h_n": after[0], "c_n": after[1]}
    expected |= {name: tensor.grad for name, tensor in zip(("dx", "dh_0", "dc_0"), tensors, strict=True)}
    expected |= {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, tensor in expected.items():
        assert_close(got[name], tensor.detach().numpy().astype(np.float64), name)


# Dropout.


def test_dropout_drops_as_often_as_asked_and_keeps_the_mean(rng, dtype):
    x = np.ones((200, 50, 10), dtype)
    dropped, pullback = layers.drop(x, 0.3, rng)
    kept = dropped != 0
    assert set(np.unique(dropped)) == {0, dtype.type(1 / 0.7)}
    # Five standard deviations of a hundred thousand draws.
    assert abs(kept.mean() - 0.7) < 5 * np.sqrt(0.3 * 0.7 / x.size)
    assert dropped.dtype == dtype
    assert_same_bits(pullback(x), dropped)


def test_dropout_is_the_oracles_with_the_same_masks(dtype):
    lstm = fastrnn.LSTM(4, 9, 3, dropout=0.4, dtype=dtype, seed=10)
    x, state, dy, dstate = inputs(lstm, 6, 5)
    rng = np.random.default_rng(11)
    masks = {k: layers.drop(np.ones((6, 5, 9), dtype), 0.4, rng)[0] for k in (1, 2)}
    (y, (h_n, c_n)), pullback = lstm.vjp(x, state, np.random.default_rng(11))
    dx, (dh_0, dc_0), grads = pullback(dy, dstate)
    y_o, h_o, c_o, tape = oracle.forward(lstm.parameters, x, *state, masks)
    dx_o, dh_o, dc_o, grads_o = oracle.backward(lstm.parameters, tape, dy, *dstate, masks)
    for a, b in [(y, y_o), (h_n, h_o), (c_n, c_o), (dx, dx_o), (dh_0, dh_o), (dc_0, dc_o)]:
        assert_close(a, b)
    for name, gradient in grads_o.items():
        assert_close(grads[name], gradient, name)


def test_dropout_is_seeded_and_off_in_calls():
    def make():
        return fastrnn.LSTM(4, 9, 2, dropout=0.5, seed=12)

    lstm, x = make(), np.ones((5, 3, 4), np.float32)
    ys = [lstm.vjp(x)[0][0] for _ in range(2)]
    again = make()
    for y in ys:
        assert_same_bits(again.vjp(x)[0][0], y)
    assert not np.array_equal(*ys)
    plain = fastrnn.LSTM(4, 9, 2, seed=12)
    assert_same_bits(lstm(x)[0], plain(x)[0])
    assert_same_bits(lstm(x)[0], plain.vjp(x)[0][0])


def test_dropout_of_one_layer_warns():
    with pytest.warns(UserWarning, match="num_layers=1"):
        fastrnn.LSTM(2, 2, dropout=0.5)


def test_seed():
    a, b, c = (fastrnn.LSTM(3, 4, seed=seed).state_dict() for seed in (1, 1, 2))
    assert_all_same_bits(a, b)
    assert not np.array_equal(a["weight_hh_l0"], c["weight_hh_l0"])
    assert max(np.abs(array).max() for array in a.values()) <= 0.5
    assert not np.array_equal(fastrnn.LSTM(3, 4).weight_hh_l0, fastrnn.LSTM(3, 4).weight_hh_l0)


# Bits.


@pytest.mark.parametrize("cut", [1, 4, 9])
def test_the_state_carries_a_sequence_on(cut, dtype):
    lstm = fastrnn.LSTM(5, 33, 2, dtype=dtype, seed=13)
    x, state, _, _ = inputs(lstm, 10, 7)
    y, (h_n, c_n) = lstm(x, state)
    y_1, middle = lstm(x[:cut], state)
    y_2, (h_2, c_2) = lstm(x[cut:], middle)
    assert_same_bits(np.concatenate([y_1, y_2]), y)
    assert_same_bits(h_2, h_n)
    assert_same_bits(c_2, c_n)


@pytest.mark.parametrize("H", [9, 70, 260])
def test_a_sequence_alone_and_in_a_batch(H, dtype):
    lstm = fastrnn.LSTM(5, H, 2, dtype=dtype, seed=14)
    x, state, dy, dstate = inputs(lstm, 6, 26)
    batch = everything(lstm, x, state, dy, dstate)
    for b, count in [(0, 1), (11, 1), (20, 6)]:
        rows = slice(b, b + count)
        cut = (x[:, rows], tuple(s[:, rows] for s in state), dy[:, rows], tuple(s[:, rows] for s in dstate))
        alone = everything(lstm, *cut)
        for name in alone.keys() - lstm.parameters.keys():
            assert_same_bits(alone[name], np.ascontiguousarray(batch[name][:, rows]), name)


# Memory.


class PoisonedNumpy:
    """NumPy, but memory that it leaves uninitialised is full of NaN."""

    def __getattr__(self, name):
        return getattr(np, name)

    def empty(self, *args, **kwargs):
        return self.empty_like(np.empty(*args, **kwargs))

    def empty_like(self, array, *args, **kwargs):
        new = np.empty_like(array, *args, **kwargs)
        new.fill(np.nan)
        return new


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("sizes", [(7, 9, 5, 21), (30, 40, 3, 8), (3, 2, 70, 200)], ids=str)
def test_uninitialised_memory_is_never_read(sizes, threads, dtype, monkeypatch, small_shares):
    T, B, I, H = sizes
    lstm = fastrnn.LSTM(I, H, 2, dtype=dtype, seed=15)
    given = inputs(lstm, T, B)
    expected = everything(lstm, *given)
    monkeypatch.setattr(layers, "np", PoisonedNumpy())
    monkeypatch.setattr(batching, "np", PoisonedNumpy())
    assert np.isnan(batching.empty(3, dtype)).all()
    lstm.load_state_dict(lstm.state_dict())  # the packed weights, too, are made anew
    batching.set_num_threads(threads)
    for _ in range(2):
        assert_all_same_bits(everything(lstm, *given), expected)


def strided(a):
    memory = np.zeros([2 * n for n in a.shape], a.dtype)
    view = memory[tuple(slice(None, None, 2) for _ in a.shape)]
    view[:] = a
    return view


def reversed_in_memory(a):
    return np.ascontiguousarray(a[..., ::-1])[..., ::-1]


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


def misaligned(a):
    memory = np.zeros(a.nbytes + 1, np.uint8)
    view = memory[1:].view(a.dtype).reshape(a.shape)
    view[:] = a
    assert not view.flags.aligned
    return view


class Subclass(np.ndarray):
    pass


@pytest.mark.parametrize(
    "awkward",
    [np.asfortranarray, strided, reversed_in_memory, read_only, misaligned, lambda a: a.view(Subclass)],
    ids=["fortran", "strided", "reversed", "read-only", "misaligned", "subclass"],
)
def test_any_array_will_do(awkward, dtype):
    """The same bits; the user's arrays stay as they were; and Numba compiles nothing anew for them."""
    lstm = fastrnn.LSTM(5, 11, 2, dtype=dtype, seed=16)
    x, state, dy, dstate = inputs(lstm, 6, 3)
    expected = everything(lstm, x, state, dy, dstate)
    kernels = [lstm_kernels.forward, lstm_kernels.backward, lstm_kernels.pack_forward, lstm_kernels.pack_backward]
    compiled = [len(kernel.signatures) for kernel in kernels]
    given = awkward(x), tuple(map(awkward, state)), awkward(dy), tuple(map(awkward, dstate))
    arrays = [given[0], *given[1], given[2], *given[3]]
    before = [a.tobytes() for a in arrays]
    other = fastrnn.LSTM(5, 11, 2, dtype=dtype)
    other.load_state_dict({name: awkward(array) for name, array in lstm.parameters.items()})
    assert_all_same_bits(everything(other, *given), expected)
    assert [a.tobytes() for a in arrays] == before
    assert [len(kernel.signatures) for kernel in kernels] == compiled


def test_kernels_are_compiled_once_per_dtype():
    """Whatever the shape, the layout, the layer's options."""
    for dtype in (np.float32, np.float64):
        for options in ({}, {"bias": False}, {"batch_first": True}, {"num_layers": 2}):
            lstm = fastrnn.LSTM(1, 1, dtype=dtype, **options)
            for x in (np.ones((1, 1, 1), dtype), np.ones((2, 3, 1), dtype), np.ones((4, 1), dtype)):
                (y, state), pullback = lstm.vjp(x)
                pullback(y, state)
                lstm(x, state)
    # `test_lstm.py` calls them too, with the same types.
    for kernel in (lstm_kernels.forward, lstm_kernels.backward, lstm_kernels.pack_forward, lstm_kernels.pack_backward):
        assert len(kernel.signatures) == 2, kernel


def test_results_are_not_views_of_each_other_or_of_the_inputs(dtype):
    """Writing to one result leaves the others, and the next call, as they are."""
    lstm = fastrnn.LSTM(5, 11, 2, dtype=dtype, seed=17)
    given = inputs(lstm, 6, 3)
    expected = everything(lstm, *given)
    x, (h_0, c_0), dy, (dh_n, dc_n) = given
    results = everything(lstm, *given)
    arrays = [*results.values(), x, h_0, c_0, dy, dh_n, dc_n]
    for i, a in enumerate(arrays):
        assert not any(np.shares_memory(a, b) for b in arrays[:i])
    for a in results.values():
        a[...] = np.nan
    assert_all_same_bits(everything(lstm, *given), expected)


# The pullback.


def flat(result):
    dx, (dh_0, dc_0), grads = result
    return {"dx": dx, "dh_0": dh_0, "dc_0": dc_0, **grads}


@pytest.mark.parametrize("dropout", [0, 0.5])
def test_a_pullback_owes_nothing_to_what_comes_after(dropout, dtype):
    """Not to earlier pullbacks, parameters, the layer's next calls, nor what the user does to the arrays."""
    lstm = fastrnn.LSTM(5, 11, 2, dropout=dropout, dtype=dtype, seed=18)
    x, state, dy, dstate = inputs(lstm, 6, 3)
    (y, after), pullback = lstm.vjp(x, state)
    expected = flat(pullback(dy, dstate))
    first = pullback(dy, dstate)
    assert_all_same_bits(flat(first), expected)
    for array in flat(first).values():
        array[...] = np.nan
    for array in (x, *state, y, *after):
        array[...] = np.nan
    with lstm.parameters.writable() as arrays:
        for array in arrays.values():
            array[...] = np.nan
    lstm.vjp(x, state)[1](dy, dstate)
    assert_all_same_bits(flat(pullback(dy, dstate)), expected)


def test_a_pullback_in_another_thread(dtype):
    lstm = fastrnn.LSTM(5, 11, dtype=dtype, seed=19)
    x, state, dy, dstate = inputs(lstm, 6, 3)
    _, pullback = lstm.vjp(x, state)
    results = []
    threads = [threading.Thread(target=lambda: results.append(pullback(dy, dstate))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        assert_all_same_bits(flat(result), flat(pullback(dy, dstate)))
    assert len(results) == 4


# NaN and infinity.


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("H", [5, 40])
def test_what_is_not_finite_stays_in_its_sequence(bad, H, dtype):
    lstm = fastrnn.LSTM(4, H, 2, dtype=dtype, seed=20)
    x, state, dy, dstate = inputs(lstm, 6, 9)
    clean = everything(lstm, x, state, dy, dstate)
    x = x.copy()
    x[2, 4, 1] = bad
    got = everything(lstm, x, state, dy, dstate)
    y, h_n, c_n, _ = oracle.forward(lstm.parameters, x, *state)
    tolerance = oracle.TOLERANCE[dtype]
    for name, expected in {"y": y, "h_n": h_n, "c_n": c_n}.items():
        np.testing.assert_allclose(got[name], expected, rtol=0, atol=tolerance, err_msg=name)
    assert_same_bits(got["y"][:2], clean["y"][:2])
    others = np.arange(9) != 4
    for name in got.keys() - lstm.parameters.keys():
        assert_same_bits(got[name][:, others], clean[name][:, others], name)
    if np.isnan(bad):
        assert np.isnan(got["y"][2:, 4]).all()
        assert np.isnan(got["dx"][:, 4]).all()
        assert all(np.isnan(got[name]).any() for name in lstm.parameters)


def test_attributes_and_repr():
    lstm = fastrnn.LSTM(3, 4, num_layers=2, bias=False, batch_first=True, dropout=0.25, dtype="float64", seed=0)
    assert repr(lstm).startswith("LSTM(input_size=3, hidden_size=4, num_layers=2, bias=False, batch_first=True")
    assert list(lstm.parameters) == ["weight_ih_l0", "weight_hh_l0", "weight_ih_l1", "weight_hh_l1"]
    assert lstm.weight_ih_l1.shape == (16, 4)
    with pytest.raises(AttributeError, match="LSTM has no attribute 'bias_ih_l0'"):
        lstm.bias_ih_l0  # noqa: B018
    same = fastrnn.LSTM(**lstm.config)
    assert same.config == lstm.config
