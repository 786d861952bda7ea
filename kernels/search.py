"""Decoding: the choice of a step's tokens among log-probabilities. `decode` has the loop over steps of a model.

Sizes: S searches of K hypotheses each, which stand in rows ``s K + k``; V tokens; T steps at most.

A method of decoding is a function ``choose(search, t, s, x, r)``: search s, whose hypotheses have t tokens, is given
those of t + 1 tokens. Rows r to r + K - 1 of x are the logits of their next tokens, or log-probabilities; x may be
written to. ``search`` is a named tuple of numbers and C-contiguous arrays that belong to the caller, of each method its
own; all begin with `COMMON`:

    tokens, parents int64 (S, T, K)    what is chosen: the token, and which of the K hypotheses it continues
    log_probs float64 (S, K)           of the hypotheses; -inf where there is none
    open int64 (S)                     `OPEN`, `CLOSED`, or what is wrong with x
    starts int64 (S)                   the token before the first one
    eos, min_length                    the token that ends (-1: none does), and not before there are so many tokens
    banned int64                       tokens that are never chosen
    temperature, normalise             x is divided by it; whether x is then to be normalised

Of equal candidates, the one that continues an earlier hypothesis comes first, and then the lesser token.
Nothing is allocated here.
"""

import math
from collections import namedtuple
from typing import Any

import numpy as np

from .activations import exp_nonpositive
from .compiler import kernel, part, specialise
from .denormals import flush_denormals, restore_mode
from .gemm import load, store
from .losses import highest_of
from .vector import at, lanes, load_part_or, load_whole, smaller, sum_of_lanes

CLOSED, OPEN, NOT_A_NUMBER, NOT_A_LOG_PROBABILITY = range(4)
# A log-probability may be above 0 by rounding; what is farther above is none.
ROUNDING = 1e-3
# So many numbers at once are compared with what a candidate has to exceed.
BLOCK = 64
# The smallest and the largest temperature by which a float32 can be divided.
COLDEST, HOTTEST = 1e-37, 1e37

COMMON = "tokens parents log_probs open starts eos min_length banned temperature normalise"
# What calls that run at once share, and what each must have for itself. Other arrays have a part for each search.
SHARED = {"banned", "penalties", "reach"}
WORKSPACE = {"counts", "counted", "ranks", "totals", "candidates", "gumbels", "weights", "heap"}


def _fields(name: str, own: str) -> Any:
    """A named tuple of what all methods have and of a method's own."""
    return namedtuple(name, f"{COMMON} {own}", module=__name__)


# `beam` is a beam search.
#   prefix int64 (S, any)            tokens that hypotheses begin with; -1: free
#   groups, diversity, counts        of so many searches, one after the other, the later ones avoid tokens that the
#                                    earlier ones chose, float64 (V) times, at this price each
#   counted int64 (1)                what counts are of: an input and a step, or at first 0
#   penalties, reach float64 (T + 1) by length: what a finished hypothesis' log-probability is divided by, and the
#                                    largest such number for what is yet longer
#   enough                           close the search when so many hypotheses have ended
#   ended, taken int64 (S)           how many have, and the steps that the search has taken
#   best_scores, best_log_probs float64 (S, R), best_places int64 (S, R, 3)
#                                    the best finished hypotheses: length, parent and last token
#   ranks, totals float64 (2 K), candidates int64 (2 K)    workspace
Beam = _fields(
    "Beam",
    "prefix groups diversity counts counted penalties reach enough ended taken "
    "best_scores best_log_probs best_places ranks totals candidates",
)

# `stochastic` is a stochastic beam search: a hypothesis that has ended keeps its place, with eos again and again.
#   noise float64 (S, any, K, V)     exponentially distributed; step t reads number t % any
#   perturbed float64 (S, K)         the hypotheses' perturbed log-probabilities, in descending order
#   gumbels float64 (V), ranks, totals float64 (K), candidates int64 (K)    workspace
Stochastic = _fields("Stochastic", "noise perturbed gumbels ranks totals candidates")

# `draw` draws K sequences independently.
#   noise float64 (S, any, K)        uniformly distributed; step t reads number t % any
#   top_k, top_p, min_p              V, 1 and 0 cut nothing
#   weights (V) of x's dtype, heap int64 (V)    workspace
Draw = _fields("Draw", "noise top_k top_p min_p weights heap")


# What methods are made of.


@part
def log_sum_exp(x, V):
    """``log(sum(exp(x)))`` of V numbers at an address; 0 if all are -inf, NaN if one is NaN or inf."""
    highest = highest_of(x, V)
    if highest == -np.inf:
        total = 0.0
        for j in range(V):
            if x[j] != x[j]:
                total = np.nan
        return total
    whole = V - V % lanes(x)
    sums = exp_nonpositive(load_part_or(at(x, whole), V - whole, -np.inf) - highest)
    for j in range(0, whole, lanes(x)):
        sums = sums + exp_nonpositive(load_whole(at(x, j)) - highest)
    return highest + math.log(sum_of_lanes(sums))


