"""Fixtures that several files share, and hypothesis' profile."""

import os
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

ROOT = Path(__file__).parent.parent
# The checkout is what is tested, even where a copy is installed.
sys.path.insert(0, str(ROOT))

from fastrnn import batching, passes  # noqa: E402

# The same examples in every run; compiling takes seconds, so no deadline.
settings.register_profile("fastrnn", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("fastrnn")


@pytest.fixture(params=[np.float32, np.float64], ids=["float32", "float64"])
def dtype(request):
    return np.dtype(request.param)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def threads():
    """Every test leaves the number of threads as it was."""
    before = batching.get_num_threads()
    yield
    batching.set_num_threads(before)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Small shapes have several chunks, as large ones do."""
    monkeypatch.setattr(passes, "ROWS_FORWARD", 48)


@pytest.fixture
def small_shares(monkeypatch):
    """Even the smallest work is cut for several threads, so that small shapes test what large ones do."""
    monkeypatch.setattr(batching, "WORTH_A_THREAD", 0)
    monkeypatch.setattr(batching, "ROWS_OF_A_SHARE", 4)


def in_a_fork(function):
    """Whether ``function()`` returns true in a forked child, which must end in time."""
    with warnings.catch_warnings():
        # From Python 3.12 on, forking a process that has threads warns: here this is the point.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if function() else 2
        finally:
            os._exit(code)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.002)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return False
