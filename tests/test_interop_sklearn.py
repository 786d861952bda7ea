"""scikit-learn's estimators for sequences: what they learn, and that they are scikit-learn's."""

import copy
import os
import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest
from oracle import assert_close, assert_same_bits

import fastrnn
from fastrnn import batching

pytest.importorskip("sklearn")

from sklearn.base import clone, is_classifier, is_regressor
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_predict, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from fastrnn.interop import sklearn as interop
from fastrnn.interop.sklearn import RNNClassifier, RNNRegressor

ESTIMATORS = [RNNClassifier, RNNRegressor]
CELLS = ["rnn", "lstm", "gru"]
QUICK = {"hidden_size": 12, "learning_rate": 0.02, "random_state": 0}

# What training is cut off after, where it is not what is tested.
unfinished = pytest.mark.filterwarnings("ignore:max_iter:sklearn.exceptions.ConvergenceWarning")


def signs(N=240, T=9, I=2, seed=0, ragged=False):
    """Sequences, and whether the sum of their first features is positive; it is at least 1 or at most -1."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, T + 1, N) if ragged else [T] * N
    X = [rng.standard_normal((t, I)) for t in lengths]
    y = np.array(["plus" if x[:, 0].sum() > 0 else "minus" for x in X])
    for x in X:
        x[:, 0] += np.sign(x[:, 0].sum()) / len(x)
    return X if ragged else np.stack(X), y


def sums(N=240, T=9, seed=0, ragged=False):
    """Sequences, and the means of their features; far from 0."""
    X, _ = signs(N, T, 2, seed, ragged)
    return X, 1e4 + 100 * np.array([x.mean(0) for x in X])


def data(estimator, **options):
    return signs(**options) if estimator is RNNClassifier else sums(**options)


def bits(model):
    return {**model.layer_.state_dict(), **model.head_.state_dict()}


def assert_same_model(a, b):
    assert bits(a).keys() == bits(b).keys()
    for name, array in bits(a).items():
        assert_same_bits(array, bits(b)[name], name)


# Learning.


@unfinished
@pytest.mark.parametrize("ragged", [False, True], ids=["", "ragged"])
@pytest.mark.parametrize("cell", CELLS)
def test_classifier_learns_the_sign_of_a_sum(cell, ragged):
    model = RNNClassifier(cell, **QUICK, max_iter=40).fit(*signs(ragged=ragged))
    X, y = signs(seed=1, ragged=ragged)
    assert model.score(X, y) >= 0.95
    assert model.classes_.tolist() == ["minus", "plus"]
    probabilities = model.predict_proba(X)
    assert_close(probabilities.sum(1), np.ones(len(X)))
    assert (model.classes_[probabilities.argmax(1)] == model.predict(X)).all()
    assert_close(np.log(probabilities), model.predict_log_proba(X))
    assert type(model.layer_) is getattr(fastrnn, cell.upper())


@unfinished
@pytest.mark.parametrize(
    "options", [{"bidirectional": True}, {"num_layers": 2, "dropout": 0.1}, {"dropout": 0.1}], ids=str
)
def test_classifier_tells_three_patterns_apart(options):
    """Which of three beats comes somewhere in noise: the last step does not tell."""
    rng = np.random.default_rng(0)
    patterns = np.array([[1, 0, 1], [1, 1, 1], [1, -1, 1]])
    y = rng.integers(0, 3, 300)
    X = rng.standard_normal((300, 8, 1)) * 0.1
    for x, label in zip(X, y):
        first = rng.integers(0, 4)
        x[first : first + 3, 0] += patterns[label]
    model = RNNClassifier(**QUICK, max_iter=60, **options).fit(X[:200], y[:200] * 10)
    assert model.score(X[200:], y[200:] * 10) >= 0.95
    assert model.classes_.tolist() == [0, 10, 20]


@unfinished
@pytest.mark.parametrize("ragged", [False, True], ids=["", "ragged"])
@pytest.mark.parametrize("cell", CELLS)
def test_regressor_learns_means(cell, ragged):
    X, y = sums(400, ragged=ragged)
    options = {**QUICK, "learning_rate": 0.01, "max_iter": 80, "bidirectional": cell == "gru"}
    two = RNNRegressor(cell, **options).fit(X, y)
    one = RNNRegressor(cell, **options).fit(X, y[:, 0])
    X, y = sums(seed=1, ragged=ragged)
    assert two.score(X, y) >= 0.9
    assert one.score(X, y[:, 0]) >= 0.9
    assert two.predict(X).shape == y.shape
    assert one.predict(X).shape == (len(y),)


@unfinished
def test_targets_of_one_value_are_learned():
    X, _ = signs(20)
    predicted = RNNRegressor(**QUICK, max_iter=60).fit(X, np.full(20, 7.0)).predict(X)
    assert np.abs(predicted - 7).max() < 0.1


@unfinished
def test_what_comes_after_a_sequences_end_is_not_seen():
    """The last of a sequence's own steps is its class, whatever stands beside it in the batch."""
    rng = np.random.default_rng(0)
    X = [rng.choice([-1.0, 1.0], (t, 1)) for t in rng.integers(1, 30, 300)]
    y = np.array([x[-1, 0] for x in X])
    model = RNNClassifier(**QUICK, max_iter=20).fit(X[:200], y[:200])
    assert model.score(X[200:], y[200:]) >= 0.99


