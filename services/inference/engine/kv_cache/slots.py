"""KV cache slots: which sequence has which slot, and which cached prefix a new sequence reuses."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from services.inference.engine.backend import Backend, BackendError
from services.inference.engine.kv_cache import prefix
from services.inference.engine.kv_cache.host_cache import MIN_SHARED_TOKENS, HostCache, SavedState

# A sequence that would lose no more tokens than this is continued in place; else its prefix is
# copied and the rest stays cached. Chosen, not measured: so few tokens are not worth a second copy.
MAX_DISCARDED_TOKENS = 32


def cache_owner(adapter: int, session: str) -> str:
    """Return the owner of a conversation's cached tokens, which differ per adapter."""
    return f"{adapter}.{session}" if session else ""


def is_owned_by(owner: str, session: str) -> bool:
    """Return whether the owner is this conversation, with any adapter."""
    return owner.partition(".")[2] == session


class Lease(NamedTuple):
    slot: int
    cached: int  # tokens of the key that the slot already holds


@dataclass(slots=True)
class _Slot:
    key: bytearray = field(default_factory=bytearray)  # of the tokens in its KV cache
    owner: str = ""  # the conversation that has, or last had, the slot; "" for stateless requests
    is_offload_done: bool = False  # the host cache has a copy, or is not to have one


