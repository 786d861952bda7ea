"""sigmoid, tanh and exp of a vector: within 4 ulp everywhere, NaN-preserving, without a branch or a table.

All come from one reduction, ``z = n ln 2 + r`` with ``|r| <= ln 2 / 2``, and a polynomial for ``expm1(r)``. Every
multiply-add is written out, so the bits do not depend on the code around a call.
"""

from numba import types
from numba.extending import overload

from .compiler import kernel, part
from .vector import (
    absolute,
    at,
    at_least,
    copysign,
    fma,
    horner,
    lanes,
    load_part,
    load_whole,
    low_bits_to_exponent,
    store_part,
    store_whole,
    where_negative,
)

# Per dtype:
#   1 / ln 2;
#   ln 2 as a short part, whose product with n is exact, and the rest;
#   two numbers that, added, round to an integer n and leave the exponent field of 2**n, or of 2**n / tiny, in the
#   low bits;
#   tiny, the least normal number;
#   z at which exp(z) is 0;
#   q, in ascending powers, the minimax polynomial of (expm1(r) - r) / r**2 for |r| <= ln 2 / 2.
_CONSTANTS = {
    types.float32: (
        1.4426950408889634,
        (0.693359375, -2.12194440054690583e-4),
        (1.5 * 2.0**23 + 127, 1.5 * 2.0**23 + 253),
        2.0**-126,
        -105.0,
        (
            0.500000001349817786,
            0.166666666816591791,
            0.0416664646020265416,
            0.00833331088958207719,
            0.00139336858626171736,
            0.000198910306543703277,
        ),
    ),
    types.float64: (
        1.4426950408889634,
        (0.693147180369123816, 1.90821492927058770e-10),
        (1.5 * 2.0**52 + 1023, 1.5 * 2.0**52 + 2045),
        2.0**-1022,
        -746.0,
        (
            0.5,
            0.16666666666666671,
            0.0416666666666666698,
            0.00833333333332611205,
            0.00138888888888837318,
            0.000198412698749012592,
            0.0000248015873256053228,
            2.75572552979696444e-6,
            2.75572735701021397e-7,
            2.51052595384484934e-8,
            2.0914717341716376e-9,
        ),
    ),
}


def _constants(x):
    """The constants for a vector's dtype."""


@overload(_constants)
def _overload_constants(x):
    constants = _CONSTANTS[x.dtype]
    return lambda x: constants


@part
def _expm1_reduced(z, shift):
    """``(expm1(r), shifted)`` with ``z = n ln 2 + r``, where ``shifted`` holds ``n`` in its low bits."""
    log2e, ln2, _, _, _, q = _constants(z)
    shifted = fma(z, log2e, shift)
    n = shifted - shift
    r = fma(n, -ln2[1], fma(n, -ln2[0], z))
    return fma(r * r, horner(r, q), r), shifted


@part
def exp_nonpositive(z):
    """``exp(z)`` of a vector of numbers up to 0, relatively accurate down to the subnormal numbers; 0 at -inf."""
    _, _, shifts, tiny, lowest, _ = _constants(z)
    expm1_r, shifted = _expm1_reduced(at_least(z, lowest), shifts[1])
    # 2**n may be subnormal: it is reached in two steps, of which only the last rounds.
    power = low_bits_to_exponent(shifted)
    return fma(expm1_r, power, power) * tiny


@part
def sigmoid(x):
    """``1 / (1 + exp(-x))`` of a vector, relatively accurate down to the subnormal numbers."""
    e = exp_nonpositive(absolute(x) * -1.0)
    s = 1.0 / (e + 1.0)
    return where_negative(x, e * s, s)


@part
def tanh(x):
    """``(1 - exp(-2|x|)) / (1 + exp(-2|x|))``, with the sign of ``x``, of a vector, relatively accurate near 0."""
    _, _, shifts, _, _, _ = _constants(x)
    expm1_r, shifted = _expm1_reduced(at_least(absolute(x) * -2.0, -80.0), shifts[0])
    power = low_bits_to_exponent(shifted)
    expm1 = fma(expm1_r, power, power - 1.0)
    return copysign(expm1 / (expm1 + 2.0), x)


@part
def _map(function, x, y):
    n, step = x.size, lanes(at(x, 0))
    whole = n - n % step
    for i in range(0, whole, step):
        store_whole(function(load_whole(at(x, i))), at(y, i))
    if whole < n:
        store_part(function(load_part(at(x, whole), n - whole)), at(y, whole), n - whole)


@kernel
def sigmoid_array(x, y):
    """``y = sigmoid(x)``. x, y: C-contiguous, of one size and dtype; y is written."""
    _map(sigmoid, x, y)


@kernel
def tanh_array(x, y):
    """``y = tanh(x)``. x, y: C-contiguous, of one size and dtype; y is written."""
    _map(tanh, x, y)
