"""Files of Keras 3 as they are: descriptions of layers and arrays, by their paths. Read without Keras.

A ``.keras`` file is a zip archive of ``config.json``, which describes the model, and ``model.weights.h5``. That is the
same HDF5 as a ``.weights.h5`` file: groups for the layers, in each a group ``vars`` of arrays, numbered, which has the
layer's name as an attribute.
"""

import importlib
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any
from zipfile import BadZipFile, ZipFile, is_zipfile

from ..checks import as_array
from ..parameters import Array

# A layer as Keras describes it.
Node = dict[str, Any]
# Its kernel, recurrent kernel and, unless there is none, bias.
Weights = list[Array]


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Node], dict[str, list[Weights]], dict[str, str]]:
    """By their paths in a file: descriptions of layers, the weights of their directions, and names."""
    h5py = imported("h5py")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"path: expected a .keras or .weights.h5 file, found none at {os.fspath(path)!r}")
    try:
        nodes: dict[str, Node] = {}
        source: Any = os.fspath(path)
        if is_zipfile(path):
            with ZipFile(path) as archive:
                nodes = dict(_nodes(json.loads(archive.read("config.json"))))
                source = io.BytesIO(archive.read("model.weights.h5"))
        with h5py.File(source, "r") as file:
            if "layer_names" in file.attrs or "model_weights" in file:
                raise ValueError("this is HDF5 as before Keras 3, which Keras writes anew by model.save('new.keras')")
            groups, names = _groups(file, h5py)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, BadZipFile, zlib.error) as error:
        raise ValueError(
            f"path: expected a whole .keras or .weights.h5 file of Keras 3, got {os.fspath(path)!r}: {error}"
        ) from error
    return nodes, groups, names


def _nodes(node: Node, path: str = "") -> Iterator[tuple[str, Node]]:
    """The descriptions of all layers of a model, and the paths where the file has their weights.

    Layers are numbered by the names of their classes, not by their own.
    """
    config = node.get("config")
    if not isinstance(config, dict):
        return
    if path:
        yield path, node
    prefix = f"{path}/" if path else ""
    layers = config.get("layers")
    seen: Counter[str] = Counter()
    for layer in layers if isinstance(layers, list) else []:
        name = re.sub(r"\W+", "", layer["class_name"])
        name = re.sub("([a-z])([A-Z])", r"\1_\2", re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)).lower()
        number = f"_{seen[name]}" if seen[name] else ""
        seen[name] += 1
        yield from _nodes(layer, f"{prefix}layers/{name}{number}")
    if isinstance(config.get("layer"), dict):
        yield from _nodes(config["layer"], f"{prefix}layer")


def _groups(file: Any, h5py: Any) -> tuple[dict[str, list[Weights]], dict[str, str]]:
    """The weights of all layers that could be recurrent ones, of one direction or two, and their names, by path."""
    names: dict[str, str] = {}
    cells: dict[str, Weights] = {}

    def visit(path: str, item: Any) -> None:
        if not isinstance(item, h5py.Group) or not path.endswith("/vars"):
            return
        place = path.removesuffix("/vars")
        if "name" in item.attrs:
            names[place] = str(item.attrs["name"])
        if place.endswith("/cell") and _is_cell(item):
            cells[place.removesuffix("/cell")] = [as_array(item[str(i)][()], path) for i in range(len(item))]

    file.visititems(visit)
    groups: dict[str, list[Weights]] = {}
    for place, arrays in cells.items():
        parent, _, last = place.rpartition("/")
        sides = [cells.get(f"{parent}/{side}_layer") for side in ("forward", "backward")]
        if parent and last in ("forward_layer", "backward_layer") and all(sides):
            groups[parent] = [side for side in sides if side is not None]
        else:
            groups[place] = [arrays]
    # Early versions write no names.
    return groups, {place: names.get(place, place.rsplit("/", 1)[-1]) for place in groups}


def _is_cell(group: Any) -> bool:
    """Whether a group's arrays are a recurrent cell's: kernel, recurrent kernel, and a bias or none."""
    if len(group) not in (2, 3) or not all(str(i) in group for i in range(len(group))):
        return False
    kernel, recurrent, *bias = [group[str(i)].shape for i in range(len(group))]
    if len(kernel) != 2 or len(recurrent) != 2 or kernel[1] != recurrent[1]:
        return False
    units, gates = recurrent
    return gates in (units, 3 * units, 4 * units) and (not bias or bias[0] in ((gates,), (2, gates)))


def imported(name: str) -> Any:
    """A module that is imported only when it is needed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{name}: expected it to be installed, by pip install fastrnn[keras], and for Keras the backend that the "
            f"environment variable KERAS_BACKEND names: {error}"
        ) from error
