"""Sampling against exact probabilities, and where numbers are large, alike or impossible."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from oracle import assert_same_bits
from oracle_decoding import Toy, language_model, sequences_of, table_model

import fastrnn
from fastrnn import batching
from fastrnn.decoding import Constraints

DTYPES = [np.float32, np.float64]


# Bounds are five standard deviations, or of a chi-square statistic d + 5 sqrt(2 d).


def chi_square(counts, p):
    """The statistic of outcomes, by how often they came and their exact probabilities, and a bound for it."""
    total = sum(counts.values())
    assert not set(counts) - set(p)
    expected = {outcome: total * q for outcome, q in p.items()}
    rare = [o for o in p if expected[o] < 5]
    cells = [(counts[o], expected[o]) for o in p if expected[o] >= 5]
    if rare:
        cells.append((sum(counts[o] for o in rare), sum(expected[o] for o in rare)))
    degrees = len(cells) - 1
    return sum((n - e) ** 2 / e for n, e in cells), degrees + 5 * math.sqrt(2 * degrees)


DRAWS = 20_000


@pytest.fixture(scope="module")
def drawn():
    """An enumerable model, its sequences' probabilities, and stochastic beams of it."""
    model = Toy(3, 3, 7, spread=1.0)
    p = {tokens: math.exp(q) for q, tokens in model.sequences(1, 3)}
    found = fastrnn.stochastic_beam_search(
        model, model.start(DRAWS), bos=0, eos=1, beam_size=3, max_length=3, rng=np.random.default_rng(11)
    )
    return p, found


def test_ordered_samples_have_plackett_luce_probabilities(drawn):
    p, found = drawn
    assert math.isclose(sum(p.values()), 1)
    counts = Counter(tuple(sequences_of(found, n)) for n in range(DRAWS))
    exact = {(a, b, c): p[a] * p[b] / (1 - p[a]) * p[c] / (1 - p[a] - p[b]) for a, b, c in itertools.permutations(p, 3)}
    assert math.isclose(sum(exact.values()), 1)
    statistic, bound = chi_square(counts, exact)
    assert statistic < bound
    # The test would see the same sets in another order.
    statistic, bound = chi_square(counts, {(c, b, a): q for (a, b, c), q in exact.items()})
    assert statistic > bound


def test_inclusion_probabilities(drawn):
    p, found = drawn
    counts = Counter(tokens for n in range(DRAWS) for tokens in sequences_of(found, n))
    inclusion = Counter()
    for a, b, c in itertools.permutations(p, 3):
        q = p[a] * p[b] / (1 - p[a]) * p[c] / (1 - p[a] - p[b])
        for each in (a, b, c):
            inclusion[each] += q
    for each, q in inclusion.items():
        assert abs(counts[each] - DRAWS * q) < 5 * math.sqrt(DRAWS * q * (1 - q)) + 1e-9, each


def test_weighted_means_are_unbiased(drawn):
    p, found = drawn
    value = {tokens: math.sin(3 * i) + 2 for i, tokens in enumerate(sorted(p))}
    mean = sum(p[tokens] * value[tokens] for tokens in p)
    values = np.array([[value[tokens] for tokens in sequences_of(found, n)] for n in range(DRAWS)])
    estimates = (found.weights * values).sum(1)
    assert abs(estimates.mean() - mean) < 5 * estimates.std() / math.sqrt(DRAWS)
    ones = found.weights.sum(1)
    assert abs(ones.mean() - 1) < 5 * ones.std() / math.sqrt(DRAWS)
    assert ones.std() > 0.05
    assert np.abs(found.normalized_weights - found.weights / ones[:, None]).max() < 1e-12
    q = 1 - np.exp(-np.exp(found.log_probs - found.threshold[:, None]))
    assert np.allclose(found.weights, np.exp(found.log_probs) / q, rtol=1e-9)
    assert (found.perturbed > found.threshold[:, None]).all()
    assert (np.diff(found.perturbed) < 0).all()


def test_temperature_is_of_each_step():
    model = Toy(3, 2, 5)
    x = model.log_probs / 0.5
    tempered = Toy(3, 2, 5)
    tempered.log_probs = x - np.log(np.exp(x).sum(1, keepdims=True))
    p = {tokens: math.exp(q) for q, tokens in tempered.sequences(None, 2)}
    options = {"bos": 0, "eos": None, "max_length": 2, "temperature": 0.5, "rng": np.random.default_rng(3)}
    without = fastrnn.stochastic_beam_search(model, model.start(DRAWS), beam_size=1, **options)
    plain = fastrnn.sample(model, model.start(DRAWS), **options)
    for found in (without, plain):
        statistic, bound = chi_square(Counter(sequences_of(found, n)[0] for n in range(DRAWS)), p)
        assert statistic < bound
        for n in range(50):
            assert math.isclose(math.exp(found.log_probs[n, 0]), p[sequences_of(found, n)[0]], rel_tol=1e-9)


