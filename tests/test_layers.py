"""The layers against the oracle and finite differences; what they promise about bits, memory, masks and NaN."""

import gc
import threading

import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba.core.dispatcher import Dispatcher
from oracle import (
    BASIC,
    CASES,
    assert_all_close,
    assert_all_same_bits,
    assert_close,
    assert_same_bits,
    each,
    everything,
    expected,
    inputs,
    lengths_for,
    make,
    named,
    pulled,
)

import fastrnn
from fastrnn import batching, layer_norm, layers, memory, packing, passes, recurrent
from fastrnn import masks as random_masks

SIZES = [1, 3, 17, 63, 65]
both_ways = pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "both ways"])


def masks_of(layer, seed, T, B):
    """What `vjp` draws with a generator of this seed, as the oracle takes it."""
    return layers.masks(layer, T, B, np.random.default_rng(seed))


def check_against_oracle(layer, x, state, dy, dstate, lengths=None):
    got = everything(layer, x, state, dy, dstate, lengths=lengths)
    wanted = expected(layer, x, state, dy, dstate, lengths)
    assert_all_close(layer, got, wanted)
    for name in ("y", *named(state, "_n")):
        assert_same_bits(got[name], got[f"{name} of vjp"], name)
    assert got.keys() - {name for name in got if name.endswith("of vjp")} == wanted.keys()
    assert {array.dtype for array in got.values()} == {layer.dtype}
    if lengths is None and not layer.bidirectional:
        assert_same_bits(got["h_n"][-1], got["y"][-1])


def tall_samples():
    """Every size in every place, and every pair of places with both large and both small."""
    places = [tuple(SIZES[(i + j * k) % 5] for j in range(4)) for k in range(1, 5) for i in range(5)]
    return places + [(1, 1, 1, 1), (65, 1, 1, 65), (1, 65, 65, 1), (65, 65, 3, 17)]


# Values and gradients.


@pytest.mark.parametrize(("T", "B", "I", "H"), tall_samples())
@pytest.mark.parametrize("case", [*BASIC, "LSTM proj", "GRU reset before"])
def test_oracle(case, T, B, I, H, dtype):
    if "proj" in case and H == 1:
        return
    layer = make(case, I, H, dtype)
    check_against_oracle(layer, *inputs(layer, T, B))


@pytest.mark.parametrize("sizes", [(1, 1, 1, 2), (3, 17, 5, 7), (2, 1, 17, 65), (9, 3, 65, 9), (4, 30, 3, 16)], ids=str)
@both_ways
@pytest.mark.parametrize("case", CASES)
def test_oracle_of_every_option(case, bidirectional, sizes, dtype):
    T, B, I, H = sizes
    layer = make(case, I, H, dtype, bidirectional=bidirectional)
    check_against_oracle(layer, *inputs(layer, T, B))
    check_against_oracle(layer, *inputs(layer, T, B), lengths_for(T, B))


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@both_ways
@pytest.mark.parametrize("case", CASES)
def test_oracle_of_a_stack(case, bidirectional, bias, num_layers, dtype):
    layer = make(case, 7, 18, dtype, num_layers=num_layers, bias=bias, bidirectional=bidirectional)
    assert sum(name.startswith(("bias_ih", "bias_hh")) for name in layer.parameters) == 2 * bias * num_layers * (
        1 + bidirectional
    )
    check_against_oracle(layer, *inputs(layer, 6, 5))


@given(data=st.data())
@pytest.mark.parametrize("cell", BASIC)
def test_oracle_of_anything(cell, data):
    """Any shape, options, lengths and number of threads."""
    T, B, I, H = data.draw(st.tuples(st.integers(1, 30), st.integers(1, 20), st.integers(1, 70), st.integers(2, 70)))
    case = data.draw(st.sampled_from([name for name in CASES if name.split()[0] == cell]))
    options = {name: data.draw(st.booleans(), name) for name in ("bias", "bidirectional")}
    num_layers, dtype = data.draw(st.integers(1, 3)), np.dtype(data.draw(st.sampled_from(["float32", "float64"])))
    batching.set_num_threads(data.draw(st.integers(1, 3)))
    layer = make(case, I, H, dtype, num_layers=num_layers, **options)
    lengths = data.draw(st.none() | st.lists(st.integers(0, T), min_size=B, max_size=B))
    check_against_oracle(layer, *inputs(layer, T, B), lengths)


