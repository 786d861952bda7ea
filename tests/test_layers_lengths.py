"""Sequences of several lengths in a batch, and checkpoints: the same bits as without them."""

import tracemalloc

import numpy as np
import pytest
from oracle import (
    BASIC,
    CASES,
    assert_all_close,
    assert_all_same_bits,
    assert_same_bits,
    each,
    everything,
    inputs,
    lengths_for,
    make,
    named,
)

from fastrnn import batching, memory

both_ways = pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "both ways"])
RANDOM = {"dropout": 0.5, "recurrent_dropout": 0.4, "zoneout": 0.3}

# Lengths.


@pytest.mark.parametrize("H", [9, 70])
@both_ways
@pytest.mark.parametrize("case", CASES)
def test_a_sequence_alone_and_padded(case, bidirectional, H, dtype):
    """The bits of a batch with lengths are those of each sequence by itself, without its padding."""
    layer = make(case, 5, H, dtype, num_layers=2, bidirectional=bidirectional)
    T, lengths = 9, [4, 9, 1, 0, 6, 9, 2, 8]
    x, state, dy, dstate = inputs(layer, T, len(lengths))
    batch = everything(layer, x, state, dy, dstate, lengths=lengths)
    sums = {name: np.zeros(array.shape) for name, array in layer.parameters.items()}
    for b, length in enumerate(lengths):
        row = slice(b, b + 1)
        before, d_after = each(state, lambda s, row=row: s[:, row]), each(dstate, lambda s, row=row: s[:, row])
        if length == 0:
            alone = {**named(before, "_n"), **named(before, "_n of vjp")}
            alone |= {f"d{name}": array for name, array in named(d_after, "_0").items()}
        else:
            alone = everything(layer, x[:length, row], before, dy[:length, row], d_after)
        for name, array in alone.items():
            if name in sums:
                sums[name] += array
            else:
                mine = np.ascontiguousarray(batch[name][: len(array), row])
                assert_same_bits(mine, np.ascontiguousarray(array), f"{name} of {b}")
        for name in ("y", "y of vjp", "dx"):
            assert not batch[name][length:, b].any(), name
    assert_all_close(layer, batch, sums)


@both_ways
@pytest.mark.parametrize("case", CASES)
def test_what_is_padding_does_not_matter(case, bidirectional, dtype):
    """Neither its values nor what comes back to it, NaN and infinity included."""
    layer = make(case, 5, 20, dtype, num_layers=2, bidirectional=bidirectional)
    x, state, dy, dstate = inputs(layer, 7, 6)
    lengths = lengths_for(7, 6)
    padding = np.arange(7)[:, None] >= lengths
    assert 0 < padding.sum() < padding.size
    results = []
    for value in (0, np.nan, np.inf, -np.inf, 1e30):
        x[padding], dy[padding] = value, value
        results.append(everything(layer, x, state, dy, dstate, lengths=lengths))
    for other in results[1:]:
        assert_all_same_bits(other, results[0])
    assert all(np.isfinite(array).all() for array in results[0].values())


@both_ways
@pytest.mark.parametrize("case", BASIC)
def test_lengths_of_whole_sequences_are_no_lengths(case, bidirectional, dtype):
    layer = make(case, 5, 20, dtype, num_layers=2, bidirectional=bidirectional)
    given = inputs(layer, 7, 6)
    assert_all_same_bits(everything(layer, *given, lengths=[7] * 6), everything(layer, *given))


@both_ways
@pytest.mark.parametrize("case", CASES)
def test_all_sequences_empty(case, bidirectional, dtype):
    """Nothing happens: y is zeros, states pass through, parameters have no gradient."""
    layer = make(case, 5, 20, dtype, num_layers=2, bidirectional=bidirectional)
    x, state, dy, dstate = inputs(layer, 7, 3)
    got = everything(layer, x, state, dy, dstate, lengths=[0, 0, 0])
    passed = {**named(state, "_n"), **named(state, "_n of vjp")}
    passed |= {f"d{name}": array for name, array in named(dstate, "_0").items()}
    for name, array in got.items():
        assert_same_bits(array, passed.get(name, np.zeros_like(array)), name)


