import re
from datetime import UTC, datetime, timedelta

import pytest

from services.contract import subjects
from services.contract.codec import encode
from services.contract.history import Exchange
from services.history.entry import MAX_BYTES, Entry, Unreadable, messages, read
from services.runtime.streams import Stored
from tests.history.samples import exchange, ids

NOW = datetime(2026, 1, 1, microsecond=123456, tzinfo=UTC)
KEY = subjects.session_key("alice", "holiday")


def entry(seq: int, request_id: str, response: str | None = None, key: str = KEY) -> Entry:
    return Entry(seq, key, NOW + timedelta(seconds=seq), exchange(request_id, 0, response))


def test_a_record_is_read_with_its_place() -> None:
    said = exchange("a")
    assert read(Stored(7, subjects.log(KEY), encode(said), NOW)) == Entry(
        7, KEY, NOW.replace(microsecond=123000), said
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
def test_what_can_not_be_read_says_why(subject: str, data: bytes) -> None:
    record = read(Stored(7, subject, data, NOW)).record
    assert isinstance(record, Unreadable) and record.why


def test_messages_are_the_last_ones_oldest_first() -> None:
    shown = messages([entry(3, "c"), entry(1, "a"), entry(2, "b")], limit=2)
    assert ids(shown) == ["b", "c"]
    assert (shown[0].session_id, shown[0].user_prompt) == ("holiday", "prompt of b")
    assert (shown[0].model_response, shown[0].model) == ("response of b", "demo")


def test_a_message_that_was_logged_twice_is_shown_once_where_it_was_first() -> None:
    assert ids(messages([entry(1, "a"), entry(2, "b"), entry(3, "a")], limit=9)) == ["a", "b"]


def test_one_request_id_in_two_sessions_is_two_messages() -> None:
    other = subjects.session_key("alice", "work")
    assert ids(messages([entry(1, "a"), entry(2, "a", key=other)], limit=9)) == ["a", "a"]


def test_the_time_shown_is_in_utc_and_milliseconds_as_mongodb_has_it() -> None:
    said = exchange("a")
    shown = messages([Entry(1, KEY, NOW, said)], limit=1)[0].timestamp
    assert shown == said.answered_at.replace(
        microsecond=said.answered_at.microsecond // 1000 * 1000
    )


def test_messages_fit_one_nats_message() -> None:
    shown = messages([entry(n, f"r{n}", "ä" * 100_000) for n in range(1, 9)], limit=8)
    assert ids(shown) == ["r5", "r6", "r7", "r8"]
    assert sum(len(encode(message)) for message in shown) < MAX_BYTES


def test_one_message_is_shown_however_long_it_is() -> None:
    assert isinstance(entry(1, "a").record, Exchange)
    assert ids(messages([entry(1, "a", "x" * MAX_BYTES)], limit=1)) == ["a"]


def test_a_time_that_is_none_in_utc_makes_a_record_unreadable() -> None:
    data = re.sub(
        rb'("answered_at":)"[^"]*"', rb'\1"0001-01-01T00:00:00+05:00"', encode(exchange("a"))
    )
    assert isinstance(read(Stored(7, subjects.log(KEY), data, NOW)).record, Unreadable)
