"""
Repairs a log whose store is damaged, as after two nats-servers wrote to it: nats-server then
acknowledges records that it can't find again, also after a restart, until the stream is emptied.
"""

import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from uuid import uuid4

from msgspec.structs import replace

from services.contract import subjects
from services.contract.history import Cleared, Erased, Exchange, LogRecord
from services.history.entry import Unreadable, read
from services.runtime.bus import Bus
from services.runtime.streams import Conflict, Stored, Stream

LOCK_TIME = timedelta(seconds=60)
"""After which a lock that was not renewed is taken over: its process died."""
RENEWED_EVERY = 500  # records
NO_LIMIT = -1

log = logging.getLogger(__name__)
Append = Callable[[str, LogRecord, str], Awaitable[int]]


class Rescue:
    """
    All that can be read is copied to a second stream, then the log is emptied, and then the records
    are moved back. Wherever a process dies in between, another goes on.
    """

    def __init__(self, bus: Bus, damaged: Stream, append: Append) -> None:
        self._damaged = damaged
        self._append = append
        self._safe = Stream(bus, subjects.HISTORY_RESCUED_STREAM)
        self._lock = 0  # its sequence
        self._clears: dict[
            str, tuple[int, int]
        ] = {}  # by key: last Cleared or Erased, before and after

    async def run(self) -> int | None:
        """The number of records that were moved back; None if another process is doing it."""
        await self._safe.ensure(subjects.HISTORY_RESCUED, NO_LIMIT, 0)
        try:
            await self._take_lock()
            if await self._safe.last(subjects.HISTORY_RESCUED_WHOLE) is None:
                await self._copy()
            if await self._safe.last(subjects.HISTORY_RESCUED_EMPTIED) is None:
                await self._damaged.purge()
                await self._mark(subjects.HISTORY_RESCUED_EMPTIED)
            return await self._move_back()
        except Conflict:
            return None

    async def finish(self) -> None:
        await self._safe.remove()

    async def is_under_way(self) -> bool:
        return await self._safe.exists()

    async def _take_lock(self) -> None:
        last = await self._safe.last(subjects.HISTORY_RESCUED_LOCK)
        if last is not None and datetime.now(UTC) - last.time < LOCK_TIME:
            raise Conflict
        self._lock = last.seq if last else 0
        await self._renew_lock()

    async def _mark(self, subject: str) -> None:
        await self._safe.append(subject, b"", uuid4().hex, 0)

    async def _renew_lock(self) -> None:
        """Raises Conflict if another process has taken it over."""
        lock = subjects.HISTORY_RESCUED_LOCK
        self._lock = (await self._safe.append(lock, b"", uuid4().hex, self._lock)).seq

    async def _copy(self) -> None:
        await self._safe.purge()  # what a process that died has copied
        self._lock = copied = 0
        async for stored in self._damaged.readable():
            if stored.subject == subjects.HISTORY_PROBE:
                continue
            if copied % RENEWED_EVERY == 0:
                await self._renew_lock()
            subject = subjects.rescued(subjects.key_of_log(stored.subject))
            last = await self._safe.last(subject)
            message_id = f"{stored.seq} {stored.time.isoformat()}"
            data = b"%d %b" % (stored.seq, stored.data)
            await self._safe.append(subject, data, message_id, last.seq if last else 0)
            copied += 1
        await self._mark(subjects.HISTORY_RESCUED_WHOLE)

    async def _move_back(self) -> int:
        moved = 0
        while stored := await self._safe.next(subjects.HISTORY_RESCUED_RECORDS, 1):
            if moved % RENEWED_EVERY == 0:
                await self._renew_lock()
            await self._move(stored)
            await self._safe.delete(stored.seq)
            moved += 1
        return moved

    async def _move(self, stored: Stored) -> None:
        key = subjects.key_of_rescued(stored.subject)
        seq, _, data = stored.data.partition(b" ")
        entry = read(Stored(int(seq), subjects.log(key), data, stored.time))
        if isinstance(entry.record, Unreadable):
            log.warning("record %d of %s can't be read: %s", entry.seq, key, entry.record.why)
            return
        record, cleared = entry.record, self._clears.get(key)
        if isinstance(record, Exchange) and cleared and record.epoch >= cleared[0]:
            record = replace(record, epoch=cleared[1])
        new_seq = await self._append(key, record, f"rescued {stored.seq} {stored.time.isoformat()}")
        if isinstance(record, Cleared | Erased):
            self._clears[key] = entry.seq, new_seq
