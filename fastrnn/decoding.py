"""What the ways of decoding share: a model as a function of one step or as a `LanguageModel`, and the loop over steps.

`fastrnn.beam` and `fastrnn.sampling` have the ways themselves, `search` and `decode` of `fastrnn.kernels` the
arithmetic. A model's hypotheses stand in rows: those of the first input, those of the second, and so on.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from . import batching, memory
from .checks import DTYPES, as_array, as_indices, as_kernel_array, describe, integer
from .heads import Embedding, Linear
from .kernels import decode
from .kernels import search as kernels
from .parameters import Array
from .recurrent import Recurrent

Step = Callable[[Array, Any], tuple[Any, Any]]

# Tokens of a function's model are less than this.
LARGEST_TOKEN = 2**31
# Rows whose logits are computed at once: enough for tall tiles, few enough that they stay near the CPU.
ROWS_OF_LOGITS = 48
# Multiply-adds after which a compiled loop comes back, so that Ctrl-C is heard.
WORK_AT_ONCE = 1_000_000_000
# Numbers in a table of what each token adds to the first layer's gates, at most.
LARGEST_TABLE = 2**22


@dataclass(frozen=True)
class Constraints:
    """What hypotheses must not be. Other log-probabilities stay as they are; what is forbidden has -inf.

    Args:
        banned: tokens that never occur.
        allowed: a function ``(n, tokens)`` that is asked for each hypothesis at each step: which tokens may follow
            ``tokens``, an int64 array, in the hypothesis of input n. It returns them, in any order, or None for all.
        no_repeat_ngram: no n-gram of so many tokens occurs twice; 0 for no such limit (Paulus, Xiong and Socher 2018).

    Raises TypeError or ValueError for an argument of a wrong type or value.
    """

    banned: Iterable[int] = ()
    allowed: Callable[[int, Array], Iterable[int] | None] | None = None
    no_repeat_ngram: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "banned", token_array(self.banned, "banned"))
        if self.allowed is not None and not callable(self.allowed):
            raise TypeError(f"allowed: expected a function, got {describe(self.allowed)}")
        integer(self.no_repeat_ngram, "no_repeat_ngram", 0)

    @property
    def by_hypothesis(self) -> bool:
        return self.allowed is not None or self.no_repeat_ngram > 0

    def apply(self, n: int, tokens: Array, log_probs: Array) -> None:
        """Forbid what may not follow ``tokens`` in a hypothesis of input n. log_probs (V,) is written."""
        if self.allowed is not None and (follow := self.allowed(n, tokens.copy())) is not None:
            kept = token_array(follow, "allowed", len(log_probs))
            numbers = log_probs[kept]
            log_probs[:] = -np.inf
            log_probs[kept] = numbers
        size = self.no_repeat_ngram
        if size and len(tokens) >= size:
            windows = np.lib.stride_tricks.sliding_window_view(tokens, size)
            last = tokens[len(tokens) - size + 1 :]
            log_probs[windows[(windows[:, :-1] == last).all(1), -1]] = -np.inf


def token_array(tokens: Any, name: str, below: int = LARGEST_TOKEN) -> Array:
    """Any number of tokens, int64."""
    tokens = as_array(list(tokens) if isinstance(tokens, Iterable) and not hasattr(tokens, "dtype") else tokens, name)
    if tokens.ndim != 1:
        raise ValueError(f"{name}: expected a list of tokens, got shape {tokens.shape}")
    return as_indices(tokens, name, below) if tokens.size else np.empty(0, np.int64)


def map_arrays(function: Callable[[Array], Array], state: Any) -> Any:
    """A state of the same structure, with ``function`` of every array; None stays None."""
    if state is None:
        return None
    if isinstance(state, dict):
        return {key: map_arrays(function, part) for key, part in state.items()}
    if isinstance(state, (tuple, list)):
        parts = [map_arrays(function, part) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)
    return function(as_array(state, "state"))


def _check_rows(state: Any, rows: int | None) -> int | None:
    """The length of the first axis, which must be the same for all arrays; as given if there are no arrays."""

    def check(array: Array) -> Array:
        nonlocal rows
        if array.ndim == 0 or array.shape[0] != (array.shape[0] or None if rows is None else rows):
            length = "at least 1" if rows is None else rows
            raise ValueError(f"state: expected arrays whose first axis has length {length}, got shape {array.shape}")
        rows = array.shape[0]
        return array

    map_arrays(check, state)
    return rows


def _starts(bos: Any, inputs: int | None, below: int) -> Array:
    """The token before the first one, int64 (N,), of so many inputs or, if that is None, of as many as ``bos`` says."""
    if type(bos) is int and 0 <= bos < below:
        return np.full(inputs or 1, bos)
    bos = as_array(bos, "bos")
    if bos.ndim > 1:
        raise ValueError(f"bos: expected a token, or one for each input, got shape {bos.shape}")
    if inputs is not None and bos.ndim == 1 and len(bos) != inputs:
        raise ValueError(f"bos: expected {inputs} tokens, one for each input, got {len(bos)}")
    return as_indices(np.repeat(bos, inputs or 1) if bos.ndim == 0 else bos, "bos", below)


class FunctionSteps:
    """A model that is a function ``step(tokens, state)``, which Python calls for every token.

    Args:
        step, state, bos: the user's.
        width: hypotheses for each input.
        constraints: or None.

    ``inputs`` is their number, N; ``V`` the tokens, and ``dtype`` that of the log-probabilities.
    """

    normalise = False

    def __init__(self, step: Step, state: Any, bos: Any, width: int, constraints: Constraints | None):
        if not callable(step):
            raise TypeError(f"step: expected a function (tokens, state) or a LanguageModel, got {describe(step)}")
        self.step, self.constraints, self.width = step, constraints, width
        self.starts = _starts(bos, _check_rows(state, None), LARGEST_TOKEN)
        self.inputs = len(self.starts)
        self.rows, self.V = self.inputs * width, 0
        self.state = map_arrays(lambda array: np.repeat(array, width, 0), state)
        self.history = np.empty((self.rows, 0), np.int64)
        # The first call says what V and the dtype are.
        self._log_probs: Array | None = self._call(np.repeat(self.starts, width))
        self.V, self.dtype = self._log_probs.shape[1], self._log_probs.dtype

    def _call(self, tokens: Array) -> Array:
        result = self.step(tokens, self.state)
        if not isinstance(result, (tuple, list)) or len(result) != 2:
            raise TypeError(f"step: expected it to return (log_probs, state), got {describe(result)}")
        log_probs, self.state = as_array(result[0], "step"), result[1]
        if log_probs.dtype not in DTYPES or (self.V and log_probs.dtype != self.dtype):
            expected = self.dtype if self.V else "float32 or float64"
            raise TypeError(f"step: expected log-probabilities of dtype {expected}, got {log_probs.dtype}")
        shape = (self.rows, self.V or None)
        log_probs = as_kernel_array(log_probs, "step", log_probs.dtype, shape)
        _check_rows(self.state, self.rows)
        return log_probs

    def _follow(self, search: Any, t: int) -> Array:
        """The log-probabilities of what follows the tokens that were chosen at step t - 1."""
        K = search.log_probs.shape[1]
        order = (search.parents[:, t - 1] + np.arange(len(search.open))[:, None] * K).reshape(-1)
        if (order != np.arange(self.rows)).any():
            self.state = map_arrays(lambda array: array[order], self.state)
        tokens = search.tokens[:, t - 1].reshape(-1)
        if self.constraints is not None and self.constraints.by_hypothesis:
            self.history = np.column_stack([self.history[order], tokens])
        return self._call(tokens.copy())

    def run(self, search: Any, first: int, last: int) -> int:
        """Steps ``first`` to ``last``, or until all searches are closed; which one comes next."""
        for t in range(first, last):
            x = self._follow(search, t) if t or self._log_probs is None else self._log_probs
            self._log_probs = None
            if self.constraints is not None or search.temperature != 1 or t + 1 < search.min_length:
                x = x.copy()  # it is written to
            chosen_by = search
            if self.constraints is not None and self.constraints.by_hypothesis:
                if isinstance(search, kernels.Beam) and search.normalise:
                    # In a beam search the rest is as likely as if nothing had been forbidden.
                    kernels.to_log_probabilities(search, x)
                    chosen_by = search._replace(temperature=1.0, normalise=False)
                self._constrain(search, t, x)
            kernels.ADVANCE[type(search)](chosen_by, t, x)
            if search.open.max() != kernels.OPEN:
                return t + 1
        return last

    def _constrain(self, search: Any, t: int, x: Array) -> None:
        assert self.constraints is not None
        K = search.log_probs.shape[1]
        prefix = getattr(search, "prefix", np.empty((len(search.open), 0)))
        forced = prefix[:, t] >= 0 if t < prefix.shape[1] else np.zeros(len(prefix), bool)
        goes_on = (search.log_probs > -np.inf) & ((search.open == kernels.OPEN) & ~forced)[:, None]
        if t:
            goes_on &= search.tokens[:, t - 1] != search.eos
        for s, k in np.argwhere(goes_on):
            row = int(s * K + k)
            if not x[row].max() < np.inf:  # also where it is forbidden
                search.open[s] = kernels.NOT_A_NUMBER
                continue
            self.constraints.apply(row // self.width, self.history[row], x[row])


class Parts(NamedTuple):
    """A model that is made of these, time first, and nothing else: it can be decoded in compiled loops.

    An object whose attribute ``parts`` is one can stand for ``step`` wherever a function is decoded.
    """

    embedding: Embedding
    rnn: Recurrent
    output: Linear

    def step(self, tokens: Array, state: Any) -> tuple[Array, Any]:
        """One step as a function, with the batch first in the state's arrays: (B, num_layers, H)."""

        def swap(array: Array) -> Array:
            if array.ndim != 3:
                raise ValueError(f"state: expected arrays (B, num_layers, H), got shape {array.shape}")
            return np.ascontiguousarray(array.swapaxes(0, 1))

        y, after = self.rnn(self.embedding(tokens[None]), map_arrays(swap, state))
        log_probs = np.empty((len(tokens), self.output.out_features))
        kernels.log_softmax(self.output(y[0]), log_probs)
        return log_probs, map_arrays(swap, after)

    def check(self) -> None:
        """Raise ValueError unless each part takes what the one before it gives."""
        for name, size, dtype, expected in (
            ("embedding", self.embedding.embedding_dim, self.embedding.dtype, self.rnn.input_size),
            ("output", self.output.in_features, self.output.dtype, self.rnn.output_size),
        ):
            if size != expected or dtype != self.rnn.dtype:
                raise ValueError(
                    f"step: expected an {name} of {expected} features and dtype {self.rnn.dtype} beside {self.rnn}, "
                    f"got {size} and {dtype}"
                )
        if self.embedding.num_embeddings < self.output.out_features:
            raise ValueError(
                f"step: expected an embedding of {self.output.out_features} tokens, got {self.embedding.num_embeddings}"
            )

    @property
    def compiled(self) -> bool:
        """Whether the kernels have a loop for it."""
        rnn = self.rnn
        return rnn.steps_in_place and rnn.cell.P == rnn.cell.H and (kernels.Beam, rnn.kernels.step) in decode.DECODE


