"""Jacobians against differences through the layers, power iteration against decompositions, graphs by counting."""

import itertools
import re
import sys

import numpy as np
import pytest
from oracle import softsign, softsign_slope

import fastrnn
from fastrnn import diagnostics
from fastrnn.diagnostics import GradientFlow, Node, example_flows, gradient_flow, plot_gradient_flow, unrolled

LAYERS = [
    ("RNN", {}),
    ("RNN", {"nonlinearity": "relu", "num_layers": 2}),
    ("RNN", {"nonlinearity": (softsign, softsign_slope)}),
    ("LSTM", {}),
    ("LSTM", {"num_layers": 2, "bias": False}),
    ("LSTM", {"num_layers": 2, "bidirectional": True, "proj_size": 2}),
    ("LSTM", {"peephole": True, "coupled": True, "zoneout": (0.3, 0.6), "recurrent_dropout": 0.5}),
    ("LSTM", {"cell_clip": 1.0}),
    ("LSTM", {"layer_norm": True}),
    ("GRU", {"num_layers": 2, "bidirectional": True, "dropout": 0.5}),
    ("GRU", {"reset_after": False, "zoneout": 0.2}),
]


def make(name, options, I=3, H=4, seed=0):
    layer = getattr(fastrnn, name)(I, H, dtype=np.float64, seed=seed, **options)
    with layer.parameters.writable() as arrays:
        for array in arrays.values():
            array *= 2  # so that the nonlinearities matter
    return layer


def single(layer, k, suffix):
    """Layer k in one direction as a layer of its own, zoneout and all."""
    tail = f"_l{k}{suffix}"
    parameters = {name[: -len(tail)] + "_l0": a for name, a in layer.parameters.items() if name.endswith(tail)}
    config = {**layer.config, "num_layers": 1, "input_size": parameters["weight_ih_l0"].shape[1], "dropout": 0.0}
    if suffix or layer.config.get("bidirectional"):
        config["bidirectional"] = False
    one = type(layer)(**config)
    one.load_state_dict(parameters)
    return one


def flat(state):
    return np.concatenate([s.ravel() for s in (state if isinstance(state, tuple) else (state,))])


def like(vector, state):
    parts = state if isinstance(state, tuple) else (state,)
    cuts = np.cumsum([s.size for s in parts])[:-1]
    arrays = tuple(v.reshape(s.shape) for v, s in zip(np.split(vector, cuts), parts))
    return arrays if isinstance(state, tuple) else arrays[0]


def slopes(one, x, state):
    """The Jacobian of the last state by ``state``, by central differences through all steps of one sequence x."""
    if len(x) == 0:
        return np.eye(flat(state).size)
    columns = []
    for unit in 1e-5 * np.eye(flat(state).size):
        ends = [flat(one(x, like(flat(state) + sign * unit, state))[1]) for sign in (1, -1)]
        columns.append((ends[0] - ends[1]) / 2e-5)
    return np.stack(columns, axis=1)


def expected(layer, x, state, size=None):
    """Norms, (2, layers, T + 1), for one sequence x with the states of all layers."""
    result, place = [], 0
    for k in range(layer.num_layers):
        outputs = []
        for suffix in ("", "_reverse") if layer.config.get("bidirectional") else ("",):
            one, inputs = single(layer, k, suffix), x[::-1].copy() if suffix else x
            s = like(flat(state), state)
            s = tuple(a[place : place + 1] for a in s) if isinstance(s, tuple) else s[place : place + 1]
            y = one(inputs, s)[0]
            norms = []
            for t in range(len(x) + 1):
                J = slopes(one, inputs[t:], one(inputs[:t], s)[1] if t else s)[:size, :size]
                norms.insert(0, (np.linalg.norm(J, 2), np.linalg.norm(J)))
            result.append(np.transpose(norms))
            outputs.append(y[::-1] if suffix else y)
            place += 1
        x = np.concatenate(outputs, axis=1)
    return np.stack(result, axis=1)


