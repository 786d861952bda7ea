"""The kernels of decoding, one step at a time, against NumPy, plain sorting and mpmath."""

import math

import mpmath
import numpy as np
import pytest
from fastrnn.kernels import search as kernels
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_close

SIZES = [(1, 1), (3, 17), (2, 63), (17, 65), (2, 1000)]


def common(S, K, T, dtype, normalise, **fields):
    return {
        "tokens": np.zeros((S, T, K), np.int64),
        "parents": np.zeros((S, T, K), np.int64),
        "log_probs": np.zeros((S, K)),
        "open": np.full(S, kernels.OPEN),
        "starts": np.zeros(S, np.int64),
        "eos": -1,
        "min_length": 0,
        "banned": np.empty(0, np.int64),
        "temperature": 1.0,
        "normalise": normalise,
        **fields,
    }


def beams(S, K, V, dtype=np.float64, T=10, R=1, normalise=False, **fields):
    return kernels.Beam(
        **{
            **common(S, K, T, dtype, normalise),
            "prefix": np.empty((S, 0), np.int64),
            "groups": 1,
            "diversity": 0.0,
            "counts": np.empty(0),
            "counted": np.zeros(1, np.int64),
            "penalties": np.ones(T + 1),
            "reach": np.ones(T + 1),
            "enough": 10**9,
            "ended": np.zeros(S, np.int64),
            "taken": np.zeros(S, np.int64),
            "best_scores": np.full((S, R), -np.inf),
            "best_log_probs": np.full((S, R), -np.inf),
            "best_places": np.zeros((S, R, 3), np.int64),
            "ranks": np.empty(2 * K),
            "totals": np.empty(2 * K),
            "candidates": np.empty(2 * K, np.int64),
            **fields,
        }
    )


def advance(search, t, x):
    kernels.ADVANCE[type(search)](search, t, x)
    return search


def log_softmax(x):
    x = x.astype(np.float64)
    highest = x.max(-1, keepdims=True)
    return x - (highest + np.log(np.exp(x - highest).sum(-1, keepdims=True)))


