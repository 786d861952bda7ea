"""The tile's shape."""

import numpy as np
from fastrnn.kernels import tile, vector


def test_a_tile_fits_the_registers():
    """Three quarters hold sums: what is left must do for the factors."""
    assert 4 * tile.ROWS * tile.VECS <= 3 * vector.REGISTERS
    assert (
        vector.LANES_OF[np.dtype(np.float32)] == 2 * vector.LANES_OF[np.dtype(np.float64)] == vector.VECTOR_BYTES // 4
    )
