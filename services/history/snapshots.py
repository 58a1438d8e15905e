"""
Snapshots of sessions: the fold of their records so far, stored to save time. A context is its
snapshot and the records that came after it.
"""

import asyncio
import logging
from collections import OrderedDict, defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from services.contract import subjects
from services.contract.codec import decode, encode
from services.contract.errors import ServiceError
from services.contract.history import Erased, Removed, Window
from services.history.context import Snapshot, WindowSize, drop_expired, fold, rewind, window
from services.history.entry import Entry, Unreadable, parse_entry
from services.history.log import SessionLog
from services.history.log_consumer import LogConsumer
from services.history.settings import HistorySettings
from services.runtime.consumers import PendingMessage
from services.runtime.streams import BucketValue, Conflict, StoredMessage, StreamUnavailable
from services.runtime.supervised import Fail

log = logging.getLogger(__name__)
Spawn = Callable[[Coroutine[Any, Any, Any]], asyncio.Task[Any]]


class Loaded(NamedTuple):
    """
    `revision` is that of the stored snapshot (0: none), by which a new one replaces it. `is_new`:
    the snapshot differs from the stored one.
    """

    snapshot: Snapshot
    revision: int
    is_new: bool = False


class Update(NamedTuple):
    """An encoded snapshot to store for `ttl` seconds (None: for ever) in place of `revision`."""

    key: str
    data: bytes
    revision: int
    ttl: float | None
    is_new: bool


