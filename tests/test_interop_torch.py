"""PyTorch's modules on fastrnn's kernels against PyTorch's own."""

import copy
import gc
import io
import pickle
import threading
import warnings
import weakref

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn.utils import rnn as rnn_utils  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import fastrnn  # noqa: E402
from fastrnn import batching  # noqa: E402
from fastrnn.interop import torch as interop  # noqa: E402
from fastrnn.interop import torch_functions  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

LAYERS = {
    "RNN": ("RNN", {}),
    "RNN relu no bias": ("RNN", {"nonlinearity": "relu", "bias": False}),
    "LSTM": ("LSTM", {}),
    "LSTM no bias batch_first": ("LSTM", {"bias": False, "batch_first": True}),
    "LSTM 2 bidirectional": ("LSTM", {"num_layers": 2, "bidirectional": True}),
    "LSTM proj": ("LSTM", {"proj_size": 3, "num_layers": 2}),
    "GRU": ("GRU", {}),
    "GRU 3 bidirectional batch_first dropout": (
        "GRU",
        {"num_layers": 3, "bidirectional": True, "batch_first": True, "dropout": 0.4},
    ),
}
CELLS = {
    "RNNCell": {},
    "RNNCell relu": {"nonlinearity": "relu"},
    "LSTMCell": {},
    "GRUCell": {},
    "GRUCell no bias": {"bias": False},
}
SIZES = [
    (7, 3, 5, 17, True),
    (3, None, 3, 7, True),
    (1, 1, 1, 4, False),
    (9, 65, 33, 6, False),
    (5, None, 2, 65, False),
]
DTYPES = {"float32": torch.float32, "float64": torch.float64}
layers = pytest.mark.parametrize("case", LAYERS)
cells = pytest.mark.parametrize("case", CELLS)
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def pair(case, I, H, dtype=torch.float32, seed=0):
    """PyTorch's module and ours with the same weights."""
    name, options = LAYERS[case] if case in LAYERS else (case.split()[0], CELLS[case])
    torch.manual_seed(seed)
    theirs = getattr(nn, name)(I, H, **options, dtype=dtype)
    ours = getattr(interop, name)(I, H, **options, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def leaves(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [leaf for part in value if part is not None for leaf in leaves(part)]


def assert_close(got, expected, times=300):
    """Within so many roundings of the array's norm."""
    for a, b in zip(leaves(got), leaves(expected), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert torch.linalg.vector_norm(a - b) <= times * torch.finfo(a.dtype).eps * (torch.linalg.vector_norm(b) + 1)


def results(module, inputs, seed=3):
    """Outputs, and gradients of a loss of all of them by all inputs and parameters."""
    inputs = [leaf.detach().clone().requires_grad_() for leaf in inputs]
    module.zero_grad()
    torch.manual_seed(seed)
    outputs = leaves(module(inputs[0], *states(module, inputs[1:])))
    loss = sum((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum() for y in outputs)
    loss.backward()
    return [y.detach() for y in outputs], [leaf.grad for leaf in inputs], [p.grad for p in module.parameters()]


def states(module, given):
    return () if not given else (tuple(given),) if "LSTM" in type(module).__name__ else (given[0],)


def inputs_of(module, T, B, with_state, seed=1):
    generator = torch.Generator().manual_seed(seed)
    dtype = module.weight_ih_l0.dtype
    batch = (B,) if B else ()
    shape = (*batch, T) if module.batch_first else (T, *batch)
    P, count = module.proj_size or module.hidden_size, module.num_layers * (1 + module.bidirectional)
    sizes = [P, module.hidden_size][: 2 if isinstance(module, nn.LSTM) else 1] if with_state else []
    shapes = [(*shape, module.input_size), *((count, *batch, size) for size in sizes)]
    return [torch.randn(s, generator=generator, dtype=dtype) for s in shapes]


@layers
@dtypes
@pytest.mark.parametrize(("T", "B", "I", "H", "with_state"), SIZES)
def test_outputs_and_gradients_are_those_of_pytorch(case, dtype, T, B, I, H, with_state):
    theirs, ours = pair(case, I, H, dtype)
    inputs = inputs_of(theirs, T, B, with_state)
    assert_close(results(ours, inputs), results(theirs, inputs))


@layers
def test_no_graph_gives_the_same_numbers(case):
    theirs, ours = pair(case, 5, 17)
    x, *state = inputs_of(theirs, 6, 3, True)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            torch.manual_seed(5)
            expected = theirs(x, *states(theirs, state))
            torch.manual_seed(5)
            got = ours(x, *states(ours, state))
        assert_close(got, expected)
        assert not any(leaf.requires_grad for leaf in leaves(got))


@layers
@pytest.mark.parametrize("lengths", [[5, 2, 9, 1], [3, 3, 3], [4], [6, 6, 2]])
@pytest.mark.parametrize("with_state", [False, True])
def test_packed_sequences(case, lengths, with_state):
    theirs, ours = pair(case, 4, 9)
    x, *state = inputs_of(theirs, max(lengths), len(lengths), with_state)

    def run(module, x, *hx):
        packed = rnn_utils.pack_padded_sequence(x, lengths, module.batch_first, enforce_sorted=False)
        y, h_n = module(packed, *hx)
        assert isinstance(y, rnn_utils.PackedSequence)
        again, of = rnn_utils.pad_packed_sequence(y, module.batch_first)
        assert of.tolist() == lengths
        return again, h_n

    class Packing(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x, *hx):
            return run(self.module, x, *hx)

    class PackingLSTM(Packing):
        pass

    kind = PackingLSTM if isinstance(theirs, nn.LSTM) else Packing
    assert_close(results(kind(ours), [x, *state]), results(kind(theirs), [x, *state]))


def cell_inputs(module, B, seed=1):
    generator = torch.Generator().manual_seed(seed)
    batch, count = (B,) if B else (), 2 if isinstance(module, nn.LSTMCell) else 1
    sizes = [module.input_size, *[module.hidden_size] * count]
    return [torch.randn(*batch, size, generator=generator, dtype=module.weight_ih.dtype) for size in sizes]


@cells
@dtypes
@pytest.mark.parametrize(("B", "I", "H"), [(None, 3, 5), (1, 17, 63), (3, 65, 65), (4, 1, 1), (5, 8, 16), (63, 7, 17)])
def test_cells(case, dtype, B, I, H):
    theirs, ours = pair(case, I, H, dtype)
    x, *state = inputs = cell_inputs(theirs, B)
    assert_close(results(ours, inputs), results(theirs, inputs))
    assert_close(results(ours, [x]), results(theirs, [x]))
    with torch.inference_mode():
        assert_close(ours(x, *states(ours, state)), theirs(x, *states(theirs, state)))
        assert_close(ours(x), theirs(x))
        flat = torch.stack([x, x], -1)[..., 0]  # not contiguous
        assert_close(ours(flat), theirs(x))


@pytest.mark.parametrize("case", ["RNN", "LSTM 2 bidirectional", "LSTM proj", "GRU", "LSTMCell", "GRUCell"])
def test_gradcheck(case):
    _, ours = pair(case, 3, 4, torch.float64)
    inputs = (cell_inputs(ours, 2) if "Cell" in case else inputs_of(ours, 3, 2, True))  # fmt: skip
    tensors = [leaf.requires_grad_() for leaf in inputs]
    names = [name for name, _ in ours.named_parameters()]
    weights = [p.detach().clone().requires_grad_() for p in ours.parameters()]

    def function(*tensors):
        given = tensors[: len(inputs)]
        arguments = given[0], *states(ours, given[1:])
        return tuple(leaves(torch.func.functional_call(ours, dict(zip(names, tensors[len(inputs) :])), arguments)))

    assert torch.autograd.gradcheck(function, (*tensors, *weights))


def test_only_what_requires_a_gradient_gets_one():
    theirs, ours = pair("LSTM 2 bidirectional", 3, 5)
    x, h, c = inputs_of(theirs, 4, 2, True)
    for wanted in (["weight_hh_l1"], ["bias_ih_l0", "weight_ih_l1_reverse"], []):
        grads = []
        for module in (theirs, ours):
            module.zero_grad()
            for name, p in module.named_parameters():
                p.requires_grad_(name in wanted)
            h_0 = h.clone().requires_grad_()
            y, _ = module(x, (h_0, c))
            y.square().sum().backward()
            grads.append([h_0.grad, *(p.grad for p in module.parameters())])
        assert [g is None for g in grads[0]] == [g is None for g in grads[1]]
        assert_close(*grads[::-1])
    _, ours = pair("GRU", 3, 5)
    for p in ours.parameters():
        p.requires_grad_(False)
    assert not ours(x)[0].requires_grad


# Weights that change.


def add_to_one(p):
    p.data.view(-1)[-1] += 0.01


def add_by_numpy(p):
    p.detach().numpy()[...] += 0.01


def other_data(p):
    p.data = p.data + 0.01


def add_without_graph(p):
    with torch.no_grad():
        p.add_(0.01)


@pytest.mark.parametrize("change", [add_to_one, add_by_numpy, other_data, add_without_graph])
@pytest.mark.parametrize("case", ["LSTM 2 bidirectional", "GRUCell", "LSTMCell"])
@pytest.mark.parametrize("B", [2, 40])
def test_a_change_of_any_weight_is_seen_at_the_next_call(change, case, B):
    theirs, ours = pair(case, 5, 63)
    inputs = cell_inputs(ours, B) if "Cell" in case else inputs_of(ours, 4, B, True)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
        with torch.inference_mode():
            before = leaves(ours(inputs[0], *states(ours, inputs[1:])))
        change(p)
        change(q)
        with torch.inference_mode():
            got = ours(inputs[0], *states(ours, inputs[1:]))
            assert_close(got, theirs(inputs[0], *states(theirs, inputs[1:])))
        assert any(not torch.equal(a, b) for a, b in zip(before, leaves(got))), name
    assert_close(results(ours, inputs), results(theirs, inputs))


def test_weights_that_are_transposed_in_place():
    theirs, ours = pair("GRU", 5, 1)
    for module in (theirs, ours):
        module.weight_ih_l0 = nn.Parameter(torch.arange(15.0).view(5, 3).t() / 15)
    x = inputs_of(ours, 4, 2, False)
    assert_close(results(ours, x), results(theirs, x))
    for module in (theirs, ours):
        module.weight_ih_l0.data[1, 2] = 3
    assert_close(results(ours, x), results(theirs, x))


def test_what_is_kept_goes_with_the_module():
    _, ours = pair("LSTM", 5, 63)
    ours(torch.ones(3, 2, 5))
    assert ours.weight_ih_l0 in torch_functions._kept
    kept = weakref.ref(torch_functions._kept[ours.weight_ih_l0].layer)
    del ours
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("optimizer", [lambda p: torch.optim.SGD(p, 0.1, 0.9), lambda p: torch.optim.AdamW(p, 0.01)])
@pytest.mark.parametrize("case", ["LSTM 2 bidirectional", "GRU 3 bidirectional batch_first dropout"])
def test_training_follows_pytorch(optimizer, case):
    losses = []
    for module in pair(case, 4, 8, torch.float64):
        torch.manual_seed(2)
        head = nn.Linear(16, 3, dtype=torch.float64)
        updates = optimizer([*module.parameters(), *head.parameters()])
        state, losses_of_one = None, []
        for step in range(20):
            x = torch.randn(6, 6, 4, dtype=torch.float64)
            y, state = module(x, state)
            state = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
            loss = nn.functional.cross_entropy(head(y).flatten(0, 1), torch.arange(36) % 3) / 2
            loss.backward()
            if step % 2:  # gradients of two batches
                nn.utils.clip_grad_norm_(module.parameters(), 0.5)
                updates.step()
                updates.zero_grad()
            losses_of_one.append(loss.item())
        losses.append(losses_of_one)
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-10)
    assert losses[0][0] != losses[0][-1]


# What programs do to modules.


def test_constructors_and_state_dicts_are_pytorchs():
    theirs, ours = pair("GRU 3 bidirectional batch_first dropout", 3, 5)
    assert isinstance(ours, nn.GRU)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert [[p.shape for p in row] for row in ours.all_weights] == [
        [p.shape for p in row] for row in theirs.all_weights
    ]
    ours.flatten_parameters()
    layer = fastrnn.GRU(3, 5, 3, batch_first=True, bidirectional=True)
    layer.load_state_dict(ours.state_dict())
    ours.eval()
    x = torch.randn(2, 4, 3)
    assert_close(torch.from_numpy(layer(x.numpy())[0].copy()), ours(x)[0].detach())


@pytest.mark.parametrize("case", ["LSTM 2 bidirectional", "GRUCell"])
def test_copies_and_files(case):
    _, ours = pair(case, 3, 5)
    inputs = cell_inputs(ours, 2) if "Cell" in case else inputs_of(ours, 4, 2, True)
    expected = leaves(ours(inputs[0]))
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(file, weights_only=False)):
        assert type(other) is type(ours)
        assert all(torch.equal(a, b) for a, b in zip(leaves(other(inputs[0])), expected))
        with torch.no_grad():
            other.bias_hh_l0.add_(1) if "Cell" not in case else other.bias_hh.add_(1)
        assert not torch.equal(leaves(other(inputs[0]))[0], expected[0])
    assert torch.equal(leaves(ours(inputs[0]))[0], expected[0])


def test_tied_and_parametrised_weights():
    x = torch.randn(4, 2, 6)
    expected = []
    for module in pair("LSTM", 6, 6) + pair("GRU", 6, 6):
        weight_norm = nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
        module.bias_ih_l0 = module.bias_hh_l0
        y, _ = weight_norm(x)
        y.square().sum().backward()
        expected.append([y, *(p.grad for p in module.parameters())])
    for theirs, ours in (expected[:2], expected[2:]):
        assert_close(ours, theirs)


def test_initialisation_and_filters_of_names():
    _, ours = pair("LSTM 2 bidirectional", 3, 5)
    torch.manual_seed(0)
    for name, p in ours.named_parameters():
        if "weight_hh" in name:
            nn.init.orthogonal_(p)
        elif "bias" in name:
            nn.init.zeros_(p)
            p.data[5:10].fill_(1)
    other = nn.LSTM(3, 5, num_layers=2, bidirectional=True)
    other.load_state_dict(ours.state_dict())
    x = torch.randn(4, 2, 3)
    assert_close(ours(x), other(x))


def test_hooks():
    _, ours = pair("GRU", 3, 5)
    seen = []
    ours.register_forward_hook(lambda module, args, output: seen.append(output[0].shape))
    ours.register_full_backward_hook(lambda module, grad_input, grad_output: seen.append(grad_output[0].shape))
    ours.weight_hh_l0.register_hook(lambda grad: grad * 0)
    y, _ = ours(torch.ones(4, 2, 3, requires_grad=True))
    y.sum().backward()
    assert seen == [(4, 2, 5), (4, 2, 5)]
    assert not ours.weight_hh_l0.grad.any()
    assert ours.weight_ih_l0.grad.any()


# The graph.


def test_a_graph_is_freed_and_kept_as_pytorchs():
    _, ours = pair("LSTM 2 bidirectional", 3, 5)
    y, _ = ours(torch.ones(4, 2, 3))
    y.sum().backward(retain_graph=True)
    first = [p.grad.clone() for p in ours.parameters()]
    y.sum().backward()
    assert_close([p.grad for p in ours.parameters()], [2 * g for g in first], 10)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()


@pytest.mark.parametrize("kind", ["LSTM", "GRUCell"])
def test_a_batch_of_gradients_is_refused(kind):
    _, ours = pair(kind, 3, 5)
    x = torch.ones(4, 2, 3)[0 if "Cell" in kind else slice(None)].clone().requires_grad_()
    y = ours(x)[0].flatten()
    with pytest.raises(NotImplementedError, match="expected tensors of numbers, got a batch of them"):
        torch.autograd.grad(y, x, torch.eye(y.numel()), is_grads_batched=True)


class Tagged(torch.Tensor):
    """As programs have them that attach something to tensors."""


@pytest.mark.parametrize("kind", ["LSTM", "GRUCell"])
def test_subclasses_of_tensors_stay_what_they_are(kind):
    theirs, ours = pair(kind, 3, 5)
    x = torch.ones(2, 3).as_subclass(Tagged)
    y, expected = ours(x), theirs(x)
    y, expected = (y[0], expected[0]) if kind == "LSTM" else (y, expected)
    assert type(y) is type(expected) is Tagged
    assert_close(y, expected)
    assert type(ours(torch.nn.Parameter(torch.ones(2, 3)))[0]) is torch.Tensor


def test_a_second_derivative_is_refused():
    _, ours = pair("LSTM", 3, 5)
    x = torch.ones(4, 2, 3, requires_grad=True)
    y, _ = ours(x)
    with pytest.raises(NotImplementedError, match="create_graph: expected False, got True"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_what_is_saved_goes_through_the_hooks_of_saved_tensors():
    theirs, ours = pair("LSTM 2 bidirectional", 3, 5)
    x = torch.randn(4, 2, 3)
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y, _ = ours(x)
    assert len(sizes) == 4  # layers and directions
    y.square().sum().backward()
    theirs(x)[0].square().sum().backward()
    assert_close([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints(use_reentrant):
    theirs, ours = pair("GRU", 3, 5)
    x = torch.randn(4, 2, 3)
    grads = []
    for module in (theirs, ours):
        x_0 = x.clone().requires_grad_()
        y, _ = torch.utils.checkpoint.checkpoint(module, x_0, use_reentrant=use_reentrant)
        y.square().sum().backward()
        grads.append([x_0.grad, *(p.grad for p in module.parameters())])
    assert_close(*grads[::-1])


def test_outputs_may_be_written_to_before_the_backward_pass():
    theirs, ours = pair("LSTM 2 bidirectional", 3, 5)
    x = torch.randn(4, 2, 3)
    grads = []
    for module in (theirs, ours):
        module.zero_grad()
        given = x.clone()
        y, (h_n, c_n) = module(given)
        if module is ours:
            given.fill_(7)
            y.mul_(2)
        else:
            y = y * 2
        (y.sum() + h_n[0].sum() + c_n.sum()).backward()
        grads.append([p.grad for p in module.parameters()])
    assert_close(*grads[::-1])


def test_weights_may_change_before_the_backward_pass():
    """Which PyTorch cannot differentiate; the gradient is that of the weights of the forward pass."""
    theirs, ours = pair("GRU", 3, 5)
    x = torch.randn(4, 2, 3)
    y, _ = ours(x)
    ours.weight_hh_l0.data.zero_()
    y.square().sum().backward()
    theirs(x)[0].square().sum().backward()
    assert_close([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])


def test_activations_are_not_copied():
    x = torch.randn(4, 2, 3)
    assert torch_functions._array(x).ctypes.data == x.data_ptr()
    _, ours = pair("GRU", 3, 5)
    ours(x)
    layer = torch_functions._kept[ours.weight_ih_l0].layer
    assert layer.weight_hh_l0.ctypes.data == ours.weight_hh_l0.data_ptr()


# Other modes.


def test_autocast_keeps_the_weights_precision():
    theirs, ours = pair("GRU", 3, 5)
    cell = interop.GRUCell(3, 5)
    linear, x = nn.Linear(3, 3), torch.randn(4, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        z = linear(x)
        assert z.dtype == torch.bfloat16
        y, h_n = ours(z)
        y.sum().backward()
        assert cell(z[0]).dtype == torch.float32
    assert y.dtype == h_n.dtype == torch.float32
    assert_close(y, theirs(z.float())[0])
    assert ours.weight_hh_l0.grad.dtype == torch.float32


def test_traced_models_need_no_fastrnn():
    theirs, ours = pair("LSTM 2 bidirectional", 3, 5)
    x = torch.randn(4, 2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(ours, x)
        cell = torch.jit.trace(interop.GRUCell(3, 5), x[0])
    assert "aten::lstm" in str(traced.inlined_graph)
    assert "PythonOp" not in str(cell.inlined_graph)
    other = torch.randn(7, 3, 3)
    assert_close(traced(other), theirs(other))


@pytest.mark.filterwarnings("ignore")
def test_compiled_models_run():
    theirs, ours = pair("GRU", 3, 5)
    linear, x = nn.Linear(3, 3), torch.randn(4, 2, 3)
    model = torch.compile(nn.Sequential(linear, ours), backend="eager")
    assert_close(model(x)[0], theirs(linear(x))[0])


def test_batches_of_nothing_and_errors_are_pytorchs():
    theirs, ours = pair("LSTM", 3, 5)
    assert ours(torch.ones(4, 0, 3))[0].shape == (4, 0, 5)
    wrong = [
        (torch.ones(0, 2, 3),),
        (torch.ones(4, 2, 2),),
        (torch.ones(3),),
        (torch.ones(4, 2, 3, dtype=torch.float64),),
        (torch.ones(4, 2, 3), (torch.ones(1, 3, 5), torch.ones(1, 2, 5))),
        (torch.ones(4, 2, 3), (torch.ones(2, 5), torch.ones(2, 5))),
    ]
    for arguments in wrong:
        with pytest.raises(Exception) as expected:
            theirs(*arguments)
        with pytest.raises(expected.type) as got:
            ours(*arguments)
        assert str(got.value) == str(expected.value)
    cell = interop.LSTMCell(3, 5)
    for arguments in (
        (torch.ones(2, 4),),
        (torch.ones(2, 3), (torch.ones(3, 5), torch.ones(2, 5))),
        (torch.ones(2, 3), (torch.ones(2, 5), torch.ones(2, 4))),
    ):
        with pytest.raises(RuntimeError, match="expected shape"):
            cell(*arguments)
    with pytest.raises(TypeError, match=r"hx: expected the weights' torch\.float32, got torch\.float64"):
        cell(torch.ones(2, 3), (torch.ones(2, 5, dtype=torch.float64), torch.ones(2, 5)))


@pytest.mark.parametrize("kind", ["LSTM", "GRUCell"])
def test_what_kernels_do_not_run_is_refused(kind):
    x = torch.ones(2, 2, 3) if kind == "LSTM" else torch.ones(2, 3)
    for module, match in [
        (getattr(interop, kind)(3, 5).half(), r"torch\.float16 on cpu"),
        (getattr(interop, kind)(3, 5).bfloat16(), r"torch\.bfloat16 on cpu"),
    ]:
        weight = next(module.parameters())
        with pytest.raises(TypeError, match=f"weights: expected float32 or float64 on the CPU.*{match}"):
            module(x.to(weight.dtype).to(weight.device))


@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell", "GRUCell"])
@pytest.mark.parametrize("name", ["weight_ih", "weight_hh", "bias_ih", "bias_hh"])
@pytest.mark.parametrize("B", [1, 9])
def test_weights_of_another_shape_are_refused(kind, name, B):
    module = getattr(interop, kind)(3, 5)
    name += "_l0" if kind == "LSTM" else ""
    weight = getattr(module, name)
    setattr(module, name, nn.Parameter(torch.zeros(len(weight) - 1, *weight.shape[1:])))
    x = torch.ones(2, B, 3) if kind == "LSTM" else torch.ones(B, 3)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="weights: expected shape"):
        module(x)


def test_a_state_may_be_a_list():
    _, ours = pair("LSTM", 3, 5)
    x, *state = inputs_of(ours, 4, 2, True)
    packed = rnn_utils.pack_padded_sequence(x, [4, 4])
    expected = ours(x, tuple(state))[0]
    assert torch.equal(ours(x, state)[0], expected)
    assert torch.equal(ours(packed, state)[0].data.view_as(expected), expected)
    _, cell = pair("LSTMCell", 3, 5)
    x, *state = cell_inputs(cell, 2)
    assert torch.equal(cell(x, state)[0], cell(x, tuple(state))[0])


def test_nan_comes_out_as_nan():
    for case in ("GRU", "LSTM"):
        _, ours = pair(case, 3, 5)
        x = torch.ones(4, 2, 3)
        x[1, 0, 2] = torch.nan
        y = ours(x)[0]
        assert y[1:, 0].isnan().all()
        assert not y[:, 1].isnan().any()
        assert not y[0].isnan().any()


# Whole models.


class Own(nn.LSTM):
    pass


def test_replace_and_restore():
    shared = nn.GRU(3, 5)
    model = nn.ModuleDict(
        {
            "a": shared,
            "b": nn.ModuleList([shared, nn.LSTM(3, 5, 2), nn.RNNCell(3, 5)]),
            "f16": nn.LSTM(3, 5).half(),
            "meta": nn.GRUCell(3, 5, device="meta"),
            "own": Own(3, 5),
            "linear": nn.Linear(3, 3),
            "ours": interop.GRU(3, 5),
        }
    )
    before = dict(model.named_parameters())
    x = torch.randn(4, 2, 3)
    expected = model["a"](x)[0]
    done = interop.replace(model)
    assert done.replaced == ["a", "b.1", "b.2"]
    assert set(done.left) == {"f16", "meta", "own"}
    assert done.left["f16"] == "torch.float16 on cpu"
    assert done.left["meta"] == "torch.float32 on meta"
    assert "a subclass" in done.left["own"]
    assert done.left["own"].endswith("Own")
    assert model["a"] is shared is model["b"][0]
    assert all(p is before[name] for name, p in model.named_parameters())
    assert_close(model["a"](x)[0], expected)
    assert interop.replace(model).replaced == []
    assert sorted(interop.restore(model)) == ["a", "b.1", "b.2", "ours"]
    assert type(shared) is nn.GRU
    assert interop.replace(nn.LSTM(3, 5)).replaced == [""]


def test_threads_are_as_many_as_torch_may_use(monkeypatch):
    _, ours = pair("LSTM", 128, 256)
    x = torch.randn(20, 64, 128)
    ours(x)[0].sum().backward()  # the weights are packed
    seen, together = [], batching.together
    monkeypatch.setattr(batching, "together", lambda n, call: seen.append(n) or together(n, call))
    before, of_torch = fastrnn.get_num_threads(), torch.get_num_threads()
    fastrnn.set_num_threads(4)
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            seen.clear()
            ours(x)[0].sum().backward()
            assert seen == [n, n]
    finally:
        fastrnn.set_num_threads(before)
        torch.set_num_threads(of_torch)


def test_many_threads_at_once():
    _, ours = pair("LSTM 2 bidirectional", 16, 33)
    xs = [torch.randn(9, 5, 16) for _ in range(8)]
    expected = [ours(x)[0] for x in xs]
    errors = []

    def work(i):
        try:
            for _ in range(10):
                y, _ = ours(xs[i])
                assert torch.equal(y, expected[i])
                torch.autograd.grad(y.sum(), list(ours.parameters()))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


@pytest.mark.parametrize("case", ["LSTM", "GRU", "GRUCell", "LSTMCell"])
@pytest.mark.parametrize("change", [lambda w: w.neg_(), lambda w: w.mul_(0.5), lambda w: w.data.neg_()])
def test_weights_of_other_signs_or_exponents_are_seen(case, change):
    theirs, ours = pair(case, 64, 128)
    x = torch.randn((100, 64) if case.endswith("Cell") else (3, 100, 64))
    with torch.no_grad():
        for name in ["weight_ih", "weight_hh", "bias_ih"]:
            ours(x)
            for module in (theirs, ours):
                change(next(p for n, p in module.named_parameters() if n.startswith(name)))
            expected, got = theirs(x), ours(x)
            expected, got = (r if isinstance(r, torch.Tensor) else r[0] for r in (expected, got))
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("B", [2, 40, 4000])
def test_too_few_or_many_states_are_refused_as_by_pytorch(grad, B):
    x, h = torch.randn(B, 3), torch.randn(B, 5)
    with torch.set_grad_enabled(grad):
        for name, states in [
            ("LSTMCell", (h, (h,), (h, h, h))),
            ("GRUCell", ((h,), (h, h), (h, h, h))),
            ("RNNCell", ((h,), (h, h))),
        ]:
            for state in states:
                for module in pair(name, 3, 5):
                    with pytest.raises((TypeError, RuntimeError, AttributeError)):
                        module(x, state)
        with pytest.raises(RuntimeError, match="expects two hidden states"):
            interop.LSTM(3, 5)(x[None], (h[None],) * 3)


@pytest.mark.parametrize("grad", [True, False])
def test_packed_sequences_that_are_none_are_refused(grad):
    packed, gru = rnn_utils.PackedSequence, interop.GRU(3, 5)
    with torch.set_grad_enabled(grad):
        for rows, sizes in [(9, [3, 3, 3, 3]), (12, [3, 3]), (0, [3])]:
            with pytest.raises(RuntimeError):
                gru(packed(torch.randn(rows, 3), torch.tensor(sizes, dtype=torch.int64)))
        for sizes in ([4, 1, 3, 2], [3, 0], [2, -1]):
            with pytest.raises(RuntimeError, match="batch_sizes: expected numbers of at least 1"):
                gru(packed(torch.randn(max(1, sum(sizes)), 3), torch.tensor(sizes)))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", ["bias_ih", "bias_hh"])
def test_a_cell_with_one_bias(grad, name):
    for case in ("RNNCell", "LSTMCell", "GRUCell"):
        theirs, ours = pair(case, 3, 5)
        for module in (theirs, ours):
            setattr(module, name, None)
        x, h = torch.randn(2, 3), torch.randn(2, 5)
        with torch.set_grad_enabled(grad):
            expected, got = (module(x, (h, h) if case == "LSTMCell" else h) for module in (theirs, ours))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", [*LAYERS, *CELLS])
def test_outputs_can_be_detached_in_place(case):
    _, ours = pair(case, 3, 5)
    outputs = ours(torch.randn(2, 3)) if case in CELLS else ours(torch.randn(4, 2, 3))
    for output in torch.utils._pytree.tree_leaves(outputs):
        output.detach_()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_what_kernels_cannot_do_is_done_by_pytorch():
    """Tangents, torch.func, tensors without numbers, counters of operations."""
    theirs, ours = pair("GRU", 3, 5)
    x, weights = torch.randn(4, 2, 3), dict(theirs.named_parameters())
    for module in (theirs, ours):
        module.requires_grad_(False)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangents = [torch.autograd.forward_ad.unpack_dual(module(dual)[0]).tangent for module in (theirs, ours)]
    torch.testing.assert_close(*tangents)
    grads = [
        torch.func.grad(lambda w, m=module: torch.func.functional_call(m, w, (x,))[0].square().sum())(weights)
        for module in (theirs, ours)
    ]
    torch.testing.assert_close(*grads)
    assert interop.GRU(3, 5, device="meta")(x.to("meta"))[0].shape == (4, 2, 5)
    with FlopCounterMode(display=False) as counter:
        ours(x)
    assert counter.get_total_flops() > 0


@pytest.mark.parametrize("grad", [True, False])
def test_negative_views_are_negative(grad):
    for case in ("GRU", "GRUCell"):
        theirs, ours = pair(case, 3, 5)
        x = torch.randn((2, 3) if case == "GRUCell" else (4, 2, 3))
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(ours(torch._neg_view(x)), theirs(-x), rtol=1e-5, atol=1e-6)


def test_a_module_that_is_parametrised_after_replace_can_be_restored():
    model = nn.Sequential(nn.LSTM(3, 5), nn.GRU(5, 2))
    interop.replace(model)
    nn.utils.parametrizations.weight_norm(model[0], "weight_hh_l0")
    x = torch.randn(4, 2, 3)
    before = model[0](x)[0]
    assert interop.restore(model) == ["0", "1"]
    assert not isinstance(model[0], interop.LSTM)
    torch.testing.assert_close(model[0](x)[0], before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["RNN", "GRU", "GRUCell", "LSTMCell"])
def test_compiled_and_exported_modules(case):
    theirs, ours = pair(case, 3, 5)
    x = torch.randn((2, 3) if case in CELLS else (4, 2, 3))
    expected = theirs(x)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(ours, backend="eager")(x), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.export.export(ours, (x,), strict=True).module()(x), expected)