def test_more_sequences_than_there_are():
    model = table_model([[0.5, 0.5, 0], [0, 0.25, 0.75], [0, 0, 1]])
    found = fastrnn.stochastic_beam_search(model, bos=[0] * 50, eos=2, beam_size=20, max_length=3)
    exact = {(0, 0, 0): 1 / 8, (0, 0, 1): 1 / 8, (0, 1, 1): 1 / 16, (0, 1, 2): 3 / 16}
    exact |= {(1, 1, 1): 1 / 32, (1, 1, 2): 3 / 32, (1, 2): 3 / 8}
    for n in range(50):
        sequences = sequences_of(found, n)
        assert sorted(sequences) == sorted(exact)
        assert np.allclose(found.weights[n, :7], [exact[s] for s in sequences], rtol=1e-12)
    assert (found.threshold == -np.inf).all()
    assert (found.weights[:, 7:] == 0).all()
    assert (found.normalized_weights[:, 7:] == 0).all()
    assert np.allclose(found.normalized_weights.sum(1), 1)
    assert (found.lengths[:, 7:] == 0).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_very_small_probabilities(dtype):
    log_probs = np.array([0, -1e-3, -200, -1e3, -1e5], dtype)
    found = fastrnn.stochastic_beam_search(
        lambda tokens, state: (np.tile(log_probs, (len(tokens), 1)), state), bos=[0] * 200, eos=None, beam_size=24,
        max_length=2, rng=np.random.default_rng(0),
    )  # fmt: skip
    for n in range(200):
        assert len(set(sequences_of(found, n))) == 24
    assert (np.diff(found.perturbed) < 0).all()
    assert np.isfinite(found.perturbed).all()
    assert np.isfinite(found.threshold).all()
    assert np.isfinite(found.weights).all()
    # Pairs of very different probabilities come in the order of these, and Gumbel noise moves none by more than 50.
    ordered = np.sort(found.log_probs, 1)[:, ::-1]
    assert np.abs(found.log_probs - ordered).max() < 50
    assert np.allclose(found.weights.sum(1), 1, atol=1e-3)
    assert np.allclose(found.normalized_weights.sum(1), 1)


def test_samples_have_the_model_s_probabilities():
    model = Toy(3, 3, 8, spread=1.0)
    p = {tokens: math.exp(q) for q, tokens in model.sequences(1, 3)}
    found = fastrnn.sample(
        model, model.start(4), bos=0, eos=1, max_length=3, num_samples=5000, rng=np.random.default_rng(1)
    )
    sequences = [sequences_of(found, n) for n in range(4)]
    statistic, bound = chi_square(Counter(s for each in sequences for s in each), p)
    assert statistic < bound
    assert all(math.isclose(math.exp(q), p[s]) for q, s in zip(found.log_probs[2], sequences[2]))
    assert len({tuple(s) for s in sequences}) == 4


def test_cuts_and_temperature_zero():
    model = Toy(6, 3, 9)
    greedy = sequences_of(fastrnn.greedy(model, model.start(), bos=0, eos=None, max_length=3))
    for options in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-300}):
        found = fastrnn.sample(model, model.start(), bos=0, eos=None, max_length=3, num_samples=5, **options)
        assert sequences_of(found) == greedy * 5
        assert (found.log_probs > -1e-12).all()
    banned = Constraints(banned=[0, 1, 2])
    found = fastrnn.sample(
        model, model.start(), bos=0, eos=5, max_length=3, num_samples=300, constraints=banned, min_length=2, top_k=3,
        rng=np.random.default_rng(0),
    )  # fmt: skip
    assert set(found.tokens[found.lengths > 0][:, 0]) == {3, 4}
    assert found.lengths.min() == 2


def test_generators_decide():
    model, state = language_model("lstm")
    for name, options in (("sample", {"num_samples": 3}), ("stochastic_beam_search", {"beam_size": 3})):
        options |= {"bos": 0, "eos": None, "max_length": 20}
        runs = [getattr(model, name)(state, **options, rng=np.random.default_rng(s)) for s in (1, 1, 2)]
        assert_same_bits(runs[0].tokens, runs[1].tokens)
        assert (runs[0].tokens != runs[2].tokens).any()
        assert (getattr(model, name)(state, **options).tokens != runs[0].tokens).any()


