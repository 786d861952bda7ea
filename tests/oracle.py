"""The layers straight from their equations in float64 NumPy, loops and all: what layers and kernels are compared with.

`forward` and `backward` read a layer's parameters and options. Sequences are time first, (T, B, features).

``masks`` is a dict of what is drawn at random in training. What it lacks is as in a call: nothing is dropped, and
zoneout is its expectation. Zoneout is 1 where a unit keeps its old state; the other masks multiply.

    ("dropout", k): (T, B, features)                           the input of layer k > 0
    ("recurrent", k, d): (B, P)                                what direction d of layer k sees of its old h
    ("zoneout_h", k, d), ("zoneout_c", k, d): (T, B, units)    or a number; the first step is the direction's own first
"""

import numba
import numpy as np

import fastrnn

# The largest error, relative to the array's largest number.
TOLERANCE = {np.dtype(np.float32): 300 * 2.0**-23, np.dtype(np.float64): 1e-12}
EPSILON = 1e-5  # added to the variance in layer normalisation


def assert_close(actual, expected, what="", slack=1):
    """``actual`` agrees with the float64 array ``expected`` to the tolerance of its own dtype, times ``slack``."""
    assert actual.shape == expected.shape, what
    error = np.abs(actual.astype(np.float64) - expected).max()
    scale = np.abs(expected).max()
    assert error <= slack * TOLERANCE[actual.dtype] * scale, f"{what}: error {error:.3g}, scale {scale:.3g}"


def assert_same_bits(actual, expected, what=""):
    assert actual.shape == expected.shape, what
    assert actual.dtype == expected.dtype, what
    assert actual.tobytes() == expected.tobytes(), what


def sigmoid(x):
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e))


# Parts of a cell. Each backward pass adds to ``grads``, a dict like the weights.


def normalise(v):
    deviation = np.sqrt(v.var(-1, keepdims=True) + EPSILON)
    return (v - v.mean(-1, keepdims=True)) / deviation, deviation


def normalise_backward(n, deviation, dn):
    return (dn - dn.mean(-1, keepdims=True) - n * (dn * n).mean(-1, keepdims=True)) / deviation


def product(w, name, x, rows=slice(None)):
    """Rows of W x + b, ``name`` being ih or hh, with the product normalised where there are weights for that."""
    a = x @ w[f"weight_{name}"][rows].T
    n = deviation = None
    if f"weight_ln_{name}" in w:
        n, deviation = normalise(a)
        a = n * w[f"weight_ln_{name}"]
    return a + w.get(f"bias_{name}", np.zeros(len(w[f"weight_{name}"])))[rows], (name, x, rows, n, deviation)


def product_backward(w, grads, saved, da):
    """The gradient by x."""
    name, x, rows, n, deviation = saved
    if f"bias_{name}" in w:
        grads[f"bias_{name}"][rows] += da.sum(0)
    if n is not None:
        grads[f"weight_ln_{name}"] += (da * n).sum(0)
        da = normalise_backward(n, deviation, da * w[f"weight_ln_{name}"])
    grads[f"weight_{name}"][rows] += da.T @ x
    return da @ w[f"weight_{name}"][rows]


# Cells: a step takes x, the old h as the weights see it, and the old states; it returns the new states and what the
# step backward reads. That one returns the gradients by what the step took.


def nonlinearity(config):
    """The function, and its derivative in terms of its value."""
    given = config["nonlinearity"]
    if not isinstance(given, str):
        f, df = (np.vectorize(getattr(g, "py_func", g), otypes=[np.float64]) for g in given)
        return f, df
    return {
        "tanh": (np.tanh, lambda y: 1 - y**2),
        "relu": (lambda a: np.maximum(a, 0), lambda y: np.where(y > 0, 1.0, 0.0)),
        "identity": (lambda a: a, np.ones_like),
    }[given]


def rnn_step(w, config, x, seen, h):
    u, saved_u = product(w, "ih", x)
    v, saved_v = product(w, "hh", seen)
    h = nonlinearity(config)[0](u + v)
    return (h,), (saved_u, saved_v, h)


def rnn_backward(w, config, grads, saved, dh):
    saved_u, saved_v, h = saved
    da = dh * nonlinearity(config)[1](h)
    return product_backward(w, grads, saved_u, da), product_backward(w, grads, saved_v, da), np.zeros_like(dh)


