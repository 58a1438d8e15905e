"""
The request index: which record of the log holds the answer to a request. It is a fold of the log,
kept in a bucket for a day, and rebuilt if the bucket is lost.
"""

import asyncio
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, suppress
from datetime import UTC, datetime, timedelta

from msgspec import Struct

from services.contract import subjects
from services.contract.codec import decode, encode
from services.contract.errors import ServiceError
from services.contract.history import Exchange
from services.history.entry import Entry, read
from services.runtime.bus import Bus
from services.runtime.consumers import Consumer, PendingMessage
from services.runtime.streams import Bucket, Conflict, Stream, StreamUnavailable
from services.runtime.supervised import Fail, SupervisedLoop

KEPT_FOR = timedelta(days=1)
DURABLE = "requests"
ACK_WAIT = 6.0  # seconds after which the batch of a dead process is redelivered
MAX_ACK_PENDING = 5000
MAX_LAG = 500  # unfolded records that a lookup searches itself; with more, it is unavailable

BATCH = 200
PARALLEL = 20  # entries written at once
FETCH_TIMEOUT = 0.5  # seconds that a fetch waits for a first record
GATHERING = 0.05  # seconds after a batch that was not full, so that the next one is larger
PAUSE = 1.0  # seconds after a failure


class Position(Struct, frozen=True):
    """Where an exchange is: its session key, and the sequence of its record."""

    key: str
    seq: int


class RequestIndex:
    """
    Maps a request id to one exchange of its tenant: the first in the log, or a later one once the
    first is gone.
    """

    def __init__(self, bus: Bus, replicas: int | None) -> None:
        self._replicas = replicas
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
        await self._bucket.ensure(KEPT_FOR.total_seconds(), replicas)
        since = datetime.now(UTC) - KEPT_FOR
        await self.consumer.ensure(ACK_WAIT, MAX_ACK_PENDING, since)

    async def exists(self) -> bool:
        return await self._bucket.exists()

    async def close(self) -> None:
        await self.consumer.close()

    async def find(self, tenant: str, request_id: str) -> Position | None:
        """
        Return where the exchange is, or was: it may have been erased or dropped since. Raises
        StreamUnavailable, also while the index is rebuilt.
        """
        progress = await self.consumer.progress()  # before the entry: folded records are then found
        value = await self._bucket.get(subjects.request_entry(tenant, request_id))
        position = _position(value.data) if value else None
        if not progress.unacknowledged or await self._holds(position, request_id):
            return position
        if progress.unacknowledged > MAX_LAG:
            raise StreamUnavailable("the request index is being rebuilt")
        return await self._find_in_log(tenant, request_id, progress.floor) or position

    async def _find_in_log(self, tenant: str, request_id: str, above: int) -> Position | None:
        """Search the tenant's records that may not be folded yet."""
        subject = subjects.log_of_tenant(tenant)
        while stored := await self._log.next(subject, above + 1):
            if _request_id(entry := read(stored)) == request_id:
                return Position(entry.key, entry.seq)
            above = stored.seq
        return None

    async def unfolded(self, batch: int, timeout: float) -> Sequence[PendingMessage]:
        return await self.consumer.fetch(batch, timeout)

    async def add(self, entry: Entry) -> None:
        """Index the record if it is an exchange. Raises StreamUnavailable."""
        request_id = _request_id(entry)
        if not subjects.is_id(request_id):
            return
        key = subjects.request_entry(subjects.session_of_key(entry.key)[0], request_id)
        position = encode(Position(entry.key, entry.seq))
        with suppress(Conflict):
            return await self._bucket.put(key, position, 0)
        value = await self._bucket.get(key)
        if value and not await self._holds(_position(value.data), request_id):
            with suppress(Conflict):  # another process folds the same record
                await self._bucket.put(key, position, value.revision)

    async def _holds(self, position: Position | None, request_id: str) -> bool:
        """Return whether the log still has the exchange at this position."""
        if position is None:
            return False
        stored = await self._log.get(position.seq)
        return stored is not None and is_answer(read(stored), position, request_id)


class Indexer:
    """Folds new records into the index. Any number may run, in any number of processes."""

    def __init__(self, index: RequestIndex, fail: Fail) -> None:
        self._index = index
        self._loop = SupervisedLoop("indexer", self._step, fail)

    def running(self) -> AbstractAsyncContextManager[None]:
        """Stops between two batches."""
        return self._loop.running()

    async def _step(self) -> float:
        try:
            fetch = self._index.unfolded(BATCH, FETCH_TIMEOUT)
            batch = await self._loop.unless_stopped(fetch) or []
            if not batch and not await self._index.exists():
                raise StreamUnavailable("the request index is lost")
            await self._add_all(batch)
        except StreamUnavailable:  # reported by those who need the log
            await self._repair()
            return PAUSE
        return 0 if len(batch) == BATCH else GATHERING

    async def _add_all(self, batch: Sequence[PendingMessage]) -> None:
        entries = [read(pending.stored) for pending in batch]
        try:
            for start in range(0, len(entries), PARALLEL):
                await asyncio.gather(*map(self._index.add, entries[start : start + PARALLEL]))
        except StreamUnavailable:
            for pending in batch:
                await pending.give_back()
            raise
        for pending in batch:
            await pending.ack()

    async def _repair(self) -> None:
        """Create the bucket or the consumer again, if it is lost."""
        with suppress(StreamUnavailable):
            await self._index.ensure()


def is_answer(entry: Entry, position: Position, request_id: str) -> bool:
    """Return whether the entry answers the request. A recreated log reuses sequences."""
    return entry.key == position.key and _request_id(entry) == request_id


def _position(data: bytes) -> Position | None:
    """Decode an entry. Earlier versions stored claims of an Idempotency-Key under such names."""
    with suppress(ServiceError):
        return decode(data, Position)
    return None


def _request_id(entry: Entry) -> str:
    return entry.record.request_id if isinstance(entry.record, Exchange) else ""