class Snapshots:
    """`spawn` runs work that no request waits for."""

    def __init__(self, session_log: SessionLog, settings: HistorySettings, spawn: Spawn) -> None:
        self._log = session_log
        self._bucket = session_log.snapshots
        self._settings = settings
        self._spawn = spawn
        self._recent = RecentSnapshots(session_log.limits.recent_snapshot_bytes)
        self._size = WindowSize(settings.history_exchanges, session_log.limits.max_page_bytes)

    async def current(self, key: str) -> Snapshot:
        """Return the session up to its last record. Its snapshot is stored in the background."""
        loaded = await self._load_current(key)
        if loaded.is_new:
            self._spawn(self.store(key, loaded.snapshot, loaded.revision))
        return loaded.snapshot

    def window(self, snapshot: Snapshot) -> Window | None:
        """
        Return how a worker may add exchanges to the context. None with HISTORY_RETENTION: history
        truncates before it drops expired turns, so a worker can't reproduce the result.
        """
        return None if self._settings.retention_seconds else window(snapshot, self._size)

    async def save(self, key: str) -> bool:
        """Store the session up to its last record. Return False if that failed."""
        loaded = await self._load_current(key)
        return not loaded.is_new or await self.store(key, loaded.snapshot, loaded.revision)

    async def save_or_raise(self, key: str) -> None:
        """
        Store the session up to its last record. Raises Conflict if other processes store the same
        snapshot faster, or JetStream stores none.
        """
        for _ in range(self._log.limits.max_tries):
            if await self.save(key):
                return
        raise Conflict

    async def add(self, sessions: Sequence[Sequence[Entry]]) -> None:
        """
        Store the snapshot of each session with these of its records, oldest first, and any others
        that it lacks. They are stored in this order, in which they are then listed. Raises Conflict
        as `save_or_raise` does.
        """
        limits = self._log.limits
        group: list[Update] = []
        for start in range(0, len(sessions), limits.snapshot_reads):
            read = sessions[start : start + limits.snapshot_reads]
            for update in await asyncio.gather(*map(self._next, read)):
                if update.is_new:
                    group.append(update)
                size = sum(len(update.data) for update in group)
                if size > limits.snapshot_group_bytes or len(group) == limits.snapshot_parallel:
                    await self._put_in_order(group)
                    group = []
        await self._put_in_order(group)

    async def _put_in_order(self, group: Sequence[Update]) -> None:
        """Store the snapshots at once. After one that was outdated, store later ones again."""
        for _ in range(self._log.limits.max_tries):
            stored = await asyncio.gather(*map(self._put, group))
            if all(stored):
                return
            rest = group[stored.index(False) :]
            group = _misplaced(await asyncio.gather(*(self._update(each.key) for each in rest)))
        raise Conflict

    async def _next(self, entries: Sequence[Entry]) -> Update:
        """Return the session's snapshot with these records."""
        key = entries[0].key
        stored, revision, _ = await self._before(entries)
        later = [entry for entry in entries if entry.seq > stored.applied_seq]
        if _is_chain(stored, later):
            return self._encoded(key, Loaded(self._fold(stored, later), revision, bool(later)))
        return await self._update(key)

    async def _update(self, key: str) -> Update:
        """Return the session's snapshot up to its last record."""
        return self._encoded(key, await self._load_current(key))

    async def _before(self, entries: Sequence[Entry]) -> Loaded:
        """
        Return the snapshot that these entries follow: the one that this process stored last, if
        they follow it directly, so that its revision is checked with the next one; else a read.
        """
        key = entries[0].key
        if recent := self._recent.get(key):
            snapshot = _decode(key, recent.data)
            if entries[0].seq > snapshot.applied_seq and _is_chain(snapshot, entries):
                return Loaded(snapshot, recent.revision)
        return await self.load(key)

    def forget_recent(self) -> None:
        """Read all snapshots again: NATS may be back with another store."""
        self._recent.clear()

    async def load(self, key: str) -> Loaded:
        """Return the stored snapshot; an empty one if there is none, or it can't be decoded."""
        value = await self._bucket.get(subjects.snapshot_entry(key))
        return Loaded(_decode(key, value.data), value.revision) if value else Loaded(Snapshot(), 0)

    async def store(self, key: str, snapshot: Snapshot, revision: int) -> bool:
        """
        Return False if another process replaced this revision, or JetStream refuses it. The
        snapshot of an erased session expires: it only serves answers that had begun before.
        """
        return await self._put(self._encoded(key, Loaded(snapshot, revision)))

    def _encoded(self, key: str, loaded: Loaded) -> Update:
        is_erased = loaded.snapshot.active_at is None
        ttl = self._log.limits.erased_snapshot_seconds if is_erased else None
        return Update(key, encode(loaded.snapshot), loaded.revision, ttl, loaded.is_new)

    async def _put(self, update: Update) -> bool:
        key, data = update.key, update.data
        self._recent.drop(key)
        try:
            revision = await self._bucket.put(
                subjects.snapshot_entry(key), data, update.revision, update.ttl
            )
        except Conflict:
            return False
        except StreamUnavailable as error:
            log.warning("snapshot not stored session=%s error=%s", key, error)
            return False
        self._recent.put(key, BucketValue(data, revision))
        return True

    async def newest_first(
        self, prefix: str = "", before: int | None = None
    ) -> AsyncIterator[tuple[str, Loaded]]:
        """Yield keys that start with `prefix` and their snapshots, by descending revision."""
        while (found := await self._bucket.before(prefix, before)) is not None:
            key, value = subjects.key_of_snapshot(found[0]), found[1]
            if value.data:
                yield key, Loaded(_decode(key, value.data), value.revision)
            before = value.revision

    async def unsaved_sessions(self, tenant: str) -> list[str]:
        """
        Return the tenant's sessions with records that their snapshots may lack, by their last
        records. Raises StreamUnavailable if there are too many records.
        """
        subject = subjects.log_of_tenant(tenant)
        floor = await self._log.snapshot_consumer.floor()
        last = await self._log.stream.last(subject)
        keys: dict[str, None] = {}
        count = 0
        async for entry in self._log.search_back(subject, last, floor):
            if not isinstance(entry.record, Unreadable):  # whose key may name no session
                keys.setdefault(entry.key)
            count += 1
            if count > self._log.limits.max_unsaved:
                raise StreamUnavailable("the snapshots are far behind it, and catching up")
        return list(reversed(keys))

    async def records_after(
        self, key: str, snapshot: Snapshot, last: StoredMessage | None
    ) -> tuple[Snapshot, list[Entry]]:
        """
        Return the session's records up to the `last` one that the snapshot lacks, oldest first,
        and the snapshot to apply them to: an empty one if this one is of another log.
        """
        is_of_another_log = last is not None and last.seq < snapshot.applied_seq
        if is_of_another_log or not 0 <= snapshot.epoch <= snapshot.applied_seq:
            snapshot = Snapshot()
        entries = [entry async for entry in self._log.walk_back(last, snapshot.applied_seq)]
        for entry in entries:
            if isinstance(entry.record, Unreadable):
                reason = entry.record.reason
                log.warning("record unreadable session=%s seq=%d: %s", key, entry.seq, reason)
        return snapshot, entries[::-1]

    async def _load_current(self, key: str) -> Loaded:
        (stored, revision, _), last = await asyncio.gather(self.load(key), self._log.last(key))
        if _seq(last) < stored.applied_seq:  # read before records of the snapshot were appended
            last = await self._log.last(key)
        base, entries = await self.records_after(key, stored, last)
        is_complete = 0 < _seq(last) == stored.applied_seq or _continues(stored, entries)
        if not is_complete and (await self.load(key)).revision != revision:
            return await self._load_current(key)  # what is missing was stored, then trimmed
        # if only expired turns were lost, it is not stored: that would restart its TTL and move the
        # session up in the list
        is_new = bool(entries) or base != stored
        return Loaded(self._fold(base, entries), revision, is_new)

    def _fold(self, snapshot: Snapshot, entries: Sequence[Entry]) -> Snapshot:
        for entry in entries:
            snapshot = fold(snapshot, entry, self._size)
        if retention := self._settings.retention_seconds:
            snapshot = drop_expired(snapshot, datetime.now(UTC) - timedelta(seconds=retention))
        return snapshot

    # for the repair of a log: what the snapshots have that it does not

    async def are_ahead(self) -> bool:
        """Return whether the newest snapshot has records after the end of the log."""
        async for _, newest in self.newest_first():
            # read after the snapshot: a record that is appended in between puts it not ahead
            return newest.snapshot.applied_seq > (await self._log.stream.state()).last_seq
        return False

    async def rewind(self) -> None:
        """
        Rewind snapshots that are ahead of the log to its end. They keep their turns, which are all
        that is left of the lost records.
        """
        last_seq = (await self._log.stream.state()).last_seq
        async for key, stored in self.newest_first():
            if stored.snapshot.applied_seq > last_seq:
                last = await self._log.last(key)
                end = last.seq if last else last_seq
                await self.store(key, rewind(stored.snapshot, end), stored.revision)

    async def restore(self, key: str, data: bytes, last_seq: int) -> None:
        await self.store(key, rewind(_decode(key, data), last_seq), 0)