def lstm_step(w, config, x, seen, h, c):
    def gate(function, a, peephole=0.0):
        """The gate's value, and its derivative."""
        a = a + peephole
        limit = config.get("cell_clip") or np.inf
        y = function(np.clip(a, -limit, limit))
        return y, (1 - y**2 if function is np.tanh else y * (1 - y)) * (np.abs(a) < limit)

    u, saved_u = product(w, "ih", x)
    v, saved_v = product(w, "hh", seen)
    *a_i, a_f, a_g, a_o = np.split(u + v, 3 if config.get("coupled") else 4, axis=1)
    f, slope_f = gate(sigmoid, a_f, w.get("weight_cf", 0) * c)
    g, slope_g = gate(np.tanh, a_g)
    i, slope_i = gate(sigmoid, *a_i, w.get("weight_ci", 0) * c) if a_i else (1 - f, None)
    c_new = f * c + i * g
    o, slope_o = gate(sigmoid, a_o, w.get("weight_co", 0) * c_new)
    out, n, deviation = c_new, None, None
    if "weight_ln_c" in w:
        n, deviation = normalise(c_new)
        out = n * w["weight_ln_c"] + w["bias_ln_c"]
    tanh_c = np.tanh(out)
    h = o * tanh_c
    saved = (saved_u, saved_v, c, c_new, n, deviation, tanh_c, h, i, f, g, o, slope_i, slope_f, slope_g, slope_o)
    return (h @ w["weight_hr"].T if "weight_hr" in w else h, c_new), saved


def lstm_backward(w, config, grads, saved, dh, dc):
    saved_u, saved_v, c, c_new, n, deviation, tanh_c, h, i, f, g, o, slope_i, slope_f, slope_g, slope_o = saved
    dh_before = np.zeros_like(dh)
    if "weight_hr" in w:
        grads["weight_hr"] += dh.T @ h
        dh = dh @ w["weight_hr"]
    da_o = dh * tanh_c * slope_o
    d_out = dh * o * (1 - tanh_c**2)
    if n is not None:
        grads["weight_ln_c"] += (d_out * n).sum(0)
        grads["bias_ln_c"] += d_out.sum(0)
        d_out = normalise_backward(n, deviation, d_out * w["weight_ln_c"])
    dc = dc + d_out + da_o * w.get("weight_co", 0)
    da_g = dc * i * slope_g
    if slope_i is None:
        da_i, da_f = None, dc * (c - g) * slope_f
    else:
        da_i, da_f = dc * g * slope_i, dc * c * slope_f
    dc_before = dc * f
    for name, da, seen in [("weight_ci", da_i, c), ("weight_cf", da_f, c), ("weight_co", da_o, c_new)]:
        if name in w:
            grads[name] += (da * seen).sum(0)
            if seen is c:
                dc_before = dc_before + da * w[name]
    da = np.hstack([d for d in (da_i, da_f, da_g, da_o) if d is not None])
    dx, d_seen = product_backward(w, grads, saved_u, da), product_backward(w, grads, saved_v, da)
    return dx, d_seen, dh_before, dc_before


def gru_step(w, config, x, seen, h):
    H = h.shape[1]
    gates, new = slice(2 * H), slice(2 * H, None)
    u, saved_u = product(w, "ih", x)
    if config["reset_after"]:
        v, saved_v = product(w, "hh", seen)
        r, z = np.split(sigmoid(u[:, gates] + v[:, gates]), 2, axis=1)
        v_n, saved_n = v[:, new], None
        n = np.tanh(u[:, new] + r * v_n)
    else:
        v, saved_v = product(w, "hh", seen, gates)
        r, z = np.split(sigmoid(u[:, gates] + v), 2, axis=1)
        v_n, saved_n = product(w, "hh", r * seen, new)
        n = np.tanh(u[:, new] + v_n)
    return ((1 - z) * n + z * h,), (saved_u, saved_v, saved_n, v_n, seen, h, r, z, n)


def gru_backward(w, config, grads, saved, dh):
    saved_u, saved_v, saved_n, v_n, seen, h, r, z, n = saved
    da_n = dh * (1 - z) * (1 - n**2)
    da_z = dh * (h - n) * z * (1 - z)
    if saved_n is None:
        dr, d_reset, dv_n = da_n * v_n, 0.0, [da_n * r]
    else:
        d_reset_h = product_backward(w, grads, saved_n, da_n)
        dr, d_reset, dv_n = d_reset_h * seen, d_reset_h * r, []
    da_r = dr * r * (1 - r)
    dx = product_backward(w, grads, saved_u, np.hstack([da_r, da_z, da_n]))
    d_seen = product_backward(w, grads, saved_v, np.hstack([da_r, da_z, *dv_n])) + d_reset
    return dx, d_seen, dh * z


CELLS = {"RNN": (rnn_step, rnn_backward), "LSTM": (lstm_step, lstm_backward), "GRU": (gru_step, gru_backward)}


# Layers.


def weights_of(layer, k, d):
    suffix = f"_l{k}" + "_reverse" * d
    return {
        name.removesuffix(suffix): np.asarray(array, np.float64)
        for name, array in layer.parameters.items()
        if name.endswith(suffix)
    }


