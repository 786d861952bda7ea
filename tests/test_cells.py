"""One step at a time: cells against the equations, a layer of one step, and PyTorch."""

import copy
import pickle

import numpy as np
import oracle
import pytest
from oracle import assert_all_same_bits, assert_close, assert_same_bits, each

import fastrnn
from fastrnn import optim

CELLS = {
    "RNN": ("RNNCell", {}),
    "RNN relu": ("RNNCell", {"nonlinearity": "relu"}),
    "RNN softsign": ("RNNCell", {"nonlinearity": (oracle.softsign, oracle.softsign_slope)}),
    "LSTM": ("LSTMCell", {}),
    "GRU": ("GRUCell", {}),
    "GRU reset before": ("GRUCell", {"reset_after": False}),
}
# What PyTorch has too.
PYTORCH = ["RNN", "RNN relu", "LSTM", "GRU"]


def make(case, I=5, H=18, dtype=np.float32, **options):
    name, more = CELLS[case]
    return getattr(fastrnn, name)(I, H, dtype=dtype, seed=1, **more, **options)


def layer_like(cell, case):
    """A layer with the cell's parameters."""
    bias = "bias_ih" in cell.parameters
    layer = oracle.make(case, cell.input_size, cell.hidden_size, cell.dtype, bias=bias)
    layer.load_state_dict({f"{name}_l0": array for name, array in cell.state_dict().items()})
    return layer


def inputs(cell, B, seed=0):
    """``x, state, dstate``, each (B, features), or (features,) if B is None."""
    rng = np.random.default_rng(seed)
    batch = () if B is None else (B,)
    arrays = [rng.standard_normal((*batch, n)).astype(cell.dtype) for n in (cell.input_size, *[cell.hidden_size] * 4)]
    x, h, c, dh, dc = arrays
    return (x, (h, c), (dh, dc)) if isinstance(cell, fastrnn.LSTMCell) else (x, h, dh)


def as_dict(state, name):
    return {letter + name: array for letter, array in zip("hc", state if isinstance(state, tuple) else (state,))}


def everything(cell, x, state, dstate):
    after, pullback = cell.vjp(x, state)
    dx, d_before, grads = pullback(dstate)
    called = as_dict(cell(x, state), "_1")
    return {**called, **as_dict(after, "_1 of vjp"), "dx": dx, **as_dict(d_before, ""), **grads}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("B", "I", "H"), [(1, 1, 1), (3, 5, 18), (30, 70, 65)])
@pytest.mark.parametrize("case", CELLS)
def test_the_equations(case, B, I, H, bias, dtype):
    cell = make(case, I, H, dtype, bias=bias)
    layer = layer_like(cell, case)
    x, state, dstate = inputs(cell, B)
    y, after, tape = oracle.forward(layer, x[None], each(state, lambda s: s[None]))
    dx, d_before, grads = oracle.backward(layer, tape, np.zeros_like(y), each(dstate, lambda d: d[None]))
    wanted = {
        **as_dict(each(after, lambda s: s[0]), "_1"),
        **as_dict(each(after, lambda s: s[0]), "_1 of vjp"),
        "dx": dx[0],
        **as_dict(each(d_before, lambda s: s[0]), ""),
        **{name.removesuffix("_l0"): grad for name, grad in grads.items()},
    }
    got = everything(cell, x, state, dstate)
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        assert_close(got[name], array, name)
        assert got[name].dtype == dtype


@pytest.mark.parametrize("case", CELLS)
def test_a_loop_of_cells_is_the_layer(case, dtype):
    """Bit for bit, from a state of zeros."""
    cell = make(case, dtype=dtype)
    layer = layer_like(cell, case)
    x = np.random.default_rng(0).standard_normal((6, 3, 5)).astype(dtype)
    y, after = layer(x)
    state = None
    for x_t, y_t in zip(x, y):
        state = cell(x_t, state)
        assert_same_bits(as_dict(state, "")["h"], y_t)
    assert_all_same_bits(as_dict(state, ""), as_dict(each(after, lambda s: s[0]), ""))


@pytest.mark.parametrize("case", CELLS)
def test_backpropagation_through_a_loop_of_cells(case):
    """The pullbacks one after another, last to first, are the layer's."""
    cell = make(case, dtype=np.float64)
    layer = layer_like(cell, case)
    x, state, dy, dstate = oracle.inputs(layer, 4, 3)
    wanted = oracle.expected(layer, x, state, dy, dstate)
    state, d, pullbacks = each(state, lambda s: s[0]), each(dstate, lambda s: s[0]), []
    for x_t in x:
        state, pullback = cell.vjp(x_t, state)
        pullbacks.append(pullback)
    sums = {name: np.zeros_like(array) for name, array in cell.parameters.items()}
    for t in reversed(range(4)):
        d = (d[0] + dy[t], d[1]) if isinstance(d, tuple) else d + dy[t]
        dx, d, grads = pullbacks[t](d)
        assert_close(dx, wanted["dx"][t])
        for name, grad in grads.items():
            sums[name] += grad
    for name, grad in sums.items():
        assert_close(grad, wanted[f"{name}_l0"], name)
    for name, array in as_dict(d, "_0").items():
        assert_close(array, wanted[f"d{name}"][0], name)


