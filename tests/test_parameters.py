"""Parameters change only where the packed weights notice; state dicts and files are taken whole or not at all."""

import copy
import json
import os
import pickle
import sys
import threading

import numpy as np
import oracle
import pytest
from oracle import assert_same_bits
from safetensors.numpy import save_file

import fastrnn
from fastrnn import parameters
from fastrnn.parameters import JoinedParameters, Parameters


@pytest.fixture
def lstm(dtype):
    return fastrnn.LSTM(3, 5, 2, dtype=dtype, seed=0)


@pytest.fixture
def x(dtype):
    return np.random.default_rng(1).standard_normal((4, 2, 3)).astype(dtype)


def other(lstm, seed=2):
    return fastrnn.LSTM(**{**lstm.config, "seed": seed})


def assert_same_state(a, b):
    assert list(a) == list(b)
    for name in a:
        assert_same_bits(a[name], b[name], name)


def assert_read_only(module):
    for name, array in module.parameters.items():
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
        with pytest.raises(ValueError, match="read-only"):
            getattr(module, name)[0] += 1


def test_writing_in_place_raises(lstm):
    before = lstm.state_dict()
    assert_read_only(lstm)
    assert_same_state(lstm.state_dict(), before)


def set_attribute(lstm, name, value):
    setattr(lstm, name, value)


def set_item(lstm, name, value):
    lstm.parameters[name] = value


def write_inside(lstm, name, value):
    with lstm.parameters.writable() as arrays:
        arrays[name][:] = value


def augment(lstm, name, value):
    lstm.parameters[name] = lstm.parameters[name] + (value - lstm.parameters[name])


WAYS = [set_attribute, set_item, write_inside, augment]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "bias_ih_l1", "bias_hh_l1", "weight_ih_l1"])
def test_changes_are_seen(way, name, lstm, x):
    """By both passes, in the layer that has been used before; and the parameters are read-only still."""

    def results(module):
        (y, _), pullback = module.vjp(x)
        return np.concatenate([module(x)[0].ravel(), y.ravel(), pullback(np.ones_like(y))[0].ravel()])

    before, version = results(lstm), lstm.parameters.version
    value = np.full_like(lstm.parameters[name], 0.125)
    way(lstm, name, value)
    np.testing.assert_allclose(lstm.parameters[name], value, rtol=1e-6)
    assert lstm.parameters.version > version
    after = results(lstm)
    assert not np.array_equal(after, before)
    fresh = other(lstm)
    fresh.load_state_dict(lstm.state_dict())
    assert_same_bits(after, results(fresh))
    assert_read_only(lstm)


def test_the_given_array_is_copied(lstm):
    value = np.zeros_like(lstm.weight_hh_l0)
    lstm.weight_hh_l0 = value
    value[:] = 1
    assert not lstm.weight_hh_l0.any()
    copied = lstm.state_dict()
    copied["weight_hh_l0"][:] = 1
    assert not lstm.weight_hh_l0.any()


def test_an_error_inside_writable_leaves_them_read_only(lstm, x):
    y, _ = lstm(x)

    def fail():
        with lstm.parameters.writable() as arrays:
            arrays["bias_ih_l1"][:] = 2
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert_read_only(lstm)
    assert not np.array_equal(lstm(x)[0], y)


def test_other_floats_are_cast(lstm):
    for dtype in (np.float32, np.float64):
        lstm.bias_ih_l0 = np.full(20, 0.5, dtype)
        assert lstm.bias_ih_l0.dtype == lstm.dtype
    assert lstm.bias_ih_l0.tolist() == [0.5] * 20


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("weight_ih_l0", np.zeros((20, 4)), ValueError, r"weight_ih_l0: expected shape \(20, 3\), got \(20, 4\)"),
        ("bias_ih_l0", np.zeros(1), ValueError, r"bias_ih_l0: expected shape \(20,\), got \(1,\)"),
        ("bias_ih_l0", 0.0, ValueError, r"bias_ih_l0: expected shape \(20,\), got \(\)"),
        ("bias_ih_l0", np.zeros(20, int), TypeError, r"bias_ih_l0: expected dtype float.., got int64"),
        ("bias_ih_l0", np.zeros(20, complex), TypeError, r"bias_ih_l0: expected dtype float.., got complex128"),
        ("bias_ih_l0", np.zeros(20, bool), TypeError, r"bias_ih_l0: expected dtype float.., got bool"),
        ("bias_ih_l2", np.zeros(20), KeyError, r"bias_ih_l2: no such parameter; there are weight_ih_l0, "),
    ],
)
def test_what_does_not_fit_changes_nothing(name, value, error, message, lstm):
    before, version = lstm.state_dict(), lstm.parameters.version
    with pytest.raises(error, match=message):
        lstm.parameters[name] = value
    if error is not KeyError:
        with pytest.raises(error, match=message):
            setattr(lstm, name, value)
        with pytest.raises(error, match=message):
            lstm.load_state_dict({**before, "weight_hh_l0": np.zeros((20, 5)), name: value})
    assert_same_state(lstm.state_dict(), before)
    assert lstm.parameters.version == version


