"""Is a commit slower than another? Exit status 0: no, 1: yes, 2: too noisy to say, 3: nothing could be measured.

    python -m asv_bench.gate --base main

builds both commits first, each with a cache of its own, and compiles. Then blocks of four processes, base head head
base, take turns at every benchmark, beside a control, a loop that never changes. Noise is what processes of one commit
differ by, in this session. A benchmark that looks slower is measured again in new processes, and judged by those
alone. `gate_statistics` has the arithmetic, `Rules` the thresholds.
"""

import argparse
import math
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from . import gate_builds, gate_report
from .gate_builds import Failed
from .gate_statistics import Estimate, estimate, within_block
from .gate_worker import CONTROL

ROOT = Path(__file__).resolve().parent.parent
SIDES = ("base", "head")
NO_REGRESSION, REGRESSION, INCONCLUSIVE, NOT_MEASURED = range(4)
SECONDS_TO_COMPILE = 1800.0
BLOCK = ("base", "head", "head", "base")
# Turns of a block: so many of each benchmark and, of few benchmarks, more.
TURNS, MOST_TURNS, TURNS_IN_ALL = 12, 48, 240


@dataclass(frozen=True)
class Rules:
    """Thresholds as parts of the budget, and how long to measure.

    A slowdown of the whole budget is found, one of less than half of it is not reported.
    """

    budget: float = 0.05
    suspicious: float = 0.4
    guilty: float = 0.6
    confidence: float = 0.99
    # Blocks in the first round and, of suspects, in the second; more while noise is wider than so much of the budget.
    first: tuple[int, int, float] = (3, 12, 1.0)
    second: tuple[int, int, float] = (4, 12, 0.6)
    first_share_of_time: float = 0.6

    def of_budget(self, part: float) -> float:
        return part * math.log1p(self.budget)

    def too_noisy(self, found: Estimate, part: float = 1.0) -> bool:
        return found.width() > self.of_budget(part)

    def suspects(self, found: Estimate) -> bool:
        return found.log_ratio >= self.of_budget(self.suspicious)

    def verdict(self, found: Estimate, confirmed: bool) -> str:
        if confirmed and found.log_ratio >= self.of_budget(self.guilty) and found.bound(self.confidence) > 0:
            return "slower"
        if self.too_noisy(found) or (self.suspects(found) and not confirmed):
            return "too noisy"
        return "faster" if found.log_ratio <= -self.of_budget(self.guilty) else "same"


@dataclass
class Result:
    name: str
    verdict: str
    estimate: Estimate
    seconds: dict[str, float]
    confirmed: bool


@dataclass
class Outcome:
    results: list[Result] = field(default_factory=list)
    # Benchmarks of one side only, and why others raise, for each side.
    only: dict[str, list[str]] = field(default_factory=lambda: {side: [] for side in SIDES})
    broken: dict[str, dict[str, str]] = field(default_factory=lambda: {side: {} for side in SIDES})
    failure: str = ""
    processes: int = 0
    seconds: float = 0.0

    @property
    def status(self) -> int:
        verdicts = {result.verdict for result in self.results}
        if "slower" in verdicts:
            return REGRESSION
        # What head no longer has is not measured; what is new in head has nothing to be compared with.
        if self.failure or self.broken["head"] or self.only["base"] or not self.results:
            return NOT_MEASURED
        return INCONCLUSIVE if "too noisy" in verdicts else NO_REGRESSION


# measure(names) starts a block's processes; of each name, and the control, it gives their seconds, (turns, 4).
Measure = Callable[[list[str]], dict[str, list[list[float]]]]


@dataclass
class Found:
    """Of a benchmark: what `within_block` says of each block, and the least seconds of each side."""

    blocks: list[tuple[float, list[float]]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SIDES, math.inf))

    @property
    def known(self) -> bool:
        return len(self.blocks) >= 2

    def add(self, turns: list[list[float]], control: list[list[float]]) -> None:
        self.blocks.append(within_block(turns, control))
        for side, *seconds in zip(BLOCK, *turns, strict=True):
            self.seconds[side] = min(self.seconds[side], *seconds)


def estimate_of(found: Found, before: Found | None = None) -> Estimate:
    """Of what was found; what was found ``before`` tells of noise, and of nothing else."""
    return estimate(found.blocks, before.blocks if before else ())