@pytest.mark.parametrize("scale", [1e-3, 30])
@pytest.mark.parametrize("case", CASES)
def test_oracle_of_tiny_and_saturated_gates(case, scale, dtype):
    layer = make(case, 5, 9, dtype)
    x, state, dy, dstate = inputs(layer, 5, 4)
    check_against_oracle(layer, (scale * x).astype(dtype), state, dy, dstate)


@both_ways
@pytest.mark.parametrize("case", BASIC)
def test_parts_left_out_stand_for_zeros(case, bidirectional, dtype):
    layer = make(case, 4, 20, dtype, num_layers=2, bidirectional=bidirectional)
    x, state, dy, dstate = inputs(layer, 7, 3)
    zeros = each(state, np.zeros_like)
    assert_same_bits(layer(x)[0], layer(x, zeros)[0])
    _, pullback = layer.vjp(x)
    for left_out, full in [
        ((dy,), (dy, zeros)),
        ((dy, None), (dy, zeros)),
        ((None, dstate), (np.zeros_like(dy), dstate)),
    ]:
        actual = pulled(pullback(*left_out))
        assert_all_same_bits(actual, pulled(pullback(*full)))
        assert all(np.abs(array).max() > 0 for array in actual.values())


@both_ways
@pytest.mark.parametrize("case", [*BASIC, "LSTM proj"])
def test_batch_first_and_one_sequence(case, bidirectional, dtype):
    """Other layouts of the same numbers: the same bits."""
    options = {"num_layers": 2, "bidirectional": bidirectional}
    layer, first = (make(case, 4, 20, dtype, batch_first=batch_first, **options) for batch_first in (False, True))
    x, state, dy, dstate = inputs(layer, 7, 3)
    for lengths in (None, [7, 0, 4]):
        wanted = everything(layer, x, state, dy, dstate, lengths=lengths)
        got = everything(first, x.swapaxes(0, 1), state, dy.swapaxes(0, 1), dstate, lengths=lengths)
        for name in ("y", "y of vjp", "dx"):
            got[name] = got[name].swapaxes(0, 1)
        assert_all_same_bits(got, wanted)

    def rows(state, which):
        return each(state, lambda s: s[:, which])

    one = everything(layer, x[:, :1], rows(state, slice(1)), dy[:, :1], rows(dstate, slice(1)))
    for one_sequence in (layer, first):
        got = everything(one_sequence, x[:, 0], rows(state, 0), dy[:, 0], rows(dstate, 0))
        assert got["y"].shape == dy[:, 0].shape
        assert got["h_n"].shape == got["dh_0"].shape == one["h_n"][:, 0].shape
        assert_all_same_bits(got, {name: a if name in layer.parameters else a[:, 0] for name, a in one.items()})


RANDOM = {"dropout": 0.5, "recurrent_dropout": 0.4, "zoneout": 0.3}


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, **RANDOM}], ids=["one layer", "a stack with masks"])
@both_ways
@pytest.mark.parametrize("case", CASES)
def test_finite_differences(case, bidirectional, options):
    """The gradients along random directions of each argument, by differences of fourth order, all masks fixed."""
    layer = make(case, 3, 5, np.float64, bidirectional=bidirectional, **options)
    x, state, dy, dstate = inputs(layer, 6, 4)
    lengths = [4, 6, 0, 5]
    _, pullback = layer.vjp(x, state, np.random.default_rng(8), lengths)
    gradients = {name.removeprefix("d"): array for name, array in pulled(pullback(dy, dstate)).items()}
    at = {"x": x, **named(state, "_0"), **layer.state_dict()}

    def loss(name, shift):
        moved = {**at, name: at[name] + shift}
        layer.load_state_dict({n: moved[n] for n in layer.parameters})
        before = oracle.as_state(layer, [moved[n] for n in named(state, "_0")])
        (y, after), _ = layer.vjp(moved["x"], before, np.random.default_rng(8), lengths)
        d_after = named(dstate, "_n")
        return (y * dy).sum() + sum((s * d_after[n]).sum() for n, s in named(after, "_n").items())

    # Where there are kinks, so small a step that it crosses none.
    rng, step = np.random.default_rng(9), 1e-5 if "relu" in case or "clip" in case else 3e-5
    assert gradients.keys() == at.keys()
    for name, gradient in gradients.items():
        along = rng.standard_normal(gradient.shape)
        near, far = (loss(name, k * step * along) - loss(name, -k * step * along) for k in (1, 2))
        measured = (8 * near - far) / (12 * step)
        assert abs(measured - (gradient * along).sum()) < 1e-8 * (1 + np.abs(gradient * along).sum()), name


