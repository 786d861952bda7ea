"""The benchmarks under asv: they are found, run, published, and drawn by a real browser. Not how fast anything is."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT

pytest.importorskip("asv", reason="asv is not installed")

BENCHMARK = "kernels.Activations.time_array"
needs_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the checkout has no git repository")


def run(command, folder, given=None, **environment):
    """A command's output; it runs as if the checkout were the only fastrnn, in one thread."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "ASV_PYTHONPATH": str(ROOT), **environment}
    command = list(map(str, command))
    done = subprocess.run(command, cwd=folder, env=env, input=given, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A clone with the benchmarks as they are in the checkout, in which asv runs with this interpreter."""
    folder = tmp_path_factory.mktemp("asv") / "clone"
    run(["git", "clone", "--quiet", ROOT, folder], ROOT)
    shutil.rmtree(folder / "asv_bench", ignore_errors=True)
    ignored = shutil.ignore_patterns("env", "results", "html", "__pycache__")
    shutil.copytree(ROOT / "asv_bench", folder / "asv_bench", ignore=ignored)
    config = folder / "asv_bench" / "asv.conf.json"
    here = json.loads(config.read_text()) | {"environment_type": "existing", "pythons": [sys.executable]}
    config.write_text(json.dumps(here))
    asv(folder, "machine", "--yes", "--machine", "here")
    return folder


def asv(folder, *arguments, **environment):
    command = [sys.executable, "-W", "ignore", "-m", "asv", "--config", "asv_bench/asv.conf.json", *arguments]
    return run(command, folder, HOME=str(folder.parent), **environment)


@pytest.fixture(scope="module")
def published(clone):
    """The pages of quick runs of one benchmark, under the names of two commits."""
    commits = subprocess.run(["git", "rev-list", "-n", "2", "HEAD"], cwd=clone, capture_output=True, text=True).stdout
    for commit in commits.split():
        which = ["--environment", f"existing:{sys.executable}", "--machine", "here", "--set-commit-hash", commit]
        output = asv(clone, "run", *which, "--quick", "--show-stderr", "--bench", "kernels.Activations")
        assert "failed" not in output
    asv(clone, "publish")
    return clone / "asv_bench" / "html"


@needs_git
def test_check(clone):
    """All benchmarks can be imported, and have the arguments that their parameters say."""
    output = asv(clone, "check", "--environment", f"existing:{sys.executable}")
    assert "No problems found" in output


@needs_git
def test_run_and_publish(published):
    index = json.loads((published / "index.json").read_text())
    assert {BENCHMARK, "kernels.Activations.track_array_fraction"} <= set(index["benchmarks"])
    # Beside each time a fraction of the machine's limit.
    timed = [name for name in index["benchmarks"] if re.search(r"\.time_", name)]
    fractions = {name.replace(".time_", ".track_") + "_fraction" for name in timed}
    assert fractions <= set(index["benchmarks"])
    (graph,) = (published / "graphs").glob(f"**/machine-here/**/{BENCHMARK}.json")
    points = json.loads(graph.read_text())
    assert points
    assert all(0 < seconds < 1e-3 for _, values in points for seconds in values)


@needs_git
def test_a_browser_draws_a_graph(published, tmp_path):
    """By the command that makes the README's picture. asv's pages load scripts from the web."""
    picture = tmp_path / "asv.png"
    command = [sys.executable, "-m", "asv_bench.pages", BENCHMARK, "--html", published, "--picture", picture]
    scripts = os.environ.get("ASV_SCRIPTS")
    command += ["--scripts", scripts] if scripts else []
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=120)
    if done.returncode == 2:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r": (\d+) points", done.stdout)[1]) >= 4
    assert picture.read_bytes().startswith(b"\x89PNG")


@needs_git
def test_preview(published):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-m", "asv", "--config", "asv_bench/asv.conf.json", "preview"]
    folder = published.parent.parent
    server = subprocess.Popen(
        [*command, "--port", str(port)], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        for _ in range(100):
            time.sleep(0.2)
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/index.html", timeout=5) as page:
                    assert b"airspeed velocity" in page.read()
                break
            except OSError:
                assert server.poll() is None, server.stderr.read()
        else:
            pytest.fail("asv preview does not answer")
    finally:
        server.terminate()
        server.communicate(timeout=20)


SAMPLES = """
import json, sys
sys.path.insert(0, "asv_bench")
from benchmarks import common, kernels, layers, limits
for made, params in ((kernels.Activations(), ("tanh", "float32")), (layers.Stream(), ("RNN", 64))):
    made.setup(*params)
    samplers = dict(made.samplers)
    made.setup(*params)
    assert made.samplers == samplers, "asv sets up before every sample"
    for name, sampler in samplers.items():
        before = made.timer()
        getattr(made, f"time_{name}")(*params)
        seconds = made.timer() - before
        fraction = getattr(made, f"track_{name}_fraction")(*params)
        print(json.dumps([seconds, sampler.calls, fraction]))

class Missing(common.Timed):
    def prepare(self):
        common.fastrnn.not_in_this_commit

    def call_it(self):
        pass

try:
    Missing().setup()
except NotImplementedError as error:
    print(json.dumps(str(error)))
"""


def test_a_sample_lasts_two_milliseconds(tmp_path):
    """asv's clock goes on by the time of one call, its call is a sample; what a commit does not have is skipped."""
    script = tmp_path / "samples.py"
    script.write_text(SAMPLES)
    *samples, missing = map(json.loads, run([sys.executable, script], ROOT).splitlines())
    assert len(samples) == 3
    for seconds, calls, fraction in samples:
        assert seconds * calls > 0.0015  # chosen by the least of three, it may be undercut a little
        assert seconds < 1e-3
        assert 0 < fraction < 2
    assert "not in this commit" in missing


def test_no_benchmark_is_skipped_here():
    """Of each class one with an LSTM, in float32, where it has a choice: all can be set up and called."""
    worker = [sys.executable, ROOT / "asv_bench" / "gate_worker.py", ROOT]
    names = [name for name, _ in json.loads(run([*worker, "--names"], ROOT, given="[]"))["names"]]
    chosen = {}
    for name in sorted(names, key=lambda name: name.lower().count("lstm") + name.count("float32"), reverse=True):
        chosen.setdefault(name.partition("(")[0], name)
    assert {name.partition(".")[0] for name in chosen} == {"kernels", "layers", "training", "decoding"}
    report = json.loads(run([*worker, "--check"], ROOT, given=json.dumps(list(chosen.values()))))
    assert report["missing"] == report["broken"] == {}
    assert set(report["ready"]) == set(chosen.values())


LIMITS = """
import json, sys, time
sys.path.insert(0, "asv_bench/benchmarks")
import limits
found = {}
all_limits = {
    "float32": limits.MultiplyAdds("float32"), "float64": limits.MultiplyAdds("float64"),
    "two threads": limits.MultiplyAdds("float32", 2), "near": limits.Reads(16_000), "far": limits.Reads(100_000_000),
}
for name, limit in all_limits.items():
    found[name] = limit.work / min(limits.Sampler(limit).sample() for _ in range(20))
limit = limits.MultiplyAdds("float32")
found["itself"] = limits.fraction(limit, limit.work, limits.MultiplyAdds("float32"))
print(json.dumps(found))
"""


def test_limits():
    """float32 has twice float64's rate, near memory more than far, and the limit reaches all of itself."""
    found = json.loads(run([sys.executable, "-c", LIMITS], ROOT))
    assert 1.5 < found["float32"] / found["float64"] < 2.5
    assert found["near"] > found["far"]
    assert found["itself"] == pytest.approx(1, abs=0.2)
    assert found["two threads"] > 0.5 * found["float32"]


def test_every_file_of_the_pages_is_known():
    """`asv_bench.pages` can serve all that the pages of the installed asv load from the web."""
    import asv

    from asv_bench import pages

    index = (Path(asv.__file__).parent / "www" / "index.html").read_text()
    urls = re.findall(r'(?:src|href)="(https://[^"]+\.(?:js|css))"', index)
    assert urls
    for url in urls:
        assert any(re.fullmatch(pattern, url.rpartition("/")[2]) for pattern in pages.FILES), url
