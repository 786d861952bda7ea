"""PyTorch's own threads as the parties of a call, for what runs inside PyTorch.

PyTorch's OpenMP threads spin for milliseconds after each of its operations, to be there at once for the next. Other
threads would have to wait for a CPU meanwhile; so a call here is the next. Where PyTorch runs on another library, and
in a forked child, in which GNU's OpenMP has lost its threads, fastrnn's helpers do it.
"""

import ctypes
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..batching import ALONE, Call

_Region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@lru_cache(None)
def _openmp() -> tuple[Any, Any, Any] | None:
    """OpenMP's functions that start a team, and tell its size and a thread's number; None if there are none."""
    if "parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    path = str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")
    try:
        # Names are looked for in what PyTorch's library was linked with, too.
        start = ctypes.CDLL(path).GOMP_parallel
        at_once = ctypes.PyDLL(path)  # which does not hand over the interpreter for so short a call
        size, number = at_once.omp_get_num_threads, at_once.omp_get_thread_num
    except (OSError, AttributeError):
        return None
    start.argtypes, start.restype = [_Region, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return start, size, number


def available() -> bool:
    """Whether `together` can run here."""
    return not _forked and _openmp() is not None


def together(parties: int, call: Call) -> None:
    """As `fastrnn.batching.together`, on threads of PyTorch's team, which the calling thread leads."""
    functions = _openmp()
    assert functions is not None
    start, team_size, thread_number = functions
    barrier = np.zeros(16, np.int64)
    errors: list[BaseException] = []

    def region(_: Any) -> None:
        me, count = thread_number(), min(parties, team_size())
        if me >= count:
            return
        try:
            call(me, count, barrier if count > 1 else ALONE)
        except BaseException as error:
            errors.append(error)
            barrier[1] = 1  # the others must not wait for this one

    # A team of another size than PyTorch's would end some of its threads, and PyTorch would start them anew.
    start(_Region(region), None, 0, 0)
    if errors:
        raise errors[0]
