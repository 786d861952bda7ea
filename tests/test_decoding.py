"""Decoding against exhaustive enumeration and a plain search that never stops early; `test_sampling` has the rest."""

import itertools
import math
import threading
from collections import Counter, namedtuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_same_bits
from oracle_decoding import Toy, language_model, sequences_of, table_model

import fastrnn
from fastrnn import batching
from fastrnn.decoding import Constraints, Parts, map_arrays
from fastrnn.heads import Embedding, Linear
from fastrnn.layers import LSTM
from fastrnn.models import CELLS, LanguageModel


def score(log_prob, length, alpha):
    return log_prob / ((5 + length) / 6) ** alpha


def plain_search(model, eos, K, T, R, alpha=0.0, min_length=0, groups=1, diversity=0.0):
    """The same search with lists and sorting: (score, log-probability, tokens).

    It never stops before T, but for one of several groups that can find nothing better, and then chooses no tokens.
    """
    pools = [[] for _ in range(groups)]
    opens = [[(0.0, (), 0)] for _ in range(groups)]
    for t in range(1, T + 1):
        counts = Counter()
        for g in range(groups):
            candidates = []
            for k, (before, tokens, node) in enumerate(opens[g]):
                for v, log_prob in enumerate(model.log_probs[node].astype(np.float64)):
                    total = before + log_prob
                    if total > -np.inf and not (v == eos and t < min_length):
                        rank = total - diversity * counts[v]
                        candidates.append((-rank, k, v, total, (*tokens, v), node * model.V + v + 1))
            candidates.sort(key=lambda c: c[:3])
            opens[g] = []
            for i, (_, _, v, total, tokens, node) in enumerate(candidates):
                ends = v == eos
                if ends and i < K // groups:
                    pools[g].append((score(total, t, alpha), total, tokens))
                if not ends and len(opens[g]) < K // groups:
                    opens[g].append((total, tokens, node))
                    if t == T:
                        pools[g].append((score(total, t, alpha), total, tokens))
            counts.update(tokens[-1] for _, tokens, _ in opens[g])
            pools[g].sort(key=lambda f: -f[0])
            if groups > 1 and opens[g] and len(pools[g]) >= R // groups and t < T:
                most = max(total for total, *_ in opens[g])
                if pools[g][R // groups - 1][0] >= max(score(most, L, alpha) for L in range(t + 1, T + 1)):
                    opens[g] = []
    best = [f for pool in pools for f in pool[: R // groups]]
    return sorted(best, key=lambda f: -f[0])


@settings(max_examples=300)
@given(
    V=st.integers(1, 5),
    T=st.integers(1, 5),
    K=st.integers(1, 9),
    eos=st.sampled_from([None, 0, "last"]),
    alpha=st.sampled_from([0.0, 0.6, 1.0, 4.0, -1.0]),
    groups=st.sampled_from([1, 1, 2, 3]),
    diversity=st.sampled_from([0.0, 0.5, 3.0]),
    min_length=st.integers(0, 5),
    most=st.integers(1, 9),
    ties=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_beam_search_is_the_plain_search(V, T, K, eos, alpha, groups, diversity, min_length, most, ties, seed):
    model = Toy(V, T, seed, halves=ties)
    eos = V - 1 if eos == "last" else eos
    min_length, R = min(min_length, T), groups * min(K, most)
    found = fastrnn.beam_search(
        model, model.start(), bos=0, eos=eos, beam_size=K * groups, max_length=T, min_length=min_length,
        length_penalty=alpha, num_return=R, groups=groups, diversity=diversity,
    )  # fmt: skip
    expected = plain_search(model, eos, K * groups, T, R, alpha, min_length, groups, diversity)
    assert sequences_of(found) == [tokens for _, _, tokens in expected]
    n = len(expected)
    assert found.log_probs[0, :n].tolist() == [log_prob for _, log_prob, _ in expected]
    assert np.allclose(found.scores[0, :n], [s for s, _, _ in expected], rtol=1e-14, atol=0)
    assert (found.scores[0, n:] == -np.inf).all()
    assert (found.log_probs[0, n:] == -np.inf).all()
    assert (found.lengths[0, n:] == 0).all()
    assert found.tokens.dtype == found.lengths.dtype == np.int64


def test_a_group_that_has_ended_repels_no_longer():
    for seed in range(100):
        model = Toy(5, 5, seed)
        found = fastrnn.beam_search(
            model, model.start(), bos=0, eos=0, beam_size=2, max_length=5, num_return=2, groups=2, diversity=3.0
        )
        assert sequences_of(found) == [tokens for _, _, tokens in plain_search(model, 0, 2, 5, 2, 0.0, 0, 2, 3.0)]


@pytest.mark.parametrize("alpha", [0.0, 0.7, 2.0, -1.0])
@pytest.mark.parametrize("eos", [None, 1])
@pytest.mark.parametrize(("V", "T"), [(1, 3), (2, 5), (3, 4), (4, 3)])
def test_a_beam_of_all_sequences_is_exhaustive(V, T, eos, alpha):
    if eos is not None and V == 1:
        eos = 0
    for seed in range(5):
        model = Toy(V, T, seed)
        found = fastrnn.beam_search(
            model, model.start(), bos=0, eos=eos, beam_size=V**T, max_length=T, length_penalty=alpha, num_return=V**T
        )
        every = [(score(p, len(tokens), alpha), p, tokens) for p, tokens in model.sequences(eos, T)]
        every.sort(key=lambda s: -s[0])
        assert sequences_of(found) == [tokens for _, _, tokens in every]
        assert found.log_probs[0, : len(every)].tolist() == [p for _, p, _ in every]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_language_model_s_beam_of_all_sequences_is_exhaustive(compiled):
    model = LanguageModel(3, 4, 5, dtype=np.float64, seed=1)
    model.output.weight = model.output.weight * 10
    for alpha in (0.0, 1.5):
        found = fastrnn.beam_search(
            model if compiled else model.step, bos=2, eos=0, beam_size=81, max_length=4, num_return=81,
            length_penalty=alpha,
        )  # fmt: skip
        every = []
        for tokens in itertools.product(range(3), repeat=4):
            tokens = tokens[: tokens.index(0) + 1] if 0 in tokens else tokens
            logits = model(np.array([2, *tokens[:-1]])[:, None])[0][:, 0]
            log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
            p = log_probs[np.arange(len(tokens)), list(tokens)].sum()
            every.append((score(p, len(tokens), alpha), tokens))
        every = sorted(set(every), key=lambda s: -s[0])
        assert sequences_of(found) == [tokens for _, tokens in every]
        assert np.abs(found.scores[0, : len(every)] - [s for s, _ in every]).max() < 1e-12


def test_the_best_sequence_may_start_with_a_poor_token():
    model = table_model([[0.4, 0.25, 0.35, 0], [0, 0.01, 0, 0.99], [0.5, 0, 0, 0.5], [0, 0, 0, 1]])
    narrow, wide = (fastrnn.beam_search(model, bos=0, eos=3, beam_size=K, max_length=3, num_return=1) for K in (1, 3))
    assert sequences_of(narrow)[0][0] == 0
    assert sequences_of(wide) == [(1, 3)]
    assert math.isclose(wide.log_probs[0, 0], math.log(0.25 * 0.99))


def test_ties_go_to_the_better_hypothesis_and_the_lesser_token():
    model = table_model(np.full((3, 3), 1 / 3))
    found = fastrnn.beam_search(model, bos=0, eos=None, beam_size=4, max_length=3, num_return=4, return_trellis=True)
    assert sequences_of(found) == [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0)]
    assert found.trellis.tokens[0].tolist() == [[0, 1, 2, 0], [0, 1, 2, 0], [0, 1, 2, 0]]
    assert found.trellis.back_pointers[0, 1:].tolist() == [[0, 0, 0, 1]] * 2


def test_rounding_above_zero_counts_as_zero():
    found = fastrnn.beam_search(
        lambda tokens, s: (np.array([[1e-6, -20]], np.float32), s), bos=0, eos=None, beam_size=1, max_length=5
    )
    assert found.log_probs.tolist() == [[0]]


def test_everything_ends_at_once():
    calls = []

    def model(tokens, state):
        calls.append(len(tokens))
        log_probs = np.full((len(tokens), 4), -np.inf)
        log_probs[:, 2] = 0
        return log_probs, state

    found = fastrnn.beam_search(model, bos=[0, 1], eos=2, beam_size=3, max_length=9, num_return=3)
    assert calls == [6]
    assert found.tokens.tolist() == [[[2], [2], [2]]] * 2
    assert found.lengths.tolist() == [[1, 0, 0]] * 2
    assert found.log_probs.tolist() == [[0, -np.inf, -np.inf]] * 2


def test_nothing_ever_ends():
    model = table_model([[0.5, 0.5, 0], [0.25, 0.75, 0], [1, 0, 0]])
    for eos in (2, None):
        found = fastrnn.beam_search(model, bos=0, eos=eos, beam_size=2, max_length=30, num_return=2)
        assert found.lengths.tolist() == [[30, 30]]
        assert found.tokens[0, 0].tolist() == [1] * 30


def test_nothing_is_possible():
    found = fastrnn.beam_search(
        lambda tokens, s: (np.full((len(tokens), 3), -np.inf), s), bos=0, eos=1, beam_size=2, max_length=4
    )
    assert found.tokens.shape == (1, 1, 0)
    assert found.scores.tolist() == [[-np.inf]]


def test_the_usual_early_stop_is_wrong_under_a_length_penalty():
    # 3 ends. From 0 a short end is likely, and the long way by 1 is nearly as likely, for more tokens.
    model = table_model([[0, 0.5, 0.1, 0.4], [0, 0.99, 0, 0.01], [0, 0, 0, 1], [0, 0, 0, 1]])
    options = {"bos": 0, "eos": 3, "beam_size": 2, "max_length": 8, "length_penalty": 1.0}
    exact = fastrnn.beam_search(model, **options)
    usual = fastrnn.beam_search(model, **options, early_stopping="count")
    assert sequences_of(usual) == [(3,)]
    assert sequences_of(exact) == [(1,) * 8]
    assert exact.scores[0, 0] > usual.scores[0, 0]


@pytest.mark.parametrize(("alpha", "steps"), [(0.0, 2), (1.0, 3), (3.0, 20), (-3.0, 2)])
def test_the_search_ends_when_nothing_open_can_win(alpha, steps):
    calls = []

    def model(tokens, state):
        calls.append(len(tokens))
        return np.log([[0.5, 0.5] if len(calls) == 1 else [0.2, 0.8]]), state

    fastrnn.beam_search(model, bos=0, eos=1, beam_size=1, max_length=20, length_penalty=alpha, min_length=2)
    # What ends with 2 tokens has the probability 0.4, and what is open at n tokens 0.5 * 0.2 ** (n - 1). With 20
    # tokens, for alpha = 1, its score is at most log(0.1) / (25 / 6) = -0.55 and then -0.94, the other's is -0.79.
    assert calls == [1] * steps


def test_inputs_are_independent(rng):
    V, T, N = 3, 5, 7
    models = [Toy(V, T, seed) for seed in range(N)]
    log_probs = np.stack([m.log_probs for m in models])

    def step(tokens, state):
        which, node = state
        node = np.where(node < 0, 0, node * V + tokens + 1)
        return log_probs[which, node], [which, node]

    for options in ({}, {"groups": 2, "diversity": 1.0}, {"length_penalty": 1.0}):
        options = {"bos": 0, "eos": 1, "beam_size": 4, "max_length": T, "num_return": 4, **options}
        together = fastrnn.beam_search(step, (np.arange(N), np.full(N, -1)), **options)
        for n, model in enumerate(models):
            alone = fastrnn.beam_search(model, model.start(), **options)
            assert sequences_of(together, n) == sequences_of(alone)
            assert_same_bits(together.scores[n], alone.scores[0])


Pair = namedtuple("Pair", "left right")


def test_states_of_any_structure_follow_their_hypotheses(rng):
    """Each array of the state collects its row's tokens; what is found must be what was collected."""
    N, K, V, T = 3, 4, 5, 6
    table = np.log(rng.dirichlet(np.ones(V), size=V))
    seen = []

    def step(tokens, state):
        def append(array):
            return np.concatenate([array[..., 1:], np.broadcast_to(tokens[:, None], (*array.shape[:-1], 1))], -1)

        def matrix(array):
            return append(array.swapaxes(1, 2)).swapaxes(1, 2) if array.ndim == 3 else append(array)

        assert isinstance(state["pair"], Pair)
        assert isinstance(state["list"], list)
        assert isinstance(state["list"][0], tuple)
        assert state["none"] is None
        state = map_arrays(lambda a: matrix(a) if a.ndim == 2 else a, state)
        seen.append(state)
        return table[tokens], state

    fixed = np.arange(N)[:, None, None] * np.ones((1, 2, 3))
    start = {
        "pair": Pair(np.zeros((N, T)), np.zeros((N, T), np.float32)),
        "list": [(fixed,), np.zeros((N, T), np.int64)],
        "none": None,
    }
    found = fastrnn.beam_search(
        step, start, bos=[1, 2, 3], eos=None, beam_size=K, max_length=T, num_return=K, return_trellis=True
    )
    last = seen[-1]
    assert (last["list"][0][0][:, 0, 0] == np.repeat(np.arange(N), K)).all()
    pointers = found.trellis.back_pointers[:, -1]
    for n in range(N):
        for k, tokens in enumerate(found.tokens[n]):
            for array in (*last["pair"], last["list"][1]):
                assert array[n * K + pointers[n, k]].tolist() == [n + 1, *tokens[:-1].tolist()]
    assert start["pair"].left.any() == False  # noqa: E712


def test_steps_that_were_not_taken_are_zeros_in_the_trellis():
    table = np.full((2, 3, 3), -1.0)
    table[0] = [-5, -5, -0.01]  # it ends at once
    found = fastrnn.beam_search(
        lambda tokens, n: (table[n, tokens], n), np.arange(2), bos=0, eos=2, beam_size=4, groups=2, num_return=2,
        max_length=4, return_trellis=True,
    )  # fmt: skip
    tokens, pointers = found.trellis
    assert pointers[0, 0].tolist() == [0, 0, 2, 2]
    assert not pointers[0, 1:].any()
    assert not tokens[0, 1:].any()
    assert (pointers[1, :, 2:] >= 2).all()


def test_the_trellis_holds_the_sequences():
    model = Toy(4, 5, 3)
    for groups in (1, 2):
        found = fastrnn.beam_search(
            model, np.full(3, -1), bos=0, eos=None, beam_size=6, max_length=5, num_return=6, groups=groups,
            diversity=0.7 * (groups - 1), return_trellis=True,
        )  # fmt: skip
        tokens, pointers = found.trellis
        for n in range(3):
            traced = set()
            for k in range(6):
                sequence = []
                for t in range(4, -1, -1):
                    sequence.append(int(tokens[n, t, k]))
                    k = pointers[n, t, k]
                traced.add(tuple(sequence[::-1]))
            assert traced == set(sequences_of(found, n))
    assert fastrnn.beam_search(model, model.start(), bos=0, eos=0, beam_size=2, max_length=5).trellis is None


# Constraints.


def no_repeat(size):
    def wanted(tokens):
        grams = [tokens[i : i + size] for i in range(len(tokens) - size + 1)]
        return len(set(grams)) == len(grams)

    return wanted


@pytest.mark.parametrize(
    ("constraints", "wanted"),
    [
        (Constraints(banned=[1]), lambda s: 1 not in s),
        (Constraints(banned=[0, 2]), lambda s: not {0, 2} & set(s)),
        (Constraints(no_repeat_ngram=1), no_repeat(1)),
        (Constraints(no_repeat_ngram=2), no_repeat(2)),
        (Constraints(no_repeat_ngram=3), no_repeat(3)),
        (Constraints(allowed=lambda n, s: {0, 1} if len(s) % 2 else None), lambda s: not set(s[1::2]) - {0, 1}),
        (Constraints(allowed=lambda n, s: [] if sum(s) == 3 else [0, 1, 2, 3]), lambda s: sum(s[:-1]) != 3),
        (
            Constraints(banned=[1], no_repeat_ngram=1, allowed=lambda n, s: np.array([1, 2, 3])),
            lambda s: no_repeat(1)(s) and not {0, 1} & set(s),
        ),
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_constraints_leave_the_rest_as_it_is(constraints, wanted, temperature):
    model = Toy(4, 4, 1)
    plain = Toy(4, 4, 1)
    x = plain.log_probs / temperature
    plain.log_probs = x - np.log(np.exp(x).sum(1, keepdims=True))
    found = fastrnn.beam_search(
        model, model.start(), bos=0, eos=3, beam_size=256, max_length=4, num_return=256, constraints=constraints,
        temperature=temperature,
    )  # fmt: skip
    every = sorted(plain.sequences(3, 4, wanted), key=lambda s: -s[0])
    assert sequences_of(found) == [tokens for _, tokens in every]
    assert np.allclose(found.log_probs[0, : len(every)], [p for p, _ in every], rtol=1e-13, atol=0)


def test_allowed_tokens_are_asked_for_by_input_and_hypothesis():
    asked = []

    def allowed(n, tokens):
        asked.append((n, tokens.tolist()))
        tokens[:] = 9  # its own copy
        return [n]

    model = table_model(np.full((3, 3), 1 / 3))
    found = fastrnn.beam_search(
        model, bos=[0, 0, 0], eos=None, beam_size=2, max_length=3, constraints=Constraints(allowed=allowed)
    )
    assert found.tokens[:, 0].tolist() == [[n] * 3 for n in range(3)]
    assert asked == [(n, [n] * t) for t in range(3) for n in range(3)]


@pytest.mark.parametrize("groups", [1, 2])
def test_prefixes_are_forced_and_count(groups):
    model = Toy(4, 5, 2)
    prefixes = [[1, 0, 2], [], [0]]
    found = fastrnn.beam_search(
        model, np.full(3, -1), bos=0, eos=3, beam_size=4**5 * groups, max_length=5, num_return=9 * groups,
        prefix=prefixes, constraints=Constraints(banned=[0], no_repeat_ngram=1, allowed=lambda n, s: range(1, 4)),
        groups=groups,
    )  # fmt: skip
    for n, prefix in enumerate(prefixes):

        def wanted(tokens, prefix=tuple(prefix)):
            given, rest = tokens[: len(prefix)], tokens[len(prefix) :]
            return given == prefix[: len(tokens)] and 0 not in rest and no_repeat(1)(tokens)

        every = sorted(model.sequences(3, 5, wanted), key=lambda s: -s[0])[:9]
        assert sequences_of(found, n) == [tokens for _, tokens in every for _ in range(groups)]
    one = fastrnn.beam_search(model, np.full(2, -1), bos=0, eos=3, beam_size=2, max_length=5, prefix=(1, 1))
    assert (one.tokens[:, 0, :2] == 1).all()


def test_greedy_takes_the_likeliest():
    model = Toy(5, 6, 4, halves=True)
    found = fastrnn.greedy(model, np.full(2, -1), bos=0, eos=2, max_length=6)
    node, tokens = 0, []
    while len(tokens) < 6 and 2 not in tokens:
        tokens.append(int(model.log_probs[node].argmax()))
        node = node * 5 + tokens[-1] + 1
    assert sequences_of(found, 0) == sequences_of(found, 1) == [tuple(tokens)]
    assert found.tokens.shape == (2, 1, len(tokens))


# Compiled loops.


def batch_first(state):
    return map_arrays(lambda a: np.ascontiguousarray(a.swapaxes(0, 1)), state)


OPTIONS = [
    {},
    {"beam_size": 1, "num_return": 1},
    {"length_penalty": 1.0, "min_length": 3},
    {"eos": None},
    {"groups": 3, "diversity": 0.5, "beam_size": 6, "num_return": 6},
    {"constraints": Constraints(banned=[0, 5, 39]), "early_stopping": "count"},
    {"prefix": [[1, 2, 3], [], [5], [4, 4], [1]]},
    {"max_length": 1},
]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
def test_the_compiled_loop_finds_the_same_bits(options, cell, dtype):
    model, state = language_model(cell, dtype)
    options = {"bos": np.arange(5), "eos": 7, "beam_size": 4, "num_return": 3, "max_length": 12, **options}
    ours = model.beam_search(state, **options, return_trellis=True)
    theirs = fastrnn.beam_search(model.step, batch_first(state), **options, return_trellis=True)
    for a, b in zip((*ours[:4], *ours.trellis), (*theirs[:4], *theirs.trellis)):
        assert_same_bits(a, b)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (65, 3, 63), (700, 1, 65)])
def test_compiled_sampling_draws_the_same(shape, cell, dtype):
    model, state = language_model(cell, dtype, *shape)
    options = {"bos": np.zeros(5, np.int64), "eos": None if shape[0] == 1 else 0, "max_length": 70}
    for name, more in (
        ("sample", {"num_samples": 3}),
        ("sample", {"num_samples": 3, "top_p": 0.7, "temperature": 1.3, "top_k": 20, "min_length": 4}),
        ("stochastic_beam_search", {"beam_size": 3}),
    ):
        ours = getattr(model, name)(state, **options, **more, rng=np.random.default_rng(5))
        theirs = getattr(fastrnn, name)(model.step, batch_first(state), **options, **more, rng=np.random.default_rng(5))
        assert (ours.tokens == theirs.tokens).all()
        assert (ours.lengths == theirs.lengths).all()
        for a, b in zip(ours[2:], theirs[2:]):
            assert np.allclose(a, b, rtol=1e-4 if dtype == np.float32 else 1e-10, atol=0)


@pytest.mark.parametrize("noise", [1, 700, 10**6])
def test_noise_is_drawn_for_some_steps_at_once(noise, monkeypatch):
    monkeypatch.setattr(fastrnn.sampling, "NOISE_AT_ONCE", noise)
    model, state = language_model("gru")
    options = {"bos": np.arange(5), "eos": 7, "max_length": 20}
    for name, more in (("sample", {"num_samples": 3}), ("stochastic_beam_search", {"beam_size": 3})):
        ours = getattr(model, name)(state, **options, **more, rng=np.random.default_rng(5))
        theirs = getattr(fastrnn, name)(model.step, batch_first(state), **options, **more, rng=np.random.default_rng(5))
        assert (ours.tokens == theirs.tokens).all()
        assert len({tuple(tokens) for tokens in ours.tokens.reshape(-1, ours.tokens.shape[2]).T.tolist()}) > 15


@pytest.mark.parametrize("table", [True, False])
def test_bits_do_not_depend_on_threads_or_the_table(table, dtype, monkeypatch, small_shares):
    model, state = language_model("gru", dtype)
    if not table:
        monkeypatch.setattr(fastrnn.decoding, "LARGEST_TABLE", 0)
    options = {"bos": np.arange(5), "eos": 7, "max_length": 30}
    results = []
    for threads, work in ((1, 10**9), (2, 10**9), (3, 1)):
        batching.set_num_threads(threads)
        monkeypatch.setattr(fastrnn.decoding, "WORK_AT_ONCE", work)
        results.append(
            (
                *model.beam_search(state, **options, beam_size=4, num_return=4, groups=2, diversity=1.0)[:4],
                *model.sample(state, **options, num_samples=4, top_p=0.9, rng=np.random.default_rng(0)),
                *model.stochastic_beam_search(state, **options, beam_size=4, rng=np.random.default_rng(0)),
            )
        )
    plain = fastrnn.beam_search(
        model.step, batch_first(state), **options, beam_size=4, num_return=4, groups=2, diversity=1.0
    )
    for result in results:
        for a, b in zip(result, results[0]):
            assert_same_bits(a, b)
        for a, b in zip(result, plain[:4]):
            assert_same_bits(a, b)


def test_changed_parameters_are_seen():
    model, state = language_model("lstm")
    options = {"bos": np.arange(5), "eos": None, "beam_size": 2, "max_length": 5}
    for name in ("embedding.weight", "rnn.weight_ih_l0", "rnn.bias_hh_l0", "output.bias", "embedding.weight"):
        before = model.beam_search(state, **options)
        model.parameters[name] = np.flip(model.parameters[name], 0)
        after = model.beam_search(state, **options)
        expected = fastrnn.beam_search(model.step, batch_first(state), **options)
        assert (before.scores != after.scores).any()
        assert_same_bits(after.scores, expected.scores)
    with model.parameters.writable() as arrays:
        for name in ("embedding.weight", "rnn.bias_hh_l0"):
            arrays[name][:] += 0.5
            after = model.beam_search(state, **options)
            assert_same_bits(after.scores, fastrnn.beam_search(model.step, batch_first(state), **options).scores)


def test_each_embedding_is_its_own():
    """All of them begin with the same version."""
    rnn, output, options = LSTM(4, 16, seed=1), Linear(16, 7, seed=2), {"eos": None, "beam_size": 3, "max_length": 8}
    embeddings = [Embedding(7, 4, seed=seed) for seed in (3, 4, 3)]
    found = [fastrnn.beam_search(Parts(part, rnn, output), bos=0, **options).scores for part in embeddings]
    nothing = (np.zeros((1, 1, 16), np.float32),) * 2
    for scores, part in zip(found, embeddings):
        step = Parts(part, rnn, output).step
        assert_same_bits(scores, fastrnn.beam_search(step, nothing, bos=[0], **options).scores)
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize(
    ("embedding", "output", "message"),
    [
        (
            Embedding(7, 4),
            Linear(16, 7),
            "an embedding of 8 features and dtype float32 beside .*, got 4 and",
        ),
        (Embedding(7, 8, np.float64), Linear(16, 7), "an embedding of 8 features and dtype .*, got 8 and float64"),
        (Embedding(7, 8), Linear(9, 7), "an output of 16 features and dtype float32 beside LSTM.*, got 9 and float32"),
        (Embedding(7, 8), Linear(16, 7, dtype=np.float64), "an output of 16 features .*, got 16 and float64"),
        (Embedding(6, 8), Linear(16, 7), "an embedding of 7 tokens, got 6"),
    ],
)
def test_parts_that_do_not_fit(embedding, output, message):
    with pytest.raises(ValueError, match=f"step: expected {message}"):
        fastrnn.greedy(Parts(embedding, LSTM(8, 16), output), bos=0, eos=None, max_length=3)


def test_layers_without_a_step_in_place_decode_too():
    model, state = language_model("lstm")
    model.rnn = LSTM(9, 17, 2, layer_norm=True, dtype=np.float64, seed=0)
    options = {"bos": np.arange(5), "eos": 7, "beam_size": 3, "max_length": 6}
    found = model.beam_search(state, **options)
    assert_same_bits(found.scores, fastrnn.beam_search(model.step, batch_first(state), **options).scores)
    for n, tokens in enumerate(sequences_of(found, n)[0] for n in range(5)):
        logits = model(np.array([n, *tokens[:-1]])[:, None], tuple(s[:, n : n + 1] for s in state))[0][:, 0]
        log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        assert math.isclose(found.log_probs[n, 0], log_probs[np.arange(len(tokens)), tokens].sum(), rel_tol=1e-12)


@pytest.mark.parametrize("options", [{"proj_size": 5}, {"coupled": True, "peephole": True}, {"zoneout": 0.1}])
def test_parts_with_other_layers(options):
    H = options.get("proj_size", 17)
    parts = Parts(
        Embedding(30, 9, np.float64, seed=0), LSTM(9, 17, 2, dtype=np.float64, seed=1, **options),
        Linear(H, 30, dtype=np.float64, seed=2),
    )  # fmt: skip
    options = {"bos": [1, 2], "eos": 7, "beam_size": 3, "max_length": 6}
    found = fastrnn.beam_search(parts, **options)
    nothing = np.zeros((2, 2, H)), np.zeros((2, 2, 17))
    assert_same_bits(found.scores, fastrnn.beam_search(parts.step, nothing, **options).scores)
    with pytest.raises(ValueError, match="step: expected an embedding of 30 tokens, got 29"):
        fastrnn.beam_search(Parts(Embedding(29, 9), LSTM(9, 17), Linear(17, 30)), **options)


def test_constraints_on_a_language_model():
    model, state = language_model("gru")
    constraints = Constraints(no_repeat_ngram=1, allowed=lambda n, tokens: range(n, 40, 2))
    options = {"bos": np.arange(5), "eos": None, "beam_size": 3, "max_length": 8, "constraints": constraints}
    found = model.beam_search(state, **options)
    for n in range(5):
        (tokens,) = sequences_of(found, n)
        assert len(set(tokens)) == 8
        assert not set(tokens) - set(range(n, 40, 2))
    drawn = model.sample(state, bos=0, eos=None, max_length=8, constraints=constraints, num_samples=9)
    for n in range(5):
        for tokens in sequences_of(drawn, n):
            assert len(set(tokens)) == 8
            assert not set(tokens) - set(range(n, 40, 2))


def test_searches_from_many_threads():
    model, state = language_model("lstm")
    options = {"bos": np.arange(5), "eos": 7, "beam_size": 4, "max_length": 30}
    expected, found = model.beam_search(state, **options), []
    workers = [threading.Thread(target=lambda: found.append(model.beam_search(state, **options))) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 6
    for each in found:
        assert_same_bits(each.scores, expected.scores)
        assert_same_bits(each.tokens, expected.tokens)


# Errors.


MODEL = table_model([[0.5, 0.5], [0.5, 0.5]])
LM = LanguageModel(3, 2, 2, seed=0)


def search(step=MODEL, state=None, **options):
    return fastrnn.beam_search(step, state, **{"bos": 0, "eos": 1, "beam_size": 2, "max_length": 3, **options})


def stochastic(step=MODEL, **options):
    return fastrnn.stochastic_beam_search(step, **{"bos": 0, "eos": 1, "beam_size": 2, "max_length": 3, **options})


def draw(step=MODEL, **options):
    return fastrnn.sample(step, **{"bos": 0, "eos": 1, "max_length": 3, **options})


def returns(log_probs, state=None):
    return lambda tokens, _: (log_probs, state)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("decode", [search, draw])
def test_what_is_no_number_is_reported_where_it_is_forbidden_too(decode, temperature):
    constraints = Constraints(allowed=lambda n, tokens: [0])
    for odd in np.nan, np.inf:

        def step(tokens, state, odd=odd):
            return np.tile([-0.5, odd], (len(tokens), 1)), state

        with pytest.raises(FloatingPointError, match="step: expected log-probabilities, got NaN or infinity"):
            decode(step, constraints=constraints, temperature=temperature)


@pytest.mark.parametrize("prefix", [[], (), np.empty(0, int), [[]]])
def test_an_empty_prefix_is_none(prefix):
    assert_same_bits(search(prefix=prefix).scores, search().scores)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: search(3), TypeError, r"step: expected a function .* got 3"),
        (lambda: search(lambda tokens, state: 1), TypeError, r"step: expected it to return \(log_probs, state\)"),
        (lambda: search(returns(np.zeros((1, 2)))), ValueError, r"step: expected shape \(2, at least 1\), got \(1"),
        (lambda: search(returns(np.zeros((2, 2), int))), TypeError, "step: expected log-probabilities of dtype"),
        (lambda: search(returns(np.ones((2, 2)))), ValueError, "step: expected log-probabilities, which are at most 0"),
        (lambda: search(returns(np.full((2, 2), np.nan))), FloatingPointError, "step: .* got NaN"),
        (lambda: draw(returns(np.full((1, 2), np.nan))), FloatingPointError, "step: .* got NaN"),
        (lambda: stochastic(returns(np.full((3, 2), np.inf))), FloatingPointError, "step: .* infinity"),
        (lambda: search(returns(np.zeros((2, 2)), np.zeros(3))), ValueError, r"state: .* length 2, got shape \(3,\)"),
        (lambda: search(state=[np.zeros(2), np.zeros(3)]), ValueError, r"state: .* length 2, got shape \(3,\)"),
        (lambda: search(state=np.zeros(())), ValueError, r"state: .* length at least 1, got shape \(\)"),
        (lambda: search(state=np.zeros((0, 2))), ValueError, r"state: .* length at least 1, got shape \(0, 2\)"),
        (lambda: search(state=np.zeros(2), bos=[0, 0, 0]), ValueError, "bos: expected 2 tokens, one for each input"),
        (lambda: search(bos=[[0]]), ValueError, "bos: expected a token, or one for each input"),
        (lambda: search(bos=0.5), TypeError, "bos: expected integers"),
        (lambda: search(bos=[]), TypeError, "bos: expected integers"),
        (lambda: search(bos=-1), ValueError, "bos: expected indices from 0"),
        (lambda: search(eos=2), ValueError, "eos: expected a token from 0 to 1, got 2"),
        (lambda: search(eos=-1), ValueError, "eos: expected at least 0, got -1"),
        (lambda: search(eos="x"), TypeError, "eos: expected an int, got 'x'"),
        (lambda: search(beam_size=0), ValueError, "beam_size: expected at least 1, got 0"),
        (lambda: search(max_length=0), ValueError, "max_length: expected at least 1, got 0"),
        (lambda: search(min_length=4), ValueError, "min_length: expected at most max_length, 3, got 4"),
        (lambda: search(length_penalty=math.nan), ValueError, "length_penalty: expected a number from -10 to 10"),
        (lambda: search(early_stopping=True), ValueError, "early_stopping: expected one of exact, count, got True"),
        (lambda: search(num_return=3), ValueError, "num_return: expected at most beam_size, 2, got 3"),
        (lambda: search(temperature=0), ValueError, "temperature: expected a number from"),
        (lambda: search(groups=2), ValueError, "groups: expected a divisor of beam_size, 2, and of num_return, 1"),
        (lambda: search(diversity=-1), ValueError, "diversity: expected a number from 0"),
        (lambda: search(constraints=[1]), TypeError, "constraints: expected fastrnn.Constraints, got list of 1"),
        (lambda: search(constraints=Constraints(banned=[2])), ValueError, "banned: expected indices from 0 to 1"),
        (lambda: Constraints(banned=[0.5]), TypeError, "banned: expected integers"),
        (lambda: Constraints(banned=3), ValueError, "banned: expected a list of tokens"),
        (lambda: Constraints(allowed=3), TypeError, "allowed: expected a function, got 3"),
        (lambda: Constraints(no_repeat_ngram=-1), ValueError, "no_repeat_ngram: expected at least 0"),
        (lambda: search(constraints=Constraints(allowed=lambda n, s: [7])), ValueError, "allowed: expected indices"),
        (lambda: search(prefix=[0, 0, 0, 0]), ValueError, "prefix: expected at most max_length, 3, tokens, got 4"),
        (lambda: search(prefix=[1]), ValueError, "prefix: expected tokens that are not eos, 1"),
        (lambda: search(prefix=[[0], [0]]), ValueError, "prefix: expected tokens, or 1 lists of them, got 2 lists"),
        (lambda: search(prefix=3), TypeError, "prefix: expected a list of tokens, or one for each input, got 3"),
        (lambda: search(prefix="01"), TypeError, "prefix: expected a list of tokens, or one for each input, got '01'"),
        (lambda: search(prefix=[2]), ValueError, "prefix: expected indices from 0 to 1, got 2"),
        (lambda: search(return_trellis=1), TypeError, "return_trellis: expected True or False"),
        (lambda: stochastic(length_penalty=1), ValueError, "length_penalty: expected 0, .* sample .* got 1"),
        (lambda: stochastic(beam_size=0), ValueError, "beam_size: expected at least 1"),
        (lambda: stochastic(rng=3), TypeError, "rng: expected a numpy.random.Generator, got 3"),
        (lambda: draw(temperature=-1), ValueError, "temperature: expected a number from 0"),
        (lambda: draw(top_k=0), ValueError, "top_k: expected at least 1, got 0"),
        (lambda: draw(top_p=0), ValueError, "top_p: expected a number greater than 0, got 0"),
        (lambda: draw(top_p=1.5), ValueError, "top_p: expected a number from 0 to 1"),
        (lambda: draw(min_p=-0.1), ValueError, "min_p: expected a number from 0 to 1"),
        (lambda: draw(num_samples=0), ValueError, "num_samples: expected at least 1"),
        (lambda: draw(min_length=4), ValueError, "min_length: expected at most max_length, 3, got 4"),
        (lambda: search(LM, bos=3), ValueError, "bos: expected indices from 0 to 2, got 3"),
        (lambda: search(LM, np.zeros((1, 1, 2), np.float32)), TypeError, "state: expected a tuple of 2 arrays"),
        (lambda: search(LM, (np.zeros((1, 2)),) * 2), ValueError, r"state: expected arrays \(num_layers, N, H\)"),
        (lambda: search(LM, (np.zeros((1, 4, 2)),) * 2), TypeError, "state: expected dtype float32, got float64"),
        (lambda: LM.step([[1]]), ValueError, r"tokens: expected shape \(B,\), got \(1, 1\)"),
        (lambda: LM.step([1], (np.zeros(2), 3)), ValueError, r"state: expected arrays \(B, num_layers, H\), got shape"),
        (lambda: LM.step([3]), ValueError, "tokens: expected indices from 0 to 2, got 3"),
        (lambda: LM.beam_search(eos=1, bos=1, beam_size=1), TypeError, "max_length"),
    ],
)  # fmt: skip
def test_wrong_calls(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_diverged_parameters_are_reported():
    model, state = language_model("gru")
    model.parameters["output.bias"] = np.full(40, np.nan)
    for call in (
        lambda: model.beam_search(state, bos=0, eos=1, beam_size=2, max_length=3),
        lambda: model.sample(state, bos=0, eos=1, max_length=3),
        lambda: model.stochastic_beam_search(state, bos=0, eos=1, beam_size=2, max_length=3),
    ):
        with pytest.raises(FloatingPointError, match="NaN"):
            call()
