"""What the gate found, for a terminal, for a pull request and for machines."""

import json
import platform
import time
from dataclasses import asdict

HEADLINES = {
    0: "no regression",
    1: "REGRESSION",
    2: "inconclusive: too noisy",
    3: "nothing was measured, or not everything",
}
ORDER = ("slower", "too noisy", "faster", "same")


def ordered(outcome):
    return sorted(outcome.results, key=lambda r: (ORDER.index(r.verdict), -r.estimate.log_ratio))


def percent(ratio):
    return f"{(ratio - 1) * 100:+.1f} %"


def row(result):
    """What stands under `TITLES`: change is head's time by base's, noise what it may look like where there is none."""
    found = result.estimate
    low, high = found.interval()
    base, head = (f"{result.seconds[side] * 1e6:.1f} us" for side in ("base", "head"))
    verdict = result.verdict + (", measured again" if result.confirmed else "")
    noise = f"±{found.width() / 2 * 100:.1f} %"
    return (
        result.name,
        base,
        head,
        percent(found.ratio),
        f"{percent(low)} to {percent(high)}",
        noise,
        str(found.processes),
        verdict,
    )


TITLES = ("benchmark", "base", "head", "change", "95 % interval", "noise", "processes", "verdict")


def remarks(outcome):
    """What else there is to say, a line each."""
    if outcome.failure:
        yield f"failed: {outcome.failure}"
    for side, broken in outcome.broken.items():
        for name, why in broken.items():
            yield f"broken in {side}: {name}: {why}"
    for side, names in outcome.only.items():
        for name in names:
            yield f"not compared, only in {side}: {name}"


def headline(outcome):
    counts = [(sum(r.verdict == verdict for r in outcome.results), verdict) for verdict in ORDER]
    found = ", ".join(f"{count} {verdict}" for count, verdict in counts if count)
    return (
        f"{HEADLINES[outcome.status]} ({found or 'no results'}; {outcome.processes} processes, {outcome.seconds:.0f} s)"
    )


def text(outcome):
    rows = [TITLES, *map(row, ordered(outcome))] if outcome.results else []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(r, widths, strict=True)).rstrip() for r in rows]
    return "\n".join([*lines, *remarks(outcome), headline(outcome)])


def markdown(outcome, rules, commits):
    def table(results):
        lines = [TITLES, ("---", *("---:",) * 6, "---"), *map(row, results)]
        return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]

    named = " and ".join(f"{side} `{commit[:12]}`" for side, commit in commits.items())
    lines = [f"### Speed: {headline(outcome)}", ""]
    lines += [f"{named}; a slowdown of {rules.budget:.0%} is found, one of less than half of that is not reported.", ""]
    notable = [r for r in ordered(outcome) if r.verdict != "same"]
    if notable:
        lines += [*table(notable), ""]
    for remark in remarks(outcome):
        first, *rest = remark.splitlines()
        lines += [f"- {first}", *(["", "  ```", *(f"  {line}" for line in rest), "  ```"] if rest else [])]
    if outcome.results:
        lines += ["", "<details><summary>All benchmarks</summary>", "", *table(ordered(outcome)), "", "</details>"]
    return "\n".join(lines) + "\n"


def as_json(outcome, rules, commits):
    results = [
        {
            "name": result.name,
            "verdict": result.verdict,
            "ratio": result.estimate.ratio,
            "interval": result.estimate.interval(),
            "noise": result.estimate.width() / 2,
            "processes": result.estimate.processes,
            "confirmed": result.confirmed,
            "seconds": result.seconds,
        }
        for result in ordered(outcome)
    ]
    report = {
        "status": outcome.status,
        "headline": headline(outcome),
        "commits": commits,
        "rules": asdict(rules),
        "results": results,
        "only": outcome.only,
        "broken": outcome.broken,
        "failure": outcome.failure,
        "processes": outcome.processes,
        "seconds": outcome.seconds,
        "date": time.strftime("%Y-%m-%d %H:%M %z"),
        "machine": platform.platform(),
    }
    return json.dumps(report, indent=1) + "\n"
