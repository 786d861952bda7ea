"""Keras's layers in and out, from memory and files, against Keras itself."""

import json
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from oracle import assert_all_same_bits, assert_close, assert_same_bits, sigmoid, softsign, softsign_slope

import fastrnn
from fastrnn.interop.keras import assign, from_keras, load, to_keras

torch = pytest.importorskip("torch")
h5py = pytest.importorskip("h5py")
os.environ["KERAS_BACKEND"] = "torch"
keras = pytest.importorskip("keras")
layers = keras.layers

# Keras's variables have an `__array__` without NumPy 2's argument copy; Keras saves them through it.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


@pytest.fixture(autouse=True, scope="module")
def one_thread_of_torch():
    """Its threads wait for each other longer than such small products take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


CASES = {
    "SimpleRNN": ("SimpleRNN", {}),
    "SimpleRNN relu": ("SimpleRNN", {"activation": "relu"}),
    "SimpleRNN linear": ("SimpleRNN", {"activation": None}),
    "LSTM": ("LSTM", {}),
    "GRU": ("GRU", {}),
    "GRU reset before": ("GRU", {"reset_after": False}),
}
NONLINEARITIES = {"SimpleRNN": "tanh", "SimpleRNN relu": "relu", "SimpleRNN linear": "identity"}


def cells(layer):
    if isinstance(layer, layers.Bidirectional):
        return [layer.forward_layer.cell, layer.backward_layer.cell]
    return [layer.cell]


def weights(layer):
    return [keras.ops.convert_to_numpy(v.value) for v in layer.weights]


def fill(layer, seed=0):
    """Random weights, biases too, that keep a linear RNN from exploding."""
    rng = np.random.default_rng(seed)
    for variable in layer.weights:
        values = rng.standard_normal(variable.shape) / np.sqrt(4 * variable.shape[-1])
        variable.assign(values.astype(variable.dtype))
    return layer


def make(case, I=5, H=18, bidirectional=False, dtype="float32", built=True, **options):
    """A Keras layer that returns all it can."""
    kind, more = CASES[case]
    options = {"return_sequences": True, "return_state": True, **more, **options}
    layer = getattr(layers, kind)(H, dtype=str(dtype), **options)
    if bidirectional:
        layer = layers.Bidirectional(layer, dtype=str(dtype))
    if built:
        layer.build((None, None, I))
        fill(layer)
    return layer


def run(layer, x, *arguments, **keywords):
    """All outputs as arrays."""
    out = layer(x, *arguments, **keywords)
    return [keras.ops.convert_to_numpy(each) for each in (out if isinstance(out, (list, tuple)) else [out])]


def inputs(B, T, I, dtype, seed=1):
    return np.random.default_rng(seed).standard_normal((B, T, I)).astype(dtype)


def states(layer, state):
    """A state here in Keras's order: all of the forward layer's, then the backward one's."""
    arrays = state if isinstance(state, tuple) else (state,)
    return [array[d] for d in range(layer.directions) for array in arrays]


def equations(cell, case, x, state):
    """Keras's equations in its own layout, in float64: outputs and the state after them, of one direction."""
    kernel, recurrent, *bias = (keras.ops.convert_to_numpy(v.value).astype(np.float64) for v in cell.weights)
    after = "after" if case == "GRU" else ""
    b_x, b_h = (bias[0] if after else (bias[0], 0)) if bias else (0, 0)
    h, *c = [s.astype(np.float64) for s in state]
    ys, H = [], len(recurrent)
    for x_t in x.astype(np.float64).swapaxes(0, 1):
        a, r_h = x_t @ kernel + b_x, h @ recurrent + b_h
        if case == "LSTM":
            i, f, g, o = np.split(a + r_h, 4, 1)
            c = [sigmoid(f) * c[0] + sigmoid(i) * np.tanh(g)]
            h = sigmoid(o) * np.tanh(c[0])
        elif case.startswith("GRU"):
            z, r = np.split(sigmoid((a + r_h)[:, : 2 * H]), 2, 1)
            inner = r * r_h[:, 2 * H :] if after else (r * h) @ recurrent[:, 2 * H :]
            h = z * h + (1 - z) * np.tanh(a[:, 2 * H :] + inner)
        else:
            f = {"tanh": np.tanh, "relu": lambda v: np.maximum(v, 0), "identity": lambda v: v}[NONLINEARITIES[case]]
            h = f(a + r_h)
        ys.append(h)
    return np.stack(ys, 1), [h, *c]