class ModelSteps:
    """A model whose steps run in compiled loops, each thread's for some of the inputs.

    As `FunctionSteps`; ``state`` is the recurrent layers', (num_layers, N, H), and ``max_length`` the most steps.
    """

    normalise = True

    def __init__(self, model: Parts, state: Any, bos: Any, width: int, max_length: int):
        rnn = model.rnn
        model.check()
        self.starts, self.states = _model_state(model, state, bos)
        self.model, self.inputs, self.width = model, len(self.starts), width
        self.V, self.dtype = model.output.out_features, rnn.dtype
        self.packed = rnn.packed
        self.output = model.output.parameters.derived("forward", model.output._pack_forward)
        self.embedding = model.embedding.parameters["weight"]
        self.table = _input_table(model, self.inputs * width * max_length)
        self.work = self.inputs * width * (self.packed.weights.size + self.output.size)
        # A call does many steps.
        parties = batching.parties_for(self.work * 8, self.inputs * width, rnn.hidden_size, self.dtype)
        self.parties = min(parties, self.inputs)
        self._parts: list[Any] = []

    def _part(self, search: Any, first: int, last: int) -> Any:
        """The arguments of the kernel for the inputs from ``first`` to ``last``."""
        model, rnn, K = self.model, self.model.rnn, search.log_probs.shape[1]
        rows, searches = (last - first) * self.width, len(search.open) // self.inputs
        if self.parties > 1:
            fields = {}
            for name, field in search._asdict().items():
                if name in kernels.WORKSPACE:
                    field = np.zeros_like(field)
                elif isinstance(field, np.ndarray) and name not in kernels.SHARED:
                    field = field[first * searches : last * searches]
                fields[name] = field
            search = type(search)(**fields)
        state = rnn.new_state(rows)
        for array, given in zip((state.h, state.s), self.states):
            array.reshape(len(array), last - first, self.width, -1)[...] = given[:, first:last, None]
        x = np.empty((rows, model.embedding.embedding_dim), self.dtype)
        logits = np.empty((min(rows, -(-ROWS_OF_LOGITS // K) * K), self.V), self.dtype)
        spare = np.empty((K, state.h.shape[2]), self.dtype)
        return search, state, (x, logits, spare)

    def run(self, search: Any, first: int, last: int) -> int:
        if not self._parts:
            cuts = [me * self.inputs // self.parties for me in range(self.parties + 1)]
            self._parts = [self._part(search, *cut) for cut in pairwise(cuts)]
        loop = decode.DECODE[type(search), self.model.rnn.kernels.step]
        reached = [first] * self.parties

        def call(me: int, parties: int, barrier: Array) -> None:
            for i in range(me, self.parties, parties):
                part, state, work = self._parts[i]
                model = self.packed, state, self.model.rnn.STATES, self.embedding, self.table, self.output
                reached[i] = loop(*model, part, first, last, *work, 1, batching.ALONE)
            if parties > 1:  # the others wait
                loop(*model, part, 0, 0, *work, parties, barrier)

        batching.together(self.parties, call)
        return max(reached)


def _input_table(model: Parts, tokens: int) -> Array:
    """What each token adds to the gates of the first layer, which is computed once; nothing if it is too large.

    tokens: how many will be looked up: if few, it would take longer to make it than to do without.
    """
    rnn, embedding = model.rnn, model.embedding
    row = rnn._work_of_a_row - rnn.cell.H
    # It depends on the parameters of both.
    kept: dict[str, tuple[Any, int, Array]] = rnn.parameters.derived("input table", dict)
    parameters = embedding.parameters
    source, version, table = kept.get("last", (None, -1, None))
    if table is None or source is not parameters or version != parameters.version or parameters.writing:
        if embedding.num_embeddings * row > LARGEST_TABLE or embedding.num_embeddings > 8 * tokens:
            return np.empty((0, row), rnn.dtype)
        version = parameters.version
        table = memory.empty(embedding.num_embeddings * row, rnn.dtype).reshape(-1, row)
        decode.input_table(rnn.packed, parameters["weight"], table)
        if not parameters.writing:
            kept["last"] = parameters, version, table
    return table


def _model_state(model: Parts, state: Any, bos: Any) -> tuple[Array, tuple[Array, ...]]:
    """The first tokens, and the state of a model's recurrent layers, zeros if it is None."""
    first = state[0] if isinstance(state, (tuple, list)) and state else state
    inputs = None
    if first is not None:
        shape = as_array(first, "state").shape
        if len(shape) != 3:
            raise ValueError(f"state: expected arrays (num_layers, N, H), got shape {shape}")
        inputs = shape[1]
    starts = _starts(bos, inputs, model.embedding.num_embeddings)
    return starts, model.rnn._state_arrays(state, "state", len(starts), True)


def steps_of(
    step: Any, state: Any, bos: Any, width: int, max_length: int, constraints: Any
) -> FunctionSteps | ModelSteps:
    """The model's steps, compiled if all of it is."""
    if constraints is not None and not isinstance(constraints, Constraints):
        raise TypeError(f"constraints: expected fastrnn.Constraints, got {describe(constraints)}")
    model = step if isinstance(step, Parts) else getattr(step, "parts", None)
    if isinstance(model, Parts):
        if model.compiled and not (constraints is not None and constraints.by_hypothesis):
            return ModelSteps(model, state, bos, width, max_length)
        starts, arrays = _model_state(model, state, bos)
        swapped = tuple([np.ascontiguousarray(array.swapaxes(0, 1)) for array in arrays])
        step, state, bos = model.step, swapped if len(swapped) > 1 else swapped[0], starts
    return FunctionSteps(step, state, bos, width, constraints)


def common(
    steps: FunctionSteps | ModelSteps,
    searches: int,
    max_length: int,
    eos: int | None,
    min_length: int,
    constraints: Constraints | None,
    temperature: float,
    normalise: bool,
) -> dict[str, Any]:
    """The fields that all searches have: of so many for each input, which have one hypothesis, the empty one."""
    S, T = steps.inputs * searches, max_length
    K = steps.width // searches
    eos = -1 if eos is None else integer(eos, "eos", 0)
    if eos >= steps.V:
        raise ValueError(f"eos: expected a token from 0 to {steps.V - 1}, got {eos}")
    banned = np.empty(0, np.int64)
    if constraints is not None:
        banned = token_array(constraints.banned, "banned", steps.V)
    log_probs = np.full((S, K), -np.inf)
    log_probs[:, 0] = 0
    return {
        "tokens": np.zeros((S, T, K), np.int64),
        "parents": np.zeros((S, T, K), np.int64),
        "log_probs": log_probs,
        "open": np.full(S, kernels.OPEN),
        "starts": steps.starts if searches == 1 else np.repeat(steps.starts, searches),
        "eos": eos,
        "min_length": integer(min_length, "min_length", 0),
        "banned": banned,
        "temperature": temperature,
        "normalise": normalise or steps.normalise or temperature != 1,
    }


def run(steps: FunctionSteps | ModelSteps, search: Any, noise: Callable[..., Any] | None = None) -> int:
    """Run all searches to their ends, drawing ``search.noise`` again and again; the number of steps."""
    T = search.tokens.shape[1]
    if noise is not None:
        period = search.noise.shape[1]
    else:
        period = max(1, WORK_AT_ONCE // steps.work) if isinstance(steps, ModelSteps) else T
    t, worst = 0, kernels.OPEN
    while t < T and worst == kernels.OPEN:
        if noise is not None:
            noise(out=search.noise)
        t = steps.run(search, t, min(t + period, T))
        worst = search.open.max()
    if worst == kernels.NOT_A_NUMBER:
        raise FloatingPointError("step: expected log-probabilities, got NaN or infinity")
    if worst == kernels.NOT_A_LOG_PROBABILITY:
        raise ValueError("step: expected log-probabilities, which are at most 0, got greater numbers")
    return t


def traced(search: Any, places: Array, eos: int) -> tuple[Array, Array]:
    """The tokens of sequences that end at ``places`` (S, R, 3), (S, R, L), padded with eos, or 0; and their lengths."""
    lengths = places[..., 0].copy()
    tokens = np.full((*lengths.shape, lengths.max()), max(eos, 0))
    kernels.trace(search.tokens, search.parents, places, tokens)
    return tokens, lengths
