"""LanguageModel: Embedding, a stack of recurrent layers, Linear; and the characters that its tokens stand for."""

import json
import os
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from .beam import Hypotheses, beam_search, greedy
from .checks import as_array, as_indices, as_kernel_array, as_seed, describe, integer, number, probability
from .decoding import Parts
from .heads import Embedding, Linear
from .losses import cross_entropy
from .masks import drop
from .parameters import Array, JoinedParameters, Module, read_file
from .recurrent import Gradients
from .sampling import Samples, StochasticBeams, sample, stochastic_beam_search
from .seq2seq import CELLS, Seq2Seq

__all__ = [
    "CELLS",
    "CHECKPOINT_PREFIX",
    "LanguageModel",
    "Seq2Seq",
    "Vocabulary",
    "from_metadata",
    "load",
    "read_config",
]

# Arrays of a checkpoint that are not the model's parameters are named so.
CHECKPOINT_PREFIX = "training."


class Vocabulary:
    """The characters of a model's text, each of which is a token: its place in the list.

    Args:
        characters: a string, or strings of one character each, without repetition.

    Raises TypeError or ValueError for anything else.

    >>> from fastrnn.models import Vocabulary
    >>> vocabulary = Vocabulary.of("abracadabra")
    >>> vocabulary.encode("cab")
    array([2, 0, 1])
    >>> vocabulary.decode([2, 0, 1])
    'cab'
    """

    def __init__(self, characters: Iterable[str]):
        if not isinstance(characters, (str, list, tuple)):
            raise TypeError(f"characters: expected a string or a list of characters, got {describe(characters)}")
        self.characters = list(characters)
        for character in self.characters:
            if not isinstance(character, str) or len(character) != 1:
                raise ValueError(f"characters: expected single characters, got {character!r}")
        if len(set(self.characters)) != len(self.characters) or not self.characters:
            raise ValueError("characters: expected at least one, each once")
        codes = _codes("".join(self.characters))
        self._order = np.argsort(codes)
        self._codes = codes[self._order]

    @classmethod
    def of(cls, text: str) -> "Vocabulary":
        """The vocabulary of the characters of a text, sorted."""
        if not isinstance(text, str):
            raise TypeError(f"text: expected a string, got {describe(text)}")
        return cls(sorted(set(text)))

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> Array:
        """The tokens of a text, int64. Raises ValueError for a character that is not in the vocabulary."""
        if not isinstance(text, str):
            raise TypeError(f"text: expected a string, got {describe(text)}")
        codes = _codes(text)
        places = np.minimum(np.searchsorted(self._codes, codes), len(self) - 1)
        unknown = np.flatnonzero(self._codes[places] != codes)
        if len(unknown):
            at = int(unknown[0])
            raise ValueError(f"text: expected characters of the vocabulary, got {text[at]!r} at position {at}")
        return self._order[places]

    def decode(self, tokens: Any) -> str:
        """The text of tokens. Raises TypeError or ValueError for what is no token."""
        tokens = as_array(tokens, "tokens")
        if tokens.size == 0:
            return ""
        return "".join([self.characters[i] for i in as_indices(tokens, "tokens", len(self)).reshape(-1)])


def _codes(text: str) -> Array:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


