"""Sessions' contexts: what their snapshots have, and what came into the log after them."""

import asyncio
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from services.history.context import Snapshot, fold, forget
from services.history.entry import Entry, Unreadable
from services.history.log import Log
from services.history.settings import HistorySettings

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

    async def _keep(self, key: str, fresh: Fresh) -> None:
        await self._log.keep(key, fresh.snapshot, fresh.revision)

    async def _read(self, key: str) -> Fresh:
        kept, revision = await self._log.snapshot(key)
        snapshot, entries = await self._log.since(key, kept)
        if not _goes_on(kept, entries) and (await self._log.snapshot(key))[1] != revision:
            return await self._read(key)  # what is missing was saved, and trimmed, meanwhile
        for entry in entries:
            snapshot = fold(snapshot, entry, self._settings.history_exchanges)
        if retention := self._settings.retention_seconds:
            snapshot = forget(snapshot, datetime.now(UTC) - timedelta(seconds=retention))
        return Fresh(snapshot, revision, snapshot != kept)


def _goes_on(snapshot: Snapshot, entries: list[Entry]) -> bool:
    """Whether there is no record between these entries and the snapshot for certain."""
    if not entries or isinstance(entries[0].record, Unreadable):
        return False
    return entries[0].record.previous <= snapshot.applied_seq
