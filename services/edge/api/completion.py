"""Shared by both completion endpoints of OpenAI's API: from requests to workers to the response."""

import asyncio
import hashlib
import logging
import time
from collections.abc import Collection, Coroutine, Iterable, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple, Protocol

import msgspec
from litestar import Response
from litestar.types import ASGIApp, Receive, Scope, Send
from msgspec import Struct
from msgspec.structs import replace

from services.client.chat_client import new_request_id
from services.client.routing import WorkerDirectory
from services.contract import prompts
from services.contract.errors import ServiceError, shutting_down
from services.contract.messages import (
    AnswerEvent,
    Channel,
    ChatRequest,
    Done,
    Failed,
    StreamEvent,
    Token,
    ToolCallDelta,
    Usage,
)
from services.edge import errors
from services.edge.api.objects import (
    ChatChunk,
    ChatCompletion,
    CompletionDetails,
    CompletionUsage,
    PromptDetails,
    TextCompletion,
)
from services.edge.api.openai_requests import CompletionRequest
from services.edge.api.openai_responses_body import ResponseBody
from services.edge.context import Edge
from services.edge.errors import AnyRequest
from services.edge.limits import EdgeLimits
from services.edge.sse import (
    END,
    RETRY,
    AnswerEvents,
    NumberedEvents,
    SseResponse,
    ToError,
    data_line,
    merge,
    text_json,
    while_connected,
)

DONE = b"data: [DONE]\n\n"
MAX_SESSION_ID_LENGTH = 128  # a longer one is hashed, as it is only compared
RESUMABLE = "x-resumable"
UNIQUE = "\0text\0"
"""Text that no other part of a chunk contains."""
SESSION_HEADERS = ("x-session-id", "x-conversation-id", "x-openwebui-chat-id")

log = logging.getLogger(__name__)


class CompletionObjects(NamedTuple):
    """
    The types of the objects of an endpoint, the prefix of their ids, and the path at which its
    answers can be retrieved.
    """

    id_prefix: str
    chunk: type[Struct]
    completion: type[Struct]
    path: str = ""


CHAT = CompletionObjects("chatcmpl", ChatChunk, ChatCompletion, "/v1/chat/completions/")
TEXT = CompletionObjects("cmpl", TextCompletion, TextCompletion)


class ChoiceBuilder(Protocol):
    """Builds one choice of a completion: `begin`, `chunks` and `end` for a stream, else `add`."""

    def begin(self) -> Iterable[Struct]:
        """Return the first chunks to stream."""

    def chunks(self, event: AnswerEvent) -> Iterable[Struct]:
        """Return the chunks of a part of the answer, which follow from the event alone."""

    def end(self, done: Done) -> Iterable[Struct]:
        """Return the last chunks; the very last one has the finish reason."""

    def add(self, event: AnswerEvent) -> None:
        """Add a part of the answer that is not streamed."""

    def build(self, done: Done) -> Struct:
        """Return the choice of what was added."""