def assert_same_outputs(layer, theirs, case, x, state=None):
    """The layer's outputs agree with the equations to its own precision, and with Keras's to float32's."""
    y, after = layer(x, state)
    arrays = [y, *states(layer, after)]
    before = [np.zeros_like(s) for s in arrays[1:]] if state is None else states(layer, state)
    n = len(before) // layer.directions
    ys, expected = [], []
    for d, cell in enumerate(cells(theirs)):
        y_d, after_d = equations(cell, case, x[:, ::-1] if d else x, before[d * n : d * n + n])
        ys.append(y_d[:, ::-1] if d else y_d)
        expected += after_d
    names = ["y", "h", "c", "h reverse", "c reverse"]
    for name, got, want in zip(names, arrays, [np.concatenate(ys, -1), *expected], strict=False):
        assert_close(got, want, name)
    kerass = run(theirs, x, initial_state=[keras.ops.convert_to_tensor(s) for s in before])
    for name, got, want in zip(names, arrays, kerass):
        assert got.dtype == want.dtype
        assert_close(got.astype(np.float32), want.astype(np.float64), name)
    return y, after


def assert_same_layer(a, b):
    assert type(a) is type(b)
    assert a.config == b.config
    assert_all_same_bits(a.state_dict(), b.state_dict())


@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "bidirectional"])
@pytest.mark.parametrize("case", CASES)
def test_layers_do_what_kerass_do(case, bidirectional, bias, dtype):
    for B, T, I, H in (1, 1, 1, 1), (3, 7, 5, 17), (2, 5, 63, 65):
        theirs = make(case, I, H, bidirectional, dtype, use_bias=bias)
        layer = from_keras(theirs)
        assert layer.batch_first
        assert layer.dtype == dtype
        assert (layer.input_size, layer.hidden_size, layer.bidirectional, layer.bias) == (I, H, bidirectional, bias)
        x = inputs(B, T, I, dtype)
        _, state = assert_same_outputs(layer, theirs, case, x)
        assert_same_outputs(layer, theirs, case, x[:, ::-1].copy(), state)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "bidirectional"])
@pytest.mark.parametrize("case", CASES)
def test_round_trips_are_exact(case, bidirectional, bias, dtype):
    theirs = make(case, 5, 17, bidirectional, dtype, use_bias=bias, recurrent_dropout=0.25)
    layer = from_keras(theirs)
    again = to_keras(layer)
    assert type(again) is type(theirs)
    for mine, their in zip(weights(again), weights(theirs), strict=True):
        assert_same_bits(mine, their)
    assert_same_layer(from_keras(again), layer)
    assert layer.recurrent_dropout == 0.25
    if case in NONLINEARITIES:
        assert layer.nonlinearity == NONLINEARITIES[case]


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "bidirectional"])
@pytest.mark.parametrize("case", CASES)
def test_to_keras_does_what_the_layer_does(case, bidirectional, num_layers, dtype):
    name, options = {"SimpleRNN": ("RNN", {}), "LSTM": ("LSTM", {}), "GRU": ("GRU", {})}[CASES[case][0]]
    if case in NONLINEARITIES:
        options = {"nonlinearity": NONLINEARITIES[case]}
    if name == "GRU":
        options = {"reset_after": case == "GRU"}
    dropout = 0.5 if num_layers > 1 else 0.0
    layer = getattr(fastrnn, name)(
        3, 9, num_layers, batch_first=True, bidirectional=bidirectional, dropout=dropout, dtype=dtype, seed=0, **options
    )
    x = inputs(2, 6, 3, dtype)
    y, state = layer(x)
    theirs = to_keras(layer, name="encoder")
    assert theirs.name == "encoder"
    # Keras multiplies float64 in float32; that the weights arrive in full is tested above.
    assert_close(run(theirs, x)[0].astype(np.float32), y.astype(np.float64), "y")
    last = run(to_keras(layer, return_sequences=False), x)[0]
    h_n = state[0] if isinstance(state, tuple) else state
    h_n = np.concatenate(list(h_n[-layer.directions :]), -1)
    assert_close(last.astype(np.float32), h_n.astype(np.float64), "h_n")
    if num_layers > 1:
        dropouts = [each.rate for each in theirs.layers if isinstance(each, layers.Dropout)]
        assert dropouts == [0.5, 0.5]
        chain = [from_keras(each) for each in theirs.layers if not isinstance(each, layers.Dropout)]
        for each in chain:
            x, _ = each(x)
        assert_close(x, y.astype(np.float64), "one after another")


