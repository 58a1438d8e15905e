"""Pages of exchanges and sessions, as many as fit in one NATS message. Pure."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from services.contract import history, responses, subjects
from services.history.context import Snapshot
from services.history.entry import (
    Entry,
    Position,
    archive_id,
    fit_first,
    fit_newest,
    in_milliseconds,
)


class ListedSession(NamedTuple):
    """`position` has the revision of its snapshot as sequence, by which sessions are listed."""

    session: history.Session
    applied_seq: int
    position: Position


def exchange_page(
    entries: Iterable[Entry],
    limit: int,
    max_bytes: int,
    before: Position | None = None,
    is_cut: bool = False,
) -> history.ExchangePage:
    """
    Return the last `limit` exchanges before this position, oldest first; fewer if too large.
    `is_cut`: there may be others before these entries.
    """
    found = _unique(entries)
    retried = {archive_id(entry.key, exchange.retry_of or "") for entry, exchange in found}
    earlier = [each for each in found if before is None or each[0].position < before]
    shown = fit_newest((_view(*each, retried) for each in earlier[-limit:]), max_bytes)
    if len(shown) == len(earlier) and not is_cut:
        return history.ExchangePage(shown)
    first = earlier[-len(shown)] if shown else found[0]
    return history.ExchangePage(shown, first[0].position.cursor)


def export_page(
    entries: Iterable[Entry],
    limit: int,
    max_bytes: int,
    after: Position | None = None,
    is_cut: bool = False,
) -> history.ExportPage:
    """
    Return the first `limit` exchanges after this position; fewer if too large. `is_cut`: there may
    be others after these entries.
    """
    later = [each for each in _unique(entries) if after is None or each[0].position > after]
    shown = fit_first((exchange for _, exchange in later[:limit]), max_bytes)
    if len(shown) == len(later) and not is_cut:
        return history.ExportPage(shown)
    return history.ExportPage(shown, later[len(shown) - 1][0].position.cursor)


def is_complete(key: str, session: Snapshot, found: Iterable[Entry]) -> bool:
    """
    Return whether the entries found at the session's begin are its first ones. Of a tree of
    responses, whose first ones may have been removed, and of a snapshot of an earlier version that
    is unknown, and taken for granted.
    """
    is_unknown = not session.first_seq or responses.is_session(subjects.session_of_key(key)[1])
    return is_unknown or any(entry.seq <= session.first_seq for entry in found)


def session_page(
    listed: Sequence[ListedSession], limit: int, max_bytes: int
) -> history.SessionPage:
    """Return the first `limit` sessions, fewer if too large, in the order of their last records."""
    fitting = fit_first((each.session for each in listed[:limit]), max_bytes)
    shown = listed[: len(fitting)]
    ordered = sorted(shown, key=lambda each: each.applied_seq, reverse=True)
    is_last = len(shown) == len(listed)
    return history.SessionPage(
        tuple(each.session for each in ordered), None if is_last else shown[-1].position.cursor
    )


def listed_session(key: str, snapshot: Snapshot, revision: int) -> ListedSession | None:
    """Return None if the session does not exist, or was erased."""
    if snapshot.active_at is None:
        return None
    session = history.Session(
        id=subjects.session_of_key(key)[1],
        title=snapshot.title or snapshot.opening,
        system_prompt=snapshot.system_prompt,
        exchanges=snapshot.exchanges,
        last_activity=snapshot.active_at,
        metadata=snapshot.metadata or {},
    )
    return ListedSession(session, snapshot.applied_seq, Position(snapshot.active_at, revision))


def _unique(entries: Iterable[Entry]) -> list[tuple[Entry, history.Exchange]]:
    """Return the exchanges among the entries, oldest first, without duplicates."""
    by_id: dict[str, tuple[Entry, history.Exchange]] = {}
    for entry in sorted(entries, key=lambda entry: entry.position):
        if isinstance(entry.record, history.Exchange):
            by_id.setdefault(archive_id(entry.key, entry.request_id), (entry, entry.record))
    return list(by_id.values())


def _view(entry: Entry, exchange: history.Exchange, retried: set[str]) -> history.ExchangeView:
    return history.ExchangeView(
        id=exchange.request_id,
        session_id=subjects.session_of_key(entry.key)[1],
        user_prompt=exchange.prompt,
        model_response=exchange.response,
        timestamp=in_milliseconds(exchange.answered_at),
        finish_reason=exchange.finish_reason,
        model=exchange.model.name if exchange.model else "",
        usage=exchange.usage,
        timings=exchange.timings,
        retried=entry.is_retried or archive_id(entry.key, exchange.request_id) in retried,
        reasoning=exchange.reasoning,
        tool_calls=exchange.tool_calls,
        tool_results=exchange.tool_results,
        feedback=exchange.feedback,
    )
