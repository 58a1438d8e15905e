"""Sessions' contexts: what their snapshots have, and what came into the log after them."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from services.history.context import Snapshot, fold, forget
from services.history.entry import Entry, Unreadable
from services.history.log import Log
from services.history.settings import HistorySettings
from services.runtime.streams import Conflict, StoredMessage

SAVE_TRIES = 10  # each lost to another process that saved the same session's snapshot

Spawn = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]


class Fresh(NamedTuple):
    """`revision` is that of the snapshot that was kept, which this one is to replace if new."""

    snapshot: Snapshot
    revision: int
    is_new: bool


class Contexts:
    """What is done after a context was answered goes through `spawn`."""

    def __init__(self, log: Log, settings: HistorySettings, spawn: Spawn) -> None:
        self._log = log
        self._settings = settings
        self._spawn = spawn

    async def of(self, key: str) -> Snapshot:
        """The session's context, up to its last record. Nobody waits for its snapshot."""
        fresh = await self._read(key)
        if fresh.is_new:
            self._spawn(self._keep(key, fresh))
        return fresh.snapshot

    async def save(self, key: str) -> bool:
        """Whether the session's snapshot now has all that the log has of it."""
        fresh = await self._read(key)
        return not fresh.is_new or await self._log.keep(key, fresh.snapshot, fresh.revision)

    async def add(self, entries: Sequence[Entry]) -> None:
        """
        Saves a session's snapshot with these of its records, oldest first, and with what else it
        lacks. Raises Conflict as `settle` does.
        """
        key = entries[0].key
        kept, revision = await self._log.snapshot(key)
        later = [entry for entry in entries if entry.seq > kept.applied_seq]
        if not later:
            return
        if _is_chain(kept, later) and await self._log.keep(key, self._fold(kept, later), revision):
            return
        await self.settle(key)

    async def settle(self, key: str) -> None:
        """Raises Conflict if others save the same session's snapshot faster, or JetStream none."""
        for _ in range(SAVE_TRIES):
            if await self.save(key):
                return
        raise Conflict

    async def _keep(self, key: str, fresh: Fresh) -> None:
        await self._log.keep(key, fresh.snapshot, fresh.revision)

    async def _read(self, key: str) -> Fresh:
        (kept, revision), last = await asyncio.gather(self._log.snapshot(key), self._log.last(key))
        if _seq(last) < kept.applied_seq:  # it was read before what the snapshot has was logged
            last = await self._log.last(key)
        snapshot, entries = await self._log.since(key, kept, last)
        has_all = 0 < _seq(last) == kept.applied_seq or _goes_on(kept, entries)
        if not has_all and (await self._log.snapshot(key))[1] != revision:
            return await self._read(key)  # what is missing was saved, and trimmed, meanwhile
        # what is only older is not kept anew: that would renew its age, and change its place
        is_new = bool(entries) or snapshot != kept
        return Fresh(self._fold(snapshot, entries), revision, is_new)

    def _fold(self, snapshot: Snapshot, entries: Sequence[Entry]) -> Snapshot:
        for entry in entries:
            snapshot = fold(snapshot, entry, self._settings.history_exchanges)
        if retention := self._settings.retention_seconds:
            snapshot = forget(snapshot, datetime.now(UTC) - timedelta(seconds=retention))
        return snapshot


def _seq(stored: StoredMessage | None) -> int:
    return stored.seq if stored else 0


def _is_chain(snapshot: Snapshot, entries: Sequence[Entry]) -> bool:
    """Whether these are all records between the snapshot and the last of them, for certain."""
    before = snapshot.applied_seq
    for entry in entries:
        if isinstance(entry.record, Unreadable) or entry.record.previous != before:
            return False
        before = entry.seq
    return True


def _goes_on(snapshot: Snapshot, entries: list[Entry]) -> bool:
    """Whether there is no record between these entries and the snapshot for certain."""
    if not entries or isinstance(entries[0].record, Unreadable):
        return False
    return entries[0].record.previous <= snapshot.applied_seq