def test_a_stack_without_dropout_has_no_dropout_layers():
    assert [type(each) for each in to_keras(fastrnn.GRU(3, 4, 2)).layers] == [layers.GRU, layers.GRU]


def test_one_bias_is_the_sum_of_two(dtype):
    lstm = fastrnn.LSTM(3, 4, dtype=dtype, seed=0)
    assert_same_bits(weights(to_keras(lstm))[2], lstm.bias_ih_l0 + lstm.bias_hh_l0)
    gru = fastrnn.GRU(3, 4, dtype=dtype, seed=0)
    assert weights(to_keras(gru))[2].shape == (2, 12)


def test_unit_forget_bias_arrives():
    theirs = layers.LSTM(4)
    theirs.build((None, None, 3))
    layer = from_keras(theirs)
    assert (layer.bias_ih_l0.reshape(4, 4) == [[0], [1], [0], [0]]).all()
    assert (layer.bias_hh_l0 == 0).all()


@pytest.mark.parametrize("case", ["SimpleRNN", "LSTM", "GRU"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "bidirectional"])
def test_rnn_of_a_cell(case, bidirectional):
    theirs = layers.RNN(getattr(layers, f"{case}Cell")(7), return_sequences=True, return_state=True)
    if bidirectional:
        theirs = layers.Bidirectional(theirs)
    theirs.build((None, None, 3))
    assert_same_outputs(from_keras(fill(theirs)), theirs, case, inputs(2, 5, 3, np.float32))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "bidirectional"])
def test_a_mask_at_the_right_is_lengths(case, bidirectional):
    # A Bidirectional layer sets zero_output_for_mask itself.
    theirs = make(case, 5, 9, bidirectional, zero_output_for_mask=True)
    layer, x, lengths = from_keras(theirs), inputs(4, 7, 5, np.float32), np.array([7, 3, 1, 5])
    mask = np.arange(7) < lengths[:, None]
    y, after = layer(x, lengths=mask.sum(1))
    expected = run(theirs, x, mask=keras.ops.convert_to_tensor(mask))
    for name, got, want in zip(["y", "h", "c", "h reverse", "c reverse"], [y, *states(layer, after)], expected):
        assert_close(got, want.astype(np.float64), name)


@pytest.mark.parametrize(
    ("mode", "merge"),
    [
        ("sum", lambda a, b: a + b),
        ("mul", lambda a, b: a * b),
        ("ave", lambda a, b: (a + b) / 2),
        (None, lambda a, b: [a, b]),
    ],
)
def test_other_merge_modes_are_told(mode, merge, tmp_path):
    x = keras.Input((None, 3))
    both = layers.Bidirectional(layers.GRU(4, return_sequences=True), merge_mode=mode, name="both")
    model = keras.Model(x, both(x))
    model.save(tmp_path / "model.keras")
    with pytest.warns(UserWarning, match=f"^merge_mode of 'both': expected 'concat', got {mode!r}") as record:
        layer = from_keras(both)
    assert record[0].filename == __file__
    x = inputs(2, 5, 3, np.float32)
    y, _ = layer(x)
    for got, want in zip(np.atleast_1d(merge(*np.split(y, 2, -1))), np.atleast_1d(np.squeeze(run(both, x)))):
        assert_close(got, want.astype(np.float64))
    with pytest.warns(UserWarning, match=r"^merge_mode of 'both'") as record:
        assert_same_layer(load(tmp_path / "model.keras", "both"), layer)
    assert record[0].filename == __file__


def test_dtype_is_the_variables():
    assert from_keras(make("LSTM", dtype="mixed_bfloat16")).dtype == np.float32
    for name in "float16", "bfloat16":
        theirs = layers.GRU(4, dtype=name, name="x", recurrent_initializer="zeros")
        theirs.build((None, None, 3))
        with pytest.raises(ValueError, match=f"^dtype of 'x': expected float32 or float64, got {name}"):
            from_keras(theirs)


def test_layers_share_no_memory_with_kerass():
    theirs = make("GRU")
    layer, before = from_keras(theirs), weights(theirs)
    copy = layer.state_dict()
    with layer.parameters.writable() as arrays:
        for array in arrays.values():
            array += 1
    for now, then in zip(weights(theirs), before):
        assert_same_bits(now, then)
    layer = from_keras(theirs)
    fill(theirs, seed=5)
    assert_all_same_bits(layer.state_dict(), copy)


