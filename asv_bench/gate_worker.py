"""One process of the gate: times the benchmarks of one build, in turn with the control, and prints JSON.

    python gate_worker.py BUILD [--names | --check | --visits N] < NAMES

NAMES is a JSON list of benchmarks. It is run as a script, so that ``benchmarks`` is found beside it, and ``fastrnn`` in
the build only. The benchmarks and the control are those of the gate's own checkout, whatever commit is measured.
"""

import argparse
import gc
import inspect
import itertools
import json
import os
import statistics
import sys
import time
from functools import cache, partial
from importlib import import_module
from pathlib import Path

MODULES = ("kernels", "layers", "training", "decoding")
# Of each benchmark in a visit, after one of the control.
SAMPLES = 5


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


def measure(makers, visits):
    """The least seconds of each, and of the control: a loop that is bound by the multiply-add units.

    Visits go round, so that what slows the machine for a while slows one visit of many benchmarks, and not all of one.
    The control is sampled beside each benchmark, and of the least beside each the median is taken.
    """
    limits = import_module("benchmarks.limits")
    control = limits.Sampler(limits.MultiplyAdds("float32"), time.thread_time)
    samplers = {name: make() for name, make in makers.items()}
    seconds, beside = (dict.fromkeys(samplers, float("inf")) for _ in range(2))
    gc.collect()
    gc.disable()
    for _ in range(visits):
        for name, sampler in samplers.items():
            beside[name] = min(beside[name], control.sample())
            seconds[name] = min(seconds[name], *(sampler.sample() for _ in range(SAMPLES)))
    return {"control": statistics.median(beside.values()), "seconds": seconds}


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
    parser.add_argument("--visits", type=int, default=1, metavar="N")
    parser.add_argument(
        "--names", action="store_true", help="only list all benchmarks, and whether the gate takes them"
    )
    parser.add_argument("--check", action="store_true", help="only set them up and call them, and say which can be")
    arguments, names = parser.parse_args(), json.load(sys.stdin)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    import fastrnn

    if not Path(fastrnn.__file__).resolve().is_relative_to(arguments.build.resolve()):
        raise SystemExit(f"fastrnn: expected the one in {arguments.build}, got {fastrnn.__file__}")
    chosen = {name: make for name, make, _ in all_benchmarks() if name in names}
    if arguments.names:
        report = {"names": [[name, in_gate] for name, _, in_gate in all_benchmarks()]}
    elif arguments.check:
        report = check(chosen)
    else:
        report = measure(chosen, arguments.visits)
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
