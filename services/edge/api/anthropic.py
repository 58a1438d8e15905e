"""
Anthropic's API: `POST /v1/messages` and `/v1/messages/count_tokens`.
https://docs.anthropic.com/en/api/messages
"""

import logging
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import msgspec
from litestar import post
from litestar.types import ASGIApp
from msgspec import Struct
from msgspec.structs import replace

from services.client.chat_client import new_request_id
from services.contract import prompts, subjects
from services.contract.errors import ServiceError, shutting_down
from services.contract.messages import (
    AnswerEvent,
    Done,
    Started,
    StreamEvent,
    Token,
    ToolCallDelta,
    Usage,
)
from services.contract.tokens import TokenCount
from services.edge import errors
from services.edge.api.anthropic_body import MessagesBody
from services.edge.api.completion import check_length, respond_whole, session_of
from services.edge.api.models import ask_worker
from services.edge.api.openai_chat import chat_request
from services.edge.context import Tenant, TheEdge
from services.edge.errors import AnyRequest
from services.edge.sse import AnswerEvents, SseResponse, ToError, data_line, read_to_end

Fields = dict[str, Any]
BlockType = Literal["text", "thinking", "tool_use"]
StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
SIGNATURE = "finetunellm"
"""Of thinking blocks: clients send it back with the block, and it is not read."""
NO_USAGE = Usage(0, 0, 0)

log = logging.getLogger(__name__)