class Slots:
    """
    A fixed number of slots, each leased to a running sequence or free. A free slot keeps its last
    sequence until the slot is needed: then the sequence is offloaded to the host cache, if it has
    an owner. Sequences without an owner (stateless requests) are evicted first and never offloaded.

    Automatic prefix caching: `acquire` reuses the longest prefix that any slot, leased or free, or
    the host cache holds, by continuing that slot or by copying the prefix.

    Tenants share `public_prefixes` only, and only whole ones: the tokens at the start of prompts
    that no tenant wrote. So neither the number of cached tokens nor the prefill time reveals what
    another tenant sent (docs/decisions/0002-prefix-cache-per-tenant.md).

    Invariants (`check_invariants`): a slot is either leased or in the free list, once; its key has
    exactly the tokens that its KV cache holds.
    """

    def __init__(
        self,
        backend: Backend,
        count: int,
        host_cache_bytes: int,
        public_prefixes: Iterable[Sequence[int]] = (),
    ) -> None:
        self._backend = backend
        self._public = sorted(map(prefix.pack_tokens, public_prefixes), key=len, reverse=True)
        self._slots = [_Slot() for _ in range(count)]
        self._free = list(range(count))  # least recently used first
        self.host_cache = HostCache(host_cache_bytes)

    def can_acquire(self) -> bool:
        return bool(self._free)

    def cached_length(self, key: bytes) -> int:
        """Return how many tokens of the key would be reused."""
        saved = self.host_cache.longest_match(key, self._public_key(key))
        return max(self._best_source(key)[1], saved.length)

    def shareable_length(self, key: bytes, other: prefix.PrefixKey) -> int:
        """
        Return how many tokens of `key` can be copied from `other`: of the same tenant the common
        prefix, of another one the longest public prefix that both start with.
        """
        if prefix.is_same_tenant(key, other):
            return prefix.shared_length(key, other)
        if not prefix.is_same_mode(key, other):
            return 0
        common = (p for p in self._public_prefixes_of(key) if prefix.starts_with(other, p))
        return len(next(common, b"")) // prefix.TOKEN_BYTES

    def acquire(self, key: bytes, owner: str = "") -> Lease:
        """
        Lease a free slot (`can_acquire`) that holds the longest cached prefix of the key. Whatever
        else is cached for this owner is superseded.
        """
        source, here = self._best_source(key)
        saved, there = self.host_cache.longest_match(key, self._public_key(key))
        is_retry = False
        if here >= there and source in self._free and self._is_continuation(source, here):
            slot = source  # continued in place
        elif max(here, there) < MIN_SHARED_TOKENS:  # nothing that is worth a copy
            slot = self._evict(prefix.adapter_of(key))
            self.invalidate(slot)
        elif saved and here - there < MIN_SHARED_TOKENS:  # restored from the host cache
            self.host_cache.touch(saved.key)
            slot = self._evict(prefix.adapter_of(saved.key))
            self._write(slot, saved)
        else:  # copied from another slot
            is_retry = not owner and self._is_stateless_retry(key, here)
            copy = self._read(source)
            slot = self._evict(prefix.adapter_of(copy.key))
            self._write(slot, copy)
        self._free.remove(slot)
        self._drop_superseded(owner)
        return self._lease(slot, key, owner, is_retry)

    def extend(self, slot: int, tokens: Iterable[int]) -> None:
        """Record that the slot's sequence has these tokens now, too."""
        prefix.extend(self._slots[slot].key, tokens)

    def truncate(self, slot: int, length: int) -> None:
        """Drop the tokens of the slot behind the first `length`, which will be computed again."""
        is_kept = self._backend.truncate(slot, length)
        assert is_kept, "this kind of model can't keep a part of a sequence"
        self._slots[slot].key = bytearray(prefix.truncate(self._slots[slot].key, length))

    def release(self, slot: int) -> None:
        """End the lease. The slot keeps its sequence for reuse."""
        self._free.append(slot)

    def invalidate(self, slot: int) -> None:
        """Drop all tokens of the slot, for example because a step failed."""
        self._backend.truncate(slot, 0)
        self._slots[slot].key = bytearray()

    def forget_session(self, session: str) -> None:
        """
        Drop what free slots and the host cache hold of a conversation. Prefixes that it shares with
        others stay, since they have no owner.
        """
        for slot in self._free:
            if is_owned_by(self._slots[slot].owner, session):
                self.invalidate(slot)
        for saved in list(self.host_cache):
            if is_owned_by(saved.owner, session):
                self.host_cache.remove(saved.key)

    def offload_next(self) -> bool:
        """
        Copy one idle sequence to the host cache, so that its slot can be reused without delay.
        Return False if all are copied. One at a time, so that requests can come in between.
        """
        for slot in self._free:
            if not self._slots[slot].is_offload_done:
                self._offload(slot)
                return True
        return False

    def move(self, source: int, target: int) -> None:
        """
        Move a leased sequence to slot `target`, whose sequence moves to `source` if it is leased,
        and is offloaded if not. Raises BackendError: then both slots are undefined.
        """
        moving = self._read(source)
        if target in self._free:
            self._offload(target)
            self._write_or_raise(target, moving)
            self.invalidate(source)
            self._free[self._free.index(target)] = source
        else:
            other = self._read(target)
            self._write_or_raise(target, moving)
            self._write_or_raise(source, other)

    def check_invariants(self, leased: int) -> None:
        """Check the invariants for a number of `leased` slots. Raises AssertionError."""
        assert len(set(self._free)) == len(self._free), "a slot is free twice"
        assert len(self._free) + leased == len(self._slots), "a slot is lost"
        for number, slot in enumerate(self._slots):
            assert self._backend.length(number) == prefix.length(slot.key), (
                f"the KV cache of slot {number} differs from its key"
            )
        self.host_cache.check_invariants()

    def _lease(self, number: int, key: bytes, owner: str, is_retry: bool) -> Lease:
        slot = self._slots[number]
        slot.owner, slot.is_offload_done = owner, False
        shared = self.shareable_length(key, slot.key)
        if not self._backend.truncate(number, shared):
            shared = 0
        is_continuation = self._is_continuation(number, shared)
        slot.key = bytearray(prefix.truncate(key, shared))
        if shared >= MIN_SHARED_TOKENS and not is_continuation and not is_retry:
            self._save_shared_prefix(number)
        return Lease(number, shared)

    def _best_source(self, key: bytes) -> tuple[int, int]:
        """Return the slot with the longest shareable prefix, preferably a free one; its length."""
        lengths = [self.shareable_length(key, slot.key) for slot in self._slots]
        source = max(range(len(lengths)), key=lambda slot: (lengths[slot], slot in self._free))
        return source, lengths[source]

    def _public_prefixes_of(self, key: bytes) -> list[bytes]:
        """Return the public prefixes that the key starts with, longest first."""
        return [p for p in self._public if prefix.starts_with(key, p)]

    def _public_key(self, key: bytes) -> bytes:
        """Return the longest public prefix of the key as a public key, else b""."""
        longest = next(iter(self._public_prefixes_of(key)), b"")
        return prefix.as_public(key, longest) if longest else b""

    def _is_continuation(self, slot: int, shared: int) -> bool:
        """Return whether the slot loses at most MAX_DISCARDED_TOKENS if only `shared` are kept."""
        return prefix.length(self._slots[slot].key) - shared <= MAX_DISCARDED_TOKENS

    def _is_stateless_retry(self, key: bytes, shared: int) -> bool:
        """
        Return whether a request without an owner probably repeats one that has ended: all slots
        with this prefix are free, have no owner, and belong to its tenant. Else several
        conversations share the prefix, so it is worth a place in the host cache.
        """
        return all(
            number in self._free and not slot.owner and prefix.is_same_tenant(key, slot.key)
            for number, slot in enumerate(self._slots)
            if self.shareable_length(key, slot.key) == shared
        )

    def _save_shared_prefix(self, slot: int) -> None:
        """Save what the slot holds as a prefix that the next conversation restores by itself."""
        key = bytes(self._slots[slot].key)
        public = self._public_key(key)
        if prefix.length(public) == prefix.length(key):
            key = public  # so that all tenants find it
        longer = prefix.length(key) - prefix.length(self.host_cache.shared_prefix(key, public))
        if longer >= MIN_SHARED_TOKENS and not self.host_cache.is_off:
            self.host_cache.add(SavedState(key, self._backend.save(slot), owner=""))

    def _evict(self, adapter: int) -> int:
        """
        Return a free slot, and offload what it holds. Preferably it is between, else next to, the
        slots leased with this adapter, since llama.cpp batches only neighbouring slots.
        """
        leased = self._leased_slots(adapter)
        slot = next((s for s in self._free if leased and leased[0] < s < leased[-1]), None)
        if slot is None:
            slot = min(self._free, key=lambda s: (self._eviction_cost(s), _distance(s, leased)))
        self._offload(slot)
        return slot

    def _leased_slots(self, adapter: int) -> list[int]:
        leased = set(range(len(self._slots))) - set(self._free)
        return sorted(s for s in leased if prefix.adapter_of(self._slots[s].key) == adapter)

    def _eviction_cost(self, slot: int) -> int:
        """Return 0 if nothing is lost, 1 for a sequence without an owner, 2 for a copy to RAM."""
        if not self._has_unsaved(slot):
            return 0
        return 2 if self._slots[slot].owner else 1

    def _has_unsaved(self, slot: int) -> bool:
        key = self._slots[slot].key
        return prefix.length(key) > 0 and bytes(key) not in self.host_cache

    def _offload(self, number: int) -> None:
        """Copy the slot's sequence to the host cache, if it has an owner and is not there."""
        slot = self._slots[number]
        slot.is_offload_done = True
        if slot.owner and self._has_unsaved(number) and not self.host_cache.is_off:
            self.host_cache.add(self._read(number))

    def _read(self, slot: int) -> SavedState:
        held = self._slots[slot]
        return SavedState(bytes(held.key), self._backend.save(slot), held.owner)

    def _write(self, slot: int, saved: SavedState) -> bool:
        """Replace the slot's sequence. Return False if that failed: then the slot is empty."""
        if self._backend.restore(slot, saved.state):
            self._slots[slot] = _Slot(bytearray(saved.key), saved.owner)
            return True
        self.invalidate(slot)
        return False

    def _write_or_raise(self, slot: int, saved: SavedState) -> None:
        if not self._write(slot, saved):
            raise BackendError("A sequence could not be moved to another slot. Send it again.")

    def _drop_superseded(self, owner: str) -> None:
        """Drop what free slots hold of a conversation that is continued in another slot."""
        for slot in self._free:
            if owner and self._slots[slot].owner == owner:
                self.invalidate(slot)


def _distance(slot: int, others: list[int]) -> int:
    return min((abs(slot - other) for other in others), default=0)
