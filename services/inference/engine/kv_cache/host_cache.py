"""Host KV cache: sequences offloaded from their slots to RAM, restored when they are continued."""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

from services.inference.engine.backend import SequenceState
from services.inference.engine.kv_cache import prefix
from services.inference.engine.kv_cache.checkpoints import Checkpoint, Checkpoints

# Shorter prefixes are not copied: prefilling so few tokens takes about as long as the copy.
MIN_SHARED_TOKENS = 16


class SavedState(NamedTuple):
    key: bytes
    state: SequenceState
    owner: str  # the conversation; "" for a prefix that several conversations share
    is_truncatable: bool = True  # to any length; else to those of the checkpoints only
    checkpoints: tuple[Checkpoint, ...] = ()

    @property
    def nbytes(self) -> int:
        return self.state.nbytes + sum(each.state.nbytes for each in self.checkpoints)

    def reusable(self, shared: int) -> int:
        """Return how many of the first `shared` tokens can be kept."""
        if self.is_truncatable or shared == prefix.length(self.key):
            return shared
        return Checkpoints(self.checkpoints).reusable(shared)


class Match(NamedTuple):
    saved: SavedState | None
    length: int  # tokens of the common prefix that can be reused


class HostCache:
    """
    At most `max_bytes` of saved states with their checkpoints, with LRU eviction. Iteration is from
    the least to the most recently used one. `reserve` leaves a part of the bytes to others.

    Invariants (`check_invariants`): keys are unique and sorted; an owner has one state, which its
    next one replaces, since the exchanges that its prompt has dropped never come back; states
    without an owner are shared prefixes.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._keys: list[bytes] = []  # sorted: the neighbours of a key share the longest prefix
        self._by_use: OrderedDict[bytes, SavedState] = OrderedDict()
        self._by_owner: dict[str, bytes] = {}
        self._shared_prefixes: list[bytes] = []
        self._bytes = 0
        self._reserved = 0

    @property
    def is_off(self) -> bool:
        return self._max_bytes == 0

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[SavedState]:
        return iter(self._by_use.values())

    def __contains__(self, key: bytes) -> bool:
        return key in self._by_use

    def longest_match(self, key: bytes, public: bytes = b"") -> Match:
        """
        Return the state with the longest reusable prefix; but a shared prefix wins over a longer
        match by fewer than MIN_SHARED_TOKENS, because restoring it needs no truncation.
        `public` is the public prefix of `key`, which all tenants share.
        """
        best = self._longest_common(key)
        shared = self.shared_prefix(key, public)
        if shared and best.length - prefix.length(shared) < MIN_SHARED_TOKENS:
            return Match(self._by_use[shared], prefix.length(shared))
        return best

    def common_length(self, key: bytes) -> int:
        """Return the length of the longest prefix that the key has in common with a state."""
        return max((prefix.shared_length(key, other) for other in self._neighbours(key)), default=0)

    def shared_prefix(self, key: bytes, public: bytes = b"") -> bytes:
        """Return the longest shared prefix of `key` or `public` that is saved, else b""."""
        found = (p for p in self._shared_prefixes if key.startswith(p) or public.startswith(p))
        return max(found, key=len, default=b"")

    def add(self, saved: SavedState) -> None:
        """Add a state, unless it exceeds `max_bytes`; replace its owner's previous one."""
        self.remove(saved.key)
        self.remove(self._by_owner.get(saved.owner, b""))
        if saved.nbytes > self._max_bytes - self._reserved:
            return
        insort(self._keys, saved.key)
        self._by_use[saved.key] = saved
        if saved.owner:
            self._by_owner[saved.owner] = saved.key
        else:
            self._shared_prefixes.append(saved.key)
        self._bytes += saved.nbytes
        self._evict()

    def adopt(self, saved: SavedState) -> None:
        """
        Add a state of an earlier process as the least recently used one, unless it does not fit or
        its owner already has one.
        """
        room = self._max_bytes - self._reserved - self._bytes
        if saved.key in self or saved.owner in self._by_owner or saved.nbytes > room:
            return
        self.add(saved)
        self._by_use.move_to_end(saved.key, last=False)

    def reserve(self, nbytes: int) -> None:
        """Leave this part of `max_bytes` to others from now on."""
        self._reserved = nbytes
        self._evict()

    def touch(self, key: bytes) -> None:
        """Mark a state as the most recently used one."""
        self._by_use.move_to_end(key)

    def remove(self, key: bytes) -> None:
        """Remove a state, if it is there."""
        if saved := self._by_use.pop(key, None):
            del self._keys[bisect_left(self._keys, key)]
            self._bytes -= saved.nbytes
            if saved.owner:
                del self._by_owner[saved.owner]
            else:
                self._shared_prefixes.remove(key)

    def _longest_common(self, key: bytes) -> Match:
        length = self.common_length(key)
        if length == 0:
            return Match(None, 0)
        # keys with the same prefix are adjacent
        first = self._keys[bisect_left(self._keys, prefix.truncate(key, length))]
        common = {first: length}
        if not self._by_use[first].is_truncatable:  # then another one may have a longer checkpoint
            common |= {other: prefix.shared_length(key, other) for other in self._neighbours(key)}
        reusable = {other: self._by_use[other].reusable(common[other]) for other in common}
        best = max(reusable, key=lambda other: reusable[other])
        return Match(self._by_use[best] if reusable[best] else None, reusable[best])

    def _neighbours(self, key: bytes) -> list[bytes]:
        at = bisect_left(self._keys, key)
        return self._keys[max(0, at - 1) : at + 1]

    def _evict(self) -> None:
        while self._bytes > self._max_bytes - self._reserved:
            self.remove(next(iter(self._by_use)))

    def check_invariants(self) -> None:
        """Raises AssertionError."""
        assert self._keys == sorted(self._by_use), "the sorted keys are not those that are saved"
        assert self._bytes == sum(saved.nbytes for saved in self), "the byte count is wrong"
        assert self._bytes <= self._max_bytes - self._reserved, "the byte limit is exceeded"
        owned = {saved.owner: saved.key for saved in self if saved.owner}
        assert self._by_owner == owned, "an owner has more than one state"
        assert sorted(self._shared_prefixes) == sorted(s.key for s in self if not s.owner)
