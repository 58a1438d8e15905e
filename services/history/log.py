"""The log of all sessions in JetStream, with the consumers that read it. Knows no MongoDB."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import NamedTuple
from uuid import uuid4

from msgspec.structs import replace

from services.contract import responses, subjects
from services.contract.codec import encode
from services.contract.history import Erased, Exchange, LogRecord
from services.history import requests
from services.history.entry import Entry, Reading, Unreadable, parse_entry
from services.history.limits import LIMITS, HistoryLimits
from services.history.requests import RequestIndex
from services.runtime.bus import Bus
from services.runtime.consumers import Consumer, MessageSize, message_sizes
from services.runtime.logs import RateLimitedLog
from services.runtime.streams import Bucket, Conflict, StoredMessage, Stream, StreamUnavailable

ARCHIVE_DURABLE = "archive"
SNAPSHOT_DURABLE = "snapshots"

log = logging.getLogger(__name__)


class ExchangeScan(NamedTuple):
    """
    Exchanges, newest first, and the keys of sessions that were erased after them: older exchanges
    of these must not be shown.
    """

    entries: Reading
    erased: set[str]


class SessionLog:
    """
    `retention_seconds`: age at which JetStream deletes records and snapshots (0: never);
    `replicas` as in the settings.
    """

    def __init__(
        self,
        bus: Bus,
        retention_seconds: int = 0,
        replicas: int | None = None,
        limits: HistoryLimits = LIMITS,
    ) -> None:
        self._bus = bus
        self._retention = retention_seconds
        self._replicas = replicas
        self.limits = limits
        self._database = ""
        self.stream = Stream(bus, subjects.HISTORY_STREAM)
        self.snapshots = Bucket(bus, subjects.SESSIONS_BUCKET)
        self.requests = RequestIndex(bus, replicas, limits)
        self._keys = Bucket(bus, subjects.KEYS_BUCKET)
        self.snapshot_consumer = Consumer(bus, subjects.HISTORY_STREAM, SNAPSHOT_DURABLE)
        self._consumers = {SNAPSHOT_DURABLE: self.snapshot_consumer}

    @property
    def archive_consumer(self) -> Consumer | None:
        """None until a MongoDB was connected once."""
        return self._consumers.get(ARCHIVE_DURABLE)

    async def ensure(self) -> None:
        """Create what is missing in JetStream and update its limits; retry until that succeeds."""
        failures = RateLimitedLog(log)
        while error := await self.try_ensure():
            failures.warning("JetStream unavailable (started with -js?) error=%s", error)
            await asyncio.sleep(self.limits.retry_seconds)

    async def try_ensure(self) -> str:
        """
        Like `ensure`, but once. Return the error, or "".

        The bucket of API keys is only created here: who may create a stream can have it copy
        others, or republish to any subject, so no other service may.
        """
        try:
            await self.stream.ensure(
                subjects.HISTORY_LOG, self.limits.max_log_bytes, self._retention, self._replicas
            )
            await self.snapshots.ensure(self._retention, self._replicas, allows_ttl=True)
            await self._keys.ensure(0, self._replicas or await self.stream.replicas())
            await self._ensure_consumers()
        except StreamUnavailable as error:
            return str(error)
        return ""

    async def try_ensure_consumers(self) -> None:
        """Create consumers that are missing, if JetStream is available."""
        with suppress(StreamUnavailable):
            await self._ensure_consumers()

    async def _ensure_consumers(self) -> None:
        if self.archive_consumer:  # from now on, a full log does not delete its oldest records
            await self.stream.refuse_when_full()
        for consumer in tuple(self._consumers.values()):  # `open_archive` may add one meanwhile
            await consumer.ensure(self.limits.ack_wait_seconds, self.limits.max_ack_pending)
        await self.requests.ensure()

    async def open_archive(self, database: str) -> None:
        """
        Open the consumer of this database. There is one per database, so that a new or replaced
        database gets all records of the log.
        """
        if database == self._database:
            return
        if self.archive_consumer:
            await self.archive_consumer.close()
        self._consumers[ARCHIVE_DURABLE] = Consumer(
            self._bus, subjects.HISTORY_STREAM, f"{ARCHIVE_DURABLE}-{database}"
        )
        await self._ensure_consumers()
        self._database = database

    async def close(self) -> None:
        for consumer in (*self._consumers.values(), self.requests.consumer):
            await consumer.close()

    async def append(self, key: str, record: LogRecord, message_id: str = "") -> int:
        """
        Append the record to its session, whatever its `previous` is. Return its sequence.

        A repeated `message_id` is dropped within two minutes. Raises Conflict if the session gets
        other records faster than this one; StreamUnavailable.
        """
        message_id = message_id or uuid4().hex
        for _ in range(self.limits.max_tries):
            last = await self.last(key)
            with suppress(Conflict):
                return await self.append_after(key, last.seq if last else 0, record, message_id)
        raise Conflict

    async def append_after(
        self, key: str, previous: int, record: LogRecord, message_id: str
    ) -> int:
        """Append the record. Raises Conflict if `previous` is not the last one (0: none)."""
        data = encode(replace(record, previous=previous))
        return (await self.stream.append(subjects.log(key), data, message_id, previous)).seq

    def sizes(self) -> AsyncIterator[MessageSize]:
        """Yield sequence, subject and size of all records, oldest first."""
        return message_sizes(self._bus, self.stream.name)

    def snapshot_sizes(self) -> AsyncIterator[MessageSize]:
        """Yield revision, subject and size of all snapshots; those of erased sessions expire."""
        return message_sizes(self._bus, f"KV_{subjects.SESSIONS_BUCKET}")

    async def last(self, key: str) -> StoredMessage | None:
        """Return the session's last record."""
        return await self.stream.last(subjects.log(key))

    async def count(self, key: str) -> int:
        """Return the number of the session's records."""
        return await self.stream.count(subjects.log(key))

    async def get(self, seq: int) -> Entry | None:
        stored = await self.stream.get(seq)
        return stored and parse_entry(stored)

    async def delete_before(self, key: str, seq: int) -> None:
        """
        Delete the session's records before this one, message by message: purging a subject would
        move the archive's consumer past records of other sessions that it lacks.
        """
        subject = subjects.log(key)
        found = await self.stream.next(subject, 1)
        while found is not None and found.seq < seq:
            _, found = await asyncio.gather(
                self.stream.delete(found.seq), self.stream.next(subject, found.seq + 1)
            )

    async def delete_exchange(self, key: str, request_id: str) -> None:
        """Delete the record of one exchange, if the log has it."""
        async for entry in self.walk_back(await self.last(key), 0):
            if entry.request_id == request_id:
                await self.stream.delete(entry.seq)

    async def newest_exchanges(
        self, tenant: str, key: str | None, limit: int, above: int, until: int | None = None
    ) -> ExchangeScan:
        """
        Return the last `limit` exchanges with sequences above `above` and at most `until`, of the
        session with this key, or (None) of all the tenant's. Erased ones are not among them.
        """
        subject = subjects.log(key) if key else subjects.log_of_tenant(tenant)
        last = await self._last_until(subject, until)
        scan = ExchangeScan(Reading(limit, self.limits.max_read_bytes), set())
        entries = self.walk_back(last, above) if key else self.search_back(subject, last, above)
        async for entry in entries:
            if isinstance(entry.record, Erased):
                scan.erased.add(entry.key)
            elif isinstance(entry.record, Exchange) and entry.key not in scan.erased:
                scan.entries.add(entry)
            if scan.entries.is_full or key in scan.erased:
                break
        return scan

    async def exchanges_after(self, key: str, limit: int, above: int) -> Reading:
        """Return the session's first `limit` exchanges with sequences above `above`."""
        found = Reading(limit, self.limits.max_read_bytes)
        async for stored in self.stream.walk(subjects.log(key), above + 1):
            if isinstance((entry := parse_entry(stored)).record, Exchange):
                found.add(entry)
            if found.is_full:
                break
        return found

    async def request_ids(self, key: str, above: int) -> tuple[set[str], int]:
        """
        Return the request ids of the session's exchanges with sequences above `above`, and the
        sequence of its last record.
        """
        last = await self.last(key)
        ids = {entry.request_id async for entry in self.walk_back(last, above)}
        return ids - {""}, last.seq if last else 0

    async def is_complete(self, key: str, since: int, first_seq: int) -> bool:
        """
        Return whether no exchange of the session after sequence `since` is only in MongoDB.
        `first_seq` is that of its first exchange (0: unknown).
        """
        if (await self.stream.state()).drops_old:  # no MongoDB was ever connected
            return True
        first = await self.stream.next(subjects.log(key), since + 1)
        if first is None or isinstance(record := parse_entry(first).record, Unreadable):
            return False
        if record.previous:
            return record.previous == since
        # it is the session's first record, or all earlier ones were trimmed when it was appended
        return not first_seq or first.seq <= first_seq

    async def _last_until(self, subject: str, until: int | None) -> StoredMessage | None:
        """Return the last message of the subject (which may have wildcards) up to a sequence."""
        if until is None:
            return await self.stream.last(subject)
        stored = await self.stream.get(until)
        if stored is not None and subjects.matches(subject, stored.subject):
            return stored
        return await self.stream.before(subject, until)

    async def walk_back(self, stored: StoredMessage | None, above: int) -> AsyncIterator[Entry]:
        """Yield this record and its session's earlier ones, newest first, by `previous`."""
        while stored is not None and stored.seq > above:
            entry = parse_entry(stored)
            yield entry
            stored = await self._previous(stored, entry, above)

    async def _previous(
        self, stored: StoredMessage, entry: Entry, above: int
    ) -> StoredMessage | None:
        if not isinstance(entry.record, Unreadable) and entry.record.previous < stored.seq:
            if entry.record.previous <= above:
                return None
            previous = await self.stream.get(entry.record.previous)
            if previous is None and not _has_holes(entry.key):
                return None  # it was trimmed, and all before it
            if previous is not None and previous.subject == stored.subject:
                return previous
        return await self.stream.before(stored.subject, stored.seq)

    async def search_back(
        self, subject: str, stored: StoredMessage | None, above: int
    ) -> AsyncIterator[Entry]:
        """Yield this record and the subject's earlier ones, newest first."""
        while stored is not None and stored.seq > above:
            yield parse_entry(stored)
            stored = await self.stream.before(subject, stored.seq)

    async def archived_until(self) -> int:
        """Return the sequence up to which MongoDB has all exchanges."""
        return await self.archive_consumer.floor() if self.archive_consumer else 0

    async def count_unarchived(self) -> int:
        """
        Return how many records MongoDB lacks: all, if none was ever connected. A consumer counts a
        record a moment after it was appended; until then this is 1.
        """
        if self.archive_consumer is None:
            return (await self.stream.state()).messages
        progress = await self.archive_consumer.progress()
        if progress.unacknowledged == 0 and await self._has_after(progress.floor):
            return 1
        return progress.unacknowledged

    async def _has_after(self, seq: int) -> bool:
        """Return whether the log has a record after this sequence."""
        if (await self.stream.state()).last_seq <= seq:
            return False  # the usual case, without reading a record
        last = await self.stream.last(subjects.HISTORY_LOG)
        return last is not None and last.seq > seq

    async def restart_consumers(self, include_current: bool = False) -> list[str]:
        """Restart the consumers that are ahead of the log, or all. Return their names."""
        # copied before they are ensured: `open_archive` may add one that does not exist yet
        consumers = self._consumers | {requests.DURABLE: self.requests.consumer}
        await self._ensure_consumers()  # a process may have died after it deleted them
        delivered = {name: await each.delivered() for name, each in consumers.items()}
        # read after the consumers: a record that is appended in between puts none of them ahead
        last_seq = (await self.stream.state()).last_seq
        ahead = [name for name, seq in delivered.items() if include_current or seq > last_seq]
        for name in ahead:
            await consumers[name].delete()
        await self._ensure_consumers()
        return ahead


def _has_holes(key: str) -> bool:
    """Return whether single records of the session may have been deleted: Removed."""
    return responses.is_session(subjects.session_of_key(key)[1])