# Options that there are not.

RELU = {"activation": "relu"}
REFUSED = [
    (lambda: make("LSTM", **RELU), "activation of 'x': expected 'tanh', got 'relu'"),
    (lambda: make("GRU", activation=None), "activation of 'x': expected 'tanh', got 'linear'"),
    (lambda: make("GRU", activation=cube), "activation of 'x': expected 'tanh', got dict"),
    (lambda: make("SimpleRNN", activation="elu"), "activation of 'x': expected 'tanh' or 'relu' or 'linear', got '"),
    (lambda: make("LSTM", recurrent_activation="hard_sigmoid"), "recurrent_activation of 'x': expected 'sigmoid', got"),
    (lambda: make("GRU", go_backwards=True), "go_backwards of 'x': expected False, got True"),
    (lambda: make("GRU", built=False), "layer: expected one that has been built or called, got 'x'"),
    (lambda: layers.Dense(3), "layer: expected an LSTM, GRU, SimpleRNN, .* got Dense"),
    (lambda: layers.RNN([layers.LSTMCell(3)]), "layer: expected an LSTM, .* got RNN"),
    (lambda: layers.TimeDistributed(layers.Dense(3)), "layer: expected an LSTM, .* got TimeDistributed of Dense"),
    (lambda: Mine(3), "layer: expected an LSTM, .* got Mine"),
    (lambda: layers.Bidirectional(Mine(3)), "layer: expected an LSTM, .* got Bidirectional of Mine"),
    (lambda: two(layers.LSTM(3), layers.LSTM(4)), "backward_layer of 'x': expected the forward layer's options, "),
    (lambda: two(layers.LSTM(3), layers.GRU(3)), "backward_layer of 'x': expected the forward layer's options, "),
    (lambda: two(layers.LSTM(3), layers.LSTM(3, **RELU)), "activation of backward_layer of 'x': expected 'tanh', got"),
    (lambda: turned(), "go_backwards of 'x': expected False, got True"),
]


@keras.saving.register_keras_serializable("tests")
def cube(a):
    return a**3


@keras.saving.register_keras_serializable()
class Mine(layers.LSTM):
    pass


def two(forward, backward):
    backward.go_backwards = True
    both = layers.Bidirectional(forward, backward_layer=backward)
    both.build((None, None, 2))
    return both


def turned():
    both = layers.Bidirectional(layers.GRU(3, go_backwards=True), backward_layer=layers.GRU(3))
    both.build((None, None, 2))
    return both


@pytest.mark.parametrize(("make_layer", "message"), REFUSED, ids=map(str, range(len(REFUSED))))
def test_what_has_no_counterpart_is_refused(make_layer, message):
    layer = make_layer()
    layer.name = "x"
    with pytest.raises(ValueError, match=r"^" + message):
        from_keras(layer)


def test_wrong_types():
    with pytest.raises(TypeError, match=r"^layer: expected a Keras layer, got 'LSTM'"):
        from_keras("LSTM")
    with pytest.raises(TypeError, match=r"^layer: expected an RNN, LSTM or GRU, got Linear"):
        to_keras(fastrnn.Linear(3, 4))
    with pytest.raises(TypeError, match=r"^return_sequences: expected True or False, got 1"):
        to_keras(fastrnn.GRU(3, 4), 1)


@pytest.mark.parametrize(
    ("layer", "option"),
    [
        (fastrnn.LSTM(3, 4, peephole=True), "peephole"),
        (fastrnn.LSTM(3, 4, coupled=True), "coupled"),
        (fastrnn.LSTM(3, 4, cell_clip=1), "cell_clip"),
        (fastrnn.LSTM(3, 4, proj_size=2), "proj_size"),
        (fastrnn.LSTM(3, 4, zoneout=(0, 0.5)), "zoneout"),
        (fastrnn.GRU(3, 4, layer_norm=True), "layer_norm"),
    ],
)
def test_what_keras_lacks_is_refused(layer, option):
    with pytest.raises(ValueError, match=f"^{option}: expected none, which Keras's .* lacks, got "):
        to_keras(layer)
    with pytest.raises(ValueError, match=f"^{option}: expected none, which Keras's .* lacks, got "):
        assign(make("LSTM"), layer)


