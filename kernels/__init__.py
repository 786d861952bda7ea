"""The Numba kernels: they know arrays, addresses and integers only."""