def state_of(layer, x, rng):
    """Any state that fits x."""
    state = layer(x)[1]
    return like(rng.standard_normal(flat(state).size), state)


@pytest.mark.parametrize(("name", "options"), LAYERS)
@pytest.mark.parametrize("of", ["state", "h"])
def test_norms_are_those_of_slopes(name, options, of, rng):
    layer = make(name, options)
    x = rng.standard_normal((6, 3))
    state = state_of(layer, x, rng)
    size = layer(x)[0].shape[-1] // (2 if options.get("bidirectional") else 1) if of == "h" else None
    flow = gradient_flow(layer, x, state, of=of)
    assert (flow.lags == np.arange(7)).all()
    largest, frobenius = expected(layer, x, state, size)
    np.testing.assert_allclose(flow.largest, largest, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(flow.frobenius, frobenius, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("name", "options"), LAYERS)
@pytest.mark.parametrize("of", ["state", "h"])
def test_power_iteration_agrees_with_decomposition(name, options, of, rng):
    layer = make(name, options, H=12)
    x = rng.standard_normal((9, 3, 3))
    exact = gradient_flow(layer, x, of=of, exact=True)
    near = gradient_flow(layer, x, of=of, exact=False, iterations=100)
    assert (near.largest <= exact.largest * (1 + 1e-9)).all()
    np.testing.assert_allclose(near.largest, exact.largest, rtol=5e-3)
    # So few rows are all taken: the random directions are a basis.
    np.testing.assert_allclose(near.frobenius, exact.frobenius, rtol=1e-9)


def test_few_iterations_and_few_directions_are_near(rng, monkeypatch):
    layer = make("LSTM", {}, H=60)
    x = rng.standard_normal((12, 7, 3))
    exact = gradient_flow(layer, x, exact=True)
    monkeypatch.setattr(diagnostics, "EXACT_STATE", 119)
    near = gradient_flow(layer, x)
    assert not (near.frobenius == exact.frobenius).all()
    np.testing.assert_allclose(near.largest, exact.largest, rtol=0.1)
    np.testing.assert_allclose(near.frobenius, exact.frobenius, rtol=0.3)
    again, other = gradient_flow(layer, x), gradient_flow(layer, x, seed=1)
    assert (again.largest == near.largest).all()
    assert (other.frobenius[:, 1:] != near.frobenius[:, 1:]).all()
    monkeypatch.setattr(diagnostics, "ROWS", 64)  # sequence by sequence
    np.testing.assert_allclose(gradient_flow(layer, x, exact=True).largest, exact.largest, rtol=1e-9)
    np.testing.assert_allclose(gradient_flow(layer, x).largest, exact.largest, rtol=0.1)


@pytest.mark.parametrize("exact", [True, False])
def test_batch_is_its_median(exact, rng):
    layer = make("LSTM", {"num_layers": 2})
    x = rng.standard_normal((5, 3, 3))
    h, c = state_of(layer, x, rng)
    flow = gradient_flow(layer, x, (h, c), exact=exact, iterations=200)
    alone = [gradient_flow(layer, x[:, b], (h[:, b], c[:, b]), exact=True) for b in range(3)]
    tolerance = 1e-9 if exact else 5e-3
    np.testing.assert_allclose(flow.largest, np.median([a.largest for a in alone], axis=0), rtol=tolerance)
    np.testing.assert_allclose(flow.frobenius, np.median([a.frobenius for a in alone], axis=0), rtol=1e-9)


def test_batch_first_and_single_precision(rng):
    layer = make("LSTM", {"num_layers": 2})
    x = rng.standard_normal((5, 2, 3))
    flow = gradient_flow(layer, x)
    other = fastrnn.LSTM(3, 4, num_layers=2, batch_first=True)
    other.load_state_dict(layer.state_dict())
    before = other.state_dict()
    theirs = gradient_flow(other, np.float32(x.swapaxes(0, 1)))
    np.testing.assert_allclose(theirs.largest, flow.largest, rtol=1e-5)
    assert all((before[name] == array).all() for name, array in other.parameters.items())


@pytest.mark.parametrize("exact", [True, False])
def test_one_step(exact, rng):
    layer = make("LSTM", {})
    flow = gradient_flow(layer, rng.standard_normal((1, 3)), exact=exact)
    assert flow.largest.shape == flow.frobenius.shape == (1, 2)
    assert flow.largest[0, 0] == 1
    assert abs(flow.frobenius[0, 0] - 8**0.5) < 1e-12


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("factor", [0.0, 1e-200, 0.5, 1.5, 1e200])
def test_powers_of_one_factor(factor, exact):
    """Norms are right down to 0 and up to infinity, where no product of the Jacobians themselves would be."""
    rnn = fastrnn.RNN(2, 4, nonlinearity="identity", dtype=np.float64)
    rnn.weight_hh_l0 = factor * np.eye(4)[::-1]
    rnn.bias_ih_l0 = rnn.bias_hh_l0 = np.zeros(4)
    flow = gradient_flow(rnn, np.zeros((4, 2)), exact=exact)
    with np.errstate(over="ignore"):
        powers = np.cumprod([1, *[np.float64(factor)] * 4])
    np.testing.assert_allclose(flow.largest[0], powers, rtol=1e-6)
    np.testing.assert_allclose(flow.frobenius[0], 2 * powers, rtol=1e-6)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("name", "options"), LAYERS)
