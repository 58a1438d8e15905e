"""
Runs of computed tokens as bytes, so that they are compared at memory speed: four bytes a token,
behind a header that has the adapter, whether they were computed exactly, and the tenant. So runs
of two adapters or of two tenants have no common prefix.
"""

import hashlib
import sys
from array import array
from collections.abc import Iterable

import numpy as np

ITEM = array("i").itemsize
_WAY = ITEM  # bytes of the header for adapter and exactness
_TENANT = 4 * ITEM
_HEADER = _WAY + _TENANT
PUBLIC = ""
"""The tenant of runs without any tenant's text: the public heads of prompts."""


def pack(
    adapter: int, tokens: Iterable[int], is_exact: bool = False, tenant: str = PUBLIC
) -> bytes:
    return _way(adapter, is_exact) + _digest(tenant) + packed(tokens)


def packed(tokens: Iterable[int]) -> bytes:
    """Return the tokens in the format of a run, without a header."""
    return array("i", tokens).tobytes()


def adapter(run: bytes | bytearray) -> int:
    """What the run was computed with."""
    return int.from_bytes(run[:_WAY], sys.byteorder) // 2


def is_same_tenant(a: bytes | bytearray, b: bytes | bytearray) -> bool:
    return a[_WAY:_HEADER] == b[_WAY:_HEADER]


def is_same_way(a: bytes | bytearray, b: bytes | bytearray) -> bool:
    """Return whether both were computed with the same adapter and the same exactness."""
    return a[:_WAY] == b[:_WAY]


def begins_with(run: bytes | bytearray, head: bytes) -> bool:
    """Return whether the run's tokens begin with `head`, which is `packed`."""
    return run.startswith(head, _HEADER)


def public(run: bytes | bytearray, head: bytes) -> bytes:
    """Return `head`, which is `packed`, as a public run with the adapter and exactness of `run`."""
    return bytes(run[:_WAY]) + _digest(PUBLIC) + head


def extend(run: bytearray, tokens: Iterable[int]) -> None:
    run += packed(tokens)


def cut(run: bytes | bytearray, length: int) -> bytes:
    """Its first `length` tokens."""
    return bytes(run[: _HEADER + length * ITEM])


def length(run: bytes | bytearray) -> int:
    """In tokens."""
    return max(0, len(run) - _HEADER) // ITEM


def shared(a: bytes | bytearray, b: bytes | bytearray) -> int:
    """
    Return how many tokens both begin with; 0 if adapter, exactness or tenant differ.
    """
    count = min(len(a), len(b)) // ITEM
    differ = np.frombuffer(a, np.int32, count) != np.frombuffer(b, np.int32, count)
    same = int(differ.argmax()) if differ.any() else count
    return max(0, same - _HEADER // ITEM)


def _way(adapter: int, is_exact: bool) -> bytes:
    return packed((2 * adapter + is_exact,))


def _digest(tenant: str) -> bytes:
    return hashlib.sha256(tenant.encode()).digest()[:_TENANT] if tenant else bytes(_TENANT)
