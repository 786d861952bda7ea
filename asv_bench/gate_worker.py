"""One process of the gate: times the benchmarks of one build when it is asked to, and prints JSON.

    python gate_worker.py BUILD [--names | --check] < NAMES

NAMES is a JSON list of benchmarks on a line. Without an option their names follow, a line each, and each is answered by
the seconds of a call. It is run as a script, so that ``benchmarks`` is found beside it, and ``fastrnn`` in
the build only. The benchmarks and the control are those of the gate's own checkout, whatever commit is measured.
"""

import argparse
import gc
import inspect
import itertools
import json
import os
import sys
import time
from functools import cache, partial
from importlib import import_module
from pathlib import Path

MODULES = ("kernels", "layers", "training", "decoding")
# Of these, taken when a benchmark's turn comes, the least counts.
SAMPLES = 2
# A loop that is bound by the multiply-add units, the same whatever commit is measured.
CONTROL = "control"


def all_benchmarks():
    """Triples ``name, make, in_gate`` of everything that the benchmarks time. make() returns a `limits.Sampler`."""
    common = import_module("benchmarks.common")
    for module in MODULES:
        found = import_module(f"benchmarks.{module}")
        for name, benchmark in vars(found).items():
            if not inspect.isclass(benchmark) or not issubclass(benchmark, common.Timed) or name.startswith("_"):
                continue
            if benchmark.__module__ != found.__name__ or benchmark.threads > 1:
                continue
            params = benchmark.params if isinstance(benchmark.params, tuple) else (benchmark.params,)
            for values in itertools.product(*params):
                prepared = cache(partial(_prepared, benchmark, values))
                for timed in benchmark.names():
                    label = f"{module}.{name}.{timed}({', '.join(map(str, values))})"
                    yield label, lambda timed=timed, prepared=prepared: prepared().samplers[timed], benchmark.in_gate


def _prepared(benchmark, values):
    made = benchmark()
    made.setup(*values)
    return made


def serve(makers, questions):
    """Answer each question, a benchmark's name or `CONTROL`, by the least seconds of a call in some samples."""
    limits = import_module("benchmarks.limits")
    # A block's processes get ready side by side; then they share one CPU.
    samplers = {name: _anywhere(make) for name, make in makers.items()}
    samplers[CONTROL] = limits.Sampler(limits.MultiplyAdds("float32"), time.thread_time)
    _pin()
    gc.collect()
    gc.disable()
    print("ready", flush=True)
    for question in questions:
        sampler = samplers[question.strip()]
        if sampler.calls > 1:  # another process had the caches
            sampler.call()
        print(min(sampler.sample() for _ in range(SAMPLES)), flush=True)


def _pin():
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def _anywhere(make):
    """``make()``, which pins the process, undone."""
    if not hasattr(os, "sched_setaffinity"):
        return make()
    cpus = os.sched_getaffinity(0)
    made = make()
    os.sched_setaffinity(0, cpus)
    return made


def check(makers):
    """Which are ready, which are of other commits only, and which raise."""
    report = {"ready": [], "missing": {}, "broken": {}}
    for name, make in makers.items():
        try:
            make().sample()
            report["ready"].append(name)
        except NotImplementedError as error:
            report["missing"][name] = str(error)
        except Exception as error:
            report["broken"][name] = f"{type(error).__name__}: {error}"
    return report


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path)
    parser.add_argument(
        "--names", action="store_true", help="only list all benchmarks, and whether the gate takes them"
    )
    parser.add_argument("--check", action="store_true", help="only set them up and call them, and say which can be")
    arguments, names = parser.parse_args(), json.loads(sys.stdin.readline())
    import fastrnn

    if not Path(fastrnn.__file__).resolve().is_relative_to(arguments.build.resolve()):
        raise SystemExit(f"fastrnn: expected the one in {arguments.build}, got {fastrnn.__file__}")
    chosen = {name: make for name, make, _ in all_benchmarks() if name in names}
    if arguments.names:
        json.dump({"names": [[name, in_gate] for name, _, in_gate in all_benchmarks()]}, sys.stdout)
    elif arguments.check:
        json.dump(check(chosen), sys.stdout)
    else:
        serve(chosen, sys.stdin)


if __name__ == "__main__":
    main()
