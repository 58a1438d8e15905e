"""Makes room in the log: what the archive has goes, the oldest first, once the log is half full."""

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager

from services.history.contexts import Contexts
from services.history.entry import Entry, Unreadable
from services.history.guard import Guard
from services.history.log import Log
from services.history.quota import Quota
from services.runtime.streams import StreamUnavailable
from services.runtime.supervised import Fail, SupervisedLoop

TRIM_ABOVE = 0.5  # as a share of the log's limit
CHUNK = 500  # records dropped at once
INTERVAL = 0.2  # seconds; what is said meanwhile must fit what a full log keeps free


class Trimmer:
    """
    Any number may run at once. It reads the state of the log anyway, so it passes it to quota and
    guard.
    """

    def __init__(
        self, history: Log, contexts: Contexts, quota: Quota, guard: Guard, fail: Fail
    ) -> None:
        self._log = history
        self._contexts = contexts
        self._quota = quota
        self._guard = guard
        self._loop = SupervisedLoop("trimmer", self._step, fail)

    def running(self) -> AbstractAsyncContextManager[None]:
        return self._loop.running(is_cancelled=True)

    async def _step(self) -> float:
        try:
            return 0 if await self.step() else INTERVAL
        except StreamUnavailable:
            return INTERVAL  # reported by those who need the log

    async def step(self) -> bool:
        """Whether something was dropped."""
        state = await self._log.state()
        self._quota.see(state)
        self._guard.see(state)
        if state.limit is None or state.drops_old or state.bytes < TRIM_ABOVE * state.limit:
            return False
        until = min(await self._log.archived_until(), state.first_seq + CHUNK - 1)
        entries = [entry async for entry in self._log.between(state.first_seq, until)]
        if not entries or not await self._are_kept(entries):
            return False
        await self._log.drop(entries)
        return True

    async def _are_kept(self, entries: Sequence[Entry]) -> bool:
        """Saves the contexts of these records' sessions: the log was all that had them."""
        keys = {entry.key for entry in entries if not isinstance(entry.record, Unreadable)}
        return all([await self._contexts.save(key) for key in keys])
