"""Makes room in the log: what the archive has goes, the oldest first, once the log is half full."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from services.history.contexts import Contexts
from services.history.entry import Entry, Unreadable
from services.history.log import Log
from services.history.quota import Quota
from services.runtime.streams import StreamUnavailable

TRIM_ABOVE = 0.5  # as a share of the log's limit
CHUNK = 500  # records dropped at once
INTERVAL = 0.2  # seconds; what is said meanwhile must fit what a full log keeps free

log = logging.getLogger(__name__)


class Trimmer:
    """
    Any number of these may run at once. It looks at the log anyway, so it shows the quota what it
    sees.
    """

    def __init__(self, history: Log, contexts: Contexts, quota: Quota) -> None:
        self._log = history
        self._contexts = contexts
        self._quota = quota

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            task.cancel()

    async def _run(self) -> None:
        while True:
            try:
                trimmed = await self.step()
            except StreamUnavailable:
                trimmed = False  # who needs the log says so
            except Exception:
                log.exception("trimming failed; trying again")
                trimmed = False
            await asyncio.sleep(0 if trimmed else INTERVAL)

    async def step(self) -> bool:
        """Whether something was dropped."""
        state = await self._log.state()
        self._quota.see(state)
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