# Dropout and zoneout.


def test_dropout_drops_as_often_as_asked_and_keeps_the_mean(rng, dtype):
    x = np.ones((200, 50, 10), dtype)
    dropped, pullback = layers.drop(x, 0.3, rng)
    kept = dropped != 0
    assert set(np.unique(dropped)) == {0, dtype.type(1 / 0.7)}
    # Five standard deviations of a hundred thousand draws.
    assert abs(kept.mean() - 0.7) < 5 * np.sqrt(0.3 * 0.7 / x.size)
    assert dropped.dtype == dtype
    assert_same_bits(pullback(x), dropped)


@both_ways
@pytest.mark.parametrize("case", ["RNN", "LSTM", "LSTM proj", "GRU"])
def test_masks(case, bidirectional, dtype):
    """As often as asked, of the shapes that they should have, and no two alike."""
    options = {"dropout": 0.3, "recurrent_dropout": 0.4, "zoneout": (0.1, 0.6) if "LSTM" in case else 0.1}
    layer = make(case, 3, 30, dtype, num_layers=3, bidirectional=bidirectional, **options)
    T, B, D, P = 20, 300, 1 + bidirectional, 10 if "proj" in case else 30
    masks = masks_of(layer, 0, T, B)
    places = list(np.ndindex(3, D))
    shapes = {("dropout", k): (T, B, D * P) for k in (1, 2)}
    shapes |= {("recurrent", *place): (B, P) for place in places}
    shapes |= {("zoneout_h", *place): (T, B, P) for place in places}
    if "LSTM" in case:
        shapes |= {("zoneout_c", *place): (T, B, 30) for place in places}
    assert {name: mask.shape for name, mask in masks.items()} == shapes
    for (kind, *_), mask in masks.items():
        chance, value = {
            "dropout": (0.7, 1 / 0.7),
            "recurrent": (0.6, 1 / 0.6),
            "zoneout_h": (0.1, 1),
            "zoneout_c": (0.6, 1),
        }[kind]
        assert set(np.unique(mask).astype(dtype)) == {0, dtype.type(value)}
        assert abs((mask != 0).mean() - chance) < 5 * np.sqrt(chance * (1 - chance) / mask.size)
    alike = [a.astype(bool).tobytes() for a in masks.values()]
    assert len(set(alike)) == len(alike)


@pytest.mark.parametrize(
    "options",
    [*({name: p} for name, p in RANDOM.items()), {"zoneout": (0.0, 0.4)}, {"zoneout": (0.4, 0.0)}, RANDOM],
    ids=str,
)
@both_ways
@pytest.mark.parametrize("case", CASES)
def test_masked_is_the_oracles_with_the_same_masks(case, bidirectional, options, dtype):
    if isinstance(options.get("zoneout"), tuple) and "LSTM" not in case:
        return
    layer = make(case, 4, 18, dtype, num_layers=2, bidirectional=bidirectional, **options)
    x, state, dy, dstate = inputs(layer, 6, 5)
    for lengths in (None, [3, 6, 0, 1, 6]):
        (y, after), pullback = layer.vjp(x, state, np.random.default_rng(11), lengths)
        got = {"y": y, **named(after, "_n"), **pulled(pullback(dy, dstate))}
        wanted = expected(layer, x, state, dy, dstate, lengths, masks_of(layer, 11, 6, 5))
        assert got.keys() == wanted.keys()
        assert_all_close(layer, got, wanted)


@pytest.mark.parametrize("option", RANDOM)
@pytest.mark.parametrize("case", BASIC)
def test_masks_are_seeded_and_off_in_calls(case, option):
    def layer_with(**options):
        return make(case, 4, 9, num_layers=2, seed=12, **options)

    layer, x = layer_with(**{option: 0.5}), np.ones((5, 3, 4), np.float32)
    ys = [layer.vjp(x)[0][0] for _ in range(2)]
    again = layer_with(**{option: 0.5})
    for y in ys:
        assert_same_bits(again.vjp(x)[0][0], y)
    assert not np.array_equal(*ys)
    assert_same_bits(*(layer.vjp(x, rng=np.random.default_rng(1))[0][0] for _ in range(2)))
    # In calls zoneout is what it is on average.
    plain = layer_with()
    if option == "zoneout":
        zeros = each(plain(x)[1], np.zeros_like)
        assert_close(layer(x)[0], oracle.forward(layer, x, zeros)[0])
        assert not np.array_equal(layer(x)[0], plain(x)[0])
    else:
        assert_same_bits(layer(x)[0], plain(x)[0])
        assert_same_bits(layer(x)[0], plain.vjp(x)[0][0])