def test_other_nonlinearities_are_refused():
    layer = fastrnn.RNN(3, 4, nonlinearity=(softsign, softsign_slope))
    with pytest.raises(ValueError, match=r"^nonlinearity: expected one of tanh, relu, identity, got a pair"):
        to_keras(layer)


# Writing back.


def test_assign_writes_into_the_model_that_it_came_from(dtype):
    x = keras.Input((None, 3), dtype=dtype.name)
    first, second = make("LSTM", 3, 5, True, dtype, built=False, return_state=False), make("LSTM", 10, 5, True, dtype)
    second.return_state = second.forward_layer.return_state = second.backward_layer.return_state = False
    model = keras.Model(x, second(first(x)))
    layer = fastrnn.LSTM(3, 5, 2, bidirectional=True, batch_first=True, dtype=dtype, seed=3)
    assign([first, second], layer)
    x = inputs(2, 6, 3, dtype)
    assert_close(run(model, x)[0].astype(np.float32), layer(x)[0].astype(np.float64))


def test_assign_takes_a_sequential_and_its_other_layers_stay():
    model = keras.Sequential(
        [keras.Input((None, 3)), layers.GRU(4, return_sequences=True), layers.Dropout(0.5), layers.GRU(4)]
    )
    model.add(layers.Dense(2))
    dense = weights(model.layers[-1])
    layer = fastrnn.GRU(3, 4, 2, batch_first=True, seed=0)
    assign(model, layer)
    x = inputs(2, 6, 3, np.float32)
    y = layer(x)[0][:, -1].astype(np.float64)
    assert_close(run(model, x)[0], y @ dense[0] + dense[1])


def test_assign_rounds_to_the_variables_dtype():
    theirs, layer = make("GRU", 3, 4), fastrnn.GRU(3, 4, dtype=np.float64, seed=0)
    assign(theirs, layer)
    assert_same_bits(from_keras(theirs).weight_hh_l0, layer.weight_hh_l0.astype(np.float32))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (fastrnn.LSTM(3, 4), "expected class 'LSTM', as the layer has it, got 'GRU' in 'x'"),
        (fastrnn.GRU(2, 4), "expected input_size 2, as the layer has it, got 3"),
        (fastrnn.GRU(3, 5), "expected hidden_size 5, as the layer has it, got 4"),
        (fastrnn.GRU(3, 4, bias=False), "expected bias False, as the layer has it, got True"),
        (fastrnn.GRU(3, 4, bidirectional=True), "expected bidirectional True, as the layer has it, got False"),
        (fastrnn.GRU(3, 4, reset_after=False), "expected reset_after False, as the layer has it, got True"),
        (fastrnn.GRU(3, 4, 2), "expected as many layers as num_layers, 2, got 1"),
    ],
)
def test_assign_to_what_does_not_fit(layer, message):
    theirs = make("GRU", 3, 4, name="x")
    before = weights(theirs)
    with pytest.raises(ValueError, match=r"^keras_layer: " + message):
        assign(theirs, layer)
    for now, then in zip(weights(theirs), before):
        assert_same_bits(now, then)


def test_assign_writes_all_or_nothing():
    good, bad = make("GRU", 3, 4), make("GRU", 3, 4)
    before = weights(good)
    with pytest.raises(ValueError, match=r"^keras_layer: expected input_size 4"):
        assign([good, bad], fastrnn.GRU(3, 4, 2))
    for now, then in zip(weights(good), before):
        assert_same_bits(now, then)


# Files.


def functional():
    """A model of models, with all kinds of layers, and some that are none of ours; and where ours are."""
    sizes = {"return_sequences": True}
    deep = keras.Sequential(
        [keras.Input((None, 4)), layers.GRU(5, name="deep", reset_after=False, **sizes), layers.GRU(3, **sizes)],
        name="inner",
    )
    middle_in = keras.Input((None, 3))
    middle = keras.Model(
        middle_in, layers.Bidirectional(layers.LSTM(2, **sizes), name="both")(middle_in), name="middle"
    )
    x = keras.Input((None, 4))
    y = layers.LSTM(4, name="first", **sizes)(x)
    y = layers.Dense(4)(y)
    y = layers.LSTM(4, name="second", use_bias=False, **sizes)(y)
    y = layers.Add()([x, y])
    y = middle(deep(y))
    y = layers.RNN(layers.GRUCell(3), name="of_a_cell", **sizes)(y)
    y = layers.Bidirectional(layers.SimpleRNN(2, activation="relu", **sizes), name="again")(y)
    y = layers.SimpleRNN(2, activation=None, use_bias=False, name="last")(y)
    model = keras.Model(x, y)
    fill(model)
    ours = [model.get_layer(n) for n in ("first", "second", "of_a_cell", "again", "last")]
    return model, [*ours, *deep.layers, middle.get_layer("both")]


