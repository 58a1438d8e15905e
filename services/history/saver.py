"""
Keeps the sessions' snapshots up to the log's end, so that sessions are listed in its order; and
ends what an erasure began.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from services.contract.history import Erased
from services.history.contexts import Contexts
from services.history.entry import Entry, Unreadable, read
from services.history.log import Log
from services.runtime.streams import Conflict, StreamUnavailable

BATCH = 100
AT_ONCE = 16  # sessions
FETCH_TIMEOUT = 0.5  # seconds; as long a stop may wait for a fetch that brings nothing
PAUSE = 1.0  # seconds after a failure

log = logging.getLogger(__name__)


class Saver:
    """Any number of these may run at once, in any number of processes."""

    def __init__(self, history: Log, contexts: Contexts) -> None:
        self._log = history
        self._contexts = contexts
        self._stopping = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Stops between two batches."""
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            self._stopping = True
            await task

    async def _run(self) -> None:
        while not self._stopping:
            try:
                await self._step()
            except (StreamUnavailable, Conflict):
                await asyncio.sleep(PAUSE)  # who needs the log says so
            except Exception:
                log.exception("saving snapshots failed; trying again")
                await asyncio.sleep(PAUSE)

    async def _step(self) -> None:
        batch = await self._log.unsaved(BATCH, FETCH_TIMEOUT)
        try:
            await self._save([read(pending.stored) for pending in batch])
        except (StreamUnavailable, Conflict):
            for pending in batch:
                await pending.give_back()
            raise
        for pending in batch:
            await pending.ack()

    async def _save(self, entries: Sequence[Entry]) -> None:
        """By their last records, as far as it can be told of those that are saved at once."""
        last = {e.key: e.seq for e in entries if not isinstance(e.record, Unreadable)}
        keys = sorted(last, key=last.__getitem__)
        for start in range(0, len(keys), AT_ONCE):
            await asyncio.gather(*map(self._contexts.settle, keys[start : start + AT_ONCE]))
        for entry in entries:
            if isinstance(entry.record, Erased):
                await self._log.delete_before(entry.key, entry.seq)
