"""
What the log holds of a session, and what history is asked. Frozen msgspec Structs, as all messages.
"""

from typing import Annotated

from msgspec import UNSET, Meta, Struct, UnsetType

from services.contract.errors import ErrorCode
from services.contract.messages import (
    FinishReason,
    ModelInfo,
    RequestId,
    Sampling,
    SessionId,
    Timestamp,
    Timings,
    Turn,
    Usage,
)

Title = Annotated[str, Meta(min_length=1, max_length=200)]
SystemPrompt = Annotated[str, Meta(max_length=16_384)]  # "": none at all
PageLimit = Annotated[int, Meta(ge=1, le=1000)]
# Where a page ends: a time in milliseconds and a sequence. To its readers a word without meaning
Cursor = Annotated[str, Meta(pattern="^[0-9]{1,14}-[1-9][0-9]{0,17}\\Z")]


class Record(Struct, frozen=True, tag_field="type", kw_only=True):
    """
    What the log holds, a subject per session. `v` is the record's version.

    `previous` is the sequence of the session's record before this one (0: none), which the stream
    checks on append; so a session can be walked back from its last record by direct gets.
    """

    v: int = 1
    previous: int


class Exchange(Record, frozen=True, tag="exchange", kw_only=True):
    """
    One prompt and its answer, or as much of it as there was when it was cancelled or failed.

    `epoch` is that of the context it was asked in, `attempt` the one at the request that answered
    it. `retry_of` is the exchange of the session that this one takes the place of. `stop_string`
    is the string that ended the answer, as in Done.
    """

    request_id: str
    attempt: str = ""  # not named by a native caller
    retry_of: str | None = None
    epoch: int
    prompt: str
    response: str
    asked_at: Timestamp
    answered_at: Timestamp
    finish_reason: FinishReason
    model: ModelInfo | None  # None: it was imported, and nobody knows
    sampling: Sampling
    usage: Usage
    timings: Timings
    stop_string: str | None = None


class Cleared(Record, frozen=True, tag="cleared", kw_only=True):
    """The session's context is empty from here on; its exchanges stay readable."""

    cleared_at: Timestamp


class Erased(Record, frozen=True, tag="erased", kw_only=True):
    """What the session was before is deleted everywhere, also what was still being answered."""

    erased_at: Timestamp


class Described(Record, frozen=True, tag="described", kw_only=True):
    """What a person says about the session; None takes it back, and what is left out stays."""

    described_at: Timestamp
    title: Title | None | UnsetType = UNSET
    system_prompt: SystemPrompt | None | UnsetType = UNSET


LogRecord = Exchange | Cleared | Erased | Described


class ContextRequest(Struct, frozen=True):
    """
    `is_answered`: who asks has an answer to store already, so that no lack of room refuses it.
    """

    session_id: SessionId
    is_answered: bool = False


class Context(Struct, frozen=True):
    """
    What the model is shown of a session, oldest first.

    `epoch` is the sequence of the session's last Cleared or Erased (0: never), `erased` that of its
    last Erased, `applied_seq` that of the last record seen. `last` is the request id of the last
    exchange, whether the model is shown it or not; "" if there is none. `system_prompt` is the
    session's own; None: the worker's.
    """

    turns: tuple[Turn, ...] = ()
    epoch: int = 0
    applied_seq: int = 0
    erased: int = 0
    last: str = ""
    system_prompt: str | None = None


class MessagesRequest(Struct, frozen=True):
    """
    The last `limit` exchanges, of one session or (None) of all of the tenant's; with `before`,
    those that come before a page whose `next` it was.
    """

    limit: PageLimit = 20
    session_id: SessionId | None = None
    before: Cursor | None = None


class ExchangeView(Struct, frozen=True):
    """
    An exchange as `GET /messages` shows it. `retried` says that another has taken its place, and
    that the model is not shown it any more.
    """

    id: str
    session_id: str
    user_prompt: str
    model_response: str
    timestamp: Timestamp
    finish_reason: FinishReason
    model: str  # "": it was imported, and nobody knows
    usage: Usage
    retried: bool = False


class ExchangePage(Struct, frozen=True):
    """
    Oldest first; fewer than asked for where they would not fit one NATS message of 1 MiB. `next` is
    the `before` of those that come before them; None: there are none.
    """

    messages: tuple[ExchangeView, ...]
    next: Cursor | None = None


class ExchangeRequest(Struct, frozen=True):
    """Ask for the exchange of one request of the tenant, in any session."""

    request_id: RequestId


class ClearRequest(Struct, frozen=True):
    """
    `request_id`, here and of the other changes: a repeat with the same one, within two minutes,
    changes nothing. A process that was frozen hears late what another has done in its stead.
    """

    session_id: SessionId
    request_id: RequestId | None = None


class Session(Struct, frozen=True):
    """
    As `GET /sessions` shows it. `title` is the beginning of its first prompt, unless one was set;
    `system_prompt` is None where the worker's holds. All that was ever said in it is counted.
    """

    id: str
    title: str
    system_prompt: str | None
    exchanges: int
    last_activity: Timestamp


class SessionsRequest(Struct, frozen=True):
    """The tenant's sessions, the last active first; `before` is the `next` of the page before."""

    limit: PageLimit = 20
    before: Cursor | None = None


class SessionPage(Struct, frozen=True):
    sessions: tuple[Session, ...]
    next: Cursor | None = None


class Description(Struct, frozen=True, omit_defaults=True):
    """What is said about a session; None takes it back, and what is left out stays as it is."""

    title: Title | None | UnsetType = UNSET
    system_prompt: SystemPrompt | None | UnsetType = UNSET


class DescribeRequest(Struct, frozen=True):
    session_id: SessionId
    description: Description
    request_id: RequestId | None = None


class ExportRequest(Struct, frozen=True):
    """Whole exchanges, the oldest first; `after` is the `next` of the page before."""

    session_id: SessionId
    after: Cursor | None = None


class ExportPage(Struct, frozen=True):
    exchanges: tuple[Exchange, ...]
    next: Cursor | None = None


class Imported(Struct, frozen=True, kw_only=True):
    """
    An exchange in the format of an export; most fields are optional. Imports with the same
    `request_id` are one exchange, unless the session was cleared in between.
    """

    request_id: RequestId
    prompt: Annotated[str, Meta(min_length=1)]
    response: str
    asked_at: Timestamp | None = None
    answered_at: Timestamp | None = None
    retry_of: RequestId | None = None
    finish_reason: FinishReason = "stop"
    model: ModelInfo | None = None
    sampling: Sampling = Sampling()
    usage: Usage = Usage(0, 0, 0)
    timings: Timings = Timings(0, 0, 0)
    stop_string: str | None = None


class ImportRequest(Struct, frozen=True):
    session_id: SessionId
    exchanges: tuple[Imported, ...]


class DeleteRequest(Struct, frozen=True):
    session_id: SessionId
    request_id: RequestId | None = None


class HistoryStatus(Struct, frozen=True):
    """
    `unarchived` counts log records that MongoDB has not acknowledged, `unreadable` those that were
    set aside; figures of the log are None while it can't be reached. `warning` says what is wrong
    with the log, or that it is nearly full, and what to do. `refuses` is the error code with which
    chats of sessions are refused at present; None: they are accepted.
    """

    database_connected: bool
    log_records: int | None
    log_bytes: int | None
    unarchived: int | None
    unreadable: int
    log_limit: int | None = None  # bytes; None: it grows with the disk
    warning: str | None = None
    refuses: ErrorCode | None = None
