"""Host KV cache: sequences offloaded from their slots to RAM, restored when they are continued."""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

from services.inference.engine.backend import SequenceState
from services.inference.engine.kv_cache import prefix

# Shorter prefixes are not copied: prefilling so few tokens takes about as long as the copy.
MIN_SHARED_TOKENS = 16


class SavedState(NamedTuple):
    run: bytes
    state: SequenceState
    owner: str  # the conversation; "" for a prefix that several conversations share


class Match(NamedTuple):
    saved: SavedState | None
    length: int  # tokens of the common prefix


class HostCache:
    """
    At most `max_bytes` of saved states, with LRU eviction. Iteration is from the least to the most
    recently used one.

    Invariants (`check_invariants`): runs are unique and sorted; an owner has one state, which its
    next one replaces, since the exchanges that its prompt has dropped never come back; states
    without an owner are shared prefixes.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._runs: list[bytes] = []  # sorted: the neighbours of a run share the longest prefix
        self._by_use: OrderedDict[bytes, SavedState] = OrderedDict()
        self._by_owner: dict[str, bytes] = {}
        self._shared_prefixes: list[bytes] = []
        self._bytes = 0

    @property
    def is_off(self) -> bool:
        return self._max_bytes == 0

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[SavedState]:
        return iter(self._by_use.values())

    def __contains__(self, run: bytes) -> bool:
        return run in self._by_use

    def longest_match(self, run: bytes, public: bytes = b"") -> Match:
        """
        Return the state with the longest common prefix; but a shared prefix wins over a longer
        match by fewer than MIN_SHARED_TOKENS, because restoring it needs no truncation.
        `public` is the public prefix of `run`, which all tenants share.
        """
        at = bisect_left(self._runs, run)
        neighbours = self._runs[max(0, at - 1) : at + 1]
        length = max((prefix.shared_length(run, other) for other in neighbours), default=0)
        shared = self.shared_prefix(run, public)
        if shared and length - prefix.length(shared) < MIN_SHARED_TOKENS:
            return Match(self._by_use[shared], prefix.length(shared))
        if length == 0:
            return Match(None, 0)
        # runs with the same prefix are adjacent
        first = bisect_left(self._runs, prefix.truncate(run, length))
        return Match(self._by_use[self._runs[first]], length)

    def shared_prefix(self, run: bytes, public: bytes = b"") -> bytes:
        """Return the longest shared prefix of `run` or `public` that is saved, else b""."""
        found = (p for p in self._shared_prefixes if run.startswith(p) or public.startswith(p))
        return max(found, key=len, default=b"")

    def add(self, saved: SavedState) -> None:
        """Add a state, unless it exceeds `max_bytes`; replace its owner's previous one."""
        self.remove(saved.run)
        self.remove(self._by_owner.get(saved.owner, b""))
        if saved.state.nbytes > self._max_bytes:
            return
        insort(self._runs, saved.run)
        self._by_use[saved.run] = saved
        if saved.owner:
            self._by_owner[saved.owner] = saved.run
        else:
            self._shared_prefixes.append(saved.run)
        self._bytes += saved.state.nbytes
        while self._bytes > self._max_bytes:
            self.remove(next(iter(self._by_use)))

    def touch(self, run: bytes) -> None:
        """Mark a state as the most recently used one."""
        self._by_use.move_to_end(run)

    def remove(self, run: bytes) -> None:
        """Remove a state, if it is there."""
        if saved := self._by_use.pop(run, None):
            del self._runs[bisect_left(self._runs, run)]
            self._bytes -= saved.state.nbytes
            if saved.owner:
                del self._by_owner[saved.owner]
            else:
                self._shared_prefixes.remove(run)

    def check_invariants(self) -> None:
        """Raises AssertionError."""
        assert self._runs == sorted(self._by_use), "the sorted runs are not those that are saved"
        assert self._bytes == sum(saved.state.nbytes for saved in self), "the byte count is wrong"
        assert self._bytes <= self._max_bytes, "the byte limit is exceeded"
        owned = {saved.owner: saved.run for saved in self if saved.owner}
        assert self._by_owner == owned, "an owner has more than one state"
        assert sorted(self._shared_prefixes) == sorted(s.run for s in self if not s.owner)