def test_nan_gives_nan(name, options, exact, rng):
    layer = make(name, options)
    x = rng.standard_normal((5, 2, 3))
    x[2, 1] = np.nan
    flow = gradient_flow(layer, x, exact=exact, iterations=3)
    assert np.isnan(flow.largest).all()
    assert np.isnan(flow.frobenius).all()
    assert np.isfinite(gradient_flow(layer, x[:, :1], exact=exact, iterations=3).largest).all()


def test_examples_vanish_explode_and_hold():
    flows = example_flows()
    last = {name: flow.largest[0, -1] for name, flow in flows.items()}
    rnn, large, gru, lstm = last.values()
    assert rnn < 1e-8
    assert large > 1e4
    assert 0.01 < gru < 100
    assert 0.01 < lstm < 100


def test_picture_of_flows(tmp_path, rng):
    matplotlib = pytest.importorskip("matplotlib")
    layer = make("LSTM", {"num_layers": 2})
    flow = gradient_flow(layer, rng.standard_normal((5, 3)))
    lags, zeros = np.arange(6), np.zeros((1, 6))
    dead = GradientFlow(("l0",), lags, zeros, zeros)
    spoilt = GradientFlow(("l0",), lags, np.array([[1, 1e150, np.inf, np.nan, 0, 1e-150]]), zeros)
    ax = plot_gradient_flow({"LSTM": flow, "dead": dead, "spoilt": spoilt})
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["LSTM, l0", "LSTM, l1", "dead", "spoilt"]
    lines = {line.get_label(): line for line in ax.get_lines()}
    np.testing.assert_array_equal(lines["LSTM, l1"].get_ydata(), flow.largest[1])
    assert ax.get_yscale() == "log"
    ax.figure.savefig(tmp_path / "flow.png")
    assert (tmp_path / "flow.png").read_bytes().startswith(b"\x89PNG")
    plot_gradient_flow({"dead": dead}).figure.savefig(tmp_path / "dead.png")

    mine = matplotlib.figure.Figure().subplots()
    assert plot_gradient_flow({"LSTM": flow}, mine) is mine


def test_command_writes_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    diagnostics._main([str(tmp_path / "out.png")])
    assert (tmp_path / "out.png").stat().st_size > 1000


def test_pictures_without_matplotlib(monkeypatch, rng):
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    with pytest.raises(ImportError, match=r"pip install fastrnn\[plot\]"):
        unrolled(make("LSTM", {}), 2).plot()


# Graphs


