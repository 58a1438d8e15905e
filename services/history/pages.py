"""What is shown a page at a time: exchanges and sessions, as many as fit one NATS message. Pure."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from services.contract import subjects
from services.contract.history import (
    Exchange,
    ExchangePage,
    ExchangeView,
    ExportPage,
    Session,
    SessionPage,
)
from services.history.context import Snapshot
from services.history.entry import (
    Entry,
    Place,
    archive_id,
    first_that_fit,
    in_milliseconds,
    newest_that_fit,
)


class PagedExchange(NamedTuple):
    """An entry that is an exchange."""

    place: Place
    key: str
    exchange: Exchange
    is_retried: bool


class Listed(NamedTuple):
    """A session, and the revision that its snapshot was found at."""

    session: Session
    applied_seq: int
    place: Place


def messages(entries: Iterable[Entry], limit: int, before: Place | None = None) -> ExchangePage:
    """The last `limit` exchanges before this place, oldest first; fewer where they don't fit."""
    found = _unique(entries)
    retried = {archive_id(said.key, said.exchange.retry_of or "") for said in found}
    earlier = [said for said in found if before is None or said.place < before]
    shown = newest_that_fit(_message(said, retried) for said in earlier[-limit:])
    if len(shown) == len(earlier):
        return ExchangePage(shown)
    return ExchangePage(shown, earlier[-len(shown)].place.cursor)


def exchanges(entries: Iterable[Entry], limit: int, after: Place | None) -> ExportPage:
    """The first `limit` exchanges after this place; fewer where they don't fit."""
    later = [said for said in _unique(entries) if after is None or said.place > after]
    shown = first_that_fit(said.exchange for said in later[:limit])
    if len(shown) == len(later):
        return ExportPage(shown)
    return ExportPage(shown, later[len(shown) - 1].place.cursor)


def sessions(listed: Sequence[Listed], limit: int) -> SessionPage:
    """The first `limit` of these, as many as fit; those saved together by their last records."""
    shown = listed[: len(first_that_fit(each.session for each in listed[:limit]))]
    ordered = sorted(shown, key=lambda each: each.applied_seq, reverse=True)
    page = tuple(each.session for each in ordered)
    return SessionPage(page, None if len(shown) == len(listed) else shown[-1].place.cursor)


def listed(key: str, snapshot: Snapshot, revision: int) -> Listed | None:
    """None if there is no such session: it never was, or was erased."""
    if snapshot.active_at is None:
        return None
    session = Session(
        id=subjects.session_of_key(key)[1],
        title=snapshot.title or snapshot.opening,
        system_prompt=snapshot.system_prompt,
        exchanges=snapshot.exchanges,
        last_activity=snapshot.active_at,
    )
    return Listed(session, snapshot.applied_seq, Place(snapshot.active_at, revision))


def _unique(entries: Iterable[Entry]) -> list[PagedExchange]:
    """The exchanges among them, oldest first, each once."""
    by_id: dict[str, PagedExchange] = {}
    for entry in sorted(entries, key=lambda entry: entry.place):
        if isinstance(entry.record, Exchange):
            said = PagedExchange(entry.place, entry.key, entry.record, entry.is_retried)
            by_id.setdefault(archive_id(entry.key, entry.record.request_id), said)
    return list(by_id.values())


def _message(said: PagedExchange, retried: set[str]) -> ExchangeView:
    exchange = said.exchange
    return ExchangeView(
        id=exchange.request_id,
        session_id=subjects.session_of_key(said.key)[1],
        user_prompt=exchange.prompt,
        model_response=exchange.response,
        timestamp=in_milliseconds(exchange.answered_at),
        finish_reason=exchange.finish_reason,
        model=exchange.model.name if exchange.model else "",
        usage=exchange.usage,
        retried=said.is_retried or archive_id(said.key, exchange.request_id) in retried,
    )
