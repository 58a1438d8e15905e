"""Sessions' contexts: what their snapshots have, and what came into the log after them."""

from datetime import UTC, datetime, timedelta

from services.history.context import Snapshot, fold, forget
from services.history.entry import Entry, Unreadable
from services.history.log import Log
from services.history.settings import HistorySettings


class Contexts:
    def __init__(self, log: Log, settings: HistorySettings) -> None:
        self._log = log
        self._settings = settings

    async def of(self, key: str) -> Snapshot:
        """The session's context, up to its last record."""
        return (await self._refresh(key))[0]

    async def save(self, key: str) -> bool:
        """Whether the session's snapshot now has all that the log has of it."""
        return (await self._refresh(key))[1]

    async def _refresh(self, key: str) -> tuple[Snapshot, bool]:
        """The context, and whether its snapshot is kept."""
        kept, revision = await self._log.snapshot(key)
        snapshot, entries = await self._log.since(key, kept)
        if not _goes_on(kept, entries) and (await self._log.snapshot(key))[1] != revision:
            return await self._refresh(key)  # what is missing was saved, and trimmed, meanwhile
        for entry in entries:
            snapshot = fold(snapshot, entry, self._settings.history_exchanges)
        if retention := self._settings.retention_seconds:
            snapshot = forget(snapshot, datetime.now(UTC) - timedelta(seconds=retention))
        return snapshot, snapshot == kept or await self._log.keep(key, snapshot, revision)


def _goes_on(snapshot: Snapshot, entries: list[Entry]) -> bool:
    """Whether there is no record between these entries and the snapshot for certain."""
    if not entries or isinstance(entries[0].record, Unreadable):
        return False
    return entries[0].record.previous <= snapshot.applied_seq
