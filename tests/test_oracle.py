"""The oracle against finite differences and PyTorch: what everything else is compared with has to be right itself."""

import numpy as np
import oracle
import pytest

GATES = {"RNN": 1, "LSTM": 4, "GRU": 3}
DEFAULTS = {"nonlinearity": "tanh", "reset_after": True}
RAGGED = [4, 0, 7, 2, 7]


def fake(cell, I, H, num_layers=1, bidirectional=False, proj_size=0, **config):
    """What the oracle reads of a layer: one that needs no kernels."""
    rng = np.random.default_rng(1)
    P, rows = proj_size or H, (GATES[cell] - bool(config.get("coupled"))) * H
    parameters = {}
    for k in range(num_layers):
        for suffix in [f"_l{k}", f"_l{k}_reverse"][: 1 + bidirectional]:
            width = I if k == 0 else P * (1 + bidirectional)
            shapes = {"weight_ih": (rows, width), "weight_hh": (rows, P), "bias_ih": rows, "bias_hh": rows}
            if proj_size:
                shapes |= {"weight_hr": (P, H)}
            if config.get("peephole"):
                shapes |= {f"weight_c{g}": H for g in ("fo" if config.get("coupled") else "ifo")}
            if config.get("layer_norm"):
                shapes |= {"weight_ln_ih": rows, "weight_ln_hh": rows}
                shapes |= {"weight_ln_c": H, "bias_ln_c": H} if cell == "LSTM" else {}
            parameters |= {name + suffix: rng.uniform(-1, 1, shape) for name, shape in shapes.items()}
    layer = type(cell, (), {})()
    layer.parameters, layer.num_layers, layer.bidirectional = parameters, num_layers, bidirectional
    layer.input_size, layer.hidden_size, layer.dtype = I, H, np.float64
    layer.config = {**DEFAULTS, "proj_size": proj_size, **config}
    return layer, oracle.inputs(layer, 7, len(RAGGED))


def random_masks(layer, x, dy, H):
    """Masks of every kind, zoneout being in some places half."""
    rng, (T, B, _) = np.random.default_rng(3), x.shape
    D = 1 + layer.bidirectional
    P = dy.shape[2] // D
    masks = {("dropout", k): 2.0 * rng.integers(0, 2, (T, B, D * P)) for k in range(1, layer.num_layers)}
    for k, d in np.ndindex(layer.num_layers, D):
        masks["recurrent", k, d] = 2.0 * rng.integers(0, 2, (B, P))
        masks["zoneout_h", k, d] = rng.integers(0, 3, (T, B, P)) / 2
        masks["zoneout_c", k, d] = rng.integers(0, 3, (T, B, H)) / 2
    return masks


CASES = [
    ("RNN", {}),
    ("RNN", {"nonlinearity": "relu"}),
    ("RNN", {"nonlinearity": "identity"}),
    ("RNN", {"nonlinearity": (np.arctan, lambda y: np.cos(y) ** 2)}),
    ("LSTM", {}),
    ("LSTM", {"proj_size": 2}),
    ("LSTM", {"peephole": True}),
    ("LSTM", {"peephole": True, "cell_clip": 0.7}),
    ("LSTM", {"peephole": True, "coupled": True, "proj_size": 3}),
    ("LSTM", {"layer_norm": True}),
    ("LSTM", {"layer_norm": True, "coupled": True, "peephole": True, "cell_clip": 0.9, "proj_size": 2}),
    ("GRU", {}),
    ("GRU", {"reset_after": False}),
    ("GRU", {"layer_norm": True}),
]


@pytest.mark.parametrize("masked", [False, True], ids=["as called", "masked"])
@pytest.mark.parametrize(("cell", "options"), CASES, ids=[f"{cell} {i}" for i, (cell, _) in enumerate(CASES)])
def test_finite_differences(cell, options, masked):
    layer, (x, state, dy, dstate) = fake(cell, 3, 5, num_layers=2, bidirectional=True, zoneout=(0.2, 0.3), **options)
    masks = random_masks(layer, x, dy, 5) if masked else None
    y, after, tape = oracle.forward(layer, x, state, RAGGED, masks)
    dx, d_before, grads = oracle.backward(layer, tape, dy, dstate)
    states, d_after = oracle.as_tuple(state), oracle.as_tuple(dstate)
    for b, length in enumerate(RAGGED):
        assert not y[length:, b].any()
        assert not dx[length:, b].any()
        assert length > 0 or all(np.array_equal(s[:, b], s_n[:, b]) for s, s_n in zip(states, oracle.as_tuple(after)))

    def loss():
        y, after, _ = oracle.forward(layer, x, oracle.as_state(layer, states), RAGGED, masks)
        return (y * dy).sum() + sum((s * ds).sum() for s, ds in zip(oracle.as_tuple(after), d_after))

    rng, step = np.random.default_rng(4), 1e-5
    arrays = {"x": x, **dict(zip("hc", states)), **layer.parameters}
    gradients = {"x": dx, **dict(zip("hc", oracle.as_tuple(d_before))), **grads}
    assert gradients.keys() == arrays.keys()
    for name, array in arrays.items():
        along, at = rng.standard_normal(array.shape), array.copy()
        values = []
        for shift in (-2, -1, 1, 2):
            array[...] = at + shift * step * along
            values.append(loss())
        array[...] = at
        measured = np.dot([1, -8, 8, -1], values) / (12 * step)
        parts = gradients[name] * along
        assert abs(measured - parts.sum()) < 1e-7 * np.abs(parts).sum(), name


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(
    ("cell", "options"),
    [("RNN", {}), ("RNN", {"nonlinearity": "relu"}), ("LSTM", {}), ("LSTM", {"proj_size": 2}), ("GRU", {})],
    ids=str,
)
def test_pytorch(cell, options, ragged):
    torch = pytest.importorskip("torch")
    layer, (x, state, dy, dstate) = fake(cell, 3, 5, num_layers=2, bidirectional=True, **options)
    lengths = [max(n, 1) for n in RAGGED] if ragged else [len(x)] * len(RAGGED)
    theirs = getattr(torch.nn, cell)(3, 5, num_layers=2, bidirectional=True, dtype=torch.float64, **options)
    theirs.load_state_dict({name: torch.tensor(array) for name, array in layer.parameters.items()})
    tensors = [torch.tensor(a, requires_grad=True) for a in (x, *oracle.as_tuple(state))]
    packed = torch.nn.utils.rnn.pack_padded_sequence(tensors[0], torch.tensor(lengths), enforce_sorted=False)
    packed, after = theirs(packed, tuple(tensors[1:]) if cell == "LSTM" else tensors[1])
    y, _ = torch.nn.utils.rnn.pad_packed_sequence(packed)
    after = after if cell == "LSTM" else (after,)
    torch.autograd.backward([y, *after], [torch.tensor(a) for a in (dy, *oracle.as_tuple(dstate))])
    y_o, after_o, tape = oracle.forward(layer, x, state, lengths)
    dx, d_before, grads = oracle.backward(layer, tape, dy, dstate)
    pairs = [(y_o, y), *zip(oracle.as_tuple(after_o), after)]
    pairs += [(a, tensor.grad) for a, tensor in zip((dx, *oracle.as_tuple(d_before)), tensors)]
    pairs += [(grads[name], parameter.grad) for name, parameter in theirs.named_parameters()]
    for actual, expected in pairs:
        np.testing.assert_allclose(actual, expected.detach().numpy(), rtol=0, atol=1e-12)
