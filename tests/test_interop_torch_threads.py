"""Calls inside PyTorch run on PyTorch's own threads; where it has none to lend, on fastrnn's."""

import os
import threading

import pytest

torch = pytest.importorskip("torch")

from conftest import in_a_fork  # noqa: E402

import fastrnn  # noqa: E402
from fastrnn import batching  # noqa: E402
from fastrnn.interop import torch as interop  # noqa: E402
from fastrnn.interop import torch_threads  # noqa: E402

lent = pytest.mark.skipif(not torch_threads.available(), reason="this PyTorch runs on no OpenMP that lends its threads")


@pytest.fixture(autouse=True)
def two_threads(small_shares):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    fastrnn.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def results(layer, x):
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y, _ = layer(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]


def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@lent
@pytest.mark.parametrize("shape", [(7, 12, 5, 33), (7, 1, 5, 200)], ids=["batch cut", "units cut"])
def test_the_helpers_are_not_needed(shape, monkeypatch):
    T, B, I, H = shape
    layer, x = interop.LSTM(I, H), torch.randn(T, B, I)
    torch.set_num_threads(1)
    expected = results(layer, x)
    torch.set_num_threads(2)
    seen, team = [], torch_threads.together

    def together(parties, call):
        def noted(me, count, barrier):
            seen.append((me, count, threading.get_ident()))
            call(me, count, barrier)

        team(parties, noted)

    monkeypatch.setattr(torch_threads, "together", together)
    monkeypatch.setattr(batching._pool, "take", lambda count: pytest.fail("a helper was asked for"))
    for _ in range(3):
        assert same(results(layer, x), expected)
    assert {(me, count) for me, count, _ in seen} == {(0, 2), (1, 2)}
    assert len({thread for *_, thread in seen}) == 2
    assert {thread for me, _, thread in seen if me == 0} == {threading.get_ident()}
    # A layer that is not PyTorch's has its helpers.
    monkeypatch.undo()
    seen.clear()
    batching.together(2, lambda me, parties, barrier: seen.append(me))
    assert 0 in seen


@lent
def test_a_team_larger_than_the_call_needs():
    torch.set_num_threads(4)
    seen = []
    torch_threads.together(2, lambda me, parties, barrier: seen.append((me, parties)))
    assert sorted(seen) == [(0, 2), (1, 2)]
    torch.set_num_threads(2)
    seen.clear()
    torch_threads.together(5, lambda me, parties, barrier: seen.append((me, parties)))
    assert sorted(seen) == [(0, 2), (1, 2)]


@lent
@pytest.mark.parametrize("who", [0, 1])
def test_an_error_of_any_party_is_raised(who):
    layer, x = interop.GRU(5, 200), torch.randn(7, 1, 5)
    expected = results(layer, x)

    def call(me, parties, barrier):
        if me == who:
            raise KeyboardInterrupt(f"of {me}")
        while not barrier[1]:  # as parties do that wait for another
            pass

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt, match=f"of {who}"):
            torch_threads.together(2, call)
    assert same(results(layer, x), expected)


def test_many_python_threads_at_once():
    layers, x = [interop.LSTM(5, 200) for _ in range(4)], torch.randn(7, 2, 5)
    expected, errors = [results(layer, x) for layer in layers], []

    def work(layer, expected):
        try:
            for _ in range(10):
                assert same(results(layer, x), expected)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=both, daemon=True) for both in zip(layers, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    assert not errors


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_has_fastrnns_threads():
    layer, x = interop.LSTM(5, 200), torch.randn(7, 1, 5)
    with torch.no_grad():
        expected = layer(x)[0]

        def child():
            return not torch_threads.available() and torch.equal(layer(x)[0], expected)

        assert in_a_fork(child)
        assert torch.equal(layer(x)[0], expected)


def test_without_openmp(monkeypatch):
    layer, x = interop.GRU(5, 33), torch.randn(7, 12, 5)
    expected = results(layer, x)
    monkeypatch.setattr(torch.__config__, "parallel_info", lambda: "ATen parallel backend: native thread pool")
    torch_threads._openmp.cache_clear()
    try:
        assert not torch_threads.available()
        assert same(results(layer, x), expected)
    finally:
        torch_threads._openmp.cache_clear()
