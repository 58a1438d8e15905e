"""
Conversations that have no slot, in RAM: what the KV cache held of them, to be put back when they
go on.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from typing import NamedTuple

from services.inference.engine.backend import State
from services.inference.engine.kv_cache import prefix

MIN_SHARED = 16  # tokens; fewer are as soon computed as they are fetched


class SavedState(NamedTuple):
    run: bytes
    state: State
    session: str  # whose it is; "" is nobody's: what several begin with


class Match(NamedTuple):
    saved: SavedState | None
    length: int  # tokens of the common beginning


class HostCache:
    """
    At most `budget` bytes; the least recently used goes first. A session has one: its next replaces
    it, since what its window has cut off never comes again.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._runs: list[bytes] = []  # sorted, so that neighbours have most in common
        self._by_use: OrderedDict[bytes, SavedState] = OrderedDict()
        self._of_session: dict[str, bytes] = {}
        self._roots: list[bytes] = []
        self._bytes = 0

    @property
    def is_off(self) -> bool:
        return self._budget == 0

    def __len__(self) -> int:
        return len(self._runs)

    def __contains__(self, run: bytes) -> bool:
        return run in self._by_use

    def longest(self, run: bytes, public: bytes = b"") -> Match:
        """
        The one that has the longest beginning in common with `run`; but rather a root, which is
        nothing more than that, where another has only a few tokens more in common. `public` is the
        public head of `run`, which is looked up among the public roots.
        """
        at = bisect_left(self._runs, run)
        neighbours = self._runs[max(0, at - 1) : at + 1]
        length = max((prefix.shared(run, other) for other in neighbours), default=0)
        root = self.root(run, public)
        if root and length - prefix.length(root) < MIN_SHARED:
            return Match(self._by_use[root], prefix.length(root))
        if length == 0:
            return Match(None, 0)
        # all that begin so stand together
        first = bisect_left(self._runs, prefix.cut(run, length))
        return Match(self._by_use[self._runs[first]], length)

    def root(self, run: bytes, public: bytes = b"") -> bytes:
        """Return the longest root that `run` or `public` begins with, or an empty one."""
        found = (r for r in self._roots if run.startswith(r) or public.startswith(r))
        return max(found, key=len, default=b"")

    def add(self, saved: SavedState) -> None:
        """Not kept if it is larger than the whole budget."""
        self.remove(saved.run)
        self.remove(self._of_session.get(saved.session, b""))
        if saved.state.nbytes > self._budget:
            return
        insort(self._runs, saved.run)
        self._by_use[saved.run] = saved
        if saved.session:
            self._of_session[saved.session] = saved.run
        else:
            self._roots.append(saved.run)
        self._bytes += saved.state.nbytes
        while self._bytes > self._budget:
            self.remove(next(iter(self._by_use)))

    def touch(self, run: bytes) -> None:
        """It was used now."""
        self._by_use.move_to_end(run)

    def remove(self, run: bytes) -> None:
        """Does nothing if it is not there."""
        if saved := self._by_use.pop(run, None):
            del self._runs[bisect_left(self._runs, run)]
            self._bytes -= saved.state.nbytes
            if saved.session:
                del self._of_session[saved.session]
            else:
                self._roots.remove(run)

    def check(self) -> None:
        """Raises AssertionError if the books are wrong."""
        assert self._runs == sorted(self._by_use), "a state is listed once"
        assert self._bytes == sum(saved.state.nbytes for saved in self._by_use.values())
        assert self._bytes <= self._budget, "the budget holds"
        owned = {saved.session: run for run, saved in self._by_use.items() if saved.session}
        assert self._of_session == owned, "a session has one state"
        assert len(self._roots) == len(self._by_use) - len(owned), "what is nobody's is a root"
