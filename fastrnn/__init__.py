"""Recurrent networks at the speed of the silicon."""

from pathlib import Path

if not (Path(__file__).parent / "kernels").is_dir():
    # A checkout: `kernels/` lies beside this package; an installation has it inside.
    __path__.append(str(Path(__file__).parent.parent))

from .batching import get_num_threads, set_num_threads
from .layers import LSTM

__version__ = "0.1.0"
__all__ = ["LSTM", "get_num_threads", "set_num_threads"]