@part
def _cool(search, x, V):
    """Divide by the temperature."""
    if search.temperature != 1:
        highest = highest_of(x, V)
        if highest > -np.inf:
            for j in range(0, V, lanes(x)):
                cooled = (load(at(x, j), V - j) - highest) / min(max(search.temperature, COLDEST), HOTTEST)
                store(cooled, at(x, j), V - j)


@part
def _forbid(search, t, x):
    for token in search.banned:
        x[token] = -np.inf
    if search.eos >= 0 and t + 1 < search.min_length:
        x[search.eos] = -np.inf


@part
def _normaliser(search, x, V):
    """What is to be subtracted from x to make it log-probabilities; inf or NaN if it is none."""
    if search.normalise:
        return log_sum_exp(x, V)
    wrong, positive = False, False
    for j in range(V):
        wrong |= x[j] != x[j]
        positive |= x[j] > ROUNDING
    return np.nan if wrong else np.inf if positive else 0.0


@part
def _is_wrong(search, s, normaliser):
    """Whether x is; if so, the search says what is wrong."""
    if normaliser < np.inf:
        return False
    search.open[s] = NOT_A_NUMBER if normaliser != normaliser else NOT_A_LOG_PROBABILITY
    return True


@part
def some_open(search, first, last):
    found = False
    for s in range(first, last):
        found |= search.open[s] == OPEN
    return found


@part
def _has_ended(search, t, s, k):
    return t > 0 and search.eos >= 0 and search.tokens[s, t - 1, k] == search.eos


@part
def _some_exceed(x, n, bound):
    found = False
    for j in range(n):
        found |= x[j] > bound
    return found


@part
def _insert(ranks, totals, candidates, count, rank, total, candidate):
    """Put a candidate in its place among ``count``, in descending order, if need be for the last; how many there are.

    It comes after those of its rank.
    """
    i = count if count < len(ranks) else count - 1
    while i > 0 and ranks[i - 1] < rank:
        ranks[i], totals[i], candidates[i] = ranks[i - 1], totals[i - 1], candidates[i - 1]
        i -= 1
    ranks[i], totals[i], candidates[i] = rank, total, candidate
    return count + 1 if count < len(ranks) else count


# Beam search.


@part
def _set_aside(search, s, length, parent, token, log_prob):
    """Keep a finished hypothesis, if it is among the best."""
    scores, log_probs, places = search.best_scores, search.best_log_probs, search.best_places
    score = log_prob / search.penalties[length]
    i = scores.shape[1]
    while i > 0 and scores[s, i - 1] < score:
        i -= 1
    for j in range(scores.shape[1] - 1, i, -1):
        scores[s, j], log_probs[s, j] = scores[s, j - 1], log_probs[s, j - 1]
        for l in range(3):
            places[s, j, l] = places[s, j - 1, l]
    if i < scores.shape[1]:
        scores[s, i], log_probs[s, i] = score, log_prob
        places[s, i, 0], places[s, i, 1], places[s, i, 2] = length, parent, token


@part
def beam(search, t, s, x, r):
    """The K best expansions of K hypotheses; what ends among the K best is set aside, and the next ones take its place.

    At most one expansion of each hypothesis ends: among the 2 K best there are K that go on.
    """
    K, V, T = search.log_probs.shape[1], x.shape[1], search.tokens.shape[1]
    ranks, totals, candidates = search.ranks, search.totals, search.candidates
    forced = search.prefix[s, t] if t < search.prefix.shape[1] else -1
    diverse = search.groups > 1
    if diverse and search.counted[0] != s // search.groups * T + t + 1:
        search.counted[0] = s // search.groups * T + t + 1
        search.counts[:] = 0
    count = 0
    for k in range(K):
        before = search.log_probs[s, k]
        if before == -np.inf:
            continue
        row = at(x, (r + k) * V)
        _cool(search, row, V)
        normaliser = _normaliser(search, row, V)
        if _is_wrong(search, s, normaliser):
            return
        first, last = (0, V) if forced < 0 else (forced, forced + 1)
        if forced < 0:
            _forbid(search, t, row)
        for j in range(first, last, BLOCK):
            n = smaller(BLOCK, last - j)
            least = ranks[count - 1] if count == len(ranks) else -np.inf
            if count == len(ranks):
                # What follows rounds otherwise: a little less than has to be exceeded.
                slack = 1e-6 * (abs(least) + abs(before) + abs(normaliser))
                if not _some_exceed(at(row, j), n, x.dtype.type(least - before + normaliser - slack)):
                    continue
            for v in range(j, j + n):
                total = before + min(row[v] - normaliser, 0.0)
                rank = total - search.diversity * search.counts[v] if diverse else total
                if rank > least:
                    count = _insert(ranks, totals, candidates, count, rank, total, k * V + v)
                    if count == len(ranks):
                        least = ranks[count - 1]

    search.taken[s], kept, bound = t + 1, 0, -np.inf
    for i in range(count):
        k, v = candidates[i] // V, candidates[i] % V
        if v == search.eos:
            if i < K:
                _set_aside(search, s, t + 1, k, v, totals[i])
                search.ended[s] += 1
        elif kept < K:
            search.tokens[s, t, kept], search.parents[s, t, kept], search.log_probs[s, kept] = v, k, totals[i]
            bound = max(bound, totals[i])
            if diverse:
                search.counts[v] += 1
            if t + 1 == T:
                _set_aside(search, s, T, k, v, totals[i])
            kept += 1
    for i in range(kept, K):
        search.log_probs[s, i] = -np.inf
    # A hypothesis' log-probability only falls, and is at most 0: whatever comes of an open one, its score is at most
    # its log-probability now by the largest penalty that it can reach.
    beaten = search.best_scores[s, -1] >= bound / search.reach[t + 1]
    if t + 1 == T or kept == 0 or beaten or search.ended[s] >= search.enough:
        search.open[s] = CLOSED