class MessageUsage(Struct, frozen=True):
    """Tokens; those of the prompt that were cached are not among `input_tokens`."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int = 0

    @classmethod
    def of(cls, usage: Usage) -> "MessageUsage":
        uncached = usage.prompt_tokens - usage.cached_tokens
        return cls(uncached, usage.completion_tokens, usage.cached_tokens)


class MessageObject(Struct, frozen=True, kw_only=True):
    """An answer."""

    id: str
    model: str
    content: tuple[Fields, ...] = ()
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None
    usage: MessageUsage
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"


class InputTokens(Struct, frozen=True):
    input_tokens: int


@post("/v1/messages", status_code=200)
async def messages(request: AnyRequest, edge: TheEdge, tenant: Tenant) -> ASGIApp:
    body = await _read(request, edge, tenant)
    if body.max_completion_tokens is None and body.max_tokens is None:
        raise ServiceError("invalid_request", "The field `max_tokens` is missing.")
    chat = chat_request(body, session_of(request, body))
    chat = replace(chat, request_id=new_request_id())
    log.info("message started answer=%s", chat.request_id)
    info = edge.workers.find_model(body.model)
    builder = MessageBuilder(f"msg_{chat.request_id}", body.model or (info.name if info else ""))
    events = edge.chat_client(tenant).stream(chat)
    if body.stream:
        encoder = MessageEncoder(builder)
        return SseResponse([events], encoder, edge.workers.to_error, edge.limits)
    return await respond_whole(request, _collect(builder, events, edge.workers.to_error))


@post("/v1/messages/count_tokens", status_code=200)
async def count_message_tokens(request: AnyRequest, edge: TheEdge, tenant: Tenant) -> InputTokens:
    """Return the number of prompt tokens of a message with this body."""
    body = await _read(request, edge, tenant)
    chat = chat_request(body, "")
    prompts.check(chat)
    reply = await ask_worker(edge, tenant, body.model, subjects.count, chat, TokenCount)
    return InputTokens(reply.tokens)


async def _read(request: AnyRequest, edge: TheEdge, tenant: str) -> MessagesBody:
    body = await edge.bodies.read(request, MessagesBody)
    check_length(edge, tenant, "messages", len(body.messages), body.model)
    return body


class MessageBuilder:
    """
    Builds a message and its events from those of an answer: each run of a channel, and each call,
    is a block. `start` comes first, then `push` for each part, and `finish`.
    """

    def __init__(self, message_id: str, model: str) -> None:
        self._id = message_id
        self._model = model
        self._blocks: list[Fields] = []
        self._open: BlockType | None = None

    def start(self, usage: Usage) -> Fields:
        message = MessageObject(id=self._id, model=self._model, usage=MessageUsage.of(usage))
        return {"type": "message_start", "message": message}

    def push(self, event: AnswerEvent) -> Iterator[Fields]:
        match event:
            case Token(channel="content", text=text) if text:
                yield from self._text("text", {"text": ""})
                yield self._delta("text", "text_delta", text)
            case Token(text=text) if text:
                yield from self._text("thinking", {"thinking": "", "signature": ""})
                yield self._delta("thinking", "thinking_delta", text)
            case ToolCallDelta():
                yield from self._push_call(event)

    def finish(self, done: Done) -> Iterator[Fields]:
        yield from self._close()
        delta = {"stop_reason": _stop_reason(done), "stop_sequence": done.stop_string}
        usage = MessageUsage.of(done.usage)
        yield {"type": "message_delta", "delta": delta, "usage": usage}
        yield {"type": "message_stop"}

    def message(self, done: Done) -> MessageObject:
        """Return the whole message, after `finish`."""
        return MessageObject(
            id=self._id,
            model=self._model,
            content=tuple(map(_with_input, self._blocks)),
            stop_reason=_stop_reason(done),
            stop_sequence=done.stop_string,
            usage=MessageUsage.of(done.usage),
        )

    def _push_call(self, event: ToolCallDelta) -> Iterator[Fields]:
        if event.name:
            yield from self._begin("tool_use", {"id": event.id, "name": event.name, "input": {}})
            self._blocks[-1]["input"] = ""  # as JSON, until the call is whole
        if event.arguments:
            yield self._delta("input", "input_json_delta", event.arguments, "partial_json")

    def _text(self, kind: BlockType, fields: Fields) -> Iterator[Fields]:
        if self._open != kind:
            yield from self._begin(kind, fields)

    def _begin(self, kind: BlockType, fields: Fields) -> Iterator[Fields]:
        yield from self._close()
        self._open = kind
        self._blocks.append({"type": kind, **fields})
        yield self._event("content_block_start", content_block={"type": kind, **fields})

    def _delta(self, field: str, kind: str, text: str, name: str = "") -> Fields:
        self._blocks[-1][field] += text
        return self._event("content_block_delta", delta={"type": kind, name or field: text})

    def _close(self) -> Iterator[Fields]:
        if self._open == "thinking":
            self._blocks[-1]["signature"] = SIGNATURE
            delta = {"type": "signature_delta", "signature": SIGNATURE}
            yield self._event("content_block_delta", delta=delta)
        if self._open:
            yield self._event("content_block_stop")
        self._open = None

    def _event(self, kind: str, **fields: Any) -> Fields:
        return {"type": kind, "index": len(self._blocks) - 1, **fields}


class MessageEncoder:
    """Writes a message as server-sent events (sse.Encoder), which have the names of their types."""

    headers = ()

    def __init__(self, builder: MessageBuilder) -> None:
        self._builder = builder
        self._is_started = False

    def begin(self) -> bytes:
        return b""  # Started has the prompt's tokens

    def encode(self, number: int, event: StreamEvent) -> bytes:
        match event:
            case Started():
                usage = Usage(event.prompt_tokens, 0, event.cached_tokens)
                return self._start(usage)
            case Token() | ToolCallDelta():
                return self._start(NO_USAGE) + _write(self._builder.push(event))
            case Done():
                return self._start(event.usage) + _write(self._builder.finish(event))
        return b""

    def end(self) -> bytes:
        return b""

    def fail(self, error: ServiceError) -> bytes:
        return _write([errors.anthropic_body(error)])

    def interrupt(self) -> bytes:
        return self.fail(shutting_down())

    def _start(self, usage: Usage) -> bytes:
        if self._is_started:
            return b""
        self._is_started = True
        return _write([self._builder.start(usage), {"type": "ping"}])


async def _collect(
    builder: MessageBuilder, events: AnswerEvents, to_error: ToError
) -> MessageObject:
    """Return the message. Raises ServiceError if its answer fails."""
    done = await read_to_end(events, builder.push, to_error)
    [*builder.finish(done)]
    return builder.message(done)


def _stop_reason(done: Done) -> StopReason:
    """Return Anthropic's reason, which has only `max_tokens` for a loop, a timeout and a cancel."""
    match done.finish_reason:
        case "stop":
            return "stop_sequence" if done.stop_string else "end_turn"
        case "tool_calls":
            return "tool_use"
    return "max_tokens"


def _with_input(block: Fields) -> Fields:
    """Return a tool call with its arguments as an object; `{}` if they are cut."""
    if block["type"] != "tool_use":
        return block
    try:
        arguments = msgspec.json.decode(block["input"])
    except msgspec.DecodeError:
        arguments = {}
    return block | {"input": arguments if isinstance(arguments, dict) else {}}


def _write(events: Iterable[Fields]) -> bytes:
    return b"".join(
        b"event: %b\n%b" % (event["type"].encode(), data_line(msgspec.json.encode(event)))
        for event in events
    )