@pytest.mark.parametrize("shape", SIZES)
def test_log_softmax_is_its_equation(shape, dtype, rng):
    x = (rng.standard_normal(shape) * 10).astype(dtype)
    x[-1, : shape[1] // 3] = -np.inf
    y = np.empty(shape)
    kernels.log_softmax(x, y)
    seen = np.isfinite(y)
    assert (seen == np.isfinite(x)).all()
    assert (y <= 0).all()
    assert_close(y[seen].astype(dtype), log_softmax(x)[seen])


@pytest.mark.parametrize("V", [1, 15, 17, 64])
def test_log_softmax_of_what_is_not_finite(V, dtype):
    x, y = np.full((5, V), -np.inf, dtype), np.zeros((5, V))
    x[1, V // 2], x[2], x[2, -1], x[3, 0], x[4] = np.nan, 0, np.inf, np.nan, 3000
    kernels.log_softmax(x, y)
    assert (y[0] == -np.inf).all()
    assert np.isnan(y[1][V // 2])
    assert np.isnan(y[2]).any()
    assert np.isnan(y[3]).any()
    assert np.abs(y[4] + math.log(V)).max() < (1e-3 if dtype == np.float32 else 1e-12)


def sorted_candidates(before, log_probs):
    """All candidates (total, hypothesis, token), the best first, and of equals the first."""
    total = (before[:, None] + log_probs).ravel()
    order = np.lexsort((np.arange(total.size), -total))
    order = order[total[order] > -np.inf]
    return [(total[i], *divmod(int(i), log_probs.shape[1])) for i in order]


@given(
    K=st.sampled_from([1, 2, 3, 17]),
    V=st.sampled_from([1, 3, 17, 63, 65, 130, 700]),
    double=st.booleans(),
    ties=st.booleans(),
    far=st.sampled_from([0.0, 1e3, 1e8]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_best_candidates_are_those_that_sorting_finds(K, V, double, ties, far, seed):
    rng, dtype = np.random.default_rng(seed), np.float64 if double else np.float32
    x = -rng.exponential(size=(2 * K, V))
    if ties:
        x = -np.floor(rng.integers(0, 4, x.shape) + (V > 100) * rng.integers(0, 9, x.shape)) / 2
    x[rng.random(x.shape) < 0.1] = -np.inf
    x = x.astype(dtype)
    before = -np.sort(rng.exponential(size=(2, K)), axis=1) - far
    before[0, K // 2 + 1 :] = -np.inf
    eos = int(rng.integers(-1, V))
    search = advance(beams(2, K, V, dtype, log_probs=before.copy(), eos=eos, R=K), 3, x.copy())
    for s in range(2):
        found = sorted_candidates(before[s], x[s * K : s * K + K].astype(np.float64))
        open_ = [c for c in found if c[2] != eos][:K]
        ended = [c for c in found[:K] if c[2] == eos]
        n = len(open_)
        assert search.log_probs[s, :n].tolist() == [c[0] for c in open_]
        assert (search.log_probs[s, n:] == -np.inf).all()
        assert search.parents[s, 3, :n].tolist() == [c[1] for c in open_]
        assert search.tokens[s, 3, :n].tolist() == [c[2] for c in open_]
        assert search.ended[s] == len(ended)
        assert search.taken[s] == 4
        assert search.best_log_probs[s, : len(ended)].tolist() == [c[0] for c in ended]
        assert search.best_places[s, : len(ended)].tolist() == [[4, c[1], eos] for c in ended]
        assert (search.open[s] == kernels.OPEN) == (n > 0 and not (len(ended) == K and ended[-1][0] >= open_[0][0]))


def test_candidates_that_are_better_by_less_than_float32_tells(rng):
    better = 0
    for _ in range(100):
        a, b = -1 - rng.random(), -rng.random()
        x = np.full((2, 100), -np.float32(rng.exponential()))
        x[1] = -50
        x[1, 70] = a + x[0, 0] - b
        found = advance(beams(1, 2, 100, np.float32, log_probs=np.array([[a, b]])), 0, x)
        if b + float(x[1, 70]) > a + float(x[0, 0]):
            better += 1
            assert found.tokens[0, 0].tolist() == [70, 0]
        else:
            assert found.tokens[0, 0].tolist() == [0, 1]
    assert 10 < better < 90


@pytest.mark.parametrize("temperature", [1.0, 0.3, 7.0])
def test_logits_are_normalised(temperature, dtype, rng):
    K, V = 3, 65
    x = (rng.standard_normal((K, V)) * 3).astype(dtype)
    before = np.array([-1.0, -1.5, -2.0])
    expected = sorted_candidates(before, log_softmax(x.astype(np.float64) / temperature))[:K]
    search = beams(1, K, V, dtype, normalise=True, temperature=temperature, log_probs=before[None].copy())
    advance(search, 0, x)
    assert search.tokens[0, 0].tolist() == [c[2] for c in expected]
    assert search.parents[0, 0].tolist() == [c[1] for c in expected]
    assert_close(search.log_probs[0].astype(dtype), np.array([c[0] for c in expected]))


@pytest.mark.parametrize("V", [1, 17, 64])
@pytest.mark.parametrize(
    ("number", "status"), [(np.nan, kernels.NOT_A_NUMBER), (np.inf, kernels.NOT_A_LOG_PROBABILITY), (0.1, None)]
)
@pytest.mark.parametrize("normalise", [False, True])
def test_what_is_no_log_probability_is_reported(V, number, status, normalise, dtype):
    for place in {0, V // 2, V - 1}:
        x = np.full((4, V), -3, dtype)
        x[2, place] = number
        search = advance(beams(2, 2, V, dtype, normalise=normalise), 0, x)
        assert search.open[0] == kernels.OPEN
        if normalise:
            assert search.open[1] == (kernels.OPEN if number == 0.1 else kernels.NOT_A_NUMBER)
        else:
            assert search.open[1] == (status or kernels.NOT_A_LOG_PROBABILITY)


def test_closed_searches_and_absent_hypotheses_are_left_alone():
    x = np.full((4, 3), np.nan)
    x[2] = -1, -2, -3
    log_probs = np.array([[-1, -2], [-1, -np.inf]])
    search = beams(2, 2, 3, log_probs=log_probs.copy(), open=np.array([kernels.CLOSED, kernels.OPEN]))
    advance(search, 0, x)
    assert search.log_probs.tolist() == [[-1, -2], [-2, -3]]
    assert search.open.tolist() == [kernels.CLOSED, kernels.OPEN]


def stochastic(S, K, V, noise, dtype=np.float64, T=10, **fields):
    return kernels.Stochastic(
        **{
            **common(S, K, T, dtype, True),
            "noise": noise,
            "perturbed": np.zeros((S, K)),
            "gumbels": np.empty(V),
            "ranks": np.empty(K),
            "totals": np.empty(K),
            "candidates": np.empty(K, np.int64),
            **fields,
        }
    )


def exact_perturbed(maximum, gumbels):
    """The formula of Kool et al. in 100 digits, for the children of one hypothesis."""
    with mpmath.workdps(2000):
        e = [mpmath.exp(-mpmath.mpf(float(g))) for g in gumbels]
        z = mpmath.exp(-mpmath.mpf(float(max(gumbels))))
        return [float(-mpmath.log(mpmath.exp(-mpmath.mpf(maximum)) - z + g)) for g in e]


@pytest.mark.parametrize("spread", [1, 30, 1000])
@pytest.mark.parametrize("maximum", [-2000.0, -5.0, 0.0, 3.0, 40.0])
def test_perturbed_children_are_exact(spread, maximum, rng):
    V = 9
    x = log_softmax(rng.standard_normal((1, V)) * spread)
    noise = rng.standard_exponential((1, 1, 1, V))
    K = V + 2
    start = np.full((1, K), -np.inf)
    start[0, 0] = -0.25
    search = stochastic(
        1, K, V, np.broadcast_to(noise, (1, 1, K, V)).copy(), log_probs=start, perturbed=np.full((1, K), maximum)
    )
    advance(search, 0, np.repeat(x, K, 0))
    expected = np.array(exact_perturbed(maximum, -0.25 + x[0] - np.log(noise[0, 0, 0])))
    order = np.argsort(-expected, kind="stable")
    assert search.tokens[0, 0, :V].tolist() == order.tolist()
    found = search.perturbed[0, :V]
    assert found[0] == maximum
    assert (np.abs(found - expected[order]) <= 1e-10 * np.maximum(1, np.abs(expected[order]))).all()
    assert np.abs(search.log_probs[0, :V] - (x[0] - 0.25)[order]).max() < 1e-10
    assert (search.perturbed[0, V:] == -np.inf).all()


@pytest.mark.parametrize("higher", [-5, 0, 5])
def test_the_k_largest_perturbed_are_kept(higher, dtype, rng):
    K, V = 5, 130
    x = rng.standard_normal((K, V)).astype(dtype)
    noise = rng.standard_exponential((1, 2, K, V))
    maxima = -np.sort(rng.exponential(size=K)) + higher
    before = -rng.exponential(size=K)
    tokens = np.zeros((1, 10, K), np.int64)
    tokens[0, 2] = 7, 8, 7, 9, 9  # 7 is eos
    search = stochastic(
        1, K, V, noise, dtype, eos=7, tokens=tokens, log_probs=before[None].copy(), perturbed=maxima[None].copy()
    )
    advance(search, 3, x.copy())
    candidates = []
    for k in range(K):
        if k in (0, 2):
            candidates.append((maxima[k], before[k], k, 7))
            continue
        log_probs = before[k] + log_softmax(x[k])
        gumbels = log_probs - np.log(noise[0, 1, k])
        candidates += [(g, log_probs[v], k, v) for v, g in enumerate(exact_perturbed(maxima[k], gumbels))]
    best = sorted(candidates, key=lambda c: -c[0])[:K]
    assert search.tokens[0, 3].tolist() == [c[3] for c in best]
    assert search.parents[0, 3].tolist() == [c[2] for c in best]
    assert_close(search.perturbed[0].astype(dtype), np.array([c[0] for c in best]))
    assert_close(search.log_probs[0].astype(dtype), np.array([c[1] for c in best]))


def draws(V, noise, dtype=np.float64, T=2, **fields):
    K = noise.shape[2]
    cuts = {"top_k": V, "top_p": 1.0, "min_p": 0.0}
    work = {"weights": np.empty(V, dtype), "heap": np.empty(V, np.int64)}
    return kernels.Draw(**{**common(1, K, T, dtype, True), "noise": noise, **cuts, **work, **fields})


def cut(p, top_k, top_p, min_p):
    """The tokens left by cutting one after the other, in descending order, and their probabilities."""
    order = np.argsort(-p, kind="stable")[: min(top_k, len(p))]
    order = order[p[order] > 0]
    q = p[order] / p[order].sum()
    order = order[np.append(0, q.cumsum()[:-1]) < top_p] if top_p < 1 else order
    order = order[p[order] >= min_p * p.max()]
    return order, p[order] / p[order].sum()


@pytest.mark.parametrize("V", [1, 3, 17, 65, 300])
@pytest.mark.parametrize(
    "cuts", [(10**6, 1, 0), (2, 1, 0), (1, 1, 0), (10**6, 0.7, 0), (10**6, 1, 0.2), (5, 0.6, 0.1), (4, 1, 0.5)]
)
def test_draws_invert_the_cut_distribution(V, cuts, rng):
    x = rng.standard_normal((1, V)) * 2
    x[0, rng.random(V) < 0.2] = -np.inf
    x[0, 0] = 1
    if V > 10:
        x[0, 5:9] = 2  # ties
    order, q = cut(np.exp(log_softmax(x[0])), *cuts)
    if cuts == (10**6, 1, 0):
        order, q = np.arange(V), np.exp(log_softmax(x[0]))
    edges = q.cumsum()
    u = np.sort(rng.random(500))
    expected = order[np.minimum(np.searchsorted(edges, u, side="right"), len(order) - 1)]
    search = draws(V, u[None, None].copy(), top_k=min(cuts[0], V), top_p=float(cuts[1]), min_p=float(cuts[2]))
    advance(search, 0, np.repeat(x, 500, 0))
    clear = np.abs(edges[:, None] - u).min(0) > 1e-9
    assert (search.tokens[0, 0] == expected)[clear].all()
    position = np.argmax(order[:, None] == search.tokens[0, 0], 0)
    assert np.abs(search.log_probs[0] - np.log(q[position])).max() < 1e-9


def test_draws_in_float32_take_every_token():
    x = np.array([[math.log(p) if p else -np.inf for p in (0.5, 0.25, 0, 0.125, 0.125)]], np.float32)
    u = (np.arange(4000) + 0.5) / 4000
    search = draws(5, u[None, None].copy(), np.float32)
    advance(search, 0, np.repeat(x, 4000, 0))
    assert np.bincount(search.tokens[0, 0], minlength=5).tolist() == [2000, 1000, 0, 500, 500]


def test_nothing_to_draw_from():
    search = draws(4, np.full((1, 1, 2), 0.5), banned=np.array([0, 2]), top_p=0.5)
    advance(search, 0, np.array([[0, -np.inf, 0, -np.inf], [0, 0, 0, 0]]))
    assert search.log_probs[0, 0] == -np.inf
    assert search.tokens[0, 0, 1] == 1
    assert search.log_probs[0, 1] == 0


def test_trace_follows_the_back_pointers():
    tokens = np.array([[[1, 2], [3, 4], [5, 6]]])
    parents = np.array([[[0, 0], [1, 0], [1, 1]]])
    places = np.array([[[3, 0, 9], [1, 0, 8], [0, 0, 7], [2, 1, 6]]])
    out = np.full((1, 4, 3), -1)
    kernels.trace(tokens, parents, places, out)
    assert out[0].tolist() == [[2, 3, 9], [8, -1, -1], [-1, -1, -1], [2, 6, -1]]
