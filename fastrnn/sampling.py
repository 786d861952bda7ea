"""Sampling: token by token, and sequences without replacement (stochastic beam search)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .checks import describe, integer, number, positive
from .decoding import Constraints, Step, common, run, steps_of, traced
from .kernels import search as kernels
from .parameters import Array

# Random numbers that are drawn at once.
NOISE_AT_ONCE = 2**18


class Samples(NamedTuple):
    """Sequences that were drawn independently for each of N inputs."""

    tokens: Array
    """int64 (N, num_samples, L), padded with eos, or 0."""
    lengths: Array
    """int64 (N, num_samples): tokens, with eos, without bos; 0 where no token was possible."""
    log_probs: Array
    """float64 (N, num_samples): by the distributions that tokens were drawn from, temperature and cuts included."""


class StochasticBeams(NamedTuple):
    """Sequences that were drawn without replacement for each of N inputs, in the order in which they were drawn.

    If there are fewer than ``beam_size``, the rest have length 0, log-probability -inf and weight 0.
    """

    tokens: Array
    """int64 (N, beam_size, L), padded with eos, or 0."""
    lengths: Array
    """int64 (N, beam_size): tokens, with eos, without bos."""
    log_probs: Array
    """float64 (N, beam_size): log p."""
    perturbed: Array
    """float64 (N, beam_size): log p with Gumbel noise, in descending order."""
    threshold: Array
    """float64 (N,): kappa, the perturbed log-probability of the sequence that would have come next; -inf if none."""
    weights: Array
    """float64 (N, beam_size): p / q, where q = 1 - exp(-exp(log p - kappa)): the sum of weight * f(sequence) is an
    unbiased estimate of the mean of f."""
    normalized_weights: Array
    """float64 (N, beam_size): the weights by their sum: biased, and of less variance."""


def _generator(rng: Any) -> np.random.Generator:
    if rng is not None and not isinstance(rng, np.random.Generator):
        raise TypeError(f"rng: expected a numpy.random.Generator, got {describe(rng)}")
    return rng or np.random.default_rng()


def sample(
    step: Step | Any,
    state: Any = None,
    *,
    bos: Any,
    eos: int | None,
    max_length: int,
    num_samples: int = 1,
    min_length: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    constraints: Constraints | None = None,
    rng: np.random.Generator | None = None,
) -> Samples:
    """Draw sequences token by token.

    At each step log-probabilities are divided by the temperature and normalised, then only the likeliest tokens are
    kept and normalised again: first the ``top_k``, then the fewest that have the probability ``top_p`` together
    (Holtzman et al. 2020, arXiv:1904.09751), then those at least ``min_p`` times as likely as the likeliest (Nguyen et
    al. 2024, arXiv:2407.01082). Of equally likely tokens, the lesser come first.

    Args:
        step, state, bos, eos, max_length, min_length: as for `beam_search`, with num_samples for K. The
            log-probabilities need not be normalised.
        num_samples: sequences for each input.
        temperature: less than 1 for likelier tokens; 0 always takes the likeliest.
        top_k: None for all.
        top_p: more than 0, at most 1.
        min_p: from 0 to 1.
        constraints: `fastrnn.Constraints`; what they leave is normalised.
        rng: None takes one seeded by the system.

    Returns `Samples`.

    Raises TypeError or ValueError for a wrong argument; FloatingPointError for log-probabilities that are NaN.

    >>> import numpy as np
    >>> import fastrnn
    >>> bigrams = np.log([[0.1, 0.6, 0.3], [0.5, 0.3, 0.2], [0.8, 0.1, 0.1]])
    >>> drawn = fastrnn.sample(
    ...     lambda tokens, state: (bigrams[tokens], state), bos=1, eos=None, max_length=5, num_samples=3, top_k=2
    ... )
    >>> drawn.tokens.shape, bool((drawn.log_probs < 0).all())
    ((1, 3, 5), True)
    """
    T, K, rng = positive(max_length, "max_length"), positive(num_samples, "num_samples"), _generator(rng)
    temperature, min_p = number(temperature, "temperature", 0), number(min_p, "min_p", 0, 1)
    if not number(top_p, "top_p", 0, 1) > 0:
        raise ValueError("top_p: expected a number greater than 0, got 0")
    if integer(min_length, "min_length", 0) > T:
        raise ValueError(f"min_length: expected at most max_length, {T}, got {min_length}")
    kept = None if top_k is None else positive(top_k, "top_k")

    steps = steps_of(step, state, bos, K, T, constraints)
    if temperature == 0:
        kept, temperature = 1, 1.0
    fields = common(steps, 1, T, eos, min_length, constraints, temperature, normalise=True)
    fields["log_probs"][...] = 0
    N, V = steps.inputs, steps.V
    search = kernels.Draw(
        **fields,
        noise=np.empty((N, _period(T, N * K), K)),
        top_k=V if kept is None else min(kept, V),
        top_p=float(top_p),
        min_p=min_p,
        weights=np.empty(V, steps.dtype),
        heap=np.empty(V, np.int64),
    )
    tokens, lengths = _drawn(steps, search, rng.random)
    return Samples(tokens, lengths, search.log_probs)


def stochastic_beam_search(
    step: Step | Any,
    state: Any = None,
    *,
    bos: Any,
    eos: int | None,
    beam_size: int,
    max_length: int,
    temperature: float = 1.0,
    length_penalty: float = 0.0,
    rng: np.random.Generator | None = None,
) -> StochasticBeams:
    """Draw sequences without replacement: one, then one of the others by their renormalised probabilities, and so on.

    It is exact, by one pass that keeps the hypotheses of the largest perturbed log-probabilities: Gumbel noise that is
    drawn top-down (Kool, van Hoof and Welling 2019, arXiv:1903.06059). A sequence that has ``max_length`` tokens is
    drawn with the probability of all that begin with it.

    Args:
        step, state, bos, eos, max_length: as for `beam_search`, with beam_size + 1 for K: the last one sets the
            threshold. The log-probabilities need not be normalised.
        beam_size: sequences to draw for each input.
        temperature: by which log-probabilities are divided; the model drawn from is the one that results.
        length_penalty: only 0: with another, the sample would not be the model's.
        rng: None takes one seeded by the system.

    Returns `StochasticBeams`, with the weights for unbiased estimates.

    Raises TypeError or ValueError for a wrong argument; FloatingPointError for log-probabilities that are NaN.

    >>> import numpy as np
    >>> import fastrnn
    >>> bigrams = np.log([[0.1, 0.6, 0.3], [0.5, 0.3, 0.2], [0.8, 0.1, 0.1]])
    >>> drawn = fastrnn.stochastic_beam_search(
    ...     lambda tokens, state: (bigrams[tokens], state), bos=1, eos=None, beam_size=9, max_length=2
    ... )
    >>> len(np.unique(drawn.tokens[0], axis=0)), float(drawn.weights.sum().round(6))  # all there are
    (9, 1.0)
    """
    T, K, rng = positive(max_length, "max_length"), positive(beam_size, "beam_size") + 1, _generator(rng)
    temperature = number(temperature, "temperature", kernels.COLDEST)
    if number(length_penalty, "length_penalty") != 0:
        raise ValueError(
            f"length_penalty: expected 0, as with another the sample would not be the model's, got {length_penalty}"
        )
    steps = steps_of(step, state, bos, K, T, None)
    fields = common(steps, 1, T, eos, 0, None, temperature, normalise=True)
    N, V = steps.inputs, steps.V
    perturbed = np.full((N, K), -np.inf)
    # A threshold is random, too: the root's noise is not left out.
    perturbed[:, 0] = rng.gumbel(size=N)
    search = kernels.Stochastic(
        **fields,
        noise=np.empty((N, _period(T, N * K * V), K, V)),
        perturbed=perturbed,
        gumbels=np.empty(V),
        ranks=np.empty(K),
        totals=np.empty(K),
        candidates=np.empty(K, np.int64),
    )
    tokens, lengths = _drawn(steps, search, rng.standard_exponential)
    tokens, lengths, log_probs = tokens[:, :-1], lengths[:, :-1], search.log_probs[:, :-1]
    threshold = perturbed[:, -1].copy()

    drawn = log_probs > -np.inf
    beyond = np.where(drawn, log_probs, 0) - threshold[:, None]
    with np.errstate(divide="ignore"):  # of the branch that is not taken
        log_q = np.where(beyond < -30, beyond, np.log(-np.expm1(-np.exp(np.minimum(beyond, 700)))))
    log_weights = np.where(drawn, log_probs - log_q, -np.inf)
    relative = np.exp(log_weights - np.maximum(log_weights.max(1, keepdims=True), -1e300))
    total = np.maximum(relative.sum(1, keepdims=True), 1e-300)
    weights = np.exp(log_weights)
    longest = lengths.max()
    return StochasticBeams(
        tokens[..., :longest], lengths, log_probs, perturbed[:, :-1], threshold, weights, relative / total
    )


def _period(steps: int, numbers: int) -> int:
    """For how many steps to draw noise at once, at so many numbers a step."""
    return max(1, min(steps, NOISE_AT_ONCE // numbers))


def _drawn(model: Any, search: Any, noise: Callable[..., Any]) -> tuple[Array, Array]:
    """Run all searches; the tokens and lengths of their hypotheses, which repeat eos once they have ended."""
    # A search that is closed is not advanced: what it has stays as it is while those of other inputs go on.
    search.parents[...] = np.arange(search.parents.shape[2])
    search.tokens[...] = max(search.eos, 0)
    steps = run(model, search, noise)
    last = search.parents[:, steps - 1], search.tokens[:, steps - 1]
    places = np.stack([np.where(search.log_probs > -np.inf, steps, 0), *last], -1)
    tokens, lengths = traced(search, places, search.eos)
    if tokens.size:
        ended = tokens == search.eos
        lengths = np.where(ended.any(2), np.minimum(lengths, ended.argmax(2) + 1), lengths)
    return tokens[..., : lengths.max()], lengths
