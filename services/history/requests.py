"""
The request index: which record of the log holds the answer to a request. It is a fold of the log,
stored in a bucket for a day, and rebuilt if the bucket is lost.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from msgspec import Struct

from services.contract import subjects
from services.contract.codec import decode, encode
from services.contract.errors import ServiceError
from services.history.entry import Entry, parse_entry
from services.history.limits import HistoryLimits
from services.history.log_consumer import LogConsumer
from services.runtime.bus import Bus
from services.runtime.consumers import Consumer, PendingMessage
from services.runtime.streams import Bucket, Conflict, StoredMessage, Stream, StreamUnavailable
from services.runtime.supervised import Fail

RETENTION = timedelta(days=1)
DURABLE = "requests"


class IndexEntry(Struct, frozen=True):
    """Where an exchange is: its session key, and the sequence of its record."""

    key: str
    seq: int

    def holds(self, entry: Entry, request_id: str) -> bool:
        """Return whether this is the exchange of the request: a recreated log reuses sequences."""
        return entry.key == self.key and entry.request_id == request_id


class Place(NamedTuple):
    """Where an exchange is, or was: then the log does not have its `entry` any more."""

    key: str
    seq: int
    entry: Entry | None = None


class RequestIndex:
    """
    Maps a request id to one exchange of its tenant: the first in the log, or a later one once the
    first is gone.
    """

    def __init__(self, bus: Bus, replicas: int | None, limits: HistoryLimits) -> None:
        self._replicas = replicas
        self._limits = limits
        self._log = Stream(bus, subjects.HISTORY_STREAM)
        self._bucket = Bucket(bus, subjects.REQUESTS_BUCKET)
        self.consumer = Consumer(bus, subjects.HISTORY_STREAM, DURABLE)

    async def ensure(self) -> None:
        """
        Create the bucket and the consumer if they are missing. A new bucket needs all entries
        again, so the consumer is deleted first: then this process may die at any point. Raises
        StreamUnavailable.
        """
        if not await self._bucket.exists():
            await self.consumer.delete()
        replicas = self._replicas or await self._log.replicas()
        await self._bucket.ensure(RETENTION.total_seconds(), replicas)
        limits, since = self._limits, datetime.now(UTC) - RETENTION
        await self.consumer.ensure(limits.ack_wait_seconds, limits.max_ack_pending, since)

    async def exists(self) -> bool:
        return await self._bucket.exists()

    async def find(self, tenant: str, request_id: str) -> Place | None:
        """
        Return where the exchange is, or was before it was erased or trimmed. Raises
        StreamUnavailable, also while the index is rebuilt.

        nats-server counts a record as pending a little after it has acknowledged it, so what is not
        indexed, or not where the index says, is looked for in the log even if nothing seems to be
        pending.
        """
        progress = await self.consumer.progress()  # before the entry: indexed records are found
        value = await self._bucket.get(subjects.request_entry(tenant, request_id))
        indexed = _decode(value.data) if value else None
        if indexed and (entry := await self._entry(indexed, request_id)):
            return Place(entry.key, entry.seq, entry)
        if progress.unacknowledged > self._limits.max_index_lag:
            raise StreamUnavailable("the request index is being rebuilt")
        if entry := await self._find_in_log(tenant, request_id, progress.floor):
            return Place(entry.key, entry.seq, entry)
        return Place(indexed.key, indexed.seq) if indexed else None

    async def _find_in_log(self, tenant: str, request_id: str, above: int) -> Entry | None:
        """Search the tenant's records that may not be indexed yet."""
        async for stored in self._log.walk(subjects.log_of_tenant(tenant), above + 1):
            if (entry := parse_entry(stored)).request_id == request_id:
                return entry
        return None

    async def add(self, entry: Entry) -> None:
        """Index the record if it is an exchange. Raises StreamUnavailable."""
        if not subjects.is_id(entry.request_id):
            return
        key = subjects.request_entry(subjects.session_of_key(entry.key)[0], entry.request_id)
        data = encode(IndexEntry(entry.key, entry.seq))
        with suppress(Conflict):
            await self._bucket.put(key, data, 0)
            return
        value = await self._bucket.get(key)
        other = _decode(value.data) if value else None
        if value and not (other and await self._entry(other, entry.request_id)):
            with suppress(Conflict):  # another process indexes the same record
                await self._bucket.put(key, data, value.revision)

    async def _entry(self, indexed: IndexEntry, request_id: str) -> Entry | None:
        """Return the exchange at this position, unless the log does not have it any more."""
        stored = await self._log.get(indexed.seq)
        entry = parse_entry(stored) if stored else None
        return entry if entry and indexed.holds(entry, request_id) else None


class Indexer(LogConsumer):
    """Adds new records to the request index."""

    def __init__(self, index: RequestIndex, fail: Fail, limits: HistoryLimits) -> None:
        super().__init__("indexer", fail, limits, limits.index_batch)
        self._index = index

    async def fetch(self, batch: int, timeout: float) -> Sequence[PendingMessage]:
        fetched = await self._index.consumer.fetch(batch, timeout)
        if not fetched and not await self._index.exists():
            raise StreamUnavailable("the request index is lost")
        return fetched

    async def process(self, records: Sequence[StoredMessage]) -> None:
        entries, parallel = [parse_entry(stored) for stored in records], self._limits.index_parallel
        for start in range(0, len(entries), parallel):
            await asyncio.gather(*map(self._index.add, entries[start : start + parallel]))

    async def recover(self, error: Exception) -> None:
        with suppress(StreamUnavailable):  # requests that need the log report it
            await self._index.ensure()


def _decode(data: bytes) -> IndexEntry | None:
    """Earlier versions stored claims of an Idempotency-Key under such keys; they are ignored."""
    with suppress(ServiceError):
        return decode(data, IndexEntry)
    return None
