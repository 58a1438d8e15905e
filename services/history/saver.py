"""
Keeps the sessions' snapshots up to the log's end, so that sessions are listed in its order; and
ends what an erasure began.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager

from services.contract.history import Erased
from services.history.contexts import Contexts
from services.history.entry import Entry, Unreadable, read
from services.history.log import Log
from services.runtime.consumers import PendingMessage
from services.runtime.streams import Conflict, StreamUnavailable
from services.runtime.supervised import Fail, SupervisedLoop

BATCH = 100
AT_ONCE = 4  # sessions, so that who asks something meanwhile waits little
FETCH_TIMEOUT = 0.5  # seconds that a fetch waits for a first record
REST = 2.0  # times as long as a full batch took: whoever asks something comes first
GATHERING = 0.2  # seconds after a batch that was not full: most turns save their own
PAUSE = 1.0  # seconds after a failure


class Saver:
    """Any number of these may run at once, in any number of processes."""

    def __init__(self, history: Log, contexts: Contexts, fail: Fail) -> None:
        self._log = history
        self._contexts = contexts
        self._loop = SupervisedLoop("saver", self._step, fail)

    def running(self) -> AbstractAsyncContextManager[None]:
        """Stops between two batches."""
        return self._loop.running()

    async def _step(self) -> float:
        try:
            fetch = self._log.unsaved(BATCH, FETCH_TIMEOUT)
            batch = await self._loop.unless_stopped(fetch) or []
            began = time.monotonic()
            await self._save_all(batch)
        except (StreamUnavailable, Conflict):  # whoever needs the log reports it
            await self._log.repair_consumers()
            return PAUSE
        return REST * (time.monotonic() - began) if len(batch) == BATCH else GATHERING

    async def _save_all(self, batch: Sequence[PendingMessage]) -> None:
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
        of_session: dict[str, list[Entry]] = defaultdict(list)
        for entry in entries:
            if not isinstance(entry.record, Unreadable):
                of_session[entry.key].append(entry)
        for of_one in of_session.values():
            of_one.sort(key=lambda entry: entry.seq)  # some may have been given out before
        sessions = sorted(of_session.values(), key=lambda of_one: of_one[-1].seq)
        for start in range(0, len(sessions), AT_ONCE):
            await asyncio.gather(*map(self._contexts.add, sessions[start : start + AT_ONCE]))
        for entry in entries:
            if isinstance(entry.record, Erased):
                await self._log.delete_before(entry.key, entry.seq)
