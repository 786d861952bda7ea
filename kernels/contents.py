"""Whether the contents of memory have changed that others write to without saying so."""

import numpy as np

from .compiler import kernel, part
from .vector import at, pointer

# Sums that run side by side, so that they are vectors of which none waits for another.
LANES = 256
# Odd, so that no two words give one product.
FACTOR = np.uint32(0x9E3779B1)
TURN = np.uint32(15)


@part
def _mixed(total, word):
    """Products carry a change upwards only: turned, what changes at the top (a sign, an exponent) is carried, too."""
    both = np.uint32(total ^ word)
    return np.uint32(both << TURN | both >> np.uint32(32 - TURN)) * FACTOR


@kernel
def add(places, sums):
    """Add the contents of memory to its sums.

    places int64 (n, 2): addresses, and how many words of four bytes to read from each on.
    sums uint32 (`LANES`): written; every LANES-th word of a place is mixed into each (`_mixed`).

    One changed word always changes its sum. Several in one lane leave it as it was once in 2**32 times.
    """
    lanes = at(sums, 0)
    for place in range(len(places)):
        words, n = pointer(places[place, 0], sums), places[place, 1]
        whole = n // LANES * LANES
        for first in range(0, whole, LANES):
            for j in range(LANES):
                lanes[j] = _mixed(lanes[j], words[first + j])
        for j in range(n - whole):
            lanes[j] = _mixed(lanes[j], words[whole + j])
