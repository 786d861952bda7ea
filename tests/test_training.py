"""Truncated BPTT step for step with PyTorch; checkpoints that continue exactly; evaluation."""

import json
import math
import os
import signal
import threading

import numpy as np
import pytest

from fastrnn import batching, models
from fastrnn.losses import cross_entropy
from fastrnn.models import CELLS, LanguageModel
from fastrnn.optim import SGD, Adam
from fastrnn.parameters import read_file, write_file
from fastrnn.training import Trainer, evaluate, streams

TEXT = np.random.default_rng(0).integers(0, 9, 700)
OPTIMIZERS = {"sgd": lambda p: SGD(p, 0.5, momentum=0.9), "adam": lambda p: Adam(p, 0.01)}


def trainer(kind="adam", dtype=np.float64, seed=1, text=TEXT, **options):
    of_model = {"dropout": options.pop("dropout", 0.0), "cell": options.pop("cell", "lstm")}
    model = LanguageModel(9, 5, 8, 2, dtype=dtype, seed=seed, vocabulary="abcdefghi", **of_model)
    settings = {"batch": 3, "seq_len": 10, "epochs": 2, "clip": 0.1, "seed": 4, **options}
    return Trainer(model, OPTIMIZERS[kind](model.parameters), text, **settings)


def updates(training, count=10**6):
    return [training.update() for _ in range(min(count, training.total - training.updates))]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_follows_torch(kind, cell):
    """Fifty updates over the ends of epochs, with clipping, from the same weights on the same windows."""
    torch = pytest.importorskip("torch")
    ours = trainer(kind, epochs=3, cell=cell)
    theirs = torch.nn.ModuleDict(
        {
            "embedding": torch.nn.Embedding(9, 5),
            "rnn": getattr(torch.nn, cell.upper())(5, 8, 2),
            "output": torch.nn.Linear(8, 9),
        }
    ).double()
    theirs.load_state_dict({n: torch.from_numpy(a) for n, a in ours.model.state_dict().items()})
    their_kind = {"sgd": lambda p: torch.optim.SGD(p, 0.5, momentum=0.9), "adam": lambda p: torch.optim.Adam(p, 0.01)}
    optimizer = their_kind[kind](theirs.parameters())

    losses, norms = [], []
    text = torch.from_numpy(TEXT[:699].reshape(3, 233).T.copy())
    while len(losses) < 50:
        state = None
        for first in range(0, 232, 10):
            last = min(first + 10, 232)
            y, state = theirs["rnn"](theirs["embedding"](text[first:last]), state)
            state = tuple(s.detach() for s in state) if cell == "lstm" else state.detach()
            logits, targets = theirs["output"](y).reshape(-1, 9), text[first + 1 : last + 1].reshape(-1)
            loss = torch.nn.functional.cross_entropy(logits, targets)
            optimizer.zero_grad()
            loss.backward()
            norms.append(torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.1).item())
            optimizer.step()
            losses.append(loss.item())
    assert max(norms) > 0.1
    assert ours.windows == 24
    np.testing.assert_allclose(updates(ours, 50), losses[:50], rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("stop", [0, 5, 24, 30])
@pytest.mark.parametrize("cell", CELLS)
def test_resumed_run_is_the_unbroken_one(cell, stop, dtype, tmp_path):
    options = {"dtype": dtype, "dropout": 0.2, "schedule": "cosine", "cell": cell}
    unbroken = trainer(**options)
    losses = updates(unbroken)
    assert len(losses) == 48

    broken = trainer(**options)
    assert updates(broken, stop) == losses[:stop]
    broken.save(tmp_path / "checkpoint")
    continued = trainer(**options)
    # Whatever it did before does not show.
    updates(continued, 3)
    continued.resume(tmp_path / "checkpoint")
    assert continued.updates == stop
    assert updates(continued) == losses[stop:]
    for name, array in unbroken.model.parameters.items():
        assert array.tobytes() == continued.model.parameters[name].tobytes(), name


def test_losses_do_not_depend_on_threads(small_shares):
    runs = []
    for threads in (1, 2):
        batching.set_num_threads(threads)
        runs.append(updates(trainer(batch=8, dtype=np.float32), 10))
    assert runs[0] == runs[1]


def test_cosine_ends_at_zero_and_constant_stays():
    rates = {}
    for schedule in ("constant", "cosine"):
        training, rates[schedule] = trainer(schedule=schedule), []
        while training.updates < training.total:
            training.update()
            rates[schedule].append(training.optimizer.lr)
    assert set(rates["constant"]) == {0.01}
    steps = np.arange(48)
    np.testing.assert_allclose(rates["cosine"], 0.005 * (1 + np.cos(np.pi * steps / 48)), rtol=1e-12)


def test_last_window_is_the_rest_and_state_is_carried():
    training = trainer(epochs=1)
    assert (training.windows, training.total) == (24, 24)
    updates(training, 23)
    state, parameters = training.state, training.model
    inputs = streams(TEXT, 3)[230:]
    assert len(inputs) == 3
    logits, _ = parameters(inputs[:-1], state)
    expected = cross_entropy(logits, inputs[1:])[0]
    assert abs(training.update() - expected) < 1e-14
    with pytest.raises(RuntimeError, match="expected at most 24 updates"):
        training.update()


def test_streams_cut_the_text():
    assert streams(np.arange(11), 3).tolist() == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]