class CompletionEncoder:
    """
    Encodes a completion: as server-sent events (sse.Encoder), or as one object. Each prompt has `n`
    choices; `heading` has the fields of all objects. The events of a resumable one have ids.
    """

    def __init__(
        self,
        objects: CompletionObjects,
        heading: dict[str, Any],
        choices: Sequence[ChoiceBuilder],
        n: int,
        includes_usage: bool,
        headers: Sequence[tuple[bytes, bytes]] = (),
        is_resumable: bool = False,
    ) -> None:
        self.headers = headers
        self._is_resumable = is_resumable
        self._objects = objects
        self._heading = heading
        self._choices = choices
        self._n = n
        # OpenAI's API: null in all chunks but the last, which has no choices
        self._no_usage = {"usage": None} if includes_usage else {}
        self._ends: dict[int, Done] = {}  # by the number of the answer
        self._frames: dict[tuple[int, Channel], list[bytes]] = {}  # by number and channel

    def begin(self) -> bytes:
        chunks = (chunk for choice in self._choices for chunk in choice.begin())
        return b"".join(self._events(chunks))

    def encode(self, number: int, event: StreamEvent) -> bytes:
        match event:
            case Token(logprobs=None) if event.text:
                events = [self._text(number, event)]
            case Token() | ToolCallDelta():
                events = self._events(self._choices[number].chunks(event))
            case Done():
                self._ends[number] = event
                events = self._events(self._choices[number].end(event))
            case _:
                return b""
        if events and events[-1] and self._is_resumable:
            events[-1] = _event_id(event) + events[-1]
        return b"".join(events)

    def end(self) -> bytes:
        if not self._no_usage:
            return DONE
        return self._event((), usage=self._usage()) + DONE

    def fail(self, error: ServiceError) -> bytes:
        """Write an `error` object, which OpenAI's SDKs raise as an exception."""
        return data_line(msgspec.json.encode(errors.body(error))) + DONE

    def interrupt(self) -> bytes:
        return RETRY if self._is_resumable else self.fail(shutting_down())

    async def collect(self, events: NumberedEvents, to_error: ToError) -> Struct:
        """Return the completion. Raises ServiceError if one of its answers fails."""
        async with aclosing(events):
            async for number, event in events:
                match event:
                    case Failed():
                        raise to_error(event)
                    case Token() | ToolCallDelta():
                        self._choices[number].add(event)
                    case Done():
                        self._ends[number] = event
        choices = tuple(
            choice.build(self._ends[number]) for number, choice in enumerate(self._choices)
        )
        return self._objects.completion(choices=choices, usage=self._usage(), **self._heading)

    def _text(self, number: int, token: Token) -> bytes:
        """
        Return the event of text without logprobs, b"" if there is none. Nearly all events are such,
        and differ only in their text, so the rest of them is encoded once.
        """
        frame = self._frames.get((number, token.channel))
        if frame is None:
            sample = Token(0, UNIQUE, (), channel=token.channel)
            events = self._events(self._choices[number].chunks(sample))
            frame = b"".join(events).split(text_json(UNIQUE))
            self._frames[number, token.channel] = frame
        return text_json(token.text).join(frame)

    def _events(self, chunks: Iterable[Struct]) -> list[bytes]:
        return [self._event((chunk,), **self._no_usage) for chunk in chunks]

    def _event(self, choices: tuple[Struct, ...], **more: Any) -> bytes:
        chunk = self._objects.chunk(choices=choices, **self._heading, **more)
        return data_line(msgspec.json.encode(chunk))

    def _usage(self) -> CompletionUsage:
        """Sum up the usage. Each prompt counts once, however many choices it has."""
        usages = {number: done.usage for number, done in self._ends.items()}
        firsts = [usage for number, usage in usages.items() if number % self._n == 0]
        prompt_tokens = sum(usage.prompt_tokens for usage in firsts)
        cached_tokens = sum(usage.cached_tokens for usage in firsts)
        completion_tokens = sum(usage.completion_tokens for usage in usages.values())
        return CompletionUsage(
            prompt_tokens,
            completion_tokens,
            prompt_tokens + completion_tokens,
            PromptDetails(cached_tokens),
            _details(usages.values()),
        )


def _details(usages: Collection[Usage]) -> CompletionDetails:
    reasoning = sum(usage.reasoning_tokens for usage in usages)
    drafted = sum(usage.drafted_tokens for usage in usages)
    if not drafted:
        return CompletionDetails(reasoning)
    accepted = sum(usage.accepted_tokens for usage in usages)
    return CompletionDetails(reasoning, accepted, drafted - accepted)


async def respond(
    request: AnyRequest,
    edge: Edge,
    tenant: str,
    objects: CompletionObjects,
    body: CompletionRequest,
    chats: Sequence[ChatRequest],
    choices: Sequence[ChoiceBuilder],
) -> ASGIApp:
    """Generate `body.n` answers to each request, and return the response that sends them."""
    n = body.n or 1
    grace = _grace(request, len(chats) * n, edge.limits)
    requests = [_number(each, number, grace) for each in chats for number in range(n)]
    ids = [str(each.request_id) for each in requests]
    user = f" user={body.user!r:.100}" if body.user else ""
    log.info("completion started answers=%s%s", ",".join(ids), user)
    client = edge.chat_client(tenant)
    heading = completion_heading(objects, ids[0], edge.workers, body.model)
    headers = _headers(request, objects, requests)
    encoder = CompletionEncoder(
        objects, heading, choices, n, body.includes_usage, headers, grace > 0
    )
    return await send(request, edge, encoder, [*map(client.stream, requests)], bool(body.stream))


