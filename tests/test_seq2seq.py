"""Seq2Seq against its equations in float64, one sequence at a time; gradients against slopes and PyTorch; decoding."""

import itertools
import math

import numpy as np
import oracle
import pytest
from oracle import assert_close, assert_same_bits

import fastrnn
from fastrnn import batching, models, seq2seq
from fastrnn.layers import LSTM
from fastrnn.models import LanguageModel, Vocabulary
from fastrnn.optim import Adam
from fastrnn.parameters import read_file, write_file
from fastrnn.seq2seq import CELLS, Encoded, Seq2Seq, attend, load, pad
from fastrnn.training import PairTrainer

KINDS = list(itertools.product(CELLS, [False, True], [False, True]))
OF_KINDS = pytest.mark.parametrize(("cell", "bidirectional", "attention"), KINDS)


def model_and_pairs(dtype=np.float64, V=7, W=5, E=3, H=6, num_layers=2, S=6, T=4, B=5, **options):
    """A model and a batch in which what stands past a sequence's end is no token."""
    rng = np.random.default_rng(3)
    model = Seq2Seq(V, W, E, H, num_layers, dtype=dtype, seed=2, **options)
    source_lengths, target_lengths = rng.integers(1, S + 1, B), rng.integers(0, T + 1, B)
    sources, targets = rng.integers(0, V, (S, B)), rng.integers(0, W, (T, B))
    sources[np.arange(S)[:, None] >= source_lengths] = -1
    targets[np.arange(T)[:, None] >= target_lengths] = 1000
    return model, (sources, source_lengths, targets, target_lengths)


