"""Truncated backpropagation through time over a sequence of any length, in the memory of a few steps."""

from collections import deque
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import numpy as np

from .checks import as_array, as_kernel_array, as_lengths, describe, integer, positive
from .parameters import Array
from .recurrent import Gradients, Pullback, Recurrent


def truncated_bptt(
    layer: Recurrent,
    x: Array,
    loss: Callable[[Array, int], tuple[float, Array]],
    state: Any = None,
    *,
    k1: int,
    k2: int | None = None,
    rng: np.random.Generator | None = None,
    lengths: Any = None,
    update: Callable[[Gradients], Any] | None = None,
) -> tuple[float, Any, Gradients]:
    """Gradients of a loss through time, window by window: BPTT(h; h') of Williams and Peng 1990, h = k2, h' = k1.

    The sequence is cut into windows of k1 steps, of which the last may be shorter. At the end of each, the loss of its
    steps goes back through the last k2 steps, its own and those before it; the state before these counts as a constant.
    With k2 >= T nothing is cut off: the sum over the windows is the whole gradient, up to rounding. With k1 >= T there
    is one window, and it has the bits of ``layer.vjp``.

    Every step is run once and taken back about k2 / k1 times, and no more than k2 steps are kept.

    Args:
        layer: a recurrent layer of one direction.
        x: (T, B, I), or (B, T, I) with ``batch_first``, or one sequence (T, I).
        loss: called as ``loss(y, first)`` for each window in turn, with its outputs, shaped as the layer's but for
            the time, and its first step. Returns the window's part of the loss and the gradient of this part by y.
            The parts are added up: for a mean over T steps each divides by T.
        state: before the first step; None stands for zeros.
        k1: steps of a window, h'.
        k2: steps through which a window's loss goes back, h, at least k1; None stands for k1.
        rng: draws the masks of dropout and zoneout; None takes the layer's own.
        lengths: B integers from 0 to T, the sequences' lengths, if they are not all T.
        update: called with the gradients of each window after it, such as an optimiser's ``step``: the next window
            runs with the new parameters. Steps are taken back with those that they were run with.

    Returns ``loss, state, grads``: the sum of the parts, the state after the last step, with which a next call
    continues, and the sum of the windows' gradients by each parameter, a dict by name.

    Raises TypeError or ValueError for a wrong argument, before any call of ``loss``, and for a layer that is
    bidirectional, whose steps read what comes after the window, or has recurrent dropout, whose masks are one a
    sequence; and for a ``loss`` that returns anything else.

    >>> import numpy as np
    >>> import fastrnn
    >>> from fastrnn.bptt import truncated_bptt
    >>> lstm = fastrnn.LSTM(3, 4, seed=0)
    >>> rng = np.random.default_rng(0)
    >>> x, wanted = (rng.standard_normal((100, 2, n), np.float32) for n in (3, 4))
    >>> def loss(y, first):  # half the mean squared error
    ...     error = y - wanted[first : first + len(y)]
    ...     return 0.5 * (error**2).sum() / wanted.size, error / wanted.size
    >>> value, (h, c), grads = truncated_bptt(lstm, x, loss, k1=10, k2=20)
    >>> h.shape, grads["weight_ih_l0"].shape
    ((1, 2, 4), (16, 3))
    """
    if not isinstance(layer, Recurrent):
        raise TypeError(f"layer: expected a recurrent layer, got {describe(layer)}")
    if layer.bidirectional:
        raise ValueError("layer: expected one direction, got a bidirectional layer, which reads past a window's end")
    if layer.recurrent_dropout:
        raise ValueError("layer: expected no recurrent_dropout, whose masks are one a sequence, not one a window")
    if not callable(loss):
        raise TypeError(f"loss: expected a function, got {describe(loss)}")
    if update is not None and not callable(update):
        raise TypeError(f"update: expected a function or None, got {describe(update)}")
    k1 = positive(k1, "k1")
    k2 = k1 if k2 is None else integer(k2, "k2 (k1 or more)", k1)
    x = as_array(x, "x")
    if x.ndim not in (2, 3):
        raise ValueError(f"x: expected 3 dimensions (a batch) or 2 (one sequence), got shape {x.shape}")
    x = as_kernel_array(x, "x", layer.dtype, (None,) * (x.ndim - 1) + (layer.input_size,))
    axis = 1 if x.ndim == 3 and layer.batch_first else 0
    T = x.shape[axis]
    if lengths is not None:
        lengths = as_lengths(lengths, "lengths", T, x.shape[1 - axis] if x.ndim == 3 else 1)

    # Where a window or its way back ends, a piece of the sequence ends: so each is made of whole pieces, and a piece
    # is run once, its dropout masks drawn once, for all the windows that go back through it.
    ends = [*range(k1, T, k1), T]
    pieces = deque(pairwise(sorted({0, *ends, *(max(0, end - k2) for end in ends)})))
    kept: deque[tuple[int, int, Pullback]] = deque()

    def run(state: Any) -> tuple[Array, Any]:
        first, last = pieces.popleft()
        left = None if lengths is None else np.clip(lengths - first, 0, last - first)
        (y, state), pullback = layer.vjp(_steps(x, first, last, axis), state, rng, left)
        kept.append((first, last, pullback))
        return y, state

    total, grads, first = 0.0, Gradients(), 0
    for end in ends:
        while kept and kept[0][0] < end - k2:
            kept.popleft()
        ys = []
        while pieces and pieces[0][1] <= end:
            y, state = run(state)
            ys.append(y)
        y = ys[0] if len(ys) == 1 else np.concatenate(ys, axis)
        value, dy = _checked(loss(y, first), y)
        window = _go_back(kept, dy, first, axis)
        total += value
        _add(window, grads)
        if update is not None:
            update(window)
        first = end
    return total, state, grads


def _steps(array: Array, first: int, last: int, axis: int) -> Array:
    return array[:, first:last] if axis else array[first:last]


def _go_back(kept: Iterable[tuple[int, int, Pullback]], dy: Array, first: int, axis: int) -> Gradients:
    """The gradients of a window's loss; ``dy`` is that by its outputs, from step ``first`` on."""
    dstate, grads = None, Gradients()
    for a, b, pullback in reversed([*kept]):
        d = _steps(dy, a - first, b - first, axis) if a >= first else None
        _, dstate, piece = pullback(d, dstate)
        _add(piece, grads)
    return grads


def _add(grads: Gradients, to: Gradients) -> None:
    for name, array in grads.items():
        if name in to:
            to[name] += array
        else:
            to[name] = array.copy()


def _checked(result: Any, y: Array) -> tuple[float, Array]:
    """What a loss returned for the outputs y."""
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise TypeError(f"loss: expected it to return its value and its gradient, got {describe(result)}")
    value, dy = result
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"loss: expected a number for its value, got {describe(value)}")
    return float(value), as_kernel_array(dy, "loss's gradient", y.dtype, y.shape)
