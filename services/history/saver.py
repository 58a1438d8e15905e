"""
Keeps the sessions' snapshots up to the log's end, so that sessions are listed in its order; and
ends what an erasure began.
"""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from services.contract.history import Erased
from services.history.contexts import Contexts
from services.history.entry import Entry, Unreadable, read
from services.history.log import Log
from services.runtime.streams import Conflict, StreamUnavailable

BATCH = 100
AT_ONCE = 4  # sessions, so that who asks something meanwhile waits little
FETCH_TIMEOUT = 0.5  # seconds; as long a stop may wait for a fetch that brings nothing
REST = 2.0  # times as long as a full batch took: whoever asks something comes first
GATHERING = 0.2  # seconds after a batch that was not full: most turns save their own
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
                began = time.monotonic()
                is_full = await self._step()
                rest = REST * (time.monotonic() - began)
                await asyncio.sleep(rest if is_full else GATHERING)
            except (StreamUnavailable, Conflict):
                await asyncio.sleep(PAUSE)  # who needs the log says so
            except Exception:
                log.exception("saving snapshots failed; trying again")
                await asyncio.sleep(PAUSE)

    async def _step(self) -> bool:
        """Whether more is there for certain."""
        batch = await self._log.unsaved(BATCH, FETCH_TIMEOUT)
        try:
            await self._save([read(pending.stored) for pending in batch])
        except (StreamUnavailable, Conflict):
            for pending in batch:
                await pending.give_back()
            raise
        for pending in batch:
            await pending.ack()
        return len(batch) == BATCH

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