def test_all_layers_of_a_keras_file(tmp_path):
    model, ours = functional()
    model.save(tmp_path / "model.keras")
    loaded = load(tmp_path / "model.keras")
    assert set(loaded) == {layer.name for layer in ours}
    for layer in ours:
        assert_same_layer(loaded[layer.name], from_keras(layer))
        assert_same_layer(load(str(tmp_path / "model.keras"), layer.name), loaded[layer.name])


def test_all_layers_of_a_weights_file(tmp_path):
    model, ours = functional()
    path = tmp_path / "model.weights.h5"
    model.save_weights(path)
    loaded = load(path)
    assert set(loaded) == {layer.name for layer in ours}
    for layer in ours:
        expected = from_keras(layer)
        assert_all_same_bits(loaded[layer.name].state_dict(), expected.state_dict())
        if not isinstance(expected, fastrnn.RNN):
            assert loaded[layer.name].config == expected.config
        else:
            assert loaded[layer.name].nonlinearity == "tanh"
            assert_same_layer(load(path, layer.name, nonlinearity=expected.nonlinearity), expected)


def test_files_of_early_versions_have_no_names(tmp_path):
    model, ours = functional()
    model.save(tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    path = tmp_path / "model.weights.h5"
    path.write_bytes(contents["model.weights.h5"])
    with h5py.File(path, "r+") as file:
        file.visititems(lambda _, item: item.attrs.clear())
    contents["model.weights.h5"] = path.read_bytes()
    with zipfile.ZipFile(tmp_path / "old.keras", "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    loaded = load(tmp_path / "old.keras")
    for layer in ours:
        assert_same_layer(loaded[layer.name], from_keras(layer))
    # Without the description, the places in the file are the names.
    assert {"lstm", "simple_rnn", "layers/bidirectional"} < set(load(path))


def test_a_subclassed_model(tmp_path):
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.encoder = make("GRU", 3, 4, name="encoder", use_bias=False, return_state=False)
            bottom = make("LSTM", 4, 4, True, return_state=False)
            self.stack = [bottom, make("LSTM", 8, 2, return_state=False, name="top")]

        def build(self, shape):
            self.built = True

        def call(self, x):
            return self.stack[1](self.stack[0](self.encoder(x)))

    model = Model()
    model.build((None, None, 3))
    model.stack[0].name = "bottom"
    for path in tmp_path / "model.keras", tmp_path / "model.weights.h5":
        (model.save if path.suffix == ".keras" else model.save_weights)(path)
        with pytest.raises(ValueError, match=r"^reset_after: expected True or False, which the arrays of 'encoder'"):
            load(path)
        loaded = load(path, reset_after=True)
        assert set(loaded) == {"encoder", "bottom", "top"}
        for layer in model.encoder, *model.stack:
            assert_same_layer(loaded[layer.name], from_keras(layer))
        assert load(path, "encoder", reset_after=False).reset_after is False


def test_layers_of_the_same_name_go_by_their_paths(tmp_path):
    parts = [
        keras.Sequential([keras.Input((None, 3)), layers.LSTM(3, return_sequences=True, name="lstm")], name=name)
        for name in ("encoder", "decoder")
    ]
    model = fill(keras.Sequential([*parts, layers.GRU(2, name="gru")]))
    for path in tmp_path / "model.keras", tmp_path / "model.weights.h5":
        (model.save if path.suffix == ".keras" else model.save_weights)(path)
        places = ["layers/sequential/layers/lstm", "layers/sequential_1/layers/lstm"]
        loaded = load(path)
        assert set(loaded) == {"gru", *places}
        for place, part in zip(places, parts):
            assert_same_layer(loaded[place], from_keras(part.layers[0]))
            assert_same_layer(load(path, place), loaded[place])
        with pytest.raises(KeyError, match=f"got 'lstm', which of {places[0]}, {places[1]}"):
            load(path, "lstm")


def test_one_layer_can_be_had_where_another_is_refused(tmp_path):
    model = keras.Sequential(
        [keras.Input((None, 3)), layers.LSTM(3, name="bad", return_sequences=True, **RELU), layers.LSTM(2, name="good")]
    )
    model.save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match=r"^activation of 'bad': expected 'tanh', got 'relu'"):
        load(tmp_path / "model.keras")
    assert load(tmp_path / "model.keras", "good").hidden_size == 2


def test_layers_of_ones_own_are_not_taken_for_kerass(tmp_path):
    model = keras.Sequential([keras.Input((None, 3)), Mine(3, name="mine", return_sequences=True), layers.GRU(3)])
    model.save(tmp_path / "model.keras")
    with pytest.raises(KeyError, match=f"^\"name: expected one of {model.layers[1].name}, got 'mine'\""):
        load(tmp_path / "model.keras", "mine")


def test_files_are_read_without_keras(tmp_path):
    model = keras.Sequential([keras.Input((None, 3)), layers.GRU(2, name="gru")])
    model.save(tmp_path / "model.keras")
    code = (
        "import sys; sys.modules['keras'] = sys.modules['torch'] = sys.modules['tensorflow'] = None\n"
        "from fastrnn.interop.keras import from_keras, load\n"
        "assert 'h5py' not in sys.modules\n"
        f"assert load({str(tmp_path / 'model.keras')!r}, 'gru').hidden_size == 2\n"
        "try:\n    from_keras(1)\n"
        "except ImportError as error:\n    assert 'pip install fastrnn[keras]' in str(error)\n"
        "else:\n    raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_h5py(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"^h5py: expected it to be installed, by pip install fastrnn\[keras\]"):
        load(tmp_path / "model.keras")


def test_files_that_are_none(tmp_path):
    model = keras.Sequential([keras.Input((None, 3)), layers.GRU(2, name="gru")])
    good = tmp_path / "good.keras"
    model.save(good)
    model.save_weights(tmp_path / "good.weights.h5")
    content = good.read_bytes()
    h5 = (tmp_path / "good.weights.h5").read_bytes()
    with h5py.File(tmp_path / "legacy.h5", "w") as file:
        file.attrs["layer_names"] = ["gru"]
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("a", "b")
    broken = bytearray(content)
    broken[len(content) // 2] ^= 255
    files = {
        "cut.keras": content[: len(content) // 2],
        "cut.weights.h5": h5[: len(h5) // 2],
        "nothing": b"",
        "text": b"some text",
        "flipped.keras": bytes(broken),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    for name in [*files, "legacy.h5", "empty.zip"]:
        with pytest.raises(ValueError, match=r"^path: expected a whole \.keras or \.weights\.h5 file of Keras 3, got "):
            load(tmp_path / name)
    for name in "missing.keras", "":
        with pytest.raises(FileNotFoundError, match=r"^path: expected a \.keras or \.weights\.h5 file, found none at"):
            load(tmp_path / name)


def test_a_description_that_does_not_fit_the_arrays(tmp_path):
    model = keras.Sequential([keras.Input((None, 3)), layers.GRU(2, name="gru")])
    model.save(tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(contents["config.json"])
    gru = next(node for node in config["config"]["layers"] if node["class_name"] == "GRU")
    gru["config"]["units"] = 5
    contents["config.json"] = json.dumps(config)
    with zipfile.ZipFile(tmp_path / "wrong.keras", "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match=r"^weights of 'gru': expected arrays of shapes \[\(3, 15\), .* got \[\("):
        load(tmp_path / "wrong.keras")


def test_wrong_arguments_of_load(tmp_path):
    model = keras.Sequential([keras.Input((None, 3)), layers.GRU(2, name="gru"), layers.Dense(2)])
    path = tmp_path / "model.keras"
    model.save(path)
    with pytest.raises(KeyError, match=r"name: expected one of gru, got 'dense'"):
        load(path, "dense")
    with pytest.raises(ValueError, match=r"^nonlinearity: expected one of tanh, relu, identity, got 'linear'"):
        load(path, nonlinearity="linear")
    with pytest.raises(TypeError, match=r"^reset_after: expected True or False, got 1"):
        load(path, reset_after=1)
    empty = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    empty.save(tmp_path / "dense.keras")
    assert load(tmp_path / "dense.keras") == {}
    with pytest.raises(KeyError, match=r"name: expected one of no layers, got 'gru'"):
        load(tmp_path / "dense.keras", "gru")
