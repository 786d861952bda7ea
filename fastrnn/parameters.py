"""Parameters: named arrays that know when they change, state dicts, and files.

A parameter is a read-only array. It changes by ``module.name = array``, by ``module.parameters[name] = array`` or
inside ``with module.parameters.writable() as arrays:``; each moves `Parameters.version`, and what the kernels read, a
packed copy, is made anew. Writing to it from outside raises, where it would otherwise be silently ignored.
"""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from .checks import DTYPES, as_array, describe

if TYPE_CHECKING:
    from typing_extensions import Self

Array = NDArray[Any]
T = TypeVar("T")


def read_only(array: Array) -> Array:
    """A view that is of one Numba type, whether parameters are being written to or not."""
    array = array.view()
    array.flags.writeable = False
    return array


class Parameters(MutableMapping[str, Array]):
    """Named arrays with a version. Read-only from outside; see the module's text for how they change."""

    def __init__(self, arrays: Mapping[str, Array]):
        self._versions = itertools.count(1)
        self.version = 0
        # One for each ``writable`` block that is open, of whatever thread.
        self._writers: list[None] = []
        self._memory = {name: np.array(array, order="C") for name, array in arrays.items()}
        self._arrays = {name: read_only(array) for name, array in self._memory.items()}
        self._derived: dict[Any, tuple[int, Any]] = {}

    @property
    def writing(self) -> bool:
        """Whether a ``writable`` block is open."""
        return bool(self._writers)

    def __getitem__(self, name: str) -> Array:
        return self._arrays[name]

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in self._arrays:
            raise KeyError(f"{name}: no such parameter; there are {', '.join(self._arrays)}")
        mine = self._arrays[name]
        array = as_array(value, name)
        if array.shape != mine.shape:
            raise ValueError(f"{name}: expected shape {mine.shape}, got {array.shape}")
        if array.dtype not in DTYPES:
            raise TypeError(f"{name}: expected dtype {mine.dtype}, got {array.dtype}")
        if self.writing:  # to the memory that is there
            self._memory[name][...] = array
        else:
            self._memory[name] = np.array(array, mine.dtype, order="C")
            self._arrays[name] = read_only(self._memory[name])
        self.version = next(self._versions)

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"{name}: a parameter cannot be deleted")

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __repr__(self) -> str:
        return f"Parameters({', '.join(f'{name} {array.shape}' for name, array in self._arrays.items())})"

    @contextmanager
    def writable(self) -> Iterator[dict[str, Array]]:
        """The parameters as arrays that may be written to, until the ``with`` block ends.

        >>> import fastrnn
        >>> lstm = fastrnn.LSTM(3, 2)
        >>> with lstm.parameters.writable() as arrays:
        ...     arrays["bias_hh_l0"][2:4] = 1  # the forget gate's
        >>> lstm.bias_hh_l0[2:4]
        array([1., 1.], dtype=float32)
        """
        arrays = {name: array.view() for name, array in self._memory.items()}
        self._writers.append(None)
        try:
            yield arrays
        finally:
            for array in arrays.values():
                array.flags.writeable = False
            self._writers.pop()
            self.version = next(self._versions)

    def derived(self, key: Any, make: Callable[[], T]) -> T:
        """What ``make()`` derives from the parameters, made again only when they have changed."""
        if self.writing:  # what is made now may be out of date at the next call
            return make()
        version = self.version
        kept = self._derived.get(key)
        if kept is None or kept[0] != version:
            kept = self._derived[key] = version, make()
        return kept[1]

    def __getstate__(self) -> dict[str, Any]:
        return {"arrays": self._arrays}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["arrays"])  # type: ignore[misc]


class JoinedParameters(MutableMapping[str, Array]):
    """The parameters of several modules under dotted names, as one mapping."""

    def __init__(self, modules: Mapping[str, "Module"]):
        self._modules = dict(modules)

    @property
    def version(self) -> int:
        return sum(module.parameters.version for module in self._modules.values())

    def _find(self, name: str) -> tuple["Parameters | JoinedParameters", str]:
        prefix, _, rest = name.partition(".")
        if prefix not in self._modules:
            raise KeyError(f"{name}: no such parameter; there are {', '.join(self)}")
        return self._modules[prefix].parameters, rest

    def __getitem__(self, name: str) -> Array:
        parameters, rest = self._find(name)
        return parameters[rest]

    def __setitem__(self, name: str, value: Any) -> None:
        parameters, rest = self._find(name)
        parameters[rest] = value

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"{name}: a parameter cannot be deleted")

    def __iter__(self) -> Iterator[str]:
        return (f"{prefix}.{name}" for prefix, module in self._modules.items() for name in module.parameters)

    def __len__(self) -> int:
        return sum(len(module.parameters) for module in self._modules.values())

    @contextmanager
    def writable(self) -> Iterator[dict[str, Array]]:
        """As `Parameters.writable`, for all the modules."""
        with ExitStack() as stack:
            arrays = {}
            for prefix, module in self._modules.items():
                for name, array in stack.enter_context(module.parameters.writable()).items():
                    arrays[f"{prefix}.{name}"] = array
            yield arrays


