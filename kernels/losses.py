"""Softmax cross-entropy: loss and gradient in one pass over the logits."""

import math

import numpy as np

from .activations import exp_nonpositive
from .barrier import meet
from .compiler import kernel
from .denormals import flush_denormals, restore_mode
from .gemm import load, store
from .vector import at, at_least, lanes, load_whole, store_whole


@kernel
def cross_entropy(logits, targets, losses, dlogits, work, me, parties, barrier):
    """``losses[r] = log(sum(exp(logits[r]))) - logits[r, targets[r]]`` and the gradient of their mean by the logits.

    logits (R, V) and targets int64 (R) are read; losses float64 (R) and dlogits (R, V) are written; work (parties, 64)
    is workspace. All are C-contiguous and belong to the caller. Call number ``me`` of ``parties`` does a share of the
    rows; the bits do not depend on the cut.
    """
    mode, (R, V) = flush_denormals(), logits.shape
    L = lanes(at(logits, 0))
    lane = at(work, me * 64)
    whole = V - V % L
    for r in range(me * R // parties, (me + 1) * R // parties):
        x, d, target = at(logits, r * V), at(dlogits, r * V), targets[r]
        most = x[0]
        if whole > 0:
            maxima = load_whole(x)
            for j in range(L, whole, L):
                maxima = at_least(load_whole(at(x, j)), maxima)
            store_whole(maxima, lane)
            for l in range(L):
                most = max(most, lane[l])
        for j in range(whole, V):
            most = max(most, x[j])

        # Stored and loaded again, the lanes past the row's end are 0. A NaN that the maximum passed over is here.
        highest = np.float64(most)
        total = exp_nonpositive(load(x, V) - highest)
        store(total, d, V)
        total = load(d, V)
        for j in range(L, V, L):
            store(exp_nonpositive(load(at(x, j), V - j) - highest), at(d, j), V - j)
            total = total + load(at(d, j), V - j)
        store_whole(total, lane)
        power = 0.0
        for l in range(L):
            power += lane[l]

        losses[r] = math.log(power) + (highest - x[target])
        scale = 1 / (power * R)
        for j in range(0, V, L):
            store(load(at(d, j), V - j) * scale, at(d, j), V - j)
        d[target] -= dlogits.dtype.type(1 / R)
    meet(barrier, parties)
    restore_mode(mode)
