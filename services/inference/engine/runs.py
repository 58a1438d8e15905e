"""
Runs of computed tokens as bytes, so that they are compared at memory speed: four bytes a token,
behind four for how they were computed: with which adapter, and whether exactly. So what two
adapters computed has no common beginning.
"""

import sys
from array import array
from collections.abc import Iterable

import numpy as np

ITEM = array("i").itemsize


def pack(adapter: int, tokens: Iterable[int], is_exact: bool = False) -> bytes:
    return array("i", (2 * adapter + is_exact, *tokens)).tobytes()


def adapter(run: bytes | bytearray) -> int:
    """What the run was computed with."""
    return int.from_bytes(run[:ITEM], sys.byteorder) // 2


def extend(run: bytearray, tokens: Iterable[int]) -> None:
    run += array("i", tokens).tobytes()


def cut(run: bytes | bytearray, length: int) -> bytes:
    """Its first `length` tokens."""
    return bytes(run[: (length + 1) * ITEM])


def length(run: bytes | bytearray) -> int:
    """In tokens."""
    return max(0, len(run) // ITEM - 1)


def shared(a: bytes | bytearray, b: bytes | bytearray) -> int:
    """How many tokens both begin with; 0 if they were computed in two ways."""
    count = min(len(a), len(b)) // ITEM
    differ = np.frombuffer(a, np.int32, count) != np.frombuffer(b, np.int32, count)
    same = int(differ.argmax()) if differ.any() else count
    return max(0, same - 1)
