"""The language model against its parts in float64, its gradients against slopes and PyTorch; files; sampling."""

import json
import math

import numpy as np
import oracle
import pytest
from oracle import assert_close, assert_same_bits

import fastrnn
from fastrnn import batching, models
from fastrnn.layers import LSTM
from fastrnn.losses import cross_entropy
from fastrnn.models import CELLS, LanguageModel, Vocabulary
from fastrnn.parameters import read_file, write_file


def model_and_tokens(dtype=np.float64, V=7, E=3, H=5, num_layers=2, T=6, B=4, **options):
    rng = np.random.default_rng(3)
    model = LanguageModel(V, E, H, num_layers, dtype=dtype, seed=2, **options)
    tokens = rng.integers(0, V, (T + 1, B))
    states = [rng.standard_normal((num_layers, B, H)).astype(dtype) for _ in range(model.rnn.STATES)]
    return model, tokens[:-1], tokens[1:], tuple(states) if len(states) > 1 else states[0]


def arrays_of(state):
    return state if isinstance(state, tuple) else (state,)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1, 1), (7, 3, 17, 2, 6, 3), (65, 17, 63, 1, 3, 65)])
def test_logits_are_the_equations(sizes, cell, dtype):
    model, tokens, _, state = model_and_tokens(dtype, *sizes, cell=cell)
    logits, after = model(tokens, state)
    p = {n: a.astype(np.float64) for n, a in model.parameters.items()}
    y, expected, _ = oracle.forward(model.rnn, p["embedding.weight"][tokens], state)
    assert_close(logits, y @ p["output.weight"].T + p["output.bias"], "logits")
    assert type(after) is type(state)
    for a, b in zip(arrays_of(after), arrays_of(expected)):
        assert_close(a, b, "state")
    (again, after_vjp), _ = model.vjp(tokens, state)
    for a, b in zip((logits, *arrays_of(after)), (again, *arrays_of(after_vjp))):
        assert_same_bits(a, b)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_slopes(dropout, cell):
    model, tokens, targets, state = model_and_tokens(dropout=dropout, cell=cell)
    ds = tuple(np.random.default_rng(7).standard_normal(s.shape) for s in arrays_of(state))
    d_after = ds if len(ds) > 1 else ds[0]

    def run():
        (logits, after), pullback = model.vjp(tokens, state, np.random.default_rng(5))
        loss, dlogits = cross_entropy(logits, targets)
        return loss + sum((a * d).sum() for a, d in zip(arrays_of(after), ds)), pullback, dlogits

    _, pullback, dlogits = run()
    dstate, grads = pullback(dlogits, d_after)
    assert list(grads) == list(model.parameters)

    def slope(array, place):
        kept = array[place]
        array[place] = kept + 1e-5
        up = run()[0]
        array[place] = kept - 1e-5
        down = run()[0]
        array[place] = kept
        return (up - down) / 2e-5

    rng = np.random.default_rng(1)
    for name in model.parameters:
        place = tuple(rng.integers(0, n) for n in grads[name].shape)
        if name == "embedding.weight":
            place = (tokens[0, 0], 1)

        def set_and_run(value, name=name, place=place):
            with model.parameters.writable() as arrays:
                arrays[name][place] = value
            return run()[0]

        kept = model.parameters[name][place]
        estimate = (set_and_run(kept + 1e-5) - set_and_run(kept - 1e-5)) / 2e-5
        set_and_run(kept)
        assert abs(estimate - grads[name][place]) < 1e-8, name
        assert grads[name].any(), name
    for s, d in zip(arrays_of(state), arrays_of(dstate)):
        assert abs(slope(s, (1, 2, 3)) - d[1, 2, 3]) < 1e-8


