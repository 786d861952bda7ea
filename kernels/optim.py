"""The optimisers' updates, each in one pass over a parameter, and the sum of squares for clipping.

Arrays are C-contiguous, of one dimension, one size and one dtype, and belong to the caller. Nothing is allocated.
"""

import math

import numpy as np

from .compiler import kernel
from .denormals import flush_denormals, restore_mode


@kernel
def sgd(p, g, v, lr, momentum, weight_decay, nesterov):
    """``v = momentum v + g; p -= lr v``, with ``g + weight_decay p`` for g, and ``g + momentum v`` for v if nesterov.

    p and v (of size 0 without momentum) are updated, g is read; numbers are of the arrays' dtype.
    """
    mode = flush_denormals()
    if v.size == 0:
        for i in range(p.size):
            p[i] -= lr * (g[i] + weight_decay * p[i])
    elif nesterov:
        for i in range(p.size):
            d = g[i] + weight_decay * p[i]
            v[i] = momentum * v[i] + d
            p[i] -= lr * (d + momentum * v[i])
    else:
        for i in range(p.size):
            v[i] = momentum * v[i] + (g[i] + weight_decay * p[i])
            p[i] -= lr * v[i]
    restore_mode(mode)


@kernel
def adam(p, g, m, v, step_size, beta1, beta2, one_minus_beta1, one_minus_beta2, root, eps, l2, keep):
    """``m, v`` decay towards g and its square; ``p = keep p - step_size m / (sqrt(v) / root + eps)``.

    p, m and v are updated, g is read, to which ``l2 p`` is added; numbers are of the arrays' dtype.
    """
    mode = flush_denormals()
    for i in range(p.size):
        d = g[i] + l2 * p[i]
        m[i] = beta1 * m[i] + one_minus_beta1 * d
        v[i] = beta2 * v[i] + one_minus_beta2 * (d * d)
        p[i] = keep * p[i] - step_size * (m[i] / (math.sqrt(v[i]) / root + eps))
    restore_mode(mode)


@kernel
def sum_of_squares(g):
    """The sum of the squares of g in float64, which neither overflows nor loses small numbers among many."""
    mode, n = flush_denormals(), g.size
    a, b, c, d, e, f, h, k = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    whole = n - n % 8
    # Eight sums: one alone would wait for each addition's end before the next.
    for i in range(0, whole, 8):
        a += np.float64(g[i]) * np.float64(g[i])
        b += np.float64(g[i + 1]) * np.float64(g[i + 1])
        c += np.float64(g[i + 2]) * np.float64(g[i + 2])
        d += np.float64(g[i + 3]) * np.float64(g[i + 3])
        e += np.float64(g[i + 4]) * np.float64(g[i + 4])
        f += np.float64(g[i + 5]) * np.float64(g[i + 5])
        h += np.float64(g[i + 6]) * np.float64(g[i + 6])
        k += np.float64(g[i + 7]) * np.float64(g[i + 7])
    for i in range(whole, n):
        a += np.float64(g[i]) * np.float64(g[i])
    restore_mode(mode)
    return ((a + b) + (c + d)) + ((e + f) + (h + k))
