"""Streaming: a layer that is fed one step at a time, and remembers its state."""

from typing import Any

import numpy as np

from .checks import as_checked, positive
from .parameters import Array
from .recurrent import Recurrent


class Stream:
    """A layer's state for a batch of endless sequences; made by `Recurrent.stream`.

    State and workspace are made once, and a step allocates nothing. (A layer with zoneout or ``layer_norm`` takes a
    slower way.) A change of the layer's parameters is seen at the next step. One stream is for one thread at a time.

    >>> import numpy as np
    >>> import fastrnn
    >>> gru = fastrnn.GRU(3, 5, num_layers=2, seed=0)
    >>> stream = gru.stream(batch_size=2)
    >>> x = np.ones((10, 2, 3), np.float32)
    >>> for x_t in x:
    ...     y_t = stream.step(x_t)
    >>> y, h_n = gru(x)
    >>> bool((y_t == y[-1]).all() and (stream.state == h_n).all())
    True
    """

    def __init__(self, layer: Recurrent, batch_size: int = 1):
        if layer.bidirectional:
            raise ValueError("stream: expected a layer of one direction: the other one begins at the sequence's end")
        self.layer, self.batch_size = layer, positive(batch_size, "batch_size")
        self._shape = self.batch_size, layer.input_size
        self._x = np.zeros(self._shape, layer.dtype)
        self._state = layer.new_state(self.batch_size)
        self._arrays = (self._state.h, self._state.s)[: layer.STATES]
        self._y = self._state.h[-1]
        self._y.flags.writeable = False
        self._in_place = layer.steps_in_place
        self._packed: Any = None
        self._version = -1

    def step(self, x: Array) -> Array:
        """Take one step of every sequence.

        Args:
            x: (batch_size, I).

        Returns the last layer's outputs, (batch_size, P): the stream's own memory, which the next step changes.

        Raises TypeError or ValueError for an array of a wrong dtype or shape.
        """
        layer = self.layer
        if type(x) is not np.ndarray or x.dtype != layer.dtype or x.shape != self._shape:
            x = as_checked(x, "x", layer.dtype, self._shape)
        if not x.flags.carray:
            self._x[...] = x
            x = self._x
        if self._in_place:
            parameters = layer.parameters
            if self._version != parameters.version or parameters.writing:
                self._version, self._packed = parameters.version, layer.packed
            layer.kernels.step_of_arrays(*self._packed, *self._state, x)
        else:
            _, self.state = layer(x[:, None] if layer.batch_first else x[None], self.state)
        return self._y

    def __getstate__(self) -> dict[str, Any]:
        # Of the rest, some is true in this process only, and some is one memory under two names.
        return {"layer": self.layer, "batch_size": self.batch_size, "state": self.state}

    def __setstate__(self, kept: dict[str, Any]) -> None:
        self.__init__(kept["layer"], kept["batch_size"])  # type: ignore[misc]
        self.state = kept["state"]

    def reset(self) -> None:
        """Begin anew, from zeros."""
        for array in self._arrays:
            array[...] = 0

    @property
    def state(self) -> Any:
        """The state, as the layer takes and returns it: a copy. It can be set."""
        state = tuple(array.copy() for array in self._arrays)
        return state if len(state) > 1 else state[0]

    @state.setter
    def state(self, state: Any) -> None:
        for array, given in zip(self._arrays, self.layer._state_arrays(state, "state", self.batch_size, True)):
            array[...] = given
