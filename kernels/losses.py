"""Softmax cross-entropy: loss and gradient in one pass over the logits."""

import math

import numpy as np

from .activations import exp_nonpositive
from .barrier import meet
from .compiler import kernel
from .denormals import flush_denormals, restore_mode
from .gemm import load, store, zeros
from .vector import at, at_least, lanes, largest_lane, load_or, sum_of_lanes


@kernel
def cross_entropy(logits, targets, losses, dlogits, me, parties, barrier):
    """``losses[r] = log(sum(exp(logits[r]))) - logits[r, targets[r]]`` and the gradient of their mean by the logits.

    logits (R, V) and targets int64 (R) are read; losses float64 (R) and dlogits (R, V) are written. All are
    C-contiguous and belong to the caller. Call number ``me`` of ``parties`` does a share of the rows; the bits do not
    depend on the cut.
    """
    mode, (R, V) = flush_denormals(), logits.shape
    L = lanes(at(logits, 0))
    for r in range(me * R // parties, (me + 1) * R // parties):
        x, d, target = at(logits, r * V), at(dlogits, r * V), targets[r]
        maxima = load_or(x, V, -np.inf)
        for j in range(L, V, L):
            maxima = at_least(load_or(at(x, j), V - j, -np.inf), maxima)
        highest = largest_lane(maxima)

        # A NaN that the maximum has passed over is here.
        total = zeros(x)
        for j in range(0, V, L):
            e = exp_nonpositive(load_or(at(x, j), V - j, -np.inf) - highest)
            store(e, at(d, j), V - j)
            total = total + e
        power = sum_of_lanes(total)

        losses[r] = math.log(power) + (highest - x[target])
        scale = 1 / (power * R)
        for j in range(0, V, L):
            store(load(at(d, j), V - j) * scale, at(d, j), V - j)
        d[target] -= dlogits.dtype.type(1 / R)
    meet(barrier, parties)
    restore_mode(mode)
