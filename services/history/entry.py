"""Records of the log with their positions. Knows how they are stored, not where."""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, TypeVar, cast

from msgspec import Struct

from services.contract import subjects
from services.contract.codec import decode, encode
from services.contract.errors import ServiceError
from services.contract.history import Cursor, Exchange, LogRecord
from services.runtime.streams import StoredMessage

S = TypeVar("S", bound=Struct)

ENTRY_BYTES = 4096  # memory of a record beside its texts
MIN_READ = 16  # exchanges, whatever their size
UNIX_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Unreadable(NamedTuple):
    """Replaces a record that can't be decoded: anyone may publish to the log's subjects."""

    reason: str


class Entry(NamedTuple):
    """
    A record with its position. `logged_at` is the time of the log's server in whole milliseconds,
    as BSON has it; `key` is the session's key.
    """

    seq: int
    key: str
    logged_at: datetime
    record: LogRecord | Unreadable
    is_retried: bool = False  # only known to MongoDB

    @property
    def position(self) -> "Position":
        return Position(self.logged_at, self.seq)

    @property
    def request_id(self) -> str:
        """The exchange's request id; "" if the record is no exchange."""
        return self.record.request_id if isinstance(self.record, Exchange) else ""


class Position(NamedTuple):
    """Orders the exchanges of a tenant, also if a lost log began again with sequence 1."""

    logged_at: datetime
    seq: int

    @classmethod
    def parse(cls, cursor: Cursor) -> "Position":
        milliseconds, seq = map(int, cursor.split("-"))
        return cls(UNIX_EPOCH + timedelta(milliseconds=milliseconds), seq)

    @property
    def cursor(self) -> Cursor:
        return f"{(self.logged_at - UNIX_EPOCH) // timedelta(milliseconds=1)}-{self.seq}"


def parse_entry(stored: StoredMessage) -> Entry:
    """Decode a message of the log. Never raises: what can't be decoded is Unreadable."""
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


def memory_of(entry: Entry) -> int:
    """Estimate the memory of a record in bytes."""
    if not isinstance(exchange := entry.record, Exchange):
        return ENTRY_BYTES
    texts = len(exchange.response) + len(exchange.reasoning) + len(exchange.prompt)
    if exchange.feedback:
        texts += len(exchange.feedback.correction or "")
    items = (*(exchange.turn.input if exchange.turn else ()), *exchange.tools)
    return ENTRY_BYTES + 2 * texts + sum(len(str(item)) for item in items)


class Reading(list[Entry]):
    """
    The exchanges that are read for one page: at most `limit`, and no more once they take
    `max_bytes` of memory, since a page shows few of them if they are large.
    """

    def __init__(self, limit: int, max_bytes: int) -> None:
        super().__init__()
        self._limit = limit
        self._left = max_bytes

    def add(self, entry: Entry) -> None:
        self.append(entry)
        self._left -= memory_of(entry)

    @property
    def is_full(self) -> bool:
        return len(self) >= self._limit or self.is_cut

    @property
    def is_cut(self) -> bool:
        """Return whether it ended before the limit, so that there may be more."""
        return self._left < 0 and MIN_READ <= len(self) < self._limit


def archive_id(key: str, request_id: str) -> str:
    """Return the exchange's id in MongoDB, the same for every copy of it in the log."""
    return f"{key}.{request_id}"


def fit_newest(items: Iterable[S], max_bytes: int) -> tuple[S, ...]:
    """Return the last items, as many as fit in `max_bytes` of JSON but at least one."""
    return fit_first(reversed(list(items)), max_bytes)[::-1]


def fit_first(items: Iterable[S], max_bytes: int) -> tuple[S, ...]:
    """Return the first items, as many as fit in `max_bytes` of JSON but at least one."""
    fitting: list[S] = []
    for item in items:
        max_bytes -= len(encode(item)) + 1
        if max_bytes < 0 and fitting:
            break
        fitting.append(item)
    return tuple(fitting)