@pytest.mark.parametrize("case", CELLS)
def test_one_sequence_and_no_state(case, dtype):
    cell = make(case, dtype=dtype)
    x, state, dstate = inputs(cell, None)
    got = everything(cell, x, state, dstate)
    batch = everything(cell, x[None], *(each(s, lambda a: a[None]) for s in (state, dstate)))
    for name, array in batch.items():
        assert_same_bits(got[name], array if name in cell.parameters else array[0], name)
    zeros = each(state, np.zeros_like)
    assert_all_same_bits(as_dict(cell(x), ""), as_dict(cell(x, zeros), ""))
    assert_all_same_bits(everything(cell, x, None, dstate), everything(cell, x, zeros, dstate))
    many = inputs(cell, 4)[0]
    assert_all_same_bits(as_dict(cell(many), ""), as_dict(cell(many, each(zeros, lambda s: np.stack([s] * 4))), ""))


def test_an_lstms_state_may_be_a_list_and_a_part_of_the_gradient_none():
    cell = make("LSTM")
    x, state, dstate = inputs(cell, 3)
    assert_all_same_bits(everything(cell, x, list(state), list(dstate)), everything(cell, x, state, dstate))
    pullback = cell.vjp(x, state)[1]
    zeros = each(dstate, np.zeros_like)
    assert_same_bits(pullback(None)[0], pullback(zeros)[0])


@pytest.mark.parametrize("case", CELLS)
def test_results_are_the_callers_own(case):
    """No call changes what it was given, or what another has returned."""
    cell = make(case)
    x, state, dstate = inputs(cell, 3)
    given = copy.deepcopy((x, state, dstate))
    first = everything(cell, x, state, dstate)
    kept = copy.deepcopy(first)
    for name, array in everything(cell, x, state, dstate).items():
        array[...] = np.nan
        assert_same_bits(first[name], kept[name], name)
    for before, now in zip(given, (x, state, dstate)):
        assert_all_same_bits(as_dict(now, ""), as_dict(before, ""))


# Parameters.


def assert_same_state(a, b):
    assert_all_same_bits(dict(a), dict(b))
    assert list(a) == list(b)


@pytest.mark.parametrize("case", CELLS)
def test_names_shapes_and_first_values(case, dtype):
    """Those of the layer, without its number."""
    cell = make(case, dtype=dtype)
    name, options = CELLS[case]
    layer = getattr(fastrnn, name.removesuffix("Cell"))(5, 18, dtype=dtype, seed=1, **options)
    assert_same_state(cell.state_dict(), {name.removesuffix("_l0"): a for name, a in layer.state_dict().items()})
    assert list(make(case, bias=False).parameters) == ["weight_ih", "weight_hh"]
    assert_same_bits(cell.weight_hh, layer.weight_hh_l0)
    x, state, dstate = inputs(cell, 2)
    assert list(cell.vjp(x, state)[1](dstate)[2]) == list(cell.parameters)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("case", CELLS)
def test_a_config_makes_the_same_cell(case, bias, dtype):
    cell = make(case, dtype=dtype, bias=bias)
    twin = type(cell)(**cell.config, seed=1)
    assert twin.config == cell.config
    assert_same_state(twin.state_dict(), cell.state_dict())
    assert repr(cell) == repr(twin)
    assert repr(cell).startswith(f"{type(cell).__name__}(input_size=5, hidden_size=18, ")


@pytest.mark.parametrize("case", CELLS)
def test_changes_are_seen(case):
    cell = make(case)
    x, state, dstate = inputs(cell, 3)
    before = everything(cell, x, state, dstate)
    cell.weight_hh = cell.weight_hh * 2
    with cell.parameters.writable() as arrays:
        arrays["bias_ih"] += 0.5
    with pytest.raises(ValueError, match="read-only"):
        cell.weight_hh[0] = 0
    got = everything(cell, x, state, dstate)
    assert not np.array_equal(got["h_1"], before["h_1"])
    assert not np.array_equal(got["dx"], before["dx"])
    fresh = type(cell)(**cell.config)
    fresh.load_state_dict(cell.state_dict())
    assert_all_same_bits(got, everything(fresh, x, state, dstate))


