from datetime import UTC, datetime, timedelta

from msgspec.structs import replace

from services.contract import subjects
from services.contract.codec import encode
from services.contract.history import Exchange, ExchangeView, Session
from services.history import pages
from services.history.context import Snapshot
from services.history.entry import Entry, Position
from services.history.limits import LIMITS
from services.history.pages import ListedSession
from tests.history.samples import exchange, ids

NOW = datetime(2026, 1, 1, microsecond=123000, tzinfo=UTC)
KEY = subjects.session_key("alice", "holiday")

MAX_BYTES = LIMITS.max_page_bytes


def entry(
    seq: int,
    request_id: str,
    response: str | None = None,
    key: str = KEY,
    retry_of: str | None = None,
) -> Entry:
    record = replace(exchange(request_id, 0, response), retry_of=retry_of)
    return Entry(seq, key, NOW + timedelta(seconds=seq), record)


def views_of(entries: list[Entry], limit: int) -> tuple[ExchangeView, ...]:
    return pages.exchange_page(entries, limit, MAX_BYTES).messages


def test_page_has_the_last_exchanges_oldest_first() -> None:
    shown = views_of([entry(3, "c"), entry(1, "a"), entry(2, "b")], limit=2)
    assert ids(shown) == ["b", "c"]
    assert (shown[0].session_id, shown[0].user_prompt) == ("holiday", "prompt of b")
    assert (shown[0].model_response, shown[0].model) == ("response of b", "demo")


def test_duplicate_exchange_is_listed_once_at_its_first_place() -> None:
    assert ids(views_of([entry(1, "a"), entry(2, "b"), entry(3, "a")], limit=9)) == ["a", "b"]


def test_one_request_id_in_two_sessions_is_listed_twice() -> None:
    other = subjects.session_key("alice", "work")
    assert ids(views_of([entry(1, "a"), entry(2, "a", key=other)], limit=9)) == ["a", "a"]


def test_timestamp_is_in_utc_and_whole_milliseconds() -> None:
    record = exchange("a")
    shown = views_of([Entry(1, KEY, NOW, record)], limit=1)[0].timestamp
    assert shown == record.answered_at.replace(
        microsecond=record.answered_at.microsecond // 1000 * 1000
    )


def test_page_fits_in_one_nats_message() -> None:
    shown = views_of([entry(n, f"r{n}", "ä" * 100_000) for n in range(1, 9)], limit=8)
    assert ids(shown) == ["r5", "r6", "r7", "r8"]
    assert sum(len(encode(message)) for message in shown) < MAX_BYTES


def test_page_has_one_exchange_however_large() -> None:
    assert isinstance(entry(1, "a").record, Exchange)
    assert ids(views_of([entry(1, "a", "x" * MAX_BYTES)], limit=1)) == ["a"]


def test_pages_walk_back_without_a_gap() -> None:
    entries = [entry(n, f"r{n}") for n in range(1, 6)]
    page = pages.exchange_page(entries, 2, MAX_BYTES)
    found = [ids(page.messages)]
    while page.next:
        page = pages.exchange_page(entries, 2, MAX_BYTES, Position.parse(page.next))
        found.append(ids(page.messages))
    assert found == [["r4", "r5"], ["r2", "r3"], ["r1"]]


def test_page_after_a_too_large_one_continues_where_it_ended() -> None:
    entries = [entry(n, f"r{n}", "ä" * 200_000) for n in range(1, 4)]
    page = pages.exchange_page(entries, 3, MAX_BYTES)
    assert ids(page.messages) == ["r2", "r3"] and page.next
    assert ids(pages.exchange_page(entries, 3, MAX_BYTES, Position.parse(page.next)).messages) == [
        "r1"
    ]


def test_retry_on_the_later_page_marks_the_exchange() -> None:
    entries = [entry(1, "a"), entry(2, "b"), entry(3, "c", retry_of="b")]
    assert [m.retried for m in views_of(entries, 9)] == [False, True, False]
    (first,) = pages.exchange_page(entries, 1, MAX_BYTES, entries[2].position).messages
    assert (first.id, first.retried) == ("b", True)


def test_export_pages_go_forward_with_whole_exchanges() -> None:
    entries = [entry(n, f"r{n}") for n in (3, 1, 2)]
    page = pages.export_page(entries, 2, MAX_BYTES, None)
    assert [exchange.request_id for exchange in page.exchanges] == ["r1", "r2"] and page.next
    page = pages.export_page(entries, 2, MAX_BYTES, Position.parse(page.next))
    assert [exchange.request_id for exchange in page.exchanges] == ["r3"] and page.next is None


def test_position_is_parsed_from_its_cursor() -> None:
    assert Position.parse(Position(NOW, 7).cursor) == Position(NOW, 7)


def snapshot(seq: int, title: str | None = None) -> Snapshot:
    return Snapshot(applied_seq=seq, active_at=NOW, opening="first prompt", title=title)


def listed(seq: int, revision: int) -> ListedSession:
    found = pages.listed_session(subjects.session_key("alice", f"s{seq}"), snapshot(seq), revision)
    assert found is not None
    return found


def test_title_of_a_session_defaults_to_its_first_prompt() -> None:
    for title in (None, "Holidays"):
        found = pages.listed_session(KEY, snapshot(7, title), 3)
        assert found is not None
        title = title or "first prompt"
        assert found.session == Session("holiday", title, None, 0, NOW)


def test_erased_session_is_not_in_the_list() -> None:
    assert pages.listed_session(KEY, Snapshot(erased=9, epoch=9, applied_seq=9), 3) is None


def test_session_page_is_in_the_order_of_last_records() -> None:
    page = pages.session_page([listed(5, 30), listed(8, 29), listed(2, 28)], 2, MAX_BYTES)
    assert [session.id for session in page.sessions] == ["s8", "s5"]
    assert page.next is not None and Position.parse(page.next).seq == 29
    assert pages.session_page([listed(2, 28)], 2, MAX_BYTES).next is None
