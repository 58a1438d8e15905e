"""Which slots a padded decode step computes."""

from collections.abc import Sequence

SMALL_SIZES = (1, 2, 4, 8)
SIZE = 16  # of larger blocks, or a multiple of it
MAX_ROWS_PER_STREAM = 2


def slot_block(slots: Sequence[int], count: int) -> range | None:
    """
    Return the range of slots, of `count`, that a step computes for streams in these sorted `slots`.
    None if over half of the range would have no stream.

    llama.cpp computes neighbouring slots together. It reuses the graph of a step, and on a GPU the
    recorded kernels, if the next step has the same slots. A block stays the same while streams in
    it begin and end. Kernels of CPUs for repacked weights compute 16 tokens at once.
    """
    first, last = slots[0], slots[-1]
    length = last - first + 1
    size = next((size for size in SMALL_SIZES if size >= length), 0)
    if not size:
        first -= first % SIZE
        size = -(-(last - first + 1) // SIZE) * SIZE
    first = max(0, min(first, count - size))
    block = range(first, min(count, first + size))
    return block if len(block) <= MAX_ROWS_PER_STREAM * len(slots) else None
