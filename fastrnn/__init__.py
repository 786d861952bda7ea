"""Recurrent networks at the speed of the silicon: layers on NumPy arrays, run by Numba kernels.

>>> import numpy as np
>>> import fastrnn
>>> lstm = fastrnn.LSTM(input_size=64, hidden_size=128)
>>> y, (h_n, c_n) = lstm(np.zeros((10, 32, 64), np.float32))
>>> y.shape
(10, 32, 128)
"""

from pathlib import Path

if not (Path(__file__).parent / "kernels").is_dir():
    # A checkout: `kernels/` lies beside this package; an installation has it inside.
    __path__.append(str(Path(__file__).parent.parent))

__version__ = "0.1.0"

from . import losses, models, optim, seq2seq, tasks, training
from .batching import get_num_threads, set_num_threads
from .beam import beam_search, greedy
from .bptt import truncated_bptt
from .cells import GRUCell, LSTMCell, RNNCell
from .decoding import Constraints
from .heads import Embedding, Linear
from .layers import GRU, LSTM, RNN
from .losses import cross_entropy
from .models import LanguageModel
from .optim import clip_grad_norm, clip_grad_value
from .sampling import sample, stochastic_beam_search
from .seq2seq import Seq2Seq

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Constraints",
    "Embedding",
    "GRUCell",
    "LSTMCell",
    "LanguageModel",
    "Linear",
    "RNNCell",
    "Seq2Seq",
    "beam_search",
    "clip_grad_norm",
    "clip_grad_value",
    "cross_entropy",
    "get_num_threads",
    "greedy",
    "losses",
    "models",
    "optim",
    "sample",
    "seq2seq",
    "set_num_threads",
    "stochastic_beam_search",
    "tasks",
    "training",
    "truncated_bptt",
]
