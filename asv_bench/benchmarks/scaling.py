"""How the cost grows: the exponent p of time ~ n**p, fitted by least squares over a range of n.

In T it is 1, or a little less where a call's own cost still counts; in B at most 1; in H between 1 and 2.
"""

import time

import numpy as np

from . import limits
from .common import CELLS, Case, pin, skipped_where_missing

# What grows, and the shapes T, B, I, H.
RANGES = {
    "T": [(T, 4, 64, 64) for T in (64, 128, 256, 512, 1024)],
    "B": [(16, B, 64, 64) for B in (8, 16, 32, 64, 128)],
    "H": [(8, 16, H, H) for H in (64, 128, 256, 512)],
}


class Exponent:
    params = (CELLS, list(RANGES))
    param_names = ("cell", "size")
    timeout = 300
    unit = "exponent"

    def setup(self, cell, size):
        pin(1)
        with skipped_where_missing():
            self.cases = [Case(cell, shape) for shape in RANGES[size]]
        self.sizes = [shape["TBIH".index(size)] for shape in RANGES[size]]

    def exponent(self, calls):
        samplers = [limits.Sampler(call, time.thread_time) for call in calls]
        seconds = np.min([[sampler.sample() for sampler in samplers] for _ in range(10)], axis=0)
        return float(np.polyfit(np.log(self.sizes), np.log(seconds), 1)[0])

    def track_inference(self, cell, size):
        return self.exponent([case.infer for case in self.cases])

    def track_training(self, cell, size):
        return self.exponent([case.train for case in self.cases])
