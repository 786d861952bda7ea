"""scikit-learn's estimators for sequences: a recurrent layer, and a linear one that reads its last states.

They go wherever scikit-learn's own do: `cross_val_score`, `GridSearchCV`, `Pipeline`, `clone`, pickle.
"""

import math
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from ..checks import as_array, as_seed, describe, flag, float_dtype, number, positive, probability
from ..heads import Linear
from ..losses import cross_entropy
from ..masks import drop
from ..models import CELLS
from ..optim import AdamW, clip_grad_norm
from ..parameters import Array, JoinedParameters
from ..recurrent import Gradients, Recurrent
from ..training import interrupts

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.metrics import accuracy_score, r2_score
    from sklearn.model_selection import train_test_split
    from sklearn.utils import check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, column_or_1d
except ImportError as error:
    raise ImportError(
        f"sklearn: expected scikit-learn to be installed, by pip install fastrnn[sklearn]: {error}"
    ) from error

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

# Sequences that are predicted at once, which bounds the memory and changes no bit of the result.
ROWS_AT_ONCE = 256


class Sequences:
    """Sequences (T, I) of any lengths, checked and of one dtype: from X (N, T, I), or N arrays of two dimensions."""

    def __init__(self, X: Any, dtype: np.dtype, features: int | None = None):
        ragged = isinstance(X, (list, tuple)) or (isinstance(X, np.ndarray) and X.dtype == object and X.ndim == 1)
        if ragged:
            self.arrays = [_numbers(x, f"X[{i}]", 2, dtype) for i, x in enumerate(X)]
        else:
            self.arrays = list(_numbers(X, "X", 3, dtype))
        if len(self.arrays) == 0:
            raise ValueError("X: expected at least one sequence, got none")
        self.features = self.arrays[0].shape[-1] if features is None else features
        for i, x in enumerate(self.arrays):
            name = f"X[{i}]" if ragged else "X"
            if x.shape[1] != self.features or self.features == 0:
                raise ValueError(f"{name}: expected {self.features or 'at least 1'} features, got {x.shape[1]}")
            if len(x) == 0:
                raise ValueError(f"{name}: expected at least one step, got none")

    def __len__(self) -> int:
        return len(self.arrays)

    def batch(self, rows: Array) -> tuple[Array, Array]:
        """Some of the sequences, padded, as (T, B, I), and their lengths (B,)."""
        chosen = [self.arrays[i] for i in rows]
        lengths = np.array([len(x) for x in chosen])
        x = np.zeros((lengths.max(), len(chosen), self.features), chosen[0].dtype)
        for b, sequence in enumerate(chosen):
            x[: len(sequence), b] = sequence
        return x, lengths