@pytest.mark.parametrize("case", BASIC)
def test_zoneout_of_one_step_is_its_expectation_on_average(case):
    layer = make(case, 4, 9, np.float64, zoneout=0.3)
    x, state, _, _ = inputs(layer, 1, 1)
    many = [np.repeat(a, 20000, axis=1) for a in (x, *named(state, "").values())]
    y, _ = layer.vjp(many[0], oracle.as_state(layer, many[1:]), np.random.default_rng(0))[0]
    np.testing.assert_allclose(y.mean(1), layer(x, state)[0][:, 0], atol=5 * y.std(1).max() / np.sqrt(20000))


def test_dropout_of_one_layer_warns():
    for case in BASIC:
        with pytest.warns(UserWarning, match="num_layers=1"):
            getattr(fastrnn, case)(2, 2, dropout=0.5)


@pytest.mark.parametrize("case", BASIC)
def test_seed(case):
    layer = getattr(fastrnn, case)
    a, b, c = (layer(3, 4, seed=seed).state_dict() for seed in (1, 1, 2))
    assert_all_same_bits(a, b)
    assert not np.array_equal(a["weight_hh_l0"], c["weight_hh_l0"])
    assert max(np.abs(array).max() for array in a.values()) <= 0.5
    assert not np.array_equal(layer(3, 4).weight_hh_l0, layer(3, 4).weight_hh_l0)


# Bits.


@pytest.mark.parametrize("sizes", [(5, 9, 3, 40), (4, 2, 3, 150)], ids=["batch cut", "units cut"])
@both_ways
@pytest.mark.parametrize("case", CASES)
def test_threads_do_not_change_a_bit(case, bidirectional, sizes, dtype, small_shares):
    T, B, I, H = sizes
    layer = make(case, I, H, dtype, bidirectional=bidirectional)
    for lengths in (None, lengths_for(T, B)):
        results = []
        for threads in (1, 2, 3):
            batching.set_num_threads(threads)
            results.append(everything(layer, *inputs(layer, T, B), lengths=lengths))
        for other in results[1:]:
            assert_all_same_bits(other, results[0])


@pytest.mark.parametrize("case", CASES)
def test_chunks_do_not_change_a_bit(case, dtype, monkeypatch):
    """However many rows' input projections, and gates' gradients, are computed at once."""
    T, B = 11, 9
    layer = make(case, 3, 40, dtype)
    for lengths in (None, lengths_for(T, B)):
        results = []
        for forward, backward in (1, 1), (48, 30), (192, 512):
            monkeypatch.setattr(passes, "ROWS_FORWARD", forward)
            monkeypatch.setattr(passes, "ROWS_BACKWARD", backward)
            results.append(everything(layer, *inputs(layer, T, B), lengths=lengths))
        for other in results[1:]:
            assert_all_same_bits(other, results[0])


@pytest.mark.parametrize("cut", [1, 4, 9])
@pytest.mark.parametrize("case", CASES)
def test_the_state_carries_a_sequence_on(case, cut, dtype):
    layer = make(case, 5, 33, dtype, num_layers=2, zoneout=0.2)
    x, state, _, _ = inputs(layer, 10, 7)
    y, after = layer(x, state)
    y_1, middle = layer(x[:cut], state)
    y_2, after_2 = layer(x[cut:], middle)
    assert_same_bits(np.concatenate([y_1, y_2]), y)
    assert_all_same_bits(named(after_2, "_n"), named(after, "_n"))


def rows_of(given, rows):
    x, state, dy, dstate = given
    return x[:, rows], each(state, lambda s: s[:, rows]), dy[:, rows], each(dstate, lambda s: s[:, rows])


