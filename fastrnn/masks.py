"""Random masks: dropout between layers, recurrent dropout, zoneout."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .batching import Sequences
from .kernels.cell import Masks as KernelMasks
from .parameters import Array

if TYPE_CHECKING:
    from .recurrent import Recurrent

# By kind, layer and direction.
Masks = dict[tuple[Any, ...], Any]


def masks(layer: "Recurrent", T: int, B: int, rng: np.random.Generator) -> Masks:
    """The masks that `vjp` draws for T steps of B sequences, by kind, layer and direction, (T, B, features).

    Those of recurrent dropout are (B, features). Steps are those of the direction: the reverse one's first is the last.
    """
    drawn: Masks = {}
    P, zoned = layer.cell.P, any(layer.zoneout)
    if not (layer.dropout or layer.recurrent_dropout or zoned):
        return drawn
    for k, d in layer._keys():
        if layer.dropout and k > 0 and d == 0:
            drawn["dropout", k] = dropout_mask((T, B, layer.directions * P), layer.dropout, rng, layer.dtype)
        if layer.recurrent_dropout:
            drawn["recurrent", k, d] = dropout_mask((B, P), layer.recurrent_dropout, rng, layer.dtype)
        for name, p, size in zip(("zoneout_h", "zoneout_c"), layer.zoneout if zoned else (), (P, layer.cell.H)):
            drawn[name, k, d] = (rng.random((T, B, size), np.float32) < p).astype(layer.dtype)
    return drawn


def draw_masks(layer: "Recurrent", sequences: Sequences, rng: np.random.Generator) -> Masks:
    """The masks for a `vjp` as the kernels read them."""
    drawn = masks(layer, sequences.T, sequences.B, rng)
    drawn = {name: sequences.rows(m) if m.ndim == 3 else sequences.sorted(m) for name, m in drawn.items()}
    # The state s of a GRU is h.
    zone_s = {
        ("zoneout_s", *name[1:]): m for name, m in drawn.items() if name[0] == f"zoneout_{'hc'[layer.STATES - 1]}"
    }
    return drawn | zone_s


def kernel_masks(masks: Masks, key: tuple[int, int], dtype: np.dtype) -> KernelMasks | None:
    """Those of one direction of a layer, as its kernels take them; None if there are none."""
    given = [masks.get((name, *key)) for name in ("recurrent", "zoneout_h", "zoneout_s")] if masks else []
    if all(mask is None for mask in given):
        return None
    return KernelMasks(*[np.empty((0, 0), dtype) if mask is None else mask for mask in given])


def no_masks(dtype: np.dtype) -> KernelMasks:
    """For kernels that take masks even where there are none."""
    return KernelMasks(*[np.empty((0, 0), dtype)] * 3)


def dropout_mask(shape: tuple[int, ...], probability: float, rng: np.random.Generator, dtype: np.dtype) -> Array:
    """0 at random, and elsewhere what keeps the mean."""
    return (rng.random(shape, np.float32) >= probability) * dtype.type(1 / (1 - probability))


def drop(x: Array, probability: float, rng: np.random.Generator) -> tuple[Array, Callable[[Array], Array]]:
    """``x`` with elements set to 0 at random and the others scaled up to keep the mean, and the pullback."""
    mask = dropout_mask(x.shape, probability, rng, x.dtype)
    return x * mask, lambda dy: dy * mask
