"""
Prefix keys: computed tokens as bytes, so that the prefix cache compares them at memory speed.

A key is a header and four bytes per token. The header has everything besides the tokens that the
KV cache depends on or that forbids sharing: adapter and deterministic prefill (4 bytes), and a
digest of the tenant (16 bytes). Keys with different headers share no prefix.
"""

import hashlib
import sys
from array import array
from collections.abc import Iterable

import numpy as np

TOKEN_BYTES = array("i").itemsize
_MODE_BYTES = TOKEN_BYTES  # adapter and deterministic prefill
_TENANT_BYTES = 4 * TOKEN_BYTES
HEADER_BYTES = _MODE_BYTES + _TENANT_BYTES
# The tenant of keys that contain no tenant's text, such as the system prompt of the server.
PUBLIC = ""

PrefixKey = bytes | bytearray


def pack(
    adapter: int, tokens: Iterable[int], is_deterministic: bool = False, tenant: str = PUBLIC
) -> bytes:
    return _mode(adapter, is_deterministic) + _digest(tenant) + pack_tokens(tokens)


def pack_tokens(tokens: Iterable[int]) -> bytes:
    """Return the tokens as in a key, without a header."""
    return array("i", tokens).tobytes()


def packed_length(tokens: bytes) -> int:
    """Return the number of packed tokens."""
    return len(tokens) // TOKEN_BYTES


def as_public(key: PrefixKey, tokens: bytes) -> bytes:
    """Return packed `tokens` as a public key with the adapter and prefill mode of `key`."""
    return bytes(key[:_MODE_BYTES]) + _digest(PUBLIC) + tokens


def extend(key: bytearray, tokens: Iterable[int]) -> None:
    key += pack_tokens(tokens)


def truncate(key: PrefixKey, length: int) -> bytes:
    """Return the key's first `length` tokens."""
    return bytes(key[: HEADER_BYTES + length * TOKEN_BYTES])


def length(key: PrefixKey) -> int:
    """Return the number of tokens."""
    return max(0, len(key) - HEADER_BYTES) // TOKEN_BYTES


def adapter_of(key: PrefixKey) -> int:
    return int.from_bytes(key[:_MODE_BYTES], sys.byteorder) // 2


def is_same_tenant(a: PrefixKey, b: PrefixKey) -> bool:
    return a[_MODE_BYTES:HEADER_BYTES] == b[_MODE_BYTES:HEADER_BYTES]


def is_public(key: PrefixKey) -> bool:
    """Return whether the key contains no tenant's text."""
    return key[_MODE_BYTES:HEADER_BYTES] == _digest(PUBLIC)


def is_same_mode(a: PrefixKey, b: PrefixKey) -> bool:
    """Return whether both have the same adapter and the same prefill mode."""
    return a[:_MODE_BYTES] == b[:_MODE_BYTES]


def starts_with(key: PrefixKey, tokens: bytes) -> bool:
    """Return whether the key starts with packed `tokens`, whatever its header."""
    return key.startswith(tokens, HEADER_BYTES)


def may_share(key: bytes, other: PrefixKey, length: int) -> bool:
    """
    Return False only if `other` certainly shares fewer than `length` tokens with `key`. Much faster
    than `shared_length`. Keys with different headers may share a public prefix.
    """
    begin = memoryview(key)[: HEADER_BYTES + length * TOKEN_BYTES]
    return other.startswith(begin) or other[:HEADER_BYTES] != key[:HEADER_BYTES]


def shared_length(a: PrefixKey, b: PrefixKey) -> int:
    """Return the length of the common prefix in tokens: 0 if the headers differ."""
    count = min(len(a), len(b)) // TOKEN_BYTES
    differ = np.frombuffer(a, np.int32, count) != np.frombuffer(b, np.int32, count)
    first = int(differ.argmax()) if count else 0  # 0 if none differs
    same = first if count and differ[first] else count
    return max(0, same - HEADER_BYTES // TOKEN_BYTES)


def _mode(adapter: int, is_deterministic: bool) -> bytes:
    return pack_tokens((2 * adapter + is_deterministic,))


def _digest(tenant: str) -> bytes:
    if tenant == PUBLIC:
        return bytes(_TENANT_BYTES)
    return hashlib.sha256(tenant.encode()).digest()[:_TENANT_BYTES]
