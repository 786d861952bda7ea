"""The LSTM straight from its equations in float64 NumPy, loops and all: what the layers and kernels are compared with.

Parameters are a dict with PyTorch's names; arrays are (T, B, features), states (num_layers, B, H).
"""

import numpy as np

# The largest error, relative to the array's largest number.
TOLERANCE = {np.dtype(np.float32): 300 * 2.0**-23, np.dtype(np.float64): 1e-12}


def assert_close(actual, expected, what=""):
    """``actual`` agrees with the float64 array ``expected`` to the tolerance of its own dtype."""
    assert actual.shape == expected.shape, what
    error = np.abs(actual.astype(np.float64) - expected).max()
    scale = np.abs(expected).max()
    assert error <= TOLERANCE[actual.dtype] * scale, f"{what}: error {error:.3g}, scale {scale:.3g}"


def assert_same_bits(actual, expected, what=""):
    assert actual.shape == expected.shape, what
    assert actual.dtype == expected.dtype, what
    assert actual.tobytes() == expected.tobytes(), what


def sigmoid(x):
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e))


def layer_of(parameters, k):
    w_ih, w_hh = (np.asarray(parameters[f"weight_{name}_l{k}"], np.float64) for name in ("ih", "hh"))
    zeros = np.zeros(len(w_ih))
    b_ih, b_hh = (np.asarray(parameters.get(f"bias_{name}_l{k}", zeros), np.float64) for name in ("ih", "hh"))
    return w_ih, w_hh, b_ih, b_hh


def forward(parameters, x, h_0, c_0, masks=None):
    """``y, h_n, c_n`` and the tape that `backward` reads. ``masks[k]`` multiplies the input of layer k, for k > 0."""
    x, h_0, c_0 = (np.asarray(a, np.float64) for a in (x, h_0, c_0))
    h_n, c_n, tape = [], [], []
    with np.errstate(all="ignore"):
        for k in range(len(h_0)):
            w_ih, w_hh, b_ih, b_hh = layer_of(parameters, k)
            if masks and k > 0:
                x = x * masks[k]
            h, c = h_0[k], c_0[k]
            y, steps = [], []
            for x_t in x:
                a_i, a_f, a_g, a_o = np.split(x_t @ w_ih.T + b_ih + h @ w_hh.T + b_hh, 4, axis=1)
                i, f, g, o = sigmoid(a_i), sigmoid(a_f), np.tanh(a_g), sigmoid(a_o)
                h_before, c_before = h, c
                c = f * c_before + i * g
                h = o * np.tanh(c)
                y.append(h)
                steps.append((x_t, i, f, g, o, h_before, c_before, c))
            x = np.stack(y)
            h_n.append(h)
            c_n.append(c)
            tape.append(steps)
    return x, np.stack(h_n), np.stack(c_n), tape


def backward(parameters, tape, dy, dh_n, dc_n, masks=None):
    """``dx, dh_0, dc_0`` and the parameters' gradients, by the chain rule from the last step to the first."""
    dy, dh_n, dc_n = (np.asarray(a, np.float64) for a in (dy, dh_n, dc_n))
    dh_0, dc_0, gradients = np.empty_like(dh_n), np.empty_like(dc_n), {}
    for k in reversed(range(len(tape))):
        w_ih, w_hh, _, _ = layer_of(parameters, k)
        dw_ih, dw_hh, db = np.zeros_like(w_ih), np.zeros_like(w_hh), np.zeros(len(w_ih))
        dh, dc = dh_n[k], dc_n[k]
        dx = []
        for dy_t, (x_t, i, f, g, o, h_before, c_before, c) in zip(dy[::-1], tape[k][::-1], strict=True):
            dh = dh + dy_t
            do = dh * np.tanh(c)
            dc = dc + dh * o / np.cosh(c) ** 2
            di, df, dg = dc * g, dc * c_before, dc * i
            da = np.hstack([di * i * (1 - i), df * f * (1 - f), dg * (1 - g**2), do * o * (1 - o)])
            dw_ih += da.T @ x_t
            dw_hh += da.T @ h_before
            db += da.sum(0)
            dx.append(da @ w_ih)
            dh, dc = da @ w_hh, dc * f
        dh_0[k], dc_0[k] = dh, dc
        dy = np.stack(dx[::-1])
        if masks and k > 0:
            dy = dy * masks[k]
        gradients |= {f"weight_ih_l{k}": dw_ih, f"weight_hh_l{k}": dw_hh}
        if f"bias_ih_l{k}" in parameters:
            gradients |= {f"bias_ih_l{k}": db, f"bias_hh_l{k}": db}
    return dy, dh_0, dc_0, gradients