def expected_logits(model, sources, source_lengths, targets, target_lengths):
    """Sequence after sequence, without any padding: a list of (target length + 1, V + 1)."""
    p = {name: array.astype(np.float64) for name, array in model.parameters.items()}
    logits = []
    for b, (n, m) in enumerate(zip(source_lengths, target_lengths)):
        x = p["source_embedding.weight"][sources[:n, b : b + 1]]
        directions = 1 + model.bidirectional
        zeros = np.zeros((model.num_layers * directions, 1, model.hidden_size // directions))
        memory, last = oracle.forward(model.encoder, x, (zeros,) * model.encoder.STATES)[:2]
        first = []
        for s in oracle.as_tuple(last):
            layers = [np.concatenate(s[k * directions : (k + 1) * directions], -1) for k in range(model.num_layers)]
            first.append(np.stack(layers))
        z = p["target_embedding.weight"][[model.end, *targets[:m, b]]][:, None]
        h, _, _ = oracle.forward(model.decoder, z, tuple(first))
        h, memory = h[:, 0], memory[:, 0]
        if model.attention:
            for t in range(m + 1):
                scores = np.array([h[t] @ memory[s] for s in range(n)])
                weights = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
                context = sum((weights[s] * memory[s] for s in range(n)), np.zeros(model.hidden_size))
                h[t] = np.tanh(p["combine.weight"] @ np.concatenate([context, h[t]]))
        logits.append(h @ p["output.weight"].T + p["output.bias"])
    return logits


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@OF_KINDS
@pytest.mark.parametrize("sizes", [(1, 1, 1, 2, 1, 1, 1, 1), (7, 5, 3, 6, 2, 6, 4, 5), (65, 63, 17, 34, 1, 17, 9, 33)])
def test_logits_and_loss_are_the_equations(sizes, cell, bidirectional, attention, dtype):
    model, pairs = model_and_pairs(dtype, *sizes, cell=cell, bidirectional=bidirectional, attention=attention)
    expected = expected_logits(model, *pairs)
    logits = model(*pairs)
    assert logits.shape == (len(pairs[2]) + 1, len(pairs[1]), model.end + 1)
    assert logits.dtype == dtype
    padded = np.zeros(logits.shape)
    losses = []
    for b, (e, m) in enumerate(zip(expected, pairs[3])):
        padded[: m + 1, b] = e
        losses += [-log_softmax(e)[t, token] for t, token in enumerate([*pairs[2][:m, b], model.end])]
    assert_close(logits, padded, "logits")
    loss, grads = model.loss_and_gradients(*pairs)
    assert abs(loss - np.mean(losses)) < (1e-12 if dtype == np.float64 else 1e-5)
    assert list(grads) == list(model.parameters)
    for name, gradient in grads.items():
        assert (gradient.shape, gradient.dtype) == (model.parameters[name].shape, dtype), name


@OF_KINDS
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_slopes(dropout, cell, bidirectional, attention):
    model, pairs = model_and_pairs(cell=cell, bidirectional=bidirectional, attention=attention, dropout=dropout)

    def loss(name, array):
        model.parameters[name] = array
        return model.loss_and_gradients(*pairs, np.random.default_rng(5))[0]

    _, grads = model.loss_and_gradients(*pairs, np.random.default_rng(5))
    rng = np.random.default_rng(1)
    for name, array in model.state_dict().items():
        # Along a random direction, so that every number counts.
        direction = rng.standard_normal(array.shape)
        slope = (loss(name, array + 1e-5 * direction) - loss(name, array - 1e-5 * direction)) / 2e-5
        loss(name, array)
        assert abs(slope - (grads[name] * direction).sum()) < 1e-8, name
        assert grads[name].any(), name
    unused = np.setdiff1d(np.arange(7), [pairs[0][t, b] for b in range(5) for t in range(pairs[1][b])])
    assert len(unused)
    assert not grads["source_embedding.weight"][unused].any()


@OF_KINDS
def test_agrees_with_torch(cell, bidirectional, attention):
    torch = pytest.importorskip("torch")
    model, pairs = model_and_pairs(cell=cell, bidirectional=bidirectional, attention=attention)
    sources, source_lengths, targets, target_lengths = pairs
    rnn = getattr(torch.nn, cell.upper())
    modules = {
        "source_embedding": torch.nn.Embedding(7, 3),
        "encoder": rnn(3, 3 if bidirectional else 6, 2, bidirectional=bidirectional),
        "target_embedding": torch.nn.Embedding(6, 3),
        "decoder": rnn(3, 6, 2),
        "output": torch.nn.Linear(6, 6),
    }
    if attention:
        modules["combine"] = torch.nn.Linear(12, 6, bias=False)
    theirs = torch.nn.ModuleDict(modules).double()
    model.load_state_dict(theirs.state_dict())

    x = theirs["source_embedding"](torch.from_numpy(np.maximum(sources, 0)))
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.from_numpy(source_lengths), enforce_sorted=False)
    memory, state = theirs["encoder"](packed)
    memory, _ = torch.nn.utils.rnn.pad_packed_sequence(memory, total_length=6)
    if bidirectional:
        join = lambda s: torch.cat([s[0::2], s[1::2]], 2)  # noqa: E731
        state = tuple(map(join, state)) if cell == "lstm" else join(state)
    ends = np.full((1, 5), 5)
    inputs = np.concatenate([ends, np.where(targets < 5, targets, 0)])
    outputs = np.concatenate([np.where(targets < 5, targets, -100), ends * 0 - 100])
    outputs[target_lengths, np.arange(5)] = 5
    h, _ = theirs["decoder"](theirs["target_embedding"](torch.from_numpy(inputs)), state)
    if attention:
        absent = torch.from_numpy(np.arange(6) >= source_lengths[:, None])
        weights = torch.einsum("tbh,sbh->tbs", h, memory).masked_fill(absent, -torch.inf).softmax(2)
        h = torch.tanh(theirs["combine"](torch.cat([torch.einsum("tbs,sbh->tbh", weights, memory), h], 2)))
    logits = theirs["output"](h)
    value = torch.nn.functional.cross_entropy(logits.reshape(-1, 6), torch.from_numpy(outputs).reshape(-1))
    value.backward()
    loss, grads = model.loss_and_gradients(*pairs)
    assert abs(loss - value.item()) < 1e-13
    for name, parameter in theirs.named_parameters():
        assert_close(grads[name], parameter.grad.numpy(), name)


def test_padding_and_neighbours_do_not_show():
    model, pairs = model_and_pairs(attention=True, bidirectional=True)
    sources, source_lengths, targets, target_lengths = pairs
    logits = model(*pairs)
    longer = np.vstack([sources, np.full((3, 5), 99)]), source_lengths, np.vstack([targets, targets]), target_lengths
    assert_close(model(*longer)[:5], logits)
    assert abs(model.loss_and_gradients(*longer)[0] - model.loss_and_gradients(*pairs)[0]) < 1e-14
    for b, (n, m) in enumerate(zip(source_lengths, target_lengths)):
        if m:
            alone = model(sources[:n, b : b + 1], None, targets[:m, b : b + 1], None)
            assert_close(alone[:, 0], logits[: m + 1, b])


@OF_KINDS
def test_arguments_may_be_read_only_and_stay(cell, bidirectional, attention):
    model, pairs = model_and_pairs(np.float32, cell=cell, bidirectional=bidirectional, attention=attention)
    before = [a.copy() for a in pairs]
    for array in pairs:
        array.flags.writeable = False
    model.loss_and_gradients(*pairs)
    model(*[np.asfortranarray(a).astype(np.int16) for a in pairs])
    model.beam_search(*pairs[:2], beam_size=2, max_length=3)
    for a, b in zip(pairs, before):
        assert_same_bits(a, b)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_sequences_of_no_tokens(bidirectional, dtype):
    model, _ = model_and_pairs(dtype, bidirectional=bidirectional)
    sources, targets = np.array([[3, 1], [2, 1]]), np.array([[1, 4]])
    pairs = sources, [2, 0], targets, [0, 1]
    # Without a source the context is 0.
    p, zeros = model.parameters, np.zeros((1, model.hidden_size), dtype)
    h, _ = model.decoder(p["target_embedding.weight"][[[model.end], [4]]])
    read = np.tanh(np.concatenate([np.zeros_like(h), h], 2) @ p["combine.weight"].T)
    expected = (read @ p["output.weight"].T + p["output.bias"])[:, 0].astype(np.float64)
    assert_close(model(*pairs)[:, 1], expected, slack=10)
    loss, grads = model.loss_and_gradients(*pairs)
    assert math.isfinite(loss)
    assert all(np.isfinite(g).all() for g in grads.values())
    assert_close(attend(zeros[None], zeros[None], np.array([0]))[0], np.zeros((1, 1, model.hidden_size)), slack=0)
    assert (model.beam_search(sources, [2, 0], max_length=3).lengths >= 1).all()


@pytest.mark.parametrize(("B", "T", "S", "H"), [(1, 1, 1, 1), (3, 17, 5, 63), (5, 3, 65, 17)])
def test_attention_is_its_equation_and_its_gradients_are_slopes(B, T, S, H, dtype, rng):
    queries, memory = rng.standard_normal((B, T, H)), rng.standard_normal((B, S, H))
    lengths = rng.integers(0, S + 1, B)
    lengths[0] = S
    d = rng.standard_normal((B, T, H))
    memory[np.arange(S) >= lengths[:, None]] = 0
    queries, memory, d = (a.astype(dtype).astype(np.float64) for a in (queries, memory, d))
    expected = np.zeros((B, T, H))
    for b, t in itertools.product(range(B), range(T)):
        scores = [math.exp(queries[b, t] @ memory[b, s]) for s in range(lengths[b])]
        for s, score in enumerate(scores):
            expected[b, t] += score / sum(scores) * memory[b, s]
    context, pullback = attend(queries.astype(dtype), memory.astype(dtype), lengths)
    assert context.dtype == dtype
    assert_close(context, expected, slack=10)
    dqueries, dmemory = pullback(d.astype(dtype))
    if dtype == np.float32:
        theirs = attend(queries, memory, lengths)[1](d)
        assert_close(dqueries, theirs[0], slack=10)
        assert_close(dmemory, theirs[1], slack=10)
        return
    there = np.arange(S) < lengths[:, None]
    assert not dmemory[~there].any()
    for array, gradient in ((queries, dqueries), (memory, dmemory)):
        u = rng.standard_normal(array.shape)
        if array is memory:
            u[~there] = 0
        kept = array.copy()
        values = []
        for sign in (1, -1):
            array[...] = kept + sign * 1e-6 * u
            values.append((attend(queries, memory, lengths)[0] * d).sum())
        array[...] = kept
        assert abs((values[0] - values[1]) / 2e-6 - (gradient * u).sum()) <= 1e-7 * np.abs(gradient).sum()


def test_attention_keeps_large_scores_and_what_is_not_finite_in_its_row(dtype):
    queries = np.array([[[1e4], [np.nan], [np.inf], [0]]], dtype)
    memory = np.array([[[1.0], [2.0], [0.0]]], dtype)
    context, pullback = attend(queries, memory, np.array([2]))
    assert context[0, [0, 3], 0].tolist() == [2, 1.5]
    assert np.isnan(context[0, 1:3, 0]).all()
    pullback(np.ones_like(queries))


def test_a_parameter_that_is_nan_shows():
    model, pairs = model_and_pairs()
    model.parameters["encoder.weight_hh_l0"] = np.full_like(model.parameters["encoder.weight_hh_l0"], np.nan)
    assert np.isnan(model.loss_and_gradients(*pairs)[0])
    with pytest.raises(FloatingPointError, match="NaN"):
        model.beam_search(*pairs[:2], beam_size=2, max_length=3)


def test_dropout_draws_from_the_generator_given():
    model, pairs = model_and_pairs(dropout=0.5)
    first, again, other = (model.loss_and_gradients(*pairs, np.random.default_rng(s))[0] for s in (1, 1, 2))
    assert first == again != other
    assert_same_bits(model(*pairs), model(*pairs))
    a, b = (model_and_pairs(dropout=0.5)[0] for _ in range(2))
    first, second = a.loss_and_gradients(*pairs)[0], a.loss_and_gradients(*pairs)[0]
    assert first == b.loss_and_gradients(*pairs)[0] != second
    # The same parameters as without dropout.
    for name, array in model_and_pairs()[0].parameters.items():
        assert_same_bits(array, a.parameters[name], name)


@OF_KINDS
def test_bits_do_not_depend_on_threads(cell, bidirectional, attention, dtype, small_shares):
    options = {"cell": cell, "bidirectional": bidirectional, "attention": attention}
    model, pairs = model_and_pairs(dtype, 40, 30, 17, 66, 2, 9, 7, 12, **options)
    results = []
    for threads in (1, 2):
        batching.set_num_threads(threads)
        results.append(model.loss_and_gradients(*pairs))
    assert results[0][0] == results[1][0]
    for name in results[0][1]:
        assert_same_bits(results[0][1][name], results[1][1][name], name)


# Decoding.


@OF_KINDS
def test_steps_are_the_call(cell, bidirectional, attention, dtype):
    model, pairs = model_and_pairs(dtype, cell=cell, bidirectional=bidirectional, attention=attention)
    sources, source_lengths, targets, target_lengths = pairs
    logits = model(*pairs).astype(np.float64)
    state = model.encode(sources, source_lengths)
    for array in (*oracle.as_tuple(state.state), *([state.memory, state.lengths] if attention else [])):
        assert len(array) == 5
    tokens = np.full(5, model.end)
    for t in range(len(targets) + 1):
        log_probs, state = model.step(tokens, state)
        assert log_probs.dtype == np.float64
        there = t <= target_lengths
        expected = log_softmax(logits[t])
        assert np.abs(log_probs - expected)[there].max() < (1e-12 if dtype == np.float64 else 1e-5)
        if t < len(targets):
            tokens = np.where(t < target_lengths, targets[t], 0)


@OF_KINDS
def test_greedy_takes_the_likeliest(cell, bidirectional, attention):
    model, (sources, source_lengths, _, _) = model_and_pairs(
        cell=cell, bidirectional=bidirectional, attention=attention
    )
    found = model.greedy(sources, source_lengths, max_length=9)
    for b in range(5):
        state = model.encode(sources[: source_lengths[b], b : b + 1])
        sequence, total = [model.end], 0.0
        while len(sequence) <= 9 and sequence[1:][-1:] != [model.end]:
            log_probs, state = model.step(np.array(sequence[-1:]), state)
            sequence.append(int(log_probs[0].argmax()))
            total += log_probs[0].max()
        assert found.tokens[b, 0, : found.lengths[b, 0]].tolist() == sequence[1:]
        assert abs(found.log_probs[b, 0] - total) < 1e-12


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_beam_search_is_the_function_on_steps(cell, attention):
    model, pairs = model_and_pairs(cell=cell, attention=attention)
    options = {"beam_size": 4, "max_length": 6, "num_return": 3, "length_penalty": 0.7}
    ours = model.beam_search(*pairs[:2], **options)
    theirs = fastrnn.beam_search(model.step, model.encode(*pairs[:2]), bos=model.end, eos=model.end, **options)
    assert_same_bits(ours.tokens, theirs.tokens)
    assert_close(ours.scores, theirs.scores)
    # Alone as in the batch.
    for b, n in enumerate(pairs[1]):
        alone = model.beam_search(pairs[0][:n, b : b + 1], **options)
        for i, length in enumerate(alone.lengths[0]):
            assert alone.tokens[0, i, :length].tolist() == ours.tokens[b, i, : ours.lengths[b, i]].tolist()
        assert_close(alone.log_probs[0], ours.log_probs[b])
    assert model.beam_search(*pairs[:2]).tokens.shape[2] <= 2 * 6 + 20


def test_wide_beam_finds_what_trying_everything_finds():
    model, (sources, source_lengths, _, _) = model_and_pairs(W=2, B=2)
    everything = []
    for m in range(4):
        for tokens in itertools.product(range(2), repeat=m):
            targets = np.array([[t, t] for t in tokens] or [[0, 0]])
            log_probs = log_softmax(model(sources, source_lengths, targets, [m, m]))
            ends = [] if m == 3 else [2]
            total = sum((log_probs[t, :, token] for t, token in enumerate([*tokens, *ends])), np.zeros(2))
            everything.append(([*tokens, *ends], total))
    found = model.beam_search(sources, source_lengths, beam_size=16, max_length=3, num_return=15)
    assert len(everything) == 15
    for b in range(2):
        expected = sorted(everything, key=lambda pair: -pair[1][b])
        for i, (tokens, total) in enumerate(expected):
            assert found.tokens[b, i, : found.lengths[b, i]].tolist() == tokens
            assert abs(found.log_probs[b, i] - total[b]) < 1e-12
    drawn = model.stochastic_beam_search(sources, source_lengths, beam_size=15, max_length=3)
    np.testing.assert_allclose(np.exp(drawn.log_probs).sum(1), 1, rtol=1e-12)


def test_samples_follow_the_model():
    model, (sources, source_lengths, _, _) = model_and_pairs(W=2, B=2)
    rng = np.random.default_rng(0)
    drawn = model.sample(sources, source_lengths, max_length=4, num_samples=2000, rng=rng)
    p = np.exp(log_softmax(model(sources, source_lengths, np.zeros((1, 2), int), [0, 0]))[0])
    for b in range(2):
        counts = np.bincount(drawn.tokens[b, :, 0], minlength=3)
        assert (np.abs(counts - 2000 * p[b]) < 5 * np.sqrt(2000 * p[b] * (1 - p[b]))).all()
    seeded = [model.sample(sources, source_lengths, rng=np.random.default_rng(3)).tokens for _ in range(2)]
    assert_same_bits(*seeded)


def test_a_translation_is_the_same_beside_others():
    """Also where it is cut off."""
    model = Seq2Seq(2, 2, 4, 8, seed=0, source_vocabulary="01", target_vocabulary="ab")
    bias = model.output.bias.copy()
    bias[model.end] = -500
    model.output.bias = bias
    texts = ["1", "01" * 20, "", "1" * 32, "0"]
    whole = model.translate(texts)
    assert [model.translate([text])[0] for text in texts] == whole
    assert [len(text) for text in whole] == [84, 148, 20, 84, 84]
    assert model.translate(texts, max_length=None) == whole


def test_translate_goes_by_the_vocabularies(monkeypatch):
    texts = ["0 1", "1", "", "100 1", "0"]
    model = Seq2Seq(3, 2, 4, 6, seed=1, source_vocabulary="01 ", target_vocabulary="ab")
    whole = model.translate(texts, beam_size=3, max_length=7)
    assert all(set(text) <= set("ab") and len(text) <= 7 for text in whole)
    sources = pad([model.source_vocabulary.encode(text) for text in texts])
    found = model.beam_search(*sources, beam_size=3, max_length=7)
    assert whole == [model.decode(tokens) for tokens in found.tokens[:, 0]]
    monkeypatch.setattr(seq2seq, "TEXTS_AT_ONCE", 2)
    assert model.translate(texts, beam_size=3, max_length=7) == whole
    assert model.translate([]) == []
    assert model.decode([0, 1, 1, 2, 0, 2]) == "abb"
    assert model.decode([0, 1]) == "ab"
    assert model.decode([2]) == model.decode([]) == ""


def test_pad():
    tokens, lengths = pad([[1, 2], [], np.array([3], np.uint8)])
    assert tokens.tolist() == [[1, 0, 3], [2, 0, 0]]
    assert lengths.tolist() == [2, 0, 1]
    assert tokens.dtype == lengths.dtype == np.int64
    assert pad([[], []])[0].shape == (1, 2)


# Files.


@pytest.mark.parametrize("vocabularies", [(None, None), ("ab\nçß漢🙂", "01234")])
@OF_KINDS
def test_file_keeps_all(cell, bidirectional, attention, vocabularies, dtype, tmp_path):
    options = {"cell": cell, "bidirectional": bidirectional, "attention": attention, "dropout": 0.25}
    names = ("source_vocabulary", "target_vocabulary")
    model, pairs = model_and_pairs(dtype, **options, **dict(zip(names, vocabularies)))
    model.save(tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert loaded.config == model.config
    assert repr(loaded) == repr(model)
    assert_same_bits(loaded(*pairs), model(*pairs))
    for name, characters in zip(names, vocabularies):
        vocabulary = getattr(loaded, name)
        assert (vocabulary and "".join(vocabulary.characters)) == characters
    assert_same_bits(Seq2Seq(**model.config, seed=9).load(tmp_path / "model")(*pairs), model(*pairs))


def test_load_knows_both_kinds_of_models_and_no_others(tmp_path):
    language_model = LanguageModel(3, 2, 4, seed=0)
    language_model.save(tmp_path / "language model")
    loaded = load(tmp_path / "language model")
    assert type(loaded) is LanguageModel
    assert_same_bits(loaded([[1]])[0], language_model([[1]])[0])
    LSTM(2, 3).save(tmp_path / "lstm")
    with pytest.raises(ValueError, match=r"path: expected the file of a LanguageModel or a Seq2Seq, got '.*lstm'"):
        load(tmp_path / "lstm")
    arrays = read_file(tmp_path / "language model")[0]
    texts = "[1", "[1]", "5", '{"class": "Seq2Seq"}', '{"class": "Seq2Seq", "odd": 1}', '{"class": ["Seq2Seq"]}'
    for content in ({}, *({"fastrnn": text} for text in texts)):
        write_file(tmp_path / "other", arrays, content)
        with pytest.raises(ValueError, match="path: expected the file of a LanguageModel or a Seq2Seq"):
            load(tmp_path / "other")
    (tmp_path / "text").write_text("no model")
    with pytest.raises(ValueError, match="path: expected a whole safetensors file"):
        load(tmp_path / "text")
    with pytest.raises(FileNotFoundError, match="none"):
        load(tmp_path / "none")
    model_and_pairs()[0].save(tmp_path / "model")
    with pytest.raises(ValueError, match="path: expected a language model's file"):
        models.load(tmp_path / "model")


# Training.


def trainer(**options):
    rng = np.random.default_rng(0)
    sources = [rng.integers(0, 7, rng.integers(0, 6)) for _ in range(20)]
    targets = [rng.integers(0, 5, rng.integers(0, 5)) for _ in range(20)]
    model, _ = model_and_pairs(options.pop("dtype", np.float64), dropout=0.2)
    settings = {"batch": 6, "epochs": 3, "clip": 0.1, "schedule": "cosine", "seed": 4, **options}
    return PairTrainer(model, Adam(model.parameters, 0.01), sources, targets, **settings)


def updates(training, count=10**6):
    return [training.update() for _ in range(min(count, training.total - training.updates))]


@pytest.mark.parametrize("stop", [0, 3, 4, 9])
def test_resumed_run_is_the_unbroken_one(stop, dtype, tmp_path):
    unbroken = trainer(dtype=dtype)
    losses = updates(unbroken)
    assert len(losses) == 12
    broken = trainer(dtype=dtype)
    assert updates(broken, stop) == losses[:stop]
    broken.save(tmp_path / "checkpoint")
    continued = trainer(dtype=dtype)
    # Whatever it did before does not show.
    updates(continued, 2)
    continued.resume(tmp_path / "checkpoint")
    assert continued.updates == stop
    assert updates(continued) == losses[stop:]
    for name, array in unbroken.model.parameters.items():
        assert array.tobytes() == continued.model.parameters[name].tobytes(), name
    assert load(tmp_path / "checkpoint").config == unbroken.model.config


def test_an_epoch_has_every_pair_once_in_another_order(monkeypatch):
    training = trainer()
    seen = []
    learn = training.model.loss_and_gradients

    def note(sources, source_lengths, targets, target_lengths, rng):
        columns = zip(sources.T, source_lengths, targets.T, target_lengths)
        seen.append([(s[:n].tolist(), t[:m].tolist()) for s, n, t, m in columns])
        assert len(sources) == max(1, source_lengths.max())
        assert len(targets) == max(1, target_lengths.max())
        return learn(sources, source_lengths, targets, target_lengths, rng)

    monkeypatch.setitem(training.model.__dict__, "loss_and_gradients", note)
    updates(training)
    assert [len(window) for window in seen] == [6, 6, 6, 2] * 3
    epochs = [list(itertools.chain(*seen[i : i + 4])) for i in (0, 4, 8)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]
    rng = np.random.default_rng(0)
    assert sorted(pair[0] for pair in epochs[0]) == sorted(
        rng.integers(0, 7, rng.integers(0, 6)).tolist() for _ in range(20)
    )


def test_resume_refuses_other_pairs_and_settings(tmp_path):
    training = trainer()
    training.save(tmp_path / "checkpoint")
    other = trainer()
    other.settings["pairs"] = "other"
    with pytest.raises(ValueError, match=r"pairs: the checkpoint .* is of other settings"):
        other.resume(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=r"batch: the checkpoint .* it has 6, not 5"):
        trainer(batch=5).resume(tmp_path / "checkpoint")
    LanguageModel(3, 2, 4).save(tmp_path / "model")
    with pytest.raises(ValueError, match="path: expected a checkpoint of a training"):
        training.resume(tmp_path / "model")


# Errors.

X, N = np.array([[1, 2], [0, 1]]), [2, 1]


def small(**options):
    return Seq2Seq(3, 4, 2, 4, **{"seed": 0, **options})


def pair_trainer(model, sources=([1],), targets=([1],), optimizer=None, **options):
    return PairTrainer(model, optimizer or Adam(model.parameters), sources, targets, **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Seq2Seq(0, 2, 2, 2), ValueError, "num_sources: expected at least 1, got 0"),
        (lambda: Seq2Seq(2, 0, 2, 2), ValueError, "num_targets: expected at least 1, got 0"),
        (lambda: Seq2Seq(2, 2, 0, 2), ValueError, "embedding_dim: expected at least 1, got 0"),
        (lambda: Seq2Seq(2, 2, 2, 0), ValueError, "hidden_size: expected at least 1, got 0"),
        (lambda: Seq2Seq(2, 2, 2, 3, bidirectional=True), ValueError, "hidden_size: expected an even number .*, got 3"),
        (lambda: small(num_layers=0), ValueError, "num_layers: expected at least 1, got 0"),
        (lambda: small(dropout=1), ValueError, "dropout: expected a probability less than 1"),
        (lambda: small(dtype=int), TypeError, "dtype: expected float32 or float64"),
        (lambda: small(seed="1"), TypeError, "seed: expected an int, got '1'"),
        (lambda: small(cell="LSTM"), ValueError, "cell: expected one of rnn, lstm, gru, got 'LSTM'"),
        (lambda: small(attention=1), TypeError, "attention: expected True or False, got 1"),
        (lambda: small(bidirectional="no"), TypeError, "bidirectional: expected True or False, got 'no'"),
        (lambda: small(source_vocabulary="ab"), ValueError, "source_vocabulary: expected 3 characters, got 2"),
        (lambda: small(target_vocabulary=Vocabulary("abc")), ValueError, "target_vocabulary: expected 4 characters"),
        (lambda: small()([1], None, X, None), ValueError, r"sources: expected shape \(T, B\), .* got \(1,\)"),
        (lambda: small()(X[:, :0], None, X, None), ValueError, r"sources: expected shape .* got \(2, 0\)"),
        (lambda: small()(X + 0.5, None, X, None), TypeError, "sources: expected integers, got dtype float64"),
        (lambda: small()(X + 1, None, X, None), ValueError, "sources: expected indices from 0 to 2, got 3"),
        (lambda: small()(X, [3, 1], X, None), ValueError, "source_lengths: expected numbers from 0 to 2, got 3"),
        (lambda: small()(X, [1], X, None), ValueError, r"source_lengths: expected shape \(2,\), got \(1,\)"),
        (lambda: small()(X, [1.0, 2.0], X, None), TypeError, "source_lengths: expected integers"),
        (lambda: small()(X, N, X[:, :1], None), ValueError, r"targets: expected shape \(T_t, 2\), .* got \(2, 1\)"),
        (lambda: small()(X, N, X + 2, None), ValueError, "targets: expected indices from 0 to 3, got 4"),
        (lambda: small()(X, N, X, [0, -1]), ValueError, "target_lengths: expected numbers from 0 to 2, got -1"),
        (lambda: small().loss_and_gradients(X, N, X, N, 1), TypeError, "rng: expected a numpy.random.Generator, got 1"),
        (lambda: small().encode([]), ValueError, "sources: expected shape"),
        (lambda: small().step([[4]], small().encode(X)), ValueError, r"tokens: expected shape \(B,\), got \(1, 1\)"),
        (lambda: small().step([4, 4], None), TypeError, "state: expected what encode or step returns, got None"),
        (lambda: small().step([4, 5], small().encode(X)), ValueError, "indices from 0 to 4, got 5"),
        (lambda: small().step([4], small().encode(X)), ValueError, r"memory: expected shape \(1, at least 1, 4\)"),
        (
            lambda: small().step([4, 4], Encoded(np.zeros((2, 1, 4), np.float32), *small().encode(X)[1:])),
            TypeError,
            "state: expected a tuple of 2 arrays",
        ),
        (lambda: small().beam_search(X, N, beam_size=0), ValueError, "beam_size: expected at least 1, got 0"),
        (lambda: small().beam_search(X, N, max_length=0), ValueError, "max_length: expected at least 1, got 0"),
        (lambda: small().beam_search(X, N, beam=3), TypeError, "beam"),
        (lambda: small().beam_search(X, N, eos=1), TypeError, "eos"),
        (lambda: small().translate(["a"]), ValueError, "translate: expected a model with vocabularies"),
        (lambda: small().decode([1]), ValueError, "decode: expected a model with vocabularies"),
        (lambda: small(target_vocabulary="abcd").decode([[1]]), ValueError, r"tokens: expected shape \(T,\)"),
        (lambda: small(target_vocabulary="abcd").decode([5]), ValueError, "tokens: expected indices from 0 to 3"),
        (
            lambda: small(source_vocabulary="abc", target_vocabulary="abcd").translate("abc"),
            TypeError,
            "texts: expected a list of strings, got 'abc'",
        ),
        (
            lambda: small(source_vocabulary="abc", target_vocabulary="abcd").translate(["ad"]),
            ValueError,
            "text: .* vocabulary, got 'd' at position 1",
        ),
        (lambda: pad([]), TypeError, "sequences: expected a list of at least one sequence, got list of 0"),
        (lambda: pad("abc"), TypeError, "sequences: expected a list of at least one sequence, got 'abc'"),
        (lambda: pad([[1], [[2]]]), ValueError, r"sequences: expected lists of tokens, got shape \(1, 1\)"),
        (lambda: pad([[1], [-2]]), ValueError, "sequences: expected indices from 0 to .*, got -2"),
        (lambda: pad([[1.5]]), TypeError, "sequences: expected integers"),
        (lambda: pair_trainer(LanguageModel(3, 2, 4)), TypeError, "model: expected a Seq2Seq, got LanguageModel"),
        (
            lambda: pair_trainer(small(), optimizer=Adam(small().parameters)),
            TypeError,
            "optimizer: expected one of the model's parameters, got Adam",
        ),
        (lambda: pair_trainer(small(), [[3]]), ValueError, "sources: expected indices from 0 to 2, got 3"),
        (lambda: pair_trainer(small(), [[1]], [[4]]), ValueError, "targets: expected indices from 0 to 3, got 4"),
        (lambda: pair_trainer(small(), [[1]], [[1], [2]]), ValueError, "targets: expected 1, as there are sources"),
        (lambda: pair_trainer(small(), []), TypeError, "sequences: expected a list of at least one sequence"),
        (lambda: pair_trainer(small(), batch=0), ValueError, "batch: expected at least 1, got 0"),
        (lambda: pair_trainer(small(), schedule="x"), ValueError, "schedule: expected one of constant, cosine"),
    ],
)  # fmt: skip
def test_wrong_calls(call, error, message):
    with pytest.raises(error, match=message):
        call()
