"""Builds of commits for the gate, each installed into a folder of its own, with its own cache of what is compiled.

The interpreter, NumPy and Numba are the gate's: what differs between two builds is the package alone.
"""

import hashlib
import importlib.metadata
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

WORKER = Path(__file__).resolve().parent / "gate_worker.py"
TAIL = 2000  # characters of a failed command's output that are shown


class Failed(Exception):
    """A build or a measurement that could not be made; the message says why."""


@dataclass(frozen=True)
class Build:
    folder: Path
    commit: str

    def command(self, *arguments):
        """A `gate_worker` of this build, as `subprocess` takes it."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FASTRNN_")}
        environment |= {"PYTHONPATH": str(self.folder / "site"), "NUMBA_CACHE_DIR": str(self.folder / "cache")}
        # Hashes of strings decide the order of sets, and that where things lie in memory.
        environment |= {"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
        return {"args": [sys.executable, str(WORKER), str(self.folder / "site"), *arguments], "env": environment}

    def run(self, names, *arguments, timeout=None):
        """The report of a process on this build, of benchmarks with these names."""
        try:
            done = subprocess.run(
                **self.command(*arguments), input=json.dumps(names), capture_output=True, text=True, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            raise Failed(f"{self.commit[:12]}: no measurement within {timeout:.0f} s") from None
        if done.returncode:
            raise Failed(f"{self.commit[:12]}: the process that measures failed:\n{done.stderr[-TAIL:]}")
        return json.loads(done.stdout)


class Process:
    """A process that stays, and times a benchmark when it is asked to."""

    def __init__(self, build, names):
        self.commit, self.errors = build.commit, tempfile.TemporaryFile("w+")  # noqa: SIM115
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        self.popen = subprocess.Popen(**build.command(), **pipes, text=True, bufsize=1)
        self._tell(json.dumps(names))

    def _tell(self, line):
        with suppress(BrokenPipeError):  # `_answer` says why
            self.popen.stdin.write(f"{line}\n")

    def _answer(self):
        line = self.popen.stdout.readline()
        if not line:
            self.popen.wait()
            self.errors.seek(0)
            raise Failed(f"{self.commit[:12]}: the process that measures failed:\n{self.errors.read()[-TAIL:]}")
        return line

    def ready(self):
        self._answer()

    def seconds(self, name):
        self._tell(name)
        return float(self._answer())

    def close(self):
        self.popen.kill()
        self.popen.wait()
        for file in (self.popen.stdin, self.popen.stdout, self.errors):
            with suppress(BrokenPipeError):
                file.close()


@contextmanager
def processes(builds, names, timeout):
    """A `Process` of each of the builds, all at once; they are ended when the time is up, or the ``with`` block is."""
    started, late = [], threading.Event()

    def end():
        late.set()
        for process in started:
            process.popen.kill()

    timer = threading.Timer(timeout, end)
    timer.start()
    try:
        for build in builds:
            started.append(Process(build, names))
        for process in started:
            process.ready()
        yield started
    except Failed:
        if late.is_set():
            raise Failed(f"{builds[0].commit[:12]}: no measurement within {timeout:.0f} s") from None
        raise
    finally:
        timer.cancel()
        for process in started:
            process.close()


def git(repository, *arguments, text=True):
    done = subprocess.run(["git", "-C", str(repository), *arguments], capture_output=True, text=text)
    if done.returncode:
        error = done.stderr if text else done.stderr.decode(errors="replace")
        raise Failed(f"git {' '.join(arguments)}: {error.strip()}")
    return done.stdout


def commit_of(repository, revision):
    try:
        return git(repository, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}").strip()
    except Failed:
        raise Failed(f"{revision}: expected a commit of {repository}") from None


def build(repository, commit, folder, side, change=None, note=print):
    """Install a commit for one side, base or head, of a comparison; a build that is there already is taken again.

    Both sides of a commit that is compared with itself are built. change(source folder): edits it before it is built;
    its ``name`` tells such builds apart.
    """
    versions = sys.version + "".join(importlib.metadata.version(name) for name in ("numpy", "numba", "llvmlite"))
    key = hashlib.sha256(f"{commit} {getattr(change, 'name', '')} {versions}".encode()).hexdigest()[:16]
    target = Path(folder).resolve() / f"{key}-{side}"
    if not (target / "done").exists():
        note(f"building {commit[:12]} ({side}{', ' + change.name if change else ''})")
        shutil.rmtree(target, ignore_errors=True)
        source = target / "source"
        source.mkdir(parents=True)
        with tarfile.open(fileobj=io.BytesIO(git(repository, "archive", commit, text=False))) as archive:
            archive.extractall(source, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        if change is not None:
            change(source)
        install(source, target / "site")
        (target / "done").touch()
    return Build(target, commit)


def install(source, site):
    # In an environment of its own pip would download setuptools; where it is at hand that only takes time.
    try:
        at_hand = int(re.match(r"\d+", importlib.metadata.version("setuptools"))[0]) >= 77
    except importlib.metadata.PackageNotFoundError:
        at_hand = False
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--target",
    ]
    for options in [["--no-build-isolation"]] * at_hand + [[]]:
        shutil.rmtree(site, ignore_errors=True)
        done = subprocess.run([*command, str(site), *options, str(source)], capture_output=True, text=True)
        if done.returncode == 0:
            return
    raise Failed(f"the build failed:\n{(done.stdout + done.stderr)[-TAIL:]}")