class RecurrentEstimator(BaseEstimator):  # type: ignore[misc]
    """What the two estimators share: their arguments, and training."""

    layer_: Recurrent
    head_: Linear

    def __init__(
        self,
        cell: str = "gru",
        hidden_size: int = 64,
        num_layers: int = 1,
        bidirectional: bool = False,
        dropout: float = 0.0,
        *,
        learning_rate: float = 1e-3,
        batch_size: int = 32,
        max_iter: int = 200,
        tol: float = 1e-4,
        clip: float | None = 1.0,
        weight_decay: float = 0.0,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 10,
        random_state: Any = None,
        verbose: bool = False,
        dtype: Any = "float32",
    ):
        self.cell = cell
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bidirectional = bidirectional
        self.dropout = dropout
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.max_iter = max_iter
        self.tol = tol
        self.clip = clip
        self.weight_decay = weight_decay
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.random_state = random_state
        self.verbose = verbose
        self.dtype = dtype

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array, tags.input_tags.three_d_array = False, True
        return tags

    # What each of the two has its own of.

    def _targets(self, y: Array, weights: Array | None) -> tuple[Array, int, dict[str, Any]]:
        """The targets as training takes them, how many outputs they need, and attributes of the fitted estimator."""
        raise NotImplementedError

    def _loss(self, outputs: Array, targets: Array, weights: Array | None) -> tuple[float, Array]:
        """The mean loss of a batch, and its gradient by the outputs."""
        raise NotImplementedError

    def _score(self, outputs: Array, targets: Array, weights: Array | None) -> float:
        raise NotImplementedError

    # Training.

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "Self":
        """Learn from sequences and their targets, from the beginning.

        Args:
            X: (N, T, I), or a list of N arrays (T, I), which may be of different lengths.
            y: N targets.
            sample_weight: how much each sequence counts, (N,), not negative; None: all the same.

        Ctrl-C ends the training after the update that is being made, with a warning: what has been learned is kept.

        Raises TypeError or ValueError for an argument of a wrong type or value, NaN among them, or of another number
        of sequences; FloatingPointError if the loss is no longer finite. An estimator that was fitted before then
        stays as it was.
        """
        dtype, dropout = float_dtype(self.dtype), probability(self.dropout, "dropout")
        if not isinstance(self.cell, str) or self.cell not in CELLS:
            raise ValueError(f"cell: expected one of {', '.join(CELLS)}, got {describe(self.cell)}")
        sequences = Sequences(X, dtype)
        N, y = len(sequences), as_array(y, "y")
        if y.ndim == 0 or len(y) != N:
            raise ValueError(f"y: expected as many targets as X has sequences, {N}, got shape {y.shape}")
        weights = None if sample_weight is None else _weights(sample_weight, N)
        targets, outputs, attributes = self._targets(y, weights)
        targets = targets if targets.dtype.kind == "i" else targets.astype(dtype)

        random = check_random_state(self.random_state)
        seeds = [as_seed(seed) for seed in random.randint(np.iinfo(np.int32).max, size=3)]
        # Of a single layer, dropout has only the states that the head reads to act on.
        layer = CELLS[self.cell](
            sequences.features, self.hidden_size, self.num_layers, bidirectional=self.bidirectional,
            dropout=dropout if self.num_layers != 1 else 0.0, dtype=dtype, seed=seeds[0],
        )  # fmt: skip
        head = Linear(layer.directions * layer.output_size, outputs, dtype=dtype, seed=seeds[1])
        parts = self._split(targets, random)
        losses, scores = self._train(layer, head, sequences, targets, weights, *parts, np.random.default_rng(seeds[2]))

        for name, attribute in attributes.items():
            setattr(self, name, attribute)
        self.layer_, self.head_ = layer, head
        self.n_features_in_, self.n_iter_, self.loss_curve_ = sequences.features, len(losses), losses
        self.validation_scores_ = scores if self.early_stopping else None
        self.best_validation_score_ = max(scores) if scores else None
        return self

    def _train(
        self,
        layer: Recurrent,
        head: Linear,
        sequences: Sequences,
        targets: Array,
        weights: Array | None,
        training: Array,
        validation: Array,
        rng: np.random.Generator,
    ) -> tuple[list[float], list[float]]:
        """Change the parameters until there is no more progress. Returns losses and scores, of each epoch."""
        batch_size, max_iter = positive(self.batch_size, "batch_size"), positive(self.max_iter, "max_iter")
        tol, patience = number(self.tol, "tol"), positive(self.n_iter_no_change, "n_iter_no_change")
        clip = None if self.clip is None else number(self.clip, "clip", 0)
        parameters = JoinedParameters({"layer": layer, "head": head})
        optimizer = AdamW(parameters, self.learning_rate, weight_decay=self.weight_decay)
        scale = None if weights is None else _relative(weights, training, validation)

        def update(rows: Array) -> float:
            out, pullback = run_vjp(layer, head, *sequences.batch(rows), self.dropout, rng)
            with np.errstate(over="ignore", invalid="ignore"):
                loss, d_out = self._loss(out, targets[rows], None if scale is None else scale[rows])
            if not math.isfinite(loss):
                raise FloatingPointError(f"loss: expected a finite number, got {loss}: try a smaller learning_rate")
            grads = pullback(d_out)
            if clip is not None:
                clip_grad_norm(grads, clip)
            optimizer.step(grads)
            return loss * len(rows)

        losses: list[float] = []
        scores: list[float] = []
        kept: dict[str, Array] = {}
        best, stale, stopped = -math.inf, 0, False
        with interrupts() as interrupted, tqdm(total=max_iter, unit="epoch", disable=not self.verbose) as bar:
            while len(losses) < max_iter and stale < patience and not stopped:
                total, order = 0.0, rng.permutation(training)
                for rows in np.split(order, range(batch_size, len(order), batch_size)):
                    total += update(rows)
                    stopped = interrupted()
                    if stopped:
                        break
                else:
                    losses.append(total / len(order))
                    value, progress = -losses[-1], {"loss": losses[-1]}
                    if self.early_stopping:
                        out = run(layer, head, sequences, validation)
                        value = self._score(out, targets[validation], None if scale is None else scale[validation])
                        scores.append(value)
                        progress["validation score"] = value
                    stale = 0 if value > best + tol else stale + 1
                    if value > best:
                        best = value
                        kept = {name: a.copy() for name, a in parameters.items()} if self.early_stopping else {}
                    bar.set_postfix(progress, refresh=False)
                    bar.update()
        parameters.update(kept)
        if stopped:
            warnings.warn("fit: interrupted; what has been learned so far is kept", stacklevel=3)
        elif stale < patience:
            warnings.warn(
                f"max_iter: after {max_iter} epochs there was still progress", ConvergenceWarning, stacklevel=3
            )
        return losses, scores

    def _split(self, targets: Array, random: Any) -> tuple[Array, Array]:
        """Which sequences to train with, and which to put aside."""
        N, rows = len(targets), np.arange(len(targets))
        if not flag(self.early_stopping, "early_stopping"):
            return rows, rows[:0]
        count = math.ceil(number(self.validation_fraction, "validation_fraction", 0, 1) * N)
        # R^2 needs two.
        if count < 2 or count == N:
            raise ValueError(
                f"validation_fraction: expected it to put aside 2 of {N} sequences or more, but not all, got {count}"
            )
        stratify = targets if targets.dtype.kind == "i" else None
        training, validation = train_test_split(rows, test_size=count, random_state=random, stratify=stratify)
        return training, validation

    def _outputs(self, X: Any) -> Array:
        """The head's outputs for sequences, (N, outputs), in float64."""
        check_is_fitted(self, "layer_")
        sequences = Sequences(X, self.layer_.dtype, self.n_features_in_)
        return run(self.layer_, self.head_, sequences, np.arange(len(sequences))).astype(np.float64)


