"""`/chat`: asks within a session, resumes an answer from anywhere, and cancels it."""

import logging
from typing import Any

import msgspec
from litestar import delete, post
from litestar.params import FromPath
from litestar.types import ASGIApp
from msgspec import Raw, Struct

from services.client.chat_client import new_request_id
from services.client.history_requests import check_connected
from services.contract import prompts, subjects
from services.contract.codec import decode
from services.contract.errors import ServiceError
from services.contract.messages import (
    AnswerEvent,
    ChatRequest,
    Done,
    Progress,
    PromptRequest,
    Started,
    StreamEvent,
    Token,
    ToolCallDelta,
)
from services.edge.context import Edge, Tenant, TheEdge
from services.edge.errors import AnyRequest, trace_field
from services.edge.limits import EdgeLimits
from services.edge.parameters import get, read_query
from services.edge.request_body import check_sizes
from services.edge.sse import (
    END,
    RETRY,
    AnswerEvents,
    SseResponse,
    data_line,
    last_event_id,
    no_content,
    text_json,
)

MISSING_KEY = (
    "POST /chat with Last-Event-ID needs the Idempotency-Key of the original request. Send both, or"
    " resume with GET /chat/{request_id}."
)

log = logging.getLogger(__name__)


class ChatBody(PromptRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of `POST /chat`."""


class ChatQuery(Struct, frozen=True):
    """The query of `POST /chat` and `GET /chat/{request_id}`."""

    progress: bool = False


EXAMPLE = 'Send JSON like {"prompt": "Hello"}.'
FIELDS = f"The fields are {', '.join(ChatBody.__struct_fields__)}."


@post("/chat", status_code=200, query=ChatQuery)
async def chat(request: AnyRequest, edge: TheEdge, tenant: Tenant) -> ASGIApp:
    """
    Answer a prompt. A repeat with the same `Idempotency-Key` gets the same answer, running or
    finished; with `Last-Event-ID` as well, only the events after that one.
    """
    query = read_query(request, ChatQuery)
    prompt = read_prompt(await request.body(), edge.limits)
    key, offset = request.headers.get("idempotency-key"), last_event_id(request)
    answers = edge.stored_answers(tenant)
    if offset and not key:
        raise ServiceError("invalid_request", MISSING_KEY)
    if offset == END:
        return no_content()
    if key and offset:
        request_id, is_new = await answers.find(key, prompt), False
    elif key:
        request_id, is_new = await answers.claim(key, prompt)
    else:
        request_id, is_new = new_request_id(), True
    if not is_new:
        if not offset:
            edge.metrics.on_repeat()
        log.info("chat resumed answer=%s offset=%d", request_id, offset)
        return _respond(edge, answers.rejoin(request_id, offset), request_id, query)
    log.info("chat started answer=%s", request_id)
    chat_request = ChatRequest(
        **msgspec.structs.asdict(prompt), request_id=request_id, grace_s=edge.limits.grace_seconds
    )
    return _respond(edge, edge.chat_client(tenant).stream(chat_request), request_id, query)


@get("/chat/{request_id:str}", query=ChatQuery)
async def resume(
    request: AnyRequest, request_id: FromPath[str], edge: TheEdge, tenant: Tenant
) -> ASGIApp:
    """
    Send the events of an answer after `Last-Event-ID`, or all of them. After the last event the
    status is 204, which stops an EventSource from reconnecting.
    """
    subjects.require_request_id(request_id)
    query, offset = read_query(request, ChatQuery), last_event_id(request)
    if offset == END:
        return no_content()
    log.info("chat resumed answer=%s offset=%d", request_id, offset)
    events = edge.stored_answers(tenant).rejoin(request_id, offset)
    return _respond(edge, events, request_id, query)


@delete("/chat/{request_id:str}", status_code=202)
async def cancel(request_id: FromPath[str], edge: TheEdge, tenant: Tenant) -> dict[str, str]:
    """Cancel an answer. Only its worker knows whether it runs, and a cancel has no reply."""
    subjects.require_request_id(request_id)
    check_connected(edge.bus)
    await edge.chat_client(tenant).cancel(request_id)
    return {"status": "cancelling", "request_id": request_id}


class ChatEncoder:
    """
    Writes `token`, `reasoning` and `tool_call` events, then `done` or `error`. An event's id, which
    a client sends back as Last-Event-ID, is the length of the answer so far, in all channels.

    With `shows_progress`, there are `progress` and `started` events before, which have no id.
    """

    __slots__ = ("_request_id", "_shows_progress")

    def __init__(self, request_id: str, shows_progress: bool = False) -> None:
        self._request_id = request_id
        self._shows_progress = shows_progress

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        return [(b"content-location", f"/chat/{self._request_id}".encode())]

    def begin(self) -> bytes:
        return b""

    def encode(self, number: int, event: StreamEvent) -> bytes:
        if isinstance(event, Token):
            return _text(event)
        match event:
            case ToolCallDelta():
                return _part(event, tool_call=_call(event))
            case Done():
                return b"id: %b\n%b" % (END.encode(), _data(self._done(event)))
            case Progress() if self._shows_progress:
                return _data({"progress": msgspec.structs.asdict(event)})
            case Started() if self._shows_progress:
                return _data({"started": _started(event)})
        return b""

    def end(self) -> bytes:
        return b""

    def fail(self, error: ServiceError) -> bytes:
        return _data({"error": error.message, "code": error.code} | trace_field())

    def interrupt(self) -> bytes:
        """Write no event: the client reconnects with `Last-Event-ID`, to another edge."""
        return RETRY

    def _done(self, event: Done) -> dict[str, Any]:
        content = msgspec.structs.asdict(event)
        del content["length"]  # the ids of the events have it
        return {"done": True, **content, "request_id": self._request_id}


def read_prompt(body: bytes, limits: EdgeLimits) -> PromptRequest:
    """Decode JSON, whatever the content type says: `curl -d` sends it as a form."""
    if not body.strip():
        raise ServiceError("invalid_request", f"The body is empty. {EXAMPLE}")
    try:
        check_sizes(decode(body, dict[str, Raw]), limits)
        prompt = decode(body, ChatBody)
    except ServiceError as error:
        if error.code != "invalid_request":
            raise
        hint = FIELDS if "unknown field" in error.message else EXAMPLE
        raise ServiceError("invalid_request", f"{error} {hint}") from error
    prompts.check(prompt)
    return prompt


def _respond(edge: Edge, events: AnswerEvents, request_id: str, query: ChatQuery) -> ASGIApp:
    encoder = ChatEncoder(request_id, query.progress)
    return SseResponse([events], encoder, edge.workers.to_error, edge.limits)


def _text(event: Token) -> bytes:
    name = "token" if event.channel == "content" else event.channel
    if event.logprobs is None:  # building a dict would double the time of nearly all events
        part = name.encode(), text_json(event.text)
        return b'id: %d\ndata: {"%b":%b}\n\n' % (event.end, *part)
    return _part(event, **{name: event.text})


def _part(event: AnswerEvent, **part: Any) -> bytes:
    more = {} if event.logprobs is None else {"logprobs": event.logprobs}
    return b"id: %d\n%b" % (event.end, _data({**part, **more}))


def _call(event: ToolCallDelta) -> dict[str, Any]:
    """Return the fields as on the bus: `id` and `name` begin a call."""
    begin = {"id": event.id, "name": event.name} if event.name else {}
    return {"index": event.index, **begin, "arguments": event.arguments}


def _started(event: Started) -> dict[str, Any]:
    content = msgspec.structs.asdict(event)
    del content["resume_state"]  # for readers on the bus
    return content


def _data(content: dict[str, Any]) -> bytes:
    return data_line(msgspec.json.encode(content))
