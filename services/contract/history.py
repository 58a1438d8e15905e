"""Records of the session log, and the requests and replies of the history service."""

from typing import Annotated, Literal, TypeVar

from msgspec import UNSET, Meta, Struct, UnsetType

from services.contract.answer import Run, events_of
from services.contract.conversation import Tool, ToolCall, ToolResults
from services.contract.errors import ErrorCode
from services.contract.messages import (
    AnswerEvent,
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
from services.contract.responses import ResponseRequestId, ResponseTurn, TreeId

Title = Annotated[str, Meta(min_length=1, max_length=200)]
SystemPrompt = Annotated[str, Meta(max_length=16_384)]  # "": no system prompt at all
Metadata = Annotated[
    dict[Annotated[str, Meta(min_length=1, max_length=64)], Annotated[str, Meta(max_length=512)]],
    Meta(max_length=16),
]
Reason = Annotated[str, Meta(min_length=1, max_length=4096)]
Correction = Annotated[str, Meta(min_length=1, max_length=65_536)]
Rating = Literal["up", "down"]
PageLimit = Annotated[int, Meta(ge=1, le=1000)]
# End of a page: a time in milliseconds and a sequence. Opaque to clients
Cursor = Annotated[str, Meta(pattern="^[0-9]{1,14}-[1-9][0-9]{0,17}\\Z")]

T = TypeVar("T")

WINDOW_SLACK = 0.3
"""
Share by which the window of exchanges may grow beyond its size before it is truncated in one step.
Between truncations each prompt starts with the one before, so the worker's prefix cache hits.
"""


class Feedback(Struct, frozen=True, omit_defaults=True):
    """
    What a user thinks of an answer: a rating and a reason, the text that the answer should have
    been, and the request id of another answer to the same prompt, to which this one is preferred.

    `preferred_session` is the session of that answer, if it is another one. Both and `given_at` are
    set by history.
    """

    rating: Rating | None = None
    reason: Reason | None = None
    correction: Correction | None = None
    preferred_to: RequestId | None = None
    preferred_session: SessionId | None = None
    given_at: Timestamp | None = None


class ExchangeFeedback(Struct, frozen=True):
    """
    Feedback on one exchange of a session, which replaces earlier feedback; None deletes it.
    `before` is the sequence of the session's feedback before this one (0: none), so that feedback
    is found without the records in between.
    """

    request_id: str
    given: Feedback | None
    before: int = 0


class Record(Struct, frozen=True, tag_field="type", kw_only=True):
    """
    A message of the log, which has one subject per session. `v` is the version of the format.

    `previous` is the sequence of the session's record before this one (0: none). The stream checks
    it on append, so a session can be read backwards from its last record by direct gets.
    """

    v: int = 1
    previous: int


class Exchange(Record, frozen=True, tag="exchange", kw_only=True):
    """
    A prompt and its response; a part of it if the request was cancelled or failed.

    `epoch` is that of the context it was generated with, `attempt` the attempt that generated it.
    `retry_of` is the request id of the exchange that this one replaces. `stop_string` is the string
    that ended the response, as in Done. `order` is that of the answer's channels (Answer.order).
    The first `prefix_length` characters of the response were given by the request. `turn` belongs
    to a response of `/v1/responses`; without a response, it has items added to a conversation.
    `tools` are those that the model could call. `feedback` is in the log as it was imported; a
    reply of history has the current one.
    """

    request_id: str
    attempt: str = ""  # empty for callers on NATS
    retry_of: str | None = None
    epoch: int
    prompt: str
    response: str
    asked_at: Timestamp
    answered_at: Timestamp
    finish_reason: FinishReason
    model: ModelInfo | None  # None: imported without it
    sampling: Sampling
    usage: Usage
    timings: Timings
    stop_string: str | None = None
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_results: ToolResults = ()
    order: tuple[Run, ...] = ()
    prefix_length: int = 0
    turn: ResponseTurn | None = None
    tools: tuple[Tool, ...] = ()
    feedback: Feedback | None = None

    @property
    def prefix(self) -> str:
        """The part of the response that the request has given."""
        return self.response[: self.prefix_length]

    @property
    def has_answer(self) -> bool:
        """Whether the next prompt can contain the exchange; reasoning alone answers nothing."""
        return len(self.response) > self.prefix_length or bool(self.tool_calls)

    @property
    def as_turn(self) -> Turn:
        """The exchange as the next prompt contains it."""
        return Turn(
            self.request_id,
            self.prompt,
            self.response,
            self.reasoning,
            self.tool_calls,
            self.tool_results,
        )

    def events(self) -> list[AnswerEvent]:
        """Return the events of the generated answer, without token ids."""
        content = self.response[self.prefix_length :]
        return events_of(content, self.reasoning, self.tool_calls, self.order)


class Cleared(Record, frozen=True, tag="cleared", kw_only=True):
    """Empties the session's context; its exchanges stay readable."""

    cleared_at: Timestamp


class Erased(Record, frozen=True, tag="erased", kw_only=True):
    """Deletes the session everywhere, also exchanges that are still being generated."""

    erased_at: Timestamp


class Described(Record, frozen=True, tag="described", kw_only=True):
    """
    Sets title, system prompt and metadata; None removes one, and an absent field leaves it as it
    is. Or sets the feedback on an exchange, which a process of an earlier version takes for a
    description that changes nothing.
    """

    described_at: Timestamp
    title: Title | None | UnsetType = UNSET
    system_prompt: SystemPrompt | None | UnsetType = UNSET
    metadata: Metadata | None | UnsetType = UNSET
    feedback: ExchangeFeedback | UnsetType = UNSET


class Removed(Record, frozen=True, tag="removed", kw_only=True):
    """Deletes one response everywhere, also if it is still being generated."""

    request_id: str
    removed_at: Timestamp


LogRecord = Exchange | Cleared | Erased | Described | Removed


class ContextRequest(Struct, frozen=True):
    """`is_answered`: the caller has a response to store, so a full log does not reject it."""

    session_id: SessionId
    is_answered: bool = False


class Context(Struct, frozen=True):
    """The part of a session that goes into the prompt; ContextReply describes the fields."""

    turns: tuple[Turn, ...] = ()
    epoch: int = 0
    applied_seq: int = 0
    erased: int = 0
    last: str = ""
    system_prompt: str | None = None
    unreplaced: str = ""

    def retried_turn(self, retry_of: str | None) -> str:
        """Return the request id of the turn that a response to a retry replaces; "" if none."""
        is_retry_of_retry = bool(retry_of) and retry_of == self.last
        return (self.unreplaced if is_retry_of_retry else "") or retry_of or ""


class Window(Struct, frozen=True):
    """
    How a context grows by an exchange. `exchanges`: number of turns left after a truncation, which
    happens once there are 30 % more (`WINDOW_SLACK`). `room`: bytes of JSON by which the turns may
    still grow, including each turn's `logged_at`.
    """

    exchanges: int
    room: int


class ContextReply(Context, frozen=True):
    """
    The reply to a ContextRequest: the part of a session that goes into the prompt; turns are oldest
    first. With a `window`, the worker may add the exchanges that it appends itself, and need not
    ask again for a while. None: it asks for each answer.

    `epoch` is the sequence of the session's last Cleared or Erased (0: none), `erased` that of its
    last Erased, `applied_seq` that of its last record. `last` is the request id of the last
    exchange, also if it is not in `turns`; "" if there is none. If that one is a retry without a
    response, `unreplaced` is the request id of the exchange that it was to replace, which stays in
    `turns`. `system_prompt` is the session's own; None: the worker's default.
    """

    window: Window | None = None


def newest_turns(turns: tuple[T, ...], exchanges: int) -> tuple[T, ...]:
    """
    Return the last `exchanges` of the turns if they exceed it by more than `WINDOW_SLACK`, else all
    of them.
    """
    limit = exchanges + max(1, round(WINDOW_SLACK * exchanges))
    return turns if len(turns) <= limit else turns[-exchanges:]


class MessagesRequest(Struct, frozen=True):
    """
    Ask for the last `limit` exchanges of one session or (None) of all the tenant's. `before` is
    the `next` of the page that follows them.
    """

    limit: PageLimit = 20
    session_id: SessionId | None = None
    before: Cursor | None = None


class ExchangeView(Struct, frozen=True):
    """
    An exchange as `GET /messages` returns it. `retried`: another exchange replaces it in the
    context.
    """

    id: str
    session_id: str
    user_prompt: str
    model_response: str
    timestamp: Timestamp
    finish_reason: FinishReason
    model: str  # "": imported without it
    usage: Usage
    timings: Timings = Timings(0, 0, 0)  # all 0: imported without them
    retried: bool = False
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_results: ToolResults = ()
    feedback: Feedback | None = None


class ExchangePage(Struct, frozen=True):
    """
    Exchanges, oldest first; fewer than `limit` if more do not fit in one NATS message. `next` is
    the `before` of the page with earlier ones; None: there are none. Not `is_complete`: the session
    had earlier ones, which were dropped because the log was full, or expired.
    """

    messages: tuple[ExchangeView, ...]
    next: Cursor | None = None
    is_complete: bool = True


class ExchangeRequest(Struct, frozen=True):
    """
    Ask for the exchange of one request id of the tenant. In any session it is found for a day, or
    with MongoDB as long as it is kept; in the session that is named, as long as that is stored.
    """

    request_id: RequestId
    session_id: SessionId | None = None


class ClearRequest(Struct, frozen=True):
    """
    Clear the context. Changes are idempotent: a repeat with the same `request_id` within two
    minutes changes nothing, as when a frozen process gets a request that another one has served.
    """

    session_id: SessionId
    request_id: RequestId | None = None


class Session(Struct, frozen=True):
    """
    A session as `GET /sessions` returns it. `title` defaults to the start of its first prompt;
    `system_prompt` is None if the worker's default applies; `exchanges` counts all that are stored,
    also those before it was cleared. `metadata` is what clients keep with it.
    """

    id: str
    title: str
    system_prompt: str | None
    exchanges: int
    last_activity: Timestamp
    metadata: dict[str, str] = {}


class SessionsRequest(Struct, frozen=True):
    """Ask for the tenant's sessions, last active first; `before` is the `next` of the last page."""

    limit: PageLimit = 20
    before: Cursor | None = None


class SessionPage(Struct, frozen=True):
    sessions: tuple[Session, ...]
    next: Cursor | None = None


class Description(Struct, frozen=True, omit_defaults=True):
    """The fields of Described; None removes one, and an absent field leaves it as it is."""

    title: Title | None | UnsetType = UNSET
    system_prompt: SystemPrompt | None | UnsetType = UNSET
    metadata: Metadata | None | UnsetType = UNSET


class DescribeRequest(Struct, frozen=True):
    session_id: SessionId
    description: Description
    request_id: RequestId | None = None


class ExportRequest(Struct, frozen=True):
    """Ask for whole exchanges, oldest first; `after` is the `next` of the last page."""

    session_id: SessionId
    after: Cursor | None = None


class ExportPage(Struct, frozen=True):
    """
    Not `is_complete`, on the first page: earlier ones were dropped, as in ExchangePage.
    `system_prompt` is the session's own, as it is now.
    """

    exchanges: tuple[Exchange, ...]
    next: Cursor | None = None
    is_complete: bool = True
    system_prompt: str | None = None


class Imported(Struct, frozen=True, kw_only=True):
    """
    An exchange in the format of an export; most fields are optional. Imports are idempotent: the
    same `request_id` is one exchange, unless the session was cleared in between.
    """

    request_id: RequestId
    prompt: str
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
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_results: ToolResults = ()
    turn: ResponseTurn | None = None
    tools: tuple[Tool, ...] = ()
    feedback: Feedback | None = None


class ImportRequest(Struct, frozen=True):
    session_id: SessionId
    exchanges: tuple[Imported, ...]


class FeedbackRequest(Struct, frozen=True):
    """
    Set the feedback on an exchange, in place of any earlier one; None deletes it. Of `feedback`,
    history sets `preferred_session` and `given_at`.
    """

    session_id: SessionId
    message_id: RequestId
    feedback: Feedback | None
    request_id: RequestId | None = None


class FeedbackStored(Struct, frozen=True):
    """
    The feedback as it is stored. `model` is the name of the exchange's model ("": unknown). Not
    `is_new`: it was the same before, and nothing was written.
    """

    feedback: Feedback | None
    model: str
    is_new: bool


class DeleteRequest(Struct, frozen=True):
    session_id: SessionId
    request_id: RequestId | None = None


class BranchRequest(Struct, frozen=True):
    """
    Ask for the responses that the next one continues: those up to `request_id`, or, without it, all
    of the conversation. At most the last `limit`.
    """

    tree: TreeId
    request_id: ResponseRequestId | None = None
    limit: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None


class Branch(Struct, frozen=True):
    """
    Responses, oldest first, without those that were removed; not `is_complete` if more would not
    fit into a NATS message. `metadata` is that of the conversation.
    """

    exchanges: tuple[Exchange, ...]
    is_complete: bool
    metadata: dict[str, str]


class RemoveRequest(Struct, frozen=True):
    """Delete one response. It is no error if there is none."""

    request_id: ResponseRequestId


class HistoryStatus(Struct, frozen=True):
    """
    State of the history service. Figures of the log are None while it is not available. Not
    `database_expected`: MONGODB_URI names no MongoDB, and none has been there.

    `unarchived` counts records that MongoDB has not acknowledged, `unreadable` those that could not
    be decoded. `warning` says what is wrong with the log, or that it is nearly full, and what to
    do. `refuses` is the error code with which chats of sessions are rejected; None: they are
    accepted. Figures of the process that replies: requests that wait for their tenant's turn,
    those `overloaded` since its start, and records `dropped` to make room without MongoDB.
    """

    database_connected: bool
    log_records: int | None
    log_bytes: int | None
    unarchived: int | None
    unreadable: int
    log_limit: int | None = None  # bytes; None: no limit but the disk
    warning: str | None = None
    refuses: ErrorCode | None = None
    waiting: int = 0
    overloaded: int = 0
    dropped: int = 0
    database_expected: bool = False