class RNNClassifier(ClassifierMixin, RecurrentEstimator):  # type: ignore[misc]
    """Classifies sequences: a recurrent layer reads one, and softmax of a linear layer of its last states says what.

    The last states are those of the top layer, of both directions, each sequence's at its own end. Trained by AdamW
    (Loshchilov and Hutter 2019) on the cross-entropy, by backpropagation through the whole sequences.

    Args:
        cell: "rnn", "lstm" or "gru".
        hidden_size, num_layers, bidirectional: of the recurrent layer, as for `fastrnn.GRU`.
        dropout: the probability with which, in training, each output of each recurrent layer is dropped, and each of
            the last states.
        learning_rate: AdamW's.
        batch_size: sequences of an update.
        max_iter: the most epochs. If there is still progress after them, there is a ConvergenceWarning.
        tol: the least that counts as progress, of the loss in training or, with ``early_stopping``, the score.
        clip: the largest norm of an update's gradients (`fastrnn.clip_grad_norm`), or None.
        weight_decay: AdamW's.
        early_stopping: whether to put sequences aside, to take the score on them after each epoch, and to end with
            the parameters that had the best one.
        validation_fraction: of the sequences to put aside.
        n_iter_no_change: epochs in a row without progress after which training ends.
        random_state: an int, with which the result is the same bit for bit; a numpy.random.RandomState, or None.
        verbose: whether to show a progress bar.
        dtype: float32 or float64, in which everything is computed.

    X is taken as it is: features of very different sizes should be scaled before.

    Attributes, once fitted: ``classes_``; ``layer_`` and ``head_``, the recurrent and the linear layer;
    ``n_features_in_``; ``n_iter_``, epochs made, ``loss_curve_``, the mean loss of each; and, with ``early_stopping``,
    ``validation_scores_``, the accuracy after each epoch, and ``best_validation_score_``, else None.

    >>> import numpy as np
    >>> from fastrnn.interop.sklearn import RNNClassifier
    >>> rng = np.random.default_rng(0)
    >>> X = [rng.standard_normal((rng.integers(3, 9), 2)) for _ in range(200)]  # of different lengths
    >>> y = ["up" if x[-1, 0] > 0 else "down" for x in X]
    >>> model = RNNClassifier(hidden_size=8, learning_rate=0.03, early_stopping=True, random_state=0).fit(X, y)
    >>> model.predict([[[0, 0], [3, 0]], [[3, 0], [3, 0], [-3, 0]]])
    array(['up', 'down'], dtype='<U4')
    """

    def _targets(self, y: Array, weights: Array | None) -> tuple[Array, int, dict[str, Any]]:
        y = column_or_1d(y, warn=True)
        check_classification_targets(y)
        classes, targets = np.unique(y, return_inverse=True)
        if len(classes) < 2:
            raise ValueError(f"y: expected at least two classes, got only {classes.tolist()[0]!r}")
        return targets.astype(np.int64), len(classes), {"classes_": classes}

    def _loss(self, outputs: Array, targets: Array, weights: Array | None) -> tuple[float, Array]:
        loss, d_out = cross_entropy(outputs, targets)
        if weights is None:
            return loss, d_out
        losses = -log_softmax(outputs.astype(np.float64))[np.arange(len(targets)), targets]
        return float((weights * losses).mean()), d_out * weights[:, None].astype(d_out.dtype)

    def _score(self, outputs: Array, targets: Array, weights: Array | None) -> float:
        return float(accuracy_score(targets, outputs.argmax(1), sample_weight=weights))

    def predict(self, X: Any) -> Array:
        """The most probable class of each sequence, (N,); X as for `fit`.

        Raises NotFittedError before `fit`; ValueError for NaN or another number of features.
        """
        outputs = self._outputs(X)
        return self.classes_[outputs.argmax(1)]

    def predict_proba(self, X: Any) -> Array:
        """The probability of each of ``classes_`` for each sequence, (N, classes), in float64."""
        return np.exp(self.predict_log_proba(X))

    def predict_log_proba(self, X: Any) -> Array:
        """The logarithms of `predict_proba`."""
        return log_softmax(self._outputs(X))


