"""Seq2Seq: an encoder reads a sequence, a decoder writes another, and looks back at what was read (attention)."""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .beam import Hypotheses, beam_search, greedy
from .checks import as_array, as_indices, as_kernel_array, as_lengths, as_seed, describe, flag, integer, probability
from .decoding import Parts, map_arrays
from .heads import Embedding, Linear
from .kernels.search import log_softmax
from .layers import GRU, LSTM, RNN
from .losses import cross_entropy
from .masks import drop
from .parameters import Array, JoinedParameters, Module, read_file
from .recurrent import Gradients, Recurrent
from .sampling import Samples, StochasticBeams, sample, stochastic_beam_search

if TYPE_CHECKING:
    from .models import LanguageModel, Vocabulary

CELLS: dict[str, Callable[..., Recurrent]] = {"rnn": RNN, "lstm": LSTM, "gru": GRU}
# Sources that `translate` reads at once.
TEXTS_AT_ONCE = 256
# It rounds a text's length up to a multiple of this, for the longest translation, which depends on no other text.
LENGTHS_AT_ONCE = 32


class Encoded(NamedTuple):
    """What the decoder knows after some tokens. The first axis of every array is the batch."""

    state: Any
    """Of the decoder's layers: arrays (B, num_layers, H), ``(h, c)`` of LSTM and one of the others."""
    memory: Array | None
    """(B, T_s, H): the encoder's outputs, 0 past a source's end. None without attention."""
    lengths: Array | None
    """int64 (B,): of the sources. None without attention."""


