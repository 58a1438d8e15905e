"""A record of the log with its place in it, and how it is shown. Knows neither NATS nor MongoDB."""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, TypeVar, cast

from msgspec import Struct

from services.contract import subjects
from services.contract.codec import decode, encode
from services.contract.errors import ServiceError
from services.contract.history import Cursor, Exchange, Imported, LogRecord
from services.runtime.streams import StoredMessage

S = TypeVar("S", bound=Struct)

MAX_BYTES = 900_000
"""Of what goes into one NATS message, whose limit is 1 MiB."""
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


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
    is_retried: bool = False  # as far as it is known without what comes after it

    @property
    def place(self) -> "Place":
        return Place(self.logged_at, self.seq)


class Place(NamedTuple):
    """Orders the exchanges of a session, and those of a tenant, also where a log was lost."""

    logged_at: datetime
    seq: int

    @classmethod
    def parse(cls, cursor: Cursor) -> "Place":
        milliseconds, seq = map(int, cursor.split("-"))
        return cls(EPOCH + timedelta(milliseconds=milliseconds), seq)

    @property
    def cursor(self) -> Cursor:
        return f"{(self.logged_at - EPOCH) // timedelta(milliseconds=1)}-{self.seq}"


def read(stored: StoredMessage) -> Entry:
    """What the log holds, as it is; never raises."""
    key = subjects.key_of_log(stored.subject)
    record: LogRecord | Unreadable
    try:
        subjects.session_of_key(key)
        record = cast(LogRecord, decode(stored.data, cast(Any, LogRecord)))
    except (ServiceError, ValueError) as error:
        record = Unreadable(str(error))
    return Entry(stored.seq, key, in_milliseconds(stored.time), record)


def in_milliseconds(time: datetime) -> datetime:
    """Return the time in UTC, clamped to the years 1 to 9999, in milliseconds as BSON has it."""
    try:
        utc = time.astimezone(UTC)
    except OverflowError:
        utc = (datetime.min if time.year == 1 else datetime.max).replace(tzinfo=UTC)
    return utc.replace(microsecond=utc.microsecond // 1000 * 1000)


def archive_id(key: str, request_id: str) -> str:
    """The same for every copy of an exchange, however often it was logged."""
    return f"{key}.{request_id}"


def as_exchange(imported: Imported, epoch: int, now: datetime) -> Exchange:
    """`now` where nobody knows when it was."""
    said = imported
    asked_at = said.asked_at or said.answered_at or now
    return Exchange(
        previous=0,
        request_id=said.request_id,
        retry_of=said.retry_of,
        epoch=epoch,
        prompt=said.prompt,
        response=said.response,
        asked_at=asked_at,
        answered_at=said.answered_at or asked_at,
        finish_reason=said.finish_reason,
        model=said.model,
        sampling=said.sampling,
        usage=said.usage,
        timings=said.timings,
        stop_string=said.stop_string,
    )


def newest_that_fit(items: Iterable[S]) -> tuple[S, ...]:
    """The last of these, as many as fit one NATS message."""
    return first_that_fit(reversed(list(items)))[::-1]


def first_that_fit(items: Iterable[S]) -> tuple[S, ...]:
    kept: list[S] = []
    room = MAX_BYTES
    for item in items:
        room -= len(encode(item)) + 1
        if room < 0 and kept:
            break
        kept.append(item)
    return tuple(kept)