@pytest.mark.parametrize("H", [9, 70, 260])
@both_ways
@pytest.mark.parametrize("case", CASES)
def test_a_sequence_alone_and_in_a_batch(case, bidirectional, H, dtype):
    if H == 260 and case not in BASIC:
        return
    layer = make(case, 5, H, dtype, num_layers=2, bidirectional=bidirectional)
    given = inputs(layer, 6, 26)
    batch = everything(layer, *given)
    for b, count in [(0, 1), (11, 1), (20, 6)]:
        rows = slice(b, b + count)
        alone = everything(layer, *rows_of(given, rows))
        for name in alone.keys() - layer.parameters.keys():
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
        new.fill(255 if new.dtype == np.uint8 else np.nan)  # bytes of ones are NaN, too
        return new


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("sizes", [(7, 9, 5, 21), (12, 40, 3, 8), (3, 2, 70, 200)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_uninitialised_memory_is_never_read(case, sizes, threads, dtype, monkeypatch, small_shares):
    T, B, I, H = sizes
    layer = make(case, I, H, dtype, num_layers=2, bidirectional=True)
    options = [{}, {"lengths": lengths_for(T, B)}, {"checkpoint": 2}]
    wanted = [everything(layer, *inputs(layer, T, B), **o) for o in options]
    for module in (layer_norm, memory, packing, passes, random_masks, recurrent):
        monkeypatch.setattr(module, "np", PoisonedNumpy())
    assert all(np.isnan(memory.empty(n, dtype)).all() for n in (3, 5000))
    layer.load_state_dict(layer.state_dict())  # the packed weights, too, are made anew
    batching.set_num_threads(threads)
    for _ in range(2):
        for o, results in zip(options, wanted):
            assert_all_same_bits(everything(layer, *inputs(layer, T, B), **o), results)


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


def compilations():
    """How many functions Numba has compiled, or loaded, for a signature."""
    return sum(len(d.overloads) for d in gc.get_objects() if issubclass(type(d), Dispatcher))


@pytest.mark.parametrize(
    "awkward",
    [np.asfortranarray, strided, reversed_in_memory, read_only, misaligned, lambda a: a.view(Subclass)],
    ids=["fortran", "strided", "reversed", "read-only", "misaligned", "subclass"],
)
@pytest.mark.parametrize("case", CASES)
def test_any_array_will_do(case, awkward, dtype):
    """The same bits; the user's arrays stay as they were; and Numba compiles nothing anew for them."""
    layer, other = (make(case, 5, 11, dtype, seed, num_layers=2, bidirectional=True) for seed in (1, 2))
    x, state, dy, dstate = inputs(layer, 6, 3)
    lengths = np.array([6, 3, 4])
    wanted = everything(layer, x, state, dy, dstate, lengths=lengths)
    compiled = compilations()
    given = awkward(x), each(state, awkward), awkward(dy), each(dstate, awkward)
    arrays = [given[0], *named(given[1], "").values(), given[2], *named(given[3], "").values()]
    before = [a.tobytes() for a in arrays]
    other.load_state_dict({name: awkward(array) for name, array in layer.parameters.items()})
    assert_all_same_bits(everything(other, *given, lengths=awkward(lengths)), wanted)
    assert [a.tobytes() for a in arrays] == before
    assert compilations() == compiled


@pytest.mark.parametrize("case", CASES)
def test_kernels_are_compiled_once_per_dtype(case):
    """Whatever the shape, the layout, the layer's general options."""

    def run(dtype, x_shapes, **options):
        layer = make(case, 1, 2, dtype, **options)
        for shape in x_shapes:
            (y, state), pullback = layer.vjp(np.ones(shape, dtype))
            pullback(y, state)
            layer(np.ones(shape, dtype), state)

    for dtype in (np.float32, np.float64):
        run(dtype, [(1, 1, 1), (2, 3, 1)])
        run(dtype, [(2, 3, 1)], num_layers=2, **RANDOM)  # masks are of a type of their own
    compiled = compilations()
    for dtype in (np.float32, np.float64):
        for options in ({}, {"bias": False}, {"batch_first": True}, {"num_layers": 2}, {"bidirectional": True}):
            run(dtype, [(1, 1, 1), (2, 3, 1), (4, 1), (3, 1, 1), (1, 50, 1)], **options)
        layer = make(case, 1, 2, dtype, **{"num_layers": 2, **RANDOM})
        x, state, dy, dstate = inputs(layer, 4, 3)
        everything(layer, x, state, dy, dstate, lengths=[2, 0, 4])
        everything(layer, x, state, dy, dstate, checkpoint=2)
    assert compilations() == compiled


@pytest.mark.parametrize("options", [{}, {"lengths": [6, 0, 2]}, {"checkpoint": 2}], ids=str)
@pytest.mark.parametrize("case", [*BASIC, "LSTM proj"])
def test_results_are_not_views_of_each_other_or_of_the_inputs(case, options, dtype):
    """Writing to one result leaves the others, and the next call, as they are."""
    layer = make(case, 5, 11, dtype, num_layers=2, bidirectional=True)
    x, state, dy, dstate = given = inputs(layer, 6, 3)
    wanted = everything(layer, *given, **options)
    results = everything(layer, *given, **options)
    arrays = [*results.values(), x, *named(state, "").values(), dy, *named(dstate, "").values()]
    for i, a in enumerate(arrays):
        assert not any(np.shares_memory(a, b) for b in arrays[:i])
    for a in results.values():
        a[...] = np.nan
    assert_all_same_bits(everything(layer, *given, **options), wanted)


# The pullback.


@pytest.mark.parametrize("checkpoint", [None, 4])
@pytest.mark.parametrize("random", [{}, RANDOM], ids=["plain", "masked"])
@pytest.mark.parametrize("case", CASES)
def test_a_pullback_owes_nothing_to_what_comes_after(case, random, checkpoint, dtype):
    """Not to earlier pullbacks, parameters, the layer's next calls, nor what the user does to the arrays."""
    layer = make(case, 5, 11, dtype, num_layers=2, bidirectional=True, **random)
    x, state, dy, dstate = inputs(layer, 6, 3)
    lengths = np.array([6, 2, 5])
    (y, after), pullback = layer.vjp(x, state, lengths=lengths, checkpoint=checkpoint)
    wanted = pulled(pullback(dy, dstate))
    first = pulled(pullback(dy, dstate))
    assert_all_same_bits(first, wanted)
    for array in (*first.values(), x, *named(state, "").values(), y, *named(after, "").values()):
        array[...] = np.nan
    with layer.parameters.writable() as arrays:
        for array in arrays.values():
            array[...] = np.nan
    lengths[:] = 1
    layer.vjp(x, state)[1](dy, dstate)
    assert_all_same_bits(pulled(pullback(dy, dstate)), wanted)


@pytest.mark.parametrize("checkpoint", [None, 4])
@pytest.mark.parametrize("case", BASIC)
def test_a_pullback_in_another_thread(case, checkpoint, dtype):
    layer = make(case, 5, 11, dtype)
    x, state, dy, dstate = inputs(layer, 6, 3)
    _, pullback = layer.vjp(x, state, checkpoint=checkpoint)
    results = []
    threads = [threading.Thread(target=lambda: results.append(pullback(dy, dstate))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        assert_all_same_bits(pulled(result), pulled(pullback(dy, dstate)))
    assert len(results) == 4


# NaN and infinity.


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("H", [5, 40])
@pytest.mark.parametrize("case", CASES)
def test_what_is_not_finite_stays_in_its_sequence(case, bad, H, dtype):
    layer = make(case, 4, H, dtype, num_layers=2)
    x, state, dy, dstate = inputs(layer, 6, 9)
    clean = everything(layer, x, state, dy, dstate)
    x = x.copy()
    x[2, 4, 1] = bad
    got = everything(layer, x, state, dy, dstate)
    y, after, _ = oracle.forward(layer, x, state)
    tolerance = (20 if "norm" in case else 1) * oracle.TOLERANCE[dtype]
    for name, array in {"y": y, **named(after, "_n")}.items():
        np.testing.assert_allclose(got[name], array, rtol=tolerance, atol=tolerance, err_msg=name)
    assert_same_bits(got["y"][:2], clean["y"][:2])
    others = np.arange(9) != 4
    for name in got.keys() - layer.parameters.keys():
        assert_same_bits(got[name][:, others], clean[name][:, others], name)
    if np.isnan(bad):
        assert np.isnan(got["y"][2:, 4]).all()
    if np.isnan(bad) and case in BASIC:
        assert np.isnan(got["dx"][:, 4]).all()
        assert all(np.isnan(got[name]).any() for name in layer.parameters)


# The class.


@pytest.mark.parametrize("case", CASES)
def test_a_config_makes_the_same_layer(case):
    layer = make(case, 3, 6, "float64", num_layers=2, bidirectional=True, bias=False, batch_first=True, **RANDOM)
    assert repr(layer).startswith(f"{case.split()[0]}(input_size=3, hidden_size=6, num_layers=2")
    assert CASES[case].items() <= layer.config.items()
    assert RANDOM.items() <= layer.config.items()
    same = type(layer)(**layer.config)
    assert same.config == layer.config
    assert {n: (a.shape, a.dtype) for n, a in same.parameters.items()} == {
        n: (a.shape, a.dtype) for n, a in layer.parameters.items()
    }


def test_attributes():
    lstm = fastrnn.LSTM(3, 4, num_layers=2, bias=False, bidirectional=True, seed=0)
    assert list(lstm.parameters) == [
        f"weight_{name}_l{k}{way}" for k in (0, 1) for way in ("", "_reverse") for name in ("ih", "hh")
    ]
    assert lstm.weight_ih_l1.shape == (16, 8)
    with pytest.raises(AttributeError, match="LSTM has no attribute 'bias_ih_l0'"):
        lstm.bias_ih_l0  # noqa: B018


@pytest.mark.parametrize(
    ("case", "rows", "shapes"),
    [
        ("LSTM proj", 24, {"weight_hr_l0": (2, 6)}),
        ("LSTM peephole", 24, {"weight_ci_l0": (6,), "weight_cf_l0": (6,), "weight_co_l0": (6,)}),
        ("LSTM coupled", 18, {}),
        (
            "LSTM peephole clip coupled proj",
            18,
            {"weight_hr_l0": (2, 6), "weight_cf_l0": (6,), "weight_co_l0": (6,)},
        ),
        (
            "LSTM norm",
            24,
            {"weight_ln_ih_l0": (24,), "weight_ln_hh_l0": (24,), "weight_ln_c_l0": (6,), "bias_ln_c_l0": (6,)},
        ),
        ("GRU norm", 18, {"weight_ln_ih_l0": (18,), "weight_ln_hh_l0": (18,)}),
        ("RNN", 6, {}),
        ("GRU", 18, {}),
    ],
)
def test_parameters(case, rows, shapes):
    P = 2 if "proj" in case else 6
    common = {"weight_ih_l0": (rows, 3), "weight_hh_l0": (rows, P), "bias_ih_l0": (rows,), "bias_hh_l0": (rows,)}
    layer = make(case, 3, 6)
    assert {name: array.shape for name, array in layer.parameters.items()} == common | shapes


def test_a_state_may_change_before_the_pullback():
    """Also where the pullback runs forward again."""
    gru, x, state = fastrnn.GRU(3, 4, seed=0), np.ones((6, 2, 3), np.float32), np.ones((1, 2, 4), np.float32)
    for checkpoint in (None, 2):
        (y, _), pullback = gru.vjp(x, state.copy(), checkpoint=checkpoint)
        wanted = pullback(y)[2]
        given = state.copy()
        (y, _), pullback = gru.vjp(x, given, checkpoint=checkpoint)
        given[...] = 50
        for name, array in pullback(y)[2].items():
            assert_same_bits(array, wanted[name], name)


@pytest.mark.parametrize("options", [{}, {"layer_norm": True}, {"bidirectional": True}], ids=str)
def test_nothing_but_empty_sequences_in_stretches(options):
    gru, state = (
        fastrnn.GRU(3, 4, seed=0, **options),
        np.ones((2 if "bidirectional" in options else 1, 2, 4), np.float32),
    )
    (_, after), pullback = gru.vjp(np.ones((6, 2, 3), np.float32), state, lengths=[0, 0], checkpoint=2)
    assert_same_bits(after, state)
    dx, d_before, grads = pullback(None, 3 * state)
    assert not dx.any()
    assert_same_bits(d_before, 3 * state)
    assert list(grads) == list(gru.parameters)
    assert not any(array.any() for array in grads.values())


def test_a_read_only_gradient_in_stretches_compiles_nothing():
    rnn = fastrnn.RNN(2, 3, seed=0)
    (y, _), pullback = rnn.vjp(np.ones((4, 2, 2), np.float32), checkpoint=2)
    pullback(y)
    before, y.flags.writeable = len(rnn.kernels.backward.signatures), False
    pullback(y)
    assert len(rnn.kernels.backward.signatures) == before
