"""Training with checkpoints that continue exactly: of a language model, and of sequence-to-sequence models.

A language model is trained by truncated backpropagation through time. The text is cut into ``batch`` streams that are
read side by side, window after window of ``seq_len`` steps. The state is carried from window to window; gradients end
at the window's edge (Williams and Peng 1990; Mikolov et al. 2010). Pairs of sequences are read whole.
"""

import hashlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from .checks import as_array, as_indices, as_seed, describe, integer, number, positive
from .losses import cross_entropy
from .models import CHECKPOINT_PREFIX, LanguageModel, load_parameters, read_config
from .optim import Optimizer, clip_grad_norm
from .parameters import Array, read_file, write_file
from .recurrent import Gradients
from .seq2seq import Seq2Seq, pad

SCHEDULES = ("constant", "cosine")


class Training:
    """What trainers share: updates, the learning rate's schedule, checkpoints, Ctrl-C.

    A trainer says how many ``windows`` an epoch has, which are learnt one an update, and how loss and gradients of the
    next one come about (``_loss_and_gradients``). ``state`` is what it carries from one to the next, an array or a
    tuple of arrays, None before an epoch's first one.
    """

    # In checkpoints, the arrays of the state have these names.
    STATE_NAMES: tuple[str, ...]
    windows: int

    def __init__(
        self,
        model: Any,
        optimizer: Optimizer,
        batch: int,
        epochs: int,
        clip: float | None,
        schedule: str,
        seed: int | None,
    ):
        if not isinstance(optimizer, Optimizer) or optimizer.parameters is not model.parameters:
            raise TypeError(f"optimizer: expected one of the model's parameters, got {describe(optimizer)}")
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {describe(schedule)}")
        self.model, self.optimizer = model, optimizer
        self.batch, self.epochs = positive(batch, "batch"), positive(epochs, "epochs")
        self.clip = None if clip is None else number(clip, "clip", 0)
        self.schedule, self.lr = schedule, optimizer.lr
        self.settings: dict[str, Any] = {
            "batch": self.batch,
            "epochs": self.epochs,
            "clip": self.clip,
            "schedule": self.schedule,
            "seed": seed,
            "lr": self.lr,
            "optimizer": {"class": type(optimizer).__name__, **optimizer.config},
        }
        self.epoch, self.window = 0, 0
        self.state: Any = None
        self._rng = np.random.default_rng(as_seed(seed))

    def _loss_and_gradients(self) -> tuple[float, Any, Gradients]:
        """``loss, state, grads`` of the window that comes next."""
        raise NotImplementedError

    @property
    def updates(self) -> int:
        """How many updates have been made."""
        return self.epoch * self.windows + self.window

    @property
    def total(self) -> int:
        """How many updates make the whole training."""
        return self.epochs * self.windows

    def update(self) -> float:
        """Take the next window, make one update, and return the loss before it, in nats a token.

        Raises FloatingPointError for a loss that is not finite, before it does harm; RuntimeError after the last one.
        """
        if self.updates >= self.total:
            raise RuntimeError(f"update: expected at most {self.total} updates, as many have been made")
        if self.schedule == "cosine":
            self.optimizer.lr = self.lr * (0.5 + 0.5 * math.cos(math.pi * self.updates / self.total))
        loss, state, grads = self._loss_and_gradients()
        if not math.isfinite(loss):
            raise FloatingPointError(f"loss: expected a finite number, got {loss}: try a smaller learning rate")
        if self.clip is not None:
            clip_grad_norm(grads, self.clip)
        self.optimizer.step(grads)
        self.window, self.state = self.window + 1, state
        if self.window == self.windows:
            self.epoch, self.window, self.state = self.epoch + 1, 0, None
        return loss

    def run(
        self,
        path: str | os.PathLike[str] | None = None,
        every: float = 30.0,
        progress: Callable[[float], Any] | None = None,
    ) -> bool:
        """Update until the last epoch's end, and return True; or until Ctrl-C, and return False.

        Args:
            path: where to write a checkpoint at each epoch's end, after so many seconds, and at Ctrl-C; None: nowhere.
            every: seconds between checkpoints.
            progress: called with each update's loss.
        """
        every = number(every, "every", 0)
        written = time.monotonic()
        with interrupts() as interrupted:
            while self.updates < self.total:
                loss = self.update()
                if progress is not None:
                    progress(loss)
                stop = interrupted()
                due = stop or self.window == 0 or time.monotonic() - written >= every
                if path is not None and due:
                    self.save(path)
                    written = time.monotonic()
                if stop:
                    return False
        return True

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint: the model's file, and with it all that `resume` needs.

        A file that is already there is replaced only once the new one is whole.
        """
        arrays = dict(self.model.parameters)
        for name, array in self.optimizer.state_dict().items():
            arrays[f"{CHECKPOINT_PREFIX}optimizer.{name}"] = array
        if self.state is not None:
            state = self.state if isinstance(self.state, tuple) else (self.state,)
            for name, array in zip(self.STATE_NAMES, state):
                arrays[f"{CHECKPOINT_PREFIX}state.{name}"] = array
        progress = {"epoch": self.epoch, "window": self.window, "rng": self._rng.bit_generator.state}
        metadata = {
            "fastrnn": json.dumps({"class": type(self.model).__name__, **self.model.config}),
            "training": json.dumps({"settings": self.settings, "progress": progress}),
        }
        write_file(path, arrays, metadata)

    def resume(self, path: str | os.PathLike[str]) -> None:
        """Continue from a checkpoint, which gives the same bits as if nothing had come between.

        Raises FileNotFoundError; ValueError for a file that is no checkpoint, or one of another model, text,
        pairs or other settings; then nothing changes.
        """
        arrays, metadata = read_file(path)
        theirs, progress = read_settings(metadata, path)
        check_settings(read_config(metadata, path), {"class": type(self.model).__name__, **self.model.config}, path)
        check_settings(theirs, self.settings, path)

        prefix, before = f"{CHECKPOINT_PREFIX}optimizer.", self.model.state_dict()
        load_parameters(self.model, arrays, path)
        try:
            kept = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
            self.optimizer.load_state_dict(kept)
        except (KeyError, TypeError, ValueError) as error:
            self.model.load_state_dict(before)
            text = f"path: expected a checkpoint of {type(self.optimizer).__name__}, got {os.fspath(path)!r}: {error}"
            raise ValueError(text) from error
        self.epoch, self.window = progress["epoch"], progress["window"]
        self._rng.bit_generator.state = progress["rng"]
        names = [f"{CHECKPOINT_PREFIX}state.{name}" for name in self.STATE_NAMES]
        state = tuple(arrays[name] for name in names if name in arrays)
        self.state = state if len(state) > 1 else state[0] if state else None


class Trainer(Training):
    """Trains a language model on a text, update by update.

    Args:
        model, optimizer: the optimiser is of the model's parameters; its ``lr`` is the first update's.
        tokens: the text, integers (N,), at least two for each stream.
        batch: streams side by side.
        seq_len: steps of a window; an epoch's last one may be shorter.
        epochs: times that the text is read.
        clip: the largest norm of an update's gradients (`clip_grad_norm`), or None.
        schedule: "constant", or "cosine", by which the learning rate falls to 0 at the last update's end
            (Loshchilov and Hutter 2017).
        seed: of the dropout masks; None takes the system's.

    Raises TypeError or ValueError for an argument of a wrong type or value.

    >>> from fastrnn.models import LanguageModel
    >>> from fastrnn.optim import Adam
    >>> from fastrnn.training import Trainer
    >>> model = LanguageModel(2, 4, 8, seed=0, vocabulary="ab")
    >>> optimizer = Adam(model.parameters, lr=0.01)
    >>> trainer = Trainer(model, optimizer, model.vocabulary.encode("ab" * 200), batch=2, seq_len=10, epochs=5)
    >>> losses = []
    >>> trainer.run(progress=losses.append)
    True
    >>> len(losses), losses[-1] < losses[0] / 2
    (100, True)
    """

    STATE_NAMES = ("h", "c")

    def __init__(
        self,
        model: LanguageModel,
        optimizer: Optimizer,
        tokens: Any,
        batch: int = 32,
        seq_len: int = 64,
        epochs: int = 1,
        clip: float | None = None,
        schedule: str = "constant",
        seed: int | None = None,
    ):
        if not isinstance(model, LanguageModel):
            raise TypeError(f"model: expected a LanguageModel, got {describe(model)}")
        super().__init__(model, optimizer, batch, epochs, clip, schedule, seed)
        self.seq_len = positive(seq_len, "seq_len")
        tokens = _text(tokens, model.num_tokens, self.batch)
        self._streams = streams(tokens, self.batch)
        self.settings |= {"seq_len": self.seq_len, "text": hashlib.sha256(tokens.tobytes()).hexdigest()}
        self.windows = -(-(len(self._streams) - 1) // self.seq_len)

    def _loss_and_gradients(self) -> tuple[float, Any, Gradients]:
        first = self.window * self.seq_len
        last = min(first + self.seq_len, len(self._streams) - 1)
        inputs, targets = self._streams[first:last], self._streams[first + 1 : last + 1]
        return self.model.loss_and_gradients(inputs, targets, self.state, self._rng)


class PairTrainer(Training):
    """Trains a sequence-to-sequence model on pairs of sequences, which are shuffled in every epoch.

    Args:
        model, optimizer: the optimiser is of the model's parameters; its ``lr`` is the first update's.
        sources, targets: as many of both, lists of tokens.
        batch: pairs of an update; an epoch's last one may have fewer.
        epochs: times that the pairs are read.
        clip, schedule: as for `Trainer`.
        seed: of the order and the dropout masks; None takes the system's.

    Raises TypeError or ValueError for an argument of a wrong type or value.

    >>> from fastrnn.optim import Adam
    >>> from fastrnn.seq2seq import Seq2Seq
    >>> from fastrnn.training import PairTrainer
    >>> model = Seq2Seq(2, 2, 4, 8, seed=0)
    >>> optimizer = Adam(model.parameters, lr=0.02)
    >>> trainer = PairTrainer(model, optimizer, [[0, 1], [1], [1, 1]], [[1, 0], [0], [0, 0]], epochs=60, seed=0)
    >>> trainer.run()
    True
    >>> sources, lengths = [[0, 1], [1, 1]], [2, 1]  # the first one has 0, 1 and the second one 1
    >>> model.greedy(sources, lengths).tokens[:, 0]
    array([[1, 0, 2], [0, 2, 2]])
    """

    STATE_NAMES = ("order",)

    def __init__(
        self,
        model: Seq2Seq,
        optimizer: Optimizer,
        sources: Sequence[Any],
        targets: Sequence[Any],
        batch: int = 32,
        epochs: int = 1,
        clip: float | None = None,
        schedule: str = "constant",
        seed: int | None = None,
    ):
        if not isinstance(model, Seq2Seq):
            raise TypeError(f"model: expected a Seq2Seq, got {describe(model)}")
        super().__init__(model, optimizer, batch, epochs, clip, schedule, seed)
        self._sources, self._targets = pad(sources), pad(targets)
        count = len(self._sources[1])
        if len(self._targets[1]) != count:
            raise ValueError(f"targets: expected {count}, as there are sources, got {len(self._targets[1])}")
        as_indices(self._sources[0], "sources", model.num_sources)
        as_indices(self._targets[0], "targets", model.end)
        content = b"".join(array.tobytes() for array in (*self._sources, *self._targets))
        self.settings["pairs"] = hashlib.sha256(content).hexdigest()
        self.windows = -(-count // self.batch)

    def _loss_and_gradients(self) -> tuple[float, Any, Gradients]:
        order = self._rng.permutation(len(self._sources[1])) if self.state is None else self.state
        chosen = order[self.window * self.batch : (self.window + 1) * self.batch]
        pairs = []
        for tokens, lengths in (self._sources, self._targets):
            longest = max(1, lengths[chosen].max())
            pairs += [tokens[:longest, chosen], lengths[chosen]]
        loss, grads = self.model.loss_and_gradients(*pairs, self._rng)
        return loss, order, grads


def read_settings(metadata: dict[str, str], path: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings and the progress in a checkpoint's metadata."""
    try:
        training, _ = json.loads(metadata["training"]), metadata["fastrnn"]
        return dict(training["settings"]), dict(training["progress"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"path: expected a checkpoint of a training, got {os.fspath(path)!r}") from error


def check_settings(theirs: dict[str, Any], mine: dict[str, Any], path: Any) -> None:
    """Raise ValueError unless a checkpoint's settings are these."""
    for name, value in mine.items():
        if theirs.get(name) != value:
            raise ValueError(
                f"{name}: the checkpoint {os.fspath(path)!r} is of other settings: it has {theirs.get(name)!r}, "
                f"not {value!r}"
            )


def streams(tokens: Array, batch: int) -> Array:
    """A text (N,) as (N // batch, batch): stream after stream of it in columns; up to batch - 1 tokens are left out."""
    steps = len(tokens) // batch
    return np.ascontiguousarray(tokens[: steps * batch].reshape(batch, steps).T)


def evaluate(model: LanguageModel, tokens: Any, batch: int = 1, seq_len: int = 512) -> float:
    """Bits a token (of a character model: bits per character) that the model needs for a text, given what came before.

    Args:
        model: a LanguageModel.
        tokens: the text, integers (N,), at least two for each stream.
        batch: streams to cut the text into, for speed; each starts without what came before.
        seq_len: steps at once; makes no difference but for speed.

    Raises TypeError or ValueError for an argument of a wrong type or value.

    >>> import numpy as np
    >>> from fastrnn.models import LanguageModel
    >>> from fastrnn.training import evaluate
    >>> model = LanguageModel(4, 2, 3)
    >>> model.parameters["output.weight"] = np.zeros((4, 3), np.float32)
    >>> model.parameters["output.bias"] = np.zeros(4, np.float32)
    >>> evaluate(model, np.arange(100) % 4)
    2.0
    """
    if not isinstance(model, LanguageModel):
        raise TypeError(f"model: expected a LanguageModel, got {describe(model)}")
    batch, seq_len = positive(batch, "batch"), positive(seq_len, "seq_len")
    text = streams(_text(tokens, model.num_tokens, batch), batch)
    state, total = None, 0.0
    for first in range(0, len(text) - 1, seq_len):
        inputs = text[first : min(first + seq_len, len(text) - 1)]
        logits, state = model(inputs, state)
        total += cross_entropy(logits, text[first + 1 : first + 1 + len(inputs)])[0] * len(inputs)
    return total / (len(text) - 1) / math.log(2)


def _text(tokens: Any, num_tokens: int, batch: int) -> Array:
    tokens = as_array(tokens, "tokens")
    if tokens.ndim != 1:
        raise ValueError(f"tokens: expected shape (N,), got {tokens.shape}")
    integer(len(tokens), f"tokens, two for each of {batch} streams", 2 * batch)
    return as_indices(tokens, "tokens", num_tokens)


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Within the block a first Ctrl-C is only noted, and asked for by the function that this yields.

    A second one interrupts at once. Outside the main thread, where signals do not come, nothing is noted.
    """
    noted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield noted.is_set
        return
    before = signal.getsignal(signal.SIGINT)

    def note(signum: int, frame: Any) -> None:
        noted.set()
        signal.signal(signal.SIGINT, before)
        # Not through sys.stderr, which this may have interrupted while it was writing.
        with suppress(OSError):
            os.write(2, b"\nstopping after this update; Ctrl-C again stops at once\n")

    signal.signal(signal.SIGINT, note)
    try:
        yield noted.is_set
    finally:
        signal.signal(signal.SIGINT, before)
