"""Softmax cross-entropy: loss and gradient in one pass over the logits."""

import math

import numpy as np

from .activations import exp_nonpositive
from .barrier import meet, portion
from .compiler import kernel, part
from .denormals import flush_denormals, restore_mode
from .gemm import load, store
from .vector import at, at_least, lanes, largest_lane, load_part_or, load_whole, store_part, store_whole, sum_of_lanes


@part
def highest_of(x, V):
    """The maximum of V numbers at an address; a NaN may be passed over."""
    whole = V - V % lanes(x)
    maxima = load_part_or(at(x, whole), V - whole, -np.inf)
    for j in range(0, whole, lanes(x)):
        maxima = at_least(load_whole(at(x, j)), maxima)
    return largest_lane(maxima)


@kernel
def cross_entropy(logits, targets, losses, dlogits, me, parties, barrier):
    """``losses[r] = log(sum(exp(logits[r]))) - logits[r, targets[r]]`` and the gradient of their mean by the logits.

    logits (R, V) and targets int64 (R) are read; losses float64 (R) and dlogits (R, V) are written. All are
    C-contiguous and belong to the caller. Call number ``me`` of ``parties`` does a share of the rows; the bits do not
    depend on the cut.
    """
    mode, (R, V) = flush_denormals(), logits.shape
    L = lanes(at(logits, 0))
    whole = V - V % L
    r0, r1 = portion(R, me, parties)
    for r in range(r0, r1):
        x, d, target = at(logits, r * V), at(dlogits, r * V), targets[r]
        # A NaN that the maximum has passed over is in the sum.
        highest = highest_of(x, V)
        total = exp_nonpositive(load_part_or(at(x, whole), V - whole, -np.inf) - highest)
        store_part(total, at(d, whole), V - whole)
        for j in range(0, whole, L):
            e = exp_nonpositive(load_whole(at(x, j)) - highest)
            store_whole(e, at(d, j))
            total = total + e
        power = sum_of_lanes(total)

        losses[r] = math.log(power) + (highest - x[target])
        scale = 1 / (power * R)
        for j in range(0, V, L):
            store(load(at(d, j), V - j) * scale, at(d, j), V - j)
        d[target] -= dlogits.dtype.type(1 / R)
    meet(barrier, parties)
    restore_mode(mode)