class RNNRegressor(RegressorMixin, RecurrentEstimator):  # type: ignore[misc]
    """Predicts numbers from sequences: a recurrent layer reads one, and a linear layer its last states.

    As `RNNClassifier`, with the same arguments and attributes (without ``classes_``), but trained on the mean squared
    error. Targets are standardised inside, so that neither their size nor their mean matters: ``loss_curve_`` is in
    units of their variances, and there are ``y_mean_`` and ``y_scale_``. ``validation_scores_`` are R^2.

    y is (N,), or (N, K) for K numbers each; predictions, in float64, have the same shape.

    >>> import numpy as np
    >>> from fastrnn.interop.sklearn import RNNRegressor
    >>> X = np.random.default_rng(0).standard_normal((200, 5, 2))
    >>> y = 1000 + X[:, -1, 0]
    >>> model = RNNRegressor(hidden_size=8, learning_rate=0.03, early_stopping=True, random_state=0).fit(X, y)
    >>> model.score(X, y) > 0.9
    True
    """

    def _targets(self, y: Array, weights: Array | None) -> tuple[Array, int, dict[str, Any]]:
        if y.ndim not in (1, 2) or 0 in y.shape:
            raise ValueError(f"y: expected shape (N,) or (N, K), got {y.shape}")
        columns = _numbers(y, "y", y.ndim, np.dtype(np.float64)).reshape(len(y), -1)
        mean = np.average(columns, 0, weights)
        largest = np.abs(columns - mean).max(0)  # whose square may be no number
        largest[largest == 0] = 1
        scale = largest * np.sqrt(np.average(((columns - mean) / largest) ** 2, 0, weights))
        scale[scale == 0] = 1
        attributes = {"y_mean_": mean, "y_scale_": scale} if y.ndim == 2 else {"y_mean_": mean[0], "y_scale_": scale[0]}
        return (columns - mean) / scale, columns.shape[1], attributes

    def _loss(self, outputs: Array, targets: Array, weights: Array | None) -> tuple[float, Array]:
        error = outputs - targets
        weighted = error if weights is None else error * weights[:, None].astype(error.dtype)
        return float(np.mean(weighted * error, dtype=np.float64)), weighted * error.dtype.type(2 / error.size)

    def _score(self, outputs: Array, targets: Array, weights: Array | None) -> float:
        return float(r2_score(targets, outputs, sample_weight=weights))

    def predict(self, X: Any) -> Array:
        """The numbers for each sequence, (N,) or (N, K); X as for `fit`.

        Raises NotFittedError before `fit`; ValueError for NaN or another number of features.
        """
        outputs = self._outputs(X)
        outputs = outputs[:, 0] if np.ndim(self.y_mean_) == 0 else outputs
        return outputs * self.y_scale_ + self.y_mean_