def every_path(graph, node):
    """All ways from a node to the total, each a tuple of nodes."""
    if node.kind == "total":
        return [(node,)]
    targets = [edge.target for edge in graph.edges if edge.source == node and not edge.cut]
    return [(node, *rest) for target in targets for rest in every_path(graph, target)]


@pytest.mark.parametrize(("name", "options"), [c for c in LAYERS if "zoneout" not in c[1]])
@pytest.mark.parametrize(("T", "window"), [(1, None), (4, None), (5, 2), (3, 1), (3, 5)])
def test_paths_are_counted(name, options, T, window):
    layer = make(name, options)
    graph = unrolled(layer, T, window)
    for weight in layer.parameters:
        layer_name = re.search(r"_(l\d+(_reverse)?)$", weight)[1]
        # Every parameter of a layer takes part in each of its steps; W_ih once for each of its inputs.
        uses = [Node("h", layer_name, t) for t in range(1, T + 1)]
        inputs = 1
        if weight.startswith("weight_ih_l") and not weight.startswith("weight_ih_l0"):
            inputs = 2 if options.get("bidirectional") else 1
        assert graph.paths(weight) == inputs * sum(len(every_path(graph, node)) for node in uses), weight


def test_paths_in_closed_form():
    one, two = make("LSTM", {}), make("LSTM", {"num_layers": 2})
    for T in (1, 2, 7, 1000):
        assert unrolled(one, T).paths("weight_hh_l0") == T * (T + 1) // 2
        assert unrolled(one, T).paths("bias_ih_l0") == T * (T + 1) // 2
        assert unrolled(two, T).paths("weight_ih_l0") == T * (T + 1) * (T + 2) // 6
        assert unrolled(two, T).paths("weight_hh_l1") == T * (T + 1) // 2
        assert len(unrolled(one, T).edges) == 5 * T
        assert unrolled(one, T, window=1).paths("weight_hh_l0") == T
    assert unrolled(one, 10, window=4).paths("weight_hh_l0") == 10 + 10 + 3


@pytest.mark.parametrize("bidirectional", [False, True])
def test_cut_edges_are_those_between_windows(bidirectional):
    graph = unrolled(fastrnn.LSTM(3, 4, 2, **({"bidirectional": True} if bidirectional else {})), 7, window=3)
    cut = {(e.source.layer, e.source.step, e.target.step) for e in graph.edges if e.cut}
    forward = {(layer, t, t + 1) for layer in ("l0", "l1") for t in (3, 6)}
    reverse = {(f"{layer}_reverse", t + 1, t) for layer in ("l0", "l1") for t in (3, 6)}
    assert cut == forward | (reverse if bidirectional else set())
    assert all(e.weight.startswith("weight_hh") for e in graph.edges if e.cut)


def test_gradients_flow_as_the_graph_says(rng):
    """A loss at step t moves with the input of step s if, and only if, a path leads from it."""
    layer = make("LSTM", {"num_layers": 2})
    graph = unrolled(layer, 4)
    x = rng.standard_normal((4, 1, 3))
    (y, _), pullback = layer.vjp(x)
    for t, s in itertools.product(range(4), range(4)):
        dy = np.zeros_like(y)
        dy[t] = 1
        reached = any(Node("loss", "", t + 1) in path for path in every_path(graph, Node("x", "", s + 1)))
        assert reached == bool(np.abs(pullback(dy)[0][s]).max() > 0)


