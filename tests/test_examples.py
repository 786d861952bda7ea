"""The example programs, run as a user runs them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(program, *arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / program, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(text):
    return [float(number) for number in re.findall(r"loss (\S+)", text)]


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_a_language_model_has_the_same_losses_with_either_import(cell):
    pytest.importorskip("torch")
    options = "--cell", cell, "--size", 32, "--batch", 8, "--window", 20, "--vocabulary", 100, "--updates", 40
    theirs, ours = [losses(run("torch_language_model.py", "--rnn", rnn, *options)) for rnn in ("torch", "fastrnn")]
    assert len(ours) == 40
    assert ours[-1] < ours[0] - 0.5
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_language_model_is_kept(tmp_path):
    torch = pytest.importorskip("torch")
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten\n" * 60)
    out = tmp_path / "model.pt"
    options = "--size", 16, "--batch", 4, "--window", 10, "--vocabulary", 12, "--epochs", 2, "--out", out
    epochs = run("torch_language_model.py", text, *options).splitlines()
    assert len(epochs) == 2
    assert torch.load(out)["rnn.weight_hh_l1"].shape == (64, 16)


def test_two_processes_have_the_gradients_of_one(tmp_path):
    torch = pytest.importorskip("torch")
    gradients, curves = [], []
    for processes in (1, 2):
        file = tmp_path / f"{processes}.pt"
        options = "--processes", processes, "--updates", 20, "--gradients", file
        curves.append(losses(run("torch_data_parallel.py", *options)))
        gradients.append(torch.load(file))
    assert gradients[0].keys() == gradients[1].keys()
    for name, one in gradients[0].items():
        assert one.abs().max() > 0
        assert (one - gradients[1][name]).norm() <= 1e-5 * one.norm()
    assert len(curves[0]) == 2
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
