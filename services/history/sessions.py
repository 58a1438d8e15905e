"""
Reads and changes of sessions, which combine log, snapshots and archive. Each public method takes
the caller's tenant and a request of the contract, and returns its reply.
"""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from msgspec.structs import asdict, replace

from services.contract import history, imports, responses, subjects
from services.contract.codec import encode
from services.contract.errors import ServiceError
from services.contract.messages import Empty, SessionErased
from services.history import pages
from services.history.archive import Archive, ArchiveUnavailable
from services.history.entry import Entry, Position, archive_id
from services.history.feedback import Feedbacks
from services.history.log import SessionLog
from services.history.requests import Place
from services.history.session_quota import SessionQuota
from services.history.snapshots import Snapshots
from services.runtime import trace_context
from services.runtime.bus import Bus
from services.runtime.logs import RateLimitedLog
from services.runtime.streams import Conflict
from services.runtime.token_bucket import TokenBuckets

log = logging.getLogger(__name__)


@dataclass
class ImportState:
    """
    The request ids that a session has since `epoch`, up to the sequence `seq`. `first_seq` is that
    of its first exchange. `is_archived`: some exchanges are only in MongoDB, and of these the ids
    have only those of the batches so far.
    """

    key: str
    epoch: int
    seq: int
    first_seq: int
    ids: set[str] = field(default_factory=set)
    is_archived: bool = False


