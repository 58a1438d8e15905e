"""Sessions' contexts: what their snapshots have, and what came into the log after them."""

from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from services.history.context import Snapshot, fold, forget
from services.history.entry import Entry, Unreadable
from services.history.log import Log
from services.history.settings import HistorySettings
from services.runtime.streams import Conflict

SAVE_TRIES = 10  # each lost to another process that saved the same session's snapshot


class Fresh(NamedTuple):
    """`revision` is that of the snapshot that was kept, which this one is to replace if new."""

    snapshot: Snapshot
    revision: int
    is_new: bool


class Contexts:
    def __init__(self, log: Log, settings: HistorySettings) -> None:
        self._log = log
        self._settings = settings

    async def of(self, key: str) -> Snapshot:
        """The session's context, up to its last record; the saver keeps it."""
        return (await self._read(key)).snapshot

    async def save(self, key: str) -> bool:
        """Whether the session's snapshot now has all that the log has of it."""
        fresh = await self._read(key)
        return not fresh.is_new or await self._log.keep(key, fresh.snapshot, fresh.revision)

    async def settle(self, key: str) -> None:
        """Raises Conflict if others save the same session's snapshot faster, or JetStream none."""
        for _ in range(SAVE_TRIES):
            if await self.save(key):
                return
        raise Conflict

    async def _read(self, key: str) -> Fresh:
        kept, revision = await self._log.snapshot(key)
        snapshot, entries = await self._log.since(key, kept)
        if not _goes_on(kept, entries) and (await self._log.snapshot(key))[1] != revision:
            return await self._read(key)  # what is missing was saved, and trimmed, meanwhile
        for entry in entries:
            snapshot = fold(snapshot, entry, self._settings.history_exchanges)
        is_new = snapshot != kept
        if retention := self._settings.retention_seconds:
            snapshot = forget(snapshot, datetime.now(UTC) - timedelta(seconds=retention))
        # what is only older is not kept anew: that would renew its age, and change its place
        return Fresh(snapshot, revision, is_new)


def _goes_on(snapshot: Snapshot, entries: list[Entry]) -> bool:
    """Whether there is no record between these entries and the snapshot for certain."""
    if not entries or isinstance(entries[0].record, Unreadable):
        return False
    return entries[0].record.previous <= snapshot.applied_seq
