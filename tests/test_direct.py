"""Steps with weights as they lie, and whether memory has changed."""

import numpy as np
import pytest
from fastrnn.kernels import contents, direct
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_close, forward, inputs, make

from fastrnn import batching

STEPS = {"RNN": direct.rnn_step, "RNN relu": direct.rnn_step, "LSTM": direct.lstm_step, "GRU": direct.gru_step}
sizes = st.sampled_from([1, 3, 7, 8, 9, 15, 16, 17, 63, 64, 65])


def guarded(array, missing=7):
    """A copy between NaNs, and the whole: what is read past an array's end is seen."""
    whole = np.full(array.size + 2 * missing, np.nan, array.dtype)
    inside = whole[missing:-missing].reshape(array.shape)
    inside[...] = array
    return inside, whole


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("case", STEPS)
@pytest.mark.parametrize("bias", [True, False])
@given(I=sizes, H=sizes, B=st.integers(1, 4), threads=st.integers(1, 2))
def test_a_step_with_weights_where_they_lie(case, dtype, bias, I, H, B, threads):
    layer = make(case, I, H, dtype, bias=bias)
    x, state, _, _ = inputs(layer, 1, B)
    _, after, _ = forward(layer, x, state)
    states, expected = [s if isinstance(s, tuple) else (s,) for s in (state, after)]
    kept = [guarded(array) for array in (x[0], *[s[0] for s in states], *layer.parameters.values())]
    results = [guarded(np.full((B, H), np.nan, dtype)) for _ in states]
    places = [array.ctypes.data for array, _ in kept]
    given_states, weights = places[1 : 1 + len(states)], places[1 + len(states) :]
    outs = [array.ctypes.data for array, _ in results]

    def call(me, parties, barrier):
        sums = np.full(B * layer.cell.slots * 16, np.nan, dtype)
        STEPS[case](
            layer.records, sums, B, I, bias, places[0], given_states[0], given_states[-1], weights[0], weights[1],
            weights[-2], weights[-1], outs[0], outs[-1], me, parties, barrier,
        )  # fmt: skip

    batching.set_num_threads(threads)
    batching.together(threads, call)
    for (array, whole), s in zip(results, expected):
        assert_close(array, s[0])
        assert np.isnan(whole[:7]).all()
        assert np.isnan(whole[-7:]).all()


def sums_of(*arrays):
    places = np.array([(array.ctypes.data, array.nbytes // 4) for array in arrays])
    sums = np.zeros(contents.LANES, np.uint32)
    contents.add(places, sums)
    return sums.tobytes()


@given(n=st.integers(1, 1200), place=st.integers(0, 1199), bit=st.integers(0, 63))
def test_any_changed_bit_is_seen(n, place, bit):
    arrays = [np.random.default_rng(n).standard_normal(k) for k in (n, 3)]
    before = sums_of(*arrays)
    assert sums_of(*[array.copy() for array in arrays]) == before
    words = arrays[place % 2].view(np.uint64)
    words[place % len(words)] ^= np.uint64(1 << bit)
    assert sums_of(*arrays) != before


@pytest.mark.parametrize("shape", [(4, 4), (32, 32), (512, 64), (300, 512), (1024, 256)])
def test_changes_of_all_signs_and_exponents_are_seen(shape):
    """They change the highest bits of a word, which products and sums of words carry nowhere."""
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    changes = [array, -array, array * 2, array * 0.5, array * 0, array * 0 + 1, array * 0 - 1]
    changes += [np.where(np.arange(array.size).reshape(shape) < n, -array, array) for n in (1, 2, 512)]
    assert len({sums_of(np.ascontiguousarray(each)) for each in changes}) == len({each.tobytes() for each in changes})


def test_numbers_that_change_places_are_seen():
    array = np.arange(600, dtype=np.float32)
    assert sums_of(array) != sums_of(array[::-1].copy())
    assert sums_of(array) != sums_of(np.roll(array, contents.LANES))
