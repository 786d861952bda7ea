"""A layer's computational graph over the steps: as data, as DOT, as a picture; `diagnostics` offers it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .checks import describe, positive
from .recurrent import Recurrent

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Node(NamedTuple):
    """A value in the unrolled graph.

    ``kind`` is "x", "h", "y", "loss" or "total"; ``layer`` is "l0", "l0_reverse", ... for a state, else "". ``step``
    counts from 1 to T; a state before the first step has 0, or T + 1 in the reverse direction; the total has T + 1.
    """

    kind: str
    layer: str
    step: int

    @property
    def name(self) -> str:
        if self.kind == "total":
            return "L"
        kind = "L" if self.kind == "loss" else self.kind
        return f"{kind}_{self.step}" if not self.layer else f"{kind}_{self.layer}_{self.step}"


class Edge(NamedTuple):
    """``source`` enters ``target`` through ``weight``, a parameter's name, or "" if as it is.

    Through one that is ``cut`` the value still goes forward, but no gradient comes back.
    """

    source: Node
    target: Node
    weight: str
    cut: bool


class Unrolled:
    """A layer's computation over T steps as a directed graph; `unrolled` makes it.

    Attributes:
        nodes, edges: tuples of `Node` and `Edge`, in an order in which they may be computed.
        inside: by parameter that no edge carries (biases, projections, peepholes), the name of the layer whose
            states it makes.
        T, window: as given.
    """

    def __init__(
        self, nodes: Sequence[Node], edges: Sequence[Edge], inside: Mapping[str, str], T: int, window: int | None
    ):
        self.nodes, self.edges, self.inside = tuple(nodes), tuple(edges), dict(inside)
        self.T, self.window = T, window

    def __repr__(self) -> str:
        return f"Unrolled({len(self.nodes)} nodes, {len(self.edges)} edges, T={self.T}, window={self.window})"

    def paths(self, weight: str) -> int:
        """Along how many paths the loss's gradient flows to the uses of a parameter, given by its name.

        Each path is one product of Jacobians in the gradient written out as a sum. One for a use of the parameter,
        at each step, and each way from there to the total loss past no cut edge.

        Raises KeyError for a name that the layer does not have.
        """
        if weight in self.inside:
            uses = [node for node in self.nodes if node.layer == self.inside[weight] and 0 < node.step <= self.T]
        else:
            uses = [edge.target for edge in self.edges if edge.weight == weight]
        if not uses or not weight:
            known = {edge.weight: "" for edge in self.edges if edge.weight} | self.inside
            raise KeyError(f"weight: expected one of {', '.join(known)}, got {describe(weight)}")
        ways = self._ways()
        return sum(ways[node] for node in uses)

    def _ways(self) -> dict[Node, int]:
        """How many ways lead from each node to the total: the sum of those of the nodes that it enters."""
        targets: dict[Node, list[Node]] = {node: [] for node in self.nodes}
        for edge in self.edges:
            if not edge.cut:
                targets[edge.source].append(edge.target)
        ways: dict[Node, int] = {}
        for node in reversed(self.nodes):  # what a node enters comes after it
            ways[node] = 1 if node.kind == "total" else sum(ways[target] for target in targets[node])
        return ways

    def dot(self) -> str:
        """The graph in Graphviz's language; ``dot -Tsvg`` draws it. Cut edges are dashed."""
        lines = ["digraph unrolled {", "  rankdir=BT;", "  node [shape=circle];"]
        rows: dict[tuple[str, str], list[str]] = {}
        for node in self.nodes:
            rows.setdefault(node[:2], []).append(f'"{node.name}";')
        lines += [f"  {{ rank=same; {' '.join(names)} }}" for names in rows.values()]
        for edge in self.edges:
            attributes = [f'label="{edge.weight}"'] if edge.weight else []
            attributes += ["style=dashed", "color=red"] if edge.cut else []
            given = f" [{', '.join(attributes)}]" if attributes else ""
            lines.append(f'  "{edge.source.name}" -> "{edge.target.name}"{given};')
        return "\n".join([*lines, "}", ""])

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the graph, time to the right and depth upwards, and return the axes; cut edges are dotted.

        ``ax`` is as for `plot_gradient_flow`. Legible up to some ten steps.

        Raises TypeError for a wrong argument; ImportError without matplotlib.
        """
        states = list(dict.fromkeys(node.layer for node in self.nodes if node.layer))
        rows = {("x", ""): 0}
        for row in (*(("h", layer) for layer in states), ("y", ""), ("loss", ""), ("total", "")):
            rows[row] = len(rows)
        ax = axes(ax, 1.4 * (self.T + 4), 1.1 * len(rows) + 0.5)

        def place(node: Node) -> tuple[float, float]:
            # The reverse direction stands aside, so that what passes it by does not pass through it.
            x = (self.T + 1) / 2 if node.kind == "total" else node.step + 0.3 * node.layer.endswith("reverse")
            return x, 1.2 * rows[node[:2]]

        colours = {"": "0.75"}
        for edge in self.edges:
            colour = colours.setdefault(edge.weight, f"C{(len(colours) - 1) % 10}")
            style = {"arrowstyle": "->", "color": colour, "linestyle": ":" if edge.cut else "-", "shrinkA": 13}
            ax.annotate("", place(edge.target), place(edge.source), arrowprops={**style, "shrinkB": 13})
        for node in self.nodes:
            circle = {"boxstyle": "circle,pad=0.25", "facecolor": "white", "edgecolor": "0.3"}
            subscript = "" if node.kind == "total" else f"_{{{node.step}}}"
            letter = "L" if node.kind in ("loss", "total") else node.kind
            ax.text(*place(node), f"${letter}{subscript}$", ha="center", va="center", bbox=circle, fontsize=9)
        for weight, colour in colours.items():
            if weight:
                ax.plot([], [], color=colour, label=weight)
        if any(edge.cut for edge in self.edges):
            ax.plot([], [], color="0.3", linestyle=":", label="cut: no gradient")
        ax.set_xlim(-0.5, self.T + 1.8)
        ax.set_ylim(-0.6, 1.2 * (len(rows) - 1) + 0.6)
        ax.set_axis_off()
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
        return ax


def unrolled(layer: Recurrent, T: int, window: int | None = None) -> Unrolled:
    """A layer's computation over T steps, from the inputs x_t to the loss L = (L_1 + ... + L_T) / T, as a graph.

    Args:
        layer: an RNN, LSTM or GRU; only its shape counts. A node "h" is all of its state, for the LSTM h and c.
        T: steps.
        window: steps of truncated backpropagation's windows: the states' edges from a window to another are cut
            (Williams and Peng 1990). None: one window.

    **What backpropagation through time saves.** W = weight_hh_l0 of one layer is used at every step s, and reaches
    every loss L_t with t >= s. Written out,

        dL/dW = sum over t, s <= t of  dL/dL_t  dL_t/dh_t  (dh_t/dh_{t-1} ... dh_{s+1}/dh_s)  dh_s/dW,

    which has 1 + 2 + ... + T = T (T + 1) / 2 terms, the number of `Unrolled.paths`: evaluated term by term, even with
    every product continued from the one before, it takes O(T^2) steps backward. But all that flows through h_s has
    the factor dh_s/dW in common, and the sum of what it multiplies obeys

        d_s = dL/dL_s  dL_s/dh_s + d_{s+1} dh_{s+1}/dh_s,        dL/dW = sum over s of d_s dh_s/dW,

    which visits each edge once: O(T) (Werbos 1990). In a stack the paths grow even faster, with one power of T more
    for every layer; the edges do not. Windows of w steps leave w (w + 1) / 2 paths each.

    Raises TypeError or ValueError for an argument of a wrong type or value.

    >>> import fastrnn
    >>> from fastrnn.diagnostics import unrolled
    >>> lstm = fastrnn.LSTM(3, 4)
    >>> unrolled(lstm, 100).paths("weight_hh_l0"), len(unrolled(lstm, 100).edges)
    (5050, 500)
    >>> unrolled(lstm, 100, window=10).paths("weight_hh_l0")
    550
    >>> unrolled(fastrnn.LSTM(3, 4, num_layers=2), 100).paths("weight_hh_l0")
    171700
    """
    if not isinstance(layer, Recurrent):
        raise TypeError(f"layer: expected an RNN, LSTM or GRU, got {describe(layer)}")
    T = positive(T, "T")
    window = None if window is None else positive(window, "window")
    steps = range(1, T + 1)
    nodes = [Node("x", "", t) for t in steps]
    edges = []
    below = [""]  # the layers whose nodes of a step are the next layer's input; "" stands for x
    for k in range(layer.num_layers):
        names = [f"l{k}{suffix}" for suffix in directions(layer)]
        for name in names:
            order, back = (steps, 1) if not name.endswith("_reverse") else (steps[::-1], -1)
            nodes += [Node("h", name, t) for t in (order[0] - back, *order)]
            for t in order:
                h, before = Node("h", name, t), t - back
                edges += [Edge(Node("h" if b else "x", b, t), h, f"weight_ih_{name}", False) for b in below]
                cut = window is not None and 0 < before <= T and (t - 1) // window != (before - 1) // window
                edges.append(Edge(Node("h", name, before), h, f"weight_hh_{name}", cut))
        below = names
    nodes += [Node(kind, "", t) for kind in ("y", "loss") for t in steps] + [Node("total", "", T + 1)]
    for t in steps:
        y, loss = Node("y", "", t), Node("loss", "", t)
        edges += [Edge(Node("h", b, t), y, "", False) for b in below]
        edges += [Edge(y, loss, "", False), Edge(loss, nodes[-1], "", False)]
    carried = {edge.weight for edge in edges}
    inside = {name: name[name.rindex("_l") + 1 :] for name in layer.parameters if name not in carried}
    return Unrolled(nodes, edges, inside, T, window)


def directions(layer: Recurrent) -> tuple[str, ...]:
    """The suffixes of a layer's directions."""
    return ("", "_reverse") if layer.bidirectional else ("",)


def axes(ax: Any, width: float, height: float) -> Any:
    """``ax``, checked, or the axes of a new figure."""
    try:
        from matplotlib.axes import Axes
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("matplotlib: needed for pictures, and not installed: pip install fastrnn[plot]") from error
    if ax is None:
        return Figure(figsize=(width, height), layout="constrained").subplots()
    if not isinstance(ax, Axes):
        raise TypeError(f"ax: expected matplotlib's Axes, got {describe(ax)}")
    return ax
