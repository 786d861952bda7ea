"""Layer normalisation of the LSTM and the GRU: what is done for them in a way of its own.

All functions take the layer, which has ``layer_norm``; those that stand in for one of `passes` or `packing` have its
name.
"""

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from . import batching, memory, packing
from .batching import Sequences
from .kernels import layer_norm as kernels
from .kernels.gemm import multiply_addresses
from .kernels.tile import VECS
from .kernels.vector import LANES_OF
from .masks import kernel_masks, no_masks
from .parameters import Array

# Rows whose input projections are computed at once, and over which gradients are gathered before the weights take them
# up: few enough to be in the second-level cache still.
ROWS_FORWARD, ROWS_BACKWARD = 48, 256

LSTM = SimpleNamespace(forward=kernels.lstm_forward, backward=kernels.lstm_backward, slots=4)
GRU = SimpleNamespace(forward=kernels.gru_forward, backward=kernels.gru_backward, slots=3)


def kinds(layer: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The parameters of one direction that other layers lack, and their shapes."""
    H = layer.cell.H
    yield "weight_ln_ih", (layer.cell.gates * H,)
    yield "weight_ln_hh", (layer.cell.gates * H,)
    if layer.STATES == 2:
        yield "weight_ln_c", (H,)
        yield "bias_ln_c", (H,)


def initial(layer: Any, kind: str, shape: tuple[int, ...]) -> Array:
    """One of these parameters at first: the normalised numbers as they are."""
    return np.full(shape, 1 if kind.startswith("weight_ln") else 0, layer.dtype)


def packs(layer: Any, save: bool) -> dict[tuple[int, int], tuple[kernels.Weights, kernels.Weights]]:
    """As the function."""

    def derived(key: tuple[int, int], backward: bool) -> kernels.Weights:
        return layer.parameters.derived((backward, *key), partial(_pack, layer, *key, backward))

    return {key: (derived(key, False), derived(key, save)) for key in layer._keys()}


def _pack(layer: Any, k: int, d: int, backward: bool) -> kernels.Weights:
    """A direction's weights as the kernels read them; nothing of it is the layer's own memory."""
    cell, dtype, matrix = layer.cell, layer.dtype, packing.pack_linear_back if backward else packing.pack_linear

    def stack(names: list[str], size: int) -> Array:
        return np.concatenate([given.get(name, np.zeros(size, dtype)) for name in names])

    given = {kind: layer.parameters[name] for kind, name in layer.names[k, d].items()}
    return kernels.Weights(
        matrix(given["weight_ih"]),
        matrix(given["weight_hh"]),
        matrix(given["weight_hr"]) if cell.P != cell.H else np.empty(0, dtype),
        stack(["bias_ih", "weight_ln_ih", "bias_hh", "weight_ln_hh"], cell.gates * cell.H),
        stack(["weight_ln_c", "bias_ln_c", "weight_ci", "weight_cf", "weight_co"], cell.H),
    )


def run_direction(
    layer: Any,
    key: tuple[int, int],
    x: Array,
    y: Array,
    before: list[Array],
    after: list[Array],
    sequences: Sequences,
    masks: dict[tuple[Any, ...], Any],
    packs: tuple[kernels.Weights, kernels.Weights],
    tape: dict[tuple[int, int], Any] | None,
) -> Any:
    """As the function, over at least one row."""
    cell, dtype, (N, I), B, W = layer.cell, layer.dtype, x.shape, sequences.B, VECS * LANES_OF[layer.dtype]
    H, P, M, functions = cell.H, cell.P, cell.gates * cell.H, LSTM if layer.STATES == 2 else GRU
    steps, multiply, chunks = sequences.steps, multiply_addresses(dtype), sequences.chunks(ROWS_FORWARD)
    mask_arrays = kernel_masks(masks, key, dtype) or no_masks(dtype)
    work, save = N * M * (I + P), tape is not None
    parties = min(B, batching.parties_for(work, B, H, dtype))

    R, saved = N if save else max(B, sequences.largest(chunks)), N if save else 0
    sizes = kernels.Buffers(
        u=R * M,
        v=R * M,
        gates=R * functions.slots * H,
        before=R * H,
        normal=R * H,
        scales=R * 3,
        xs=_padded(I, W) * saved,
        hs=_padded(P, W) * saved,
        ms=_padded(H, W) * saved if P != H else 0,
        seen=B * P,
        m=B * H,
        scratch=parties * W,
    )
    buffers = kernels.Buffers(*[memory.empty(size, dtype) for size in sizes])
    h_0, s = before[0], after[-1]
    s[...] = before[-1]

    def call(me: int, parties: int, barrier: Array) -> None:
        functions.forward(
            layer.records, x, h_0, s, packs[0], y, buffers, steps, chunks, mask_arrays, save,
            sequences.share(me, parties, 1, dtype), barrier, multiply,
        )  # fmt: skip

    batching.together(parties, call)
    after[0][...] = sequences.last(y, h_0)
    if tape is None:
        return None
    tape[key] = buffers

    def backward(dy: Array, d_after: list[Array], d_before: list[Array], sums: Any, tape: Any) -> Array:
        backs, fresh = sequences.chunks(ROWS_BACKWARD), key not in sums
        parties = min(B, batching.parties_for(2 * work, B, H, dtype))
        R = sequences.largest(backs)
        sizes = kernels.Work(du=R * M, dv=R * M, dn=R * H, dp=R * P, dm=B * H, d_seen=B * P, scratch=parties * W)
        space = kernels.Work(*[memory.empty(size, dtype) for size in sizes])
        out = gradients(layer, sums, key, N, I, d_before)
        for d, d_n in zip((out.h_0, out.s_0), d_after):
            d[...] = d_n

        def call(me: int, parties: int, barrier: Array) -> None:
            functions.backward(
                layer.records, dy, packs[1], tape[key], out, space, steps, backs, mask_arrays, fresh,
                sequences.share(me, parties, 1, dtype), barrier, multiply,
            )  # fmt: skip

        batching.together(parties, call)
        return out.x

    return backward


def gradients(layer: Any, sums: Any, key: tuple[int, int], N: int, I: int, states: list[Array]) -> kernels.Gradients:
    """As the function."""
    cell, dtype = layer.cell, layer.dtype
    H, P, M = cell.H, cell.P, cell.gates * cell.H
    if key not in sums:
        shapes = [(M, I), (M, P), (P, H) if P != H else (0, 0), (4, M), (5, H)]
        sums[key] = [np.empty(shape, dtype) for shape in shapes]
    s_0 = states[1] if layer.STATES == 2 else np.empty_like(states[0])
    return kernels.Gradients(np.empty((N, I), dtype), states[0], s_0, *sums[key])


def named(layer: Any, sums: Any) -> dict[str, Array]:
    """Gradients by the parameters' names, from what the kernels write."""
    named: dict[str, Array] = {}
    for k, d in layer._keys():
        w_ih, w_hh, w_hr, gates, units = sums[k, d]
        given = {"weight_ih": w_ih, "weight_hh": w_hh, "weight_hr": w_hr}
        for names, rows in (
            ("bias_ih weight_ln_ih bias_hh weight_ln_hh", gates),
            ("weight_ln_c bias_ln_c weight_ci weight_cf weight_co", units),
        ):
            given |= {name: row.copy() for name, row in zip(names.split(), rows)}
        named |= {name: given[kind] for kind, name in layer.names[k, d].items()}
    return named


def _padded(columns: int, W: int) -> int:
    """The numbers of a row in panels."""
    return -(-columns // W) * W
