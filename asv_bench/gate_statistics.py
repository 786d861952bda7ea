"""What the gate makes of its measurements: a ratio, and how sure it is of it.

A block is four processes that are alive at once, base head head base, and take turns on one CPU: within milliseconds
all four have timed a benchmark, and what slows the machine for longer slows them alike. So a turn's ratios are sound
where its times are not, and of a block's turns the median counts, less the control's, which no commit changes. The two
processes of one commit differ by noise alone, whatever head has changed: from that, in this session, comes what the
comparison of head with base may differ by.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """Of the logarithm of head's time by base's, from so many processes."""

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


def within_block(turns, control):
    """Logarithms of a block's ratios: of head by base, and two of one commit by itself.

    turns, control: seconds (turns, 4) of the processes base, head, head, base.
    """
    base, head, head_again, base_again = range(4)
    logs = [np.log(np.asarray(seconds, float)) for seconds in (turns, control)]
    change, *same = (
        np.subtract(*(np.median(compared(x), 0) for x in logs))
        for compared in (
            lambda x: (x[:, head] + x[:, head_again] - x[:, base] - x[:, base_again]) / 2,
            lambda x: x[:, base_again] - x[:, base],
            lambda x: x[:, head_again] - x[:, head],
        )
    )
    return float(change), [float(x) for x in same]


def estimate(blocks, others=()):
    """The `Estimate` from what `within_block` says of blocks, of two or more; of ``others`` only noise counts."""
    changes = [change for change, _ in blocks]
    same = [same for _, same in (*blocks, *others)]
    # The mean of two processes less that of two others varies half as much as one less another.
    error = math.sqrt(np.square(same).mean() / 2 / len(changes))
    return Estimate(float(np.mean(changes)), error, 2 * len(same), 4 * len(changes))


def student_quantile(probability, freedom):
    """Student's t: Cornish and Fisher's expansion, within 1 % from 4 degrees of freedom on."""
    z, total = NormalDist().inv_cdf(probability), 0.0
    # Powers of z from z on, of which every other one occurs, and the divisor; one row for each power of 1 / freedom.
    rows = [((1,), 1), ((1, 1), 4), ((3, 16, 5), 96), ((-15, 17, 19, 3), 384), ((-945, -1920, 1482, 776, 79), 92160)]
    for power, (coefficients, divisor) in enumerate(rows):
        total += sum(c * z ** (2 * k + 1) for k, c in enumerate(coefficients)) / divisor / freedom**power
    return total