class Seq2Seq(Module):
    """Turns a sequence into another: an encoder's last state is a decoder's first.

    (Sutskever, Vinyals and Le 2014, arXiv:1409.3215; attention: Luong, Pham and Manning 2015, arXiv:1508.04025.)

    With h_t the decoder's outputs and m_s the encoder's, attention is a_ts = softmax_s(h_t . m_s), over a source's own
    steps, c_t = sum_s a_ts m_s, and logits_t = W_out tanh(W_c [c_t; h_t]) + b_out. Without it, logits_t = W_out h_t +
    b_out.

    Args:
        num_sources, num_targets: tokens that there are in sources and in targets. A target begins and ends with one
            more, ``model.end`` = num_targets, which the model adds by itself.
        embedding_dim: numbers that stand for a token.
        hidden_size: units of each layer of the decoder, H, and of the encoder.
        num_layers: recurrent layers of the encoder, and of the decoder.
        dropout: the probability with which `loss_and_gradients` drops each output of the embeddings, of each recurrent
            layer and of attention.
        dtype: float32 or float64.
        seed: of the initial parameters and of dropout; None takes the system's.
        source_vocabulary, target_vocabulary: the characters that the tokens stand for, if they do; saved with it.
        cell: of the recurrent layers: "rnn", "lstm" or "gru".
        bidirectional: the encoder reads sources both ways, with H / 2 units each way. Both ways' outputs, and their
            states, are joined: forward first.
        attention: whether the decoder sees all of the encoder's outputs, not only its last state.

    Parameters are ``source_embedding.weight``, ``encoder.weight_ih_l0``, ..., ``target_embedding.weight``,
    ``decoder.weight_ih_l0``, ..., ``combine.weight``, which is W_c (H, 2 H), and ``output.weight`` and ``output.bias``
    (num_targets + 1). Sources are integers (T_s, B), targets (T_t, B) without the model's own token; what stands past
    a sequence's end is not read.

    Raises TypeError or ValueError for an argument of a wrong type or value.

    >>> import numpy as np
    >>> from fastrnn.seq2seq import Seq2Seq, pad
    >>> model = Seq2Seq(10, 10, 16, 32, seed=0, source_vocabulary="0123456789", target_vocabulary="0123456789")
    >>> sources = pad([model.source_vocabulary.encode(text) for text in ("123", "45678")])
    >>> targets = pad([model.target_vocabulary.encode(text) for text in ("321", "87654")])
    >>> loss, grads = model.loss_and_gradients(*sources, *targets)
    >>> grads["combine.weight"].shape
    (32, 64)
    >>> best = model.beam_search(*sources, beam_size=4, max_length=8)
    >>> best.tokens.shape[:2]  # the best of each source
    (2, 1)
    >>> len(model.translate(["123", "45678"]))
    2
    """

    parameters: JoinedParameters

    def __init__(
        self,
        num_sources: int,
        num_targets: int,
        embedding_dim: int,
        hidden_size: int,
        num_layers: int = 1,
        dropout: float = 0.0,
        dtype: Any = np.float32,
        seed: int | None = None,
        source_vocabulary: "Vocabulary | Iterable[str] | None" = None,
        target_vocabulary: "Vocabulary | Iterable[str] | None" = None,
        cell: str = "lstm",
        bidirectional: bool = False,
        attention: bool = True,
    ):
        if not isinstance(cell, str) or cell not in CELLS:
            raise ValueError(f"cell: expected one of {', '.join(CELLS)}, got {describe(cell)}")
        self.num_sources, self.end = integer(num_sources, "num_sources", 1), integer(num_targets, "num_targets", 1)
        self.dropout = probability(dropout, "dropout")
        self.bidirectional, self.attention = flag(bidirectional, "bidirectional"), flag(attention, "attention")
        H = integer(hidden_size, "hidden_size", 1)
        if self.bidirectional and H % 2:
            raise ValueError(f"hidden_size: expected an even number if bidirectional, got {H}")
        seeds: Any = np.random.SeedSequence(as_seed(seed)).generate_state(7, np.uint64)
        options: Any = {"dropout": self.dropout if num_layers != 1 else 0.0, "dtype": dtype}
        self.source_embedding = Embedding(self.num_sources, embedding_dim, dtype, int(seeds[0]))
        self.encoder = CELLS[cell](
            embedding_dim, H // 2 if self.bidirectional else H, num_layers,
            bidirectional=self.bidirectional, seed=int(seeds[1]), **options,
        )  # fmt: skip
        self.target_embedding = Embedding(self.end + 1, embedding_dim, dtype, int(seeds[2]))
        self.decoder = CELLS[cell](embedding_dim, H, num_layers, seed=int(seeds[3]), **options)
        self.combine = Linear(2 * H, H, bias=False, dtype=dtype, seed=int(seeds[4])) if self.attention else None
        self.output = Linear(H, self.end + 1, dtype=dtype, seed=int(seeds[5]))
        self.hidden_size, self.num_layers, self.dtype = H, self.decoder.num_layers, self.decoder.dtype
        self._rng = np.random.default_rng(seeds[6])
        self.source_vocabulary = _vocabulary(source_vocabulary, "source_vocabulary", self.num_sources)
        self.target_vocabulary = _vocabulary(target_vocabulary, "target_vocabulary", self.end)
        self.config = {
            "num_sources": self.num_sources,
            "num_targets": self.end,
            "embedding_dim": self.source_embedding.embedding_dim,
            "hidden_size": H,
            "num_layers": self.num_layers,
            "dropout": self.dropout,
            "dtype": self.dtype.name,
            "source_vocabulary": self.source_vocabulary and "".join(self.source_vocabulary.characters),
            "target_vocabulary": self.target_vocabulary and "".join(self.target_vocabulary.characters),
            "cell": cell,
            "bidirectional": self.bidirectional,
            "attention": self.attention,
        }
        parts = ("source_embedding", "encoder", "target_embedding", "decoder", "combine", "output")
        modules = {name: getattr(self, name) for name in parts}
        self.parameters = JoinedParameters({name: module for name, module in modules.items() if module is not None})

    # Arguments, checked.

    def _sources(self, sources: Any, lengths: Any) -> tuple[Array, Array]:
        return _sequences(sources, "sources", lengths, "source_lengths", self.num_sources)

    def _targets(self, targets: Any, lengths: Any, batch: int) -> tuple[Array, Array, Array]:
        """What the decoder reads and what it is to write, both (T_t + 1, B), and how many of these are read."""
        targets, lengths = _sequences(targets, "targets", lengths, "target_lengths", self.end)
        T, B = targets.shape
        if batch != B:
            raise ValueError(f"targets: expected shape (T_t, {batch}), as there are {batch} sources, got {(T, B)}")
        inputs = np.concatenate([np.full((1, B), self.end), targets])
        outputs = np.concatenate([targets, np.zeros((1, B), np.int64)])
        outputs[lengths, np.arange(B)] = self.end
        return inputs, outputs, lengths + 1

    def _rng_for(self, rng: Any) -> np.random.Generator:
        if rng is not None and not isinstance(rng, np.random.Generator):
            raise TypeError(f"rng: expected a numpy.random.Generator, got {describe(rng)}")
        return rng or self._rng

    # The bridge: a state of the encoder (num_layers * directions, B, H / directions) is one of the decoder
    # (num_layers, B, H).

    def _bridge(self, state: Any) -> Any:
        L, D = self.num_layers, self.encoder.directions

        def join(s: Array) -> Array:
            return s.reshape(L, D, *s.shape[1:]).swapaxes(1, 2).reshape(L, s.shape[1], -1)

        return map_arrays(join, state)

    def _bridge_back(self, dstate: Any) -> Any:
        L, D = self.num_layers, self.encoder.directions

        def part(d: Array) -> Array:
            return d.reshape(L, d.shape[1], D, -1).swapaxes(1, 2).reshape(L * D, d.shape[1], -1)

        return map_arrays(part, dstate)

    def _look_back(self, h: Array, memory: Array | None, lengths: Array | None) -> Array:
        """What the output layer reads (B, T, H) at outputs h (B, T, H) of the decoder."""
        if self.combine is None or memory is None or lengths is None:
            return h
        return np.tanh(self.combine(np.concatenate([attend(h, memory, lengths)[0], h], 2)))

    # Training.

    def __call__(self, sources: Any, source_lengths: Any, targets: Any, target_lengths: Any) -> Array:
        """The logits of every target token given the source and the target tokens before it, for inference.

        Args:
            sources: integers (T_s, B).
            source_lengths: of B sources, from 0 to T_s; None: all are T_s long.
            targets, target_lengths: likewise, (T_t, B).

        Returns an array (T_t + 1, B, num_targets + 1): logits[t, b] are those of token t of target b, and at
        t = target_lengths[b] those of ``model.end``; 0 past that.

        Raises TypeError or ValueError for an array of a wrong dtype or shape, or a token out of range.
        """
        sources, source_lengths = self._sources(sources, source_lengths)
        inputs, _, steps = self._targets(targets, target_lengths, sources.shape[1])
        memory, state = self.encoder(self.source_embedding(sources), lengths=source_lengths)
        h, _ = self.decoder(self.target_embedding(inputs), self._bridge(state), steps)
        logits = self.output(self._look_back(h.swapaxes(0, 1), memory.swapaxes(0, 1), source_lengths)).swapaxes(0, 1)
        logits[np.arange(len(inputs))[:, None] >= steps] = 0
        return np.ascontiguousarray(logits)

    def loss_and_gradients(
        self,
        sources: Any,
        source_lengths: Any,
        targets: Any,
        target_lengths: Any,
        rng: np.random.Generator | None = None,
    ) -> tuple[float, Gradients]:
        """``loss, grads``: the mean cross-entropy, in nats, of all target tokens and ends, and its gradients by name.

        Every token is predicted from the true ones before it (teacher forcing). Arguments are as for a call; ``rng``
        draws the masks of dropout (None: the model's own, by ``seed``).
        """
        sources, source_lengths = self._sources(sources, source_lengths)
        inputs, outputs, steps = self._targets(targets, target_lengths, sources.shape[1])
        rng = self._rng_for(rng)
        x, source_pullback = self.source_embedding.vjp(sources)
        x, undrop_x = self._drop(x, rng)
        (memory, state), encoder_pullback = self.encoder.vjp(x, rng=rng, lengths=source_lengths)
        z, target_pullback = self.target_embedding.vjp(inputs)
        z, undrop_z = self._drop(z, rng)
        (h, _), decoder_pullback = self.decoder.vjp(z, self._bridge(state), rng, steps)
        # From here on only the rows of tokens that there are, N of them.
        there = np.arange(len(inputs))[:, None] < steps
        rows = h[there]
        if self.combine is not None:
            context, attention_pullback = attend(h.swapaxes(0, 1), memory.swapaxes(0, 1), source_lengths)
            rows, combine_pullback = self.combine.vjp(np.concatenate([context.swapaxes(0, 1)[there], rows], 1))
            rows = np.tanh(rows)
        read, undrop_rows = self._drop(rows, rng)
        logits, output_pullback = self.output.vjp(read)
        loss, dlogits = cross_entropy(logits, outputs[there])

        grads: dict[str, Gradients] = {}
        drows, grads["output"] = output_pullback(dlogits)
        drows, dh, dmemory = undrop_rows(drows), np.zeros_like(h), None
        if self.combine is not None:
            drows, grads["combine"] = combine_pullback(drows * (1 - rows * rows))
            dcontext = np.zeros_like(h)
            dcontext[there], drows = drows[:, : self.hidden_size], drows[:, self.hidden_size :]
            dqueries, dmemory = attention_pullback(dcontext.swapaxes(0, 1))
            dh, dmemory = dh + dqueries.swapaxes(0, 1), dmemory.swapaxes(0, 1)
        dh[there] += drows
        dz, dstate, grads["decoder"] = decoder_pullback(dh)
        grads["target_embedding"] = target_pullback(undrop_z(dz))
        dx, _, grads["encoder"] = encoder_pullback(dmemory, self._bridge_back(dstate))
        grads["source_embedding"] = source_pullback(undrop_x(dx))
        return loss, {name: grads[name.partition(".")[0]][name.partition(".")[2]] for name in self.parameters}

    def _drop(self, x: Array, rng: np.random.Generator) -> tuple[Array, Callable[[Array], Array]]:
        return drop(x, self.dropout, rng) if self.dropout else (x, lambda dx: dx)

    # Decoding.

    def encode(self, sources: Any, source_lengths: Any = None) -> Encoded:
        """Read sources (T_s, B), and return what `step` begins with, before ``model.end`` as the first token.

        >>> import fastrnn
        >>> from fastrnn.seq2seq import Seq2Seq
        >>> model = Seq2Seq(5, 3, 4, 6, seed=0)
        >>> best = fastrnn.greedy(model.step, model.encode([[1], [4]]), bos=model.end, eos=model.end, max_length=7)
        >>> best.tokens.shape[:2]
        (1, 1)
        """
        sources, lengths = self._sources(sources, source_lengths)
        memory, state = self.encoder(self.source_embedding(sources), lengths=lengths)
        state = map_arrays(_batch_first, self._bridge(state))
        return Encoded(state, _batch_first(memory), lengths) if self.attention else Encoded(state, None, None)

    def step(self, tokens: Any, state: Any) -> tuple[Array, Encoded]:
        """One step of the decoder as `fastrnn.beam_search` and its like take it, with the batch first in every array.

        Args:
            tokens: integers (B,): the last ones written, ``model.end`` before the first.
            state: before them, as `encode` and this method return it.

        Returns ``log_probs, state``: float64 (B, num_targets + 1), of the tokens that come next, and the state after
        these.

        Raises TypeError or ValueError for an array of a wrong dtype or shape, or a token out of range.
        """
        if not isinstance(state, tuple) or len(state) != 3:
            raise TypeError(f"state: expected what encode or step returns, got {describe(state)}")
        tokens = as_array(tokens, "tokens")
        if tokens.ndim != 1:
            raise ValueError(f"tokens: expected shape (B,), got {tokens.shape}")
        before, memory, lengths = state
        if self.attention:
            memory = as_kernel_array(memory, "memory", self.dtype, (len(tokens), None, self.hidden_size))
            lengths = as_lengths(lengths, "lengths", memory.shape[1], len(tokens))
        log_probs, after = self._step(tokens, before, memory, lengths)
        return log_probs, Encoded(after, memory, lengths)

    def _step(self, tokens: Array, state: Any, memory: Array | None, lengths: Array | None) -> tuple[Array, Any]:
        """As `step`, with a memory (N, T_s, H) that N groups of tokens, all as large, look back at."""
        x = self.target_embedding(tokens[None])
        h, after = self.decoder(x, map_arrays(_batch_first, state))
        groups = len(tokens) if memory is None else len(memory)
        logits = self.output(self._look_back(h.reshape(groups, -1, self.hidden_size), memory, lengths))
        log_probs = np.empty((len(tokens), self.end + 1))
        log_softmax(logits.reshape(log_probs.shape), log_probs)
        return log_probs, map_arrays(_batch_first, after)

    def _search(
        self, search: Callable[..., Any], sources: Any, source_lengths: Any, max_length: int | None, options: Any
    ) -> Any:
        state, memory, lengths = self.encode(sources, source_lengths)
        if max_length is None:
            max_length = 2 * as_array(sources, "sources").shape[0] + 20
        ends = {"bos": self.end, "eos": self.end, "max_length": max_length}
        if memory is None:  # compiled loops decode it
            model = Parts(self.target_embedding, self.decoder, self.output)
            return search(model, map_arrays(_batch_first, state), **ends, **options)
        # The memory of a source is the same for all its hypotheses: the search need not repeat and reorder it.
        return search(lambda tokens, state: self._step(tokens, state, memory, lengths), state, **ends, **options)

    def beam_search(
        self,
        sources: Any,
        source_lengths: Any = None,
        *,
        beam_size: int = 8,
        max_length: int | None = None,
        **options: Any,
    ) -> Hypotheses:
        """The likeliest targets of sources (T_s, B): `fastrnn.beam_search` of the model, with its options.

        ``max_length`` counts the token ``model.end``, too; None stands for 2 T_s + 20. The sequences that are returned
        end with ``model.end``, and are padded with it.
        """
        return self._search(beam_search, sources, source_lengths, max_length, {"beam_size": beam_size, **options})

    def greedy(
        self, sources: Any, source_lengths: Any = None, *, max_length: int | None = None, **options: Any
    ) -> Hypotheses:
        """The likeliest token at each step: `fastrnn.greedy` of the model, as `beam_search` above."""
        return self._search(greedy, sources, source_lengths, max_length, options)

    def sample(
        self, sources: Any, source_lengths: Any = None, *, max_length: int | None = None, **options: Any
    ) -> Samples:
        """Targets drawn token by token: `fastrnn.sample` of the model, as `beam_search` above."""
        return self._search(sample, sources, source_lengths, max_length, options)

    def stochastic_beam_search(
        self,
        sources: Any,
        source_lengths: Any = None,
        *,
        beam_size: int = 8,
        max_length: int | None = None,
        **options: Any,
    ) -> StochasticBeams:
        """Targets drawn without replacement: `fastrnn.stochastic_beam_search` of the model, as `beam_search` above."""
        options["beam_size"] = beam_size
        return self._search(stochastic_beam_search, sources, source_lengths, max_length, options)

    def translate(self, texts: Sequence[str], beam_size: int = 8, **options: Any) -> list[str]:
        """The likeliest targets of texts, as texts: `beam_search` by way of the vocabularies.

        Without ``max_length``, T_s stands for a text's length rounded up to a multiple of 32, whatever is beside it.

        Raises ValueError for a model without vocabularies, or a character that is not in them.
        """
        if self.source_vocabulary is None or self.target_vocabulary is None:
            raise ValueError(f"translate: expected a model with vocabularies, got {self!r}")
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            raise TypeError(f"texts: expected a list of strings, got {describe(texts)}")
        sources = [self.source_vocabulary.encode(text) for text in texts]
        rounded = [-(-len(source) // LENGTHS_AT_ONCE) * LENGTHS_AT_ONCE for source in sources]
        max_length, translations = options.pop("max_length", None), [""] * len(sources)
        for size in sorted(set(rounded)):
            options |= {"beam_size": beam_size, "max_length": 2 * size + 20 if max_length is None else max_length}
            places = [i for i, n in enumerate(rounded) if n == size]
            for first in range(0, len(places), TEXTS_AT_ONCE):
                some = places[first : first + TEXTS_AT_ONCE]
                found = self.beam_search(*pad([sources[i] for i in some]), **options)
                for i, tokens in zip(some, found.tokens[:, 0]):
                    translations[i] = self.decode(tokens)
        return translations

    def decode(self, tokens: Any) -> str:
        """The text of target tokens (T,) up to the first ``model.end``. Raises ValueError without a vocabulary."""
        if self.target_vocabulary is None:
            raise ValueError(f"decode: expected a model with vocabularies, got {self!r}")
        tokens = as_array(tokens, "tokens")
        if tokens.ndim != 1:
            raise ValueError(f"tokens: expected shape (T,), got {tokens.shape}")
        ends = np.flatnonzero(tokens == self.end)
        return self.target_vocabulary.decode(tokens[: ends[0]] if len(ends) else tokens)


def load(path: str | os.PathLike[str]) -> "Seq2Seq | LanguageModel":
    """The model of a file that `Seq2Seq.save`, `LanguageModel.save` or a training run wrote.

    Raises FileNotFoundError, or ValueError for a file of anything else.
    """
    from . import models

    arrays, metadata = read_file(path)
    try:
        config = models.read_config(metadata, path)
        kind = {"LanguageModel": models.LanguageModel, "Seq2Seq": Seq2Seq}[config.pop("class")]
        model: Seq2Seq | LanguageModel = kind(**config)
    except (KeyError, TypeError, ValueError) as error:
        text = f"path: expected the file of a LanguageModel or a Seq2Seq, got {os.fspath(path)!r}"
        raise ValueError(text) from error
    models.load_parameters(model, arrays, path)
    return model


def attend(queries: Array, memory: Array, lengths: Array) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
    """Dot-product attention: context[b, t] = sum_s softmax_s(queries[b, t] . memory[b, s]) memory[b, s].

    Args:
        queries: (B, T, H).
        memory: (B, S, H), finite past the lengths.
        lengths: integers (B,): s < lengths[b]. Where one is 0, the context is 0.

    Returns the context (B, T, H) and ``pullback(dcontext)``, which returns ``dqueries, dmemory``.
    """
    info = np.finfo(queries.dtype)
    # What is not finite passes through without a warning.
    with np.errstate(invalid="ignore", over="ignore"):
        scores = queries @ memory.swapaxes(1, 2)
        scores[np.broadcast_to((np.arange(memory.shape[1]) >= lengths[:, None])[:, None], scores.shape)] = -np.inf
        weights = np.exp(scores - np.maximum(scores.max(2, keepdims=True), info.min))
        weights /= np.maximum(weights.sum(2, keepdims=True), info.tiny)
        context = weights @ memory

    def pullback(dcontext: Array) -> tuple[Array, Array]:
        with np.errstate(invalid="ignore", over="ignore"):
            dweights = dcontext @ memory.swapaxes(1, 2)
            dscores = weights * (dweights - (weights * dweights).sum(2, keepdims=True))
            return dscores @ memory, dscores.swapaxes(1, 2) @ queries + weights.swapaxes(1, 2) @ dcontext

    return context, pullback


def pad(sequences: Sequence[Any]) -> tuple[Array, Array]:
    """Sequences of tokens as one batch: int64 (T, B), padded with 0, and their lengths, int64 (B,).

    Raises TypeError or ValueError for anything but lists of integers of at least 0, or for no sequence.

    >>> from fastrnn.seq2seq import pad
    >>> tokens, lengths = pad([[1, 2, 3], [4]])
    >>> tokens.T, lengths
    (array([[1, 2, 3], [4, 0, 0]]), array([3, 1]))
    """
    if isinstance(sequences, str) or not isinstance(sequences, Sequence) or not sequences:
        raise TypeError(f"sequences: expected a list of at least one sequence, got {describe(sequences)}")
    arrays = [as_array(tokens, "sequences") for tokens in sequences]
    lengths = np.array([array.size for array in arrays])
    tokens = np.zeros((max(1, lengths.max()), len(arrays)), np.int64)
    for b, array in enumerate(arrays):
        if array.ndim != 1:
            raise ValueError(f"sequences: expected lists of tokens, got shape {array.shape}")
        if array.size:
            tokens[: len(array), b] = as_indices(array, "sequences", 2**31)
    return tokens, lengths


def _sequences(tokens: Any, name: str, lengths: Any, lengths_name: str, below: int) -> tuple[Array, Array]:
    """A batch of sequences, int64 (T, B), with 0 past the ends, and their lengths."""
    tokens = as_array(tokens, name)
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(f"{name}: expected shape (T, B), both at least 1, got {tokens.shape}")
    T, B = tokens.shape
    lengths = np.full(B, T) if lengths is None else as_lengths(lengths, lengths_name, T, B)
    if tokens.dtype.kind in "iu":
        tokens = np.where(np.arange(T)[:, None] < lengths, tokens, tokens.dtype.type(0))
    return as_indices(tokens, name, below), lengths


def _batch_first(array: Array) -> Array:
    """The first two axes exchanged: the batch first, or, once more, last."""
    return np.ascontiguousarray(as_array(array, "state").swapaxes(0, 1))


def _vocabulary(given: Any, name: str, tokens: int) -> "Vocabulary | None":
    from .models import Vocabulary

    vocabulary = given if given is None or isinstance(given, Vocabulary) else Vocabulary(given)
    if vocabulary is not None and len(vocabulary) != tokens:
        raise ValueError(f"{name}: expected {tokens} characters, got {len(vocabulary)}")
    return vocabulary