@pytest.mark.parametrize("cell", CELLS)
def test_agrees_with_torch(cell):
    torch = pytest.importorskip("torch")
    model, tokens, targets, state = model_and_tokens(cell=cell)
    embedding, rnn, output = torch.nn.Embedding(7, 3), getattr(torch.nn, cell.upper())(3, 5, 2), torch.nn.Linear(5, 7)
    theirs = torch.nn.ModuleDict({"embedding": embedding, "rnn": rnn, "output": output}).double()
    model.load_state_dict(theirs.state_dict())
    their_state = tuple(map(torch.from_numpy, state)) if cell == "lstm" else torch.from_numpy(state)
    y, _ = rnn(embedding(torch.from_numpy(tokens)), their_state)
    value = torch.nn.functional.cross_entropy(output(y).reshape(-1, 7), torch.from_numpy(targets).reshape(-1))
    value.backward()
    loss, _, grads = model.loss_and_gradients(tokens, targets, state)
    assert abs(loss - value.item()) < 1e-13
    for name, parameter in theirs.named_parameters():
        assert_close(grads[name], parameter.grad.numpy(), name)


def test_dropout_draws_from_the_generator_given():
    model, tokens, targets, _ = model_and_tokens(dropout=0.5)
    first, again, other = (
        model.loss_and_gradients(tokens, targets, rng=np.random.default_rng(s))[0] for s in (1, 1, 2)
    )
    assert first == again != other
    assert_same_bits(model(tokens)[0], model(tokens)[0])
    a, b = (LanguageModel(7, 3, 5, dropout=0.5, seed=2) for _ in range(2))
    assert a.loss_and_gradients(tokens, targets)[0] == b.loss_and_gradients(tokens, targets)[0]


@pytest.mark.parametrize("cell", CELLS)
def test_bits_do_not_depend_on_threads(cell, dtype, small_shares):
    model, tokens, targets, state = model_and_tokens(dtype, 40, 17, 65, 2, 5, 12, cell=cell)
    results = []
    for threads in (1, 2):
        batching.set_num_threads(threads)
        results.append(model.loss_and_gradients(tokens, targets, state))
    assert results[0][0] == results[1][0]
    for name in results[0][2]:
        assert_same_bits(results[0][2][name], results[1][2][name], name)


@pytest.mark.parametrize("cell", CELLS)
def test_greedy_generation_takes_the_likeliest(cell):
    model, *_ = model_and_tokens(cell=cell)
    prompt = np.array([1, 4, 2])
    sequence = list(prompt)
    for _ in range(12):
        sequence.append(int(model(np.array(sequence)[:, None])[0][-1, 0].argmax()))
    drawn = model.generate(prompt, 12, temperature=0)
    assert drawn.dtype == np.int64
    assert drawn.tolist() == sequence[3:]
    assert model.generate(prompt, 12, temperature=1e-300).tolist() == sequence[3:]
    assert model.generate(prompt, 0).shape == (0,)


def test_generation_draws_from_the_distribution():
    model, *_ = model_and_tokens(V=4)
    prompt = np.array([1, 0])
    logits = model(prompt[:, None])[0][-1, 0]
    for temperature in (1.0, 0.5):
        rng = np.random.default_rng(0)
        counts = np.bincount([model.generate(prompt, 1, temperature, rng)[0] for _ in range(2000)], minlength=4)
        weights = np.exp(logits / temperature)
        # Five standard deviations of a count.
        p = weights / weights.sum()
        assert (np.abs(counts - 2000 * p) < 5 * np.sqrt(2000 * p * (1 - p))).all()
    seeded = [model.generate(prompt, 20, rng=np.random.default_rng(9)).tolist() for _ in range(2)]
    assert seeded[0] == seeded[1]


@pytest.mark.parametrize("cell", CELLS)
def test_a_step_is_a_call_with_the_batch_first(cell, dtype):
    model, tokens, _, state = model_and_tokens(dtype, cell=cell)
    swapped = tuple(s.swapaxes(0, 1) for s in arrays_of(state))
    log_probs, after = model.step(tokens[0], swapped if len(swapped) > 1 else swapped[0])
    logits, expected = model(tokens[:1], state)
    assert log_probs.dtype == np.float64
    logits = logits[0].astype(np.float64)
    error = log_probs - (logits - np.log(np.exp(logits).sum(1, keepdims=True)))
    assert np.abs(error).max() < oracle.TOLERANCE[dtype]
    for a, b in zip(arrays_of(after), arrays_of(expected)):
        assert_same_bits(a, np.ascontiguousarray(b.swapaxes(0, 1)))
    nothing = tuple(np.zeros_like(s) for s in swapped)
    assert_same_bits(model.step(tokens[0])[0], model.step(tokens[0], nothing if len(nothing) > 1 else nothing[0])[0])


