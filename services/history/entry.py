"""A record of the log with its place in it, and how it is shown. Knows neither NATS nor MongoDB."""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, NamedTuple, TypeVar, cast

from msgspec import Struct

from services.contract import subjects
from services.contract.codec import decode, encode
from services.contract.errors import ServiceError
from services.contract.history import Exchange, LogRecord, Message
from services.runtime.streams import Stored

S = TypeVar("S", bound=Struct)

MAX_BYTES = 900_000
"""Of what goes into one NATS message, whose limit is 1 MiB."""


class Unreadable(NamedTuple):
    """Stands where a record can't be read: the log takes what anyone publishes to its subjects."""

    why: str


class Entry(NamedTuple):
    """
    `logged_at` is the log's own clock, in whole milliseconds, as MongoDB keeps it; `key` is the
    session's.
    """

    seq: int
    key: str
    logged_at: datetime
    record: LogRecord | Unreadable


def read(stored: Stored) -> Entry:
    """What the log holds, as it is; never raises."""
    key = subjects.key_of_log(stored.subject)
    record: LogRecord | Unreadable
    try:
        subjects.session_of_key(key)
        record = cast(LogRecord, decode(stored.data, cast(Any, LogRecord)))
        if isinstance(record, Exchange):
            in_milliseconds(record.answered_at)  # not every time with a zone has one in UTC
    except (ServiceError, ValueError, OverflowError) as error:
        record = Unreadable(str(error))
    return Entry(stored.seq, key, in_milliseconds(stored.time), record)


def in_milliseconds(time: datetime) -> datetime:
    return time.astimezone(UTC).replace(microsecond=time.microsecond // 1000 * 1000)


def archive_id(key: str, request_id: str) -> str:
    """The same for every copy of an exchange, however often it was logged."""
    return f"{key}.{request_id}"


def messages(entries: Iterable[Entry], limit: int) -> tuple[Message, ...]:
    """The last `limit` exchanges, oldest first, each once; fewer where they would not fit."""
    by_id: dict[str, Message] = {}
    for entry in sorted(entries, key=lambda entry: (entry.logged_at, entry.seq)):
        if isinstance(entry.record, Exchange):
            by_id.setdefault(
                archive_id(entry.key, entry.record.request_id), _message(entry.key, entry.record)
            )
    return newest_that_fit(list(by_id.values())[-limit:])


def _message(key: str, exchange: Exchange) -> Message:
    return Message(
        id=exchange.request_id,
        session_id=subjects.session_of_key(key)[1],
        user_prompt=exchange.prompt,
        model_response=exchange.response,
        timestamp=in_milliseconds(exchange.answered_at),
        finish_reason=exchange.finish_reason,
        model=exchange.model.name if exchange.model else "",
        usage=exchange.usage,
    )


def newest_that_fit(items: Iterable[S]) -> tuple[S, ...]:
    """The last of these, as many as fit one NATS message."""
    kept: list[S] = []
    room = MAX_BYTES
    for item in reversed(list(items)):
        room -= len(encode(item)) + 1
        if room < 0 and kept:
            break
        kept.append(item)
    return tuple(reversed(kept))