class LanguageModel(Module):
    """Predicts the next token of a sequence from those before: Embedding, recurrent layers, Linear.

    (Mikolov et al. 2010; with LSTM and dropout, which spares the recurrence: Zaremba, Sutskever and Vinyals 2014.)

    Args:
        num_tokens: tokens there are, V.
        embedding_dim: numbers that stand for a token.
        hidden_size: units of each recurrent layer, H.
        num_layers: recurrent layers.
        dropout: the probability with which `vjp` drops each output of the embedding and of each recurrent layer.
        dtype: float32 or float64.
        seed: of the initial parameters and of dropout; None takes the system's.
        vocabulary: the characters that the tokens stand for, if they do; saved with the model.
        cell: of the recurrent layers: "rnn", "lstm" or "gru".

    Parameters are ``embedding.weight``, ``rnn.weight_ih_l0``, ..., ``output.weight`` and ``output.bias``. Tokens are
    integers (T, B), the state is the recurrent layers': ``(h, c)`` of LSTM, one array of the others.

    Raises TypeError or ValueError for an argument of a wrong type or value.

    >>> from fastrnn.models import LanguageModel
    >>> model = LanguageModel(3, 8, 16, seed=0, vocabulary="abc")
    >>> logits, state = model(model.vocabulary.encode("abcab")[:, None])
    >>> logits.shape
    (5, 1, 3)
    >>> len(model.vocabulary.decode(model.generate(model.vocabulary.encode("ab"), length=10)))
    10
    """

    parameters: JoinedParameters

    def __init__(
        self,
        num_tokens: int,
        embedding_dim: int,
        hidden_size: int,
        num_layers: int = 1,
        dropout: float = 0.0,
        dtype: Any = np.float32,
        seed: int | None = None,
        vocabulary: Vocabulary | Iterable[str] | None = None,
        cell: str = "lstm",
    ):
        if not isinstance(cell, str) or cell not in CELLS:
            raise ValueError(f"cell: expected one of {', '.join(CELLS)}, got {describe(cell)}")
        self.dropout = probability(dropout, "dropout")
        seeds: Any = np.random.SeedSequence(as_seed(seed)).generate_state(4, np.uint64)
        self.embedding = Embedding(num_tokens, embedding_dim, dtype, int(seeds[0]))
        self.rnn = CELLS[cell](
            embedding_dim,
            hidden_size,
            num_layers,
            dropout=self.dropout if num_layers != 1 else 0.0,
            dtype=dtype,
            seed=int(seeds[1]),
        )
        self.output = Linear(self.rnn.hidden_size, self.embedding.num_embeddings, dtype=dtype, seed=int(seeds[2]))
        self.num_tokens, self.dtype = self.embedding.num_embeddings, self.rnn.dtype
        self._rng = np.random.default_rng(seeds[3])
        if vocabulary is not None and not isinstance(vocabulary, Vocabulary):
            vocabulary = Vocabulary(vocabulary)
        if vocabulary is not None and len(vocabulary) != self.num_tokens:
            raise ValueError(f"vocabulary: expected {self.num_tokens} characters, got {len(vocabulary)}")
        self.vocabulary = vocabulary
        self.config = {
            "num_tokens": self.num_tokens,
            "embedding_dim": self.embedding.embedding_dim,
            "hidden_size": self.rnn.hidden_size,
            "num_layers": self.rnn.num_layers,
            "dropout": self.dropout,
            "dtype": self.dtype.name,
            "vocabulary": None if vocabulary is None else "".join(vocabulary.characters),
            "cell": cell,
        }
        self.parameters = JoinedParameters({"embedding": self.embedding, "rnn": self.rnn, "output": self.output})

    def _tokens(self, tokens: Any, name: str = "tokens") -> Array:
        tokens = as_array(tokens, name)
        if tokens.ndim != 2:
            raise ValueError(f"{name}: expected shape (T, B), got {tokens.shape}")
        return as_indices(tokens, name, self.num_tokens)

    def __call__(self, tokens: Any, state: Any = None) -> tuple[Array, Any]:
        """``logits, state``: (T, B, V), of the token after each token (T, B), and the state after the last one.

        ``state`` is that before the first token; None stands for zeros.

        Raises TypeError or ValueError for an array of a wrong dtype or shape, or a token out of range.
        """
        y, state = self.rnn(self.embedding(self._tokens(tokens)), state)
        return self.output(y), state

    def vjp(
        self, tokens: Any, state: Any = None, rng: np.random.Generator | None = None
    ) -> tuple[Any, Callable[..., tuple[Any, Gradients]]]:
        """As a call, for training: with dropout, whose masks ``rng`` draws (None: the model's own, by ``seed``).

        Returns ``(logits, state), pullback``. ``pullback(dlogits, dstate=None)`` returns ``dstate_0, grads``: the
        gradients by the state before the first token and by each parameter, a dict by name.
        """
        tokens = self._tokens(tokens)
        if rng is not None and not isinstance(rng, np.random.Generator):
            raise TypeError(f"rng: expected a numpy.random.Generator, got {describe(rng)}")
        rng = rng or self._rng
        x, embedding_pullback = self.embedding.vjp(tokens)
        undrop_x = undrop_y = None
        if self.dropout:
            x, undrop_x = drop(x, self.dropout, rng)
        (y, state), rnn_pullback = self.rnn.vjp(x, state, rng)
        if self.dropout:
            y, undrop_y = drop(y, self.dropout, rng)
        logits, output_pullback = self.output.vjp(y)

        shape = logits.shape

        def pullback(dlogits: Array, dstate: Any = None) -> tuple[Any, Gradients]:
            dlogits = as_kernel_array(dlogits, "dlogits", self.dtype, shape)
            dy, output_grads = output_pullback(dlogits)
            dx, dstate_0, rnn_grads = rnn_pullback(undrop_y(dy) if undrop_y else dy, dstate)
            embedding_grads = embedding_pullback(undrop_x(dx) if undrop_x else dx)
            parts = {"embedding": embedding_grads, "rnn": rnn_grads, "output": output_grads}
            return dstate_0, {f"{prefix}.{name}": g for prefix, grads in parts.items() for name, g in grads.items()}

        return (logits, state), pullback

    def loss_and_gradients(
        self, tokens: Any, targets: Any, state: Any = None, rng: np.random.Generator | None = None
    ) -> tuple[float, Any, Gradients]:
        """``loss, state, grads``: the mean cross-entropy of targets (T, B), the tokens that follow, and its gradients.

        The gradient ends at the window's first step: it takes ``state`` for a constant, as truncated
        backpropagation through time does (Williams and Peng 1990).
        """
        (logits, state), pullback = self.vjp(tokens, state, rng)
        loss, dlogits = cross_entropy(logits, targets)
        return loss, state, pullback(dlogits)[1]

    @property
    def parts(self) -> Parts:
        """What decoding in a compiled loop needs to know."""
        return Parts(self.embedding, self.rnn, self.output)

    def step(self, tokens: Any, state: Any = None) -> tuple[Array, Any]:
        """One step as `fastrnn.beam_search` and its like take it, with the batch first in every array.

        Args:
            tokens: integers (B,).
            state: before them, arrays (B, num_layers, H) as a call returns them but for the order of axes; None
                stands for zeros.

        Returns ``log_probs, state``: float64 (B, V), of the tokens that come next, and the state after these.

        Raises TypeError or ValueError for an array of a wrong dtype or shape, or a token out of range.
        """
        tokens = as_array(tokens, "tokens")
        if tokens.ndim != 1:
            raise ValueError(f"tokens: expected shape (B,), got {tokens.shape}")
        return self.parts.step(as_indices(tokens, "tokens", self.num_tokens), state)

    def beam_search(self, state: Any = None, **options: Any) -> Hypotheses:
        """The likeliest continuations: `fastrnn.beam_search` of the model, in a compiled loop, with its options.

        ``state`` is as a call takes and returns it; None stands for zeros. To continue a prompt:

        >>> import fastrnn
        >>> model = fastrnn.LanguageModel(3, 8, 16, seed=0, vocabulary="abc")
        >>> prompt = model.vocabulary.encode("abcab")
        >>> _, state = model(prompt[:-1, None])
        >>> best = model.beam_search(state, bos=prompt[-1], eos=None, beam_size=4, max_length=10, num_return=2)
        >>> [len(model.vocabulary.decode(tokens)) for tokens in best.tokens[0]]
        [10, 10]
        """
        return beam_search(self, state, **options)

    def greedy(self, state: Any = None, **options: Any) -> Hypotheses:
        """The likeliest token at each step: `fastrnn.greedy` of the model, as `beam_search` above."""
        return greedy(self, state, **options)

    def sample(self, state: Any = None, **options: Any) -> Samples:
        """Sequences drawn token by token: `fastrnn.sample` of the model, as `beam_search` above."""
        return sample(self, state, **options)

    def stochastic_beam_search(self, state: Any = None, **options: Any) -> StochasticBeams:
        """Sequences without replacement: `fastrnn.stochastic_beam_search` of the model, as `beam_search` above."""
        return stochastic_beam_search(self, state, **options)

    def generate(
        self, prompt_tokens: Any, length: int, temperature: float = 1.0, rng: np.random.Generator | None = None
    ) -> Array:
        """Continue a prompt, drawing one token a step from ``softmax(logits / temperature)``.

        Args:
            prompt_tokens: integers (T,), at least one.
            length: how many tokens to draw.
            temperature: less than 1 for likelier tokens; 0 always takes the likeliest.
            rng: draws the tokens; None takes one seeded by the system.

        Returns the drawn tokens, int64 (length,), without the prompt.

        Raises TypeError or ValueError for a wrong argument, FloatingPointError for logits that are not finite.
        """
        prompt_tokens = as_array(prompt_tokens, "prompt_tokens")
        if prompt_tokens.ndim != 1:
            raise ValueError(f"prompt_tokens: expected shape (T,), got {prompt_tokens.shape}")
        tokens = self._tokens(prompt_tokens[:, None], "prompt_tokens")
        length, temperature = integer(length, "length", 0), number(temperature, "temperature", 0)
        if rng is not None and not isinstance(rng, np.random.Generator):
            raise TypeError(f"rng: expected a numpy.random.Generator, got {describe(rng)}")
        rng = rng or np.random.default_rng()
        drawn = np.empty(length, np.int64)
        state = None
        for i in range(length):
            y, state = self.rnn(self.embedding(tokens), state)
            drawn[i] = _draw(self.output(y[-1, 0]), temperature, rng)
            tokens = drawn[i : i + 1, None]
        return drawn