def as_tuple(state):
    return tuple(np.asarray(s, np.float64) for s in (state if isinstance(state, (tuple, list)) else (state,)))


def as_state(layer, states):
    return tuple(states) if type(layer).__name__ == "LSTM" else states[0]


def zoneouts(layer, masks, k, d, steps, rows):
    """For each state, what part of it each step keeps."""
    p = layer.config.get("zoneout", 0)
    keeps = []
    for letter, expectation in zip("hc", p if isinstance(p, (tuple, list)) else (p, p)):
        keep = masks.get((f"zoneout_{letter}", k, d), expectation)
        keeps.append(np.full(steps, keep) if np.ndim(keep) == 0 else keep[:steps, rows])
    return keeps


def blend(keep, old, new):
    """keep * old + (1 - keep) * new, where 0 times what is not finite is 0."""
    return np.where(keep == 0, new, np.where(keep == 1, old, keep * old + (1 - keep) * new))


def forward(layer, x, state, lengths=None, masks=None):
    """``y, state_n`` and the tape that `backward` reads."""
    T, B, _ = x.shape
    x, before, masks = np.asarray(x, np.float64), as_tuple(state), masks or {}
    lengths = np.full(B, T) if lengths is None else np.asarray(lengths)
    directions = 1 + layer.bidirectional
    step, _ = CELLS[type(layer).__name__]
    y = np.zeros((T, B, directions * before[0].shape[2]))
    after = [s.copy() for s in before]
    tape = []
    with np.errstate(all="ignore"):
        for length in np.unique(lengths):
            rows = np.flatnonzero(lengths == length)
            passes, sequence = [], x[:length, rows]
            for k in range(layer.num_layers):
                if ("dropout", k) in masks:
                    sequence = sequence * masks["dropout", k][:length, rows]
                outputs = []
                for d in range(directions):
                    w, at = weights_of(layer, k, d), k * directions + d
                    states = tuple(s[at, rows] for s in before)
                    mask = masks.get(("recurrent", k, d), np.ones((B, 1)))[rows]
                    keeps = zoneouts(layer, masks, k, d, length, rows)
                    steps, hs = [], np.empty((length, *states[0].shape))
                    for t in range(length):
                        new, saved = step(w, layer.config, sequence[-1 - t if d else t], mask * states[0], *states)
                        states = tuple(blend(keep[t], s, s_new) for keep, s, s_new in zip(keeps, states, new))
                        hs[t] = states[0]
                        steps.append(saved)
                    for s, s_n in zip(after, states):
                        s[at, rows] = s_n
                    outputs.append(hs[::-1] if d else hs)
                    passes.append((w, mask, keeps, steps))
                sequence = np.concatenate(outputs, axis=2)
            y[:length, rows] = sequence
            tape.append((length, rows, passes))
    return y, as_state(layer, after), (x.shape, masks, tape)


def backward(layer, tape, dy, dstate):
    """``dx, dstate_0`` and the parameters' gradients, by the chain rule from the last step to the first."""
    shape, masks, groups = tape
    dy, d_after = np.asarray(dy, np.float64), as_tuple(dstate)
    directions = 1 + layer.bidirectional
    _, step_backward = CELLS[type(layer).__name__]
    dx, d_before = np.zeros(shape), [s.copy() for s in d_after]
    gradients = {name: np.zeros(array.shape) for name, array in layer.parameters.items()}
    with np.errstate(all="ignore"):
        for length, rows, passes in groups:
            d_sequence = dy[:length, rows]
            for k in reversed(range(layer.num_layers)):
                d_outputs, d_sequence = np.split(d_sequence, directions, axis=2), 0.0
                for d, d_hs in enumerate(d_outputs):
                    at = k * directions + d
                    w, mask, keeps, steps = passes[at]
                    suffix = f"_l{k}" + "_reverse" * d
                    grads = {name: gradients[name + suffix] for name in w}
                    d_inputs = np.empty((length, len(rows), w["weight_ih"].shape[1]))
                    d_states = [s[at, rows] for s in d_after]
                    for t in reversed(range(length)):
                        place = length - 1 - t if d else t
                        d_states[0] = d_states[0] + d_hs[place]
                        d_new = [(1 - keep[t]) * ds for keep, ds in zip(keeps, d_states)]
                        d_input, d_seen, *d_old = step_backward(w, layer.config, grads, steps[t], *d_new)
                        d_old[0] = d_old[0] + mask * d_seen
                        d_states = [keep[t] * ds + ds_old for keep, ds, ds_old in zip(keeps, d_states, d_old)]
                        d_inputs[place] = d_input
                    for s, ds in zip(d_before, d_states):
                        s[at, rows] = ds
                    d_sequence = d_sequence + d_inputs
                if ("dropout", k) in masks:
                    d_sequence = d_sequence * masks["dropout", k][:length, rows]
            dx[:length, rows] = d_sequence
    return dx, as_state(layer, d_before), gradients


