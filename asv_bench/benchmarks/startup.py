"""What a new process waits for: the import, and the first call, compiled anew or read from the disk."""

import os
import shutil
import subprocess
import sys
import tempfile

FIRST_CALL = """
import time
begin = time.perf_counter()
import numpy as np, fastrnn
layer, x = fastrnn.{cell}(16, 32, seed=0), np.ones((5, 4, 16), np.float32)
(y, _), pullback = layer.vjp(x)
pullback(y)
layer(x)
print(time.perf_counter() - begin)
"""


class Import:
    repeat, number, rounds, timeout = 5, 1, 1, 120

    def timeraw_import(self):
        return "import fastrnn"


class FirstCall:
    """From the interpreter's start to a layer's first inference and training, in seconds."""

    params = (["RNN", "LSTM", "GRU"],)
    param_names = ("cell",)
    timeout = 300
    unit = "seconds"

    def setup(self, cell):
        import fastrnn

        if not hasattr(fastrnn, cell):
            raise NotImplementedError(f"{cell}: not in this commit")
        self.cache = tempfile.mkdtemp(prefix="first-call-")

    def teardown(self, cell):
        shutil.rmtree(self.cache, ignore_errors=True)

    def seconds(self, cell):
        environment = {**os.environ, "NUMBA_CACHE_DIR": self.cache, "FASTRNN_NUM_THREADS": "1"}
        command = [sys.executable, "-c", FIRST_CALL.format(cell=cell)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=200)
        return float(done.stdout)

    def track_cold(self, cell):
        """With nothing compiled."""
        return self.seconds(cell)

    def track_warm(self, cell):
        """With everything read from the disk: the least of five."""
        self.seconds(cell)
        return min(self.seconds(cell) for _ in range(5))