def test_a_parameter_cannot_be_deleted(lstm):
    with pytest.raises(TypeError, match="bias_ih_l0: a parameter cannot be deleted"):
        del lstm.parameters["bias_ih_l0"]


def test_a_state_dict_must_fit_by_name_unless_told(lstm):
    before = lstm.state_dict()
    state = other(lstm).state_dict()
    del state["bias_ih_l1"]
    state["weight"] = np.zeros(1)
    with pytest.raises(KeyError, match=r"state_dict: missing \['bias_ih_l1'\], not known \['weight'\]"):
        lstm.load_state_dict(state)
    assert_same_state(lstm.state_dict(), before)
    lstm.load_state_dict(state, strict=False)
    del state["weight"]
    assert_same_state(lstm.state_dict(), {name: state.get(name, before[name]) for name in before})


def test_tensors_of_pytorch_are_taken(lstm):
    torch = pytest.importorskip("torch")
    theirs = torch.nn.LSTM(3, 5, 2, dtype=getattr(torch, lstm.dtype.name))
    lstm.load_state_dict(theirs.state_dict())
    lstm.bias_ih_l0 = theirs.state_dict()["bias_hh_l0"]
    for name, tensor in theirs.state_dict().items():
        source = theirs.state_dict()["bias_hh_l0"] if name == "bias_ih_l0" else tensor
        assert_same_bits(lstm.parameters[name], source.numpy(), name)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, *[lambda m, p=p: pickle.loads(pickle.dumps(m, p)) for p in range(2, 6)]]
)
def test_copies_are_modules_of_their_own(duplicate, lstm, x):
    y, _ = lstm(x)
    twin = duplicate(lstm)
    assert twin.config == lstm.config
    assert_same_bits(twin(x)[0], y)
    assert_read_only(twin)
    twin.bias_ih_l0 = np.ones_like(twin.bias_ih_l0)
    assert not np.array_equal(twin(x)[0], y)
    assert_same_bits(lstm(x)[0], y)
    lstm.bias_hh_l0 = np.ones_like(lstm.bias_ih_l0)
    assert not np.array_equal(twin.bias_hh_l0, lstm.bias_hh_l0)


def test_files(lstm, x, tmp_path):
    path = tmp_path / "model.safetensors"
    lstm.save(path)
    twin = other(lstm)
    assert twin.load(str(path)) is twin
    assert_same_state(twin.state_dict(), lstm.state_dict())
    assert_same_bits(twin(x)[0], lstm(x)[0])
    assert_read_only(twin)
    assert os.listdir(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "both ways"])
@pytest.mark.parametrize("case", [case for case in oracle.CASES if case != "RNN softsign"])
def test_a_file_says_what_it_is_of(case, bidirectional, dtype, tmp_path):
    """Its metadata makes the module anew."""
    layer = oracle.make(case, 3, 6, dtype, num_layers=2, bidirectional=bidirectional, zoneout=0.2)
    layer.save(tmp_path / "layer")
    arrays, metadata = parameters.read_file(tmp_path / "layer")
    assert_same_state({name: arrays[name] for name in layer.parameters}, layer.state_dict())
    config = json.loads(metadata["fastrnn"])
    twin = getattr(fastrnn, config.pop("class"))(**config).load(tmp_path / "layer")
    assert repr(twin) == repr(layer)
    x = oracle.inputs(layer, 4, 2)[0]
    assert_same_bits(twin(x)[0], layer(x)[0])


def test_a_layer_with_a_function_of_ones_own_is_saved(dtype, tmp_path):
    """Its parameters are; a file holds no function."""
    layer, other = (oracle.make("RNN softsign", 3, 6, dtype, seed=seed) for seed in (1, 2))
    layer.save(tmp_path / "layer")
    assert_same_state(other.load(tmp_path / "layer").state_dict(), layer.state_dict())