# What the tests of layers share.


@numba.njit
def softsign(a):
    return a / (1 + abs(a))


@numba.njit
def softsign_slope(y):
    return (1 - abs(y)) ** 2


# Every cell with every option of its own; the first word is the class. For "proj" `make` says the size.
CASES = {
    "RNN": {},
    "RNN relu": {"nonlinearity": "relu"},
    "RNN identity": {"nonlinearity": "identity"},
    "RNN softsign": {"nonlinearity": (softsign, softsign_slope)},
    "LSTM": {},
    "LSTM proj": {},
    "LSTM peephole": {"peephole": True},
    "LSTM clip": {"cell_clip": 0.6},
    "LSTM coupled": {"coupled": True},
    "LSTM peephole clip coupled proj": {"peephole": True, "cell_clip": 0.6, "coupled": True},
    "LSTM norm": {"layer_norm": True},
    "LSTM norm peephole clip coupled proj": {"layer_norm": True, "peephole": True, "cell_clip": 0.9, "coupled": True},
    "GRU": {},
    "GRU reset before": {"reset_after": False},
    "GRU norm": {"layer_norm": True},
}
BASIC = ["RNN", "LSTM", "GRU"]


def make(case, I, H, dtype=np.float32, seed=1, **options):
    """A layer with no parameter that could as well be missing."""
    options = {**CASES[case], **options}
    if "proj" in case:
        options["proj_size"] = max(1, H // 3)
    layer = getattr(fastrnn, case.split()[0])(I, H, dtype=dtype, seed=seed, **options)
    rng = np.random.default_rng(seed)
    with layer.parameters.writable() as arrays:
        for array in arrays.values():
            array += rng.uniform(-0.3, 0.3, array.shape) * H**-0.5
    return layer


def inputs(layer, T, B, seed=0):
    """``x, state, dy, dstate``, time first."""
    rng = np.random.default_rng(seed)
    directions, H = 1 + layer.bidirectional, layer.hidden_size
    P = layer.config.get("proj_size") or H
    widths = [P, H] if type(layer).__name__ == "LSTM" else [P]
    states = [(layer.num_layers * directions, B, width) for width in widths]
    shapes = [(T, B, layer.input_size), (T, B, directions * P), *states, *states]
    x, dy, *rest = (rng.standard_normal(shape).astype(layer.dtype) for shape in shapes)
    state, dstate = rest[: len(states)], rest[len(states) :]
    return x, as_state(layer, state), dy, as_state(layer, dstate)


def lengths_for(T, B):
    """Lengths that are neither sorted nor all different, with 0 and T among them if there is room."""
    lengths = np.random.default_rng([T, B]).integers(0, T + 1, B)
    lengths[: B // 3 : 2], lengths[-1] = T, 0 if B > 1 else T
    return lengths


def each(state, function):
    """A state with its arrays replaced by what the function makes of them."""
    return tuple(map(function, state)) if isinstance(state, tuple) else function(state)


def named(state, name):
    """The arrays of a state, as ``h`` and ``c`` with the name after it."""
    return {letter + name: array for letter, array in zip("hc", state if isinstance(state, tuple) else (state,))}


def pulled(result):
    """All that a pullback gives, by name."""
    dx, d_before, grads = result
    return {"dx": dx, **{f"d{name}": array for name, array in named(d_before, "_0").items()}, **grads}


def everything(layer, x, state, dy, dstate, rng=None, lengths=None, checkpoint=None):
    """All that call and vjp give, as a dict of arrays by name."""
    y, after = layer(x, state, lengths)
    (y_vjp, after_vjp), pullback = layer.vjp(x, state, rng, lengths, checkpoint)
    results = {"y": y, **named(after, "_n"), "y of vjp": y_vjp, **named(after_vjp, "_n of vjp")}
    return results | pulled(pullback(dy, dstate))


def expected(layer, x, state, dy, dstate, lengths=None, masks=None):
    """What vjp gives, by the equations."""
    y, after, tape = forward(layer, x, state, lengths, masks)
    return {"y": y, **named(after, "_n"), **pulled(backward(layer, tape, dy, dstate))}


def assert_all_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert_same_bits(np.ascontiguousarray(actual[name]), np.ascontiguousarray(array), name)


def assert_all_close(layer, actual, expected):
    # Dividing by a deviation near 0 makes small errors larger.
    slack = 20 if layer.config.get("layer_norm") else 1
    for name, array in expected.items():
        assert_close(actual[name], array, name, slack)