@unfinished
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("options", [{"cell": "lstm", "bidirectional": True}, {"num_layers": 2}], ids=str)
def test_predictions_are_the_same_bits_alone_and_in_a_batch(estimator, options, monkeypatch):
    X, y = data(estimator, N=60, ragged=True)
    model = estimator(**QUICK, max_iter=2, **options).fit(X, y)
    outputs = [model._outputs(X)]
    monkeypatch.setattr(interop, "ROWS_AT_ONCE", 7)
    outputs.append(model._outputs(X))
    outputs.append(np.concatenate([model._outputs([x]) for x in X]))
    outputs.append(np.concatenate([model._outputs(x[None]) for x in X]))
    for other in outputs[1:]:
        assert_same_bits(other, outputs[0])


@unfinished
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_array_is_a_list_of_its_sequences(estimator):
    X, y = data(estimator, N=40)
    models = [estimator(**QUICK, max_iter=3, dropout=0.2).fit(each, y) for each in (X, list(X), X.tolist(), objects(X))]
    for model in models[1:]:
        assert_same_model(model, models[0])


def objects(sequences):
    array = np.empty(len(sequences), object)
    for i, sequence in enumerate(sequences):
        array[i] = sequence
    return array


@unfinished
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_training_is_what_its_parts_say(estimator, dtype):
    """One update with all sequences, against the layers' own pullbacks and Adam's first step, which is g / |g|."""
    X, y = data(estimator, N=16, ragged=True)
    options = {**QUICK, "batch_size": 16, "dtype": dtype, "clip": None, "cell": "lstm", "bidirectional": True}
    options["num_layers"] = 2
    before, after = (estimator(**{**options, "learning_rate": lr}, max_iter=1).fit(X, y) for lr in (0, 0.01))
    x, lengths = interop.Sequences(X, dtype).batch(np.arange(16))
    (_, (h, c)), pullback = before.layer_.vjp(x, lengths=lengths)
    out, pullback_head = before.head_.vjp(np.concatenate([h[2], h[3]], 1))
    if estimator is RNNClassifier:
        loss, d_out = fastrnn.cross_entropy(out, np.array([["minus", "plus"].index(label) for label in y]))
    else:
        error = out - ((y - y.mean(0)) / y.std(0)).astype(dtype)
        loss, d_out = (error.astype(float) ** 2).mean(), 2 * error / error.size
    d_read, head_grads = pullback_head(d_out)
    dh = np.stack([np.zeros_like(h[0]), np.zeros_like(h[0]), *np.split(d_read, 2, 1)])
    grads = pullback(None, (dh, np.zeros_like(c)))[2]
    assert_close(np.array(after.loss_curve_[0]).astype(dtype), np.array(loss))
    assert_close(np.array(head_loss(estimator, before, X, y)).astype(dtype), np.array(loss))
    for name, g in {**grads, **head_grads}.items():
        large = np.abs(g) > 1e-5
        assert large.mean() > 0.5
        step = (bits(after)[name] - bits(before)[name])[large]
        assert np.abs(step + 0.01 * np.sign(g[large])).max() < 0.01 * 2e-3, name


