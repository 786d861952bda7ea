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


def run(folder, *arguments, path=()):
    """The script's output and its JSON, run from a folder that is not the repository's."""
    file = folder / "report.json"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, path), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(SCRIPT), "--grid", "quick", "--repeat", "1", "--json", str(file), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(file.read_text())


def check_fields(output, report, threads):
    assert {"cpu", "cpus", "platform", "versions", "date", "missing", "threads", "grid", "repeat"} <= set(report)
    assert report["threads"] == threads
    assert [row["kind"] for row in report["rows"]] == ["inference"] * 4 + ["training"] * 4 + ["step"]
    for row in report["rows"]:
        assert all(seconds > 0 for rounds in row["rounds"].values() for seconds in rounds)
        assert set(row["median_seconds"]) == set(row["rounds"]) == set(row["settings"])
        assert set(row["ratios"]) == set(row["rounds"]) - {"fastrnn"}
        assert row["gflops"] > 0
        assert row["peak_gflops"] > 0
        assert row["fraction_of_peak"] > 0
        assert all(target["met"] == (target["reached"] >= target["target"]) for target in row["targets"])
    met = [target["met"] for row in report["rows"] for target in row["targets"]]
    assert (report["targets"], report["targets_met"]) == (len(met), sum(met))
    assert f"targets met: {report['targets_met']} of {report['targets']}" in output


@pytest.mark.skipif(bool(NOT_INSTALLED), reason=f"not installed: {', '.join(NOT_INSTALLED)}")
@pytest.mark.parametrize("threads", [1, 2])
def test_libraries_agree(tmp_path, threads):
    output, report = run(tmp_path, "--threads", str(threads))
    check_fields(output, report, threads)
    assert report["missing"] == {}
    for row in report["rows"]:
        training = row["kind"] == "training"
        expected = {"fastrnn", "torch"} | (set() if training else {"onnxruntime"})
        assert expected <= set(row["rounds"])
        assert ("torch LSTMCell" in row["rounds"]) == (row["kind"] == "step")
        assert row["compared"] in row["ratios"]
        # Every candidate was compared with fastrnn: y, h, c; training, the gradients too.
        assert len(row["disagreement"]) == len(row["trials"]) * (8 if training else 3)
        assert max(row["disagreement"].values()) < 1e-4


def test_missing_libraries_are_named_and_left_out(tmp_path):
    for name in ("torch", "onnx", "onnxruntime"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not here')\n")
    output, report = run(tmp_path, path=[tmp_path])
    check_fields(output, report, 1)
    assert report["missing"] == {"torch": "not here", "onnxruntime": "not here"}
    assert "left out: torch (not here)\nleft out: onnxruntime (not here)\n" in output
    assert all(set(row["rounds"]) == {"fastrnn"} for row in report["rows"])
