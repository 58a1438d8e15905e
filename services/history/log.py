"""
The log of all sessions, and the snapshots of their contexts. Knows where things are in JetStream,
not what MongoDB has of them.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import NamedTuple
from uuid import uuid4

from msgspec.structs import replace

from services.contract import subjects
from services.contract.codec import decode, encode
from services.contract.errors import ServiceError
from services.contract.history import Erased, Exchange, LogRecord
from services.history import requests
from services.history.context import Snapshot, cut
from services.history.entry import Entry, Unreadable, read
from services.history.log_repair import LogRepair
from services.runtime.bus import Bus
from services.runtime.consumers import Consumer, PendingMessage
from services.runtime.streams import (
    Bucket,
    Conflict,
    StoredMessage,
    Stream,
    StreamState,
    StreamUnavailable,
)

# Of a new log; `nats stream edit HISTORY --max-bytes` gives it more. Some 500,000 exchanges: months
# of backlog for a MongoDB that is down, and little enough to fit beside it on a small machine.
MAX_BYTES = 1024**3
ARCHIVE = "archive"
SAVING = "snapshots"
# seconds after which a batch of a process that died is given to another: longer than MongoDB may
# take to write it
ACK_WAIT = 6.0
MAX_ACK_PENDING = 5000  # ten processes with a batch each
APPEND_TRIES = 10  # each lost to a turn of the same session that ended in that millisecond
RETRY_INTERVAL = 1.0  # seconds

log = logging.getLogger(__name__)


class Found(NamedTuple):
    """
    Exchanges, and the keys of the sessions that were erased after them: what is older of these is
    not to be shown.
    """

    entries: list[Entry]
    erased: set[str]


class Log:
    """`retention` in seconds, 0: for ever; `replicas` as in the settings."""

    def __init__(self, bus: Bus, retention: int, replicas: int | None = None) -> None:
        self._retention = retention
        self._replicas = replicas
        self._stream = Stream(bus, subjects.HISTORY_STREAM)
        self._snapshots = Bucket(bus, subjects.SESSIONS_BUCKET)
        self._saving = Consumer(bus, subjects.HISTORY_STREAM, SAVING)
        self.requests = requests.RequestIndex(bus, replicas)
        self._bus = bus
        self._database = ""
        self._archive: Consumer | None = None

    async def ensure(self) -> None:
        """
        Makes what is missing in JetStream, and brings its limits up to date; tries until it is
        done.
        """
        complaint = ""
        while why := await self._why_not_ensured():
            if why != complaint:
                log.warning("JetStream: %s; still trying (start nats-server with -js?)", why)
                complaint = why
            await asyncio.sleep(RETRY_INTERVAL)

    async def close(self) -> None:
        await self._saving.close()
        await self.requests.close()
        await self._close_archive()

    async def open_archive(self, database: str) -> None:
        """
        How far the log has been given to MongoDB is kept per database: one that is new, or was put
        in another's place, gets all that the log has. From now on the log drops nothing by itself.
        """
        if database == self._database:
            return
        await self._close_archive()
        self._archive = Consumer(self._bus, subjects.HISTORY_STREAM, f"{ARCHIVE}-{database}")
        await self._ensure_archive(self._archive)
        self._database = database

    async def _ensure_archive(self, archive: Consumer) -> None:
        await self._stream.refuse_when_full()
        await archive.ensure(ACK_WAIT, MAX_ACK_PENDING)

    async def _close_archive(self) -> None:
        if self._archive:
            await self._archive.close()

    async def _why_not_ensured(self) -> str:
        try:
            await self._stream.ensure(
                subjects.HISTORY_LOG, MAX_BYTES, self._retention, self._replicas
            )
            await self._snapshots.ensure(self._retention, self._replicas)
            await self._ensure_consumers()
        except StreamUnavailable as error:
            return str(error)
        return ""

    async def repair(self) -> None:
        """
        Makes what is lost in JetStream, for which a check is due then; nothing is done while that
        can't be used.
        """
        await self._why_not_ensured()

    async def repair_consumers(self) -> None:
        """The same of consumers, as long as the stream is there."""
        with suppress(StreamUnavailable):
            await self._ensure_consumers()

    async def _ensure_consumers(self) -> None:
        await self._saving.ensure(ACK_WAIT, MAX_ACK_PENDING)
        await self.requests.ensure()
        if self._archive:
            await self._ensure_archive(self._archive)

    async def state(self) -> StreamState:
        return await self._stream.state()

    async def snapshot(self, key: str) -> tuple[Snapshot, int]:
        """What was kept of the session's context, and its revision to `keep` another by."""
        value = await self._snapshots.get(key)
        if value is None or not value.data:
            return Snapshot(), value.revision if value else 0
        return self._decode(key, value.data), value.revision

    def _decode(self, key: str, data: bytes) -> Snapshot:
        try:
            return decode(data, Snapshot)
        except ServiceError as error:
            log.warning("snapshot of %s can't be read, the log is read instead: %s", key, error)
            return Snapshot()

    async def keep(self, key: str, snapshot: Snapshot, revision: int) -> bool:
        """
        False if it is not kept: another process may have been first, or JetStream may refuse it.
        """
        try:
            await self._snapshots.put(key, encode(snapshot), revision)
        except Conflict:
            return False
        except StreamUnavailable as error:
            log.warning("snapshot of %s not kept: %s", key, error)
            return False
        return True

    async def last(self, key: str) -> StoredMessage | None:
        """The session's last record."""
        return await self._stream.last(subjects.log(key))

    async def since(
        self, key: str, snapshot: Snapshot, last: StoredMessage | None
    ) -> tuple[Snapshot, list[Entry]]:
        """
        The session's records that the snapshot lacks, oldest first, up to the `last` one that there
        is, and what they are to be applied to: nothing, if the snapshot is of a log that is no
        more.
        """
        is_of_another_log = last is not None and last.seq < snapshot.applied_seq
        if is_of_another_log or not 0 <= snapshot.epoch <= snapshot.applied_seq:
            snapshot = Snapshot()
        entries = [entry async for entry in self._back(last, snapshot.applied_seq)]
        for entry in entries:
            if isinstance(entry.record, Unreadable):
                log.warning("record %d of %s: %s", entry.seq, key, entry.record.why)
        return snapshot, entries[::-1]

    async def append(self, key: str, record: LogRecord, message_id: str = "") -> int:
        """
        After the session's last record, whatever `previous` says; the sequence. One with the same
        `message_id`, within two minutes, is not appended. Raises Conflict if the session gets other
        records faster than this one.
        """
        subject, message_id = subjects.log(key), message_id or uuid4().hex
        for _ in range(APPEND_TRIES):
            last = await self.last(key)
            record = replace(record, previous=last.seq if last else 0)
            with suppress(Conflict):
                appended = await self._stream.append(
                    subject, encode(record), message_id, record.previous
                )
                return appended.seq
        raise Conflict

    async def rewind_consumers(self, all_of_them: bool = False) -> list[str]:
        """
        Restart the consumers that are ahead of the log; their work is idempotent. Return their
        names.
        """
        await self._ensure_consumers()  # a process may have died after it deleted them
        consumers = {SAVING: self._saving, requests.DURABLE: self.requests.consumer}
        consumers |= {ARCHIVE: self._archive} if self._archive else {}
        delivered = {name: await consumer.delivered() for name, consumer in consumers.items()}
        # read after the consumers: a record that is appended in between puts none of them ahead
        last_seq = (await self._stream.state()).last_seq
        ahead = [name for name, seq in delivered.items() if all_of_them or seq > last_seq]
        for name in ahead:
            await consumers[name].delete()
        await self._ensure_consumers()
        return ahead

    async def are_snapshots_ahead(self) -> bool:
        """Return whether the newest snapshot has records that the log does not have."""
        newest = await self._snapshots.before("", None)
        if newest is None or not newest[1].data:
            return False
        snapshot = self._decode(newest[0], newest[1].data)
        return snapshot.applied_seq > (await self._stream.state()).last_seq

    async def cut_snapshots(self) -> None:
        """
        Cut the snapshots that are ahead of the log to its end. They keep their turns, which are all
        that is left of the lost records.
        """
        last_seq = (await self._stream.state()).last_seq
        before: int | None = None
        while (found := await self._snapshots.before("", before)) is not None:
            key, value = found
            snapshot = self._decode(key, value.data) if value.data else Snapshot()
            if snapshot.applied_seq > last_seq:
                last = await self.last(key)
                end = last.seq if last else last_seq
                await self.keep(key, cut(snapshot, end), value.revision)
            before = value.revision

    async def _reset_snapshots(self, rescue: LogRepair) -> None:
        """Keep only the snapshots of sessions without records; the saver rebuilds the others."""
        last_seq = (await self._stream.state()).last_seq
        for key, value in (await self._snapshots.readable()).items():
            if value.data and await self.last(key) is None:
                await rescue.keep_snapshot(key, value.data)
        await self._snapshots.purge()
        async for key, data in rescue.snapshots():
            await self.keep(key, cut(self._decode(key, data), last_seq), 0)

    async def is_suspect(self) -> bool:
        """Return whether JetStream's figures are inconsistent, or it can't find the last record."""
        state = await self._stream.state()
        end = await self._stream.get(state.last_seq) if state.messages else None
        if end is None:
            return not state.is_whole
        last = await self._stream.last(end.subject)
        return not state.is_whole or last is None or last.seq < end.seq

    async def is_being_rescued(self) -> bool:
        """Return whether a process, maybe one that died, has begun a rescue."""
        return await self._rescue().is_under_way()

    async def rescue(self, is_under_way: bool = False) -> int | None:
        """
        Empties a damaged log and appends again what can be read of it; the number of records. None
        if another process is doing it. `is_under_way`: only if it is, still.
        """
        rescue = self._rescue()
        if not is_under_way:
            await rescue.begin()
        try:
            moved = await rescue.run()
            await self._reset_snapshots(rescue)
        except Conflict:
            return None
        await self.rewind_consumers(all_of_them=True)
        await rescue.finish()
        return moved

    def _rescue(self) -> LogRepair:
        return LogRepair(self._bus, self._stream, self.append)

    async def probe(self) -> None:
        """Raises StreamUnavailable if the log takes no records."""
        await self._stream.probe(subjects.HISTORY_PROBE)

    async def get(self, seq: int) -> Entry | None:
        stored = await self._stream.get(seq)
        return stored and read(stored)

    async def delete_before(self, key: str, seq: int) -> None:
        """
        The session's records before this one, message by message: a purge of a subject would move
        the archive's consumer to the log's end, past what it lacks of other sessions.
        """
        subject = subjects.log(key)
        found = await self._stream.next(subject, 1)
        while found is not None and found.seq < seq:
            _, found = await asyncio.gather(
                self._stream.delete(found.seq), self._stream.next(subject, found.seq + 1)
            )

    async def exchanges(
        self, tenant: str, key: str | None, limit: int, above: int, until: int | None = None
    ) -> Found:
        """
        The last `limit` exchanges after the sequence `above`, and not after `until`, newest first:
        of the session with this key, or (None) of all of the tenant's. What was erased is not among
        them.
        """
        subject = subjects.log(key) if key else subjects.log_of_tenant(tenant)
        last = await self._last(subject, until)
        walk = self._back(last, above) if key else self._back_in(subject, last, above)
        found = Found([], set())
        async for entry in walk:
            if isinstance(entry.record, Erased):
                found.erased.add(entry.key)
            elif isinstance(entry.record, Exchange) and entry.key not in found.erased:
                found.entries.append(entry)
            if len(found.entries) == limit or key in found.erased:
                break
        return found

    async def next_exchanges(self, key: str, limit: int, above: int) -> list[Entry]:
        """The session's first `limit` exchanges after the sequence `above`, oldest first."""
        subject = subjects.log(key)
        found: list[Entry] = []
        stored = await self._stream.next(subject, above + 1)
        while stored is not None and len(found) < limit:
            if isinstance((entry := read(stored)).record, Exchange):
                found.append(entry)
            stored = await self._stream.next(subject, stored.seq + 1)
        return found

    async def request_ids(self, key: str, above: int) -> tuple[set[str], int]:
        """
        Return the request ids of the session's exchanges after the sequence `above`, and its last
        sequence.
        """
        last = await self.last(key)
        records = [entry.record async for entry in self._back(last, above)]
        found = {record.request_id for record in records if isinstance(record, Exchange)}
        return found, last.seq if last else 0

    async def is_whole(self, key: str, erased: int) -> bool:
        """Whether the log has all of the session since then, but for what was lost for good."""
        if (await self._stream.state()).drops_old:  # there never was an archive
            return True
        first = await self._stream.next(subjects.log(key), erased + 1)
        if first is None or isinstance(record := read(first).record, Unreadable):
            return False
        return record.previous in (0, erased)

    async def unsaved_sessions(self, tenant: str, limit: int) -> list[str]:
        """
        The keys of the tenant's sessions that have records which their snapshots may lack, by their
        last ones. Raises StreamUnavailable if there are more records than `limit`.
        """
        subject = subjects.log_of_tenant(tenant)
        floor = await self._saving.floor()
        keys: dict[str, None] = {}
        seen = 0
        async for entry in self._back_in(subject, await self._stream.last(subject), floor):
            keys.setdefault(entry.key)
            seen += 1
            if seen > limit:
                raise StreamUnavailable("the snapshots are far behind it, and catching up")
        return list(reversed(keys))

    async def sessions(
        self, tenant: str, before: int | None
    ) -> AsyncIterator[tuple[str, Snapshot, int]]:
        """Key, snapshot and revision of the tenant's sessions, the last saved first."""
        prefix = f"{tenant}."
        while (found := await self._snapshots.before(prefix, before)) is not None:
            key, value = found
            if value.data:
                yield key, self._decode(key, value.data), value.revision
            before = value.revision

    async def unsaved(self, batch: int, timeout: float) -> Sequence[PendingMessage]:
        """Records of sessions whose snapshots are to be brought up to date."""
        return await _fetch(self._saving, batch, timeout)

    async def _last(self, subject: str, until: int | None) -> StoredMessage | None:
        """The subject's last message, or its last up to a sequence; it may have wildcards."""
        if until is None:
            return await self._stream.last(subject)
        stored = await self._stream.get(until)
        if stored is not None and subjects.matches(subject, stored.subject):
            return stored
        return await self._stream.before(subject, until)

    async def _back(self, stored: StoredMessage | None, above: int) -> AsyncIterator[Entry]:
        """From this message to the first of its session, each by the one that comes after it."""
        while stored is not None and stored.seq > above:
            entry = read(stored)
            yield entry
            stored = await self._previous(stored, entry, above)

    async def _previous(
        self, stored: StoredMessage, entry: Entry, above: int
    ) -> StoredMessage | None:
        if not isinstance(entry.record, Unreadable) and entry.record.previous < stored.seq:
            if entry.record.previous <= above:
                return None
            previous = await self._stream.get(entry.record.previous)
            if previous is None or previous.subject == stored.subject:
                return previous  # None: it has been dropped, and all that was before it
        return await self._stream.before(stored.subject, stored.seq)

    async def _back_in(
        self, subject: str, stored: StoredMessage | None, above: int
    ) -> AsyncIterator[Entry]:
        while stored is not None and stored.seq > above:
            yield read(stored)
            stored = await self._stream.before(subject, stored.seq)

    async def unarchived(self, batch: int, timeout: float) -> Sequence[PendingMessage]:
        """`open_archive` comes first."""
        assert self._archive is not None
        return await _fetch(self._archive, batch, timeout)

    async def between(self, first: int, last: int) -> AsyncIterator[Entry]:
        """All sessions' records with these sequences, oldest first."""
        while first <= last and (stored := await self._stream.next(subjects.HISTORY_LOG, first)):
            if stored.seq <= last:
                yield read(stored)
            first = stored.seq + 1

    async def drop(self, entries: Sequence[Entry]) -> None:
        """
        Drops these records, the oldest first: a session whose last record is older than its
        snapshot is taken for one of another log.
        """
        for entry in entries:
            await self._stream.delete(entry.seq)

    async def archived_until(self) -> int:
        """Whatever has this sequence or less is in the archive."""
        return await self._archive.floor() if self._archive else 0

    async def count_unarchived(self) -> int:
        """All, as long as no database has been seen."""
        if self._archive is None:
            return (await self._stream.state()).messages
        return await self._archive.unacknowledged()


async def _fetch(consumer: Consumer, batch: int, timeout: float) -> Sequence[PendingMessage]:
    """Fetch records without probes, which may be delivered before they are deleted."""
    fetched = await consumer.fetch(batch, timeout)
    for pending in fetched:
        if pending.stored.subject == subjects.HISTORY_PROBE:
            await pending.ack()
    return [each for each in fetched if each.stored.subject != subjects.HISTORY_PROBE]