class Session:
    """Blocks of processes, and what they found, until the time is up."""

    def __init__(self, measure: Measure, rules: Rules, seconds: float, clock: Callable[[], float] = time.monotonic):
        self.measure, self.rules, self.clock = measure, rules, clock
        self.begin, self.end, self.longest = clock(), clock() + seconds, 0.0

    def block(self, names: list[str], found: dict[str, Found]) -> None:
        begin = self.clock()
        measured = self.measure(names)
        for name in names:
            found[name].add(measured[name], measured[CONTROL])
        self.longest = max(self.longest, self.clock() - begin)

    def round(
        self,
        names: list[str],
        limits: tuple[int, int, float],
        end: float,
        found: dict[str, Found],
        before: dict[str, Found] | None = None,
    ) -> None:
        """Measure, beside what has been found, as many blocks as the rules ask for and the time allows."""
        fewest, most, part = limits
        while True:
            blocks = {name: len(found[name].blocks) for name in names}
            names = [
                name
                for name, n in blocks.items()
                if n < fewest
                or (n < most and self.rules.too_noisy(estimate_of(found[name], before and before[name]), part))
            ]
            # A block that would go on past the end is not begun; two are the least that says anything.
            two = all(blocks[name] >= 2 for name in names)
            if not names or self.clock() + self.longest > (end if two else self.end):
                break
            self.block(names, found)

    def results(self, names: list[str]) -> list[Result]:
        first, second = ({name: Found() for name in names} for _ in range(2))
        first_end = self.begin + self.rules.first_share_of_time * (self.end - self.begin)
        self.round(names, self.rules.first, first_end, first)
        suspects = [name for name in names if first[name].known and self.rules.suspects(estimate_of(first[name]))]
        self.round(suspects, self.rules.second, self.end, second, first)
        # What is still noisy has the time that suspects have left.
        self.round([name for name in names if name not in suspects], self.rules.first, self.end, first)
        results = []
        for name in names:
            confirmed = second[name].known
            found, before = (second[name], first[name]) if confirmed else (first[name], None)
            if found.known:
                estimated = estimate_of(found, before)
                results.append(
                    Result(name, self.rules.verdict(estimated, confirmed), estimated, found.seconds, confirmed)
                )
        return results


def compare(builds: dict[str, gate_builds.Build], names: list[str], rules: Rules, seconds: float, turns: int = TURNS):
    """The `Outcome` of a gate on two builds."""
    outcome, begin = Outcome(), time.monotonic()
    checked = {side: build.run(names, "--check", timeout=SECONDS_TO_COMPILE) for side, build in builds.items()}
    ready = {side: set(report["ready"]) for side, report in checked.items()}
    both = [name for name in names if name in ready["base"] & ready["head"]]
    for side, other in zip(SIDES, SIDES[::-1], strict=True):
        outcome.only[side] = sorted(ready[side] & set(checked[other]["missing"]))
    outcome.broken = {side: report["broken"] for side, report in checked.items()}

    def measure(names: list[str]) -> dict[str, list[list[float]]]:
        outcome.processes += len(BLOCK)
        found: dict[str, list[list[float]]] = {name: [] for name in (CONTROL, *names)}
        with gate_builds.processes([builds[side] for side in BLOCK], names, max(120.0, seconds)) as block:
            for turn in range(max(turns, min(TURNS_IN_ALL // len(names), MOST_TURNS * turns // TURNS))):
                # Base and head take turns at being the first.
                order = (1, 0, 3, 2) if turn % 2 else (0, 1, 2, 3)
                for name, of_name in found.items():
                    timed = {i: block[i].seconds(name) for i in order}
                    of_name.append([timed[i] for i in range(len(BLOCK))])
        return found

    try:
        outcome.results = Session(measure, rules, seconds).results(both)
    except Failed as failure:
        outcome.failure = str(failure)
    outcome.seconds = time.monotonic() - begin
    return outcome


def share(text: str) -> float:
    """``5%`` or ``0.05``."""
    number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if not 0 < number < 1:
        raise ValueError
    return number


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, metavar="REV", help="the commit to compare with")
    parser.add_argument("--head", default="HEAD", metavar="REV", help="the commit to judge (default: HEAD)")
    parser.add_argument("--budget", type=share, default=0.05, metavar="5%%", help="the slowdown to find (default: 5%%)")
    parser.add_argument("--only", metavar="REGEX", help="benchmarks whose names it is found in, of all; see --list")
    parser.add_argument(
        "--time-limit", type=float, default=900, metavar="S", help="seconds of measuring, once all is built (900)"
    )
    parser.add_argument("--quick", action="store_true", help="a few short processes: does it work? It says little else")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write a summary for a pull request")
    parser.add_argument("--builds", type=Path, default=ROOT / "asv_bench" / "env" / "gate", metavar="DIR")
    parser.add_argument("--repository", type=Path, default=ROOT, metavar="DIR", help="of the commits (default: this)")
    parser.add_argument("--list", action="store_true", help="print the benchmarks' names and do nothing else")
    return parser


QUICK = {"first": (2, 2, 1.0), "second": (2, 2, 1.0)}


def chosen(build: gate_builds.Build, only: str | None) -> list[str]:
    """Names of the benchmarks that are meant for the gate or, if given a pattern, of all that it is found in."""
    names = build.run([], "--names", timeout=SECONDS_TO_COMPILE)["names"]
    found = [name for name, in_gate in names if (in_gate if only is None else re.search(only, name))]
    if not found:
        raise Failed(f"--only {only}: no benchmark has such a name")
    return found


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    rules = Rules(options.budget, **(QUICK if options.quick else {}))
    commits: dict[str, str] = {}
    try:
        commits = {side: gate_builds.commit_of(options.repository, getattr(options, side)) for side in SIDES}
        builds = {side: gate_builds.build(options.repository, c, options.builds, side) for side, c in commits.items()}
        names = chosen(builds["head"], options.only)
        if options.list:
            print(*names, sep="\n")
            return NO_REGRESSION
        print(f"compiling, then measuring {len(names)} benchmarks", flush=True)
        outcome = compare(builds, names, rules, options.time_limit, 2 if options.quick else TURNS)
    except Failed as failure:
        outcome = Outcome(failure=str(failure))
    print(gate_report.text(outcome))
    if options.json:
        options.json.write_text(gate_report.as_json(outcome, rules, commits))
    if options.markdown:
        options.markdown.write_text(gate_report.markdown(outcome, rules, commits))
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