def test_it_learns():
    training = trainer(text=np.arange(600) % 9, clip=5.0, epochs=12)
    losses = updates(training)
    assert losses[0] > 2
    assert losses[-1] < 0.1
    assert evaluate(training.model, np.arange(300) % 9) < 0.2


def test_evaluate_is_the_mean_of_all_tokens():
    model = trainer().model
    logits, _ = model(TEXT[:-1, None])
    expected = cross_entropy(logits, TEXT[1:, None])[0] / math.log(2)
    for seq_len in (1, 100, 699, 5000):
        assert abs(evaluate(model, TEXT, seq_len=seq_len) - expected) < 1e-12
    halves = [evaluate(model, half) for half in (TEXT[:350], TEXT[350:])]
    assert abs(evaluate(model, TEXT, batch=2) - np.mean(halves)) < 1e-12


def test_diverging_run_stops_before_it_does_harm():
    training = trainer()
    updates(training, 3)
    training.model.parameters["output.bias"] = np.full(9, np.nan)
    before = training.model.state_dict()
    with pytest.raises(FloatingPointError, match="loss: expected a finite number, got nan"):
        training.update()
    for name, array in training.model.parameters.items():
        assert array.tobytes() == before[name].tobytes()
    assert training.updates == 3


def test_run_writes_at_epochs_and_in_time(tmp_path, monkeypatch):
    written = []
    training = trainer()
    monkeypatch.setattr(training, "save", lambda path: written.append(training.updates))
    assert training.run(tmp_path / "checkpoint", every=1e6)
    assert written == [24, 48]
    training, written = trainer(epochs=1), []
    monkeypatch.setattr(training, "save", lambda path: written.append(training.updates))
    assert training.run(tmp_path / "checkpoint", every=0)
    assert written == list(range(1, 25))


def test_interrupted_run_writes_and_continues(tmp_path):
    losses = updates(trainer())
    training, seen = trainer(), []

    def progress(loss):
        seen.append(loss)
        if len(seen) == 7:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    assert training.run(tmp_path / "checkpoint", every=1e6, progress=progress) is False
    assert signal.getsignal(signal.SIGINT) is before
    assert seen == losses[:7]
    continued = trainer()
    continued.resume(tmp_path / "checkpoint")
    assert continued.run(progress=seen.append) is True
    assert seen == losses


def test_second_interrupt_stops_at_once():
    def progress(loss):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        trainer().run(progress=progress)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_run_in_another_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(trainer(epochs=1).run()))
    thread.start()
    thread.join()
    assert results == [True]


def test_checkpoint_is_a_model_and_keeps_all(tmp_path):
    training = trainer(dropout=0.1)
    updates(training, 5)
    training.save(tmp_path / "checkpoint")
    model = models.load(tmp_path / "checkpoint")
    assert "".join(model.vocabulary.characters) == "abcdefghi"
    tokens = TEXT[:20, None]
    assert model(tokens)[0].tobytes() == training.model(tokens)[0].tobytes()
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_resume_refuses_other_settings_and_changes_nothing(tmp_path):
    path = tmp_path / "checkpoint"
    training = trainer()
    updates(training, 5)
    training.save(path)
    others = {
        "batch": trainer(batch=4),
        "clip": trainer(clip=None),
        "seed": trainer(seed=2, schedule="cosine"),
        "text": trainer(text=TEXT[::-1]),
        "optimizer": trainer("sgd"),
        "dropout": trainer(dropout=0.5),
        "dtype": trainer(dtype=np.float32),
    }
    others["schedule"] = others.pop("seed")
    for name, other in others.items():
        before = other.model.state_dict()
        with pytest.raises(ValueError, match="is of other settings"):
            other.resume(path)
        assert other.updates == 0, name
        for n, a in other.model.parameters.items():
            assert a.tobytes() == before[n].tobytes(), name

    training.model.save(tmp_path / "model")
    with pytest.raises(ValueError, match="path: expected a checkpoint of a training"):
        trainer().resume(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match="none"):
        trainer().resume(tmp_path / "none")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="path: expected a whole safetensors file"):
        trainer().resume(path)


