"""How a layer's weights and their gradients lie in memory for the kernels, and the sizes of buffers.

`fastrnn.kernels.cell` has the layouts; `layer_norm` has `packs`, `gradients` and `named` of its own.
"""

from functools import lru_cache, partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from . import batching, memory
from .kernels import bptt
from .kernels import cell as cells
from .kernels.gemm import WHOLE, pack, pack_transposed
from .kernels.tile import VECS
from .kernels.vector import LANES_OF
from .parameters import Array

if TYPE_CHECKING:
    from .recurrent import Recurrent

# Multiply-adds that take about as long as packing a number.
WORK_OF_A_NUMBER = 8

Key = tuple[int, int]
Gradients = dict[str, Array]
Sums = dict[Key, list[Array]]
Packs = dict[Key, tuple[Any, Any]]


def weights(layer: "Recurrent", k: int, d: int) -> SimpleNamespace:
    """The parameters of a direction, with zeros or nothing for those it lacks."""
    H, gates = layer.cell.H, layer.cell.gates
    given = {kind: layer.parameters[name] for kind, name in layer.names[k, d].items()}
    none, zeros = np.empty((0, 0), layer.dtype), np.zeros(H, layer.dtype)
    if not layer.bias:
        given |= {"bias_ih": np.zeros(gates * H, layer.dtype), "bias_hh": np.zeros(gates * H, layer.dtype)}
    peepholes = none
    if layer.cell.peephole:
        peepholes = np.stack([given.get(f"weight_c{gate}", zeros) for gate in "ifo"])
    given |= {"weight_hr": given.get("weight_hr", none), "peepholes": peepholes}
    return SimpleNamespace(**given)


def _pack(kernel: Any, w: Array, window: cells.Window, gates: int, units: int, out: Array) -> None:
    """Let a kernel pack some gates of a weight, on several threads if it is large."""

    def call(me: int, parties: int, barrier: Array) -> None:
        kernel(w, window.count, window.rotate, gates, units, out, me, parties, barrier)

    batching.together(batching.parties_for(WORK_OF_A_NUMBER * w.size, 0, len(w), w.dtype), call)


