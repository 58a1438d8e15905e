"""KV cache slots: which sequence has which slot, and which cached prefix a new sequence reuses."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from services.inference.engine.adapter_numbers import BASE, file_of
from services.inference.engine.backend import Backend, BackendError
from services.inference.engine.kv_cache import prefix
from services.inference.engine.kv_cache.checkpoints import MIN_DISTANCE, Checkpoint, Checkpoints
from services.inference.engine.kv_cache.host_cache import MIN_SHARED_TOKENS, HostCache, SavedState

# A sequence that would lose no more tokens than this is continued in place; else its prefix is
# copied and the rest stays cached. Chosen, not measured: so few tokens are not worth a second copy.
MAX_DISCARDED_TOKENS = 32


def cache_owner(adapter: int, session: str) -> str:
    """Return the owner of a conversation's cached tokens, which differ per adapter."""
    return f"{adapter}.{session}" if session else ""


def session_of(owner: str) -> str:
    """Return the conversation of an owner; "" if there is none."""
    return owner.partition(".")[2]


def is_owned_by(owner: str, session: str) -> bool:
    """Return whether the owner is this conversation, with any adapter."""
    return session_of(owner) == session


class Lease(NamedTuple):
    slot: int
    cached: int  # tokens of the key that the slot already holds


@dataclass(slots=True)
class _Slot:
    key: bytearray = field(default_factory=bytearray)  # of the tokens in its KV cache
    owner: str = ""  # the conversation that has, or last had, the slot; "" for stateless requests
    is_offload_done: bool = False  # the host cache has a copy, or is not to have one
    checkpoints: Checkpoints = field(default_factory=Checkpoints)