@pytest.mark.parametrize("case", CELLS)
def test_files(case, dtype, tmp_path):
    cell = make(case, dtype=dtype)
    cell.save(tmp_path / "cell")
    other = type(cell)(**cell.config, seed=2)
    assert other.load(tmp_path / "cell") is other
    assert_same_state(other.state_dict(), cell.state_dict())
    x, state, dstate = inputs(cell, 3)
    assert_all_same_bits(everything(other, x, state, dstate), everything(cell, x, state, dstate))


def pickled(module):
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
@pytest.mark.parametrize("case", CELLS)
def test_copies_of_cells_are_cells_of_their_own(case, duplicate, dtype):
    cell = make(case, dtype=dtype)
    given = inputs(cell, 3)
    wanted = everything(cell, *given)
    twin = duplicate(cell)
    assert type(twin) is type(cell)
    assert twin.config == cell.config
    assert_all_same_bits(everything(twin, *given), wanted)
    twin.weight_ih = np.zeros_like(twin.weight_ih)
    assert not np.array_equal(everything(twin, *given)["h_1"], wanted["h_1"])
    assert_all_same_bits(everything(cell, *given), wanted)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
@pytest.mark.parametrize("case", oracle.CASES)
def test_copies_of_layers_are_layers_of_their_own(case, duplicate):
    layer = oracle.make(case, 4, 9, num_layers=2, zoneout=0.1, recurrent_dropout=0.2)
    x, state, dy, dstate = oracle.inputs(layer, 3, 2)

    def results(layer):
        return oracle.everything(layer, x, state, dy, dstate, rng=np.random.default_rng(3))

    wanted = results(layer)
    twin = duplicate(layer)
    assert repr(twin) == repr(layer)
    assert_all_same_bits(results(twin), wanted)
    # The layer's own generator is copied as it stands.
    assert_same_bits(twin.vjp(x)[0][0], layer.vjp(x)[0][0])
    twin.weight_ih_l1 = np.zeros_like(twin.weight_ih_l1)
    assert not np.array_equal(results(twin)["y"], wanted["y"])
    assert_all_same_bits(results(layer), wanted)


@pytest.mark.parametrize("case", CELLS)
def test_an_optimiser_learns_with_a_cell(case):
    """To take the state to where it is wanted."""
    cell = make(case, 4, 6)
    adam = optim.Adam(cell.parameters, lr=0.02)
    x, state, _ = inputs(cell, 8)
    wanted = np.random.default_rng(5).uniform(0.1, 0.8, (8, 6)).astype(np.float32)
    losses = []
    for _ in range(60):
        after, pullback = cell.vjp(x, state)
        error = as_dict(after, "")["h"] - wanted
        losses.append(float((error**2).mean()))
        zeros = np.zeros_like(error)
        _, _, grads = pullback((error, zeros) if isinstance(state, tuple) else error)
        adam.step(grads)
    assert losses[-1] < 0.5 * losses[0]


# PyTorch.


def torch_cell(torch, cell):
    names = {"input_size", "hidden_size", "bias", "nonlinearity"} & cell.config.keys()
    options = {name: cell.config[name] for name in names}
    return getattr(torch.nn, type(cell).__name__)(**options, dtype=getattr(torch, cell.dtype.name))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("B", [None, 1, 7])
@pytest.mark.parametrize("case", PYTORCH)
def test_pytorch(case, B, bias, dtype):
    torch = pytest.importorskip("torch")
    cell = make(case, dtype=dtype, bias=bias)
    theirs = torch_cell(torch, cell)
    theirs.load_state_dict({name: torch.from_numpy(array) for name, array in cell.state_dict().items()})
    x, state, dstate = inputs(cell, B)

    def tensor(array):
        return torch.from_numpy(array).requires_grad_()

    x_t, state_t = tensor(x), each(state, tensor)
    after = theirs(x_t, state_t)
    states = list(after) if isinstance(after, tuple) else [after]
    torch.autograd.backward(states, [torch.from_numpy(d) for d in as_dict(dstate, "").values()])
    got = everything(cell, x, state, dstate)
    wanted = {
        **as_dict(after, "_1"),
        "dx": x_t.grad,
        **{name: s.grad for name, s in as_dict(state_t, "").items()},
        **{name: p.grad for name, p in theirs.named_parameters()},
    }
    assert wanted.keys() == got.keys() - {name for name in got if name.endswith("of vjp")}
    for name, expected in wanted.items():
        assert_close(got[name], expected.detach().numpy().astype(np.float64), name)
    for name, expected in as_dict(theirs(x_t), "").items():
        assert_close(as_dict(cell(x), "")[name], expected.detach().numpy().astype(np.float64), name)


@pytest.mark.parametrize("case", PYTORCH)
def test_state_dicts_are_pytorchs(case, dtype):
    torch = pytest.importorskip("torch")
    cell = make(case, dtype=dtype)
    theirs = torch_cell(torch, cell)
    cell.load_state_dict(theirs.state_dict())
    assert_same_state(cell.state_dict(), {name: tensor.numpy() for name, tensor in theirs.state_dict().items()})
    cell.weight_hh = cell.weight_hh + 1
    theirs.load_state_dict({name: torch.from_numpy(array) for name, array in cell.state_dict().items()})
    assert_same_bits(theirs.weight_hh.detach().numpy(), cell.weight_hh)


