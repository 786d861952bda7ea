"""Checks of arguments: every public function's errors say which argument, what was expected and what came."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

DTYPES = (np.dtype(np.float32), np.dtype(np.float64))


def describe(value: Any) -> str:
    """A few words on what was given."""
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of {len(value)}"
    if isinstance(value, (str, int, float, bool, type(None))):
        return repr(value)
    return type(value).__name__


def integer(value: Any, name: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an int, got {describe(value)}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    return int(value)


def positive(value: Any, name: str) -> int:
    return integer(value, name, 1)


def number(value: Any, name: str, least: float = -np.inf, most: float = np.inf) -> float:
    """A finite number from ``least`` to ``most``."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name}: expected a number, got {describe(value)}")
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an int past the largest float
        finite = False
    if not finite or not least <= value <= most:
        raise ValueError(f"{name}: expected a number from {least} to {most}, got {value}")
    return float(value)


def probability(value: Any, name: str) -> float:
    """A probability less than 1."""
    value = number(value, name, 0, 1)
    if value == 1:
        raise ValueError(f"{name}: expected a probability less than 1, got 1")
    return value


def as_seed(value: Any, name: str = "seed") -> int | None:
    """A whole number that seeds a random generator, or None, for which the system gives one."""
    return None if value is None else integer(value, name, 0)


def flag(value: Any, name: str) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected True or False, got {describe(value)}")
    return bool(value)


def float_dtype(value: Any) -> np.dtype:
    # None would be float64 to NumPy, also where it only compares.
    try:
        dtype = np.dtype("V") if value is None else np.dtype(value)
    except TypeError:
        dtype = np.dtype("V")
    if dtype not in DTYPES:
        raise TypeError(f"dtype: expected float32 or float64, got {value!r}")
    return dtype


def as_array(value: Any, name: str) -> NDArray[Any]:
    """``value`` as an array, such as NumPy makes of it."""
    try:
        return np.asarray(value)
    except Exception as error:
        raise TypeError(f"{name}: expected an array in main memory, got {describe(value)}: {error}") from error


def as_checked(value: Any, name: str, dtype: np.dtype, shape: tuple[int | None, ...]) -> NDArray[Any]:
    """``value`` as an array, if it has this dtype and shape. ``None`` in ``shape``: any size of at least 1."""
    array = value if type(value) is np.ndarray else as_array(value, name)
    if array.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype}, got {array.dtype}")
    if array.shape != shape and not _fits(array.shape, shape):
        expected = ", ".join("at least 1" if n is None else str(n) for n in shape)
        raise ValueError(f"{name}: expected shape ({expected}), got {array.shape}")
    return array


def as_kernel_array(value: Any, name: str, dtype: np.dtype, shape: tuple[int | None, ...]) -> NDArray[Any]:
    """As `as_checked`, laid out as kernels read arrays (C-contiguous, aligned, writable); a copy if need be."""
    array = as_checked(value, name, dtype, shape)
    # A read-only array would be another type to Numba, compiled for anew.
    return array if array.flags.carray else np.array(array, order="C")


def as_lengths(value: Any, name: str, steps: int, batch: int) -> NDArray[np.int64]:
    """``value`` as the lengths of a batch of sequences, from 0 to ``steps``."""
    array = as_array(value, name)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers, got dtype {array.dtype}")
    if array.shape != (batch,):
        raise ValueError(f"{name}: expected shape ({batch},), got {array.shape}")
    least, most = int(array.min()), int(array.max())
    if least < 0 or most > steps:
        raise ValueError(f"{name}: expected numbers from 0 to {steps}, got {least if least < 0 else most}")
    return array.astype(np.int64)


def as_indices(value: Any, name: str, below: int, shape: tuple[int, ...] | None = None) -> NDArray[np.int64]:
    """``value`` as a C-contiguous array of int64 from 0 to ``below`` - 1, of a given shape or of any, at least one."""
    array = as_array(value, name)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers, got dtype {array.dtype}")
    if shape is not None and array.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {array.shape}")
    if array.size == 0:
        raise ValueError(f"{name}: expected at least one index, got shape {array.shape}")
    least, most = int(array.min()), int(array.max())
    if least < 0 or most >= below:
        raise ValueError(f"{name}: expected indices from 0 to {below - 1}, got {least if least < 0 else most}")
    return as_kernel_array(array.astype(np.int64, copy=False), name, np.dtype(np.int64), array.shape)


def _fits(given: tuple[int, ...], shape: tuple[int | None, ...]) -> bool:
    return len(given) == len(shape) and all(n >= 1 if m is None else n == m for n, m in zip(given, shape))