class Module:
    """What layers and models share: parameters as attributes, state dicts, files.

    ``parameters`` are the module's own or, of a module made of modules, theirs under dotted names; ``config`` holds
    the arguments that make such a module anew.
    """

    parameters: Parameters | JoinedParameters
    config: dict[str, Any]

    def __getattr__(self, name: str) -> Array:
        parameters = self.__dict__.get("parameters", {})
        if name in parameters:
            return parameters[name]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("parameters", {}):
            self.parameters[name] = value
        else:
            super().__setattr__(name, value)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.config.items())})"

    def state_dict(self) -> dict[str, Array]:
        """A copy of every parameter, by name."""
        return {name: array.copy() for name, array in self.parameters.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """Take parameters from a state dict of arrays, or of PyTorch's tensors; nothing changes if any does not fit.

        Raises KeyError for names that are missing or not known, unless ``strict`` is False, and ValueError or
        TypeError for a wrong shape or dtype.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict: expected a mapping, got {describe(state_dict)}")
        missing = [name for name in self.parameters if name not in state_dict]
        unknown = [name for name in state_dict if name not in self.parameters]
        if strict and (missing or unknown):
            raise KeyError(f"state_dict: missing {missing}, not known {unknown}")
        arrays = {}
        for name in self.parameters:
            if name in state_dict:
                array, mine = as_array(state_dict[name], name), self.parameters[name]
                if array.shape != mine.shape:
                    raise ValueError(f"{name}: expected shape {mine.shape}, got {array.shape}")
                if array.dtype not in DTYPES:
                    raise TypeError(f"{name}: expected dtype {mine.dtype}, got {array.dtype}")
                arrays[name] = array
        for name, array in arrays.items():
            self.parameters[name] = array

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the parameters to a safetensors file, which PyTorch's safetensors reads too.

        An existing file is replaced only once the new one is whole.
        """
        # A function is saved by its name only.
        config = json.dumps({"class": type(self).__name__, **self.config}, default=str)
        write_file(path, self.parameters, {"fastrnn": config})

    def load(self, path: str | os.PathLike[str]) -> "Self":
        """Take the parameters from a safetensors file and return the module.

        Raises FileNotFoundError, or ValueError for a file that is no whole safetensors file.
        """
        self.load_state_dict(read_file(path)[0])
        return self


def write_file(path: str | os.PathLike[str], arrays: Mapping[str, Array], metadata: dict[str, str]) -> None:
    """Write a safetensors file, as `replace_file` does."""
    replace_file(path, to_bytes({name: np.asarray(array, order="C") for name, array in arrays.items()}, metadata))


def replace_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file beside ``path`` and move it there: whoever reads finds the old one or the new one.

    What is no file, such as a pipe, is written to as it is.
    """
    path = Path(os.path.realpath(path))
    exists = path.exists()
    if exists and not path.is_file():
        path.write_bytes(content)
        return
    if exists:
        with open(path, "r+b"):  # says why, if it must not be written
            pass
    # Always the same name: what a killed process leaves behind, the next one writes over.
    name = os.fsencode(path.name)
    partial = path.with_name(f".{path.name if len(name) < 240 else hashlib.sha256(name).hexdigest()}.partial")
    try:
        with open(partial, "wb") as file:
            if exists:
                shutil.copymode(path, partial)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read_file(path: str | os.PathLike[str]) -> tuple[dict[str, Array], dict[str, str]]:
    """The arrays and the metadata of a safetensors file."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"path: expected a safetensors file, found none at {os.fspath(path)!r}")
    with open(path, "rb"):  # says why, if it cannot be read
        pass
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, TypeError, AttributeError) as error:  # the latter of numbers that NumPy does not have
        raise ValueError(f"path: expected a whole safetensors file, got {os.fspath(path)!r}: {error}") from error