class Slots:
    """
    A fixed number of slots, each leased to a running sequence or free. A free slot keeps its last
    sequence until the slot is needed: then the sequence is offloaded to the host cache, if it has
    an owner. Sequences without an owner (stateless requests) are evicted first and never offloaded.

    Automatic prefix caching: `acquire` reuses the longest prefix that any slot, leased or free, or
    the host cache holds, by continuing that slot or by copying the prefix.

    If the model's state can't be cut, a prefix is reused where it is all that a slot or a saved
    state has, and where there is a checkpoint (`checkpoints.py`): at the end of a public prefix, at
    the end of what a prompt shares with others, where a prompt continues a sequence, at the
    `stable_length` of a prompt, which the conversation's next one repeats, and before text that may
    become a stop string. Checkpoints take at most half of the bytes of the host cache.

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
        self.count = count
        self.max_length = backend.context  # tokens of a slot
        self._backend = backend
        self._public = sorted(map(prefix.pack_tokens, public_prefixes), key=len, reverse=True)
        self._slots = [_Slot() for _ in range(count)]
        self._free = list(range(count))  # least recently used first
        self.host_cache = HostCache(host_cache_bytes)
        self._max_checkpoint_bytes = host_cache_bytes // 2
        self._makes_checkpoints = not (backend.is_truncatable or self.host_cache.is_off)

    def can_acquire(self) -> bool:
        return bool(self._free)

    def cached_length(self, key: bytes, owner: str = "") -> int:
        """Return how many tokens of the key would be reused."""
        saved = self.host_cache.longest_match(key, self._public_key(key))
        return max(self._best_source(key, owner)[1], saved.length)

    def coming_length(self, key: bytes, slot: int, prefilling: prefix.PrefixKey) -> int:
        """
        Return how many tokens of `key` can be copied from a leased slot as soon as it has the
        tokens of `prefilling`, if it gets a checkpoint there (`plan_checkpoints`).
        """
        shared, held = self.shareable_length(key, prefilling), self._slots[slot]
        if self._backend.is_truncatable:
            return shared
        branch = self._branch_length(key, prefilling, shared)
        if self._makes_checkpoints and branch > prefix.length(held.key):
            return branch
        return self._checkpoint_length(key, prefilling, held.checkpoints, shared)

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
        return prefix.packed_length(next(common, b""))

    def acquire(self, key: bytes, owner: str = "", stable_length: int = 0) -> Lease:
        """
        Lease a free slot (`can_acquire`) that holds the longest cached prefix of the key. Whatever
        else is cached for this owner is superseded. `stable_length` is how many tokens of the key
        the owner's next one will repeat, if they are known to be worth checkpoints.
        """
        common = self._common_length(key) if self._makes_checkpoints else 0
        source, here = self._best_source(key, owner)
        saved, there = self.host_cache.longest_match(key, self._public_key(key))
        is_retry = False
        if here >= there and source in self._free and self._is_continuation(source, here, owner):
            slot = source  # continued in place
        elif max(here, there) < MIN_SHARED_TOKENS:  # nothing that is worth a copy
            slot = self._evict(prefix.adapter_of(key))
            self.invalidate(slot)
        elif saved and here - there < MIN_SHARED_TOKENS:  # restored from the host cache
            self.host_cache.touch(saved.key)
            slot = self._evict(prefix.adapter_of(saved.key))
            # the slot often begins with it: most prompts share a system prompt
            is_there = self._reusable(slot, key, owner) >= there
            if not is_there and not self._write(slot, saved):
                self.host_cache.remove(saved.key)
        else:  # copied from another slot
            # prompts of all callers start with a public prefix, so it is worth saving
            is_public = here == prefix.packed_length(self._public_prefix(key))
            is_retry = not owner and not is_public and self._is_stateless_retry(key, here)
            copy = self._read(source)
            slot = self._evict(prefix.adapter_of(copy.key))
            self._write(slot, copy)
        self._free.remove(slot)
        self._drop_superseded(owner)
        lease = self._lease(slot, key, owner, is_retry)
        if self._makes_checkpoints and stable_length:
            self._make_checkpoint(slot)
            public = map(prefix.packed_length, self._public_prefixes_of(key))
            self.plan_checkpoints(slot, (*public, common - MIN_DISTANCE, stable_length))
        return lease

    def plan_checkpoints(self, slot: int, lengths: Iterable[int]) -> None:
        """Let the slot's sequence have checkpoints at these lengths, when it gets there."""
        if self._makes_checkpoints:
            held = self._slots[slot]
            held.checkpoints.plan(lengths, prefix.length(held.key))

    def next_checkpoint(self, slot: int) -> int:
        """Return the length at which the slot's prefill must pause; 0: nowhere."""
        return self._slots[slot].checkpoints.next_planned

    def extend(self, slot: int, tokens: Iterable[int]) -> None:
        """Record that the slot's sequence has these tokens now, too."""
        held = self._slots[slot]
        prefix.extend(held.key, tokens)
        if self._makes_checkpoints and held.checkpoints.next_planned == prefix.length(held.key):
            self._make_checkpoint(slot)

    def hold_checkpoint(self, slot: int) -> None:
        """
        Keep a checkpoint of the slot, if there is room, until `settle_checkpoint` says whether it
        is needed.
        """
        held = self._slots[slot]
        if self._makes_checkpoints and held.checkpoints.has_room_at(prefix.length(held.key)):
            held.checkpoints.hold(self._checkpoint(slot))

    def settle_checkpoint(self, slot: int, is_needed: bool) -> None:
        if self._makes_checkpoints:
            self._slots[slot].checkpoints.settle(is_needed)
            self._bound_checkpoints()

    @property
    def is_truncatable(self) -> bool:
        """Whether a slot can be truncated to any length."""
        return self._backend.is_truncatable

    def length(self, slot: int) -> int:
        """Return how many tokens the slot holds."""
        return prefix.length(self._slots[slot].key)

    def can_truncate(self, slot: int, length: int) -> bool:
        return length >= self._backend.min_length(slot)

    def truncate(self, slot: int, length: int) -> None:
        """
        Drop the tokens of the slot behind the first `length` (`can_truncate`), which will be
        computed again.
        """
        self._backend.truncate(slot, length)
        held = self._slots[slot]
        held.key = bytearray(prefix.truncate(held.key, length))
        held.checkpoints.truncate(length)

    def drop_draft(self, slot: int) -> None:
        """Drop the computed tokens that `extend` has not recorded: those of a rejected draft."""
        self._backend.truncate(slot, prefix.length(self._slots[slot].key))

    def release(self, slot: int) -> None:
        """End the lease. The slot keeps its sequence for reuse."""
        self._free.append(slot)

    def invalidate(self, slot: int) -> None:
        """Drop all tokens of the slot, for example because a step failed."""
        self._backend.truncate(slot, 0)
        self._slots[slot].key = bytearray()
        self._slots[slot].checkpoints = Checkpoints()

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

    def forget_adapter(self, file: int) -> None:
        """Drop what free slots and the host cache hold of an adapter's file, at any scale."""
        for slot in self._free:
            if file_of(prefix.adapter_of(self._slots[slot].key)) == file:
                self.invalidate(slot)
        for saved in list(self.host_cache):
            if file_of(prefix.adapter_of(saved.key)) == file:
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

    def save_all(self) -> list[SavedState]:
        """
        Offload all idle sequences. Return what the host cache has, most recently used first, but
        not what was computed with adapters, whose numbers belong to this process, nor prefixes of
        tenants without an owner, which nobody would know to erase.
        """
        while self.offload_next():
            pass
        saved = reversed(list(self.host_cache))
        return [
            each
            for each in saved
            if prefix.adapter_of(each.key) == BASE and (each.owner or prefix.is_public(each.key))
        ]

    def adopt(self, saved: SavedState) -> None:
        """Take a state of an earlier process into the host cache, if nothing newer is there."""
        if not any(saved.owner and slot.owner == saved.owner for slot in self._slots):
            self.host_cache.adopt(saved)

    def move(self, source: int, target: int) -> None:
        """
        Move a leased sequence to slot `target`, whose sequence moves to `source` if it is leased,
        and is offloaded if not. Raises BackendError: then both slots are undefined.
        """
        moving, plans = self._read(source), self._slots[source].checkpoints
        if target in self._free:
            self._offload(target)
            self._write_or_raise(target, moving)
            self.invalidate(source)
            self._free[self._free.index(target)] = source
        else:
            other, other_plans = self._read(target), self._slots[target].checkpoints
            self._write_or_raise(target, moving)
            self._write_or_raise(source, other)
            self._slots[source].checkpoints = other_plans
        self._slots[target].checkpoints = plans

    def check_invariants(self, leased: int) -> None:
        """Check the invariants for a number of `leased` slots. Raises AssertionError."""
        assert len(set(self._free)) == len(self._free), "a slot is free twice"
        assert len(self._free) + leased == len(self._slots), "a slot is lost"
        for number, slot in enumerate(self._slots):
            assert self._backend.length(number) == prefix.length(slot.key), (
                f"the KV cache of slot {number} differs from its key"
            )
            slot.checkpoints.check_invariants(prefix.length(slot.key))
        self.host_cache.check_invariants()

    def _lease(self, number: int, key: bytes, owner: str, is_retry: bool) -> Lease:
        slot = self._slots[number]
        shared = self._cut(number, key)
        is_continuation = self._is_continuation(number, shared, owner)
        slot.owner, slot.is_offload_done = owner, False
        slot.key = bytearray(prefix.truncate(key, shared))
        slot.checkpoints.truncate(shared)
        if shared >= MIN_SHARED_TOKENS and not is_continuation and not is_retry:
            self._save_shared_prefix(number)
        return Lease(number, shared)

    def _cut(self, number: int, key: bytes) -> int:
        """Drop what the slot has beside a prefix of the key. Return how many tokens are left."""
        slot = self._slots[number]
        shared = self.shareable_length(key, slot.key)
        if shared and shared < self._backend.min_length(number):
            shared = self._checkpoint_length(key, slot.key, slot.checkpoints, shared)
            checkpoint = slot.checkpoints.longest(shared)
            if checkpoint and self._backend.rewind(number, shared, checkpoint.state):
                return shared
            shared = 0
        self._backend.truncate(number, shared)
        return shared

    def _checkpoint_length(
        self, key: bytes, other: prefix.PrefixKey, checkpoints: Checkpoints, shared: int
    ) -> int:
        """
        Return the longest reusable prefix of `key` at one of the checkpoints of `other`, of at most
        `shared` tokens; of another tenant's, where a public prefix ends.
        """
        if prefix.is_same_tenant(key, other):
            return checkpoints.reusable(shared)
        public = map(prefix.packed_length, self._public_prefixes_of(key))
        return next((n for n in public if n <= shared and checkpoints.reusable(n) == n), 0)

    def _branch_length(self, key: bytes, other: prefix.PrefixKey, shared: int) -> int:
        """
        Return where to make a checkpoint for what both share, and others will probably, too: some
        tokens before its end, since questions begin with the same words by chance.
        """
        is_exact = not prefix.is_same_tenant(key, other)  # then a public prefix ends there
        return shared if is_exact else max(0, shared - MIN_DISTANCE)

    def _common_length(self, key: bytes) -> int:
        """Return the longest prefix that the key shares with anything cached, reusable or not."""
        here = max(self.shareable_length(key, slot.key) for slot in self._slots)
        return max(here, self.host_cache.common_length(key))

    def _checkpoint(self, number: int) -> Checkpoint:
        length = prefix.length(self._slots[number].key)
        return Checkpoint(length, self._backend.save_checkpoint(number))

    def _make_checkpoint(self, number: int) -> None:
        held = self._slots[number]
        if held.checkpoints.has_room_at(prefix.length(held.key)):
            held.checkpoints.add(self._checkpoint(number))
            self._bound_checkpoints()

    def _bound_checkpoints(self) -> None:
        """Drop checkpoints while they need too many bytes: first of slots that are longest free."""
        leased = set(range(len(self._slots))) - set(self._free)
        by_use = [self._slots[number].checkpoints for number in (*self._free, *leased)]
        nbytes = sum(checkpoints.nbytes for checkpoints in by_use)
        for checkpoints in by_use:
            while len(checkpoints) and nbytes > self._max_checkpoint_bytes:
                nbytes -= checkpoints.drop_one().state.nbytes
        self.host_cache.reserve(nbytes)

    def _reusable(self, number: int, key: bytes, owner: str) -> int:
        """Return how many tokens of the key this slot, or a copy of it, could keep."""
        slot = self._slots[number]
        shared = self.shareable_length(key, slot.key)
        if self._backend.is_truncatable or shared in (0, prefix.length(slot.key)):
            return shared
        is_in_place = number in self._free and self._is_continuation(number, shared, owner)
        if is_in_place and shared >= self._backend.min_length(number):  # a copy has less
            return shared
        return self._checkpoint_length(key, slot.key, slot.checkpoints, shared)

    def _best_source(self, key: bytes, owner: str) -> tuple[int, int]:
        """Return the slot with the longest reusable prefix, preferably a free one; its length."""
        free = sorted(self._free)
        leased = sorted({*range(self.count)} - {*free})
        source, longest = 0, -1
        for number in (*free, *leased):
            if prefix.may_share(key, self._slots[number].key, longest + 1):
                length = self._reusable(number, key, owner)
                if length > longest:
                    source, longest = number, length
        return source, longest

    def _public_prefixes_of(self, key: bytes) -> list[bytes]:
        """Return the public prefixes that the key starts with, longest first."""
        return [p for p in self._public if prefix.starts_with(key, p)]

    def _public_prefix(self, key: bytes) -> bytes:
        """Return the longest public prefix of the key, else b""."""
        return next(iter(self._public_prefixes_of(key)), b"")

    def _public_key(self, key: bytes) -> bytes:
        """Return the longest public prefix of the key as a public key, else b""."""
        longest = self._public_prefix(key)
        return prefix.as_public(key, longest) if longest else b""

    def _is_continuation(self, slot: int, shared: int, owner: str) -> bool:
        """
        Return whether the slot loses nothing of worth if only `shared` tokens are kept: at most
        MAX_DISCARDED_TOKENS, or what the same conversation has given up.
        """
        held = self._slots[slot]
        is_own = bool(owner) and held.owner == owner
        return is_own or prefix.length(held.key) - shared <= MAX_DISCARDED_TOKENS

    def _is_stateless_retry(self, key: bytes, shared: int) -> bool:
        """
        Return whether a request without an owner probably repeats one that has ended: all slots
        with this prefix are free, have no owner, and belong to its tenant. Else several
        conversations share the prefix, so it is worth a place in the host cache.
        """
        return all(
            number in self._free and not slot.owner and prefix.is_same_tenant(key, slot.key)
            for number, slot in enumerate(self._slots)
            if self.shareable_length(key, slot.key) >= shared
        )

    def _save_shared_prefix(self, slot: int) -> None:
        """Save what the slot holds as a prefix that the next conversation restores by itself."""
        key = bytes(self._slots[slot].key)
        public = self._public_key(key)
        if prefix.length(public) == prefix.length(key):
            key = public  # so that all tenants find it
        longer = prefix.length(key) - prefix.length(self.host_cache.shared_prefix(key, public))
        if longer >= MIN_SHARED_TOKENS and not self.host_cache.is_off:
            state, is_truncatable = self._backend.save(slot), self._backend.is_truncatable
            self.host_cache.add(SavedState(key, state, "", is_truncatable))

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
        state, checkpoints = self._backend.save(slot), tuple(held.checkpoints)
        is_truncatable = self._backend.is_truncatable
        return SavedState(bytes(held.key), state, held.owner, is_truncatable, checkpoints)

    def _write(self, slot: int, saved: SavedState) -> bool:
        """Replace the slot's sequence. Return False if that failed: then the slot is empty."""
        if self._backend.restore(slot, saved.state):
            checkpoints = Checkpoints(saved.checkpoints)
            self._slots[slot] = _Slot(bytearray(saved.key), saved.owner, checkpoints=checkpoints)
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