# Stochastic beam search.


@part
def _log1mexp(x):
    """``log(1 - exp(x))`` for x up to 0."""
    return math.log(-math.expm1(x)) if x > -0.6931471805599453 else math.log1p(-math.exp(x))


@part
def _given_maximum(gumbel, highest, maximum):
    """``-log(exp(-maximum) - exp(-highest) + exp(-gumbel))``: one of the Gumbel variables whose maximum is ``highest``,
    as if that had been ``maximum`` (Kool, van Hoof and Welling 2019, appendix B.3)."""
    v = maximum - gumbel + (_log1mexp(gumbel - highest) if gumbel < highest else -np.inf)
    return maximum - max(0.0, v) - math.log1p(math.exp(-abs(v)))


@part
def stochastic(search, t, s, x, r):
    """The K largest perturbed log-probabilities among K hypotheses' expansions, and those that have ended."""
    K, V = search.log_probs.shape[1], x.shape[1]
    ranks, totals, candidates, gumbels = search.ranks, search.totals, search.candidates, search.gumbels
    count = 0
    for k in range(K):
        before, maximum = search.log_probs[s, k], search.perturbed[s, k]
        if before == -np.inf:
            continue
        least = ranks[count - 1] if count == len(ranks) else -np.inf
        if _has_ended(search, t, s, k):
            if maximum > least:
                count = _insert(ranks, totals, candidates, count, maximum, before, k * V + search.eos)
            continue
        row = at(x, (r + k) * V)
        _cool(search, row, V)
        normaliser = _normaliser(search, row, V)
        if _is_wrong(search, s, normaliser):
            return
        period = search.noise.shape[1]
        noise, highest = at(search.noise, ((s * period + t % period) * K + k) * V), -np.inf
        for v in range(V):
            gumbels[v] = before + (row[v] - normaliser) - math.log(max(noise[v], 1e-300))
            highest = max(highest, gumbels[v])
        # No number grows by more than the highest one does.
        growth = max(0.0, maximum - highest)
        for v in range(V):
            least = ranks[count - 1] if count == len(ranks) else -np.inf
            if gumbels[v] + growth > least - 1e-9 * abs(least) if least > -np.inf else gumbels[v] > -np.inf:
                rank = _given_maximum(gumbels[v], highest, maximum)
                if rank > least:
                    total = before + (row[v] - normaliser)
                    count = _insert(ranks, totals, candidates, count, rank, total, k * V + v)

    search.open[s] = CLOSED
    for i in range(K):
        search.log_probs[s, i] = search.perturbed[s, i] = -np.inf
        if i < count:
            search.tokens[s, t, i], search.parents[s, t, i] = candidates[i] % V, candidates[i] // V
            search.log_probs[s, i], search.perturbed[s, i] = totals[i], ranks[i]
            if candidates[i] % V != search.eos and t + 1 < search.tokens.shape[1]:
                search.open[s] = OPEN


# Sampling.


@part
def _sift(heap, n, i, x):
    """Let number i sink to where it belongs in a heap of n tokens, the likeliest first."""
    token = heap[i]
    while 2 * i + 1 < n:
        child = 2 * i + 1
        if child + 1 < n and _precedes(x, heap[child + 1], heap[child]):
            child += 1
        if not _precedes(x, heap[child], token):
            break
        heap[i] = heap[child]
        i = child
    heap[i] = token


@part
def _precedes(x, a, b):
    return x[a] > x[b] or (x[a] == x[b] and a < b)


