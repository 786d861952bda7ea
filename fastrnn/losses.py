"""Losses, each with its gradient."""

from typing import Any

import numpy as np

from . import batching
from .checks import DTYPES, as_array, as_indices, as_kernel_array
from .kernels import losses as kernels
from .parameters import Array

# An exponential and what goes with it costs about as many multiply-adds.
MULTIPLY_ADDS_OF_A_LOGIT = 32


def cross_entropy(logits: Array, targets: Any) -> tuple[float, Array]:
    """Softmax cross-entropy, ``-log softmax(logits)[target]``, in nats: its mean over all targets, and its gradient.

    Args:
        logits: (..., V), float32 or float64. -inf stands for a probability of 0.
        targets: integers (...) from 0 to V - 1.

    Returns ``loss, dlogits``: a Python float, summed in float64, and the gradient by the logits, shaped as they are.

    Raises TypeError or ValueError for an array of a wrong dtype or shape, or for a target out of range.

    >>> import numpy as np
    >>> from fastrnn.losses import cross_entropy
    >>> loss, dlogits = cross_entropy(np.zeros((2, 4), np.float32), np.array([0, 3]))
    >>> round(loss, 6), dlogits[0]
    (1.386294, array([-0.375,  0.125,  0.125,  0.125], dtype=float32))
    """
    logits = as_array(logits, "logits")
    if logits.dtype not in DTYPES:
        raise TypeError(f"logits: expected dtype float32 or float64, got {logits.dtype}")
    if logits.ndim == 0:
        raise ValueError("logits: expected shape (..., V), got ()")
    logits = as_kernel_array(logits, "logits", logits.dtype, (None,) * logits.ndim)
    *shape, V = logits.shape
    targets = as_indices(targets, "targets", V, tuple(shape))
    rows, dlogits = logits.reshape(-1, V), np.empty_like(logits)
    losses = np.empty(len(rows))
    parties = batching.parties_for(rows.size * MULTIPLY_ADDS_OF_A_LOGIT, len(rows), 1, logits.dtype)

    def call(me: int, parties: int, barrier: Array) -> None:
        kernels.cross_entropy(rows, targets.reshape(-1), losses, dlogits.reshape(rows.shape), me, parties, barrier)

    batching.together(parties, call)
    return float(losses.mean()), dlogits
