"""
What a session is, put together of the log, its context and the archive. Knows no subjects of
requests.
"""

import asyncio
import logging
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime

import msgspec

from services.contract.errors import ServiceError
from services.contract.history import (
    Cleared,
    Cursor,
    Described,
    Description,
    Erased,
    Exchange,
    ExchangePage,
    ExportPage,
    Imported,
    Session,
    SessionPage,
)
from services.history import pages
from services.history.archive import Archive, ArchiveUnavailable
from services.history.contexts import Contexts
from services.history.entry import Entry, Place, archive_id, as_exchange
from services.history.log import Log
from services.history.requests import Position, is_answer
from services.runtime.streams import DUPLICATE_WINDOW, Conflict

EXPORTED = 200  # exchanges at once
# seconds that a caller waits for an erasure; the rest is deleted in the background
ERASE_TIMEOUT = 0.4
# seconds for which the ids of a session are trusted while other processes may append: shorter than
# the window in which the log itself drops duplicates
TRUSTED_FOR = DUPLICATE_WINDOW / 2
# seconds that the ids of a session are kept for the next batch of its import, which takes as long
# at most; and of how many sessions
KEPT_FOR = 60.0
MAX_KEPT = 8
MOST_UNSAVED = 1000  # records that a list of sessions waits for

log = logging.getLogger(__name__)


class _Logged(msgspec.Struct):
    """The ids of a session's exchanges after `epoch` and up to the sequence `seq` of the log."""

    epoch: int
    seq: int
    ids: set[str]
    read_at: float


