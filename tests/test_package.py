"""The package as users have it: imported from a checkout, a wheel, an editable install, a folder nobody may write to.

What is installed is made from a copy of the checkout, so that nothing is left in it.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

WHERE = """
import json, sys
import fastrnn, fastrnn.kernels, fastrnn.kernels.lstm
print(json.dumps([fastrnn.__file__, fastrnn.kernels.__file__, fastrnn.kernels.lstm.__file__]))
"""

IMPORTING = """
import json, sys
import fastrnn
from fastrnn import kernels
from numba.core.dispatcher import Dispatcher
optional = {"torch", "onnx", "onnxruntime", "keras", "h5py", "sklearn", "matplotlib", "tqdm"}
eager = sorted(optional & set(sys.modules))
modules = [module for name, module in sys.modules.items() if name.startswith("fastrnn")]
dispatchers = {id(d): d for m in modules for d in vars(m).values() if isinstance(d, Dispatcher)}
compiled = [str(d) for d in dispatchers.values() if d.signatures]
print(json.dumps({"eager": eager, "compiled": compiled, "dispatchers": len(dispatchers)}))
"""

TRAINING = """
import json, sys
import numpy as np
import fastrnn
from fastrnn.kernels import gemm, gru, lstm, rnn
total, dispatchers = 0.0, [gemm.pack, gemm.pack_transposed]
for Layer, kernels in (fastrnn.RNN, rnn), (fastrnn.LSTM, lstm), (fastrnn.GRU, gru):
    layer, dispatchers = Layer(3, 4, seed=0), [*dispatchers, kernels.forward, kernels.backward, kernels.step_of_arrays]
    x = np.ones((5, 2, 3), np.float32)
    (y, state), pullback = layer.vjp(x)
    total += float(y.sum() + sum(g.sum() for g in pullback(y)[2].values()) + layer.stream(2).step(x[0]).sum())