@pytest.mark.parametrize(
    ("Layer", "options"),
    [
        (
            fastrnn.RNN,
            {"input_size": np.int64(3), "bias": np.True_, "dropout": np.float32(0), "zoneout": np.float32(0.5)},
        ),
        (fastrnn.LSTM, {"proj_size": np.int32(2), "peephole": np.True_, "coupled": np.False_}),
        (fastrnn.LSTM, {"cell_clip": np.float32(0.5), "layer_norm": np.True_, "zoneout": (np.float64(0.5), 0)}),
        (fastrnn.GRU, {"reset_after": np.False_, "num_layers": np.uint8(2), "bidirectional": np.True_}),
    ],
)
def test_numpys_numbers_as_options_are_saved(Layer, options, tmp_path):
    layer = Layer(**{"input_size": 3, "hidden_size": 4, **options})
    layer.save(tmp_path / "layer")
    config = json.loads(parameters.read_file(tmp_path / "layer")[1]["fastrnn"])
    assert config.pop("class") == Layer.__name__
    twin = Layer(**config)
    for name, value in options.items():
        assert np.all(np.equal(twin.config[name], value)), name


def test_pytorch_reads_the_file(lstm, tmp_path):
    torch = pytest.importorskip("torch")
    load_file = pytest.importorskip("safetensors.torch").load_file
    lstm.save(tmp_path / "model")
    tensors = load_file(tmp_path / "model")
    torch.nn.LSTM(3, 5, 2, dtype=getattr(torch, lstm.dtype.name)).load_state_dict(tensors)
    for name, array in lstm.parameters.items():
        assert_same_bits(tensors[name].numpy(), array, name)


def test_a_file_has_the_usual_permissions(lstm, tmp_path):
    """Not those of a temporary file, which only its owner may read."""
    (tmp_path / "usual").touch()
    lstm.save(tmp_path / "model")
    assert (tmp_path / "model").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_file_keeps_its_permissions(lstm, tmp_path):
    path = tmp_path / "model"
    lstm.save(path)
    path.chmod(0o600)
    other(lstm).save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert_same_state(fastrnn.LSTM(3, 5, 2, dtype=lstm.dtype).load(path).state_dict(), other(lstm).state_dict())


def test_a_link_stays_a_link(lstm, tmp_path):
    for target in ("model", "there/is/none/yet"):
        (tmp_path / target).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(target)
        lstm.save(tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert_same_state(
            fastrnn.LSTM(3, 5, 2, dtype=lstm.dtype).load(tmp_path / target).state_dict(), lstm.state_dict()
        )


def test_what_is_no_file_is_written_to(lstm, tmp_path):
    """And not replaced by one."""
    lstm.save(tmp_path / "model")
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()), daemon=True)
    reader.start()
    lstm.save(tmp_path / "pipe")
    reader.join(30)
    assert read == [(tmp_path / "model").read_bytes()]
    assert (tmp_path / "pipe").is_fifo()
    with pytest.raises(IsADirectoryError):
        lstm.save(tmp_path)


@pytest.mark.parametrize("name", ["n" * 255, "漢" * 85])
def test_the_longest_names(name, lstm, tmp_path):
    lstm.save(tmp_path / name)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_forbidden_files(lstm, tmp_path):
    path = tmp_path / "model"
    lstm.save(path)
    path.chmod(0o400)
    with pytest.raises(PermissionError):
        lstm.save(path)
    path.chmod(0)
    with pytest.raises(PermissionError):
        lstm.load(path)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100, -1, -100])
def test_a_truncated_file_is_refused(size, lstm, tmp_path):
    path = tmp_path / "model"
    lstm.save(path)
    before = lstm.state_dict()
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"expected a whole safetensors file, got '.*model'"):
        lstm.load(path)
    assert_same_state(lstm.state_dict(), before)