class RecentSnapshots:
    """
    Snapshots that this process stored last, so that a session's next one needs no read. If another
    process has replaced one, its revision is outdated, and storing the next one is a conflict.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._stored: OrderedDict[str, BucketValue] = OrderedDict()

    def get(self, key: str) -> BucketValue | None:
        return self._stored.get(key)

    def put(self, key: str, value: BucketValue) -> None:
        """Keep a snapshot, in place of those that were stored longest ago."""
        self.drop(key)
        self._stored[key] = value
        self._bytes += len(value.data)
        while self._bytes > self._max_bytes:
            self.drop(next(iter(self._stored)))

    def drop(self, key: str) -> None:
        if value := self._stored.pop(key, None):
            self._bytes -= len(value.data)

    def clear(self) -> None:
        self._stored.clear()
        self._bytes = 0


class SnapshotSaver(LogConsumer):
    """
    Keeps snapshots up to date, so that sessions are listed in log order, and completes deletions
    that a process began.
    """

    def __init__(self, session_log: SessionLog, snapshots: Snapshots, fail: Fail) -> None:
        limits = session_log.limits
        # so that a backlog leaves room for requests
        super().__init__("snapshot saver", fail, limits, limits.snapshot_batch, rest=0.5)
        self._log = session_log
        self._snapshots = snapshots

    async def fetch(self, batch: int, timeout: float) -> Sequence[PendingMessage]:
        return await self._log.snapshot_consumer.fetch(batch, timeout)

    async def process(self, records: Sequence[StoredMessage]) -> None:
        """Save sessions in the order of their last records, as far as this batch tells."""
        entries = sorted(map(parse_entry, records), key=lambda entry: entry.seq)
        by_session: dict[str, list[Entry]] = defaultdict(list)
        for entry in entries:
            if not isinstance(entry.record, Unreadable):
                by_session[entry.key].append(entry)
        sessions = sorted(by_session.values(), key=lambda entries: entries[-1].seq)
        await self._snapshots.add(sessions)
        for entry in entries:
            match entry.record:
                case Erased():
                    await self._log.delete_before(entry.key, entry.seq)
                case Removed(request_id=request_id):
                    await self._log.delete_exchange(entry.key, request_id)

    async def recover(self, error: Exception) -> None:
        await self._log.try_ensure_consumers()  # requests report the error


def _decode(key: str, data: bytes) -> Snapshot:
    """Return an empty snapshot if there is no data (it was deleted) or it can't be decoded."""
    if not data:
        return Snapshot()
    try:
        return decode(data, Snapshot)
    except ServiceError as error:
        log.warning("snapshot unreadable, reading the log instead session=%s: %s", key, error)
        return Snapshot()


def _seq(stored: StoredMessage | None) -> int:
    return stored.seq if stored else 0


def _misplaced(updates: Sequence[Update]) -> Sequence[Update]:
    """
    Return those from the first one on that is new, or stored before an earlier one. Others are left
    where they are: a list that is being read misses what is stored again.
    """
    revision = 0
    for n, update in enumerate(updates):
        if update.is_new or update.revision < revision:
            return updates[n:]
        revision = update.revision
    return ()


def _is_chain(snapshot: Snapshot, entries: Sequence[Entry]) -> bool:
    """Return whether these are certainly all records between the snapshot and the last of them."""
    previous = snapshot.applied_seq
    for entry in entries:
        if isinstance(entry.record, Unreadable) or entry.record.previous != previous:
            return False
        previous = entry.seq
    return True


def _continues(snapshot: Snapshot, entries: list[Entry]) -> bool:
    """Return whether there is certainly no record between the snapshot and these entries."""
    if not entries or isinstance(entries[0].record, Unreadable):
        return False
    return entries[0].record.previous <= snapshot.applied_seq