@pytest.mark.parametrize("cell", CELLS)
def test_resume_refuses_another_cell(cell, tmp_path):
    trainer(cell=cell).save(tmp_path / "checkpoint")
    for other in CELLS.keys() - {cell}:
        with pytest.raises(ValueError, match=f"cell: .* is of other settings: it has '{cell}', not '{other}'"):
            trainer(cell=other).resume(tmp_path / "checkpoint")


def test_resume_takes_a_checkpoint_that_names_no_cell_for_lstm(tmp_path):
    training = trainer()
    losses = updates(training, 5)
    training.save(tmp_path / "checkpoint")
    arrays, metadata = read_file(tmp_path / "checkpoint")
    config = json.loads(metadata["fastrnn"])
    del config["cell"]
    write_file(tmp_path / "checkpoint", arrays, {**metadata, "fastrnn": json.dumps(config)})
    continued = trainer()
    continued.resume(tmp_path / "checkpoint")
    assert losses + updates(continued, 3) == updates(trainer(), 8)


def test_resume_refuses_a_file_without_an_array(tmp_path):
    training = trainer()
    training.update()
    training.save(tmp_path / "checkpoint")
    arrays, metadata = read_file(tmp_path / "checkpoint")
    del arrays["training.optimizer.exp_avg.output.bias"]
    write_file(tmp_path / "checkpoint", arrays, metadata)
    with pytest.raises(ValueError, match=r"a checkpoint of Adam, got .* missing \['exp_avg.output.bias'\]"):
        trainer().resume(tmp_path / "checkpoint")


@pytest.mark.parametrize(
    ("key", "message"), [("training", "a checkpoint of a training"), ("fastrnn", "a model's file")]
)
@pytest.mark.parametrize("text", ["", "x", "5", "[]", "{}", '{"settings": 1}'])
def test_resume_refuses_a_file_that_says_something_else(key, message, text, tmp_path):
    trainer().save(tmp_path / "checkpoint")
    arrays, metadata = read_file(tmp_path / "checkpoint")
    write_file(tmp_path / "checkpoint", arrays, {**metadata, key: text})
    if key == "fastrnn" and text.startswith("{"):
        message = "of other settings"
    elif key == "fastrnn" and text == "[]":
        message = "a model's file"
    with pytest.raises(ValueError, match=message):
        trainer().resume(tmp_path / "checkpoint")


def a_model():
    return LanguageModel(3, 2, 2, seed=0)


def wrong(**options):
    model = a_model()
    arguments = {"model": model, "optimizer": SGD(model.parameters, 1), "tokens": [0, 1, 2] * 10, "batch": 2} | options
    return Trainer(**arguments)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: wrong(model=3), TypeError, "model: expected a LanguageModel, got 3"),
        (lambda: wrong(optimizer=None), TypeError, "optimizer: expected one of the model's parameters, got None"),
        (lambda: wrong(optimizer=SGD(a_model().parameters, 1)), TypeError, "optimizer: expected one of the model's"),
        (lambda: wrong(batch=0), ValueError, "batch: expected at least 1, got 0"),
        (lambda: wrong(seq_len=1.5), TypeError, "seq_len: expected an int, got 1.5"),
        (lambda: wrong(epochs=0), ValueError, "epochs: expected at least 1, got 0"),
        (lambda: wrong(clip=-1), ValueError, "clip: expected a number from 0"),
        (lambda: wrong(seed=-1), ValueError, "seed: expected at least 0, got -1"),
        (lambda: wrong(schedule="linear"), ValueError, "schedule: expected one of constant, cosine, got 'linear'"),
        (lambda: wrong(tokens=[0, 1, 2]), ValueError, "tokens, two for each of 2 streams: expected at least 4, got 3"),
        (lambda: wrong(tokens=[[0, 1]]), ValueError, r"tokens: expected shape \(N,\), got \(1, 2\)"),
        (lambda: wrong(tokens=[3] * 9), ValueError, "tokens: expected indices from 0 to 2, got 3"),
        (lambda: wrong(tokens=[0.5] * 9), TypeError, "tokens: expected integers"),
        (lambda: wrong().run(every=-1), ValueError, "every: expected a number from 0"),
        (lambda: evaluate(3, [0, 1]), TypeError, "model: expected a LanguageModel, got 3"),
        (lambda: evaluate(a_model(), [0]), ValueError, "tokens, two for each of 1 streams: expected at least 2, got 1"),
        (lambda: evaluate(a_model(), [0, 3]), ValueError, "tokens: expected indices from 0 to 2"),
        (lambda: evaluate(a_model(), [0, 1], batch=0), ValueError, "batch: expected at least 1"),
        (lambda: evaluate(a_model(), [0, 1], seq_len=0), ValueError, "seq_len: expected at least 1"),
    ],
)
def test_wrong_calls(call, error, message):
    with pytest.raises(error, match=message):
        call()
