"""asv_bench/peers.py runs, and every library computes the same. How fast they are is no test's business."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "asv_bench" / "peers.py"
NOT_INSTALLED = [name for name in ("torch", "onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
OWN = {"full length", "normal numbers", "a whole sequence"}  # what is no peer
needs_peers = pytest.mark.skipif(bool(NOT_INSTALLED), reason=f"not installed: {', '.join(NOT_INSTALLED)}")


def start(folder, *arguments, path=()):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, path), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


def run(folder, *arguments, path=()):
    """The script's output and its JSON, run from a folder that is not the repository's."""
    file = folder / "report.json"
    done = start(folder, "--grid", "quick", "--repeat", "1", "--json", str(file), *arguments, path=path)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(file.read_text())


def check_fields(output, report, threads):
    fields = {"cpu", "cpus", "platform", "versions", "date", "missing", "threads", "grid", "repeat", "cell", "only"}
    assert fields <= set(report)
    assert report["threads"] == threads
    for row in report["rows"]:
        assert all(seconds > 0 for rounds in row["rounds"].values() for seconds in rounds)
        assert set(row["median_seconds"]) == set(row["rounds"]) == set(row["settings"])
        assert set(row["ratios"]) == set(row["rounds"]) - {"fastrnn"}
        assert row["gflops"] > 0
        assert row["peak_gflops"] > 0
        assert row["fraction_of_peak"] > 0
        for target in row["targets"]:
            reached, aim = target["reached"], target["target"]
            assert target["met"] == (reached <= aim if target["at_most"] else reached >= aim)
    met = [target["met"] for row in report["rows"] for target in row["targets"]]
    assert (report["targets"], report["targets_met"]) == (len(met), sum(met))
    assert f"targets met: {report['targets_met']} of {report['targets']}" in output


def check_agreement(report):
    assert report["missing"] == {}
    for row in report["rows"]:
        kind, training = row["kind"], row["kind"].endswith("training")
        expected = {"fastrnn"}
        if not kind.startswith(("njit", "denormal")):
            expected |= {"torch"}
            expected |= set() if training or kind.startswith("bidirectional") else {"onnxruntime"}
            assert row["compared"] in row["ratios"]
        assert expected <= set(row["rounds"])
        assert ("torch cell" in row["rounds"]) == (kind == "step")
        # Every candidate was compared with fastrnn: y, h, an LSTM's c; training, the gradients too.
        results = 3 if row["cell"] == "lstm" else 2
        results += (1 + 4 * (4 if kind.startswith("bidirectional") else 1)) if training else 0
        others = sum(name.startswith(("full length", "normal numbers")) for name in row["trials"])
        if not kind.startswith("denormal"):
            assert len(row["disagreement"]) == (len(row["trials"]) - others) * results
        assert max(row["disagreement"].values()) < 1e-4


@needs_peers
def test_libraries_agree(tmp_path):
    output, report = run(tmp_path)
    check_fields(output, report, 1)
    check_agreement(report)
    rows = report["rows"]
    for cell, kinds in {
        "lstm": "inference training lengths bidirectional step njit denormal",
        "gru": "inference training lengths step njit denormal",
        "rnn": "inference training denormal",
    }.items():
        assert {row["kind"].split()[0] for row in rows if row["cell"].split()[0] == cell} == set(kinds.split())
    measured = {(row["kind"].split()[0], name) for row in rows for name in row["measures"]}
    assert measured == {
        ("lengths", "of full length"),
        ("denormal", "of normal numbers"),
        ("njit", "of a whole sequence"),
        ("njit", "us a step"),
    }


@needs_peers
def test_libraries_agree_on_two_threads(tmp_path):
    output, report = run(tmp_path, "--threads", "2", "--cell", "gru", "--only", "lengths,step")
    check_fields(output, report, 2)
    check_agreement(report)
    kinds = ["lengths inference", "lengths training", "step"]
    assert [(row["cell"], row["kind"]) for row in report["rows"]] == [("gru", kind) for kind in kinds]


def test_missing_libraries_are_named_and_left_out(tmp_path):
    for name in ("torch", "onnx", "onnxruntime"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not here')\n")
    output, report = run(tmp_path, "--cell", "lstm", "--only", "inference,lengths,step", path=[tmp_path])
    check_fields(output, report, 1)
    assert report["missing"] == {"torch": "not here", "onnxruntime": "not here"}
    assert "left out: torch (not here)\nleft out: onnxruntime (not here)\n" in output
    assert all(set(row["rounds"]) - OWN == {"fastrnn"} for row in report["rows"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "step,walk"], "--only: expected some of inference,"),
        (["--cell", "rnn", "--only", "step"], "--cell rnn --only step: nothing to measure"),
        (["--repeat", "0"], "--threads and --repeat: expected at least 1"),
    ],
)
def test_wrong_arguments(tmp_path, arguments, message):
    done = start(tmp_path, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
