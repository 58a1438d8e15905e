import re
from datetime import UTC, datetime, timedelta

import pytest

from services.contract import subjects
from services.contract.codec import encode
from services.history import pages
from services.history.entry import Entry, Unreadable, parse_entry
from services.runtime.streams import StoredMessage
from tests.history.samples import exchange

NOW = datetime(2026, 1, 1, microsecond=123456, tzinfo=UTC)
KEY = subjects.session_key("alice", "holiday")


def entry(seq: int, request_id: str, response: str | None = None, key: str = KEY) -> Entry:
    return Entry(seq, key, NOW + timedelta(seconds=seq), exchange(request_id, 0, response))


def test_record_is_parsed_with_its_position() -> None:
    record = exchange("a")
    assert parse_entry(StoredMessage(7, subjects.log(KEY), encode(record), NOW)) == Entry(
        7, KEY, NOW.replace(microsecond=123000), record
    )


@pytest.mark.parametrize(
    ("subject", "data"),
    [
        (subjects.log(KEY), b"not json"),
        (subjects.log(KEY), b'{"type":"later","v":2,"previous":0}'),
        (subjects.log(KEY), encode(exchange("a")).replace(b"+00:00", b"").replace(b'Z"', b'"')),
        ("history.log.alice", encode(exchange("a"))),
        ("history.log.alice._w", encode(exchange("a"))),
    ],
    ids=["no JSON", "unknown type", "time without a zone", "no session", "no UTF-8 in session"],
)
def test_unreadable_record_has_a_reason(subject: str, data: bytes) -> None:
    record = parse_entry(StoredMessage(7, subject, data, NOW)).record
    assert isinstance(record, Unreadable) and record.reason


def test_time_outside_the_range_of_utc_is_clamped() -> None:
    data = re.sub(
        rb'("answered_at":)"[^"]*"', rb'\1"0001-01-01T00:00:00+05:00"', encode(exchange("a"))
    )
    entry = parse_entry(StoredMessage(7, subjects.log(KEY), data, NOW))
    (shown,) = pages.exchange_page([entry], 9, 10_000).messages
    assert shown.timestamp == datetime(1, 1, 1, tzinfo=UTC)