def test_sequences_of_an_input_that_ends_before_another_are_its_own():
    """Re-scored, they have the log-probabilities that stand beside them."""
    with np.errstate(divide="ignore"):
        p = np.log([[0, 0.5, 0.5, 0], [1.0, 0, 0, 0], [1.0, 0, 0, 0], [0.1, 0, 0, 0.9]])
    step = lambda tokens, state: (p[tokens], state)  # noqa: E731
    rng = np.random.default_rng(1)
    drawn = fastrnn.sample(step, bos=[0, 3], eos=0, max_length=6, num_samples=8, rng=rng)
    without = fastrnn.stochastic_beam_search(step, bos=[0, 3], eos=0, max_length=6, beam_size=2, rng=rng)
    for found in (drawn, without):
        for n, bos in enumerate((0, 3)):
            for tokens, length, log_prob in zip(found.tokens[n], found.lengths[n], found.log_probs[n]):
                path = [bos, *tokens[:length]]
                assert log_prob == pytest.approx(sum(p[a, b] for a, b in itertools.pairwise(path)), abs=1e-12)
                assert not tokens[length:].any()
    assert {tuple(tokens) for tokens in drawn.tokens[0, :, :2].tolist()} == {(1, 0), (2, 0)}
    assert {tuple(tokens) for tokens in without.tokens[0, :, :2].tolist()} == {(1, 0), (2, 0)}


@pytest.mark.parametrize("name", ["sample", "stochastic_beam_search"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_models_sequences_of_several_inputs_are_scored_as_they_are_drawn(name, threads, small_shares):
    model = fastrnn.LanguageModel(5, 6, 7, seed=3)
    model.output.weight = model.output.weight * 8
    batching.set_num_threads(threads)
    size = {"num_samples": 6} if name == "sample" else {"beam_size": 6}
    found = getattr(model, name)(bos=[0, 1, 2, 4], eos=3, max_length=30, **size, rng=np.random.default_rng(0))
    assert len(set(found.lengths.max(1).tolist())) > 1
    for n, bos in enumerate((0, 1, 2, 4)):
        for tokens, length, log_prob in zip(found.tokens[n], found.lengths[n], found.log_probs[n]):
            path = np.array([bos, *tokens[:length]])
            logits = model(path[:-1, None])[0][:, 0].astype(np.float64)
            scores = logits - np.log(np.exp(logits).sum(1, keepdims=True))
            assert log_prob == pytest.approx(scores[np.arange(length), path[1:]].sum(), abs=1e-3)


# Numbers that are large, alike or impossible.


def always(log_probs):
    return lambda tokens, state: (np.tile(log_probs, (len(tokens), 1)), state)


def sample(step, **options):
    options = {"bos": 0, "eos": None, "max_length": 1, "rng": np.random.default_rng(0), **options}
    return fastrnn.sample(step, **options)


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9999}, {"min_p": 1e-3}], ids=str)
@pytest.mark.parametrize("offset", [0, 20, 1e6, -1e6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_log_probabilities_do_not_depend_on_an_offset(offset, options, dtype):
    """It is exact in both dtypes."""
    drawn = sample(always(np.array([0, -1, -2], dtype) + dtype(offset)), num_samples=300, **options)
    p = np.exp([0, -1, -2]) / np.exp([0, -1, -2]).sum()
    tokens = drawn.tokens[0, :, 0]
    assert set(tokens.tolist()) == {0, 1, 2}
    np.testing.assert_allclose(np.exp(drawn.log_probs[0]), p[tokens], rtol=4 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"top_k": 1}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_likeliest_is_taken_however_close_others_are(options, dtype):
    rng = np.random.default_rng(0)
    for _ in range(100):
        x = (rng.normal(size=rng.integers(2, 40)) * 4 * np.finfo(dtype).eps).astype(dtype)
        assert sample(always(x), **options).tokens.item() == x.argmax()


@pytest.mark.parametrize(
    "sample",
    [
        lambda: sample(always([-np.inf, -np.inf]), eos=1, max_length=3, num_samples=2),
        lambda: sample(always([-1.0, -1.0]), eos=1, num_samples=2, constraints=fastrnn.Constraints(banned=[0, 1])),
        lambda: fastrnn.LanguageModel(1, 4, 4).sample(bos=0, eos=0, max_length=3, min_length=2, num_samples=2),
        lambda: fastrnn.stochastic_beam_search(always([-np.inf] * 2), bos=0, eos=1, beam_size=2, max_length=3),
    ],
)
def test_nothing_is_possible(sample):
    drawn = sample()
    assert drawn.tokens.shape == (1, 2, 0)
    assert drawn.lengths.tolist() == [[0, 0]]
    assert drawn.log_probs.tolist() == [[-np.inf, -np.inf]]


@pytest.mark.parametrize("temperature", [1e30, 1e39, 1e300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_at_the_highest_temperatures_all_that_is_possible_is_alike(dtype, temperature):
    step = always(np.array([-1, -2, -np.inf], dtype))
    drawn = sample(step, num_samples=20, temperature=temperature)
    np.testing.assert_allclose(drawn.log_probs, np.log(0.5), rtol=1e-6)
    found = fastrnn.beam_search(step, bos=0, eos=None, beam_size=2, max_length=1, temperature=temperature, num_return=2)
    np.testing.assert_allclose(found.log_probs, np.log(0.5), rtol=1e-6)