@pytest.mark.parametrize("cell", CELLS)
def test_decoding_methods_are_the_functions(cell):
    model, *_, state = model_and_tokens(cell=cell)
    options = {"bos": [1, 2, 3, 4], "eos": 0, "max_length": 9}
    for name, more in (("beam_search", {"beam_size": 3}), ("greedy", {})):
        found = getattr(model, name)(state, **options, **more)
        expected = getattr(fastrnn, name)(model, state, **options, **more)
        for a, b in zip(found[:4], expected[:4]):
            assert_same_bits(a, b)
    for name, more in (("sample", {"top_k": 3}), ("stochastic_beam_search", {"beam_size": 3})):
        found, expected = (
            f(*arguments, state, **options, **more, rng=np.random.default_rng(1))
            for f, arguments in ((getattr(model, name), ()), (getattr(fastrnn, name), (model,)))
        )
        for a, b in zip(found, expected):
            assert_same_bits(a, b)


def test_generation_refuses_what_is_not_finite():
    model, *_ = model_and_tokens()
    model.parameters["output.bias"] = np.full(7, np.nan)
    with pytest.raises(FloatingPointError, match="logits: expected finite numbers"):
        model.generate([1], 1)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("vocabulary", [None, "ab\nçß漢🙂"])
def test_file_keeps_all(vocabulary, cell, dtype, tmp_path):
    model, tokens, _, state = model_and_tokens(dtype, dropout=0.25, vocabulary=vocabulary, cell=cell)
    model.save(tmp_path / "model")
    loaded = models.load(tmp_path / "model")
    assert loaded.config == model.config
    assert_same_bits(loaded(tokens, state)[0], model(tokens, state)[0])
    assert (loaded.vocabulary and "".join(loaded.vocabulary.characters)) == vocabulary
    assert repr(loaded) == repr(model)
    assert type(loaded.rnn) is CELLS[cell]


def test_a_file_that_names_no_cell_is_of_lstm(tmp_path):
    model, tokens, _, state = model_and_tokens()
    model.save(tmp_path / "model")
    arrays, metadata = read_file(tmp_path / "model")
    config = json.loads(metadata["fastrnn"])
    assert config.pop("cell") == "lstm"
    write_file(tmp_path / "model", arrays, {**metadata, "fastrnn": json.dumps(config)})
    loaded = models.load(tmp_path / "model")
    assert loaded.config == model.config
    assert_same_bits(loaded(tokens, state)[0], model(tokens, state)[0])


