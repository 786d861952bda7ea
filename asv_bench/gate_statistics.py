"""What the gate makes of its measurements: a ratio, and how sure it is of it.

Each process gives the logarithm of a benchmark's least time by the control's. Noise only ever slows a process down, and
some far more than others: so of the processes of a commit the fastest third counts, by its mean. Two halves of the
processes of one commit, divided at random, differ by noise alone, whatever head has changed: from that, in this
session, comes what the comparison of head with base may differ by.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

COUNTED = 3  # one process in so many
SPLITS = 60  # of each commit's processes into halves


@dataclass(frozen=True)
class Estimate:
    """Of the logarithm of head's time by base's, from so many processes of each."""

    log_ratio: float
    error: float
    freedom: float
    processes: int

    @property
    def ratio(self):
        return math.exp(self.log_ratio)

    def bound(self, confidence):
        """What the ratio's logarithm is above, with so much confidence."""
        return self.log_ratio - student_quantile(confidence, self.freedom) * self.error

    def interval(self, confidence=0.95):
        """The ratio's confidence interval."""
        half = student_quantile(0.5 + confidence / 2, self.freedom) * self.error
        return math.exp(self.log_ratio - half), math.exp(self.log_ratio + half)

    def width(self, confidence=0.95):
        """How wide that interval is where nothing has changed: what noise alone may look like."""
        return 2 * student_quantile(0.5 + confidence / 2, self.freedom) * self.error


def fastest(numbers):
    """The mean of the least third, and of at least two, along the last axis."""
    numbers = np.sort(numbers, -1)
    return numbers[..., : max(2, round(numbers.shape[-1] / COUNTED))].mean(-1)


def estimate(base, head):
    """The `Estimate` from as many numbers of base as of head, four or more of each."""
    base, head = np.asarray(base, float), np.asarray(head, float)
    n, rng = len(base), np.random.default_rng(0)
    orders = rng.permuted(np.tile(np.arange(n), (SPLITS, 1)), axis=1)
    halves = np.array(
        [fastest(side[orders[:, : n // 2]]) - fastest(side[orders[:, -(n // 2) :]]) for side in (base, head)]
    )
    # Halves differ by more than the wholes do: there are half as many processes.
    error = math.sqrt((halves**2).mean() / 2)
    return Estimate(float(fastest(head) - fastest(base)), error, n - 1, n)


def student_quantile(probability, freedom):
    """Student's t: Cornish and Fisher's expansion, within 1 % from 4 degrees of freedom on."""
    z, total = NormalDist().inv_cdf(probability), 0.0
    # Powers of z from z on, of which every other one occurs, and the divisor; one row for each power of 1 / freedom.
    rows = [((1,), 1), ((1, 1), 4), ((3, 16, 5), 96), ((-15, 17, 19, 3), 384), ((-945, -1920, 1482, 776, 79), 92160)]
    for power, (coefficients, divisor) in enumerate(rows):
        total += sum(c * z ** (2 * k + 1) for k, c in enumerate(coefficients)) / divisor / freedom**power
    return total