# The wrong calls.

lstm, gru = fastrnn.LSTMCell(3, 4, seed=0), fastrnn.GRUCell(3, 4, seed=0)
x, h = np.ones((2, 3), np.float32), np.ones((2, 4), np.float32)

CALLS = [
    (gru, x[None], None, ValueError, r"x: expected 2 dimensions \(a batch\) or 1, got shape \(1, 2, 3\)"),
    (gru, 1.0, None, ValueError, r"x: expected 2 dimensions \(a batch\) or 1, got shape \(\)"),
    (gru, [[1.0], [1.0, 2.0]], None, TypeError, "x: expected an array in main memory, got list of 2"),
    (gru, x.astype(np.float64), None, TypeError, "x: expected dtype float32, got float64"),
    (gru, x[:, :2], None, ValueError, r"x: expected shape \(.*3\), got \(.*2, 2\)"),
    (gru, x[0, :2], None, ValueError, r"x: expected shape \(.*3\), got \(.*2\)"),
    (gru, x[:0], None, ValueError, r"x: expected shape \(.*at least 1, 3\), got \(.*0, 3\)"),
    (gru, x, h[:1], ValueError, r"state: expected shape \(.*2, 4\), got \(.*1, 4\)"),
    (gru, x, h[0], ValueError, r"state: expected shape \(.*2, 4\), got \(.*4\)"),
    (gru, x[0], h, ValueError, r"state: expected shape \(.*4\), got \(.*2, 4\)"),
    (gru, x, h.astype(np.float64), TypeError, "state: expected dtype float32, got float64"),
    (gru, x, (h, h), ValueError, r"state: expected shape \(.*2, 4\), got "),
    (lstm, x, h, TypeError, "state: expected a tuple of 2 arrays, got ndarray"),
    (lstm, x, (h,), TypeError, "state: expected a tuple of 2 arrays, got tuple of 1"),
    (lstm, x, (h, None), TypeError, "state: expected dtype float32, got object"),
    (lstm, x, (h, h[:, :3]), ValueError, r"state: expected shape \(.*2, 4\), got \(.*2, 3\)"),
]


@pytest.mark.parametrize(("cell", "x", "state", "error", "message"), CALLS, ids=map(str, range(len(CALLS))))
def test_wrong_calls(cell, x, state, error, message):
    with pytest.raises(error, match="^" + message):
        cell(x, state)
    with pytest.raises(error, match="^" + message):
        cell.vjp(x, state)


@pytest.mark.parametrize(
    ("cell", "dstate", "error", "message"),
    [
        (gru, h[:1], ValueError, r"dstate: expected shape \(.*2, 4\), got \(.*1, 4\)"),
        (gru, h.astype(np.float64), TypeError, "dstate: expected dtype float32, got float64"),
        (lstm, h, TypeError, "dstate: expected a tuple of 2 arrays, got ndarray"),
        (lstm, (h, h[0]), ValueError, r"dstate: expected shape \(.*2, 4\), got \(.*4\)"),
    ],
)
def test_wrong_gradients(cell, dstate, error, message):
    with pytest.raises(error, match="^" + message):
        cell.vjp(x)[1](dstate)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fastrnn.RNNCell(3), TypeError, "hidden_size"),
        (lambda: fastrnn.RNNCell(0, 4), ValueError, "input_size: expected at least 1, got 0"),
        (lambda: fastrnn.LSTMCell(3, 4.0), TypeError, "hidden_size: expected an int, got 4.0"),
        (lambda: fastrnn.LSTMCell(3, 4, 1), TypeError, "bias: expected True or False, got 1"),
        (lambda: fastrnn.RNNCell(3, 4, nonlinearity="sine"), ValueError, "nonlinearity: expected one of tanh, relu"),
        (lambda: fastrnn.GRUCell(3, 4, reset_after=0), TypeError, "reset_after: expected True or False, got 0"),
        (lambda: fastrnn.GRUCell(3, 4, dtype=int), TypeError, "dtype: expected float32 or float64, got "),
        (lambda: fastrnn.GRUCell(3, 4, seed=-1), ValueError, "seed: expected at least 0, got -1"),
        (lambda: fastrnn.GRUCell(3, 4, num_layers=2), TypeError, "num_layers"),
    ],
)
def test_wrong_cells(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_states_are_tuples_where_there_are_two():
    for cell in (gru, lstm):
        state = cell(x)
        assert isinstance(state, tuple) == (cell is lstm)
        assert {s.shape for s in as_dict(state, "").values()} == {(2, 4)}