@pytest.mark.parametrize(("name", "options"), LAYERS)
def test_dot_and_picture_have_every_node_and_edge(name, options, tmp_path):
    graph = unrolled(make(name, options), 4, window=2)
    assert repr(graph).startswith(f"Unrolled({len(graph.nodes)} nodes, {len(graph.edges)} edges")
    names = [node.name for node in graph.nodes]
    assert len(set(names)) == len(names)
    dot = graph.dot()
    assert dot.startswith("digraph unrolled {\n")
    assert dot.endswith("}\n")
    assert dot.count("{") == dot.count("}")
    assert sorted(re.findall(r'"(\w+)";', "".join(re.findall(r"rank=same; (.*) }", dot)))) == sorted(names)
    edges = re.findall(r'^  "(\w+)" -> "(\w+)"(?: \[(?:label="(\w+)")?(.*)\])?;$', dot, re.MULTILINE)
    assert [(a, b, weight, "dashed" in rest) for a, b, weight, rest in edges] == [
        (e.source.name, e.target.name, e.weight, e.cut) for e in graph.edges
    ]

    pytest.importorskip("matplotlib")
    ax = graph.plot()
    arrows = [text for text in ax.texts if getattr(text, "arrow_patch", None) is not None]
    assert len(arrows) == len(graph.edges)
    assert len(ax.texts) == len(graph.edges) + len(graph.nodes)
    ax.figure.savefig(tmp_path / "graph.png", dpi=30)
    assert (tmp_path / "graph.png").stat().st_size > 1000


X = np.zeros((2, 3))
LAYER = fastrnn.LSTM(3, 4, dtype=np.float64)
FLOW = GradientFlow(("l0",), np.arange(2), np.ones((1, 2)), np.ones((1, 2)))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gradient_flow("LSTM", X), TypeError, "layer: expected an RNN, LSTM or GRU, got 'LSTM'"),
        (lambda: gradient_flow(LAYER, X[0]), ValueError, "x: expected 3 dimensions"),
        (lambda: gradient_flow(LAYER, np.float32(X)), TypeError, "x: expected dtype float64, got float32"),
        (lambda: gradient_flow(LAYER, X[:, :2]), ValueError, r"x: expected shape .*, got \(2, 2\)"),
        (lambda: gradient_flow(LAYER, X, X), TypeError, "state: expected a tuple of 2 arrays, got ndarray"),
        (lambda: gradient_flow(LAYER, X, (X, X)), ValueError, r"state: expected shape \(1, 4\), got \(2, 3\)"),
        (lambda: gradient_flow(LAYER, X, of="c"), ValueError, "of: expected 'state' or 'h', got 'c'"),
        (lambda: gradient_flow(LAYER, X, exact=1), TypeError, "exact: expected True or False, got 1"),
        (lambda: gradient_flow(LAYER, X, iterations=0), ValueError, "iterations: expected at least 1, got 0"),
        (lambda: gradient_flow(LAYER, X, seed=-1), ValueError, "seed: expected at least 0, got -1"),
        (lambda: plot_gradient_flow(FLOW), TypeError, "flows: expected a dict of GradientFlow, got GradientFlow"),
        (lambda: plot_gradient_flow({"a": X}), TypeError, r"flows\['a'\]: expected a GradientFlow, got ndarray"),
        (lambda: plot_gradient_flow({}), ValueError, "flows: expected at least one GradientFlow, got none"),
        (lambda: example_flows(0), ValueError, "T: expected at least 1, got 0"),
        (lambda: example_flows(input_size=1.5), TypeError, "input_size: expected an int, got 1.5"),
        (lambda: example_flows(hidden_size=0), ValueError, "hidden_size: expected at least 1, got 0"),
        (lambda: unrolled(X, 3), TypeError, "layer: expected an RNN, LSTM or GRU, got ndarray"),
        (lambda: unrolled(LAYER, 0), ValueError, "T: expected at least 1, got 0"),
        (lambda: unrolled(LAYER, 3, 0), ValueError, "window: expected at least 1, got 0"),
        (lambda: unrolled(LAYER, 3).paths("weight"), KeyError, "weight: expected one of weight_ih_l0, .*got 'weight'"),
        (lambda: unrolled(LAYER, 3).paths(""), KeyError, "weight: expected one of weight_ih_l0, .*got ''"),
    ],
)
def test_wrong_calls(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_wrong_axes():
    pytest.importorskip("matplotlib")
    for call in (lambda ax: plot_gradient_flow({"a": FLOW}, ax), unrolled(LAYER, 2).plot):
        with pytest.raises(TypeError, match="ax: expected matplotlib's Axes, got 'axes'"):
            call("axes")