def run(layer: Recurrent, head: Linear, sequences: Sequences, rows: Array) -> Array:
    """The outputs (N, outputs) for some of the sequences."""
    outputs = []
    for some in np.split(rows, range(ROWS_AT_ONCE, len(rows), ROWS_AT_ONCE)):
        x, lengths = sequences.batch(some)
        outputs.append(head(_read(layer, layer(x, lengths=lengths)[1])))
    return np.concatenate(outputs)


def run_vjp(
    layer: Recurrent, head: Linear, x: Array, lengths: Array, dropout: float, rng: np.random.Generator
) -> "tuple[Array, Callable[[Array], Gradients]]":
    """The outputs (B, outputs) for x (T, B, I), and the pullback to the gradients by all parameters."""
    (_, state), pullback_layer = layer.vjp(x, rng=rng, lengths=lengths)
    read, undrop = drop(_read(layer, state), dropout, rng)
    outputs, pullback_head = head.vjp(read)
    D = layer.directions

    def pullback(d_out: Array) -> Gradients:
        d_read, head_grads = pullback_head(d_out)
        h_n, *rest = state if isinstance(state, tuple) else (state,)
        dh = np.zeros_like(h_n)
        dh[-D:] = np.split(undrop(d_read), D, 1)
        d_state = (dh, *[np.zeros_like(s) for s in rest]) if rest else dh
        layer_grads = pullback_layer(None, d_state)[2]
        return {f"layer.{n}": g for n, g in layer_grads.items()} | {f"head.{n}": g for n, g in head_grads.items()}

    return outputs, pullback


def _read(layer: Recurrent, state: Any) -> Array:
    """What the head reads: the last h of the top layer, of both directions, (B, directions * H)."""
    h_n = state[0] if isinstance(state, tuple) else state
    return np.concatenate(list(h_n[-layer.directions :]), 1)


def log_softmax(a: Array) -> Array:
    """Logarithms of the softmax of each row."""
    a = a - a.max(1, keepdims=True)
    return a - np.log(np.exp(a).sum(1, keepdims=True))


def _numbers(value: Any, name: str, ndim: int, dtype: np.dtype) -> Array:
    """``value`` as an array of finite numbers of this dtype and of so many dimensions."""
    array = as_array(value, name)
    if array.ndim != ndim:
        shapes = {1: "(N,)", 2: "(T, I)", 3: "(N, T, I), or a list of arrays (T, I)"}
        raise ValueError(f"{name}: expected shape {shapes[ndim]}, got {array.shape}")
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name}: expected real numbers, got dtype {array.dtype}")
    with np.errstate(over="ignore"):
        array = array.astype(dtype, copy=False)
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: expected finite numbers of {dtype}, got NaN or infinity")
    return array


def _weights(sample_weight: Any, count: int) -> Array:
    weights = as_array(sample_weight, "sample_weight")
    if weights.shape != (count,):
        raise ValueError(f"sample_weight: expected shape ({count},), got {weights.shape}")
    weights = _numbers(weights, "sample_weight", 1, np.dtype(np.float64))
    if weights.min() < 0 or weights.max() == 0:
        raise ValueError(f"sample_weight: expected numbers of at least 0, some greater, got {weights.min()}")
    return weights


def _relative(weights: Array, training: Array, validation: Array) -> Array:
    """Weights whose mean over the training sequences is 1."""
    for rows, name in (training, "to train with"), (validation, "put aside"):
        if len(rows) and weights[rows].max() == 0:
            raise ValueError(f"sample_weight: expected some greater than 0 among the sequences {name}, got only 0")
    return weights / weights[training].mean()
