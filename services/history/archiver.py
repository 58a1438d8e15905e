"""
Takes the log's records to the archive, in batches: acknowledged to the log once they are written.
"""

import logging
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager

from services.contract.history import Erased
from services.history.archive import Archive, ArchiveUnavailable
from services.history.entry import Entry, Unreadable, read
from services.history.log import Log
from services.runtime.consumers import PendingMessage
from services.runtime.streams import StreamUnavailable
from services.runtime.supervised import Fail, SupervisedLoop

BATCH = 500
FETCH_TIMEOUT = 0.5  # seconds that a fetch waits for a first record
LOOK_INTERVAL = 0.5  # seconds between checks whether MongoDB is connected
GATHERING = 0.1  # seconds after a batch that was not full, so that the next one is worth its cost
PAUSE = 1.0  # seconds after a failure

log = logging.getLogger(__name__)


class Archiver:
    """Any number of these may run at once, in any number of processes."""

    def __init__(self, history: Log, archive: Archive, fail: Fail) -> None:
        self._log = history
        self._archive = archive
        self._loop = SupervisedLoop("archiver", self._step, fail)
        self._complained = False

    def running(self) -> AbstractAsyncContextManager[None]:
        """Stops between two batches."""
        return self._loop.running()

    async def _step(self) -> float:
        if not self._archive.connected:
            return LOOK_INTERVAL
        try:
            await self._log.open_archive(self._archive.id)
            fetch = self._log.unarchived(BATCH, FETCH_TIMEOUT)
            batch = await self._loop.unless_stopped(fetch) or []
            await self._archive_all(batch)
        except ArchiveUnavailable as error:
            self._complain(error)
            return PAUSE
        except StreamUnavailable as error:
            self._complain(error)
            await self._log.repair_consumers()
            return PAUSE
        if batch:
            self._complained = False
        return 0 if len(batch) == BATCH else GATHERING

    async def _archive_all(self, batch: Sequence[PendingMessage]) -> None:
        if not batch:
            return
        entries = [read(pending.stored) for pending in batch]
        try:
            entries = await self._archive.write(entries)
            for pending, entry in zip(batch, entries, strict=True):
                await self._heed(entry, pending.stored.data)
        except ArchiveUnavailable:
            for pending in batch:
                await pending.give_back()
            raise
        for pending, entry in zip(batch, entries, strict=True):
            await (pending.set_aside() if _is_unreadable(entry) else pending.ack())

    async def _heed(self, entry: Entry, data: bytes) -> None:
        match entry.record:
            case Erased():
                await self._archive.erase(entry)
            case Unreadable(why):
                log.warning("record %d of %s set aside: %s", entry.seq, entry.key, why)
                await self._archive.set_aside(entry, why, data)

    def _complain(self, error: Exception) -> None:
        # a lost connection has been said already, by the one who looks after it
        if self._archive.connected and not self._complained:
            log.warning("archiving waits (%s); nothing is lost, the log keeps it", error)
            self._complained = True


def _is_unreadable(entry: Entry) -> bool:
    return isinstance(entry.record, Unreadable)