@pytest.mark.parametrize("kind", [list, tuple, np.int32, np.int64, np.uint8, np.uint64], ids=lambda kind: kind.__name__)
def test_any_integers_will_do(kind):
    layer = make("LSTM", 3, 4)
    given = inputs(layer, 6, 3)
    lengths = kind([6, 0, 2])
    assert_all_same_bits(everything(layer, *given, lengths=lengths), everything(layer, *given, lengths=[6, 0, 2]))


@pytest.mark.parametrize(
    ("lengths", "error"),
    [
        ([6, 2], ValueError),
        ([6, 2, 1, 1], ValueError),
        ([[6, 2, 1]], ValueError),
        (6, ValueError),
        ([], (TypeError, ValueError)),
        ([6, -1, 1], ValueError),
        ([6, 7, 1], ValueError),
        (np.array([6, 2, 2**63], np.uint64), ValueError),
        ([6.0, 2.0, 1.0], TypeError),
        ([True, True, False], TypeError),
        (["6", "2", "1"], TypeError),
        ([6, None, 1], TypeError),
        ("621", (TypeError, ValueError)),
    ],
    ids=str,
)
@pytest.mark.parametrize("batch_first", [False, True], ids=["time first", "batch first"])
@pytest.mark.parametrize("case", BASIC)
def test_wrong_lengths(case, batch_first, lengths, error):
    layer = make(case, 4, 5, batch_first=batch_first)
    x = np.ones((3, 6, 4) if batch_first else (6, 3, 4), np.float32)
    with pytest.raises(error, match="lengths: expected"):
        layer(x, None, lengths)
    with pytest.raises(error, match="lengths: expected"):
        layer.vjp(x, lengths=lengths)


# Checkpoints.


@pytest.mark.parametrize("T", [1, 2, 7])
@pytest.mark.parametrize("random", [{}, RANDOM], ids=["plain", "masked"])
@both_ways
@pytest.mark.parametrize("case", CASES)
def test_checkpoints_do_not_change_a_bit(case, bidirectional, random, T, dtype):
    layer = make(case, 4, 11, dtype, num_layers=2, bidirectional=bidirectional, **random)
    given = inputs(layer, T, 5)
    for lengths in (None, lengths_for(T, 5)):
        wanted = everything(layer, *given, np.random.default_rng(3), lengths)
        for k in range(1, T + 2):
            got = everything(layer, *given, np.random.default_rng(3), lengths, checkpoint=k)
            assert_all_same_bits(got, wanted)


@pytest.mark.parametrize("sizes", [(40, 26, 5, 40), (33, 1, 70, 150), (50, 3, 1, 9)], ids=str)
@pytest.mark.parametrize("case", [*BASIC, "LSTM proj"])
def test_checkpoints_in_long_sequences(case, sizes, dtype, small_shares):
    T, B, I, H = sizes
    layer = make(case, I, H, dtype)
    given = inputs(layer, T, B)
    wanted = everything(layer, *given)
    for threads in (1, 3):
        batching.set_num_threads(threads)
        for k in (6, 13, 32):
            assert_all_same_bits(everything(layer, *given, checkpoint=k), wanted)


@pytest.mark.parametrize("case", BASIC)
def test_checkpoints_save_memory(case):
    layer = make(case, 4, 64)
    x = np.ones((400, 8, 4), np.float32)
    layer.vjp(x)[1](None)  # the packed weights are made, and stay
    held = []
    tracemalloc.start()
    try:
        for checkpoint in (None, 20):
            memory._kept.clear()  # what is used again would not be counted
            before = tracemalloc.get_traced_memory()[0]
            (y, _), pullback = layer.vjp(x, checkpoint=checkpoint)
            held.append(tracemalloc.get_traced_memory()[0] - before - y.nbytes)
            del y, pullback, _
    finally:
        tracemalloc.stop()
    assert held[1] < held[0] / 2


@pytest.mark.parametrize(
    ("checkpoint", "error"),
    [(0, ValueError), (-3, ValueError), (2.0, TypeError), (True, TypeError), ("2", TypeError), ([2], TypeError)],
    ids=str,
)
def test_wrong_checkpoints(checkpoint, error):
    with pytest.raises(error, match="checkpoint: expected"):
        make("LSTM", 4, 5).vjp(np.ones((6, 3, 4), np.float32), checkpoint=checkpoint)