class Sessions:
    def __init__(
        self,
        bus: Bus,
        session_log: SessionLog,
        archive: Archive,
        snapshots: Snapshots,
        quota: SessionQuota,
    ) -> None:
        self._bus = bus
        self._log = session_log
        self._archive = archive
        self._snapshots = snapshots
        self._quota = quota
        self._feedbacks = Feedbacks(session_log, archive, snapshots)
        self._limits = session_log.limits
        self._rejections = RateLimitedLog(log)
        self._empty = TokenBuckets(
            "changes of sessions without exchanges",
            self._limits.empty_session_bytes,
            self._limits.empty_session_bytes_per_second,
        )
        self._imports: dict[str, ImportState] = {}  # by session key, last imported last

    async def context(self, tenant: str, request: history.ContextRequest) -> history.ContextReply:
        """Raise ServiceError(too_many_sessions) if the answer would begin one too many."""
        session = await self._snapshots.current(subjects.session_key(tenant, request.session_id))
        if session.active_at is None and not request.is_answered:
            self._quota.require_session(tenant)
        return session.as_reply(self._snapshots.window(session))

    async def give_feedback(
        self, tenant: str, request: history.FeedbackRequest
    ) -> history.FeedbackStored:
        if request.feedback is not None:
            self._quota.require_bytes(tenant)
        key = subjects.session_key(tenant, request.session_id)
        message_id = _message_id(key, "feedback", request.request_id)
        return await self._feedbacks.give(tenant, request, message_id)

    async def clear(self, tenant: str, request: history.ClearRequest) -> Empty:
        """A clear session is cleared again, because of requests that are being answered."""
        key = subjects.session_key(tenant, request.session_id)
        await self._charge_unknown(tenant, key)
        cleared = history.Cleared(previous=0, cleared_at=datetime.now(UTC))
        await self._log.append(key, cleared, _message_id(key, "clear", request.request_id))
        return Empty()

    async def erase(self, tenant: str, request: history.DeleteRequest) -> Empty:
        """
        Hide the session from now on, and delete it. What can't be deleted within a moment is
        deleted by snapshot saver and archiver.
        """
        key = subjects.session_key(tenant, request.session_id)
        await self._charge_unknown(tenant, key)
        erased = history.Erased(previous=0, erased_at=datetime.now(UTC))
        seq = await self._log.append(key, erased, _message_id(key, "erase", request.request_id))
        await self._snapshots.save_or_raise(key)
        try:
            async with asyncio.timeout(self._limits.max_erase_seconds):
                await self._delete(key, seq)
        except (ArchiveUnavailable, TimeoutError) as error:
            reason = str(error) or "slow"
            log.warning("erasure continues in the background session=%s reason=%s", key, reason)
        await self._bus.publish(
            subjects.erased(tenant),
            SessionErased(request.session_id, seq),
            headers=trace_context.headers(),
        )
        return Empty()

    async def _delete(self, key: str, seq: int) -> None:
        erased = await self._log.get(seq)
        await self._log.delete_before(key, seq)
        if erased is not None and self._archive.connected:
            await self._archive.erase(erased)

    async def remove(self, tenant: str, request: history.RemoveRequest) -> Empty:
        """
        Hide one response from now on, and delete it. What can't be deleted now is deleted by
        snapshot saver and archiver.
        """
        id_ = request.request_id
        key = subjects.session_key(tenant, responses.session_of(id_))
        await self._charge_unknown(tenant, key)
        removed = history.Removed(previous=0, request_id=id_, removed_at=datetime.now(UTC))
        seq = await self._log.append(key, removed, _message_id(key, "remove", id_))
        await self._log.delete_exchange(key, id_)
        entry = await self._log.get(seq)
        try:
            if entry is not None and self._archive.connected:
                await self._archive.remove(entry, id_)
        except ArchiveUnavailable as error:
            log.warning("removal continues in the background session=%s reason=%s", key, error)
        return Empty()

    async def describe(self, tenant: str, request: history.DescribeRequest) -> history.Session:
        key = subjects.session_key(tenant, request.session_id)
        session = await self._snapshots.current(key)
        if session.active_at is None:
            self._quota.require_session(tenant)
        if not session.exchanges:
            self._charge(tenant, len(encode(request.description)))
        record = history.Described(
            previous=0,
            described_at=datetime.now(UTC),
            title=request.description.title,
            system_prompt=request.description.system_prompt,
            metadata=request.description.metadata,
        )
        await self._log.append(key, record, _message_id(key, "describe", request.request_id))
        listed = pages.listed_session(key, await self._snapshots.current(key), 0)
        if listed is None:
            raise Conflict  # it was erased in this moment
        if not (await self._log.stream.state()).has_dropped:
            return listed.session
        return await self._count_stored(tenant, listed.session)

    async def _charge_unknown(self, tenant: str, key: str) -> None:
        """
        Count a change of a session that does not exist, maybe yet. What exists can always be
        cleared and erased. Raises ServiceError(rate_limit_exceeded).
        """
        if (await self._snapshots.current(key)).active_at is None:
            self._charge(tenant, 0)

    def _charge(self, tenant: str, size: int) -> None:
        try:
            self._empty.take(tenant, max(size, self._limits.empty_session_min_bytes))
        except ServiceError as error:
            self._rejections.warning("change rejected tenant=%s: %s", tenant, error)
            raise

    async def list_sessions(
        self, tenant: str, request: history.SessionsRequest
    ) -> history.SessionPage:
        """
        List sessions in the order in which their snapshots were saved, which is that of the log.
        Unsaved ones are saved first, so the list has every finished answer.
        """
        for key in await self._snapshots.unsaved_sessions(tenant):
            await self._snapshots.save_or_raise(key)
        found: list[pages.ListedSession] = []
        before = Position.parse(request.before).seq if request.before else None
        async for key, (snapshot, revision, _) in self._snapshots.newest_first(
            f"{tenant}.", before
        ):
            if listed := pages.listed_session(key, snapshot, revision):
                found.append(listed)
            if len(found) > request.limit:
                break
        page = pages.session_page(found, request.limit, self._limits.max_page_bytes)
        if not (await self._log.stream.state()).has_dropped:
            return page
        counted = [await self._count_stored(tenant, session) for session in page.sessions]
        return replace(page, sessions=tuple(counted))

    async def _count_stored(self, tenant: str, session: history.Session) -> history.Session:
        """Return the session without exchanges that a log without MongoDB has dropped."""
        records = await self._log.count(subjects.session_key(tenant, session.id))
        return replace(session, exchanges=min(session.exchanges, records))

    async def messages(self, tenant: str, request: history.MessagesRequest) -> history.ExchangePage:
        """Return the last exchanges before the cursor, of one session or of all the tenant's."""
        key = subjects.session_key(tenant, request.session_id) if request.session_id else None
        before = Position.parse(request.before) if request.before else None
        session = await self._snapshots.current(key) if key else None
        if before and session and before.seq <= session.erased:
            return history.ExchangePage(())
        # one more tells whether there is a next page; the one at the cursor may retry another
        found, is_cut = await self._newest(tenant, key, request.limit + 2, before)
        page = pages.exchange_page(
            found, request.limit, self._limits.max_page_bytes, before, is_cut
        )
        if page.next or key is None or session is None:
            return page
        return replace(page, is_complete=pages.is_complete(key, session, found))

    async def _newest(
        self, tenant: str, key: str | None, limit: int, until: Position | None
    ) -> tuple[list[Entry], bool]:
        """
        Return exchanges, newest first, and whether there may be more that were not read: those up
        to the archive's floor from MongoDB, those above it from the log. The floor is read first,
        so that none is missing; some may come twice.
        """
        seq = until and until.seq
        is_archived = self._archive.connected
        floor = await self._log.archived_until() if is_archived else 0
        scan = await self._log.newest_exchanges(tenant, key, limit, floor, seq)
        found = await self._feedbacks.add_to(scan.entries)
        if not is_archived or scan.entries.is_full or key in scan.erased:
            return found, scan.entries.is_cut
        try:
            archived = await self._archive.newest(tenant, key, limit, scan.erased, until)
            found += await self._feedbacks.add_to(archived, is_archived=True)
        except ArchiveUnavailable:
            logged = (await self._log.newest_exchanges(tenant, key, limit, 0, seq)).entries
            return await self._feedbacks.add_to(logged), logged.is_cut
        return found, archived.is_cut

    async def find(self, tenant: str, request: history.ExchangeRequest) -> history.Exchange:
        """
        Return the exchange of a request id. Raises StreamUnavailable, ArchiveUnavailable if only
        MongoDB has it, and ServiceError(not_found).
        """
        request_id = request.request_id
        if request.session_id is not None:
            return await self._find_in(tenant, request.session_id, request_id)
        place = await self._log.requests.find(tenant, request_id)
        entry = place.entry if place else None
        if entry is None:
            entry = await self._find_archived(tenant, request_id, place)
        if (
            entry is None
            or not isinstance(entry.record, history.Exchange)
            or entry.seq <= (await self._snapshots.current(entry.key)).erased
        ):
            raise ServiceError(
                "not_found",
                "No answer has this request id. Answers can be found for a day; with MongoDB, as"
                " long as they are stored.",
            )
        return entry.record

    async def _find_in(self, tenant: str, session_id: str, request_id: str) -> history.Exchange:
        key = subjects.session_key(tenant, session_id)
        return await self._feedbacks.exchange(key, request_id)

    async def _find_archived(
        self, tenant: str, request_id: str, place: Place | None
    ) -> Entry | None:
        """`place` is where the log had it. Raises ArchiveUnavailable if MongoDB must have it."""
        try:
            entry = await self._archive.find(tenant, request_id)
        except ArchiveUnavailable:
            if place and await self._is_archived(place):
                raise
            return None
        return entry if entry and await self._is_cleaned(entry.key) else None

    async def _is_cleaned(self, key: str) -> bool:
        """Return whether MongoDB has deleted all that was erased of the session."""
        return await self._log.archived_until() >= (await self._snapshots.current(key)).erased

    async def _is_archived(self, place: Place) -> bool:
        """Return whether MongoDB must have a record that was trimmed from the log."""
        if place.seq <= (await self._snapshots.current(place.key)).erased:
            return False
        return not (await self._log.stream.state()).drops_old

    async def export(self, tenant: str, request: history.ExportRequest) -> history.ExportPage:
        """
        Return exchanges after the cursor, oldest first. Raises ArchiveUnavailable if some of them
        are only in MongoDB.
        """
        key = subjects.session_key(tenant, request.session_id)
        after = Position.parse(request.after) if request.after else None
        session = await self._snapshots.current(key)
        limit, erased = self._limits.export_page, session.erased
        floor = await self._log.archived_until()
        found, is_cut = list[Entry](), False
        unavailable: ArchiveUnavailable | None = None
        try:
            if floor >= erased:
                archived = await self._archive.oldest(key, limit + 1, after)
                found = await self._feedbacks.add_to(archived, is_archived=True)
                is_cut = archived.is_cut
        except ArchiveUnavailable as error:
            found, is_cut, unavailable, floor = [], False, error, 0
        start = max(floor, erased, after.seq if after else 0)
        if not is_cut:
            logged = await self._log.exchanges_after(key, limit + 1, start)
            found, is_cut = [*found, *await self._feedbacks.add_to(logged)], logged.is_cut
        if unavailable and session.exchanges:  # at last, since the log may be trimmed meanwhile
            if not await self._log.is_complete(key, erased, session.first_seq):
                raise unavailable
        page = pages.export_page(found, limit, self._limits.max_page_bytes, after, is_cut)
        if after:
            return page
        is_complete = pages.is_complete(key, session, found)
        return replace(page, is_complete=is_complete, system_prompt=session.system_prompt)

    async def import_exchanges(self, tenant: str, request: history.ImportRequest) -> Empty:
        """
        Append the exchanges to the session in this order, except those that it has had since it
        was cleared: a repeated import changes nothing.
        """
        self._quota.require_bytes(tenant)
        for imported in request.exchanges:
            imports.check(imported)
        batch = [imported.request_id for imported in request.exchanges]
        state = await self._import_state(subjects.session_key(tenant, request.session_id), batch)
        for imported in request.exchanges:
            await self._import(imported, state, batch)
        self._imports[state.key] = state
        while len(self._imports) > self._limits.max_imports:
            del self._imports[next(iter(self._imports))]
        return Empty()

    async def _import_state(self, key: str, batch: Sequence[str]) -> ImportState:
        """Reuse the state of the session's last import if it still holds, or read a new one."""
        session = await self._snapshots.current(key)
        if session.active_at is None:
            self._quota.require_session(subjects.session_of_key(key)[0])
        state = self._imports.pop(key, None)
        if state and state.epoch == session.epoch and await self._is_current(state):
            if state.is_archived:
                state.ids |= await self._archive.request_ids(key, state.epoch, batch)
            return state
        state = ImportState(key, session.epoch, session.epoch, session.first_seq)
        if session.applied_seq > session.epoch:
            await self._update(state, batch)
        elif await self._log.last(key) is None:  # also if the last record was trimmed
            state.seq = 0
        return state

    async def _is_current(self, state: ImportState) -> bool:
        """Return whether the log still has the record that the state ends with."""
        last = await self._log.get(state.seq) if state.seq else None
        return bool(last and last.key == state.key and last.request_id in state.ids)

    async def _import(
        self, imported: history.Imported, state: ImportState, batch: Sequence[str]
    ) -> None:
        """
        Append the exchange unless the session has it. The append expects the last record that the
        state knows, so a process that was frozen can't append what others did meanwhile.
        """
        exchange = _imported_exchange(imported, state.epoch, datetime.now(UTC))
        message_id = f"{archive_id(state.key, imported.request_id)}.{state.epoch}"
        for _ in range(self._limits.max_tries):
            if imported.request_id in state.ids:
                return
            try:
                state.seq = await self._log.append_after(state.key, state.seq, exchange, message_id)
                state.ids.add(imported.request_id)
            except Conflict:
                await self._update(state, batch)
        if imported.request_id not in state.ids:
            raise Conflict

    async def _update(self, state: ImportState, batch: Sequence[str]) -> None:
        """
        Add the ids that the session got since; of archived exchanges, those of the batch. Raises
        ArchiveUnavailable if some are only in MongoDB.

        The log is read first: records that are trimmed meanwhile are in MongoDB by then.
        """
        last = await self._log.last(state.key)
        if last is None or last.seq < state.seq:  # records were trimmed, or the log was lost
            state.seq = state.epoch
            state.ids.clear()
        ids, last_seq = await self._log.request_ids(state.key, state.seq)
        if not await self._log.is_complete(state.key, state.seq, state.first_seq):
            state.is_archived = True
            ids |= await self._archive.request_ids(state.key, state.epoch, batch)
        state.ids |= ids
        state.seq = last_seq


def _imported_exchange(imported: history.Imported, epoch: int, now: datetime) -> history.Exchange:
    """Times default to `now`."""
    asked_at = imported.asked_at or imported.answered_at or now
    times = {"asked_at": asked_at, "answered_at": imported.answered_at or asked_at}
    return history.Exchange(previous=0, epoch=epoch, **(asdict(imported) | times))


def _message_id(key: str, change: str, request_id: str | None) -> str:
    return f"{archive_id(key, request_id)}.{change}" if request_id else ""
