"""The most memory that a process has needed, and of it what a training step asks NumPy for."""

import tracemalloc

from .common import CELLS, Case, pin, skipped_where_missing

SHAPE = (200, 32, 256, 256)


class Peak:
    params = CELLS
    param_names = ("cell",)
    timeout = 300

    def setup(self, cell):
        pin(1)
        with skipped_where_missing():
            self.case = Case(cell, SHAPE)

    def peakmem_inference(self, cell):
        self.case.infer()

    def peakmem_training(self, cell):
        self.case.train()

    def track_arrays_of_training(self, cell):
        """Beside the layer, x and dy."""
        self.case.train()
        tracemalloc.start()
        self.case.train()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak

    track_arrays_of_training.unit = "bytes"
