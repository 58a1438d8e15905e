"""
Repairs a log whose store was damaged by two nats-servers. nats-server then acknowledges records
that it can't find again, even after a restart, until the stream is emptied.
"""

import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import NamedTuple
from uuid import uuid4

from msgspec.structs import replace

from services.contract import subjects
from services.contract.history import Cleared, Erased, Exchange, LogRecord
from services.history.entry import Unreadable, read
from services.runtime.bus import Bus
from services.runtime.streams import Conflict, MessageTooLarge, StoredMessage, Stream

LOCK_TIME = timedelta(seconds=60)
"""After which a lock that was not renewed is taken over: its process died."""
RENEW_INTERVAL = 10.0  # seconds between two renewals of the lock
NO_LIMIT = -1

log = logging.getLogger(__name__)
Append = Callable[[str, LogRecord, str], Awaitable[int]]


class Clear(NamedTuple):
    """Sequences of a session's last Cleared or Erased, in the damaged log and in the new one."""

    before: int
    after: int


class LogRepair:
    """
    All that can be read is copied to a second stream, then the log is emptied, and then the records
    are moved back. Wherever a process dies in between, another goes on.

    Until the log is emptied, whatever is written to the second stream names that stream's end: a
    process that was frozen, and whose lock was taken over, can write nothing more.
    """

    def __init__(self, bus: Bus, damaged: Stream, append: Append) -> None:
        self._damaged = damaged
        self._append = append
        self._safe = Stream(bus, subjects.HISTORY_REPAIR_STREAM)
        self._end = 0  # sequence of the last message of `_safe`
        self._lock = 0  # its sequence
        self._renewed_at = -math.inf
        self._clears: dict[str, Clear | None] = {}  # by key

    async def begin(self) -> None:
        await self._safe.ensure(subjects.HISTORY_REPAIR, NO_LIMIT, 0)

    async def run(self) -> int:
        """
        Return the number of records that were moved back. Raises Conflict if another process is
        doing it; StreamUnavailable, also if nobody began a rescue, or another process has ended it.
        """
        await self._take_lock()
        if await self._safe.last(subjects.HISTORY_REPAIR_EMPTIED) is None:
            await self._empty()
            await self._write(subjects.HISTORY_REPAIR_EMPTIED, b"")
        return await self._move_back()

    async def keep_snapshot(self, key: str, data: bytes) -> None:
        """Until `finish`. Raises Conflict if another process has taken over."""
        await self._keep_lock()
        await self._write(subjects.repair_snapshot(key), data)

    async def snapshots(self) -> AsyncIterator[tuple[str, bytes]]:
        """Keys and data of those that were kept, also by a process that died since."""
        stored = await self._safe.next(subjects.HISTORY_REPAIR_SNAPSHOTS, 1)
        while stored is not None:
            yield subjects.key_of_repair(stored.subject), stored.data
            stored = await self._safe.next(subjects.HISTORY_REPAIR_SNAPSHOTS, stored.seq + 1)

    async def finish(self) -> None:
        await self._safe.remove()

    async def is_under_way(self) -> bool:
        return await self._safe.exists()

    async def _take_lock(self) -> None:
        last = await self._safe.last(subjects.HISTORY_REPAIR_LOCK)
        if last is not None and datetime.now(UTC) - last.time < LOCK_TIME:
            raise Conflict
        self._lock = last.seq if last else 0
        await self._renew_lock()

    async def _renew_lock(self) -> None:
        """Raises Conflict if another process has taken it over."""
        lock = subjects.HISTORY_REPAIR_LOCK
        self._lock = (await self._safe.append(lock, b"", uuid4().hex, self._lock)).seq
        self._end = self._lock
        self._renewed_at = time.monotonic()

    async def _keep_lock(self) -> None:
        if time.monotonic() - self._renewed_at > RENEW_INTERVAL:
            await self._renew_lock()

    async def _write(self, subject: str, data: bytes) -> None:
        """Raises Conflict if another process has written to the second stream."""
        self._end = (await self._safe.append_at(subject, data, self._end)).seq

    async def _empty(self) -> None:
        """
        Goes on after the last record that was copied, also with what is appended meanwhile. (Where
        copying began is not left to message ids: nats-server keeps those of purged messages.)
        """
        last = await self._safe.last(subjects.HISTORY_REPAIR_RECORDS)
        copied = _split(last)[0] if last else 0
        while (state := await self._damaged.state()).messages:
            await self._copy(max(copied + 1, state.first_seq), state.last_seq)
            await self._damaged.purge(copied := state.last_seq)

    async def _copy(self, first: int, last: int) -> None:
        for seq in range(first, last + 1):
            await self._keep_lock()
            stored = await self._damaged.get(seq)
            if stored is not None and _is_record(stored):
                await self._copy_record(stored)

    async def _copy_record(self, stored: StoredMessage) -> None:
        subject = subjects.repair_record(subjects.key_of_log(stored.subject))
        try:
            await self._write(subject, b"%d %b" % (stored.seq, stored.data))
        except MessageTooLarge as error:  # it would never be repaired
            log.error("record %d of %s is lost: %s", stored.seq, stored.subject, error)

    async def _move_back(self) -> int:
        moved = 0
        while stored := await self._safe.next(subjects.HISTORY_REPAIR_RECORDS, 1):
            await self._keep_lock()
            try:
                await self._move(stored)
            except MessageTooLarge as error:
                log.error("record %d of %s is lost: %s", stored.seq, stored.subject, error)
            await self._safe.delete(stored.seq)
            moved += 1
        return moved

    async def _move(self, stored: StoredMessage) -> None:
        key = subjects.key_of_repair(stored.subject)
        seq, data = _split(stored)
        message_id = f"rescued {stored.seq} {stored.time.isoformat()}"
        record = read(StoredMessage(seq, subjects.log(key), data, stored.time)).record
        if isinstance(record, Unreadable):
            log.warning("record %d of %s can't be read: %s", seq, key, record.why)
            last = await self._damaged.last(subjects.log(key))
            await self._damaged.append(subjects.log(key), data, message_id, last.seq if last else 0)
            return
        if isinstance(record, Exchange):
            cleared = await self._last_clear(key)
            if cleared and record.epoch >= cleared.before:
                record = replace(record, epoch=cleared.after)
        new_seq = await self._append(key, record, message_id)
        if isinstance(record, Cleared | Erased):
            await self._write(subjects.repair_clear(key), b"%d %d" % (seq, new_seq))
            self._clears[key] = Clear(seq, new_seq)

    async def _last_clear(self, key: str) -> Clear | None:
        """Also if the process that moved it has died since."""
        if key not in self._clears:
            stored = await self._safe.last(subjects.repair_clear(key))
            self._clears[key] = Clear(*map(int, stored.data.split())) if stored else None
        return self._clears[key]


def _is_record(stored: StoredMessage) -> bool:
    return stored.subject != subjects.HISTORY_PROBE and subjects.matches(
        subjects.HISTORY_LOG, stored.subject
    )


def _split(rescued: StoredMessage) -> tuple[int, bytes]:
    """Return the sequence that the record had in the damaged log, and its data."""
    seq, _, data = rescued.data.partition(b" ")
    return int(seq), data