def test_what_is_no_file_of_the_module_is_refused(lstm, tmp_path):
    before = lstm.state_dict()
    with pytest.raises(FileNotFoundError, match="none"):
        lstm.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=tmp_path.name):
        lstm.load(tmp_path)
    (tmp_path / "text").write_text("A file of something else, longer than a header's length.")
    with pytest.raises(ValueError, match="expected a whole safetensors file"):
        lstm.load(tmp_path / "text")
    save_file({"weight": np.zeros(3)}, tmp_path / "another")
    with pytest.raises(KeyError, match=r"not known \['weight'\]"):
        lstm.load(tmp_path / "another")
    fastrnn.LSTM(3, 6, 2, dtype=lstm.dtype).save(tmp_path / "larger")
    with pytest.raises(ValueError, match="weight_ih_l0: expected shape"):
        lstm.load(tmp_path / "larger")
    assert_same_state(lstm.state_dict(), before)


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_a_failing_write_leaves_the_old_file(failing, lstm, tmp_path, monkeypatch):
    path = tmp_path / "model"
    lstm.save(path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(parameters.os, failing, fail)
        with pytest.raises(OSError, match="disk full"):
            other(lstm).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model"]
    other(lstm).save(path)
    assert path.read_bytes() != before


def test_a_missing_folder_is_an_error(lstm, tmp_path):
    with pytest.raises(FileNotFoundError):
        lstm.save(tmp_path / "none" / "model")


def test_derived_is_made_once_per_version():
    p = Parameters({"a": np.zeros(2)})
    made = []

    def make():
        made.append(p.version)
        return len(made)

    assert [p.derived("k", make), p.derived("k", make), p.derived("other", make)] == [1, 1, 2]
    p["a"] = np.ones(2)
    assert [p.derived("k", make), p.derived("k", make)] == [3, 3]
    with p.writable():
        pass
    assert p.derived("k", make) == 4


def test_joined_parameters(x):
    """The parameters of modules in modules, under dotted names."""

    class Pair(parameters.Module):
        def __init__(self):
            self.config = {}
            self.inner = fastrnn.LSTM(3, 5, seed=0)
            self.parameters = JoinedParameters({"inner": self.inner, "last": fastrnn.LSTM(5, 2, seed=1)})

    pair = Pair()
    assert list(pair.parameters)[:2] == ["inner.weight_ih_l0", "inner.weight_hh_l0"]
    assert len(pair.parameters) == len(list(pair.parameters)) == 8
    version = pair.parameters.version
    pair.parameters["inner.bias_ih_l0"] = np.ones(20)
    assert pair.inner.bias_ih_l0.tolist() == [1] * 20
    assert pair.parameters.version > version
    with pair.parameters.writable() as arrays:
        arrays["last.bias_ih_l0"][:] = 3
    assert pair.state_dict()["last.bias_ih_l0"].tolist() == [3] * 8
    for name in ("inner.bias", "none.bias", "inner", ""):
        with pytest.raises(KeyError):
            pair.parameters[name]
        with pytest.raises(KeyError, match="no such parameter"):
            pair.parameters[name] = np.ones(1)
    with pytest.raises(ValueError, match="read-only"):
        pair.parameters["last.bias_ih_l0"][:] = 0
    twin = copy.deepcopy(pair)
    twin.parameters["inner.bias_ih_l0"] = np.zeros(20)
    assert twin.inner.bias_ih_l0.tolist() == [0] * 20
    assert pair.inner.bias_ih_l0.tolist() == [1] * 20


def test_a_call_while_parameters_are_written_sees_each_write():
    layer, x = fastrnn.LSTM(3, 4, seed=0), np.ones((2, 1, 3), np.float32)
    with layer.parameters.writable() as arrays:
        before = layer(x)[0]
        arrays["weight_ih_l0"][:] += 1
        between = layer(x)[0]
    assert not np.array_equal(before, between)
    np.testing.assert_array_equal(layer(x)[0], between)


def test_threads_train_on_one_layer_at_once():
    """Each finds the arrays writable until its own block ends, however the others' begin and end."""
    lstm, x, errors = fastrnn.LSTM(3, 4, seed=0), np.ones((2, 2, 3), np.float32), []

    def train():
        try:
            optimizer = fastrnn.optim.SGD(lstm.parameters, lr=1e-4)
            for _ in range(100):
                (y, _), pullback = lstm.vjp(x)
                optimizer.step(pullback(y)[2])
        except Exception as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=train) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert errors == []
    assert not lstm.parameters.writing
    assert_read_only(lstm)


def test_blocks_in_blocks_and_assignments_in_them():
    linear = fastrnn.Linear(2, 3, seed=0)
    with linear.parameters.writable() as outer:
        with linear.parameters.writable() as inner:
            inner["bias"][:] = 1
        outer["bias"][0] = 2
        linear.weight = np.ones((3, 2))
        outer["weight"][0] = 3
        version = linear.parameters.version
    assert linear.parameters.version != version
    assert linear.bias.tolist() == [2, 1, 1]
    assert linear.weight.tolist() == [[3, 3], [1, 1], [1, 1]]
    assert linear(np.ones((1, 2), np.float32)).tolist() == [[8, 3, 3]]
    for arrays in (inner, outer):
        with pytest.raises(ValueError, match="read-only"):
            arrays["bias"][0] = 0
    assert_read_only(linear)