class Sessions:
    def __init__(self, log: Log, archive: Archive, contexts: Contexts) -> None:
        self._log = log
        self._archive = archive
        self._contexts = contexts
        self._logged: dict[str, _Logged] = {}  # by key, the last imported ones

    async def clear(self, key: str, request_id: str | None) -> None:
        """Also what is being answered, which is why a session that is clear is cleared again."""
        cleared = Cleared(previous=0, cleared_at=datetime.now(UTC))
        await self._log.append(key, cleared, _message_id(key, "clear", request_id))

    async def erase(self, key: str, request_id: str | None) -> None:
        """
        From now on nobody is shown it. What can't be deleted in a moment, saver and archiver delete
        when they can.
        """
        erased = Erased(previous=0, erased_at=datetime.now(UTC))
        seq = await self._log.append(key, erased, _message_id(key, "erase", request_id))
        await self._contexts.settle(key)
        try:
            async with asyncio.timeout(ERASE_TIMEOUT):
                await self._delete(key, seq)
        except (ArchiveUnavailable, TimeoutError) as error:
            why = str(error) or "it takes its time"
            log.warning("%s: the rest of %s is erased later", why, key)

    async def _delete(self, key: str, seq: int) -> None:
        erased = await self._log.get(seq)
        await self._log.delete_before(key, seq)
        if erased is not None and self._archive.connected:
            await self._archive.erase(erased)

    async def messages(
        self, tenant: str, key: str | None, limit: int, cursor: Cursor | None = None
    ) -> ExchangePage:
        """The last exchanges before the cursor, of one session or of all of the tenant's."""
        before = Place.parse(cursor) if cursor else None
        if before and key and before.seq <= (await self._contexts.of(key)).erased:
            return ExchangePage(())
        # one more tells whether there is more, and one at the cursor whether the next was retried
        return pages.messages(await self._last(tenant, key, limit + 2, before), limit, before)

    async def _last(
        self, tenant: str, key: str | None, limit: int, until: Place | None
    ) -> list[Entry]:
        """
        Never behind: where the archive ends is asked before the archive is, and what comes after it
        is read from the log.
        """
        seq = until and until.seq
        is_archived = self._archive.connected
        floor = await self._log.archived_until() if is_archived else 0
        found = await self._log.exchanges(tenant, key, limit, floor, seq)
        if not is_archived or len(found.entries) == limit or key in found.erased:
            return found.entries
        try:
            archived = await self._archive.last(tenant, key, limit, found.erased, until)
        except ArchiveUnavailable:  # then all is read from the log
            return (await self._log.exchanges(tenant, key, limit, 0, seq)).entries
        return found.entries + archived

    async def find(self, tenant: str, request_id: str) -> Exchange | None:
        """
        Return the answer to this request. Raises StreamUnavailable, and ServiceError if only
        MongoDB has the answer and it can't be reached.
        """
        position = await self._log.requests.find(tenant, request_id)
        entry = await self._log.get(position.seq) if position else None
        if position is None or entry is None or not is_answer(entry, position, request_id):
            entry = await self._find_archived(tenant, request_id, position)
        if entry is None or entry.seq <= (await self._contexts.of(entry.key)).erased:
            return None
        return entry.record if isinstance(entry.record, Exchange) else None

    async def _find_archived(
        self, tenant: str, request_id: str, position: Position | None
    ) -> Entry | None:
        """`position` is where the log had it. Raises ServiceError if MongoDB must have it."""
        if self._archive.connected:
            with suppress(ArchiveUnavailable):
                entry = await self._archive.find(tenant, request_id)
                return entry if entry and await self._is_cleaned(entry.key) else None
        if position and await self._is_archived(position):
            raise ServiceError(
                "history_unavailable", "The answer is in MongoDB, which can't be reached.", 5
            )
        return None

    async def _is_cleaned(self, key: str) -> bool:
        """Return whether MongoDB has deleted all that was erased of the session."""
        return await self._log.archived_until() >= (await self._contexts.of(key)).erased

    async def _is_archived(self, position: Position) -> bool:
        """Return whether MongoDB must have the record that the log dropped."""
        if position.seq <= (await self._contexts.of(position.key)).erased:
            return False
        return not (await self._log.state()).drops_old

    async def export(self, key: str, cursor: Cursor | None) -> ExportPage:
        """
        Some exchanges after the cursor, the oldest first. Raises ServiceError where MongoDB has
        some of them and can't be asked.
        """
        after = Place.parse(cursor) if cursor else None
        session = await self._contexts.of(key)
        erased, start = session.erased, after.seq if after else 0
        is_archived = self._archive.connected
        floor = await self._log.archived_until() if is_archived else 0
        found: list[Entry] = []
        try:
            if is_archived and floor >= erased:
                found = await self._archive.next(key, EXPORTED + 1, after)
        except ArchiveUnavailable:
            is_archived, floor = False, 0
        if not is_archived and session.exchanges and not await self._log.is_whole(key, erased):
            raise ServiceError(
                "history_unavailable", "MongoDB has a part of the session, and is not there.", 5
            )
        found += await self._log.next_exchanges(key, EXPORTED + 1, max(floor, erased, start))
        return pages.exchanges(found, EXPORTED, after)

    async def bring_in(self, key: str, imported: Sequence[Imported]) -> None:
        """
        Append the exchanges to the session, in this order, except those that it has since it was
        cleared: a repeated import changes nothing.
        """
        session = await self._contexts.of(key)
        epoch = session.epoch
        is_empty = session.applied_seq == epoch  # since it was cleared
        there, read_at = set[str](), -math.inf
        for each in imported:
            if time.monotonic() - read_at > TRUSTED_FOR:
                if not is_empty:
                    there = await self._request_ids(key, epoch, imported)
                is_empty, read_at = False, time.monotonic()
            if each.request_id in there:
                continue
            exchange = as_exchange(each, epoch, datetime.now(UTC))
            message_id = f"{archive_id(key, each.request_id)}.{epoch}"
            try:
                await self._log.append(key, exchange, message_id)
            except Conflict:  # with the same import in another process, which is ahead
                there, read_at = await self._request_ids(key, epoch, imported), time.monotonic()
                if each.request_id not in there:
                    raise

    async def _request_ids(self, key: str, epoch: int, imported: Sequence[Imported]) -> set[str]:
        """
        Return the ids that the session has since the epoch; of archived ones, those to be imported.
        Raises ServiceError if MongoDB has some of them and can't be asked.
        """
        there = await self._logged_ids(key, epoch)
        if await self._log.is_whole(key, epoch):
            return there
        if not self._archive.connected:
            raise ServiceError(
                "history_unavailable", "MongoDB has a part of the session, and is not there.", 5
            )
        try:
            archived = await self._archive.request_ids(key, epoch, [i.request_id for i in imported])
        except ArchiveUnavailable as error:
            raise ServiceError(
                "history_unavailable",
                f"A part of the session is in MongoDB, which fails: {error}",
                5,
            ) from error
        return there | archived

    async def _logged_ids(self, key: str, epoch: int) -> set[str]:
        """
        Return the ids of the session's exchanges in the log. Reads only records after those of the
        previous batch: else the time of an import would grow with its square.
        """
        known = self._logged.pop(key, None)
        now = time.monotonic()
        if known is None or known.epoch != epoch or now - known.read_at > KEPT_FOR:
            known = _Logged(epoch, epoch, set(), now)
        found, last = await self._log.request_ids(key, known.seq)
        if last < known.seq:  # the log went back
            known = _Logged(epoch, epoch, set(), now)
            found, last = await self._log.request_ids(key, epoch)
        ids = known.ids | found
        self._logged[key] = _Logged(epoch, max(last, epoch), ids, time.monotonic())
        while len(self._logged) > MAX_KEPT:
            del self._logged[next(iter(self._logged))]
        return ids

    async def describe(self, key: str, said: Description, request_id: str | None) -> Session:
        record = Described(
            previous=0,
            described_at=datetime.now(UTC),
            title=said.title,
            system_prompt=said.system_prompt,
        )
        await self._log.append(key, record, _message_id(key, "describe", request_id))
        listed = pages.listed(key, await self._contexts.of(key), 0)
        if listed is None:
            raise Conflict  # it was erased in this moment
        return listed.session

    async def list(self, tenant: str, limit: int, cursor: Cursor | None) -> SessionPage:
        """
        In the order in which they were saved, which is that of the log: what is not saved yet is
        saved first, so the list is never behind.
        """
        for key in await self._log.unsaved_sessions(tenant, MOST_UNSAVED):
            await self._contexts.settle(key)
        found: list[pages.Listed] = []
        before = Place.parse(cursor).seq if cursor else None
        async for key, snapshot, revision in self._log.sessions(tenant, before):
            if listed := pages.listed(key, snapshot, revision):
                found.append(listed)
            if len(found) > limit:
                break
        return pages.sessions(found, limit)


def _message_id(key: str, change: str, request_id: str | None) -> str:
    return f"{archive_id(key, request_id)}.{change}" if request_id else ""