def _pack_weights(kernel: Any, cell: cells.Cell, w: SimpleNamespace, parts: Any, out: Array) -> None:
    """The parts that the passes have in common."""
    L = LANES_OF[out.dtype]
    units, W = cell.spread * L, VECS * L
    out[parts.zeros : parts.zeros + W] = 0
    _pack(kernel, w.weight_ih, cell.x, cell.gates, units, out[parts.w_ih :])
    _pack(kernel, w.weight_hh, cell.h, cell.gates, units, out[parts.w_hh :])
    if cell.again.count:
        _pack(kernel, w.weight_hh, cell.again, cell.gates, units, out[parts.again :])
    if cell.P != cell.H:
        _pack(kernel, w.weight_hr, WHOLE, 1, W, out[parts.again :])
    if cell.peephole:
        out[parts.extra : parts.end] = np.concatenate([_padded(p, -(-cell.H // L) * L) for p in w.peepholes])


def _pack_bias(cell: cells.Cell, w: SimpleNamespace, out: Array) -> None:
    """The biases of all slots; out: all of that part."""
    L, H = LANES_OF[out.dtype], cell.H
    slots = out.reshape(-1, VECS // cell.spread, L)
    slots[...] = 0
    for window, bias in (cell.x, w.bias_ih), (cell.h, w.bias_hh), (cell.again, w.bias_hh):
        for j in range(window.count):
            g = (j + window.rotate) % cell.gates
            slots[:, window.slot + j] += _padded(bias[g * H : g * H + H], len(slots) * L).reshape(-1, L)


def _padded(numbers: Array, count: int) -> Array:
    padded = np.zeros(count, numbers.dtype)
    padded[: len(numbers)] = numbers
    return padded


def pack_linear(w: Array, bias: Any = 0) -> Array:
    """Bias (N), or a number, and weight (N, K) of a linear layer as `kernels.linear.forward` reads them."""
    (N, K), W = w.shape, VECS * LANES_OF[w.dtype]
    end = -(-N // W) * W
    packed = memory.empty(end * (1 + K), w.dtype)
    packed[:N], packed[N:end] = bias, 0
    _pack(pack, w, WHOLE, 1, W, packed[end:])
    return packed


def pack_linear_back(w: Array) -> Array:
    """The weight (N, K) of a linear layer, after a row of zeros, as `kernels.linear.backward` reads it."""
    (N, K), W = w.shape, VECS * LANES_OF[w.dtype]
    packed = memory.empty(W + -(-N // W) * W * -(-K // W) * W, w.dtype)
    packed[:W] = 0
    _pack(pack_transposed, w, WHOLE, 1, W, packed[W:])
    return packed


def pack_all(layer: "Recurrent") -> Array:
    """All weights as the forward kernels read them, where the layer's records say."""
    packed = memory.empty(int(layer.records["packed"]["end"][-1]), layer.dtype)
    for key, places in zip(layer._keys(), layer.records["packed"].tolist()):
        w, parts = weights(layer, *key), cells.PackedParts(*places)
        _pack_bias(layer.cell, w, packed[parts.bias : parts.w_ih])
        _pack_weights(pack, layer.cell, w, parts, packed)
    return packed


def pack_backward(layer: "Recurrent", key: Key, parts: cells.BackParts) -> Array:
    """A direction's weights as the backward kernels read them."""
    packed = memory.empty(parts.end, layer.dtype)
    _pack_weights(pack_transposed, layer.cell, weights(layer, *key), parts, packed)
    return packed


def packed_of(layer: "Recurrent") -> Array:
    """`pack_all`, made once for a version of the parameters."""
    return layer.parameters.derived("forward", partial(pack_all, layer))


def packs(layer: "Recurrent", save: bool) -> Packs:
    """Each direction's records and weights, as the kernels take them: forward and, if ``save``, backward."""
    return layer.parameters.derived(("packs", save), partial(_packs, layer, save))


def _packs(layer: "Recurrent", save: bool) -> Packs:
    packed, packs = packed_of(layer), {}
    for i, (key, places) in enumerate(zip(layer._keys(), layer.records["packed_back"].tolist())):
        records = layer.records[i:]
        backward = pack_backward(layer, key, cells.BackParts(*places)) if save else packed
        packs[key] = (records, packed), (records, backward)
    return packs


def gradients(layer: "Recurrent", sums: Sums, key: Key, N: int, I: int, states: list[Array]) -> Any:
    """Arrays for a direction's gradients: those by the state are ``states``, those by weights ``sums``' own, of which
    there may be none yet."""
    cell, dtype, L = layer.cell, layer.dtype, LANES_OF[layer.dtype]
    H, P, U = cell.H, cell.P, -(-cell.H // L)
    if key not in sums:
        sums[key] = [
            np.empty((cell.gates * H, I), dtype),
            np.empty((cell.gates * H, P), dtype),
            np.empty((P, H) if P != H else (0, 0), dtype),
            np.empty((-(-U // cell.spread), VECS * L), dtype),
            np.empty((3, U * L) if cell.peephole else (0, 0), dtype),
        ]
    s_0 = states[1] if layer.STATES == 2 else np.empty_like(states[0])
    return bptt.Gradients(np.empty((N, I), dtype), states[0], s_0, *sums[key])


def named(layer: "Recurrent", sums: Sums) -> Gradients:
    """Gradients by the parameters' names, from what the kernels write."""
    cell = layer.cell
    named: Gradients = {}
    in_bias_ih, in_bias_hh = _bias_places(cell, LANES_OF[layer.dtype])
    for k, d in layer._keys():
        w_ih, w_hh, w_hr, b, peepholes = sums[k, d]
        given = {"weight_ih": w_ih, "weight_hh": w_hh, "weight_hr": w_hr}
        given |= {"bias_ih": b.take(in_bias_ih), "bias_hh": b.take(in_bias_hh)}
        if cell.peephole:
            given |= {f"weight_c{gate}": row[: cell.H].copy() for gate, row in zip("ifo", peepholes)}
        named |= {name: given[kind] for kind, name in layer.names[k, d].items()}
    return named


@lru_cache(1024)
def _bias_places(cell: cells.Cell, L: int) -> tuple[Array, Array]:
    """Where the numbers of ``bias_ih`` and of ``bias_hh`` are among the bias's gradients, (G, W)."""
    units = np.arange(cell.H)
    of_unit = units // (cell.spread * L) * VECS * L + units % (cell.spread * L)
    places = np.empty((2, cell.gates, cell.H), np.int64)
    for bias, windows in zip(places, ([cell.x], [cell.h, cell.again])):
        for window in windows:
            for j in range(window.count):
                bias[(j + window.rotate) % cell.gates] = of_unit + (window.slot + j) * L
    return places[0].ravel(), places[1].ravel()


# Where the parts of an array are, as kernels take it, and the array's size. What is returned must not be changed.


@lru_cache(1024)
def buffer_layout(*shape: Any) -> tuple[Array, int]:
    parts = cells.layout(*shape)
    return np.array([parts], cells.record_of(cells.BufferParts)), parts.end


@lru_cache(1024)
def work_layout(*shape: Any) -> tuple[Array, int]:
    parts = bptt.work_layout(*shape)
    return np.array([parts], cells.record_of(bptt.WorkParts)), parts.end
