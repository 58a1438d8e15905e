"""
What a session is, put together of the log, its context and the archive. Knows no subjects of
requests.
"""

import logging
from datetime import UTC, datetime

from services.contract.history import Cleared, Erased, Exchange
from services.history.archive import Archive, ArchiveUnavailable
from services.history.contexts import Contexts
from services.history.entry import Entry
from services.history.log import Log
from services.runtime.streams import Conflict

LOOKED_FOR_AMONG = 500  # exchanges
SAVE_TRIES = 10  # each lost to another process that saved the same session's snapshot

log = logging.getLogger(__name__)


class Sessions:
    def __init__(self, log: Log, archive: Archive, contexts: Contexts) -> None:
        self._log = log
        self._archive = archive
        self._contexts = contexts

    async def clear(self, key: str) -> None:
        """Also what is being answered, which is why a session that is clear is cleared again."""
        await self._log.append(key, Cleared(previous=0, cleared_at=datetime.now(UTC)))

    async def erase(self, key: str) -> None:
        """What MongoDB can't be asked to erase now, the archiver erases when it can."""
        seq = await self._log.append(key, Erased(previous=0, erased_at=datetime.now(UTC)))
        await self._save(key)
        erased = await self._log.get(seq)
        if erased is not None and self._archive.connected:
            try:
                await self._archive.erase(erased)
            except ArchiveUnavailable as error:
                log.warning("%s: what it has of %s is erased once it is back", error, key)
        await self._log.delete_before(key, seq)

    async def last(self, tenant: str, key: str | None, limit: int) -> list[Entry]:
        """
        The last exchanges, of one session or of all of the tenant's. Never behind: where the
        archive ends is asked before the archive is, and what comes after it is read from the log.
        """
        is_archived = self._archive.connected
        until = await self._log.archived_until() if is_archived else 0
        found = await self._log.exchanges(tenant, key, limit, until)
        if not is_archived or len(found.entries) == limit or key in found.erased:
            return found.entries
        try:
            archived = await self._archive.last(tenant, key, limit, found.erased)
        except ArchiveUnavailable:  # then all is read from the log
            return (await self._log.exchanges(tenant, key, limit, 0)).entries
        return found.entries + archived

    async def find(self, tenant: str, request_id: str) -> Exchange | None:
        """Who asks for an answer again comes soon: it is looked for among the tenant's last."""
        for entry in await self.last(tenant, None, LOOKED_FOR_AMONG):
            if isinstance(entry.record, Exchange) and entry.record.request_id == request_id:
                return entry.record
        return None

    async def _save(self, key: str) -> None:
        """The snapshot has nothing any more of what was before."""
        for _ in range(SAVE_TRIES):
            if await self._contexts.save(key):
                return
        raise Conflict