async def send(
    request: AnyRequest,
    edge: Edge,
    encoder: CompletionEncoder,
    answers: Sequence[AnswerEvents],
    is_stream: bool,
) -> ASGIApp:
    """Return the response that sends the answers as a stream, or as one completion."""
    if is_stream:
        return SseResponse(answers, encoder, edge.workers.to_error, edge.limits)
    events = merge(answers, edge.limits.max_queued_events)
    collecting = encoder.collect(events, edge.workers.to_error)
    return await respond_whole(request, collecting, encoder.headers)


async def respond_whole(
    request: AnyRequest,
    collecting: Coroutine[Any, Any, Any],
    headers: Iterable[tuple[bytes, bytes]] = (),
) -> ASGIApp:
    """Return the response with an object, once it is collected. Raises ServiceError."""
    try:
        collected = await while_connected(request.receive, collecting)
    except asyncio.CancelledError:  # by uvicorn, when the drain took too long
        raise shutting_down() from None
    if collected is None:
        return _send_nothing
    named = {name.decode(): value.decode() for name, value in headers}
    return Response(collected, headers=named).to_asgi_response(app=None, request=request)


async def _send_nothing(scope: Scope, receive: Receive, send: Send) -> None:
    """Respond to a client that has disconnected: the access log has no status then."""


def session_of(request: AnyRequest, body: CompletionRequest | ResponseBody) -> str:
    """Return the session that a client names. It only selects the worker, for its prefix cache."""
    given = (request.headers.get(header) for header in SESSION_HEADERS)
    session_id = next(filter(None, given), body.prompt_cache_key or "")
    if len(session_id) > MAX_SESSION_ID_LENGTH:
        return hashlib.sha256(session_id.encode()).hexdigest()
    return session_id


def check_length(edge: Edge, tenant: str, field: str, count: int, model: str | None) -> None:
    """
    Reject a prompt with `count` messages or tokens before any work on it, as each message has at
    least one token. Raises ServiceError(context_length_exceeded), but not for a model that the
    tenant may not use: the error would tell its context window.
    """
    info = edge.rate_limits.visible_workers(tenant).find_model(model)
    if info and count >= info.context:
        raise prompts.context_exceeded(field, f"at least {count}", info.context)


def _number(request: ChatRequest, number: int, grace: float) -> ChatRequest:
    """Return a copy with an id, and a seed of its own, as the same seed gives the same answer."""
    seed = None if request.seed is None else (request.seed + number) % (2**32 - 1)
    return replace(request, request_id=new_request_id(), seed=seed, grace_s=grace)


def _grace(request: AnyRequest, answers: int, limits: EdgeLimits) -> float:
    """
    Return how long an answer goes on without a client; 0: it is cancelled at once. Raises
    ServiceError(invalid_request) if one id can't name the answers.
    """
    if request.headers.get(RESUMABLE, "false").lower() in ("false", "0", ""):
        return 0.0
    if answers > 1:
        message = "A request with X-Resumable has one answer: send `n: 1` and one prompt."
        raise ServiceError("invalid_request", message)
    return limits.grace_seconds


def _headers(
    request: AnyRequest, objects: CompletionObjects, requests: Sequence[ChatRequest]
) -> list[tuple[bytes, bytes]]:
    """Return headers that name the answer, unless there are several or it can't be retrieved."""
    if len(requests) > 1 or not objects.path:
        return []
    request_id = str(requests[0].request_id).encode()
    own = [] if request.headers.get("x-request-id") else [(b"x-request-id", request_id)]
    return [(b"content-location", objects.path.encode() + request_id), *own]


def _event_id(event: StreamEvent) -> bytes:
    """Return the line with the id of an event: what a client sends back as Last-Event-ID."""
    last = END if isinstance(event, Done) else event.end  # type: ignore[union-attr]
    return f"id: {last}\n".encode()


def completion_heading(
    objects: CompletionObjects,
    request_id: str,
    workers: WorkerDirectory,
    model: str | None,
    age_seconds: float = 0.0,
) -> dict[str, Any]:
    """Return the fields that all objects of an answer have."""
    info = workers.find_model(model)  # None: the request will fail with the reason
    return {
        "id": f"{objects.id_prefix}-{request_id}",
        "created": int(time.time() - age_seconds),
        "model": model or (info.name if info else ""),
        "system_fingerprint": f"fp_{info.digest[:12]}" if info else "",
    }
