"""Sampling where numbers are large, alike or impossible; `test_decoding` has what it draws, and how often."""

import numpy as np
import pytest

import fastrnn

DTYPES = [np.float32, np.float64]


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