@part
def _likeliest(search, x, weights, total, V):
    """Put the tokens that may be drawn at the end of ``search.heap``, backwards; how many, and their weight.

    total: of all weights.
    """
    heap, top_k, top_p = search.heap, search.top_k, search.top_p
    n = 0
    for v in range(V):
        if weights[v] > 0:
            heap[n] = v
            n += 1
    most = smaller(n, top_k)
    for i in range(n // 2 - 1, -1, -1):
        _sift(heap, n, i, x)
    highest = weights[heap[0]] if n > 0 else 0.0
    # With both cuts, top_p is a part of the weight of all the top_k.
    first, total = (most, 0.0) if top_k < V and top_p < 1 else (0, total)
    taken, kept, mass = 0, 0, 0.0
    while kept < most and (top_p == 1 or mass < top_p * total or taken < first):
        while taken <= kept or taken < first:
            token = heap[0]
            n -= 1
            heap[0] = heap[n]
            _sift(heap, n, 0, x)
            taken += 1
            heap[V - taken] = token
            if taken <= first:
                total += weights[token]
        token = heap[V - 1 - kept]
        if weights[token] < search.min_p * highest:
            break
        kept += 1
        mass += weights[token]
    return kept, mass


@part
def draw(search, t, s, x, r):
    """One token for each sequence that has not ended."""
    K, V = search.log_probs.shape[1], x.shape[1]
    weights, heap = search.weights, search.heap
    search.open[s] = CLOSED
    for k in range(K):
        search.parents[s, t, k] = k
        if search.log_probs[s, k] == -np.inf:
            continue
        if _has_ended(search, t, s, k):
            search.tokens[s, t, k] = search.eos
            continue
        row = at(x, (r + k) * V)
        _forbid(search, t, row)
        _cool(search, row, V)
        # Less the highest one, which is exact: less the logarithm of their sum, large numbers would be rounded.
        highest, n, total = highest_of(row, V), V, 0.0
        if not highest > -np.inf:
            highest = 0.0
        for j in range(0, V, lanes(row)):
            store(exp_nonpositive(load(at(row, j), V - j) - highest), at(weights, j), V - j)
        for v in range(V):
            total += weights[v]
        if _is_wrong(search, s, total):
            return
        cut = search.top_k < V or search.top_p < 1 or search.min_p > 0
        if cut:
            n, total = _likeliest(search, row, weights, total, V)
        token, point, mass = -1, search.noise[s, t % search.noise.shape[1], k] * total, 0.0
        for i in range(n):
            v = heap[V - 1 - i] if cut else i
            if weights[v] > 0:
                token = v
                mass += weights[v]
                if mass > point:
                    break
        if token < 0:
            search.log_probs[s, k] = -np.inf
            continue
        search.tokens[s, t, k] = token
        search.log_probs[s, k] += min(row[token] - highest - math.log(total), 0.0)
        if token != search.eos and t + 1 < search.tokens.shape[1]:
            search.open[s] = OPEN


# In the template below it is a method.
choose = None


def _advance(search, t, x):
    """One step of all searches. x: (S K, V)."""
    mode, K = flush_denormals(), search.log_probs.shape[1]
    for s in range(len(search.open)):
        if search.open[s] == OPEN:
            choose(search, t, s, x, s * K)
    restore_mode(mode)


METHODS = {Beam: beam, Stochastic: stochastic, Draw: draw}
ADVANCE = {kind: specialise(_advance, __name__, f"advance_{kind.__name__}", choose=f) for kind, f in METHODS.items()}


@kernel
def trace(tokens, parents, places, out):
    """Write sequences, from their ends back to their beginnings.

    tokens, parents: (S, T, K). places int64 (S, R, 3): length, parent and last token of each. out int64 (S, R, L) is
    written, up to each length.
    """
    for s in range(places.shape[0]):
        for i in range(places.shape[1]):
            length, k, token = places[s, i]
            for t in range(length - 1, -1, -1):
                out[s, i, t] = token
                if t > 0:
                    token, k = tokens[s, t - 1, k], parents[s, t - 1, k]


@kernel
def to_log_probabilities(search, x):
    """Divide x (M, V) by the temperature and normalise it, in place."""
    mode, (M, V) = flush_denormals(), x.shape
    for r in range(M):
        row = at(x, r * V)
        _cool(search, row, V)
        total = log_sum_exp(row, V)
        for v in range(V):
            x[r, v] = min(x[r, v] - total, 0.0)
    restore_mode(mode)


@kernel
def log_softmax(x, y):
    """``y = x - log(sum(exp(x)))`` by rows. x (M, V) is read, y float64 (M, V) written."""
    mode, (M, V) = flush_denormals(), x.shape
    for r in range(M):
        total = log_sum_exp(at(x, r * V), V)
        for v in range(V):
            y[r, v] = x[r, v] - total
    restore_mode(mode)