def head_loss(estimator, model, X, y):
    """The loss from what a user sees."""
    if estimator is RNNClassifier:
        log = model.predict_log_proba(X)
        return -np.mean([log[i, list(model.classes_).index(label)] for i, label in enumerate(y)])
    return np.mean(((model.predict(X) - y) / y.std(0)) ** 2)


@pytest.mark.parametrize("weights", [None, np.array([0.0, 0.5, 1.5, 2.0])], ids=["", "weights"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradients_by_the_outputs_are_the_losss(estimator, weights, rng):
    outputs = rng.standard_normal((4, 3))
    targets = np.array([0, 2, 2, 1]) if estimator is RNNClassifier else rng.standard_normal((4, 3))

    def loss(outputs):
        return estimator()._loss(outputs, targets, weights)[0]

    assert_gradient(loss, outputs, estimator()._loss(outputs, targets, weights)[1])


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_by_the_parameters_are_the_outputs_own(cell, rng):
    """With dropout: the same generator draws the same masks."""
    layer = getattr(fastrnn, cell.upper())(2, 3, 2, bidirectional=True, dropout=0.5, dtype=np.float64, seed=0)
    head = fastrnn.Linear(6, 2, dtype=np.float64, seed=0)
    x, lengths = interop.Sequences(signs(5, ragged=True)[0], np.dtype(np.float64)).batch(np.arange(5))
    weight = rng.standard_normal((5, 2))

    def call():
        return interop.run_vjp(layer, head, x, lengths, 0.5, np.random.default_rng(1))

    grads = call()[1](weight)
    for module, prefix in (layer, "layer"), (head, "head"):
        assert {f"{prefix}.{name}" for name in module.parameters} <= set(grads)
        for name in module.parameters:
            before = module.parameters[name]

            def value(array, module=module, name=name):
                module.parameters[name] = array
                return (call()[0] * weight).sum()

            assert_gradient(value, before, grads[f"{prefix}.{name}"])
            module.parameters[name] = before


def assert_gradient(f, x, gradient):
    """Central differences at up to ten numbers of x."""
    for i in np.linspace(0, x.size - 1, min(x.size, 10)).astype(int):
        step = np.zeros(x.size)
        step[i] = 1e-6
        step = step.reshape(x.shape)
        assert abs((f(x + step) - f(x - step)) / 2e-6 - gradient.ravel()[i]) < 1e-7 * max(1, np.abs(gradient).max())


@unfinished
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradients_are_clipped_and_weights_decay(estimator):
    X, y = data(estimator, N=16)
    options = {**QUICK, "batch_size": 16, "max_iter": 1}
    before = bits(estimator(**{**options, "learning_rate": 0}).fit(X, y))
    clipped = bits(estimator(**options, clip=0.0).fit(X, y))
    decayed = bits(estimator(**options, clip=0.0, weight_decay=5).fit(X, y))
    for name, array in before.items():
        assert_same_bits(clipped[name], array)
        assert_close(decayed[name], array.astype(np.float64) * (1 - 0.02 * 5))


def test_every_class_is_among_the_sequences_put_aside():
    targets = np.repeat([0, 1, 2], [80, 10, 10])
    for seed in range(5):
        model = RNNClassifier(early_stopping=True, validation_fraction=0.1)
        training, validation = model._split(targets, np.random.RandomState(seed))
        assert np.bincount(targets[validation]).tolist() == [8, 1, 1]
        assert sorted([*training, *validation]) == list(range(100))


# Sample weights.


@unfinished
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_weights_count_sequences(estimator):
    """In one batch a weight of 2 is a sequence twice, and 0 is none."""
    X, y = data(estimator, N=30, ragged=True)
    weights = np.arange(30) % 3
    rows = np.repeat(np.arange(30), weights)
    options = {**QUICK, "max_iter": 5, "batch_size": 100, "dtype": np.float64}
    weighted = estimator(**options).fit(X, y, sample_weight=weights)
    repeated = estimator(**options).fit([X[i] for i in rows], y[rows])
    for name, array in bits(weighted).items():
        assert np.abs(array - bits(repeated)[name]).max() < 1e-9, name
    assert_close(np.array(weighted.loss_curve_), np.array(repeated.loss_curve_), slack=100)
    scaled = estimator(**options).fit(X, y, sample_weight=weights * 1000.0)
    assert_close(np.array(weighted.loss_curve_), np.array(scaled.loss_curve_), slack=100)


@unfinished
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equal_weights_are_none(estimator):
    X, y = data(estimator, N=50)
    options = {**QUICK, "max_iter": 3, "early_stopping": True, "dtype": np.float64}
    a, b = estimator(**options).fit(X, y), estimator(**options).fit(X, y, np.full(50, 3))
    assert_close(np.array(a.loss_curve_), np.array(b.loss_curve_), slack=100)
    assert_close(np.array(a.validation_scores_), np.array(b.validation_scores_), slack=100)


# Stopping.


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_early_stopping_stops_and_restores_the_best(estimator):
    X, y = data(estimator, N=120)
    options = {**QUICK, "n_iter_no_change": 4, "early_stopping": True, "validation_fraction": 0.25}
    model = estimator(**options).fit(X, y)
    scores = model.validation_scores_
    best = int(np.argmax(scores))
    assert model.n_iter_ == len(scores) == len(model.loss_curve_) < 200
    assert model.best_validation_score_ == scores[best]
    # Progress that is less than tol does not count, so the best may be among the last ones.
    assert max(scores[-4:]) <= max(scores[:-4]) + 1e-4
    with pytest.warns(ConvergenceWarning, match=r"^max_iter: after \d+ epochs"):
        there = estimator(**{**options, "n_iter_no_change": 1000}, max_iter=best + 1).fit(X, y)
    assert_same_model(model, there)
    assert best + 1 < model.n_iter_


def test_without_progress_of_the_loss_training_ends():
    X, y = signs(64)
    model = RNNClassifier(**QUICK, tol=1e3, n_iter_no_change=3).fit(X, y)
    # The first epoch is progress from nothing.
    assert model.n_iter_ == 4
    assert model.validation_scores_ is None
    assert model.best_validation_score_ is None


def test_an_end_before_convergence_is_told():
    with pytest.warns(ConvergenceWarning, match="^max_iter: after 3 epochs there was still progress") as record:
        model = RNNClassifier(**QUICK, max_iter=3).fit(*signs(64))
    assert record[0].filename == __file__
    assert model.n_iter_ == len(model.loss_curve_) == 3


class Interrupted(RNNClassifier):
    """Ctrl-C comes in the fifth update."""

    def _loss(self, outputs, targets, weights):
        self.updates = getattr(self, "updates", 0) + 1
        if self.updates == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return super()._loss(outputs, targets, weights)


@pytest.mark.parametrize("early_stopping", [False, True])
def test_ctrl_c_keeps_what_has_been_learned(early_stopping):
    X, y = signs(64)
    options = {**QUICK, "batch_size": 16, "early_stopping": early_stopping}
    model = Interrupted(**options)
    with pytest.warns(UserWarning, match="^fit: interrupted; what has been learned so far is kept") as record:
        model.fit(X, y)
    assert record[0].filename == __file__
    assert model.updates == 5
    assert model.n_iter_ == 1
    assert len(model.predict(X)) == 64
    with pytest.warns(ConvergenceWarning):
        one = RNNClassifier(**options, max_iter=1).fit(X, y)
    assert model.loss_curve_ == one.loss_curve_
    same = all((array == bits(one)[name]).all() for name, array in bits(model).items())
    assert same == early_stopping


def test_a_loss_that_is_not_finite_raises_and_changes_nothing():
    X, y = sums(64)
    with pytest.warns(ConvergenceWarning):
        model = RNNRegressor(**QUICK, max_iter=1).fit(X, y)
    before = bits(model)
    model.set_params(learning_rate=1e30, clip=None, max_iter=50)
    with pytest.raises(
        FloatingPointError, match=r"^loss: expected a finite number, got .*: try a smaller learning_rate"
    ):
        model.fit(X[:, :, :1], y[:, 0])
    assert model.n_features_in_ == 2
    assert model.predict(X).shape == y.shape
    for name, array in bits(model).items():
        assert_same_bits(array, before[name])


@unfinished
def test_progress_is_shown_only_if_asked_for(capfd):
    RNNClassifier(**QUICK, max_iter=2).fit(*signs(40))
    assert capfd.readouterr() == ("", "")
    RNNClassifier(**QUICK, max_iter=2, verbose=True, early_stopping=True).fit(*signs(40))
    out, err = capfd.readouterr()
    assert out == ""
    assert "2/2" in err
    assert "loss=" in err
    assert "validation score=" in err


# What scikit-learn expects of an estimator.


@unfinished
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("options", [{}, {"early_stopping": True, "num_layers": 2, "dropout": 0.5}], ids=str)
def test_a_seed_fixes_every_bit(estimator, options):
    X, y = data(estimator, N=50, ragged=True)
    options = {**QUICK, "max_iter": 3, **options}
    model = estimator(**options).fit(X, y)
    batching.set_num_threads(1)
    again = estimator(**options).fit(X, y)
    assert_same_model(model, again)
    assert_same_model(model.fit(X, y), again)  # fitting is from the beginning
    assert model.loss_curve_ == again.loss_curve_
    other = estimator(**{**options, "random_state": 1}).fit(X, y)
    assert not any((array == bits(other)[name]).all() for name, array in bits(model).items())
    states = [estimator(**{**options, "random_state": np.random.RandomState(0)}).fit(X, y) for _ in range(2)]
    assert_same_model(*states)
    a, b = (estimator(**{**options, "random_state": None}).fit(X, y) for _ in range(2))
    assert (bits(a)["weight"] != bits(b)["weight"]).any()


@unfinished
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_fit_changes_neither_parameters_nor_data(estimator):
    X, y = data(estimator, N=40)
    X.flags.writeable = y.flags.writeable = False
    weights = np.ones(40)
    before = X.copy(), y.copy()
    model = estimator(hidden_size=np.int64(5), max_iter=2, dtype=np.float64)
    parameters = copy.copy(model.__dict__)
    assert model.fit(X, y, weights) is model
    assert {name: model.__dict__[name] for name in parameters} == parameters
    assert set(parameters) == set(model.get_params())
    assert all(name.endswith("_") for name in set(model.__dict__) - set(parameters))
    assert_same_bits(X, before[0])
    assert (y == before[1]).all()
    assert (weights == 1).all()
    assert model.n_features_in_ == 2
    fitted = copy.copy(model.__dict__)
    assert_same_bits(model._outputs(X), model._outputs(X))
    assert model.__dict__ == fitted


@unfinished
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_parameters_clones_and_pickles(estimator):
    X, y = data(estimator, N=40, ragged=True)
    model = estimator("lstm", 7, random_state=3)
    assert model.get_params()["cell"] == "lstm"
    assert model.set_params(max_iter=2, bidirectional=True) is model
    with pytest.raises(ValueError, match="Invalid parameter 'cells'"):
        model.set_params(cells="gru")
    model.fit(X, y)
    twin = clone(model)
    assert twin.get_params() == model.get_params()
    assert not hasattr(twin, "layer_")
    assert_same_model(twin.fit(X, y), model)
    for other in pickle.loads(pickle.dumps(model)), copy.deepcopy(model):
        assert_same_bits(other._outputs(X), model._outputs(X))
        assert other.predict(X).tolist() == model.predict(X).tolist()
    assert repr(model).startswith(f"{estimator.__name__}(")


def test_kinds_and_tags():
    assert is_classifier(RNNClassifier())
    assert is_regressor(RNNRegressor())
    for estimator in ESTIMATORS:
        tags = estimator().__sklearn_tags__().input_tags
        assert tags.three_d_array
        assert not tags.two_d_array
        assert not tags.allow_nan


@unfinished
@pytest.mark.parametrize("ragged", [False, True], ids=["", "ragged"])
def test_cross_validation_and_grid_search(ragged):
    X, y = signs(150, ragged=ragged)
    model = RNNClassifier(**QUICK, max_iter=30)
    assert cross_val_score(model, X, y, cv=3).mean() >= 0.9
    assert (cross_val_predict(model, X, y, cv=3) == y).mean() >= 0.9
    search = GridSearchCV(model, {"cell": ["gru", "rnn"], "learning_rate": [1e-6, 0.02]}, cv=2, error_score="raise")
    search.fit(X, y)
    assert search.best_params_["learning_rate"] == 0.02
    assert search.score(*signs(seed=1, ragged=ragged)) >= 0.9


@unfinished
def test_pipeline():
    X, y = sums(100, ragged=True)
    scale = FunctionTransformer(lambda X: [x * 10 for x in X])
    pipeline = make_pipeline(scale, RNNRegressor(**QUICK, max_iter=3))
    pipeline.fit(X, y, rnnregressor__sample_weight=np.ones(100))
    alone = RNNRegressor(**QUICK, max_iter=3).fit([x * 10 for x in X], y, np.ones(100))
    assert_same_bits(pipeline.predict(X), alone.predict([x * 10 for x in X]))
    assert pipeline.score(X, y) == alone.score([x * 10 for x in X], y)
    assert cross_val_score(pipeline, X, y, cv=2).shape == (2,)


def test_without_scikit_learn():
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "try:\n    import fastrnn.interop.sklearn\n"
        "except ImportError as error:\n    assert 'pip install fastrnn[sklearn]' in str(error)\n"
        "else:\n    raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# The wrong calls.

X, labels = signs(20)
numbers = np.arange(20.0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_not_fitted(estimator):
    for method in {"predict", "predict_proba", "predict_log_proba"} & set(dir(estimator)):
        with pytest.raises(NotFittedError, match=f"This {estimator.__name__} instance is not fitted"):
            getattr(estimator(), method)(X)


def with_nan(value=np.nan):
    x = X.copy()
    x[3, 4, 1] = value
    return x


WRONG_X = [
    (with_nan(), ValueError, r"X: expected finite numbers of float32, got NaN or infinity"),
    (with_nan(1e300), ValueError, r"X: expected finite numbers of float32, got NaN or infinity"),
    (list(with_nan()), ValueError, r"X\[3\]: expected finite numbers of float32, got NaN or infinity"),
    (X[0], ValueError, r"X: expected shape \(N, T, I\), or a list of arrays \(T, I\), got \(9, 2\)"),
    (list(X[0]), ValueError, r"X\[0\]: expected shape \(T, I\), got \(2,\)"),
    (X[:0], ValueError, "X: expected at least one sequence, got none"),
    ([], ValueError, "X: expected at least one sequence, got none"),
    (X[:, :0], ValueError, r"X: expected at least one step, got none"),
    ([*X[:19], X[19, :0]], ValueError, r"X\[19\]: expected at least one step, got none"),
    ([*X[:19], X[19, :, :1]], ValueError, r"X\[19\]: expected 2 features, got 1"),
    (X[:, :, :0], ValueError, r"X: expected at least 1 features, got 0"),
    (X.astype(str), TypeError, "X: expected real numbers, got dtype <U"),
    (X.astype(complex), TypeError, "X: expected real numbers, got dtype complex128"),
    (None, ValueError, "X: expected shape"),
]


@pytest.mark.parametrize(("x", "error", "message"), WRONG_X, ids=map(str, range(len(WRONG_X))))
@pytest.mark.parametrize("estimator", ESTIMATORS)
@unfinished
def test_wrong_sequences(estimator, x, error, message):
    y = labels if estimator is RNNClassifier else numbers
    with pytest.raises(error, match="^" + message):
        estimator().fit(x, y)
    model = estimator(hidden_size=2, max_iter=1, random_state=0).fit(X, y)
    with pytest.raises(error, match="^" + message.replace("at least 1 features", "2 features")):
        model.predict(x)
    with pytest.raises(ValueError, match=r"^X: expected 2 features, got 1"):
        model.predict(X[:, :, :1])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: RNNClassifier().fit(X, labels[:-1]),
            ValueError,
            r"y: expected as many targets as .* 20, got shape \(19",
        ),
        (lambda: RNNRegressor().fit(X, None), ValueError, r"y: expected as many targets as .* 20, got shape \(\)"),
        (lambda: RNNClassifier().fit(X, ["a"] * 20), ValueError, "y: expected at least two classes, got only 'a'"),
        (lambda: RNNClassifier().fit(X, numbers + 0.5), ValueError, "Unknown label type: continuous"),
        (lambda: RNNClassifier().fit(X, np.zeros((20, 3))), ValueError, "y should be a 1d array"),
        (lambda: RNNRegressor().fit(X, np.zeros((20, 3, 1))), ValueError, r"y: expected shape \(N,\) or \(N, K\)"),
        (lambda: RNNRegressor().fit(X, np.zeros((20, 0))), ValueError, r"y: expected shape \(N,\) or \(N, K\)"),
        (lambda: RNNRegressor().fit(X, numbers * np.nan), ValueError, "y: expected finite numbers of float64"),
        (lambda: RNNRegressor().fit(X, labels), TypeError, "y: expected real numbers, got dtype <U5"),
        (lambda: RNNRegressor().fit(X, numbers, [1]), ValueError, r"sample_weight: expected shape \(20,\), got \(1,\)"),
        (
            lambda: RNNRegressor().fit(X, numbers, numbers - 1),
            ValueError,
            "sample_weight: expected numbers of at least 0",
        ),
        (
            lambda: RNNRegressor().fit(X, numbers, numbers * 0),
            ValueError,
            "sample_weight: expected numbers of at least 0",
        ),
        (lambda: fit(cell="lstmp"), ValueError, "cell: expected one of rnn, lstm, gru, got 'lstmp'"),
        (lambda: fit(cell=None), ValueError, "cell: expected one of rnn, lstm, gru, got None"),
        (lambda: fit(hidden_size=0), ValueError, "hidden_size: expected at least 1, got 0"),
        (lambda: fit(num_layers=1.5), TypeError, "num_layers: expected an int, got 1.5"),
        (lambda: fit(bidirectional=1), TypeError, "bidirectional: expected True or False, got 1"),
        (lambda: fit(dropout=1), ValueError, "dropout: expected a probability less than 1, got 1"),
        (lambda: fit(learning_rate=-1), ValueError, "lr: expected a number from 0 to inf, got -1"),
        (lambda: fit(batch_size=0), ValueError, "batch_size: expected at least 1, got 0"),
        (lambda: fit(max_iter=0), ValueError, "max_iter: expected at least 1, got 0"),
        (lambda: fit(tol="a"), TypeError, "tol: expected a number, got 'a'"),
        (lambda: fit(clip=-1), ValueError, "clip: expected a number from 0 to inf, got -1"),
        (lambda: fit(weight_decay=-1), ValueError, "weight_decay: expected a number from 0 to inf, got -1"),
        (lambda: fit(early_stopping=1), TypeError, "early_stopping: expected True or False, got 1"),
        (lambda: fit(early_stopping=True, validation_fraction=2), ValueError, "validation_fraction: expected a number"),
        (
            lambda: fit(early_stopping=True, validation_fraction=1),
            ValueError,
            "validation_fraction: expected it to put",
        ),
        (
            lambda: fit(early_stopping=True, validation_fraction=0),
            ValueError,
            "validation_fraction: expected it to put",
        ),
        (lambda: fit(n_iter_no_change=0), ValueError, "n_iter_no_change: expected at least 1, got 0"),
        (lambda: fit(random_state="a"), ValueError, "'a' cannot be used to seed"),
        (lambda: fit(dtype="float16"), TypeError, "dtype: expected float32 or float64, got 'float16'"),
    ],
)
def test_wrong_calls(call, error, message):
    with pytest.raises(error, match="^" + message if message[0] != "U" else message):
        call()


def fit(**options):
    return RNNRegressor(**options).fit(X, numbers)


@pytest.mark.parametrize("size", [1e-300, 1e-200, 1.0, 1e160, 1e300])
def test_targets_of_any_size(size):
    """Squares of which may be no numbers."""
    X = np.random.default_rng(0).standard_normal((40, 5, 2))
    fitted = [RNNRegressor(**QUICK).fit(X, X[:, -1, 0] * s) for s in (1.0, size)]
    np.testing.assert_allclose(fitted[1].predict(X) / size, fitted[0].predict(X), rtol=1e-4, atol=1e-6)