stats = [dispatcher.stats for dispatcher in dispatchers]
hits, misses = [sum(s.cache_hits.values()) for s in stats], [sum(s.cache_misses.values()) for s in stats]
print(json.dumps({"hits": hits, "misses": misses, "sum": total}))
"""

SIGMOID = """
import json
import numpy as np
import fastrnn
from fastrnn.kernels import activations
x, y = np.zeros(3), np.empty(3)
activations.sigmoid_array(x, y)
print(json.dumps([y.tolist(), activations.sigmoid_array.stats.cache_path is None]))
"""


def run(code, *, path=(), cwd, python=sys.executable, isolated=True, **variables):
    """What ``code``, a script in no package's folder, prints as JSON."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "NUMBA_CACHE_DIR")}
    env |= {"PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1", **variables}
    # With -c the working directory comes first among the folders that modules are looked for in; -P leaves it out.
    flags = ["-W", "error", *(["-P"] if isolated and sys.version_info >= (3, 11) else [])]
    done = subprocess.run([python, *flags, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def pip(*arguments, python=sys.executable):
    """Run pip without a network: setuptools must be here, or the test is skipped."""
    pytest.importorskip("setuptools", minversion="77")
    command = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "-q", *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def copy_of_checkout(folder):
    unwanted = shutil.ignore_patterns("__pycache__", ".*", "build", "*.egg-info", "tests", "asv_bench")
    return shutil.copytree(ROOT, folder, ignore=unwanted)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = copy_of_checkout(folder / "source")
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, source)
    [wheel] = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    pip("install", "--no-deps", "--no-index", "--no-compile", "--target", folder, wheel)
    return folder


def assert_inside(files, *folders):
    files = [Path(file).resolve() for file in files]
    assert [file.parent for file in files] == [Path(folder).resolve() for folder in folders]


def test_the_top_level_has_these_folders():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a checkout")
    folders = {line.split("/")[0] for line in listed.stdout.splitlines() if "/" in line}
    assert {folder for folder in folders if not folder.startswith(".")} <= {
        "fastrnn",
        "kernels",
        "tests",
        "asv_bench",
        "examples",
    }


def test_the_wheel_holds_the_package_only(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    packages = {name.split("/")[0] for name in names}
    assert packages == {"fastrnn", wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info"}
    modules = {f"fastrnn/{path.relative_to(ROOT / 'fastrnn').as_posix()}" for path in (ROOT / "fastrnn").rglob("*.py")}
    modules |= {f"fastrnn/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert "fastrnn/py.typed" in names


def test_from_the_checkout(tmp_path):
    expected = ROOT / "fastrnn", ROOT / "kernels", ROOT / "kernels"
    assert_inside(run(WHERE, cwd=ROOT, isolated=False), *expected)
    assert_inside(run(WHERE, cwd=tmp_path, path=[ROOT]), *expected)


def test_from_a_wheel(installed, tmp_path):
    package = installed / "fastrnn"
    assert_inside(run(WHERE, cwd=tmp_path, path=[installed]), package, package / "kernels", package / "kernels")


def test_a_checkout_and_a_wheel_do_not_mix(installed):
    """Whichever comes first on the path is taken whole."""
    package = installed / "fastrnn"
    expected = package, package / "kernels", package / "kernels"
    assert_inside(run(WHERE, cwd=ROOT, path=[installed, ROOT]), *expected)
    files = run(WHERE, cwd=ROOT, path=[installed], isolated=False)
    assert_inside(files, ROOT / "fastrnn", ROOT / "kernels", ROOT / "kernels")


def test_from_an_editable_install(tmp_path):
    source = copy_of_checkout(tmp_path / "source")
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True, timeout=120)
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    [site] = venv.glob("**/site-packages")
    # The new environment sees what this one has installed (NumPy, Numba, setuptools), but for fastrnn itself.
    parent = tmp_path / "parent"
    parent.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(("fastrnn", "__editable__")):
            (parent / entry.name).symlink_to(entry)
    (site / "parent.pth").write_text(str(parent))
    pip("install", "--no-deps", "--no-build-isolation", "--no-index", "-e", source, python=python)
    expected = source / "fastrnn", source / "kernels", source / "kernels"
    (tmp_path / "elsewhere").mkdir()
    assert_inside(run(WHERE, cwd=tmp_path / "elsewhere", python=python), *expected)
    assert run(SIGMOID, cwd=tmp_path / "elsewhere", python=python)[0] == [0.5] * 3


def test_importing_compiles_nothing_and_imports_no_framework(tmp_path):
    found = run(IMPORTING, cwd=tmp_path, path=[ROOT], NUMBA_CACHE_DIR=str(tmp_path / "cache"))
    assert found["dispatchers"] > 10
    assert (found["eager"], found["compiled"]) == ([], [])
    assert not list(tmp_path.rglob("*.nbi"))


def test_a_second_process_compiles_nothing(installed, tmp_path):
    """The cache lies beside the installed kernels."""
    first, second = (run(TRAINING, cwd=tmp_path, path=[installed]) for _ in range(2))
    assert first["misses"] == second["hits"] == [1] * 11
    assert first["hits"] == second["misses"] == [0] * 11
    assert first["sum"] == second["sum"]
    assert list((installed / "fastrnn" / "kernels" / "__pycache__").glob("*lstm_forward*.nbc"))


def test_where_nothing_can_be_written(wheel, tmp_path):
    """No folder for the cache, neither here nor at home: compiled in every process, without a word."""
    pip("install", "--no-deps", "--no-index", "--no-compile", "--target", tmp_path / "site", wheel)
    # A file in its place keeps even root, who may write anywhere, from making a folder.
    (tmp_path / "site" / "fastrnn" / "kernels" / "__pycache__").touch()
    nowhere = {"HOME": "/dev/null", "USERPROFILE": "/dev/null", "XDG_CACHE_HOME": "/dev/null/x"}
    for more in ({}, {"NUMBA_CACHE_DIR": "/dev/null/x"}):
        got = run(SIGMOID, cwd="/", path=[tmp_path / "site"], **nowhere, LOCALAPPDATA="/dev/null", **more)
        assert got == [[0.5] * 3, True]
