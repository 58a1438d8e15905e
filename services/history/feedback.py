"""Feedback on exchanges: gives it, and finds it in the log and in MongoDB."""

import asyncio
from collections import OrderedDict, defaultdict
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime

from msgspec import UNSET
from msgspec.structs import replace

from services.contract import history, responses, subjects
from services.contract.codec import encode
from services.contract.errors import ServiceError
from services.contract.history import Exchange, ExchangeFeedback, Feedback
from services.history.archive import Archive, ArchiveUnavailable
from services.history.context import Snapshot
from services.history.entry import Entry, archive_id, in_milliseconds
from services.history.log import SessionLog
from services.history.requests import Place
from services.history.snapshots import Snapshots
from services.runtime.streams import Conflict

BATCH = 50  # exchanges whose feedback is read at once
UNKNOWN = "No answer of this session has the id {id!r}: it may have been erased, or dropped."


@dataclass
class FeedbackIndex:
    """
    Where the log has a session's feedback: sequences by request id, complete up to `head`, the
    sequence of the last one.
    """

    head: int = 0
    seqs: dict[str, int] = field(default_factory=dict)


class Feedbacks:
    """Gives feedback, and adds what was given last to the exchanges that are read."""

    def __init__(self, session_log: SessionLog, archive: Archive, snapshots: Snapshots) -> None:
        self._log = session_log
        self._archive = archive
        self._snapshots = snapshots
        self._limits = session_log.limits
        self._indexes: OrderedDict[str, FeedbackIndex] = OrderedDict()  # last used last

    async def add_to(self, entries: Sequence[Entry], is_archived: bool = False) -> list[Entry]:
        """
        Return the entries of a page, each exchange with its current feedback. Entries for which a
        page has no room after the feedback on those before them stay without.

        Feedback on an exchange that the log has is in the log, too; with `is_archived`, MongoDB is
        asked as well. Raises StreamUnavailable, ArchiveUnavailable.
        """
        left = 2 * self._limits.max_page_bytes
        found: list[Entry] = []
        for start in range(0, len(entries), BATCH):
            batch = entries[start : start + BATCH]
            if left > 0:
                batch = await self._add_to(batch, is_archived)
                left -= sum(map(_feedback_bytes, batch))
            found += batch
        return found

    async def _add_to(self, entries: Sequence[Entry], is_archived: bool) -> list[Entry]:
        ids: defaultdict[str, list[str]] = defaultdict(list)  # request ids by session
        for entry in entries:
            if entry.request_id:
                ids[entry.key].append(entry.request_id)
        found: dict[str, Feedback | None] = {}
        if is_archived and ids:
            keys = [archive_id(key, each) for key, of_key in ids.items() for each in of_key]
            found = await self._archive.feedback(keys)
        for logged in await asyncio.gather(*(self._logged(*each) for each in ids.items())):
            found |= logged  # given later than what MongoDB has
        return [_with(entry, found) for entry in entries]

    async def give(
        self, tenant: str, request: history.FeedbackRequest, message_id: str
    ) -> history.FeedbackStored:
        """
        Append the feedback unless the exchange has the same. The append expects the record up to
        which the session was read, so that no feedback outlives the exchange. Raises
        ServiceError, Conflict, StreamUnavailable; ArchiveUnavailable if only MongoDB may have the
        exchange.
        """
        key = subjects.session_key(tenant, request.session_id)
        if responses.is_session(request.session_id):
            message = "Responses of /v1/responses take no feedback: use sessions of /chat."
            raise ServiceError("not_found", message)
        for _ in range(self._limits.max_tries):
            last = await self._log.last(key)
            session = await self._snapshots.current(key)
            exchange = await self.exchange(key, request.message_id)
            given = await self._checked(tenant, key, exchange, request.feedback)
            model = exchange.model.name if exchange.model else ""
            if _content(given) == _content(exchange.feedback):
                return history.FeedbackStored(exchange.feedback, model, is_new=False)
            record = history.Described(
                previous=0,
                described_at=datetime.now(UTC),
                feedback=ExchangeFeedback(request.message_id, given, session.feedback_seq),
            )
            with suppress(Conflict):
                await self._log.append_after(key, last.seq if last else 0, record, message_id)
                return history.FeedbackStored(given, model, is_new=True)
        raise Conflict

    async def exchange(self, key: str, request_id: str) -> Exchange:
        """
        Return an exchange of the session, with its feedback. Raises ServiceError(not_found);
        ArchiveUnavailable if it may be one that only MongoDB has.
        """
        if (entry := await self._find(key, request_id)) is None:
            raise ServiceError("not_found", UNKNOWN.format(id=request_id))
        assert isinstance(entry.record, Exchange)
        return entry.record

    async def _find(self, key: str, request_id: str, place: Place | None = None) -> Entry | None:
        """`place` is what the request index has, if it was asked already."""
        tenant, _ = subjects.session_of_key(key)
        session = await self._snapshots.current(key)
        place = place or await self._log.requests.find(tenant, request_id)
        entry = place.entry if place and place.key == key else None
        if entry and entry.seq > session.erased:
            return (await self.add_to([entry]))[0]
        return await self._search(key, request_id, session)

    async def _search(self, key: str, request_id: str, session: Snapshot) -> Entry | None:
        """Search MongoDB, which needs one read, then the log for what MongoDB lacks."""
        floor = await self._log.archived_until()
        unavailable: ArchiveUnavailable | None = None
        try:
            if self._log.archive_consumer and floor >= session.erased:
                if found := await self._archive.find_in(key, request_id):
                    return (await self.add_to([found], is_archived=True))[0]
        except ArchiveUnavailable as error:
            unavailable, floor = error, 0
        above = max(floor, session.erased)
        async for entry in self._log.walk_back(await self._log.last(key), above):
            if entry.request_id == request_id:
                return (await self.add_to([entry]))[0]
        if unavailable and not await self._log.is_complete(key, session.erased, session.first_seq):
            raise unavailable
        return None

    async def _checked(
        self, tenant: str, key: str, exchange: Exchange, given: Feedback | None
    ) -> Feedback | None:
        """Return the feedback as it is stored, or None. Raises ServiceError if it does not fit."""
        if given is None or replace(given, preferred_session=None, given_at=None) == Feedback():
            return None
        if given.correction is not None and exchange.tool_calls:
            message = "The answer calls tools: rate it, but correct the answer after the results."
            raise ServiceError("invalid_request", message)
        other = await self._preferred_session(tenant, key, exchange, given.preferred_to)
        now = in_milliseconds(datetime.now(UTC))
        given = replace(given, preferred_session=other, given_at=now)
        size = len(encode(replace(exchange, feedback=given)))
        if size > self._limits.max_exchange_bytes:
            raise ServiceError(
                "payload_too_large",
                f"The answer with its feedback has {size:,} bytes; the maximum is"
                f" {self._limits.max_exchange_bytes:,}: shorten the correction.",
            )
        return given

    async def _preferred_session(
        self, tenant: str, key: str, exchange: Exchange, preferred_to: str | None
    ) -> str | None:
        """
        Return the session of the other answer; None: the same session, or there is no preference.
        Raises ServiceError unless it is another answer to the same prompt.
        """
        if preferred_to is None:
            return None
        if preferred_to == exchange.request_id:
            raise ServiceError("invalid_request", "`preferred_to` is the answer itself.")
        other = await self._find(key, preferred_to) or await self._find_any(tenant, preferred_to)
        if other is None or not isinstance(other.record, Exchange):
            message = f"No answer has the id {preferred_to!r} in `preferred_to`."
            raise ServiceError("not_found", message)
        asked = (exchange.prompt, exchange.tool_results)
        if (other.record.prompt, other.record.tool_results) != asked:
            message = "`preferred_to` must be another answer to the same prompt."
            raise ServiceError("invalid_request", message)
        return None if other.key == key else subjects.session_of_key(other.key)[1]

    async def _find_any(self, tenant: str, request_id: str) -> Entry | None:
        """Return an exchange of any session of the tenant."""
        place = await self._log.requests.find(tenant, request_id)
        if place and (entry := await self._find(place.key, request_id, place)):
            return entry
        entry = await self._archive.find(tenant, request_id) if self._archive.connected else None
        return await self._find(entry.key, request_id) if entry else None

    async def _logged(self, key: str, request_ids: Iterable[str]) -> Mapping[str, Feedback | None]:
        """Return the feedback that the log has on these exchanges, by archive ids."""
        index = await self._index(key)
        places = {each: seq for each in request_ids if (seq := index.seqs.get(each))}
        entries = await asyncio.gather(*map(self._log.get, places.values()))
        found: dict[str, Feedback | None] = {}
        for request_id, entry in zip(places, entries, strict=True):
            feedback = entry and _feedback_of(entry, key)
            if feedback and feedback.request_id == request_id:
                found[archive_id(key, request_id)] = feedback.given
        return found

    async def _index(self, key: str) -> FeedbackIndex:
        """Return the session's index up to its last record. It is read once, then continued."""
        head = (await self._snapshots.current(key)).feedback_seq
        index = self._indexes.get(key, FeedbackIndex())
        if head < index.head:  # it was erased, or the log was lost
            index = FeedbackIndex()
        newer: dict[str, int] = {}
        async for seq, feedback in self._newest_first(key, head, index.head):
            newer.setdefault(feedback.request_id, seq)
        index = FeedbackIndex(head, index.seqs | newer)
        self._indexes.pop(key, None)  # only now: others may read it meanwhile
        if index.seqs:
            self._indexes[key] = index
        while sum(len(each.seqs) for each in self._indexes.values()) > self._limits.max_indexed:
            self._indexes.popitem(last=False)
        return index

    async def _newest_first(
        self, key: str, seq: int, above: int
    ) -> AsyncIterator[tuple[int, ExchangeFeedback]]:
        """
        Yield the session's feedback from `seq` on back to `above`. Where a sequence is not that of
        feedback, as in a log that was lost in part, the session's records are searched.
        """
        while seq > above:
            entry = await self._log.get(seq)
            if entry is None:  # it was trimmed, and all before it
                return
            feedback = _feedback_of(entry, key)
            if feedback is None:
                entry, feedback = await self._search_back(key, seq, above)
            if entry is None or feedback is None:
                return
            yield entry.seq, feedback
            seq = min(feedback.before, entry.seq - 1)

    async def _search_back(
        self, key: str, seq: int, above: int
    ) -> tuple[Entry | None, ExchangeFeedback | None]:
        before = await self._log.stream.before(subjects.log(key), seq)
        async for entry in self._log.walk_back(before, above):
            if feedback := _feedback_of(entry, key):
                return entry, feedback
        return None, None


def _feedback_of(entry: Entry, key: str) -> ExchangeFeedback | None:
    """Return the feedback that the record has, if it is one of this session."""
    if entry.key != key or not isinstance(entry.record, history.Described):
        return None
    feedback = entry.record.feedback
    return None if feedback is UNSET else feedback


def _with(entry: Entry, found: Mapping[str, Feedback | None]) -> Entry:
    id_ = archive_id(entry.key, entry.request_id)
    if not isinstance(entry.record, Exchange) or id_ not in found:
        return entry
    return entry._replace(record=replace(entry.record, feedback=found[id_]))


def _feedback_bytes(entry: Entry) -> int:
    feedback = entry.record.feedback if isinstance(entry.record, Exchange) else None
    return len(encode(feedback)) if feedback else 0


def _content(feedback: Feedback | None) -> Feedback | None:
    """Return the feedback without the time at which it was given."""
    return feedback and replace(feedback, given_at=None)
