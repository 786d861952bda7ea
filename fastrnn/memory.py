"""Memory for the kernels' large buffers, used again: pages fresh from the system cost more than many a call."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .kernels.gemm import before_a_line

# Bytes. Smaller buffers come from NumPy: of those the C library keeps enough.
WORTH_KEEPING = 2**20
# Bytes that nobody uses and that are kept all the same, at most: past them, what was given back first goes.
MOST_KEPT = 2**29
# Numbers from which on a buffer begins on a cache line, so that no vector of it straddles two.
WORTH_ALIGNING = 4096

# Blocks that nobody uses, by id, as they were given back. Whoever pops one has it: threads need no lock. Only blocks
# are listed: to make pairs could start a garbage collection, and that could give back another meanwhile.
_kept: dict[int, NDArray[np.uint8]] = {}


class _Lent:
    """A block in use. Arrays made of it hold this, and no array holds the block: with the last one, it comes back."""

    def __init__(self, block: NDArray[np.uint8]):
        self.block, self.__array_interface__ = block, block.__array_interface__

    # At the interpreter's end a module's names may be gone, but not a default argument.
    def __del__(self, kept: dict[int, NDArray[np.uint8]] = _kept, most: int = MOST_KEPT) -> None:
        kept[id(self.block)] = self.block
        blocks = [*kept.values()]
        too_much = sum(block.nbytes for block in blocks) - most
        for block in blocks:
            if too_much > 0 and kept.pop(id(block), None) is not None:
                too_much -= block.nbytes


def _block(size: int) -> NDArray[np.uint8]:
    """A block of at least so many bytes: the smallest of those kept, unless it is more than a quarter larger."""
    fitting = [block for block in [*_kept.values()] if size <= block.nbytes <= 1.25 * size]
    for block in sorted(fitting, key=lambda block: block.nbytes):
        if _kept.pop(id(block), None) is not None:  # no other thread took it
            return block
    try:
        return np.empty(size, np.uint8)
    except MemoryError:
        _kept.clear()
        return np.empty(size, np.uint8)


def empty(count: int, dtype: np.dtype) -> NDArray[Any]:
    """An uninitialised array; a large one in memory that earlier arrays were in."""
    if count < WORTH_ALIGNING:
        return np.empty(count, dtype)
    size = (count + 64 // dtype.itemsize) * dtype.itemsize
    block = np.empty(size, np.uint8) if size < WORTH_KEEPING else np.asarray(_Lent(_block(size)))
    memory = block[:size].view(dtype)
    offset = before_a_line(memory)
    return memory[offset : offset + count]