def _draw(logits: Array, temperature: float, rng: np.random.Generator) -> int:
    logits = logits.astype(np.float64)
    if not np.isfinite(logits).all():
        raise FloatingPointError("logits: expected finite numbers, got others: the parameters have diverged")
    if temperature == 0:
        return int(logits.argmax())
    with np.errstate(over="ignore"):  # so small a temperature leaves the likeliest
        weights = np.exp((logits - logits.max()) / temperature)
    total = weights.cumsum()
    return int(np.searchsorted(total, rng.random() * total[-1], side="right"))


def load(path: str | os.PathLike[str]) -> LanguageModel:
    """The language model of a file that `LanguageModel.save` or a training run wrote.

    Raises FileNotFoundError, or ValueError for a file of anything else.
    """
    arrays, metadata = read_file(path)
    model = from_metadata(metadata, path)
    load_parameters(model, arrays, path)
    return model


def load_parameters(model: Module, arrays: dict[str, Array], path: Any) -> None:
    """A model's parameters from its file, which may be a checkpoint of a training."""
    try:
        model.load_state_dict({n: a for n, a in arrays.items() if not n.startswith(CHECKPOINT_PREFIX)})
    except (KeyError, TypeError, ValueError) as error:
        text = f"path: expected the parameters of a {type(model).__name__}, got {os.fspath(path)!r}: {error}"
        raise ValueError(text) from error


def from_metadata(metadata: dict[str, str], path: Any) -> LanguageModel:
    """A language model made as the one whose file has this metadata."""
    try:
        config = read_config(metadata, path)
        if config.pop("class") != LanguageModel.__name__:
            raise KeyError("class")
        return LanguageModel(**config)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"path: expected a language model's file, got {os.fspath(path)!r}") from error


def read_config(metadata: dict[str, str], path: Any) -> dict[str, Any]:
    """A model's class and arguments in its file's metadata. A file that names no cell is of LSTM layers."""
    try:
        return {"cell": "lstm", **json.loads(metadata["fastrnn"])}
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"path: expected a model's file, got {os.fspath(path)!r}") from error
