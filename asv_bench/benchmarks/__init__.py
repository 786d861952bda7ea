"""What asv times from commit to commit, and the gate on two of them. `common` says what all benchmarks share."""

import os

# Read when NumPy is imported: its products would start threads of their own.
os.environ |= {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
