"""Beam search, and its narrowest beam, the greedy choice."""

from typing import Any, NamedTuple

import numpy as np

from .checks import as_array, describe, flag, integer, number, positive
from .decoding import Constraints, Step, common, run, steps_of, token_array, traced
from .kernels import search as kernels
from .parameters import Array

EARLY_STOPPING = ("exact", "count")
NEVER = 2**62


class Trellis(NamedTuple):
    """All hypotheses that a beam search kept open. Steps that a search did not take are zeros."""

    tokens: Array
    """int64 (N, steps, beam_size): what each was extended by."""
    back_pointers: Array
    """int64 (N, steps, beam_size): the place, at the step before, of what it extends."""


class Hypotheses(NamedTuple):
    """What a beam search found for N inputs, the best first. Where there is no hypothesis, length 0 and score -inf."""

    tokens: Array
    """int64 (N, num_return, L), padded with eos, or 0."""
    lengths: Array
    """int64 (N, num_return): tokens, with eos, without bos."""
    scores: Array
    """float64 (N, num_return): log-probabilities by their length penalty."""
    log_probs: Array
    """float64 (N, num_return): sums over the tokens, eos included."""
    trellis: Trellis | None
    """If it was asked for."""


def beam_search(
    step: Step | Any,
    state: Any = None,
    *,
    bos: Any,
    eos: int | None,
    beam_size: int,
    max_length: int,
    min_length: int = 0,
    length_penalty: float = 0.0,
    early_stopping: str = "exact",
    num_return: int = 1,
    temperature: float = 1.0,
    groups: int = 1,
    diversity: float = 0.0,
    constraints: Constraints | None = None,
    prefix: Any = None,
    return_trellis: bool = False,
) -> Hypotheses:
    """The likeliest sequences of a model, as a beam search finds them, for N independent inputs at once.

    At each step the K best of the K * V expansions of K hypotheses are taken. Those that end are set aside, and the
    next best ones that go on take their places. The search ends when no open hypothesis can still become one of the
    best ``num_return``: its log-probability only falls, so its score is at most what it has now by the largest
    penalty it can reach.

    A hypothesis of log-probability p and L tokens, eos included, has the score ``p / ((5 + L) / 6) ** length_penalty``
    (Wu et al. 2016, arXiv:1609.08144, equation 14). Of equal candidates, the one that continues the better hypothesis
    comes first, and then the lesser token.

    Args:
        step: ``step(tokens, state)`` returns ``log_probs, state``: of the tokens int64 (N * K,) given as the next
            ones, the log-probabilities (N * K, V), float32 or float64, of what follows them. K rows for the first
            input, K for the second, and so on. Or a `fastrnn.LanguageModel`, which runs in a compiled loop.
        state: before the first token: arrays (N, ...) in any nesting of tuples, lists and dicts, or None; and what
            ``step`` returns, but with first axis N * K. Of a `LanguageModel`, what its call returns.
        bos: the token before the first one, or one for each input.
        eos: the token that ends a hypothesis, or None.
        beam_size: hypotheses kept open, K.
        max_length: tokens after which a hypothesis is cut off, and stands beside those that have ended.
        min_length: a hypothesis does not end before it has so many tokens, eos included.
        length_penalty: the exponent; more than 0 for longer hypotheses.
        early_stopping: "exact" as above; "count" to stop as soon as K hypotheses have ended, as is usual, though a
            better one may be open.
        num_return: how many of the best to return, at most K.
        temperature: by which log-probabilities are divided, and then normalised.
        groups: of K / groups hypotheses, each a search of its own, where later groups avoid the tokens that the
            earlier ones choose at the same step to go on: of a candidate's log-probability, ``diversity`` is
            subtracted for each time, for the choice only (Vijayakumar et al. 2018, arXiv:1610.02424). Each group
            returns num_return / groups.
        constraints: `fastrnn.Constraints`: banned tokens, allowed ones, n-grams that must not be repeated.
        prefix: tokens with which hypotheses begin, or a list of such lists, one for each input. They count, and
            no constraint is asked about them.
        return_trellis: whether to return all that was kept open, too.

    Returns `Hypotheses`. Log-probabilities may be -inf: such tokens are not taken. Where nothing is left to take,
    the search ends, with fewer hypotheses.

    Raises TypeError or ValueError for a wrong argument; FloatingPointError for log-probabilities that are NaN.

    >>> import numpy as np
    >>> import fastrnn
    >>> bigrams = np.log([[0.1, 0.6, 0.3], [0.5, 0.3, 0.2], [0.8, 0.1, 0.1]])
    >>> best = fastrnn.beam_search(
    ...     lambda tokens, state: (bigrams[tokens], state), bos=1, eos=2, beam_size=3, max_length=4, num_return=2
    ... )
    >>> best.tokens[0], best.lengths[0], np.exp(best.log_probs[0]).round(3)
    (array([[2, 2], [0, 2]]), array([1, 2]), array([0.2 , 0.15]))
    """
    K, T = positive(beam_size, "beam_size"), positive(max_length, "max_length")
    G, R = positive(groups, "groups"), positive(num_return, "num_return")
    alpha, diversity = number(length_penalty, "length_penalty", -10, 10), number(diversity, "diversity", 0)
    temperature = number(temperature, "temperature", kernels.COLDEST)
    if integer(min_length, "min_length", 0) > T:
        raise ValueError(f"min_length: expected at most max_length, {T}, got {min_length}")
    if K % G or R % G:
        raise ValueError(f"groups: expected a divisor of beam_size, {K}, and of num_return, {R}, got {G}")
    if R > K:
        raise ValueError(f"num_return: expected at most beam_size, {K}, got {R}")
    if not isinstance(early_stopping, str) or early_stopping not in EARLY_STOPPING:
        raise ValueError(f"early_stopping: expected one of {', '.join(EARLY_STOPPING)}, got {describe(early_stopping)}")
    return_trellis = flag(return_trellis, "return_trellis")

    steps = steps_of(step, state, bos, K, T, constraints)
    fields = common(steps, G, T, eos, min_length, constraints, temperature, normalise=False)
    N, S = steps.inputs, steps.inputs * G
    penalties, reach = _penalties(alpha, T)
    search = kernels.Beam(
        **fields,
        prefix=_prefix(prefix, N, G, T, fields["eos"], steps.V),
        groups=G,
        diversity=diversity,
        counts=np.empty(steps.V if G > 1 else 0),
        counted=np.zeros(1, np.int64),
        penalties=penalties,
        reach=reach,
        enough=K // G if early_stopping == "count" else NEVER,
        ended=np.zeros(S, np.int64),
        taken=np.zeros(S, np.int64),
        best_scores=np.full((S, R // G), -np.inf),
        best_log_probs=np.full((S, R // G), -np.inf),
        best_places=np.zeros((S, R // G, 3), np.int64),
        ranks=np.empty(2 * K // G),
        totals=np.empty(2 * K // G),
        candidates=np.empty(2 * K // G, np.int64),
    )
    taken = run(steps, search)  # by those that went on longest

    tokens, lengths = traced(search, search.best_places, search.eos)
    scores, log_probs = search.best_scores.reshape(N, R), search.best_log_probs.reshape(N, R)
    tokens, lengths = tokens.reshape(N, R, -1), lengths.reshape(N, R)
    if G > 1:
        order = np.argsort(-scores, axis=1, kind="stable")
        scores, log_probs, lengths = (np.take_along_axis(a, order, 1) for a in (scores, log_probs, lengths))
        tokens = np.take_along_axis(tokens, order[..., None], 1)
    trellis = None
    if return_trellis:
        # A group's back-pointers count its own hypotheses.
        first = np.where(np.arange(taken) < search.taken[:, None], (np.arange(S) % G * (K // G))[:, None], 0)
        pointers = search.parents[:, :taken] + first[..., None]
        kept = search.tokens[:, :taken], pointers
        trellis = Trellis(*(a.reshape(N, G, taken, -1).swapaxes(1, 2).reshape(N, taken, K) for a in kept))
    return Hypotheses(tokens, lengths, scores, log_probs, trellis)


def greedy(
    step: Step | Any,
    state: Any = None,
    *,
    bos: Any,
    eos: int | None,
    max_length: int,
    min_length: int = 0,
    constraints: Constraints | None = None,
    prefix: Any = None,
) -> Hypotheses:
    """The likeliest token at each step, until it is eos: `beam_search` with ``beam_size=1``, whose arguments these are.

    >>> import numpy as np
    >>> import fastrnn
    >>> bigrams = np.log([[0.1, 0.6, 0.3], [0.5, 0.3, 0.2], [0.8, 0.1, 0.1]])
    >>> best = fastrnn.greedy(lambda tokens, state: (bigrams[tokens], state), bos=[0, 1], eos=None, max_length=4)
    >>> best.tokens[:, 0]
    array([[1, 0, 1, 0], [0, 1, 0, 1]])
    """
    return beam_search(
        step, state, bos=bos, eos=eos, beam_size=1, max_length=max_length, min_length=min_length,
        constraints=constraints, prefix=prefix,
    )  # fmt: skip


def _penalties(alpha: float, longest: int) -> tuple[Array, Array]:
    """By length: the penalty, and the largest one of what comes of a hypothesis, which has at least one token more."""
    if alpha == 0:
        ones = np.ones(longest + 1)
        return ones, ones
    penalties = ((5.0 + np.arange(longest + 1)) / 6.0) ** alpha
    return penalties, np.full(longest + 1, penalties[-1]) if alpha > 0 else np.append(penalties[1:], penalties[-1])


def _prefix(prefix: Any, inputs: int, groups: int, longest: int, eos: int, V: int) -> Array:
    """The forced tokens, int64 (S, the longest prefix), -1 where there is none."""
    if prefix is None:
        return np.empty((inputs * groups, 0), np.int64)
    given = list(prefix) if isinstance(prefix, (list, tuple)) else as_array(prefix, "prefix")
    if isinstance(given, np.ndarray) and given.ndim == 0:
        raise TypeError(f"prefix: expected a list of tokens, or one for each input, got {describe(prefix)}")
    one = len(given) == 0 or np.ndim(given[0]) == 0
    prefixes = [token_array(tokens, "prefix", V) for tokens in ([given] * inputs if one else given)]
    if len(prefixes) != inputs:
        raise ValueError(f"prefix: expected tokens, or {inputs} lists of them, got {len(prefixes)} lists")
    forced = np.full((inputs, max(map(len, prefixes))), -1)
    for row, tokens in zip(forced, prefixes):
        row[: len(tokens)] = tokens
    if forced.shape[1] > longest:
        raise ValueError(f"prefix: expected at most max_length, {longest}, tokens, got {forced.shape[1]}")
    if eos >= 0 and (forced == eos).any():
        raise ValueError(f"prefix: expected tokens that are not eos, {eos}")
    return np.repeat(forced, groups, 0)
