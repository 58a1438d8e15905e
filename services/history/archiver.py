"""
Takes the log's records to the archive, in batches: acknowledged to the log once they are written.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from services.contract.history import Erased
from services.history.archive import Archive, ArchiveUnavailable
from services.history.document import checked
from services.history.entry import Entry, Unreadable, read
from services.history.log import Log
from services.runtime.consumers import Pending
from services.runtime.streams import StreamUnavailable

BATCH = 500
FETCH_TIMEOUT = 0.5  # seconds; as long a stop may wait for a fetch that brings nothing
GATHERING = 0.1  # seconds after a batch that was not full, so that the next one is worth its cost
PAUSE = 1.0  # seconds after a failure

log = logging.getLogger(__name__)


class Archiver:
    """Any number of these may run at once, in any number of processes."""

    def __init__(self, history: Log, archive: Archive) -> None:
        self._log = history
        self._archive = archive
        self._stopping = asyncio.Event()
        self._complained = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Stops between two batches."""
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            self._stopping.set()
            await task

    async def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                await self._step()
            except (ArchiveUnavailable, StreamUnavailable) as error:
                self._complain(error)
                await self._pause(PAUSE)
            except Exception:
                log.exception("archiving failed; trying again")
                await self._pause(PAUSE)

    async def _step(self) -> None:
        if not self._archive.connected:
            return await self._pause(FETCH_TIMEOUT)
        await self._log.open_archive(self._archive.id)
        if batch := await self._log.unarchived(BATCH, FETCH_TIMEOUT):
            await self._archive_all(batch)
            self._complained = False
            if len(batch) < BATCH:
                await self._pause(GATHERING)

    async def _archive_all(self, batch: Sequence[Pending]) -> None:
        entries = [checked(read(pending.stored)) for pending in batch]
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

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            return


def _is_unreadable(entry: Entry) -> bool:
    return isinstance(entry.record, Unreadable)