def test_load_refuses_other_files(tmp_path):
    LSTM(2, 3).save(tmp_path / "lstm")
    with pytest.raises(ValueError, match="path: expected a language model's file"):
        models.load(tmp_path / "lstm")
    for text in ("5", "[]", "x", "{}", '{"class": "LanguageModel"}', '{"class": "LanguageModel", "odd": 1}'):
        write_file(tmp_path / "other", {"a": np.ones(1)}, {"fastrnn": text})
        with pytest.raises(ValueError, match="path: expected a language model's file"):
            models.load(tmp_path / "other")
    for text in ('{"a": ' * 100_000, "[" * 100_000):
        write_file(tmp_path / "deep", {"a": np.ones(1)}, {"fastrnn": text})
        with pytest.raises(ValueError, match="path: expected a language model's file"):
            models.load(tmp_path / "deep")
    lm = model()
    for odd in np.float16, np.int64, bool:
        arrays = {**lm.state_dict(), "embedding.weight": lm.embedding.weight.astype(odd)}
        write_file(tmp_path / "odd", arrays, {"fastrnn": json.dumps({"class": "LanguageModel", **lm.config})})
        with pytest.raises(
            ValueError, match=r"path: expected the parameters of a LanguageModel, .* expected dtype float"
        ):
            models.load(tmp_path / "odd")
    header = json.dumps({"a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "bfloat16").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    # Other packages teach NumPy this dtype.
    with pytest.raises(ValueError, match=r"path: expected a (whole safetensors|language model's) file"):
        models.load(tmp_path / "bfloat16")
    (tmp_path / "text").write_text("no model")
    with pytest.raises(ValueError, match="path: expected a whole safetensors file"):
        models.load(tmp_path / "text")
    with pytest.raises(FileNotFoundError, match="none"):
        models.load(tmp_path / "none")


@pytest.mark.parametrize("text", ["", "a", "hello\r\n\t\x00", "çß漢🙂 mixed"])
def test_vocabulary_there_and_back(text):
    vocabulary = Vocabulary.of(text + "!")
    tokens = vocabulary.encode(text)
    assert tokens.dtype == np.int64
    assert [vocabulary.characters[i] for i in tokens] == list(text)
    assert vocabulary.decode(tokens) == text
    assert len(vocabulary) == len(set(text + "!"))
    assert Vocabulary("zya").encode("ayz").tolist() == [2, 1, 0]


X = np.array([[1, 2]])


def model():
    return LanguageModel(3, 2, 2, seed=0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: LanguageModel(0, 2, 2), ValueError, "num_embeddings: expected at least 1"),
        (lambda: LanguageModel(3, 2, 2, 0), ValueError, "num_layers: expected at least 1, got 0"),
        (lambda: LanguageModel(3, 2, 2, dropout=1), ValueError, "dropout: expected a probability less than 1"),
        (lambda: LanguageModel(3, 2, 2, dtype=int), TypeError, "dtype: expected float32 or float64"),
        (lambda: LanguageModel(3, 2, 2, seed="1"), TypeError, "seed: expected an int, got '1'"),
        (lambda: LanguageModel(3, 2, 2, cell="LSTM"), ValueError, "cell: expected one of rnn, lstm, gru, got 'LSTM'"),
        (lambda: LanguageModel(3, 2, 2, cell=None), ValueError, "cell: expected one of rnn, lstm, gru, got None"),
        (lambda: LanguageModel(3, 2, 2, vocabulary="ab"), ValueError, "vocabulary: expected 3 characters, got 2"),
        (lambda: model()([1, 2]), ValueError, r"tokens: expected shape \(T, B\), got \(2,\)"),
        (lambda: model()(X + 0.5), TypeError, "tokens: expected integers, got dtype float64"),
        (lambda: model()(X + 1), ValueError, "tokens: expected indices from 0 to 2, got 3"),
        (lambda: model()(X, 1), TypeError, "state: expected a tuple of 2 arrays"),
        (lambda: model().vjp(X, rng=1), TypeError, "rng: expected a numpy.random.Generator, got 1"),
        (lambda: model().vjp(X)[1](np.ones((1, 2, 2), np.float32)), ValueError, "dlogits: expected shape"),
        (lambda: model().loss_and_gradients(X, X[:, :1]), ValueError, "targets: expected shape"),
        (lambda: model().generate([], 1), TypeError, "prompt_tokens: expected integers"),
        (lambda: model().generate(X, 1), ValueError, r"prompt_tokens: expected shape \(T,\)"),
        (lambda: model().generate([3], 1), ValueError, "prompt_tokens: expected indices from 0 to 2, got 3"),
        (lambda: model().generate([0], -1), ValueError, "length: expected at least 0, got -1"),
        (lambda: model().generate([0], 1, -0.5), ValueError, "temperature: expected a number from 0"),
        (lambda: model().generate([0], 1, math.nan), ValueError, "temperature: expected a number from 0"),
        (lambda: model().generate([0], 1, 1, 3), TypeError, "rng: expected a numpy.random.Generator, got 3"),
        (lambda: Vocabulary(3), TypeError, "characters: expected a string or a list"),
        (lambda: Vocabulary(["ab"]), ValueError, "characters: expected single characters, got 'ab'"),
        (lambda: Vocabulary("aba"), ValueError, "characters: expected at least one, each once"),
        (lambda: Vocabulary(""), ValueError, "characters: expected at least one, each once"),
        (lambda: Vocabulary.of(3), TypeError, "text: expected a string, got 3"),
        (lambda: Vocabulary("ab").encode("abca"), ValueError, "text: .* vocabulary, got 'c' at position 2"),
        (lambda: Vocabulary("ab").encode(b"a"), TypeError, "text: expected a string, got bytes"),
        (lambda: Vocabulary("ab").decode([2]), ValueError, "tokens: expected indices from 0 to 1, got 2"),
    ],
)
def test_wrong_calls(call, error, message):
    with pytest.raises(error, match=message):
        call()
