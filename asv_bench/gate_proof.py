"""Does the gate find a slowdown, and only then? Many gates on one commit, half of them with a slowdown planted in it.

    python -m asv_bench.gate_proof --gates 20 --plant 5% --log proof.log

plants a slowdown of known size in one kernel of a scratch copy: at its end the kernel waits, by the CPU's own counter,
for such a share of the time that it took. Builds are made once. Then gates of the commit with its planted copy and of
the commit with itself take turns, each with measurements and noise of its own; the log has a line for each and, at
the end, the rates. Exit status 0: at least 19 of 20 found it, in the kernel's benchmark, and at most 1 of 20 found
something where there is nothing.
"""

import argparse
import json
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from . import gate, gate_builds, gate_report

# Appended to a module of kernels: from then on the name stands for the kernel and a wait.
PLANTED = """

from llvmlite import ir as _ir
from numba import types as _types
from numba.extending import intrinsic as _intrinsic

from .compiler import kernel as _kernel


@_intrinsic
def _cycles(typing):
    def codegen(context, builder, signature, args):
        kind = _ir.FunctionType(_ir.IntType(64), [])
        return builder.call(builder.module.declare_intrinsic("llvm.readcyclecounter", (), kind), [])

    return _types.int64(), codegen


_without_plant = {kernel}


@_kernel
def {kernel}(*arguments):
    begin = _cycles()
    _without_plant(*arguments)
    end = _cycles()
    while _cycles() - end < (end - begin) * {share}:
        pass
"""


@dataclass(frozen=True)
class Plant:
    """A change of sources: ``kernel``, as "lstm.forward", takes so much longer, a share of its own time."""

    kernel: str
    share: float

    @property
    def name(self):
        return f"{self.kernel} slower by {self.share:.2%}"

    def __call__(self, source):
        module, _, kernel = self.kernel.partition(".")
        file = Path(source) / "kernels" / f"{module}.py"
        if not file.exists():
            raise gate_builds.Failed(f"--kernel {self.kernel}: there is no {file.name} among the kernels")
        with file.open("a") as code:
            code.write(PLANTED.format(kernel=kernel, share=self.share))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gates", type=int, default=20, metavar="N", help="gates of each kind (default: 20)")
    parser.add_argument("--plant", type=gate.share, default=0.05, metavar="5%%", help="the slowdown (default: 5%%)")
    parser.add_argument("--kernel", default="lstm.forward", metavar="MODULE.NAME", help="where (default: lstm.forward)")
    parser.add_argument(
        "--expect", default="kernels.Cell.infer(LSTM, float32, batch)", metavar="NAME", help="the benchmark to fail"
    )
    parser.add_argument(
        "--only", default=r"kernels.Cell.*\((LSTM|GRU), float32", metavar="REGEX", help="benchmarks of each gate"
    )
    parser.add_argument("--revision", default="HEAD", metavar="REV")
    parser.add_argument("--budget", type=gate.share, default=0.05, metavar="5%%")
    parser.add_argument("--time-limit", type=float, default=90, metavar="S", help="seconds of each gate (default: 90)")
    parser.add_argument("--log", type=Path, default=Path("gate_proof.log"), metavar="FILE")
    parser.add_argument("--builds", type=Path, default=gate.ROOT / "asv_bench" / "env" / "gate", metavar="DIR")
    parser.add_argument("--repository", type=Path, default=gate.ROOT, metavar="DIR")
    options = parser.parse_args(arguments)
    rules = gate.Rules(options.budget)

    def note(line):
        print(line, flush=True)
        with options.log.open("a") as log:
            log.write(line + "\n")

    commit = gate_builds.commit_of(options.repository, options.revision)

    def built(side, change=None):
        return gate_builds.build(options.repository, commit, options.builds, side, change, note)

    base = built("base")
    kinds = {"planted": built("head", Plant(options.kernel, options.plant)), "nothing": built("head")}
    names = gate.chosen(base, options.only)
    if options.expect not in names:
        raise SystemExit(f"--expect: expected one of {len(names)} benchmarks, got {options.expect}")
    found = {kind: [] for kind in kinds}
    note(
        f"{time.strftime('%Y-%m-%d %H:%M %z')} {platform.platform()}: {commit[:12]}, {len(names)} benchmarks, {options}"
    )
    for i in range(options.gates):
        for kind, head in kinds.items():
            outcome = gate.compare({"base": base, "head": head}, names, rules, options.time_limit)
            slower = {r.name: r.estimate.ratio for r in outcome.results if r.verdict == "slower"}
            expected = [r for r in outcome.results if r.name == options.expect]
            ratio = expected[0].estimate.ratio if expected else float("nan")
            found[kind].append({"status": outcome.status, "slower": slower, "expected": ratio})
            note(
                f"{time.strftime('%H:%M:%S')} {i + 1}/{options.gates} {kind}: {gate_report.headline(outcome)}; "
                f"expected one {gate_report.percent(ratio)}; slower: {json.dumps(slower)}"
            )
    right = sum(options.expect in each["slower"] for each in found["planted"])
    wrong = sum(each["status"] == gate.REGRESSION for each in found["nothing"])
    unsure = {kind: sum(each["status"] == gate.INCONCLUSIVE for each in all_) for kind, all_ in found.items()}
    note(
        f"{time.strftime('%Y-%m-%d %H:%M %z')} {options.plant:.1%} planted in {options.kernel}: found in {right} of "
        f"{options.gates} gates; nothing planted: {wrong} of {options.gates} failed; inconclusive: {unsure}"
    )
    return 0 if right >= 0.95 * options.gates and wrong <= 0.05 * options.gates else 1


if __name__ == "__main__":
    sys.exit(main())
