"""
Which sequence of the KV cache belongs to whom, and what was computed before and need not be again.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from services.inference.engine.backend import Backend, BackendError, State
from services.inference.engine.kv_cache import prefix
from services.inference.engine.kv_cache.host_cache import MIN_SHARED, HostCache, SavedState

SPARE = 32  # tokens of a conversation that may be lost to another one, or be read again


class Lease(NamedTuple):
    slot: int
    cached: int  # tokens of the run that the slot already holds


class _Moved(NamedTuple):
    """A held sequence on its way to another slot."""

    run: bytes
    state: State
    session: str


class Slots:
    """
    A fixed number of slots, each free or held. A free one keeps its last sequence, until somebody
    else needs the slot: then it is copied to RAM (`states`), if it was not before, and comes back
    when it is continued.

    The longest beginning that a prompt shares with any of these, running or idle, is not computed
    again: it is kept, or copied.

    Tenants share only public heads, and these only whole: `heads` are the tokens at the start of
    prompts that no tenant wrote. Everything else is shared within its tenant only, so neither the
    number of cached tokens nor the prefill time reveals what another tenant sent.

    What is nobody's (of no session) never goes to RAM, and of what would be lost it goes first.
    """

    def __init__(
        self, backend: Backend, count: int, budget: int, heads: Iterable[Sequence[int]] = ()
    ) -> None:
        self._backend = backend
        self._heads = sorted(map(prefix.packed, heads), key=len, reverse=True)
        self._runs = [bytearray() for _ in range(count)]
        self._sessions = [""] * count  # whose each is, or was
        self._is_stored = [False] * count  # what it holds is in RAM too
        self._free = list(range(count))  # least recently used first
        self.states = HostCache(budget)

    def can_acquire(self) -> bool:
        return bool(self._free)

    def cached(self, run: bytes) -> int:
        """How many of its tokens have been computed."""
        return max(self._nearest(run)[1], self.states.longest(run, self._public(run)).length)

    def shared(self, run: bytes, other: bytes | bytearray) -> int:
        """
        Return how many tokens of `run` can be copied from `other`. For runs of two tenants, these
        are the tokens of the longest public head that both begin with.
        """
        if prefix.is_same_tenant(run, other):
            return prefix.shared(run, other)
        if not prefix.is_same_way(run, other):
            return 0
        heads = (head for head in self._heads_of(run) if prefix.begins_with(other, head))
        return len(next(heads, b"")) // prefix.ITEM

    def acquire(self, run: bytes, session: str = "") -> Lease:
        """
        Takes a free slot, with as much of `run` in it as there is; there must be a free one. What
        else is kept of the session is replaced by this; "" is nobody's.
        """
        source, here = self._nearest(run)
        saved, there = self.states.longest(run, self._public(run))
        is_told_anew = False
        if here >= there and source in self._free and self._is_continued(self._runs[source], here):
            slot = source
        elif max(here, there) < MIN_SHARED:
            slot = self._room(prefix.adapter(run))
            self.forget(slot)
        elif saved and here - there < MIN_SHARED:
            slot = self._fetch(saved)
        else:
            is_told_anew = not session and self._may_be_told_anew(run, here)
            slot = self._copy(source)
        self._free.remove(slot)
        self._abandon(session)
        self._sessions[slot], self._is_stored[slot] = session, False
        had, shared = self._keep_shared(slot, run)
        if shared >= MIN_SHARED and not self._is_continued(had, shared) and not is_told_anew:
            self._keep_root(slot)
        return Lease(slot, shared)

    def update(self, slot: int, new: Iterable[int]) -> None:
        """`new` tokens of the slot's sequence have been computed."""
        prefix.extend(self._runs[slot], new)

    def cut(self, slot: int, length: int) -> None:
        """The rest of the slot's sequence will be computed anew."""
        is_kept = self._backend.cut(slot, length)
        assert is_kept, "what this kind of model computed can't be cut"
        self._runs[slot] = bytearray(prefix.cut(self._runs[slot], length))

    def release(self, slot: int) -> None:
        self._free.append(slot)

    def forget(self, slot: int) -> None:
        """What the slot holds can't be trusted (a step failed)."""
        self._backend.cut(slot, 0)
        self._runs[slot] = bytearray()

    def tidy(self) -> bool:
        """
        Copies one idle conversation to RAM, so that its slot can be given away at once. False if
        there is none left: so it is done bit by bit while there is nothing else to do.
        """
        for slot in self._free:
            if not self._is_stored[slot]:
                self._store(slot)
                return True
        return False

    def move(self, source: int, target: int) -> None:
        """
        The held sequence goes on in the slot `target`; one that held that goes on in `source`.
        Raises BackendError.
        """
        if target in self._free:
            self._store(target)
            self._give(target, self._take(source))
            self.forget(source)
            self._free[self._free.index(target)] = source
        else:
            one, other = self._take(source), self._take(target)
            self._give(target, one)
            self._give(source, other)

    def check(self, held: int) -> None:
        """Raises AssertionError if a slot was lost or given twice, or holds what it should not."""
        assert len(set(self._free)) == len(self._free), "a slot is free twice"
        assert len(self._free) + held == len(self._runs), "a slot is lost"
        for slot, run in enumerate(self._runs):
            assert self._backend.length(slot) == prefix.length(run), (
                "a slot holds what is not known"
            )
        self.states.check()

    def _held(self, adapter: int) -> list[int]:
        """Those whose sequences are computed with it."""
        held = set(range(len(self._runs))) - set(self._free)
        return sorted(slot for slot in held if prefix.adapter(self._runs[slot]) == adapter)

    def _take(self, slot: int) -> _Moved:
        return _Moved(bytes(self._runs[slot]), self._backend.save(slot), self._sessions[slot])

    def _give(self, slot: int, moved: _Moved) -> None:
        if not self._put(slot, moved.run, moved.state):
            raise BackendError("A sequence could not be moved to another slot.")
        self._sessions[slot], self._is_stored[slot] = moved.session, False

    def _nearest(self, run: bytes) -> tuple[int, int]:
        """(slot, common beginning); of equals a free one, so that nothing needs to be copied."""
        lengths = [self.shared(run, other) for other in self._runs]
        source = max(range(len(lengths)), key=lambda slot: (lengths[slot], slot in self._free))
        return source, lengths[source]

    def _heads_of(self, run: bytes) -> list[bytes]:
        """Return the public heads that the run begins with, longest first."""
        return [head for head in self._heads if prefix.begins_with(run, head)]

    def _public(self, run: bytes) -> bytes:
        """Return the longest public head that the run begins with, as a run, or an empty one."""
        heads = self._heads_of(run)
        return prefix.public(run, heads[0]) if heads else b""

    def _is_continued(self, run: bytes | bytearray, shared: int) -> bool:
        """Whether it is this very conversation that goes on, or one that is as soon read again."""
        return prefix.length(run) - shared <= SPARE

    def _fetch(self, saved: SavedState) -> int:
        """From RAM into a free slot."""
        self.states.touch(saved.run)
        slot = self._room(prefix.adapter(saved.run))
        self._put(slot, saved.run, saved.state)
        return slot

    def _copy(self, source: int) -> int:
        """From a slot that stays as it is into a free one."""
        run, state = bytes(self._runs[source]), self._backend.save(source)
        slot = self._room(prefix.adapter(run))
        self._put(slot, run, state)
        return slot

    def _put(self, slot: int, run: bytes, state: State) -> bool:
        if self._backend.restore(slot, state):
            self._runs[slot] = bytearray(run)
            return True
        self.forget(slot)
        return False

    def _may_be_told_anew(self, run: bytes, shared: int) -> bool:
        """
        Whether what has so much in common with it is nobody's and has ended: maybe turns of one
        conversation, whose caller sends all of it each time, and not several that begin so.
        """
        sources = [s for s, other in enumerate(self._runs) if self.shared(run, other) == shared]
        return all(
            source in self._free
            and not self._sessions[source]
            and prefix.is_same_tenant(run, self._runs[source])
            for source in sources
        )

    def _keep_shared(self, slot: int, run: bytes) -> tuple[bytearray, int]:
        """Keeps what the slot and the new run have in common: (what it had, how much is kept)."""
        had = self._runs[slot]
        shared = self.shared(run, had)
        if not self._backend.cut(slot, shared):
            shared = 0
        self._runs[slot] = bytearray(prefix.cut(run, shared))
        return had, shared

    def _keep_root(self, slot: int) -> None:
        """A beginning of several conversations: the next one is spared the rest of this one."""
        root = bytes(self._runs[slot])
        public = self._public(root)
        if prefix.length(public) == prefix.length(root):
            root = public  # so that all tenants find it
        longer = prefix.length(root) - prefix.length(self.states.root(root, public))
        if longer >= MIN_SHARED and not self.states.is_off:
            self.states.add(SavedState(root, self._backend.save(slot), session=""))

    def _room(self, adapter: int) -> int:
        """
        A free slot, between or beside those held with the adapter if that can be: llama.cpp
        computes neighbours in one batch. What it held goes to RAM.
        """
        held = self._held(adapter)
        slot = next((free for free in self._free if held and held[0] < free < held[-1]), None)
        if slot is None:
            slot = min(self._free, key=lambda free: (self._loss(free), _distance(free, held)))
        self._store(slot)
        return slot

    def _loss(self, slot: int) -> int:
        """Of giving it away: none; what nobody may come back for; a conversation's copy."""
        if not self._is_warm(slot):
            return 0
        return 2 if self._sessions[slot] else 1

    def _is_warm(self, slot: int) -> bool:
        """Whether it holds what is not in RAM."""
        return prefix.length(self._runs[slot]) > 0 and bytes(self._runs[slot]) not in self.states

    def _store(self, slot: int) -> None:
        """What it holds of a session is copied to RAM, if it is not there."""
        self._is_stored[slot] = True
        session = self._sessions[slot]
        if session and self._is_warm(slot) and not self.states.is_off:
            run = bytes(self._runs[slot])
            self.states.add(SavedState(run, self._backend.save(slot), session))

    def _abandon(self, session: str) -> None:
        """What a free slot holds of a session that goes on in another is not to be kept."""
        for slot in self._free:
            if session and self._sessions[slot] == session:
                self.forget(slot)


def _distance(slot: int, others: list[int]) -> int:
    return min((abs(slot - other) for other in others), default=0)
